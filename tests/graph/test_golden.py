"""Printed plans and graphs, kept as files: a refactor leaves them as they are.

To accept a change that is meant, run this file with BLORA_WRITE_GOLDEN=1 set, and read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import blora_compiler as blora
from blora_compiler.profiling import profile
from blora_compiler.rewriting import fold, insert, settle
from blora_compiler.tracing import trace
from tests.models import build, example_inputs

GOLDEN = Path(__file__).parents[1] / "golden"


def compare(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("BLORA_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_a_plan_from_shapes_alone_prints_as_before():
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=1000, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    plan = blora.make_plan(config, 0.4, rules={"*.down_proj": {"min_rank": 64}, "*.layers.1.self_attn.*": "dense"})
    compare("plan_llama.txt", plan.table() + plan.summary() + "\n")


@pytest.mark.parametrize("name", ["llama", "encoder"])
def test_a_folded_graph_prints_as_before(name):
    program = trace(build(name), example_inputs(name))
    rules = {"*layers.*": {"min_rank": 4}}  # so that no branch of these random weights is removed
    options = {"inputs": example_inputs(name), "damage": "plain", "rank_multiple": 4, "rules": rules}
    plan = blora.make_plan(build(name), 0.5, **options)
    branched, _ = insert(program, plan.forms, profile(program, [], kind="plain"))
    folded, _ = fold(settle(branched, plan.forms), plan.forms)
    lines = [
        f"{node.op} {node.target} {type(folded.graph.get_submodule(str(node.target))).__name__}"
        if node.op == "call_module"
        else f"{node.op} {node.target}"
        for node in folded.graph.graph.nodes
        if node.op in ("call_module", "output", "placeholder") or "scaled_dot" in str(node.target)
    ]
    compare(f"folded_{name}.txt", "\n".join(lines) + "\n")
