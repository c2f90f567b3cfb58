"""Which kernels the shipped graph runs, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blora_compiler.cost_models.kernels import (
    FULL,
    FUSED,
    SESSION,
    UNFUSED,
    Kernel,
    Shared,
    fused,
    gemm,
    group_kernels,
    operator_kernels,
    pointwise,
)

from blora_compiler.values import AttentionShape, Dense, Factored, Operator, Removed, Workload, can_pack, site_groups
from tests.planning import site

WORKLOAD = Workload(batch=2, tokens=8)  # 16 rows
DECODE = Workload("decode", batch=3, tokens=1, context=99)
# GQA: 64 wide, 4 query heads and one key and value head of 16.
Q, K, V = (
    replace(site(name, 64, width), group="x", branch="attn") for name, width in (("q", 64), ("k", 16), ("v", 16))
)
O = site("o", 64, 64)  # noqa: E741  as models call it
HEAD = site("head", 64, 1000, kind="head")


def shared(kernel: Kernel, *positions_and_widths: tuple[int, int]) -> Shared:
    total = sum(width for _, width in positions_and_widths)
    return Shared(kernel, tuple((position, width / total) for position, width in positions_and_widths))


def alone(kernel: Kernel, position: int = 0) -> Shared:
    return Shared(kernel, ((position, 1.0),))


def test_a_gemm_by_hand():
    assert gemm(16, 64, 96, "sites") == Kernel(
        "gemm", "sites", flops=2 * 16 * 64 * 96, weights=64 * 96, activations=16 * 64 + 16 * 96, shape=(16, 64, 96)
    )


# ── Sites that read one input ────────────────────────────────────────────────────────────────────────────────────

DENSE = Dense()
BIASED = (replace(Q, bias="q.bias"), replace(K, bias="k.bias"), V)
BY_HAND = {
    "dense": ((Q, K, V), (DENSE, DENSE, DENSE), [
        shared(gemm(16, 64, 96, "sites"), (0, 64), (1, 16), (2, 16)),
        shared(pointwise(2 * 16 * 96, "sites", "split"), (0, 64), (1, 16), (2, 16)),
    ]),
    "factored": ((Q, K, V), (Factored(24), Factored(8), Factored(4)), [
        shared(gemm(16, 64, 36, "sites"), (0, 24), (1, 8), (2, 4)),
        shared(pointwise(2 * 16 * 36, "sites", "split"), (0, 24), (1, 8), (2, 4)),
        alone(gemm(16, 24, 64, "sites"), 0),
        alone(gemm(16, 8, 16, "sites"), 1),
        alone(gemm(16, 4, 16, "sites"), 2),
    ]),
    "dense and factored": ((Q, K, V), (Factored(24), DENSE, Factored(4)), [
        shared(gemm(16, 64, 24 + 16 + 4, "sites"), (0, 24), (1, 16), (2, 4)),
        shared(pointwise(2 * 16 * 44, "sites", "split"), (0, 24), (1, 16), (2, 4)),
        alone(gemm(16, 24, 64, "sites"), 0),
        alone(gemm(16, 4, 16, "sites"), 2),
    ]),
    "one removed": ((Q, K, V), (Removed(), DENSE, Factored(4)), [
        shared(gemm(16, 64, 20, "sites"), (1, 16), (2, 4)),
        shared(pointwise(2 * 16 * 20, "sites", "split"), (1, 16), (2, 4)),
        alone(gemm(16, 4, 16, "sites"), 2),
    ]),
    "all but one removed": ((Q, K, V), (Removed(), Removed(), Factored(4)), [
        alone(gemm(16, 64, 4, "sites"), 2),
        alone(gemm(16, 4, 16, "sites"), 2),
    ]),
    "removed": ((Q, K, V), (Removed(), Removed(), Removed()), []),
    "biases": (BIASED, (DENSE, Factored(8), DENSE), [
        shared(gemm(16, 64, 64 + 8 + 16, "sites"), (0, 64), (1, 8), (2, 16)),
        shared(pointwise(2 * 16 * 88, "sites", "split"), (0, 64), (1, 8), (2, 16)),
        alone(pointwise(2 * 16 * 64, "sites"), 0),
        alone(gemm(16, 8, 16, "sites"), 1),
        alone(pointwise(2 * 16 * 16, "sites"), 1),
    ]),
    "one site": ((O,), (Factored(8),), [alone(gemm(16, 64, 8, "sites")), alone(gemm(16, 8, 64, "sites"))]),
    "several calls": ((replace(O, rows=("batch*tokens", "batch")),), (Factored(8),), [
        alone(gemm(16, 64, 8, "sites")), alone(gemm(16, 8, 64, "sites")),
        alone(gemm(2, 64, 8, "sites")), alone(gemm(2, 8, 64, "sites")),
    ]),
    "head": ((HEAD,), (DENSE,), [alone(gemm(16, 64, 1000, "head"))]),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_kernels_of_sites_by_hand(name):
    sites, forms, kernels = BY_HAND[name]
    assert group_kernels(sites, forms, WORKLOAD) == kernels


@pytest.mark.parametrize("form", [DENSE, Factored(8)])
@pytest.mark.parametrize("workload", [WORKLOAD, DECODE], ids=["prefill", "decode"])
def test_a_graph_that_generates_has_the_head_at_the_last_position_alone(form, workload):
    found = group_kernels((HEAD,), (form,), workload, generates=True)
    assert {one.kernel.shape[0] for one in found} == {workload.batch}
    assert {one.kernel.kind for one in found} == {"head"}
    (kernel, *_) = group_kernels((O,), (form,), workload, generates=True)
    assert kernel.kernel.shape[0] == workload.batch * workload.tokens, "only the head"


def test_what_only_the_last_position_needs_has_one_row_a_sequence_where_the_graph_generates():
    late = (replace(Q, last_only=True), K, V)
    forms = (Factored(24), Factored(8), DENSE)
    rows = [one.kernel.shape[0] for one in group_kernels(late, forms, WORKLOAD, True) if one.kernel.op == "gemm"]
    assert rows == [16, 2, 16], "packed with keys and values, which all positions need; then q alone; then k"
    alone_too = group_kernels((replace(O, last_only=True, bias="o.bias"),), (Factored(8),), WORKLOAD, True)
    assert alone_too == [
        alone(gemm(2, 64, 8, "sites")), alone(gemm(2, 8, 64, "sites")), alone(pointwise(2 * 2 * 64, "sites")),
    ]  # fmt: skip
    for sites in (late, (replace(O, last_only=True),)):
        everywhere = group_kernels(sites, forms[: len(sites)], WORKLOAD)
        assert {one.kernel.shape[0] for one in everywhere if one.kernel.op == "gemm"} == {16}, "an encoder"
        plain = tuple(replace(each, last_only=False) for each in sites)
        steps = [group_kernels(each, forms[: len(sites)], DECODE, True) for each in (sites, plain)]
        assert steps[0] == steps[1], "a step has one position anyway"


UNPACKED = {
    "another input": replace(K, group="y"),
    "other rows": replace(K, rows=("batch",)),
    "two calls": replace(K, rows=("batch*tokens", "batch*tokens")),
    "another width": replace(K, in_features=32),
    "a head": replace(K, kind="head"),
    "tied": replace(K, tied=True),
    "another branch": replace(K, branch="mlp"),
}


@pytest.mark.parametrize("why", UNPACKED)
def test_sites_that_do_not_pack_run_one_by_one(why):
    other = UNPACKED[why]
    assert not can_pack((Q, other))
    forms = (Factored(24), DENSE)
    expected = [
        *group_kernels((Q,), forms[:1], WORKLOAD),
        *(Shared(one.kernel, ((1, 1.0),)) for one in group_kernels((other,), forms[1:], WORKLOAD)),
    ]
    assert group_kernels((Q, other), forms, WORKLOAD) == expected
    assert site_groups([Q, other]) == [(Q,), (other,)]


def test_groups_keep_the_order_of_the_sites():
    gate, up = (replace(site(name, 64, 96), group="y") for name in ("gate", "up"))
    assert site_groups([Q, O, K, gate, V, up, HEAD]) == [(Q, K, V), (O,), (gate, up), (HEAD,)]
    assert site_groups([]) == []


def test_a_block_whose_branches_share_their_input_has_one_group_a_branch():
    """GPT-J and Phi: attention and MLP read the same norm, and either may be removed without the other."""
    up = replace(site("up", 64, 96), group="x", branch="mlp")
    assert site_groups([Q, K, V, up]) == [(Q, K, V), (up,)]


# ── Everything else ──────────────────────────────────────────────────────────────────────────────────────────────

GROUPED = AttentionShape("batch", "64", "8", "tokens", "tokens + context", "128", "128")
ATTENTION = Operator(
    "sdpa",
    "attention",
    flops="4*batch*64*tokens*(tokens + context)*128",
    activations="batch*tokens",
    attention=GROUPED,
)


@pytest.mark.parametrize(("generates", "rotary"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize(
    ("workload", "shape", "without_rotation"),
    [(WORKLOAD, (2, 64, 8, 8, 8, 128), FUSED), (DECODE, (3, 64, 8, 1, 100, 128), UNFUSED)],
    ids=["prefill", "decode"],
)
def test_attention_is_one_kernel_over_the_heads_that_the_cache_holds(
    workload, shape, without_rotation, generates, rotary
):
    """Steps of models that rotate nothing stay products around a softmax; their prompts do not."""
    which = FULL if not generates else FUSED if rotary else without_rotation
    batch, heads, _, queries, keys, size = shape
    operator = replace(ATTENTION, attention=replace(GROUPED, rotary=rotary))
    assert operator_kernels(operator, workload, generates) == [
        Kernel(
            "attention", "attention", flops=4 * batch * heads * queries * keys * size,
            activations=batch * queries, shape=(*shape, which),
        )
    ]  # fmt: skip


def test_the_last_attention_of_a_prompt_is_a_step_behind_copies_of_its_keys_and_values():
    operator = replace(ATTENTION, last_only=True, attention=replace(GROUPED, rotary=True, value_size="64"))
    copied = [4 * 2 * 8 * 7 * 128, 4 * 2 * 8 * 7 * 64]  # keys and values of 7 positions, read and written twice
    assert operator_kernels(operator, WORKLOAD, True) == [
        *(pointwise(elements, "attention") for elements in copied),
        Kernel("attention", "attention", flops=4 * 2 * 64 * 1 * 8 * 128, activations=2,
               shape=(2, 64, 8, 1, 8, 128, FUSED)),
    ]  # fmt: skip
    assert operator_kernels(operator, DECODE, True) == operator_kernels(
        replace(operator, last_only=False), DECODE, True
    )
    unknown = operator_kernels(replace(operator, attention=None), WORKLOAD, True)
    assert unknown == [Kernel("attention", "attention", flops=4 * 2 * 64 * 1 * 8 * 128, activations=2)]


@pytest.mark.parametrize("generates", [False, True])
def test_other_work_at_the_last_position(generates):
    norm = Operator("norm.mean", "elementwise", activations="64*batch*tokens", owner="norm", last_only=True)
    assert operator_kernels(norm, WORKLOAD, generates) == [
        pointwise(64 * 2 * (1 if generates else 8), "norm", "rms_norm")
    ]


def elementwise(name: str, owner: str = "", owner_type: str = "", activations: str = "48", **fields) -> Operator:
    return Operator(name, "elementwise", owner=owner, owner_type=owner_type, activations=activations, **fields)


OPERATORS = [
    (Operator("a", "attention", "80", activations="6"), [Kernel("attention", "attention", 80, 0, 6)]),
    (Operator("m", "matmul", "80", activations="6"), [Kernel("gemm", "attention", 80, 0, 6)]),
    (Operator("m", "matmul", "80", activations="6", weight_reads="7"), [Kernel("gemm", "experts", 80, 7, 6)]),
    (Operator("e", "experts", "80", activations="6", weight_reads="batch*7"), [Kernel("gemm", "experts", 80, 14, 6)]),
    (Operator("c", "convolution", "80", activations="6", weight_reads="7"),
     [Kernel("gemm", "convolution", 80, 7, 6)]),
    (Operator("l", "lookup", activations="batch*tokens"), [pointwise(32, "lookup")]),
    (SESSION, [Kernel("session", "session")]),
    (elementwise("view", activations="0"), []),
    (elementwise("a.mul"), [pointwise(48, "elementwise", "add")]),
    (elementwise("a.act.gelu"), [pointwise(48, "elementwise", "gelu")]),
    (elementwise("a.act.silu_3"), [pointwise(48, "elementwise", "silu")]),
    (elementwise("model.norm.mean", "model.norm"), [pointwise(48, "norm", "rms_norm")]),
    (elementwise("a.ln_1.mul", "a.ln_1", "LlamaRMSNorm"), [pointwise(48, "norm", "rms_norm")]),
    (elementwise("a.ln_1.layer_norm_2", "a.ln_1", "LayerNorm"), [pointwise(48, "norm", "layer_norm")]),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "kernels"), OPERATORS, ids=[operator.name for operator, _ in OPERATORS])
def test_kernels_of_operators_by_hand(operator, kernels):
    assert operator_kernels(operator, WORKLOAD) == kernels


# ── Fusion ───────────────────────────────────────────────────────────────────────────────────────────────────────

RESIDUAL = elementwise("layer.add", "layer", "LlamaDecoderLayer", "3*batch*tokens")
NORM = [
    elementwise("layer.norm.pow", "layer.norm", "LlamaRMSNorm", "2*batch*tokens"),
    elementwise("layer.norm.mean", "layer.norm", "LlamaRMSNorm", "batch*tokens"),
    elementwise("layer.norm.mul", "layer.norm", "LlamaRMSNorm", "4*batch*tokens", params=64),
]
NORM_AS_ONE = NORM[2]
ROTARY = [
    elementwise("layer.attn.neg", "layer.attn", "LlamaAttention", "batch*tokens"),
    elementwise("layer.attn.cat", "layer.attn", "LlamaAttention", "2*batch*tokens", params=3),
    elementwise("layer.attn.add", "layer.attn", "LlamaAttention", "batch*tokens", params=5),
]
MATMUL = Operator("layer.attn.matmul", "matmul", "8", owner="layer.attn")
ROUTING = [
    elementwise("layer.mlp.experts.eq", "layer.mlp.experts", "MixtralExperts", "batch*tokens"),
    elementwise("layer.mlp.experts.gather", "layer.mlp.experts", "MixtralExperts", "2*batch*tokens"),
]
EXPERTS = Operator("layer.mlp.experts.grouped_mm", "experts", "8", owner="layer.mlp.experts")
FUSIONS = {
    "a norm": (NORM, [NORM_AS_ONE]),
    "a norm with the residual in front": ([MATMUL, RESIDUAL, *NORM], [MATMUL, NORM_AS_ONE]),
    "a residual without a norm behind": ([*NORM, RESIDUAL], [NORM_AS_ONE, RESIDUAL]),
    "something else in front of a norm": ([ROTARY[1], *NORM], [ROTARY[1], NORM_AS_ONE]),
    "a matrix product between": ([RESIDUAL, MATMUL, *NORM], [RESIDUAL, MATMUL, NORM_AS_ONE]),
    "a rotary embedding": (ROTARY, [replace(ROTARY[1], params=8)]),
    "two modules in a row": ([*ROTARY, *NORM], [replace(ROTARY[1], params=8), NORM_AS_ONE]),
    "another kind between": ([ROTARY[0], MATMUL, ROTARY[2]], [ROTARY[0], MATMUL, ROTARY[2]]),
    "no module": ([elementwise("add"), elementwise("mul")], [elementwise("add"), elementwise("mul")]),
    "attention": ([ATTENTION, ATTENTION], [ATTENTION, ATTENTION]),
    "routed experts": ([*ROUTING, EXPERTS, EXPERTS, ROUTING[0]], [ROUTING[1], EXPERTS, EXPERTS, ROUTING[0]]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_what_fuses_and_that_a_call_costs_something(name):
    operators, merged = FUSIONS[name]
    assert fused(operators) == (*merged, SESSION)


def test_routed_experts_read_what_is_routed():
    """Mixtral's 8 experts of which 2 are used: few rows cannot reach more than 2 each, many read all of them."""
    experts = Operator(
        "experts", "experts", flops="2*2*batch*tokens*64*96", weight_reads="Min(8, 2*batch*tokens)*64*96"
    )
    (few,), (many,) = (operator_kernels(experts, load) for load in (Workload("decode", 1, 1, 9), WORKLOAD))
    assert (few.weights, many.weights) == (2 * 64 * 96, 8 * 64 * 96)
    assert (few.flops, many.flops) == (2 * 2 * 64 * 96, 2 * 2 * 16 * 64 * 96)
