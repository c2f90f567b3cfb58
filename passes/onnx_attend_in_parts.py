"""AttendInParts: a long prompt attends in parts of its queries, each part to the keys in front of it only.

ONNX Runtime's CPU `GroupQueryAttention` computes the scores of every query with every key, and drops those behind
the query afterwards. Where it starts a cache, so

    y, K, V = GroupQueryAttention(q, k, v)      becomes, for one sequence of at least `smallest` tokens,

    y_i, K_i, V_i = GroupQueryAttention(q_i, k_i, v_i; past = K_(i-1), V_(i-1)),      i = 1 .. parts
    y, K, V = Concat(y_1 ...), K_parts, V_parts

Part i has its own rows of the bias, and the columns up to its own end. With four parts 5/8 of the scores are left,
and they fit in a core's cache. The kernel takes several tokens behind a cache for a batch of one only, so both ways
stay in the graph, under an `If`; short prompts and batches run as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .onnx_edit import add_constant, constant
from .onnx_result import OnnxPassResult

_DOMAIN = "com.microsoft"
_KEY, _VALUE, _PAST_KEY, _LENGTHS, _TOTAL, _BIAS = 1, 2, 3, 5, 6, 10
_KNOWN_ATTRIBUTES = frozenset({"num_heads", "kv_num_heads", "scale", "softcap", "do_rotary", "rotary_interleaved"})
PREFIX = "attention_in_parts"


@dataclass(frozen=True)
class AttendInParts:
    """Split the queries of attentions that start a cache.

    Attributes:
        parts: how many.
        smallest: tokens of a prompt that is split; below, a call costs more than it saves. At least `parts`.
    """

    parts: int = 4
    smallest: int = 192

    def run(self, model: ir.Model) -> OnnxPassResult:
        """Edit `model` in place."""
        attentions = [node for node in model.graph if _starts_a_cache(node)]
        accepted, refusals = [], []
        for node in attentions:
            reason = _reason_to_refuse(node)
            if reason:
                refusals.append(f"attention {node.name or node.outputs[0].name}: {reason}")
            else:
                accepted.append(node)
        if accepted:
            # Every attention of a prefill reads the same prompt, so its length is looked at once.
            lengths = _insert_lengths(model.graph, accepted[0], self.parts, self.smallest)
            for position, node in enumerate(accepted):
                _replace(model.graph, node, lengths, f"{PREFIX}_{position}")
        return OnnxPassResult(model, bool(accepted), len(accepted), tuple(refusals))


@dataclass(frozen=True)
class _Lengths:
    """Values of the graph that say where the parts of a prompt lie.

    Attributes:
        is_long: whether this run is split: a boolean scalar.
        sizes: tokens of each part (parts,).
        ends: where each part ends, one (1,) each.
    """

    is_long: ir.Value
    sizes: ir.Value
    ends: tuple[ir.Value, ...]


def _starts_a_cache(node: ir.Node) -> bool:
    return node.op_type == "GroupQueryAttention" and node.domain == _DOMAIN and node.inputs[_PAST_KEY] is None


def _reason_to_refuse(node: ir.Node) -> str | None:
    if node.inputs[_KEY] is None or node.inputs[_VALUE] is None:
        return "its query, key and value are packed"
    if node.attributes.get_int("do_rotary", 0):
        return "it rotates by itself, at positions of the whole prompt"
    unknown = sorted(set(node.attributes) - _KNOWN_ATTRIBUTES)
    if unknown:
        return f"it has the attribute {unknown[0]}, which this pass does not know"
    if any(value is not None for value in (*node.inputs[_TOTAL + 1 : _BIAS], *node.inputs[_BIAS + 1 :])):
        return "it has an input that this pass does not know"
    if any(value.name is None for value in node.outputs) or len(node.outputs) != 3:
        return "it has other outputs than its result, keys and values"
    return None


def _insert_lengths(graph: ir.Graph, before: ir.Node, parts: int, smallest: int) -> _Lengths:
    key = before.inputs[0]
    assert key is not None
    made: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=f"{PREFIX}_{name}")
        node.outputs[0].name, node.outputs[0].dtype = f"{PREFIX}_{name}_0", dtype
        node.outputs[0].shape = ir.Shape([parts if name == "sizes" else 1])
        made.append(node)
        return node.outputs[0]

    def number(name: str, values: list[int]) -> ir.Value:
        return add_constant(graph, f"{PREFIX}_{name}", values)

    integer, boolean = ir.DataType.INT64, ir.DataType.BOOL
    batch = add("Shape", [key], "batch", integer, start=0, end=1)
    tokens = add("Shape", [key], "tokens", integer, start=1, end=2)
    size = add("Div", [tokens, number("count", [parts])], "size", integer)
    ends = [add("Mul", [size, number(f"upto_{i}", [i])], f"end_{i}", integer) for i in range(1, parts)]
    last = add("Sub", [tokens, ends[-1]], "last", integer)
    sizes = add("Concat", [*[size] * (parts - 1), last], "sizes", integer, axis=0)
    one_sequence = add("Equal", [batch, number("one", [1])], "one_sequence", boolean)
    enough = add("GreaterOrEqual", [tokens, number("smallest", [smallest])], "enough", boolean)
    is_long = add("And", [one_sequence, enough], "is_long", boolean)
    graph.insert_before(before, made)
    return _Lengths(is_long, sizes, (*ends, tokens))


def _replace(graph: ir.Graph, node: ir.Node, lengths: _Lengths, name: str) -> None:
    branches = {
        "then_branch": _in_parts(node, lengths, f"{name}_split"),
        "else_branch": _at_once(node, f"{name}_whole"),
    }
    attributes = [ir.AttrGraph(role, branch) for role, branch in branches.items()]
    chosen = ir.Node("", "If", [lengths.is_long], attributes, num_outputs=3, name=name)
    graph.insert_before(node, chosen)
    for old, new in zip(node.outputs, chosen.outputs, strict=True):
        new.name, old.name = old.name, f"{old.name}_replaced"
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _at_once(node: ir.Node, name: str) -> ir.Graph:
    """The attention as it was, in a graph of its own."""
    copy = ir.Node(_DOMAIN, node.op_type, node.inputs, node.attributes.values(), num_outputs=3, name=name)
    for index, (old, new) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
        new.name, new.type, new.shape = f"{name}_{index}", old.type, old.shape
    return ir.Graph([], list(copy.outputs), nodes=[copy], name=name)


def _in_parts(node: ir.Node, lengths: _Lengths, name: str) -> ir.Graph:
    count = len(lengths.ends)
    nodes: list[ir.Node] = []
    constants: list[ir.Value] = []

    def add(op: str, inputs: list[ir.Value | None], label: str, outputs: int = 1, **attributes: int) -> ir.Node:
        made = ir.node(op, inputs, attributes=attributes, num_outputs=outputs, name=f"{name}_{label}")
        for index, value in enumerate(made.outputs):
            value.name = f"{made.name}_{index}"
        nodes.append(made)
        return made

    def inner(label: str, array: np.ndarray) -> ir.Value:
        constants.append(constant(f"{name}_{label}", array))
        return constants[-1]

    def rows(value: ir.Value | None, label: str, axis: int) -> list[ir.Value]:
        return list(add("Split", [value, lengths.sizes], label, count, axis=axis).outputs)

    queries, keys, values = (rows(node.inputs[at], label, 1) for at, label in enumerate(("query", "key", "value")))
    bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else None
    biases = rows(bias, "bias", 2) if bias is not None else []
    start, axis, one = (inner(label, np.array([value])) for label, value in (("start", 0), ("axis", 3), ("one", 1)))
    no_axes = inner("scalar", np.array([], np.int64))
    past: list[ir.Value | None] = [None, None]
    results = []
    for part, end in enumerate(lengths.ends):
        behind = add("Cast", [add("Sub", [end, one], f"behind_{part}").outputs[0]], f"lengths_{part}", to=_INT32)
        total = add("Cast", [add("Reshape", [end, no_axes], f"end_{part}").outputs[0]], f"total_{part}", to=_INT32)
        inputs = [queries[part], keys[part], values[part], *past, behind.outputs[0], total.outputs[0]]
        if biases:
            seen = add("Slice", [biases[part], start, end, axis], f"seen_{part}")
            inputs += [None, None, None, seen.outputs[0]]
        attention = ir.Node(
            _DOMAIN, node.op_type, inputs, node.attributes.values(), num_outputs=3, name=f"{name}_attention_{part}"
        )
        for index, value in enumerate(attention.outputs):
            value.name, value.type = f"{attention.name}_{index}", node.outputs[index].type
        nodes.append(attention)
        results.append(attention.outputs[0])
        past = list(attention.outputs[1:])
    joined = add("Concat", list(results), "joined", axis=1)
    outputs = [joined.outputs[0], *[value for value in past if value is not None]]
    for old, new in zip(node.outputs, outputs, strict=True):
        new.type, new.shape = old.type, old.shape
    return ir.Graph([], outputs, nodes=nodes, initializers=constants, name=name)


_INT32 = int(ir.DataType.INT32)
