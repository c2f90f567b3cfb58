"""What each ONNX pass is worth: the same graphs with and without it, interleaved; dense and compressed end to end.

    python benchmarks/passes.py --out benchmarks/results/passes-cpu.json
    python benchmarks/passes.py --model gpt2 --repeats 15 --out benchmarks/results/passes-gpt2-cpu.json

A Llama or a GPT-2 with random weights (speed does not depend on them), dense and at uniform shares of the break-even
rank, is exported once each. Then its graphs are rewritten with all passes, without those that the model is there for
(`none`), and with all but one. Every run is also compared with the one without them, and the largest difference of
the last position's logits is recorded beside the times. A pass that others build on takes them along: without
KeepLastPosition there is no gather that LastPositionEarly could move, and attention that rotates is not cut.
GPT-2 has a table of single passes for decode steps too, and one variant more, whose activation stays in the eight
steps that are exported: ONNX Runtime makes one kernel of them as it opens a session, unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from blora_compiler.passes.onnx_share_weights import ShareWeights
from torch import nn

from blora_compiler import lowering
from blora_compiler.artifact import WEIGHTS, open_session, session_options
from blora_compiler.measuring import in_forms, uniform_forms
from blora_compiler.outline import outline_of
from blora_compiler.report import table, versions
from blora_compiler.timing import bound_call, interleaved
from blora_compiler.tracing import trace
from blora_compiler.values import Factored

# Model -> the passes that are timed on it, where they have most to do. `none` leaves these out and no others.
PASSES = {
    "llama": (
        "CollapseReshapes", "RotateBeforeAttention", "MultiplyMaskedRows", "KeepLastPosition", "LastPositionEarly",
        "AttendInParts",
    ),
    "gpt2": ("UnflattenGemms", "DropSameReshapes"),
}  # fmt: skip
KEPT = (1.0, 0.5, 0.25)
IN_STEPS = "session without its fusion of GELU"
# ONNX Runtime's own names for what finds a GELU by its steps.
GELU_FUSIONS = ["FastGeluFusion", "GeluFusionL1", "GeluFusionL2", "BiasGeluFusion"]


def variants(model: str) -> dict[str, Collection[str]]:
    """Variant -> the passes it leaves out."""
    found: dict[str, Collection[str]] = {"all": (), "none": PASSES[model]}
    found |= {f"without {name}": (name,) for name in PASSES[model]}
    return found | ({IN_STEPS: ()} if model == "gpt2" else {})


@dataclass(frozen=True)
class Size:
    """The model and what is timed. The defaults are what the committed results of the Llama were made with."""

    model: str = "llama"
    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 8
    heads: int = 16
    kv_heads: int = 8
    vocabulary: int = 4096
    tokens: int = 512
    context: int = 256
    threads: int = 2
    multiple: int = 8


GPT2 = Size(model="gpt2", hidden=512, intermediate=2048, layers=5, heads=8, kv_heads=8, vocabulary=3000)


def built(size: Size) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if size.model == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=size.hidden, n_inner=size.intermediate, n_layer=size.layers, n_head=size.heads,
                vocab_size=size.vocabulary, n_positions=2 * size.tokens, bos_token_id=0, eos_token_id=0,
            )
        ).eval()  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, vocab_size=size.vocabulary,
            max_position_embeddings=2 * size.tokens, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip


def export_variants(size: Size, folder: Path) -> dict[str, Any]:
    """Write every variant of every graph to `folder/KEPT/VARIANT`; returns FLOPs ratios and counts of the passes."""
    model = built(size)
    program = trace(model)
    sites = [site for site in outline_of(program, size.model).sites if site.kind != "head"]
    example = lowering.checked_example(model, dict(program.inputs))
    found: dict[str, Any] = {"flops_ratio": {}, "counts": {}}
    for kept in KEPT:
        forms = {} if kept == 1.0 else uniform_forms(sites, kept, size.multiple)
        dense = sum(site.in_features * site.out_features for site in sites)
        runs = sum(
            form.rank * (site.in_features + site.out_features)
            if isinstance(form := forms.get(site.name), Factored)
            else site.in_features * site.out_features
            for site in sites
        )
        found["flops_ratio"][str(kept)] = runs / dense
        exported = lowering.export_graphs(in_forms(model, sites, forms), example, "cpu", True)
        for variant, without in variants(size.model).items():
            models = {name: graph.clone() for name, graph in exported.models.items()}
            results = {
                name: lowering.rewrite_for_speed(name, graph, "cpu", without) for name, graph in models.items()
            }
            counts = {
                name: {label: result.applied for label, result in passes.items()} for name, passes in results.items()
            }
            if variant == "all":
                found["counts"][str(kept)] = counts
            place = folder / str(kept) / variant
            place.mkdir(parents=True)
            ShareWeights(place / WEIGHTS).run(models)
            for name, graph in models.items():
                ir.save(graph, place / f"{name}.onnx")
    return found


def call(folder: Path, kept: float, variant: str, phase: str, size: Size) -> tuple[Callable[[], None], np.ndarray]:
    """A bound call of one variant, and the last position's logits of a run of it."""
    path = folder / str(kept) / variant / f"{phase}.onnx"
    if variant == IN_STEPS:
        session = onnxruntime.InferenceSession(
            str(path), session_options(size.threads, pinned=True), providers=["CPUExecutionProvider"],
            disabled_optimizers=GELU_FUSIONS,
        )  # fmt: skip
    else:
        session = open_session(path, "cpu", size.threads, pinned=True)
    new, context = (size.tokens, 0) if phase == "prefill" else (1, size.context)
    known = {
        "input_ids": np.arange(new, dtype=np.int64)[None] % size.vocabulary,
        "attention_mask": np.ones((1, context + new), np.int64),
        "position_ids": np.arange(context, context + new, dtype=np.int64)[None],
    }
    cache = np.ones((1, size.kv_heads, context, size.hidden // size.heads), np.float32)
    feeds = {value.name: known.get(value.name, cache) for value in session.get_inputs()}
    return bound_call(session, feeds, "cpu"), session.run(["logits"], feeds)[0][:, -1]


def timed(
    folder: Path, cases: Mapping[str, tuple[float, str]], phase: str, size: Size, repeats: int
) -> dict[str, Any]:
    """Case -> median and quartiles in milliseconds; all of them interleaved in one run."""
    made = {name: call(folder, kept, variant, phase, size) for name, (kept, variant) in cases.items()}
    timings = interleaved(phase, {name: run for name, (run, _) in made.items()}, repeats)
    logits = {name: values for name, (_, values) in made.items()}
    found = {}
    for timing in timings:
        kept = cases[timing.name][0]
        reference = logits.get(f"{kept} none", logits.get("none"))
        assert reference is not None, "every run has the variant without passes"
        difference = float(np.abs(logits[timing.name] - reference).max())
        found[timing.name] = {
            "median_ms": timing.median_ms, "low_ms": timing.low_ms, "high_ms": timing.high_ms,
            "largest_difference": difference,
        }  # fmt: skip
    return found


def measure(size: Size, repeats: int) -> dict[str, Any]:
    """Everything the result file holds."""
    ends = {f"{kept} {variant}": (kept, variant) for kept in KEPT for variant in ("none", "all")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = export_variants(size, folder)
        end_to_end = {
            phase: timed(folder, ends, phase, size, rounds * repeats)
            for phase, rounds in (("prefill", 1), ("decode", 6))
        }
        found["end_to_end"] = end_to_end
        for name, phase, rounds in (("single", "prefill", 1), ("single_decode", "decode", 20)):
            if phase == "decode" and size.model == "llama":
                continue  # the passes that are timed one by one there are about prompts
            found[name] = {
                str(kept): timed(
                    folder,
                    {variant: (kept, variant) for variant in variants(size.model)},
                    phase,
                    size,
                    rounds * repeats,
                )
                for kept in (1.0, 0.25)
            }
    return {"size": vars(size), "versions": versions(), **found}


def report(result: Mapping[str, Any]) -> str:
    """The two tables, as markdown."""
    rows = []
    for phase, times in result["end_to_end"].items():
        for kept in KEPT:
            none, every = times[f"{kept} none"]["median_ms"], times[f"{kept} all"]["median_ms"]
            dense = [times[f"1.0 {variant}"]["median_ms"] for variant in ("none", "all")]
            rows.append(
                (phase, kept, f"{none:.2f}", f"{every:.2f}", f"{none / every:.2f}x",
                 f"{dense[0] / none:.2f}x", f"{dense[1] / every:.2f}x")
            )  # fmt: skip
    header = ("phase", "kept", "ms without", "ms with", "passes give", "over dense without", "over dense with")
    return f"{table(header, rows)}\n\n{table_of_passes(result)}"


def table_of_passes(result: Mapping[str, Any]) -> str:
    """What each pass gives: the time without it over the time with all."""
    timings = {
        f"{phase}, kept {kept}: off / on": times
        for phase, key in (("prefill", "single"), ("decode", "single_decode"))
        for kept, times in result.get(key, {}).items()
    }
    variants = [name for name in next(iter(timings.values())) if name != "all"]
    rows = [
        (
            "all of these" if name == "none" else name.removeprefix("without "),
            *(_off_over_on(times[name], times["all"]) for times in timings.values()),
        )
        for name in variants
    ]
    return table(("pass", *timings), rows)


def _off_over_on(off: Mapping[str, float], on: Mapping[str, float]) -> str:
    """The ratio of two medians, or that one of them says nothing: its quartiles are too far apart."""
    if any(time["high_ms"] > 1.3 * time["low_ms"] for time in (off, on)):
        return "disturbed"
    return f"{off['median_ms'] / on['median_ms']:.3f}x"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--rank-multiple", type=int, default=8)
    parser.add_argument("--model", choices=tuple(PASSES), default="llama")
    options = parser.parse_args(arguments)
    size = replace(GPT2 if options.model == "gpt2" else Size(), multiple=options.rank_multiple)
    result = measure(size, options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
