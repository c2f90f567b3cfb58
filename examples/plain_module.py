"""Compress a module that is not from Hugging Face, with batches of your own, and run it in ONNX Runtime.

python examples/plain_module.py --budget 0.5 --out compressed/
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import blora_compiler as blora


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="0.5")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(96, 4, 256, batch_first=True), 2).eval()
    batches = [torch.randn(4, 24, 96) for _ in range(16)]  # yours: what the model sees in use

    compiled = blora.compile(
        model,
        options.budget,
        calibration=batches,
        train=batches,
        distill=blora.DistillConfig(steps=options.steps, learning_rate=5e-4),
        on_record=print,
    )
    artifact = compiled.export(options.out)
    session = artifact.session("model")
    example = batches[0]
    (mine,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    with torch.no_grad():
        reference = model(example)
    distance = float((torch.from_numpy(mine) - reference).square().mean() / reference.square().mean())
    print(f"relative squared distance to the original: {distance:.4f}")
    return distance


if __name__ == "__main__":
    main()
