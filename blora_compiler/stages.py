"""What each stage of a compilation does: plain values in, a plain value and a line worth printing out.

The functions here put the stages' own files to work and say what happened; compiling.py lists them in order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from torch import Tensor, nn

from .artifact import Artifact
from .budget import Budget
from .calibration import CALIBRATION_LENGTH, calibration_batches, example_inputs, tokens_of_step, training_batches
from .clocks import Target, in_dtype, target_of
from .cost_models.devices import THIS
from .cost_models.flops import FlopsCostModel
from .distillation import DistillConfig, check_earlier, distill, learning_rate_for
from .errors import BadInput, listed
from .evaluate import Quality, perplexity_and_kl
from .folders import write_text
from .graph import Program, bind
from .latency_budget import TimedProblem, check_runnable, meet
from .measuring import export_for_timing
from .narrowing import LEAST_KEPT, Inner, best_width, inner_channels, narrowed, order_channels, widths_at
from .objective import shared_blocks
from .outline import Outline, outline_of
from .plan import Plan, reprice
from .problem import Problem, build_problem
from .profiling import Kind, Profile, check_kind, check_weights, profile
from .refitting import refit, side_by_side_refusal
from .replanning import Build, Start, apart, can_measure, replan
from .rewriting import (
    branched_sites,
    check_given_outputs,
    fold,
    insert,
    refusals_of,
    settle,
    starting_factors,
    summary_of,
)
from .rules import RuleValue, resolve_rules
from .solver import solve
from .source import Source, is_meta, load_source
from .sweeping import Place
from .tracing import fixed_sizes, has_computed_sizes, trace
from .values import AnyWorkload, Dense, Form, Metric, Refusal, Scope, Site, Workload
from .workloads import as_workload, check_fits

# Sites that stay dense train through a branch of this rank when there is training; it folds away at no cost.
DENSE_BRANCH_RANK = 16

TIMED = "timed"  # the fingerprint of a plan that says what it took on this machine
DISTILL = "distill"  # in the folder of a compilation: checkpoints and metrics of its training

CalibrationData = list[dict[str, Tensor]]
Windows = tuple[Tensor | None, int | None]  # evaluation windows (windows, length) and their stride, or Nones
T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a stage gives: the value the next stages need, and what to tell the user about it."""

    value: T
    summary: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Record:
    """What one stage did.

    Attributes:
        stage: its name.
        seconds: wall time.
        summary: one line worth printing.
        facts: numbers for the report.
        refusals: what was left alone, and why.
    """

    stage: str
    seconds: float
    summary: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()

    def __str__(self) -> str:
        return f"{self.stage:<9} {self.seconds:7.1f} s  {self.summary}"


