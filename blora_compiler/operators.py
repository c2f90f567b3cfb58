"""What a graph node costs, as data: shapes become size expressions, nodes become `Operator` values.

Only this file reads symbolic shapes. Formulas count as `torch.utils.flop_counter` does: a multiply-add is two
operations, attention is counted in full whether masked or not, elementwise work is no FLOP and has its own field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from .values import Operator

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

ATTENTION = aten.scaled_dot_product_attention.default
MATRIX_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.matmul.default, aten.linear.default, aten.addmm.default,
                   aten.baddbmm.default}  # fmt: skip
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
                aten.conv2d.padding, aten.convolution.default}  # fmt: skip


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


def describe_operator(node: fx.Node, symbols: Mapping[str, str]) -> Operator:
    """The operator a non-site node stands for.

    Args:
        node: a call_function node with tensor results.
        symbols: names of the graph's symbols, from `size_names`.
    """
    output = _shape(node, symbols)
    operands = [argument for argument in node.all_input_nodes if isinstance(argument.meta.get("val"), Tensor)]
    activations = [_shape(operand, symbols) for operand in operands if operand.op != "get_attr"]
    moved = added([multiplied(shape) for shape in (*activations, output)])

    if node.target is ATTENTION:
        return _attention(node, symbols)
    if node.target in MATRIX_PRODUCTS:
        first = _shape(_operand(node, 1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0), symbols)
        return Operator(node.name, "matmul", multiplied(["2", *output, first[-1]]), activations=moved)
    if node.target in CONVOLUTIONS:
        kernel = _shape(_operand(node, 1), symbols)  # (out channels, in channels / groups, *window)
        return Operator(node.name, "convolution", multiplied(["2", *output, *kernel[1:]]), activations=moved)
    if node.target is aten.embedding.default:
        count = multiplied(output)
        return Operator(node.name, "lookup", activations=count)
    # Reductions read more than they write, so the larger of the two is the work.
    sizes = [shape for shape in (*activations, output) if shape]
    work = max((multiplied(shape) for shape in sizes), key=_rough_size, default="1")
    return Operator(node.name, "elementwise", elementwise=work, activations=moved)


def _attention(node: fx.Node, symbols: Mapping[str, str]) -> Operator:
    """Scores and mixing, each 2 * batch * heads * queries * keys * size. Keys that grow with the query's tokens are
    those of a cache in decode: they count the context too."""
    query = _shape(_operand(node, 0), symbols)
    key = _shape(_operand(node, 1), symbols)
    value = _shape(_operand(node, 2), symbols)
    keys = "tokens + context" if key[-2] == query[-2] == "tokens" else key[-2]
    scores = multiplied([*query[:-1], keys])
    flops = added([multiplied(["2", scores, query[-1]]), multiplied(["2", scores, value[-1]])])
    moved = added(
        [multiplied(query), multiplied([*key[:-2], keys, key[-1]]), multiplied([*value[:-2], keys, value[-1]]),
         multiplied([*query[:-1], value[-1]])]
    )  # fmt: skip
    return Operator(node.name, "attention", flops, elementwise=scores, activations=moved)


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
    from .values import Workload

    return Workload(batch=2, tokens=64).evaluate(expression)
