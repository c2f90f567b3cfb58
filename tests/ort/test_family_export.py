"""Members of a family are exported and verified like any compiled model, also from a saved family and the shell."""

from __future__ import annotations

import pytest
import torch

import blora_compiler as blora
from blora_compiler.cli import at, run_family
from blora_compiler.errors import BadInput
from tests.models import build


def test_a_member_is_exported_with_parity_and_loads_back_as_a_model(tmp_path):
    made = blora.compile_family(build("llama"), 0.3, 0.7, rank_multiple=4)
    made.save(tmp_path / "run" / "family")
    at(tmp_path / "run", "0.45", tmp_path / "member")
    member = made.at(0.45)
    loaded = blora.load(tmp_path / "member" / "model")
    assert loaded.plan == member.plan
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, member.module(input_ids=ids).logits)
    artifact = blora.Artifact.load(tmp_path / "member" / "onnx")
    assert artifact.parity.max_error <= 1e-4
    assert {"prefill", "decode"} <= set(artifact.graphs)


def test_the_command_line_refuses_what_is_no_family_and_no_range(tmp_path):
    with pytest.raises(BadInput, match="holds a family"):
        at(tmp_path, "0.3", tmp_path / "member")
    with pytest.raises(BadInput, match="two fractions"):
        run_family("m", tmp_path / "run", {"budget": "a..b"}, None, None, {}, False, False, True)
    with pytest.raises(BadInput, match="--plan"):
        run_family("m", tmp_path / "run", {"budget": "0.2..0.7"}, None, None, {"--plan": "p"}, False, False, True)
