"""The page of a real analysis, as the library writes it, opened from its file: what it shows is what the API says."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import blora_compiler as blora
from blora_compiler.analysis import WhatIf
from tests.models import tiny_llama

SEED = 3040
DEVICES = ("h200", "cpu-amx")
WORKLOADS = ("prefill 1x64", "prefill 1x32 + 8 decode steps")
BUDGETS = (0.02, 0.25, "40%", 0.55, 0.75, 1.0)
# Below this no plan goes, so the first stop of the slider is an infeasible one.
RULES = {"*": {"min_rank": 4}}

# Numbers that must be on the page at every feasible stop.
SHOWN = {
    "speedup", "ms", "ms_dense", "flops", "flops_dense", "params", "params_dense", "bytes", "bytes_dense",
    "peak_memory_bytes", "peak_memory_bytes_dense", "changed", "fraction", "gap", "binds.compute",
    "binds.bandwidth", "binds.launch", "phases.0.tokens_per_s", "phases.0.tokens_per_s_dense",
}  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> WhatIf:
    return blora.whatif(tiny_llama(layers=3).config, BUDGETS, DEVICES, WORKLOADS, rules=RULES, rank_multiple=4)


@pytest.fixture
def page(open_page, answers: WhatIf) -> Any:
    """The file that `to_html` writes, opened."""
    pytest.importorskip("plotly", reason="the page draws with plotly; pip install plotly")
    opened = open_page(answers.data)
    assert answers.to_html(opened.path) == opened.path
    opened.open()
    return opened


def value_at(values: Any, path: str) -> Any:
    """The entry at `phases.0.ms`; the length of a list at `sites.length`."""
    for name in path.split("."):
        if isinstance(values, list):
            values = len(values) if name == "length" else values[int(name)]
        else:
            values = values[name]
    return values


def said_by_the_api(answers: WhatIf, point: dict[str, Any], shown: dict[str, Any]) -> Any:
    """What a number on the page should be: of the point, a quotient of two of its numbers, or of the analysis."""
    if "derived" in shown:
        above, below = shown["derived"].split("/")
        return value_at(point, above) / value_at(point, below)
    first = shown["number"].partition(".")[0]
    return value_at(point if first in point else dict(answers.data), shown["number"])


def move_slider(page: Any, index: int) -> None:
    page.run(
        "const slider = document.getElementById('budget-a'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input', {bubbles: true}))",
        index,
    )
    page.settle()


def test_the_file_needs_nothing_but_itself(page):
    assert page.browser.current_url.startswith("file://")
    assert Path(page.path).stat().st_size > 1_000_000  # plotly is inside
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith(("data:", "blob:"))] == []


def test_five_stops_drawn_at_random_equal_the_api(page, answers):
    draw = random.Random(SEED)
    print(f"seed {SEED}")
    names = [workload["name"] for workload in answers.data["workloads"]]
    budgets = answers.data["budgets"]
    every = [(device, name, index) for device in DEVICES for name in names for index in range(1, len(budgets))]
    for device, workload, index in draw.sample(every, 5):
        page.select(device=device, workload=workload)
        move_slider(page, index)
        point = answers.point(budgets[index], device, workload)
        assert page.state() == {"device": device, "workload": workload, "budget": budgets[index], "compare": None}
        assert point["feasible"]
        shown = page.numbers()
        assert {entry["number"] for entry in shown} >= SHOWN
        wrong = [
            (entry["number"], entry["value"], said_by_the_api(answers, point, entry))
            for entry in shown
            if entry["value"] != said_by_the_api(answers, point, entry)
        ]
        assert wrong == [], f"page and API differ at {device}, {workload}, {budgets[index]}"


def test_the_pictures_hold_the_plans(page, answers):
    page.select(device="cpu-amx", workload="prefill 1x64")
    move_slider(page, 2)
    point = answers.point("40%", "cpu-amx", "prefill 1x64")
    curve = page.run("return document.getElementById('tradeoff').data.map((trace) => trace.y)")
    speedups = {answers.point(b, "cpu-amx", "prefill 1x64")["speedup"] for b in answers.data["budgets"][1:]}
    drawn = {value for trace in curve for value in trace if value is not None}
    assert point["speedup"] in drawn and speedups <= drawn


def test_a_stop_that_no_plan_meets_says_the_apis_reason(page, answers):
    move_slider(page, 0)
    point = answers.point(0.02)
    assert not point["feasible"]
    assert point["reason"] in page.text("#notices")
    assert not {entry["number"] for entry in page.numbers()} & SHOWN
