"""Measured times: a table swept once on a device with the runtime that ships, and how it is read between its points.

    time = sum over features of correction x (table + bytes of weights x cold penalty + ...)

- GEMMs: the table holds times at grid points (rows, inner, columns) with the weights in the cache. Between them,
  time is interpolated linearly in the logarithms, so a product of sizes stays a product; beyond them, the nearest
  point's FLOP rate is kept.
- Steps between the points: kernels work on so many rows and columns at once, and what is left over costs nearly as
  much. A few GEMMs swept at every row count and at every multiple of 8 columns say how far a size lies off the line.
- Threads: on a CPU a GEMM with too little work for a second thread runs on one. Neither side of that limit says
  anything about the other, so there are two grids, each with the points of its own side, carried on a little.
- Weights that do not stay in the nearest cache between two passes of a model cost extra per byte. The penalty was
  measured over rows and over how many bytes of weights a pass reads.
- Attention: a non-negative fit of launches, FLOPs, scores and bytes of keys and values to measured points. On a CPU
  a long prompt on its own attends in parts, as lowering cuts it.
- Pointwise work and norms: interpolated over the elements moved.
- Corrections: whole models are not the sum of their kernels run alone. A few whole-model runs give one factor a kind
  of work, and the cost of a call, by non-negative least squares on relative errors. Factored pairs alone, whose
  second GEMM waits for the first, have corrections of their own, fitted likewise to swept pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.interpolate import RegularGridInterpolator
from scipy.optimize import nnls

from blora_compiler.errors import BadInput
from blora_compiler.values import DTYPE_BYTES

from .devices import THIS, THIS_CUDA, Device
from .kernels import FULL, FUSED, UNFUSED, Kernel
from .roofline import Limit

FORMAT, VERSION = "blora-calibration", 2
# What corrections scale: GEMMs, their weights that are cold, the activations they move, attention of three sorts,
# pointwise work of four; and nanoseconds for each launch and each call.
FEATURES = (
    "gemm", "cold", "traffic", "attention", "cached attention", "unfused attention", "norm", "activation", "split",
    "elementwise", "launches", "call",
)  # fmt: skip
# The factors of kernels that run alone.
UNCORRECTED: dict[str, float] = {
    **dict.fromkeys(FEATURES, 1.0), "traffic": 0.0, "launches": 0.0, "call": 0.0
}  # fmt: skip
_ATTENTION_FEATURES = {FULL: "attention", FUSED: "cached attention", UNFUSED: "unfused attention"}
_FEATURE_OF = {
    "rms_norm": "norm", "layer_norm": "norm", "gelu": "activation", "silu": "activation", "split": "split",
    "add": "elementwise",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """What a sweep found on one device, with one runtime, in one dtype.

    Attributes:
        device: what the device calls itself.
        provider: ONNX Runtime's execution provider: `cpu` or `cuda`.
        threads: of a session's kernels; 0 where that means nothing.
        runtime: version of ONNX Runtime.
        dtype: of weights and activations.
        rows, inner, columns: the grid's axes.
        gemm_ns: (rows, inner, columns) nanoseconds, row by row; None where a point was too large to be swept.
        row_steps, column_steps: (rows, inner, columns) and nanoseconds of GEMMs at every row count, or every multiple
            of 8 columns, between points of the grid; see `steps_between`.
        cold_rows, cold_bytes: axes of the next, ascending: rows of a GEMM, and bytes of weights that a pass reads.
        cold_ns_per_byte: what each byte of weights costs more than in the nearest cache, row by row.
        attention: (batch, heads, kv heads, queries, keys, head size, which) and nanoseconds; see `kernels`.
        pointwise: function -> (elements moved, nanoseconds), ascending.
        memory_bytes: of the device.
        corrections: factor of each of `FEATURES`; nanoseconds for the last two.
        runs: the whole-model runs behind the corrections: name, features in ns, measured ns.
        pair_corrections, pair_runs: the same for factored pairs that run alone.
    """

    device: str
    provider: str
    threads: int
    runtime: str
    dtype: str
    rows: tuple[int, ...]
    inner: tuple[int, ...]
    columns: tuple[int, ...]
    gemm_ns: tuple[float | None, ...] = field(repr=False)
    cold_rows: tuple[float, ...]
    cold_bytes: tuple[float, ...]
    cold_ns_per_byte: tuple[float, ...]
    attention: tuple[tuple[tuple[int, ...], float], ...] = field(repr=False)
    pointwise: Mapping[str, tuple[tuple[float, float], ...]] = field(repr=False)
    memory_bytes: int
    corrections: Mapping[str, float]
    runs: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    pair_corrections: Mapping[str, float] = field(default_factory=lambda: dict(UNCORRECTED))
    pair_runs: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    row_steps: tuple[tuple[tuple[int, ...], float], ...] = field(default=(), repr=False)
    column_steps: tuple[tuple[tuple[int, ...], float], ...] = field(default=(), repr=False)

    def to_json(self) -> str:
        """As `read_table` reads it, with a hash over its content."""
        content = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()
        return (
            json.dumps({"format": FORMAT, "version": VERSION, "sha256": digest, "table": json.loads(content)}) + "\n"
        )


def read_table(path: Path) -> Table:
    """The table in a file.

    Raises:
        BadInput: naming the file, when it is missing, damaged or of another version.
    """
    again = "run `blora calibrate` again"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"there is no calibration table {path}; run `blora calibrate` on the device first") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"calibration table {path} is corrupt ({error}); {again}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BadInput(f"{path} is no calibration table; {again}")
    if data.get("version") != VERSION:
        raise BadInput(f"calibration table {path} has version {data.get('version')}, this reads {VERSION}; {again}")
    content = json.dumps(data.get("table"), sort_keys=True)
    if hashlib.sha256(content.encode()).hexdigest() != data.get("sha256"):
        raise BadInput(f"calibration table {path} is corrupt (its content does not match its hash); {again}")
    try:
        return _table_from_json(data["table"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"calibration table {path} is corrupt ({error!r}); {again}") from error


def _table_from_json(record: Mapping[str, Any]) -> Table:
    pointwise = {function: _pairs(points) for function, points in record["pointwise"].items()}
    listed = (
        "rows", "inner", "columns", "gemm_ns", "cold_rows", "cold_bytes", "cold_ns_per_byte", "runs", "pair_runs",
    )  # fmt: skip
    lists: dict[str, Any] = {name: tuple(record[name]) for name in listed}
    for name in ("attention", "row_steps", "column_steps"):
        lists[name] = tuple((tuple(shape), float(ns)) for shape, ns in record[name])
    return Table(**{**record, **lists, "pointwise": pointwise})


def _pairs(points: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    return tuple((float(a), float(b)) for a, b in points)


@dataclass(frozen=True, eq=False)  # compared by identity: prices are cached by clock
class MeasuredClock:
    """Times read from a table.

    Attributes:
        table: what was swept.
        working_set: bytes of weights that one pass of the model reads; 0 when unknown, and then all are cold.
        among: what runs beside a kernel, which decides the corrections: the rest of a `model`, the other GEMM of a
            `pair`, or `nothing`, which gives the kernels as they ran alone.
    """

    table: Table
    working_set: int = 0
    among: Literal["model", "pair", "nothing"] = "model"

    def time_ns(self, kernel: Kernel, dtype: str) -> int:
        """See `Clock`."""
        parts = self.features(kernel, dtype)
        factors = self._factors
        return max(1, round(sum(factors[name] * amount for name, amount in parts.items())))

    def limit(self, kernel: Kernel, dtype: str) -> Limit:
        """See `Clock`: what the time is nearest to, a launch alone, its bytes, or neither."""
        time = self.time_ns(kernel, dtype)
        if kernel.op == "session" or time < 2 * self._launch_ns:
            return "launch"
        width = DTYPE_BYTES[dtype]
        moved = self.features(kernel, dtype).get("cold", 0.0) + kernel.activations * width * self._ns_per_moved_byte
        if kernel.op == "gemm" and kernel.shape:
            # The same GEMM with few rows reads the same weights: what it takes is the reading.
            _, inner, columns = kernel.shape
            moved = max(moved, self._gemm_ns(1, inner, columns) + self.features(kernel, dtype)["cold"])
        return "bandwidth" if moved >= time / 2 else "compute"

    def for_working_set(self, weight_bytes: int) -> MeasuredClock:
        """See `Clock`."""
        return replace(self, working_set=weight_bytes)

    def features(self, kernel: Kernel, dtype: str) -> dict[str, float]:
        """The parts of a kernel's time before corrections, by name in `FEATURES`: ns, or how many launches or calls.

        Raises:
            BadInput: for a dtype that was not swept.
        """
        if dtype != self.table.dtype:
            raise BadInput(
                f"the calibration of {self.table.device} was swept in {self.table.dtype}, the workload is {dtype}; "
                f"run `blora calibrate --dtype {dtype}`, or plan with a workload in {self.table.dtype}"
            )
        match kernel.op:
            case "session":
                return {"call": 1.0}
            case "attention":
                sort = _ATTENTION_FEATURES[kernel.shape[6] if kernel.shape else FULL]
                parts = self._attention_parts(kernel)
                time = sum(self._attention_ns(part) for part in parts) or self._unknown_attention_ns(kernel)
                # What cuts a prompt and joins its parts again: splits of queries, keys, values, and one joint.
                copied = 2 * kernel.activations if len(parts) > 1 else 0
                found = {sort: time, "cold": self._cold_cache_ns(kernel), "launches": max(1.0, len(parts))}
                return found | ({"elementwise": _between(self.table.pointwise["add"], copied)} if copied else {})
            case "gemm":
                width = DTYPE_BYTES[dtype]
                cold = kernel.weights * width * self._cold_ns_per_byte(kernel)
                traffic = kernel.activations * width * self._ns_per_moved_byte
                return {"gemm": self._any_gemm_ns(kernel), "cold": cold, "traffic": traffic, "launches": 1.0}
        points = self.table.pointwise[kernel.function]
        return {_FEATURE_OF[kernel.function]: _between(points, kernel.activations), "launches": 1.0}

    # ── Reading the table ──

    @property
    def _factors(self) -> Mapping[str, float]:
        match self.among:
            case "model":
                return self.table.corrections
            case "pair":
                return self.table.pair_corrections
        return UNCORRECTED

    def _cold_cache_ns(self, kernel: Kernel) -> float:
        """What keys and values cost more that a step finds in memory: every layer has its own, so none stay near."""
        if not kernel.shape:
            return 0.0
        batch, _, kv_heads, queries, keys, size, which = kernel.shape
        if queries == keys:
            return 0.0  # a prompt's own keys have just been computed
        moved = 2 * batch * kv_heads * keys * size * DTYPE_BYTES[self.table.dtype]
        return _CACHE_PASSES[which] * moved * self._cold_penalty(1.0)

    @cached_property
    def _cold_grid(self) -> RegularGridInterpolator:
        axes = (np.log(self.table.cold_rows), np.log(self.table.cold_bytes))
        return RegularGridInterpolator(axes, np.reshape(self.table.cold_ns_per_byte, [len(axis) for axis in axes]))

    def _cold_ns_per_byte(self, kernel: Kernel) -> float:
        """At the working set, or when that is unknown at the largest one: then nothing stays in a cache."""
        return self._cold_penalty(kernel.shape[0] if kernel.shape else self.table.cold_rows[-1])

    def _cold_penalty(self, asked: float) -> float:
        rows, sizes = self.table.cold_rows, self.table.cold_bytes
        read = self.working_set or sizes[-1]
        inside = (min(max(asked, rows[0]), rows[-1]), min(max(read, sizes[0]), sizes[-1]))
        return float(self._cold_grid(np.log(inside))[0])

    @cached_property
    def _grids(self) -> tuple[RegularGridInterpolator, RegularGridInterpolator]:
        """Of GEMMs on one thread, and of those on several."""
        axes = (self.table.rows, self.table.inner, self.table.columns)
        times = np.array([np.nan if ns is None else ns for ns in self.table.gemm_ns], dtype=float)
        times = _filled(times.reshape([len(axis) for axis in axes]), axes)
        log_axes = [np.log(axis) for axis in axes]
        several = self._on_several_threads(_grid_work(self.table))
        one, many = (
            RegularGridInterpolator(log_axes, carried_on(np.log(_without_noise(times, side)), side, log_axes))
            for side in (~several, several)
        )
        return one, many

    def _on_several_threads(self, multiply_adds: Any) -> Any:
        """Whether a GEMM with so much work runs on more than one thread; of an array, element by element."""
        limit = _MOST_ON_ONE_THREAD if self.table.provider == "cpu" and self.table.threads != 1 else 0
        return np.asarray(multiply_adds) >= limit

    def _gemm_ns(self, rows: float, inner: float, columns: float) -> float:
        asked = (rows, inner, columns)
        axes = (self.table.rows, self.table.inner, self.table.columns)
        inside = [min(max(size, axis[0]), axis[-1]) for size, axis in zip(asked, axes, strict=True)]
        beyond = float(np.prod([size / near for size, near in zip(asked, inside, strict=True)]))
        grid = self._grids[int(self._on_several_threads(np.prod(inside)))]
        on_line = float(np.exp(grid(np.log(inside))[0])) * max(beyond, 1.0)
        return on_line * self._row_step(rows) * self._column_step(rows, columns)

    @cached_property
    def _row_steps(self) -> dict[int, float]:
        points = (
            (m, (k, n, bool(self._on_several_threads(m * k * n))), ns) for (m, k, n), ns in self.table.row_steps
        )
        return steps_between(points, self.table.rows)

    def _row_step(self, rows: float) -> float:
        """Off the line between two row counts of the grid; 1 on the grid, and beyond what was swept."""
        return self._row_steps.get(round(rows), 1.0)

    @cached_property
    def _column_steps(self) -> dict[int, dict[int, float]]:
        """Row count that was swept -> columns -> off the line."""
        points = self.table.column_steps
        found = {
            rows: steps_between(
                ((n, (k, bool(self._on_several_threads(m * k * n))), ns) for (m, k, n), ns in points if m == rows),
                self.table.columns,
            )
            for rows in sorted({shape[0] for shape, _ in points})
        }
        return {rows: steps for rows, steps in found.items() if steps}

    def _column_step(self, rows: float, columns: float) -> float:
        """Off the line between two numbers of columns of the grid, between the row counts that were swept.

        Beyond the last one what is left over is as much as there, and so a smaller share: of 8 columns too many, the
        tile that they start costs the same whatever the number of full ones.
        """
        if not self._column_steps:
            return 1.0
        swept = list(self._column_steps)
        factors = [_repeated(self._column_steps[count], round(columns)) for count in swept]
        return float(np.interp(np.log(rows), np.log(swept), factors))

    def _any_gemm_ns(self, kernel: Kernel) -> float:
        """A GEMM by its shape; one whose shape is unknown (experts, eager attention) at the rate of a square one."""
        if len(kernel.shape) == 3:
            return self._gemm_ns(*kernel.shape)
        side = max(1.0, (kernel.flops / 2) ** (1 / 3))
        return self._gemm_ns(side, side, side)

    @cached_property
    def _attention_weights(self) -> np.ndarray:
        shapes = np.array([_attention_features(shape) for shape, _ in self.table.attention])
        times = np.array([ns for _, ns in self.table.attention])
        weights, _ = nnls(shapes / times[:, None], np.ones(len(times)))
        return weights

    def _attention_parts(self, kernel: Kernel) -> list[tuple[int, ...]]:
        """The shapes in which attention is run: its own, or those of its parts; none where it is unknown."""
        if not kernel.shape or self.table.provider != "cpu":
            return [kernel.shape] if kernel.shape else []
        return attention_in_parts(kernel.shape)

    def _attention_ns(self, shape: Sequence[int]) -> float:
        return float(_attention_features(shape) @ self._attention_weights)

    def _unknown_attention_ns(self, kernel: Kernel) -> float:
        side = max(1.0, (kernel.flops / 4) ** (1 / 3))
        return 2 * self._gemm_ns(side, side, side)

    @cached_property
    def _launch_ns(self) -> float:
        return min(ns for ns in self.table.gemm_ns if ns is not None)

    @cached_property
    def _ns_per_moved_byte(self) -> float:
        elements, ns = self.table.pointwise["add"][-1]
        return ns / (elements * DTYPE_BYTES[self.table.dtype])


def fit_corrections(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Factors that bring the sums of kernels to measured times of whole models, none below zero.

    Args:
        runs: each with `features` (name -> ns, launches and calls in number) and `measured_ns`. Runs far slower than
            others must not decide alone, so the errors are relative.

    A kind of work that the runs do not tell apart from the others keeps a factor near 1: the fit is pulled there.
    """
    rows = np.array([[run["features"].get(name, 0.0) for name in FEATURES] for run in runs])
    measured = np.array([run["measured_ns"] for run in runs])
    start = np.array([UNCORRECTED[name] for name in FEATURES])
    pull = np.diag([_PULL if UNCORRECTED[name] else 0.0 for name in FEATURES])
    relative, weights = rows / measured[:, None], np.ones(len(measured))
    for _ in range(_REWEIGHTINGS):
        matrix = np.vstack([relative * weights[:, None], pull])
        target = np.concatenate([weights, pull @ start])
        factors, _ = nnls(matrix, target)
        error = np.abs(relative @ factors - 1)
        weights = np.sqrt(np.minimum(1.0, _USUAL_ERROR / np.maximum(error, 1e-9)))  # Huber's
    return {name: float(factor) for name, factor in zip(FEATURES, factors, strict=True)}


