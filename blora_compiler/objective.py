"""Runs student and teacher on one batch and compares them.

    head      causal language models whose logits are `output_embeddings(last_hidden_state)`: the KL is taken from
              hidden states and head weights, so the logits never exist as a whole
    logits    other models with logits over their vocabulary (soft-capped, scaled or compressed heads, graph modules)
    outputs   everything else: relative squared distance of all floating outputs

To the first two can be added the cross-entropy of the text's own next tokens, and to each the mean relative distance
of the outputs of all blocks that hold a branched projection. To the last can be added the distance of the outputs'
means over the tokens, which is what sentence encoders are used for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import BadInput
from .graph import DECODER_INPUT, output_mask, token_mask
from .layers import BranchedLinear
from .losses import TopK, head_losses, kl_from_logits, pooled_distance, relative_error, topk_kl

Comparison = Literal["head", "logits", "outputs"]
Inputs = dict[str, Tensor]


class Terms(NamedTuple):
    """The loss of a batch and what it is made of.

    Attributes:
        loss: the weighted sum that training minimises.
        main: KL in nats per token at the temperature, or the relative distance of outputs. Detached.
        label: cross-entropy of the text's own next tokens, or None where it was not asked for. Detached.
        hidden: relative distance of block outputs, or None where it was not asked for. Detached.
    """

    loss: Tensor
    main: Tensor
    hidden: Tensor | None
    label: Tensor | None = None


class Objective(nn.Module):
    """`forward(inputs) -> Terms`. Holds the student as a submodule and the teacher beside it, out of reach of
    `parameters()`, so that nothing that walks this module can train or wrap the teacher."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        comparison: Comparison,
        *,
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        hidden_weight: float = 0.0,
        label_weight: float = 0.0,
        pooled_weight: float = 0.0,
    ) -> None:
        """Args:
        comparison: see the module; `choose_comparison` finds it.
        temperature: of the KL; its gradient shrinks with the square, which the loss undoes.
        kl_weight: of the main term, whatever the comparison.
        hidden_weight: of the block distance; 0 leaves it out.
        label_weight: of the cross-entropy of the text's next tokens; models with a vocabulary only.
        pooled_weight: of `pooled_distance` of the first output of shape (batch, tokens, features); models without a
            vocabulary only.

        Raises:
            BadInput: if labels are asked for and there is no vocabulary, pooled outputs and there is one, or block
                outputs are to be compared and no block exists in both models.
        """
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self.comparison = comparison
        self._temperature = temperature
        self._main_weight = kl_weight * (temperature**2 if comparison != "outputs" else 1.0)
        self._hidden_weight = hidden_weight
        self._label_weight = label_weight
        if label_weight and comparison == "outputs":
            raise BadInput(
                f"label_weight is {label_weight}, but this model has no vocabulary to find the next token in; "
                f"set it to 0"
            )
        self._pooled_weight = pooled_weight
        if pooled_weight and comparison != "outputs":
            raise BadInput(
                f"pooled_weight is {pooled_weight}, but this model has a vocabulary to be compared by; set it to 0"
            )
        self._blocks = shared_blocks(student, teacher) if hidden_weight else ()
        if hidden_weight and not self._blocks:
            raise BadInput(
                f"hidden_weight is {hidden_weight} but 0 blocks of this model hold a branched projection and exist "
                f"in the teacher under the same name; set hidden_weight to 0"
            )

    @property
    def teacher(self) -> nn.Module:
        """The model that is matched; no submodule of this one."""
        return self._teacher[0]

    def forward(self, inputs: Inputs, stored: TopK | None = None) -> Terms:
        """Args:
        inputs: the model's keyword inputs.
        stored: the teacher's distributions, already softened; the teacher then does not run.
        """
        if stored is not None:
            main = topk_kl(_logits(self.student, inputs) / self._temperature, *stored)
            return Terms(self._main_weight * main, main.detach(), None)
        with torch.no_grad(), block_outputs(self.teacher, self._blocks) as teacher_blocks:
            reference = self._run(self.teacher, inputs)
        with block_outputs(self.student, self._blocks) as student_blocks:
            output = self._run(self.student, inputs)
        loss, main, label = self._compare(output, reference, inputs)
        hidden: Tensor | None = None
        if self._blocks:
            hidden = mean_error(student_blocks, teacher_blocks, token_mask(inputs))
            loss = loss + self._hidden_weight * hidden
        return Terms(loss, main.detach(), None if hidden is None else hidden.detach(), label)

    def _run(self, model: nn.Module, inputs: Inputs) -> Any:
        match self.comparison:
            case "head":
                return _last_hidden(model, inputs)
            case "logits":
                return _logits(model, inputs)
            case "outputs":
                return model(**_without_cache(model, inputs))

    def _compare(self, output: Any, reference: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """What training minimises of the main term and the labels together, and each of the two alone."""
        mask = output_mask(inputs)
        match self.comparison:
            case "head":
                return self._compare_hidden(output, reference, inputs)
            case "logits":
                main = kl_from_logits(output, reference, _fitting(mask, output), self._temperature)
                if not self._label_weight:
                    return self._main_weight * main, main, None
                targets = next_tokens(inputs)
                label = F.cross_entropy(output.flatten(0, -2).float(), targets.flatten(), ignore_index=-1)
                return self._main_weight * main + self._label_weight * label, main, label.detach()
            case "outputs":
                main = output_distance(output, reference, mask)
                loss = self._main_weight * main
                if self._pooled_weight:
                    sides = (_by_token(output), _by_token(reference))
                    loss = loss + self._pooled_weight * pooled_distance(*sides, _fitting(mask, sides[0]))
                return loss, main, None

    def _compare_hidden(
        self, student: Tensor, teacher: Tensor, inputs: Inputs
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        heads = [model.get_output_embeddings() for model in (self.student, self.teacher)]  # type: ignore[operator]
        mask = _fitting(output_mask(inputs), student)
        # The labels' weight is relative to the KL's there.
        weight = self._label_weight / self._main_weight if self._main_weight else 0.0
        targets = next_tokens(inputs) if weight else None
        total, main = head_losses(
            student.flatten(0, -2) if mask is None else student[mask],
            heads[0].weight,
            teacher.flatten(0, -2) if mask is None else teacher[mask],
            heads[1].weight,
            student_bias=heads[0].bias,
            teacher_bias=heads[1].bias,
            labels=None if targets is None else targets.flatten() if mask is None else targets[mask],
            label_weight=weight,
            temperature=self._temperature,
        )
        label = (total.detach() - main) / weight if weight else None
        return self._main_weight * total, main, label


def next_tokens(inputs: Inputs) -> Tensor:
    """(batch, tokens) what the text goes on with after each token; -1 at its end, and where either is padding."""
    ids, mask = inputs[DECODER_INPUT if DECODER_INPUT in inputs else "input_ids"], output_mask(inputs)
    following = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]), -1)
    return F.pad(following, (0, 1), value=-1)


