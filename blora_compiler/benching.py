"""Bench: dense against compressed, lowered by the same call and timed in turns of one run.

Every side goes through the same `lower`: same passes, same fusions, same dtype, same threads. The dense model is one
side among the others. What a model is compared at is its form, so it may have random weights: no value changes its
speed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .artifact import CORES, MANIFEST, WEIGHTS, Artifact
from .attribution import Attribution, block_columns, profile_export
from .bench_result import DENSE, BenchResult, ModuleTime, Side
from .budget import Budget
from .capture import captured_decode
from .clocks import DTYPES, Target
from .cost_models.flops import FlopsCostModel
from .cost_models.prediction import Predictor
from .errors import BadInput, BloraError, ParityFailed
from .graph import Program
from .measuring import export_for_timing, in_forms, uniform_forms
from .narrowing import inner_channels, narrowed_alike
from .outline import Outline, outline, outline_of
from .plan import Plan
from .predicting import this_or_why_not, workload_of
from .profiling import prior
from .report import versions
from .rules import RuleValue, resolve_rules
from .solver import solve
from .source import is_meta, load_source, position_limit, random_weights
from .stages import Request, device_of_budget
from .sweeping import Place, call_cost_ns, gemm_alone_ns
from .timing import Timing, call_of, fixed_cache_call, interleaved, on_first_core, setting_of
from .tracing import generates, is_pretrained, trace
from .values import Dense, Form, Site, Workload

PLANS = ("uniform", "shared", "interpolative", "narrow", "prior")
PROFILES = 3  # profiles of each side and setting, taken in turns; their medians are reported
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Contender:
    """An export that takes part: `forms` is empty for the dense one; `sites` have the shapes it runs, if known."""

    name: str
    artifact: Artifact
    forms: Mapping[str, Form] = field(default_factory=dict)
    kept: float = 1.0
    sites: tuple[Site, ...] = ()


Cache = Literal["growing", "fixed", "captured", "captured fixed"]


@dataclass(frozen=True)
class Load:
    """One thing that every side runs: a phase of its graphs, or a prompt and `steps` decode steps behind it.

    Attributes:
        phase: `prefill`, `decode`, `model` or `end to end`.
        batch: sequences.
        tokens: of the prompt; of a decode step, tokens in the cache before it; 0 where inputs have one size alone.
        steps: of `end to end`.
        cache: of a decode step: `growing` by a copy, as the graph returns it; `fixed`, in buffers that the graph
            extends in place; `captured`, growing and replayed as a CUDA graph; `captured fixed`, both.
    """

    phase: str
    batch: int
    tokens: int
    steps: int = 0
    cache: Cache = "growing"

    @property
    def setting(self) -> str:
        """As `Timing.setting` says it."""
        how = {
            "growing": "", "fixed": ", fixed cache", "captured": ", captured",
            "captured fixed": ", captured, fixed cache",
        }[self.cache]  # fmt: skip
        behind = f" + {self.steps} steps" if self.phase == "end to end" else ""
        return f"{setting_of(self.phase, self.batch, self.tokens)}{behind}{how}"

    @property
    def is_profiled(self) -> bool:
        """Whether it runs one graph as every export runs it: what a profile and a measure of memory can repeat."""
        return self.phase != "end to end" and self.cache == "growing"

    @property
    def tokens_a_run(self) -> int:
        """Tokens handled or made by one run; end to end counts the new ones. 0 where there are none to count."""
        per_sequence = {"decode": 1, "end to end": self.steps}.get(self.phase, self.tokens)
        return self.batch * per_sequence

    def call(self, artifact: Artifact) -> Callable[[], Any]:
        """One run, with sessions of its own whose threads are pinned."""
        artifact = artifact.pinned()
        if self.phase not in ("decode", "end to end"):
            return call_of(artifact, self.phase, self.batch, self.tokens)
        # The cache that steps stand behind is as long in each as it is on average.
        decode = self._step(artifact, self.tokens + self.steps // 2)
        if self.phase == "decode":
            return decode
        prefill = call_of(artifact, "prefill", self.batch, self.tokens)

        def run() -> None:
            prefill()
            for _ in range(self.steps):
                decode()

        return run

    def _step(self, artifact: Artifact, context: int) -> Callable[[], Any]:
        if self.cache == "fixed":
            return fixed_cache_call(artifact, self.batch, context)
        if self.cache.startswith("captured"):
            return captured_decode(artifact, self.batch, context, fixed=self.cache == "captured fixed")
        return call_of(artifact, "decode", self.batch, context)


def bench(
    model: nn.Module | str | Path | Any,
    budgets: Sequence[float | str] = (0.5, 0.25),
    *,
    plans: Sequence[str] | None = None,
    target: str = "cpu",
    dtype: str | None = None,
    threads: int = 0,
    batches: Sequence[int] = (1,),
    tokens: int = 256,
    context: int | None = None,
    new_tokens: int = 16,
    rounds: int = 15,
    copies: int | None = None,
    profile: bool = True,
    memory: bool = True,
    settings: Sequence[Load] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> BenchResult:
    """Time a dense model against compressed forms of it, in one run.

    Args:
        model: a run folder of `blora compile` (its two exports are timed as they are), a Hugging Face folder with or
            without weights, a config, or a Hugging Face model. Without weights they are random.
        budgets: shares of the projections' FLOPs to keep; each is one side a plan. Not for run folders.
        plans: `uniform` (the same share of the break-even rank everywhere), `shared` (the same, and sites that read
            one input share their first factor), `interpolative` (the same share of the weights, at higher ranks),
            `narrow` (MLPs keep the fourth root of the budget of their inner channels, then as `shared`),
            `prior` (the solver's, by the spectral prior; no branch is removed). By default all. Nothing is measured
            or trained.
        target, dtype, threads: as of `lower` and of sessions, without bfloat16; 0 threads leaves it to ONNX Runtime.
        batches, tokens, context, new_tokens: prompts of `tokens`, decode steps behind `context` cached tokens
            (`tokens` by default; again with a cache of fixed size where the graphs allow it, and on CUDA captured),
            and end to end one prompt with `new_tokens` steps, at each batch; other models run their one graph.
        rounds: timed runs a side and setting (three times as many for decode).
        copies: sessions a side and setting that take turns, each with weights of its own; by default 2 where a
            side's weights would fit the processor's last-level cache, else 1.
        profile: also record ONNX Runtime's profiles, for the time of the compressed modules, and time their GEMMs
            alone.
        memory: also run each side once in a fresh process, for its peak memory.
        settings: these loads instead of those that `batches` and the sizes make.
        folder: keeps the exports; a temporary one by default.
        seed: of random weights.
        tell: called with a line now and then.

    Raises:
        BadInput: what cannot be benched, with the reason.
    """
    numbers = {"tokens": tokens, "rounds": rounds, "new_tokens": new_tokens, "context": context, "copies": copies}
    _check_numbers(batches, {name: 1 if number is None else number for name, number in numbers.items()})
    if threads < 0:
        raise BadInput(f"threads is {threads}; give a number of them, or 0 to leave it to ONNX Runtime")
    threads = min(threads, len(CORES)) if CORES else threads  # each has a core of its own
    run = Path(model) if isinstance(model, str | Path) else None
    behind = tokens if context is None else context
    asked: dict[str, Any] = {"batches": batches, "tokens": tokens, "context": behind, "steps": new_tokens}
    how: dict[str, Any] = {"rounds": rounds, "copies": copies, "profile": profile, "memory": memory, "tell": tell}
    if run is not None and (run / "onnx" / MANIFEST).exists():
        sides, shape, name, note = _sides_of_run(run, threads, target, dtype)
        exported = sides[0].artifact
        loads = settings or _loads(target, exported.generation, exported.takes_any_length, **asked)
        if shape is not None and shape.positions:
            _check_positions(loads, shape.positions)
        return bench_sides(sides, shape, name, loads, threads, [note] if note else [], **how)
    if dtype == "bfloat16":
        raise BadInput(
            "bench feeds caches and GEMMs in float32 or float16, and has no bfloat16; give dtype='float16'"
        )
    place = Place(target, dtype or DTYPES.get(target, "float32"), threads)
    plans = PLANS if plans is None else plans
    unknown = [plan for plan in plans if plan not in PLANS]
    if unknown or not plans or not budgets:
        raise BadInput(f"plans {list(plans)} at budgets {list(budgets)}: give a budget, and plans of {PLANS}")
    dense, name, weights = _dense_model(model, seed)
    _check_positions(settings or _loads(target, generates(dense), True, **asked), position_limit(dense))
    with nullcontext(str(folder)) if folder is not None else tempfile.TemporaryDirectory() as kept:
        sides, shape = _exported(dense, name, budgets, plans, place, Path(kept), tell)
        exported = sides[0].artifact
        loads = settings or _loads(target, exported.generation, exported.takes_any_length, **asked)
        return bench_sides(sides, shape, name, loads, threads, [weights], **how)


# ── Who takes part ───────────────────────────────────────────────────────────────────────────────────────────────


def _dense_model(model: Any, seed: int) -> tuple[nn.Module, str, str]:
    """The dense model in float32, its name, and where its weights come from."""
    source = load_source(model)
    if not is_pretrained(source.model):
        raise BadInput(
            f"{source.name} is no Hugging Face model; export both sides with `lower` and use `time_exports`"
        )
    if not is_meta(source.model):
        return source.model, source.name, "The dense side has the model's own weights, the others random factors."
    return random_weights(source, seed), source.name, "All weights are random: no value changes a speed."


def _exported(
    dense: nn.Module,
    name: str,
    budgets: Sequence[float | str],
    plans: Sequence[str],
    place: Place,
    folder: Path,
    tell: Callable[[str], None],
) -> tuple[list[Contender], Outline]:
    torch.manual_seed(0)
    program = trace(dense)
    shape, inputs = outline_of(program, name), dict(program.inputs)
    every: dict[str, tuple[tuple[Site, ...], dict[str, Form]]] = {DENSE: (shape.sites, {})}
    for budget in budgets:
        for plan in plans:
            every[f"{budget} {plan}"] = planned_forms(program, budget, plan)
    sides = []
    for side, (sites, forms) in every.items():
        tell(f"exporting {side}")
        artifact = export_for_timing(in_forms(dense, sites, forms), folder / side.replace(" ", "-"), place, inputs)
        sides.append(Contender(side, artifact, forms, kept_of(sites, forms), sites))
    return sides, shape


def planned_forms(program: Program, budget: float | str, plan: str) -> tuple[tuple[Site, ...], dict[str, Form]]:
    """The sites in the shapes they run in, and site -> form, by one of `PLANS`; heads stay dense.

    Raises:
        BadInput: uniform ranks at a budget that is not a share; `narrow` for a model without MLPs that can be.
    """
    sites = program.sites
    if plan == "prior":
        # Removed branches would make this another model than the one whose speed is asked for.
        rules: dict[str, RuleValue] = {"*": {"min_rank": 8}}
        rules |= {site.name: "exclude" for site in sites if site.kind == "head"}
        asked = Budget.parse(budget)
        request = Request(asked, rules=rules, target=device_of_budget(asked, None))
        return sites, dict(solve(request.of_program("bench", program, prior(sites))[0]).forms)
    share = Budget.parse(budget).fraction
    if share is None:
        raise BadInput(f"budget {budget!r} is an amount; uniform ranks need a share such as 0.5")
    if plan == "narrow":
        inners, refusals = inner_channels(program, resolve_rules(None, sites))
        if not inners:
            raise BadInput(f"no MLP can be narrowed ({'; '.join(map(str, refusals)) or 'none was found'})")
        sites = narrowed_alike(sites, inners, share**0.25)
        share *= sum(site.whole.weight_count for site in sites if site.kind != "head") / sum(
            site.weight_count for site in sites if site.kind != "head"
        )
    shares, interpolative = plan in ("shared", "narrow"), plan == "interpolative"
    return sites, uniform_forms(sites, share, shares_first_factors=shares, interpolative=interpolative)


def kept_of(sites: Sequence[Site], forms: Mapping[str, Form]) -> float:
    """Share of the projections' FLOPs that these forms keep, for one prompt; heads count where they are factored."""
    prices, workload = FlopsCostModel(), Workload()
    counted = [site for site in sites if _counts(site, forms)]
    dense = sum(prices.cost(site.whole, Dense(), workload).flops for site in counted)
    now = sum(prices.cost(site, forms.get(site.name, Dense()), workload).flops for site in counted)
    return now / dense if dense else 1.0


def _counts(site: Site, forms: Mapping[str, Form]) -> bool:
    return site.kind != "head" or not isinstance(forms.get(site.name, Dense()), Dense)


def _sides_of_run(
    run: Path, threads: int, target: str, dtype: str | None
) -> tuple[list[Contender], Outline | None, str, str]:
    """Both exports of a run folder, its plan, and the model's outline where the model is still there."""
    if not (run / "onnx-dense" / MANIFEST).exists():
        raise BadInput(f"{run} has onnx/ but no onnx-dense/ to compare with; run `blora compile` again with --export")
    dense, small = (Artifact.load(run / part, threads or None) for part in ("onnx-dense", "onnx"))
    alike = [(a.target, a.dtype, a.generation) for a in (dense, small)]
    if alike[0] != alike[1]:
        raise BadInput(f"{run}: onnx-dense/ is {alike[0]}, onnx/ is {alike[1]}; both must be lowered alike")
    if target != small.target or dtype not in (None, small.dtype):
        raise BadInput(
            f"{run} was exported for {small.target} in {small.dtype}, asked was {target} in {dtype}; "
            f"`blora export` it again for that"
        )
    try:
        plan = Plan.from_json((run / "plan.json").read_text(encoding="utf-8"))
        source = json.loads((run / "run.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{run} holds no readable plan.json and run.json ({error}); give a run folder") from error
    shape, note = None, ""
    try:
        shape = outline(source)
    except BloraError as error:
        note = f"no prediction: the dense model {source} cannot be read ({error})"
    whole = () if shape is None else shape.sites
    sites = plan.narrowed(whole)
    kept = kept_of(sites, plan.forms) if sites else _share_of_run(run, plan)
    sides = [Contender(DENSE, dense, sites=whole), Contender(f"{plan.budget} plan", small, plan.forms, kept, sites)]
    return sides, shape, f"{Path(source).name}, run {run.name}", note


def _share_of_run(run: Path, plan: Plan) -> float:
    """Share of the projections' FLOPs that a run kept: by its plan if that is about FLOPs, else by its report."""
    if plan.metric == "flops":
        return sum(c.cost for c in plan.choices) / max(sum(c.dense_cost for c in plan.choices), 1)
    try:
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        return float(report["achieved"]["sites"]["flops"]["fraction"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{run / 'report.json'} cannot be read ({error!r}); run the compilation again") from error


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────


def bench_sides(
    sides: Sequence[Contender],
    shape: Outline | None,
    name: str,
    loads: Sequence[Load],
    threads: int,
    notes: Sequence[str],
    *,
    rounds: int,
    copies: int | None = None,
    profile: bool = True,
    memory: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> BenchResult:
    """Time exports that are already there; see `bench`. The first side is the dense one.

    Args:
        sides: lowered alike.
        shape: of the dense model, for predictions; None makes none.
        name: of the model.
        loads: what each side runs.
        threads: the exports were opened with.
        notes: what the result has to say first.
        rounds, copies, profile, memory, tell: as of `bench`.
    """
    first = sides[0].artifact
    loads, refused = _possible(loads, sides)
    count, why = (copies, "as asked") if copies else _copies(sides)
    counted = _counted_sites(sides, shape)
    timings: list[Timing] = []
    modules: list[ModuleTime] = []
    alone: dict[tuple[int, ...], float] = {}
    for load in loads:
        tell(f"timing {load.setting}")
        try:
            calls = {side.name: rotating([load.call(side.artifact) for _ in range(count)]) for side in sides}
        except (BadInput, ParityFailed) as error:
            if not load.cache.startswith("captured"):
                raise
            refused.append(f"{load.setting} was left out; {error}.")  # the others need no graph to be captured
            continue
        timings += interleaved(load.setting, calls, 3 * rounds if load.phase == "decode" else rounds)
        del calls
        if profile and load.is_profiled:
            tell(f"profiling {load.setting}")
            modules += _profiled(sides, shape, counted, load, rounds, alone)
    loads = [load for load in loads if any(timing.setting == load.setting for timing in timings)]
    # One process a graph: at the last of its loads, since each has to import everything again.
    phases = list({load.phase: load for load in loads if load.is_profiled}.values())
    measured = [_side(side, phases if memory else (), tell) for side in sides]
    setup = {
        "model": name, "target": first.target, "dtype": first.dtype, "threads": threads, "rounds": rounds,
        "copies": count, "versions": versions(), "notes": [*notes, *refused, *_notes(count, why, sides, loads)],
    }  # fmt: skip
    tokens = {load.setting: load.tokens_a_run for load in loads}
    return BenchResult(setup, tuple(measured), tuple(timings), tuple(modules), tokens)


def _possible(loads: Sequence[Load], sides: Sequence[Contender]) -> tuple[list[Load], list[str]]:
    """The loads that every side can run, and why the others are left out."""
    reasons = [(side.name, side.artifact.fixed_cache_refusal) for side in sides]
    refusal = next((f"{name}: {reason}" for name, reason in reasons if reason is not None), None)
    possible = [load for load in loads if not load.cache.endswith("fixed") or refusal is None]
    refused = [f"{load.setting} was left out; {refusal}." for load in loads if load not in possible]
    return possible, refused


def rotating(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One call that runs the given ones in turn, so that none finds its weights where it left them."""
    turns = cycle(calls)

    def run() -> None:
        next(turns)()

    return run


def _copies(sides: Sequence[Contender]) -> tuple[int, str]:
    cache = last_level_cache_bytes()
    smallest = min(int(side.artifact.manifest["parameter_bytes"]) for side in sides)
    if sides[0].artifact.target != "cpu":
        return 1, "rotated on the CPU only"
    if cache is None:
        return 2, "size of the last-level cache unknown"
    return (2 if smallest <= cache else 1), (
        f"smallest side {smallest / 1e6:.1f} MB of weights, last-level cache {cache / 1e6:.1f} MB as the system says"
    )


def last_level_cache_bytes(folder: Path = _CACHE) -> int | None:
    """Of the first core, as the system states it; None where it does not."""
    found = []
    for path in folder.glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        if text[:-1].isdigit() and text[-1:] in units:
            found.append(int(text[:-1]) * units[text[-1]])
    return max(found, default=None)


def _counted_sites(sides: Sequence[Contender], shape: Outline | None) -> frozenset[str]:
    """Names of the projections that count at any side: the same ones are summed at all of them."""
    if shape is None:
        return frozenset(name for side in sides for name in side.forms)
    return frozenset(site.name for site in shape.sites if any(_counts(site, side.forms) for side in sides))


def _profiled(
    sides: Sequence[Contender],
    shape: Outline | None,
    counted: frozenset[str],
    load: Load,
    rounds: int,
    alone: dict[tuple[int, ...], float],
) -> list[ModuleTime]:
    """Profiles of all sides at one load, in turns; medians over the turns. `alone` keeps what GEMMs took alone."""
    found: dict[str, list[Any]] = {side.name: [] for side in sides}
    for _ in range(PROFILES):
        for side in sides:
            columns = block_columns(side.sites, side.forms) if side.sites else None
            found[side.name].append(
                profile_export(
                    side.artifact, batch=load.batch, tokens=load.tokens or 1, repeats=-(-rounds // PROFILES),
                    phase=load.phase, columns=columns,  # type: ignore[arg-type]
                )
            )  # fmt: skip
    times = [_module_time(side, found[side.name], shape, counted, load) for side in sides]
    return [
        replace(time, alone_ms=alone_ms(found[side.name][0], counted, side.artifact, alone))
        for side, time in zip(sides, times, strict=True)
    ]


def alone_ms(
    found: Attribution, counted: frozenset[str], artifact: Artifact, known: dict[tuple[int, ...], float]
) -> float | None:
    """Milliseconds that the GEMMs of the counted sites take alone, one after another; None where that says nothing.

    Args:
        found: a profile, whose nodes say which GEMMs run.
        counted: names of the sites.
        artifact: whose provider, type and threads they are timed with.
        known: (bytes of weights, rows, inner, columns) -> milliseconds, added to.
    """
    # Profiles of CUDA time launches, ONNX Runtime casts where the CPU has no kernel, and these GEMMs are of floats.
    if artifact.target != "cpu" or artifact.dtype != "float32" or artifact.quantize is not None:
        return None
    place = Place(artifact.target, artifact.dtype, artifact.threads or 0)
    weight_bytes, total = int(artifact.manifest["parameter_bytes"]), 0.0
    with on_first_core():
        call_ns = call_cost_ns(place)
        for node in found.nodes:
            share = sum(share for site, share in node.shares.items() if site in counted)
            if not node.product or not share:
                continue
            key = (weight_bytes, *node.product)
            if key not in known:
                known[key] = 1e-6 * gemm_alone_ns(place, node.product, call_ns, weight_bytes)
            total += share * node.calls * known[key]
    return total


def _module_time(
    side: Contender, profiles: Sequence[Any], shape: Outline | None, counted: frozenset[str], load: Load
) -> ModuleTime:
    sites = [sum(time for name, time in found.sites.items() if name in counted) for found in profiles]
    middle = sorted(profiles, key=lambda found: found.total_ms)[len(profiles) // 2]
    time = ModuleTime(
        load.setting, side.name, statistics.median(sites), middle.kinds,
        middle.total_ms, copies=sum(node.calls for node in middle.nodes if node.kind == "copies"),
        clock=middle.clock,
    )  # fmt: skip
    target, note = this_or_why_not(side.artifact) if shape is not None else (None, "")
    if target is None or shape is None:
        return replace(time, note=note)
    sites_ms, whole_ms = predicted(shape, side, counted, load, target)
    return replace(time, predicted_sites_ms=sites_ms, predicted_ms=whole_ms)


def predicted(
    shape: Outline, side: Contender, counted: frozenset[str], load: Load, target: Target
) -> tuple[float, float]:
    """Milliseconds of the counted sites and of the whole graph, by a calibrated clock."""
    workload = workload_of(load.phase, load.batch, load.tokens or 1, side.artifact.dtype)
    predictor = Predictor(side.sites, shape.operators, workload, target.clock, side.artifact.generation)
    whole = predictor.predict(side.forms)
    return 1e-6 * sum(t for name, t in whole.by_site.items() if name in counted), whole.milliseconds


def _side(side: Contender, loads: Sequence[Load], tell: Callable[[str], None]) -> Side:
    if loads:
        tell(f"memory of {side.name}")
    graphs = [f"{name}.onnx" for name in side.artifact.graphs]
    files = sum(int(side.artifact.manifest["files"][name]["bytes"]) for name in (*graphs, WEIGHTS))
    peaks = {load.setting: peak_memory(side.artifact, load) for load in loads}
    return Side(side.name, side.kept, files, str(side.artifact.parity), peaks)


def peak_memory(artifact: Artifact, load: Load) -> int:
    """Bytes that opening one graph and running it once add to a fresh process: resident on the CPU, else on the GPU.

    Raises:
        BloraError: the process failed.
    """
    arguments = [str(artifact.folder), str(artifact.threads or 0), load.phase, str(load.batch), str(load.tokens)]
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY_PROGRAM, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BloraError(f"measuring the memory of {artifact.folder} failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


_MEMORY_PROGRAM = "import sys; from blora_compiler.benching import print_memory; print_memory(*sys.argv[1:])"


def print_memory(folder: str, threads: str, phase: str, batch: str, tokens: str) -> None:
    """What the fresh process does: open, run once, print the bytes that this added at its peak."""
    artifact = Artifact.load(folder, int(threads) or None)
    is_cuda = artifact.target == "cuda"
    before = _device_bytes() if is_cuda else _resident_bytes("VmRSS")
    call_of(artifact, phase, int(batch), int(tokens))()
    # ONNX Runtime's arena gives nothing back to the device, so what it holds afterwards is its peak.
    after = _device_bytes() if is_cuda else _resident_bytes("VmHWM")
    print(max(0, after - before))


def _resident_bytes(field_name: str) -> int:
    """A field of this process's status: `VmRSS` now, `VmHWM` at its peak. 0 where the system has no such file."""
    path = Path("/proc/self/status")
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field_name}:")), 0)


def _device_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


# ── What is asked ────────────────────────────────────────────────────────────────────────────────────────────────


def _loads(
    target: str, generates: bool, any_length: bool, batches: Sequence[int], tokens: int, context: int, steps: int
) -> list[Load]:
    if not generates:
        return [Load("model", batch, tokens if any_length else 0) for batch in batches]
    prompts = [Load("prefill", batch, tokens) for batch in batches]
    caches: tuple[Cache, ...] = ("growing", "fixed")
    if target == "cuda":
        caches = (*caches, "captured", "captured fixed")
    decodes = [Load("decode", batch, context, cache=cache) for batch in batches for cache in caches]
    return [*prompts, *decodes, *(Load("end to end", batch, tokens, steps) for batch in batches)]


def _check_numbers(batches: Sequence[int], numbers: Mapping[str, int]) -> None:
    if not batches:
        raise BadInput("batches is empty; name at least one batch size")
    for name, value in (*(("batch", batch) for batch in batches), *numbers.items()):
        if value < 1:
            raise BadInput(f"{name} is {value}; a bench needs at least 1")


def _check_positions(loads: Sequence[Load], limit: int) -> None:
    for load in loads:
        needed = load.tokens + load.steps + (load.phase == "decode")
        if needed > limit:
            raise BadInput(f"{load.setting} needs {needed} positions, the model has {limit}; ask for fewer tokens")


def _notes(copies: int, why: str, sides: Sequence[Contender], loads: Sequence[Load]) -> list[str]:
    quantised = [f"{side.name} in {side.artifact.quantize}" for side in sides if side.artifact.quantize is not None]
    notes = [
        "All sides went through the same lowering (passes, fusions, dtype, threads) and took turns in one run"
        + (f"; but weights are stored {', '.join(quantised)}." if quantised else "."),
        f"{copies} {'copy' if copies == 1 else 'copies'} of each side's weights took turns ({why}).",
        "Inputs and outputs are bound beforehand: the caller's loop is in no number.",
        "Modules: time of the plan's projections by ONNX Runtime's profile, recorded in turns with one copy of "
        "a side's weights, and without what recording cost.",
        "GEMMs alone: the same products one by one, each among its like and at its fastest, over the modules' time.",
    ]
    if any(load.phase == "end to end" for load in loads):
        notes.append("End to end: one prompt, then steps behind a cache of the steps' average length; no sampling.")
    if any(load.cache.endswith("fixed") for load in loads):
        notes.append("Fixed cache: buffers for twice the context, which a step extends in place.")
    if any(load.cache.startswith("captured") for load in loads):
        notes.append(
            "Captured: a step behind one length of cache, replayed as a CUDA graph, checked with other inputs."
        )
    if sides[0].artifact.target == "cuda":
        notes.append("On CUDA a profile times launches, not kernels: module times are no kernel times there.")
    return notes
