"""A device profile and a calibration table made in code: round numbers, so that times can be worked out by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

from blora_compiler.cost_models.devices import Device
from blora_compiler.cost_models.kernels import FULL, FUNCTIONS, FUSED, UNFUSED
from blora_compiler.cost_models.measured import UNCORRECTED, Table

# 1 FLOP takes 1 ps, 1 byte 10 ps, a launch 1 us; every GEMM reaches the peak and nothing is cached.
PROFILE: dict[str, Any] = {
    "name": "made", "title": "Made in code", "provider": "cpu", "measured": False, "source": "these tests",
    "dtype": "float32", "peak_flops": {"float32": 1e12, "float16": 2e12}, "bandwidth": 1e11, "memory_bytes": 10**9,
    "launch_ns": 1000, "session_ns": 5000, "cache_bytes": 0, "cache_bandwidth": 1e12, "units": 1,
    "tiles": [[1, 1, 1.0]], "depth": 0, "align": 1, "misaligned": 0.5, "efficiency": 1.0,
    "attention_efficiency": 0.5,
}  # fmt: skip


def device(**changes: Any) -> Device:
    """`PROFILE` with some fields changed."""
    return Device(**{**PROFILE, **changes})


ROWS, INNER, COLUMNS = (1, 4, 16, 64), (16, 64, 256), (16, 64, 256)


def gemm_ns(rows: float, inner: float, columns: float) -> float:
    """A power law: what interpolation in the logarithms reproduces everywhere on the grid."""
    return 10 * rows**0.8 * inner**0.9 * columns**0.7


def attention_ns(shape: tuple[int, ...]) -> float:
    """Launches and FLOPs; each sort of attention takes longer than the one before."""
    batch, heads, _, queries, keys, size, which = shape
    return (1 + which) * (500 + 0.01 * 4 * batch * heads * queries * keys * size)


ATTENTION_SHAPES = [
    (batch, heads, kv_heads, queries, keys, size, which)
    for batch, (heads, kv_heads), (queries, keys), size, which in product(
        (1, 2), ((4, 2), (8, 8)), ((1, 32), (16, 16), (32, 64)), (8, 16), (FULL, FUSED, UNFUSED)
    )
]


def table(**changes: Any) -> Table:
    """A calibration in float32: GEMMs by a power law, pointwise work at 1 ns an element (splits at 3 ns)."""
    fields: dict[str, Any] = {
        "device": "made in code", "provider": "cpu", "threads": 1, "runtime": "1.0", "dtype": "float32",
        "rows": ROWS, "inner": INNER, "columns": COLUMNS,
        "gemm_ns": tuple(gemm_ns(*shape) for shape in product(ROWS, INNER, COLUMNS)),
        "cold_rows": (1.0, 64.0), "cold_bytes": (1e4, 1e6), "cold_ns_per_byte": (0.0, 0.5, 0.0, 0.1),
        "attention": tuple((shape, attention_ns(shape)) for shape in ATTENTION_SHAPES),
        "pointwise": {name: ((100.0, 200.0), (1000.0, 3000.0 if name == "split" else 1000.0)) for name in FUNCTIONS},
        "memory_bytes": 10**9,
        "corrections": UNCORRECTED,
    }  # fmt: skip
    return Table(**{**fields, **changes})
