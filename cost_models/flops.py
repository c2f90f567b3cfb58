"""Exact counts: FLOPs, elementwise work, bytes and parameters of any site in any form, and of the rest of the graph.

FLOPs agree with `torch.utils.flop_counter` on the whole graph (attention counted in full; the fused CPU kernel
counts as zero there, so compare on the meta device or with the MATH backend).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blora_compiler.values import (
    DTYPE_BYTES,
    ZERO_COST,
    Cost,
    Dense,
    Factored,
    Form,
    Operator,
    Removed,
    Site,
    Workload,
)


@dataclass(frozen=True)
class FlopsCostModel:
    """Counts operations and storage; knows no time, so `latency_ns` is None."""

    def cost(self, site: Site, form: Form, workload: Workload) -> Cost:
        """The cost of one site, all its calls together, its weight stored once.

        A tied dense weight is stored by the lookup that shares it, so it adds no bytes here; in any other form the
        tie is gone and the new weights are counted beside the lookup's.
        """
        rows = sum(workload.evaluate(expression) for expression in site.rows)
        out, into = site.out_features, site.in_features
        width = DTYPE_BYTES[workload.dtype]
        match form:
            case Dense():
                multiplied, stored, moved = out * into, 0 if site.tied else out * into, into + out
            case Factored(rank):
                multiplied, stored, moved = rank * (into + out), rank * (into + out), into + 2 * rank + out
            case Removed():
                return Cost()
        bias = out if site.bias is not None else 0
        return Cost(
            flops=2 * rows * multiplied,
            elementwise=rows * bias,
            weight_bytes=width * (stored + bias),
            activation_bytes=width * rows * moved,
            params=stored + bias,
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


def whole_graph_cost(
    sites: Iterable[Site],
    operators: Iterable[Operator],
    forms: Mapping[str, Form],
    workload: Workload,
    model: FlopsCostModel | None = None,
) -> Cost:
    """Everything in the graph: sites in the given forms (dense where `forms` has none) and all other operators."""
    model = model or FlopsCostModel()
    total = sum((model.cost(site, forms.get(site.name, Dense()), workload) for site in sites), ZERO_COST)
    return sum((model.operator_cost(operator, workload) for operator in operators), total)
