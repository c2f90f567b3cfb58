"""FLOPs of the whole graph agree with torch's counter; sites, experts and large shapes with hand counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from blora_compiler.cost_models.devices import load_device
from blora_compiler.cost_models.flops import FlopsCostModel, whole_graph_cost
from blora_compiler.cost_models.prediction import Predictor
from blora_compiler.cost_models.roofline import RooflineClock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blora_compiler.graph import Program
from blora_compiler.outline import Outline, outline
from blora_compiler.profiling import profile
from blora_compiler.rewriting import fold, insert, settle
from blora_compiler.tracing import trace
from blora_compiler.values import AttentionShape, Cost, Dense, Factored, Removed, Site, Workload
from tests.models import MODELS, build, example_inputs


@lru_cache
def traced(name: str) -> Program:
    return trace(build(name), example_inputs(name))


def counted(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    # The fused attention kernel counts as zero on the CPU, so attention runs as plain arithmetic.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "tokens"), [(2, 8), (3, 24)])
def test_the_whole_graph_agrees_with_torchs_counter(name, batch, tokens):
    program = traced(name)
    inputs = {}
    for key, value in program.inputs.items():
        shape = (batch, *value.shape[1:]) if name == "vit" else (batch, tokens, *value.shape[2:])
        inputs[key] = torch.randn(shape) if value.is_floating_point() else torch.ones(shape, dtype=value.dtype)
    cost = whole_graph_cost(program.sites, program.operators, {}, Workload(batch=batch, tokens=tokens))
    assert cost.flops == counted(program.call_graph, inputs)


# ── More architectures, counted on the model as its author wrote it ──────────────────────────────────────────────

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUPED_QUERIES = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {**GROUPED_QUERIES, "num_experts_per_tok": 2}


class ConvolutionsAndEinsum(nn.Module):
    """A convolution, a transposed one, and einsum with shared, summed and broadcast axes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(8, 16, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose1d(16, 8, 4, stride=2)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(x)).transpose(1, 2)
        scores = torch.einsum("bid, bjd -> bij", y, y)
        mixed = torch.einsum("...ij, ...jd -> ...id", scores, y)
        return self.out(mixed)


def architectures() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """Name -> a tiny model and its example inputs, or None where they can be made up."""
    import transformers as tf
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    def whisper() -> tuple[nn.Module, Any]:
        config = tf.WhisperConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=8,
            max_source_positions=20, vocab_size=64, **{k: v for k, v in SMALL.items() if k.endswith("token_id")},
        )  # fmt: skip
        return WhisperEncoder(config), {"input_features": torch.randn(2, 8, 40)}

    def t5() -> tuple[nn.Module, Any]:
        model = tf.T5EncoderModel(tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64))
        return model, {"input_ids": torch.ones(2, 16, dtype=torch.int64)}

    return {
        "qwen3": lambda: (tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED_QUERIES, head_dim=16)), None),
        "gemma2": lambda: (tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED_QUERIES, head_dim=8)), None),
        "phi3": lambda: (tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED_QUERIES)), None),
        "opt": lambda: (
            tf.OPTForCausalLM(tf.OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16)),
            None,
        ),
        "t5 encoder": t5,
        "mistral": lambda: (tf.MistralForCausalLM(tf.MistralConfig(**GROUPED_QUERIES, sliding_window=8)), None),
        "falcon": lambda: (tf.FalconForCausalLM(tf.FalconConfig(**SMALL, alibi=False)), None),
        "gpt-neox": lambda: (tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)), None),
        "distilbert": lambda: (
            tf.DistilBertModel(tf.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=64)),
            None,
        ),
        "whisper encoder": whisper,
        "mixtral": lambda: (tf.MixtralForCausalLM(tf.MixtralConfig(**EXPERTS, num_local_experts=4)), None),
        "qwen3-moe": lambda: (
            tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**EXPERTS, num_experts=8, moe_intermediate_size=24, head_dim=8)),
            None,
        ),
        "deepseek-v3": lambda: (
            tf.DeepseekV3ForCausalLM(
                tf.DeepseekV3Config(
                    **SMALL, num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=8, n_group=2,
                    topk_group=1, num_experts_per_tok=2, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8,
                    qk_nope_head_dim=16, v_head_dim=12, first_k_dense_replace=1,
                )
            ),
            None,
        ),
        "convolutions and einsum": lambda: (ConvolutionsAndEinsum(), (torch.randn(2, 8, 21),)),
    }  # fmt: skip


