"""Every example runs, at toy size, so that they stay true."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_no_example_is_left_out():
    tested = {"compress_a_language_model", "plan_without_weights", "plain_module", "what_if"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_compress_a_language_model(tmp_path):
    text = example("compress_a_language_model")(
        ["--budget", "0.6", "--steps", "2", "--length", "32", "--out", str(tmp_path)]
    )
    assert text.startswith("It was a dark night, and")
    assert len(text) > len("It was a dark night, and") + 10


def test_plan_without_weights():
    plan = example("plan_without_weights")(["--layers", "8", "--width", "1024"])
    assert plan.fraction <= 0.25
    assert plan.damage is None
    assert {str(form) for site, form in plan.forms.items() if ".layers.0." in site} == {
        "dense"
    } or plan.fraction < 0.25


def test_what_if(tmp_path):
    arguments = ["--layers", "4", "--width", "1024", "--budgets", "0.25", "1.0", "--out", str(tmp_path / "page.html")]
    answers = example("what_if")(arguments)
    assert answers.point(0.25)["speedup"] > answers.point(1.0)["speedup"] == 1.0
    assert (tmp_path / "page.html").stat().st_size > 1_000_000


def test_plain_module(tmp_path):
    distance = example("plain_module")(["--steps", "3", "--out", str(tmp_path / "onnx")])
    assert 0 < distance < 0.5
