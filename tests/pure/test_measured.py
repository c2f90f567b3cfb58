"""Times from a calibration table: exact where it was swept, sensible between, refused where it is damaged."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from itertools import product
from math import exp, log, prod, sqrt

import numpy as np
import pytest
from blora_compiler.cost_models.kernels import FULL, FUNCTIONS, FUSED, UNFUSED, Kernel, gemm, pointwise
from blora_compiler.cost_models.measured import (
    FEATURES,
    UNCORRECTED,
    MeasuredClock,
    Table,
    attention_in_parts,
    carried_on,
    device_of,
    fit_corrections,
    read_table,
    steps_between,
    with_warm_weights,
)
from hypothesis import given
from hypothesis import strategies as st

from blora_compiler.errors import BadInput
from tests.made_devices import ATTENTION_SHAPES, COLUMNS, INNER, ROWS, attention_ns, gemm_ns, table

AXES = (ROWS, INNER, COLUMNS)
GRID = list(product(*AXES))
SESSION = Kernel("session", "session")


def parts_of(kernel: Kernel, of: Table | None = None, working_set: int = 10**4) -> dict[str, float]:
    """A kernel's time in parts, while all weights stay in the cache."""
    return MeasuredClock(of or table(), working_set).features(kernel, "float32")


def gemm_part(*shape: int, of: Table | None = None) -> float:
    return parts_of(gemm(*shape, "sites"), of)["gemm"]


# ── GEMMs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_points_of_the_grid_are_exact():
    draw = random.Random(7)
    # Any times that no larger shape undercuts.
    times = {shape: draw.uniform(0.9, 1) * 4 ** sum(axis.index(size) for axis, size in zip(AXES, shape, strict=True))
             for shape in GRID}  # fmt: skip
    times = {shape: 1000 * time for shape, time in times.items()}
    swept = table(gemm_ns=tuple(times.values()))
    for shape, nanoseconds in times.items():
        assert gemm_part(*shape, of=swept) == pytest.approx(nanoseconds, rel=1e-12)
    clock = MeasuredClock(swept, working_set=10**4)
    assert clock.time_ns(gemm(4, 64, 256, "sites"), "float32") == round(times[4, 64, 256])


@given(st.integers(1, 64), st.integers(16, 256), st.integers(16, 256))
def test_a_power_law_is_reproduced_between_the_points(rows, inner, columns):
    assert gemm_part(rows, inner, columns) == pytest.approx(gemm_ns(rows, inner, columns), rel=1e-9)


def test_a_shape_takes_no_longer_than_a_larger_one():
    """Other work on the machine only ever adds time, so a point above a larger one was disturbed."""
    times = {shape: gemm_ns(*shape) for shape in GRID}
    times[4, 64, 64] = 2 * gemm_ns(64, 256, 256)
    swept = table(gemm_ns=tuple(times.values()))
    assert gemm_part(4, 64, 64, of=swept) == pytest.approx(min(
        gemm_ns(16, 64, 64), gemm_ns(4, 256, 64), gemm_ns(4, 64, 256)
    ))  # fmt: skip
    for shape in GRID:
        if shape != (4, 64, 64):
            assert gemm_part(*shape, of=swept) == pytest.approx(gemm_ns(*shape), rel=1e-12)


def test_half_way_is_the_geometric_mean():
    times = [1000.0] * len(GRID)
    times[GRID.index((64, 256, 256))] = 9000.0
    swept = table(gemm_ns=tuple(times))
    assert gemm_part(32, 256, 256, of=swept) == pytest.approx(3000)
    assert gemm_part(32, 128, 256, of=swept) == pytest.approx(sqrt(3) * 1000)


FILLED = [
    ({(64, 256, 256)}, (64, 256, 256), 4 * gemm_ns(16, 256, 256)),
    ({(64, 256, 256), (16, 256, 256)}, (64, 256, 256), 16 * gemm_ns(4, 256, 256)),
    ({(rows, 256, 256) for rows in ROWS}, (4, 256, 256), 4 * gemm_ns(4, 64, 256)),
    ({(rows, inner, 256) for rows in ROWS for inner in INNER}, (16, 64, 256), 4 * gemm_ns(16, 64, 64)),
]


