"""What the shipped graph runs: sites and operators as the kernels ONNX Runtime launches for them.

A traced graph is finer than the graph that ships. Lowering fuses it, and what counts for time is what is left:

1. The projections of a group (q/k/v, gate/up) read one input, so the exporter packs their first GEMMs into one,
   as wide as all of them together: a dense site brings its outputs, a factored one its rank. What comes out is split
   again, and each factored site has a second GEMM of its own. Sites that share their first factor bring it once; they
   read one input again, so their second GEMMs become one too, and its result is split.
2. In a graph that generates, prefill computes for the last position only what nothing else needs: the head, and all
   that lies behind the keys and values of the last attention. That attention is a step behind a cache of all others.
   Where a query is packed with its keys and values, their first GEMM has all rows, and what follows only the last.
3. Elementwise work in a row that belongs to one module (a norm, a rotary embedding) is one kernel.
4. Attention is one kernel, whatever the number of its heads; the cache holds the heads before they are repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from blora_compiler.values import Dense, Factored, Form, Operator, Removed, Site, Workload, can_pack

# Attention without a cache; with a cache in one kernel, which the exporter makes of prompts and of rotary models; and
# behind a cache as matrix products around a softmax, which is what steps of the others keep.
FULL, FUSED, UNFUSED = 0, 1, 2
# Pointwise kernels that take different times for the same elements: `add` stands for everything else.
FUNCTIONS = ("add", "rms_norm", "layer_norm", "gelu", "silu", "split")
# Kinds of work, as predictions and ONNX Runtime's profiles are summed up.
KINDS = ("sites", "head", "attention", "norm", "elementwise", "lookup", "experts", "convolution", "session")


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        op: `gemm`, `attention`, `pointwise` or `session` (what a call costs whatever the graph holds).
        kind: of work, one of `KINDS`.
        flops: multiply-adds counted twice.
        weights: elements of constant weights read.
        activations: elements of everything else read and written.
        function: what a pointwise kernel computes: one of `FUNCTIONS`.
        shape: of a GEMM (rows, inner, columns); of attention (batch, heads, kv heads, queries, keys, head size,
            and which of `FULL`, `FUSED`, `UNFUSED`).
    """

    op: str
    kind: str
    flops: int = 0
    weights: int = 0
    activations: int = 0
    function: str = ""
    shape: tuple[int, ...] = ()


def gemm(rows: int, inner: int, columns: int, kind: str) -> Kernel:
    """(rows x inner) times a constant (inner x columns)."""
    return Kernel(
        op="gemm",
        kind=kind,
        flops=2 * rows * inner * columns,
        weights=inner * columns,
        activations=rows * (inner + columns),
        shape=(rows, inner, columns),
    )


def pointwise(elements: int, kind: str, function: str = "add") -> Kernel:
    """Work that moves `elements` and computes little."""
    return Kernel(op="pointwise", kind=kind, activations=elements, function=function)


@dataclass(frozen=True)
class Shared:
    """A kernel, and how much of it each of several sites accounts for.

    Attributes:
        kernel: launched once.
        shares: site position -> share; they sum to 1.
    """

    kernel: Kernel
    shares: tuple[tuple[int, float], ...]


def rows_of(site: Site, workload: Workload, generates: bool) -> list[int]:
    """Rows of each of a site's GEMMs; in a graph that generates, one a sequence where only the last is needed."""
    last_only = generates and (site.kind == "head" or site.last_only)
    return [(workload.last_position if last_only else workload).evaluate(rows) for rows in site.rows]


def group_kernels(
    sites: Sequence[Site], forms: Sequence[Form], workload: Workload, generates: bool = False
) -> list[Shared]:
    """The kernels of sites that read the same input, one site alone among them."""
    kept = [position for position, form in enumerate(forms) if not isinstance(form, Removed)]
    if not kept:
        return []
    if len(kept) > 1 and not can_pack([sites[position] for position in kept]):
        return [
            replace(shared, shares=((position, 1.0),))
            for position in kept
            for shared in group_kernels([sites[position]], [forms[position]], workload, generates)
        ]
    kernels: list[Shared] = []
    first = sites[kept[0]]
    kind = "head" if first.kind == "head" else "sites"
    sharers = [position for position in kept if _sharers(forms[position])]
    widths = {position: first_width(sites[position], forms[position]) for position in kept}
    total = sum(widths.values())
    shares = tuple((position, width / (total or 1)) for position, width in widths.items())
    if sharers:
        shares = _by_outputs(sites, sharers, shares)
    rows_by_site = {position: rows_of(sites[position], workload, generates) for position in kept}
    for call in range(len(first.rows)):
        packed_rows = max(rows[call] for rows in rows_by_site.values())
        if total:
            kernels.append(Shared(gemm(packed_rows, first.in_features, total, kind), shares))
        if sum(width > 0 for width in widths.values()) > 1:
            kernels.append(Shared(pointwise(2 * packed_rows * total, kind, "split"), shares))
        if sharers:
            kernels += _shared_second_factors(sites, forms, sharers, packed_rows, kind)
        for position in kept:
            site, form, rows = sites[position], forms[position], rows_by_site[position][call]
            alone = ((position, 1.0),)
            if isinstance(form, Factored) and not form.sharers:
                kernels.append(Shared(gemm(rows, form.rank, form.outputs_of_second(site), kind), alone))
            if isinstance(form, Factored) and form.outputs_of_second(site) < site.out_features:
                kernels.append(Shared(pointwise(2 * rows * site.out_features, kind, "split"), alone))  # a copy too
            if site.bias is not None:
                kernels.append(Shared(pointwise(2 * rows * site.out_features, kind), alone))
    return kernels


