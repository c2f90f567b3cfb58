"""An outline equals the full trace, whether its layers were written out or traced one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from blora_compiler.errors import BadInput
from blora_compiler.outline import Outline, find_repetition, outline
from blora_compiler.source import load_source
from blora_compiler.tracing import trace
from blora_compiler.values import Workload
from tests.models import build, example_inputs, tiny_llama

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
GROUPED_QUERIES = {**SMALL, "num_key_value_heads": 2}


def configs() -> dict[str, Callable[[], Any]]:
    """Name -> a config whose layers repeat, with more of them than a shortened model keeps."""
    import transformers as tf

    moe = {
        **GROUPED_QUERIES, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "moe_intermediate_size": 48,
        "architectures": ["Qwen3MoeForCausalLM"],
    }  # fmt: skip
    return {
        "llama": lambda: tf.LlamaConfig(
            **GROUPED_QUERIES, num_hidden_layers=6, tie_word_embeddings=True, architectures=["LlamaForCausalLM"]
        ),
        "gpt2": lambda: tf.GPT2Config(
            n_embd=64, n_layer=6, n_head=4, vocab_size=128, n_positions=128, architectures=["GPT2LMHeadModel"]
        ),
        "bert": lambda: tf.BertConfig(**SMALL, num_hidden_layers=6, architectures=["BertForMaskedLM"]),
        "gemma2": lambda: tf.Gemma2Config(
            **GROUPED_QUERIES, num_hidden_layers=6, head_dim=16, architectures=["Gemma2ForCausalLM"]
        ),
        "qwen3-moe": lambda: tf.Qwen3MoeConfig(**moe, num_hidden_layers=6),
        "qwen3-moe, first dense": lambda: tf.Qwen3MoeConfig(**moe, num_hidden_layers=5, mlp_only_layers=[0]),
    }


# Layers that are traced: two periods (after any that differ), and a late one.
KEPT = {
    "llama": (0, 1, 5),
    "gpt2": (0, 1, 5),
    "bert": (0, 1, 5),
    "gemma2": (0, 1, 2, 3, 4),
    "qwen3-moe": (0, 1, 5),
    "qwen3-moe, first dense": (0, 1, 2, 4),
}


@lru_cache
def outlined(name: str) -> Outline:
    return outline(configs()[name]())


def assert_equals_full_trace(parts: Outline, model: nn.Module) -> None:
    program = trace(model)
    assert [site.name for site in parts.sites] == [site.name for site in program.sites]
    assert parts.sites == program.sites
    assert parts.operators == program.operators
    assert parts.refusals == program.refusals


@pytest.mark.parametrize("name", configs())
def test_layers_that_repeat_are_written_out_as_a_full_trace_has_them(name):
    source = load_source(configs()[name]())
    assert find_repetition(source.model).kept == KEPT[name]
    assert_equals_full_trace(outlined(name), source.model)


def test_operators_have_names_of_their_own_and_know_their_module():
    parts = outlined("llama")
    names = [operator.name for operator in parts.operators]
    assert len(set(names)) == len(names)
    norm = next(op for op in parts.operators if op.name == "model.layers.4.post_attention_layernorm.mul_1")
    assert (norm.owner, norm.owner_type) == ("model.layers.4.post_attention_layernorm", "LlamaRMSNorm")
    assert (norm.params, norm.weight_reads) == (64, "64")


def test_what_else_planning_asks_of_a_model():
    llama, bert = outlined("llama"), outlined("bert")
    assert (llama.name, llama.positions, llama.can_generate) == ("llama config", 2048, True)
    assert (bert.name, bert.positions, bert.can_generate) == ("bert config", 512, False)
    encoder = outline(build("encoder"), example_inputs("encoder"))
    assert (encoder.name, encoder.positions, encoder.can_generate) == ("TransformerEncoder", None, None)
    assert len(encoder.sites) == 8


def test_a_model_with_weights_is_outlined_and_left_as_it_is():
    torch.manual_seed(0)
    model = tiny_llama(layers=5)
    ids = torch.randint(0, 128, (2, 9))
    with torch.no_grad():  # which must make no difference to what is traced
        before = model(ids).logits
        parts = outline(model)
        assert torch.equal(model(ids).logits, before)
    assert len(model.model.layers) == 5
    assert_equals_full_trace(parts, model)


def test_a_folder_with_a_config_alone_is_enough(tmp_path):
    configs()["gpt2"]().save_pretrained(tmp_path / "a-gpt2")
    parts = outline(tmp_path / "a-gpt2")
    assert (parts.name, len(parts.sites)) == ("a-gpt2", 25)


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        (80, {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}),
        (126, {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128}),
    ],
    ids=["70B", "405B"],
)
def test_of_the_largest_models_three_layers_are_traced(layers, sizes, monkeypatch):
    from transformers import LlamaConfig

    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    traced = []

    def counting(model, *arguments):
        traced.append(len(model.model.layers))
        return trace(model, *arguments)

    monkeypatch.setattr(sys.modules[find_repetition.__module__], "trace", counting)
    parts = outline(config)
    assert traced == [3]
    assert len(parts.sites) == 7 * layers + 1
    attention = [operator for operator in parts.operators if operator.kind == "attention"]
    assert len(attention) == layers
    decode = Workload(phase="decode", batch=1, tokens=1, context=999)
    assert {decode.evaluate(operator.flops) for operator in attention} == {4 * 1000 * sizes["hidden_size"]}


# ── What looks as if it repeats, and does not ────────────────────────────────────────────────────────────────────


class Block(nn.Module):
    """A residual layer. `how` says in what hidden way it may depend on its number."""

    def __init__(self, layer_idx: int, how: str) -> None:
        super().__init__()
        self.layer_idx, self.how = layer_idx, how
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if (self.how == "every other layer" and self.layer_idx % 2) or (self.how == "late" and self.layer_idx > 3):
            y = y.sin()
        return x + self.down(y.relu())


class Layered(PreTrainedModel):
    """Six layers with one thing odd about them."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, how: str) -> None:
        super().__init__(PretrainedConfig(vocab_size=32))
        self.how = how
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Block(index, how) for index in range(6))
        if how == "another list":
            self.gates = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        if how == "another shape":
            self.layers[3].up, self.layers[3].down = nn.Linear(16, 40), nn.Linear(40, 16)
        if how == "another setting":
            self.layers[3].window = 8
        if how == "a list in the config":
            self.config.scales = [1, 1, 1, 1, 2, 1]
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        results = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if self.how == "another list":
                x = self.gates[index](x)
            if self.how == "work in between":
                x = x.tanh()
            if self.how == "a list in the config" and self.config.scales[index] > 1:
                x = x * self.config.scales[index]
            results.append(x)
        if self.how == "all results":
            x = torch.stack(results).sum(0)
        if self.how == "a layer by number":
            x = x + self.layers[5].down.bias
        return x


