"""Which clock times kernels on a device: a calibrated table for `this` machine, a roofline for a profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .cost_models.devices import THIS, THIS_CUDA, Device, load_device
from .cost_models.measured import MeasuredClock, Table, device_of, read_table
from .cost_models.roofline import Clock, RooflineClock
from .errors import BadInput
from .sweeping import Place
from .values import AnyWorkload

DTYPES = {"cpu": "float32", "cuda": "float16"}  # what models run in on each provider unless the user says


@dataclass(frozen=True)
class Target:
    """A device, and the clock that times kernels on it.

    Attributes:
        device: its profile; of `this` machine, what the calibration found.
        clock: measured for `this` machine, a roofline otherwise.
        table: of `this` machine, or None.
    """

    device: Device
    clock: Clock
    table: Table | None = None


def target_of(name: str | Path, dtype: str | None = None, table: Path | None = None) -> Target:
    """The device with a name (`this`, `this-cuda`, `h200`, ...) or in a profile's file.

    Args:
        name: as above.
        dtype: of the weights; the device's own by default.
        table: the calibration to read for `this`; where `blora calibrate` writes it by default.

    Raises:
        BadInput: no such device, a dtype it does not have, or a calibration that is missing, corrupt or stale.
    """
    if not isinstance(name, str | Path):
        raise BadInput(
            f"device {name!r} is no name and no path; use the name of a profile, or the path of one (.json)"
        )
    if str(name) in (THIS, THIS_CUDA):
        provider = "cuda" if str(name) == THIS_CUDA else "cpu"
        return this_target(this_table(Place(provider, dtype or DTYPES[provider]), table))
    device = load_device(name)
    device.peak(dtype or device.dtype)
    return Target(device, RooflineClock(device))


def this_target(table: Table) -> Target:
    """This machine, as a calibration found it."""
    return Target(device_of(table), MeasuredClock(table), table)


def this_table(place: Place, path: Path | None = None) -> Table:
    """The calibration of this machine, refused when it was made by another runtime or for another processor.

    Args:
        place: provider, dtype and threads.
        path: of another table than the one that is kept for the place.

    Raises:
        BadInput: naming the file, what it was made with and what is here.
    """
    from .measuring import table_path

    path = path or table_path(place)
    table = read_table(path)
    here = place.identity()
    stale = {name: (getattr(table, name), here[name]) for name in ("device", "runtime", "provider", "dtype")
             if getattr(table, name) != here[name]}  # fmt: skip
    if stale:
        name, (then, now) = next(iter(stale.items()))
        raise BadInput(
            f"calibration table {path} is stale: it was swept with {name} {then!r}, here it is {now!r}; "
            f"run `blora calibrate` again"
        )
    return table


def in_dtype(workload: AnyWorkload, dtype: str) -> AnyWorkload:
    """The workload with its weights and arithmetic in another type."""
    from dataclasses import replace

    from .values import Mix, Workload

    if isinstance(workload, Workload):
        return replace(workload, dtype=dtype)
    return Mix(tuple((weight, replace(part, dtype=dtype)) for weight, part in workload.parts))
