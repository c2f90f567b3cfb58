"""The quality of an export itself: perplexity and distance to the teacher of what ONNX Runtime computes.

A prefill graph returns the last position alone, so each window goes through the decode graph token by token, as a
generation would: every number that a user would get is in the measure, rounded inputs of quantised GEMMs too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from .artifact import Artifact
from .errors import BadInput
from .evaluate import Quality, perplexity_and_kl

# Windows that take a step together: a step of many reads the weights once.
BATCH = 32


def export_quality(
    artifact: Artifact, teacher: nn.Module | None, windows: Tensor, *, stride: int | None = None
) -> Quality:
    """Score a generating export on token windows; see `perplexity_and_kl`, which takes the same arguments.

    Raises:
        BadInput: if the export cannot generate, or the windows cannot be used.
    """
    if not artifact.generation:
        raise BadInput(f"this export has graphs {', '.join(artifact.graphs)}; scoring text needs prefill and decode")
    return perplexity_and_kl(_StepByStep(artifact), teacher, windows, stride=stride, batch=BATCH)


class _StepByStep(nn.Module):
    """An export called like the model: (batch, tokens) ids -> logits of every position."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        self.artifact = artifact

    def forward(self, input_ids: Tensor) -> Any:
        output = self.artifact.prefill(input_ids[:, :1], torch.ones_like(input_ids[:, :1]))
        logits = [output.logits]
        for position in range(1, input_ids.shape[1]):
            mask = torch.ones_like(input_ids[:, : position + 1])
            output = self.artifact.decode(input_ids[:, position : position + 1], mask, output.past_key_values)
            logits.append(output.logits)
        return CausalLMOutput(logits=torch.cat(logits, dim=1).float())
