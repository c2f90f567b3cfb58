"""Does a measured clock choose better plans? Damage at equal measured latency, beside FLOPs and uniform ranks.

    python benchmarks/latency_plans.py --out benchmarks/results/latency-plans-cpu.json [--minilm FOLDER]

Each model is planned by FLOPs at three budgets, by predicted latency at the times that those plans are predicted to
take, and with one share of the break-even rank everywhere. All are exported and timed in turns in one run. The damage
of the latency plans, and of the uniform ones, is read off at the measured time of each FLOPs plan, between their own
points (linear in the logarithm of damage over time). Damage is the predicted one that planning minimises.

Models: the bundled language model; all-MiniLM-L6-v2 where --minilm names its folder, else a random-weight encoder of
its shape; and a random-weight GPT-2. Calibration texts are the bundled prose, or the model's own samples.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blora_compiler.cost_models.flops import FlopsCostModel
from blora_compiler.cost_models.prediction import Predictor
from prediction import encoder, gpt2, table_of_this
from torch import nn

from blora_compiler.budget import Budget
from blora_compiler.calibration import calibration_batches
from blora_compiler.clocks import Target, this_target
from blora_compiler.latency_budget import TimedProblem
from blora_compiler.measuring import export_for_timing, in_forms, time_workload, uniform_forms
from blora_compiler.outline import Outline, outline_of
from blora_compiler.problem import build_problem
from blora_compiler.profiling import Profile, profile
from blora_compiler.report import versions
from blora_compiler.solver import solve
from blora_compiler.source import BUNDLED_MODEL, BUNDLED_TRAIN_TEXT, load_source
from blora_compiler.sweeping import Place
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Form, Workload

BUDGETS = (0.25, 0.4, 0.6)
REPEATS, RUNS = 24, 3
# Both knapsacks decide ranks alone: removed branches would hide the difference behind a jump in damage.
RULES = {"*": {"min_rank": 8}}


@dataclass(frozen=True)
class Case:
    name: str
    model: str | nn.Module
    calibration: Any
    workload: Workload


def cases(minilm: Path | None) -> list[Case]:
    torch.manual_seed(0)
    sentence = Case("minilm shape, random weights", encoder(), None, Workload("prefill", 4, 64))
    if minilm is not None:
        sentence = Case("all-MiniLM-L6-v2", str(minilm), None, Workload("prefill", 4, 64))
    return [
        Case("prose-llama-8m", str(BUNDLED_MODEL), BUNDLED_TRAIN_TEXT, Workload("prefill", 1, 128)),
        sentence,
        Case("gpt2 512x5, random weights", gpt2(), None, Workload("prefill", 1, 64)),
    ]


def plans_of(case: Case, shape: Outline, profiled: Profile, target: Target) -> dict[str, dict[str, Form]]:
    """Name -> forms: three FLOPs plans, latency plans predicted to take as long, and uniform ranks."""
    arguments: dict[str, Any] = {
        "sites": shape.sites, "damage_model": profiled, "workload": case.workload, "rules": RULES,
    }  # fmt: skip
    predictor = Predictor(shape.sites, shape.operators, case.workload, target.clock, shape.can_generate)
    found: dict[str, dict[str, Form]] = {"dense": {}}
    for budget in BUDGETS:
        problem = build_problem(**arguments, budget=Budget.parse(budget), cost_model=FlopsCostModel())
        found[f"flops {budget}"] = solve(problem).forms
        allowed = predictor.predict(found[f"flops {budget}"]).nanoseconds
        limit = Budget.parse(f"{math.ceil(allowed)}ns")
        timed = TimedProblem(
            target, shape.can_generate, {**arguments, "budget": limit, "scope": "model"}, shape.operators
        )
        found[f"latency {budget}"] = solve(timed.problem()).forms
        found[f"uniform {budget}"] = {
            name: form for name, form in uniform_forms(shape.sites, budget).items() if name in problem_names(problem)
        }
    return found


def problem_names(problem: Any) -> set[str]:
    return {site.name for site in problem.counted}


def run(case: Case, place: Place, target: Target) -> dict[str, Any]:
    source = load_source(case.model)
    program = trace(source.model)
    shape = outline_of(program, case.name)
    batches, origin = calibration_batches(program, source, case.calibration, 0)
    profiled = profile(program, batches)
    plans = plans_of(case, shape, profiled, target)
    with tempfile.TemporaryDirectory() as folder:
        exports = {
            name: export_for_timing(
                in_forms(source.model, shape.sites, forms), Path(folder) / name.replace(" ", "-"), place,
                dict(program.inputs),
            )
            for name, forms in plans.items()
        }  # fmt: skip
        runs = [time_workload(exports, case.workload, REPEATS) for _ in range(RUNS)]
        times = min(runs, key=lambda run: sum(run.values()))  # the least disturbed one
    predictor = Predictor(shape.sites, shape.operators, case.workload, target.clock, shape.can_generate)
    sites = {site.name: site for site in shape.sites}
    points = {
        name: {
            "ms": times[name],
            "predicted_ms": predictor.predict(forms).milliseconds,
            "damage": sum(profiled.damage(sites[n], form) for n, form in forms.items() if form != Dense()),
        }
        for name, forms in plans.items()
    }
    return {
        "model": case.name, "workload": case.workload.name, "damage_unit": profiled.unit, "calibration": origin,
        "points": points, "at_equal_latency": compared(points),
    }  # fmt: skip


def compared(points: Mapping[str, Mapping[str, float]]) -> list[dict[str, float | None]]:
    """Damage of the other methods at the measured time of each FLOPs plan, over the FLOPs plan's own."""
    rows = []
    for budget in BUDGETS:
        flops = points[f"flops {budget}"]
        row: dict[str, float | None] = {"budget": budget, "ms": flops["ms"], "flops_damage": flops["damage"]}
        for method in ("latency", "uniform"):
            damage = damage_at(flops["ms"], [points[f"{method} {other}"] for other in BUDGETS])
            row[f"{method}_over_flops"] = None if damage is None else damage / flops["damage"]
        rows.append(row)
    return rows


