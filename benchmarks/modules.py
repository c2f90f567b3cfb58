"""The compressed modules alone: the products of one block in one session, dense against compressed, by rows.

    python benchmarks/modules.py --out benchmarks/results/modules-cpu.json
    python benchmarks/modules.py --target cuda --out benchmarks/results/modules-cuda.json

A profile on CUDA times launches, so what `bench` reports of modules on a CPU cannot be read off a profile there. Here
the products that the exported graph runs for a block (packed ones as one, last-position ones left out) are put into a
session of their own, each with weights of its own, and timed with inputs and outputs bound to the device; dense and
compressed in turns, medians over the rounds. Beside them: the same products each timed alone at its fastest, summed,
which is the most that any lowering of these shapes could reach, and the smallest number of rows at which the speed-up
reaches the paper's 4.05x.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blora_compiler.cost_models.latency import kernels_of
from speed import llama

from blora_compiler.folders import write_text
from blora_compiler.measuring import uniform_forms
from blora_compiler.outline import outline
from blora_compiler.report import table, versions
from blora_compiler.sweeping import Place, call_cost_ns, gemm_alone_ns, gemm_sequence
from blora_compiler.timing import on_first_core
from blora_compiler.values import DTYPE_BYTES, Form, Site, Workload, site_groups

PAPER = 4.05  # speed-up of compressed modules that the paper states
PLANS = ("uniform", "shared")
# model -> (config, budgets, prompts as batch x tokens)
CPU = {"llama 1024": (lambda: llama(1024, 2816, 16, 8, layers=2), (0.5, 0.25), ((1, 128), (1, 512)))}
CUDA = {
    "llama 4096": (
        lambda: llama(4096, 11008, 32, 8, layers=2), (0.5, 0.22),
        ((1, 512), (1, 1024), (1, 2048), (8, 512), (16, 512), (32, 512), (64, 512)),
    )
}  # fmt: skip
TOY = {"toy": (lambda: llama(64, 160, 4, 2, layers=2), (0.5,), ((1, 16), (2, 16)))}


@dataclass(frozen=True)
class Timed:
    """One plan at one prompt. Milliseconds; `alone_ms` is the sum of the compressed products each alone."""

    model: str
    budget: float
    plan: str
    prompt: str
    rows: int
    flops_ratio: float
    dense_ms: float
    ms: float
    alone_ms: float

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.ms


def products_of(sites: Sequence[Site], forms: dict[str, Form], load: Workload) -> list[tuple[int, ...]]:
    """(rows, inner, columns) of every product that the exported graph runs for these sites, in order."""
    kernels = kernels_of(site_groups(sites), (), forms, load, generates=True)
    return [kernel.shape for kernel, _ in kernels if kernel.op == "gemm"]


def multiply_adds(products: Sequence[Sequence[int]]) -> int:
    return sum(rows * inner * columns for rows, inner, columns in products)


def time_models(models: dict[str, Any], place: Place, rounds: int) -> list[Timed]:
    """Every model, budget, plan and prompt."""
    found = []
    call_ns = call_cost_ns(place)
    for name, (config, budgets, prompts) in models.items():
        sites = [site for site in outline(config()).sites if site.name.startswith("model.layers.0.")]
        for batch, tokens in prompts:
            load = Workload("prefill", batch, tokens, dtype=place.dtype)
            dense = products_of(sites, {}, load)
            for budget in budgets:
                for plan in PLANS:
                    forms = uniform_forms(sites, budget, shares_first_factors=plan == "shared")
                    small = products_of(sites, forms, load)
                    sides = [gemm_sequence(place, products) for products in (dense, small)]
                    times = [[side.time_ns(call_ns) for side in sides] for _ in range(rounds)]
                    weight_bytes = DTYPE_BYTES[place.dtype] * sum(inner * columns for _, inner, columns in small)
                    alone = sum(gemm_alone_ns(place, product, call_ns, weight_bytes) for product in small)
                    medians = [1e-6 * statistics.median(side) for side in zip(*times, strict=True)]
                    ratio = multiply_adds(dense) / multiply_adds(small)
                    found.append(
                        Timed(name, budget, plan, f"{batch}x{tokens}", batch * tokens, ratio, *medians, 1e-6 * alone)
                    )
                    print(f"{name} {budget} {plan} {batch}x{tokens}: {found[-1].speedup:.2f}x", flush=True)
    return found


def reaches(found: Sequence[Timed], speedup: float = PAPER) -> int | None:
    """The smallest number of rows at which any plan is so much faster, or None."""
    return min((one.rows for one in found if one.speedup >= speedup), default=None)


def compact(found: Sequence[Timed]) -> str:
    rows = [
        (
            one.model, one.plan, f"{one.budget:g}", one.prompt, f"{one.dense_ms:.3f}", f"{one.ms:.3f}",
            f"{one.speedup:.2f}x", f"{one.flops_ratio:.2f}x", f"{one.speedup / one.flops_ratio:.2f}",
            f"{one.alone_ms / one.ms:.2f}",
        )
        for one in found
    ]  # fmt: skip
    headings = ("model", "plan", "kept", "prompt", "dense ms", "ms", "speed-up", "FLOPs ratio", "of it", "alone")
    least = reaches(found)
    return f"{table(headings, rows)}\n\n{PAPER}x " + ("is not reached" if least is None else f"from {least} rows on")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that everything runs")
    options = parser.parse_args(arguments)
    place = Place(options.target, "float32" if options.target == "cpu" else "float16")
    with on_first_core():
        found = time_models(TOY if options.toy else {"cpu": CPU, "cuda": CUDA}[options.target], place, options.rounds)
    result = {
        "device": place.identity(), "versions": versions(), "rounds": options.rounds, "reaches_rows": reaches(found),
        "timings": [{**asdict(one), "speedup": one.speedup} for one in found],
    }  # fmt: skip
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(compact(found), flush=True)


if __name__ == "__main__":
    main()
