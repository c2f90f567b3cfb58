"""Compile: the stages in order, with no logic of their own here.

model -> trace -> profile -> plan -> insert -> distill -> fold -> Compiled -> lower -> verify
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from .budget import Budget
from .calibration import (
    CALIBRATION_LENGTH,
    calibration_batches,
    evaluation_sequences,
    example_inputs,
    reusable,
    training_batches,
)
from .cost_models.flops import FlopsCostModel
from .distillation import DistillConfig
from .distillation import distill as train_student
from .errors import BadInput
from .evaluate import Quality, perplexity_and_kl
from .folders import write_text
from .graph import Program, bind
from .objective import shared_blocks
from .plan import Plan, reprice
from .problem import Problem, build_problem
from .profiling import Kind, Profile, check_weights, prior, profile
from .rewriting import branched_sites, fold, insert, refusals_of, settle, summary_of
from .rules import RuleValue
from .solver import solve
from .source import Source, is_meta, load_source
from .tracing import trace
from .values import Dense, Form, Metric, Refusal, Scope, Workload

if TYPE_CHECKING:
    from .artifact import Artifact
    from .report import Report
    from .timing import Timing

# Sites that stay dense train through a branch of this rank when there is training; it folds away at no cost.
DENSE_BRANCH_RANK = 16


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


@dataclass(frozen=True)
class Compiled:
    """A compressed model and how it came about.

    Attributes:
        module: the compressed model as a module tree; for Hugging Face models it still has `generate()`.
        graph: the same weights as an fx graph.
        plan: which site runs how, at what cost.
        records: one per stage, in order.
        program: both views and the sites.
        source: the teacher, its tokenizer and name.
        quality: on the evaluation text: `teacher`, `untrained` and `compressed`, as far as measured.
    """

    module: nn.Module
    graph: fx.GraphModule
    plan: Plan
    records: tuple[Record, ...]
    program: Program = field(repr=False)
    source: Source = field(repr=False)
    quality: Mapping[str, Quality] = field(default_factory=dict)

    def report(self, artifact: Artifact | None = None, timings: Sequence[Timing] | None = None) -> Report:
        """What was asked, planned and achieved; prints as markdown."""
        from .report import build_report

        return build_report(self, artifact, timings)

    def save(self, folder: str | Path, *, merged: bool = False) -> Path:
        """Write the compressed model as safetensors and JSON; `blora.load(folder)` reads it back.

        Args:
            merged: write stock-shaped dense weights instead, which plain `from_pretrained` loads. No smaller and no
                faster: for evaluation tools.
        """
        from .saving import save

        return save(self, Path(folder), merged=merged)

    def export(
        self,
        folder: str | Path,
        target: str = "cpu",
        dtype: str | None = None,
        generation: bool | None = None,
        **options: Any,
    ) -> Artifact:
        """Lower to ONNX, load the files in ONNX Runtime, compare, and only then hand them out.

        Args:
            folder: receives the graphs, one weights file and `export.json`.
            target: `cpu` or `cuda`.
            dtype: `float32`, `float16` or (CUDA only) `bfloat16`; by default float32 on the CPU, float16 on CUDA.
            generation: prefill and decode graphs with a key/value cache; by default where the model can generate.
            options: further arguments of `lower`.

        Raises:
            ParityFailed: ONNX Runtime and PyTorch disagree; nothing is left in `folder`.
        """
        from .lowering import lower

        names = [name for name, form in self.plan.forms.items() if self.program.form_module(name) is not None]
        inputs: Any = tuple(self.program.inputs.values()) if self.program.positional else dict(self.program.inputs)
        return lower(
            self.module, folder, inputs=inputs, target=target, dtype=dtype, generation=generation,  # type: ignore[arg-type]
            site_names=names, **options,
        )  # fmt: skip


class _Journal:
    """Collects records, and tells the caller as each stage ends."""

    def __init__(self, on_record: Callable[[Record], None] | None) -> None:
        self.records: list[Record] = []
        self.on_record = on_record

    @contextmanager
    def stage(self, name: str) -> Any:
        note: dict[str, Any] = {"summary": "", "facts": {}, "refusals": ()}
        started = time.perf_counter()
        yield note
        record = Record(name, time.perf_counter() - started, note["summary"], note["facts"], tuple(note["refusals"]))
        self.records.append(record)
        if self.on_record is not None:
            self.on_record(record)


def compile(
    model: nn.Module | str | Path,
    budget: float | int | str,
    *,
    metric: Metric | None = None,
    scope: Scope = "sites",
    workload: Workload | None = None,
    rules: Mapping[str, RuleValue] | None = None,
    calibration: Any = None,
    train: Any = None,
    evaluation: Any = None,
    distill: DistillConfig | None = None,
    plan: Plan | None = None,
    damage: Kind = "two-sided",
    inputs: Any = None,
    tokenizer: Any = None,
    seed: int = 0,
    rank_multiple: int = 8,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    on_record: Callable[[Record], None] | None = None,
) -> Compiled:
    """Compress a model to a budget.

    Args:
        model: an `nn.Module`, a Hugging Face folder or a hub id. It stays untouched: it is the teacher.
        budget: the share to keep (`0.25`, `"25%"`) or an amount with a unit (`"3.2GFLOP"`, `"400MB"`).
        metric: what the budget counts: `flops` (default), `bytes` or `params`.
        scope: `sites` counts the projections, `model` everything in the graph.
        workload: shapes the cost is counted at.
        rules: glob on site names -> `dense`, `exclude`, `compress` or `{"min_rank": .., "max_rank": ..}`.
        calibration: text file, texts, token ids `(sequences, tokens)` or batches; by default the training data, else
            sequences sampled from the model itself.
        train: data to distill on, in the same forms; None compresses without training, unless `distill` is given,
            which then trains on sequences sampled from the model itself.
        evaluation: text file or token windows to measure perplexity and KL on, before and after.
        distill: how to train.
        plan: apply this plan (perhaps edited by hand) instead of solving for one; its costs are counted anew.
        damage: how damage is measured: `two-sided`, or the baselines `whitened`, `plain` and `prior`.
        inputs: example inputs; needed for modules that are no Hugging Face models and have no calibration batches.
        tokenizer: for text data, where `model` is a module.
        seed: of calibration sampling, tokens drawn for the damage, and the order of training data.
        rank_multiple: ranks are multiples of this, since hardware likes aligned sizes.
        folder: keeps the profile cache, the plan and training checkpoints.
        resume, overwrite: what to do with an earlier training run in `folder`.
        progress: show a progress bar while training.
        on_record: called as each stage ends.

    Returns:
        The compressed model, its plan and a record of each stage.

    Raises:
        BadInput: something given cannot be used; the message says what to change.
        InfeasibleBudget: no plan is that small; names the smallest that is.
        ParityFailed: a rewrite changed what it must not.
    """
    asked = Budget.parse(budget, metric)
    journal = _Journal(on_record)
    calibration, train = reusable(calibration), reusable(train)
    folder = None if folder is None else Path(folder)

    with journal.stage("load") as note:
        source = load_source(model, tokenizer)
        if is_meta(source.model):
            raise BadInput(f"{source.name} has no weights to compress; plan it with make_plan, or give the weights")
        count = sum(p.numel() for p in source.model.parameters())
        note["summary"] = f"{source.name}, {count / 1e6:.2f} M parameters" + (
            f"; {source.note}" if source.note else ""
        )
        windows, stride = evaluation_sequences(source, evaluation)

    with journal.stage("trace") as note:
        program = trace(source.model, example_inputs(source, calibration) if inputs is None else inputs)
        check_weights(program)
        note["summary"] = f"{len(program.sites)} sites, {len(program.operators)} other operators"
        note["refusals"] = program.refusals

    with journal.stage("profile") as note:
        data, origin = calibration_batches(program, source, calibration if calibration is not None else train, seed)
        profiled = profile(program, data, kind=damage, seed=seed, cache=folder)
        note["summary"] = f"{profiled.kind} damage of {len(program.sites)} sites from {origin} ({profiled.unit})"
        note["facts"] = {"kind": profiled.kind, "unit": profiled.unit, "tokens": profiled.tokens, "data": origin}

    with journal.stage("plan") as note:
        problem = plan_problem(program, profiled, asked, workload, rules, scope, rank_multiple)
        chosen = solve(problem) if plan is None else reprice(plan, problem)
        note["summary"] = chosen.summary()
        if folder is not None:
            write_text(folder / "plan.json", chosen.to_json())

    forms = chosen.forms
    compresses = any(form != Dense() for form in forms.values())
    trains = compresses and (train is not None or distill is not None)
    config = distill or DistillConfig(seed=seed)

    with journal.stage("insert") as note:
        branched, results = insert(program, forms, profiled, dense_branch_rank=DENSE_BRANCH_RANK if trains else 0)
        note["summary"] = summary_of(results)
        note["refusals"] = refusals_of(results)

    quality: dict[str, Quality] = {}
    if windows is not None:
        with journal.stage("evaluate") as note:
            quality["teacher"] = perplexity_and_kl(source.model, None, windows, stride=stride)
            untrained, _ = fold(settle(branched, forms), forms)
            quality["untrained"] = perplexity_and_kl(untrained.tree, source.model, windows, stride=stride)
            note["summary"] = f"teacher {quality['teacher']}; untrained {quality['untrained']}"

    with journal.stage("distill") as note:
        if trains:
            batches, origin = training_batches(program, source, train, config)
            config = without_missing_blocks(config, branched, source)
            result = train_student(
                branched.tree, source.model, batches, config,
                folder=None if folder is None else folder / "distill",
                retained=frozenset(name for name in branched_sites(branched) if forms[name] == Dense()),
                executable_cost=retention_cost(problem, forms),
                resume=resume, overwrite=overwrite, progress=progress,
            )  # fmt: skip
            bind(branched)
            note["summary"] = (
                f"{result.steps} steps, {result.tokens} tokens from {origin}, last loss {result.loss:.4f}"
            )
            note["facts"] = {
                "config": config.to_json(),
                "tokens": result.tokens,
                "seconds": result.seconds,
                "data": origin,
            }
        else:
            branched = settle(branched, forms)
            reason = (
                "the plan changes nothing" if not compresses else "no training data and no DistillConfig were given"
            )
            note["summary"] = f"skipped: {reason}"

    with journal.stage("fold") as note:
        folded, results = fold(branched, forms)
        note["summary"] = summary_of(results)
        note["refusals"] = refusals_of(results)

    if windows is not None and trains:
        with journal.stage("evaluate") as note:
            quality["compressed"] = perplexity_and_kl(folded.tree, source.model, windows, stride=stride)
            note["summary"] = f"compressed {quality['compressed']}"
    elif "untrained" in quality:
        quality["compressed"] = quality["untrained"]

    return Compiled(folded.tree, folded.graph, chosen, tuple(journal.records), folded, source, quality)


def make_plan(
    model: nn.Module | str | Path | Any,
    budget: float | int | str,
    *,
    metric: Metric | None = None,
    scope: Scope = "sites",
    workload: Workload | None = None,
    rules: Mapping[str, RuleValue] | None = None,
    calibration: Any = None,
    damage: Kind = "two-sided",
    inputs: Any = None,
    tokenizer: Any = None,
    seed: int = 0,
    rank_multiple: int = 8,
) -> Plan:
    """Solve for a plan and stop: the first half of `compile`, with the same arguments.

    A config, or a folder with a config and no weights, is planned on the meta device with a spectral prior: nothing
    is downloaded or allocated, and the plan's damage is None.

    Raises:
        BadInput, InfeasibleBudget: as `compile`.
    """
    asked = Budget.parse(budget, metric)
    calibration = reusable(calibration)
    source = load_source(model, tokenizer)
    program = trace(source.model, example_inputs(source, calibration) if inputs is None else inputs)
    if is_meta(source.model):
        profiled = prior(program.sites)
    else:
        data, _ = calibration_batches(program, source, calibration, seed)
        profiled = profile(program, data, kind=damage, seed=seed)
    return solve(plan_problem(program, profiled, asked, workload, rules, scope, rank_multiple))


def plan_problem(
    program: Program,
    profiled: Profile,
    budget: Budget,
    workload: Workload | None,
    rules: Mapping[str, RuleValue] | None,
    scope: Scope,
    rank_multiple: int,
) -> Problem:
    """The knapsack of a traced and profiled program."""
    return build_problem(
        program.sites, budget=budget, cost_model=FlopsCostModel(), damage_model=profiled,
        workload=workload or default_workload(program), rules=rules, scope=scope, operators=program.operators,
        rank_multiple=rank_multiple, fingerprints=fingerprints(program, profiled),
    )  # fmt: skip


# ── Small decisions the driver makes from what it is given ───────────────────────────────────────────────────────


def without_missing_blocks(config: DistillConfig, branched: Program, source: Source) -> DistillConfig:
    """The hidden-state term off, where a model has no blocks whose outputs could be compared."""
    if config.hidden_weight and not shared_blocks(branched.tree, source.model):
        return replace(config, hidden_weight=0.0)
    return config


def default_workload(program: Program) -> Workload:
    """One prompt of 128 tokens, or as long as the model allows."""
    config = getattr(program.tree, "config", None)
    longest = getattr(config, "max_position_embeddings", None) or CALIBRATION_LENGTH
    return Workload(tokens=min(128, int(longest)))


def fingerprints(program: Program, profiled: Profile) -> dict[str, str]:
    """What a plan was made for: the model's shapes and the damage it was solved with."""
    import hashlib

    shapes = ";".join(f"{s.name}:{s.out_features}x{s.in_features}" for s in program.sites)
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
    sites = {site.name: site for site in problem.sites}
    price = {
        name: (problem.cost(sites[name], Dense()), problem.cost(sites[name], form)) for name, form in forms.items()
    }

    def fractions(retention: Mapping[str, float]) -> tuple[float, float]:
        relaxed = executable = float(problem.fixed)
        for name, (dense, final) in price.items():
            d = retention.get(name, 0.0)
            is_dense = forms[name] == Dense()
            relaxed += dense if is_dense else d * dense + final
            executable += dense if is_dense or d > 0.0 else final
        return relaxed / problem.baseline, executable / problem.baseline

    return fractions
