"""Compile: the stages in order, with no logic of their own here.

    model -> trace -> profile (-> narrow) -> plan -> refit (-> measure) -> insert -> distill -> fold -> Compiled
          -> lower -> verify

What each stage does is in stages.py; how, in the files it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from . import stages
from .budget import Budget
from .calibration import calibration_batches, evaluation_sequences, example_inputs, reusable
from .data import check_readable
from .distillation import DistillConfig
from .evaluate import Quality
from .graph import Program
from .onnx_compiling import compile_onnx, refuse_damage_and_scope, refuse_options
from .onnx_files import is_onnx_path
from .outline import outline, outline_of
from .plan import Plan
from .profiling import Kind, prior, profile
from .rules import RuleValue
from .solver import solve
from .source import Source, is_meta, load_source
from .stages import Journal, Record, Request, changes_anything, device_of_budget, refuse_what_cannot_start
from .tracing import trace
from .values import AnyWorkload, Metric, Scope

if TYPE_CHECKING:
    from .artifact import Artifact
    from .predicting import TimeSpent
    from .report import Report
    from .timing import Timing


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

    def report(
        self,
        artifact: Artifact | None = None,
        timings: Sequence[Timing] | None = None,
        spent: Sequence[TimeSpent] = (),
    ) -> Report:
        """What was asked, planned and achieved; prints as markdown."""
        from .report import build_report

        return build_report(self, artifact, timings, [time.to_json() for time in spent])

    def time_spent(self, artifact: Artifact, *, batch: int = 1, tokens: int = 256) -> list[TimeSpent]:
        """Where the time of each graph of an export goes, site by site, predicted beside measured.

        Args:
            artifact: from `export`.
            batch, tokens: a prompt's shape; a decode step stands behind a cache of `tokens`.
        """
        from .predicting import time_spent

        shape = outline_of(self.program, self.source.name)
        return time_spent(shape, self.plan.forms, artifact, batch=batch, tokens=tokens)

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
        quantize: str | None = None,
        **options: Any,
    ) -> Artifact:
        """Lower to ONNX, load the files in ONNX Runtime, compare, and only then hand them out.

        Args:
            folder: receives the graphs, one weights file and `export.json`.
            target: `cpu` or `cuda`.
            dtype: `float32`, `float16` or (CUDA only) `bfloat16`; by default float32 on the CPU, float16 on CUDA.
            generation: prefill and decode graphs with a key/value cache; by default where the model can generate.
            quantize: `int8` or `int4` stores the weights of sites in that many bits; see docs/quantization.md.
            options: further arguments of `lower`.

        Raises:
            ParityFailed: ONNX Runtime and PyTorch disagree; nothing is left in `folder`.
        """
        from .lowering import lower

        names = [site.name for site in self.program.sites if site.in_tree]
        inputs: Any = tuple(self.program.inputs.values()) if self.program.positional else dict(self.program.inputs)
        return lower(
            self.module, folder, inputs=inputs, target=target, dtype=dtype, generation=generation,  # type: ignore[arg-type]
            quantize=quantize, site_names=names,  # type: ignore[arg-type]
            **{"tokenizer": self.source.tokenizer, **options},
        )  # fmt: skip


def compile(
    model: nn.Module | str | Path,
    budget: float | int | str,
    *,
    metric: Metric | None = None,
    scope: Scope = "sites",
    device: str | Path | None = None,
    dtype: str | None = None,
    workload: str | AnyWorkload | None = None,
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
    interpolative: bool = False,
    narrow: bool | float = False,
    rounds: int = 1,
    refit: bool = True,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    on_record: Callable[[Record], None] | None = None,
) -> Compiled:
    """Compress a model to a budget.

    Args:
        model: an `nn.Module`, a Hugging Face folder or a hub id. It stays untouched: it is the teacher. The path of
            an `.onnx` file goes to `compile_onnx`, and a `CompiledOnnx` comes back.
        budget: the share to keep (`0.25`, `"25%"`) or an amount with a unit (`"12ms"`, `"3.2GFLOP"`, `"400MB"`).
        metric: what the budget counts: `flops` (default), `latency`, `bytes` or `params`.
        scope: `sites` counts the projections, `model` everything in the graph.
        device: whose time a budget in latency is about: a known name, the path of a profile, or `this` (default) for
            this machine, once calibrated. Plans for `this` are timed on it, and solved again where they miss.
        dtype: of the weights, for budgets in bytes or time: what they will be exported in. By default the device's
            own, without a device float32.
        workload: shapes the cost is counted at: a value, or a text such as `"prefill 1x2048 + 256 decode steps"`.
        rules: glob on site names -> `dense`, `exclude`, `compress` or `{"min_rank": .., "max_rank": ..}`.
        calibration: text file, texts, token ids `(sequences, tokens)` or batches; by default the training data, else
            sequences sampled from the model itself.
        train: data to distill on, in the same forms; None compresses without training, unless `distill` is given,
            which then trains on sequences sampled from the model itself.
        evaluation: text file or token windows to measure perplexity and KL on, before and after.
        distill: how to train.
        plan: apply this plan (perhaps edited by hand) instead of solving for one; its costs are counted anew.
        damage: how damage is measured: `two-sided`, or the baselines `whitened` and `plain`.
        inputs: example inputs; needed for modules that are no Hugging Face models and have no calibration batches.
        tokenizer: for text data, where `model` is a module.
        seed: of calibration sampling, tokens drawn for the damage, and the order of training data.
        rank_multiple: ranks are multiples of this, since hardware likes aligned sizes.
        interpolative: let the first GEMM of each pair compute some of the outputs themselves, so that a pair of rank
            r has r^2 weights less: higher ranks for the same FLOPs, for one more copy of the outputs a run and about
            ten times the rounding errors. Not for heads, budgets in time, ONNX files, families, and exports in
            bfloat16, int8 or int4.
        narrow: let MLPs lose inner channels before what is left is factored: True for the share that damages least
            before training, or the share of them to keep, from 0.25 on. See `narrowing`. For budgets in flops, bytes
            or params.
        rounds: how often the plan may be solved again with damages measured at the plan before; see `marginals`.
        refit: fit each site's starting factors to the inputs that the compressed sites before it give; see
            `refitting`. Neither applies to the baseline measures of damage.
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
    if is_onnx_path(model):
        refuse_damage_and_scope(damage, scope)
        refuse_options(
            {"train": train, "evaluation": evaluation, "distill": distill, "inputs": inputs, "tokenizer": tokenizer,
             "device": device, "dtype": dtype, "folder": folder, "resume": resume, "interpolative": interpolative,
             "narrow": narrow, "rounds": rounds if rounds > 1 else None}
        )  # fmt: skip
        # Typed as what every other model gives: callers with a path of this kind know what comes back.
        compiled: Any = compile_onnx(
            str(model), budget, metric=metric, workload=workload, rules=rules, calibration=calibration, plan=plan,
            seed=seed, rank_multiple=rank_multiple, on_record=on_record,
        )  # fmt: skip
        return compiled
    asked = Budget.parse(budget, metric)
    refuse_what_cannot_start(damage, narrows=narrow, metric=asked.metric, plan=plan)
    folder = None if folder is None else Path(folder)
    stages.refuse_earlier_run(folder, train is not None or distill is not None, resume, overwrite)
    target = device_of_budget(asked, device, dtype)
    request = Request(asked, workload, rules, scope, rank_multiple, interpolative, target, dtype)
    check_readable(calibration, train, evaluation)
    calibration, train = reusable(calibration), reusable(train)
    data = train if calibration is None else calibration
    config = distill or DistillConfig(seed=seed)
    journal = Journal(on_record)

    source = journal.run("load", stages.load, model, tokenizer)
    windows = evaluation_sequences(source, evaluation)
    program = journal.run("trace", stages.trace_model, source, inputs, data, rules)
    profiled, batches = journal.run("profile", stages.measure_damage, source, program, data, damage, seed, folder)

    resumed = stages.resumed_plan(asked, folder, resume)
    given, teacher = resumed or plan, program
    build_on = partial(request.of_program, source.name)
    program, profiled = journal.run(
        "narrow", stages.narrow_mlps, program, profiled, batches, build_on, narrow, given, refit, folder
    )
    build = partial(build_on, program)
    problem, _ = build(profiled)
    if resumed is not None:
        stages.check_resumed(resumed, problem)
    chosen = resumed or journal.run("plan", stages.choose_forms, problem, plan, folder)
    if resumed is not None:
        found = journal.run("measure", stages.resume_timed, program, batches, profiled, build, resumed, refit)
    else:
        found = journal.run(
            "refit", stages.measure_plan, program, batches, profiled, build, chosen, 0 if given else rounds, refit,
            folder, teacher,
        )  # fmt: skip
    if given is None:
        found = journal.run("measure", stages.meet_latency, source, program, batches, found, folder)
    chosen = found.plan
    trains = changes_anything(chosen) and (train is not None or distill is not None)
    branched = journal.run("insert", stages.insert_branches, program, found, trains)
    quality = journal.run("evaluate", stages.evaluate_untrained, source, branched, chosen.forms, windows)
    if trains:
        branched = journal.run(
            "distill", stages.distill_branches, source, branched, found.problem, chosen, train, config,
            folder, resume, overwrite, progress,
        )  # fmt: skip
    else:
        branched = journal.run("settle", stages.settle_branches, branched, chosen)
    folded = journal.run("fold", stages.fold_branches, branched, chosen.forms)
    quality = journal.run("evaluate", stages.evaluate_compressed, source, folded, windows, quality, trains)

    return Compiled(folded.tree, folded.graph, chosen, tuple(journal.records), folded, source, quality)


