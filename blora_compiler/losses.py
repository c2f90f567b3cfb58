"""What the student is trained on: distances between student and teacher, in nats per token or relative squares.

    head_losses      KL(teacher || student), and the likelihood of the text itself where asked, from hidden states
                     and output heads; the (tokens x vocabulary) logits never exist as a whole, only one tile of
                     them at a time. `head_kl` is its first half
    kl_from_logits   the same from logits, for models whose head cannot be taken apart
    topk_kl          the same against stored top-k teacher logits, the remaining mass lumped into one bucket
    relative_error   ||student - teacher||^2 / ||teacher||^2 per token, for block outputs and for encoders

The gradient of a KL with respect to the student's logits is `softmax(student) - softmax(teacher)`: known as soon as
the loss is. `head_kl` and `kl_from_logits` therefore form their gradients tile by tile in the forward pass and only
scale them in the backward pass, so that a tile of logits is computed once for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .errors import BadInput

Reduction = Literal["mean", "sum"]

# Wide enough that the usual small vocabularies are one chunk, whose logits need no second computation.
DEFAULT_VOCABULARY_CHUNK = 32768

# Elements of one tile of logits. On a CPU a tile and its temporaries should stay in the last-level cache; an
# accelerator wants large GEMMs instead.
_LEAST_SHARE = 1e-6  # of the mean squared length of the rows, below which a row is measured by that

_CPU_TILE_ELEMENTS = 1 << 20
_ACCELERATOR_TILE_ELEMENTS = 1 << 26


# ── KL from hidden states and heads ──────────────────────────────────────────────────────────────────────────────


class _Head(NamedTuple):
    """One side of the comparison, already in the dtype the GEMMs run in and divided by the temperature.

    Attributes:
        hidden: (tokens, features) / temperature.
        weight: (vocabulary, features).
        bias: (vocabulary,) / temperature, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """(rows, columns) of the logits, in the dtype of the softmax statistics."""
        bias = None if self.bias is None else self.bias[columns]
        return F.linear(self.hidden[rows], self.weight[columns], bias).to(dtype)


def head_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    vocabulary_chunk: int = DEFAULT_VOCABULARY_CHUNK,
) -> Tensor:
    """KL(teacher || student) at `temperature` between `softmax(hidden @ head.T + bias)` of both, in nats per token.

    As `head_losses`, without labels.
    """
    return head_losses(
        student_hidden, student_head, teacher_hidden, teacher_head, student_bias=student_bias,
        teacher_bias=teacher_bias, temperature=temperature, reduction=reduction, vocabulary_chunk=vocabulary_chunk,
    )[0]  # fmt: skip


def head_losses(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    vocabulary_chunk: int = DEFAULT_VOCABULARY_CHUNK,
) -> tuple[Tensor, Tensor]:
    """`KL(teacher || student) + label_weight * cross-entropy of the labels`, and the KL alone, in nats per token.

    Both come from one pass over the logits: the gradient of the sum is `(p_student - p_teacher)` plus
    `label_weight * (p_student - one-hot)` in the rows that have a label.

    Under autocast the GEMMs run in its dtype; softmax statistics and sums are float32 (float64 for float64 inputs).
    Gradients reach the student's three tensors only.

    Args:
        student_hidden: (tokens, student_features).
        student_head: (vocabulary, student_features).
        teacher_hidden: (tokens, teacher_features).
        teacher_head: (vocabulary, teacher_features).
        student_bias, teacher_bias: (vocabulary,) or None.
        labels: (tokens,) the vocabulary entry that the text goes on with, -1 where there is none; or None.
        label_weight: of the cross-entropy, which is summed over labelled tokens and divided as the KL is.
        temperature: divides all logits; the result is the KL of the softened distributions, not rescaled. Labels
            want 1.
        reduction: `"mean"` over tokens, or `"sum"`.
        vocabulary_chunk: widest slice of the vocabulary whose logits exist at once. Where the vocabulary is wider,
            every logit is computed twice: once for the normaliser and once for loss and gradient.

    Returns:
        Two scalars; gradients flow from the first alone.

    Raises:
        BadInput: if the two sides differ in tokens or vocabulary, there are no tokens, or labels meet a temperature.
    """
    if label_weight and temperature != 1.0:
        raise BadInput(f"labels are likelihoods at temperature 1, not {temperature}; set one of the two back")
    _check_pair(student_hidden, teacher_hidden, student_head, teacher_head)
    device = student_hidden.device.type
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype
    scale = 1.0 / student_hidden.shape[0] if reduction == "mean" else 1.0
    return _HeadKL.apply(
        student_hidden,
        student_head,
        student_bias,
        teacher_hidden.detach(),
        teacher_head.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        labels if label_weight else None,
        _Options(compute_dtype, temperature, scale, vocabulary_chunk, torch.is_grad_enabled(), label_weight),
    )


