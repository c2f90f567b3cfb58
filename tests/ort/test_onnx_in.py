from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from blora_compiler.passes.onnx_factor_sites import FactorSites
from blora_compiler.passes.onnx_pack_first_factors import PackFirstFactors
from models import build
from onnx import TensorProto, helper, numpy_helper

import blora_compiler as blora
from blora_compiler import onnx_compiling, onnx_files, onnx_verification
from blora_compiler.cli import main
from blora_compiler.errors import BadInput, InfeasibleBudget, ParityFailed
from blora_compiler.onnx_profiling import profile_sites
from blora_compiler.onnx_sites import find_sites

WIDTH, OUT = 32, 48


def weight(out: int = OUT, into: int = WIDTH, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """A matrix (out, in) whose singular values fall."""
    generator = np.random.default_rng(seed)
    U, _ = np.linalg.qr(generator.standard_normal((out, out)))
    V, _ = np.linalg.qr(generator.standard_normal((into, into)))
    size = min(out, into)
    return ((U[:, :size] * 0.8 ** np.arange(size)) @ V[:size]).astype(dtype)


def graph(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    inputs: dict[str, Sequence[Any]] | None = None,
    outputs: Sequence[str] = ("y",),
    dtype: int = TensorProto.FLOAT,
    opset: int = 17,
) -> onnx.ModelProto:
    inputs = {"x": ["batch", "tokens", WIDTH]} if inputs is None else inputs
    made = helper.make_graph(
        list(nodes), "tested",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=9, producer_name="someone")
    helper.set_model_props(model, {"author": "someone", "licence": "theirs"})
    return model


def node(op: str, inputs: Sequence[str], outputs: Sequence[str] = ("y",), name: str = "", **attributes: Any) -> Any:
    return helper.make_node(op, list(inputs), list(outputs), name=name or f"the_{op}_{outputs[0]}", **attributes)


def saved(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    onnx.save(model, str(folder / name))
    return folder / name


def outputs_of(source: Path | ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    given = str(source) if isinstance(source, Path) else ir.to_proto(source).SerializeToString()
    return onnxruntime.InferenceSession(given, providers=["CPUExecutionProvider"]).run(None, feed)


def feed_of(*shape: int, seed: int = 1, name: str = "x") -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


W = weight()
BIAS = np.linspace(-1, 1, OUT, dtype=np.float32)
FLAT = {"x": ["rows", WIDTH]}
TURNED = {"x": [WIDTH, "rows"]}
MICROSOFT = {"domain": "com.microsoft"}
# Each way to write one product with one weight: the model, and a feed for it.
WAYS: dict[str, tuple[onnx.ModelProto, dict[str, np.ndarray]]] = {
    "MatMul": (graph([node("MatMul", ["x", "w"])], {"w": W.T}), feed_of(2, 5, WIDTH)),
    "behind a Transpose": (
        graph([node("Transpose", ["w"], ["v"]), node("MatMul", ["x", "v"])], {"w": W}),
        feed_of(2, 5, WIDTH),
    ),
    "from a Constant": (
        graph([node("Constant", [], ["w"], value=numpy_helper.from_array(W.T.copy())),
               node("MatMul", ["x", "w"])], {}),
        feed_of(2, 5, WIDTH),
    ),
    "Gemm": (graph([node("Gemm", ["x", "w", "b"])], {"w": W.T, "b": BIAS}, FLAT), feed_of(7, WIDTH)),
    "Gemm transB": (
        graph([node("Gemm", ["x", "w", "b"], transB=1, alpha=0.5, beta=2.0)], {"w": W, "b": BIAS}, FLAT),
        feed_of(7, WIDTH),
    ),
    "Gemm transA": (
        graph([node("Gemm", ["x", "w", "b"], transA=1, alpha=3.0)], {"w": W.T, "b": BIAS}, TURNED),
        feed_of(WIDTH, 7),
    ),
    "Gemm, opset 9": (graph([node("Gemm", ["x", "w", "b"])], {"w": W.T, "b": BIAS}, FLAT, opset=9),
                      feed_of(7, WIDTH)),
    "FusedMatMul": (
        graph([node("FusedMatMul", ["x", "w"], transB=1, alpha=0.25, **MICROSOFT)], {"w": W}),
        feed_of(2, 5, WIDTH),
    ),
    "Attention": (
        graph([node("Attention", ["x", "w", "b"], num_heads=2, **MICROSOFT)], {"w": W.T, "b": BIAS}),
        feed_of(2, 5, WIDTH),
    ),
}  # fmt: skip


# ── Rewriting ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", WAYS)
def test_exact_factors_compute_the_same_in_every_way_to_write_a_product(way: str):
    proto, feed = WAYS[way]
    model = ir.from_proto(proto)
    [site] = find_sites(model).sites
    np.testing.assert_array_equal(site.matrix(), W)
    Q, R = np.linalg.qr(W.astype(np.float64))
    before = outputs_of(ir.from_proto(proto), feed)
    result = FactorSites({site.name: (R.astype(np.float32), Q.astype(np.float32))}).run(model)
    assert result.modified and result.changed == (site.name,)
    np.testing.assert_allclose(outputs_of(model, feed)[0], before[0], atol=2e-5)
    names = {value.name for value in model.graph.initializers.values()}
    assert names == {f"{site.weight.name}.A", f"{site.weight.name}.B"} | ({"b"} if "b" in names else set())
    assert "Constant" not in [n.op_type for n in model.graph], "a weight that nothing reads is dropped"


@pytest.mark.parametrize("way", WAYS)
def test_every_way_compiles_to_its_budget_and_keeps_its_type(way: str, tmp_path: Path):
    proto, feed = WAYS[way]
    path = saved(proto, tmp_path)
    compiled = blora.compile_onnx(path, 0.5, tmp_path / "out.onnx", rank_multiple=1)
    assert compiled.plan.fraction <= 0.5
    assert compiled.artifact is not None and compiled.artifact.parity.parity.max_error <= 1e-4
    changed = outputs_of(tmp_path / "out.onnx", feed)[0] - outputs_of(path, feed)[0]
    assert np.abs(changed).max() > 0


def test_the_second_run_of_the_pass_finds_nothing_to_do():
    model = ir.from_proto(WAYS["MatMul"][0])
    factors = {"w": (W[:8], np.eye(OUT, 8, dtype=np.float32))}
    assert FactorSites(factors).run(model).modified
    again = FactorSites(factors).run(model)
    assert not again.modified
    assert [str(refusal) for refusal in again.refusals] == ["w: the graph has no such site"]


# ── Packing ──────────────────────────────────────────────────────────────────────────────────────────────────────

SIZES = (WIDTH, OUT, WIDTH)


def siblings(opset: int = 17) -> onnx.ModelProto:
    """Three products of one input, and one of another that shares the last one's weight."""
    names = ("q", "k", "v")
    nodes = [node("MatMul", ["x", f"w{name}"], [name]) for name in names]
    nodes += [node("Relu", ["q"], ["r"]), node("MatMul", ["r", "wo"], ["o"]), node("MatMul", ["o", "wo"], ["y"])]
    constants = {
        f"w{name}": weight(out, seed=out + i).T for i, (name, out) in enumerate(zip(names, SIZES, strict=True))
    }
    return graph(nodes, constants | {"wo": weight(WIDTH, seed=9).T}, outputs=("k", "v", "y"), opset=opset)


def factored(proto: onnx.ModelProto) -> tuple[ir.Model, tuple[str, ...]]:
    """Every site at full rank, so that nothing changes but rounding."""
    model = ir.from_proto(proto)
    factors = {}
    for site in find_sites(model).sites:
        Q, R = np.linalg.qr(site.matrix().astype(np.float64))
        factors[site.name] = (R.astype(np.float32), Q.astype(np.float32))
    result = FactorSites(factors).run(model)
    return model, result.first_factors


def test_first_factors_of_one_input_become_one_product():
    proto, feed = siblings(), feed_of(2, 5, WIDTH)
    model, first = factored(proto)
    others = {value.name for value in model.graph.initializers.values()} - set(first)
    result = PackFirstFactors(first).run(model)
    assert (result.modified, result.applied) == (True, 3)
    assert [(n.op_type, len(n.outputs)) for n in model.graph][:2] == [("MatMul", 1), ("Split", 3)]
    assert sum(n.op_type == "MatMul" for n in model.graph) == 1 + 3 + 4, "packed; three second ones; a pair, twice"
    ranks = [min(WIDTH, out) for out in SIZES]
    [wide] = [v for v in model.graph.initializers.values() if v.name.endswith(".packed")]
    assert tuple(wide.shape) == (WIDTH, sum(ranks))
    assert others < {value.name for value in model.graph.initializers.values()}, "nothing else is touched"
    for actual, wanted in zip(outputs_of(model, feed), outputs_of(ir.from_proto(proto), feed), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-5)
    assert not PackFirstFactors(first).run(model).modified


def test_packed_factors_take_no_name_that_the_graph_has():
    model, first = factored(siblings())
    taken = [f"{first[0]}.packed{part}" for part in ("", ".sizes")]
    for name in taken:
        value = ir.Value(name=name, const_value=ir.tensor(np.zeros(3, np.float32), name=name))
        model.graph.register_initializer(value)
    assert PackFirstFactors(first).run(model).applied == 3
    assert {*taken, *(f"{name}_2" for name in taken)} <= set(model.graph.initializers)
    outputs_of(model, feed_of(2, 5, WIDTH))


def test_what_cannot_be_packed_says_why():
    model, first = factored(siblings())
    [reason] = PackFirstFactors(first).run(model).refusals
    assert reason == "wo.A: 2 products read it"
    old, first = factored(siblings(opset=11))
    result = PackFirstFactors(first).run(old)
    assert not result.modified
    assert result.refusals[1].endswith("and 2 more: opset 11 has no Split that takes sizes, opset 13 has")
    read, first = factored(siblings())
    [product] = [node for node in read.graph if node.op_type == "MatMul" and node.inputs[1].name == first[0]]
    read.graph.outputs.append(product.outputs[0])
    result = PackFirstFactors(first).run(read)
    assert result.refusals[0] == f"{first[0]}: its product is an output of the graph"
    assert result.applied == 2
    strange, _ = factored(siblings())
    assert not PackFirstFactors(()).run(strange).modified, "weights that are not named are the user's own"


def test_a_compiled_file_has_its_first_products_packed(tmp_path: Path):
    compiled = blora.compile_onnx(saved(siblings(), tmp_path), 0.5, tmp_path / "out.onnx", rank_multiple=1)
    assert compiled.artifact is not None and compiled.artifact.parity.parity.max_error <= 1e-4
    assert compiled.records[-1].facts["packed"]["applied"] == 3
    assert any(n.op_type == "Split" for n in ir.load(tmp_path / "out.onnx").graph)


# ── Sharing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def twins() -> onnx.ModelProto:
    """Two products of one input that look at the same directions of it, and one after them."""
    U = np.linalg.qr(np.random.default_rng(5).standard_normal((OUT, OUT)))[0]
    constants = {"wk": W.T, "wq": (3 * U @ W).T.astype(np.float32), "wo": weight(WIDTH, OUT, seed=9).T}
    nodes = [node("MatMul", ["x", "wq"], ["q"]), node("MatMul", ["x", "wk"], ["k"]), node("Add", ["q", "k"], ["s"])]
    return graph([*nodes, node("MatMul", ["s", "wo"])], constants)


def test_one_array_becomes_one_initializer_and_one_product():
    model, feed = ir.from_proto(twins()), feed_of(2, 5, WIDTH)
    A = np.eye(WIDTH, dtype=np.float32)
    matrices = {site.name: site.matrix().astype(np.float32) for site in find_sites(model).sites[:2]}
    result = FactorSites({name: (A, B) for name, B in matrices.items()}).run(model)
    assert result.changed == ("wq", "wk") and result.first_factors == ("wq.A",)
    assert [n.op_type for n in model.graph] == ["MatMul", "MatMul", "MatMul", "Add", "MatMul"]
    np.testing.assert_allclose(outputs_of(model, feed)[0], outputs_of(ir.from_proto(twins()), feed)[0], atol=2e-5)


def test_what_sharing_damages_is_the_sum_of_both_shares(tmp_path: Path):
    feed = feed_of(2, 60, WIDTH)
    profiled = profile_sites(saved(twins(), tmp_path), [feed], tmp_path)
    x = feed["x"].reshape(-1, WIDTH).astype(np.float64)
    [(names, spectra)] = profiled.shared.items()
    assert names == ("wq", "wk") and spectra["wq"].A is spectra["wk"].A
    for site in find_sites(ir.from_proto(twins())).sites[:2]:
        true, spectrum = site.matrix().astype(np.float64), spectra[site.name]
        lost = true - spectrum.B[:, :6].numpy() @ spectrum.A[:6].numpy()
        assert spectrum.tail[6] == pytest.approx(np.square(x @ lost.T).sum() / np.square(x @ true.T).sum(), rel=2e-2)
        assert spectrum.tail[6] == pytest.approx(profiled.spectra[site.name].tail[6], rel=1e-2), "twins lose nothing"


def test_a_compiled_file_shares_where_that_pays(tmp_path: Path):
    compiled = blora.compile_onnx(saved(twins(), tmp_path), 0.4, tmp_path / "out.onnx", rank_multiple=1)
    assert [str(form).endswith("shared") for form in compiled.plan.forms.values()] == [True, True, False]
    assert compiled.artifact is not None and compiled.artifact.parity.parity.max_error <= 1e-4
    assert sum(n.op_type == "MatMul" for n in ir.load(tmp_path / "out.onnx").graph) == 1 + 2 + 2
    assert compiled.plan.fraction <= 0.4


def mlp() -> onnx.ModelProto:
    """Two products, one weight used twice, a residual and a node of another kind."""
    nodes = [
        node("MatMul", ["x", "block.up.weight"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "block.down.weight"], ["d"]),
        node("Add", ["x", "d"], ["s"]),
        node("MatMul", ["s", "shared"], ["t"]),
        node("MatMul", ["t", "shared"], ["u"]),
        node("Softmax", ["u"], ["y"], axis=-1),
    ]
    constants = {
        "block.up.weight": weight(seed=1).T, "block.down.weight": weight(WIDTH, OUT, seed=2).T,
        "shared": weight(WIDTH, WIDTH, seed=3),
    }  # fmt: skip
    return graph(nodes, constants)


def test_everything_else_stays_as_it_was(tmp_path: Path):
    path = saved(mlp(), tmp_path)
    before_bytes = path.read_bytes()
    compiled = blora.compile_onnx(path, 0.7, tmp_path / "out.onnx", rules={"shared": "dense"})
    assert path.read_bytes() == before_bytes, "the original is never touched"
    before, after = onnx.load(str(path)), onnx.load(str(tmp_path / "out.onnx"))
    for name in ("ir_version", "producer_name"):
        assert getattr(before, name) == getattr(after, name)
    assert list(before.opset_import) == list(after.opset_import)
    assert list(before.metadata_props) == list(after.metadata_props)
    assert list(before.graph.input) == list(after.graph.input)
    assert [o.name for o in before.graph.output] == [o.name for o in after.graph.output]
    assert before.graph.name == after.graph.name
    factored = {c.site for c in compiled.plan.choices if str(c.form) != "dense"}
    assert factored == {"block.up", "block.down"}
    kept = {n.name: n for n in after.graph.node}
    for old in before.graph.node:
        assert list(kept[old.name].output) == list(old.output), "nodes keep names and outputs"
        if old.op_type != "MatMul" or old.input[1] == "shared":
            assert kept[old.name] == old
    assert len(after.graph.node) == len(before.graph.node) + 2


def test_a_weight_used_twice_is_one_site_with_two_calls(tmp_path: Path):
    path = saved(mlp(), tmp_path)
    compiled = blora.compile_onnx(
        path, 0.5, tmp_path / "out.onnx", rules={"block.*": "exclude"}, workload="prefill 2x5"
    )
    [choice] = compiled.plan.choices
    assert choice.dense_cost == 2 * 2 * 10 * WIDTH * WIDTH
    after = onnx.load(str(tmp_path / "out.onnx"))
    assert sorted(i.name for i in after.graph.initializer if "shared" in i.name) == ["shared.A", "shared.B"]


def test_budget_one_changes_no_byte(tmp_path: Path):
    path = saved(mlp(), tmp_path)
    compiled = blora.compile_onnx(path, 1.0, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()
    assert compiled.artifact is not None and compiled.artifact.parity.distances == {"y": 0.0}


def test_half_precision_stays_half_precision(tmp_path: Path):
    proto = graph([node("MatMul", ["x", "w"])], {"w": weight(dtype=np.float16).T}, dtype=TensorProto.FLOAT16)
    compiled = blora.compile_onnx(saved(proto, tmp_path), 0.5, tmp_path / "out.onnx")
    types = {i.name: i.data_type for i in onnx.load(str(tmp_path / "out.onnx")).graph.initializer}
    assert types == {"w.A": TensorProto.FLOAT16, "w.B": TensorProto.FLOAT16}
    assert compiled.plan.workload.dtype == "float16"


# ── What is found, and what is refused ───────────────────────────────────────────────────────────────────────────


def loop_body() -> onnx.GraphProto:
    return helper.make_graph(
        [node("MatMul", ["x", "w"], ["inner"])], "then", [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )  # fmt: skip


REFUSED: dict[str, tuple[Sequence[Any], dict[str, np.ndarray], str]] = {
    "batched": ([node("MatMul", ["x", "w"])], {"w": np.stack([W.T])}, "only matrices are placed"),
    "vector": ([node("MatMul", ["x", "w"])], {"w": W[0]}, "only matrices are placed"),
    "computed": (
        [node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), node("MatMul", ["x", "t"])], {},
        "no constant operand on its right",
    ),
    "left": ([node("MatMul", ["w", "x"])], {"w": np.ones((2, 3), np.float32)}, "no constant operand on its right"),
    "behind an operation": (
        [node("Mul", ["w", "s"], ["v"]), node("MatMul", ["x", "v"])], {"w": W.T, "s": np.float32(2)},
        "computed by Mul; fold constants",
    ),
    "dequantised": (
        [node("DequantizeLinear", ["w", "s"], ["v"]), node("MatMul", ["x", "v"])],
        {"w": (W.T * 20).astype(np.int8), "s": np.float32(0.05)}, "quantised (DequantizeLinear)",
    ),
    "quantised": ([node("MatMulNBits", ["x", "w", "s"], K=32, N=48, bits=4, block_size=32, **MICROSOFT)],
                  {"w": np.zeros((48, 1, 16), np.uint8), "s": np.ones(48, np.float32)}, "quantised already"),
    "double": ([node("MatMul", ["x", "w"])], {"w": W.T.astype(np.float64)}, "only float32, float16, bfloat16"),
    "both constant": ([node("MatMul", ["v", "w"])], {"w": W.T, "v": W}, "both operands are constants"),
    "moved axes": ([node("FusedMatMul", ["x", "w"], transA=1, **MICROSOFT)], {"w": W.T}, "with transA moves axes"),
    "convolution": ([node("Conv", ["x", "w"])], {"w": np.zeros((4, 4, 3), np.float32)}, "no plain product"),
    "inside": (
        [node("If", ["c"], ["y"], then_branch=loop_body(), else_branch=loop_body())], {"w": W.T, "c": np.array(True)},
        "inside a subgraph",
    ),
}  # fmt: skip


def test_sequences_and_maps_are_compared_by_their_entries():
    compare = onnx_verification._compare
    parts = [np.ones(3, np.float32), np.full(2, 2.0, np.float32)]
    assert compare("y", [parts[0], parts[1] * (1 + 1e-3)], parts, 1e-2, "float32") == pytest.approx(1e-3, rel=0.01)
    assert compare("y", {"a": 0.5, "b": 2}, {"a": 0.5, "b": 2}, 1e-2, "float32") == 0.0
    with pytest.raises(ParityFailed, match="y, entry 1: the file and the same weights unfactored differ"):
        compare("y", [parts[0], 2 * parts[1]], parts, 1e-2, "float32")
    with pytest.raises(ParityFailed, match="1 entries, with the same weights unfactored 2"):
        compare("y", parts[:1], parts, 1e-2, "float32")


def test_a_weight_read_both_ways_is_one_site_that_stays(tmp_path: Path):
    """A tied autoencoder: whatever its site becomes, the weight is still read."""
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Transpose", ["w"], ["v"]), node("MatMul", ["h", "v"])]
    path = saved(graph(nodes, {"w": W.T}), tmp_path)
    found = find_sites(onnx_files.read_model(path))
    assert [(site.name, site.tied) for site in found.sites] == [("w", True)]
    assert "multiplied transposed as well" in found.refusals[0].reason
    with pytest.raises(BadInput, match="has no bytes to save"):
        blora.compile_onnx(path, 0.5, metric="bytes")


def test_files_in_which_weights_must_be_inputs_are_refused(tmp_path: Path):
    model = graph(
        [node("Constant", [], ["w"], value=numpy_helper.from_array(W.T.copy())), node("MatMul", ["x", "w"])], {}
    )
    model.ir_version = 3
    with pytest.raises(BadInput, match="IR version 3, whose weights must be inputs too"):
        blora.compile_onnx(saved(model, tmp_path), 0.5)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_placed_is_refused_with_its_reason(case: str):
    nodes, constants, sentence = REFUSED[case]
    found = find_sites(ir.from_proto(graph(nodes, constants)))
    assert not found.sites
    assert any(sentence in refusal.reason for refusal in found.refusals), found.refusals


def test_a_weight_that_a_caller_may_replace_is_refused():
    proto = graph([node("MatMul", ["x", "w"])], {"w": W.T}, {"x": ["batch", "tokens", WIDTH], "w": list(W.T.shape)})
    [refusal] = find_sites(ir.from_proto(proto)).refusals
    assert "a caller may replace it" in refusal.reason


def test_weights_of_another_type_than_most_are_refused():
    half = weight(seed=1, dtype=np.float16).T
    nodes = [
        node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["x", "v"], ["b"]), node("Cast", ["x"], ["h"], to=10),
        node("MatMul", ["h", "half"], ["c"]),
    ]  # fmt: skip
    found = find_sites(ir.from_proto(graph(nodes, {"w": W.T, "v": W.T, "half": half}, outputs=["a", "b", "c"])))
    assert [site.name for site in found.sites] == ["w", "v"]
    assert [str(r) for r in found.refusals] == [
        "half: its weight is float16 in a float32 model; costs are counted in one type"
    ]


def with_head() -> onnx.ModelProto:
    """A lookup, a product, and a head that is the lookup's table again."""
    table = weight(64, WIDTH, seed=4)
    nodes = [
        node("Gather", ["table", "ids"], ["x"]), node("MatMul", ["x", "w"], ["h"]),
        node("Transpose", ["table"], ["turned"]), node("MatMul", ["h", "turned"], ["logits"]),
    ]  # fmt: skip
    proto = graph(nodes, {"table": table, "w": weight(WIDTH, WIDTH).T}, {"ids": ["batch", "tokens"]}, ["logits"])
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return proto


def test_heads_are_excluded_unless_a_rule_says_otherwise(tmp_path: Path):
    path = saved(with_head(), tmp_path)
    assert blora.compile_onnx(path, 0.5).plan.excluded == ("table",)
    compiled = blora.compile_onnx(
        path, 0.7, tmp_path / "out.onnx", rules={"table": "compress", "w": "dense"}, rank_multiple=4
    )
    assert compiled.plan.excluded == ()
    left = {i.name for i in onnx.load(str(tmp_path / "out.onnx")).graph.initializer}
    assert left == {"table", "w", "table.A", "table.B"}, "the lookup keeps its table"


def test_names_come_from_scopes_weights_and_paths():
    nodes = [
        node("MatMul", ["x", "val_1"], ["a"], name="node_linear"), node("MatMul", ["x", "layers.0.up.weight"], ["b"]),
        node("MatMul", ["x", "onnx::MatMul_7"], ["c"], name="/layers.0/down/MatMul"),
    ]  # fmt: skip
    scope = nodes[0].metadata_props.add()
    scope.key, scope.value = "pkg.torch.onnx.name_scopes", "['', 'layers.0', 'layers.0.gate', 'linear']"
    constants = {name: weight(seed=n).T for n, name in enumerate(("val_1", "layers.0.up.weight", "onnx::MatMul_7"))}
    found = find_sites(ir.from_proto(graph(nodes, constants, outputs=["a", "b", "c"]))).sites
    assert [site.name for site in found] == ["layers.0.gate", "layers.0.up", "layers.0.down"]
    assert "val_1" in found[0].aliases and "/layers.0/down/MatMul" in found[2].aliases


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("memory_bytes", [1, 2 << 30], ids=["one site a pass", "all in one pass"])
def test_damage_is_the_share_of_the_output_that_is_lost(memory_bytes: int, tmp_path: Path):
    path = saved(mlp(), tmp_path)
    feeds = [feed_of(2, 40, WIDTH, seed=seed) for seed in range(3)]
    feeds = [{"x": feed["x"] * np.linspace(3, 0.1, WIDTH, dtype=np.float32)} for feed in feeds]
    profiled = profile_sites(path, feeds, tmp_path, memory_bytes=memory_bytes)
    x = np.concatenate([feed["x"].reshape(-1, WIDTH) for feed in feeds]).astype(np.float64)
    up = weight(seed=1).astype(np.float64)
    spectrum = profiled.spectra["block.up"]
    for rank in (2, 8, 12):
        lost = up - spectrum.B[:, :rank].numpy().astype(np.float64) @ spectrum.A[:rank].numpy()
        expected = np.square(x @ lost.T).sum() / np.square(x @ up.T).sum()
        assert spectrum.tail[rank] == pytest.approx(expected, rel=2e-2)
        U, S, Vt = np.linalg.svd(up, full_matrices=False)
        plain = up - (U[:, :rank] * S[:rank]) @ Vt[:rank]
        assert expected < np.square(x @ plain.T).sum() / np.square(x @ up.T).sum(), "data tells what matters"
    assert spectrum.tail[0] == pytest.approx(1.0)
    assert profiled.unit == "relative output error"


def test_columns_are_measured_as_columns(tmp_path: Path):
    proto, _ = WAYS["Gemm transA"]
    x = feed_of(WIDTH, 60)["x"] * np.linspace(3, 0.1, WIDTH, dtype=np.float32)[:, None]
    spectrum = profile_sites(saved(proto, tmp_path), [{"x": x}], tmp_path).spectra["w"]
    lost = W - spectrum.B[:, :8].numpy() @ spectrum.A[:8].numpy()
    assert spectrum.tail[8] == pytest.approx(np.square(lost @ x).sum() / np.square(W @ x).sum(), rel=2e-2)


def test_rows_are_those_of_the_file_or_of_a_run_at_the_workload(tmp_path: Path):
    fixed = graph([node("MatMul", ["x", "w"])], {"w": W.T}, {"x": [3, 4, WIDTH]})
    open_axes = WAYS["MatMul"][0]
    for name, proto, rows in (("fixed", fixed, 12), ("open", open_axes, 42)):
        path = saved(proto, tmp_path, f"{name}.onnx")
        plan = blora.compile_onnx(path, 0.5, workload="prefill 2x21").plan
        assert plan.baseline == 2 * rows * WIDTH * OUT


def test_calibration_arrays_are_cut_into_runs_and_the_record_says_what_was_used(tmp_path: Path):
    path = saved(mlp(), tmp_path)
    arrays = tmp_path / "data.npz"
    np.savez(arrays, **feed_of(20, 6, WIDTH))
    for calibration, runs in ((arrays, 3), ([arrays, arrays], 6), (feed_of(4, 6, WIDTH), 1), (None, 8)):
        compiled = blora.compile_onnx(path, 0.5, calibration=calibration)
        record = next(r for r in compiled.records if r.stage == "profile")
        assert f"{runs} runs" in record.summary
        assert ("random inputs" in record.summary) == (calibration is None)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"xs": np.zeros((1, 2, WIDTH), np.float32)}, "'xs' is no input of the graph; did you mean 'x'?"),
        ({}, "input 'x' is missing"),
        ({"x": np.zeros((1, 2, 7), np.float32)}, "has shape (1, 2, 7), the graph takes"),
        ({"x": np.zeros((1, 2, WIDTH), np.int64)}, "is int64, the graph takes float32"),
        ({"x": np.zeros((0, 2, WIDTH), np.float32)}, "no sequences"),
        ([], "calibration is an empty list"),
        ([3], "calibration[0] is a int"),
        ({"x": [[1.0, 2.0], [3.0]]}, "input 'x' is no array"),
        ({"x": np.full((1, 2, WIDTH), -1e39)}, "holds -1e+39, which no float32 can"),
        ({"x": np.full((1, 2, WIDTH), np.nan, np.float32)}, "its input is not finite on the calibration data"),
    ],
)
def test_calibration_that_does_not_fit_is_refused(arrays: Any, sentence: str, tmp_path: Path):
    with pytest.raises(BadInput) as caught:
        blora.compile_onnx(saved(mlp(), tmp_path), 0.5, calibration=arrays)
    assert sentence in str(caught.value)