@pytest.mark.parametrize(("missing", "shape", "nanoseconds"), FILLED)
def test_points_too_large_to_be_swept_go_on_at_the_rate_of_the_nearest(missing, shape, nanoseconds):
    swept = table(gemm_ns=tuple(None if point in missing else gemm_ns(*point) for point in GRID))
    assert gemm_part(*shape, of=swept) == pytest.approx(nanoseconds, rel=1e-12)
    for point in GRID:
        if point not in missing:
            assert gemm_part(*point, of=swept) == pytest.approx(gemm_ns(*point), rel=1e-12)


BEYOND = [
    ((128, 256, 256), 2 * gemm_ns(64, 256, 256)),
    ((128, 1024, 64), 8 * gemm_ns(64, 256, 64)),
    ((4, 64, 1000), 1000 / 256 * gemm_ns(4, 64, 256)),
    ((4, 8, 64), gemm_ns(4, 16, 64)),  # no smaller than the smallest
    ((4, 8, 512), gemm_ns(4, 16, 256)),  # half of one size, twice the other: the same FLOPs
]


@pytest.mark.parametrize(("shape", "nanoseconds"), BEYOND)
def test_beyond_the_grid_the_flop_rate_stays(shape, nanoseconds):
    assert gemm_part(*shape) == pytest.approx(nanoseconds, rel=1e-12)


def test_a_product_of_unknown_shape_runs_like_a_square_one():
    experts = Kernel("gemm", "experts", flops=2 * 32**3)
    assert parts_of(experts)["gemm"] == pytest.approx(gemm_ns(32, 32, 32))
    eager = Kernel("attention", "attention", flops=2 * 2 * 32**3)
    assert parts_of(eager) == {"attention": pytest.approx(2 * gemm_ns(32, 32, 32)), "cold": 0.0, "launches": 1.0}


# ── One thread or several ──

LIMIT = 65_536


def two_threads(**changes) -> Table:
    """A second thread halves the time, and is there from 65,536 multiply-adds on."""
    times = (gemm_ns(*shape) / (2 if prod(shape) >= LIMIT else 1) for shape in GRID)
    return table(**{"threads": 2, "gemm_ns": tuple(times), **changes})


