"""Exact counts: FLOPs, elementwise work, bytes and parameters of any site in any form, and of the rest of the graph.

FLOPs agree with `torch.utils.flop_counter` on the whole graph (attention counted in full; the fused CPU kernel
counts as zero there, so compare on the meta device or with the MATH backend).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from blora_compiler.values import (
    DTYPE_BYTES,
    ZERO_COST,
    AnyWorkload,
    Cost,
    Dense,
    Factored,
    Form,
    Operator,
    Removed,
    Site,
    Workload,
    mixed,
)


@dataclass(frozen=True)
class FlopsCostModel:
    """Counts operations and storage; knows no time, so `latency_ns` is None."""

    def cost(self, site: Site, form: Form, workload: Workload) -> Cost:
        """The cost of one site, all its calls together, its weight stored once.

        A tied dense weight is stored by the lookup that shares it, so it adds no bytes here; in any other form the
        tie is gone and the new weights are counted beside the lookup's. A first factor that several sites share is
        counted once, with the first of them.
        """
        shape = (site.out_features, site.in_features)
        reads_input, second = True, site.out_features
        if isinstance(form, Factored):
            reads_input, second = form.brings_first_factor(site.name), form.outputs_of_second(site)
            form = Factored(form.rank)
        return _projection_cost(
            shape, site.rows, site.tied, site.bias is not None, form, reads_input, second, workload
        )

    def operator_cost(self, operator: Operator, workload: Workload) -> Cost:
        """The cost of one operator that is no site."""
        width = DTYPE_BYTES[workload.dtype]
        return Cost(
            flops=workload.evaluate(operator.flops),
            elementwise=workload.evaluate(operator.elementwise),
            weight_bytes=width * operator.params,
            activation_bytes=width * workload.evaluate(operator.activations),
            params=operator.params,
        )


@lru_cache(maxsize=1 << 17)
def _projection_cost(
    shape: tuple[int, int],
    rows: tuple[str, ...],
    tied: bool,
    has_bias: bool,
    form: Form,
    reads_input: bool,
    second: int,
    workload: Workload,
) -> Cost:
    """The cost of a site by what it depends on. Cached: identical layers ask the same, for dozens of forms.

    Args:
        reads_input: whether the first of two factors counts here.
        second: how many outputs the second of two factors computes.
    """
    out, into = shape
    count = sum(workload.evaluate(expression) for expression in rows)
    width = DTYPE_BYTES[workload.dtype]
    match form:
        case Dense():
            multiplied, stored, moved = out * into, 0 if tied else out * into, into + out
        case Factored(rank):
            read = into if reads_input else 0
            multiplied = stored = rank * (read + second)
            moved = (into + rank if reads_input else 0) + rank + second
        case Removed():
            return Cost()
    bias = out if has_bias else 0
    return Cost(
        flops=2 * count * multiplied,
        elementwise=count * bias,
        weight_bytes=width * (stored + bias),
        activation_bytes=width * count * moved,
        params=stored + bias,
    )


def whole_graph_cost(
    sites: Iterable[Site],
    operators: Iterable[Operator],
    forms: Mapping[str, Form],
    workload: AnyWorkload,
    model: FlopsCostModel | None = None,
) -> Cost:
    """Everything in the graph: sites in the given forms (dense where `forms` has none) and all other operators, but
    for those of branches that are gone."""
    model = model or FlopsCostModel()
    total = ZERO_COST
    sites = tuple(sites)
    gone = tuple(f"{site.branch}." for site in sites if isinstance(forms.get(site.name), Removed))
    for site in sites:
        form = forms.get(site.name, Dense())
        total += mixed(partial(model.cost, site, form), workload)
    for operator in operators:
        if gone and operator.name.startswith(gone):
            continue
        total += mixed(partial(model.operator_cost, operator), workload)
    return total
