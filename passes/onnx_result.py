"""What an ONNX pass gives back beyond the model: how often it applied, and why it did not elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir


@dataclass  # onnx_ir's own result is not frozen, so this one cannot be
class OnnxPassResult(ir.passes.PassResult):
    """The result of a pass that counts.

    Attributes:
        model, modified: as onnx_ir defines them.
        applied: places that were rewritten.
        refusals: one sentence for each place that looked alike and was left alone.
    """

    applied: int = 0
    refusals: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What the manifest of an export keeps."""
        return {"applied": self.applied, "refusals": list(self.refusals)}
