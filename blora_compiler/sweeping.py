"""Sweep a device: time single kernels with ONNX Runtime, the runtime that ships, at the points of a table.

Each point is a graph of several equal nodes with weights of their own, so that one run is long enough to time and no
weight is found in the nearest cache. A sweep writes every point down as it goes and goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from .artifact import CORES, PROVIDERS, check_provider, session_options
from .cost_models.kernels import FULL, FUSED, UNFUSED
from .errors import BadInput
from .timing import bound_call

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SIZES = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
# Each GEMM is timed in so many passes over the grid, minutes apart: what disturbs one seldom disturbs the other.
PASSES = 2
SMALL_ROWS, SMALL_SIZES = (1, 16, 128), (16, 64, 256)  # for tests: seconds instead of minutes
# Where times step between the points of the grid: every row count of a few weights, and every multiple of 8 columns
# at a few row counts.
STEP_ROWS, STEP_WEIGHTS = range(1, 65), ((160, 96), (256, 512), (768, 64), (1024, 256))
STEP_COLUMNS, STEPS_AT_ROWS, STEPS_INNER = range(8, 257, 8), (1, 4, 16, 128), (96, 192, 512)
# Pairs that run alone: rows, and (inner, rank, columns). Ranks may lie off the grid, as planned ones do.
PAIR_ROWS = (1, 3, 10, 44, 180, 700)
PAIR_SIZES = ((112, 40, 176), (208, 24, 1120), (1120, 56, 136), (480, 88, 640), (896, 232, 1440), (2016, 152, 448))
# Points longer than this are left to the table's own extrapolation at a constant rate.
LONGEST_NS = 3e8
_HOT_BYTES, _COLD_BYTES, _ROWS_THAT_HIDE_WEIGHTS = 2 << 20, 96 << 20, 64
_COLD_ROWS = (1, 4, 16, 64, 256)
_COLD_SIZES_MB = (2, 4, 6, 8, 16, 32, 48, 96, 256)
_TENSOR_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
_NUMPY_TYPES = {"float32": np.float32, "float16": np.float16}
_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Place:
    """Where a sweep runs.

    Attributes:
        provider: `cpu` or `cuda`.
        dtype: of weights and activations.
        threads: of a session's kernels; 0 leaves the choice to ONNX Runtime.
    """

    provider: str = "cpu"
    dtype: str = "float32"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise BadInput(f"provider is {self.provider!r}; use 'cpu' or 'cuda'")
        if self.dtype not in _TENSOR_TYPES:
            raise BadInput(f"dtype is {self.dtype!r}; a sweep runs in {' or '.join(_TENSOR_TYPES)}")
        if (self.provider, self.dtype) == ("cuda", "float32"):
            raise BadInput(
                "CUDA has no kernel for grouped queries in float32, and ONNX Runtime would run them on the CPU; "
                "sweep in float16: `blora calibrate --target cuda --dtype float16`"
            )
        if not 0 <= self.threads <= (len(CORES) or self.threads):
            raise BadInput(f"threads is {self.threads}; give 1 to {len(CORES)}, or 0 to leave it to ONNX Runtime")
        check_provider(self.provider)

    @property
    def numpy_type(self) -> Any:
        """Of weights and activations."""
        return _NUMPY_TYPES[self.dtype]

    @property
    def device_name(self) -> str:
        """What the device calls itself."""
        return cuda_name() if self.provider == "cuda" else cpu_name()

    def identity(self) -> dict[str, Any]:
        """What must be equal for two sweeps to be one."""
        return {
            "device": self.device_name, "provider": self.provider, "threads": self.threads,
            "runtime": onnxruntime.__version__, "dtype": self.dtype,
        }  # fmt: skip


def cpu_name() -> str:
    """The processor's model name and its number of usable cores."""
    import platform

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        name = next(lines, f":{name}").partition(":")[2].strip()
    return f"{name}, {len(CORES) or os.cpu_count()} cores"


