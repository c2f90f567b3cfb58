"""Latency: the kernels of sites and operators, each timed by a clock; counts come from the exact model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import accumulate, pairwise

import numpy as np

from blora_compiler.values import DTYPE_BYTES, Cost, Dense, Factored, Form, Operator, Site, Workload, site_groups

from .flops import FlopsCostModel
from .kernels import (
    Kernel,
    Shared,
    first_width,
    gemm,
    group_kernels,
    operator_kernels,
    pointwise,
    rows_of,
)
from .roofline import Clock, Limit

_COUNTS = FlopsCostModel()


@dataclass(frozen=True)
class LatencyCostModel:
    """Exact counts, and nanoseconds from a clock.

    Attributes:
        clock: times one kernel.
        generates: whether the graph is lowered with a key/value cache; see `kernels`.
    """

    clock: Clock
    generates: bool = False

    def groups(self, sites: Sequence[Site]) -> list[tuple[Site, ...]]:
        """The sites in order, those together whose first GEMMs become one."""
        return site_groups(sites)

    def cost(self, site: Site, form: Form, workload: Workload) -> Cost:
        """One site on its own."""
        return self.group_costs((site,), (form,), workload)[0]

    def group_costs(self, sites: Sequence[Site], forms: Sequence[Form], workload: Workload) -> tuple[Cost, ...]:
        """Sites that read the same input, together: one cost a site. A shared kernel is charged by columns."""
        times = [0] * len(sites)
        for shared in group_kernels(sites, forms, workload, self.generates):
            nanoseconds = self.kernel_time(shared.kernel, workload.dtype)
            ends = accumulate((share for _, share in shared.shares), initial=0.0)
            cuts = [round(nanoseconds * end) for end in ends]
            for (position, _), (low, high) in zip(shared.shares, pairwise(cuts), strict=True):
                times[position] += high - low
        return tuple(
            replace(_COUNTS.cost(site, form, workload), latency_ns=time)
            for site, form, time in zip(sites, forms, times, strict=True)
        )

    def operator_cost(self, operator: Operator, workload: Workload) -> Cost:
        """One operator that is no site."""
        time = sum(self.kernel_time(k, workload.dtype) for k in operator_kernels(operator, workload, self.generates))
        return replace(_COUNTS.operator_cost(operator, workload), latency_ns=time)

    def combination_times(
        self, sites: Sequence[Site], forms: Sequence[Sequence[Form]], workload: Workload
    ) -> np.ndarray:
        """Nanoseconds of every combination of forms of sites that pack: (forms of site 0, forms of site 1, ...).

        Equal to the sums of `group_costs`, which would take one call a combination. No form is `Removed`.
        """
        first = sites[0]
        of_sites = list(zip(sites, forms, strict=True))
        alone = [np.array([self._alone(site, form, workload) for form in options]) for site, options in of_sites]
        widths = [np.array([first_width(site, form) for form in options]) for site, options in of_sites]
        total_width = reduce(np.add.outer, widths)
        distinct, position = np.unique(total_width, return_inverse=True)
        rows = max(rows for site in sites for rows in rows_of(site, workload, self.generates))
        packed = [
            self.kernel_time(gemm(rows, first.in_features, int(width), "sites"), workload.dtype)
            + self.kernel_time(pointwise(2 * rows * int(width), "sites", "split"), workload.dtype)
            for width in distinct
        ]
        return reduce(np.add.outer, alone) + np.array(packed, dtype=np.int64)[position].reshape(total_width.shape)

    def kernel_time(self, kernel: Kernel, dtype: str) -> int:
        """Nanoseconds of one launch of a kernel."""
        return _timed(self.clock, kernel, dtype)  # type: ignore[arg-type]  # clocks hash by identity

    def _alone(self, site: Site, form: Form, workload: Workload) -> int:
        """Nanoseconds of what a site adds to a packed first GEMM."""
        kernels = group_kernels((site,), (form,), workload, self.generates)[1:]
        return sum(self.kernel_time(shared.kernel, workload.dtype) for shared in kernels)


@dataclass(frozen=True, eq=False)
class ScaledClock:
    """A clock whose times are all multiplied: what a device was measured to need over what was predicted.

    Attributes:
        clock: as it was.
        factor: above 1 where the device is slower than the clock says.
    """

    clock: Clock
    factor: float = 1.0

    def time_ns(self, kernel: Kernel, dtype: str) -> int:
        """See `Clock`."""
        return max(1, round(self.factor * self.clock.time_ns(kernel, dtype)))

    def limit(self, kernel: Kernel, dtype: str) -> Limit:
        """See `Clock`."""
        return self.clock.limit(kernel, dtype)

    def for_working_set(self, weight_bytes: int) -> ScaledClock:
        """See `Clock`."""
        return ScaledClock(self.clock.for_working_set(weight_bytes), self.factor)


@lru_cache(maxsize=1 << 18)
def _timed(clock: Clock, kernel: Kernel, dtype: str) -> int:
    """Cached: identical layers ask for the same kernels, forms by the dozen."""
    return clock.time_ns(kernel, dtype)


def kernels_of(
    groups: Sequence[Sequence[Site]],
    operators: Sequence[Operator],
    forms: Mapping[str, Form],
    workload: Workload,
    generates: bool,
) -> list[tuple[Kernel, tuple[tuple[str, float], ...]]]:
    """Every kernel of a graph with sites in the given forms (dense where none is given), and whose it is.

    Returns:
        (kernel, ((site or operator name, share), ...)) pairs.
    """
    found: list[tuple[Kernel, tuple[tuple[str, float], ...]]] = []
    for sites in groups:
        shared: Sequence[Shared] = group_kernels(
            sites, [forms.get(site.name, Dense()) for site in sites], workload, generates
        )
        found += [(s.kernel, tuple((sites[p].name, share) for p, share in s.shares)) for s in shared]
    for operator in operators:
        found += [(k, ((operator.name, 1.0),)) for k in operator_kernels(operator, workload, generates)]
    return found


def weight_bytes_read(
    sites: Iterable[Site], operators: Iterable[Operator], forms: Mapping[str, Form], workload: Workload
) -> int:
    """Bytes of weights that one pass of a model reads."""
    elements = sum(workload.evaluate(operator.weight_reads) for operator in operators)
    for site in sites:
        match forms.get(site.name, Dense()):
            case Dense():
                elements += site.weight_count
            case Factored(rank) as form:
                read = site.in_features if form.brings_first_factor(site.name) else 0
                elements += rank * (read + form.outputs_of_second(site))
    return elements * DTYPE_BYTES[workload.dtype]
