"""Predicted against measured: single GEMMs and pairs off the calibration grid, and whole models end to end.

    python benchmarks/prediction.py --out benchmarks/results/prediction-cpu.json
    python benchmarks/prediction.py --provider cuda --dtype float16 --out benchmarks/results/prediction-cuda.json

The shapes are drawn from a seed below; none lies on the calibration's grid. The models, workloads and budgets of the
end-to-end cases are not those that the calibration ran. Dense and compressed are timed in turns in one run. Beside
the calibrated prediction stands the bare roofline of the same device (its best GEMM, its bandwidth): the ablation.

This machine must be calibrated first (`blora calibrate`); where it is not, the script does it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from blora_compiler.cost_models.flops import FlopsCostModel
from blora_compiler.cost_models.kernels import gemm
from blora_compiler.cost_models.measured import MeasuredClock, Table
from blora_compiler.cost_models.prediction import Predictor
from blora_compiler.cost_models.roofline import RooflineClock
from onnx import helper, numpy_helper
from torch import nn

from blora_compiler import sweeping
from blora_compiler.artifact import Artifact, session_options
from blora_compiler.budget import Budget
from blora_compiler.clocks import Target, this_target
from blora_compiler.errors import BadInput
from blora_compiler.measuring import calibrate, export_for_timing, in_forms, time_workload
from blora_compiler.outline import Outline, outline_of
from blora_compiler.problem import build_problem
from blora_compiler.profiling import prior
from blora_compiler.report import versions
from blora_compiler.solver import solve
from blora_compiler.source import BUNDLED_MODEL, load_source
from blora_compiler.sweeping import Place
from blora_compiler.timing import bound_call, on_first_core
from blora_compiler.tracing import trace
from blora_compiler.values import DTYPE_BYTES, Workload

SEED = 20261122
GEMMS, PAIRS = 24, 24
# Every shape and case is timed in each of so many passes, in another order each time and minutes apart.
PASSES, REPEATS = 5, 9

# Rows, inner size, columns, and the rank of the pair that is timed beside the GEMM, or None.
Shape = tuple[int, int, int, int | None]


@dataclass(frozen=True)
class Case:
    """A model at two budgets, and the workloads it is run at."""

    name: str
    model: Any
    budgets: tuple[float, ...]
    workloads: tuple[Workload, ...]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=512, n_layer=5, n_head=8, vocab_size=3000, n_positions=512, bos_token_id=0, eos_token_id=0)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=640, intermediate_size=1760, num_hidden_layers=6, num_attention_heads=10,
            num_key_value_heads=5, vocab_size=3000, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def encoder() -> nn.Module:
    """The shape of all-MiniLM-L6-v2."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=3000
    )
    return BertModel(config, add_pooling_layer=False)


CASES = (
    Case("prose-llama-8m", BUNDLED_MODEL, (0.25, 0.5), (Workload("prefill", 1, 256), Workload("decode", 1, 1, 256))),
    Case("llama 640x6", llama, (0.22, 0.45), (Workload("prefill", 2, 200), Workload("decode", 8, 1, 150))),
    Case("gpt2 512x5", gpt2, (0.3, 0.55), (Workload("prefill", 1, 300), Workload("decode", 2, 1, 300))),
    Case("minilm shape 384x6", encoder, (0.28, 0.58), (Workload("prefill", 8, 128), Workload("prefill", 1, 72))),
)  # fmt: skip


# ── Single GEMMs and pairs ───────────────────────────────────────────────────────────────────────────────────────


def draw_shapes(table: Table) -> list[Shape]:
    """(rows, inner, columns, rank or None): log-uniform sizes, multiples of 8, none of them on the grid."""
    generator = random.Random(SEED)

    def size(low: int, high: int, on_grid: Sequence[int], multiple: int) -> int:
        while True:
            drawn = low * (high / low) ** generator.random()
            rounded = max(multiple, round(drawn / multiple) * multiple)
            if rounded not in on_grid:
                return rounded

    shapes: list[Shape] = []
    for index in range(GEMMS + PAIRS):
        rows, inner, columns = (
            size(1, 1600, table.rows, 1),
            size(72, 2800, table.inner, 8),
            size(72, 2800, table.columns, 8),
        )
        break_even = inner * columns // (inner + columns)
        rank = max(8, round(generator.uniform(0.2, 0.6) * break_even / 8) * 8)
        shapes.append((rows, inner, columns, None if index < GEMMS else rank))
    return shapes


