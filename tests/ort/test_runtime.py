"""What sessions on a GPU need, as far as a CPU can tell: placement, weights given by address, libraries, refusals."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from blora_compiler import runtime
from blora_compiler.artifact import PROVIDERS, Artifact, open_session, session_options
from blora_compiler.errors import ProviderMissing
from blora_compiler.lowering import lower
from blora_compiler.runtime import SharedWeights, check_placement, load_cuda_libraries, record_placement
from blora_compiler.timing import call_of, generation_feeds
from tests.models import build

PROMPT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("runtime") / "export"
    return lower(build("llama"), folder, inputs={"input_ids": torch.ones(2, 8, dtype=torch.int64)}, new_tokens=2)


# ── Placement ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("graph", ["prefill", "decode"])
def test_a_node_that_computes_elsewhere_is_an_error(exported: Artifact, graph: str) -> None:
    """Where a session is on CUDA and has no kernel for a node, ONNX Runtime gives it to the CPU without a word."""
    options = session_options()
    record_placement(options)
    path = str(exported.folder / f"{graph}.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    check_placement(session, f"{graph}.onnx", "CPUExecutionProvider")
    with pytest.raises(ProviderMissing, match=rf"nodes of {graph}\.onnx that belong on CUDA.* on CPUExec") as caught:
        check_placement(session, f"{graph}.onnx", "CUDAExecutionProvider")
    model = ir.load(path)
    products = sum(node.op_type in ("MatMul", "Gemm", "FusedMatMul") for node in model.graph)
    assert int(str(caught.value).split()[0]) >= products > 4


def test_shape_arithmetic_may_stay_on_the_host(tmp_path: Path) -> None:
    x = ir.Value(name="x", shape=ir.Shape(["rows", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    shape = ir.node("Shape", [x])
    doubled = ir.node("Add", [shape.outputs[0], shape.outputs[0]])
    doubled.outputs[0].name, doubled.outputs[0].dtype = "y", ir.DataType.INT64
    doubled.outputs[0].shape = ir.Shape([2])
    graph = ir.Graph([x], [doubled.outputs[0]], nodes=[shape, doubled], opset_imports={"": 21}, name="sizes")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "sizes.onnx")
    options = session_options()
    record_placement(options)
    session = onnxruntime.InferenceSession(str(tmp_path / "sizes.onnx"), options, providers=["CPUExecutionProvider"])
    check_placement(session, "sizes.onnx", "CUDAExecutionProvider")


def test_libraries_that_are_missing_are_told_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    load_cuda_libraries.cache_clear()
    said = load_cuda_libraries()
    assert capsys.readouterr().out == ""
    assert said == "" or "Failed to load" in said
    assert load_cuda_libraries() is said


# ── Weights in memory once ───────────────────────────────────────────────────────────────────────────────────────


def test_both_graphs_read_one_set_of_weights_by_address(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without packing, the CPU reads what it was given in place, as a GPU does: a change shows in both sessions."""
    mapped = ir.ExternalTensor.numpy
    monkeypatch.setattr(ir.ExternalTensor, "numpy", lambda tensor: mapped(tensor).copy())  # else it is read-only
    weights = SharedWeights("cpu")
    sessions = {
        name: open_session(exported.folder / f"{name}.onnx", "cpu", weights=weights, low_memory=True)
        for name in exported.graphs
    }
    before = {name: _logits(exported, session, name) for name, session in sessions.items()}
    for name, plain in before.items():
        np.testing.assert_array_equal(plain, _logits(exported, exported.session(name), name))
    for value in weights._values.values():
        value.update_inplace(2 * value.numpy())
    for name, session in sessions.items():
        assert np.abs(_logits(exported, session, name) - before[name]).max() > 1e-3


def test_every_tensor_of_the_file_is_loaded_once(exported: Artifact) -> None:
    weights = SharedWeights("cpu")
    supplied = [weights.supply(exported.folder / f"{name}.onnx", session_options()) for name in exported.graphs]
    stored = {
        (tensor.offset, tuple(tensor.shape))
        for name in exported.graphs
        for value in ir.load(exported.folder / f"{name}.onnx").graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor) and tensor.dtype == ir.DataType.FLOAT
    }
    assert len(weights) == len(stored)
    assert sum(supplied) > len(stored) >= max(supplied)


def test_weights_live_as_long_as_a_session_that_reads_them(exported: Artifact) -> None:
    artifact = Artifact(exported.folder, {**exported.manifest, "target": "cpu"}, low_memory=True)
    artifact._weights = SharedWeights("cpu")
    session = artifact.session("decode")
    expected = _logits(exported, session, "decode")
    del artifact
    gc.collect()
    np.testing.assert_array_equal(_logits(exported, session, "decode"), expected)


def test_copies_of_an_artifact_read_the_same_weights(exported: Artifact) -> None:
    cuda = Artifact(exported.folder, {**exported.manifest, "target": "cuda"})
    assert cuda._weights is not None
    assert cuda.pinned()._weights is cuda._weights
    assert exported._weights is None, "the CPU packs its own"


def test_a_device_that_takes_no_tensor_is_an_error(exported: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDA failure 35")

    monkeypatch.setattr(runtime.onnxruntime.OrtValue, "ortvalue_from_numpy", fail)
    with pytest.raises(ProviderMissing, match=r"could not be put on 'cuda': CUDA failure 35; check that the driver"):
        SharedWeights("cuda").supply(exported.folder / "decode.onnx", session_options())


def test_low_memory_generates_the_same_tokens(exported: Artifact) -> None:
    small = Artifact.load(exported.folder, low_memory=True)
    options = small.session("decode").get_session_options()
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert small.pinned().low_memory
    expected = exported.generate(PROMPT, max_new_tokens=6)
    assert torch.equal(small.generate(PROMPT, max_new_tokens=6), expected)


def _logits(exported: Artifact, session: onnxruntime.InferenceSession, phase: str) -> np.ndarray:
    """What a session makes of the inputs that a timing would give it."""
    assert session.get_providers() == [PROVIDERS["cpu"]]
    artifact = Artifact(exported.folder, exported.manifest)
    artifact._sessions = {phase: session}
    names = [output.name for output in session.get_outputs()]
    feeds = generation_feeds(artifact, phase, 2, 6)
    call_of(artifact, phase, 2, 6)()  # bound runs read the same weights
    found: np.ndarray = session.run(names, feeds)[names.index("logits")]
    return found


@pytest.mark.long
def test_the_script_for_large_models_runs_at_toy_size(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "large_model.py"
    out = tmp_path / "large.json"
    command = [sys.executable, str(script), "--toy", "--out", str(out), "--folder", str(tmp_path / "exports")]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found["exports"]) == set(found["served"]) == {"dense", "0.5"}
    assert found["exports"]["0.5"]["kept"] <= 0.5 < found["exports"]["dense"]["kept"]
    assert all(len(ways["packed"]["generated"]) == 10 for ways in found["served"].values())
    assert {timing["name"] for timing in found["times"]} == {"packed", "mapped"}
