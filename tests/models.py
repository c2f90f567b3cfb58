"""The six kinds of model that go the whole way, tiny, with random weights, made in code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UsesOneWeightTwice(nn.Module):
    """A plain module that calls `F.linear(x, self.w)` twice with one weight."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(F.relu(F.linear(x, self.w))), self.w)


def tiny_llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=128, max_position_embeddings=128, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=128, bos_token_id=0, eos_token_id=0)
    )


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=128)
    )


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=32,
            patch_size=8,
        )
    )


def torch_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)


def example_inputs(name: str) -> Any:
    """Inputs for the models that cannot make up their own; None for Hugging Face models."""
    if name == "encoder":
        return (torch.randn(2, 8, 64),)
    if name == "twice":
        return (torch.randn(2, 8, 48),)
    return None


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "vit": tiny_vit,
    "encoder": torch_encoder,
    "twice": UsesOneWeightTwice,
}


def build(name: str) -> nn.Module:
    """The named model in eval mode, the same weights every time."""
    torch.manual_seed(0)
    return MODELS[name]().eval()
