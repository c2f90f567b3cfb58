"""Quality is what its definition says, in float32, on stated windows."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blora_compiler.errors import BadInput
from blora_compiler.evaluate import perplexity_and_kl


def _llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_quality_equals_its_definition():
    student, teacher = _llama(0).train(), _llama(1).eval()
    windows = torch.randint(0, 50, (5, 9), generator=torch.Generator().manual_seed(0))
    found = perplexity_and_kl(student, teacher, windows, stride=27, batch=2)

    with torch.no_grad():
        log_s, log_t = (torch.log_softmax(m(windows).logits[:, :-1].double(), -1) for m in (student, teacher))
    likelihood = -log_s.gather(-1, windows[:, 1:, None]).mean()
    assert found.perplexity == pytest.approx(math.exp(likelihood), rel=1e-5)
    assert found.kl == pytest.approx(float((log_t.exp() * (log_t - log_s)).sum(-1).mean()), rel=1e-5)
    assert found.top1_agreement == pytest.approx(float((log_s.argmax(-1) == log_t.argmax(-1)).double().mean()))
    assert (found.tokens, found.length, found.stride) == (40, 9, 27)
    assert student.training
    assert not teacher.training


def test_without_a_teacher_only_perplexity_is_known():
    found = perplexity_and_kl(_llama(0), None, torch.randint(0, 50, (2, 5)))
    assert found.kl is None
    assert found.top1_agreement is None
    assert str(found).startswith(f"perplexity {found.perplexity:.2f} (8 tokens, windows of 5)")


def test_a_model_agrees_with_itself():
    model = _llama(0)
    found = perplexity_and_kl(model, model, torch.randint(0, 50, (2, 5)), stride=3)
    assert found.kl == pytest.approx(0.0, abs=1e-7)
    assert found.top1_agreement == 1.0
    assert "KL 0.0000 nats/token, top-1 100.0% (8 tokens, windows of 5, stride 3)" in str(found)


def test_windows_may_be_of_any_integers():
    windows = torch.randint(0, 50, (2, 5))
    assert perplexity_and_kl(_llama(0), None, windows.int()) == perplexity_and_kl(_llama(0), None, windows)


def test_half_precision_and_empty_windows_are_refused():
    with pytest.raises(BadInput, match=r"is bfloat16 but quality is measured in float32; load the model with dtype"):
        perplexity_and_kl(_llama(0).bfloat16(), None, torch.zeros(2, 5).long())
    for shape in ((0, 5), (2, 1), (5,)):
        with pytest.raises(BadInput, match="evaluation windows have shape"):
            perplexity_and_kl(_llama(0), None, torch.zeros(shape).long())
