"""Trains the branched tree towards its teacher while dense compute leaves it, on a schedule fixed by step.

    retention d of every factored site    1 -> 0 over the first part of the steps, then the dense part is freed
    the remaining steps                   train exactly the form that folding will write

A fractional d saves nothing yet: metrics keep the `relaxed` fraction (d counts in proportion) apart from the
`executable` one (dense counts in full until d is 0), and only the executable one is the budget.

Everything that decides a step (batch, retention, learning rate) is a pure function of the step number, so a resumed
run needs the trainable tensors, the optimizer's state and the random state, and then repeats bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .checkpoint import Checkpoint, list_checkpoints, load_latest, remove_leftovers, save_checkpoint
from .data import Batches, BatchSource
from .errors import BadInput, DistillationDiverged
from .layers import BranchedLinear
from .losses import TopK
from .objective import Inputs, Objective, Terms, choose_comparison
from .offline import TeacherTopK, fingerprint_of_module, write_teacher_topk

Autocast = Literal["auto", "bfloat16", "off"]
ExecutableCost = Callable[[Mapping[str, float]], tuple[float, float]]

# Settings that change what is kept on the disk, not what is computed; a resumed run may change them.
_FREE_TO_CHANGE = ("checkpoint_every", "keep_checkpoints")


# ── Settings ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class DistillConfig:
    """How to distill. Plain data; equal after JSON.

    Attributes:
        steps: optimizer steps.
        batch: sequences per step.
        length: tokens per sequence.
        learning_rate: peak; warms up linearly over `warmup_fraction` of the steps, then falls to 0 as a cosine. None
            leaves it to `learning_rate_for` where the plan's damage is known, else takes 0.001.
        warmup_fraction: of the steps.
        weight_decay: of matrices; vectors (norms, biases, gates) have none.
        betas: AdamW's.
        gradient_clip: largest norm of the whole gradient.
        temperature: of the KL.
        kl_weight: of the KL, or of the output distance where a model has no vocabulary.
        hidden_weight: of the block outputs' relative distance; 0 leaves it out.
        label_weight: of the cross-entropy of the text's own next tokens (models with a vocabulary); 0 leaves it out.
            It helps where the teacher itself has more to learn from such text, and pulls away from it.
        pooled_weight: of the distance of the outputs' directions after their mean over the tokens (models without a
            vocabulary), which is what sentence encoders are used for; 0 leaves it out.
        retention_fraction: part of the steps over which retention goes from 1 to 0; 0 starts without dense parts.
        retention_shape: how it goes.
        seed: of the order of batches and of anything random in the model.
        autocast: run GEMMs in bfloat16, or not; `"auto"` times both once and takes bfloat16 where it is faster.
        compile: run both models through `torch.compile`: shorter steps after a minute or so of compiling. Needs a
            C++ compiler on a CPU, and goes without the hidden-state term.
        checkpoint_every: steps between checkpoints; the last step always writes one.
        keep_checkpoints: how many of them stay.
        teacher_topk: store this many teacher logits per token beforehand, so that the teacher need not run while
            the student trains; None runs it each step.
    """

    steps: int = 1000
    batch: int = 8
    length: int = 256
    learning_rate: float | None = None
    warmup_fraction: float = 0.02
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    temperature: float = 1.0
    kl_weight: float = 1.0
    hidden_weight: float = 0.1
    label_weight: float = 0.0
    pooled_weight: float = 0.0
    retention_fraction: float = 0.5
    retention_shape: Literal["linear", "cosine"] = "linear"
    seed: int = 0
    autocast: Autocast = "auto"
    compile: bool = False
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    teacher_topk: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_every", "keep_checkpoints"):
            _require(name, getattr(self, name), "a whole number of at least 1", lambda v: _whole(v) and v >= 1)
        _require("length", self.length, "a whole number of at least 2", lambda v: _whole(v) and v >= 2)
        _require("seed", self.seed, "a whole number of at least 0", lambda v: _whole(v) and v >= 0)
        for name in ("gradient_clip", "temperature", *(() if self.learning_rate is None else ("learning_rate",))):
            _require(name, getattr(self, name), "a number above 0", lambda v: _finite(v) and v > 0)
        for name in ("weight_decay", "kl_weight", "hidden_weight", "label_weight", "pooled_weight"):
            _require(name, getattr(self, name), "a number of at least 0", lambda v: _finite(v) and v >= 0)
        for name in ("warmup_fraction", "retention_fraction"):
            _require(name, getattr(self, name), "at least 0 and below 1", lambda v: _finite(v) and 0 <= v < 1)
        _require("betas", self.betas, "two numbers of at least 0 and below 1", _are_betas)
        _require("retention_shape", self.retention_shape, "'linear' or 'cosine'", lambda v: v in ("linear", "cosine"))
        _require(
            "autocast",
            self.autocast,
            "'auto', 'bfloat16' or 'off'",
            lambda v: v in ("auto", "bfloat16", "off"),
        )
        _require(
            "teacher_topk",
            self.teacher_topk,
            "None or a whole number of at least 1",
            lambda v: v is None or (_whole(v) and v >= 1),
        )
        if self.kl_weight == self.hidden_weight == self.pooled_weight == 0:
            raise BadInput(
                "kl_weight, hidden_weight and pooled_weight are all 0, so nothing would be trained; raise one of them"
            )
        if self.compile and self.hidden_weight:
            raise BadInput(
                f"compile=True cannot collect block outputs, but hidden_weight={self.hidden_weight} compares them; "
                f"set one of the two back"
            )
        if self.label_weight and (self.kl_weight == 0 or self.temperature != 1.0 or self.teacher_topk is not None):
            raise BadInput(
                f"label_weight={self.label_weight} goes with a KL at temperature 1 and a teacher that runs; got "
                f"kl_weight={self.kl_weight}, temperature={self.temperature}, teacher_topk={self.teacher_topk}"
            )
        if self.teacher_topk is not None and self.hidden_weight:
            raise BadInput(
                f"teacher_topk={self.teacher_topk} stores logits only, but hidden_weight={self.hidden_weight} needs "
                f"the teacher's block outputs; set hidden_weight=0 or teacher_topk=None"
            )

    @property
    def retention_steps(self) -> int:
        """The first step at which every factored site has d = 0; at least the last step trains the final form."""
        return min(math.ceil(self.retention_fraction * self.steps), self.steps - 1)

    def deciding(self) -> DistillConfig:
        """The same, with defaults for what a resumed run may change: its result does not depend on it."""
        defaults: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in _FREE_TO_CHANGE}
        return replace(self, **defaults)

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads back."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DistillConfig:
        """Raises BadInput for settings this class does not know."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise BadInput(f"unknown distillation settings {unknown}; known are {', '.join(sorted(known))}")
        values = dict(data)
        if isinstance(values.get("betas"), list):
            values["betas"] = tuple(values["betas"])
        return cls(**values)


