"""Calibration: tiny sweeps of real kernels, interrupted and resumed, written, read, and refused when stale.

No test judges a time: where times matter they are made up, elsewhere they only have to be there.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from blora_compiler.cost_models.kernels import FULL, FUNCTIONS, FUSED, UNFUSED, gemm
from blora_compiler.cost_models.measured import FEATURES, UNCORRECTED, MeasuredClock, Table, read_table

import blora_compiler as blora
from blora_compiler import cli, measuring, sweeping
from blora_compiler.artifact import session_options
from blora_compiler.clocks import target_of, this_table
from blora_compiler.errors import BadInput
from blora_compiler.measuring import WholeModel, calibrate, table_path
from blora_compiler.sweeping import (
    SMALL_ROWS,
    SMALL_SIZES,
    Journal,
    Place,
    attention_shapes,
    attention_stack,
    gemm_stack,
    pair_stack,
    pointwise_stack,
    stack_bytes,
    stack_nodes,
    sweep_attention,
    sweep_gemms,
)
from blora_compiler.values import Workload
from tests.models import tiny_llama
from tests.ort.conftest import SMALL_ATTENTION, SMALL_PAIRS

calibrate_small = partial(calibrate, Place(), rows=SMALL_ROWS, sizes=SMALL_SIZES, models=())


class Interrupted(Exception):
    """What a keyboard, or a power cut, does to a sweep."""


class MadeUpTimes:
    """Stands in for the clock: no two points are alike, and how many were asked for is known.

    Attributes:
        asked: how many times so far.
        stop_at: raises instead of answering this one.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.stop_at: int | None = None

    def __call__(self, call: Callable[[], Any], *_: Any, **__: Any) -> float:
        if self.asked == self.stop_at:
            raise Interrupted
        self.asked += 1
        return 1e6 + 1e3 * self.asked


@pytest.fixture
def made_up(short_sweeps, monkeypatch) -> MadeUpTimes:
    times = MadeUpTimes()
    monkeypatch.setattr(sweeping, "undisturbed_ns", times)
    monkeypatch.setattr(measuring, "call_cost_ns", lambda place: 0.0)  # is no point: every sweep asks for it
    return times


@pytest.fixture
def whole_sweep(made_up, tmp_path) -> int:
    """How many points a sweep has that nothing interrupts."""
    calibrate_small(tmp_path / "whole.json")
    count, made_up.asked = made_up.asked, 0
    return count


# ── The table ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_is_complete_and_reads_back_equal(small_cache):
    folder, table = small_cache
    (path,) = folder.iterdir()  # nothing of the sweep is left beside it
    assert path == folder / "calibration-cpu-float32-all-threads.json"
    assert read_table(path) == table
    assert (table.rows, table.inner, table.columns) == (SMALL_ROWS, SMALL_SIZES, SMALL_SIZES)
    assert len(table.gemm_ns) == len(SMALL_ROWS) * len(SMALL_SIZES) ** 2
    assert set(table.pointwise) == set(FUNCTIONS)
    assert tuple(shape for shape, _ in table.attention) == SMALL_ATTENTION
    assert table.corrections == UNCORRECTED and table.runs == ()
    assert (table.cold_rows, table.cold_bytes) == ((1.0, 16.0), tuple(size * 2.0**20 for size in (2, 4, 8, 12, 16)))
    penalties = np.reshape(table.cold_ns_per_byte, (2, 5))
    assert (penalties[:, 0] == 0).all() and (np.diff(penalties) >= 0).all()  # more bytes never cost less
    assert {name: getattr(table, name) for name in Place().identity()} == Place().identity()
    times = [*table.gemm_ns, *(ns for _, ns in table.attention), *(n for p in table.pointwise.values() for _, n in p)]
    assert all(ns is not None and math.isfinite(ns) and ns > 0 for ns in times)
    assert table.memory_bytes > 1 << 28