# ── Which comparison fits ────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def choose_comparison(student: nn.Module, teacher: nn.Module, inputs: Inputs) -> Comparison:
    """The comparison that both models allow, found by running both once on a corner of `inputs`."""
    corner = _corner(inputs)
    models = (student, teacher)
    if not all(_speaks_a_vocabulary(model, corner) for model in models):
        return "outputs"
    return "head" if all(_head_comes_apart(model, corner) for model in models) else "logits"


def _corner(inputs: Inputs) -> Inputs:
    """The first row, and of token ids (with their mask) only the first few."""
    rows = {name: tensor[:1] for name, tensor in inputs.items()}
    if "input_ids" in rows:
        length = rows["input_ids"].shape[-1]
        rows = {name: t[:, :8] if t.ndim == 2 and t.shape[-1] == length else t for name, t in rows.items()}
    return rows


def _speaks_a_vocabulary(model: nn.Module, inputs: Inputs) -> bool:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return False
    logits = getattr(model(**_without_cache(model, inputs)), "logits", None)
    return isinstance(logits, Tensor) and logits.shape[-1] == getattr(config.get_text_config(), "vocab_size", None)


def _head_comes_apart(model: Any, inputs: Inputs) -> bool:
    """Whether the logits are the output embeddings applied to the base model's hidden states, and no more.

    Compared by value: soft-capping (Gemma 2), logit scaling (Cohere, Granite) and extra layers (BERT) show there.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    base: Any = getattr(model, "base_model", model)
    if not isinstance(head, nn.Linear) or base is model:
        return False
    hidden = getattr(base(**_without_cache(base, inputs)), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.in_features:
        return False
    logits = model(**_without_cache(model, inputs)).logits
    # Not `allclose`: logits that are NaN must come out as "no" here, and stop the run at its first loss.
    return bool((head(hidden) - logits).abs().max() <= 1e-4 * logits.abs().max())


def _last_hidden(model: nn.Module, inputs: Inputs) -> Tensor:
    base = model.base_model
    return base(**_without_cache(base, inputs)).last_hidden_state  # type: ignore[operator, arg-type]


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**_without_cache(model, inputs)).logits


def _without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs`, told not to build a key/value cache where the model has that choice."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return {**inputs, "use_cache": False} if takes_cache else dict(inputs)


# ── Outputs and blocks ───────────────────────────────────────────────────────────────────────────────────────────


def output_distance(student: Any, teacher: Any, mask: Tensor | None) -> Tensor:
    """Mean `relative_error` over all floating tensors that the two models return."""
    students, teachers = list(_floating(student)), list(_floating(teacher))
    if not students:
        raise BadInput(f"the model returns {type(student).__name__} with 0 floating tensors; nothing can be matched")
    return mean_error(students, teachers, mask)


def mean_error(students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean `relative_error` of pairs, each over the tokens that count where it has a row for each."""
    errors = [relative_error(s, t, _fitting(mask, s)) for s, t in zip(students, teachers, strict=True)]
    return torch.stack(errors).mean()


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.dim():  # a single number is a loss, not an output
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floating(value)


