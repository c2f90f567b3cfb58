"""Device profiles: what a device can do at most, as data files with their sources.

A profile is one JSON file; `devices/` holds those that ship. To add one, write a file like them and name it by its
path, or put it into a folder that the environment variable BLORA_DEVICES names and use its `name`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from blora_compiler.errors import BadInput, did_you_mean, listed
from blora_compiler.values import DTYPE_BYTES

FOLDER = Path(__file__).parent / "devices"
THIS, THIS_CUDA = "this", "this-cuda"  # this machine, as its calibration found it


@dataclass(frozen=True)
class Device:
    """Ceilings of one device.

    Attributes:
        name: how it is asked for.
        title: for people.
        provider: ONNX Runtime's execution provider that runs on it: `cpu` or `cuda`.
        measured: whether the numbers were measured with ONNX Runtime; False for datasheets.
        source: where the numbers come from.
        dtype: what models run in there unless the user says.
        peak_flops: dtype -> FLOP/s at most, without sparsity.
        bandwidth: bytes/s between memory and the units.
        memory_bytes: of the device.
        launch_ns: what starting a kernel costs.
        session_ns: what a call of a session costs whatever is in it.
        cache_bytes, cache_bandwidth: of the last cache that keeps weights between calls; 0 where nothing is kept.
        units: how many tiles are worked on at once.
        tiles: (rows, columns, relative efficiency) that GEMMs are cut into.
        depth: steps of the inner loop that starting and ending a tile is worth.
        align: sizes should be multiples of this.
        misaligned: relative efficiency where they are not.
        efficiency: share of the peak that large GEMMs reach.
        attention_efficiency: share of the peak that attention reaches.
    """

    name: str
    title: str
    provider: str
    measured: bool
    source: str
    dtype: str
    peak_flops: Mapping[str, float]
    bandwidth: float
    memory_bytes: int
    launch_ns: float
    session_ns: float
    cache_bytes: int
    cache_bandwidth: float
    units: int
    tiles: tuple[tuple[int, int, float], ...]
    depth: float
    align: int
    misaligned: float
    efficiency: float
    attention_efficiency: float

    def peak(self, dtype: str) -> float:
        """FLOP/s at most in a dtype.

        Raises:
            BadInput: if the device has no arithmetic of that type.
        """
        if dtype not in self.peak_flops:
            raise BadInput(
                f"device {self.name!r} has no {dtype} arithmetic; use {' or '.join(self.peak_flops)}, "
                f"or add peak_flops.{dtype} to its profile"
            )
        return self.peak_flops[dtype]


def device_names() -> list[str]:
    """Every profile that can be named, `this` among them."""
    return sorted([*_profiles(), THIS, THIS_CUDA])


def load_device(name: str | Path) -> Device:
    """The profile with a name, or in a file.

    Raises:
        BadInput: no such profile (with the nearest names), or one with missing or absurd fields, all of them listed.
    """
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise BadInput(f"device profile {path} does not exist; the known devices are {', '.join(device_names())}")
        return _read(path)
    profiles = _profiles()
    if str(name).lower() not in profiles:
        raise BadInput(
            f"device {str(name)!r} is unknown{did_you_mean(str(name).lower(), device_names())}; use one of "
            f"{', '.join(device_names())}, or the path of a profile (.json)"
        )
    return _read(profiles[str(name).lower()])


def _profiles() -> dict[str, Path]:
    """Name -> file; a user's own folder wins."""
    folders = [FOLDER]
    if own := os.environ.get("BLORA_DEVICES"):
        folders.append(Path(own))
    return {path.stem.lower(): path for folder in folders for path in sorted(folder.glob("*.json"))}


@lru_cache(maxsize=64)
def _read_cached(path: Path, modified: int) -> Device:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"device profile {path} cannot be read as JSON: {error}") from error
    return device_from_json(data, str(path))


def _read(path: Path) -> Device:
    return _read_cached(path, path.stat().st_mtime_ns)


# ── Validation ───────────────────────────────────────────────────────────────────────────────────────────────────


def _number(low: float, high: float) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (isinstance(value, float) and not math.isfinite(value)):
            return "must be a number"
        return None if low <= value <= high else f"must lie between {low:g} and {high:g}"

    return check


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "must be text"


def _peaks(value: Any) -> str | None:
    if not isinstance(value, dict) or not value:
        return f"must map {', '.join(DTYPE_BYTES)} to FLOP/s"
    unknown = [name for name in value if name not in DTYPE_BYTES]
    if unknown:
        return f"has the unknown dtype {unknown[0]!r}; known are {', '.join(DTYPE_BYTES)}"
    wrong = [name for name, peak in value.items() if _number(1e8, 1e18)(peak)]
    return f"must hold 1e+08 to 1e+18 FLOP/s for {wrong[0]}" if wrong else None


def _tiles(value: Any) -> str | None:
    if isinstance(value, list) and value and all(map(_is_tile, value)):
        return None
    return "must be a list of [rows, columns, relative efficiency]: whole sizes from 1 to 4096, efficiencies up to 1"


def _is_tile(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    *sizes, efficiency = value
    whole = all(isinstance(size, int) and not _number(1, 4096)(size) for size in sizes)
    return whole and not _number(1e-3, 1)(efficiency)


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "name": _text,
    "title": _text,
    "provider": lambda value: None if value in ("cpu", "cuda") else "must be 'cpu' or 'cuda'",
    "measured": lambda value: None if isinstance(value, bool) else "must be true or false",
    "source": _text,
    "dtype": lambda value: None if value in list(DTYPE_BYTES) else f"must be one of {', '.join(DTYPE_BYTES)}",
    "peak_flops": _peaks,
    "bandwidth": _number(1e8, 1e15),
    "memory_bytes": _number(1e7, 1e14),
    "launch_ns": _number(0, 1e7),
    "session_ns": _number(0, 1e9),
    "cache_bytes": _number(0, 1e12),
    "cache_bandwidth": _number(1e8, 1e16),
    "units": _number(1, 1e5),
    "tiles": _tiles,
    "depth": _number(0, 1e5),
    "align": _number(1, 1024),
    "misaligned": _number(1e-3, 1),
    "efficiency": _number(1e-3, 1),
    "attention_efficiency": _number(1e-3, 1),
}


def device_from_json(data: Any, where: str) -> Device:
    """The device a JSON object describes.

    Raises:
        BadInput: naming `where`, with every missing, unknown and absurd field.
    """
    if not isinstance(data, dict):
        raise BadInput(f"{where}: holds a {type(data).__name__}, a device profile is an object")
    known = [f.name for f in fields(Device)]
    problems = [f"{name} is missing" for name in known if name not in data]
    problems += [
        f"{name!r} is no field of a profile{did_you_mean(name, known)}" for name in data if name not in known
    ]
    for name, check in _CHECKS.items():
        if name in data and (wrong := check(data[name])):
            problems.append(f"{name} is {data[name]!r}, it {wrong}")
    if not problems and data["dtype"] not in data["peak_flops"]:
        problems.append(f"dtype is {data['dtype']!r}, but peak_flops has {', '.join(data['peak_flops'])} alone")
    if problems:
        raise BadInput(f"device profile {where}: {listed(problems)}")
    return Device(**{**data, "tiles": tuple((int(t[0]), int(t[1]), float(t[2])) for t in data["tiles"])})
