"""Compress a sentence encoder on unlabelled sentences, export it to ONNX, and see what it gained and lost.

python examples/sentence_encoder.py --model all-MiniLM-L6-v2/ --sentences sentences.txt --budget 0.5 --out small/

Sentences are one a line, or a CSV of pairs whose scores are not read. With --pairs (a CSV of two sentences and a
score, such as the STS benchmark's) it also prints the rank correlation of cosines with scores, before and after.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoTokenizer

import blora_compiler as blora
from blora_compiler.evaluate import encoder_quality, read_sts
from blora_compiler.lowering import lower
from blora_compiler.report import versions
from blora_compiler.timing import time_exports

# Only the mean over tokens is used, so the pooler is neither compressed nor counted.
RULES = {"pooler*": "exclude"}


def read_sentences(path: Path) -> list[str]:
    """Each sentence once, in the order of the file."""
    if path.suffix == ".csv":
        return list(dict.fromkeys(text for pair in read_sts(path) for text in (pair.first, pair.second)))
    return list(dict.fromkeys(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()))


def batches_of(sentences: list[str], tokenizer, size: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Sentences of similar length together, so that little is padding."""
    ordered = sorted(sentences, key=len)
    batches = []
    for first in range(0, len(ordered), size):
        encoded = tokenizer(
            ordered[first : first + size], padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        batches.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
    random.Random(0).shuffle(batches)
    return batches


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a sentence encoder that pools by the mean")
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--budget", default="0.5")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32, help="sentences a step")
    parser.add_argument("--length", type=int, default=128, help="longest sentence, in tokens")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--hidden-weight", type=float, default=0.0, help="of the blocks' outputs in the loss")
    parser.add_argument("--pooled-weight", type=float, default=1.0, help="of the sentences' embeddings in the loss")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--json", type=Path, help="also write what was found here")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    batches = batches_of(read_sentences(options.sentences), tokenizer, options.batch, options.length)
    compiled = blora.compile(
        options.model,
        options.budget,
        rules=RULES,
        calibration=batches[: max(1, 1024 // options.batch)],
        train=batches,
        distill=blora.DistillConfig(
            steps=options.steps,
            learning_rate=options.learning_rate,
            hidden_weight=options.hidden_weight,
            pooled_weight=options.pooled_weight,
            retention_fraction=0.0,
        ),
        on_record=print,
    )
    compiled.save(options.out / "model")
    artifact = compiled.export(options.out / "onnx")
    dense = lower(compiled.source.model, options.out / "onnx-dense", inputs=dict(compiled.program.inputs))
    found: dict[str, float] = {}
    for batch in (1, 8):
        timings = {
            timing.name: timing.median_ms
            for timing in time_exports(
                {"dense": dense, "compressed": artifact}, batch=batch, tokens=options.length, repeats=options.repeats
            )
        }
        found[f"speedup {batch}x{options.length}"] = timings["dense"] / timings["compressed"]
        print(
            f"{batch} sentences of {options.length} tokens: {1e3 * batch / timings['dense']:.0f} a second dense, "
            f"{1e3 * batch / timings['compressed']:.0f} compressed"
        )
    if options.pairs is not None:
        pairs = read_sts(options.pairs)
        teacher = compiled.source.model
        for name, model in (("dense", teacher), ("compressed", compiled.module)):
            quality = encoder_quality(model, teacher, tokenizer, pairs, max_length=options.length)
            found[f"spearman {name}"] = quality.spearman or 0.0
            print(f"{name}: {quality}")
    if options.json is not None:
        seconds = {record.stage: round(record.seconds, 1) for record in compiled.records}
        settings = {name: value for name, value in vars(options).items() if isinstance(value, (int, float, str))}
        found_by = {
            "settings": settings,
            "fraction": compiled.plan.fraction,
            "seconds": seconds,
            "versions": versions(),
        }
        del settings["model"]  # a path
        options.json.write_text(json.dumps({**found_by, "found": found}, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
