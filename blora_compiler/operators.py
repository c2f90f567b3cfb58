"""What a graph node costs, as data: shapes become size expressions, nodes become `Operator` values.

Only this file reads symbolic shapes. Formulas count as `torch.utils.flop_counter` does: a multiply-add is two
operations, attention is counted in full whether masked or not, elementwise work is no FLOP and has its own field.
Routed experts, which that counter leaves out, are counted by the rows that are routed to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from .values import AttentionShape, Operator, Workload

aten = torch.ops.aten

# Operators that move no data or that only assert: they cost nothing and do not hide a parameter behind them.
VIEWS: set[Any] = {
    aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints, aten.squeeze.dim,
    aten.squeeze.default, aten.unsqueeze.default, aten.transpose.int, aten.permute.default, aten.t.default,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.unbind.int, aten.alias.default, aten.detach.default, aten.detach_.default,
    aten.lift_fresh_copy.default, aten.contiguous.default, aten.dropout.default, aten.to.dtype_layout,
    aten.to.dtype, aten.to.device, aten.movedim.int, aten._assert_tensor_metadata.default, aten.sym_size.int,
    aten.view_as.default, aten.expand_as.default, aten.numpy_T.default, aten.swapaxes.default,
}  # fmt: skip

# Of these, the ones that put elements into another order.
REORDERINGS: set[Any] = {
    aten.transpose.int, aten.permute.default, aten.t.default, aten.movedim.int, aten.numpy_T.default,
    aten.swapaxes.default,
}  # fmt: skip

ATTENTION = aten.scaled_dot_product_attention.default
KEYS = "tokens + context"  # what a query attends to
MATRIX_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.matmul.default, aten.linear.default, aten.addmm.default,
                   aten.baddbmm.default}  # fmt: skip
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
                aten.conv2d.padding, aten.conv3d.padding, aten.convolution.default}  # fmt: skip
TRANSPOSED_CONVOLUTIONS = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
# (rows of all experts, in) times (experts, in, out), rows sorted by expert: torch's own kernel, and the stand-in that
# transformers registers for the types and devices that torch has none for.
GROUPED_PRODUCTS = {"_grouped_mm", "grouped_mm_fallback"}
# Reads of a constant table at computed positions.
GATHERS = {aten.index.Tensor, aten.index_select.default}
# What keys and values pass through between the cache and the attention that changes none of their numbers.
COPIES = {aten.clone.default, aten.repeat_interleave.self_int, aten.repeat.default}


# What computes each position of its input from that position alone, where it keeps the axis of positions.
_BY_POSITION = {
    "add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "exp", "tanh", "sigmoid", "erf", "relu", "gelu",
    "silu", "clamp", "mean", "layer_norm", "rms_norm", "cat", "linear", "addmm", "mm", "matmul", "to", "getitem",
}  # fmt: skip


def last_only_nodes(graph: fx.Graph, symbols: Mapping[str, str], constants: Mapping[fx.Node, str]) -> set[fx.Node]:
    """Nodes whose result at a position is needed for the output at that position, and for nothing else.

    Walks from the output towards the inputs, and stops where positions meet: at the keys and values of the last
    attention, and at what these are computed from.
    """
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and _holds_numbers(node) and _positions(node, symbols):
            readers = [user for user in node.users if user.op == "output" or _holds_numbers(user)]
            if readers and all(
                user.op == "output" or (user in found and _keeps_positions_apart(user, node, symbols, constants))
                for user in readers
            ):
                found.add(node)
    return found


def _holds_numbers(node: fx.Node) -> bool:
    """Whether a result is tensors, and not a size or nothing at all."""
    return isinstance(node.meta.get("val"), Tensor | tuple | list)


def _positions(node: fx.Node, symbols: Mapping[str, str]) -> list[str]:
    """The axes of a result that run over positions."""
    return [size for size in _shape(node, symbols) if "tokens" in size]


def _keeps_positions_apart(
    user: fx.Node, node: fx.Node, symbols: Mapping[str, str], constants: Mapping[fx.Node, str]
) -> bool:
    if _positions(user, symbols) != _positions(node, symbols) and operation_name(user) not in ("view", "reshape"):
        return False
    operands = user.all_input_nodes
    if user.target is ATTENTION:
        return user.args[0] is node and user.args[1] is not node and user.args[2] is not node
    if user.target in MATRIX_PRODUCTS and not all(n is node or _is_constant(n, constants) for n in operands):
        return False
    if operation_name(user) == "mean":
        return bool(user.args[1] == [-1])
    if operation_name(user) == "cat":
        return user.args[1:] == (-1,)
    return user.target in VIEWS or user.target in COPIES or operation_name(user) in _BY_POSITION


def size_names(graph: fx.GraphModule, inputs: list[str]) -> dict[str, str]:
    """Symbol -> `batch` for the first axis of any input, `tokens` for the second.

    torch.export may give two inputs different symbols for one size (it cannot know that a mask is as long as the
    ids); they are the same workload quantity.
    """
    names: dict[str, str] = {}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            for size, name in zip(value.shape[:2], ("batch", "tokens"), strict=False):
                if isinstance(size, torch.SymInt):
                    names.setdefault(str(size.node.expr), name)
    return names


def size_expression(size: int | torch.SymInt, symbols: Mapping[str, str]) -> str:
    """One axis as an expression over `batch` and `tokens`."""
    if isinstance(size, int):
        return str(size)
    return _renamed(size.node.expr, tuple(symbols.items()))


@lru_cache(maxsize=4096)
def _renamed(expression: Any, symbols: tuple[tuple[str, str], ...]) -> str:
    """A sympy expression with its symbols named. Cached: identical layers have identical sizes."""
    names = dict(symbols)
    return str(expression.subs({symbol: names.get(str(symbol), str(symbol)) for symbol in expression.free_symbols}))


def element_count(shape: Iterable[int | torch.SymInt], symbols: Mapping[str, str]) -> list[str]:
    """The axes of a shape as expressions; their product is the number of elements."""
    return [size_expression(size, symbols) for size in shape]


def multiplied(factors: Iterable[str]) -> str:
    """A product as one expression, its numbers already multiplied: `["2", "tokens", "3"]` -> `"6*tokens"`."""
    number, symbolic = 1, []
    for factor in factors:
        if factor.isdigit():
            number *= int(factor)
        else:
            symbolic.append(factor if factor.isidentifier() else f"({factor})")
    return "*".join([str(number), *symbolic] if number != 1 or not symbolic else symbolic)


def added(terms: Iterable[str]) -> str:
    """A sum as one expression, zeros left out."""
    terms = [term for term in terms if term != "0"]
    return " + ".join(terms) or "0"


def describe_operators(
    nodes: Iterable[fx.Node],
    symbols: Mapping[str, str],
    constants: Mapping[fx.Node, str],
    last_only: Collection[fx.Node] = (),
) -> tuple[Operator, ...]:
    """The operators that nodes stand for, in order, each with a name of its own.

    A name says where and what, and counts within its module only, so it is the same however many other modules the
    graph has.

    Args:
        nodes: call_function nodes with tensor results that belong to no site.
        symbols: names of the graph's symbols, from `size_names`.
        constants: every node that depends on constants alone.
        last_only: from `last_only_nodes`.
    """
    seen: Counter[str] = Counter()
    described = []
    for node in nodes:
        operator = replace(describe_operator(node, symbols, constants), last_only=node in last_only)
        count = seen[operator.name]
        seen[operator.name] += 1
        described.append(replace(operator, name=f"{operator.name}_{count}") if count else operator)
    return tuple(described)


def describe_operator(node: fx.Node, symbols: Mapping[str, str], constants: Mapping[fx.Node, str]) -> Operator:
    """The operator a node stands for; arguments as for `describe_operators`."""
    owner, owner_type = innermost_module(node)
    name = f"{owner}.{operation_name(node)}" if owner else operation_name(node)
    operator = replace(_work(node, symbols, constants), name=name, owner=owner, owner_type=owner_type)
    if operator.weight_reads != "0":
        return operator
    return replace(operator, weight_reads=_constants_read(node, symbols, constants))


def operation_name(node: fx.Node) -> str:
    """`bmm` of `aten.bmm.default`; the plain name of anything else."""
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))


def innermost_module(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the module a node was traced in; `""` is the model itself."""
    for path, owner in reversed((node.meta.get("nn_module_stack") or {}).values()):
        if not str(path).startswith("_empty_nn_module_stack"):
            return str(path), getattr(owner, "__name__", str(owner)).rpartition(".")[2]
    return "", ""