def cuda_name() -> str:
    """The first CUDA device's name, as torch knows it."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CUDA device"


def memory_bytes(provider: str) -> int:
    """Memory of the device."""
    if provider == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ── Points already swept ─────────────────────────────────────────────────────────────────────────────────────────


class Journal:
    """Key -> nanoseconds, one line of JSON a point, so that an interrupted sweep goes on where it stopped."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self.points: dict[str, float | None] = {}
        self.restarted: str | None = None
        if path.exists():
            self._read(identity)
        if not self.points:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(identity) + "\n", encoding="utf-8")

    def _read(self, identity: dict[str, Any]) -> None:
        lines = path_lines(self._path)
        if not lines or lines[0] != identity:
            self.restarted = f"{self._path} is of another device, runtime or dtype: swept again from the start"
            return
        self.points = {line["key"]: line["ns"] for line in lines[1:] if set(line) == {"key", "ns"}}
        if not self._path.read_text(encoding="utf-8").endswith("\n"):  # cut off; the next point needs its own line
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write("\n")

    def get(self, key: str, measure: Callable[[], float | None]) -> float | None:
        """The point's time, measured now if it never was."""
        if key not in self.points:
            self.points[key] = measure()
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": key, "ns": self.points[key]}) + "\n")
        return self.points[key]


def path_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a line that was cut off while it was written is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


# ── Graphs of equal nodes ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Stack:
    """A session over several equal nodes, and their number."""

    session: onnxruntime.InferenceSession
    nodes: int
    place: Place

    def time_ns(self, feeds: dict[str, np.ndarray], call_ns: float = 0.0) -> float:
        """Nanoseconds of one node left undisturbed, the cost of the call taken off."""
        call = bound_call(self.session, feeds, self.place.provider)
        return max(1.0, (undisturbed_ns(call) - call_ns) / self.nodes)


def undisturbed_ns(call: Callable[[], Any], least_seconds: float = 0.012, least_runs: int = 4) -> float:
    """Lower quartile over repeats, after two warm-ups; more repeats for what is short.

    Other work on the machine only ever adds time, and a point of the table is read by every later prediction.
    """
    call()
    call()
    seconds: list[float] = []
    while len(seconds) < least_runs or (sum(seconds) < least_seconds and len(seconds) < 400):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return 1e9 * statistics.quantiles(seconds, n=4)[0]


def _session(
    place: Place,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[onnx.TensorProto] = (),
) -> onnxruntime.InferenceSession:
    graph = helper.make_graph(list(nodes), "sweep", list(inputs), list(outputs), list(constants))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    # Kernels are timed as they run in the middle of a model, where no thread has to wake up first.
    options = session_options(place.threads, pinned=True, alone=True)
    if place.provider != "cpu":  # a kernel that the device lacks must not be timed on the CPU instead
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDERS[place.provider]])


def _value(place: Place, name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _TENSOR_TYPES[place.dtype], list(shape))


def _random(place: Place, *shape: int) -> np.ndarray:
    """Small values of either sign: no denormals, no overflow in float16, and as many bits that differ from value to
    value as a model has (a GPU multiplies alike numbers faster, since it draws less power)."""
    random = np.random.default_rng(0)
    values = random.uniform(0.01, 0.02, 8191) * random.choice((-1.0, 1.0), 8191)
    return np.resize(values.astype(place.numpy_type), shape)


def call_cost_ns(place: Place) -> float:
    """What a call of a session costs with next to nothing in it."""
    node = helper.make_node("Identity", ["x"], ["y"])
    session = _session(place, [node], [_value(place, "x", [1])], [_value(place, "y", [1])])
    return undisturbed_ns(bound_call(session, {"x": _random(place, 1)}, place.provider), least_runs=200)


