"""How good a student is: perplexity, distance to the teacher and agreement, on stated windows in float32.

The probes of in-context learning and the measures of sentence encoders, in files of their own, are imported from here
too; docs/evaluation.md says what each number is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoders import (
    EncoderQuality,
    SentencePair,
    encoder_quality,
    mean_cosine,
    read_sts,
    sentence_embeddings,
    spearman_on_pairs,
)
from .errors import BadInput
from .losses import kl_from_logits
from .probes import (
    FrozenTask,
    FrozenTasks,
    Pair,
    PairedDifference,
    ProbeResult,
    Question,
    Retention,
    Task,
    TaskScore,
    freeze_tasks,
    generate_answers,
    icl_probe,
    icl_questions,
    in_eval_mode,
    paired_differences,
    read_tasks,
    retention,
    uses_trained_shots,
    wilson_interval,
)

__all__ = [
    "Quality",
    "perplexity_and_kl",
    # In-context learning.
    "read_tasks",
    "Task",
    "Pair",
    "icl_questions",
    "Question",
    "uses_trained_shots",
    "icl_probe",
    "ProbeResult",
    "TaskScore",
    "generate_answers",
    "wilson_interval",
    "paired_differences",
    "PairedDifference",
    "freeze_tasks",
    "FrozenTasks",
    "FrozenTask",
    "retention",
    "Retention",
    # Sentence encoders.
    "read_sts",
    "SentencePair",
    "sentence_embeddings",
    "spearman_on_pairs",
    "mean_cosine",
    "encoder_quality",
    "EncoderQuality",
]


@dataclass(frozen=True)
class Quality:
    """What was measured, and on what; a perplexity says nothing without the latter.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of `tokens` predictions.
        kl: mean KL(teacher || student) in nats per token; None without a teacher.
        top1_agreement: fraction of predictions whose likeliest token is the teacher's; None without a teacher.
        tokens: number of predictions.
        length: tokens per window; each window gives length - 1 predictions.
        stride: tokens between the starts of windows; None where the windows are of no single text.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    tokens: int
    length: int
    stride: int | None = None

    def __str__(self) -> str:
        distance = "" if self.kl is None else f", KL {self.kl:.4f} nats/token, top-1 {self.top1_agreement:.1%}"
        stride = "" if self.stride is None else f", stride {self.stride}"
        return f"perplexity {self.perplexity:.2f}{distance} ({self.tokens} tokens, windows of {self.length}{stride})"

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def perplexity_and_kl(
    student: nn.Module,
    teacher: nn.Module | None,
    windows: Tensor,
    *,
    stride: int | None = None,
    batch: int = 8,
) -> Quality:
    """Scores a causal language model on token windows, without BOS, in float32 arithmetic.

    Args:
        student, teacher: called as `model(input_ids=...)`, return `.logits`; float32 weights.
        windows: (windows, length) token ids, from `data.evaluation_windows`.
        stride: recorded beside the numbers.
        batch: windows per forward pass.

    Raises:
        BadInput: if a window has fewer than two tokens, there is none, or a model is not float32.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise BadInput(f"evaluation windows have shape {tuple(windows.shape)}; at least (1, 2) is needed")
    models = [model for model in (student, teacher) if model is not None]
    for model in models:
        _check_float32(model)
    with in_eval_mode(*models):
        totals = sum(_totals(student, teacher, piece) for piece in windows.split(batch))
    assert isinstance(totals, Tensor)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    likelihood, kl, agreement = (totals / tokens).tolist()
    known = teacher is not None
    return Quality(
        math.exp(likelihood), kl if known else None, agreement if known else None, tokens, windows.shape[1], stride
    )


def _totals(student: nn.Module, teacher: nn.Module | None, windows: Tensor) -> Tensor:
    """(3,) float64: summed negative log-likelihood, summed KL, number of agreements."""
    logits = _predictions(student, windows)
    targets = windows[:, 1:].to(logits.device).long()  # ids may be int32
    likelihood = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    if teacher is None:
        return torch.tensor([float(likelihood), 0.0, 0.0], dtype=torch.float64)
    reference = _predictions(teacher, windows)
    kl = kl_from_logits(logits, reference) * targets.numel()
    agreement = (logits.argmax(-1) == reference.argmax(-1)).sum()
    return torch.tensor([float(likelihood), float(kl), float(agreement)], dtype=torch.float64)


def _predictions(model: nn.Module, windows: Tensor) -> Tensor:
    """(windows, length - 1, vocabulary) float32 logits of the next token."""
    device = next(model.parameters(), windows).device  # an export has no parameters, and runs where its session does
    with torch.autocast(device.type, enabled=False):
        return model(input_ids=windows[:, :-1].to(device)).logits  # what follows the last token is not asked


def _check_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise BadInput(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')} but quality is measured in float32; "
                f"load the model with dtype=torch.float32 or call .float() on a copy"
            )