def chain(place: Place, rows: int, sizes: Sequence[int], copies: int) -> Any:
    """A session over copies of (rows x sizes[0]) -> sizes[1] -> ..., each with weights of its own."""
    weights, nodes, outputs = [], [], []
    for copy in range(copies):
        last = "x"
        for step, (inner, columns) in enumerate(pairwise(sizes)):
            name, result = f"w{copy}_{step}", f"y{copy}_{step}"
            values = np.resize(np.linspace(0.01, 0.02, 8191 + copy, dtype=place.numpy_type), (inner, columns))
            weights.append(numpy_helper.from_array(values, name))
            nodes.append(helper.make_node("MatMul", [last, name], [result]))
            last = result
        outputs.append(last)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(place.numpy_type))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", element, [rows, sizes[0]])],
        [helper.make_tensor_value_info(name, element, [rows, sizes[-1]]) for name in outputs],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = session_options(place.threads, pinned=True, alone=True)
    providers = list(dict.fromkeys((sweeping.PROVIDERS[place.provider], sweeping.PROVIDERS["cpu"])))
    return sweeping.onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def time_shapes(place: Place, shapes: Sequence[Shape], order: Sequence[int]) -> dict[tuple[int, str], float]:
    """(position, dense or pair) -> nanoseconds of one copy: a pass over the shapes, each behind its dense twin.

    One session at a time, so that its threads stay awake: what is timed is the kernels, not their waking up.
    """
    with on_first_core():
        call_ns = sweeping.call_cost_ns(place)
    found = {}
    for position in order:
        rows, inner, *_ = shapes[position]
        copies = copies_of(shapes[position])
        feeds = {"x": np.full((rows, inner), 0.01, place.numpy_type)}
        for name, sizes in chains_of(shapes[position]).items():
            call = bound_call(chain(place, rows, sizes, copies), feeds, place.provider)
            with on_first_core():
                run_ns = sweeping.undisturbed_ns(call, least_seconds=0.02)
            found[position, name] = max(1.0, run_ns - call_ns) / copies
    return found