@given(st.integers(1, 64), st.integers(16, 256), st.integers(16, 256))
def test_what_is_too_small_for_a_second_thread_is_told_by_its_like_and_so_is_the_rest(rows, inner, columns):
    """In the cell of the grid that the limit runs through, too, though the larger GEMM may be the faster one."""
    expected = gemm_ns(rows, inner, columns) / (2 if rows * inner * columns >= LIMIT else 1)
    assert gemm_part(rows, inner, columns, of=two_threads()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("changes", [{"threads": 1}, {"provider": "cuda", "threads": 0}])
def test_where_there_is_no_second_thread_the_limit_means_nothing(changes):
    found = gemm_part(2, 128, 192, of=two_threads(**changes))  # below the limit, in a cell that reaches beyond it
    assert found < 0.99 * gemm_part(2, 128, 192, of=two_threads())


def test_points_are_carried_on_along_straight_lines():
    axes = (np.array([0.0, 1.0, 3.0, 4.0, 5.0]), np.array([0.0]))
    logs = np.array([[1.0], [1.5], [2.5], [9.0], [9.0]])
    known = np.array([[True], [True], [False], [False], [False]])
    assert carried_on(logs, known, axes).ravel() == pytest.approx([1.0, 1.5, 2.5, 3.0, 3.5])
    assert carried_on(logs[::-1], known[::-1], (axes[0], axes[1])).ravel()[3:] == pytest.approx([1.5, 1.0]), "known"


@pytest.mark.parametrize(("times", "beyond"), [((2.0, 1.0), 1.0), ((1.0, 4.0), 5.0)])
def test_what_is_carried_on_neither_falls_nor_outgrows_the_size(times, beyond):
    logs = np.array([*times, 0.0])
    known = np.array([True, True, False])
    assert carried_on(logs, known, (np.array([0.0, 1.0, 2.0]),))[2] == pytest.approx(beyond)


# ── Steps between the points ──


def test_steps_are_counted_from_the_line_between_the_points_of_the_grid():
    """Two series, one on a machine four times slower: 3 lies on the line in the one, at four times in the other."""
    line = sqrt(3)  # at 3, of a time that grows with the root
    fast = [(1, ("a",), 100.0), (3, ("a",), 100 * line), (4, ("a",), 200.0)]
    slow = [(1, ("b",), 400.0), (3, ("b",), 4 * 400 * line), (4, ("b",), 800.0)]
    assert steps_between(fast + slow, (1, 4)) == pytest.approx({1: 1.0, 3: 2.0, 4: 1.0})
    assert steps_between(fast, (1, 4)) == pytest.approx({1: 1.0, 3: 1.0, 4: 1.0})


def test_sizes_with_no_point_of_the_grid_on_both_sides_have_no_step():
    points = [(size, (), float(size)) for size in (1, 2, 3, 5)]
    assert set(steps_between(points, (2, 3, 64))) == {2, 3}
    assert steps_between(points, (64,)) == {}


def stepped() -> Table:
    """Three rows cost 1.2 of the line; 24 columns 1.5 of it at 1 row and 1.1 at 16 rows."""
    rows = tuple(((m, 64, 64), factor * gemm_ns(m, 64, 64)) for m, factor in ((1, 1.0), (3, 1.2), (4, 1.0)))
    columns = tuple(
        ((m, 64, n), factor * gemm_ns(m, 64, n))
        for m, most in ((1, 1.5), (16, 1.1))
        for n, factor in ((16, 1.0), (24, most), (32, 1.0), (64, 1.0))
    )
    return table(row_steps=rows, column_steps=columns)


STEPPED = [
    ((3, 64, 64), 1.2), ((4, 64, 64), 1.0), ((2, 64, 64), 1.0), ((50, 64, 64), 1.0),
    ((1, 64, 24), 1.5), ((16, 64, 24), 1.1), ((64, 64, 24), 1.1), ((4, 64, 24), 1.3), ((3, 16, 16), 1.2),
    # Beyond 64 columns: as far into a tile of 64, the same columns too many, of more.
    ((1, 64, 64 + 24), 1 + 0.5 * 24 / 88), ((1, 64, 128 + 24), 1 + 0.5 * 24 / 152), ((1, 64, 128), 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "factor"), STEPPED)
def test_a_size_off_the_line_costs_what_its_step_says(shape, factor):
    assert gemm_part(*shape, of=stepped()) == pytest.approx(factor * gemm_ns(*shape), rel=1e-9)


# ── Cold weights ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("working_set", "share"),
    [(0, 1.0), (1, 0.0), (10**4, 0.0), (10**5, 0.5), (10**6, 1.0), (10**12, 1.0)],
)
def test_the_more_a_pass_reads_the_less_stays_in_the_cache(working_set, share):
    clock = MeasuredClock(table()).for_working_set(working_set)
    for rows, penalty in ((1, 0.5), (8, 0.3)):
        found = clock.features(gemm(rows, 64, 16, "sites"), "float32")
        assert found["cold"] == pytest.approx(share * penalty * 4 * 64 * 16)
    found = clock.features(gemm(1, 64, 16, "sites"), "float32")
    assert found["gemm"] == pytest.approx(gemm_ns(1, 64, 16)), "the rest does not depend on it"


@pytest.mark.parametrize(("rows", "penalty"), [(1, 0.5), (8, 0.3), (64, 0.1), (1000, 0.1)])
def test_a_cold_byte_costs_less_the_more_there_is_to_do_meanwhile(rows, penalty):
    found = parts_of(gemm(rows, 64, 16, "sites"), working_set=10**6)
    assert found["cold"] == pytest.approx(penalty * 4 * 64 * 16)


