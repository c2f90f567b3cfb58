"""Is a budget in time kept? Models compiled for this machine, exported, and timed again afterwards, without training.

    python benchmarks/latency_budget.py --out benchmarks/results/latency-budget-cpu.json

`compile` times its plan and solves again at most twice. Then, in a new run that it did not see, the finished export
is timed beside the dense one: what is reported is that time over what the budget allows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from prediction import encoder, gpt2, table_of_this

import blora_compiler as blora
from blora_compiler.data import load_texts
from blora_compiler.latency_budget import time_by_scope
from blora_compiler.lowering import lower
from blora_compiler.report import table as markdown
from blora_compiler.report import versions
from blora_compiler.source import BUNDLED_MODEL, BUNDLED_TRAIN_TEXT
from blora_compiler.sweeping import Place

# Times do not depend on how well factors were fitted: a short text and no refit keep this a matter of minutes.
CALIBRATION_CHARACTERS = 40_000
CASES: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("minilm shape, random weights", encoder, {"budget": "3.5ms", "scope": "model", "workload": "prefill 1x72"}),
    ("prose-llama-8m", str(BUNDLED_MODEL), {"budget": 0.65, "scope": "model", "workload": "prefill 1x256"}),
    ("prose-llama-8m", str(BUNDLED_MODEL), {"budget": 0.4, "scope": "sites", "workload": "prefill 1x256"}),
    ("prose-llama-8m", str(BUNDLED_MODEL),
     {"budget": 0.7, "scope": "model", "workload": "1 x 128 prefill + 32 decode steps"}),
    ("gpt2 512x5, random weights", gpt2, {"budget": 0.6, "scope": "model", "workload": "decode 2@300"}),
)  # fmt: skip


def run(name: str, model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = model if isinstance(model, str) else model()
    calibration = [load_texts(BUNDLED_TRAIN_TEXT)[0][:CALIBRATION_CHARACTERS]] if isinstance(model, str) else None
    compiled = blora.compile(
        model, metric="latency", device="this", calibration=calibration, rules={"*": {"min_rank": 8}}, refit=False,
        rounds=0,
        **asked,
    )  # fmt: skip
    (record,) = [record for record in compiled.records if record.stage == "measure"]
    with tempfile.TemporaryDirectory() as folder:
        inputs = dict(compiled.program.inputs)
        exports = {
            "dense": lower(compiled.source.model, Path(folder) / "dense", inputs=inputs, new_tokens=2),
            "compressed": compiled.export(Path(folder) / "compressed", new_tokens=2),
        }
        times = time_by_scope(compiled.program.sites, compiled.plan, exports)
    fraction = asked["budget"] if isinstance(asked["budget"], float) else None
    allowed = compiled.plan.limit / 1e6 if fraction is None else fraction * times["dense"]
    return {
        "model": name, **asked, "attempts": record.facts["attempts"], "summary": record.summary,
        "again": {"dense_ms": times["dense"], "compressed_ms": times["compressed"], "allowed_ms": allowed,
                  "used": times["compressed"] / allowed},
    }  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    """A line a case: how often it was solved again, and what the finished export took of the budget."""
    rows = []
    for case in result["cases"]:
        budget, again = case["budget"], case["again"]
        asked = budget if isinstance(budget, str) else f"{100 * budget:.0f} % of dense"
        times = [f"{again[name]:.2f}" for name in ("dense_ms", "allowed_ms", "compressed_ms")]
        asked = f"{asked}, {case['scope']}"
        solved_again, used = str(len(case["attempts"]) - 1), f"{again['used']:.3f}"
        rows.append((case["model"], case["workload"], asked, solved_again, *times, used))
    headings = ("model", "workload", "budget, scope", "solved again", "dense ms", "allowed ms", "measured ms")
    return markdown((*headings, "of the budget"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    place = Place()
    table_of_this(place)
    result: dict[str, Any] = {"device": place.identity(), "versions": versions(), "cases": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, model, asked in CASES:
        result["cases"].append(run(name, model, asked))
        print(f"{name}, {asked}: {result['cases'][-1]['summary']}", flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")  # a case is minutes: keep each
    print(table(result))


if __name__ == "__main__":
    main()
