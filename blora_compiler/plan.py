"""The plan: which form each site takes, what that costs, and how good it is. Data, and nothing but data.

A plan prints as a table, reads back from JSON as an equal plan, can be edited by hand and priced again.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from .errors import BadInput, PlanInvalid, did_you_mean, listed
from .problem import DamageKind, Problem, fixed_and_baseline
from .rules import SiteRule
from .values import (
    METRICS,
    RELATIVE_ERROR,
    AnyWorkload,
    Dense,
    Factored,
    Form,
    Metric,
    Removed,
    Scope,
    Site,
    form_from_json,
    form_to_json,
    format_amount,
)
from .workloads import workload_from_json

SCHEMA = 1
_SMALLEST_UNITS: dict[Metric, str] = {"flops": "FLOP", "latency": "ns", "bytes": "B", "params": "params"}
_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("site", "left"),
    ("form", "left"),
    ("of dense", "right"),
    ("cost", "right"),
    ("share", "right"),
    ("damage", "right"),
    ("note", "left"),
)


@dataclass(frozen=True)
class Choice:
    """The form of one site.

    Attributes:
        site: name of the site.
        form: how it runs.
        cost: of this form, in the plan's metric.
        dense_cost: of the dense form.
        damage: in the plan's damage unit, or None where the measure predicts no KL. A removed branch has it on its
            last site.
        note: why this form, where the damage alone does not say it.
        shape: (out_features, in_features) where an MLP has lost inner channels; None where it is the teacher's.
    """

    site: str
    form: Form
    cost: int
    dense_cost: int
    damage: float | None
    note: str = ""
    shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class Plan:
    """Site -> form, with what it costs, what it damages and how it was found.

    Attributes:
        choices: one a counted site, in site order.
        excluded: sites that stay dense and are no part of the decision.
        metric, scope, budget, workload, rank_multiple: as asked; `budget` is the text.
        limit: the cost that was never to be exceeded.
        cost: of everything that counts, in these forms.
        baseline: the same with all sites dense.
        fixed: the part of both that no choice changes.
        damage_kind: the measure that `objective` is in.
        damage_unit: what its numbers count: `nats per token`, or what an encoder's output distance is in.
        objective: sum of the predicted damages.
        gap: certified: no plan made of the same options has an objective below `objective * (1 - gap)`. None for a
            plan that was edited by hand.
        fingerprints: of the model and the data behind the numbers.
        schema: version of the JSON form.
    """

    choices: tuple[Choice, ...]
    excluded: tuple[str, ...]
    metric: Metric
    scope: Scope
    budget: str
    limit: int
    cost: int
    baseline: int
    fixed: int
    damage_kind: DamageKind
    damage_unit: str
    objective: float
    gap: float | None
    rank_multiple: int
    workload: AnyWorkload
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def fraction(self) -> float:
        """The executable fraction of the baseline that is kept."""
        return self.cost / self.baseline if self.baseline else 1.0

    @property
    def damage(self) -> float | None:
        """Predicted rise of the mean KL (encoders: of the output distance) in `damage_unit`; None if not measured."""
        return self.objective if _is_comparable(self.damage_kind, self.damage_unit) else None

    @cached_property
    def forms(self) -> dict[str, Form]:
        """Counted site -> form."""
        return {choice.site: choice.form for choice in self.choices}

    def form(self, site_name: str) -> Form:
        """The form of one site; Dense for an excluded one.

        Raises:
            BadInput: if the plan knows no such site.
        """
        if site_name in self.excluded:
            return Dense()
        if site_name not in self.forms:
            near = did_you_mean(site_name, [*self.forms, *self.excluded])
            raise BadInput(f"the plan has no site {site_name!r}{near}")
        return self.forms[site_name]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Site -> (out_features, in_features), of those that an MLP narrower than the teacher's has."""
        return {choice.site: choice.shape for choice in self.choices if choice.shape is not None}

    def narrowed(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """The teacher's sites in the shapes that this plan gives them."""
        return tuple(
            replace(
                site,
                out_features=self.shapes[site.name][0],
                in_features=self.shapes[site.name][1],
                narrowed_from=(site.out_features, site.in_features),
            )
            if site.name in self.shapes
            else site
            for site in sites
        )

    def summary(self) -> str:
        """The plan in one line."""
        kinds = Counter(type(choice.form) for choice in self.choices)
        counts = [
            f"{kinds[kind]} {word}"
            for kind, word in ((Factored, "factored"), (Dense, "dense"), (Removed, "removed"))
            if kinds[kind]
        ]
        if self.shapes:
            counts.append(f"{len(self.shapes)} narrowed")
        excluded = f" ({len(self.excluded)} excluded)" if self.excluded else ""
        damage = "damage unknown" if self.damage is None else f"damage {self.damage:.4g} {self.damage_unit}"
        gap = f"gap {self.gap:.1g}" if self.gap is not None else "gap unknown (edited)"
        return (
            f"keeps {self.fraction:.4f} of {format_amount(self.baseline, self.metric)} (budget {self.budget}, "
            f"scope {self.scope}): {', '.join(counts)} of {len(self.choices)} sites{excluded}; "
            f"{damage} ({self.damage_kind}), {gap}"
        )

    def table(self) -> str:
        """The plan as an ASCII table, one line a site in site order, under its summary."""
        from rich.box import MARKDOWN
        from rich.console import Console
        from rich.table import Table

        table = Table(box=MARKDOWN)
        for heading, justify in _COLUMNS:
            table.add_column(heading, justify=justify, no_wrap=True)
        for choice in self.choices:
            table.add_row(*self._row(choice))
        for name in self.excluded:
            table.add_row(name, str(Dense()), "-", "-", "-", "-", "excluded")
        # A file instead of a terminal, and a width no table reaches: nothing is wrapped, cut or coloured.
        console = Console(
            file=io.StringIO(), width=10_000, color_system=None, markup=False, highlight=False, emoji=False
        )
        with console.capture() as captured:
            console.print(table)
        lines = [line.rstrip() for line in captured.get().splitlines() if line.strip()]
        return "\n".join([self.summary(), "", *lines]) + "\n"

    def _row(self, choice: Choice) -> tuple[str, ...]:
        # The first of the sites that share a factor carries its cost: what they keep of dense, they keep together.
        together = choice.form.sharers if isinstance(choice.form, Factored) else ()
        alike = [other for other in self.choices if other.site in together] or [choice]
        cost, dense_cost = sum(other.cost for other in alike), sum(other.dense_cost for other in alike)
        return (
            choice.site,
            str(choice.form),
            f"{cost / dense_cost:.1%}" if dense_cost else "-",
            format_amount(choice.cost, self.metric),
            f"{choice.cost / self.cost:.2%}" if self.cost else "-",
            "-" if choice.damage is None else f"{choice.damage:.3g}",
            choice.note,
        )

    def to_json(self) -> str:
        """The plan as text that `from_json` reads back as an equal plan."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record["choices"] = [_choice_to_json(choice) for choice in self.choices]
        record["workload"] = self.workload.to_json()
        record["fingerprints"] = dict(self.fingerprints)
        return json.dumps({"schema": record.pop("schema"), **record}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """The plan that `to_json` wrote, perhaps edited since. Only its shape is checked: see `reprice`.

        Args:
            text: the JSON text.
            where: what messages call it, such as the file's name.

        Raises:
            BadInput: listing everything that makes the text no plan.
        """
        return _plan_from_json(text, where)


# ── Plans from forms ─────────────────────────────────────────────────────────────────────────────────────────────


def price_forms(problem: Problem, forms: Mapping[str, Form], gap: float | None) -> Plan:
    """The plan that gives each counted site of the problem its form in `forms`, priced in exact integers."""
    damages = [problem.damage(site, forms[site.name]) for site in problem.counted]
    costs = problem.costs(forms)
    is_measured = _is_comparable(problem.damage_kind, problem.damage_unit)
    choices = tuple(
        Choice(
            site=site.name,
            form=forms[site.name],
            cost=costs[site.name],
            dense_cost=problem.dense_costs[site.name],
            damage=damage if is_measured else None,
            note=_note(problem, site, forms[site.name]),
            shape=None if site.narrowed_from is None else (site.out_features, site.in_features),
        )
        for site, damage in zip(problem.counted, damages, strict=True)
    )
    return Plan(
        choices=choices,
        excluded=problem.excluded,
        metric=problem.metric,
        scope=problem.scope,
        budget=problem.budget.text,
        limit=problem.limit,
        cost=problem.total(forms),
        baseline=problem.baseline,
        fixed=problem.fixed,
        damage_kind=problem.damage_kind,
        damage_unit=problem.damage_unit,
        objective=math.fsum(damages),
        gap=gap,
        rank_multiple=problem.rank_multiple,
        workload=problem.workload,
        fingerprints=dict(problem.fingerprints),
    )


def reprice(plan: Plan, problem: Problem) -> Plan:
    """An edited plan with every number computed again; only its forms are trusted.

    Any rank below break-even may be written, aligned or not. The gap of the result is None.

    Raises:
        BadInput: listing every form that cannot be applied to the problem's sites, or naming cost and limit when
            the plan costs more than the budget allows.
    """
    problems = [*_repetitions(plan), *_problems_of_forms(plan.forms, problem), *_problems_of_shapes(plan, problem)]
    if problems:
        raise BadInput(f"the plan does not fit this model: {listed(problems)}")
    priced = price_forms(problem, plan.forms, gap=None)
    if priced.cost > priced.limit:
        raise BadInput(
            f"the plan costs {with_digits(priced.cost, priced.metric)}, above the limit "
            f"{with_digits(priced.limit, priced.metric)} of budget {priced.budget}; "
            f"lower some ranks or raise the budget"
        )
    return priced


def check_plan(plan: Plan, problem: Problem) -> None:
    """Recompute the plan from sites, rules and models alone, trusting nothing a solver said and no option's numbers.

    Raises:
        PlanInvalid: listing what is covered wrongly, forbidden, mispriced or above the limit.
    """
    problems = [*_repetitions(plan), *_problems_of_forms(plan.forms, problem)]
    if not problems:
        problems = _problems_of_numbers(plan, problem)
    if problems:
        raise PlanInvalid(f"the plan contradicts its problem: {listed(problems)}")


def _is_comparable(kind: str, unit: str) -> bool:
    """Whether damages of different sites are in one unit, so that they may be shown beside each other."""
    return kind == "two-sided" or unit == RELATIVE_ERROR


def with_digits(amount: int, metric: Metric) -> str:
    """`amount` for people and in full: two amounts that differ by one must not print alike."""
    return f"{format_amount(amount, metric)} ({amount:,} {_SMALLEST_UNITS[metric]})"


def _note(problem: Problem, site: Site, form: Form) -> str:
    if isinstance(form, Removed):
        return f"with branch {site.branch}"
    if isinstance(form, Factored) and form.sharers:
        others = [name.rpartition(".")[2] for name in form.sharers if name != site.name]
        return ", ".join([f"first factor with {', '.join(others)}", *_what_is_left(site)])
    return ", ".join([*filter(None, [problem.notes.get(site.name, "")]), *_what_is_left(site)])


def _what_is_left(site: Site) -> list[str]:
    if site.narrowed_from is None:
        return []
    sides = zip((site.out_features, site.in_features), site.narrowed_from, ("outputs", "inputs"), strict=True)
    return [f"{now} of {before} {side}" for now, before, side in sides if now != before]


def _repetitions(plan: Plan) -> list[str]:
    counts = Counter([*(choice.site for choice in plan.choices), *plan.excluded])
    return [f"{name} is listed {count} times; keep one" for name, count in counts.items() if count > 1]


def _problems_of_forms(forms: Mapping[str, Form], problem: Problem) -> list[str]:
    """Everything that keeps these forms from being applied to the problem's sites under its rules."""
    sites = {site.name: site for site in problem.sites}
    problems = [f"{name}: no such site{did_you_mean(name, sites)}" for name in forms if name not in sites]
    problems += [
        f"{name}: is excluded here and has no form; drop it from the choices, or give it the rule 'compress'"
        for name in problem.excluded
        if name in forms
    ]
    problems += [f"{site.name}: has no form; add one" for site in problem.counted if site.name not in forms]
    for site in problem.counted:
        if site.name in forms and (reason := _reason_to_refuse(site, problem.rules[site.name], forms[site.name])):
            problems.append(f"{site.name}: {reason}")
    return problems + _problems_of_sharing(forms, problem) + _problems_of_removals(forms, problem)


def _reason_to_refuse(site: Site, rule: SiteRule, form: Form) -> str | None:
    """Why this site may not take this form, looked at alone, or None."""
    if rule.mode == "dense" and form != Dense():
        return f"{form}, but rule {rule.source!r} keeps it dense; change one of the two"
    if not isinstance(form, Factored):
        return None
    if form.interpolative and site.kind == "head":
        return "interpolative, but a head's outputs are computed at one position by two plain products; drop that"
    if not form.sharers and (reason := _reason_of_rank(form, site.in_features, site.out_features)):
        return reason
    if rule.min_rank is not None and form.rank < rule.min_rank:
        return f"rank {form.rank} is below min_rank {rule.min_rank} of the rules; change one of the two"
    if rule.max_rank is not None and form.rank > rule.max_rank:
        return f"rank {form.rank} is above max_rank {rule.max_rank} of the rules; change one of the two"
    return None


def _reason_of_rank(form: Factored, in_features: int, out_features: int) -> str | None:
    """Why two factors of this rank are no smaller than one (out x in) matrix, or None."""
    rank, interpolative = form.rank, form.interpolative
    shape = f"{out_features} x {in_features}"
    full_rank = min(in_features, out_features)
    if rank > full_rank:
        return f"rank {rank} is above the full rank {full_rank} of {shape}; lower the rank or keep it dense"
    break_even = -(-in_features * out_features // (in_features + out_features))
    if rank >= break_even and interpolative:
        return (
            f"rank {rank} is not below {break_even}, the break-even of plain pairs for {shape}, and damage is not "
            f"measured beyond it; lower the rank or keep it dense"
        )
    if rank >= break_even:
        return (
            f"rank {rank} costs no less than the dense layer (break-even {break_even} for {shape}); "
            f"lower the rank or keep it dense"
        )
    return None


def _problems_of_sharing(forms: Mapping[str, Form], problem: Problem) -> list[str]:
    """A first factor is shared by all sites that it names, at one rank, and by sites that may."""
    can_share = {tuple(site.name for site in group): group for group in problem.sharing_groups}
    problems = []
    shared = {name: form for name, form in forms.items() if isinstance(form, Factored) and form.sharers}
    for name, form in shared.items():
        first, others = form.sharers[0], ", ".join(form.sharers)
        if name not in form.sharers:
            problems.append(f"{name}: shares its first factor with {others}, but is not among them; add or drop it")
        elif differing := [other for other in form.sharers if forms.get(other) != form]:
            problems.append(
                f"{name}: has {form} with {others}, but {differing[0]} has {forms.get(differing[0], 'no form')}; "
                f"give all of them one rank and the same sharers"
            )
        elif form.sharers not in can_share:
            problems.append(
                f"{name}: no first factor can be shared by {others}; sites share one where they read the same input, "
                f"no rule keeps one of them dense, and the profile measured it; leave sharers out"
            )
        elif name == first:
            sites = can_share[form.sharers]
            outputs = sum(site.out_features for site in sites)
            if form.interpolative and form.rank >= sites[0].out_features:
                problems.append(
                    f"{name}: has {sites[0].out_features} outputs, and {form} would compute {form.rank} of them with "
                    f"the first factor; lower the rank or leave interpolative out"
                )
            if reason := _reason_of_rank(form, sites[0].in_features, outputs):
                problems.append(f"{others}: {reason}")
    return problems


def _problems_of_removals(forms: Mapping[str, Form], problem: Problem) -> list[str]:
    """Removed is for whole branches, and only for those that the rules and ties leave open."""
    removed = [site for site in problem.counted if isinstance(forms.get(site.name), Removed)]
    problems = [
        f"{site.name}: removed, but it belongs to no removable branch; keep it dense or factor it"
        for site in removed
        if site.branch is None
    ]
    for branch in dict.fromkeys(site.branch for site in removed if site.branch is not None):
        members = [site.name for site in problem.sites if site.branch == branch]
        kept = [name for name in members if not isinstance(forms.get(name), Removed)]
        if kept:
            problems.append(
                f"{branch}: {len(members) - len(kept)} of its {len(members)} sites are removed but not "
                f"{', '.join(kept)}; remove all of them or none"
            )
        elif branch not in problem.removable_branches:
            problems.append(f"{branch}: removed, but a rule or a tied weight keeps one of its sites; keep the branch")
    return problems


def _problems_of_shapes(plan: Plan, problem: Problem) -> list[str]:
    """A plan may only be priced on sites that were narrowed as it says."""
    of_plan, of_sites = plan.shapes, _shapes(problem)
    return [
        f"{name}: the plan has it {'whole' if name not in of_plan else ' x '.join(map(str, of_plan[name]))}, this "
        f"model {'whole' if name not in of_sites else ' x '.join(map(str, of_sites[name]))}"
        for name in dict.fromkeys([*of_plan, *of_sites])
        if of_plan.get(name) != of_sites.get(name)
    ]


def _shapes(problem: Problem) -> dict[str, tuple[int, int]]:
    narrowed = [site for site in problem.counted if site.narrowed_from is not None]
    return {site.name: (site.out_features, site.in_features) for site in narrowed}


def _problems_of_numbers(plan: Plan, problem: Problem) -> list[str]:
    """Every number of the plan that the models and the budget contradict. Costs are exact; damages to rounding."""
    fixed, baseline = fixed_and_baseline(problem)
    costs, total = list(problem.costs(plan.forms).values()), problem.total(plan.forms)
    dense_costs = list(problem.dense_costs.values())
    objective = math.fsum(problem.damage(site, plan.form(site.name)) for site in problem.counted)
    expected: dict[str, tuple[Any, Any]] = {
        "order of sites": ([choice.site for choice in plan.choices], [site.name for site in problem.counted]),
        "shapes": (plan.shapes, _shapes(problem)),
        "excluded": (plan.excluded, problem.excluded),
        "costs": ([choice.cost for choice in plan.choices], costs),
        "dense costs": ([choice.dense_cost for choice in plan.choices], dense_costs),
        "cost": (plan.cost, total),
        "fixed": (plan.fixed, fixed),
        "baseline": (plan.baseline, baseline),
        "limit": (plan.limit, min(problem.limit, problem.budget.limit(baseline))),
    }
    problems = [f"{name}: says {said}, is {found}" for name, (said, found) in expected.items() if said != found]
    if not math.isclose(plan.objective, objective, rel_tol=1e-9):
        problems.append(f"objective: says {plan.objective!r}, is {objective!r}")
    if total > problem.budget.limit(baseline):
        problems.append(f"cost {total:,} is above the limit {problem.budget.limit(baseline):,}")
    if plan.gap is not None and not 0 <= plan.gap <= 1:
        problems.append(f"gap {plan.gap!r} is not between 0 and 1")
    return problems


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Shape:
    """What a JSON value must be, as a test and in words."""

    fits: Callable[[Any], bool]
    words: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    # The upper end keeps out infinity, and integers too long for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_text_to_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _one_of(names: Sequence[str]) -> _Shape:
    return _Shape(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


_INTEGER = _Shape(_is_integer, "an integer of at least 0")
_POSITIVE = _Shape(lambda value: _is_integer(value) and value > 0, "an integer of at least 1")
_NUMBER = _Shape(_is_number, "a number of at least 0")
_NUMBER_OR_NULL = _Shape(lambda value: value is None or _is_number(value), "a number of at least 0 or null")
_TEXT = _Shape(lambda value: isinstance(value, str), "text")
_OBJECT = _Shape(lambda value: isinstance(value, dict), "an object")
_SIZES = _Shape(
    lambda value: isinstance(value, list) and len(value) == 2 and all(_is_integer(size) and size for size in value),
    "a list of two sizes, outputs and inputs",
)
_ANYTHING = _Shape(lambda value: True, "anything")

_PLAN_SHAPES: dict[str, _Shape] = {
    "schema": _INTEGER,
    "choices": _Shape(lambda value: isinstance(value, list), "a list"),
    "excluded": _Shape(_is_list_of_text, "a list of texts"),
    "metric": _one_of(METRICS),
    "scope": _one_of(get_args(Scope)),
    "budget": _TEXT,
    "limit": _INTEGER,
    "cost": _INTEGER,
    "baseline": _INTEGER,
    "fixed": _INTEGER,
    "damage_kind": _one_of(get_args(DamageKind)),
    "damage_unit": _TEXT,
    "objective": _NUMBER,
    "gap": _NUMBER_OR_NULL,
    "rank_multiple": _POSITIVE,
    "workload": _OBJECT,
    "fingerprints": _Shape(_is_text_to_text, "an object of texts"),
}
_CHOICE_SHAPES: dict[str, _Shape] = {
    "site": _TEXT,
    "form": _ANYTHING,  # form_from_json judges form and rank together
    "cost": _INTEGER,
    "dense_cost": _INTEGER,
    "damage": _NUMBER_OR_NULL,
    "note": _TEXT,
}


def _choice_to_json(choice: Choice) -> dict[str, Any]:
    """One flat record, so that a form is edited in one place: `"form": "factored", "rank": 64`."""
    return {
        "site": choice.site,
        **form_to_json(choice.form),
        "cost": choice.cost,
        "dense_cost": choice.dense_cost,
        "damage": choice.damage,
        "note": choice.note,
        **({} if choice.shape is None else {"shape": list(choice.shape)}),
    }


def _plan_from_json(text: str, where: str) -> Plan:
    record = _object_from_json(text, where)
    if record.get("schema") != SCHEMA:
        raise BadInput(
            f"{where}: schema is {record.get('schema')!r}, this version reads {SCHEMA}; "
            f"write the plan again with this version"
        )
    problems = _problems_of_record(record, _PLAN_SHAPES, where)
    choices: list[Choice] = []
    for index, item in enumerate(record["choices"] if isinstance(record.get("choices"), list) else []):
        read = _choice_from_json(item, f"{where}: choices[{index}]")
        if isinstance(read, Choice):
            choices.append(read)
        else:
            problems += read
    workload = _workload_from_json(record.get("workload"), where, problems)
    if problems or workload is None:
        raise BadInput(f"not a plan: {listed(problems)}")
    scalars = {name: record[name] for name in _PLAN_SHAPES}
    scalars |= {"choices": tuple(choices), "excluded": tuple(record["excluded"]), "workload": workload}
    scalars |= {"objective": float(record["objective"]), "gap": _float_or_none(record["gap"])}
    plan = Plan(**scalars)
    if repeated := _repetitions(plan):
        raise BadInput(f"{where}: {listed(repeated)}")
    return plan


def _object_from_json(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    if not isinstance(record, dict):
        raise BadInput(f"{where}: holds a {type(record).__name__}, a plan is an object")
    return record


def _problems_of_record(record: Mapping[str, Any], shapes: Mapping[str, _Shape], where: str) -> list[str]:
    """Missing, unknown and ill-typed fields of one JSON object."""
    problems = [f"{where}: {name} is missing" for name in shapes if name not in record]
    problems += [
        f"{where}: {name!r} is no field of a plan{did_you_mean(name, shapes)}"
        for name in record
        if name not in shapes
    ]
    problems += [
        f"{where}: {name} is {record[name]!r}, it must be {shape.words}"
        for name, shape in shapes.items()
        if name in record and not shape.fits(record[name])
    ]
    return problems


def _choice_from_json(item: Any, where: str) -> Choice | list[str]:
    """The choice, or what is wrong with it."""
    if not isinstance(item, dict):
        return [f"{where} is {item!r}, it must be an object"]
    of_factors = ("rank", "sharers", "interpolative")
    written_form = {name: item[name] for name in ("form", *of_factors) if name in item}
    rest = {name: value for name, value in item.items() if name not in of_factors}
    shape = rest.pop("shape", None)
    if shape is not None and not _SIZES.fits(shape):
        return [f"{where}: shape is {shape!r}, it must be {_SIZES.words}"]
    if problems := _problems_of_record(rest, _CHOICE_SHAPES, where):
        return problems
    try:
        form = form_from_json(written_form, f"{where} ({item['site']})")
    except BadInput as error:
        return [f"{where}: {error}" if where not in str(error) else str(error)]
    damage = _float_or_none(item["damage"])
    sizes = None if shape is None else (shape[0], shape[1])
    return Choice(item["site"], form, item["cost"], item["dense_cost"], damage, item["note"], sizes)


def _workload_from_json(record: Any, where: str, problems: list[str]) -> AnyWorkload | None:
    """The workload, or None with the reason added to `problems`."""
    if not isinstance(record, dict):
        return None
    try:
        return workload_from_json(record, where)
    except BadInput as error:
        problems.append(str(error))
        return None


def _float_or_none(value: float | None) -> float | None:
    return None if value is None else float(value)