@pytest.mark.parametrize("name", architectures())
def test_an_architecture_agrees_with_torchs_counter(name):
    torch.manual_seed(0)
    model, inputs = architectures()[name]()
    program = trace(model.eval(), inputs)
    if hasattr(model, "set_experts_implementation"):
        # The counter knows no grouped product; written as one linear per expert, the same work is counted.
        model.set_experts_implementation("eager")
    batch, tokens = 3, 12
    longer = dict(program.inputs)
    for key, value in longer.items():
        size = (batch, *value.shape[1:]) if value.is_floating_point() else (batch, tokens)
        longer[key] = torch.randn(size) if value.is_floating_point() else torch.randint(1, 2, size)
    cost = whole_graph_cost(program.sites, program.operators, {}, Workload(batch=batch, tokens=tokens))
    call = (lambda: model(*longer.values())) if program.positional else (lambda: model(**longer, **program.constants))
    assert cost.flops == counted(call)
    held = sum(parameter.numel() for parameter in model.parameters())
    assert cost.params == held


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_once(name):
    program = traced(name)
    cost = whole_graph_cost(program.sites, program.operators, {}, Workload())
    assert cost.params == sum(parameter.numel() for parameter in build(name).parameters())
    assert cost.weight_bytes == 4 * cost.params


