"""Weight-only quantisation of an export: which weights were quantised, and what the model is with them.

The pass quantises the weights of GEMMs in the graphs. That the graphs are right is checked against the model: with
the same weights rounded alike (`round_weights`), PyTorch must give what the graphs give when they compute in floats
(`FloatArithmetic`). How far the rounding itself moves the outputs is measured beside it, and is no failure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from .artifact import Artifact, session_options
from .errors import BadInput
from .passes.onnx_quantize_weights import (
    FLOAT_ARITHMETIC,
    INT8_ARITHMETIC,
    OPERATOR,
    QuantizeResult,
    QuantizeWeights,
    digest_columns,
    rounded_matrix,
)

Quantize = Literal["int8", "int4"]
BITS: dict[str, int] = {"int8": 8, "int4": 4}


def check_quantize(quantize: str | None, target: str) -> None:
    """Refuse what no later stage could meet.

    Raises:
        BadInput: naming what can be asked for.
    """
    if quantize is None:
        return
    if quantize not in BITS:
        raise BadInput(f"quantize is {quantize!r}; use {' or '.join(map(repr, get_args(Quantize)))}, or None")
    if target != "cpu":
        raise BadInput(
            f"quantize={quantize!r} is for target 'cpu', not {target!r}: quantised graphs were never run there; "
            f"leave quantize out, or use target='cpu'"
        )


def quantize_graph(name: str, model: ir.Model, quantize: str, known: Collection[bytes]) -> QuantizeResult:
    """Quantise one graph of an export in place.

    Rows are many in a prompt and one in a step behind the cache. With one row the time goes into reading weights,
    and rounding the row to int8 lets the kernel read them as they are. With many rows 4 bits are unpacked to floats
    once for all of them, which is as fast as int8 or faster, and exact. ONNX Runtime has no such kernel for 8 bits.

    Args:
        known: see `QuantizeWeights`.
    """
    in_floats = quantize == "int4" and name != "decode"
    arithmetic = FLOAT_ARITHMETIC if in_floats else INT8_ARITHMETIC
    return QuantizeWeights(BITS[quantize], arithmetic, known).run(model)


# ── Which weights of the model they are ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ModelColumns:
    """The columns of a model's matrices, by which they are found in graphs that pack or transpose them.

    Attributes:
        digests: (name of the parameter, axis of its inputs) -> a digest of each column. Which axis a product sums
            over is not known of a parameter alone, so there are both.
    """

    digests: Mapping[tuple[str, int], frozenset[bytes]]

    @classmethod
    def of(cls, tree: nn.Module) -> ModelColumns:
        """Of all parameters with two axes, in the type they have."""
        matrices = {name: p.detach().numpy() for name, p in tree.named_parameters() if p.ndim == 2}
        return cls(
            {
                (name, axis): frozenset(digest_columns(matrix.T if axis == 1 else matrix))
                for name, matrix in matrices.items()
                for axis in (1, 0)
            }
        )

    @property
    def all(self) -> frozenset[bytes]:
        """The digests of every column."""
        return frozenset().union(*self.digests.values())

    def within(self, columns: Collection[bytes]) -> dict[str, int]:
        """Name of every parameter whose columns are all among some -> the axis of its inputs."""
        return {name: axis for (name, axis), digests in self.digests.items() if digests <= frozenset(columns)}


def round_weights(reference: nn.Module, artifact: Artifact) -> None:
    """Give the quantised parameters of `reference`, a copy in float32, the values they have in the export."""
    dtype, bits = getattr(torch, artifact.dtype), BITS[str(artifact.quantize)]
    parameters = dict(reference.named_parameters())
    missing = [name for name in _parameters_of(artifact) if name not in parameters]
    if missing:
        raise BadInput(
            f"{len(missing)} quantised parameters of {artifact.folder} are not in the model ({missing[0]}, ...); "
            f"compare the export with the model it was made from"
        )
    for name, axis in _parameters_of(artifact).items():
        parameter = parameters[name]
        matrix = parameter.detach().to(dtype).numpy()
        by_input = rounded_matrix(matrix.T if axis == 1 else matrix, bits)
        rounded = np.ascontiguousarray(by_input.T if axis == 1 else by_input)
        # A new tensor: the old one may share its memory with the caller's model.
        parameter.data = torch.from_numpy(rounded).to(parameter.dtype)


def _parameters_of(artifact: Artifact) -> Mapping[str, int]:
    return dict(artifact.manifest["quantization"]["parameters"])


# ── The same graphs in floats ────────────────────────────────────────────────────────────────────────────────────


def rounds_inputs(folder: Path, graph: str) -> bool:
    """Whether a graph computes quantised GEMMs in int8."""
    model = ir.load(folder / f"{graph}.onnx")  # weights stay on disk
    return any(
        node.op_type == OPERATOR and node.attributes.get_int("accuracy_level", 0) == INT8_ARITHMETIC
        for node in model.graph
    )


class FloatArithmetic(Artifact):
    """The same files, opened so that quantised GEMMs compute in floats and round no input."""

    def _open(
        self, name: str, profile_prefix: Path | None = None, sizes: Mapping[str, int] | None = None
    ) -> onnxruntime.InferenceSession:
        model = ir.load(self.folder / f"{name}.onnx")
        for node in model.graph:
            if node.op_type == OPERATOR:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FLOAT_ARITHMETIC)
        options = session_options(self.threads)
        for axis, size in (sizes or {}).items():
            options.add_free_dimension_override_by_name(axis, size)
        # The graph is passed in memory; its weights stay in the folder's file.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.folder.resolve())
        )
        graph = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def in_float_arithmetic(artifact: Artifact) -> Artifact:
    """The export with sessions of its own whose quantised GEMMs compute in floats."""
    return FloatArithmetic(artifact.folder, artifact.manifest, artifact.threads)