def copies_of(shape: Shape) -> int:
    """How many GEMMs or pairs with weights of their own make a run long enough to time."""
    _, inner, columns, _ = shape
    return max(2, min(16, (4 << 20) // (4 * inner * columns)))


def chains_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The GEMM, and where a rank was drawn the pair, by the sizes that activations have on their way."""
    _, inner, columns, rank = shape
    return {"dense": (inner, columns)} | ({} if rank is None else {"pair": (inner, rank, columns)})


def kernel_rows(
    place: Place, target: Target, shapes: Sequence[Shape], passes: Sequence[Mapping[tuple[int, str], float]]
) -> list[dict[str, Any]]:
    """Each shape as it was timed, and predicted with the table and with the bare roofline."""
    assert target.table is not None
    bare = RooflineClock(target.device, bare=True)
    found = []
    for position, shape in enumerate(shapes):
        rows, inner, columns, rank = shape
        row: dict[str, Any] = {"rows": rows, "inner": inner, "columns": columns, "rank": rank}
        for name, sizes in chains_of(shape).items():
            read = copies_of(shape) * DTYPE_BYTES[place.dtype] * sum(a * b for a, b in pairwise(sizes))
            measured = MeasuredClock(target.table, read, among="pair" if name == "pair" else "nothing")
            kernels = [gemm(rows, a, b, "sites") for a, b in pairwise(sizes)]
            times = [of_pass[position, name] for of_pass in passes]
            row[name] = {"measured_ns": undisturbed(times), "slowest_pass": max(times) / min(times)}
            for label, clock in (("calibrated", measured), ("roofline", bare.for_working_set(read))):
                row[name][label] = sum(clock.time_ns(kernel, place.dtype) for kernel in kernels)
        found.append(row)
    return found


def undisturbed(times: Sequence[float]) -> float:
    """The lower quartile over the passes: other work on the machine only ever adds time."""
    return statistics.quantiles(times, n=4)[0] if len(times) > 1 else times[0]


# ── End to end ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Exported:
    """A case's model, dense and at its budgets, ready to be timed."""

    case: Case
    shape: Outline
    forms: Mapping[str, Mapping[str, Any]]
    exports: Mapping[str, Artifact]


def export_case(case: Case, place: Place, folder: Path) -> Exported:
    """Plans by FLOPs with a spectral prior, exported."""
    torch.manual_seed(0)
    source = load_source(str(case.model) if isinstance(case.model, Path) else case.model())
    program = trace(source.model)
    shape = outline_of(program, case.name)
    forms: dict[str, Mapping[str, Any]] = {"dense": {}}
    for budget in case.budgets:
        problem = build_problem(
            shape.sites, budget=Budget.parse(budget), cost_model=FlopsCostModel(), damage_model=prior(shape.sites),
            workload=case.workloads[0], rules={"*": {"min_rank": 8}},
        )  # fmt: skip
        forms[str(budget)] = solve(problem).forms
    exports = {
        name: export_for_timing(
            in_forms(source.model, shape.sites, of_sites), folder / name, place, dict(program.inputs)
        )
        for name, of_sites in forms.items()
    }
    return Exported(case, shape, forms, exports)


def time_cases(exported: Sequence[Exported], order: Sequence[int]) -> dict[tuple[str, str, str], float]:
    """(model, workload, form) -> milliseconds: a pass over the cases, dense and compressed in turns."""
    return {
        (exported[position].case.name, load.name, name): milliseconds
        for position in order
        for load in exported[position].case.workloads
        for name, milliseconds in time_workload(exported[position].exports, load, REPEATS).items()
    }


def end_to_end_rows(
    place: Place, target: Target, exported: Sequence[Exported],
    passes: Sequence[Mapping[tuple[str, str, str], float]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Every case as it was timed, and predicted."""
    clocks = {"calibrated": target.clock, "roofline": RooflineClock(target.device, bare=True)}
    found = []
    for each in exported:
        shape = each.shape
        for workload in each.case.workloads:
            key = (each.case.name, workload.name)
            times = {name: undisturbed([of_pass[(*key, name)] for of_pass in passes]) for name in each.forms}
            typed = replace(workload, dtype=place.dtype)
            predicted = {
                label: {
                    name: Predictor(shape.sites, shape.operators, typed, clock, shape.can_generate)
                    .predict(of_sites)
                    .milliseconds
                    for name, of_sites in each.forms.items()
                }
                for label, clock in clocks.items()
            }
            for budget in map(str, each.case.budgets):
                found.append(
                    {
                        "model": each.case.name, "workload": workload.name, "budget": float(budget),
                        "dense_ms": times["dense"], "compressed_ms": times[budget],
                        "speedup": times["dense"] / times[budget],
                        **{
                            label: {
                                "dense_ms": of_forms["dense"], "compressed_ms": of_forms[budget],
                                "speedup": of_forms["dense"] / of_forms[budget],
                            }
                            for label, of_forms in predicted.items()
                        },
                    }
                )  # fmt: skip
                print(describe_case(found[-1]), flush=True)
    return found


def describe_case(row: Mapping[str, Any]) -> str:
    guess = row["calibrated"]
    return (
        f"{row['model']:<20} {row['workload']:<16} {row['budget']:<5} measured {row['dense_ms']:8.3f} -> "
        f"{row['compressed_ms']:8.3f} ms {row['speedup']:5.2f}x   predicted {guess['dense_ms']:8.3f} -> "
        f"{guess['compressed_ms']:8.3f} ms {guess['speedup']:5.2f}x   roofline {row['roofline']['speedup']:5.2f}x"
    )


# ── Summary ──────────────────────────────────────────────────────────────────────────────────────────────────────


def mean_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean absolute relative error."""
    return statistics.mean(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))


def summarise(kernels: Sequence[Mapping[str, Any]], cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    pairs = [row for row in kernels if row["rank"] is not None]
    for label in ("calibrated", "roofline"):
        times = [(k[label], k["measured_ns"]) for row in kernels for k in (row["dense"], row.get("pair")) if k]
        summary[label] = {
            "kernel_time_error": mean_error(*zip(*times, strict=True)),
            "pair_speedup_error": mean_error(
                [row["dense"][label] / row["pair"][label] for row in pairs],
                [row["dense"]["measured_ns"] / row["pair"]["measured_ns"] for row in pairs],
            ),
            "end_to_end_speedup_error": mean_error(
                [row[label]["speedup"] for row in cases], [row["speedup"] for row in cases]
            ),
            "end_to_end_ms_error": mean_error(
                [row[label][f"{which}_ms"] for which in ("dense", "compressed") for row in cases],
                [row[f"{which}_ms"] for which in ("dense", "compressed") for row in cases],
            ),
            "end_to_end_ms_bias": statistics.mean(
                row[label][f"{which}_ms"] / row[f"{which}_ms"] - 1
                for which in ("dense", "compressed")
                for row in cases
            ),
        }
    return summary


ROWS_OF_TABLE = {
    "end_to_end_speedup_error": "speed-up of a whole model, {cases} cases",
    "end_to_end_ms_error": "milliseconds of a whole model",
    "pair_speedup_error": "speed-up of a factored pair over its GEMM, {pairs} shapes",
    "kernel_time_error": "time of a GEMM or pair, {timings} timings",
}


def table(result: Mapping[str, Any]) -> str:
    """The summary as people read it, in Markdown."""
    pairs = sum(row["rank"] is not None for row in result["kernels"])
    counts = {"cases": len(result["end_to_end"]), "pairs": pairs, "timings": len(result["kernels"]) + pairs}
    lines = ["| | calibrated | bare roofline |", "|---|---|---|"]
    for name, title in ROWS_OF_TABLE.items():
        errors = (f"{result['summary'][label][name]:.1%}".replace("%", " %") for label in ("calibrated", "roofline"))
        lines.append(f"| {title.format(**counts)} | {' | '.join(errors)} |")
    return "\n".join(lines)


def table_of_this(place: Place) -> Table:
    """This machine's calibration, made now where there is none that fits."""
    from blora_compiler.clocks import this_table

    try:
        return this_table(place)
    except BadInput as error:
        print(f"{error}; calibrating now", flush=True)
        return calibrate(place, tell=print)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--provider", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    options = parser.parse_args()
    place = Place(options.provider, options.dtype)
    target = this_target(table_of_this(place))
    assert target.table is not None
    shapes = draw_shapes(target.table)
    with tempfile.TemporaryDirectory() as folder:
        exported = [export_case(case, place, Path(folder) / str(index)) for index, case in enumerate(CASES)]
        of_shapes, of_cases = [], []
        for number in range(PASSES):
            print(f"pass {number + 1} of {PASSES}", flush=True)
            draw = random.Random(SEED + number)
            of_shapes.append(time_shapes(place, shapes, draw.sample(range(len(shapes)), len(shapes))))
            of_cases.append(time_cases(exported, draw.sample(range(len(exported)), len(exported))))
        kernels = kernel_rows(place, target, shapes, of_shapes)
        cases = end_to_end_rows(place, target, exported, of_cases)
    summary = summarise(kernels, cases)
    result = {
        "device": place.identity(), "versions": {**versions(), "onnx": onnx.__version__}, "seed": SEED,
        "corrections": dict(target.table.corrections), "pair_corrections": dict(target.table.pair_corrections),
        "passes": PASSES, "summary": summary,
        "kernels": kernels, "end_to_end": cases,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    bias = summary["calibrated"]["end_to_end_ms_bias"]
    print(f"\nmean absolute relative errors; milliseconds of whole models are {bias:+.1%} off on average\n")
    print(table(result))


if __name__ == "__main__":
    main()
