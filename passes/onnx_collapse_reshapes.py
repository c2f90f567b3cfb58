"""CollapseReshapes: a tensor that is reshaped and reshaped back is read as it was.

    Reshape(Reshape(x, a), b)      becomes      x                 where the result has the shape of x

An exporter splits a projection into heads, and a fused attention joins them again. Shapes are compared by their
recorded sizes and symbols: where one of them is not known, nothing is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from .onnx_result import OnnxPassResult

_Sizes = tuple[int | str, ...]


@dataclass(frozen=True)
class CollapseReshapes:
    """Remove pairs of reshapes that undo each other, and the first of them where nothing else reads it."""

    def run(self, model: ir.Model) -> OnnxPassResult:
        """Edit `model` in place."""
        applied, refusals = 0, []
        for node in list(model.graph):
            source = _source_of_pair(node)
            if source is None:
                continue
            reason = _reason_to_refuse(node, source)
            if reason:
                refusals.append(reason)
                continue
            first = _only(node.inputs[0]).producer()
            assert first is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            if not first.outputs[0].uses() and not first.outputs[0].is_graph_output():
                model.graph.remove(first, safe=True)
            applied += 1
        return OnnxPassResult(model, bool(applied), applied, tuple(refusals))


def _source_of_pair(node: ir.Node) -> ir.Value | None:
    """What the first of two reshapes in a row reads, if `node` is the second."""
    if node.op_type != "Reshape" or node.inputs[0] is None:
        return None
    first = node.inputs[0].producer()
    return first.inputs[0] if first is not None and first.op_type == "Reshape" else None


def _reason_to_refuse(node: ir.Node, source: ir.Value) -> str | None:
    output, where = node.outputs[0], f"reshape {node.name or node.outputs[0].name}"
    if output.is_graph_output():
        return f"{where}: its result is an output of the graph"
    result, original = _result_sizes(node), known_sizes(source)
    if result is None or original is None:
        return f"{where}: the shape of its result or of {source.name} is not recorded"
    if result != original:
        return f"{where}: its result is {list(result)}, {source.name} is {list(original)}"
    return None


def _result_sizes(node: ir.Node) -> _Sizes | None:
    """The second reshape's result: as recorded, or computed from a constant target."""
    recorded = known_sizes(node.outputs[0])
    if recorded is not None:
        return recorded
    before, target = known_sizes(_only(node.inputs[0])), _only(node.inputs[1]).const_value
    if before is None or target is None or node.attributes.get_int("allowzero", 0):
        return None
    wanted = [int(size) for size in target.numpy()]
    copied = len([size for size in wanted if size == 0])
    if wanted[:copied] != [0] * copied or len(before) < copied:
        return None
    rest, left = wanted[copied:], before[copied:]
    if any(not isinstance(size, int) for size in left):
        return None
    fixed = prod(size for size in rest if size != -1)
    total = prod(size for size in left if isinstance(size, int))
    return (*before[:copied], *(total // fixed if size == -1 else size for size in rest))


def known_sizes(value: ir.Value) -> _Sizes | None:
    """Sizes as integers and symbols as text; None where an axis, or the rank, is not recorded."""
    if value.shape is None:
        return None
    sizes = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return None if any(size is None for size in sizes) else sizes


def _only(value: ir.Value | None) -> ir.Value:
    assert value is not None, "a reshape has two inputs"
    return value
