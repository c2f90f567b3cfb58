"""What would a quarter of the compute do to a 70B-shaped model on two GPUs? Seconds, and no weights.

python examples/what_if.py --layers 80 --width 8192 --out what-if.html
"""

from __future__ import annotations

import argparse

from transformers import LlamaConfig

import blora_compiler as blora


def main(arguments: list[str] | None = None) -> blora.WhatIf:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0])
    parser.add_argument("--out", default="what-if.html")
    options = parser.parse_args(arguments)

    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 128,
        num_key_value_heads=max(1, options.width // 1024),
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    answers = blora.whatif(
        config,
        options.budgets,
        device=["h200", "l4"],
        workload=["prefill 1x2048", "decode 8@2048", "1 x 2048 prefill + 256 decode steps"],
    )
    print(answers.table())
    budget = min(options.budgets, key=lambda share: abs(share - 0.25))
    print(answers.compare({"budget": budget, "device": "h200"}, {"budget": budget, "device": "l4"}))
    print(f"Written to {answers.to_html(options.out)}: open it in a browser.")
    return answers


if __name__ == "__main__":
    main()
