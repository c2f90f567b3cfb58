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
    name: str
    config: Callable[[], Any]
    budget: float
    settings: tuple[Load, ...]


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


CPU_LLAMA = (Load("prefill", 1, 512), Load("decode", 1, 256), Load("end to end", 1, 512, 16))
CUDA_LLAMA = (
    Load("prefill", 1, 2048), Load("prefill", 8, 512), Load("prefill", 16, 512), Load("decode", 1, 512),
    Load("decode", 16, 512), Load("decode", 64, 512), Load("end to end", 1, 2048, 64),
)  # fmt: skip
TOY_LLAMA = (Load("prefill", 1, 16), Load("decode", 1, 8), Load("end to end", 1, 8, 2))


def cases(target: str, toy: bool) -> list[Case]:
    if toy:
        return [
            Case("toy llama 0.5", lambda: llama(64, 160, 4, 2, layers=1), 0.5, TOY_LLAMA),
            Case("toy encoder 0.5", lambda: minilm(64, 1, 4), 0.5, (Load("model", 2, 8),)),
        ]
    if target == "cuda":
        return [
            Case(f"llama 4096x8 {kept}", lambda: llama(4096, 11008, 32, 8), kept, CUDA_LLAMA) for kept in (0.5, 0.22)
        ]
    return [
        *(Case(f"llama 1024x8 {kept}", lambda: llama(1024, 2816, 16, 8), kept, CPU_LLAMA) for kept in (0.5, 0.25)),
        *(Case(f"minilm shape {kept}", minilm, kept, (Load("model", 8, 128),)) for kept in (0.5, 0.25)),
    ]


def read_results(path: Path, again: bool) -> dict[str, Any]:
    if again or not path.exists():
        return {"cases": {}}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def compact(results: Mapping[str, Any]) -> str:
    """Every case, side and setting: speed-ups beside the FLOPs ratio, and how much of it the modules reach."""
    rows = []
    for name, case in results["cases"].items():
        ratios = {side["name"]: side["flops_ratio"] for side in case["sides"]}
        for row in case["summary"]:
            if row["name"] == "dense":
                continue
            modules = (row["module_speedup"], row["module_speedup_over_flops_ratio"])
            rows.append(
                (
                    name, row["setting"], row["name"], f"{row['speedup']:.2f}x", f"{ratios[row['name']]:.2f}x",
                    *("-" if value is None else f"{value:.2f}" for value in modules),
                )
            )  # fmt: skip
    return table(("case", "setting", "plan", "end to end", "FLOPs ratio", "modules", "modules/ratio"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", default="", help="run the cases whose name contains this")
    parser.add_argument("--plan", action="append", choices=("uniform", "prior"), help="repeatable (both)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--again", action="store_true", help="forget what the file holds")
    options = parser.parse_args(arguments)
    results = read_results(options.out, options.again)
    dtype = "float32" if options.target == "cpu" else "float16"
    results |= {"device": Place(options.target, dtype, options.threads).identity(), "versions": versions()}
    for case in cases(options.target, options.toy):
        if options.case not in case.name or case.name in results["cases"]:
            continue
        found = blora.bench(
            case.config(), (case.budget,), plans=options.plan or ("uniform", "prior"), target=options.target,
            dtype=dtype, threads=options.threads, rounds=options.rounds, settings=case.settings,
            tell=lambda line, name=case.name: print(f"{name}: {line}", flush=True),
        )  # fmt: skip
        results["cases"][case.name] = found.to_json()
        write_text(options.out, json.dumps(results, indent=1) + "\n")
    print(compact(results), flush=True)


if __name__ == "__main__":
    main()