def test_weights_that_were_cold_when_they_were_swept_are_not_counted_cold_again():
    """The largest weights were read from memory by the sweep too: table and penalty together give what it took."""
    truth = {shape: gemm_ns(*shape) for shape in GRID}
    penalty = {rows: MeasuredClock(table(), 10**6)._cold_penalty(rows) for rows in ROWS}
    big = 4 * 256 * 256
    timed = {s: ns + (penalty[s[0]] * big if s[1:] == (256, 256) else 0.0) for s, ns in truth.items()}
    raw = table(gemm_ns=tuple(timed.values()))
    warm = with_warm_weights(raw, lambda inner, columns: 10**6 if (inner, columns) == (256, 256) else 10**4)
    assert warm.gemm_ns == pytest.approx(tuple(truth.values()))
    kernel = gemm(4, 256, 256, "sites")
    found = MeasuredClock(warm, 10**6, among="nothing").time_ns(kernel, "float32")
    assert found == pytest.approx(timed[4, 256, 256], abs=1)


def test_without_its_reading_a_gemm_is_no_faster_than_a_smaller_one():
    raw = table(gemm_ns=tuple(None if shape == (64, 256, 256) else gemm_ns(*shape) for shape in GRID))
    warm = with_warm_weights(raw, lambda inner, columns: 10**6 if (inner, columns) == (256, 256) else 10**4)
    found = dict(zip(GRID, warm.gemm_ns, strict=True))
    assert found[64, 256, 256] is None, "what was not swept stays so"
    assert found[1, 256, 256] == max(gemm_ns(1, 64, 256), gemm_ns(1, 256, 64))  # its penalty is more than its time
    assert found[1, 256, 64] == pytest.approx(gemm_ns(1, 256, 64))


def test_a_product_of_unknown_shape_has_many_rows():
    experts = Kernel("gemm", "experts", flops=100, weights=1000)
    assert parts_of(experts, working_set=10**6)["cold"] == pytest.approx(0.1 * 4 * 1000)


# ── Everything else ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "shape", [*ATTENTION_SHAPES[::7], (3, 12, 4, 1, 500, 64, FUSED), (1, 2, 2, 77, 77, 24, FULL)]
)
def test_attention_is_fitted_also_where_it_was_not_swept(shape):
    kernel = Kernel("attention", "attention", shape=shape)
    parts = parts_of(kernel, working_set=10**12)
    assert parts.pop("cold") == pytest.approx(cold_cache_ns(shape))
    sort = {FULL: "attention", FUSED: "cached attention", UNFUSED: "unfused attention"}[shape[6]]
    assert parts == {sort: pytest.approx(attention_ns(shape), rel=1e-6), "launches": 1.0}


def test_a_long_prompt_on_its_own_attends_in_parts_on_a_cpu():
    prompt = (1, 12, 4, 203, 203, 64, FUSED)
    parts = attention_in_parts(prompt)
    assert [shape[3:5] for shape in parts] == [(50, 50), (50, 100), (50, 150), (53, 203)]
    assert {(*shape[:3], *shape[5:]) for shape in parts} == {(1, 12, 4, 64, FUSED)}
    whole = [(1, 12, 4, 191, 191, 64, FUSED), (2, *prompt[1:]), (*prompt[:6], FULL), (1, 12, 4, 1, 203, 64, FUSED)]
    assert all(attention_in_parts(shape) == [shape] for shape in whole), "short, a batch, an encoder, a step"

    kernel = Kernel("attention", "attention", activations=500, shape=prompt)
    on_cpu = parts_of(kernel)
    assert on_cpu["cached attention"] == pytest.approx(sum(map(attention_ns, parts)), rel=1e-6)
    assert (on_cpu["launches"], on_cpu["elementwise"], on_cpu["cold"]) == (4.0, 1000.0, 0.0)
    elsewhere = parts_of(kernel, of=table(provider="cuda"))
    assert elsewhere == {
        "cached attention": pytest.approx(attention_ns(prompt), rel=1e-6),
        "cold": 0.0,
        "launches": 1.0,
    }


