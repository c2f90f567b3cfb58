"""Is smaller faster? Dense against compressed, lowered alike, at the sizes that the speed targets are stated for.

    python benchmarks/speed.py --out benchmarks/results/speed-cpu.json
    python benchmarks/speed.py --target cuda --out benchmarks/results/speed-cuda.json

    python benchmarks/speed.py --target cuda --prepare graphs
    python benchmarks/speed.py --target cuda --prepared graphs --out benchmarks/results/speed-cuda.json

The second pair does the same in two parts: the graphs are exported without weights wherever there is time for it, and
filled with random ones and timed where the device is, all plans of a model in turns and each load a case.

Models have random weights, filled in on the spot. Every case is one `blora.bench`; its result is written to the file
as soon as it is there, and a case that the file already holds is not run again (`--again` forgets them). With
`--case TEXT` only cases run whose name contains the text. The compact table of all cases in the file comes last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blora_compiler.cost_models.devices import load_device
from blora_compiler.cost_models.prediction import Predictor
from blora_compiler.cost_models.roofline import RooflineClock
from unweighted import fill, strip

import blora_compiler as blora
from blora_compiler.artifact import MANIFEST
from blora_compiler.benching import Cache, Contender, Load, bench_sides, kept_of, planned_forms
from blora_compiler.folders import write_text
from blora_compiler.lowering import checked_example, write_graphs
from blora_compiler.measuring import in_forms, uniform_forms
from blora_compiler.outline import outline
from blora_compiler.predicting import workload_of
from blora_compiler.report import table, versions
from blora_compiler.sweeping import Place
from blora_compiler.tracing import trace


@dataclass(frozen=True)
class Case:
    """One dense model and one plan for it, so that a case is over in a few minutes."""

    model: str
    config: Callable[[], Any]
    budget: float
    plan: str
    settings: tuple[Load, ...]

    @property
    def name(self) -> str:
        return f"{self.model} {self.budget} {self.plan}"


def llama(hidden: int, mlp: int, heads: int, kv_heads: int, layers: int = 8) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=4096, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def minilm(hidden: int = 384, layers: int = 6, heads: int = 12) -> Any:
    from transformers import BertConfig

    return BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden,
        vocab_size=30522,
    )  # fmt: skip


SIDE = "side.json"
PLANS = ("uniform", "shared", "interpolative", "narrow", "prior")
CPU_LLAMA = (
    Load("prefill", 1, 512), Load("decode", 1, 256), Load("decode", 1, 256, cache="fixed"),
    Load("end to end", 1, 512, 16),
)  # fmt: skip
CAPTURED: tuple[Cache, ...] = ("captured", "captured fixed")
CUDA_LLAMA = (
    Load("prefill", 1, 2048), Load("prefill", 8, 512), Load("prefill", 16, 512),
    Load("decode", 1, 512), Load("decode", 1, 512, cache="fixed"),
    *(Load("decode", batch, 512, cache=cache) for batch in (1, 16, 64) for cache in CAPTURED),
    Load("end to end", 1, 2048, 64, cache="captured fixed"),
)  # fmt: skip
TOY_LLAMA = (
    Load("prefill", 1, 16), Load("decode", 1, 8), Load("decode", 1, 8, cache="fixed"), Load("end to end", 1, 8, 2),
)  # fmt: skip


def cases(target: str, toy: bool) -> list[Case]:
    if toy:
        models = [("toy llama", lambda: llama(64, 160, 4, 2, layers=1), (0.5,), TOY_LLAMA),
                  ("toy encoder", lambda: minilm(64, 1, 4), (0.5,), (Load("model", 2, 8),))]  # fmt: skip
    elif target == "cuda":
        models = [("llama 4096x8", lambda: llama(4096, 11008, 32, 8), (0.5, 0.22), CUDA_LLAMA)]
    else:
        models = [("llama 1024x8", lambda: llama(1024, 2816, 16, 8), (0.5, 0.25), CPU_LLAMA),
                  ("minilm shape", minilm, (0.5, 0.25), (Load("model", 8, 128),))]  # fmt: skip
    return [
        Case(model, config, budget, plan, settings)
        for model, config, budgets, settings in models
        for budget in budgets
        for plan in PLANS
    ]


def read_results(path: Path, again: bool) -> dict[str, Any]:
    if again or not path.exists():
        return {"cases": {}}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def compact(results: Mapping[str, Any]) -> str:
    """Every case and setting: speed-ups beside the FLOPs ratio, and how much of it the modules reach.

    docs/why-not-faster.md shows it as it is printed.
    """
    is_predicted = "predicted_for" in results
    rows = []
    for name, case in results["cases"].items():
        ratios = {side["name"]: side["flops_ratio"] for side in case["sides"]}
        dense = {row["setting"]: row for row in case["summary"] if row["name"] == "dense"}
        for row in case["summary"]:
            if row["name"] == "dense":
                continue
            times = [dense[row["setting"]]["median_ms"], row["median_ms"]]
            rows.append(
                (
                    _label(name, row), row["setting"], *(f"{time:.{2 if is_predicted else 1}f}" for time in times),
                    f"{row['speedup']:.2f}x", f"{ratios[row['name']]:.2f}x",
                    *(_predicted(dense[row["setting"]], row) if is_predicted else _of_modules(row)),
                )
            )  # fmt: skip
    last = ("predicted ms", "predicted") if is_predicted else ("modules", "modules/ratio", "GEMMs alone")
    return table(("case", "setting", "dense ms", "ms", "speed-up", "FLOPs ratio", *last), rows)


def _of_modules(row: Mapping[str, Any]) -> tuple[str, ...]:
    of_modules = ("module_speedup", "module_speedup_over_flops_ratio", "gemms_alone_over_modules")
    return tuple("-" if row[key] is None else f"{row[key]:.2f}" for key in of_modules)


def _predicted(dense: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
    """Milliseconds and speed-up by a device's profile."""
    if row.get("predicted_ms") is None:
        return "-", "-"
    return f"{row['predicted_ms']:.2f}", f"{dense['predicted_ms'] / row['predicted_ms']:.2f}x"


