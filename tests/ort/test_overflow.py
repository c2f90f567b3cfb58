"""float16 is refused where a model leaves its range, before any file is written, and the place is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blora_compiler.errors import BadInput
from blora_compiler.lowering import lower
from blora_compiler.overflow import check_range, largest_outputs
from tests.models import build


def token_ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(0))}


def llama_with_residual_stream(largest: float) -> nn.Module:
    """A Llama whose second layer's MLP lifts the residual stream to about `largest`. RMS norms hide that later."""
    model = build("llama")
    name = "model.layers.1.mlp"
    found = largest_outputs(model, [token_ids()], by_keyword=True)[name]
    # In two places, so that no weight leaves the range itself.
    with torch.no_grad():
        for projection in (model.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.down_proj):
            projection.weight.mul_((largest / found) ** 0.5)
    return model


def test_a_residual_stream_out_of_range_is_named(tmp_path: Path) -> None:
    model = llama_with_residual_stream(2e5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(BadInput) as caught:
        lower(model, tmp_path / "export", inputs=token_ids(), dtype="float16", generation=False)
    message = str(caught.value)
    found = re.match(r"output of model\.layers\.1\.mlp\.down_proj reaches (\d+), float16 ends at 65504", message)
    assert found is not None, message
    assert 1.5e5 < float(found[1]) <= 2e5  # the first tokens, which an export pads away, may have held the largest
    assert "65504 (and 2 more" in message
    assert "lower in float32, or on CUDA in bfloat16" in message
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_same_model_lowers_in_float32(tmp_path: Path) -> None:
    model = llama_with_residual_stream(2e5)
    exported = lower(model, tmp_path / "export", inputs=token_ids(), dtype="float32", generation=False)
    assert exported.parity.max_error < 1e-4


def test_a_stream_within_the_range_is_not_refused() -> None:
    check_range(llama_with_residual_stream(6e4), [token_ids()], "float16", by_keyword=True)


def test_prompts_are_watched_too(tmp_path: Path) -> None:
    """A token that only the prompts hold starts the stream just below the limit, and the attention adds to it."""
    model = build("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # logits are not what is tested
    inputs = {"input_ids": token_ids()["input_ids"].clamp(max=126)}
    attention = "model.layers.0.self_attn.o_proj"
    with torch.no_grad():
        model.model.embed_tokens.weight[127] = 6e4
        found = largest_outputs(model, [inputs], by_keyword=True)[attention]
        model.get_submodule(attention).weight.mul_(4e4 / found)
    check_range(model, [inputs], "float16", by_keyword=True)
    with pytest.raises(BadInput, match=r"output of model\.layers\.0.* reaches .* float16 ends at 65504"):
        lower(model, tmp_path / "export", inputs=inputs, dtype="float16", prompts=[[1, 127], [127, 2, 3]])


def test_a_weight_out_of_range_is_named() -> None:
    tree = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        tree[1].weight[0, 0] = -7e4
    with pytest.raises(BadInput, match=r"weight 1\.weight reaches 70000, float16 ends at 65504: lower"):
        check_range(tree, [], "float16", by_keyword=False)
    check_range(tree, [], "bfloat16", by_keyword=False)


def test_encoder_layers_are_looked_into() -> None:
    """Their fused kernel would run without calling the layers inside."""
    encoder = build("encoder")
    outputs = largest_outputs(encoder, [{"src": torch.randn(2, 6, 64)}], by_keyword=False)
    assert "layers.1.linear2" in outputs
    assert outputs["layers.1"] == outputs["TransformerEncoder"] > 0
