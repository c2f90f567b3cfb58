"""What-if at the scale of Llama-3-70B and 405B: 20 budgets, 2 devices, 2 workloads, no weights. Time and memory.

    python benchmarks/whatif_scale.py --out benchmarks/results/whatif-scale.json [--html docs-folder]

Each analysis runs in a process of its own, so that its peak memory is its own. The solver is timed beside: one plan
with `MilpSolver`, and a sweep over 20 budgets of the same problem, on 560 and 2000 sites with 65 forms each.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BUDGETS = [round(0.05 * step, 2) for step in range(1, 21)]
DEVICES = ["h200", "l4"]
WORKLOADS = ["prefill 1x2048", "decode 8@2048"]
SHAPES = {
    "Llama-3-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8},
    "Llama-3.1-405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
                       "num_attention_heads": 128, "num_key_value_heads": 8},
}  # fmt: skip


def config(name: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[name], vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def analyse(name: str, metric: Any, html: str | None) -> dict[str, Any]:
    """One analysis, in this process."""
    from blora_compiler import whatif

    shape = config(name)
    started = time.perf_counter()
    answers = whatif(shape, BUDGETS, DEVICES, WORKLOADS, metric=metric)
    seconds = time.perf_counter() - started
    if html is not None:
        answers.to_html(html)
    feasible = [point for point in answers.data["points"] if point["feasible"]]
    return {
        "model": name, "metric": metric, "seconds": seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "sites": len(answers.data["sites"]), "points": len(answers.data["points"]), "feasible": len(feasible),
        "largest_gap": max(point["gap"] for point in feasible),
        "quarter": {
            f"{point['workload']} on {point['device']}": point["speedup"]
            for point in feasible
            if point["budget"] == "0.25"
        },
    }  # fmt: skip


def time_solver(sites: int) -> dict[str, Any]:
    """One solve, and a sweep of 20 budgets, of a problem with 65 forms a site; medians of three."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from blora_compiler.budget import Budget
    from blora_compiler.solver import solve
    from blora_compiler.sweep import sweep
    from tests.planning import planned, transformer

    layers = sites // 5
    problem = planned(transformer(layers, 1024, 2816)[: 5 * layers], 0.35, rank_multiple=8)

    def seconds(work: Any) -> float:
        found = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    plan = solve(problem)
    budgets = [Budget.parse(budget) for budget in BUDGETS]
    return {
        "sites": len(problem.counted), "options": len(problem.options), "gap": plan.gap,
        "solve_seconds": seconds(lambda: solve(problem)), "sweep_seconds": seconds(lambda: sweep(problem, budgets)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--html", type=Path, help="also write the page of the 70B analysis here")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "METRIC", "HTML"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, metric, html = options.one
        print(json.dumps(analyse(name, metric, html or None)))
        return
    result: dict[str, Any] = {"analyses": [], "solver": [time_solver(560), time_solver(2000)]}
    for name in SHAPES:
        for metric in ("flops", "latency"):
            page = str(options.html) if options.html and name == "Llama-3-70B" and metric == "flops" else ""
            command = [sys.executable, __file__, "--one", name, metric, page]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            result["analyses"].append(json.loads(ran.stdout.splitlines()[-1]))
            row = result["analyses"][-1]
            print(
                f"{row['model']:<15} {row['metric']:<8} {row['seconds']:6.1f} s  {row['peak_gb']:5.2f} GB  "
                f"{row['points']} points  largest gap {row['largest_gap']:.1e}", flush=True,
            )  # fmt: skip
    for row in result["solver"]:
        print(
            f"{row['sites']} sites, {row['options']} options: solve {row['solve_seconds']:.2f} s, "
            f"20 budgets {row['sweep_seconds']:.2f} s, gap {row['gap']:.1e}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
