"""LastPositionEarly: the last block of a prefill computes the last position alone, behind its keys and values.

`KeepLastPosition` leaves a gather in front of the head. Here it moves towards the inputs, one node at a time:

1. Gather(f(x, ...)) becomes f(Gather(x), ...) where f treats every position alike: GEMMs with a constant weight,
   norms, elementwise work, features split or joined, rotary embeddings. All outputs of f that are read must be
   gathered.
2. Gather(GroupQueryAttention(q, k, v)) without a past becomes a step behind a cache:
   GroupQueryAttention(Gather(q), Gather(k), Gather(v), past = k and v of all positions but the last).
   The keys and values that it leaves are the same.

It stops where something else needs every position: at the keys and values of the last block, and at the residual
stream in front of it. Of that block, all but two projections then run on one position per sequence. Nothing that
leaves the graph changes: the logits are the last position's, and the cache comes from keys and values alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .onnx_collapse_reshapes import known_sizes
from .onnx_edit import add_constant, is_constant
from .onnx_result import OnnxPassResult

_NORMS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
                    "SkipSimplifiedLayerNormalization", "RMSNormalization"})  # fmt: skip
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Tanh", "Sigmoid", "Erf", "Relu", "Gelu", "FastGelu",
                          "QuickGelu", "BiasGelu", "Cast", "Identity", "Clip"})  # fmt: skip
_QUERY, _KEY, _VALUE, _PAST_KEY, _PAST_VALUE, _BIAS = 0, 1, 2, 3, 4, 10


@dataclass(frozen=True)
class LastPositionEarly:
    """Move the gather of the last position up to where another node needs all positions."""

    def run(self, model: ir.Model) -> OnnxPassResult:
        """Edit `model` in place. `applied` counts the nodes that now run on the last position alone."""
        applied = 0
        waiting = [node for node in model.graph if _gathers_last(node)]
        while waiting:
            node = _source(waiting.pop())
            if node is not None and _reason_to_refuse(node) is None:
                waiting += _move_in_front(model.graph, node)
                applied += 1
        # Only now, since a node waits until the last of its outputs is gathered.
        stopped = [_source(node) for node in model.graph if _gathers_last(node)]
        refusals = [_reason_to_refuse(node) for node in dict.fromkeys(stopped) if node is not None]
        return OnnxPassResult(model, bool(applied), applied, tuple(reason for reason in refusals if reason))


def _source(gather: ir.Node) -> ir.Node | None:
    """What computes the values that are gathered; None for inputs, and for gathers that are gone by now."""
    value = gather.inputs[0]
    return None if value is None else value.producer()


def _gathers_last(node: ir.Node) -> bool:
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1:
        return False
    index = _input(node, 1).const_value
    return index is not None and index.numpy().tolist() == [-1]


def _reason_to_refuse(node: ir.Node) -> str | None:
    where = f"{node.op_type} {node.name or node.outputs[0].name}"
    if _is_attention(node):
        gathered: tuple[ir.Value, ...] = (node.outputs[0],)
        if _is_step(node):
            return f"{where}: it reads a cache already"
        unsupported = _unsupported_attention(node)
        if unsupported:
            return f"{where}: {unsupported}"
    else:
        gathered = tuple(value for value in node.outputs if value.uses() or value.is_graph_output())
        if _positions_of(node) is None:
            return f"{where}: it does not treat every position alike, or shapes are not recorded"
    for value in gathered:
        others = [use.node for use in value.uses() if not _gathers_last(use.node)]
        if value.is_graph_output() or others:
            reader = "the graph's output" if not others else f"{others[0].op_type} {others[0].name or ''}".strip()
            return f"{where}: {reader} reads all positions of {value.name}"
    return None


def _is_attention(node: ir.Node) -> bool:
    return node.op_type == "GroupQueryAttention"


def _is_step(node: ir.Node) -> bool:
    return node.inputs[_PAST_KEY] is not None


def _unsupported_attention(node: ir.Node) -> str | None:
    if node.inputs[_KEY] is None or node.inputs[_VALUE] is None:
        return "its query, key and value are packed"
    if node.attributes.get_int("do_rotary", 0):
        return "it rotates by itself, at positions of the whole prompt"
    if any(value is not None for value in node.inputs[_BIAS + 1 :]):
        return "it has an input behind the bias that this pass does not know"
    sizes = [known_sizes(_input(node, index)) for index in (_QUERY, _KEY, _VALUE)]
    if any(size is None or len(size) != 3 or not isinstance(size[2], int) for size in sizes):
        return "the shapes of its query, key and value are not recorded"
    bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
    if bias is not None and (bias.shape is None or len(bias.shape) != 4):
        return "the shape of its bias is not recorded"
    return None


def _positions_of(node: ir.Node) -> tuple[int, ...] | None:
    """Which inputs carry positions on axis 1, if the node treats every position alike; else None."""
    result = known_sizes(node.outputs[0])
    varying = [index for index, value in enumerate(node.inputs) if value is not None and not is_constant(value)]
    if result is None or len(result) != 3 or not varying:
        return None
    if node.op_type == "RotaryEmbedding" and node.domain == "com.microsoft":
        return (0, 1) if known_sizes(_input(node, 1)) == result[:2] and len(result) == 3 else None
    sizes = [known_sizes(_input(node, index)) for index in varying]
    if any(size is None or len(size) != 3 or size[1] != result[1] for size in sizes):
        return None
    if node.op_type in ("MatMul", "FusedMatMul"):
        weight, transposed = node.inputs[1], node.attributes.get_int("transA", 0)
        plain = varying == [0] and not transposed and weight is not None and weight.shape is not None
        return (0,) if plain and len(weight.shape) == 2 else None
    if node.op_type in _NORMS:
        return tuple(varying) if node.attributes.get_int("axis", -1) in (-1, 2) and max(varying) <= 1 else None
    if node.op_type == "Split":
        return (0,) if node.attributes.get_int("axis", 0) in (-1, 2) and varying == [0] else None
    if node.op_type == "Concat":
        joins_features = node.attributes.get_int("axis", 0) in (-1, 2)
        return tuple(varying) if joins_features and len(varying) == len(node.inputs) else None
    if node.op_type in _ELEMENTWISE and all(_same_for_all_positions(value) for value in node.inputs if value):
        return tuple(varying)
    return None


def _same_for_all_positions(value: ir.Value) -> bool:
    """An activation, or a constant without an axis of positions."""
    if not is_constant(value):
        return True
    return value.shape is not None and all(size == 1 for size in tuple(value.shape)[:-1])


def _move_in_front(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """The node reads gathered inputs, and its readers read it directly. Returns the gathers to go on with."""
    attention = _is_attention(node)
    outputs = node.outputs[:1] if attention else node.outputs
    if attention:
        gathers = [_turn_into_step(graph, node)]
    else:
        positions = _positions_of(node)
        assert positions is not None
        gathers = []
        for index in positions:
            gather = _gather_of(graph, _input(node, index), node)
            node.replace_input_with(index, gather.outputs[0])
            gathers.append(gather)
    for value in outputs:
        for gather in [use.node for use in value.uses()]:
            gathered = gather.outputs[0]
            promised = gathered.name if gathered.is_graph_output() else None
            gathered.replace_all_uses_with(value, replace_graph_outputs=True)
            graph.remove(gather, safe=True)
            if promised is not None:  # what callers ask for by name
                value.name = promised
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[0], 1, *tuple(value.shape)[2:]])
    return gathers


def _gather_of(graph: ir.Graph, value: ir.Value, before: ir.Node, axis: int = 1) -> ir.Node:
    """The gather of a value's last position: the one that exists, or a new one right behind the value."""
    for use in value.uses():
        if axis == 1 and _gathers_last(use.node):
            return use.node
    name = f"{value.name}_last"
    gather = ir.node("Gather", [value, _index(graph)], attributes={"axis": axis}, name=f"{name}_position")
    gathered = gather.outputs[0]
    gathered.name, gathered.type = name, value.type
    if value.shape is not None:
        gathered.shape = ir.Shape([1 if at == axis else size for at, size in enumerate(value.shape)])
    producer = value.producer()
    if producer is None:  # an input: in front of everything that could read it
        graph.insert_before(graph[0], gather)
    else:
        graph.insert_after(producer, gather)
    return gather