def make_plan(
    model: nn.Module | str | Path | Any,
    budget: float | int | str,
    *,
    metric: Metric | None = None,
    scope: Scope = "sites",
    device: str | Path | None = None,
    dtype: str | None = None,
    workload: str | AnyWorkload | None = None,
    rules: Mapping[str, RuleValue] | None = None,
    calibration: Any = None,
    damage: Kind = "two-sided",
    inputs: Any = None,
    tokenizer: Any = None,
    seed: int = 0,
    rank_multiple: int = 8,
    interpolative: bool = False,
    narrow: bool | float = False,
    rounds: int = 1,
    refit: bool = True,
) -> Plan:
    """Solve for a plan and stop: the first half of `compile`, with the same arguments.

    A config, or a folder with a config and no weights, is planned on the meta device with a spectral prior: nothing
    is downloaded or allocated, and the plan's damage is None.

    Raises:
        BadInput, InfeasibleBudget: as `compile`.
    """
    if is_onnx_path(model):
        refuse_damage_and_scope(damage, scope)
        refuse_options(
            {"inputs": inputs, "tokenizer": tokenizer, "device": device, "dtype": dtype,
             "interpolative": interpolative, "narrow": narrow}
        )  # fmt: skip
        return compile_onnx(
            str(model),
            budget,
            metric=metric,
            workload=workload,
            rules=rules,
            calibration=calibration,
            seed=seed,
            rank_multiple=rank_multiple,
        ).plan
    asked = Budget.parse(budget, metric)
    refuse_what_cannot_start(damage, planning=True, narrows=narrow, metric=asked.metric)
    target = device_of_budget(asked, device, dtype)
    request = Request(asked, workload, rules, scope, rank_multiple, interpolative, target, dtype)
    check_readable(calibration)
    calibration = reusable(calibration)
    source = load_source(model, tokenizer)
    if is_meta(source.model):
        stages.refuse_without_weights(source, narrow, damage, calibration)
        shape = outline(source, inputs)
        return solve(request.problem(shape, prior(shape.sites))[0])
    program = trace(source.model, example_inputs(source, calibration) if inputs is None else inputs)
    batches, _ = calibration_batches(program, source, calibration, seed)
    profiled = profile(program, batches, kind=damage, seed=seed)
    teacher, build_on = program, partial(request.of_program, source.name)
    program, profiled = stages.narrow_mlps(program, profiled, batches, build_on, narrow, None, refit, None).value
    build = partial(build_on, program)
    plan = solve(build(profiled)[0])
    return stages.measure_plan(program, batches, profiled, build, plan, rounds, refit, None, teacher).value.plan
