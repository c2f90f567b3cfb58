"""What needs a GPU: exports for CUDA verified there, generated from, captured. Skipped, and counted, without one."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

import blora_compiler as blora
from blora_compiler.artifact import PROVIDERS, Artifact
from blora_compiler.benching import Load
from blora_compiler.capture import captured_decode
from blora_compiler.lowering import lower

MODEL = Path(blora.__file__).parent / "assets" / "prose-llama-8m"
PROMPT = [[1, 40, 300, 7, 81, 9], [5, 6, 77, 8, 9, 10]]


def _has_cuda() -> bool:
    return torch.cuda.is_available() and PROVIDERS["cuda"] in onnxruntime.get_available_providers()


pytestmark = pytest.mark.skipif(not _has_cuda(), reason="no CUDA device, or no onnxruntime-gpu")


def _model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Lowering verifies prefill, decode on both caches, and greedy generations, all on the device."""
    folder = tmp_path_factory.mktemp("cuda") / request.param
    return lower(
        _model(), folder, inputs={"input_ids": torch.ones(2, 8, dtype=torch.int64)}, target="cuda",
        dtype=request.param, new_tokens=16,
    )  # fmt: skip


def test_the_export_was_verified_on_both_caches(exported):
    assert exported.target == "cuda" and exported.fixed_cache_refusal is None
    assert any("cache of fixed size" in where for where in exported.parity.errors)
    assert exported.parity.sequences and not exported.unmapped_sites


def test_generation_is_the_same_on_either_cache(exported):
    ids = torch.tensor(PROMPT)
    growing = exported.generator().generate(ids, max_new_tokens=12, do_sample=False)
    fixed = exported.generator(max_length=32).generate(ids, max_new_tokens=12, do_sample=False)
    assert growing.shape == (2, 18) and torch.equal(growing, fixed)
    assert torch.equal(exported.generate(ids, max_new_tokens=12)[:, :7], growing[:, :7])


def test_both_sessions_read_one_copy_of_the_weights(exported):
    if exported.dtype != "float16":
        pytest.skip("numpy has no bfloat16, so each session loads its own")
    for name in exported.graphs:
        exported.session(name)
    assert exported._weights is not None and len(exported._weights) > 20


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_a_decode_step_is_captured_and_replayed_with_other_inputs(exported, fixed):
    if exported.dtype != "float16":
        pytest.skip("numpy has no bfloat16 to feed")
    captured_decode(exported.pinned(), 2, 24, fixed)()


def test_a_compressed_model_is_smaller_and_benched_on_every_cache(tmp_path):
    found = blora.bench(
        MODEL, (0.5,), plans=("shared",), target="cuda", rounds=1, profile=False,
        settings=(Load("prefill", 1, 16), *(Load("decode", 2, 16, cache=c) for c in ("growing", "captured fixed"))),
    )  # fmt: skip
    dense, small = found.sides
    assert small.file_bytes < dense.file_bytes
    assert len(found.settings) == 3, found.markdown()
    assert all(bytes_ > 0 for side in found.sides for bytes_ in side.peak_bytes.values())
