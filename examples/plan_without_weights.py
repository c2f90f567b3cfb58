"""Ask what a budget would do to a large model, from its shape alone: nothing is downloaded or allocated.

python examples/plan_without_weights.py --layers 80 --width 8192 --budget 0.25
"""

from __future__ import annotations

import argparse

from transformers import LlamaConfig

import blora_compiler as blora


def main(arguments: list[str] | None = None) -> blora.Plan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80, help="the first stays dense, so let it be many")
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--budget", default="0.25")
    options = parser.parse_args(arguments)

    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 128,
        num_key_value_heads=max(1, options.width // 1024),
        architectures=["LlamaForCausalLM"],
    )
    plan = blora.make_plan(config, options.budget, rank_multiple=64, rules={"*.layers.0.*": "dense"})
    print(plan.table())
    print(plan.summary())
    return plan


if __name__ == "__main__":
    main()
