"""FactorSites: a product with a constant weight becomes two, or one with another weight.

    op(x, V, rest)      becomes      op(MatMul(x, A^T), B^T, rest)          for a site with factors W' = B A

where V is the weight as the op reads it, op is the node itself (its name, its outputs, its bias and every attribute
but transA and transB stay), and A^T (in, rank) and B^T (rank, out) are new initializers in the weight's own type.

1. A Gemm with transA reads its x through a `Transpose` first, as the MatMul has no such switch.
2. Calls of one weight read the same two initializers; sites that share their first factor, one A^T and one product.
3. A weight that nothing reads any more is dropped, with the `Transpose`, `Identity` or `Constant` it came through.

Given one matrix instead of two, the node gets that one and no MatMul: so a reference is made that computes with the
product B A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from blora_compiler.onnx_sites import OnnxSite, find_sites, reads_columns
from blora_compiler.values import Refusal

from .onnx_edit import add_constant, free_name


@dataclass(frozen=True)
class FactorSites:
    """Give sites of an ONNX graph new weights.

    Attributes:
        matrices: site name -> (A (rank, in), B (out, rank)), or (W (out, in),), applied from the left to the right.
            Sites that are not named stay as they are. Those that share their first factor have one array A.
    """

    matrices: Mapping[str, Sequence[np.ndarray]] = field(repr=False)

    def run(self, model: ir.Model) -> FactorResult:
        """Edit `model` in place."""
        sites = {site.name: site for site in find_sites(model).sites}
        refusals = [Refusal(name, "the graph has no such site") for name in self.matrices if name not in sites]
        changed = [name for name in sites if name in self.matrices]
        shared: dict[int, _FirstFactor] = {}
        stored = [_replace(model.graph, sites[name], self.matrices[name], shared) for name in changed]
        first_factors = tuple(dict.fromkeys(str(values[0].name) for values in stored if len(values) == 2))
        return FactorResult(model, bool(changed), tuple(refusals), tuple(changed), first_factors)


@dataclass(frozen=True)
class FactorResult:
    """What the pass did.

    Attributes:
        model: the model that was given, edited.
        modified: whether anything changed.
        refusals: names that are no sites of the graph.
        changed: names of the sites that have new weights.
        first_factors: names of the initializers that hold each A^T.
    """

    model: ir.Model
    modified: bool
    refusals: tuple[Refusal, ...]
    changed: tuple[str, ...]
    first_factors: tuple[str, ...] = ()


@dataclass(frozen=True)
class _FirstFactor:
    """An A^T in the graph, and the products with it: value that is multiplied -> what comes out."""

    value: ir.Value
    products: dict[ir.Value, ir.Value]


def _replace(
    graph: ir.Graph, site: OnnxSite, matrices: Sequence[np.ndarray], shared: dict[int, _FirstFactor]
) -> list[ir.Value]:
    """Returns the site's new initializers, in the order in which they multiply. `shared` is added to, by array."""
    dtype = site.matrix().dtype

    def store(matrix: np.ndarray, suffix: str) -> ir.Value:
        name = free_name(graph, f"{site.weight.name}.{suffix}")
        return add_constant(graph, name, np.ascontiguousarray(matrix.T).astype(dtype))

    if len(matrices) == 2 and id(matrices[0]) not in shared:
        shared[id(matrices[0])] = _FirstFactor(store(matrices[0], "A"), {})
    factor = shared[id(matrices[0])] if len(matrices) == 2 else None
    last = store(matrices[-1], "W" if factor is None else "B")
    stored = [last] if factor is None else [factor.value, last]
    for position, node in enumerate(site.calls):
        if factor is not None:
            _multiply_first(graph, node, factor, f"{site.weight.name}.A.{position}")
        old = node.inputs[1]
        assert old is not None
        node.replace_input_with(1, stored[-1])
        node.attributes.pop("transB", None)
        _drop_unread(graph, old)
    return stored


def _multiply_first(graph: ir.Graph, node: ir.Node, first: _FirstFactor, name: str) -> None:
    """Let `node` read x @ factor in place of x."""
    x, factor = node.inputs[0], first.value
    assert x is not None
    if x in first.products and not reads_columns(node):
        node.replace_input_with(0, first.products[x])
        return
    given = x
    if reads_columns(node):
        turned = ir.node("Transpose", [x], attributes={"perm": [1, 0]}, name=free_name(graph, f"{name}.transpose"))
        turned.outputs[0].name, turned.outputs[0].dtype = free_name(graph, f"{name}.transposed"), factor.dtype
        graph.insert_before(node, turned)
        node.attributes.pop("transA")
        x = turned.outputs[0]
    product = ir.node("MatMul", [x, factor], name=free_name(graph, f"{name}.MatMul"))
    hidden = product.outputs[0]
    hidden.name, hidden.dtype = free_name(graph, f"{name}.hidden"), factor.dtype
    if x.shape is not None and factor.shape is not None:
        hidden.shape = ir.Shape([*x.shape[:-1], factor.shape[1]])
    graph.insert_before(node, product)
    node.replace_input_with(0, hidden)
    if x is given:
        first.products[x] = hidden


def _drop_unread(graph: ir.Graph, value: ir.Value) -> None:
    """Remove a constant that nothing reads any more, and what it came through."""
    if value.uses() or value.is_graph_output():
        return
    if value.is_initializer():
        del graph.initializers[str(value.name)]
        return
    node = value.producer()
    if node is None or node.op_type not in ("Transpose", "Identity", "Constant"):
        return
    before = [source for source in node.inputs if source is not None]
    graph.remove(node, safe=True)
    for source in before:
        _drop_unread(graph, source)
