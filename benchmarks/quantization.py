"""Low rank and quantised weights, alone and together: size, speed and quality of each, from the same exports.

    python benchmarks/quantization.py --out benchmarks/results/quantization-cpu.json
    blora compile MODEL --budget 0.25 --train TEXT --no-export --out run/
    python benchmarks/quantization.py --student run/ --out benchmarks/results/quantization-cpu.json

The bundled model, dense and at two budgets, is exported in float32, int8 and int4. Sizes are whole export folders.
Times are medians of interleaved runs, all exports in turns of one run. Quality is that of the exports themselves, run
through ONNX Runtime token by token, on 32 windows of 257 tokens of the bundled validation text, window i starting at
token 768 i; KL is to the dense float32 model in PyTorch. Students are fitted and not trained unless --distill-steps
says so; --student adds one that `blora compile` trained, or that `Compiled.save` wrote. What is compared is what
quantisation adds to each. With --work exports and their quality stay in a folder, and a later run takes them from
there and times them anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import blora_compiler as blora
from blora_compiler.artifact import Artifact
from blora_compiler.calibration import evaluation_sequences
from blora_compiler.cli import demo_config
from blora_compiler.export_quality import export_quality
from blora_compiler.folders import write_text
from blora_compiler.lowering import lower
from blora_compiler.measuring import in_forms, uniform_forms
from blora_compiler.outline import outline_of
from blora_compiler.report import describe_quantization, table, versions
from blora_compiler.source import BUNDLED_MODEL, BUNDLED_TRAIN_TEXT, BUNDLED_VALIDATION_TEXT, Source, load_source
from blora_compiler.timing import time_exports
from blora_compiler.tracing import trace

BUDGETS = (1.0, 0.5, 0.25)
QUANTIZE = (None, "int8", "int4")
THREADS = 2
WINDOWS = 32


def form_of(budget: float) -> str:
    """What the model at a budget is called."""
    return "dense" if budget == 1.0 else f"low rank {budget}"


def name_of(form: str, quantize: str | None) -> str:
    """What a row is called."""
    return form if quantize is None else f"{form} + {quantize}"


def opened(folder: Path, forms: Sequence[str]) -> dict[str, Artifact]:
    """The exports of some forms in a folder; nothing unless all are there."""
    names = [name_of(form, quantize) for form in forms for quantize in QUANTIZE]
    complete = all((folder / name).exists() for name in names)
    return {name: Artifact.load(folder / name, THREADS) for name in names} if complete else {}


def exports_of(budget: float, distill_steps: int, folder: Path) -> dict[str, Artifact]:
    """The bundled model at one budget, exported in every number of bits; row name -> export."""
    if found := opened(folder, (form_of(budget),)):
        return found
    trains = distill_steps > 0 and budget < 1.0
    compiled = blora.compile(
        BUNDLED_MODEL, budget, calibration=BUNDLED_TRAIN_TEXT, train=BUNDLED_TRAIN_TEXT if trains else None,
        distill=demo_config(distill_steps) if trains else None,
        folder=folder / (f"trained {budget}" if trains else "profile"),  # untrained budgets share one profile
        on_record=lambda record: print(f"[{budget}] {record}", flush=True),
    )  # fmt: skip
    for quantize in QUANTIZE:
        name = name_of(form_of(budget), quantize)
        artifact = compiled.export(folder / name, quantize=quantize, prompts=[[1, 2, 3, 4, 5]], new_tokens=16)
        print(f"[{budget}] {name}: {artifact.parity}", flush=True)
    return opened(folder, (form_of(budget),))


def student_exports(student: Path, folder: Path) -> dict[str, Artifact]:
    """A student as it was saved, exported in every number of bits; row name -> export."""
    loaded = blora.load(student / "model" if (student / "model").is_dir() else student)
    form = f"{form_of(round(loaded.plan.fraction, 2))}, trained"
    if found := opened(folder, (form,)):
        return found
    for quantize in QUANTIZE:
        name = name_of(form, quantize)
        artifact = lower(
            loaded.module, folder / name, inputs=loaded.inputs, quantize=quantize,  # type: ignore[arg-type]
            site_names=loaded.sites, prompts=[[1, 2, 3, 4, 5]], new_tokens=16, tokenizer=loaded.tokenizer,
        )  # fmt: skip
        print(f"[student] {name}: {artifact.parity}", flush=True)
    return opened(folder, (form,))


def training_of(student: Path) -> str | None:
    """How a run folder says that its student was trained; None where there is no such folder."""
    settings = student / "run.json"
    return json.loads(settings.read_text(encoding="utf-8")).get("distill") if settings.exists() else None


def large_exports(folder: Path) -> dict[str, Artifact]:
    """A Llama with random weights, too large for the caches, in the same forms: for its speed and size alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    forms = [form_of(budget) for budget in BUDGETS]
    if found := opened(folder, forms):
        return found
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
            num_key_value_heads=8, vocab_size=4096, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    program = trace(model)
    sites = [site for site in outline_of(program, "llama").sites if site.kind != "head"]
    for budget in BUDGETS:
        tree = in_forms(model, sites, {} if budget == 1.0 else uniform_forms(sites, budget))
        for quantize in QUANTIZE:
            name = name_of(form_of(budget), quantize)
            artifact = lower(
                tree, folder / name, inputs=dict(program.inputs), quantize=quantize,  # type: ignore[arg-type]
                prompts=[[1, 2, 3, 4, 5]], new_tokens=2, tolerance=1e-3,
            )  # fmt: skip
            print(f"[1024 wide] {name}: {artifact.parity}", flush=True)
    return opened(folder, forms)