def test_a_calibration_file_that_is_none_is_refused(tmp_path: Path):
    path = saved(mlp(), tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name, sentence in (("bad.npz", "cannot be read as .npz"), ("one.npy", "one array without a name")):
        with pytest.raises(BadInput, match=sentence):
            blora.compile_onnx(path, 0.5, calibration=tmp_path / name)


# ── External data ────────────────────────────────────────────────────────────────────────────────────────────────


def with_external_data(folder: Path, location: str = "weights.bin") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(mlp(), str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    if location != "weights.bin":
        proto = onnx.load(str(path), load_external_data=False)
        for tensor in proto.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = location
        path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_is_read_and_small_results_are_one_file(tmp_path: Path):
    path = with_external_data(tmp_path / "model")
    compiled = blora.compile_onnx(path, 0.5, tmp_path / "out.onnx")
    assert compiled.artifact is not None and list(compiled.artifact.files) == ["out.onnx"]
    plain = blora.compile_onnx(saved(mlp(), tmp_path), 0.5)
    assert compiled.plan.choices == plain.plan.choices
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["model.onnx", "weights.bin"]


def test_large_results_have_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_files, "EMBEDDED_BYTES", 100)
    path = with_external_data(tmp_path / "model")
    compiled = blora.compile_onnx(path, 0.5, tmp_path / "out" / "small.onnx")
    assert compiled.artifact is not None
    assert sorted(compiled.artifact.files) == ["small.onnx", "small.onnx.data"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["small.onnx", "small.onnx.data"]
    outputs_of(tmp_path / "out" / "small.onnx", feed_of(1, 3, WIDTH))
    monkeypatch.undo()
    blora.compile_onnx(path, 0.5, tmp_path / "out" / "small.onnx", overwrite=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["small.onnx"], "nothing reads the old weights"


def test_whole_numbers_that_the_graph_cannot_hold_are_refused(tmp_path: Path):
    nodes = [node("Gather", ["table", "ids"], ["x"]), node("MatMul", ["x", "w"])]
    model = graph(nodes, {"table": weight(16, WIDTH), "w": W.T}, {"ids": ["rows", 4]})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    path = saved(model, tmp_path)
    blora.compile_onnx(path, 0.5, calibration={"ids": np.full((2, 4), 3)})
    with pytest.raises(BadInput, match="'ids' holds 4294967299, which no int32 can"):
        blora.compile_onnx(path, 0.5, calibration={"ids": np.full((2, 4), 2**32 + 3)})


@pytest.mark.parametrize("location", ["/etc/hostname", "../secret.bin", "sub/../../secret.bin", "C:\\secret.bin"])
def test_external_data_outside_the_folder_is_never_read(location: str, tmp_path: Path):
    (tmp_path / "secret.bin").write_bytes(bytes(100_000))
    path = with_external_data(tmp_path / "model", location)
    with pytest.raises(BadInput, match="leaves the model's folder"):
        blora.compile_onnx(path, 0.5)


def test_links_out_of_the_folder_are_never_followed(tmp_path: Path):
    (tmp_path / "secret.bin").write_bytes(bytes(100_000))
    path = with_external_data(tmp_path / "model")
    (tmp_path / "model" / "weights.bin").unlink()
    (tmp_path / "model" / "weights.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(BadInput, match="is a link out of the model's folder"):
        blora.compile_onnx(path, 0.5)


def test_constants_outside_the_file_are_read_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another model's file of the same name lies in the folder that the process runs in."""
    nodes = [node("Constant", [], ["w"], value=numpy_helper.from_array(W.T.copy())), node("MatMul", ["x", "w"])]
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "model.onnx"
    settings = {"save_as_external_data": True, "location": "weights.bin", "convert_attribute": True}
    onnx.save(graph(nodes, {}), str(path), size_threshold=0, **settings)
    (tmp_path / "weights.bin").write_bytes(bytes((tmp_path / "model" / "weights.bin").stat().st_size))
    monkeypatch.chdir(tmp_path)
    found = blora.compile_onnx("model/model.onnx", 0.75, tmp_path / "out.onnx")
    plain = blora.compile_onnx(saved(graph([node("MatMul", ["x", "w"])], {"w": W.T}), tmp_path), 0.75)
    assert found.plan.damage == pytest.approx(plain.plan.damage, rel=1e-5)
    assert found.artifact is not None
    outputs_of(tmp_path / "out.onnx", feed_of(1, 3, WIDTH))


def test_a_model_of_links_says_what_to_copy(tmp_path: Path):
    """As Hugging Face's cache keeps files: links in a folder of names, to files named by their content."""
    path = with_external_data(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.onnx").symlink_to(path.rename(tmp_path / "blobs" / "0a"))
    (snapshot / "weights.bin").symlink_to((tmp_path / "blobs" / "weights.bin").rename(tmp_path / "blobs" / "1b"))
    with pytest.raises(BadInput, match="is a link out of the model's folder; copy the files, not the links"):
        blora.compile_onnx(snapshot / "model.onnx", 0.5)


def test_missing_and_cut_external_data_are_named(tmp_path: Path):
    path = with_external_data(tmp_path / "model")
    data = tmp_path / "model" / "weights.bin"
    data.write_bytes(data.read_bytes()[:50])
    with pytest.raises(BadInput, match=r"but 'weights.bin' has 50; the file was cut short"):
        blora.compile_onnx(path, 0.5)
    data.unlink()
    with pytest.raises(BadInput, match=r"its file 'weights.bin' is missing"):
        blora.compile_onnx(path, 0.5)


def test_a_result_never_replaces_what_it_is_read_from(tmp_path: Path):
    path = with_external_data(tmp_path / "model", "out.onnx.data")
    (tmp_path / "model" / "weights.bin").rename(tmp_path / "model" / "out.onnx.data")
    for out in (path, tmp_path / "model" / "out.onnx"):
        with pytest.raises(BadInput, match="choose another name for the result"):
            blora.compile_onnx(path, 0.5, out, overwrite=True)


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a folder and no ONNX file"),
        (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
        (lambda path: path.write_bytes(b"\xff\xfeno model at all"), "is no ONNX"),
        (
            lambda path: onnx.save(graph([node("Relu", ["x"])], {}), str(path)),
            "has 0 matrix products with a constant 2-D weight",
        ),
        (
            lambda path: onnx.save(graph([node("MatMul", ["x", "w"])], {"w": W.T * np.nan}), str(path)),
            "its weight w holds NaN or infinite values",
        ),
        (
            lambda path: onnx.save(graph([node("Unheard", ["x"], ["h"]), node("MatMul", ["h", "w"])], {"w": W.T}),
                                   str(path)),
            "ONNX Runtime cannot load",
        ),
    ],
)  # fmt: skip
def test_files_that_cannot_be_compiled(write: Callable[[Path], None], sentence: str, tmp_path: Path):
    write(tmp_path / "model.onnx")
    with pytest.raises(BadInput) as caught:
        blora.compile_onnx(tmp_path / "model.onnx", 0.5)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget": "a lot"}, "is not a number"),
        ({"budget": "12ms"}, "has no model of time"),
        ({"rules": {"block.upp": "dense"}}, "did you mean 'block.up'"),
        ({"workload": "prefill 1x8 + 4 decode steps"}, "is a mix"),
        ({"rank_multiple": 0}, "rank_multiple is 0"),
        ({"out": "folder"}, "does not end in .onnx"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], sentence: str, tmp_path: Path):
    with pytest.raises(BadInput) as caught:
        blora.compile_onnx(saved(mlp(), tmp_path), **{"budget": 0.5, **options})
    assert sentence in str(caught.value)


def test_an_earlier_result_is_replaced_only_when_asked(tmp_path: Path):
    path, out = saved(mlp(), tmp_path), tmp_path / "out.onnx"
    out.write_bytes(b"somebody's")
    with pytest.raises(BadInput, match="exists; replace it with overwrite=True"):
        blora.compile_onnx(path, 0.5, out)
    assert out.read_bytes() == b"somebody's"
    blora.compile_onnx(path, 0.5, out, overwrite=True)
    outputs_of(out, feed_of(1, 2, WIDTH))


def test_an_infeasible_budget_names_the_smallest(tmp_path: Path):
    with pytest.raises(InfeasibleBudget) as caught:
        blora.compile_onnx(saved(mlp(), tmp_path), 0.01)
    assert 0.01 < caught.value.smallest_fraction < 0.5
    assert "block.up" in caught.value.binding


def test_a_file_that_computes_something_else_is_not_left_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Doubles(FactorSites):
        def run(self, model: ir.Model) -> Any:
            return FactorSites({name: (A, 2 * B) for name, (A, B) in self.matrices.items()}).run(model)

    path = saved(mlp(), tmp_path)
    monkeypatch.setattr(onnx_compiling, "FactorSites", Doubles)
    with pytest.raises(ParityFailed, match="the file and the same weights unfactored differ by"):
        blora.compile_onnx(path, 0.5, tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_file_of_another_signature_is_not_left_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Renames(FactorSites):
        def run(self, model: ir.Model) -> Any:
            model.graph.outputs[0].name = "renamed"
            return super().run(model)

    path = saved(mlp(), tmp_path)
    monkeypatch.setattr(onnx_compiling, "FactorSites", Renames)
    with pytest.raises(ParityFailed, match=r"has the signature \[.*'renamed'.*\], model\.onnx \[.*'y'"):
        blora.compile_onnx(path, 0.5, tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("fill", [np.finfo(np.float32).min, -1e9, -1e4])
def test_fills_of_a_mask_hide_no_difference(fill: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Doubles(FactorSites):
        def run(self, model: ir.Model) -> Any:
            return FactorSites({name: (A, 2 * B) for name, (A, B) in self.matrices.items()}).run(model)

    nodes = [node("MatMul", ["x", "w"], ["scores"]), node("Where", ["mask", "scores", "fill"])]
    constants = {"w": W.T, "mask": np.arange(OUT) < OUT // 2, "fill": np.float32(fill)}
    path = saved(graph(nodes, constants), tmp_path)
    blora.compile_onnx(path, 0.5, tmp_path / "right.onnx")
    monkeypatch.setattr(onnx_compiling, "FactorSites", Doubles)
    with pytest.raises(ParityFailed, match="the file and the same weights unfactored differ by"):
        blora.compile_onnx(path, 0.5, tmp_path / "out.onnx")


def test_a_file_that_changed_since_the_plan_is_refused(tmp_path: Path):
    path = saved(mlp(), tmp_path)
    compiled = blora.compile(path, 0.5)
    proto = mlp()
    proto.producer_name = "someone else"
    saved(proto, tmp_path)
    with pytest.raises(BadInput, match="has changed since the plan was made"):
        compiled.save(tmp_path / "out.onnx")  # type: ignore[arg-type]


def test_weights_beside_the_file_that_changed_since_the_plan_are_noticed(tmp_path: Path):
    path = with_external_data(tmp_path / "model")
    compiled = blora.compile(path, 0.5)
    weights = tmp_path / "model" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(BadInput, match="has changed since the plan was made"):
        compiled.save(tmp_path / "out.onnx")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="without these options: rounds: plans are not tried on it"):
        blora.compile(path, 0.5, rounds=2)


# ── The doors ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_compile_and_make_plan_take_the_path_of_an_onnx_file(tmp_path: Path):
    path = saved(mlp(), tmp_path)
    compiled: Any = blora.compile(path, 0.5)
    assert isinstance(compiled, blora.CompiledOnnx) and compiled.artifact is None
    assert blora.make_plan(str(path), 0.5).choices == compiled.plan.choices
    stored = compiled.save(tmp_path / "out.onnx")
    assert str(stored.report()).startswith("# model.onnx at budget 0.5")
    assert "unfactored" in str(stored.report())
    edited = blora.compile_onnx(path, 0.5, plan=compiled.plan)
    assert edited.plan.forms == compiled.plan.forms
    for options, word in (({"train": ["text"]}, "train: nothing trains"), ({"damage": "plain"}, "always 'whitened'"),
                          ({"scope": "model"}, "only the sites are counted")):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            blora.compile(path, 0.5, **options)  # type: ignore[arg-type]


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["blora", *map(str, arguments)])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command_line_writes_plans_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path, out = saved(mlp(), tmp_path), tmp_path / "out.onnx"
    np.savez(tmp_path / "data.npz", **feed_of(8, 6, WIDTH))
    rest = ("--calibration", tmp_path / "data.npz", "--rule", "shared=:24", "--seed", "1")
    assert run_cli(monkeypatch, "compile", path, "--budget", "0.5", "--dry-run", *rest) == 0
    assert "| block.up " in capsys.readouterr().out and not out.exists()
    assert run_cli(monkeypatch, "compile", path, "--budget", "0.5", "-o", out, "--json", *rest) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["achieved"]["sites"]["flops"]["fraction"] <= 0.5
    assert data["export"]["files"] == ["out.onnx"] and data["budget"]["damage_unit"] == "relative output error"
    assert run_cli(monkeypatch, "compile", path, "--budget", "0.5", "-o", out, "--overwrite") == 0
    assert "Written to" in capsys.readouterr().out
    for arguments, code, sentence in (
        (("-o", out), 2, "exists; replace it"),
        ((), 2, "--out is missing"),
        (("-o", tmp_path / "n.onnx", "--train", "t.txt", "--steps", "3"), 2, "train: nothing trains"),
        (("-o", tmp_path / "n.onnx", "--eval", "t.txt"), 2, "eval: there is no tokenizer"),
    ):
        assert run_cli(monkeypatch, "compile", path, "--budget", "0.5", *arguments) == code
        assert sentence in capsys.readouterr().err
    assert run_cli(monkeypatch, "compile", path, "--budget", "0.01", "-o", tmp_path / "n.onnx") == 3
    assert not (tmp_path / "n.onnx").exists()


# ── Exported models ──────────────────────────────────────────────────────────────────────────────────────────────


def exported(name: str, fusions: str | None, folder: Path) -> Path:
    from transformers.exporters import OnnxConfig, OnnxExporter

    from blora_compiler.lowering import quiet_exporters

    model = build(name)
    ids = torch.randint(0, 128, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model.config.use_cache = False  # type: ignore[union-attr, assignment]
    with torch.no_grad(), quiet_exporters():
        components = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True, ort_fusions=fusions)).components
    ir.save(next(iter(components.values())).program, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("name", "fusions", "sites", "known"),
    [
        ("bert", None, 13, "encoder.layer.0.attention.self.query"),
        ("bert", "cpu", 9, "encoder.layer.0.intermediate.dense"),
        ("vit", None, 13, "vit.layers.1.mlp.fc1"),
        ("vit", "cpu", 9, "vit.layers.1.mlp.fc1"),
        ("llama", None, 15, "model.layers.0.mlp.up_proj"),
        ("llama", "cpu", 9, "model.layers.0.mlp.down_proj"),
    ],
)
def test_exported_graphs_go_all_the_way(name: str, fusions: str | None, sites: int, known: str, tmp_path: Path):
    path = exported(name, fusions, tmp_path)
    compiled = blora.compile_onnx(path, 0.5, tmp_path / "out.onnx")
    assert len(compiled.sites) == sites
    assert known in compiled.plan.forms
    assert ("lm_head" in compiled.plan.excluded) == (name == "llama")
    assert 0.45 < compiled.plan.fraction <= 0.5
    assert compiled.artifact is not None
    assert compiled.artifact.parity.parity.max_error < 1e-5
    assert len(compiled.artifact.parity.parity.errors) == 3, "the calibration run and two more shapes"
    assert 0 < max(compiled.artifact.parity.distances.values()) < 1
    assert any("no constant operand" in str(r) for r in compiled.records[0].refusals), "attention scores stay"
