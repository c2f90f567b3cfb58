"""Weight-only quantisation: the pass, exports that carry it, what is refused, what the command line says of it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from blora_compiler.passes.onnx_quantize_weights import (
    FLOAT_ARITHMETIC,
    INT8_ARITHMETIC,
    QuantizeWeights,
    block_size,
    digest_columns,
    quantize_matrix,
    rounded_matrix,
    stored_bytes,
)
from blora_compiler.passes.onnx_stamp_sites import SITES_KEY
from torch import nn
from typer.testing import CliRunner

from blora_compiler import compile as compile_model
from blora_compiler.artifact import Artifact, open_session
from blora_compiler.attribution import profile_export
from blora_compiler.cli import app
from blora_compiler.errors import BadInput, ParityFailed
from blora_compiler.evaluate import perplexity_and_kl
from blora_compiler.export_quality import export_quality
from blora_compiler.layers import FactoredLinear
from blora_compiler.lowering import lower
from blora_compiler.report import describe_quantization, quantization_lines
from blora_compiler.verification import random_tokens, verify
from tests.models import build, tiny_llama

WIDTH, RANK = 64, 24


class Pair(nn.Module):
    """A factored projection and a dense one, and nothing of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        self.up = FactoredLinear(torch.randn(RANK, 48) / 7, torch.randn(96, RANK) / 5, torch.randn(96))
        self.down = nn.Linear(96, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, tokens, 48) -> the same shape."""
        return self.down(torch.relu(self.up(x)))


def factored_llama() -> nn.Module:
    model = tiny_llama(layers=1).eval()
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = model.get_submodule(f"model.layers.0.self_attn.{name}").weight
        left, sizes, right = torch.linalg.svd(weight.detach(), full_matrices=False)
        pair = FactoredLinear(sizes[:RANK, None] * right[:RANK], left[:, :RANK], None)
        model.set_submodule(f"model.layers.0.self_attn.{name}", pair)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    """A Llama in int4 with a tied head, one thread."""
    torch.manual_seed(0)
    tree = factored_llama()
    folder = tmp_path_factory.mktemp("llama") / "export"
    lower(tree, folder, inputs={"input_ids": torch.randint(0, 128, (2, 8))}, quantize="int4", new_tokens=6)
    return tree, Artifact.load(folder, threads=1)


# ── The numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("inner", "expected"), [(1024, 64), (320, 64), (72, 32), (40, 64), (24, 32)])
def test_blocks_have_the_size_that_takes_fewest_bytes(inner: int, expected: int) -> None:
    assert block_size(inner, 4, 4) == expected


@pytest.mark.parametrize(("bits", "step"), [(4, 1 / 15), (8, 1 / 255)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rounding_stays_within_a_step_of_each_block(bits: int, step: float, dtype: Any) -> None:
    matrix = np.random.default_rng(0).standard_normal((72, 10)).astype(dtype)
    rounded = rounded_matrix(matrix, bits)
    size = block_size(72, bits, matrix.dtype.itemsize)
    for start in range(0, 72, size):
        block = matrix[start : start + size].astype(np.float32)
        reach = np.maximum(block.max(0), 0) - np.minimum(block.min(0), 0)
        assert (
            np.abs(rounded[start : start + size] - block) <= 1.01 * step * reach + 1e-3 * (dtype != np.float32)
        ).all()
    assert np.abs(rounded - matrix).max() > 0.2 * step  # it does round


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_those_that_are_stored(bits: int) -> None:
    matrix = np.ones((128, 6), np.float32)
    assert stored_bytes(matrix, bits) == sum(part.nbytes for part in vars(quantize_matrix(matrix, bits)).values())


def test_a_packed_gemm_holds_the_numbers_of_its_parts() -> None:
    left, right = np.random.default_rng(0).standard_normal((2, 40, 8)).astype(np.float32)
    together = rounded_matrix(np.hstack([left, right]), 4)
    assert np.array_equal(together, np.hstack([rounded_matrix(left, 4), rounded_matrix(right, 4)]))


def test_the_root_logger_stays_as_it_was() -> None:
    code = (
        "import logging, numpy; from blora_compiler.passes.onnx_quantize_weights import quantize_matrix;"
        "quantize_matrix(numpy.ones((32, 2), numpy.float32), 4);"
        "print(logging.getLogger().handlers, logging.getLogger().level == logging.WARNING)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[] True"


# ── The pass ─────────────────────────────────────────────────────────────────────────────────────────────────────


def matrix_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) / rows**0.5).astype(np.float32)


def constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))


def graph_of(*nodes: ir.Node, constants: list[ir.Value]) -> ir.Model:
    """x (rows, 64) through the first node and so on; every node has the stamp of a site of its name."""
    for position, node in enumerate(nodes):
        node.name = f"node_{position}"
        node.outputs[0].name, node.outputs[0].dtype = f"value_{position}", ir.DataType.FLOAT
        node.metadata_props[SITES_KEY] = f"site_{position}"
    x = next(iter(nodes)).inputs[0]
    assert x is not None
    nodes[-1].outputs[0].shape = ir.Shape(["rows", None])
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=constants, opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def rows_of() -> ir.Value:
    return ir.Value(name="x", shape=ir.Shape(["rows", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))


W, V, BIAS = matrix_of(WIDTH, 96), matrix_of(40, 96, seed=1), matrix_of(1, 40, seed=2)[0]
SQUARE, SMALL = matrix_of(WIDTH, WIDTH), matrix_of(2, 96)
KNOWN = frozenset(d for matrix in (W, V.T, SQUARE, SQUARE.T, SMALL) for d in digest_columns(matrix))
FLOATS = {bits: QuantizeWeights(bits, FLOAT_ARITHMETIC, KNOWN) for bits in (4, 8)}


def two_gemms(w: np.ndarray = W, v: np.ndarray = V) -> ir.Model:
    """MatMul(x, w), then a Gemm that holds its weight transposed and adds a bias."""
    constants = [constant("w", w), constant("v", v), constant("bias", BIAS)]
    first = ir.node("MatMul", [rows_of(), constants[0]])
    second = ir.node("Gemm", [first.outputs[0], constants[1], constants[2]], attributes={"transB": 1})
    return graph_of(first, second, constants=constants)


def run(model: ir.Model, path: Path) -> np.ndarray:
    ir.save(model, path)
    x = np.random.default_rng(3).standard_normal((5, WIDTH)).astype(np.float32)
    return open_session(path, "cpu", 1).run(None, {"x": x})[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_are_those_of_the_rounded_weights(bits: int, tmp_path: Path) -> None:
    model = two_gemms()
    interface = [(value.name, str(value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)]
    result = FLOATS[bits].run(model)
    assert (result.modified, result.applied, result.refusals) == (True, 2, ())
    assert [(value.name, str(value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)] == interface
    assert [node.op_type for node in model.graph] == ["MatMulNBits", "MatMulNBits"]
    expected = run(two_gemms(rounded_matrix(W, bits), rounded_matrix(V.T, bits).T), tmp_path / "rounded.onnx")
    actual = run(model, tmp_path / "quantised.onnx")
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    unrounded = run(two_gemms(), tmp_path / "float.onnx")
    assert np.abs(unrounded - expected).max() > 1e-3


def test_int8_arithmetic_rounds_the_inputs_too(tmp_path: Path) -> None:
    outputs = []
    for arithmetic in (FLOAT_ARITHMETIC, INT8_ARITHMETIC):
        model = two_gemms()
        QuantizeWeights(8, arithmetic, KNOWN).run(model)
        outputs.append(run(model, tmp_path / f"{arithmetic}.onnx"))
    difference = np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0])
    assert 1e-4 < difference < 0.03


def test_names_stamps_and_weights_follow() -> None:
    model = two_gemms()
    FLOATS[4].run(model)
    for position, node in enumerate(model.graph):
        assert (node.name, node.metadata_props) == (f"node_{position}", {SITES_KEY: f"site_{position}"})
        assert node.outputs[0].name == f"value_{position}"
        assert node.outputs[0].dtype == ir.DataType.FLOAT
    parts = ("packed", "scales", "zero_points")
    packed = {f"{weight}_{part}" for weight in ("w", "v_transposed") for part in parts}
    assert set(model.graph.initializers) == {"bias", *packed}


def test_a_second_run_changes_nothing() -> None:
    model = two_gemms()
    FLOATS[4].run(model)
    nodes = list(model.graph)
    again = FLOATS[4].run(model)
    assert (again.modified, again.applied, again.refusals, again.columns) == (False, 0, (), frozenset())
    assert list(model.graph) == nodes


def test_nodes_that_share_a_weight_go_on_sharing_it() -> None:
    w = constant("w", SQUARE)
    first = ir.node("MatMul", [rows_of(), w])
    second = ir.node("MatMul", [first.outputs[0], w])
    third = ir.node("Gemm", [second.outputs[0], w], attributes={"transB": 1})
    model = graph_of(first, second, third, constants=[w])
    assert FLOATS[4].run(model).applied == 3
    assert [node.inputs[1].name for node in model.graph] == ["w_packed", "w_packed", "w_transposed_packed"]
    assert len(model.graph.initializers) == 6


def test_a_fused_product_that_transposes_its_weight_is_quantised(tmp_path: Path) -> None:
    w = constant("w", np.ascontiguousarray(W.T))
    product = ir.node("FusedMatMul", [rows_of(), w], attributes={"transB": 1}, domain="com.microsoft")
    model = graph_of(product, constants=[w])
    model.graph.opset_imports["com.microsoft"] = 1
    expected = run(model, tmp_path / "float.onnx")
    assert FLOATS[8].run(model).applied == 1
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    np.testing.assert_allclose(run(model, tmp_path / "quantised.onnx"), expected, atol=0.05)


def test_a_weight_behind_a_transpose_is_found(tmp_path: Path) -> None:
    w = constant("w", np.ascontiguousarray(W.T))
    turned = ir.node("Transpose", [w], attributes={"perm": [1, 0]}, name="turn")
    turned.outputs[0].name = "turned"
    product = ir.node("MatMul", [rows_of(), turned.outputs[0]])
    model = graph_of(product, constants=[w])
    model.graph.insert_before(product, turned)
    expected = run(model, tmp_path / "float.onnx")
    assert FLOATS[8].run(model).applied == 1
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    assert set(model.graph.initializers) == {"w_transposed_packed", "w_transposed_scales", "w_transposed_zero_points"}
    np.testing.assert_allclose(run(model, tmp_path / "quantised.onnx"), expected, atol=0.05)


def refused(kind: str) -> ir.Model:
    x, w, bias = rows_of(), constant("w", W), constant("bias", matrix_of(1, 96)[0])
    if kind == "tied":
        table = constant("table", np.ascontiguousarray(W.T))
        product = ir.node("MatMul", [x, w])
        lookup = ir.node("Gather", [table, constant("ids", np.array([0]))])
        return graph_of(product, lookup, constants=[w, table, lookup.inputs[1]])
    if kind == "small":
        w = constant("w", SMALL)
        return graph_of(ir.node("MatMul", [x, w]), constants=[w])
    if kind == "scaled":
        return graph_of(ir.node("Gemm", [x, w, bias], attributes={"alpha": 0.5}), constants=[w, bias])
    if kind == "fused":
        return graph_of(ir.node("Attention", [x, w], domain="com.microsoft"), constants=[w])
    other = W.copy()
    other[:, 7] *= 2
    w = constant("w", other)
    return graph_of(ir.node("MatMul", [x, w]), constants=[w])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("tied", "MatMul node_0: a lookup reads the same weight, so it would be stored twice"),
        ("small", "MatMul node_0: its weight (2, 96) would take 1968 bytes and takes 768"),
        ("scaled", "Gemm node_0: it scales, transposes its first input, or adds more than a bias for each column"),
        ("fused", "Attention node_0: the operator has no form for quantised weights"),
        ("unknown", "MatMul node_0: 1 of its weight's 96 columns are no parameter's, so nothing could check it"),
    ],
)
def test_others_are_left_alone_and_say_why(kind: str, reason: str) -> None:
    model = refused(kind)
    nodes = list(model.graph)
    result = FLOATS[4].run(model)
    assert (result.modified, result.applied, result.refusals) == (False, 0, (reason,))
    assert list(model.graph) == nodes


# ── Exports ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_graphs_agree_with_the_rounded_weights(llama: tuple[nn.Module, Artifact]) -> None:
    _, exported = llama
    assert exported.quantize == "int4"
    assert exported.parity.max_error < 1e-5
    assert {"prefill 3x33", "decode 3x33", "decode 3x33, cache of fixed size"} <= set(exported.parity.errors)
    # A prompt computes in floats, a step in int8.
    errors = exported.parity.rounding_errors
    assert errors["prefill 3x33"] < 1e-5
    assert 1e-4 < errors["decode 3x33"] < 0.05
    assert "with inputs in int8 within" in str(exported.parity)
    assert 0.02 < exported.manifest["quantization"]["loss"] < 0.5


def test_quantised_tensors_are_stored_once(llama: tuple[nn.Module, Artifact]) -> None:
    tree, exported = llama
    quantized = exported.manifest["quantization"]["parameters"]
    names = dict(tree.named_parameters())
    assert set(quantized) == {name for name, p in names.items() if p.ndim == 2 and "embed_tokens" not in name}
    packed = sum(stored_bytes(names[name].detach().numpy().T, 4) for name in quantized)
    floats = sum(p.nbytes for name, p in names.items() if name not in quantized)
    stored = (exported.folder / "weights.data").stat().st_size
    assert packed + floats <= stored + 4096 <= packed + floats + 8192  # alignment, and tensors kept in the graphs
    assert stored < 0.5 * sum(p.nbytes for p in names.values())


def test_nodes_still_map_to_sites(llama: tuple[nn.Module, Artifact]) -> None:
    _, exported = llama
    assert exported.unmapped_sites == ()
    for graph in exported.graphs:
        operators = {node.name: node.op_type for node in ir.load(exported.folder / f"{graph}.onnx").graph}
        sites = exported.node_sites(graph)
        named = [site for computed in sites.values() for site in computed]
        assert named.count("model.layers.0.self_attn.q_proj") == 2  # A and B
        kinds = {operators[node] for node, computed in sites.items() if computed != ["lm_head"]}
        assert kinds == {"MatMulNBits"}
    measured = profile_export(exported, phase="decode", tokens=8, repeats=3)
    quantised = [node for node in measured.nodes if node.op == "MatMulNBits"]
    assert quantised
    assert all(node.kind == "sites" and node.shares for node in quantised)


def test_what_was_quantised_and_what_not_is_told(llama: tuple[nn.Module, Artifact]) -> None:
    _, exported = llama
    described = describe_quantization(exported)
    assert described is not None
    assert described["gemms"]["prefill"] == described["gemms"]["decode"] == 7
    headline, *refusals = quantization_lines(described)
    assert headline.startswith("weights in int4: GEMMs 7 of prefill, 7 of decode; outputs on random inputs moved by")
    assert len(refusals) == 2
    assert all(line.endswith("a lookup reads the same weight, so it would be stored twice") for line in refusals)


def test_it_verifies_again_and_not_against_other_weights(llama: tuple[nn.Module, Artifact]) -> None:
    tree, exported = llama
    before = {name: p.detach().clone() for name, p in tree.named_parameters()}
    assert verify(exported, tree, new_tokens=2).max_error < 1e-5
    assert all(torch.equal(p, before[name]) for name, p in tree.named_parameters())
    other = factored_llama()
    with torch.no_grad():
        other.load_state_dict(tree.state_dict())
        other.model.layers[0].mlp.down_proj.weight[3] *= 2
    with pytest.raises(ParityFailed, match="prefill 1x1"):
        verify(exported, other, new_tokens=2)
    with pytest.raises(BadInput, match=r"quantised parameters of .* are not in the model"):
        verify(exported, tiny_llama(layers=1).eval(), new_tokens=2)


def test_an_export_is_scored_as_it_runs(llama: tuple[nn.Module, Artifact]) -> None:
    tree, exported = llama
    windows = random_tokens(tree, 3, 12)
    dense = perplexity_and_kl(tree, tree, windows)
    quantised = export_quality(exported, tree, windows)
    assert dense.perplexity != quantised.perplexity == pytest.approx(dense.perplexity, rel=0.2)
    assert quantised.kl is not None
    assert 1e-6 < quantised.kl < 0.1
    assert quantised.tokens == dense.tokens == 33


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_plain_modules_are_quantised(quantize: Any, tmp_path: Path) -> None:
    exported = lower(Pair().eval(), tmp_path / "export", inputs=(torch.randn(2, 8, 48),), quantize=quantize)
    assert exported.manifest["passes"]["model"]["QuantizeWeights"] == {"applied": 3, "refusals": []}
    assert exported.parity.max_error < 1e-5
    # Many rows in 4 bits compute in floats, so nothing but weights is rounded.
    assert (exported.parity.rounding_tolerance is None) == (quantize == "int4")
    assert exported.manifest["quantization"]["loss"] < (0.02 if quantize == "int8" else 0.2)
    with pytest.raises(BadInput, match="scoring text needs prefill and decode"):
        export_quality(exported, None, torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(("name", "dtype"), [("bert", "float32"), ("gpt2", "float16")])
def test_encoders_and_conv1d_models_are_quantised(name: str, dtype: str, tmp_path: Path) -> None:
    exported = lower(
        build(name), tmp_path / "export", inputs={"input_ids": torch.randint(0, 128, (2, 8))}, quantize="int8",
        dtype=dtype, new_tokens=2, prompts=[[1, 2, 3]] if name == "gpt2" else None,
    )  # fmt: skip
    assert exported.parity.max_error < (1e-4 if dtype == "float32" else 1e-2)
    for result in exported.manifest["passes"].values():
        assert result["QuantizeWeights"]["applied"] >= 8
    axes = set(exported.manifest["quantization"]["parameters"].values())
    assert axes == ({0} if name == "gpt2" else {1})


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("quantize", "target", "message"),
    [
        ("int2", "cpu", "quantize is 'int2'; use 'int8' or 'int4', or None"),
        ("int4", "cuda", "quantize='int4' is for target 'cpu', not 'cuda': quantised graphs were never run there"),
    ],
)
def test_bad_requests_are_refused_before_any_work(quantize: Any, target: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        lower(nn.Linear(4, 4), tmp_path / "export", inputs=(torch.randn(2, 4),), quantize=quantize, target=target)
    assert str(caught.value).startswith(message)


def test_attention_of_a_torch_encoder_is_quantised_too(tmp_path: Path) -> None:
    tree = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 1).eval()
    exported = lower(tree, tmp_path / "export", inputs=(torch.randn(2, 8, 64),), quantize="int4")
    assert "layers.0.self_attn.in_proj_weight" in exported.manifest["quantization"]["parameters"]
    assert exported.manifest["passes"]["model"]["QuantizeWeights"] == {"applied": 4, "refusals": []}


def test_a_model_without_a_gemm_to_quantise_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with pytest.raises(BadInput, match=r"no GEMM can be quantised: model: .*would take .* bytes and takes"):
        lower(nn.Sequential(nn.Linear(2, 96)), folder, inputs=(torch.randn(2, 3, 2),), quantize="int8")
    assert not folder.exists()


def test_inputs_that_do_not_stand_int8_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blora_compiler.verification.ROUNDING_TOLERANCE", 1e-5)
    with pytest.raises(ParityFailed, match="the model does not stand that rounding; export it without quantize"):
        lower(Pair().eval(), tmp_path / "export", inputs=(torch.randn(2, 8, 48),), quantize="int8")
    assert not (tmp_path / "export").exists()


# ── The command line ─────────────────────────────────────────────────────────────────────────────────────────────


def blora(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blora_compiler.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == expect, result.stderr[-2000:]
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the bundled tokenizer, on disk."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from blora_compiler.source import BUNDLED_MODEL

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED_MODEL).save_pretrained(folder)
    return folder


def test_a_run_is_quantised_scored_and_reported(model: Path, tmp_path: Path) -> None:
    from blora_compiler.source import BUNDLED_VALIDATION_TEXT

    out = tmp_path / "run"
    told = blora(
        "compile", model, "--budget", "0.5", "--eval", BUNDLED_VALIDATION_TEXT, "--out", out, "--quantize", "int4"
    )
    assert "\nexport     weights in int4: GEMMs" in told.stdout
    assert "\nexport     not quantised, prefill: FusedMatMul" in told.stdout
    assert "a lookup reads the same weight" in told.stdout
    data = json.loads((out / "report.json").read_text())
    assert data["export"]["quantization"]["quantize"] == "int4"
    assert data["quality"]["int4"]["kl"] > data["quality"]["compressed"]["kl"] > 0
    assert data["quality"]["int4"]["tokens"] == data["quality"]["compressed"]["tokens"]
    text = (out / "report.md").read_text()
    assert "- weights in int4: GEMMs" in text
    assert "exported alike but for weights in int4" in text
    again = json.loads(blora("export", out, "--out", tmp_path / "int8", "--quantize", "int8", "--json").stdout)
    assert again["quantization"]["quantize"] == "int8"
    assert "with inputs in int8" in blora("verify", tmp_path / "int8", "--model", out / "model").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MODEL", "--budget", "0.5", "--quantize", "int5"), "quantize is 'int5'; use 'int8' or 'int4'"),
        (("MODEL", "--budget", "0.5", "--quantize", "int4", "--no-export"), "--no-export skips it"),
        (("MODEL", "--budget", "0.5", "--quantize", "int4", "--target", "cuda"), "is for target 'cpu', not 'cuda'"),
        (("MODEL", "--budget", "0.2..0.5", "--quantize", "int4", "--out", "x"), "is a range, and --quantize is for"),
        (("x.onnx", "--budget", "0.5", "--quantize", "int4", "-o", "y.onnx"), "quantize: weights keep their type"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments: tuple[str, ...], message: str) -> None:
    """Before the model is looked for."""
    result = CliRunner().invoke(app, ["compile", *arguments])
    assert isinstance(result.exception, BadInput)
    assert message in str(result.exception)


@pytest.mark.long
def test_the_benchmark_runs_at_toy_size(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    benchmark = importlib.import_module("benchmarks.quantization")
    monkeypatch.setattr(benchmark, "BUNDLED_MODEL", model)
    monkeypatch.setattr(benchmark, "QUANTIZE", (None, "int4"))
    result = benchmark.measure(tmp_path / "bundled", (1.0, 0.5), tokens=8, repeats=1, most_windows=2)
    rows = result["rows"]
    assert list(rows) == ["dense", "dense + int4", "low rank 0.5", "low rank 0.5 + int4"]
    assert rows["dense"]["quality"]["kl"] < 1e-6 < rows["dense + int4"]["quality"]["kl"]
    assert all(rows[f"{name} + int4"]["bytes"] < rows[name]["bytes"] for name in ("dense", "low rank 0.5"))
    assert "| low rank 0.5 + int4 |" in benchmark.report(rows)
    # A saved student, through the command; what is in the folder already is not made again.
    compile_model(model, 0.5).save(tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text('{"distill": "DistillConfig(steps=3)"}', encoding="utf-8")
    monkeypatch.setattr(benchmark.blora, "compile", None)
    benchmark.main(
        ["--student", str(tmp_path / "run"), "--budgets", "0.5", "--repeats", "1", "--work", str(tmp_path),
         "--out", str(tmp_path / "q.json")]
    )  # fmt: skip
    found = json.loads((tmp_path / "q.json").read_text(encoding="utf-8"))
    assert found["student"] == "DistillConfig(steps=3)"
    (trained, quantized) = [row for name, row in found["rows"].items() if "trained" in name]
    assert quantized["bytes"] < trained["bytes"]
    assert found["rows"]["dense"]["quality"] == rows["dense"]["quality"]
