"""The compressed modules alone: the products of one block in one session, dense against compressed, by rows.

    python benchmarks/modules.py --out benchmarks/results/modules-cpu.json
    python benchmarks/modules.py --target cuda --device h200 --out benchmarks/results/modules-cuda.json

A profile on CUDA times launches, so what `bench` reports of modules on a CPU cannot be read off a profile there. Here
the products that the exported graph runs for a block (packed ones as one, last-position ones left out) are put into a
session of their own, each with weights of its own, and timed with inputs and outputs bound to the device; dense and
compressed in turns, medians over the rounds. Beside them: the same products each timed alone at its fastest, summed,
which is the most that any lowering of these shapes could reach, and the smallest number of rows at which the speed-up
reaches the paper's 4.05x. With `--device` also what the cost model says of a device's profile, which no measurement
went into; `--report-only` reads the times from the file instead of taking them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from blora_compiler.cost_models.devices import load_device
from blora_compiler.cost_models.kernels import gemm
from blora_compiler.cost_models.latency import kernels_of
from blora_compiler.cost_models.roofline import RooflineClock
from speed import llama

from blora_compiler.folders import write_text
from blora_compiler.measuring import uniform_forms
from blora_compiler.outline import outline
from blora_compiler.report import table, versions
from blora_compiler.sweeping import Place, call_cost_ns, gemm_alone_ns, gemm_sequence
from blora_compiler.timing import on_first_core
from blora_compiler.values import DTYPE_BYTES, Form, Site, Workload, site_groups

PAPER = 4.05  # speed-up of compressed modules that the paper states
# name -> whether sites that read one input share their first factor, and what ranks are multiples of
PLANS = {"uniform": (False, 8), "shared": (True, 8), "shared, ranks x128": (True, 128)}
# model -> (config, budgets, prompts as batch x tokens)
CPU = {"llama 1024": (lambda: llama(1024, 2816, 16, 8, layers=2), (0.5, 0.25), ((1, 128), (1, 512)))}
CUDA = {
    "llama 4096": (
        lambda: llama(4096, 11008, 32, 8, layers=2), (0.5, 0.22),
        ((1, 2048), (8, 512), (16, 512), (1, 1024), (32, 512), (64, 512)),
    )
}  # fmt: skip
TOY = {"toy": (lambda: llama(64, 160, 4, 2, layers=2), (0.5,), ((1, 16), (2, 16)))}


@dataclass(frozen=True)
class Timed:
    """One plan at one prompt. Milliseconds; `alone_ms` is the sum of the compressed products each alone.

    Predictions are of the same products by a device's profile; None without one.
    """

    model: str
    budget: float
    plan: str
    prompt: str
    rows: int
    flops_ratio: float
    dense_ms: float
    ms: float
    alone_ms: float
    predicted_dense_ms: float | None = None
    predicted_ms: float | None = None

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.ms

    @property
    def predicted_speedup(self) -> float | None:
        return (
            None
            if not self.predicted_ms or not self.predicted_dense_ms
            else self.predicted_dense_ms / self.predicted_ms
        )


def products_of(sites: Sequence[Site], forms: dict[str, Form], load: Workload) -> list[tuple[int, ...]]:
    """(rows, inner, columns) of every product that the exported graph runs for these sites, in order."""
    kernels = kernels_of(site_groups(sites), (), forms, load, generates=True)
    return [kernel.shape for kernel, _ in kernels if kernel.op == "gemm"]


def with_predictions(found: Sequence[Timed], models: dict[str, Any], device: str, dtype: str) -> list[Timed]:
    """The same timings with what the roofline of a device's profile says of their products."""
    clock = RooflineClock(load_device(device))

    def milliseconds(products: Sequence[Sequence[int]]) -> float:
        return 1e-6 * sum(clock.time_ns(gemm(*product, "sites"), dtype) for product in products)

    predicted = []
    for one in found:
        sites = block_sites(models[one.model][0]())
        shares, multiple = PLANS[one.plan]
        batch, tokens = (int(part) for part in one.prompt.split("x"))
        load = Workload("prefill", batch, tokens, dtype=dtype)
        forms = uniform_forms(sites, one.budget, multiple, shares_first_factors=shares)
        dense, small = (milliseconds(products_of(sites, of_sites, load)) for of_sites in ({}, forms))
        predicted.append(replace(one, predicted_dense_ms=dense, predicted_ms=small))
    return predicted