def _by_token(output: Any) -> Tensor:
    """The first output of shape (batch, tokens, features): an encoder's last hidden states."""
    for tensor in _floating(output):
        if tensor.ndim == 3:
            return tensor
    raise BadInput("pooled_weight needs an output of shape (batch, tokens, features), and there is none; set it to 0")


def _fitting(mask: Tensor | None, tensor: Tensor) -> Tensor | None:
    """The mask if it is about the rows of `tensor`; a pooled output, say, has none."""
    return mask if mask is not None and mask.shape == tensor.shape[:-1] else None


def shared_blocks(student: nn.Module, teacher: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks: the outermost entries of module lists that hold a branched projection, in both models."""
    lists = {name for name, module in student.named_modules() if isinstance(module, nn.ModuleList)}
    in_teacher = {name for name, _ in teacher.named_modules()}
    blocks = dict.fromkeys(
        block
        for name, module in student.named_modules()
        if isinstance(module, BranchedLinear) and (block := _block_of(name, lists))
    )
    return tuple(block for block in blocks if block in in_teacher)


def _block_of(site: str, lists: set[str]) -> str | None:
    parts = site.split(".")
    for depth in range(1, len(parts)):
        # A list in a list is never called itself; its entries are.
        if ".".join(parts[:depth]) in lists and ".".join(parts[: depth + 1]) not in lists:
            return ".".join(parts[: depth + 1])
    return None


@contextmanager
def block_outputs(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[list[Tensor]]:
    """Collects the first tensor each block returns while the context is open."""
    collected: list[Tensor] = []

    def collect(_module: nn.Module, _inputs: Any, output: Any) -> None:
        collected.append(output if isinstance(output, Tensor) else output[0])

    handles = [model.get_submodule(block).register_forward_hook(collect) for block in blocks]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
