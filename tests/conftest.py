"""Each test gets the marker of the folder it is in; threads are fixed so that sums are reproducible.

On a slow machine the longest tests are skipped, and counted: exporters are slow Python, and all of them would take an
hour there. `BLORA_LONG_TESTS=1` runs them anywhere.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine fails no deadline, each run draws the same examples, and a failure prints how to have it again.
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")

GROUPS = {"pure", "graph", "ort", "browser", "device"}
# For one step of a Python loop. Chosen below the 67 of the one machine (2 GHz EPYC, first generation) where all tests
# took an hour; no other machine was measured.
SLOW_NS = 55.0
MEASURED = "BLORA_STEP_NS"


def step_ns() -> float:
    """What one step of a Python loop takes of this process's own time, at its best: load of others does not count."""
    times = []
    for _ in range(5):
        started, total = time.process_time(), 0
        for index in range(100_000):
            total += index
        times.append((time.process_time() - started) / 100_000)
    return 1e9 * min(times)


def pytest_configure() -> None:
    """Measure once, where the run starts: workers of xdist inherit the answer, so that all skip the same tests."""
    if not os.environ.get("BLORA_LONG_TESTS") and MEASURED not in os.environ:
        os.environ[MEASURED] = str(step_ns())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = 0.0 if os.environ.get("BLORA_LONG_TESTS") else float(os.environ[MEASURED])
    if found > SLOW_NS:
        reason = "takes minutes on a slow machine; set BLORA_LONG_TESTS=1 to run it"
        for item in items:
            if item.get_closest_marker("long") is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
    for item in items:
        group = Path(item.path).parent.name
        assert group in GROUPS, f"{item.path} is in no test group; move it to tests/{{{','.join(sorted(GROUPS))}}}"
        item.add_marker(getattr(pytest.mark, group))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