class _Options(NamedTuple):
    """What `_HeadKL` needs beside tensors. Inside an autograd function gradients look disabled, hence the flag."""

    dtype: torch.dtype
    temperature: float
    scale: float
    chunk: int
    gradients_wanted: bool
    label_weight: float


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        teacher_bias: Tensor | None,
        labels: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        dtype, temperature, scale, chunk, gradients_wanted, label_weight = options
        wants = [gradients_wanted and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(student_hidden.device.type, enabled=False):
            student = _prepared(student_hidden, student_head, student_bias, dtype, temperature)
            teacher = _prepared(teacher_hidden, teacher_head, teacher_bias, dtype, temperature)
            sums, gradients = _losses_over_tiles(student, teacher, chunk, wants, labels, label_weight)
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        ctx.present = [g is not None for g in gradients]
        ctx.scale = scale
        # Tiles differentiate with respect to logits that already carry 1 / temperature. The head's gradient has
        # it through the scaled hidden states; the other two need it here.
        ctx.extra_scales = (1.0 / temperature, 1.0, 1.0 / temperature)
        ctx.dtypes = [None if t is None else t.dtype for t in (student_hidden, student_head, student_bias)]
        kl, likelihood = (sums * scale).unbind()
        ctx.mark_non_differentiable(kl)
        return kl + label_weight * likelihood, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _of_kl: Tensor) -> Any:
        stored = iter(ctx.saved_tensors)
        scaled: list[Tensor | None] = []
        for present, extra, dtype in zip(ctx.present, ctx.extra_scales, ctx.dtypes, strict=True):
            factor = grad_output * (ctx.scale * extra)
            scaled.append((next(stored) * factor).to(dtype) if present else None)
        return (*scaled, None, None, None, None, None)


def _prepared(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, temperature: float) -> _Head:
    return _Head(
        hidden.to(dtype) if temperature == 1.0 else (hidden / temperature).to(dtype),
        weight.to(dtype),
        None if bias is None else (bias / temperature).to(dtype),
    )


