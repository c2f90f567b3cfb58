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
        attentions = [node for node in rotating if node.inputs[_PAST_KEY] is None]
        refusals = [f"{node.name}: has a past, and so reads the positions row by row" for node in rotating
                    if node not in attentions]  # fmt: skip
        for position, node in enumerate(attentions):
            if node.inputs[_KEY] is None:
                _split_packed_input(model.graph, node, f"attention_{position}")
            for index, role in ((_QUERY, "query"), (_KEY, "key")):
                _rotate_input(model.graph, node, index, f"attention_{position}_{role}")
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


def _rotate_input(graph: ir.Graph, node: ir.Node, index: int, name: str) -> None:
    states = node.inputs[index]
    assert states is not None
    rotary = ir.node(
        "RotaryEmbedding",
        [states, node.inputs[_POSITIONS], node.inputs[_COS], node.inputs[_SIN]],
        attributes={"interleaved": node.attributes.get_int("rotary_interleaved", 0)},
        domain=_DOMAIN,
        name=f"{name}_rotary",
    )
    rotated = rotary.outputs[0]
    rotated.name, rotated.type, rotated.shape = f"{name}_rotated", states.type, states.shape
    graph.insert_before(node, rotary)
    node.replace_input_with(index, rotated)