def test_every_time_stands_where_it_was_measured(made_up, tmp_path):
    journal = Journal(tmp_path / "points.jsonl", Place().identity())
    table = measuring.sweep(Place(), journal, SMALL_ROWS, SMALL_SIZES, print)
    shapes = [(m, k, n) for m in SMALL_ROWS for k in SMALL_SIZES for n in SMALL_SIZES]
    assert table.gemm_ns == tuple(journal.points[f"gemm 1 {m} {k} {n}"] for m, k, n in shapes)  # the faster pass
    assert all(journal.points[f"gemm 2 {m} {k} {n}"] > journal.points[f"gemm 1 {m} {k} {n}"] for m, k, n in shapes)
    assert len(set(table.gemm_ns)) == len(shapes)
    for shape, ns in table.attention:
        assert ns == journal.points["attention " + " ".join(map(str, shape))]
    for (m, k, n), ns in table.row_steps + table.column_steps:
        assert ns == journal.points[f"step 1 {m} {k} {n}"] < journal.points[f"step 2 {m} {k} {n}"]
    assert {shape[0] for shape, _ in table.row_steps} == {1, 5, 16}
    assert {shape[2] for shape, _ in table.column_steps} == {16, 24, 64}
    pairs = [(m, *sizes) for sizes in SMALL_PAIRS["PAIR_SIZES"] for m in SMALL_PAIRS["PAIR_ROWS"]]
    for (m, k, r, n), record in zip(pairs, table.pair_runs, strict=True):
        assert record["name"] == f"pair {m} x {k} -> {r} -> {n}"
        assert record["measured_ns"] == journal.points[f"pair 1 {m} {k} {r} {n}"]
        assert record["features"]["launches"] == 2
    for function, points in table.pointwise.items():
        assert points[0] == (2048.0, journal.points[f"{function} 1"])