def _sharers(form: Form) -> tuple[str, ...]:
    return form.sharers if isinstance(form, Factored) else ()


def _shared_second_factors(
    sites: Sequence[Site], forms: Sequence[Form], sharers: Sequence[int], rows: int, kind: str
) -> list[Shared]:
    """The one second GEMM of sites that share their first factor, and the split of what comes out."""
    form = forms[sharers[0]]
    assert isinstance(form, Factored)
    columns = {position: form.outputs_of_second(sites[position]) for position in sharers}
    outputs = sum(columns.values())
    shares = tuple((position, columns[position] / outputs) for position in sharers)
    second = Shared(gemm(rows, form.rank, outputs, kind), shares)
    return [second] if len(sharers) == 1 else [second, Shared(pointwise(2 * rows * outputs, kind, "split"), shares)]


def _by_outputs(
    sites: Sequence[Site], sharers: Sequence[int], shares: tuple[tuple[int, float], ...]
) -> tuple[tuple[int, float], ...]:
    """Shares of a first GEMM, what belongs to the shared factor divided between its sites by their outputs."""
    of_factor = sum(share for position, share in shares if position in sharers)
    outputs = sum(sites[position].out_features for position in sharers)
    return tuple(
        (position, of_factor * sites[position].out_features / outputs if position in sharers else share)
        for position, share in shares
    )


def first_width(site: Site, form: Form) -> int:
    """Columns that a site brings to the first GEMM of its group: its rank, or all its outputs where it is dense.

    Of sites that share their first factor, the first one brings it.
    """
    match form:
        case Factored(rank):
            return rank if form.brings_first_factor(site.name) else 0
        case Dense():
            return site.out_features
    raise AssertionError(f"{form} has no GEMM")


def operator_kernels(operator: Operator, workload: Workload, generates: bool = False) -> list[Kernel]:
    """The kernels of one operator that is no site."""
    if operator.kind == "attention":
        return _attention(operator, workload, generates)
    if generates and operator.last_only:
        workload = workload.last_position
    activations = workload.evaluate(operator.activations)
    match operator.kind:
        case "matmul" | "convolution" | "experts":
            weights = workload.evaluate(operator.weight_reads)
            # A product of two activations is attention written out; one with a weight that is no site is a router.
            kind = operator.kind if operator.kind != "matmul" else "experts" if weights else "attention"
            return [Kernel("gemm", kind, workload.evaluate(operator.flops), weights, activations)]
        case "lookup":
            return [pointwise(2 * activations, "lookup")]
        case "session":
            return [Kernel("session", "session")]
    if not activations:
        return []
    if _is_norm(operator):
        return [pointwise(activations, "norm", "layer_norm" if _operation(operator) == "layer_norm" else "rms_norm")]
    return [pointwise(activations, "elementwise", _function(operator))]


def _attention(operator: Operator, workload: Workload, generates: bool) -> list[Kernel]:
    """One kernel; for the last position of a prompt, behind copies of its other keys and values as a cache."""
    cut = generates and operator.last_only and workload.tokens > 1
    seen = workload.last_position if cut else workload
    shape: tuple[int, ...] = ()
    copies: list[Kernel] = []
    if operator.attention is not None:
        a = operator.attention
        batch, heads, kv_heads, queries, keys, size, value_size = map(
            seen.evaluate, (a.batch, a.heads, a.kv_heads, a.queries, a.keys, a.head_size, a.value_size)
        )
        which = FULL if not generates else FUSED if a.rotary or workload.phase == "prefill" else UNFUSED
        shape = (batch, heads, kv_heads, queries, keys, size, which)
        if cut:  # cut off the last one, and turned around: read and written twice
            copies = [pointwise(4 * batch * kv_heads * (keys - 1) * each, "attention") for each in (size, value_size)]
    flops, activations = seen.evaluate(operator.flops), seen.evaluate(operator.activations)
    return [*copies, Kernel("attention", "attention", flops, 0, activations, shape=shape)]


def _operation(operator: Operator) -> str:
    """The aten operation at the end of its name, without the number that tells repetitions apart."""
    return re.sub(r"_\d+$", "", operator.name.rpartition(".")[2])


def _function(operator: Operator) -> str:
    operation = _operation(operator)
    return operation if operation in ("gelu", "silu") else "add"


def _is_norm(operator: Operator) -> bool:
    return "norm" in operator.owner_type.lower() or "norm" in operator.owner.rpartition(".")[2].lower()


SESSION = Operator("session", "session")


def fused(operators: Iterable[Operator]) -> tuple[Operator, ...]:
    """The operators as they run: elementwise work in a row that one module owns is one, and a call costs something.

    A fused kernel reads what its first step reads and writes what its last one writes; the largest step stands for
    both. Work on scalars and shapes has no elements to speak of and stays as small as it is. A residual addition in
    front of a norm is part of it.
    """
    merged: list[Operator] = []
    for (owner, kind, _), run in groupby(operators, key=lambda o: (o.owner, o.kind, o.last_only)):
        members = list(run)
        if kind != "elementwise" or not owner:
            merged += members
            continue
        largest = max(members, key=lambda operator: _REFERENCE.evaluate(operator.activations))
        if _is_norm(largest) and merged and merged[-1].kind == "elementwise" and _operation(merged[-1]) == "add":
            merged.pop()
        merged.append(replace(largest, params=sum(operator.params for operator in members)))
    return (*merged, SESSION)


_REFERENCE = Workload(batch=2, tokens=64)
