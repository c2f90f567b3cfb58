"""A model above 2 GB, the most that one protobuf holds: exported dense and at 0.5, verified, opened again, run.

    python benchmarks/large_model.py --out benchmarks/results/large-model.json

A Llama with random weights (8 blocks of width 2560, 2.4 GB in float32) is planned by the spectral prior, gets random
factors, and goes through `lower` like any other. Each step runs in a process of its own, so that its peak memory is
its own. Then the exports are served both ways that the CPU has: weights packed by each session, and read in place
from the mapped file (`low_memory`). The times want the machine to themselves.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from blora_compiler.artifact import Artifact
from blora_compiler.benching import kept_of, planned_forms
from blora_compiler.folders import write_text
from blora_compiler.measuring import export_for_timing, in_forms
from blora_compiler.report import versions
from blora_compiler.source import load_source, random_weights
from blora_compiler.sweeping import Place
from blora_compiler.timing import call_of, interleaved
from blora_compiler.tracing import trace

SIDES = ("dense", "0.5")
LOADS = (("prefill", 256), ("prefill", 64), ("decode", 256))
TOY_LOADS = (("prefill", 16), ("decode", 8))


def config(toy: bool) -> Any:
    width, mlp, layers, heads = (64, 160, 1, 4) if toy else (2560, 6912, 8, 20)
    return LlamaConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, vocab_size=4096, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def export(side: str, folder: Path, toy: bool) -> dict[str, Any]:
    """Plan, factor, lower, verify. `lower` opens the files again before it returns them."""
    started = time.perf_counter()
    dense = random_weights(load_source(config(toy)))
    program = trace(dense)
    sites, inputs = program.sites, dict(program.inputs)
    forms = {} if side == "dense" else planned_forms(program, side, "prior")[1]
    tree = in_forms(dense, sites, forms)
    del dense, program
    artifact = export_for_timing(tree, folder / side, Place(), inputs)
    return {
        "kept": kept_of(sites, forms),
        "parameter_bytes": artifact.manifest["parameter_bytes"],
        "weights_file_bytes": artifact.manifest["files"]["weights.data"]["bytes"],
        "parity": artifact.parity.to_json(),
        "unmapped_sites": artifact.unmapped_sites,
        "seconds": time.perf_counter() - started,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def serve(side: str, folder: Path, low_memory: bool) -> dict[str, Any]:
    """Load, generate, and say what both sessions hold: pages shared with others counted by this process's part."""
    before = proportional_bytes()
    started = time.perf_counter()
    artifact = Artifact.load(folder / side, low_memory=low_memory)
    generated = artifact.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=6)
    return {
        "first_tokens_s": time.perf_counter() - started,
        "generated": generated[0].tolist(),
        "memory_bytes": proportional_bytes() - before,
    }


def proportional_bytes() -> int:
    """Resident memory of this process; a page that is mapped twice counts once (`Pss`)."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def times(folder: Path, toy: bool) -> list[dict[str, Any]]:
    """Both ways to hold weights, in turns of one run."""
    found = []
    for side in SIDES:
        ways = {"packed": Artifact.load(folder / side), "mapped": Artifact.load(folder / side, low_memory=True)}
        for phase, tokens in TOY_LOADS if toy else LOADS:
            calls = {name: call_of(artifact.pinned(), phase, 1, tokens) for name, artifact in ways.items()}
            timed = interleaved(
                f"{phase} 1x{tokens}" if phase == "prefill" else f"decode, context {tokens}", calls, 6
            )
            found += [{"side": side, **timing.to_json()} for timing in timed]
    return found


def in_a_process(folder: Path, *step: str) -> Any:
    """Run one step of this script and read what it prints last."""
    command = [sys.executable, __file__, "--folder", str(folder), "--step", *step]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(step)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_step(step: Sequence[str], folder: Path) -> Any:
    name, *rest = step
    if name == "export":
        return export(rest[0], folder, "toy" in rest)
    if name == "serve":
        return serve(rest[0], folder, rest[1] == "mapped")
    return times(folder, "toy" in rest)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="keeps the exports, and uses those that are there")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--no-times", action="store_true", help="leave the times that --out holds as they are")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        print(json.dumps(run_step(options.step, options.folder)))
        return
    if options.out is None:
        parser.error("--out is missing")
    toy = ("toy",) if options.toy else ()
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"exports": {}}
    results |= {"config": config(options.toy).to_diff_dict(), "device": Place().identity(), "versions": versions()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for side in SIDES:
            if side not in results["exports"] or not (folder / side / "export.json").exists():
                results["exports"][side] = in_a_process(folder, "export", side, *toy)
                write_text(options.out, json.dumps(results, indent=1) + "\n")  # each step is a minute or more
                print(f"exported {side}: {results['exports'][side]}", flush=True)
        results["served"] = {
            side: {way: in_a_process(folder, "serve", side, way) for way in ("packed", "mapped")} for side in SIDES
        }
        write_text(options.out, json.dumps(results, indent=1) + "\n")
        for side, ways in results["served"].items():
            if ways["packed"]["generated"] != ways["mapped"]["generated"]:
                raise SystemExit(f"{side}: packed and mapped weights generate other tokens: {ways}")
            print(side, {way: f"{found['memory_bytes'] / 1e9:.2f} GB" for way, found in ways.items()}, flush=True)
        if not options.no_times:
            results["times"] = in_a_process(folder, "times", *toy)
            write_text(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
