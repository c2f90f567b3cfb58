"""UnflattenGemms: a GEMM on flattened positions becomes a product on (batch, tokens, features).

    Reshape(Gemm(Reshape(x, rows), weight, bias), positions)      becomes

1. MatMul(x, weight) + bias                          where x is (batch, tokens, in), the result (batch, tokens, out)
2. MatMul(Reshape(x, positions), weight) + bias      where x has other axes, such as heads, and in = out

GPT-2's `Conv1D` is exported like this, as every `addmm` is. Positions have an axis of their own again, so that a
prefill can drop those it does not need (`LastPositionEarly`).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .onnx_collapse_reshapes import known_sizes
from .onnx_result import OnnxPassResult


@dataclass(frozen=True)
class UnflattenGemms:
    """Replace every GEMM between two reshapes that flatten and restore its positions."""

    def run(self, model: ir.Model) -> OnnxPassResult:
        """Edit `model` in place."""
        applied, refusals = 0, []
        for gemm in [node for node in model.graph if _reads_flattened(node)]:
            reason = _reason_to_refuse(gemm)
            if reason:
                refusals.append(f"GEMM {gemm.name or gemm.outputs[0].name}: {reason}")
                continue
            _replace(model.graph, gemm, applied)
            applied += 1
        return OnnxPassResult(model, bool(applied), applied, tuple(refusals))


def _reads_flattened(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or node.inputs[0] is None:
        return False
    flatten = node.inputs[0].producer()
    return flatten is not None and flatten.op_type == "Reshape"


def _reason_to_refuse(gemm: ir.Node) -> str | None:
    uses = gemm.outputs[0].uses()
    if len(uses) != 1 or uses[0].node.op_type != "Reshape" or gemm.outputs[0].is_graph_output():
        return "something other than one reshape reads it"
    restore, weight = uses[0].node, _input(gemm, 1)
    result, matrix = known_sizes(restore.outputs[0]), known_sizes(weight)
    if weight.const_value is None or matrix is None or len(matrix) != 2:
        return "its weight is no constant matrix"
    if result is None or len(result) != 3:
        return "the shape of its result is not recorded as (batch, tokens, features)"
    if result[2] != matrix[1]:
        return f"its result is reshaped to rows of {result[2]}, and the product has {matrix[1]}"
    if not _reads_as_it_gives(gemm, result):
        target = _input(restore, 1).const_value
        if matrix[0] != matrix[1]:
            return f"what it reads is not recorded as {[*result[:2], matrix[0]]}"
        if target is not None and 0 in target.numpy():
            return "its result takes the size of an axis from the flattened one"
    switched = [name for name in ("transA", "transB") if gemm.attributes.get_int(name, 0)]
    switched += [name for name in ("alpha", "beta") if gemm.attributes.get_float(name, 1.0) != 1.0]
    if switched:
        return f"it has {', '.join(switched)}, which a product has not"
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is not None and known_sizes(bias) != result[2:]:
        return f"its bias is {bias.shape}, not a row of {result[2]}"
    return None


def _reads_as_it_gives(gemm: ir.Node, result: tuple[int | str, ...]) -> bool:
    """Whether what is flattened in front of a GEMM has three axes, the first two those of the result."""
    sizes, matrix = known_sizes(_input(_input(gemm, 0).producer(), 0)), known_sizes(_input(gemm, 1))
    if sizes is None or matrix is None or len(sizes) != 3:
        return False
    return sizes[:2] == result[:2] and sizes[2] == matrix[0]


def _replace(graph: ir.Graph, gemm: ir.Node, position: int) -> None:
    flatten, restore = _input(gemm, 0).producer(), gemm.outputs[0].uses()[0].node
    assert flatten is not None
    bias, result = gemm.inputs[2] if len(gemm.inputs) > 2 else None, restore.outputs[0]
    x, nodes = _input(flatten, 0), []
    if not _reads_as_it_gives(gemm, known_sizes(result) or ()):
        nodes.append(ir.node("Reshape", [x, _input(restore, 1)], restore.attributes, name=f"product_{position}_of"))
        x = nodes[-1].outputs[0]
    product = ir.node("MatMul", [x, _input(gemm, 1)], name=f"product_{position}")
    product.metadata_props.update(gemm.metadata_props)
    nodes.append(product)
    if bias is not None:
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"product_{position}_bias"))
    for node in nodes:
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{node.name}_0", result.type, ir.Shape(tuple(result.shape or ()))
    last = nodes[-1].outputs[0]
    last.name = result.name
    graph.insert_before(restore, nodes)
    result.replace_all_uses_with(last, replace_graph_outputs=True)
    graph.remove((restore, gemm), safe=True)
    if not flatten.outputs[0].uses() and not flatten.outputs[0].is_graph_output():
        graph.remove(flatten, safe=True)


def _input(node: ir.Node | None, index: int) -> ir.Value:
    assert node is not None, "asked before"
    value = node.inputs[index]
    assert value is not None, "asked before"
    return value
