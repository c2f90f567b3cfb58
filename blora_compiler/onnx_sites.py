"""Sites of an ONNX graph: the matrix products that have a constant 2-D weight, and a reason for every other one.

    op(x, W, ...)  with op in MatMul, Gemm, FusedMatMul, FusedGemm and com.microsoft's Attention (packed q/k/v)

W is an initializer or a `Constant`, also behind `Transpose` and `Identity`. A weight that several nodes read in the
same orientation is one site with several calls. Nothing here changes the graph.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from .passes.onnx_stamp_sites import SCOPES_KEY, SITES_KEY
from .values import Refusal, Site

_MICROSOFT = "com.microsoft"
# In all of them input 0 is x, input 1 is W, and W stands right of x.
_PRODUCTS = frozenset(
    {("", "MatMul"), ("", "Gemm"), (_MICROSOFT, "FusedMatMul"), (_MICROSOFT, "FusedGemm"), (_MICROSOFT, "Attention")}
)
_QUANTISED = frozenset(
    {
        "MatMulInteger", "QLinearMatMul", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat", "QAttention", "QGemm", "QLinearConv", "ConvInteger", "QMoE",
    }
)  # fmt: skip
_OTHER_PRODUCTS = frozenset(
    {
        "Conv", "ConvTranspose", "FusedConv", "NhwcConv", "Einsum", "LSTM", "GRU", "RNN", "MoE", "PackedAttention",
        "DecoderMaskedSelfAttention", "LongformerAttention", "GemmFloat8", "SparseToDenseMatMul",
    }
)  # fmt: skip
_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
# What may stand between an output head and the graph output it feeds.
_AFTER_HEAD = frozenset({"Add", "Cast", "Identity", "Reshape", "Slice", "Mul", "Div", "Tanh", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class OnnxSite:
    """One weight and the nodes that multiply by it.

    Attributes:
        name: for rules and tables: the scope or the path behind the weight's or the node's name.
        aliases: the weight's own name and those of its nodes; rules match these too.
        weight: the value that holds the matrix: an initializer, or the output of a `Constant`.
        transposed: what is stored is in x out.
        in_features, out_features: of W as y = W x.
        calls: the nodes, in graph order.
        dtype: of the weight: `float32`, `float16` or `bfloat16`.
        kind: `"head"` where a vocabulary-sized product feeds a graph output.
        tied: something that is no call reads the weight too (an embedding lookup).
        bias: name of a constant bias that the nodes add, or None.
    """

    name: str
    aliases: tuple[str, ...]
    weight: ir.Value = field(repr=False)
    transposed: bool
    in_features: int
    out_features: int
    calls: tuple[ir.Node, ...] = field(repr=False)
    dtype: str
    kind: Literal["projection", "head"] = "projection"
    tied: bool = False
    bias: str | None = None

    def matrix(self) -> np.ndarray:
        """W (out_features, in_features) in its own type."""
        stored = _tensor_of(self.weight).numpy()
        return stored.T if self.transposed else stored

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """What the calls multiply by W, one value a call."""
        return tuple(value for node in self.calls if (value := node.inputs[0]) is not None)

    def planned(self, rows: Sequence[int]) -> Site:
        """The site as planning knows it, with the rows of each call."""
        assert self.weight.name is not None
        return Site(
            name=self.name,
            weight=self.weight.name,
            in_features=self.in_features,
            out_features=self.out_features,
            rows=tuple(str(count) for count in rows),
            group=str(self.inputs[0].name),
            bias=self.bias,
            aliases=self.aliases,
            transposed=self.transposed,
            kind=self.kind,
            tied=self.tied,
            in_tree=False,
        )


@dataclass(frozen=True)
class OnnxSites:
    """All sites of a graph in graph order, their type, and what was left alone."""

    sites: tuple[OnnxSite, ...]
    refusals: tuple[Refusal, ...]
    dtype: str


def reads_columns(node: ir.Node) -> bool:
    """Whether x is stored (in, rows), as `Gemm` with transA reads it."""
    return bool(_integer(node, "transA"))


def find_sites(model: ir.Model) -> OnnxSites:
    """Every site of the main graph, and every other matrix product with the reason why it is none."""
    refusals: list[Refusal] = []
    calls: dict[tuple[str, bool], list[ir.Node]] = {}
    for position, node in enumerate(model.graph):
        reason = reason_to_skip(node)
        if reason is None and (str(_weight_of(node)[0].name), not _weight_of(node)[1]) in calls:
            reason = "its weight is multiplied transposed as well, by an earlier product, which is the site"
        if reason is None:
            weight, transposed = _weight_of(node)
            calls.setdefault((str(weight.name), transposed), []).append(node)
        elif reason:
            refusals.append(Refusal(node.name or f"{node.op_type} at {position}", reason))
    refusals += _hidden_products(model)
    found = _named(calls, _vocabularies(model))
    dtype = Counter(site.dtype for site in found).most_common(1)[0][0] if found else "float32"
    refusals += [
        Refusal(site.name, f"its weight is {site.dtype} in a {dtype} model; costs are counted in one type")
        for site in found
        if site.dtype != dtype
    ]
    return OnnxSites(tuple(site for site in found if site.dtype == dtype), tuple(refusals), dtype)


def reason_to_skip(node: ir.Node) -> str | None:
    """Why a node is no call of a site; None if it is one, and `""` if it is no matrix product at all."""
    if node.op_type in _QUANTISED:
        return f"{node.op_type} is quantised already"
    if node.op_type in _OTHER_PRODUCTS:
        return f"{node.op_type} is no plain product with one matrix"
    if (node.domain, node.op_type) not in _PRODUCTS:
        return ""
    if len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return f"{node.op_type} lacks an operand"
    found = _constant_behind(node.inputs[1])
    if isinstance(found, str):
        return found
    left_is_constant = not isinstance(_constant_behind(node.inputs[0]), str)
    if left_is_constant:
        return "both operands are constants; fold them before compiling"
    return _reason_about_weight(found[0]) or _reason_about_attributes(node)


def _reason_about_weight(value: ir.Value) -> str | None:
    tensor = _tensor_of(value)
    shape = tuple(tensor.shape)
    if len(shape) != 2:
        return f"its weight has shape {list(shape)}; only matrices are placed, no batches of them and no vectors"
    if 0 in shape:
        return f"its weight has shape {list(shape)} and no entries"
    if tensor.dtype not in _DTYPES:
        return f"its weight is {tensor.dtype.name.lower()}; only {', '.join(_DTYPES.values())} are placed"
    return None


def _reason_about_attributes(node: ir.Node) -> str | None:
    if node.op_type != "FusedMatMul":
        return None
    odd = [name for name in ("transA", "transBatchA", "transBatchB") if _integer(node, name)]
    return f"FusedMatMul with {' and '.join(odd)} moves axes of its input" if odd else None


def _hidden_products(model: ir.Model) -> Iterator[Refusal]:
    """Products in subgraphs and functions: their weights may be read once, often or never in a run."""
    top = {id(node) for node in model.graph}
    for node in model.graph.all_nodes():
        if id(node) not in top and reason_to_skip(node) != "":
            yield Refusal(node.name or node.op_type, "it is inside a subgraph (If, Loop or Scan)")
    for function in model.functions.values():
        for node in function.all_nodes():
            if reason_to_skip(node) != "":
                yield Refusal(node.name or node.op_type, f"it is inside the function {function.name}")


# ── Constants ────────────────────────────────────────────────────────────────────────────────────────────────────


def _constant_behind(value: ir.Value | None) -> tuple[ir.Value, bool] | str:
    """The constant behind transposes and whether it is transposed; or why there is none."""
    transposed = permuted = False
    while value is not None:
        if value.is_initializer():
            if value.is_graph_input():
                return "its weight is a graph input too, so a caller may replace it"
            if permuted:
                return "its weight is behind a Transpose that permutes other axes than two"
            return (value, transposed) if value.const_value is not None else "its weight has no data"
        node = value.producer()
        if node is None:
            return "it has no constant operand on its right"
        if node.op_type == "Constant":
            has_tensor = "value" in node.attributes and not permuted
            return (value, transposed) if has_tensor else "its weight is a Constant that is no tensor"
        if node.op_type == "Transpose":
            permutation = node.attributes.get("perm")
            permuted |= permutation is not None and list(permutation.value) != [1, 0]
            transposed = not transposed
        elif node.op_type != "Identity":
            return _why_computed(node)
        value = node.inputs[0]
    return "its weight is left out"


def _why_computed(node: ir.Node) -> str:
    constant = all(v is None or v.is_initializer() or _is_constant_node(v.producer()) for v in node.inputs)
    if constant and node.op_type.startswith("DequantizeLinear"):
        return "its weight is quantised (DequantizeLinear)"
    if constant and node.inputs:
        return f"its weight is computed by {node.op_type}; fold constants before compiling"
    return "it has no constant operand on its right"


def _is_constant_node(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Constant"


def _weight_of(node: ir.Node) -> tuple[ir.Value, bool]:
    """The stored matrix behind a call, and whether it is stored (in, out)."""
    found = _constant_behind(node.inputs[1])
    assert not isinstance(found, str)
    value, behind_transpose = found
    # op computes x @ V; W is V transposed, so an untouched V is the transposed storage.
    return value, behind_transpose == bool(_integer(node, "transB"))


def _tensor_of(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    assert node is not None
    return node.attributes["value"].as_tensor()


def _integer(node: ir.Node, name: str) -> int:
    return node.attributes.get_int(name, 0) or 0


# ── From nodes to sites ──────────────────────────────────────────────────────────────────────────────────────────


def _named(calls: Mapping[tuple[str, bool], list[ir.Node]], vocabularies: set[int]) -> list[OnnxSite]:
    sites: list[OnnxSite] = []
    taken: set[str] = set()
    for (_, transposed), nodes in calls.items():
        weight, _ = _weight_of(nodes[0])
        shape = tuple(int(size) for size in _tensor_of(weight).shape)
        into, out = shape if transposed else shape[::-1]
        name = _free_name(_name_of(nodes[0], weight), taken)
        taken.add(name)
        others = [weight.name, *(part for node in nodes for part in (node.name, node.outputs[0].name))]
        is_head = out in vocabularies and any(_feeds_output(node.outputs[0]) for node in nodes)
        sites.append(
            OnnxSite(
                name=name,
                aliases=tuple(dict.fromkeys(other for other in others if other and other != name)),
                weight=weight,
                transposed=transposed,
                in_features=into,
                out_features=out,
                calls=tuple(nodes),
                dtype=_DTYPES[_tensor_of(weight).dtype],
                kind="head" if is_head else "projection",
                tied=_is_read_elsewhere(weight, nodes),
                bias=_bias_of(nodes[0]),
            )
        )
    return sites


def _name_of(node: ir.Node, weight: ir.Value) -> str:
    """The name that people know the weight by: its module's, as far as the exporter left a trace of it."""
    stamp = node.metadata_props.get(SITES_KEY, "")
    if stamp and " " not in stamp:
        return stamp
    if scope := _scope_of(node):
        return scope
    stored, called = weight.name or "", node.name or ""
    if "." in stored and "::" not in stored:
        return stored.removesuffix(".weight")
    if "/" in called:
        parts = [part for part in called.split("/") if part]
        if len(parts) > 1 and parts[-1].split("_")[0] == node.op_type:
            parts.pop()
        return ".".join(parts)
    return stored or called


