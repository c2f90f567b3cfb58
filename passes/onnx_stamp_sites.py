"""StampSites: every GEMM node that computes a site carries the site's name in its metadata.

An exporter may pack several projections into one GEMM (weights side by side), transpose weights, or lose the scope a
node came from, so the weights themselves say which site it is:

1. The node's constant weight, read as (in, out), is walked from its first column. Where a block of columns equals
   one of a site's matrices, the node computes that site, and the walk goes on behind the block; columns that no
   site holds (a projection nobody asked about) are stepped over.
2. A matrix that sites share belongs to all of them. Where others hold the same block each, the scope that the
   exporter recorded for the node decides; where it names none of them, all are stamped.
3. Where no block is found at all, the scope alone decides.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import onnx_ir as ir

SITES_KEY = "blora.sites"
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_GEMMS = frozenset({"MatMul", "FusedMatMul", "Gemm", "Attention"})


@dataclass(frozen=True)
class StampSites:
    """Write `blora.sites` (site names joined by a space) into the metadata of the nodes that compute sites.

    Attributes:
        matrices: names of sites -> the matrices that they hold together, each (out, in) as in y = W x. Usually one
            site and its own: W if dense, A and B if factored. For a weight whose storage order is unknown, give both.
    """

    matrices: Mapping[tuple[str, ...], Sequence[np.ndarray]] = field(repr=False)

    def run(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the metadata of `model` in place, and give every GEMM node a name."""
        blocks = _blocks_by_first_column(self.matrices)
        modified = False
        for position, node in enumerate(model.graph):
            weight = _constant_weight(node)
            if weight is None:
                continue
            scopes = set(ast.literal_eval(node.metadata_props.get(SCOPES_KEY, "[]")))
            sites = _sites_by_content(weight, blocks, scopes) or [
                name for name in dict.fromkeys(chain.from_iterable(self.matrices)) if name in scopes
            ]
            if not sites:
                continue
            node.name = node.name or f"node_{position}"
            stamp = " ".join(sites)
            modified |= node.metadata_props.get(SITES_KEY) != stamp
            node.metadata_props[SITES_KEY] = stamp
        return ir.passes.PassResult(model, modified)


def stamped_sites(model: ir.Model) -> dict[str, list[str]]:
    """Node name -> names of the sites it computes, as `StampSites` left them."""
    return {
        str(node.name): node.metadata_props[SITES_KEY].split(" ")
        for node in model.graph
        if SITES_KEY in node.metadata_props
    }


_Blocks = dict[bytes, list[tuple[tuple[str, ...], np.ndarray]]]


def _blocks_by_first_column(matrices: Mapping[tuple[str, ...], Sequence[np.ndarray]]) -> _Blocks:
    """Bytes of a matrix's first row (the first column of its transpose) -> the sites that have such a matrix."""
    blocks: _Blocks = {}
    for names, owned in matrices.items():
        for matrix in owned:
            bits = _as_bits(matrix)
            blocks.setdefault(bits[0].tobytes(), []).append((names, bits))
    return blocks


def _sites_by_content(weight: np.ndarray, blocks: _Blocks, scopes: set[str]) -> list[str]:
    """The sites whose matrices lie side by side in `weight` (in, out), in order."""
    rows = _as_bits(weight.T)
    found: list[str] = []
    start = 0
    while start < len(rows):
        matches = [
            (names, len(block))
            for names, block in blocks.get(rows[start].tobytes(), ())
            if np.array_equal(rows[start : start + len(block)], block)
        ]
        if not matches:
            start += 1
            continue
        width = max(size for _, size in matches)
        holders = [names for names, size in matches if size == width]
        found += chain.from_iterable([names for names in holders if scopes & set(names)] or holders)
        start += width
    return list(dict.fromkeys(found))


def _constant_weight(node: ir.Node) -> np.ndarray | None:
    """The node's constant (in, out) weight, whichever way the file stores it; None if it has none."""
    if node.op_type not in _GEMMS:
        return None
    for value in node.inputs[1:]:
        matrix = _constant_matrix(value)
        if matrix is not None:
            return matrix.T if node.attributes.get_int("transB", 0) else matrix
    return None


def _constant_matrix(value: ir.Value | None) -> np.ndarray | None:
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy() if len(value.const_value.shape) == 2 else None
    for source in _transposed_sources(value):
        matrix = _constant_matrix(source)
        return None if matrix is None else matrix.T
    return None


def _transposed_sources(value: ir.Value) -> Iterator[ir.Value | None]:
    node = value.producer()
    if node is not None and node.op_type == "Transpose":
        yield node.inputs[0]


def _as_bits(matrix: np.ndarray) -> np.ndarray:
    """The matrix as unsigned integers, contiguous: compares exactly, NaNs and narrow floats included."""
    return np.ascontiguousarray(matrix).view(np.dtype(f"u{matrix.dtype.itemsize}"))
