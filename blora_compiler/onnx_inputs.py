"""Inputs for an ONNX graph: the caller's arrays, checked and cut into runs, or random ones by the graph's signature.

Random inputs have the shapes of a workload. A symbolic axis is `batch` where it comes first or is named so, `context`
where its name (or its input's) speaks of a past, `context + tokens` where it says total, and else `tokens`. Integers
stay below the size of the table they look up, masks are ones, positions count up, and floats are standard normal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from .errors import BadInput, did_you_mean, listed
from .values import Workload

Feed = dict[str, np.ndarray]

RANDOM_RUNS = 8
SEQUENCES_PER_RUN = 8
_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16, "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64, "tensor(uint32)": np.uint32, "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_,
}  # fmt: skip
_UNKNOWN_LIMIT = 2  # integers of unknown meaning are 0 or 1, which any table has
_TOLD_BY_NAME = ("mask", "position")
_PASSED_ON = frozenset({"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand"})


# ── The caller's ─────────────────────────────────────────────────────────────────────────────────────────────────


def given_feeds(calibration: Any, session: onnxruntime.InferenceSession) -> list[Feed]:
    """Runs of the caller's arrays, each of at most 8 sequences where the graph leaves the batch open.

    Args:
        calibration: an `.npz` file of arrays by input name, batch first; a mapping of that kind; or a list of these.

    Raises:
        BadInput: files that cannot be read, and arrays that do not fit the graph's inputs, all of them listed.
    """
    several = isinstance(calibration, Sequence) and not isinstance(calibration, str)
    parts = list(calibration) if several else [calibration]
    if not parts:
        raise BadInput("calibration is an empty list; leave it out, or give arrays by input name")
    feeds: list[Feed] = []
    for position, part in enumerate(parts):
        unnamed = f"calibration[{position}]" if several else "calibration"
        where = str(part) if isinstance(part, str | Path) else unnamed
        feeds += _runs(_checked(_arrays(part, where), session, where), session)
    return feeds


def _arrays(part: Any, where: str) -> Mapping[str, Any]:
    if isinstance(part, Mapping):
        return part
    if not isinstance(part, str | Path):
        raise BadInput(f"{where} is a {type(part).__name__}; give an .npz file, or arrays by input name")
    try:
        loaded = np.load(part, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise BadInput(
                f"{where} holds one array without a name; write it with numpy.savez(file, input_name=array)"
            )
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except BadInput:
        raise
    except Exception as error:  # a bad zip, a bad header or pickled objects each raise a type of their own
        raise BadInput(f"calibration {where} cannot be read as .npz ({error}); write it with numpy.savez") from error


def _checked(arrays: Mapping[str, Any], session: onnxruntime.InferenceSession, where: str) -> Feed:
    specs = {spec.name: spec for spec in session.get_inputs()}
    problems = [
        f"{name!r} is no input of the graph{did_you_mean(name, specs)}" for name in arrays if name not in specs
    ]
    problems += [f"input {name!r} is missing" for name in specs if name not in arrays]
    feed: Feed = {}
    for name, spec in specs.items():
        if name not in arrays:
            continue
        try:
            array = np.asarray(arrays[name])
        except ValueError as error:  # rows of different lengths
            problems.append(f"input {name!r} is no array ({error})")
            continue
        problem = _reason_to_refuse(array, spec)
        if problem:
            problems.append(f"input {name!r} {problem}")
        else:
            feed[name] = np.ascontiguousarray(array, dtype=_TYPES[spec.type])
    if problems:
        raise BadInput(f"{where}: {listed(problems)}")
    return feed


def _reason_to_refuse(array: np.ndarray, spec: Any) -> str | None:
    if spec.type not in _TYPES:
        return f"is {spec.type} in the graph, which is not supported"
    wanted = np.dtype(_TYPES[spec.type])
    kinds = {"i": "iub", "u": "iub", "f": "f", "b": "b"}
    if array.dtype.kind not in kinds[wanted.kind]:
        return f"is {array.dtype}, the graph takes {wanted}"
    sizes = [_fixed_size(size) for size in spec.shape]
    fits = len(sizes) == array.ndim and all(
        size is None or size == got for size, got in zip(sizes, array.shape, strict=True)
    )
    # An axis that the graph fixes in front is a batch of that size, of which the array may hold several.
    if not fits and sizes and sizes[0] and array.ndim == len(sizes) and array.shape[0] % sizes[0] == 0:
        fits = all(s is None or s == got for s, got in zip(sizes[1:], array.shape[1:], strict=True))
    if not fits:
        return f"has shape {array.shape}, the graph takes {tuple(spec.shape)}"
    if not array.shape[0] if array.ndim else False:
        return f"has shape {array.shape} and no sequences"
    return _reason_it_does_not_fit(array, wanted)


def _reason_it_does_not_fit(array: np.ndarray, wanted: np.dtype) -> str | None:
    """Why the values would be others in the type that the graph takes, or None; rounding is no reason."""
    if not array.size or wanted.kind == "b" or array.dtype == wanted:
        return None
    limits = np.finfo(wanted) if wanted.kind == "f" else np.iinfo(wanted)
    finite = array[np.isfinite(array)]
    for value in (finite.min(), finite.max()) if finite.size else ():
        if not limits.min <= value <= limits.max:
            return f"holds {value}, which no {wanted} can"
    return None


def _fixed_size(size: Any) -> int | None:
    """The size of an axis that the graph fixes; some exporters write a fixed size as a symbol (`"32"`)."""
    return int(size) if isinstance(size, int) or str(size).isdigit() else None


def _runs(feed: Feed, session: onnxruntime.InferenceSession) -> list[Feed]:
    """The feed cut along its batch, where every input has it in front; else the feed in one run."""
    counts = {array.shape[0] if array.ndim else 0 for array in feed.values()}
    fixed = {_fixed_size(spec.shape[0]) if spec.shape else None for spec in session.get_inputs()}
    if len(counts) != 1 or len(fixed) != 1:
        return [feed]
    count, size = counts.pop(), fixed.pop() or SEQUENCES_PER_RUN
    return [{n: array[start : start + size] for n, array in feed.items()} for start in range(0, count, size)]


# ── Random ones ──────────────────────────────────────────────────────────────────────────────────────────────────


def random_feeds(
    model: ir.Model, session: onnxruntime.InferenceSession, workload: Workload, seed: int, runs: int = RANDOM_RUNS
) -> list[Feed]:
    """Random inputs in the shapes of the workload.

    Raises:
        BadInput: for an input that is no tensor of numbers.
    """
    odd = [f"{spec.name!r} is {spec.type}" for spec in session.get_inputs() if spec.type not in _TYPES]
    if odd:
        raise BadInput(f"no inputs can be made up for {', '.join(odd)}; give calibration arrays")
    limits = _integer_limits(model)
    generator = np.random.default_rng(seed)
    return [
        {
            spec.name: _random(spec, _shape(spec, workload), limits.get(spec.name), workload, generator)
            for spec in session.get_inputs()
        }
        for _ in range(runs)
    ]


def _shape(spec: Any, workload: Workload) -> tuple[int, ...]:
    return tuple(_size(str(size), axis, spec.name, workload) for axis, size in enumerate(spec.shape))


def _size(text: str, axis: int, name: str, workload: Workload) -> int:
    if text.isdigit():
        return int(text)
    if " + " in text:
        return sum(_size(part, axis, name, workload) for part in text.split(" + "))
    is_past = any(word in f"{text} {name}".lower() for word in ("past", "cache"))
    if "batch" in text.lower() or (axis == 0 and "seq" not in text.lower()):
        return workload.batch
    if "total" in text.lower():
        return workload.context + workload.tokens
    return workload.context if is_past else workload.tokens


def _random(
    spec: Any, shape: tuple[int, ...], limit: int | None, workload: Workload, generator: np.random.Generator
) -> np.ndarray:
    dtype = np.dtype(_TYPES[spec.type])
    name = spec.name.lower()
    if "mask" in name:
        return np.ones(shape, dtype)
    if dtype.kind == "f":
        return generator.standard_normal(shape).astype(dtype)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(dtype)
    if "position" in name and shape:
        counted = (workload.context + np.arange(shape[-1])) % (limit or 1 << 31)
        return np.broadcast_to(counted, shape).astype(dtype)
    return generator.integers(0, limit or _UNKNOWN_LIMIT, shape).astype(dtype)


def _integer_limits(model: ir.Model) -> dict[str, int]:
    """Input name -> the rows of the smallest table it looks up, or the depth of its one-hot code."""
    limits: dict[str, int] = {}
    for value in model.graph.inputs:
        found = list(_table_sizes(value))
        if found and value.name is not None:
            limits[value.name] = min(found)
    return limits


def _table_sizes(value: ir.Value, depth: int = 8) -> Iterable[int]:
    if depth == 0:
        return
    for use in value.uses():
        node = use.node
        if node.op_type == "Gather" and use.idx == 1:
            yield from _rows_of(node.inputs[0], node.attributes.get_int("axis", 0) or 0)
        elif node.op_type == "EmbedLayerNormalization":
            table = {0: 2, 1: 4, 8: 3}.get(use.idx)  # ids, segments, positions
            if table is not None:
                yield from _rows_of(node.inputs[table], 0)
        elif node.op_type == "Equal":
            yield from _counted_up_to(node.inputs[1 - use.idx])
        elif node.op_type == "OneHot" and use.idx == 0:
            size = node.inputs[1]
            if size is not None and size.const_value is not None:
                yield int(size.const_value.numpy().reshape(-1)[0])
        elif node.op_type in _PASSED_ON and use.idx == 0:
            yield from _table_sizes(node.outputs[0], depth - 1)


def _rows_of(table: ir.Value | None, axis: int) -> Iterable[int]:
    if table is not None and table.const_value is not None and len(table.const_value.shape) > axis:
        yield int(table.const_value.shape[axis])


def _counted_up_to(value: ir.Value | None) -> Iterable[int]:
    """n where a constant holds 0, 1, ... n - 1: a one-hot code that was written out as a comparison."""
    if value is not None and value.const_value is not None:
        entries = value.const_value.numpy().reshape(-1)
        if len(entries) > 1 and np.array_equal(entries, np.arange(len(entries))):
            yield len(entries)


def unknown_integers(model: ir.Model, session: onnxruntime.InferenceSession) -> list[str]:
    """Inputs of whole numbers whose range nothing in the graph tells; random ones are 0 and 1 there."""
    limits = _integer_limits(model)
    return [
        spec.name
        for spec in session.get_inputs()
        if "int" in spec.type and spec.name not in limits and not any(w in spec.name.lower() for w in _TOLD_BY_NAME)
    ]