# ── In two parts ─────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(chosen: Sequence[Case], target: str, dtype: str, folder: Path) -> None:
    """Export each model, dense and by every plan, without weights; `side.json` says what a side keeps."""
    for model in dict.fromkeys(case.model for case in chosen):
        of_model = [case for case in chosen if case.model == model]
        dense = random_model(of_model[0].config(), dtype)
        program = trace(dense)
        sides = {"dense": (program.sites, {})}
        for case in of_model:
            sides[f"{case.budget} {case.plan}"] = planned_forms(program, case.budget, case.plan)
        for name, (sites, forms) in sides.items():
            print(f"{model}: exporting {name}", flush=True)
            into = folder / model.replace(" ", "-") / name.replace(" ", "-")
            if (into / SIDE).exists():
                continue  # made by an earlier call
            into.mkdir(parents=True, exist_ok=True)
            tree = in_forms(dense, sites, forms).to(next(dense.parameters()).dtype)
            example = checked_example(tree, dict(program.inputs))
            manifest = write_graphs(tree, into, example, target, dtype, generation=bool(dense.can_generate()))
            manifest |= {"metadata": {}, "prompts": None}
            manifest["parity"] = {"dtype": dtype, "tolerance": 0.0}
            write_text(into / MANIFEST, json.dumps(manifest))
            strip(into)
            write_text(into / SIDE, json.dumps({"name": name, "kept": kept_of(sites, forms)}))