def block_sites(config: Any) -> list[Site]:
    return [site for site in outline(config).sites if site.name.startswith("model.layers.0.")]


def multiply_adds(products: Sequence[Sequence[int]]) -> int:
    return sum(rows * inner * columns for rows, inner, columns in products)


def time_models(models: dict[str, Any], place: Place, rounds: int) -> list[Timed]:
    """Every model, budget, plan and prompt."""
    found = []
    call_ns = call_cost_ns(place)
    alone_ns: dict[tuple[int, ...], float] = {}
    for name, (config, budgets, prompts) in models.items():
        sites = block_sites(config())
        for batch, tokens in prompts:
            load = Workload("prefill", batch, tokens, dtype=place.dtype)
            dense = products_of(sites, {}, load)
            dense_side = gemm_sequence(place, dense)
            for budget in budgets:
                for plan, (shares, multiple) in PLANS.items():
                    if multiple > 8 and place.provider == "cpu":
                        continue  # tiles of a GPU
                    forms = uniform_forms(sites, budget, multiple, shares_first_factors=shares)
                    small = products_of(sites, forms, load)
                    sides = (dense_side, gemm_sequence(place, small))
                    times = [[side.time_ns(call_ns) for side in sides] for _ in range(rounds)]
                    weight_bytes = DTYPE_BYTES[place.dtype] * sum(inner * columns for _, inner, columns in small)
                    for product in small:
                        if product not in alone_ns:
                            alone_ns[product] = gemm_alone_ns(place, product, call_ns, weight_bytes)
                    alone = sum(alone_ns[product] for product in small)
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
            "-" if one.predicted_ms is None else f"{one.predicted_ms:.3f}",
            "-" if one.predicted_speedup is None else f"{one.predicted_speedup:.2f}x",
        )
        for one in found
    ]  # fmt: skip
    headings = ("model", "plan", "kept", "prompt", "dense ms", "ms", "speed-up", "FLOPs ratio", "of it", "alone",
                "predicted ms", "predicted")  # fmt: skip
    least = reaches(found)
    return f"{table(headings, rows)}\n\n{PAPER}x " + ("is not reached" if least is None else f"from {least} rows on")


def timings_in(result: Mapping[str, Any]) -> list[Timed]:
    """What a result file holds."""
    named = {field.name for field in fields(Timed)}
    return [Timed(**{key: one[key] for key in named & set(one)}) for one in result["timings"]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--device", help="a device's profile, such as h200, whose predictions stand beside the times")
    parser.add_argument("--report-only", action="store_true", help="take the times from the file")
    options = parser.parse_args(arguments)
    dtype = "float32" if options.target == "cpu" else "float16"
    models = TOY if options.toy else {"cpu": CPU, "cuda": CUDA}[options.target]
    if options.report_only:
        result = json.loads(options.out.read_text(encoding="utf-8"))
        found = timings_in(result)
    else:
        place = Place(options.target, dtype)
        with on_first_core():
            found = time_models(models, place, options.rounds)
        result = {"device": place.identity(), "versions": versions(), "rounds": options.rounds}
    if options.device is not None:
        found = with_predictions(found, models, options.device, dtype)
        result["predicted_for"] = options.device
    result["reaches_rows"] = reaches(found)
    result["timings"] = [
        {**asdict(one), "speedup": one.speedup, "predicted_speedup": one.predicted_speedup} for one in found
    ]
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(compact(found), flush=True)


if __name__ == "__main__":
    main()