def gemm_stack(place: Place, inner: int, columns: int, nodes: int) -> Stack:
    """GEMMs with weights of their own, all reading one input (rows x inner)."""
    weights = _random(place, nodes + inner * columns)  # windows that differ: equal constants become one
    constants = [
        numpy_helper.from_array(weights[i : i + inner * columns].reshape(inner, columns), f"w{i}")
        for i in range(nodes)
    ]
    products = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(nodes)]
    outputs = [_value(place, f"y{i}", ["rows", columns]) for i in range(nodes)]
    return Stack(_session(place, products, [_value(place, "x", ["rows", inner])], outputs, constants), nodes, place)


@dataclass(frozen=True)
class GemmSequence:
    """A session over GEMMs of any shapes, one after the other, and inputs for them."""

    stack: Stack
    feeds: dict[str, np.ndarray]

    def time_ns(self, call_ns: float = 0.0) -> float:
        """Nanoseconds of all of them left undisturbed, the cost of the call taken off."""
        return self.stack.time_ns(self.feeds, call_ns)


def gemm_sequence(place: Place, products: Sequence[Sequence[int]]) -> GemmSequence:
    """GEMMs (rows, inner, columns) with weights of their own; those of one size read the same input."""
    feeds = {f"x{rows}_{inner}": _random(place, rows, inner) for rows, inner, _ in products}
    longest = max(inner * columns for _, inner, columns in products)
    weights = _random(place, len(products) + longest)  # windows that differ: equal constants become one
    constants = [
        numpy_helper.from_array(weights[i : i + inner * columns].reshape(inner, columns), f"w{i}")
        for i, (_, inner, columns) in enumerate(products)
    ]
    nodes = [
        helper.make_node("MatMul", [f"x{rows}_{inner}", f"w{i}"], [f"y{i}"])
        for i, (rows, inner, _) in enumerate(products)
    ]
    inputs = [_value(place, name, value.shape) for name, value in feeds.items()]
    outputs = [_value(place, f"y{i}", [rows, columns]) for i, (rows, _, columns) in enumerate(products)]
    return GemmSequence(Stack(_session(place, nodes, inputs, outputs, constants), 1, place), feeds)


