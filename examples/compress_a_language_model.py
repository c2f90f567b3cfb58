"""Compress a causal language model to a budget, distill it, export it, and let ONNX Runtime write a sentence.

python examples/compress_a_language_model.py --budget 0.25 --steps 300 --out compressed/
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import blora_compiler as blora
from blora_compiler.source import BUNDLED_MODEL, BUNDLED_TRAIN_TEXT, BUNDLED_VALIDATION_TEXT


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="a folder or hub id")
    parser.add_argument("--train", default=str(BUNDLED_TRAIN_TEXT), help="text to distill on")
    parser.add_argument("--eval", default=str(BUNDLED_VALIDATION_TEXT), help="text to measure on")
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt", default="It was a dark night, and")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)

    compiled = blora.compile(
        options.model,
        options.budget,
        train=options.train,
        evaluation=options.eval,
        distill=blora.DistillConfig(steps=options.steps, length=options.length),
        on_record=print,
    )
    compiled.save(options.out / "model")
    artifact = compiled.export(options.out / "onnx")

    tokenizer = compiled.source.tokenizer
    prompt = torch.tensor([tokenizer(options.prompt)["input_ids"]])
    text = tokenizer.decode(artifact.generate(prompt, max_new_tokens=24)[0])
    print(f"{artifact.parity}\n\n{text}")
    return text


if __name__ == "__main__":
    main()