def _losses_over_tiles(
    student: _Head,
    teacher: _Head,
    chunk: int,
    wants: Sequence[bool],
    labels: Tensor | None,
    label_weight: float,
) -> tuple[Tensor, list[Tensor | None]]:
    """(2,) summed KL and cross-entropy, one tile at a time.

    And the gradients of the KL plus the weighted cross-entropy for hidden, head and bias, None where not wanted.
    """
    statistics = torch.promote_types(student.hidden.dtype, torch.float32)
    tokens, vocabulary = student.hidden.shape[0], student.weight.shape[0]
    sums = student.hidden.new_zeros(2, dtype=statistics)
    hidden_gradient = student.hidden.new_zeros(student.hidden.shape, dtype=statistics) if wants[0] else None
    head_gradient = student.weight.new_zeros(student.weight.shape, dtype=statistics) if wants[1] else None
    bias_gradient = student.weight.new_zeros(vocabulary, dtype=statistics) if wants[2] else None

    for rows in _slices(tokens, _rows_per_tile(student.hidden, min(chunk, vocabulary))):
        for columns, log_student, log_teacher in _log_probabilities(student, teacher, rows, chunk, statistics):
            if labels is None:
                tile_loss, difference = _kl_and_gradient(log_student, log_teacher)
            else:
                row_weights = label_weight * (labels[rows] >= 0).to(statistics)
                entries = _entries(labels[rows], columns)
                sums[1] -= log_student[entries].sum()
                tile_loss, difference = _kl_and_gradient(log_student, log_teacher, row_weights)
                difference[entries] -= label_weight
            sums[0] += tile_loss
            narrow = difference.to(student.hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient[rows] += narrow @ student.weight[columns]
            if head_gradient is not None:
                head_gradient[columns] += narrow.T @ student.hidden[rows]
            if bias_gradient is not None:
                bias_gradient[columns] += difference.sum(0)
    return sums, [hidden_gradient, head_gradient, bias_gradient]


def _log_probabilities(
    student: _Head, teacher: _Head, rows: slice, chunk: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (columns, student's, teacher's log-probabilities of those columns), normalised over all columns."""
    vocabulary = student.weight.shape[0]
    if chunk >= vocabulary:
        everything = slice(0, vocabulary)
        yield (
            everything,
            torch.log_softmax(student.logits(rows, everything, dtype), dim=-1),
            torch.log_softmax(teacher.logits(rows, everything, dtype), dim=-1),
        )
        return
    normalisers = [_normaliser(side, rows, chunk, dtype) for side in (student, teacher)]
    for columns in _slices(vocabulary, chunk):
        yield (
            columns,
            student.logits(rows, columns, dtype).sub_(normalisers[0]),
            teacher.logits(rows, columns, dtype).sub_(normalisers[1]),
        )


def _normaliser(side: _Head, rows: slice, chunk: int, dtype: torch.dtype) -> Tensor:
    """(rows, 1): log of the sum of the exponentials of all logits of a row."""
    parts = [
        torch.logsumexp(side.logits(rows, columns, dtype), dim=-1, keepdim=True)
        for columns in _slices(side.weight.shape[0], chunk)
    ]
    return torch.logsumexp(torch.cat(parts, dim=-1), dim=-1, keepdim=True)


def _kl_and_gradient(
    log_student: Tensor, log_teacher: Tensor, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed KL of a tile and its gradient with respect to the student's logits. Overwrites both arguments.

    Args:
        row_weights: (rows,) of a cross-entropy beside the KL, whose `p_student` is then part of the gradient.
    """
    teacher = log_teacher.exp()
    loss = torch.dot(teacher.view(-1), log_teacher.sub_(log_student).view(-1))
    student = log_student.exp_()
    if row_weights is not None:
        student.mul_(1.0 + row_weights[:, None])
    return loss, student.sub_(teacher)


def _entries(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(row, column) indices into a tile of the labels that lie in its columns; -1 is no label."""
    rows = ((labels >= columns.start) & (labels < columns.stop)).nonzero().squeeze(1)
    return rows, labels[rows] - columns.start


def _rows_per_tile(like: Tensor, columns: int) -> int:
    elements = _CPU_TILE_ELEMENTS if like.device.type == "cpu" else _ACCELERATOR_TILE_ELEMENTS
    return max(1, elements // columns)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _check_pair(student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor) -> None:
    if student.shape[0] != teacher.shape[0]:
        raise BadInput(
            f"the student has {student.shape[0]} tokens and the teacher {teacher.shape[0]}; "
            f"run both on the same batch"
        )
    if student_head.shape[0] != teacher_head.shape[0]:
        raise BadInput(
            f"the student's vocabulary is {student_head.shape[0]} and the teacher's {teacher_head.shape[0]}; "
            f"logits can only be compared over one vocabulary"
        )
    if student.shape[0] == 0:
        raise BadInput("there are 0 tokens to compare; at least 1 must be unmasked in every batch")


# ── KL from logits ───────────────────────────────────────────────────────────────────────────────────────────────


def kl_from_logits(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || student) at `temperature` over unmasked tokens, in nats; temporaries are tile-sized.

    Args:
        student, teacher: (..., vocabulary).
        mask: (...), true or non-zero where a token counts; None counts all.
        temperature: divides all logits.

    Raises:
        BadInput: if the shapes differ, or no token counts.
    """
    if student.shape != teacher.shape:
        raise BadInput(
            f"student logits are {tuple(student.shape)} and teacher logits {tuple(teacher.shape)}; "
            f"run both on the same batch, with one vocabulary"
        )
    student, teacher = _counted(student, mask), _counted(teacher, mask)
    if student.shape[0] == 0:
        raise BadInput("there are 0 tokens to compare; at least 1 must be unmasked in every batch")
    return _LogitsKL.apply(student, teacher.detach(), temperature, torch.is_grad_enabled())


class _LogitsKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, gradient_wanted: bool) -> Tensor:
        statistics = torch.promote_types(student.dtype, torch.float32)
        gradient = torch.empty_like(student) if gradient_wanted and ctx.needs_input_grad[0] else None
        loss = student.new_zeros((), dtype=statistics)
        for rows in _slices(student.shape[0], _rows_per_tile(student, student.shape[1])):
            tile_loss, difference = _kl_and_gradient(
                torch.log_softmax(student[rows].to(statistics) / temperature, dim=-1),
                torch.log_softmax(teacher[rows].to(statistics) / temperature, dim=-1),
            )
            loss += tile_loss
            if gradient is not None:
                gradient[rows] = difference.div_(temperature * student.shape[0])
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return loss / student.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None


# ── KL against stored top-k logits ───────────────────────────────────────────────────────────────────────────────


class TopK(NamedTuple):
    """A teacher's distribution per token, reduced to its k largest logits and the mass of all others.

    Attributes:
        values: (..., k) logits divided by the temperature, largest first.
        indices: (..., k) their vocabulary entries.
        rest: (...) log of the summed exponentials of all other logits; -inf where k is the whole vocabulary.
    """

    values: Tensor
    indices: Tensor
    rest: Tensor


def reduce_to_topk(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """`logits`: (..., vocabulary) -> its k largest entries and the mass of the rest, in float32."""
    scaled = logits.float() / temperature
    values, indices = scaled.topk(k, dim=-1)
    rest = torch.logsumexp(scaled.scatter(-1, indices, float("-inf")), dim=-1)
    return TopK(values, indices, rest)


def topk_kl(
    student_logits: Tensor, values: Tensor, indices: Tensor, rest_logsumexp: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean KL(teacher || student) over k + 1 events: the k stored entries, and "any other", in nats per token.

    A lower bound of the KL over the whole vocabulary (merging events never raises a KL), and equal to it
    when k is the whole vocabulary.

    Args:
        student_logits: (..., vocabulary), already divided by the temperature the teacher was stored at.
        values, indices: (..., k). rest_logsumexp: (...). See `TopK`.
        mask: (...), non-zero where a token counts; None counts all.
    """
    student = _counted(student_logits, mask).float()
    stored, entries = _counted(values, mask).float(), _counted(indices, mask).long()
    rest = _counted(rest_logsumexp.unsqueeze(-1), mask).float()
    log_teacher = torch.log_softmax(torch.cat([stored, rest], dim=-1), dim=-1)

    student_rest = torch.logsumexp(student.scatter(-1, entries, float("-inf")), dim=-1, keepdim=True)
    chosen = student.gather(-1, entries)
    log_student = torch.cat([chosen, student_rest], dim=-1) - torch.logsumexp(student, dim=-1, keepdim=True)
    # Where k is the whole vocabulary both sides give "any other" no mass, and 0 * (inf - inf) must be 0. The
    # inner `where` keeps the unused infinities out of the backward pass, where they would turn into NaN.
    possible = log_teacher > float("-inf")
    gap = torch.where(possible, log_teacher, 0.0) - torch.where(possible, log_student, 0.0)
    return (log_teacher.exp() * gap).sum(-1).mean()


# ── Distances of hidden states and outputs ───────────────────────────────────────────────────────────────────────


def relative_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over counted rows of ||student - teacher||^2 / ||teacher||^2: 0 when equal, 1 for a zero student.

    Args:
        student, teacher: (..., features).
        mask: (...), non-zero where a row counts; None counts all.
    """
    if student.shape != teacher.shape:
        raise BadInput(
            f"the student's output is {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; "
            f"run both on the same batch"
        )
    student, teacher = _counted(student, mask).float(), _counted(teacher, mask).float()
    # A row of zeros at the teacher has no scale of its own, and takes a small share of what the others have.
    size = teacher.square().sum(-1)
    size = size.clamp_min(max(_LEAST_SHARE * float(size.mean()), torch.finfo(torch.float32).tiny))
    return ((student - teacher).square().sum(-1) / size).mean()


def pooled_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over sequences of ||s/|s| - t/|t|||^2 = 2 (1 - cosine), s and t being the means over counted tokens.

    What sentence encoders are used for: the direction of the mean of their last hidden states.

    Args:
        student, teacher: (batch, tokens, features).
        mask: (batch, tokens), non-zero where a token counts; None counts all.
    """
    weights = (torch.ones_like(student[..., :1]) if mask is None else mask.unsqueeze(-1)).float()
    ours, theirs = ((side.float() * weights).sum(1) for side in (student, teacher))
    return 2 * (1 - torch.cosine_similarity(ours, theirs, dim=-1)).mean()


def _counted(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """(..., features) -> (rows, features): the rows where `mask` (...) is non-zero, or all of them."""
    if mask is None:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor[mask.bool()]
