"""QuantizeWeights: GEMMs read their constant weight in 8 or 4 bits, packed by ONNX Runtime's own quantiser.

    MatMul(x, W)              becomes   MatMulNBits(x, packed W, scales, zero points)
    FusedMatMul(x, W)         becomes   MatMulNBits(x, packed W, scales, zero points)
    Gemm(x, W, bias)          becomes   MatMulNBits(x, packed W, scales, zero points, bias)

where W may be stored transposed. Each column of W (in, out) is cut into blocks along `in`, and each block has its own
scale and zero point. Blocks have the size that stores the weight in fewest bytes; the last one is padded where the
size does not divide `in`. The node keeps its name, its outputs and its metadata, so a stamped site stays stamped.

Left alone, and said so:

1. A GEMM that scales, or transposes its first input; other operators that hold the weight of a site.
2. A weight with a column that no parameter of the model has: nothing outside the graph could say what it computes.
3. A weight that a lookup reads too (a tied head): it would be stored a second time.
4. A weight that would not become smaller.

Two nodes that read one initializer read one packed weight. Columns do not depend on each other, so a packed GEMM of
several sites holds the same numbers as one GEMM a site.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .onnx_edit import add_constant
from .onnx_result import OnnxPassResult
from .onnx_stamp_sites import SITES_KEY

# ONNX Runtime also has 16 (twice the scales) and 128 and more. Smaller blocks are closer to the float model and take
# more bytes; the kernels like 64 better than 32.
BLOCK_SIZES = (64, 32)
# What MatMulNBits computes in: float32, or int8, to which it then rounds its input, block by block.
FLOAT_ARITHMETIC, INT8_ARITHMETIC = 1, 4
OPERATOR, DOMAIN = "MatMulNBits", "com.microsoft"
_GEMMS = frozenset({"MatMul", "FusedMatMul", "Gemm"})
_SWITCHES = ("transA", "transBatchA", "transBatchB")  # `transB` alone is no hindrance


@dataclass
class QuantizeResult(OnnxPassResult):
    """The result of the pass.

    Attributes:
        columns: digests of all columns that were quantised, as `digest_columns` makes them: which weights of a model
            they were is found by these, since a packed GEMM holds several.
    """

    columns: frozenset[bytes] = frozenset()


@dataclass(frozen=True)
class QuantizeWeights:
    """Quantise the weights of GEMMs, all with the same number of bits.

    Attributes:
        bits: 8 or 4.
        arithmetic: `FLOAT_ARITHMETIC` or `INT8_ARITHMETIC`.
        known: digests of the columns of the model's matrices, as `digest_columns` makes them.
    """

    bits: int
    arithmetic: int
    known: Collection[bytes] = field(repr=False)

    def run(self, model: ir.Model) -> QuantizeResult:
        """Edit `model` in place, before its weights leave for a file."""
        graph = model.graph
        lookups = _lookup_tables(graph)
        stored: dict[tuple[ir.Value, bool], _Stored] = {}
        columns: set[bytes] = set()
        refusals = []
        applied = 0
        for node in list(graph):
            if not _holds_weight(node):
                continue
            reason = _reason_to_refuse(node) or self._reason_to_keep(_matrix(node), lookups)
            if reason is not None:
                refusals.append(f"{node.op_type} {node.name or node.outputs[0].name}: {reason}")
                continue
            weight, transposed = _weight(node)
            if (weight, transposed) not in stored:
                name = f"{weight.name}{'_transposed' if transposed else ''}"
                stored[weight, transposed] = _store(graph, name, _matrix(node), self.bits)
                columns.update(digest_columns(_matrix(node)))
            self._replace(graph, node, stored[weight, transposed])
            applied += 1
        for weight in dict.fromkeys(weight for weight, _ in stored):
            _drop_unread(graph, weight)
        if applied:
            graph.opset_imports.setdefault(DOMAIN, 1)
        return QuantizeResult(model, bool(applied), applied, tuple(refusals), frozenset(columns))

    def _reason_to_keep(self, matrix: np.ndarray, lookups: Sequence[np.ndarray]) -> str | None:
        if any(np.array_equal(matrix, table.T) for table in lookups if table.shape[::-1] == matrix.shape):
            return "a lookup reads the same weight, so it would be stored twice"
        before, after = matrix.nbytes, stored_bytes(matrix, self.bits)
        if after >= before:
            return f"its weight {matrix.shape} would take {after} bytes and takes {before}"
        unknown = sum(digest not in self.known for digest in digest_columns(matrix))
        if unknown:
            return (
                f"{unknown} of its weight's {matrix.shape[1]} columns are no parameter's, so nothing could check it"
            )
        return None

    def _replace(self, graph: ir.Graph, node: ir.Node, stored: _Stored) -> None:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        rest = [] if bias is None else [None, bias]  # in front of the bias: an order of rows, which is for GPTQ
        quantized = ir.node(
            OPERATOR, [node.inputs[0], *stored.values, *rest], domain=DOMAIN, name=node.name,
            attributes={**stored.attributes, "bits": self.bits, "accuracy_level": self.arithmetic},
        )  # fmt: skip
        quantized.metadata_props.update(node.metadata_props)
        old, new = node.outputs[0], quantized.outputs[0]
        new.shape, new.type = old.shape, old.type
        new.name, old.name = old.name, None
        graph.insert_before(node, quantized)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)


# ── The numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (in, out) as MatMulNBits reads it.

    Attributes:
        packed: (out, blocks, bytes) uint8; two numbers a byte in 4 bits, the earlier one in the low half.
        scales: (out, blocks), in the matrix's own type.
        zero_points: (out, bytes) uint8, packed alike, each row padded to whole bytes.
    """

    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray


def digest_columns(matrix: np.ndarray) -> list[bytes]:
    """A digest of each column of a matrix (in, out), by which it is known again in a packed one."""
    return [hashlib.blake2b(column.data, digest_size=16).digest() for column in np.ascontiguousarray(matrix.T)]


def block_size(inner: int, bits: int, scale_bytes: int) -> int:
    """The block size that stores columns of `inner` numbers in fewest bytes; the larger one where they tie."""
    return min(BLOCK_SIZES, key=lambda size: -(-inner // size) * _block_bytes(size, bits, scale_bytes))


def stored_bytes(matrix: np.ndarray, bits: int) -> int:
    """Bytes of a matrix (in, out) once it is quantised."""
    inner, outer = matrix.shape
    size = block_size(inner, bits, matrix.dtype.itemsize)
    return round(outer * -(-inner // size) * _block_bytes(size, bits, matrix.dtype.itemsize))


def _block_bytes(size: int, bits: int, scale_bytes: int) -> float:
    return (size + 1) * bits / 8 + scale_bytes


def quantize_matrix(matrix: np.ndarray, bits: int) -> QuantizedMatrix:
    """A matrix (in, out) in float32 or float16, quantised by ONNX Runtime's own quantiser."""
    with _without_log_setup():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    size = block_size(matrix.shape[0], bits, matrix.dtype.itemsize)
    config = DefaultWeightOnlyQuantConfig(block_size=size, is_symmetric=False, bits=bits)
    return QuantizedMatrix(*DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(matrix)))


@contextmanager
def _without_log_setup() -> Iterator[None]:
    """Importing ONNX Runtime's quantiser makes the root logger print every library's progress: undo that."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def rounded_matrix(matrix: np.ndarray, bits: int) -> np.ndarray:
    """What a matrix (in, out) stands for once it is quantised, in float32: (number - zero point) * scale."""
    quantized = quantize_matrix(matrix, bits)
    outer, blocks = quantized.scales.shape
    numbers = _unpacked(quantized.packed, bits).reshape(outer, blocks, -1)
    zero_points = _unpacked(quantized.zero_points, bits).reshape(outer, -1)[:, :blocks]
    values = (numbers - zero_points[..., None]) * quantized.scales.astype(np.float32)[..., None]
    return values.reshape(outer, -1)[:, : matrix.shape[0]].T


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """The numbers in bytes, as float32: the last axis doubles in 4 bits."""
    if bits == 8:
        return packed.astype(np.float32)
    halves = np.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1).astype(np.float32)


# ── The graph ────────────────────────────────────────────────────────────────────────────────────────────────────


def _holds_weight(node: ir.Node) -> bool:
    """A GEMM with a constant matrix, or another operator that is stamped with the site whose matrix it holds."""
    if node.op_type == OPERATOR or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    constant = _constant(node.inputs[1])[0].const_value
    is_gemm = node.op_type in _GEMMS or SITES_KEY in node.metadata_props
    return is_gemm and constant is not None and len(constant.shape) == 2


def _constant(value: ir.Value) -> tuple[ir.Value, bool]:
    """Where a weight comes from, and whether transposed: exporters leave the `Transpose` of a large one as a node."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        return node.inputs[0], True
    return value, False


def _weight(node: ir.Node) -> tuple[ir.Value, bool]:
    """The initializer that a node multiplies by, and whether by its transpose."""
    assert node.inputs[1] is not None
    source, transposed = _constant(node.inputs[1])
    return source, transposed != bool(node.attributes.get_int("transB", 0))


def _reason_to_refuse(node: ir.Node) -> str | None:
    if node.op_type not in _GEMMS:
        return "the operator has no form for quantised weights"
    if not _is_plain(node):
        return "it scales, transposes its first input, or adds more than a bias for each column"
    return None


def _matrix(node: ir.Node) -> np.ndarray:
    """The constant weight as (in, out)."""
    weight, transposed = _weight(node)
    assert weight.const_value is not None
    matrix = weight.const_value.numpy()
    return matrix.T if transposed else matrix


def _drop_unread(graph: ir.Graph, weight: ir.Value) -> None:
    """Remove an initializer that nothing reads any more, and transposes of it that nothing reads."""
    for use in list(weight.uses()):
        if use.node.op_type == "Transpose" and not use.node.outputs[0].uses():
            graph.remove(use.node, safe=True)
    if not weight.uses():
        del graph.initializers[str(weight.name)]


def _is_plain(node: ir.Node) -> bool:
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    is_vector = bias is None or (bias.shape is not None and tuple(bias.shape) == (_matrix(node).shape[1],))
    return factors == [1.0, 1.0] and not any(node.attributes.get_int(name, 0) for name in _SWITCHES) and is_vector


def _lookup_tables(graph: ir.Graph) -> list[np.ndarray]:
    """The constant matrices that a Gather reads rows of."""
    tables = [node.inputs[0] for node in graph if node.op_type == "Gather"]
    constants = [value.const_value for value in tables if value is not None and value.const_value is not None]
    return [constant.numpy() for constant in constants if len(constant.shape) == 2]


@dataclass(frozen=True)
class _Stored:
    """A quantised weight in the graph: the inputs that a node reads it by, and the attributes that describe it."""

    values: tuple[ir.Value, ...]
    attributes: dict[str, int]


def _store(graph: ir.Graph, weight: str, matrix: np.ndarray, bits: int) -> _Stored:
    inner, outer = matrix.shape
    quantized = quantize_matrix(matrix, bits)
    size = block_size(inner, bits, matrix.dtype.itemsize)
    values = []
    for part, array in vars(quantized).items():
        values.append(add_constant(graph, f"{weight}_{part}", array))
    return _Stored(tuple(values), {"K": inner, "N": outer, "block_size": size})
