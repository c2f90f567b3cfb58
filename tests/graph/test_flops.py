"""FLOPs of the whole graph agree with torch's counter, and single sites with counts made by hand."""

from __future__ import annotations

import pytest
import torch
from blora_compiler.cost_models.flops import FlopsCostModel, whole_graph_cost
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blora_compiler.graph import Program
from blora_compiler.profiling import profile
from blora_compiler.rewriting import fold, insert, settle
from blora_compiler.tracing import trace
from blora_compiler.values import Cost, Dense, Factored, Removed, Site, Workload
from tests.models import MODELS, build, example_inputs


def counted(program: Program, inputs) -> int:
    # The fused attention kernel counts as zero on the CPU, so attention runs as plain arithmetic.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        program.call_graph(inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "tokens"), [(2, 8), (3, 24)])
def test_the_whole_graph_agrees_with_torchs_counter(name, batch, tokens):
    program = trace(build(name), example_inputs(name))
    inputs = {}
    for key, value in program.inputs.items():
        shape = (batch, *value.shape[1:]) if name == "vit" else (batch, tokens, *value.shape[2:])
        inputs[key] = torch.randn(shape) if value.is_floating_point() else torch.ones(shape, dtype=value.dtype)
    cost = whole_graph_cost(program.sites, program.operators, {}, Workload(batch=batch, tokens=tokens))
    assert cost.flops == counted(program, inputs)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_once(name):
    model = build(name)
    program = trace(model, example_inputs(name))
    cost = whole_graph_cost(program.sites, program.operators, {}, Workload())
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert cost.weight_bytes == 4 * cost.params


@pytest.mark.parametrize("name", MODELS)
def test_a_compressed_graph_agrees_too(name):
    program = trace(build(name), example_inputs(name))
    forms = {s.name: Factored(max(1, s.break_even_rank // 3)) for s in program.sites if s.kind != "head"}
    branched, _ = insert(program, forms, profile(program, [], kind="plain"))
    folded, _ = fold(settle(branched, forms), forms)
    first = next(iter(program.inputs.values()))
    cost = whole_graph_cost(
        program.sites, program.operators, forms, Workload(batch=first.shape[0], tokens=first.shape[1])
    )
    assert cost.flops == counted(folded, folded.inputs)


SITE = Site("s", "s.weight", in_features=48, out_features=192, rows=("batch*tokens",), group="s", bias="s.bias")


def test_one_site_by_hand():
    model, workload = FlopsCostModel(), Workload(batch=3, tokens=5)
    rows = 15
    assert model.cost(SITE, Dense(), workload) == Cost(
        flops=2 * rows * 48 * 192, elementwise=rows * 192, weight_bytes=4 * (48 * 192 + 192),
        activation_bytes=4 * rows * (48 + 192), params=48 * 192 + 192,
    )  # fmt: skip
    assert model.cost(SITE, Factored(16), workload) == Cost(
        flops=2 * rows * 16 * (48 + 192), elementwise=rows * 192, weight_bytes=4 * (16 * 240 + 192),
        activation_bytes=4 * rows * (48 + 2 * 16 + 192), params=16 * 240 + 192,
    )  # fmt: skip
    assert model.cost(SITE, Removed(), workload) == Cost()


def test_break_even_is_the_first_rank_that_saves_nothing():
    model, workload = FlopsCostModel(), Workload()
    dense = model.cost(SITE, Dense(), workload).flops
    assert model.cost(SITE, Factored(SITE.break_even_rank - 1), workload).flops < dense
    assert model.cost(SITE, Factored(SITE.break_even_rank), workload).flops >= dense


def test_a_tied_head_costs_no_bytes_until_it_is_compressed():
    head = Site("h", "h.weight", 64, 128, ("batch*tokens",), "h", kind="head", tied=True)
    model, workload = FlopsCostModel(), Workload()
    assert model.cost(head, Dense(), workload).weight_bytes == 0
    assert model.cost(head, Factored(8), workload).weight_bytes == 4 * 8 * (64 + 128)


def test_decode_attention_counts_the_context():
    program = trace(build("llama"))
    attention = [operator for operator in program.operators if operator.kind == "attention"]
    cost = FlopsCostModel().operator_cost(attention[0], Workload(phase="decode", batch=2, tokens=1, context=31))
    heads, size = 4, 16
    assert cost.flops == 2 * (2 * 2 * heads * 1 * 32 * size)