def _require(name: str, value: Any, wanted: str, holds: Callable[[Any], bool]) -> None:
    if not holds(value):
        raise BadInput(f"{name} is {value!r}; it must be {wanted}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_betas(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_finite(beta) and 0 <= beta < 1 for beta in value)


@dataclass(frozen=True)
class DistillResult:
    """What a run did.

    Attributes:
        steps: optimizer steps in all; `resumed_from` of them were taken by earlier processes.
        resumed_from: the step this process started at.
        comparison: `head`, `logits` or `outputs`; see objective.py.
        autocast: whether GEMMs ran in bfloat16.
        loss: of the last step.
        main: KL in nats per token, or output distance, of the last step's batch.
        hidden: block distance of the last step's batch, or None.
        tokens: seen by all steps, padding included (for inputs without tokens: rows).
        seconds: of training, earlier processes included.
        metrics: the JSONL file, or None.
        checkpoint: the last checkpoint, or None.
    """

    steps: int
    resumed_from: int
    comparison: str
    autocast: bool
    loss: float
    main: float
    hidden: float | None
    tokens: int
    seconds: float
    metrics: Path | None
    checkpoint: Path | None


DEFAULT_LEARNING_RATE = 1e-3
# The peak that suits a plan with this much damage, in nats per token, at so many tokens a step; found on the bundled
# model at 0.25.
REFERENCE_LEARNING_RATE, REFERENCE_DAMAGE, REFERENCE_TOKENS = 1e-3, 0.31, 8 * 256
SMALLEST_LEARNING_RATE = 1e-4


def learning_rate_for(damage: float, tokens: int) -> float:
    """A peak learning rate for a plan with a damage in nats per token, trained with so many tokens a step.

    The jitter of the optimizer's steps costs a KL that grows with their square, and it has to stay below the damage
    there is to repair: so the rate goes with the root of the damage. On the bundled model, the rate that is right at
    budget 0.25 leaves a plan at 0.5 worse than it was before training. The noise of a gradient falls with the root of
    the tokens behind it, and so the rate rises with it.
    """
    highest = REFERENCE_LEARNING_RATE * math.sqrt(tokens / REFERENCE_TOKENS)
    rate = highest * math.sqrt(damage / REFERENCE_DAMAGE)
    return min(max(rate, SMALLEST_LEARNING_RATE), highest)


# ── Schedules: pure functions of the step ────────────────────────────────────────────────────────────────────────


def retention_at(step: int, config: DistillConfig) -> float:
    """d of every factored site during `step` (from 0): 1.0 at the start, exactly 0.0 from `retention_steps` on."""
    if step >= config.retention_steps:
        return 0.0
    progress = step / config.retention_steps
    return 1.0 - progress if config.retention_shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def learning_rate_at(step: int, config: DistillConfig) -> float:
    """Linear warm-up, then a cosine that reaches 0 just after the last step."""
    peak = DEFAULT_LEARNING_RATE if config.learning_rate is None else config.learning_rate
    warmup = math.ceil(config.warmup_fraction * config.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (config.steps - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


# ── The run ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Progress:
    """What changes from step to step beside the tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Run:
    """Everything a training loop needs, made once."""

    config: DistillConfig
    tree: nn.Module
    batches: BatchSource
    trainable: dict[str, nn.Parameter]
    factored: dict[str, BranchedLinear]
    retained: dict[str, BranchedLinear]
    optimizer: torch.optim.AdamW
    objective: Objective
    stored: TeacherTopK | None
    executable_cost: ExecutableCost | None
    folder: Path | None
    fingerprint: dict[str, Any]
    autocast: bool

    @property
    def device(self) -> torch.device:
        return next(self.tree.parameters()).device


def distill(
    tree: nn.Module,
    teacher: nn.Module,
    batches: BatchSource,
    config: DistillConfig,
    *,
    folder: Path | None = None,
    retained: frozenset[str] = frozenset(),
    executable_cost: ExecutableCost | None = None,
    resume: bool = False,
    overwrite: bool = False,
    before_step: Callable[[int], None] | None = None,
    loss_weight: Callable[[int], float] | None = None,
    on_step: Callable[[Mapping[str, Any]], None] | None = None,
    progress: bool = True,
) -> DistillResult:
    """Trains `tree` in place until every branched site outside `retained` is purely factored.

    The student runs in eval mode: it has to match a deterministic teacher, and dropout would only add noise.
    Modes and `requires_grad` flags of both models, and the caller's random state, are put back afterwards.

    Args:
        tree: the model with `BranchedLinear` in place of projections; what requires a gradient and is not shared
            with the teacher trains.
        teacher: never trains; may share frozen parameters with the tree.
        batches: `data.Batches` or `data.InputBatches`.
        folder: receives `metrics.jsonl` and `checkpoints/`; None keeps nothing.
        retained: sites whose final form is dense: their d stays 1.
        executable_cost: retention by site -> (relaxed fraction, executable fraction) of the baseline cost.
        resume: continue from the newest good checkpoint in `folder`, or start where there is none.
        overwrite: remove an earlier run's metrics, checkpoints and stored teacher logits first.
        before_step: called with each step's number (from 0) before it is taken, to choose what of the tree trains
            in it. Must depend on the number alone, so that a resumed run repeats.
        loss_weight: what the gradient of each step's loss is multiplied with, by the step's number alone.
        on_step: called with each step's metrics.
        progress: show a bar on stderr.

    Raises:
        BadInput: for settings, data or folders that do not fit each other.
        DistillationDiverged: when the loss or the gradient is no longer finite.
    """
    _check_folder(folder, config, resume, overwrite)
    sites = {name: module for name, module in tree.named_modules() if isinstance(module, BranchedLinear)}
    trainable = _trainable(tree, teacher)
    _check_sites(sites, retained, trainable)
    with _undisturbed(tree, teacher, config.seed), _teacher_unchanged(teacher):
        fingerprint = _fingerprint(tree, teacher, batches, config, retained)
        checkpoint = _checkpoint_to_resume(folder, fingerprint) if resume else None
        autocast = checkpoint.state["autocast"] if checkpoint else _decide_autocast(tree, batches, config)
        run = _Run(
            config=config,
            tree=tree,
            batches=batches,
            trainable=trainable,
            factored={name: site for name, site in sites.items() if name not in retained},
            retained={name: site for name, site in sites.items() if name in retained},
            optimizer=_optimizer(trainable, config),
            objective=_objective(tree, teacher, batches, config),
            stored=_stored_teacher(teacher, batches, config, folder),
            executable_cost=executable_cost,
            folder=folder,
            fingerprint=fingerprint,
            autocast=autocast,
        )
        where = _restore(run, checkpoint) if checkpoint else _Progress()
        _truncate_metrics(folder, where.step)
        with _compiled((tree, teacher) if config.compile else ()):
            return _train(run, where, before_step, loss_weight or (lambda step: 1.0), on_step, progress)


def _train(
    run: _Run,
    where: _Progress,
    before_step: Callable[[int], None] | None,
    loss_weight: Callable[[int], float],
    on_step: Callable[[Mapping[str, Any]], None] | None,
    show: bool,
) -> DistillResult:
    """Takes the remaining steps."""
    resumed_from = where.step
    accelerator = _accelerator(run.device, run.autocast)
    objective, optimizer = accelerator.prepare(run.objective, run.optimizer, device_placement=[False, False])
    started = time.perf_counter() - where.seconds
    path: Path | None = list_checkpoints(run.folder / "checkpoints")[-1] if where.step and run.folder else None
    try:
        with _bar(run.config.steps, where.step, show) as advance, _metrics_file(run.folder) as write:
            while where.step < run.config.steps:
                costs = _set_retention(run, where.step)
                if before_step is not None:
                    before_step(where.step)
                weight = loss_weight(where.step)
                record = _step(
                    run, where, path, weight, accelerator=accelerator, objective=objective, optimizer=optimizer
                )
                where.seconds = time.perf_counter() - started
                where.last = {**record, **costs, "tokens": where.tokens, "seconds": round(where.seconds, 3)}
                write(where.last)
                advance(where.last)
                if run.folder is not None and _is_checkpoint_step(where.step, run.config):
                    path = save_checkpoint(
                        run.folder / "checkpoints", _checkpoint_of(run, where), run.config.keep_checkpoints
                    )
                if on_step is not None:
                    on_step(where.last)
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        accelerator.unwrap_model(objective, keep_fp32_wrapper=False)
        accelerator.free_memory()
    return DistillResult(
        steps=where.step,
        resumed_from=resumed_from,
        comparison=run.objective.comparison,
        autocast=run.autocast,
        loss=where.last["loss"],
        main=where.last["kl"],
        hidden=where.last["hidden"],
        tokens=where.tokens,
        seconds=where.seconds,
        metrics=None if run.folder is None else run.folder / "metrics.jsonl",
        checkpoint=path,
    )


def _step(
    run: _Run,
    where: _Progress,
    good: Path | None,
    weight: float,
    *,
    accelerator: Any,
    objective: nn.Module,
    optimizer: Any,
) -> dict[str, Any]:
    """One optimizer step; moves `where` forward. Nothing is changed when loss or gradient are not finite."""
    step, config = where.step, run.config
    inputs = _inputs_of(run, step)
    rate = learning_rate_at(step, config)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    terms: Terms = objective(inputs, _stored_for(run, step))
    loss = float(terms.loss.detach())
    _stop_unless_finite("loss", loss, step, good)
    accelerator.backward(weight * terms.loss)
    norm = float(accelerator.clip_grad_norm_(run.trainable.values(), config.gradient_clip))
    _stop_unless_finite("gradient norm", norm, step, good)
    optimizer.step()
    optimizer.zero_grad()
    where.step += 1
    where.tokens += next(iter(inputs.values())).numel() if "input_ids" in inputs else _rows(inputs)
    return {
        "step": where.step,
        "loss": loss,
        "kl": float(terms.main),
        "hidden": None if terms.hidden is None else float(terms.hidden),
        "label": None if terms.label is None else float(terms.label),
        "lr": rate,
        "gradient_norm": norm,
    }


def _stop_unless_finite(what: str, value: float, step: int, good: Path | None) -> None:
    if math.isfinite(value):
        return
    kept = "no checkpoint was written yet" if good is None else f"the last good checkpoint is {good}"
    raise DistillationDiverged(
        f"the {what} of step {step + 1} is {value}; the weights of step {step} are unchanged and {kept}. "
        f"Try a lower learning_rate, a lower gradient_clip, or autocast='off'"
    )


def _set_retention(run: _Run, step: int) -> dict[str, float | None]:
    """Brings every factored site to this step's d, frees dense parts at 0, and returns what it costs now."""
    retention = retention_at(step, run.config)
    for site in run.factored.values():
        site.retention.data.fill_(retention)
        if retention == 0.0:
            site.drop_dense()
    relaxed = executable = None
    if run.executable_cost is not None:
        retention_of = dict.fromkeys(run.factored, retention) | dict.fromkeys(run.retained, 1.0)
        relaxed, executable = run.executable_cost(retention_of)
    return {"retention": retention, "relaxed": relaxed, "executable": executable}


def _inputs_of(run: _Run, step: int) -> Inputs:
    return {name: tensor.to(run.device) for name, tensor in _named(run.batches, step).items()}


def _named(batches: BatchSource, step: int) -> Inputs:
    batch = batches.batch(step)
    return {getattr(batches, "main", "input_ids"): batch} if isinstance(batch, Tensor) else dict(batch)


def _stored_for(run: _Run, step: int) -> TopK | None:
    if run.stored is None:
        return None
    assert isinstance(run.batches, Batches)
    return TopK(*(tensor.to(run.device) for tensor in run.stored.read(run.batches.rows(step))))


def _rows(inputs: Inputs) -> int:
    return next(iter(inputs.values())).shape[0]


# ── What trains, and what must not ───────────────────────────────────────────────────────────────────────────────


def _trainable(tree: nn.Module, teacher: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the tree that require a gradient and are not the teacher's.

    The teacher is the caller's model, whose parameters usually all require gradients; sharing decides.
    """
    shared = {id(parameter) for parameter in teacher.parameters()}
    chosen = {n: p for n, p in tree.named_parameters() if p.requires_grad and id(p) not in shared}
    storages = {p.untyped_storage().data_ptr() for p in teacher.parameters() if p.numel()}
    for name, parameter in chosen.items():
        assert parameter.untyped_storage().data_ptr() not in storages, f"{name} would train the teacher's memory"
    return chosen


def _check_sites(
    sites: Mapping[str, BranchedLinear], retained: frozenset[str], trainable: Mapping[str, nn.Parameter]
) -> None:
    if not trainable:
        raise BadInput("0 parameters of this tree can train; insert branches first, or skip distillation")
    if missing := sorted(retained - sites.keys()):
        raise BadInput(f"retained names {missing} are no branched sites; this tree has {', '.join(sites) or 'none'}")


@contextmanager
def _undisturbed(tree: nn.Module, teacher: nn.Module, seed: int) -> Iterator[None]:
    """Both models in eval mode, shared parameters without gradients, a seeded random state; then all as before."""
    modes = [(module, module.training) for model in (tree, teacher) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in teacher.parameters()]
    device = next(tree.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            tree.eval()
            teacher.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, required in flags:
                parameter.requires_grad_(required)
            for module, mode in modes:
                module.training = mode


@contextmanager
def _compiled(models: Sequence[nn.Module]) -> Iterator[None]:
    """Models, and the base models that the head is taken from, run through `torch.compile`; then as before."""
    modules = [module for model in models for module in {model, getattr(model, "base_model", model)}]
    try:
        for module in modules:
            module.compile(dynamic=False)
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


@contextmanager
def _teacher_unchanged(teacher: nn.Module) -> Iterator[None]:
    """Asserts that no teacher tensor was written to: every in-place write raises a tensor's version."""
    before = {name: tensor._version for name, tensor in teacher.state_dict(keep_vars=True).items()}
    yield
    after = {name: tensor._version for name, tensor in teacher.state_dict(keep_vars=True).items()}
    written = [name for name in after if before[name] != after[name]]
    assert not written, f"training wrote to the teacher: {written}"


def _optimizer(trainable: Mapping[str, nn.Parameter], config: DistillConfig) -> torch.optim.AdamW:
    """AdamW, fused where every parameter allows it; matrices decay, vectors do not."""
    matrices = [p for p in trainable.values() if p.ndim >= 2]
    vectors = [p for p in trainable.values() if p.ndim < 2]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if parameters
    ]
    return torch.optim.AdamW(groups, lr=learning_rate_at(0, config), betas=config.betas, fused=True)


def _objective(tree: nn.Module, teacher: nn.Module, batches: BatchSource, config: DistillConfig) -> Objective:
    device = next(tree.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in _named(batches, 0).items()}
    comparison = choose_comparison(tree, teacher, inputs)
    return Objective(
        tree,
        teacher,
        comparison,
        temperature=config.temperature,
        kl_weight=config.kl_weight,
        hidden_weight=config.hidden_weight,
        label_weight=config.label_weight,
        pooled_weight=config.pooled_weight,
    )


def _stored_teacher(
    teacher: nn.Module, batches: BatchSource, config: DistillConfig, folder: Path | None
) -> TeacherTopK | None:
    if config.teacher_topk is None:
        return None
    if folder is None or not isinstance(batches, Batches):
        raise BadInput(
            f"teacher_topk={config.teacher_topk} stores logits of token sequences in the run's folder; "
            f"give a folder and token sequences, or set teacher_topk=None"
        )
    return write_teacher_topk(
        teacher, batches.sequences, config.teacher_topk, folder / "teacher-topk", temperature=config.temperature
    )


# ── Precision ────────────────────────────────────────────────────────────────────────────────────────────────────


def _decide_autocast(tree: nn.Module, batches: BatchSource, config: DistillConfig) -> bool:
    """Whether GEMMs run in bfloat16; `"auto"` asks the machine once, and checkpoints carry the answer."""
    if config.autocast != "auto":
        return config.autocast == "bfloat16"
    widest = max((p for p in tree.parameters() if p.ndim == 2), key=lambda p: p.numel(), default=None)
    if widest is None:
        return False
    batch = batches.batch(0)
    rows = (batch if isinstance(batch, Tensor) else next(iter(batch.values()))).numel()
    return bfloat16_pays(min(rows, 4096), min(widest.shape), widest.device)


def bfloat16_pays(rows: int, width: int, device: torch.device) -> bool:
    """Whether a (rows x width) by (width x width) product, casts included, is faster in bfloat16 than in float32."""
    x, weight = torch.zeros(rows, width, device=device), torch.zeros(width, width, device=device)

    def full() -> Tensor:
        return x @ weight

    def cast() -> Tensor:
        return x.bfloat16() @ weight.bfloat16()

    return _best_time(cast, device) < _best_time(full, device)


def _best_time(work: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _accelerator(device: torch.device, autocast: bool) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps its precision and device in process-wide singletons and refuses a second run with others.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16" if autocast else "no", cpu=device.type == "cpu")
    if accelerator.num_processes > 1:
        raise BadInput(
            f"distillation runs in 1 process but was launched in {accelerator.num_processes}; "
            f"start it without a distributed launcher"
        )
    return accelerator


# ── Checkpoints and resuming ─────────────────────────────────────────────────────────────────────────────────────


def _checkpoint_of(run: _Run, where: _Progress) -> Checkpoint:
    tensors: dict[str, Tensor] = {f"model/{name}": p for name, p in run.trainable.items()}
    for name, parameter in run.trainable.items():
        for key, value in run.optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value
    tensors["random/cpu"] = torch.get_rng_state()
    if run.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(run.device)
    state = {
        "fingerprint": run.fingerprint,
        "autocast": run.autocast,
        "threads": torch.get_num_threads(),
        "tokens": where.tokens,
        "seconds": where.seconds,
        "last": where.last,
    }
    return Checkpoint(where.step, tensors, state)


@torch.no_grad()
def _restore(run: _Run, checkpoint: Checkpoint) -> _Progress:
    """Puts a checkpoint's tensors into the tree and the optimizer. Retention follows from the step."""
    for name, parameter in run.trainable.items():
        parameter.copy_(checkpoint.tensors[f"model/{name}"])
        prefix = f"optimizer/{name}/"
        run.optimizer.state[parameter] = {
            key.removeprefix(prefix): _laid_out_like(parameter, value)
            for key, value in checkpoint.tensors.items()
            if key.startswith(prefix)
        }
    _set_retention(run, checkpoint.step)
    torch.set_rng_state(checkpoint.tensors["random/cpu"])
    if "random/cuda" in checkpoint.tensors:
        torch.cuda.set_rng_state(checkpoint.tensors["random/cuda"], run.device)
    state = checkpoint.state
    if state["threads"] != torch.get_num_threads():
        warnings.warn(
            f"the run used {state['threads']} threads and now has {torch.get_num_threads()}; "
            f"sums may round differently, so it will not repeat bit for bit",
            stacklevel=3,
        )
    return _Progress(checkpoint.step, state["tokens"], state["seconds"], state["last"])


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` on the parameter's device and in its memory layout.

    The fused optimizer walks parameter, gradient and moments by address. Files hold rows one after the other, but a
    factor that came out of an SVD may hold columns: without this the moments would silently be paired with other
    elements.
    """
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _checkpoint_to_resume(folder: Path | None, fingerprint: dict[str, Any]) -> Checkpoint | None:
    assert folder is not None
    root = folder / "checkpoints"
    remove_leftovers(root)
    checkpoint, damaged = load_latest(root)
    for damage in damaged:
        step = "the start" if checkpoint is None else f"step {checkpoint.step}"
        warnings.warn(f"{damage.reason}\ngoing back to {step}", stacklevel=3)
        shutil.rmtree(damage.path)
    if checkpoint is not None:
        _check_fingerprint(checkpoint.state["fingerprint"], fingerprint, folder)
    return checkpoint


def _fingerprint(
    tree: nn.Module, teacher: nn.Module, batches: BatchSource, config: DistillConfig, retained: frozenset[str]
) -> dict[str, Any]:
    """Everything a run's result depends on, as JSON values."""
    settings = {name: value for name, value in config.to_json().items() if name not in _FREE_TO_CHANGE}
    return {
        **{f"config.{name}": value for name, value in settings.items()},
        "data": batches.fingerprint(),
        "teacher": fingerprint_of_module(teacher),
        "tree": fingerprint_of_module(tree),
        "retained": sorted(retained),
        "torch": torch.__version__,
    }


def _check_fingerprint(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        listed = "; ".join(f"{name} was {found.get(name)!r} and is now {wanted[name]!r}" for name in differing)
        raise BadInput(f"{folder}: cannot resume another run: {listed}. Restore these, or start with overwrite")


def _check_folder(folder: Path | None, config: DistillConfig, resume: bool, overwrite: bool) -> None:
    check_earlier(folder, resume, overwrite)
    if folder is None:
        return
    if overwrite:
        _remove_earlier(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error


def check_earlier(folder: Path | None, resume: bool, overwrite: bool) -> None:
    """Raise BadInput where a folder holds another run, or none to continue is named."""
    if resume and overwrite:
        raise BadInput("resume and overwrite exclude each other: one keeps what the folder holds, one removes it")
    if folder is None:
        if resume:
            raise BadInput("resume needs the folder of the run to continue; None was given")
        return
    earlier = [path for name in ("metrics.jsonl", "checkpoints") if (path := folder / name).exists()]
    if earlier and not resume and not overwrite:
        raise BadInput(f"{earlier[0]} exists already; resume that run, overwrite it, or choose another folder")


def _remove_earlier(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    for name in ("checkpoints", "teacher-topk"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _is_checkpoint_step(step: int, config: DistillConfig) -> bool:
    return step % config.checkpoint_every == 0 or step == config.steps


# ── Metrics and the bar ──────────────────────────────────────────────────────────────────────────────────────────


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that a killed process left unfinished is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # a finished line ends with a newline


def _truncate_metrics(folder: Path | None, step: int) -> None:
    """Drops records of steps after the checkpoint: they will be taken, and written, again."""
    if folder is None:
        return
    path = folder / "metrics.jsonl"
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_suffix(".writing")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def _metrics_file(folder: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    with nullcontext() if folder is None else (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:

        def write(record: Mapping[str, Any]) -> None:
            if file is not None:
                file.write(json.dumps(record) + "\n")
                file.flush()

        yield write


@contextmanager
def _bar(steps: int, done: int, show: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress bar on stderr: steps, loss, executable budget, time left."""
    bar = Progress(
        TextColumn("distill"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}{task.fields[budget]}"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=not show,
    )
    task = bar.add_task("distill", total=steps, completed=done, loss="", budget="")

    def advance(record: Mapping[str, Any]) -> None:
        executable = record["executable"]
        budget = "" if executable is None else f"  budget {executable:.1%}"
        bar.update(task, completed=record["step"], loss=f"loss {record['loss']:.4f}", budget=budget)

    with bar:
        yield advance
