"""Each test gets the marker of the folder it is in; threads are fixed so that sums are reproducible."""

from __future__ import annotations

from pathlib import Path

import pytest

GROUPS = {"pure", "graph", "ort", "browser", "device"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = Path(item.path).parent.name
        assert group in GROUPS, f"{item.path} is in no test group; move it to tests/{{{','.join(sorted(GROUPS))}}}"
        item.add_marker(getattr(pytest.mark, group))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
