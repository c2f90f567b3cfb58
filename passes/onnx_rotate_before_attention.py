"""RotateBeforeAttention: rotary positions of a padded prompt are applied in front of `GroupQueryAttention`.

ONNX Runtime's CPU `GroupQueryAttention` that starts a cache rotates every row at the first row's positions, whatever
`position_ids` says. The prompt's own logits survive that (attention sees differences of positions only), but the keys
it leaves in the cache are turned by the wrong angle for every row that is padded differently from the first, and the
first decoded token is wrong. So, where the node has no past and rotates at given positions:

    GroupQueryAttention(q, k, v; rotary)      becomes      GroupQueryAttention(Rotary(q), Rotary(k), v)

A packed q/k/v input is split first. Nodes with a past read `position_ids` row by row and are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .onnx_edit import add_constant
from .onnx_result import OnnxPassResult

_DOMAIN = "com.microsoft"
_QUERY, _KEY, _VALUE, _PAST_KEY, _COS, _SIN, _POSITIONS = 0, 1, 2, 3, 7, 8, 9


@dataclass(frozen=True)
class RotateBeforeAttention:
    """Take the rotary embedding out of every `GroupQueryAttention` that starts a cache at given positions."""

    def run(self, model: ir.Model) -> OnnxPassResult:
        """Edit `model` in place."""
        rotating = [node for node in model.graph if _rotates(node)]
        reasons = {node: _reason_to_refuse(node) for node in rotating}
        attentions = [node for node in rotating if reasons[node] is None]
        refusals = [f"{node.name}: {reason}" for node, reason in reasons.items() if reason is not None]
        for position, node in enumerate(attentions):
            if node.inputs[_KEY] is None:
                _split_packed_input(model.graph, node, f"attention_{position}")
            for index, role, heads in ((_QUERY, "query", "num_heads"), (_KEY, "key", "kv_num_heads")):
                _rotate_input(model.graph, node, index, heads, f"attention_{position}_{role}")
            for index in (_COS, _SIN, _POSITIONS):
                node.replace_input_with(index, None)
            for attribute in ("do_rotary", "rotary_interleaved"):
                node.attributes.pop(attribute, None)
        return OnnxPassResult(model, bool(attentions), len(attentions), tuple(refusals))


def _rotates(node: ir.Node) -> bool:
    """Whether a node is an attention that rotates its queries and keys at given positions."""
    if node.op_type != "GroupQueryAttention" or node.domain != _DOMAIN or len(node.inputs) <= _POSITIONS:
        return False
    return node.attributes.get_int("do_rotary", 0) == 1 and node.inputs[_POSITIONS] is not None


def _reason_to_refuse(node: ir.Node) -> str | None:
    if node.inputs[_PAST_KEY] is not None:
        return "has a past, and so reads the positions row by row"
    if _width(node.inputs[_COS]) is None:
        return "the width of its cosines is not known, and so not how much of each head turns"
    packed = node.inputs[_QUERY]
    if node.inputs[_KEY] is None and (packed is None or packed.shape is None or not _is_width(packed.shape)):
        return "the width of its packed queries, keys and values is not known, and so not where to split them"
    return None


def _is_width(shape: ir.Shape) -> bool:
    return len(shape) == 3 and isinstance(shape[2], int)


def _width(value: ir.Value | None) -> int | None:
    """Columns of a table, if that is a fixed number. One that is put together has those of its parts."""
    if value is None:
        return None
    if value.shape is not None:
        columns = value.shape[1]
        return columns if isinstance(columns, int) else None
    node = value.producer()
    if node is None or node.op_type != "Concat" or node.attributes.get_int("axis") != 0:
        return None
    return next((width for part in node.inputs if (width := _width(part)) is not None), None)


def _split_packed_input(graph: ir.Graph, node: ir.Node, name: str) -> None:
    """Read query, key and value (batch, tokens, heads * head size) off their packed projection."""
    packed = node.inputs[_QUERY]
    assert packed is not None and packed.shape is not None, f"{node.name} has no query, or one of unknown shape"
    heads = [node.attributes.get_int("num_heads"), *[node.attributes.get_int("kv_num_heads")] * 2]
    width = packed.shape[2]
    assert isinstance(width, int), f"{node.name}: the packed width {width} is not fixed"
    sizes = [count * (width // sum(heads)) for count in heads]
    lengths = add_constant(graph, f"{name}_sizes", sizes)
    split = ir.node("Split", [packed, lengths], attributes={"axis": 2}, num_outputs=3, name=f"{name}_split")
    graph.insert_before(node, split)
    for index, part, size in zip((_QUERY, _KEY, _VALUE), split.outputs, sizes, strict=True):
        part.name, part.type, part.shape = f"{name}_split_{index}", packed.type, ir.Shape([*packed.shape[:2], size])
        node.replace_input_with(index, part)


def _rotate_input(graph: ir.Graph, node: ir.Node, index: int, heads: str, name: str) -> None:
    states, cosines = node.inputs[index], node.inputs[_COS]
    assert states is not None and cosines is not None
    half = _width(cosines)
    # Attention reads off the cosines how much of each head turns; the operator alone takes all of it unless told.
    assert half is not None, f"{node.name} is refused"
    turning = {"num_heads": node.attributes.get_int(heads), "rotary_embedding_dim": 2 * half}
    rotary = ir.node(
        "RotaryEmbedding",
        [states, node.inputs[_POSITIONS], cosines, node.inputs[_SIN]],
        attributes={"interleaved": node.attributes.get_int("rotary_interleaved", 0), **turning},
        domain=_DOMAIN,
        name=f"{name}_rotary",
    )
    rotated = rotary.outputs[0]
    rotated.name, rotated.type, rotated.shape = f"{name}_rotated", states.type, states.shape
    graph.insert_before(node, rotary)
    node.replace_input_with(index, rotated)