def _turn_into_step(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """Attention of the last position to all, in place. Returns the query's gather."""
    kv_heads = node.attributes.get_int("kv_num_heads")
    for index, past, role in ((_KEY, _PAST_KEY, "key"), (_VALUE, _PAST_VALUE, "value")):
        states = _input(node, index)
        before_last = _past_of(graph, node, states, kv_heads, f"{node.outputs[0].name}_past_{role}")
        node.replace_input_with(index, _gather_of(graph, states, node).outputs[0])
        node.replace_input_with(past, before_last)
    if len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None:
        node.replace_input_with(_BIAS, _gather_of(graph, _input(node, _BIAS), node, axis=2).outputs[0])
    query = _gather_of(graph, _input(node, _QUERY), node)
    node.replace_input_with(_QUERY, query.outputs[0])
    return query


def _past_of(graph: ir.Graph, node: ir.Node, states: ir.Value, heads: int, name: str) -> ir.Value:
    """All positions but the last of (batch, tokens, heads * size), as a cache (batch, heads, tokens - 1, size)."""
    sizes = tuple(states.shape or ())
    assert isinstance(sizes[2], int), "asked before"
    size = sizes[2] // heads
    bounds = [
        add_constant(graph, f"{name}_{role}", [value]) for role, value in (("start", 0), ("end", -1), ("axis", 1))
    ]
    # No -1 among the sizes: behind a prompt of one token there is nothing to infer it from.
    heads_shape = add_constant(graph, f"{name}_heads", [0, 0, heads, size])
    cut = ir.node("Slice", [states, *bounds], name=f"{name}_slice")
    split = ir.node("Reshape", [cut.outputs[0], heads_shape], name=f"{name}_reshape")
    turned = ir.node("Transpose", [split.outputs[0]], attributes={"perm": [0, 2, 1, 3]}, name=f"{name}_transpose")
    shapes = ([sizes[0], None, sizes[2]], [sizes[0], None, heads, size], [sizes[0], heads, None, size])
    for made, shape in zip((cut, split, turned), shapes, strict=True):
        value = made.outputs[0]
        value.name, value.type, value.shape = f"{made.name}_0", states.type, ir.Shape(shape)
    graph.insert_before(node, (cut, split, turned))
    return turned.outputs[0]


def _index(graph: ir.Graph) -> ir.Value:
    existing = graph.initializers.get("last_position")
    return existing if existing is not None else add_constant(graph, "last_position", [-1])


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} {node.name} has no input {index}"
    return value