def cold_cache_ns(shape):
    """A step's keys and values, 4 bytes each, cross the memory twice, or six times where attention is unfused."""
    batch, _, kv_heads, queries, keys, size, which = shape
    passes = {FULL: 0, FUSED: 2, UNFUSED: 6}[which] if queries < keys else 0
    return passes * 2 * batch * kv_heads * keys * size * 4 * 0.5  # 0.5 ns a byte at one row, all cold


@pytest.mark.parametrize(
    ("elements", "nanoseconds"),
    [(100, 200), (550, 600), (1000, 1000), (4000, 4000), (1, 200)],
    ids=["a point", "between", "the last", "beyond", "below"],
)
def test_pointwise_work_is_linear_between_and_in_proportion_beyond(elements, nanoseconds):
    assert parts_of(pointwise(elements, "elementwise")) == {"elementwise": nanoseconds, "launches": 1.0}


def test_every_function_of_pointwise_work_has_its_correction():
    names = {function: next(iter(parts_of(pointwise(100, "norm", function)))) for function in FUNCTIONS}
    assert names == {
        "add": "elementwise", "rms_norm": "norm", "layer_norm": "norm", "gelu": "activation", "silu": "activation",
        "split": "split",
    }  # fmt: skip
    assert set(names.values()) < set(FEATURES)


def test_corrections_scale_the_parts():
    factors = {name: 2.0 + position for position, name in enumerate(FEATURES)}
    swept = table(corrections=factors)
    kernel = gemm(4, 64, 256, "sites")
    parts = parts_of(kernel, swept, working_set=10**5)
    assert set(parts) == {"gemm", "cold", "traffic", "launches"}
    # 1 ns an element of 4 bytes is what moving activations takes
    assert parts["traffic"] == pytest.approx(4 * 64 + 4 * 256)
    clock = MeasuredClock(swept, working_set=10**5)
    expected = 2 * parts["gemm"] + 3 * parts["cold"] + 4 * parts["traffic"] + factors["launches"]
    assert clock.time_ns(kernel, "float32") == round(expected)
    assert clock.time_ns(SESSION, "float32") == factors["call"]
    assert clock.for_working_set(10**5).table is swept


def test_what_runs_beside_a_kernel_decides_its_corrections():
    swept = table(
        corrections=dict.fromkeys(FEATURES, 7.0), pair_corrections={**UNCORRECTED, "gemm": 1.5, "launches": 90}
    )
    kernel = gemm(4, 64, 256, "sites")
    parts = parts_of(kernel, swept, working_set=10**5)
    alone = MeasuredClock(swept, working_set=10**5, among="nothing")
    assert alone.time_ns(kernel, "float32") == round(parts["gemm"] + parts["cold"])
    assert alone.time_ns(SESSION, "float32") == 1
    in_pair = replace(alone, among="pair")
    assert in_pair.time_ns(kernel, "float32") == round(1.5 * parts["gemm"] + parts["cold"] + 90)
    assert in_pair.for_working_set(10**5).among == "pair"


LIMITS = [
    (SESSION, "launch"),
    (gemm(1, 16, 16, "sites"), "launch"),
    (gemm(1, 256, 256, "sites"), "bandwidth"),  # the reading is all there is
    (gemm(64, 256, 256, "sites"), "compute"),
    (pointwise(10**5, "norm"), "bandwidth"),
    (Kernel("attention", "attention", shape=(2, 8, 8, 32, 64, 16, UNFUSED)), "compute"),
    (Kernel("attention", "attention", shape=(1, 4, 2, 1, 8, 8, FULL)), "launch"),
    (Kernel("gemm", "experts", flops=2 * 200**3), "compute"),
]


@pytest.mark.parametrize(("kernel", "limit"), LIMITS)
def test_what_binds(kernel, limit):
    assert MeasuredClock(table(), working_set=10**4).limit(kernel, "float32") == limit


