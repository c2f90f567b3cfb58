"""CountPastByMask: a decode graph reads the length of its past off the attention mask, not off the cache's shape.

    Shape(past)[2:3]      becomes      Shape(attention_mask)[1:2] - 1

A decode step adds one token, so both are the same number while the cache holds the past and nothing else. Behind
the rewrite the cache may be longer than the past: a buffer of fixed size that `GroupQueryAttention` reads up to the
length it is told and, where input and output are bound to the same memory, extends in place, without a copy.

Refused where anything but `GroupQueryAttention` reads the past (a Concat makes a longer copy at every step), and
where an attention's new cache is read inside the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .onnx_edit import add_constant

_DOMAIN = "com.microsoft"
_PAST = (3, 4)
_TOKENS = 2  # the axis of a cache (batch, heads, tokens, head size)


@dataclass(frozen=True)
class CountPastByMask:
    """Make a decode graph independent of how long its cache buffers are. Changes nothing the second time.

    Attributes:
        mask: the graph input (batch, past + 1) of attended tokens.
        past: what names of cache inputs begin with.
    """

    mask: str = "attention_mask"
    past: str = "input.past_key_values."

    def reason_to_skip(self, model: ir.Model) -> str | None:
        """Why the graph cannot run on a cache of fixed size, in one sentence; None where it can."""
        caches = self._caches(model.graph)
        if not caches:
            return f"no input begins with {self.past!r}"
        if not any(value.name == self.mask for value in model.graph.inputs):
            return f"the graph does not read {self.mask}, which would say how long the past is"
        for cache in caches:
            for use in cache.uses():
                extends = _is_attention(use.node) and use.idx in _PAST
                if not extends and not _is_length(use.node) and not _is_shape_without_length(use.node):
                    return (
                        f"{use.node.op_type} {use.node.name} reads {cache.name}; only GroupQueryAttention can extend "
                        f"a cache in place"
                    )
        for node in model.graph:
            if _is_attention(node) and any(output.uses() for output in node.outputs[1:3]):
                return f"the graph reads the new cache of {node.name} itself"
        return None

    def run(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model` in place, or leave it as it is where `reason_to_skip` has a reason."""
        if self.reason_to_skip(model) is not None:
            return ir.passes.PassResult(model, modified=False)
        lengths = [use.node for cache in self._caches(model.graph) for use in cache.uses() if _is_length(use.node)]
        if not lengths:
            return ir.passes.PassResult(model, modified=False)
        past = self._past_length(model.graph)
        for node in lengths:
            node.outputs[0].replace_all_uses_with(past)
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=True)

    def _caches(self, graph: ir.Graph) -> list[ir.Value]:
        return [value for value in graph.inputs if value.name is not None and value.name.startswith(self.past)]

    def _past_length(self, graph: ir.Graph) -> ir.Value:
        """Columns of the mask less one, as a vector of one number: what `Shape(past)[2:3]` gave."""
        mask = next(value for value in graph.inputs if value.name == self.mask)
        one = add_constant(graph, "one_new_token", [1])
        columns = ir.node("Shape", [mask], attributes={"start": 1, "end": 2}, name="mask_columns")
        length = ir.node("Sub", [columns.outputs[0], one], name="past_by_mask")
        for node, name in ((columns, "mask_columns"), (length, "past_by_mask")):
            value = node.outputs[0]
            value.name, value.shape, value.dtype = name, ir.Shape([1]), ir.DataType.INT64
        graph.insert_before(graph[0], [columns, length])
        return length.outputs[0]


def _is_attention(node: ir.Node) -> bool:
    return node.op_type == "GroupQueryAttention" and node.domain == _DOMAIN


def _is_length(node: ir.Node) -> bool:
    """Whether a node is `Shape(...)[2:3]`."""
    return node.op_type == "Shape" and _axes_of_shape(node) == (_TOKENS, _TOKENS + 1)


def _is_shape_without_length(node: ir.Node) -> bool:
    """Whether a node reads axes of a shape, and the tokens are not among them."""
    return node.op_type == "Shape" and _TOKENS not in range(*_axes_of_shape(node))


def _axes_of_shape(node: ir.Node) -> tuple[int, int]:
    """The axes (first, past the last) of a tensor of four that a `Shape` node reads."""
    first, last, _ = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)).indices(4)
    return first, last