def _work(node: fx.Node, symbols: Mapping[str, str], constants: Mapping[fx.Node, str]) -> Operator:
    """What a node computes, reads and writes; its name and its constants are added by the caller."""
    output = _with_cache(_shape(node, symbols))
    operands = [argument for argument in node.all_input_nodes if isinstance(argument.meta.get("val"), Tensor)]
    activations = [
        _with_cache(_shape(operand, symbols)) for operand in operands if not _is_constant(operand, constants)
    ]
    moved = added([multiplied(shape) for shape in (*activations, output)])

    if node.target is ATTENTION:
        return _attention(node, symbols)
    if operation_name(node) in GROUPED_PRODUCTS:
        return _grouped_product(node, symbols, moved)
    if node.target in MATRIX_PRODUCTS:
        first = 1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0
        inner = _with_cache(_shape(_operand(node, first), symbols))
        if len(activations) > 1 and KEYS in (inner[-1], output[-1]):
            return _written_out_attention(node, first, inner, output, moved, symbols)
        routed = any(_is_gathered_stack(operand, constants) for operand in operands)
        flops = multiplied(["2", *output, inner[-1]])
        return Operator("", "experts" if routed else "matmul", flops, activations=moved)
    if node.target is aten.einsum.default and len(node.args[1]) == 2:  # type: ignore[arg-type]
        return Operator("", "matmul", _einsum_flops(node, symbols), activations=moved)
    if node.target in CONVOLUTIONS or node.target in TRANSPOSED_CONVOLUTIONS:
        # Each element of the output (of the input, where transposed) meets (channels / groups, *window) numbers.
        met = _shape(_operand(node, 1), symbols)[1:]
        elements = output if node.target in CONVOLUTIONS else _shape(_operand(node, 0), symbols)
        return Operator("", "convolution", multiplied(["2", *elements, *met]), activations=moved)
    if node.target is aten.embedding.default or _is_gather(node, constants):
        count = multiplied(output)
        return Operator("", "lookup", activations=count, weight_reads=count)
    # Reductions read more than they write, so the larger of the two is the work.
    sizes = [shape for shape in (*activations, output) if shape]
    work = max((multiplied(shape) for shape in sizes), key=_rough_size, default="1")
    return Operator("", "elementwise", elementwise=work, activations=moved)


