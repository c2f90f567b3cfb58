"""capture: one shape at one address, replayed with other inputs. The CPU replays too; it only captures nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blora_compiler.artifact import Artifact
from blora_compiler.capture import ReplayedRun, captured_decode, check_replays, sizes_of
from blora_compiler.errors import BadInput, ParityFailed
from blora_compiler.lowering import lower
from blora_compiler.timing import extended_in_place, generation_feeds
from tests.models import build

BATCH, CONTEXT = 2, 6


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model = build("llama")
    with torch.no_grad():  # at the scale it starts with, two tokens are all but alike
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim == 2 else None
    folder = tmp_path_factory.mktemp("capture") / "export"
    return lower(model, folder, inputs={"input_ids": torch.ones(2, 8, dtype=torch.int64)}, new_tokens=2)


@pytest.fixture
def feeds(exported: Artifact) -> dict[str, np.ndarray]:
    return generation_feeds(exported, "decode", BATCH, CONTEXT)


def test_a_session_of_one_size_has_no_open_axis_and_computes_the_same(exported, feeds):
    plain = exported.session("decode")
    sizes = sizes_of(plain, feeds)
    named = {axis: size for axis, size in sizes.items() if not axis.isdigit()}  # exporters call a fixed size "16"
    assert set(named.values()) == {BATCH, CONTEXT, CONTEXT + 1}
    fixed = exported.at_sizes("decode", sizes)
    assert all(isinstance(size, int) for spec in fixed.get_inputs() for size in spec.shape)
    for found, expected in zip(fixed.run(None, feeds), plain.run(None, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert exported.session("decode") is plain


def test_replays_read_what_was_changed_and_write_where_they_wrote(exported, feeds):
    plain = exported.session("decode")
    run = ReplayedRun(exported.at_sizes("decode", sizes_of(plain, feeds)), feeds, "cpu")
    addresses = [value.data_ptr() for value in run._outputs]
    first = run.output("logits")
    check_replays(run, ReplayedRun(plain, feeds, "cpu"), feeds)
    assert np.abs(run.output("logits") - first).max() > 1e-3
    run.change({name: feeds[name] for name in feeds})
    run()
    np.testing.assert_allclose(run.output("logits"), first, rtol=1e-4, atol=1e-5)
    assert [value.data_ptr() for value in run._outputs] == addresses


def test_a_replay_that_ignores_its_inputs_is_an_error(exported, feeds, monkeypatch):
    plain = exported.session("decode")
    run, other = (ReplayedRun(plain, feeds, "cpu") for _ in range(2))
    monkeypatch.setattr(run, "change", lambda feeds: None)
    with pytest.raises(ParityFailed, match=r"replayed with token 2 is .* from a plain one, allowed are"):
        check_replays(run, other, feeds)


def test_weights_that_tell_no_tokens_apart_prove_nothing(exported, feeds):
    run = ReplayedRun(exported.session("decode"), feeds, "cpu")
    run.output = lambda name: np.ones((BATCH, 1, 4), np.float32)  # type: ignore[method-assign]
    with pytest.raises(ParityFailed, match="two different tokens gave the same logits"):
        check_replays(run, run, feeds)


def test_replays_on_a_cache_of_fixed_size_extend_it_in_place(exported):
    plain = exported.session("decode")
    feeds = generation_feeds(exported, "decode", BATCH, CONTEXT, room=2 * CONTEXT)
    in_place = extended_in_place(plain, feeds)
    assert len(in_place) == sum(value.ndim == 4 for value in feeds.values())
    run = ReplayedRun(exported.at_sizes("decode", sizes_of(plain, feeds)), feeds, "cpu", in_place)
    check_replays(run, ReplayedRun(plain, feeds, "cpu", in_place), feeds)
    cache = run.output(next(iter(in_place)))
    assert cache.shape[2] == 2 * CONTEXT
    assert np.abs(cache[:, :, CONTEXT] - 0.25).max() > 1e-3 and (cache[:, :, CONTEXT + 1 :] == 0.25).all()
    # What a growing cache computes of the same tokens.
    grown = generation_feeds(exported, "decode", BATCH, CONTEXT)
    grown = {name: np.full_like(value, 3) if name == "input_ids" else value for name, value in grown.items()}
    grown |= {name: 0.25 * value for name, value in grown.items() if value.ndim == 4}
    np.testing.assert_allclose(run.output("logits"), plain.run(["logits"], grown)[0], rtol=1e-4, atol=1e-5)


def test_without_cuda_nothing_is_captured(exported):
    with pytest.raises(BadInput, match="a CUDA graph needs target 'cuda', this export is for 'cpu'"):
        captured_decode(exported, BATCH, CONTEXT)


def test_a_graph_that_cannot_be_captured_is_refused_with_the_reason(exported, monkeypatch):
    """The device is played by the CPU; what fails is the run that would capture."""
    monkeypatch.setattr(Artifact, "target", "cuda")
    plain = exported._sessions["decode"]

    class Refuses:
        def __init__(self) -> None:
            self.get_outputs, self.io_binding = plain.get_outputs, plain.io_binding

        def run_with_iobinding(self, binding):
            raise RuntimeError("not all nodes are on CUDA")

    monkeypatch.setattr(Artifact, "at_sizes", lambda self, name, sizes: Refuses())
    real = ReplayedRun.__init__
    monkeypatch.setattr(
        ReplayedRun, "__init__", lambda self, session, feeds, device, in_place: real(self, session, feeds, "cpu")
    )
    with pytest.raises(BadInput, match="does not capture decode 2x1 behind 6 tokens: not all nodes are on CUDA"):
        captured_decode(exported, BATCH, CONTEXT)


def test_on_cuda_the_session_of_one_size_is_asked_to_capture(exported, monkeypatch):
    from blora_compiler import artifact as artifact_module

    asked = {}

    def open_nothing(path, options, providers):
        asked["providers"] = providers
        raise RuntimeError("no device")

    monkeypatch.setattr(artifact_module, "check_provider", lambda target: None)
    monkeypatch.setattr(artifact_module.onnxruntime, "InferenceSession", open_nothing)
    for sizes, first in (
        (None, "CUDAExecutionProvider"),
        ({}, ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})),
    ):
        with pytest.raises(BadInput, match="no device"):
            artifact_module.open_session(exported.folder / "decode.onnx", "cuda", sizes=sizes)
        assert asked["providers"] == [first, "CPUExecutionProvider"]