class Journal:
    """Runs stages, keeps a record of each, and tells the caller as each one ends."""

    def __init__(self, on_record: Callable[[Record], None] | None) -> None:
        self.records: list[Record] = []
        self._on_record = on_record

    def run(self, name: str, stage: Callable[P, Outcome[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """The stage's value, its record kept. A stage with nothing to say leaves no record."""
        started = time.perf_counter()
        outcome = stage(*args, **kwargs)
        if outcome.summary:
            seconds = time.perf_counter() - started
            self.records.append(Record(name, seconds, outcome.summary, outcome.facts, outcome.refusals))
            if self._on_record is not None:
                self._on_record(self.records[-1])
        return outcome.value


# ── The stages ───────────────────────────────────────────────────────────────────────────────────────────────────


def load(model: nn.Module | str | Path, tokenizer: Any) -> Outcome[Source]:
    """The teacher behind whatever the caller named."""
    source = load_source(model, tokenizer)
    if is_meta(source.model):
        raise BadInput(f"{source.name} has no weights to compress; plan it with make_plan, or give the weights")
    count = sum(p.numel() for p in source.model.parameters())
    note = f"; {source.note}" if source.note else ""
    return Outcome(source, f"{source.name}, {count / 1e6:.2f} M parameters{note}")


def trace_model(source: Source, inputs: Any, data: Any, rules: Mapping[str, RuleValue] | None) -> Outcome[Program]:
    """The program behind a teacher, its weights and the rules on its sites checked before any long work."""
    program = trace(source.model, example_inputs(source, data) if inputs is None else inputs)
    check_weights(program)
    resolve_rules(rules, program.sites)
    summary = f"{len(program.sites)} sites, {len(program.operators)} other operators"
    if (tokens := fixed_sizes(program).get(("input_ids", 1))) is not None:
        summary += f"; the model's code has another graph for each length, and costs are for {tokens} tokens"
    if has_computed_sizes(program):
        summary += "; sizes that depend on values are those of the example"
    return Outcome(program, summary, refusals=program.refusals)


def measure_damage(
    source: Source, program: Program, data: Any, damage: Kind, seed: int, folder: Path | None
) -> Outcome[tuple[Profile, CalibrationData]]:
    """The damage of every form of every site, and the data it was measured on: the caller's or the model's own."""
    batches, origin = calibration_batches(program, source, data, seed)
    profiled = profile(program, batches, kind=damage, seed=seed, cache=folder)
    summary = f"{profiled.kind} damage of {len(program.sites)} sites from {origin} ({profiled.unit})"
    facts = {"kind": profiled.kind, "unit": profiled.unit, "tokens": profiled.tokens, "data": origin}
    return Outcome((profiled, batches), summary, facts)


def narrow_mlps(
    program: Program,
    profiled: Profile,
    batches: CalibrationData,
    build_on: Callable[[Program, Profile], tuple[Problem, TimedProblem | None]],
    narrows: bool | float,
    plan: Plan | None,
    refits: bool,
    folder: Path | None,
) -> Outcome[tuple[Program, Profile]]:
    """MLPs with fewer inner channels: as many as damage least, the share asked for, or those of a given plan."""
    whole = (program, profiled)
    if not (plan.shapes if plan is not None else narrows):
        return Outcome(whole, "")
    problem, _ = build_on(program, profiled)
    inners, refusals = inner_channels(program, problem.rules)
    if not inners and plan is None:
        return Outcome(whole, "no MLP has inner channels that can go", refusals=tuple(refusals))
    of_plan = {} if plan is None else _widths_of(plan, inners, refusals)
    block = problem.rank_multiple if plan is None else plan.rank_multiple
    orderings = order_channels(program, inners, batches, block=block, seed=profiled.seed)
    if plan is None and narrows is True:
        shares = shares_to_try(problem.limit / problem.baseline)
        refits = refits and side_by_side_refusal(program, apart(batches)[0]) is None  # the stage `refit` says why not
        best, tried = best_width(
            program, profiled, batches, lambda *of: build_on(*of)[0], orderings, shares, refits, folder
        )
        known = [
            (one.share, one.damage if math.isfinite(one.damage) else None) for one in tried
        ]  # JSON has no infinity
        facts = {"tried": [{"share": share, "damage": damage} for share, damage in known]}
        summary = f"damage by the share of inner channels kept: {', '.join(map(str, tried))} ({profiled.unit})"
        return Outcome((best.program, best.profile), summary, facts, tuple(refusals))
    widths = of_plan or widths_at(orderings, narrows)
    left, all_of_them = sum(widths.values()), sum(inner.width for inner in inners)
    summary = f"{left} of {all_of_them} inner channels of {len(inners)} MLPs kept"
    return Outcome(narrowed(program, profiled, batches, orderings, widths, folder), summary, refusals=tuple(refusals))


def _widths_of(plan: Plan, inners: Sequence[Inner], refusals: Sequence[Refusal]) -> dict[str, int]:
    """Consumer -> channels that a plan leaves it.

    Raises:
        BadInput: the plan narrows what cannot be narrowed here.
    """
    known = {name for inner in inners for name in (*inner.producers, inner.consumer)}
    if stray := [name for name in plan.shapes if name not in known]:
        reasons = "; ".join(map(str, refusals)) or "none of their inner channels was found"
        raise BadInput(f"the plan narrows {listed(stray)}, which cannot be narrowed here ({reasons})")
    return {
        inner.consumer: plan.shapes[inner.consumer][1] if inner.consumer in plan.shapes else inner.width
        for inner in inners
    }


def choose_forms(problem: Problem, plan: Plan | None, folder: Path | None) -> Outcome[Plan]:
    """The solver's plan, or the caller's counted anew; written to the folder either way."""
    chosen = solve(problem) if plan is None else reprice(plan, problem)
    _keep(chosen, folder)
    return Outcome(chosen, chosen.summary())


def _keep(plan: Plan, folder: Path | None) -> None:
    if folder is not None:
        write_text(folder / "plan.json", plan.to_json())


def measure_plan(
    program: Program,
    batches: CalibrationData,
    profiled: Profile,
    build: Build,
    plan: Plan,
    rounds: int,
    refits: bool,
    folder: Path | None,
    teacher: Program | None = None,
) -> Outcome[Start]:
    """Starting factors fitted to the plan, its true damage, and up to `rounds` plans better informed by it.

    Baselines and plans without a factored site are left as they are.
    """
    if not can_measure(profiled, plan):
        problem, timed = build(profiled)
        return Outcome(Start(profiled, problem, timed, plan, None), "")
    why_not = side_by_side_refusal(program, apart(batches)[0]) if refits else None
    start, attempts = replan(program, batches, profiled, build, plan, rounds, refits and why_not is None, teacher)
    _keep(start.plan, folder)
    tried = [*map(str, attempts), *([] if why_not is None else [f"not refitted: {why_not}"])]
    summary = f"{'; '.join(tried)} ({profiled.unit}); {start.plan.summary()}"
    return Outcome(start, summary, {"attempts": [attempt.to_json() for attempt in attempts]})


def resumed_plan(budget: Budget, folder: Path | None, resume: bool) -> Plan | None:
    """The plan that an interrupted run with this budget in time had timed: timing it again might decide otherwise."""
    path = None if folder is None else folder / "plan.json"
    if not resume or budget.metric != "latency" or path is None or not path.exists():
        return None
    plan = Plan.from_json(path.read_text(encoding="utf-8"))
    same = (plan.budget, plan.metric) == (budget.text, budget.metric)
    return plan if same and TIMED in plan.fingerprints else None


def check_resumed(plan: Plan, problem: Problem) -> None:
    """Raise BadInput unless a plan found in the folder was made for what is asked now."""
    excluded = tuple(site.name for site in problem.sites if problem.rules[site.name].mode == "exclude")
    asked = {"scope": problem.scope, "workload": problem.workload, "rank_multiple": problem.rank_multiple}
    differing = [name for name, value in {**asked, "excluded": excluded}.items() if getattr(plan, name) != value]
    differing += [name for name, value in problem.fingerprints.items() if plan.fingerprints.get(name) != value]
    if differing:
        raise BadInput(
            f"the plan to resume was made for another {', '.join(differing)}; restore that, or start with overwrite"
        )


def refuse_earlier_run(folder: Path | None, trains: bool, resume: bool, overwrite: bool) -> None:
    """Raise BadInput, before any work, where the training would find another run in its folder."""
    if folder is not None and trains:
        check_earlier(folder / DISTILL, resume, overwrite)


def resume_timed(
    program: Program, batches: CalibrationData, profiled: Profile, build: Build, plan: Plan, refits: bool
) -> Outcome[Start]:
    """Where a run goes on that had timed its plan: at that plan as it is, its factors fitted to it again."""
    problem, timed = build(profiled)
    fitting, factors = apart(batches)[0], None
    if refits and can_measure(profiled, plan) and side_by_side_refusal(program, fitting) is None:
        factors = refit(program, plan.forms, starting_factors(program.sites, plan.forms, profiled), fitting)
    return Outcome(Start(profiled, problem, timed, plan, factors), f"timed before: {plan.fingerprints[TIMED]}")


def device_of_budget(budget: Budget, device: str | Path | None, dtype: str | None = None) -> Target | None:
    """The device whose time counts: as asked, this machine for a budget in time, else none."""
    if device is None and budget.metric != "latency":
        return None
    return target_of(device or THIS, dtype)


def meet_latency(
    source: Source, program: Program, batches: CalibrationData, found: Start, folder: Path | None
) -> Outcome[Start]:
    """Plans for this machine timed on it, and solved again where they miss their budget; others as they are.

    The plan in the folder is the one that came of it.
    """
    timed, problem, plan = found.timed, found.problem, found.plan
    if timed is None or timed.target.table is None:
        return Outcome(found, "")
    check_runnable(problem.workload)
    place = Place(timed.target.device.provider, problem.workload.dtype, timed.target.table.threads)

    def export(forms: Mapping[str, Form], folder: Path) -> Artifact:
        if all(form == Dense() for form in forms.values()):
            return export_for_timing(source.model, folder, place, program.inputs)
        branched, _ = insert(program, forms, found.profile)
        folded, _ = fold(settle(branched, forms), forms)
        return export_for_timing(folded.tree, folder, place, program.inputs)

    met = meet(timed, problem, plan, export)
    chosen = replace(met.plan, fingerprints={**met.plan.fingerprints, TIMED: met.summary})
    _keep(chosen, folder)
    factors = found.factors
    if factors is not None and chosen.forms != plan.forms:
        own, fitting = starting_factors(program.sites, chosen.forms, found.profile), apart(batches)[0]
        factors = refit(program, chosen.forms, own, fitting)  # which could be done for the plan before
    facts = {"attempts": [attempt.to_json() for attempt in met.attempts]}
    return Outcome(Start(found.profile, met.problem, timed, chosen, factors), met.summary, facts)


def insert_branches(program: Program, found: Start, trains: bool) -> Outcome[Program]:
    """The program with its trainable branches; dense sites get one too where there is training to use it."""
    rank = DENSE_BRANCH_RANK if trains else 0
    branched, results = insert(
        program, found.plan.forms, found.profile, factors=found.factors, dense_branch_rank=rank
    )
    check_given_outputs(branched, found.plan.forms)
    return Outcome(branched, summary_of(results), refusals=refusals_of(results))


def distill_branches(
    source: Source,
    branched: Program,
    problem: Problem,
    plan: Plan,
    train: Any,
    config: DistillConfig,
    folder: Path | None,
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> Outcome[Program]:
    """The same program, trained in place until every factored site has no dense part left."""
    forms = plan.forms
    batches, origin = training_batches(branched, source, train, config)
    config, note = without_missing_blocks(config, branched, source)
    if config.learning_rate is None and plan.damage is not None and plan.damage_unit == "nats per token":
        config = replace(config, learning_rate=learning_rate_for(plan.damage, tokens_of_step(batches)))
    result = distill(
        branched.tree,
        source.model,
        batches,
        config,
        folder=None if folder is None else folder / DISTILL,
        retained=frozenset(name for name in branched_sites(branched) if forms[name] == Dense()),
        executable_cost=retention_cost(problem, forms),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    bind(branched)
    facts = {"config": config.to_json(), "tokens": result.tokens, "seconds": result.seconds, "data": origin}
    rate = "" if config.learning_rate is None else f", learning rate {config.learning_rate:.2g}"
    summary = f"{result.steps} steps, {result.tokens} tokens from {origin}{rate}, last loss {result.loss:.4f}{note}"
    return Outcome(branched, summary, facts)


def settle_branches(branched: Program, plan: Plan) -> Outcome[Program]:
    """Retention set to its final value where nothing trains."""
    reason = "no training data and no DistillConfig were given" if changes_anything(plan) else "nothing changes"
    return Outcome(settle(branched, plan.forms), f"not distilled: {reason}")


def fold_branches(branched: Program, forms: Mapping[str, Form]) -> Outcome[Program]:
    """Every site in its final form."""
    folded, results = fold(branched, forms)
    return Outcome(folded, summary_of(results), refusals=refusals_of(results))


def evaluate_untrained(
    source: Source, branched: Program, forms: Mapping[str, Form], windows: Windows
) -> Outcome[dict[str, Quality]]:
    """The teacher's quality, and the plan's before any training."""
    sequences, stride = windows
    if sequences is None:
        return Outcome({}, "")
    teacher = perplexity_and_kl(source.model, None, sequences, stride=stride)
    folded, _ = fold(settle(branched, forms), forms)
    untrained = perplexity_and_kl(folded.tree, source.model, sequences, stride=stride)
    return Outcome({"teacher": teacher, "untrained": untrained}, f"teacher {teacher}; untrained {untrained}")


def evaluate_compressed(
    source: Source, folded: Program, windows: Windows, before: Mapping[str, Quality], trained: bool
) -> Outcome[dict[str, Quality]]:
    """The final quality, added to what was measured before; the untrained one where nothing trained."""
    sequences, stride = windows
    if sequences is None:
        return Outcome({}, "")
    if not trained:
        return Outcome({**before, "compressed": before["untrained"]}, "")
    compressed = perplexity_and_kl(folded.tree, source.model, sequences, stride=stride)
    return Outcome({**before, "compressed": compressed}, f"compressed {compressed}")


@dataclass(frozen=True)
class Request:
    """What a plan is asked for; arguments as those of `compile`.

    Attributes:
        target: the device of a budget in time, else None.
        dtype: of the weights, where it is not the device's own.
    """

    budget: Budget
    workload: str | AnyWorkload | None = None
    rules: Mapping[str, RuleValue] | None = None
    scope: Scope = "sites"
    rank_multiple: int = 8
    interpolative: bool = False
    target: Target | None = None
    dtype: str | None = None

    def problem(self, shape: Outline, profiled: Profile) -> tuple[Problem, TimedProblem | None]:
        """The knapsack of a model, and where its prices come from when the budget is about time."""
        load = resolve_workload(self.workload, shape, self.target, self.dtype)
        arguments: dict[str, Any] = {
            "sites": shape.sites, "budget": self.budget, "damage_model": profiled, "workload": load,
            "rules": self.rules, "scope": self.scope, "rank_multiple": self.rank_multiple,
            "interpolative": self.interpolative, "fingerprints": fingerprints(shape.sites, profiled),
            "refusals": shape.refusals,
        }  # fmt: skip
        if self.budget.metric != "latency":
            return build_problem(**arguments, operators=shape.operators, cost_model=FlopsCostModel()), None
        assert self.target is not None
        timed = TimedProblem(self.target, bool(shape.can_generate), arguments, shape.operators)
        return timed.problem(), timed

    def of_program(self, name: str, program: Program, profiled: Profile) -> tuple[Problem, TimedProblem | None]:
        """`problem` of a traced model of this name."""
        return self.problem(outline_of(program, name), profiled)


# ── Small decisions the driver makes from what it is given ───────────────────────────────────────────────────────


def refuse_what_cannot_start(
    damage: str,
    planning: bool = False,
    narrows: bool | float = False,
    metric: Metric = "flops",
    plan: Plan | None = None,
) -> None:
    """Raise BadInput, before any work, for requests that no later stage could meet."""
    check_kind(damage)
    if damage == "prior" and not planning:
        raise BadInput("damage='prior' has no factors to start from; it is for make_plan on a config without weights")
    if not isinstance(narrows, bool | int | float):
        raise BadInput(f"narrow is {narrows!r}; give True, or the share of the inner channels to keep, such as 0.7")
    if not isinstance(narrows, bool) and not LEAST_KEPT <= narrows <= 1:
        raise BadInput(f"narrow is {narrows}; give True, or a share of the inner channels from {LEAST_KEPT} to 1")
    if plan is not None and narrows:
        raise BadInput("a plan says how wide its MLPs are; leave narrow out, or the plan")
    who = "narrow" if narrows else "the plan narrows MLPs, which"
    if (narrows or (plan is not None and plan.shapes)) and damage != "two-sided":
        raise BadInput(f"{who} needs a two-sided damage to choose channels by, and got {damage!r}; leave one out")
    if narrows and metric == "latency":
        raise BadInput("narrow is for budgets in flops, bytes or params; with a budget in time leave it out")


def refuse_without_weights(source: Source, narrows: bool | float, damage: str, calibration: Any = None) -> None:
    """Raise BadInput for what a plan on shapes alone cannot decide."""
    if damage in ("whitened", "plain"):
        raise BadInput(f"{source.name} has no weights, which damage={damage!r} is measured on; leave damage out")
    if narrows:
        raise BadInput(f"{source.name} has no weights to choose channels by; give them, or leave narrow out")
    if calibration is not None:
        raise BadInput(f"{source.name} has no weights to measure the damage of; leave the calibration data out")


def shares_to_try(budget: float) -> tuple[float, ...]:
    """Shares of the inner channels, from wide to narrow, for a budget: its fourth root and powers of that.

    A budget is spent on widths and on ranks; at its square root, both keep the same share.
    """
    shares = (budget ** (step / 4) for step in range(1, 5))
    return () if budget >= 1 else tuple(share for share in shares if share >= LEAST_KEPT)


def changes_anything(plan: Plan) -> bool:
    """Whether a plan gives any site another form than dense, or another shape."""
    return bool(plan.shapes) or any(form != Dense() for form in plan.forms.values())


def without_missing_blocks(config: DistillConfig, branched: Program, source: Source) -> tuple[DistillConfig, str]:
    """The hidden-state term off where a model has no blocks to compare, and a note that says so."""
    if config.hidden_weight and not shared_blocks(branched.tree, source.model):
        return replace(config, hidden_weight=0.0), "; without the hidden-state term: no block is in both models"
    return config, ""


def resolve_workload(
    workload: str | AnyWorkload | None, shape: Outline, target: Target | None, dtype: str | None
) -> AnyWorkload:
    """The workload asked for, or one prompt of 128 tokens.

    It is in `dtype`, else in the device's own. A value that names another type than float32, which is what values are
    in where nobody says anything, stays in that.

    Raises:
        BadInput: a text that is no workload, or one that the model cannot run.
    """
    own = dtype or ("float32" if target is None else target.device.dtype)
    if workload is None:
        load: AnyWorkload = Workload(tokens=min(128, shape.positions or CALIBRATION_LENGTH), dtype=own)
    else:
        load = as_workload(workload, own)
        load = in_dtype(load, own) if dtype is not None or load.dtype == "float32" else load
    check_fits(load, shape.positions, shape.can_generate, shape.name)
    return load


def fingerprints(sites: Sequence[Site], profiled: Profile) -> dict[str, str]:
    """What a plan was made for: the model's shapes and the damage it was solved with."""
    import hashlib

    shapes = ";".join(f"{s.name}:{s.out_features}x{s.in_features}" for s in sites)
    return {
        "sites": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "damage": f"{profiled.kind}, {profiled.unit}, {profiled.tokens} tokens, seed {profiled.seed}",
    }


def retention_cost(
    problem: Problem, forms: Mapping[str, Form]
) -> Callable[[Mapping[str, float]], tuple[float, float]]:
    """Retention by site -> (relaxed, executable) fraction of the baseline.

    Relaxed counts a fractional dense part by its fraction, beside its branch. That saves nothing yet: executable
    counts the site as the one dense GEMM it would fold to until its retention is 0.
    """
    final, dense = problem.costs(forms), problem.costs({name: Dense() for name in forms})
    price = {name: (dense[name], final[name]) for name in forms}

    def fractions(retention: Mapping[str, float]) -> tuple[float, float]:
        relaxed = executable = float(problem.fixed)
        for name, (dense, final) in price.items():
            d = retention.get(name, 0.0)
            is_dense = forms[name] == Dense()
            relaxed += dense if is_dense else d * dense + final
            executable += dense if is_dense or d > 0.0 else final
        return relaxed / problem.baseline, executable / problem.baseline

    return fractions
