"""For the whole folder: one small calibration (real sweeps, a few seconds of them), one export of equal models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from blora_compiler.cost_models.kernels import FULL, FUSED, UNFUSED
from blora_compiler.cost_models.measured import Table

from blora_compiler import lowering, measuring, sweeping
from blora_compiler.sweeping import SMALL_ROWS, SMALL_SIZES, Place, sweep_pointwise, sweep_residency
from tests.exports import remembering

# A prompt and a step behind a cache, as one kernel and as several, and an encoder.
SMALL_ATTENTION = (
    (1, 4, 2, 16, 16, 16, FUSED), (1, 4, 2, 1, 17, 16, FUSED), (2, 4, 4, 1, 17, 16, UNFUSED),
    (1, 4, 4, 1, 33, 16, UNFUSED), (2, 4, 4, 16, 16, 16, FULL),
)  # fmt: skip
SMALL_STEPS = {"STEP_ROWS": (1, 5, 16), "STEP_WEIGHTS": ((32, 16),), "STEP_COLUMNS": (16, 24, 64),
               "STEPS_AT_ROWS": (1, 16), "STEPS_INNER": (16,)}  # fmt: skip
SMALL_PAIRS = {"PAIR_ROWS": (1, 16), "PAIR_SIZES": ((48, 8, 32), (64, 24, 16))}


@pytest.fixture(scope="session", autouse=True)
def _exported_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "export_graphs", remembering(lowering.export_graphs))
        yield


@pytest.fixture(scope="session")
def short_sweeps() -> Iterator[None]:
    """Sweeps of a few points: what is tested is that they run and what becomes of them, not what they find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            measuring, "sweep_residency", partial(sweep_residency, sizes_mb=(2, 4, 8, 12, 16), rows=(1, 16))
        )
        patch.setattr(measuring, "sweep_pointwise", partial(sweep_pointwise, most=1 << 16))
        patch.setattr(measuring, "attention_shapes", lambda: list(SMALL_ATTENTION))
        for name, value in (SMALL_STEPS | SMALL_PAIRS).items():
            patch.setattr(sweeping, name, value)
        patch.setattr(measuring, "STEP_WEIGHTS", SMALL_STEPS["STEP_WEIGHTS"])
        yield


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory, short_sweeps: None) -> tuple[Path, Table]:
    """A folder for BLORA_CACHE with this machine's table in it, and the table."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLORA_CACHE", str(folder))
        return folder, measuring.calibrate(Place(), rows=SMALL_ROWS, sizes=SMALL_SIZES, models=())


@pytest.fixture
def calibrated(small_cache: tuple[Path, Table], monkeypatch: pytest.MonkeyPatch) -> Table:
    """This machine, calibrated."""
    folder, table = small_cache
    monkeypatch.setenv("BLORA_CACHE", str(folder))
    return table


@pytest.fixture
def not_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine, never calibrated: an empty cache."""
    monkeypatch.setenv("BLORA_CACHE", str(tmp_path / "empty"))
    return tmp_path / "empty"