def sizes_and_times(exports: Mapping[str, Artifact], tokens: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Row name -> bytes on disk, milliseconds with quartiles, parity and what was quantised."""
    rows: dict[str, dict[str, Any]] = {
        name: {
            "bytes": sum(path.stat().st_size for path in artifact.files),
            "quantization": describe_quantization(artifact),
            "parity": artifact.parity.to_json(),
        }
        for name, artifact in exports.items()
    }
    for timing in time_exports(exports, tokens=tokens, repeats=repeats):
        rows[timing.name][timing.setting.split()[0]] = {
            "setting": timing.setting, "median_ms": timing.median_ms, "low_ms": timing.low_ms,
            "high_ms": timing.high_ms,
        }  # fmt: skip
    return rows


def measure(
    folder: Path,
    budgets: Sequence[float],
    distill_steps: int = 0,
    tokens: int = 256,
    repeats: int = 15,
    most_windows: int = WINDOWS,
    student: Path | None = None,
) -> dict[str, Any]:
    """The bundled model in every form: what the result file holds of it."""
    source = load_source(BUNDLED_MODEL)
    exports: dict[str, Artifact] = {}
    for budget in budgets:
        exports |= exports_of(budget, distill_steps, folder)
    if student is not None:
        exports |= student_exports(student, folder)
    rows = sizes_and_times(exports, tokens, repeats)
    for name, artifact in exports.items():
        rows[name]["quality"] = quality_of(name, artifact, source, most_windows)
    trained = {} if student is None else {"student": training_of(student)}
    return {"distill_steps": distill_steps, **trained, "threads": THREADS, "versions": versions(), "rows": rows}


def quality_of(name: str, artifact: Artifact, source: Source, most_windows: int) -> dict[str, Any]:
    """Perplexity and KL of an export, kept in a file beside its folder."""
    kept = artifact.folder.parent / f"{name}.quality.json"
    if not kept.exists():
        windows, stride = evaluation_sequences(source, BUNDLED_VALIDATION_TEXT)
        assert windows is not None
        quality = export_quality(artifact, source.model, windows[:most_windows], stride=stride)
        print(f"{name}: {quality}", flush=True)
        write_text(kept, json.dumps(quality.to_json()))
    return dict(json.loads(kept.read_text(encoding="utf-8")))


def report(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table as markdown, sizes and times over the dense float32 export's; docs/quantization.md shows it."""
    dense = rows[form_of(1.0)]
    lines = []
    for name, row in rows.items():
        speeds = [f"{dense[p]['median_ms'] / row[p]['median_ms']:.2f}x" for p in ("prefill", "decode")]
        quality = row.get("quality")
        scores = [] if quality is None else [f"{quality['perplexity']:.2f}", f"{quality['kl']:.4f}"]
        lines.append((name, f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / dense['bytes']:.2f}", *speeds, *scores))
    timed = [dense[phase]["setting"] for phase in ("prefill", "decode")]
    scored = ("perplexity", "KL") if "quality" in dense else ()
    return table(("", "MB", "of dense", *timed, *scored), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--distill-steps", type=int, default=0, help="train the students for so many steps (0)")
    parser.add_argument("--student", type=Path, help="a run folder of `blora compile`, or what `Compiled.save` wrote")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="of rows beside the dense model's")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--large", action="store_true", help="time a 1024-wide model with random weights too")
    parser.add_argument("--work", type=Path, help="keep the exports here, and take those that are here already")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.work or Path(scratch)
        budgets = tuple(dict.fromkeys((1.0, *options.budgets)))
        result = measure(
            folder / "bundled", budgets, options.distill_steps, repeats=options.repeats, student=options.student
        )
        if options.large:
            result["large"] = sizes_and_times(large_exports(folder / "large"), 256, options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report(result["rows"]))
    if options.large:
        print(f"\n{report(result['large'])}")


if __name__ == "__main__":
    main()
