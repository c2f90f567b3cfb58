"""The bundled model through every stage at several budgets, and a 70B-shaped plan: one JSON with what it all took.

    python benchmarks/end_to_end.py --out benchmarks/results/cpu.json

Quality is measured on 96 windows of 257 tokens of the bundled validation text, window i starting at token 768 i.
Training is the demo's: same data, steps and settings at every budget. Times are medians of interleaved runs.
Budgets that --out already has and that are not asked for are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEFAULT_BUDGETS = (0.5, 0.25)
WINDOWS, LENGTH, STRIDE = 96, 257, 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=DEFAULT_BUDGETS)
    parser.add_argument("--steps", type=int, default=None, help="training steps; the demo's by default")
    parser.add_argument("--meta-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.meta_only:
        print(json.dumps(meta_plan()))
        return
    earlier = json.loads(options.out.read_text())["budgets"] if options.out.exists() else {}
    result: dict[str, Any] = {"machine": machine(), "meta_plan": meta_plan_in_own_process(), "budgets": earlier}
    with tempfile.TemporaryDirectory() as scratch:
        for budget in options.budgets:
            result["budgets"][str(budget)] = run(budget, options.steps, Path(scratch))
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def run(budget: float, steps: int | None, scratch: Path) -> dict[str, Any]:
    """Compile, export, time against the dense export, and report."""
    import torch

    import blora_compiler as blora
    from blora_compiler.cli import demo_config
    from blora_compiler.data import evaluation_windows, load_texts, tokenize
    from blora_compiler.lowering import lower
    from blora_compiler.source import BUNDLED_MODEL, BUNDLED_TRAIN_TEXT, BUNDLED_VALIDATION_TEXT, load_source
    from blora_compiler.timing import time_exports

    torch.set_num_threads(2)
    tokenizer = load_source(BUNDLED_MODEL).tokenizer
    windows = evaluation_windows(tokenize(load_texts(BUNDLED_VALIDATION_TEXT), tokenizer), LENGTH, STRIDE, WINDOWS)
    started = time.perf_counter()
    compiled = blora.compile(
        BUNDLED_MODEL, budget, train=BUNDLED_TRAIN_TEXT, evaluation=windows, distill=demo_config(steps), narrow=True,
        on_record=lambda record: print(f"[{budget}] {record}", flush=True),
    )  # fmt: skip
    artifact = compiled.export(
        scratch / f"onnx-{budget}", prompts=[row[: 5 + 4 * i].tolist() for i, row in enumerate(windows[:8])]
    )
    dense_folder = scratch / "onnx-dense"
    inputs: Any = dict(compiled.program.inputs)
    dense = (
        blora.Artifact.load(dense_folder)
        if dense_folder.exists()
        else lower(compiled.source.model, dense_folder, inputs=inputs)
    )
    for export in (dense, artifact):
        export.threads = 2
    timings = [
        timing
        for batch, tokens in ((1, 256), (8, 128))
        for timing in time_exports({"dense": dense, "compressed": artifact}, batch=batch, tokens=tokens)
    ]
    data = dict(compiled.report(artifact, timings).data)
    quality = data["quality"]
    data["stride"] = STRIDE
    data["kl_ratio"] = quality["compressed"]["kl"] / quality["untrained"]["kl"]
    data["perplexity_ratio"] = quality["compressed"]["perplexity"] / quality["teacher"]["perplexity"]
    data["seconds"] = time.perf_counter() - started
    return data


def meta_plan() -> dict[str, Any]:
    """Trace and plan an 80-layer, 8192-wide Llama shape on the meta device, with the spectral prior."""
    from transformers import LlamaConfig

    import blora_compiler as blora

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    started = time.perf_counter()
    plan = blora.make_plan(config, 0.25)
    return {
        "seconds": time.perf_counter() - started,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "sites": len(plan.choices) + len(plan.excluded),
        "fraction": plan.fraction,
        "gap": plan.gap,
        "damage_kind": plan.damage_kind,
    }


def meta_plan_in_own_process() -> dict[str, Any]:
    command = [sys.executable, __file__, "--out", os.devnull, "--meta-only"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(), "threads": 2}


def table(result: dict[str, Any]) -> str:
    """What the README shows, from the JSON alone."""
    from blora_compiler.report import table as markdown

    rows = []
    for budget, data in sorted(result["budgets"].items(), reverse=True):
        quality = data["quality"]
        speed = {(t["setting"], t["name"]): t["median_ms"] for t in data["timings"]}
        ratios = [
            f"{speed[setting, 'dense'] / speed[setting, 'compressed']:.2f}x"
            for setting in dict.fromkeys(setting for setting, _ in speed)
        ]
        rows.append(
            (
                budget,
                f"{data['achieved']['sites']['flops']['fraction']:.4f}",
                f"{quality['teacher']['perplexity']:.2f}",
                f"{quality['untrained']['perplexity']:.2f} / {quality['untrained']['kl']:.3f}",
                f"{quality['compressed']['perplexity']:.2f} / {quality['compressed']['kl']:.3f}",
                *ratios,
            )
        )
    settings = list(dict.fromkeys(t["setting"] for t in next(iter(result["budgets"].values()))["timings"]))
    header = ("budget", "kept", "teacher ppl", "untrained ppl / KL", "distilled ppl / KL", *settings)
    return markdown(header, rows)


def small_batches(result: dict[str, Any]) -> str:
    """What docs/why-not-faster.md shows of the same: decode steps and prompts, of one sequence and of eight."""
    from blora_compiler.report import table as markdown

    settings = ("decode 1x1, context 256", "decode 8x1, context 128", "prefill 1x256", "prefill 8x128")
    rows = []
    for budget, data in sorted(result["budgets"].items(), reverse=True):
        ms = {(t["setting"], t["name"]): t["median_ms"] for t in data["timings"]}
        pairs = [(ms[setting, "dense"], ms[setting, "compressed"]) for setting in settings]
        rows.append((budget, *(f"{dense / now:.2f}x ({dense:.2f} to {now:.2f} ms)" for dense, now in pairs)))
    return markdown(("kept", *settings), rows)


if __name__ == "__main__":
    main()