def test_another_dtype_than_the_swept_one_is_refused():
    with pytest.raises(BadInput) as refusal:
        MeasuredClock(table()).time_ns(SESSION, "float16")
    assert str(refusal.value) == (
        "the calibration of made in code was swept in float32, the workload is float16; "
        "run `blora calibrate --dtype float16`, or plan with a workload in float32"
    )


def test_a_calibrated_device_as_a_profile():
    found = device_of(table(corrections={**UNCORRECTED, "call": 1234.0}, cold_ns_per_byte=(0.1, 0.25, 0.0, 0.1)))
    assert (found.name, found.title, found.provider, found.dtype) == ("this", "made in code", "cpu", "float32")
    assert found.measured
    assert device_of(table(provider="cuda", threads=0)).name == "this-cuda"
    assert found.source == "calibrated on this machine with ONNX Runtime 1.0"
    # The largest GEMM is the best one; one row of the largest weight that stays in the caches is the best reading.
    assert found.peak("float32") == pytest.approx(2e9 * 64 * 256 * 256 / gemm_ns(64, 256, 256))
    seconds_per_byte = 1e-9 * gemm_ns(1, 16, 64) / (4 * 16 * 64)
    assert found.cache_bandwidth == pytest.approx(1 / seconds_per_byte)
    assert found.bandwidth == pytest.approx(1 / (seconds_per_byte + 0.25e-9))
    assert found.cache_bytes == 10**4, "the penalty is more than half of the largest above"
    assert found.launch_ns == gemm_ns(1, 16, 16)
    assert found.session_ns == 1234
    assert found.memory_bytes == 10**9


def test_what_is_left_of_few_rows_without_the_reading_of_their_weights_is_no_arithmetic():
    """Large weights at few rows are nearly all reading, which is taken off; the rest was ten times a core's best."""
    times = {point: gemm_ns(*point) for point in GRID}
    noisy = {(4, 256, 256): 1.0, (1, 256, 256): 1.0}
    assert set(noisy) < set(times)
    here = device_of(table(gemm_ns=tuple(noisy.get(point, times[point]) for point in GRID)))
    assert (here.peak("float32"), here.cache_bandwidth) == (
        device_of(table()).peak("float32"), device_of(table()).cache_bandwidth,
    )  # fmt: skip


def test_a_device_whose_caches_keep_nothing():
    swept = table(cold_ns_per_byte=(0.3, 0.5, 0.0, 0.1), gemm_ns=(None, *(gemm_ns(*point) for point in GRID[1:])))
    assert device_of(swept).cache_bytes == 0
    assert device_of(swept).launch_ns == gemm_ns(1, 16, 64), "points that were not swept do not count"


# ── Corrections ──────────────────────────────────────────────────────────────────────────────────────────────────

TRUTH = {
    "gemm": 1.2, "cold": 0.8, "traffic": 0.3, "attention": 1.5, "cached attention": 1.4, "unfused attention": 0.6,
    "norm": 0.7, "activation": 1.1, "split": 0.9, "elementwise": 1.3, "launches": 400.0, "call": 20_000.0,
}  # fmt: skip


def run(features: dict[str, float], truth=TRUTH) -> dict:
    return {"features": features, "measured_ns": sum(truth[name] * amount for name, amount in features.items())}


def test_known_factors_are_recovered():
    draw = random.Random(3)
    amounts = dict.fromkeys(FEATURES, 1e5) | {"launches": 200, "call": 1}
    runs = [run({name: most * exp(draw.uniform(log(0.01), 0)) for name, most in amounts.items()}) for _ in range(400)]
    found = fit_corrections(runs)
    assert list(found) == list(FEATURES)
    for name in FEATURES:
        assert found[name] == pytest.approx(TRUTH[name], rel=0.05), name


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("count", [1, 20])
def test_few_runs_pull_a_factor_less_far_from_one(factor, count):
    """Least squares of count (g / factor - 1)^2 + 0.01 (g - 1)^2, by hand."""
    found = fit_corrections([run({"gemm": 5e4}, {"gemm": factor})] * count)
    expected = (count / factor + 0.01) / (count / factor**2 + 0.01)
    assert found["gemm"] == pytest.approx(expected, rel=1e-9)
    rest = FEATURES[1:]
    assert [found[name] for name in rest] == pytest.approx([UNCORRECTED[name] for name in rest], rel=1e-9)