@lru_cache
def layered(how: str) -> Layered:
    torch.manual_seed(0)
    return Layered(how).eval()


def test_layers_without_oddities_repeat():
    assert find_repetition(layered("plain")).kept == (0, 1, 5)
    assert_equals_full_trace(outline(layered("plain")), layered("plain"))


@pytest.mark.parametrize("how", ["another list", "another shape", "another setting", "a list in the config"])
def test_layers_that_differ_by_themselves_are_not_taken_to_repeat(how):
    assert find_repetition(layered(how)) is None
    assert_equals_full_trace(outline(layered(how)), layered(how))


@pytest.mark.parametrize("how", ["every other layer", "late", "work in between", "all results", "a layer by number"])
def test_layers_that_turn_out_to_differ_are_traced_whole(how):
    assert find_repetition(layered(how)) is not None
    assert_equals_full_trace(outline(layered(how)), layered(how))


def test_a_plain_module_is_always_traced_whole():
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True), 6)
    assert find_repetition(stack) is None


def test_a_model_that_cannot_be_traced_says_why():
    class Branching(Layered):
        def forward(self, input_ids, attention_mask=None):
            x = super().forward(input_ids)
            return x if x.sum() > 0 else -x

    with pytest.raises(BadInput, match=r"torch.export could not trace Branching"):
        outline(Branching("plain"))