def random_model(config: Any, dtype: str) -> Any:
    """A model of a config in the precision of its export, so that no copy in float32 has to fit beside it."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    head = AutoModelForCausalLM if config.model_type == "llama" else AutoModel
    return head.from_config(config, dtype=getattr(torch, dtype)).eval()


def time_prepared(
    chosen: Sequence[Case],
    prepared: Path,
    threads: int,
    rounds: int,
    memory: bool,
    results: dict[str, Any],
    out: Path,
) -> None:
    """Fill and time the sides of each model in turns; what CUDA's profile says of modules is nothing."""
    for model in dict.fromkeys(case.model for case in chosen):
        settings = next(case.settings for case in chosen if case.model == model)
        if all(f"{model}, {load.setting}" in results["cases"] for load in settings):
            continue
        folders = {path.parent for path in (prepared / model.replace(" ", "-")).glob(f"*/{SIDE}")}
        described = {path: json.loads((path / SIDE).read_text(encoding="utf-8")) for path in folders}
        with tempfile.TemporaryDirectory() as scratch:
            sides = [
                Contender(said["name"], fill(path, Path(scratch) / path.name, threads or None), kept=said["kept"])
                for path, said in sorted(described.items(), key=lambda item: -item[1]["kept"])
            ]
            notes = ["Exported without weights, filled with random ones where they were timed."]
            for load in settings:
                case = f"{model}, {load.setting}"
                if case in results["cases"]:
                    continue
                found = bench_sides(
                    sides, None, model, (load,), threads, notes, rounds=rounds, profile=False, memory=memory,
                    tell=lambda line, model=model: print(f"{model}: {line}", flush=True),
                )  # fmt: skip
                results["cases"][case] = found.to_json()
                write_text(out, json.dumps(results, indent=1) + "\n")


def _label(case: str, row: Mapping[str, Any]) -> str:
    """Of a row: the case's name holds the plan, or (timed from prepared graphs) the setting, which has a column."""
    return case if case.endswith(row["name"]) else f"{case.removesuffix(', ' + row['setting'])} {row['name']}"


def add_predictions(results: dict[str, Any], chosen: Sequence[Case], device: str, dtype: str) -> None:
    """What a device's profile says of every timed graph beside its time: nothing that was measured went into it."""
    clock = RooflineClock(load_device(device))
    for case in chosen:
        shape = outline(case.config())
        share, shares = case.budget, case.plan == "shared"
        if case.plan not in ("uniform", "shared"):
            continue
        sides = {"dense": {}, f"{share} {case.plan}": uniform_forms(shape.sites, share, shares_first_factors=shares)}
        for load in case.settings:
            found = results["cases"].get(f"{case.model}, {load.setting}")
            if found is None or load.phase == "end to end":
                continue
            workload = workload_of(load.phase, load.batch, load.tokens, dtype)
            predictor = Predictor(shape.sites, shape.operators, workload, clock, shape.can_generate)
            for row in found["summary"]:
                if row["name"] in sides:
                    row["predicted_ms"] = predictor.predict(sides[row["name"]]).milliseconds
    results["predicted_for"] = device


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="results; needed unless graphs are prepared only")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="export without weights, and time nothing")
    parser.add_argument("--prepared", type=Path, metavar="FOLDER", help="time what --prepare made")
    parser.add_argument(
        "--device", help="with --prepared: a device's profile whose predictions stand beside the times"
    )
    parser.add_argument("--no-memory", action="store_true", help="with --prepared: leave peak memory out")
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", default="", help="run the cases whose name contains this")
    parser.add_argument("--plan", action="append", choices=PLANS, help="repeatable (all)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--again", action="store_true", help="forget what the file holds")
    options = parser.parse_args(arguments)
    dtype = "float32" if options.target == "cpu" else "float16"
    chosen = [
        case
        for case in cases(options.target, options.toy)
        if options.case in case.name and case.plan in (options.plan or PLANS)
    ]
    if options.prepare is not None:
        prepare(chosen, options.target, dtype, options.prepare)
        return
    if options.out is None:
        parser.error("--out is missing")
    results = read_results(options.out, options.again)
    results |= {"device": Place(options.target, dtype, options.threads).identity(), "versions": versions()}
    if options.prepared is not None:
        time_prepared(
            chosen, options.prepared, options.threads, options.rounds, not options.no_memory, results, options.out
        )
        if options.device is not None:
            add_predictions(results, chosen, options.device, dtype)
            write_text(options.out, json.dumps(results, indent=1) + "\n")
        chosen = []
    for case in chosen:
        if case.name in results["cases"]:
            continue
        found = blora.bench(
            case.config(), (case.budget,), plans=(case.plan,), target=options.target,
            dtype=dtype, threads=options.threads, rounds=options.rounds, settings=case.settings,
            tell=lambda line, name=case.name: print(f"{name}: {line}", flush=True),
        )  # fmt: skip
        results["cases"][case.name] = found.to_json()
        write_text(options.out, json.dumps(results, indent=1) + "\n")
    print(compact(results), flush=True)


if __name__ == "__main__":
    main()