def test_kinds_of_work_that_runs_do_not_tell_apart_stay_near_one():
    runs = [run({"gemm": size, "norm": size}, {"gemm": 3.0, "norm": 0.0}) for size in (1e4, 3e4, 1e5)]
    found = fit_corrections(runs)
    assert found["gemm"] == pytest.approx(found["norm"]) == pytest.approx(1.5, rel=0.01)


def test_no_factor_is_below_zero():
    runs = [
        {"features": {"gemm": 1e4, "norm": 1e4}, "measured_ns": 5e3},
        {"features": {"gemm": 1e4}, "measured_ns": 1e4},
    ]
    assert all(factor >= 0 for factor in fit_corrections(runs * 50).values())


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_reads_back(tmp_path):
    path = tmp_path / "table.json"
    run_of = ({"name": "a", "features": {}},)
    gaps = replace(
        stepped(), gemm_ns=(*(gemm_ns(*point) for point in GRID[:-1]), None), runs=run_of, pair_runs=run_of
    )
    path.write_text(gaps.to_json(), encoding="utf-8")
    assert read_table(path) == gaps


def hashed(**changes) -> str:
    """A file whose hash fits a table with some fields changed, or left out where they are None."""
    fields = {**json.loads(table().to_json())["table"], **changes}
    content = {name: value for name, value in fields.items() if value is not None}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return written(table=content, sha256=digest)


def written(**changes) -> str:
    return json.dumps({**json.loads(table().to_json()), **changes})


AGAIN = "; run `blora calibrate` again"
DAMAGED = {
    "truncated": (table().to_json()[:200], "calibration table {path} is corrupt ("),
    "empty": ("", "calibration table {path} is corrupt (Expecting value"),
    "a list": ("[]", "{path} is no calibration table" + AGAIN),
    "another format": (written(format="onnx"), "{path} is no calibration table" + AGAIN),
    "another version": (written(version=99), "calibration table {path} has version 99, this reads 2" + AGAIN),
    "no version": (written(version=None), "calibration table {path} has version None, this reads 2" + AGAIN),
    "edited": (written(table={**json.loads(table().to_json())["table"], "threads": 64}),
               "calibration table {path} is corrupt (its content does not match its hash)" + AGAIN),
    "no table": (written(table=None), "calibration table {path} is corrupt (its content does not match its hash)"),
    "a field less": (hashed(cold_rows=None), "calibration table {path} is corrupt (KeyError('cold_rows'))" + AGAIN),
    "a field more": (hashed(colour="red"), "calibration table {path} is corrupt (TypeError("),
    "no numbers": (hashed(pointwise={"add": [["many", 1]]}), "calibration table {path} is corrupt (ValueError("),
    "no hash": (written(sha256=None), "calibration table {path} is corrupt (its content does not match its hash)"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_and_never_used(name, tmp_path):
    text, message = DAMAGED[name]
    path = tmp_path / "table.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as refusal:
        read_table(path)
    assert str(refusal.value).startswith(message.format(path=path))
    assert str(refusal.value).endswith(AGAIN)


def test_a_file_that_is_no_text_is_corrupt(tmp_path):
    path = tmp_path / "table.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match=rf"calibration table {path} is corrupt \('utf-8' codec"):
        read_table(path)


def test_a_missing_table_says_what_makes_one(tmp_path):
    path = tmp_path / "table.json"
    with pytest.raises(BadInput) as refusal:
        read_table(path)
    assert str(refusal.value) == (f"there is no calibration table {path}; run `blora calibrate` on the device first")