# ── Kinds of work ────────────────────────────────────────────────────────────────────────────────────────────────


def _with_cache(shape: list[str]) -> list[str]:
    """A shape whose last two axes are queries and keys, where keys grow with the queries' tokens: those of a cache in
    decode count as well."""
    return [*shape[:-1], KEYS] if shape[-2:] == ["tokens", "tokens"] else shape


def _written_out_attention(
    node: fx.Node, first: int, left: list[str], output: list[str], moved: str, symbols: Mapping[str, str]
) -> Operator:
    """A product of queries and keys, or of scores and values; the latter carries the sizes of the attention."""
    flops = multiplied(["2", *output, left[-1]])
    other = _operand(node, first + 1)
    right = _shape(other, symbols)
    behind = multiplied([*(size for size in right if size != "tokens"), "context"])
    moved = added([moved, behind])  # keys or values that lie in the cache
    if left[-1] != KEYS:
        return Operator("", "matmul", flops, activations=moved)
    kv_heads = right[-3] if len(right) > 3 else "1"
    if kv_heads.isdigit():
        kv_heads = str(int(kv_heads) // _times_repeated(other))
    shape = AttentionShape(
        batch=multiplied(right[: -3 if len(right) > 3 else -2]),
        heads=output[-3] if len(output) > 3 else "1",
        kv_heads=kv_heads,
        queries=output[-2],
        keys=KEYS,
        head_size=_size_of_keys(_operand(node, first), symbols) or right[-1],
        value_size=right[-1],
    )
    return Operator("", "matmul", flops, activations=moved, attention=shape)


def _size_of_keys(scores: fx.Node, symbols: Mapping[str, str]) -> str | None:
    """The size of queries and keys behind scores, up their first operands; None where no product is found there."""
    node = scores
    while node.op == "call_function" and node.target not in MATRIX_PRODUCTS:
        node = next(iter(node.all_input_nodes), node)
        if not node.all_input_nodes:
            return None
    if node.op != "call_function":
        return None
    return _shape(_operand(node, 1 if node.target is aten.baddbmm.default else 0), symbols)[-1]


def _attention(node: fx.Node, symbols: Mapping[str, str]) -> Operator:
    """Scores and mixing, each 2 * batch * heads * queries * keys * size."""
    shape = _attention_shape(node, symbols)
    scores = multiplied([shape.batch, shape.heads, shape.queries, shape.keys])
    flops = added([multiplied(["2", scores, shape.head_size]), multiplied(["2", scores, shape.value_size])])
    sizes = (shape.head_size, shape.value_size)
    rows = [multiplied([shape.batch, shape.heads, shape.queries, size]) for size in sizes]
    rows += [multiplied([shape.batch, shape.kv_heads, shape.keys, size]) for size in sizes]
    return Operator("", "attention", flops, elementwise=scores, activations=added(rows), attention=shape)


def _attention_shape(node: fx.Node, symbols: Mapping[str, str]) -> AttentionShape:
    """Keys that grow with the query's tokens are those of a cache in decode: they count the context too."""
    query, key, value = (_shape(_operand(node, position), symbols) for position in range(3))
    heads = query[-3] if len(query) > 3 else "1"
    kv_heads = key[-3] if len(key) > 3 else "1"
    if kv_heads.isdigit():
        kv_heads = str(int(kv_heads) // _times_repeated(_operand(node, 1)))
    return AttentionShape(
        batch=multiplied(query[: -3 if len(query) > 3 else -2]),
        heads=heads,
        kv_heads=kv_heads,
        queries=query[-2],
        keys=KEYS if key[-2] == query[-2] == "tokens" else key[-2],
        head_size=query[-1],
        value_size=value[-1],
        rotary=_is_rotated(_operand(node, 0)),
    )


def _is_rotated(node: fx.Node) -> bool:
    """Whether a query comes out of a sum or a concatenation, as rotated ones do, and not out of a projection."""
    while node.op == "call_function" and (node.target in VIEWS or node.target in COPIES):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        node = source
    return node.target in (aten.add.Tensor, aten.cat.default)


def _times_repeated(node: fx.Node) -> int:
    """How often each key head was repeated on its way into attention, by views and copies alone."""
    times = 1
    while node.op == "call_function" and (node.target in VIEWS or node.target in COPIES):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        if node.target in (aten.expand.default, *COPIES):
            before, after = _static_elements(source), _static_elements(node)
            times *= after // before
        node = source
    return times


def _static_elements(node: fx.Node) -> int:
    """The product of a shape's fixed axes: batch and tokens left out, heads and their size kept."""
    product = 1
    for size in node.meta["val"].shape:
        product *= size if isinstance(size, int) else 1
    return product


def _grouped_product(node: fx.Node, symbols: Mapping[str, str], moved: str) -> Operator:
    """Each routed row (a token goes to several experts) meets one expert's matrix, and no more experts are read than
    there are rows."""
    rows, out = _shape(node, symbols)
    experts, into, _ = _shape(_operand(node, 1), symbols)
    return Operator(
        "", "experts", multiplied(["2", rows, into, out]), activations=moved,
        weight_reads=multiplied([f"Min({experts}, {rows})", into, out]),
    )  # fmt: skip


def _is_gather(node: fx.Node, constants: Mapping[fx.Node, str]) -> bool:
    """Whether a node reads a constant table of numbers at computed positions, as an embedding does."""
    if node.target not in GATHERS or node in constants:
        return False
    table = _operand(node, 0)
    return _is_constant(table, constants) and table.meta["val"].is_floating_point()


def _is_gathered_stack(node: fx.Node, constants: Mapping[fx.Node, str]) -> bool:
    """Whether an operand is a matrix for each row, gathered from a constant stack of experts."""
    source = _views_behind(node)[-1]
    return _is_gather(source, constants) and _operand(source, 0).meta["val"].dim() == 3


def _einsum_flops(node: fx.Node, symbols: Mapping[str, str]) -> str:
    """Twice the product of all axes that the output has or both operands share; others are summed beforehand."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, list | tuple)
    inputs, _, output = equation.replace(" ", "").partition("->")
    axes: dict[str, str] = {}
    named: list[set[str]] = []
    for labels, operand in zip(inputs.split(","), operands, strict=True):
        assert isinstance(operand, fx.Node)
        sizes = _shape(operand, symbols)
        before, _, after = labels.partition("...")
        hidden = [f".{index}" for index in range(len(before) + len(after) - len(sizes), 0)]
        names = [*before, *hidden, *after]
        named.append(set(names))
        for name, size in zip(names, sizes, strict=True):
            if axes.get(name, "1") == "1":  # an axis of size 1 is broadcast against the other operand's
                axes[name] = size
    met = [size for name, size in axes.items() if name in output or name[0] == "." or all(name in n for n in named)]
    return multiplied(["2", *met])


# ── Constants ────────────────────────────────────────────────────────────────────────────────────────────────────


def _constants_read(node: fx.Node, symbols: Mapping[str, str], constants: Mapping[fx.Node, str]) -> str:
    """Elements of floating-point constants that a node reads in one call."""
    operands = [
        operand
        for operand in node.all_input_nodes
        if _is_constant(operand, constants)
        and isinstance(operand.meta.get("val"), Tensor)
        and operand.meta["val"].is_floating_point()
    ]
    return added([_elements_read(operand, symbols) for operand in operands])


def _elements_read(node: fx.Node, symbols: Mapping[str, str]) -> str:
    """The smallest shape a constant has on its way: a slice reads less than its table, and a class token that is
    expanded to the batch is read once."""
    return min((multiplied(_shape(view, symbols)) for view in _views_behind(node)), key=_rough_size)


def _is_constant(node: fx.Node, constants: Mapping[fx.Node, str]) -> bool:
    """Whether a node holds a constant, or a view of one that is as long as the input asks for."""
    return any(view in constants for view in _views_behind(node))


def _views_behind(node: fx.Node) -> list[fx.Node]:
    """A node, and what it is a view of, step by step."""
    found = [node]
    while node.op == "call_function" and node.target in VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        found.append(node)
    return found


def _operand(node: fx.Node, position: int) -> fx.Node:
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    return operand


def _shape(node: fx.Node, symbols: Mapping[str, str]) -> list[str]:
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        value = next((part for part in value if isinstance(part, Tensor)), None)
    if value is None and node.op == "get_attr":
        value = node.graph.owning_module.get_parameter(str(node.target)) if node.graph.owning_module else None
    return [] if value is None else element_count(value.shape, symbols)


def _rough_size(expression: str) -> int:
    """Orders size expressions by their value at a middling shape; only ever used to compare two of them."""
    return Workload(batch=2, tokens=64).evaluate(expression)