# How often the cache crosses the memory in a step: in and, one token longer, out; and where exporters leave attention
# unfused, turned around twice more on the way.
_CACHE_PASSES = {FULL: 0, FUSED: 2, UNFUSED: 6}
# As much as one run whose error is a tenth of the factor's distance from 1.
_PULL = 0.1
# A run that misses by more than the usual error counts by its distance, not by its square: it met other work.
_USUAL_ERROR = 0.1
_REWEIGHTINGS = 8


def _attention_features(shape: Sequence[int]) -> np.ndarray:
    """What attention's time is made of: a launch, per head, FLOPs, scores, keys and values; each sort apart."""
    batch, heads, kv_heads, queries, keys, size, which = shape
    scores = batch * heads * queries * keys
    parts = np.array([1.0, batch * heads, 4.0 * scores * size, scores, 2.0 * batch * kv_heads * keys * size,
                      2.0 * batch * heads * queries * size])  # fmt: skip
    return np.concatenate([parts * (which == sort) for sort in (FULL, FUSED, UNFUSED)])


# As `passes.AttendInParts` does: how many parts, and from how many tokens on.
ATTENTION_PARTS, ATTENTION_PARTS_FROM = 4, 192


def attention_in_parts(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The kernels of one attention on a CPU: a long prompt on its own is cut, each part sees what is before it."""
    batch, heads, kv_heads, queries, keys, size, which = shape
    if which != FUSED or batch > 1 or queries != keys or queries < ATTENTION_PARTS_FROM:
        return [shape]
    each = queries // ATTENTION_PARTS
    ends = [*(each * number for number in range(1, ATTENTION_PARTS)), queries]
    starts = [0, *ends[:-1]]
    return [(batch, heads, kv_heads, end - start, end, size, which) for start, end in zip(starts, ends, strict=True)]


def _between(points: Sequence[tuple[float, float]], amount: float) -> float:
    """Linear between the points, by proportion beyond the last."""
    sizes, times = zip(*points, strict=True)
    if amount >= sizes[-1]:
        return times[-1] * amount / sizes[-1]
    return float(np.interp(amount, sizes, times))


def _grid_work(table: Table) -> np.ndarray:
    """Multiply-adds of each point of the grid."""
    work: np.ndarray = np.multiply.outer(np.multiply.outer(table.rows, table.inner), table.columns)
    return work


def _without_noise(times: np.ndarray, side: np.ndarray) -> np.ndarray:
    """No GEMM takes longer than one that is larger along an axis; noise only adds time, so the larger's stands.

    That holds among the points of one side of the limit that a second thread has; the others are left alone.
    """
    every = times
    times = np.where(side, times, np.nan)
    for axis in range(times.ndim):
        times = np.flip(np.fmin.accumulate(np.flip(times, axis), axis), axis)
    return np.where(side, times, every)


def _filled(times: np.ndarray, axes: Sequence[Sequence[int]]) -> np.ndarray:
    """Points that were too large to sweep, at the FLOP rate of the nearest smaller one along each axis in turn."""
    for axis, sizes in enumerate(axes):
        for position in range(1, len(sizes)):
            here = np.take(times, position, axis)
            before = np.take(times, position - 1, axis) * sizes[position] / sizes[position - 1]
            index: list[Any] = [slice(None)] * times.ndim
            index[axis] = position
            times[tuple(index)] = np.where(np.isnan(here), before, here)
    return times


# ONNX Runtime's CPU GEMM takes a thread for every 65,536 multiply-adds that it has begun, as far as there are any.
_MOST_ON_ONE_THREAD = 65_536
# A query near the limit lies in a cell whose corners are at most a step along each axis beyond it.
_STEPS_BEYOND = 3


def carried_on(logs: np.ndarray, known: np.ndarray, axes: Sequence[np.ndarray]) -> np.ndarray:
    """Points next to the known ones, on the straight lines through the last two known points along each axis.

    Args:
        logs: logarithms of times, over the axes; points too far from the known ones keep theirs.
        known: which of them may be gone by.
        axes: logarithms of the sizes.

    Times along a line neither fall with the size nor grow faster than it.
    """
    found = np.where(known, logs, np.nan)
    for _ in range(_STEPS_BEYOND):
        guesses = [_along(found, axis, sizes) for axis, sizes in enumerate(axes)]
        guesses += [np.flip(_along(np.flip(found, a), a, sizes[::-1]), a) for a, sizes in enumerate(axes)]
        count = np.sum([~np.isnan(guess) for guess in guesses], axis=0)
        mean = np.nansum(guesses, axis=0) / np.maximum(count, 1)
        found = np.where(np.isnan(found) & (count > 0), mean, found)
    return np.where(np.isnan(found), logs, found)


def _along(logs: np.ndarray, axis: int, sizes: np.ndarray) -> np.ndarray:
    """What the two points before each one along an axis say about it; not a number where one of them is unknown."""
    values = np.moveaxis(logs, axis, -1)
    guess = np.full_like(values, np.nan)
    slope = np.clip(np.diff(values, axis=-1) / np.diff(sizes), 0.0, 1.0)
    guess[..., 2:] = values[..., 1:-1] + slope[..., :-1] * np.diff(sizes)[1:]
    return np.moveaxis(guess, -1, axis)


def steps_between(points: Iterable[tuple[int, tuple[int, ...], float]], grid: Sequence[int]) -> dict[int, float]:
    """How far times lie off the line between the two sizes of a grid around them, in the logarithms.

    Args:
        points: a size, what the point has in common with others of its series, and nanoseconds.
        grid: sizes at which the lines begin and end; a series is compared with its own times there, so that a
            machine that was slower meanwhile does not matter.

    Returns:
        Size -> the median over the series of time over time on the line; 1 on the grid.
    """
    series: dict[tuple[int, ...], dict[int, float]] = {}
    for size, of_series, ns in points:
        series.setdefault(of_series, {})[size] = ns
    logs: dict[int, list[float]] = {}
    for times in series.values():
        ends = [size for size in sorted(times) if size in grid]
        for size in (size for size in times if ends and ends[0] <= size <= ends[-1]):
            line = np.interp(np.log(size), np.log(ends), np.log([times[end] for end in ends]))
            logs.setdefault(size, []).append(float(np.log(times[size]) - line))
    return {size: float(np.exp(np.median(values))) for size, values in logs.items()}


# Tiles of columns are at most so wide, and a divisor of it.
_WIDEST_TILE = 64


def _repeated(steps: Mapping[int, float], size: int) -> float:
    """The factor at a size; beyond the last, that of the largest size as far into a tile, on as many columns."""
    last = max(steps)
    if size <= last:
        return steps.get(size, 1.0)
    like = size - _WIDEST_TILE * -(-(size - last) // _WIDEST_TILE)
    return 1.0 + (steps.get(like, 1.0) - 1.0) * like / size


def with_warm_weights(table: Table, read_bytes: Callable[[int, int], float]) -> Table:
    """GEMMs whose weights were too many for the cache when they were swept, less what reading these took.

    Otherwise `cold` would count that reading again.

    Args:
        table: with GEMMs as they were timed.
        read_bytes: (inner, columns) -> bytes of weights that a pass of the sweep read.

    No GEMM comes out faster than one that is smaller along an axis and runs on as many threads.
    """
    axes = (table.rows, table.inner, table.columns)
    width = DTYPE_BYTES[table.dtype]
    times = np.array([np.nan if ns is None else ns for ns in table.gemm_ns], dtype=float)
    times = times.reshape([len(axis) for axis in axes])
    several = MeasuredClock(table)._on_several_threads(_grid_work(table))
    times = np.where(several, _without_noise(times, several), _without_noise(times, ~several))
    for (i, inner), (j, columns) in product(enumerate(table.inner), enumerate(table.columns)):
        clock = MeasuredClock(table, max(1, round(read_bytes(inner, columns))))
        for r, rows in enumerate(table.rows):
            times[r, i, j] -= width * inner * columns * clock._cold_penalty(rows)
    times = np.where(np.isnan(times), np.nan, np.maximum(times, 1.0))
    for side in (several, ~several):
        grown = np.where(side, times, np.nan)
        for axis in range(times.ndim):
            grown = np.fmax.accumulate(grown, axis)
        times = np.where(side & ~np.isnan(times), grown, times)
    swept = [ns is not None for ns in table.gemm_ns]
    kept = zip(times.ravel(), swept, strict=True)
    return replace(table, gemm_ns=tuple(float(ns) if known else None for ns, known in kept))


def device_of(table: Table) -> Device:
    """What a calibrated device can do, in the terms of a profile: its best GEMM, its bytes, its launches.

    With weights that outgrow the caches, the time of their reading was taken off. With few rows that is nearly all of
    it, and what is left is noise: so the best GEMM is one of many rows, and the best reading one that caches hold.
    """
    width = DTYPE_BYTES[table.dtype]
    points = [(m, k, n, ns) for (m, k, n), ns in _points(table) if ns is not None]
    most_rows = max(m for m, *_ in points)
    peak = max(2e9 * m * k * n / ns for m, k, n, ns in points if m == most_rows)
    reads = [(width * k * n, ns) for m, k, n, ns in points if m == table.rows[0]]
    held = [(size, ns) for size, ns in reads if size <= table.cold_bytes[0]]
    hot = max(1e9 * size / ns for size, ns in held or reads)
    few_rows = table.cold_ns_per_byte[: len(table.cold_bytes)]
    cold = 1e9 / (1e9 / hot + few_rows[-1])
    pairs = zip(table.cold_bytes, few_rows, strict=True)
    kept = max((size for size, penalty in pairs if penalty < 0.5 * few_rows[-1]), default=0.0)
    return Device(
        name=THIS_CUDA if table.provider == "cuda" else THIS, title=table.device, provider=table.provider,
        measured=True, dtype=table.dtype,
        source=f"calibrated on this machine with ONNX Runtime {table.runtime}", peak_flops={table.dtype: peak},
        bandwidth=cold, memory_bytes=table.memory_bytes, launch_ns=min(ns for *_, ns in points),
        session_ns=table.corrections["call"], cache_bytes=int(kept), cache_bandwidth=hot, units=1,
        tiles=((1, 1, 1.0),), depth=0.0, align=8, misaligned=1.0, efficiency=1.0, attention_efficiency=1.0,
    )  # fmt: skip


def _points(table: Table) -> list[tuple[tuple[int, int, int], float | None]]:
    shapes = [(m, k, n) for m in table.rows for k in table.inner for n in table.columns]
    return list(zip(shapes, table.gemm_ns, strict=True))
