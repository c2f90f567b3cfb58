"""Predictions of whole graphs: every kernel timed, the times summed up by site, by kind of work, by what binds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from blora_compiler.values import DTYPE_BYTES, AnyWorkload, Form, Operator, Removed, Site, Workload, site_groups
from blora_compiler.workloads import at_the_end

from .kernels import Kernel, fused
from .latency import LatencyCostModel, kernels_of, weight_bytes_read
from .roofline import Clock

LIMITS = ("compute", "bandwidth", "launch")


@dataclass
class SiteWork:
    """What one site's GEMMs amount to.

    Attributes:
        flops, bytes_moved, nanoseconds: of all of them, at the workload.
        by_limit: what binds -> nanoseconds.
    """

    flops: float = 0.0
    bytes_moved: float = 0.0
    nanoseconds: float = 0.0
    by_limit: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0.0))

    @property
    def binds(self) -> str:
        """What most of the time is bound by."""
        return max(self.by_limit, key=lambda limit: self.by_limit[limit])


@dataclass
class Prediction:
    """Sums over the kernels of one graph, filled kernel by kernel.

    Attributes:
        parts: (weight, workload, nanoseconds of one run of it).
        nanoseconds: of the whole workload.
        by_limit, by_kind: what binds, and kind of work -> nanoseconds.
        by_site: site or operator -> nanoseconds.
        work: site -> what its GEMMs amount to.
        running_bytes: key/value cache and widest kernel's activations, at the part that needs most.
    """

    parts: list[tuple[int, Workload, int]] = field(default_factory=list)
    nanoseconds: float = 0.0
    by_limit: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0.0))
    by_kind: dict[str, float] = field(default_factory=dict)
    by_site: dict[str, float] = field(default_factory=dict)
    work: dict[str, SiteWork] = field(default_factory=dict)
    running_bytes: int = 0

    @property
    def milliseconds(self) -> float:
        """Of the whole workload."""
        return 1e-6 * self.nanoseconds

    @property
    def site_milliseconds(self) -> float:
        """Of the projections, heads among them."""
        return 1e-6 * (self.by_kind.get("sites", 0.0) + self.by_kind.get("head", 0.0))

    @property
    def binds(self) -> dict[str, float]:
        """What binds -> share of the time; they sum to 1."""
        return {limit: time / self.nanoseconds for limit, time in self.by_limit.items()}

    def add(
        self, kernel: Kernel, shares: Iterable[tuple[str, float]], dtype: str, weight: int, time: int, limit: str
    ) -> None:
        """Count one kernel that takes `time` nanoseconds and runs `weight` times."""
        total = weight * time
        self.nanoseconds += total
        self.by_limit[limit] += total
        self.by_kind[kernel.kind] = self.by_kind.get(kernel.kind, 0.0) + total
        is_projection = kernel.op == "gemm" and kernel.kind in ("sites", "head")
        moved = weight * (kernel.weights + kernel.activations) * DTYPE_BYTES[dtype]
        for name, share in shares:
            self.by_site[name] = self.by_site.get(name, 0.0) + share * total
            if is_projection:
                work = self.work.setdefault(name, SiteWork())
                work.flops += share * weight * kernel.flops
                work.bytes_moved += share * moved
                work.nanoseconds += share * total
                work.by_limit[limit] += share * total


@dataclass(frozen=True)
class Predictor:
    """Predicts one model at one workload on one device, in any forms.

    Attributes:
        sites, operators: of the model, as traced.
        workload: or a mix.
        clock: of the device.
        generates: whether the model is lowered with a key/value cache.
    """

    sites: tuple[Site, ...]
    operators: tuple[Operator, ...]
    workload: AnyWorkload
    clock: Clock
    generates: bool

    def predict(self, forms: Mapping[str, Form]) -> Prediction:
        """The graph with sites in the given forms, dense where none is given."""
        prediction = Prediction()
        removed = {site.branch for site in self.sites if isinstance(forms.get(site.name), Removed)}
        gone = tuple(f"{branch}." for branch in removed)
        parts = zip(self.workload.parts, at_the_end(self.workload), self._around, strict=True)
        for (weight, part), at_end, around in parts:
            read = weight_bytes_read(self.sites, self._fused, forms, part)
            clock = self.clock.for_working_set(read)
            model = LatencyCostModel(clock, self.generates)
            total = widest = 0
            for kernel, shares in (*kernels_of(self._groups, (), forms, part, self.generates), *around):
                if gone and shares[0][0].startswith(gone):
                    continue
                time = model.kernel_time(kernel, part.dtype)
                prediction.add(kernel, shares, part.dtype, weight, time, clock.limit(kernel, part.dtype))
                total += time
                widest = max(widest, kernel.activations)
            prediction.parts.append((weight, part, total))
            running = DTYPE_BYTES[part.dtype] * (self._cache_elements(at_end) + widest)
            prediction.running_bytes = max(prediction.running_bytes, running)
        return prediction

    @cached_property
    def _groups(self) -> list[tuple[Site, ...]]:
        return site_groups(self.sites)

    @cached_property
    def _fused(self) -> tuple[Operator, ...]:
        return fused(self.operators)

    @cached_property
    def _around(self) -> list[list[tuple[Kernel, tuple[tuple[str, float], ...]]]]:
        """The kernels of everything that is no site, by part: the same whatever the forms."""
        return [kernels_of((), self._fused, {}, part, self.generates) for _, part in self.workload.parts]

    def _cache_elements(self, part: Workload) -> int:
        """Keys and values that all layers keep."""
        if not self.generates:
            return 0
        shapes = [operator.attention for operator in self.operators if operator.attention is not None]
        sizes = [(a.batch, a.kv_heads, a.keys, a.head_size, a.value_size) for a in shapes]
        evaluated = ([part.evaluate(size) for size in of_one] for of_one in sizes)
        return sum(batch * heads * keys * (key + value) for batch, heads, keys, key, value in evaluated)
