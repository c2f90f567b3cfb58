"""Roofline: a kernel takes as long as its arithmetic or its bytes, whichever is longer, and its launch.

    time = launch + max(flops / (peak x efficiency), weights / weight bandwidth + activations / bandwidth)

GEMMs rarely reach the peak. Their efficiency is a product of what can be known without running them:

- quantisation: the output is cut into tiles and the tiles into waves over the device's units; a last tile or wave
  that is not full costs as much as a full one. Of the device's tile sizes the best one counts.
- depth: a tile's inner loop has a start and an end, worth `depth` steps of it, so short inner sizes pay for them.
- alignment: sizes that are no multiple of what the vector or tensor units load at once.

Bare ceilings are within 22 to 28 % of a kernel's time (KernelSight-LM, arXiv 2606.28565); this is for devices that
are not at hand, and the baseline that a measured table has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, Protocol

from blora_compiler.values import DTYPE_BYTES

from .devices import Device
from .kernels import Kernel

Limit = Literal["compute", "bandwidth", "launch"]
# A tile whose inner loop would be shorter is not split further among idle units.
_LEAST_DEPTH = 256


class Clock(Protocol):
    """Says how long a kernel takes on one device."""

    def time_ns(self, kernel: Kernel, dtype: str) -> int:
        """Nanoseconds of one launch, the launch itself included."""
        ...

    def limit(self, kernel: Kernel, dtype: str) -> Limit:
        """What that time is mostly made of."""
        ...

    def for_working_set(self, weight_bytes: int) -> Clock:
        """The same clock for a model that reads so many bytes of weights in one pass: few stay in the caches."""
        ...


@dataclass(frozen=True, eq=False)  # compared by identity: prices are cached by clock
class RooflineClock:
    """Times from a device profile alone.

    Attributes:
        device: the profile.
        working_set: bytes of weights that one pass of the model reads; 0 when unknown, and then nothing is cached.
        bare: without efficiencies and launches: the textbook roofline, kept for comparison.
    """

    device: Device
    working_set: int = 0
    bare: bool = False

    def time_ns(self, kernel: Kernel, dtype: str) -> int:
        """See `Clock`."""
        launch, compute, bandwidth = self.parts_ns(kernel, dtype)
        return max(1, round(launch + max(compute, bandwidth)))

    def limit(self, kernel: Kernel, dtype: str) -> Limit:
        """See `Clock`."""
        launch, compute, bandwidth = self.parts_ns(kernel, dtype)
        if launch >= max(compute, bandwidth):
            return "launch"
        return "compute" if compute >= bandwidth else "bandwidth"

    def for_working_set(self, weight_bytes: int) -> RooflineClock:
        """See `Clock`."""
        return replace(self, working_set=weight_bytes)

    def parts_ns(self, kernel: Kernel, dtype: str) -> tuple[float, float, float]:
        """Nanoseconds of launch, of arithmetic and of moving bytes."""
        device, width = self.device, DTYPE_BYTES[dtype]
        if kernel.op == "session":
            return (0.0 if self.bare else device.session_ns), 0.0, 0.0
        fits = 0 < self.working_set <= device.cache_bytes
        weight_bandwidth = device.cache_bandwidth if fits and not self.bare else device.bandwidth
        moved = kernel.weights * width / weight_bandwidth + kernel.activations * width / device.bandwidth
        efficiency = 1.0 if self.bare else self._efficiency(kernel)
        compute = kernel.flops / (device.peak(dtype) * efficiency)
        return (0.0 if self.bare else device.launch_ns), 1e9 * compute, 1e9 * moved

    def _efficiency(self, kernel: Kernel) -> float:
        """Share of the peak that the kernel's arithmetic can reach."""
        device = self.device
        if kernel.op != "gemm" or len(kernel.shape) != 3:
            return device.attention_efficiency if kernel.op == "attention" else device.efficiency
        _, inner, columns = kernel.shape
        best = max(_quantisation(kernel.shape, tile, device.units) * tile[2] for tile in device.tiles)
        depth = inner / (inner + device.depth)
        aligned = all(size % device.align == 0 for size in (inner, columns))
        return device.efficiency * best * depth * (1.0 if aligned else device.misaligned)


def _quantisation(shape: tuple[int, ...], tile: tuple[int, int, float], units: int) -> float:
    """Share of the work in full tiles and waves that is asked for. Few tiles are cut along the inner size too."""
    rows, inner, columns = shape
    down, across = ceil(rows / tile[0]), ceil(columns / tile[1])
    filled = rows * columns / (down * tile[0] * across * tile[1])
    pieces = down * across * max(1, min(units // (down * across), inner // _LEAST_DEPTH))
    return filled * pieces / (ceil(pieces / units) * units)