def gemm_alone_ns(place: Place, product: Sequence[int], call_ns: float, weight_bytes: int) -> float:
    """Nanoseconds of one GEMM among nothing but its like: the fastest of some passes, each with a session of its own.

    Args:
        place: provider, dtype and threads.
        product: (rows, inner, columns).
        call_ns: what a call costs (`call_cost_ns`), taken off.
        weight_bytes: of the model it is taken from. Few rows wait for their weights, so as many of them take turns
            as fill that, up to 96 MB; many rows do not.
    """
    rows, inner, columns = product
    nodes = stack_nodes(place, inner * columns)
    if rows < _ROWS_THAT_HIDE_WEIGHTS:
        each = np.dtype(place.numpy_type).itemsize * inner * columns
        nodes = max(nodes, min(256, min(weight_bytes, _COLD_BYTES) // each))
    feeds = {"x": _random(place, rows, inner)}
    return min(gemm_stack(place, inner, columns, nodes).time_ns(feeds, call_ns) for _ in range(PASSES))


def stack_nodes(place: Place, weights: int) -> int:
    """How many nodes a stack has whose nodes have so many weights each: 2 MB in all, where 2 to 32 nodes can be."""
    return min(32, max(2, _HOT_BYTES // (np.dtype(place.numpy_type).itemsize * weights)))


def stack_bytes(place: Place, inner: int, columns: int) -> float:
    """Bytes of weights that a run of the sweep's stack of GEMMs reads."""
    return float(stack_nodes(place, inner * columns) * np.dtype(place.numpy_type).itemsize * inner * columns)


def pair_stack(place: Place, inner: int, rank: int, columns: int, nodes: int) -> Stack:
    """Factored pairs with weights of their own, all reading one input (rows x inner)."""
    firsts, seconds = _random(place, nodes + inner * rank), _random(place, nodes + rank * columns)
    constants, products = [], []
    for i in range(nodes):
        constants += [
            numpy_helper.from_array(firsts[i : i + inner * rank].reshape(inner, rank), f"a{i}"),
            numpy_helper.from_array(seconds[i : i + rank * columns].reshape(rank, columns), f"b{i}"),
        ]
        products += [
            helper.make_node("MatMul", ["x", f"a{i}"], [f"h{i}"]),
            helper.make_node("MatMul", [f"h{i}", f"b{i}"], [f"y{i}"]),
        ]
    outputs = [_value(place, f"y{i}", ["rows", columns]) for i in range(nodes)]
    session = _session(place, products, [_value(place, "x", ["rows", inner])], outputs, constants)
    return Stack(session, nodes, place)


_POINTWISE = {
    "rms_norm": ("SkipSimplifiedLayerNormalization", _MICROSOFT, {}),
    "layer_norm": ("SkipLayerNormalization", _MICROSOFT, {}),
    "gelu": ("Gelu", _MICROSOFT, {}),
    "silu": ("QuickGelu", _MICROSOFT, {"alpha": 1.0}),
    "add": ("Add", "", {}),
}


def pointwise_stack(place: Place, width: int, nodes: int, function: str) -> Stack:
    """A chain of one pointwise function as the shipped graphs run it, norms with the addition in front; or splits."""
    constants = [numpy_helper.from_array(_random(place, width), name) for name in ("w", "b")]
    if function == "split":
        constants = [numpy_helper.from_array(np.array([width // 2, width - width // 2]), "sizes")]
        names = [[f"y{i}", f"z{i}"] for i in range(nodes)]
        chain = [helper.make_node("Split", ["x0", "sizes"], pair, axis=-1) for pair in names]
        outputs = [_value(place, name, ["rows", width // 2]) for pair in names for name in pair]
        return Stack(_session(place, chain, [_value(place, "x0", ["rows", width])], outputs, constants), nodes, place)
    op, domain, attributes = _POINTWISE[function]
    extra = {"rms_norm": ["w"], "layer_norm": ["w", "b"]}.get(function, [])

    def node(i: int) -> onnx.NodeProto:
        inputs = [f"x{i}"] if function in ("gelu", "silu") else [f"x{i}", "x0", *extra]
        return helper.make_node(op, inputs, [f"x{i + 1}"], domain=domain, **attributes)

    value = [_value(place, name, ["rows", width]) for name in ("x0", f"x{nodes}")]
    used = [constant for constant in constants if constant.name in extra]
    return Stack(_session(place, [node(i) for i in range(nodes)], value[:1], value[1:], used), nodes, place)


def attention_stack(place: Place, shape: Sequence[int], nodes: int = 2) -> tuple[Stack, dict[str, np.ndarray]]:
    """Attention as the shipped graphs run it: multi-head without a cache, grouped queries behind one, or products.

    Args:
        shape: (batch, heads, kv heads, queries, keys, head size, which); see `cost_models.kernels`.
    """
    make = {FULL: _full_attention, FUSED: _fused_attention, UNFUSED: _unfused_attention}[shape[6]]
    feeds, step, results = make(place, shape)
    types = {np.dtype(np.int32): TensorProto.INT32, np.dtype(place.numpy_type): _TENSOR_TYPES[place.dtype]}
    values = [helper.make_tensor_value_info(n, types[a.dtype], list(a.shape)) for n, a in feeds.items()]
    products = [node for i in range(nodes) for node in step(i)]
    outputs = [_value(place, f"{name}{i}", dims) for i in range(nodes) for name, dims in results.items()]
    return Stack(_session(place, products, values, outputs), nodes, place), feeds


_Attention = tuple[
    dict[str, np.ndarray], Callable[[int], list[onnx.NodeProto]], dict[str, list[int]]
]  # inputs; the nodes of the i-th copy; outputs of a copy and their shapes


def _full_attention(place: Place, shape: Sequence[int]) -> _Attention:
    batch, heads, _, queries, keys, size, _ = shape
    feeds = {"q": _random(place, batch, queries, heads * size)}
    feeds |= {name: _random(place, batch, keys, heads * size) for name in ("k", "v")}

    def step(i: int) -> list[onnx.NodeProto]:
        node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], [f"y{i}"], domain=_MICROSOFT, num_heads=heads)
        return [node]

    return feeds, step, {"y": [batch, queries, heads * size]}


def _fused_attention(place: Place, shape: Sequence[int]) -> _Attention:
    batch, heads, kv_heads, queries, keys, size, _ = shape
    past = keys - queries
    feeds = {"q": _random(place, batch, queries, heads * size)}
    feeds |= {name: _random(place, batch, queries, kv_heads * size) for name in ("k", "v")}
    feeds |= {"lengths": np.full(batch, keys - 1, np.int32), "total": np.array([keys], np.int32)}
    if past:
        feeds |= {name: _random(place, batch, kv_heads, past, size) for name in ("past_k", "past_v")}
    inputs = ["q", "k", "v", "past_k" if past else "", "past_v" if past else "", "lengths", "total"]
    if place.provider == "cpu":  # the shipped CPU graphs hand the mask over as a bias
        feeds["bias"] = np.zeros((batch, 1, queries, keys), place.numpy_type)
        inputs += ["", "", "", "bias"]

    def step(i: int) -> list[onnx.NodeProto]:
        outputs = [f"y{i}", f"present_k{i}", f"present_v{i}"]
        return [
            helper.make_node("GroupQueryAttention", inputs, outputs, domain=_MICROSOFT,
                             num_heads=heads, kv_num_heads=kv_heads)
        ]  # fmt: skip

    cache = [batch, kv_heads, keys, size]
    return feeds, step, {"y": [batch, queries, heads * size], "present_k": cache, "present_v": cache}


def _unfused_attention(place: Place, shape: Sequence[int]) -> _Attention:
    """As exported GPT-2s keep it: keys and values go through (batch, tokens, width) on their way to the products.

    The reshapes in between keep ONNX Runtime from cancelling the transposes, here as there.
    """
    batch, heads, _, queries, keys, size, _ = shape
    past = keys - queries
    feeds = {name: _random(place, batch, heads, queries, size) for name in ("q", "k", "v")}
    feeds |= {f"past_{name}": _random(place, batch, heads, past, size) for name in ("k", "v")} if past else {}
    feeds["bias"] = np.zeros((batch, 1, queries, keys), place.numpy_type)

    def turned(source: str, result: str, order: list[int]) -> onnx.NodeProto:
        return helper.make_node("Transpose", [source], [result], perm=order)

    def constant(name: str, values: list[int]) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value_ints=values)

    def prepared(name: str, i: int, order: list[int]) -> list[onnx.NodeProto]:
        """The cache that goes out, and keys or values as the products want them."""
        kept, flat, apart = f"present_{name}{i}", f"flat_{name}{i}", f"apart_{name}{i}"
        grown = helper.make_node("Concat", [f"past_{name}", name] if past else [name], [kept], axis=2)
        return [
            grown, turned(kept, f"tokens_{name}{i}", [0, 2, 1, 3]),
            constant(f"wide_{name}{i}", [0, 0, heads * size]), constant(f"heads_{name}{i}", [0, 0, heads, size]),
            helper.make_node("Reshape", [f"tokens_{name}{i}", f"wide_{name}{i}"], [flat]),
            helper.make_node("Reshape", [flat, f"heads_{name}{i}"], [apart]),
            turned(apart, f"ready_{name}{i}", order),
        ]  # fmt: skip

    def step(i: int) -> list[onnx.NodeProto]:
        return [
            *prepared("k", i, [0, 2, 3, 1]), *prepared("v", i, [0, 2, 1, 3]),
            helper.make_node("MatMul", ["q", f"ready_k{i}"], [f"scores{i}"]),
            helper.make_node("Add", [f"scores{i}", "bias"], [f"biased{i}"]),
            helper.make_node("Softmax", [f"biased{i}"], [f"shares{i}"], axis=-1),
            helper.make_node("MatMul", [f"shares{i}", f"ready_v{i}"], [f"y{i}"]),
        ]  # fmt: skip

    cache = [batch, heads, keys, size]
    return feeds, step, {"y": [batch, heads, queries, size], "present_k": cache, "present_v": cache}


# ── The sweep ────────────────────────────────────────────────────────────────────────────────────────────────────


def sweep_gemms(
    place: Place,
    journal: Journal,
    rows: Sequence[int],
    sizes: Sequence[int],
    call_ns: float,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[tuple[int, int, int], float | None]:
    """(rows, inner, columns) -> nanoseconds of one GEMM with its weights in the cache; None where it takes too long.

    Of the passes the fastest counts.
    """
    found: dict[tuple[int, int, int], float | None] = {}
    for number in range(1, PASSES + 1):
        for inner, columns in product(sizes, sizes):
            if columns == sizes[0]:
                tell(f"GEMMs, pass {number} of {PASSES}, inner size {inner}")
            for shape, time_ns in _sweep_rows(place, journal, rows, (inner, columns), number, call_ns):
                times = [time for time in (found.get(shape), time_ns) if time is not None]
                found[shape] = min(times, default=None)
    return found


def _sweep_rows(
    place: Place, journal: Journal, rows: Sequence[int], weight: tuple[int, int], number: int, call_ns: float
) -> Iterator[tuple[tuple[int, int, int], float | None]]:
    """One weight's GEMMs with ever more rows, until they take too long."""
    inner, columns = weight
    stack: Stack | None = None
    longest: float | None = 0.0
    for count in rows:
        key = f"gemm {number} {count} {inner} {columns}"
        if longest is None or 2 * longest > LONGEST_NS:
            longest = journal.get(key, lambda: None)
        else:
            if key not in journal.points:
                stack = stack or gemm_stack(place, inner, columns, stack_nodes(place, inner * columns))
            longest = journal.get(key, partial(_time_rows, stack, count, inner, call_ns))
        yield (count, inner, columns), longest


def _time_rows(stack: Stack | None, rows: int, inner: int, call_ns: float) -> float:
    assert stack is not None
    return stack.time_ns({"x": _random(stack.place, rows, inner)}, call_ns)


def sweep_steps(place: Place, journal: Journal, number: int, call_ns: float) -> dict[tuple[int, int, int], float]:
    """(rows, inner, columns) -> nanoseconds, one pass of so many: every row count, every multiple of 8 columns."""
    by_weight: dict[tuple[int, int], Sequence[int]] = dict.fromkeys(product(STEPS_INNER, STEP_COLUMNS), STEPS_AT_ROWS)
    by_weight |= dict.fromkeys(STEP_WEIGHTS, STEP_ROWS)
    found = {}
    for (inner, columns), rows in by_weight.items():
        stack: Stack | None = None
        for count in rows:
            key = f"step {number} {count} {inner} {columns}"
            if key not in journal.points:
                stack = stack or gemm_stack(place, inner, columns, stack_nodes(place, inner * columns))
            found[count, inner, columns] = journal.get(key, partial(_time_rows, stack, count, inner, call_ns)) or 1.0
    return found


def sweep_pairs(
    place: Place, journal: Journal, number: int, call_ns: float
) -> dict[tuple[int, int, int, int], tuple[float, float]]:
    """(rows, inner, rank, columns) -> nanoseconds of one pair, and bytes of weights that a run reads; one pass."""
    found = {}
    width = np.dtype(place.numpy_type).itemsize
    for inner, rank, columns in PAIR_SIZES:
        weights = rank * (inner + columns)
        nodes = stack_nodes(place, weights)
        stack: Stack | None = None
        for count in PAIR_ROWS:
            key = f"pair {number} {count} {inner} {rank} {columns}"
            if key not in journal.points:
                stack = stack or pair_stack(place, inner, rank, columns, nodes)
            time_ns = journal.get(key, partial(_time_rows, stack, count, inner, call_ns)) or 1.0
            found[count, inner, rank, columns] = (time_ns, float(nodes * width * weights))
    return found


def sweep_residency(
    place: Place, journal: Journal, sizes_mb: Sequence[int] = _COLD_SIZES_MB, rows: Sequence[int] = _COLD_ROWS
) -> dict[str, Any]:
    """What a byte of weights costs more when so many others are read before it comes up again in the next pass.

    Returns:
        `cold_rows` and `cold_bytes`, the axes, and `cold_ns_per_byte` over them, row by row. More bytes never cost
        less: where noise says so, the larger cost of fewer bytes stands.
    """
    width = np.dtype(place.numpy_type).itemsize
    side = 512
    per_weight = width * side * side
    times = np.zeros((len(rows), len(sizes_mb)))
    for column, size in enumerate(sizes_mb):
        stack: Stack | None = None
        for row, count in enumerate(rows):
            found = []
            for number in range(1, PASSES + 1):
                key = f"residency {number} {size} {count}"
                if key not in journal.points:
                    stack = stack or gemm_stack(place, side, side, max(2, size * 2**20 // per_weight))
                found.append(journal.get(key, partial(_time_rows, stack, count, side, 0.0)) or 0.0)
            times[row, column] = min(found)
    extra = np.maximum.accumulate(np.maximum(times - times[:, :1], 0.0), axis=1) / per_weight
    return {
        "cold_rows": tuple(float(count) for count in rows),
        "cold_bytes": tuple(float(size * 2**20) for size in sizes_mb),
        "cold_ns_per_byte": tuple(float(penalty) for penalty in extra.ravel()),
    }


def attention_shapes() -> list[tuple[int, ...]]:
    """(batch, heads, kv heads, queries, keys, head size, which): prompts, their parts, steps, and encoders.

    Prompts are never unfused.
    """
    grouped, full = ((10, 5, 32), (8, 8, 64), (16, 8, 64), (16, 4, 128)), ((12, 12, 32), (12, 12, 64), (8, 8, 64))
    parts = ((64, 128), (64, 256), (128, 384), (128, 512), (256, 1024))
    prompts, steps = ((1, 32), (1, 128), (4, 128), (1, 512), (1, 1024)), ((1, 64), (1, 256), (8, 256), (1, 1024))
    found: list[tuple[int, ...]] = []
    found += [(b, h, kv, t, t, size, FUSED) for b, t in prompts for h, kv, size in (*grouped, full[0])]
    found += [(1, h, kv, q, k, size, FUSED) for q, k in parts for h, kv, size in (*grouped, full[0])]
    for heads, which in ((grouped, FUSED), (full, UNFUSED)):
        found += [(b, h, kv, 1, c + 1, size, which) for b, c in steps for h, kv, size in heads]
    return found + [(b, h, kv, t, t, size, FULL) for b, t in (*prompts, (8, 128)) for h, kv, size in full]


def sweep_attention(
    place: Place, journal: Journal, shapes: Sequence[tuple[int, ...]], call_ns: float
) -> list[tuple[tuple[int, ...], float]]:
    """Nanoseconds of one attention kernel at each shape."""
    found = []
    for shape in shapes:

        def measure(shape: tuple[int, ...] = shape) -> float:
            stack, feeds = attention_stack(place, shape)
            return stack.time_ns(feeds, call_ns)

        time_ns = journal.get("attention " + " ".join(map(str, shape)), measure)
        assert time_ns is not None
        found.append((shape, time_ns))
    return found


def sweep_pointwise(
    place: Place, journal: Journal, function: str, call_ns: float, most: int = 1 << 24
) -> list[tuple[float, float]]:
    """(elements moved, nanoseconds) of one pointwise kernel."""
    width, found, rows = 1024, [], 1
    while 2 * rows * width <= most:

        def measure(rows: int = rows) -> float:
            stack = pointwise_stack(place, width, 8, function)
            return stack.time_ns({"x0": _random(place, rows, width)}, call_ns)

        found.append((float(2 * rows * width), journal.get(f"{function} {rows}", measure) or 1.0))
        rows *= 4
    return found
