"""Verify a compressed ONNX file: loaded in ONNX Runtime and compared with a reference that shares its weights.

The reference is the original graph in which each changed site has the one dense matrix B A. So the difference is that
of two orders of arithmetic, whatever compression did to the quality. How far the outputs are from the original's is
reported beside it, and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .artifact import Parity
from .errors import BadInput, ParityFailed
from .onnx_files import open_on_cpu, opened, read_model
from .onnx_inputs import Feed, random_feeds
from .onnx_profiling import run
from .onnx_sites import find_sites
from .passes.onnx_factor_sites import FactorSites
from .values import Workload
from .verification import SMALLEST_UNIT, TOLERANCES

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]

_OTHER_SHAPES = ((2, 7), (3, 16))  # batch, tokens
# Outputs more than this many times the size that a share of them is below are fills. Of a million normal values, the
# largest is 40 times the size that a tenth is below; where a channel stands out further, it is measured by itself.
_LARGEST_RATIO, _LOW_SHARE = 1000, 0.1


@dataclass(frozen=True)
class OnnxParity:
    """How a compressed file compares.

    Attributes:
        parity: against the reference with the same weights; errors are relative to the largest output, fills such as
            a mask's lowest number left out.
        distances: output -> root of the squared distance to the original's output, relative to that output's size,
            over all settings. Outputs that hold no floats are left out.
    """

    parity: Parity
    distances: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        far = ", ".join(f"{name} {distance:.3g}" for name, distance in self.distances.items())
        return (
            f"{len(self.parity.errors)} settings within {self.parity.max_error:.2g} of the same weights unfactored "
            f"(tolerance {self.parity.tolerance:.2g}); relative distance to the original: {far or 'no float outputs'}"
        )


def verify_onnx(
    written: Path, original: Path, factors: Factors, feeds: Mapping[str, Feed], dtype: str, scratch: Path
) -> OnnxParity:
    """Compare a file that was written with the one it came from.

    Args:
        written: the compressed file.
        original: the file it was made of.
        factors: site name -> A (rank, in) and B (out, rank) as they were given to the rewrite.
        feeds: setting -> inputs by name.
        dtype: of the sites, which decides the tolerance.
        scratch: folder for temporary files.

    Raises:
        ParityFailed: the file has other inputs, outputs or metadata, or computes something else.
    """
    _compare_structure(read_model(original), read_model(written))
    with opened(read_model(original), scratch, str(original)) as session:
        names, signature = [spec.name for spec in session.get_outputs()], _signature(session)
        before = {setting: run(session, names, feed) for setting, feed in feeds.items()}
    reference = read_model(original)
    FactorSites(_merged(reference, factors)).run(reference)
    with opened(reference, scratch, "the reference") as session:
        expected = {setting: run(session, names, feed) for setting, feed in feeds.items()}
    session = open_on_cpu(written, written.name)
    if _signature(session) != signature:
        raise ParityFailed(f"{written.name} has the signature {_signature(session)}, {original.name} {signature}")
    errors: dict[str, float] = {}
    distances = [_Distance() for _ in names]
    for setting, feed in feeds.items():
        actual = run(session, names, feed)
        for index, name in enumerate(names):
            error = _compare(f"{setting}, {name}", actual[index], expected[setting][index], TOLERANCES[dtype], dtype)
            errors[setting] = max(error, errors.get(setting, 0.0))
            distances[index].add(actual[index], before[setting][index])
    far = {name: d.relative for name, d in zip(names, distances, strict=True) if d.is_float}
    return OnnxParity(Parity(dtype, TOLERANCES[dtype], errors), far)


def verification_feeds(
    path: Path, given: Sequence[Feed], workload: Workload, seed: int, scratch: Path
) -> dict[str, Feed]:
    """What to compare on: the first calibration run, and random inputs of other shapes where the graph takes them."""
    feeds = {"the first calibration run": given[0]}
    seen = {_shapes(given[0])}
    model = read_model(path)
    with opened(read_model(path), scratch, str(path)) as session:
        for batch, tokens in _OTHER_SHAPES:
            shape = Workload("prefill", batch, tokens, workload.context, workload.dtype)
            try:
                feed = random_feeds(model, session, shape, seed + batch, runs=1)[0]
                run(session, None, feed)
            except BadInput:  # not every graph takes made-up inputs, and the caller's are among the settings already
                continue
            if _shapes(feed) not in seen:
                seen.add(_shapes(feed))
                feeds[f"random {batch}x{tokens}"] = feed
    return feeds


def _shapes(feed: Feed) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in feed.values())


def _merged(reference: ir.Model, factors: Factors) -> dict[str, tuple[np.ndarray]]:
    """Site name -> B A, of the factors as they are stored: rounded to the weight's type."""
    merged = {}
    for site in find_sites(reference).sites:
        if site.name in factors:
            A, B = (part.astype(site.matrix().dtype).astype(np.float64) for part in factors[site.name])
            merged[site.name] = (B @ A,)
    return merged