@pytest.mark.parametrize("name", MODELS)
def test_a_compressed_graph_agrees_too(name):
    program = traced(name)
    forms = {s.name: Factored(max(1, s.break_even_rank // 3)) for s in program.sites if s.kind != "head"}
    branched, _ = insert(program, forms, profile(program, [], kind="plain"))
    folded, _ = fold(settle(branched, forms), forms)
    first = next(iter(program.inputs.values()))
    cost = whole_graph_cost(
        program.sites, program.operators, forms, Workload(batch=first.shape[0], tokens=first.shape[1])
    )
    assert cost.flops == counted(folded.call_graph, folded.inputs)


# ── By hand ──────────────────────────────────────────────────────────────────────────────────────────────────────

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


WRITTEN_OUT = {
    "llama": {"num_key_value_heads": 2}, "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "gptj": {"rotary_dim": 8}, "bloom": {}, "gpt_neo": {"attention_types": [[["global"], 2]]},
}  # fmt: skip
NAMES = {
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN_OUT)
def test_attention_that_is_written_out_reads_the_cache_as_a_fused_one_does(kind):
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **{**SMALL, **WRITTEN_OUT[kind], **NAMES.get(kind, {})})
    config._attn_implementation = "eager"
    parts = outline(config)
    kv_heads = WRITTEN_OUT[kind].get("num_key_value_heads", 4)
    costs = {context: total(parts, Workload("decode", 2, 1, context)) for context in (10, 30)}
    assert costs[30].flops - costs[10].flops == 20 * 2 * 2 * (2 * 2 * 32)  # two products, both layers, both sequences
    kept = [operator.attention for operator in parts.operators if operator.attention is not None]
    assert [(shape.kv_heads, shape.head_size, shape.value_size) for shape in kept] == (
        [("1", "8", "8")] * 2 if kind == "bloom" else [(str(kv_heads), "8", "8")] * 2
    )
    found = Predictor(
        parts.sites, parts.operators, Workload("decode", 2, 1, 1000), RooflineClock(load_device("l4")), True
    ).predict({})
    assert found.running_bytes >= 4 * 2 * 2 * kv_heads * 1001 * 2 * 8, "keys and values, both layers and sequences"


@lru_cache
def llama_70b() -> Outline:
    from transformers import LlamaConfig

    return outline(
        LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
    )  # fmt: skip


def total(parts: Outline, workload: Workload) -> Cost:
    return whole_graph_cost(parts.sites, parts.operators, {}, workload)


def layer(parts: Outline, prefix: str) -> Outline:
    """The part of an outline that lies below a path."""
    return replace(
        parts,
        sites=tuple(site for site in parts.sites if site.name.startswith(prefix)),
        operators=tuple(operator for operator in parts.operators if operator.owner.startswith(prefix)),
    )


HIDDEN, FFN, KV_WIDTH, VOCABULARY, LAYERS = 8192, 28672, 8 * 128, 128256, 80
LLAMA_70B_LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_WIDTH + 3 * HIDDEN * FFN  # weights of one layer's projections


@pytest.mark.parametrize(
    "workload",
    [
        Workload(batch=2, tokens=512),
        Workload(batch=1, tokens=256, context=1024),
        Workload(phase="decode", batch=8, tokens=1, context=4095),
    ],
    ids=lambda workload: workload.phase + str(workload.context),
)
def test_a_70b_llama_by_hand(workload):
    rows, keys = workload.batch * workload.tokens, workload.tokens + workload.context
    one_layer = 2 * rows * LLAMA_70B_LAYER + 2 * (2 * rows * keys * HIDDEN)  # scores and mixing, 64 heads of 128
    assert total(layer(llama_70b(), "model.layers.41."), workload).flops == one_layer
    assert total(llama_70b(), workload).flops == LAYERS * one_layer + 2 * rows * HIDDEN * VOCABULARY


def test_parameters_of_a_70b_llama_by_hand():
    assert total(llama_70b(), Workload()).params == 70_553_706_496
    one_layer = total(layer(llama_70b(), "model.layers.41."), Workload()).params
    assert one_layer == LLAMA_70B_LAYER + 2 * HIDDEN
    assert LAYERS * one_layer + 2 * VOCABULARY * HIDDEN + HIDDEN == 70_553_706_496


def test_attention_reads_keys_and_values_as_the_cache_holds_them():
    (attention,) = [op for op in layer(llama_70b(), "model.layers.0.self_attn").operators if op.kind == "attention"]
    assert attention.attention == AttentionShape(
        batch="batch", heads="64", kv_heads="8", queries="tokens", keys="tokens + context", head_size="128",
        value_size="128", rotary=True,
    )  # fmt: skip
    workload = Workload(phase="decode", batch=3, tokens=1, context=99)
    queries_and_outputs, cache = 2 * 3 * 64 * 128, 2 * 3 * 8 * 100 * 128
    assert workload.evaluate(attention.activations) == queries_and_outputs + cache


class GroupedQueries(nn.Module):
    """Attention with 8 query heads and 2 key heads, the ways code writes it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, 8, 4).transpose(1, 2)
        k = self.k(x).view(batch, tokens, 2, 4).transpose(1, 2)
        if self.how == "repeat_interleave":
            k = k.repeat_interleave(4, 1)
        elif self.how == "repeat":
            k = k.repeat(1, 4, 1, 1).contiguous()
        elif self.how == "expand":
            k = k[:, :, None].expand(batch, 2, 4, tokens, 4).clone().flatten(1, 2)
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=self.how == "enable_gqa")


@pytest.mark.parametrize("how", ["repeat_interleave", "repeat", "expand", "enable_gqa"])
def test_key_heads_are_counted_before_they_are_repeated(how):
    program = trace(GroupedQueries(how), (torch.randn(2, 5, 32),))
    (attention,) = [operator for operator in program.operators if operator.kind == "attention"]
    shape = attention.attention
    assert (shape.heads, shape.kv_heads) == ("8", "2")
    assert Workload(batch=3, tokens=7).evaluate(attention.flops) == 2 * 2 * 3 * 8 * 7 * 7 * 4


def test_attention_without_an_axis_of_heads_has_one():
    class OneHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(16, 16)

        def forward(self, x):
            return F.scaled_dot_product_attention(self.q(x), x, x)

    program = trace(OneHead(), (torch.randn(2, 5, 16),))
    shape = program.operators[0].attention
    assert (shape.batch, shape.heads, shape.kv_heads, shape.head_size) == ("batch", "1", "1", "16")


MIXTRALS = {
    "tiny": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "8x7b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@lru_cache
def mixtral(name: str) -> Outline:
    from transformers import MixtralConfig

    return outline(MixtralConfig(**MIXTRALS[name], architectures=["MixtralForCausalLM"]))


@pytest.mark.parametrize("name", MIXTRALS)
@pytest.mark.parametrize(
    "workload", [Workload(batch=2, tokens=64), Workload(phase="decode", batch=1, tokens=1, context=300)]
)
def test_routed_experts_by_hand(name, workload):
    sizes = MIXTRALS[name]
    hidden, ffn, experts, top = (
        sizes[key] for key in ("hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok")
    )
    layers, vocabulary = sizes["num_hidden_layers"], sizes["vocab_size"]
    kv_width = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    rows, keys = workload.batch * workload.tokens, workload.tokens + workload.context
    parts = mixtral(name)

    attention_weights = 2 * hidden * hidden + 2 * hidden * kv_width
    one_expert = 3 * hidden * ffn  # gate, up and down
    one_layer = 2 * rows * (attention_weights + hidden * experts + top * one_expert) + 4 * rows * keys * hidden
    assert total(parts, workload).flops == layers * one_layer + 2 * rows * hidden * vocabulary

    products = [operator for operator in parts.operators if operator.kind == "experts"]
    assert len(products) == 2 * layers
    read = sum(workload.evaluate(operator.weight_reads) for operator in products)
    assert read == layers * min(experts, rows * top) * one_expert
    assert sum(operator.params for operator in products) == layers * experts * one_expert
    held = attention_weights + hidden * experts + experts * one_expert + 2 * hidden
    assert total(parts, workload).params == layers * held + 2 * hidden * vocabulary + hidden
    assert name == "tiny" or total(parts, workload).params == 46_702_792_704  # as published
    refused = {refusal.site: refusal.reason for refusal in parts.refusals}
    assert refused["model.layers.1.mlp.experts.down_proj"] == (
        f"the weight holds {experts} routed experts, and a low-rank form of those is not known"
    )


@pytest.mark.parametrize("how", ["bfloat16", "batched_mm"])
def test_routed_experts_count_alike_however_they_are_computed(how):
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**MIXTRALS["tiny"])).eval()
    if how == "bfloat16":
        model = model.to(torch.bfloat16)  # torch has a kernel of its own for these
    else:
        model.set_experts_implementation(how)
    workload = Workload(batch=2, tokens=5)
    ways = [trace(model).operators, mixtral("tiny").operators]
    flops, held = (
        [[f(operator) for operator in way if operator.kind == "experts"] for way in ways]
        for f in (lambda operator: workload.evaluate(operator.flops), lambda operator: operator.params)
    )
    assert flops[0] == flops[1]
    assert len(flops[0]) == 4
    if how == "batched_mm":  # a matrix for each row is gathered first, and that is what holds the weights
        gathers = [op for op in ways[0] if op.kind == "lookup" and op.owner_type == "MixtralExperts"]
        assert [op.params for op in gathers] == held[1]
        assert workload.evaluate(gathers[0].weight_reads) == 2 * 2 * 5 * (2 * 48 * 32)
    else:
        assert held[0] == held[1]


def test_weights_read_in_one_call():
    workload = Workload(batch=3, tokens=5)
    bert = {operator.name: operator for operator in traced("bert").operators}
    words = bert["embeddings.word_embeddings.embedding"]
    assert (workload.evaluate(words.weight_reads), words.params) == (3 * 5 * 64, 128 * 64)
    norm = bert["encoder.layer.1.output.LayerNorm.layer_norm"]
    assert (norm.weight_reads, norm.params) == ("64 + 64", 128)

    vit = traced("vit").operators
    (patches,) = [operator for operator in vit if operator.kind == "convolution"]
    assert workload.evaluate(patches.weight_reads) == patches.params == 64 * 3 * 8 * 8 + 64
    (joined,) = [operator for operator in vit if operator.name.endswith("embeddings.cat")]
    assert joined.weight_reads == "64"  # the class token, once for the whole batch


def test_decode_attention_counts_the_context():
    attention = [operator for operator in traced("llama").operators if operator.kind == "attention"]
    cost = FlopsCostModel().operator_cost(attention[0], Workload(phase="decode", batch=2, tokens=1, context=31))
    heads, size = 4, 16
    assert cost.flops == 2 * (2 * 2 * heads * 1 * 32 * size)
