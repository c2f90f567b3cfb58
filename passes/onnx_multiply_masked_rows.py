"""MultiplyMaskedRows: rows that attend to nothing become zero by one product instead of two views and a choice.

    Reshape(Where(masked, 0, Reshape(x, heads)))      becomes      x * kept,      kept = 1 where not masked, else 0

`masked` is (batch, tokens, 1, 1), x and the result (batch, tokens, features). The exporter guards every attention
like this, and the choice reads and writes the activations three times. `kept` is computed once for all layers.

In float32 only: the product is zero because x is finite there (a masked score is the lowest finite number, so such
a row attends evenly), while half types may overflow in the sum of score and mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .onnx_collapse_reshapes import known_sizes
from .onnx_edit import add_constant
from .onnx_result import OnnxPassResult


@dataclass(frozen=True)
class MultiplyMaskedRows:
    """Replace the guards behind attention by a product."""

    def run(self, model: ir.Model) -> OnnxPassResult:
        """Edit `model` in place."""
        refusals = []
        kept: dict[ir.Value, ir.Value] = {}
        applied = 0
        for guard in [node for node in model.graph if _is_guard(node)]:
            reason = _reason_to_refuse(guard)
            if reason:
                refusals.append(reason)
                continue
            masked = guard.inputs[0]
            assert masked is not None
            if masked not in kept:
                kept[masked] = _insert_kept(model.graph, masked, guard, len(kept))
            _replace(model.graph, guard, kept[masked], applied)
            applied += 1
        return OnnxPassResult(model, bool(applied), applied, tuple(refusals))


_FINITE_WHEN_MASKED = frozenset({"GroupQueryAttention", "MultiHeadAttention"})


def _is_guard(node: ir.Node) -> bool:
    """`Where(condition, 0, reshaped)`."""
    if node.op_type != "Where" or any(value is None for value in node.inputs):
        return False
    zero, chosen = node.inputs[1], node.inputs[2]
    assert zero is not None and chosen is not None
    producer = chosen.producer()
    if zero.const_value is None or producer is None or producer.op_type != "Reshape":
        return False
    return zero.const_value.size == 1 and not zero.const_value.numpy().any()


def _reason_to_refuse(guard: ir.Node) -> str | None:
    where = f"guard {guard.name or guard.outputs[0].name}"
    uses = guard.outputs[0].uses()
    if len(uses) != 1 or uses[0].node.op_type != "Reshape" or guard.outputs[0].is_graph_output():
        return f"{where}: something other than one reshape reads it"
    first = guard.inputs[2].producer()
    masked, last = guard.inputs[0], uses[0].node
    assert first is not None and masked is not None and first.inputs[0] is not None
    sizes, result = known_sizes(masked), known_sizes(last.outputs[0])
    if sizes is None or result is None or len(result) != 3 or len(sizes) != 4:
        return f"{where}: the shape of its mask or of its result is not recorded as (batch, tokens, ...)"
    if sizes != (result[0], result[1], 1, 1):
        return f"{where}: its mask is {list(sizes)}, its result {list(result)}; it must be one for a whole row"
    if _rows_in(first.inputs[0]) != result:
        return f"{where}: what it guards is not recorded as {list(result)}"
    attention = first.inputs[0].producer()
    if attention is None or attention.op_type not in _FINITE_WHEN_MASKED:
        made_by = "an input" if attention is None else attention.op_type
        return f"{where}: it guards what {made_by} gives, which may be NaN in a masked row"
    if last.outputs[0].dtype != ir.DataType.FLOAT:
        return f"{where}: it is {last.outputs[0].dtype}, and a masked row is finite for certain in float32 only"
    return None


def _rows_in(value: ir.Value) -> tuple[int | str, ...] | None:
    """The sizes of a value; those of an attention's result are its query's, or its share of a packed input."""
    node = value.producer()
    if value.shape is not None or node is None or node.op_type != "GroupQueryAttention":
        return known_sizes(value)
    sizes = None if node.inputs[0] is None else known_sizes(node.inputs[0])
    if sizes is None or node.inputs[1] is not None:
        return sizes
    heads = node.attributes.get_int("num_heads")
    width, all_heads = sizes[2], heads + 2 * node.attributes.get_int("kv_num_heads")
    return (*sizes[:2], width // all_heads * heads) if isinstance(width, int) else None


def _insert_kept(graph: ir.Graph, masked: ir.Value, before: ir.Node, position: int) -> ir.Value:
    name = f"kept_rows_{position}"
    axis = add_constant(graph, f"{name}_axis", [3])
    squeeze = ir.node("Squeeze", [masked, axis], name=f"{name}_squeeze")
    negate = ir.node("Not", [squeeze.outputs[0]], name=f"{name}_not")
    cast = ir.node("Cast", [negate.outputs[0]], attributes={"to": ir.DataType.FLOAT}, name=f"{name}_cast")
    assert masked.shape is not None
    for node, dtype in ((squeeze, ir.DataType.BOOL), (negate, ir.DataType.BOOL), (cast, ir.DataType.FLOAT)):
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}_0", dtype
        node.outputs[0].shape = ir.Shape(tuple(masked.shape)[:3])
    graph.insert_before(before, (squeeze, negate, cast))
    return cast.outputs[0]


def _replace(graph: ir.Graph, guard: ir.Node, kept: ir.Value, position: int) -> None:
    last = guard.outputs[0].uses()[0].node
    first = guard.inputs[2].producer()
    assert first is not None
    source, result = first.inputs[0], last.outputs[0]
    assert source is not None
    source.shape, source.dtype = result.shape, result.dtype
    multiply = ir.node("Mul", [source, kept], name=f"masked_rows_{position}")
    product = multiply.outputs[0]
    product.name, product.type, product.shape = result.name, result.type, result.shape
    graph.insert_before(last, multiply)
    result.replace_all_uses_with(product, replace_graph_outputs=True)
    graph.remove((last, guard), safe=True)
    if not first.outputs[0].uses() and not first.outputs[0].is_graph_output():
        graph.remove(first, safe=True)