def damage_at(milliseconds: float, points: Sequence[Mapping[str, float]]) -> float | None:
    """Between the points; beyond them along the nearest pair, but no further than a tenth of the time."""
    ordered = sorted(points, key=lambda point: point["ms"])
    times, logs = [p["ms"] for p in ordered], [math.log(p["damage"]) for p in ordered]
    if not 0.9 * times[0] <= milliseconds <= 1.1 * times[-1]:
        return None
    right = min(max(int(np.searchsorted(times, milliseconds)), 1), len(times) - 1)
    slope = (logs[right] - logs[right - 1]) / (times[right] - times[right - 1])
    return math.exp(logs[right - 1] + slope * (milliseconds - times[right - 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--only", default="", help="run the models whose name contains this")
    options = parser.parse_args()
    place = Place()
    target = this_target(table_of_this(place))
    result: dict[str, Any] = {"device": place.identity(), "versions": versions(), "models": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for case in (case for case in cases(options.minilm) if options.only in case.name):
        row = run(case, place, target)
        result["models"].append(row)
        print(f"\n{row['model']}, {row['workload']} ({row['damage_unit']}; calibrated on {row['calibration']})")
        for name, point in row["points"].items():
            predicted = f"predicted {point['predicted_ms']:8.3f}"
            print(f"  {name:<13} {point['ms']:8.3f} ms  {predicted}  damage {point['damage']:.4g}")
        for equal in row["at_equal_latency"]:
            ratios = {k: None if v is None else round(v, 3) for k, v in equal.items() if k.endswith("_over_flops")}
            print(f"  at the {equal['ms']:.3f} ms of FLOPs {equal['budget']}: {ratios}", flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")  # a model is minutes: keep each


if __name__ == "__main__":
    main()