def test_what_would_take_too_long_is_left_to_the_rate_of_what_did_not(small_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(sweeping.Stack, "time_ns", lambda stack, feeds, call_ns=0.0: 1e8 * len(feeds["x"]))
    swept = sweep_gemms(Place(), Journal(tmp_path / "j", {}), (1, 2, 4, 8), (16,), 0.0)
    assert swept == {(1, 16, 16): 1e8, (2, 16, 16): 2e8, (4, 16, 16): None, (8, 16, 16): None}
    table = replace(small_cache[1], rows=(1, 2, 4, 8), inner=(16, 32), columns=(16, 32),
                    gemm_ns=tuple(ns for ns in swept.values() for _ in range(4)))  # fmt: skip
    (tmp_path / "table.json").write_text(table.to_json())
    clock = MeasuredClock(read_table(tmp_path / "table.json"))
    assert clock.features(gemm(8, 16, 16, "sites"), "float32")["gemm"] == pytest.approx(8e8)


# ── The kernels that are swept, against the same in numpy ────────────────────────────────────────────────────────


def run(stack: Any, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return stack.session.run(None, dict(feeds))


def small_values(count: int) -> np.ndarray:
    """What the sweep fills everything with: small numbers of either sign, the same in every call."""
    values = sweeping._random(Place(), count)
    assert np.abs(values).min() >= 0.01 and np.abs(values).max() <= 0.02
    return values


def test_gemms_have_weights_of_their_own():
    x = np.linspace(-1, 1, 3 * 16, dtype=np.float32).reshape(3, 16)
    results = run(gemm_stack(Place(), 16, 24, nodes=3), {"x": x})
    # The weights of node i are the window that starts i further into one row of numbers.
    window = small_values(3 + 16 * 24)
    for i, result in enumerate(results):
        np.testing.assert_allclose(result, x @ window[i : i + 16 * 24].reshape(16, 24), atol=1e-6)
    assert not np.array_equal(results[0], results[1])


def test_pairs_have_weights_of_their_own_and_hand_on_what_the_first_computes():
    x = np.linspace(-1, 1, 3 * 16, dtype=np.float32).reshape(3, 16)
    results = run(pair_stack(Place(), 16, 8, 24, nodes=2), {"x": x})
    first, second = (small_values(2 + n) for n in (16 * 8, 8 * 24))
    for i, result in enumerate(results):
        hidden = x @ first[i : i + 16 * 8].reshape(16, 8)
        np.testing.assert_allclose(result, hidden @ second[i : i + 8 * 24].reshape(8, 24), atol=1e-6)
    assert not np.array_equal(results[0], results[1])


def test_threads_stay_awake_only_where_no_other_session_is_alive():
    """A run of a few kernels is over before a thread wakes up; two sessions would take each other's cores."""
    key = "session.force_spinning_stop"
    assert session_options(2, pinned=True).get_session_config_entry(key) == "1"
    with pytest.raises(RuntimeError, match=key):
        session_options(2, pinned=True, alone=True).get_session_config_entry(key)


def test_a_stack_has_two_megabytes_of_weights_where_so_many_nodes_can_be():
    place = Place()
    assert [stack_nodes(place, weights) for weights in (8 * 8, 256 * 256, 4096 * 4096)] == [32, 8, 2]
    assert stack_bytes(place, 256, 256) == 2 << 20
    assert stack_bytes(place, 4096, 4096) == 2 * 4 * 4096 * 4096


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


NORM_WEIGHT = small_values(32)
POINTWISE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "add": lambda x: 2 * x,
    "rms_norm": lambda x: 2 * x / np.sqrt((4 * x * x).mean(-1, keepdims=True) + 1e-12) * NORM_WEIGHT,
    "layer_norm": lambda x: (
        2 * (x - x.mean(-1, keepdims=True)) / np.sqrt(4 * x.var(-1, keepdims=True) + 1e-12) * NORM_WEIGHT
        + NORM_WEIGHT
    ),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_pointwise_kernels_run_and_compute_what_they_are_named_for(function):
    x = np.sin(np.arange(4 * 32, dtype=np.float32)).reshape(4, 32)
    if function == "split":
        results = run(pointwise_stack(Place(), 32, 2, function), {"x0": x})
        assert [result.shape for result in results] == [(4, 16)] * 4
        np.testing.assert_array_equal(np.concatenate(results[:2], axis=-1), x)
        return
    (result,) = run(pointwise_stack(Place(), 32, 1, function), {"x0": x})
    np.testing.assert_allclose(result, POINTWISE[function](x), atol=2e-6)
    (chained,) = run(pointwise_stack(Place(), 32, 3, function), {"x0": x})
    assert chained.shape == x.shape and np.isfinite(chained).all()


def by_head(values: np.ndarray, batch: int, size: int) -> np.ndarray:
    """(batch, heads, tokens, size) of either layout."""
    return values if values.ndim == 4 else values.reshape(batch, values.shape[1], -1, size).swapaxes(1, 2)


@pytest.mark.parametrize("shape", SMALL_ATTENTION, ids=lambda shape: "x".join(map(str, shape)))
def test_attention_kernels_attend_to_what_their_shape_says(shape):
    batch, heads, kv_heads, queries, keys, size, which = shape
    stack, feeds = attention_stack(Place(), shape)
    draw = np.random.default_rng(0)
    feeds |= {n: draw.standard_normal(feeds[n].shape, np.float32) for n in feeds if n.endswith(("q", "k", "v"))}
    unseen = np.triu(np.full((queries, keys), -1e9, np.float32), k=keys - queries + 1)
    if which == UNFUSED:  # the mask is the bias alone
        feeds["bias"] = np.broadcast_to(unseen, feeds["bias"].shape).copy()
    k, v = (by_head(feeds[name], batch, size) for name in "kv")
    if "past_k" in feeds:
        k, v = (np.concatenate([feeds[f"past_{name}"], new], axis=2) for name, new in (("k", k), ("v", v)))
    assert k.shape == (batch, kv_heads, keys, size)
    k, v = (np.repeat(values, heads // kv_heads, axis=1) for values in (k, v))
    scores = by_head(feeds["q"], batch, size) @ k.swapaxes(-1, -2)
    scores = scores if which == UNFUSED else scores / math.sqrt(size)  # where shipped graphs scale the queries
    weights = np.exp(scores + (0 if which == FULL else unseen))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v
    results = dict(zip((output.name for output in stack.session.get_outputs()), run(stack, feeds), strict=True))
    for i in range(stack.nodes):
        np.testing.assert_allclose(by_head(results[f"y{i}"], batch, size), expected, atol=2e-6)
    assert ("present_k0" in results) == (which != FULL)


def test_the_shapes_of_a_full_sweep_are_prompts_steps_and_encoders():
    shapes = attention_shapes()
    assert len(set(shapes)) == len(shapes)
    kinds = {(which, queries == 1 < keys) for *_, queries, keys, _, which in shapes}
    assert kinds == {(FULL, False), (FUSED, False), (FUSED, True), (UNFUSED, True)}
    assert all(heads % kv_heads == 0 and keys >= queries for _, heads, kv_heads, queries, keys, _, _ in shapes)


def test_a_kernel_that_fails_ends_the_sweep(made_up, monkeypatch, tmp_path):
    def refuse(place: Place, shape: tuple[int, ...]) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(sweeping, "attention_stack", refuse)
    with pytest.raises(RuntimeError, match="no such kernel"):
        sweep_attention(Place(), Journal(tmp_path / "j", {}), SMALL_ATTENTION, 0.0)


def test_cuda_is_not_swept_in_a_type_that_would_run_on_the_cpu():
    with pytest.raises(BadInput, match="--target cuda --dtype float16"):
        Place("cuda", "float32")


@pytest.mark.parametrize("threads", [-1, 4096])
def test_threads_that_no_session_can_have_are_refused(threads):
    with pytest.raises(BadInput, match=f"threads is {threads}; give 1 to"):
        Place(threads=threads)


# ── Interrupted, resumed ─────────────────────────────────────────────────────────────────────────────────────────


def interrupted_by_tell(made_up: MadeUpTimes, path: Path) -> None:
    def tell(line: str) -> None:
        if line.startswith("GEMMs, pass 1 of 2, inner size 64"):
            raise Interrupted

    with pytest.raises(Interrupted):
        calibrate_small(path, tell=tell)


def interrupted_by_the_clock(made_up: MadeUpTimes, path: Path) -> None:
    made_up.stop_at = made_up.asked + 60
    with pytest.raises(Interrupted):
        calibrate_small(path)
    made_up.stop_at = None


@pytest.mark.parametrize("interrupt", [interrupted_by_tell, interrupted_by_the_clock])
def test_a_resumed_sweep_measures_nothing_twice(interrupt, made_up, whole_sweep, tmp_path):
    path = tmp_path / "table.json"
    interrupt(made_up, path)
    assert 40 < made_up.asked < whole_sweep and not path.exists()
    unfinished = [json.loads(line) for line in path.with_suffix(".partial.jsonl").read_text().splitlines()]
    assert unfinished[0] == Place().identity() and len(unfinished) == 1 + made_up.asked
    table = calibrate_small(path)
    assert made_up.asked == whole_sweep
    found = {record["key"]: record["ns"] for record in unfinished[1:]}
    shapes = [(m, k, n) for m in SMALL_ROWS for k in SMALL_SIZES for n in SMALL_SIZES]
    swept = {f"gemm 1 {m} {k} {n}": ns for (m, k, n), ns in zip(shapes, table.gemm_ns, strict=True)}
    assert found.keys() & swept.keys()
    assert all(swept[key] == found[key] for key in found.keys() & swept.keys())
    assert read_table(path) == table
    assert not path.with_suffix(".partial.jsonl").exists()


def test_a_sweep_may_start_again_on_purpose(made_up, whole_sweep, tmp_path):
    interrupted_by_the_clock(made_up, tmp_path / "table.json")
    made_up.asked = 0
    calibrate_small(tmp_path / "table.json", again=True)
    assert made_up.asked == whole_sweep


def test_a_line_that_was_cut_off_costs_that_point_alone(tmp_path):
    path, identity = tmp_path / "points.jsonl", Place().identity()
    first = Journal(path, identity)
    for key in ("a", "b"):
        first.get(key, lambda: 1.0)
    path.write_text(path.read_text()[:-8])
    second = Journal(path, identity)
    assert second.points == {"a": 1.0}
    second.get("b", lambda: 2.0)
    assert Journal(path, identity).points == {"a": 1.0, "b": 2.0}


def test_points_of_another_device_are_named_and_not_used(made_up, whole_sweep, monkeypatch, tmp_path):
    path = tmp_path / "table.json"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sweeping, "cpu_name", lambda: "Another processor, 64 cores")
        interrupted_by_the_clock(made_up, path)
    made_up.asked = 0
    said: list[str] = []
    table = calibrate_small(path, tell=said.append)
    assert made_up.asked == whole_sweep
    assert said[0] == (
        f"{path.with_suffix('.partial.jsonl')} is of another device, runtime or dtype: swept again from the start"
    )
    assert table.device == Place().device_name


# ── Where tables are, and which are refused ──────────────────────────────────────────────────────────────────────


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("BLORA_CACHE", str(tmp_path))
    assert table_path(Place()) == tmp_path / "calibration-cpu-float32-all-threads.json"
    assert table_path(Place(dtype="float16", threads=2)).name == "calibration-cpu-float16-2-threads.json"
    monkeypatch.delenv("BLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert table_path(Place()).parent == tmp_path / "home" / ".cache" / "blora"


def test_this_machine_reads_the_table_of_the_cache(calibrated):
    target = target_of("this")
    assert target.table == calibrated
    assert (target.device.name, target.device.measured, target.device.dtype) == ("this", True, "float32")
    assert target.device.title == calibrated.device
    assert onnxruntime.__version__ in target.device.source


def test_a_missing_table_is_named(not_calibrated):
    path = not_calibrated / "calibration-cpu-float32-all-threads.json"
    with pytest.raises(BadInput) as error:
        target_of("this")
    assert str(error.value) == (f"there is no calibration table {path}; run `blora calibrate` on the device first")


def damaged(table: Table, how: str) -> str:
    record = json.loads(table.to_json())
    match how:
        case "cut off":
            return table.to_json()[:-30]
        case "edited":
            record["table"]["gemm_ns"][0] *= 0.5
        case "something else":
            record = {"format": "blora-plan"}
        case "of another version":
            record["version"] = 7
    return json.dumps(record)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "calibration table {path} is corrupt ("),
        ("edited", "calibration table {path} is corrupt (its content does not match its hash)"),
        ("something else", "{path} is no calibration table"),
        ("of another version", "calibration table {path} has version 7, this reads 2"),
    ],
)
def test_a_damaged_table_is_named(how, message, small_cache, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(damaged(small_cache[1], how))
    with pytest.raises(BadInput) as error:
        this_table(Place(), path)
    assert str(error.value).startswith(message.format(path=path))
    assert str(error.value).endswith("; run `blora calibrate` again")


@pytest.mark.parametrize(
    ("change", "here"),
    [
        ({"runtime": "1.2.3"}, onnxruntime.__version__),
        ({"device": "Another processor, 64 cores"}, Place().device_name),
        ({"provider": "cuda"}, "cpu"),
        ({"dtype": "float16"}, "float32"),
    ],
)
def test_a_stale_table_is_refused_naming_then_and_now(change, here, small_cache, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(replace(small_cache[1], **change).to_json())
    ((name, then),) = change.items()
    with pytest.raises(BadInput) as error:
        this_table(Place(), path)
    assert str(error.value) == (
        f"calibration table {path} is stale: it was swept with {name} {then!r}, here it is {here!r}; "
        f"run `blora calibrate` again"
    )
    path.write_text(small_cache[1].to_json())
    assert this_table(Place(), path) == small_cache[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"provider": "tpu"}, "provider is 'tpu'; use 'cpu' or 'cuda'"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'; a sweep runs in float32 or float16"),
    ],
)
def test_places_that_no_sweep_runs_at(fields, message):
    with pytest.raises(BadInput) as error:
        Place(**fields)
    assert str(error.value) == message


def test_another_dtype_than_the_sweeps_is_refused(calibrated):
    with pytest.raises(
        BadInput, match=r"was swept in float32, the workload is float16; run `blora calibrate --dtype"
    ):
        target_of("this").clock.time_ns(gemm(4, 16, 16, "sites"), "float16")


# ── Whole models ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_whole_models_give_corrections(short_sweeps, tmp_path):
    workloads = (Workload("prefill", 2, 8), Workload("decode", 1, 1, 8))
    model = WholeModel("tiny llama", lambda: tiny_llama(layers=1), workloads)
    table = calibrate(Place(), tmp_path / "table.json", rows=(1, 16), sizes=(16, 64), models=(model,))
    assert read_table(tmp_path / "table.json") == table
    assert [run["name"] for run in table.runs] == [
        f"tiny llama {name}, {workload.name}" for workload in workloads for name in ("dense", "compressed")
    ]
    for record in table.runs:
        assert tuple(record["features"]) == FEATURES and record["features"]["call"] == 1.0
        assert record["measured_ns"] > 0
    dense, compressed = (record["features"] for record in table.runs[:2])
    assert compressed["launches"] == dense["launches"] + 7  # seven projections take a second GEMM
    assert tuple(table.corrections) == FEATURES and min(table.corrections.values()) >= 0


# ── Used ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_what_if_on_this_machine_is_marked_measured(calibrated):
    answers = blora.whatif(tiny_llama().config, [0.5, 1.0], ["this", "h200"], "prefill 1x16")
    assert [device["measured"] for device in answers.data["devices"]] == [True, False]
    point = answers.point(0.5, "this")
    assert point["feasible"] and point["ms"] > 0
    text = answers.table()
    assert f"on {calibrated.device} (float32)" in " ".join(text.split())
    assert text.count("not measured: from its datasheet") == 1


@pytest.fixture
def blora_cli(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blora", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def test_the_command_sweeps_and_says_what_it_found(blora_cli, made_up, monkeypatch, tmp_path):
    quick = partial(calibrate, rows=SMALL_ROWS, sizes=SMALL_SIZES, models=())
    monkeypatch.setattr(measuring, "calibrate", quick)
    monkeypatch.setenv("BLORA_CACHE", str(tmp_path))
    path = tmp_path / "calibration-cpu-float32-all-threads.json"
    code, out, _ = blora_cli("calibrate")
    assert code == 0 and "GEMMs, pass 2 of 2, inner size 256" in out
    assert out.splitlines()[-1].startswith(Place().device_name) and out.strip().endswith(f"written to {path}")
    assert this_table(Place()).rows == SMALL_ROWS
    code, out, _ = blora_cli("calibrate", "--out", tmp_path / "other.json", "--threads", 1, "--again", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["path"] == str(tmp_path / "other.json") and facts["whole_model_runs"] == 0
    assert facts["peak_flops"] > 0 and facts["bandwidth"] > 0 and set(facts["corrections"]) == set(FEATURES)
    assert read_table(tmp_path / "other.json").threads == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "bfloat16"), "dtype is 'bfloat16'"),
        (("--target", "tpu"), "provider is 'tpu'"),
        (("--speed", "fast"), "No such option"),
    ],
)
def test_the_command_refuses_what_cannot_be_swept(blora_cli, arguments, message):
    code, out, err = blora_cli("calibrate", *arguments)
    assert (code, out) == (2, "") and message in err
