"""Which machines skip the long tests: decided once a run, by what the machine is and not by how busy it is."""

from __future__ import annotations

import itertools
import os
import time

import pytest
from hypothesis import settings

from tests import conftest


def test_a_busy_machine_is_not_a_slow_one(monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    assert conftest.step_ns() < 1e9 / 100_000


def test_workers_inherit_what_was_measured_where_the_run_started(monkeypatch):
    monkeypatch.delenv("BLORA_LONG_TESTS", raising=False)
    monkeypatch.delenv(conftest.MEASURED, raising=False)
    monkeypatch.setattr(conftest, "step_ns", lambda: 2 * conftest.SLOW_NS)
    conftest.pytest_configure()
    monkeypatch.setattr(conftest, "step_ns", lambda: pytest.fail("decided twice"))
    conftest.pytest_configure()
    assert float(os.environ[conftest.MEASURED]) == 2 * conftest.SLOW_NS


def test_random_tests_repeat_and_have_no_deadline():
    assert (settings().deadline, settings().derandomize, settings().print_blob) == (None, True, True)
