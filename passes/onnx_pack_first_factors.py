"""PackFirstFactors: first factors that multiply the same value become one product.

    h_i = MatMul(x, A_i),  i = 1 .. n      becomes      h_1 ... h_n = Split(MatMul(x, [A_1 ... A_n]))

where each A_i (in, rank_i) is one of the named initializers and only one node reads it. A GEMM with a few dozen
columns leaves most of a core's registers idle and reads x again; the packed one is as wide as all ranks together.
The h_i keep their names, and what reads them does not change.

A factor with several calls stays as it is and says so. One without siblings has nothing to be packed with.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .onnx_edit import add_constant, free_name
from .onnx_result import OnnxPassResult

# From here on, Split takes its sizes as an input.
_SPLIT_BY_INPUT = 13


@dataclass(frozen=True)
class PackFirstFactors:
    """Pack named constant right operands of `MatMul` by the value they multiply.

    Attributes:
        factors: names of initializers; products with any other weight are left alone.
    """

    factors: Collection[str]

    def run(self, model: ir.Model) -> OnnxPassResult:
        """Edit `model` in place. `applied` counts the products that were packed into others."""
        refusals: list[str] = []
        by_input: dict[ir.Value, list[ir.Node]] = {}
        for node in model.graph:
            if self._multiplies_a_factor(node):
                reason = _reason_to_refuse(node)
                if reason:
                    refusals.append(f"{_right(node).name}: {reason}")
                else:
                    by_input.setdefault(_left(node), []).append(node)
        applied = 0
        for siblings in (nodes for nodes in by_input.values() if len(nodes) > 1):
            if model.opset_imports.get("", 0) < _SPLIT_BY_INPUT:
                refusals.append(
                    f"{_right(siblings[0]).name} and {len(siblings) - 1} more: opset "
                    f"{model.opset_imports.get('', 0)} has no Split that takes sizes, opset {_SPLIT_BY_INPUT} has"
                )
            else:
                _pack(model.graph, siblings)
                applied += len(siblings)
        return OnnxPassResult(model, bool(applied), applied, tuple(dict.fromkeys(refusals)))

    def _multiplies_a_factor(self, node: ir.Node) -> bool:
        if node.op_type != "MatMul" or node.domain:
            return False
        right = _right(node)
        return right.is_initializer() and right.name in self.factors


def _left(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _right(node: ir.Node) -> ir.Value:
    value = node.inputs[1]
    assert value is not None
    return value


def _reason_to_refuse(node: ir.Node) -> str | None:
    calls = len(_right(node).uses())
    if calls > 1:
        return f"{calls} products read it"
    if node.outputs[0].is_graph_output():
        return "its product is an output of the graph"
    return None


def _pack(graph: ir.Graph, siblings: list[ir.Node]) -> None:
    """One product and a split in the place of the first sibling; the others' readers all come later."""
    first = siblings[0]
    matrices = [_right(node).const_value.numpy() for node in siblings]
    name = f"{_right(first).name}.packed"
    packed = add_constant(graph, free_name(graph, name), np.concatenate(matrices, axis=1))
    sizes = add_constant(graph, free_name(graph, f"{name}.sizes"), [matrix.shape[1] for matrix in matrices])
    product = ir.node("MatMul", [_left(first), packed], name=free_name(graph, f"{name}.MatMul"))
    wide = product.outputs[0]
    wide.name, wide.dtype = free_name(graph, f"{name}.hidden"), packed.dtype
    split_name = free_name(graph, f"{name}.Split")
    split = ir.node("Split", [wide, sizes], attributes={"axis": -1}, num_outputs=len(siblings), name=split_name)
    graph.insert_before(first, (product, split))
    for node, part in zip(siblings, split.outputs, strict=True):
        old, weight = node.outputs[0], _right(node)
        part.name, part.dtype, part.shape = old.name, old.dtype, old.shape
        old.name = free_name(graph, f"{part.name}.unpacked")
        old.replace_all_uses_with(part)
        graph.remove(node, safe=True)
        del graph.initializers[str(weight.name)]
