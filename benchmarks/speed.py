"""Is smaller faster? Dense against compressed, lowered alike, at the sizes that the speed targets are stated for.

    python benchmarks/speed.py --out benchmarks/results/speed-cpu.json
    python benchmarks/speed.py --target cuda --out benchmarks/results/speed-cuda.json

Models have random weights, filled in on the spot. Every case is one `blora.bench`; its result is written to the file
as soon as it is there, and a case that the file already holds is not run again (`--again` forgets them). With
`--case TEXT` only cases run whose name contains the text. The compact table of all cases in the file comes last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blora_compiler as blora
from blora_compiler.benching import Load
from blora_compiler.folders import write_text
from blora_compiler.report import table, versions
from blora_compiler.sweeping import Place


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


PLANS = ("uniform", "shared", "interpolative", "narrow", "prior")
CPU_LLAMA = (
    Load("prefill", 1, 512), Load("decode", 1, 256), Load("decode", 1, 256, cache="fixed"),
    Load("end to end", 1, 512, 16),
)  # fmt: skip
CUDA_LLAMA = (
    Load("prefill", 1, 2048), Load("prefill", 8, 512), Load("prefill", 16, 512),
    *(Load("decode", batch, 512, cache=cache) for batch in (1, 16, 64) for cache in ("growing", "captured")),
    Load("end to end", 1, 2048, 64),
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
    rows = []
    for name, case in results["cases"].items():
        ratios = {side["name"]: side["flops_ratio"] for side in case["sides"]}
        dense = {row["setting"]: row["median_ms"] for row in case["summary"] if row["name"] == "dense"}
        for row in case["summary"]:
            if row["name"] == "dense":
                continue
            of_modules = ("module_speedup", "module_speedup_over_flops_ratio", "gemms_alone_over_modules")
            rows.append(
                (
                    name, row["setting"], f"{dense[row['setting']]:.1f}", f"{row['median_ms']:.1f}",
                    f"{row['speedup']:.2f}x", f"{ratios[row['name']]:.2f}x",
                    *("-" if row[key] is None else f"{row[key]:.2f}" for key in of_modules),
                )
            )  # fmt: skip
    return table(
        ("case", "setting", "dense ms", "ms", "speed-up", "FLOPs ratio", "modules", "modules/ratio", "GEMMs alone"),
        rows,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", default="", help="run the cases whose name contains this")
    parser.add_argument("--plan", action="append", choices=PLANS, help="repeatable (all)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--again", action="store_true", help="forget what the file holds")
    options = parser.parse_args(arguments)
    results = read_results(options.out, options.again)
    dtype = "float32" if options.target == "cpu" else "float16"
    results |= {"device": Place(options.target, dtype, options.threads).identity(), "versions": versions()}
    for case in cases(options.target, options.toy):
        if options.case not in case.name or case.plan not in (options.plan or PLANS) or case.name in results["cases"]:
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
