'use strict';

/* The page of a what-if analysis. It shows what the JSON holds and computes nothing but ratios of two of its numbers.
 *
 * Every element that shows a number has `data-number` (its path: in the selected point, else in the whole analysis)
 * and `data-value` (JSON.stringify of the number). A ratio has `data-derived` too: the two paths it divides.
 * In a comparison `data-side` says whose point is meant. Text from the analysis is only ever set as textContent;
 * Plotly reads some HTML in its labels, so what it gets is escaped, and the tooltips are our own.
 */
(() => {
  // ── The analysis ──────────────────────────────────────────────────────────────────────────────────────────────

  const { intensities, ...data } = JSON.parse(document.getElementById('analysis').textContent);
  for (const point of data.points) {
    if (point.intensity)
      point.intensity = point.intensity.map((index) => (index === null ? null : intensities[index]));
  }

  const keyOf = (device, workload, budget) => JSON.stringify([device, workload, budget]);
  const pointAt = new Map(
    data.points.map((point) => [keyOf(point.device, point.workload, point.budget), point]),
  );
  const hasDamage = data.damage_kind !== 'prior';
  const METRIC = { flops: 'FLOPs', latency: 'time', bytes: 'weight bytes', params: 'parameters' }[
    data.metric
  ];
  const SCOPE = data.scope === 'model' ? 'the whole model' : 'the projections that may be compressed';
  const BINDS = ['compute', 'bandwidth', 'launch'];
  const BINDS_SYMBOLS = { compute: 'circle', bandwidth: 'square', launch: 'triangle-up' };
  const BINDS_WORDS = { compute: 'Compute', bandwidth: 'Memory bandwidth', launch: 'Launches' };

  /** A selection with everything it names. `point` is never missing: the renderer of the file has checked. */
  function viewOf(selection, side) {
    const device = data.devices.findIndex((each) => each.name === selection.device);
    const smallest = data.smallest.findIndex(
      (each) => each.device === selection.device && each.workload === selection.workload,
    );
    return {
      side,
      selection,
      deviceIndex: device,
      device: data.devices[device],
      smallestIndex: smallest,
      budgetIndex: data.budgets.indexOf(selection.budget),
      workload: data.workloads.find((each) => each.name === selection.workload),
      point: pointAt.get(keyOf(selection.device, selection.workload, selection.budget)),
    };
  }

  /** The number at a path such as `phases.0.ms`, in the point or else in the analysis; null where there is none. */
  function resolve(view, path) {
    const walk = (from) => path.split('.').reduce((value, name) => value?.[name], from);
    return walk(view.point) ?? walk(data) ?? null;
  }

  // ── Numbers as text ───────────────────────────────────────────────────────────────────────────────────────────

  const GAP = '\u202f';
  const three = new Intl.NumberFormat('en', { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
  const whole = new Intl.NumberFormat('en');

  const PREFIXES = [
    [1e18, 'E'],
    [1e15, 'P'],
    [1e12, 'T'],
    [1e9, 'G'],
    [1e6, 'M'],
    [1e3, 'k'],
  ];
  const COUNTS = [
    [1e12, 'T'],
    [1e9, 'B'],
    [1e6, 'M'],
    [1e3, 'k'],
  ];

  /** [digits, unit], three significant digits: the prefix is chosen after rounding, so that 999.9 k reads 1.00 M. */
  function scaled(value, unit, steps) {
    const rounded = Math.abs(Number(value.toPrecision(3)));
    const step = steps.find(([size]) => rounded >= size);
    if (step) return [three.format(value / step[0]), step[1] + unit];
    return [Number.isInteger(value) ? whole.format(value) : three.format(value), unit];
  }

  const FORMAT = {
    times: (value) => [value < 1000 ? three.format(value) : whole.format(Math.round(value)), '×'],
    ms: (value) =>
      value >= 999.5
        ? [three.format(value / 1e3), 's']
        : value >= 0.9995
          ? [three.format(value), 'ms']
          : [three.format(value * 1e3), 'µs'],
    ns: (value) => FORMAT.ms(value / 1e6),
    percent: (value) => [(value * 100).toFixed(Math.abs(value) < 0.0995 && value !== 0 ? 2 : 1), '%'],
    /** Four significant digits, never fewer than the value: the digits, given as a budget, must be feasible. */
    percentUp: (value) => {
      const near = Number(value.toPrecision(4));
      const step = 10 ** (Math.floor(Math.log10(value)) - 3);
      return [String(Number(((near < value ? near + step : near) * 100).toPrecision(4))), '%'];
    },
    part: (value) => [(value * 100).toFixed(1), '%'],
    flop: (value) => scaled(value, 'FLOP', PREFIXES),
    flops: (value) => scaled(value, 'FLOP/s', PREFIXES),
    bandwidth: (value) => scaled(value, 'B/s', PREFIXES),
    bytes: (value) => scaled(value, 'B', PREFIXES),
    params: (value) => scaled(value, '', COUNTS),
    rate: (value) => scaled(value, '/s', PREFIXES),
    count: (value) => [whole.format(value), ''],
    intensity: (value) => scaled(value, 'FLOP/B', PREFIXES),
    nats: (value) => [value >= 0.001 || value === 0 ? three.format(value) : value.toExponential(2), ''],
    gap: (value) => {
      if (value === 0) return ['0', ''];
      const [digits, exponent] = value.toExponential(1).split('e');
      const raised = [...String(Number(exponent))]
        .map((c) => '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'['-0123456789'.indexOf(c)])
        .join('');
      return [`${digits}${GAP}×${GAP}10${raised}`, ''];
    },
    budget: (text) => {
      const share = shareOfBudget(text);
      return share === null ? [text, ''] : [String(Number((share * 100).toPrecision(6))), '%'];
    },
  };

  /** 0.25 of "0.25" and of "25%"; null of an amount such as "12ms", which is shown as it is. */
  function shareOfBudget(text) {
    const match = /^\s*\+?([\d.]+(?:e[+-]?\d+)?)\s*(%?)\s*$/i.exec(text);
    return match ? Number(match[1]) / (match[2] ? 100 : 1) : null;
  }

  const shares = data.budgets.map(shareOfBudget);
  const numeric = shares.every((share) => share !== null);
  const BUDGET_KIND = numeric ? 'share' : shares.some((share) => share !== null) ? 'share or amount' : 'amount';

  const inWords = ([digits, unit]) => (unit ? digits + (unit === '×' ? '' : GAP) + unit : digits);
  const budgetInWords = (text) => inWords(FORMAT.budget(text));

  // ── Elements ──────────────────────────────────────────────────────────────────────────────────────────────────

  const $ = (id) => document.getElementById(id);

  function el(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === 'style')
        for (const [key, entry] of Object.entries(value)) element.style.setProperty(key, entry);
      else if (name in element) element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== ''));
    return element;
  }

  /** The one way a number gets onto the page: its text beside its exact value and where that came from. */
  function numberElement(
    view,
    path,
    format,
    { value = resolve(view, path), derived = null, parts = false } = {},
  ) {
    const [digits, unit] = FORMAT[format](value);
    const element = el('span', {}, parts ? digits : inWords([digits, unit]));
    if (parts && unit) element.append(el('span', { className: 'unit' }, (unit === '×' ? '' : GAP) + unit));
    element.dataset.number = path;
    element.dataset.value = JSON.stringify(value);
    element.dataset.side = view.side;
    if (derived) element.dataset.derived = derived;
    return element;
  }

  /** A share such as `flops / flops_dense`, as a number element; null where either is unknown. */
  function shareElement(view, path, above, below, format, options) {
    const [top, bottom] = [resolve(view, above), resolve(view, below)];
    if (top === null || !bottom) return null;
    return numberElement(view, path, format, {
      ...options,
      value: top / bottom,
      derived: `${above}/${below}`,
    });
  }

  // ── State, and the URL that holds it ──────────────────────────────────────────────────────────────────────────

  const SELECTED = ['budget', 'device', 'workload'];
  const first = (list) => list[0].name;
  const known = (list, name) => list.some((each) => each.name === name);

  /** The middle one of the stops that are feasible, since a page should open on an answer. */
  function openingBudget(device, workload) {
    const feasible = data.budgets.filter((budget) => pointAt.get(keyOf(device, workload, budget)).feasible);
    return feasible.length ? feasible[Math.floor((feasible.length - 1) / 2)] : data.budgets.at(-1);
  }

  /** `wanted` where the analysis has it, `otherwise` where it has not. */
  function sanitised(wanted, otherwise) {
    const device = known(data.devices, wanted.device) ? wanted.device : otherwise.device;
    const workload = known(data.workloads, wanted.workload) ? wanted.workload : otherwise.workload;
    return {
      device,
      workload,
      budget: data.budgets.includes(wanted.budget) ? wanted.budget : otherwise.budget,
    };
  }

  function opening() {
    const [device, workload] = [first(data.devices), first(data.workloads)];
    return { device, workload, budget: openingBudget(device, workload), compare: null };
  }

  /** What a comparison starts with: the next device, else another budget, so that there is something to see. */
  function counterpart({ device, workload, budget }) {
    const at = data.devices.findIndex((each) => each.name === device);
    if (data.devices.length > 1)
      return { device: data.devices[(at + 1) % data.devices.length].name, workload, budget };
    return { device, workload, budget: data.budgets.at(-1) };
  }

  function stateOfHash() {
    const hash = new URLSearchParams(location.hash.slice(1));
    const read = (prefix) => Object.fromEntries(SELECTED.map((name) => [name, hash.get(prefix + name)]));
    const start = sanitised(read(''), opening());
    if (!hash.has('budget') && (hash.has('device') || hash.has('workload'))) {
      start.budget = openingBudget(start.device, start.workload);
    }
    return { ...start, compare: hash.has('compare.budget') ? sanitised(read('compare.'), start) : null };
  }

  function hashOfState() {
    const hash = new URLSearchParams();
    for (const name of SELECTED) hash.set(name, state[name]);
    if (state.compare) for (const name of SELECTED) hash.set(`compare.${name}`, state.compare[name]);
    return `#${hash}`;
  }

  let state = stateOfHash();
  let hashTimer = 0;

  /** Browsers refuse hundreds of URL changes in a row, and a dragged slider makes them. */
  function writeHashSoon() {
    clearTimeout(hashTimer);
    hashTimer = setTimeout(() => {
      if (location.hash !== hashOfState()) history.replaceState(null, '', hashOfState());
    }, 120);
  }

  /** Change the selection of side `a` or, in a comparison, `b`. Raises on a name that the analysis does not have. */
  function select(change, side = 'a') {
    const before = side === 'a' ? state : (state.compare ?? counterpart(state));
    const next = { device: before.device, workload: before.workload, budget: before.budget, ...change };
    if (!pointAt.has(keyOf(next.device, next.workload, next.budget))) {
      throw new RangeError(
        `no point for device ${next.device}, workload ${next.workload}, budget ${next.budget}`,
      );
    }
    state = side === 'a' ? { ...state, ...next } : { ...state, compare: next };
    render();
  }

  function compare(on) {
    state = { ...state, compare: on ? (state.compare ?? counterpart(state)) : null };
    render();
  }

  // ── Controls ──────────────────────────────────────────────────────────────────────────────────────────────────

  const controls = { a: buildControls('a'), b: buildControls('b') };

  function buildControls(side) {
    const root = $(`controls-${side}`);
    root.append($('controls-template').content.cloneNode(true));
    const find = (selector) => root.querySelector(selector);
    const [slider, device, workload] = [find('input'), find('.device select'), find('.workload select')];
    const suffix = side === 'a' ? '' : ', second selection';
    for (const [name, input] of Object.entries({ budget: slider, device, workload })) {
      input.id = `${name}-${side}`;
      const label = find(`.${name} label`);
      label.htmlFor = input.id;
      if (suffix) label.append(el('span', { className: 'unseen' }, suffix));
    }
    find('.side').textContent = side.toUpperCase();
    find('output').htmlFor = slider.id;
    slider.max = data.budgets.length - 1;
    slider.disabled = data.budgets.length === 1;
    device.append(...data.devices.map((each) => el('option', { value: each.name }, each.title || each.name)));
    workload.append(...data.workloads.map((each) => el('option', { value: each.name }, each.name)));
    slider.addEventListener('input', () => select({ budget: data.budgets[slider.valueAsNumber] }, side));
    device.addEventListener('change', () => select({ device: device.value }, side));
    workload.addEventListener('change', () => select({ workload: workload.value }, side));
    return {
      slider,
      device,
      workload,
      output: find('output'),
      stops: find('.stops'),
      deviceHelp: find('.device .help'),
      workloadHelp: find('.workload .help'),
    };
  }

  function renderControls(view) {
    const { slider, device, workload, output, stops, deviceHelp, workloadHelp } = controls[view.side];
    slider.value = view.budgetIndex;
    slider.style.setProperty(
      '--position',
      data.budgets.length > 1 ? view.budgetIndex / (data.budgets.length - 1) : 0,
    );
    device.value = view.selection.device;
    workload.value = view.selection.workload;
    output.replaceChildren(numberElement(view, 'budget', 'budget'));
    const words = view.point.feasible
      ? `${inWords(FORMAT.times(view.point.speedup))} as fast as dense`
      : 'infeasible';
    slider.setAttribute(
      'aria-valuetext',
      `${budgetInWords(view.selection.budget)} of ${shares[view.budgetIndex] === null ? '' : 'dense '}${METRIC}, ${words}`,
    );
    renderStops(view, slider, stops);
    deviceHelp.textContent = `${view.device.measured ? 'calibrated' : 'not measured'}, ${view.device.dtype}: ${view.device.source}`;
    deviceHelp.title = deviceHelp.textContent;
    workloadHelp.textContent = [...new Set(view.workload.parts.map((part) => part.phase))].join(' and ');
  }

  // Of the digits and letters of one budget, and the room between two.
  const LABEL_WIDTH = Math.max(44, Math.max(...data.budgets.map((text) => budgetInWords(text).length)) * 6.5 + 10);

  /** Which stops get a label where the first and the last are `width` px apart: the ends, and so many between that none touch. */
  function labelledStops(width) {
    const last = data.budgets.length - 1;
    const every = Math.max(1, Math.ceil((last * LABEL_WIDTH) / Math.max(width, LABEL_WIDTH)));
    return data.budgets.map((_, index) => index === last || (index % every === 0 && last - index >= every));
  }

  function renderStops(view, slider, stops) {
    const last = data.budgets.length - 1;
    const labelled = labelledStops((printing ? PRINTED_WIDTH : slider.clientWidth) - 22);
    stops.replaceChildren(
      ...data.budgets.map((budget, index) => {
        const point = pointAt.get(keyOf(view.selection.device, view.selection.workload, budget));
        const stop = el('div', {
          className: point.feasible ? 'stop' : 'stop infeasible',
          style: { '--position': last ? index / last : 0 },
        });
        if (labelled[index]) stop.append(numberElement(view, `budgets.${index}`, 'budget'));
        return stop;
      }),
    );
  }

  // ── Notices ───────────────────────────────────────────────────────────────────────────────────────────────────

  function renderNotices(views) {
    $('notices').replaceChildren(
      ...views
        .filter((view) => !view.point.feasible)
        .map((view) => {
          const title = views.length > 1 ? `${view.side.toUpperCase()} is infeasible. ` : 'Infeasible. ';
          const notice = el(
            'p',
            { className: `notice of-${view.side}` },
            el('strong', {}, title),
            'No plan keeps ',
            METRIC,
            ' within ',
            numberElement(view, 'budget', 'budget'),
            ': ',
            view.point.reason ?? 'no reason given',
            '. ',
          );
          if (smallestPath(view) && resolve(view, smallestPath(view)) !== null) {
            notice.append(
              'The smallest feasible budget for this device and workload is ',
              numberElement(view, smallestPath(view), 'percentUp'),
              ` of dense ${METRIC}.`,
            );
          }
          return notice;
        }),
    );
  }

  // ── Cards ─────────────────────────────────────────────────────────────────────────────────────────────────────

  const pathIn = (path, view) => (typeof path === 'function' ? path(view) : path);

  /** A row of a card: its value and its number element for a view, and the name of the ratio of two such values. */
  function row(label, path, format, { name = path, dense = null } = {}) {
    const value = (view) => (pathIn(path, view) === null ? null : resolve(view, pathIn(path, view)));
    const element = (view, options) =>
      value(view) === null ? null : numberElement(view, pathIn(path, view), format, options);
    return { label, path, name, value, element, dense };
  }

  /** A row that shows one number of the point as a share of another. */
  function share(label, name, above, below, format) {
    const value = (view) =>
      resolve(view, above) === null || !resolve(view, below)
        ? null
        : resolve(view, above) / resolve(view, below);
    const element = (view, options) => shareElement(view, name, above, below, format, options);
    return { label, path: name, name, value, element, dense: null };
  }

  const smallestPath = (view) => (view.smallestIndex < 0 ? null : `smallest.${view.smallestIndex}.fraction`);

  const CARDS = [
    {
      title: 'Speed-up',
      rows: () => [
        row('end to end', 'speedup', 'times'),
        share('projections alone', 'sites_speedup', 'sites_ms_dense', 'sites_ms', 'times'),
      ],
      note: slowerNote,
    },
    {
      title: 'Time per pass',
      rows: () => [row('compressed', 'ms', 'ms'), row('dense', 'ms_dense', 'ms')],
      bar: ['ms', 'ms_dense'],
    },
    { title: 'Tokens per second', rows: phaseRows },
    {
      title: 'What limits the time',
      rows: () => BINDS.map((name) => row(BINDS_WORDS[name], `binds.${name}`, 'part')),
      stack: true,
    },
    {
      title: 'Peak memory',
      rows: () => [
        row('compressed', 'peak_memory_bytes', 'bytes'),
        row('dense', 'peak_memory_bytes_dense', 'bytes'),
      ],
      note: fitNote,
      fits: true,
      bar: ['peak_memory_bytes', (view) => `devices.${view.deviceIndex}.memory_bytes`],
    },
    {
      title: 'Predicted damage',
      rows: () => [row('', 'damage', 'nats')],
      note: damageNote,
      missing: 'not measured',
    },
    {
      title: 'FLOPs kept',
      rows: () => [
        share('kept', 'flops_kept', 'flops', 'flops_dense', 'percent'),
        row('compressed', 'flops', 'flop'),
        row('dense', 'flops_dense', 'flop'),
      ],
      bar: ['flops', 'flops_dense'],
    },
    {
      title: 'Parameters',
      rows: () => [row('compressed', 'params', 'params'), row('dense', 'params_dense', 'params')],
      bar: ['params', 'params_dense'],
    },
    {
      title: 'Weight bytes',
      rows: () => [row('compressed', 'bytes', 'bytes'), row('dense', 'bytes_dense', 'bytes')],
      bar: ['bytes', 'bytes_dense'],
    },
    {
      title: 'Sites changed',
      rows: () => [row('changed', 'changed', 'count')],
      note: (view) =>
        el('p', { className: 'sub' }, 'of ', numberElement(view, 'sites.length', 'count'), ' projections'),
    },
    {
      title: 'Smallest feasible budget',
      rows: () => [row('', smallestPath, 'percentUp', { name: 'smallest' })],
      always: true,
      note: () => el('p', { className: 'sub' }, `of dense ${METRIC}`),
    },
    {
      title: 'Certified gap',
      rows: () => [row('gap', 'gap', 'gap'), row('plan keeps', 'fraction', 'percent')],
    },
  ];

  /** One row a phase of the workload; phases of two workloads are put side by side by name and order. */
  function phaseRows(views) {
    const named = (view) => {
      const seen = {};
      return (view.point.phases ?? []).map(({ phase }, index) => {
        seen[phase] = (seen[phase] ?? 0) + 1;
        return { name: seen[phase] > 1 ? `${phase} ${seen[phase]}` : phase, index };
      });
    };
    const names = [...new Set(views.flatMap((view) => named(view).map(({ name }) => name)))];
    return names.map((name) => {
      const at = (field) => (view) => {
        const found = named(view).find((each) => each.name === name);
        return found ? `phases.${found.index}.${field}` : null;
      };
      const dense = row('dense', at('tokens_per_s_dense'), 'rate');
      return row(name, at('tokens_per_s'), 'rate', { name: `${name}_tokens_per_s`, dense });
    });
  }

  function fitNote(view) {
    const fits = view.point.fits;
    return el(
      'p',
      { className: fits ? 'sub' : 'sub bad' },
      fits ? 'fits in ' : 'does not fit in ',
      numberElement(view, `devices.${view.deviceIndex}.memory_bytes`, 'bytes'),
    );
  }

  function slowerNote(view) {
    return view.point.speedup < 1 ? el('p', { className: 'sub bad' }, 'slower than dense') : null;
  }

  function damageNote(view) {
    if (view.point.damage === null) return el('p', { className: 'sub' }, 'no weights were seen');
    return el('p', { className: 'sub' }, `${data.damage_unit}, ${data.damage_kind}, before training`);
  }

  function renderCards(views) {
    $('numbers').replaceChildren(
      ...CARDS.map((card) => {
        const body = views.length > 1 ? comparedBody(card, views) : singleBody(card, views[0]);
        return el('article', { className: 'card' }, el('h3', {}, card.title), ...body);
      }),
    );
  }

  function singleBody(card, view) {
    if (!view.point.feasible && !card.always) return [el('p', { className: 'figure words' }, '—')];
    if (card.stack) return [stackedBar(view), stackedKeys(view)];
    const rows = card.rows([view]);
    if (rows.some((each) => each.dense)) return rows.flatMap((each) => phaseLines(each, view, rows.length));
    const [main, ...others] = rows;
    const figure = main.element(view, { parts: true });
    const body = [
      figure
        ? el('p', { className: 'figure' }, figure)
        : el('p', { className: 'figure words' }, card.missing ?? '—'),
    ];
    for (const other of others) body.push(pairLine(other, view));
    if (card.note) body.push(card.note(view));
    if (card.bar) body.push(keptBar(view, ...card.bar));
    return body;
  }

  function pairLine(each, view) {
    const element = each.element(view);
    return element && el('p', { className: 'sub' }, `${each.label} `, element);
  }

  function phaseLines(each, view, count) {
    const figure = el(
      'p',
      { className: count > 1 ? 'figure medium' : 'figure' },
      each.element(view, { parts: true }),
    );
    return [figure, el('p', { className: 'sub' }, `${each.label}, dense `, each.dense.element(view))];
  }

  function keptBar(view, part, of) {
    const full = resolve(view, pathIn(of, view));
    const kept = full ? resolve(view, part) / full : 0;
    return el(
      'div',
      { className: 'bars', 'aria-hidden': 'true' },
      el(
        'div',
        { className: kept > 1 ? 'bar over' : 'bar' },
        el('i', { style: { width: `${Math.min(kept, 1) * 100}%` } }),
      ),
    );
  }

  function stackedBar(view) {
    return el(
      'div',
      { className: 'bar stack', 'aria-hidden': 'true' },
      ...BINDS.map((name) =>
        el('i', { style: { width: `${view.point.binds[name] * 100}%`, '--fill': `var(--${name})` } }),
      ),
    );
  }

  function stackedKeys(view) {
    return el(
      'div',
      { className: 'keys' },
      ...BINDS.map((name) =>
        el(
          'div',
          {},
          el('span', { className: 'key', style: { '--fill': `var(--${name})` } }, name),
          numberElement(view, `binds.${name}`, 'part'),
        ),
      ),
    );
  }

  /** Both numbers and their ratio; the other rows of a card become one line with both values. */
  function comparedBody(card, views) {
    if (card.stack)
      return [...views.filter((view) => view.point.feasible).map(stackedBar), comparedKeys(views)];
    const rows = card.rows(views);
    if (!rows.length) return [el('p', { className: 'figure words' }, '—')];
    const main = card.rows === phaseRows ? rows : rows.slice(0, 1);
    const named = main.length > 1;
    const table = el(
      'table',
      { className: 'versus' },
      el('tbody', {}, ...main.flatMap((each) => comparedRow(card, each, views, named))),
    );
    const others = rows.slice(main.length).map((each) => bothLine(each, views));
    const misfits =
      'fits' in card
        ? views
            .filter((view) => view.point.fits === false)
            .map((view) => el('p', { className: 'sub bad' }, `${view.side.toUpperCase()} does not fit`))
        : [];
    return [table, ...others, ...misfits];
  }

  /** A's number, B's number and B / A, where both are known and A's is not zero. */
  function comparedRow(card, each, views, named) {
    const values = views.map((view) => (view.point.feasible || card.always ? each.value(view) : null));
    const lines = views.map((view, index) => {
      const element = values[index] === null ? null : each.element(view);
      const none = (view.point.feasible && card.missing) || '—';
      const ratio =
        index === 1 && values[0] && values[1] !== null
          ? numberElement(view, `${each.name}_ratio`, 'times', {
              value: values[1] / values[0],
              derived: 'b/a',
            })
          : '';
      return el(
        'tr',
        { className: `of-${view.side}` },
        el('th', { scope: 'row' }, view.side.toUpperCase()),
        el('td', { className: element ? '' : 'none' }, element ?? none),
        el('td', { className: 'ratio' }, ratio),
      );
    });
    return named ? [el('tr', { className: 'what' }, el('td', { colSpan: 3 }, each.label)), ...lines] : lines;
  }

  function bothLine(each, views) {
    const known = views.filter((view) => view.point.feasible && each.value(view) !== null);
    // One value alone says whose it is.
    const whose = (view) => (known.length < views.length ? `${view.side.toUpperCase()}: ` : '');
    return known.length
      ? el(
          'p',
          { className: 'sub' },
          `${each.label} `,
          ...known.flatMap((view, index) => [index ? ', ' : whose(view), each.element(view)]),
        )
      : null;
  }

  function comparedKeys(views) {
    return el(
      'div',
      { className: 'keys' },
      ...BINDS.map((name) =>
        el(
          'div',
          {},
          el('span', { className: 'key', style: { '--fill': `var(--${name})` } }, name),
          el(
            'span',
            { className: 'both' },
            ...views.map((view) =>
              view.point.feasible ? numberElement(view, `binds.${name}`, 'part') : el('span', {}, '—'),
            ),
          ),
        ),
      ),
    );
  }

  // ── Charts: what they share ───────────────────────────────────────────────────────────────────────────────────

  const CONFIG = {
    displayModeBar: false,
    scrollZoom: false,
    doubleClick: false,
    responsive: false,
    showTips: false,
  };
  const paint = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const SANS = getComputedStyle(document.body).fontFamily;

  /** Plotly reads a little HTML in its labels; a role called `<b>` must read as it is written. */
  const plain = (text) => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');

  function axis(extra) {
    return {
      fixedrange: true,
      zeroline: false,
      showline: false,
      gridcolor: paint('line'),
      gridwidth: 1,
      ticks: '',
      tickfont: { family: SANS, size: 11.5, color: paint('muted') },
      ...extra,
    };
  }
  const axisTitle = (text, standoff) => ({
    text,
    standoff,
    font: { family: SANS, size: 12, color: paint('muted') },
  });

  function layoutOf(width, height, margin, extra) {
    return {
      width,
      height,
      margin,
      paper_bgcolor: 'rgba(0,0,0,0)',
      plot_bgcolor: 'rgba(0,0,0,0)',
      showlegend: false,
      hovermode: 'closest',
      hoverdistance: 24,
      dragmode: false,
      font: { family: SANS, size: 12, color: paint('ink') },
      ...extra,
    };
  }

  const note = (text, extra) => ({
    text,
    showarrow: false,
    font: { family: SANS, size: 11.5, color: paint('muted') },
    ...extra,
  });

  /** Draw into `#id`, or say in words why there is nothing to draw. */
  function draw(id, figure, why) {
    const [chart, blank] = [$(id), $(`${id}-blank`)];
    const empty = figure === null;
    (id === 'heatmap' ? $('heatmap-scroller') : chart).hidden = empty;
    blank.hidden = !empty;
    blank.textContent = empty ? why : '';
    if (empty) {
      Plotly.purge(chart);
      listening.delete(id);
      return Promise.resolve();
    }
    return Plotly.react(chart, figure.traces, figure.layout, CONFIG).then(() => listen(id, chart));
  }

  const listening = new Set();
  const onHover = {};
  const onClick = {};

  function listen(id, chart) {
    if (listening.has(id)) return;
    listening.add(id);
    chart.on('plotly_hover', (event) => showTooltip(onHover[id]?.(event.points[0]), event.event));
    chart.on('plotly_unhover', hideTooltip);
    chart.on('plotly_click', (event) => onClick[id]?.(event.points[0]));
  }

  /** `lines`: a title, then [label, value] pairs; a value is text or an element. */
  function showTooltip(lines, event) {
    if (!lines || !event) return hideTooltip();
    const [title, ...pairs] = lines;
    const tooltip = $('tooltip');
    tooltip.replaceChildren(
      el('b', {}, title),
      ...pairs.map(([label, value]) => el('div', {}, el('span', {}, label), el('span', {}, value))),
    );
    tooltip.hidden = false;
    const { clientX: x, clientY: y } = event.touches?.[0] ?? event;
    const { width, height } = tooltip.getBoundingClientRect();
    const left = x + 16 + width > innerWidth - 8 ? x - 16 - width : x + 16;
    const top = y + 16 + height > innerHeight - 8 ? y - 16 - height : y + 16;
    tooltip.style.transform = `translate(${Math.max(8, left)}px, ${Math.max(8, top)}px)`;
    return undefined;
  }

  function hideTooltip() {
    $('tooltip').hidden = true;
    $('tooltip').replaceChildren();
  }

  const nameOf = (view, views) =>
    (views.length > 1 ? `${view.side.toUpperCase()} at ` : '') + budgetInWords(view.selection.budget);

  // ── Trade-off: budget against speed-up, and damage where there is one ─────────────────────────────────────────

  const xOf = (index) => (numeric ? shares[index] * 100 : index);

  function pointsAlong(view) {
    return data.budgets.map((budget) =>
      pointAt.get(keyOf(view.selection.device, view.selection.workload, budget)),
    );
  }

  function tradeoffFigure(views, width) {
    const all = views.map((view) => ({
      view,
      points: pointsAlong(view),
      colour: paint(`side-${view.side}`),
    }));
    const damages = all.some(({ points }) => points.some((point) => point.feasible && point.damage !== null));
    if (!all.some(({ points }) => points.some((point) => point.feasible))) return null;
    const drawn = damages
      ? [
          ['speedup', 'y'],
          ['damage', 'y2'],
        ]
      : [['speedup', 'y']];
    // The marks of the current stops come last: no curve may hide them.
    const traces = [curve, currentStop].flatMap((trace) =>
      all.flatMap((each) => drawn.map(([field, yaxis]) => trace(each, field, yaxis))),
    );
    traces.push(...all.map((each) => infeasibleStops(each, damages)));
    const speeds = all.flatMap(({ points }) =>
      points.filter((point) => point.feasible).map((point) => point.speedup),
    );
    const top = Math.max(...speeds, 1);
    const split = damages ? 0.44 : 0;
    const xs = data.budgets.map((_, index) => xOf(index));
    const pad = Math.max((Math.max(...xs) - Math.min(...xs)) * 0.03, numeric ? 1 : 0.3);
    const narrow = width < 480;
    // A percentage needs little room beside the last tick, an amount half of its own width.
    const margin = { l: narrow ? 44 : 52, r: numeric ? 12 : LABEL_WIDTH / 2, t: 22, b: 46 };
    // Both pads of the axis are 6 % of what lies between them.
    const named = labelledStops((width - margin.l - margin.r) / 1.06);
    return {
      traces,
      layout: layoutOf(
        width,
        damages ? 370 : 330,
        margin,
        {
          xaxis: axis({
            range: [Math.min(...xs) - pad, Math.max(...xs) + pad],
            anchor: damages ? 'y2' : 'y',
            showgrid: false,
            title: axisTitle(`Budget: ${BUDGET_KIND} of ${numeric ? 'dense ' : ''}${METRIC} kept`, 8),
            nticks: narrow ? 6 : 11,
            ...(numeric
              ? { ticksuffix: `${GAP}%` }
              : {
                  tickvals: xs.filter((_, index) => named[index]),
                  ticktext: data.budgets.filter((_, index) => named[index]).map(plain),
                }),
          }),
          yaxis: axis({
            domain: [split + (damages ? 0.1 : 0), 1],
            range: [Math.min(0, ...speeds), top * 1.1],
            ticksuffix: '×',
            nticks: 5,
          }),
          ...(damages && { yaxis2: axis({ domain: [0, split - 0.06], rangemode: 'tozero', nticks: 4 }) }),
          shapes: [
            {
              type: 'line',
              xref: 'paper',
              x0: 0,
              x1: 1,
              yref: 'y',
              y0: 1,
              y1: 1,
              line: { color: paint('line-strong'), width: 1, dash: 'dot' },
            },
            ...all.map(({ view, colour }) => ({
              type: 'line',
              xref: 'x',
              x0: xOf(view.budgetIndex),
              x1: xOf(view.budgetIndex),
              yref: 'paper',
              y0: 0,
              y1: 1,
              line: { color: colour, width: 1 },
              opacity: 0.45,
              layer: 'below',
            })),
          ],
          annotations: [
            note('Speed-up over dense', {
              xref: 'paper',
              x: 0,
              xanchor: 'left',
              yref: 'paper',
              y: 1,
              yanchor: 'bottom',
              yshift: 4,
            }),
            ...(damages
              ? [
                  note(`Predicted damage, ${plain(data.damage_unit)}`, {
                    xref: 'paper',
                    x: 0,
                    xanchor: 'left',
                    yref: 'y2 domain',
                    y: 1,
                    yanchor: 'bottom',
                    yshift: 4,
                  }),
                ]
              : []),
          ],
        },
      ),
    };
  }

  const SOLVED = { type: 'scatter', xaxis: 'x', hoverinfo: 'none', cliponaxis: false };

  function curve({ view, points, colour }, field, yaxis) {
    const at = points
      .map((point, index) => ({ point, index }))
      .filter(({ point }) => point.feasible && point[field] !== null);
    return {
      ...SOLVED,
      yaxis,
      mode: 'lines+markers',
      x: at.map(({ index }) => xOf(index)),
      y: at.map(({ point }) => point[field]),
      customdata: at.map(({ index }) => [view.side, index]),
      // Dashed, so that where the two curves are one, both are seen.
      line: { color: colour, width: 2, dash: view.side === 'a' ? 'solid' : 'dash' },
      marker: { color: paint('surface'), size: 6, line: { color: colour, width: 1.6 } },
    };
  }

  function currentStop({ view, colour }, field, yaxis) {
    // In a comparison B's mark is the smaller, so that both show where both sides stand on one spot.
    const size = !state.compare ? 13 : view.side === 'a' ? 17 : 10;
    const here = view.point.feasible && view.point[field] !== null;
    return {
      ...SOLVED,
      yaxis,
      mode: 'markers',
      x: here ? [xOf(view.budgetIndex)] : [],
      y: here ? [view.point[field]] : [],
      customdata: [[view.side, view.budgetIndex]],
      marker: { color: colour, size, line: { color: paint('surface'), width: state.compare ? 1.5 : 2.5 } },
    };
  }

  /** Crosses on the floor of the chart: stops that were asked for and have no plan. */
  function infeasibleStops({ view, points }, damages) {
    const at = points.map((point, index) => ({ point, index })).filter(({ point }) => !point.feasible);
    return {
      type: 'scatter',
      xaxis: 'x',
      yaxis: damages ? 'y2' : 'y',
      mode: 'markers',
      hoverinfo: 'none',
      cliponaxis: false,
      x: at.map(({ index }) => xOf(index)),
      y: at.map(() => 0),
      customdata: at.map(({ index }) => [view.side, index]),
      marker: {
        symbol: 'x-thin',
        size: at.map(({ index }) => (index === view.budgetIndex ? 12 : 8)),
        line: { color: paint('bad'), width: at.map(({ index }) => (index === view.budgetIndex ? 3 : 1.6)) },
      },
    };
  }

  onHover.tradeoff = ({ customdata: [side, index] }) => {
    const view = viewsNow().find((each) => each.side === side);
    if (!view) return null;
    const there = viewOf({ ...view.selection, budget: data.budgets[index] }, side);
    const title = `Budget ${budgetInWords(data.budgets[index])}, ${there.device.title}`;
    if (!there.point.feasible) return [title, ['infeasible', there.point.reason ?? '']];
    return [
      title,
      ['speed-up', numberElement(there, 'speedup', 'times')],
      ['time', numberElement(there, 'ms', 'ms')],
      ['dense', numberElement(there, 'ms_dense', 'ms')],
      ...(there.point.damage === null ? [] : [['damage', numberElement(there, 'damage', 'nats')]]),
    ];
  };
  onClick.tradeoff = ({ customdata: [side, index] }) => select({ budget: data.budgets[index] }, side);

  function renderTradeoff(views) {
    const figure = tradeoffFigure(views, widthOf('tradeoff'));
    $('tradeoff-caption').textContent =
      'Each mark is a solved plan; choose one by clicking it.' +
      (views.some((view) => pointsAlong(view).some((point) => !point.feasible))
        ? ' A cross is a stop without any plan.'
        : '');
    $('tradeoff').setAttribute(
      'aria-label',
      `Line chart of speed-up${hasDamage ? ' and damage' : ''} against the budget`,
    );
    return draw('tradeoff', figure, 'No stop of the slider is feasible for this device and workload.');
  }

  // ── Heat map: layers down, roles across ───────────────────────────────────────────────────────────────────────

  const TALLEST_CELL = 26;
  const grid = buildGrid();

  /** Row and column of every site. Sites outside the layers come last; a second site of one cell gets a column. */
  function buildGrid() {
    const layers = [...new Set(data.sites.map((site) => site.layer))].sort(
      (a, b) => (a ?? Infinity) - (b ?? Infinity),
    );
    const rowOf = new Map(layers.map((layer, index) => [layer, index]));
    const columns = new Map();
    const siteAt = layers.map(() => []);
    data.sites.forEach((site, index) => {
      for (let copy = 1; ; copy += 1) {
        const key = JSON.stringify([site.role, copy]);
        if (!columns.has(key)) columns.set(key, { index: columns.size, role: site.role, copy });
        const column = columns.get(key).index;
        if (siteAt[rowOf.get(site.layer)][column] === undefined) {
          siteAt[rowOf.get(site.layer)][column] = index;
          return;
        }
      }
    });
    const short = (role) => role.split('.').at(-1);
    const roles = [...columns.values()];
    const taken = (role) =>
      new Set(roles.filter((each) => short(each.role) === short(role)).map((each) => each.role)).size > 1;
    const names = roles.map(
      ({ role, copy }) => (taken(role) ? role : short(role)) + (copy > 1 ? ` ${copy}` : ''),
    );
    return { layers, names, siteAt };
  }

  const overGrid = (make, empty = null) =>
    grid.siteAt.map((cells) =>
      grid.names.map((_, column) => (cells[column] === undefined ? empty : make(cells[column]))),
    );

  const isExcluded = (form) => form === null || form === undefined;

  function formElement(view, index) {
    const form = view.point.forms[index];
    if (form > 0) return el('span', {}, 'rank ', numberElement(view, `forms.${index}`, 'count'));
    return isExcluded(form) ? 'excluded' : form === -1 ? 'dense' : 'removed';
  }

  const keptShare = (site, form) => (form * (site.in + site.out)) / (site.in * site.out);
  const fullRank = (site, form) => (form === -1 ? Math.min(site.in, site.out) : form);

  /** One number a cell: removed in [-1, 0), the kept share in [0, 1), dense in [1, 2), excluded in [2, 3). */
  function bandOf(site, form) {
    if (isExcluded(form)) return 2.5;
    if (form === -1) return 1.5;
    return form === 0 ? -0.5 : Math.min(keptShare(site, form), 0.999);
  }

  function bandScale() {
    const [low, middle, high] = ['share-low', 'share-middle', 'share-high'].map(paint);
    return [
      [0, paint('removed')],
      [0.25, paint('removed')],
      [0.25, low],
      [0.375, middle],
      [0.5, high],
      [0.5, paint('dense')],
      [0.75, paint('dense')],
      [0.75, paint('excluded')],
      [1, paint('excluded')],
    ];
  }

  /** The colour of a place on a scale, as Plotly mixes it: red, green and blue from 0 to 255. */
  function colourAt(scale, place) {
    const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    const next = scale.findIndex(([stop]) => stop > place);
    const [[low, from], [high, to]] = [scale[next - 1], scale[next]];
    const end = channels(to);
    return channels(from).map((channel, index) => channel + ((end[index] - channel) * (place - low)) / (high - low));
  }

  /** Black or white, by the luminance of WCAG: above 0.179 black has the higher contrast, and either has 4.5. */
  function inkOn(colour) {
    const [red, green, blue] = colour
      .map((channel) => channel / 255)
      .map((channel) => (channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? '#000' : '#fff';
  }

  function heatmapFigure(views, width) {
    if (!data.sites.length || views.some((view) => !view.point.feasible)) return null;
    const rows = grid.layers.length;
    // Beside the other two charts it may be as tall as both; below each other it should fit on a screen.
    const cell = Math.min(TALLEST_CELL, Math.max(6, (innerWidth > 900 && !printing ? 770 : 620) / rows));
    const margin = { l: 46, r: 4, t: 8, b: 8 };
    // A screen can scroll to what does not fit, paper cannot.
    const full = printing ? width : Math.max(width, margin.l + margin.r + grid.names.length * 26);
    const column = (full - margin.l - margin.r) / grid.names.length;
    const longest = Math.max(...grid.names.map((name) => name.length)) * 6.2;
    const slanted = longest > column - 6;
    margin.t = slanted ? Math.min(longest * 0.75, 120) + 14 : 24;
    // A slanted name leans out of the map to the right, the last one most.
    const leaning = (name, index) => name.length * 4.6 - (grid.names.length - 1 - index) * column;
    if (slanted) margin.r = Math.min(Math.max(26, ...grid.names.map(leaning)), 120);
    const every = Math.ceil(18 / cell);
    const differing = views.length > 1;
    return {
      traces: [differing ? differenceTrace(views) : formTrace(views[0], cell)],
      layout: layoutOf(full, rows * cell + margin.t + margin.b, margin, {
        xaxis: axis({
          side: 'top',
          showgrid: false,
          tickvals: grid.names.map((_, index) => index),
          ticktext: grid.names.map(plain),
          tickangle: slanted ? -45 : 0,
          ticklabeloverflow: 'allow',
          range: [-0.5, grid.names.length - 0.5],
        }),
        yaxis: axis({ autorange: false, range: [rows - 0.5, -0.5], showgrid: false, ...layerTicks(every) }),
      }),
    };
  }

  /** A label every so many layers that they do not touch: 0, 5, 10 or 0, 10, 20 read better than 0, 3, 6. */
  function layerTicks(every) {
    const step = [1, 2, 5, 10, 20, 50, 100].find((each) => each >= every) ?? every;
    const outside = grid.layers.indexOf(null);
    const shown = grid.layers
      .map((layer, index) => ({ layer, index }))
      .filter(
        ({ layer, index }) =>
          layer === null || (layer % step === 0 && (outside < 0 || outside - index >= every)),
      );
    return {
      tickvals: shown.map(({ index }) => index),
      ticktext: shown.map(({ layer }) => (layer === null ? 'other' : String(layer))),
    };
  }

  const CELLS = { type: 'heatmap', hoverinfo: 'none', showscale: false, hoverongaps: false };
  const cellGap = (cell) => (cell >= 8 ? { xgap: 2, ygap: 1 } : { xgap: 2, ygap: 0.6 });

  function formTrace(view, cell) {
    const { forms } = view.point;
    const scale = bandScale();
    const band = (site) => bandOf(data.sites[site], forms[site]);
    // Plotly has one colour for all words, or picks by a rule of its own that leaves some too pale to read.
    const word = (site) =>
      `<span style="color:${inkOn(colourAt(scale, (band(site) + 1) / 4))}">${shortForm(forms[site])}</span>`;
    const words =
      cell >= 16
        ? {
            text: overGrid((site) => (isExcluded(forms[site]) ? '' : word(site)), ''),
            texttemplate: '%{text}',
            textfont: { family: SANS, size: 10.5 },
          }
        : {};
    return {
      ...CELLS,
      ...cellGap(cell),
      ...words,
      z: overGrid(band),
      zmin: -1,
      zmax: 3,
      colorscale: scale,
    };
  }
  const shortForm = (form) => (form === -1 ? 'dense' : form === 0 ? '–' : String(form));

  function rankDifference(views, site) {
    const [a, b] = views.map((view) => view.point.forms[site]);
    return a === null || b === null ? null : fullRank(data.sites[site], b) - fullRank(data.sites[site], a);
  }

  function differenceTrace(views) {
    // As a share of the site's full rank, or the narrow sites would all look alike beside the wide ones.
    const z = overGrid((site) => {
      const difference = rankDifference(views, site);
      return difference === null ? null : difference / fullRank(data.sites[site], -1);
    });
    const most = Math.max(...z.flat().map((value) => Math.abs(value ?? 0))) || 1;
    return {
      ...CELLS,
      ...cellGap(8),
      z,
      zmin: -most,
      zmax: most,
      colorscale: [
        [0, paint('side-a')],
        [0.5, paint('excluded')],
        [1, paint('side-b')],
      ],
    };
  }

  onHover.heatmap = ({ pointNumber: [line, column] }) => {
    const index = grid.siteAt[line]?.[column];
    const views = viewsNow();
    if (index === undefined || views.some((view) => !view.point.feasible)) return null;
    const lines = [data.sites[index].name, ['in × out', shapeElement(views[0], index)]];
    for (const view of views) {
      const side = views.length > 1 ? `${view.side.toUpperCase()} ` : '';
      const form = view.point.forms[index];
      lines.push([`${side}form`, formElement(view, index)]);
      if (form > 0) lines.push([`${side}kept`, keptElement(view, index, form)]);
    }
    const difference = views.length > 1 ? rankDifference(views, index) : null;
    if (difference !== null)
      lines.push([
        'difference in rank',
        numberElement(views[1], `rank_difference.${index}`, 'count', { value: difference, derived: 'b-a' }),
      ]);
    lines.push(['break-even rank', numberElement(views[0], `sites.${index}.break_even`, 'count')]);
    return lines;
  };

  const shapeElement = (view, index) =>
    el(
      'span',
      {},
      numberElement(view, `sites.${index}.in`, 'count'),
      ' × ',
      numberElement(view, `sites.${index}.out`, 'count'),
    );
  const keptElement = (view, index, form) =>
    el(
      'span',
      {},
      numberElement(view, `kept.${index}`, 'percent', {
        value: keptShare(data.sites[index], form),
        derived: 'kept',
      }),
      ' of dense FLOPs',
    );

  function renderHeatmap(views) {
    const differing = views.length > 1;
    $('heatmap-title').textContent = differing ? 'Difference in rank' : 'Forms and ranks';
    $('heatmap-caption').textContent = differing
      ? differenceCaption(views)
      : 'Every projection, coloured by the share of its dense FLOPs that it keeps.';
    $('heatmap').setAttribute(
      'aria-label',
      `${$('heatmap-title').textContent}, layers down and projections across`,
    );
    const figure = heatmapFigure(views, widthOf('heatmap-scroller'));
    $('heatmap-legend').hidden = figure === null;
    $('heatmap-legend').replaceChildren(...(differing ? differenceKeys() : formKeys(views[0])));
    return draw(
      'heatmap',
      figure,
      data.sites.length ? infeasibleWords(views) : 'The analysis has no projections.',
    );
  }

  function differenceCaption(views) {
    const same =
      views.every((view) => view.point.feasible) &&
      data.sites.every((_, site) => !rankDifference(views, site));
    return same
      ? 'A and B give every projection the same form.'
      : 'Rank in B less rank in A, coloured by its share of the full rank. Dense counts as full rank, removed as none.';
  }

  const key = (label, fill, kind = '') =>
    el('span', { className: `key ${kind}`, style: { '--fill': fill } }, label);

  function formKeys(view) {
    const forms = view.point.forms ?? [];
    return [
      key(
        'low rank: less to more kept',
        'linear-gradient(to right, var(--share-low), var(--share-middle), var(--share-high))',
        'ramp',
      ),
      key('dense', 'var(--dense)'),
      ...(forms.includes(0) ? [key('removed', 'var(--removed)')] : []),
      ...(forms.includes(null) ? [key('excluded', 'var(--excluded)')] : []),
    ];
  }

  const differenceKeys = () => [
    key(
      'more in A, equal, more in B',
      'linear-gradient(to right, var(--side-a), var(--excluded), var(--side-b))',
      'ramp',
    ),
  ];

  function infeasibleWords(views) {
    const bad = views.filter((view) => !view.point.feasible);
    return `Nothing to draw: ${bad.map((view) => nameOf(view, views)).join(' and ')} ${bad.length > 1 ? 'are' : 'is'} infeasible for this selection.`;
  }

  // ── Roofline: what each site reaches, under what its device can give ──────────────────────────────────────────

  const rangeCache = new Map();

  /** Axis ranges of one device and workload over all its budgets, so that a dragged slider moves points, not axes. */
  function rooflineRange({ device, selection }) {
    const cacheKey = keyOf(selection.device, selection.workload, null);
    if (!rangeCache.has(cacheKey)) {
      const range = { x: [Infinity, -Infinity], y: [Infinity, -Infinity] };
      const widen = ([low, high], value) => [Math.min(low, value), Math.max(high, value)];
      const reach = (x, y) => {
        range.x = widen(range.x, Math.log10(x));
        range.y = widen(range.y, Math.log10(y));
      };
      for (const point of data.points) {
        if (point.device !== selection.device || point.workload !== selection.workload) continue;
        for (const entry of point.intensity ?? [])
          if (entry && entry[0] > 0 && entry[1] > 0) reach(entry[0], entry[1]);
      }
      reach(device.peak_flops / device.bandwidth, device.peak_flops);
      rangeCache.set(cacheKey, range);
    }
    return rangeCache.get(cacheKey);
  }

  /** Sites that stand on one spot, of one role and form, are one mark: equal layers would hide each other. */
  function spotsOf(view) {
    const spots = new Map();
    (view.point.intensity ?? []).forEach((entry, index) => {
      if (!entry || !(entry[0] > 0) || !(entry[1] > 0)) return;
      const at = JSON.stringify([entry, data.sites[index].role, view.point.forms[index]]);
      if (!spots.has(at)) spots.set(at, { entry, sites: [], view });
      spots.get(at).sites.push(index);
    });
    return [...spots.values()];
  }

  let spotsShown = [];

  function rooflineFigure(views, width) {
    const feasible = views.filter((view) => view.point.feasible);
    if (!feasible.length || (views.length === 1 && !views[0].point.feasible)) return null;
    spotsShown = feasible.flatMap(spotsOf);
    if (!spotsShown.length) return null;
    const ranges = feasible.map(rooflineRange);
    const merged = (name, low, high) => [
      Math.min(...ranges.map((range) => range[name][0])) - low,
      Math.max(...ranges.map((range) => range[name][1])) + high,
    ];
    const [x, y] = [merged('x', 0.25, 0.45), merged('y', 0.3, 0.35)];
    const devices = feasible.filter(
      (view, index) => feasible.findIndex((each) => each.device === view.device) === index,
    );
    const [height, margin] = [330, { l: width < 480 ? 50 : 58, r: 12, t: 12, b: 48 }];
    const size = { width: width - margin.l - margin.r, height: height - margin.t - margin.b };
    return {
      traces: [
        ...devices.map((view) => ceiling(view, x, views.length > 1)),
        ...BINDS.flatMap((binds) => feasible.map((view) => spotTrace(view, binds))),
      ],
      layout: layoutOf(width, height, margin, {
        xaxis: axis({ type: 'log', range: x, title: axisTitle('FLOPs per byte moved', 8), ...decades(x) }),
        yaxis: axis({ type: 'log', range: y, title: axisTitle('FLOP/s', 6), ...decades(y) }),
        annotations: devices.flatMap((view) => ceilingNotes(view, x, y, size, devices.length > 1)),
      }),
    };
  }

  /** Powers of ten, or 1, 2 and 5 of them where the axis spans too few. */
  function decades([low, high]) {
    const mantissas = high - low < 2.4 ? [1, 2, 5] : [1];
    const every = Math.ceil((high - low) / 7);
    const values = [];
    for (let power = Math.floor(low); power <= high; power += 1) {
      if (power % every === 0) values.push(...mantissas.map((mantissa) => mantissa * 10 ** power));
    }
    const shown = values.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
    const text = (value) => {
      const [size, prefix] = PREFIXES.find(([each]) => value >= each * 0.999) ?? [1, ''];
      return `${Number((value / size).toPrecision(1))}${prefix ? GAP + prefix : ''}`;
    };
    return { tickvals: shown, ticktext: shown.map(text) };
  }

  function ceiling(view, x, comparing) {
    const { peak_flops: peak, bandwidth } = view.device;
    const ends = [10 ** x[0], peak / bandwidth, 10 ** x[1]];
    return {
      type: 'scatter',
      mode: 'lines',
      x: ends,
      y: ends.map((intensity) => Math.min(peak, bandwidth * intensity)),
      hoverinfo: 'skip',
      line: { color: comparing ? paint(`side-${view.side}`) : paint('ink'), width: 1.6 },
      opacity: comparing ? 0.8 : 0.62,
    };
  }

  /** The names of the two ceilings; the slope's is written along it, or left out where the slope is too short. */
  function ceilingNotes(view, x, y, size, several) {
    const { peak_flops: peak, bandwidth } = view.device;
    const whose = several ? `${view.side.toUpperCase()}: ` : '';
    const ridge = Math.log10(peak / bandwidth);
    const start = Math.max(x[0], y[0] - Math.log10(bandwidth));
    const [across, up] = [size.width / (x[1] - x[0]), size.height / (y[1] - y[0])];
    const angle = Math.atan2(up, across);
    const room = Math.min(ridge, x[1]) - start;
    const flat = note(`${whose}peak compute`, {
      xref: 'x',
      x: x[1],
      xanchor: 'right',
      yref: 'y',
      y: Math.log10(peak),
      yanchor: 'bottom',
      yshift: 1,
    });
    const along = start + room / 2;
    const sloped = note(`${whose}memory bandwidth`, {
      xref: 'x',
      x: along,
      yref: 'y',
      y: along + Math.log10(bandwidth),
      xanchor: 'center',
      yanchor: 'middle',
      textangle: (-angle * 180) / Math.PI,
      xshift: -10 * Math.sin(angle),
      yshift: 10 * Math.cos(angle),
    });
    return Math.hypot(room * across, room * up) > 150 ? [flat, sloped] : [flat];
  }

  function spotTrace(view, binds) {
    const spots = spotsShown.filter((spot) => spot.view === view && spot.entry[2] === binds);
    return {
      type: 'scatter',
      mode: 'markers',
      hoverinfo: 'none',
      x: spots.map(({ entry }) => entry[0]),
      y: spots.map(({ entry }) => entry[1]),
      customdata: spots.map((spot) => spotsShown.indexOf(spot)),
      marker: {
        symbol: BINDS_SYMBOLS[binds] + (view.side === 'a' ? '' : '-open'),
        color: paint(binds),
        opacity: 0.72,
        size: spots.map(({ sites }) => Math.min(7 + 1.7 * Math.log2(sites.length), 15)),
        line: {
          color: view.side === 'a' ? paint('surface') : paint(binds),
          width: view.side === 'a' ? 0.8 : 1.6,
        },
      },
    };
  }

  onHover.roofline = ({ customdata }) => {
    const spot = spotsShown[customdata];
    if (!spot) return null;
    const { view, sites, entry } = spot;
    const index = sites[0];
    const lines = [data.sites[index].name];
    if (sites.length > 1)
      lines.push([
        'and the same',
        sites
          .slice(1, 4)
          .map((site) => data.sites[site].name)
          .join(', ') + (sites.length > 4 ? ', …' : ''),
      ]);
    if (state.compare) lines.push(['side', `${view.side.toUpperCase()}, ${view.device.title}`]);
    lines.push(
      ['in × out', shapeElement(view, index)],
      ['form', formElement(view, index)],
      ['intensity', numberElement(view, `intensity.${index}.0`, 'intensity')],
      ['reaches', numberElement(view, `intensity.${index}.1`, 'flops')],
      ['bound by', (BINDS_WORDS[entry[2]] ?? entry[2]).toLowerCase()],
    );
    return lines;
  };

  function renderRoofline(views) {
    const figure = rooflineFigure(views, widthOf('roofline'));
    $('roofline-caption').replaceChildren(
      ...views
        .filter((view, index) => index === 0 || view.device !== views[0].device)
        .flatMap((view, index) => [
          index ? ' ' : '',
          `${view.device.title}: `,
          numberElement(view, `devices.${view.deviceIndex}.peak_flops`, 'flops'),
          ', ',
          numberElement(view, `devices.${view.deviceIndex}.bandwidth`, 'bandwidth'),
          ', ',
          numberElement(view, `devices.${view.deviceIndex}.launch_ns`, 'ns'),
          ' a launch.',
        ]),
    );
    $('roofline-legend').hidden = figure === null;
    $('roofline-legend').replaceChildren(
      ...BINDS.map((name) => key(`bound by ${BINDS_WORDS[name].toLowerCase()}`, `var(--${name})`, BINDS_SYMBOLS[name])),
      ...(views.length > 1 ? [key('filled: A', 'var(--muted)', 'circle'), key('open: B', '', 'ring')] : []),
    );
    $('roofline').setAttribute(
      'aria-label',
      'Roofline of the device with every projection, by floating point operations a byte and a second',
    );
    const why = views.some((view) => view.point.feasible)
      ? 'No projection of this plan runs, so none stands under the roofline.'
      : infeasibleWords(views);
    return draw('roofline', figure, why);
  }

  // ── The sites as a table: what the charts say by colour and to a pointer ──────────────────────────────────────

  /** Filled where it is open: a large model has a row for each of a thousand sites. */
  function renderSites(views) {
    if (!$('sites').open) return $('sites-table').replaceChildren();
    const shown = views.filter((view) => view.point.feasible);
    const head = (text) => el('th', { scope: 'col' }, text);
    const side = (view) => (views.length > 1 ? `${view.side.toUpperCase()}: ` : '');
    return $('sites-table').replaceChildren(
      el(
        'thead',
        {},
        el(
          'tr',
          {},
          head('site'),
          head('in × out'),
          ...shown.flatMap((view) => [head(`${side(view)}form`), head(`${side(view)}bound by`)]),
        ),
      ),
      el('tbody', {}, ...data.sites.map((_, index) => siteRow(views[0], shown, index))),
    );
  }

  function siteRow(view, shown, index) {
    const cells = shown.flatMap((each) => {
      const binds = each.point.intensity?.[index]?.[2];
      return [formElement(each, index), binds ? (BINDS_WORDS[binds] ?? binds).toLowerCase() : '—'];
    });
    return el(
      'tr',
      {},
      el('th', { scope: 'row' }, data.sites[index].name),
      el('td', {}, shapeElement(view, index)),
      ...cells.map((cell) => el('td', {}, cell)),
    );
  }

  // ── All of it ─────────────────────────────────────────────────────────────────────────────────────────────────

  function viewsNow() {
    return state.compare ? [viewOf(state, 'a'), viewOf(state.compare, 'b')] : [viewOf(state, 'a')];
  }

  /** What A4 and Letter have for a chart between the usual margins, in CSS pixels. */
  const PRINTED_WIDTH = 640;
  let printing = false;

  /** Paper is narrower than most windows and always white, so that everything is drawn anew for it, and after it. */
  function print(on) {
    if (printing === on) return;
    printing = on;
    document.documentElement.classList.toggle('printing', on);
    viewsNow().forEach(renderControls);
    // At once: what is not drawn when the event ends is not on the paper.
    drawn = drawCharts();
  }

  /** The width a chart may take: its panel's, which does not depend on the chart inside. */
  function widthOf(id) {
    if (printing) return PRINTED_WIDTH;
    const panel = $(id).closest('.panel');
    const style = getComputedStyle(panel);
    return Math.floor(panel.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
  }

  function drawCharts() {
    const views = viewsNow();
    return Promise.all([renderTradeoff(views), renderHeatmap(views), renderRoofline(views)]);
  }

  let chartsDue = null;

  /** Charts are drawn once a frame at most: a slider may send more events than a screen shows. */
  function renderChartsSoon() {
    chartsDue ??= new Promise((resolveDrawn) => {
      requestAnimationFrame(() => {
        chartsDue = null;
        resolveDrawn(drawCharts());
      });
    });
    drawn = chartsDue;
  }

  let drawn = Promise.resolve();

  /** The link to the numbers must not land behind the bar that stays in sight: all controls, or the slider alone. */
  function keepClearOfBar() {
    const bars = [...document.querySelectorAll('.controls, .field.budget')].filter(
      (bar) => getComputedStyle(bar).position === 'sticky',
    );
    $('numbers').style.scrollMarginTop = `${Math.max(0, ...bars.map((bar) => bar.offsetHeight)) + 8}px`;
  }

  function render() {
    const views = viewsNow();
    document.body.classList.toggle('comparing', views.length > 1);
    $('compare').setAttribute('aria-pressed', String(views.length > 1));
    $('controls-b').hidden = views.length === 1;
    hideTooltip();
    views.forEach(renderControls);
    keepClearOfBar();
    renderNotices(views);
    renderCards(views);
    renderSites(views);
    renderChartsSoon();
    writeHashSoon();
  }

  function renderOnce() {
    // A map of few layers is wide, not tall: it goes below the other charts.
    document.querySelector('.charts').classList.toggle('wide-map', grid.layers.length * TALLEST_CELL < 520);
    $('model').textContent = data.model;
    $('lede').textContent =
      `A budget is the ${BUDGET_KIND} of ${METRIC} to keep, counted over ${SCOPE}. ` +
      'Every stop of the slider is a solved plan; nothing in between is guessed.';
    $('footer').append(
      el(
        'p',
        {},
        'Times are predicted for one pass of the whole workload, end to end; speed-up is dense time over compressed time. ' +
          'Peak memory is weights, key and value cache and the widest activations. The certified gap is how far the plan can be from the best one.',
      ),
      el(
        'p',
        {},
        hasDamage
          ? `Damage is the predicted rise of the divergence from the dense model, in ${data.damage_unit}, before any training.`
          : 'Damage is not measured: the analysis saw a configuration, no weights.',
      ),
    );
  }

  $('sites').addEventListener('toggle', () => renderSites(viewsNow()));
  $('compare').addEventListener('click', () => compare(!state.compare));
  addEventListener('hashchange', () => {
    // A link inside the page, such as the one to the numbers, changes no selection.
    const hash = new URLSearchParams(location.hash.slice(1));
    if (SELECTED.some((name) => hash.has(name))) state = stateOfHash();
    render();
  });
  addEventListener('scroll', hideTooltip, { passive: true });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', renderChartsSoon);
  addEventListener('beforeprint', () => print(true));
  addEventListener('afterprint', () => print(false));
  matchMedia('print').addEventListener('change', (event) => print(event.matches));
  let widthBefore = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth === widthBefore) return;
    widthBefore = document.body.clientWidth;
    viewsNow().forEach(renderControls);
    keepClearOfBar();
    renderChartsSoon();
  }).observe(document.body);

  window.blora = {
    data,
    select,
    compare,
    get state() {
      return structuredClone(state);
    },
    /** Resolves when the charts of the last change are drawn. */
    get drawn() {
      return drawn;
    },
  };

  renderOnce();
  render();
})();
