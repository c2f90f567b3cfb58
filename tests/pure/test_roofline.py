"""Times from a profile alone, worked out by hand: 1 ps a FLOP, 10 ps a byte, 1 us a launch."""

from __future__ import annotations

import pytest
from blora_compiler.cost_models.devices import load_device
from blora_compiler.cost_models.kernels import Kernel, gemm, pointwise
from blora_compiler.cost_models.roofline import RooflineClock

from blora_compiler.errors import BadInput
from tests.made_devices import device

ATTENTION = Kernel("attention", "attention", flops=10**7, activations=100)
SESSION = Kernel("session", "session")

# kernel, dtype, ns, what binds, ns of the textbook's roofline
BY_HAND = [
    # 12e6 FLOP take 12,000 ns, 60,000 weights and 50,000 activations 4,400 ns
    (gemm(100, 200, 300, "sites"), "float32", 1000 + 12_000, "compute", 12_000),
    (gemm(100, 200, 300, "sites"), "float16", 1000 + 6_000, "compute", 6_000),
    # 2e6 FLOP take 2,000 ns, 1,000,000 weights and 2,000 activations 40,080 ns
    (gemm(1, 1000, 1000, "sites"), "float32", 1000 + 40_080, "bandwidth", 40_080),
    (gemm(1, 1000, 1000, "sites"), "float16", 1000 + 20_040, "bandwidth", 20_040),
    # 100 weights and 20 activations: 4.8 ns
    (gemm(1, 10, 10, "sites"), "float32", 1000 + 5, "launch", 5),
    (ATTENTION, "float32", 1000 + 20_000, "compute", 10_000),  # half of the peak
    (pointwise(1000, "norm"), "float32", 1000 + 40, "launch", 40),
    (pointwise(10**6, "norm"), "float32", 1000 + 40_000, "bandwidth", 40_000),
    (Kernel("gemm", "experts", flops=10**7), "float32", 1000 + 10_000, "compute", 10_000),  # no shape, no loss
    (SESSION, "float32", 5000, "launch", 1),
]


@pytest.mark.parametrize(("kernel", "dtype", "nanoseconds", "limit", "bare"), BY_HAND)
def test_times_by_hand(kernel, dtype, nanoseconds, limit, bare):
    clock = RooflineClock(device())
    assert clock.time_ns(kernel, dtype) == nanoseconds
    assert clock.limit(kernel, dtype) == limit
    textbook = RooflineClock(device(), bare=True)
    assert textbook.time_ns(kernel, dtype) == bare
    if kernel.op != "session":
        assert textbook.limit(kernel, dtype) != "launch"


def test_a_dtype_the_device_lacks_is_refused():
    with pytest.raises(BadInput, match="device 'made' has no bfloat16 arithmetic"):
        RooflineClock(device()).time_ns(gemm(1, 1, 1, "sites"), "bfloat16")


# ── Efficiency ───────────────────────────────────────────────────────────────────────────────────────────────────


def compute_ns(kernel, bare=False, **changes) -> float:
    return RooflineClock(device(**changes), bare=bare).parts_ns(kernel, "float32")[1]


@pytest.mark.parametrize("shape", [(128, 128, 60), (128, 60, 128)], ids=["columns", "inner"])
def test_a_misaligned_rank_costs_more_than_a_larger_aligned_one(shape):
    aligned = tuple(64 if size == 60 else size for size in shape)
    at_60, at_64 = (compute_ns(gemm(*one, "sites"), align=8) for one in (shape, aligned))
    assert at_60 == pytest.approx(2e-3 * 128 * 128 * 60 / 0.5)
    assert at_64 == pytest.approx(2e-3 * 128 * 128 * 64)
    assert at_60 > at_64


def test_rows_need_no_alignment():
    assert compute_ns(gemm(13, 64, 64, "sites"), align=8) == pytest.approx(2e-3 * 13 * 64 * 64)


def test_a_short_inner_size_pays_for_its_tiles_start_and_end():
    assert compute_ns(gemm(1000, 50, 50, "sites"), depth=50) == pytest.approx(2 * 5000)
    assert compute_ns(gemm(1000, 950, 50, "sites"), depth=50) == pytest.approx(95_000 / 0.95)


BIG, FLAT = (64, 64, 1.0), (16, 64, 0.8)
QUANTISED = [
    # 65 rows of 128 in 2 tiles; 2 tiles on 4 units
    ((65, 64, 64), [BIG], 65 / 128 * 2 / 4),
    # 512 steps are two halves: 4 pieces on 4 units
    ((65, 512, 64), [BIG], 65 / 128),
    # 5 tiles are two waves of 4
    ((64, 64, 320), [BIG], 5 / 8),
    # 5 tiles of 512 steps are not split: no unit is left over in a first wave
    ((64, 512, 320), [BIG], 5 / 8),
    # a quarter of one tile, on one unit of 4
    ((16, 64, 64), [BIG], 1 / 4 / 4),
    # the flat tile is full
    ((16, 64, 64), [BIG, FLAT], 0.8 / 4),
    # the big one is better at what fills it
    ((256, 64, 64), [BIG, FLAT], 1.0),
]


@pytest.mark.parametrize(("shape", "tiles", "efficiency"), QUANTISED)
def test_tiles_and_waves_that_are_not_full_cost_as_if_they_were(shape, tiles, efficiency):
    kernel = gemm(*shape, "sites")
    assert compute_ns(kernel, tiles=tiles, units=4) == pytest.approx(1e-3 * kernel.flops / efficiency)
    assert compute_ns(kernel, tiles=tiles, units=4, efficiency=0.5) == pytest.approx(2e-3 * kernel.flops / efficiency)
    assert compute_ns(kernel, bare=True, tiles=tiles, units=4) == pytest.approx(1e-3 * kernel.flops)


@pytest.mark.parametrize("name", ["h200", "t4", "cpu-amx"])
def test_a_skinny_gemm_reaches_less_of_the_peak_than_a_square_one(name):
    profile = load_device(name)
    clock = RooflineClock(profile)

    def reached(columns: int) -> float:
        kernel = gemm(2048, 4096, columns, "sites")
        launch, compute, _ = clock.parts_ns(kernel, profile.dtype)
        assert launch == profile.launch_ns
        return 1e9 * kernel.flops / compute / profile.peak(profile.dtype)

    assert reached(4096) <= profile.efficiency
    assert reached(4096) > 0.8 * profile.efficiency
    assert reached(8) < 0.5 * reached(4096)
    assert reached(60) < 0.95 * reached(64)


# ── Caches ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("working_set", "nanoseconds"),
    [(10**6, 1000 + 4_000 + 80), (10**6 + 1, 1000 + 40_080), (0, 1000 + 40_080)],
    ids=["fits", "does not fit", "unknown"],
)
def test_weights_that_stay_in_the_cache_are_read_at_its_speed(working_set, nanoseconds):
    clock = RooflineClock(device(cache_bytes=10**6)).for_working_set(working_set)
    kernel = gemm(1, 1000, 1000, "sites")
    assert clock.time_ns(kernel, "float32") == nanoseconds
    assert clock.time_ns(pointwise(10**6, "norm"), "float32") == 41_000, "activations come from memory"
    assert RooflineClock(clock.device, working_set, bare=True).time_ns(kernel, "float32") == 40_080


def test_a_time_is_at_least_a_nanosecond():
    clock = RooflineClock(device(launch_ns=0))
    assert clock.time_ns(pointwise(1, "norm"), "float32") == 1
    assert clock.parts_ns(pointwise(1, "norm"), "float32")[2] == pytest.approx(0.04)