def _compare_structure(before: ir.Model, after: ir.Model) -> None:
    for name in ("ir_version", "opset_imports", "metadata_props", "producer_name", "domain", "model_version"):
        old, new = getattr(before, name), getattr(after, name)
        if (dict(old), dict(new)) != (dict(new), dict(old)) if isinstance(old, Mapping) else old != new:
            raise ParityFailed(f"{name} was {old} and is {new}; it must stay as it was")


def _signature(session: Any) -> list[tuple[str, str, list[Any]]]:
    return [(spec.name, spec.type, spec.shape) for spec in (*session.get_inputs(), *session.get_outputs())]


def _compare(where: str, actual: Any, expected: Any, tolerance: float, dtype: str) -> float:
    """The error of one output, of sequences and maps the largest; 0 for one without floats, which must be equal."""
    if isinstance(expected, list | dict):
        keys = range(len(expected)) if isinstance(expected, list) else list(expected)
        if len(actual) != len(expected) or (isinstance(expected, dict) and actual.keys() != expected.keys()):
            raise ParityFailed(f"{where}: {len(actual)} entries, with the same weights unfactored {len(expected)}")
        parts = [(np.asarray(actual[key]), np.asarray(expected[key])) for key in keys]
        return max(
            (_compare(f"{where}, entry {k}", *pair, tolerance, dtype) for k, pair in zip(keys, parts, strict=True)),
            default=0.0,
        )
    if not _is_float(expected):
        if not np.array_equal(np.asarray(actual), np.asarray(expected)):
            raise ParityFailed(f"{where}: values that are no floats differ from those of the same weights unfactored")
        return 0.0
    if actual.shape != expected.shape:
        raise ParityFailed(f"{where}: shape {actual.shape}, with the same weights unfactored {expected.shape}")
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)):
        count = int((finite & ~np.isfinite(actual)).sum())
        raise ParityFailed(
            f"{where}: {count} of {actual.size} values are not finite, and are with the same weights unfactored; an "
            f"activation between two factors overflows {dtype}: compile a float32 model"
        )
    sizes = np.abs(expected[finite])
    scale = _scale(sizes)
    error = float((np.abs(actual - expected)[finite] / np.maximum(sizes, scale)).max(initial=0.0))
    if not error <= tolerance:
        raise ParityFailed(
            f"{where}: the file and the same weights unfactored differ by {error:.3g} of the largest output "
            f"({scale:.3g}); the tolerance for {dtype} is {tolerance:.3g}"
        )
    return error


def _scale(sizes: np.ndarray) -> float:
    """What differences are counted in: the largest size, of those no fill.

    A masked logit is the lowest number of its type, or minus a billion; beside it every other output is nothing. So
    sizes beyond any that computed values reach above their low ones do not count.
    """
    computed = sizes[sizes > 0]
    if computed.size:
        computed = computed[computed <= _LARGEST_RATIO * np.quantile(computed, _LOW_SHARE)]
    return max(SMALLEST_UNIT, float(computed.max(initial=0.0)))


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


class _Distance:
    """Sums of squares of an output and of its change, over finite values."""

    def __init__(self) -> None:
        self.change = self.size = 0.0
        self.is_float = False

    def add(self, actual: Any, before: Any) -> None:
        if not _is_float(before) or actual.shape != before.shape:
            return
        self.is_float = True
        finite = np.isfinite(actual) & np.isfinite(before)
        actual, before = actual[finite].astype(np.float64), before[finite].astype(np.float64)
        self.change += float(np.square(actual - before).sum())
        self.size += float(np.square(before).sum())

    @property
    def relative(self) -> float:
        return math.sqrt(self.change / self.size) if self.size else math.sqrt(self.change)