def _scope_of(node: ir.Node) -> str:
    """The module that torch.onnx recorded for the node; its last scope is the operation itself."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES_KEY, "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""


def _free_name(name: str, taken: set[str]) -> str:
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _bias_of(node: ir.Node) -> str | None:
    bias = node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None
    return bias.name if bias is not None and bias.is_initializer() else None


def _is_read_elsewhere(weight: ir.Value, calls: Sequence[ir.Node]) -> bool:
    """Whether anything but the calls reads the weight, directly or behind a transpose."""
    ours = {id(node) for node in calls}
    waiting = [weight]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return True
        for use in value.uses():
            if use.node.op_type in ("Transpose", "Identity"):
                waiting.append(use.node.outputs[0])
            elif id(use.node) not in ours:
                return True
    return False


def _vocabularies(model: ir.Model) -> set[int]:
    """How many rows the lookup tables of the graph have."""
    tables: list[ir.Value | None] = []
    for node in model.graph:
        if node.op_type == "Gather" and _integer(node, "axis") == 0:
            tables.append(node.inputs[0])
        elif node.op_type == "EmbedLayerNormalization":
            tables.append(node.inputs[2])
    shapes = [
        tuple(_tensor_of(found[0]).shape)
        for table in tables
        if table is not None and not isinstance(found := _constant_behind(table), str)
    ]
    return {int(shape[0]) for shape in shapes if len(shape) == 2}


def _feeds_output(value: ir.Value, depth: int = 8) -> bool:
    """Whether a value reaches a graph output with nothing but small change in between."""
    if value.is_graph_output():
        return True
    if depth == 0:
        return False
    after = [use.node for use in value.uses() if use.node.op_type in _AFTER_HEAD]
    return any(_feeds_output(output, depth - 1) for node in after for output in node.outputs)
