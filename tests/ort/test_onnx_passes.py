"""The ONNX passes that make graphs faster: each applies, refuses with a reason, settles, and preserves outputs."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from blora_compiler.cost_models.latency import kernels_of
from blora_compiler.cost_models.measured import ATTENTION_PARTS, ATTENTION_PARTS_FROM
from blora_compiler.passes.onnx_attend_in_parts import AttendInParts
from blora_compiler.passes.onnx_collapse_reshapes import CollapseReshapes
from blora_compiler.passes.onnx_drop_same_reshapes import DropSameReshapes
from blora_compiler.passes.onnx_keep_last_position import KeepLastPosition
from blora_compiler.passes.onnx_last_position_early import LastPositionEarly
from blora_compiler.passes.onnx_multiply_masked_rows import MultiplyMaskedRows
from blora_compiler.passes.onnx_rotate_before_attention import RotateBeforeAttention
from blora_compiler.passes.onnx_unflatten_gemms import UnflattenGemms
from blora_compiler.passes.onnx_unfuse_transposes import UnfuseTransposes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from blora_compiler import lowering
from blora_compiler.artifact import open_session, session_options
from blora_compiler.layers import FactoredLinear
from blora_compiler.lowering import lower
from blora_compiler.tracing import trace
from blora_compiler.values import Factored, Form, Workload, site_groups
from blora_compiler.verification import LONG
from tests.models import build

# Heads of 16: of smaller ones the exporter leaves the rotation outside attention.
VOCABULARY, WIDTH, LAYERS = 96, 64, 2
PARTS = AttendInParts(parts=4, smallest=8)
Step = Callable[[ir.Model], Any]

# Every pass with those that run before it in a prefill graph.
BEFORE: dict[str, tuple[list[Step], Any]] = {
    "reshapes": ([], CollapseReshapes()),
    "rows": ([CollapseReshapes().run, RotateBeforeAttention().run], MultiplyMaskedRows()),
    "last": (
        [CollapseReshapes().run, RotateBeforeAttention().run, MultiplyMaskedRows().run, KeepLastPosition().run],
        LastPositionEarly(),
    ),
    "parts": ([CollapseReshapes().run, RotateBeforeAttention().run], PARTS),
}


def products_of_one_position(model: ir.Model) -> list[ir.Node]:
    products = [node for node in model.graph if node.op_type == "MatMul"]
    return [node for node in products if node.outputs[0].shape is not None and node.outputs[0].shape[1] == 1]


def tiny_llama(factored: bool) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    for name, module in list(model.named_modules()) if factored else []:
        if isinstance(module, nn.Linear) and name != "lm_head":
            A, B = torch.randn(8, module.in_features) / 6, torch.randn(module.out_features, 8) / 3
            model.set_submodule(name, FactoredLinear(A, B, None))
    return model


@pytest.fixture(scope="module")
def exported() -> dict[bool, ir.Model]:
    """Prefill graphs as the exporter leaves them: of a dense model, and of a factored one."""
    torch.manual_seed(0)  # fixtures of a module come before the seed of each test
    ids = torch.randint(0, VOCABULARY, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    example = {"input_ids": ids, "attention_mask": mask}
    return {
        factored: lowering.export_graphs(tiny_llama(factored), example, "cpu", True).models["prefill"]
        for factored in (False, True)
    }


def prepared(exported: Mapping[bool, ir.Model], factored: bool, name: str) -> ir.Model:
    model = exported[factored].clone()
    for step in BEFORE[name][0]:
        step(model)
    return model


def run(model: ir.Model, path: Path, batch: int, tokens: int, padding: int = 0) -> dict[str, np.ndarray]:
    """Every output of a prefill graph for random tokens, the first row padded on the left."""
    ir.save(model, path)
    mask = np.ones((batch, tokens), np.int64)
    mask[0, :padding] = 0
    feeds = {
        "input_ids": np.random.default_rng(tokens).integers(0, VOCABULARY, (batch, tokens)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
    }
    session = open_session(path, "cpu", 1)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def signature(model: ir.Model) -> list[tuple[str | None, object, str]]:
    return [(value.name, value.dtype, str(value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


# ── Every pass, on exported models ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("name", BEFORE)
def test_outputs_are_preserved(exported: dict[bool, ir.Model], name: str, factored: bool, tmp_path: Path) -> None:
    model = prepared(exported, factored, name)
    shapes = [(1, 1, 0), (1, 7, 0), (2, 5, 2), (1, 11, 3), (1, 64, 0), (3, 16, 4)]
    expected = [run(model, tmp_path / "before.onnx", *shape) for shape in shapes]
    before = signature(model)
    BEFORE[name][1].run(model)
    assert signature(model) == before
    for shape, wanted in zip(shapes, expected, strict=True):
        actual = run(model, tmp_path / "after.onnx", *shape)
        assert list(actual) == list(wanted)
        for output, value in wanted.items():
            np.testing.assert_allclose(actual[output], value, atol=2e-5, err_msg=f"{output} at {shape}")


@pytest.mark.parametrize("name", ["rows", "last", "parts"])
def test_a_second_run_changes_nothing(exported: dict[bool, ir.Model], name: str) -> None:
    model = prepared(exported, True, name)
    first = BEFORE[name][1].run(model)
    assert first.modified
    assert first.applied > 0
    nodes = [node.name for node in model.graph]
    second = BEFORE[name][1].run(model)
    assert (second.modified, second.applied) == (False, 0)
    assert [node.name for node in model.graph] == nodes


@pytest.mark.parametrize("name", BEFORE)
def test_every_value_has_a_name_of_its_own(exported: dict[bool, ir.Model], name: str) -> None:
    model = prepared(exported, True, name)
    BEFORE[name][1].run(model)
    nodes = list(model.graph.all_nodes())
    names = [value.name for node in nodes for value in node.outputs if value.uses() or value.is_graph_output()]
    assert all(names)
    assert len(names) == len(set(names))
    assert all(node.name for node in nodes)


def test_the_passes_find_their_places_in_an_export(tmp_path: Path) -> None:
    artifact = lower(
        tiny_llama(True), tmp_path / "export", inputs={"input_ids": torch.randint(0, VOCABULARY, (2, 8))},
        new_tokens=2, prompts=[[1, 2, 3]],
    )  # fmt: skip
    counted = {
        name: {label: result["applied"] for label, result in results.items()}
        for name, results in artifact.manifest["passes"].items()
    }
    assert counted["prefill"]["MultiplyMaskedRows"] == counted["decode"]["MultiplyMaskedRows"] == LAYERS
    assert counted["prefill"]["AttendInParts"] == LAYERS - 1  # the last one takes the last position alone
    assert counted["prefill"]["LastPositionEarly"] >= 10
    assert counted["decode"]["CollapseReshapes"] == 3 * LAYERS  # query, key and value
    # The way that only long prompts take was compared too.
    assert artifact.parity.errors[f"prefill {LONG}"] < 1e-4
    assert LONG.tokens >= AttendInParts().smallest


# ── RotateBeforeAttention, KeepLastPosition ──────────────────────────────────────────────────────────────────────


def test_rotation_leaves_the_attention_of_prompts(exported: dict[bool, ir.Model], tmp_path: Path) -> None:
    """Of rows padded alike, so that rotating all at the first row's positions was right before, too."""
    model = exported[True].clone()
    expected = run(model, tmp_path / "before.onnx", 2, 7)
    before = signature(model)
    done = RotateBeforeAttention().run(model)
    assert (done.modified, done.applied, done.refusals) == (True, LAYERS, ())
    assert signature(model) == before
    assert operators(model)["RotaryEmbedding"] == 2 * LAYERS  # queries and keys
    assert not any(
        node.attributes.get_int("do_rotary", 0) for node in model.graph if node.op_type == "GroupQueryAttention"
    )
    for output, value in run(model, tmp_path / "after.onnx", 2, 7).items():
        np.testing.assert_allclose(value, expected[output], atol=2e-5)
    again = RotateBeforeAttention().run(model)
    assert (again.modified, again.applied) == (False, 0)


@pytest.mark.parametrize("turning", [16, 32], ids=["half of each head", "all of it"])
def test_rotation_turns_what_attention_turned(turning: int, tmp_path: Path) -> None:
    """Of a head of 32, as much as the cosines are wide. One row, so that attention alone was right before."""
    heads, kv_heads, size, tokens = 4, 2, 32, 6
    generator = np.random.default_rng(0)
    angles = generator.standard_normal((16, turning // 2)).astype(np.float32)
    names = {"lengths": np.array([tokens - 1], np.int32), "total": np.array(tokens, np.int32)}
    names |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    names["positions"] = np.arange(tokens)[None] + 2
    constants = [ir.Value(name=name, const_value=ir.tensor(value, name=name)) for name, value in names.items()]
    by_name = {value.name: value for value in constants}
    for value in constants:
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    states = [
        ir.val(name, dtype=ir.DataType.FLOAT, shape=(1, tokens, count * size))
        for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    ]
    attention = ir.node(
        "GroupQueryAttention",
        [*states, None, None, *(by_name[name] for name in ("lengths", "total", "cos", "sin", "positions"))],
        attributes={"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1}, num_outputs=3,
        domain="com.microsoft",
    )  # fmt: skip
    for value, shape in zip(attention.outputs, ((1, tokens, heads * size), *[(1, kv_heads, tokens, size)] * 2),
                            strict=True):  # fmt: skip
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    model = small_graph(attention, inputs=states, outputs=list(attention.outputs), constants=constants)
    feeds = {value.name: generator.standard_normal(tuple(value.shape)).astype(np.float32) for value in states}

    def outputs(name: str) -> list[np.ndarray]:
        ir.save(model, tmp_path / name)
        return open_session(tmp_path / name, "cpu", 1).run(None, feeds)

    expected = outputs("before.onnx")
    assert RotateBeforeAttention().run(model).applied == 1
    for value, wanted in zip(outputs("after.onnx"), expected, strict=True):
        np.testing.assert_allclose(value, wanted, atol=1e-5)


def test_rotation_stays_where_there_is_a_past() -> None:
    ids = torch.randint(0, VOCABULARY, (2, 8))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decode = lowering.export_graphs(tiny_llama(False), example, "cpu", True).models["decode"]
    nodes = operators(decode)
    done = RotateBeforeAttention().run(decode)
    assert (done.modified, done.applied, len(done.refusals)) == (False, 0, LAYERS)
    assert "has a past" in done.refusals[0]
    assert operators(decode) == nodes


def test_rotation_stays_where_nobody_knows_how_wide_the_packed_input_is(exported: dict[bool, ir.Model]) -> None:
    model = exported[False].clone()
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for node in attentions:
        assert node.inputs[0] is not None and node.inputs[1] is None, "else nothing is packed"
        node.inputs[0].shape = None
    done = RotateBeforeAttention().run(model)
    assert (done.modified, len(done.refusals)) == (False, len(attentions))
    assert "width of its packed queries" in done.refusals[0]


def test_the_last_position_is_kept_once_and_counted(exported: dict[bool, ir.Model]) -> None:
    model = exported[False].clone()
    done = KeepLastPosition().run(model)
    assert (done.modified, done.applied, done.refusals) == (True, 1, ())
    again = KeepLastPosition().run(model)
    assert (again.modified, again.applied) == (False, 0)


# ── CollapseReshapes ─────────────────────────────────────────────────────────────────────────────────────────────


def small_graph(
    *nodes: ir.Node, inputs: list[ir.Value], outputs: list[ir.Value], constants: list[ir.Value]
) -> ir.Model:
    for position, node in enumerate(nodes):
        node.name = node.name or f"node_{position}"
        for index, value in enumerate(node.outputs):
            value.name = value.name or f"value_{position}_{index}"
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 20, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


def tensor(name: str, *sizes: int | str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(dtype))


def constant(name: str, value: Any) -> ir.Value:
    array = np.asarray(value)
    return ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))


def reshaped_twice(
    last: list[int], recorded: tuple[int | str, ...] | None = None, is_output: bool = False
) -> ir.Model:
    x, heads, target = tensor("x", "b", "s", 8), constant("heads", [0, 0, 2, 4]), constant("target", last)
    first = ir.node("Reshape", [x, heads])
    first.outputs[0].shape, first.outputs[0].dtype = ir.Shape(["b", "s", 2, 4]), ir.DataType.FLOAT
    second = ir.node("Reshape", [first.outputs[0], target])
    if recorded is not None:
        second.outputs[0].shape = ir.Shape(recorded)
    second.outputs[0].dtype = ir.DataType.FLOAT
    relu = ir.node("Relu", [second.outputs[0]])
    relu.outputs[0].dtype = ir.DataType.FLOAT
    outputs = [relu.outputs[0], *([second.outputs[0]] if is_output else [])]
    return small_graph(first, second, relu, inputs=[x], outputs=outputs, constants=[heads, target])


@pytest.mark.parametrize(("last", "recorded"), [([0, 0, 8], None), ([0, 0, -1], None), ([7], ("b", "s", 8))])
def test_reshapes_that_undo_each_other_go(last: list[int], recorded: tuple[int | str, ...] | None) -> None:
    model = reshaped_twice(last, recorded)
    result = CollapseReshapes().run(model)
    assert (result.applied, result.refusals) == (1, ())
    assert operators(model) == {"Relu": 1}
    assert not CollapseReshapes().run(model).modified


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (reshaped_twice([0, -1, 8]), "reshape node_1: the shape of its result or of x is not recorded"),
        (reshaped_twice([0, 0, 4, 2]), "reshape node_1: its result is ['b', 's', 4, 2], x is ['b', 's', 8]"),
        (reshaped_twice([1], ("s", "b", 8)), "reshape node_1: its result is ['s', 'b', 8], x is ['b', 's', 8]"),
        (reshaped_twice([0, 0, 8], is_output=True), "reshape node_1: its result is an output of the graph"),
    ],
)
def test_other_reshapes_stay(model: ir.Model, reason: str) -> None:
    result = CollapseReshapes().run(model)
    assert (result.modified, result.refusals) == (False, (reason,))
    assert operators(model)["Reshape"] == 2


# ── UnflattenGemms and DropSameReshapes ──────────────────────────────────────────────────────────────────────────


def flattened(
    sizes: tuple[int | str, ...] = ("b", "s", 6), features: int = 8, restored: list[int] | None = None, **changed: Any
) -> ir.Model:
    """Reshape(Gemm(Reshape(x, rows), weight, bias), positions)."""
    random = np.random.default_rng(0)
    inner = int(np.prod([size for size in sizes[2:] if isinstance(size, int)]))
    x, rows = tensor("x", *sizes), constant("rows", [-1, inner])
    positions = constant("positions", restored or [-1, 3, features])
    weight = constant("weight", random.standard_normal((inner, features)).astype(np.float32))
    bias = constant("bias", random.standard_normal(features).astype(np.float32))
    flatten = ir.node("Reshape", [x, rows])
    gemm = ir.node("Gemm", [flatten.outputs[0], weight, bias], attributes=changed or None)
    gemm.metadata_props["scope"] = "h.0"
    restore = ir.node("Reshape", [gemm.outputs[0], positions])
    restore.outputs[0].shape, restore.outputs[0].dtype = ir.Shape(["b", "s", features]), ir.DataType.FLOAT
    return small_graph(
        flatten, gemm, restore, inputs=[x], outputs=[restore.outputs[0]], constants=[rows, positions, weight, bias]
    )


@pytest.mark.parametrize(
    ("sizes", "features", "left"),
    [
        (("b", "s", 6), 8, {"MatMul": 1, "Add": 1}),
        (("b", "s", 2, 4), 8, {"Reshape": 1, "MatMul": 1, "Add": 1}),  # heads in front, and in = out
    ],
)
def test_a_flattened_gemm_becomes_a_product(
    sizes: tuple[int | str, ...], features: int, left: dict[str, int], tmp_path: Path
) -> None:
    model = flattened(sizes, features)
    before = signature(model)
    ir.save(model, tmp_path / "before.onnx")
    result = UnflattenGemms().run(model)
    ir.save(model, tmp_path / "after.onnx")
    assert (result.applied, result.refusals) == (1, ())
    assert operators(model) == left
    assert signature(model) == before
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert product.metadata_props["scope"] == "h.0"
    shape = (2, 3, *sizes[2:])
    feeds = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}  # type: ignore[arg-type]
    outputs = [open_session(tmp_path / f"{name}.onnx", "cpu", 1).run(None, feeds)[0] for name in ("before", "after")]
    assert outputs[0].shape == (2, 3, features)
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-6)
    assert not UnflattenGemms().run(model).modified


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (flattened(transA=1), "GEMM node_1: it has transA, which a product has not"),
        (flattened(alpha=2.0), "GEMM node_1: it has alpha, which a product has not"),
        (flattened(("b", "s", 2, 3)), "GEMM node_1: what it reads is not recorded as ['b', 's', 6]"),
        (flattened(("b", "t", 6)), "GEMM node_1: what it reads is not recorded as ['b', 's', 6]"),
        (
            flattened(("b", "s", 2, 4), restored=[0, 3, 8]),
            "GEMM node_1: its result takes the size of an axis from the flattened one",
        ),
    ],
)
def test_other_gemms_stay(model: ir.Model, reason: str) -> None:
    before = operators(model)
    result = UnflattenGemms().run(model)
    assert (result.modified, result.refusals) == (False, (reason,))
    assert operators(model) == before


def test_a_flattened_gemm_that_is_read_as_it_is_stays() -> None:
    model = flattened()
    gemm = next(node for node in model.graph if node.op_type == "Gemm")
    model.graph.outputs.append(gemm.outputs[0])
    result = UnflattenGemms().run(model)
    assert (result.modified, result.refusals) == (
        False, ("GEMM node_1: something other than one reshape reads it",)
    )  # fmt: skip


def reshaped_to(*sizes: int | str, is_output: bool = False) -> ir.Model:
    x, target = tensor("x", "b", "s", 8), constant("target", [-1, 3, 8])
    view = ir.node("Reshape", [x, target])
    view.outputs[0].shape, view.outputs[0].dtype = ir.Shape(sizes), ir.DataType.FLOAT
    relu = ir.node("Relu", [view.outputs[0]])
    relu.outputs[0].dtype = ir.DataType.FLOAT
    outputs = [relu.outputs[0], *([view.outputs[0]] if is_output else [])]
    return small_graph(view, relu, inputs=[x], outputs=outputs, constants=[target])


def test_a_reshape_to_the_same_shape_goes() -> None:
    model = reshaped_to("b", "s", 8)
    result = DropSameReshapes().run(model)
    assert (result.applied, result.refusals) == (1, ())
    assert operators(model) == {"Relu": 1}
    assert not DropSameReshapes().run(model).modified


@pytest.mark.parametrize(
    ("model", "refusals"),
    [
        (reshaped_to("s", "b", 8), ()),
        (reshaped_to("b", "s", 8, is_output=True), ("reshape node_0: its result is an output of the graph",)),
    ],
)
def test_other_single_reshapes_stay(model: ir.Model, refusals: tuple[str, ...]) -> None:
    result = DropSameReshapes().run(model)
    assert (result.modified, result.refusals) == (False, refusals)
    assert operators(model) == {"Reshape": 1, "Relu": 1}


# ── GPT-2 ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def gpt2s() -> dict[tuple[bool, str], ir.Model]:
    """Both graphs of GPT-2 as the exporter leaves them, dense and factored."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    found = {}
    for factored in (False, True):
        model = build("gpt2")
        for name, module in list(model.named_modules()) if factored else []:
            if type(module).__name__ == "Conv1D":
                A, B = torch.randn(8, module.weight.shape[0]) / 6, torch.randn(module.weight.shape[1], 8) / 3
                model.set_submodule(name, FactoredLinear(A, B, module.bias))
        exported = lowering.export_graphs(model, {"input_ids": ids, "attention_mask": mask}, "cpu", True)
        found |= {(factored, name): graph for name, graph in exported.models.items()}
    return found


@pytest.mark.parametrize("factored", [False, True])
def test_gpt2s_last_block_runs_on_one_position(gpt2s: dict[tuple[bool, str], ir.Model], factored: bool) -> None:
    model = gpt2s[factored, "prefill"].clone()
    results = lowering.rewrite_for_speed("prefill", model, "cpu")
    # Four GEMMs a block; behind the last norm a view; a guard behind every attention.
    assert results["UnflattenGemms"].applied == (0 if factored else 4 * LAYERS)
    assert results["DropSameReshapes"].applied >= 1
    assert results["MultiplyMaskedRows"].applied == LAYERS
    assert operators(model)["Gemm"] == 0
    # The head, and what the cost model takes to run late: c_proj, c_fc, c_proj of the last block.
    late = products_of_one_position(model)
    sites = [site for site in trace(build("gpt2")).sites if site.last_only and site.kind != "head"]
    assert len(late) == 1 + len(sites) * (2 if factored else 1)


@pytest.mark.parametrize("factored", [False, True])
def test_gpt2_computes_the_same(gpt2s: dict[tuple[bool, str], ir.Model], factored: bool, tmp_path: Path) -> None:
    before, after = (gpt2s[factored, "prefill"].clone() for _ in range(2))
    lowering.rewrite_for_speed("prefill", after, "cpu")
    for shape in ((1, 1, 0), (1, 7, 0), (2, 5, 2), (3, 16, 4)):
        expected, actual = run(before, tmp_path / "a.onnx", *shape), run(after, tmp_path / "b.onnx", *shape)
        assert list(actual) == list(expected)
        for name, value in expected.items():
            wanted = value[:, -1:] if name == "logits" else value
            np.testing.assert_allclose(actual[name], wanted, atol=2e-5, err_msg=f"{name} at {shape}")


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_session_makes_one_kernel_of_a_gelu_in_steps(
    gpt2s: dict[tuple[bool, str], ir.Model], name: str, factored: bool, tmp_path: Path
) -> None:
    """Why no pass does: should ONNX Runtime stop finding the steps, GPT-2 is slower for it and this says so."""
    model = gpt2s[factored, name].clone()
    lowering.rewrite_for_speed(name, model, "cpu")
    assert operators(model)["Tanh"] == LAYERS
    ir.save(model, tmp_path / "model.onnx")
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    fused = ir.load(tmp_path / "optimized.onnx")
    assert operators(fused)["FastGelu"] == LAYERS
    assert not {"Tanh", "Pow"} & set(operators(fused))
    # The bias joins it where no GEMM adds it.
    gelus = [node for node in fused.graph if node.op_type == "FastGelu"]
    assert {len([value for value in node.inputs if value is not None]) for node in gelus} == {2 if factored else 1}


def test_products_without_flattening_keep_their_sites(tmp_path: Path) -> None:
    artifact = lower(
        build("gpt2"), tmp_path / "export", inputs={"input_ids": torch.randint(0, VOCABULARY, (2, 8))},
        new_tokens=2, prompts=[[1, 2, 3]],
    )  # fmt: skip
    for graph in ("prefill", "decode"):
        assert artifact.manifest["passes"][graph]["UnflattenGemms"]["applied"] == 4 * LAYERS
        sites = {site for found in artifact.manifest["node_sites"][graph].values() for site in found}
        assert {f"transformer.h.{layer}.mlp.c_fc" for layer in range(LAYERS)} <= sites
    assert artifact.manifest["unmapped_sites"] == []
    assert max(artifact.parity.errors.values()) < 1e-4


def test_what_else_reads_the_logits_keeps_all_positions(tmp_path: Path) -> None:
    x, weight = tensor("x", "b", "s", 8), constant("weight", np.random.default_rng(0).random((8, 4), np.float32))
    product = ir.node("MatMul", [x, weight])
    logits = product.outputs[0]
    logits.name, logits.shape, logits.dtype = "logits", ir.Shape(["b", "s", 4]), ir.DataType.FLOAT
    softmax = ir.node("Softmax", [logits])
    softmax.outputs[0].name, softmax.outputs[0].dtype = "chances", ir.DataType.FLOAT
    model = small_graph(
        product, softmax, inputs=[x], outputs=[logits, softmax.outputs[0]], constants=[weight]
    )  # fmt: skip
    ir.save(model, tmp_path / "before.onnx")
    KeepLastPosition().run(model)
    ir.save(model, tmp_path / "after.onnx")
    feeds = {"x": np.random.default_rng(1).random((2, 5, 8), np.float32)}
    (wanted, chances), (kept, same) = (
        open_session(tmp_path / f"{name}.onnx", "cpu", 1).run(["logits", "chances"], feeds)
        for name in ("before", "after")
    )
    np.testing.assert_allclose(kept, wanted[:, -1:], atol=1e-6)
    np.testing.assert_allclose(same, chances, atol=1e-6)


def test_the_logits_keep_their_name_where_the_last_position_moves_further(tmp_path: Path) -> None:
    x, drawn = tensor("x", "b", "s", 8), np.random.default_rng(0)
    halves = [constant(name, drawn.random((8, 4), np.float32)) for name in ("left", "right")]
    products = [ir.node("MatMul", [x, half]) for half in halves]
    both = ir.node("Add", [product.outputs[0] for product in products])
    for node in (*products, both):
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(["b", "s", 4]), ir.DataType.FLOAT
    both.outputs[0].name = "logits"
    model = small_graph(*products, both, inputs=[x], outputs=[both.outputs[0]], constants=halves)
    ir.save(model, tmp_path / "before.onnx")
    assert KeepLastPosition().run(model).modified  # behind the sum, which reads two computed values
    assert LastPositionEarly().run(model).modified
    ir.save(model, tmp_path / "after.onnx")
    feeds = {"x": drawn.random((2, 5, 8), np.float32)}
    wanted, kept = (
        open_session(tmp_path / f"{name}.onnx", "cpu", 1).run(["logits"], feeds)[0] for name in ("before", "after")
    )
    np.testing.assert_allclose(kept, wanted[:, -1:], atol=1e-6)


def test_a_gemm_over_parts_of_the_features_stays() -> None:
    x, weight = tensor("x", "b", "s", 64), constant("weight", np.ones((8, 8), np.float32))
    rows, target = constant("rows", [-1, 8]), constant("target", [0, -1, 64])
    flat = ir.node("Reshape", [x, rows])
    gemm = ir.node("Gemm", [flat.outputs[0], weight])
    restored = ir.node("Reshape", [gemm.outputs[0], target])
    for node, sizes in ((flat, (None, 8)), (gemm, (None, 8)), (restored, ("b", "s", 64))):
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(sizes), ir.DataType.FLOAT
    model = small_graph(
        flat, gemm, restored, inputs=[x], outputs=[restored.outputs[0]], constants=[weight, rows, target]
    )
    result = UnflattenGemms().run(model)
    assert not result.modified
    assert result.refusals == ("GEMM node_1: its result is reshaped to rows of 64, and the product has 8",)


# ── MultiplyMaskedRows ───────────────────────────────────────────────────────────────────────────────────────────


def guarded(
    masked: tuple[int | str, ...] = ("b", "s", 1, 1),
    dtype: ir.DataType = ir.DataType.FLOAT,
    x_last: int = 8,
    made_by: str | None = "MultiHeadAttention",
    zero: float = 0.0,
    reader: str | None = None,
) -> ir.Model:
    x, mask = tensor("x", "b", "s", x_last, dtype=dtype), tensor("mask", *masked, dtype=ir.DataType.BOOL)
    instead = constant("zero", np.full((), zero, dtype.numpy()))
    heads, joined = constant("heads", [0, 0, 2, 4]), constant("joined", [0, 0, 8])
    made = [ir.node(made_by, [x])] if made_by else []
    if made_by == "MultiHeadAttention":
        made = [ir.node(made_by, [x, x, x], attributes={"num_heads": 2}, domain="com.microsoft")]
    for node in made:
        node.outputs[0].shape, node.outputs[0].dtype = x.shape, dtype
    first = ir.node("Reshape", [made[0].outputs[0] if made else x, heads])
    guard = ir.node("Where", [mask, instead, first.outputs[0]])
    last = ir.node("Reshape", [guard.outputs[0], joined])
    last.outputs[0].shape, last.outputs[0].dtype = ir.Shape(["b", "s", 8]), dtype
    read = reader and reader != "output"
    readers = [ir.node(reader, [guard.outputs[0]])] if read else []
    for node in readers:
        node.outputs[0].dtype = dtype
    guard.outputs[0].dtype = dtype
    outputs = [node.outputs[0] for node in (last, *readers, *([guard] if reader == "output" else []))]
    return small_graph(
        *made, first, guard, last, *readers, inputs=[x, mask], outputs=outputs, constants=[instead, heads, joined]
    )


def test_a_guard_becomes_a_product(tmp_path: Path) -> None:
    model = guarded()
    feeds = {
        "x": np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32),
        "mask": np.array([[1, 0, 0], [0, 0, 1]], bool)[:, :, None, None],
    }
    ir.save(model, tmp_path / "before.onnx")
    result = MultiplyMaskedRows().run(model)
    ir.save(model, tmp_path / "after.onnx")
    assert (result.applied, result.refusals) == (1, ())
    assert operators(model) == {"MultiHeadAttention": 1, "Squeeze": 1, "Not": 1, "Cast": 1, "Mul": 1}
    before, after = (
        open_session(tmp_path / f"{name}.onnx", "cpu", 1).run(None, feeds)[0] for name in ("before", "after")
    )
    np.testing.assert_array_equal(before, after)
    assert not after[0, 0].any()
    assert after[0, 1].any()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (guarded(masked=("b", "s", 2, 1)), "guard node_2: its mask is ['b', 's', 2, 1], its result ['b', 's', 8]"),
        (guarded(dtype=ir.DataType.FLOAT16), "guard node_2: it is FLOAT16, and a masked row is finite for certain"),
        (guarded(x_last=16), "guard node_2: what it guards is not recorded as ['b', 's', 8]"),
        (guarded(made_by="Softmax"), "guard node_2: it guards what Softmax gives, which may be NaN in a masked row"),
        (guarded(made_by=None), "guard node_1: it guards what an input gives, which may be NaN in a masked row"),
        (guarded(reader="Relu"), "guard node_2: something other than one reshape reads it"),
        (guarded(reader="output"), "guard node_2: something other than one reshape reads it"),
        (guarded(zero=7.0), None),  # a choice, but none that a product could make
    ],
)
def test_other_guards_stay(model: ir.Model, reason: str | None) -> None:
    before = operators(model)
    result = MultiplyMaskedRows().run(model)
    assert not result.modified
    assert len(result.refusals) == (0 if reason is None else 1)
    assert all(refusal.startswith(reason or "") for refusal in result.refusals)
    assert operators(model) == before


# ── Attention that is left as it is ──────────────────────────────────────────────────────────────────────────────


def attending(
    outputs: int = 3,
    shape: tuple[int | str, ...] | None = ("b", "s", 8),
    rotates: bool = False,
    **given: tuple[int, ir.Value],
) -> ir.Model:
    """The last position of one attention of two heads of 4; `given` are further inputs and where they go."""
    states = [tensor(name, "b", "s", 8) for name in ("query", "key", "value")]
    for value in states:
        value.shape = None if shape is None else ir.Shape(shape)
    lengths = [tensor("lengths", "b", dtype=ir.DataType.INT32), tensor("total", dtype=ir.DataType.INT32)]
    inputs: list[ir.Value | None] = [*states, None, None, *lengths, *[None] * 5]
    for place, value in given.values():
        inputs[place] = value
    attributes = {"num_heads": 2, "kv_num_heads": 2} | ({"do_rotary": 1} if rotates else {})
    attention = ir.node(
        "GroupQueryAttention", inputs, attributes=attributes, num_outputs=outputs, domain="com.microsoft"
    )
    last = constant("last", [-1])
    gather = ir.node("Gather", [attention.outputs[0], last], attributes={"axis": 1})
    for value in (*attention.outputs, gather.outputs[0]):
        value.dtype = ir.DataType.FLOAT
    read = [value for value in inputs if value is not None]
    return small_graph(
        attention, gather, inputs=read, outputs=[gather.outputs[0], *attention.outputs[1:]], constants=[last]
    )


PAST, BIAS, BEHIND_BIAS, COSINES, SINES, POSITIONS = 3, 10, 11, 7, 8, 9
TABLES = {
    "cosines": (COSINES, tensor("cosines", "p", "half")), "sines": (SINES, tensor("sines", "p", "half")),
    "positions": (POSITIONS, tensor("positions", "b", "s", dtype=ir.DataType.INT64)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "model", "reason"),
    [
        (PARTS, attending(tables=(COSINES, tensor("x", 4))), "it has an input that this pass does not know"),
        (PARTS, attending(sink=(BEHIND_BIAS, tensor("x", 4))), "it has an input that this pass does not know"),
        (PARTS, attending(outputs=4), "it has other outputs than its result, keys and values"),
        (LastPositionEarly(), attending(past=(PAST, tensor("x", 4))), "it reads a cache already"),
        (
            LastPositionEarly(), attending(sink=(BEHIND_BIAS, tensor("x", 4))),
            "it has an input behind the bias that this pass does not know",
        ),
        (LastPositionEarly(), attending(bias=(BIAS, tensor("x", 4))), "the shape of its bias is not recorded"),
        (LastPositionEarly(), attending(shape=None), "the shapes of its query, key and value are not recorded"),
        (
            LastPositionEarly(), attending(shape=("b", "s", "wide")),
            "the shapes of its query, key and value are not recorded",
        ),
        (
            RotateBeforeAttention(), attending(rotates=True, **TABLES),
            "the width of its cosines is not known, and so not how much of each head turns",
        ),
    ],
)  # fmt: skip
def test_other_attentions_stay(step: Any, model: ir.Model, reason: str) -> None:
    before = operators(model)
    result = step.run(model)
    assert not result.modified
    assert [refusal.partition("node_0: ")[2] for refusal in result.refusals] == [reason]
    assert operators(model) == before


# ── LastPositionEarly ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_block_runs_on_one_position(exported: dict[bool, ir.Model]) -> None:
    model = prepared(exported, True, "last")
    LastPositionEarly().run(model)
    one = products_of_one_position(model)
    # The head; q's second GEMM; o, down (two each); gate and up (packed first, two second).
    assert len(one) == 1 + 1 + 2 + 2 + 3
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert [node.inputs[3] is None for node in attentions] == [True, False]


@pytest.mark.parametrize("factored", [False, True])
def test_the_cost_model_knows_which_gemms_run_on_one_position(exported: dict[bool, ir.Model], factored: bool) -> None:
    model = prepared(exported, factored, "last")
    LastPositionEarly().run(model)
    gemms = [node for node in model.graph if node.op_type == "MatMul"]
    late = sum(node.outputs[0].shape[1] == 1 for node in gemms)  # type: ignore[index]
    sites = trace(tiny_llama(False)).sites
    forms: dict[str, Form] = {site.name: Factored(8) for site in sites if factored and site.kind != "head"}
    load = Workload("prefill", 2, 7)
    kernels = [kernel for kernel, _ in kernels_of(site_groups(sites), (), forms, load, generates=True)]
    rows = [kernel.shape[0] for kernel in kernels if kernel.op == "gemm"]
    assert (len(rows), rows.count(2), rows.count(14)) == (len(gemms), late, len(gemms) - late)


def test_the_cost_model_cuts_attention_as_the_pass_does() -> None:
    assert (AttendInParts().parts, AttendInParts().smallest) == (ATTENTION_PARTS, ATTENTION_PARTS_FROM)


def test_it_stops_where_all_positions_are_read(exported: dict[bool, ir.Model]) -> None:
    result = LastPositionEarly().run(prepared(exported, True, "last"))
    assert any(
        reason.startswith("SkipSimplifiedLayerNormalization") and "MatMul" in reason for reason in result.refusals
    )
    whole = prepared(exported, True, "last")
    hidden = next(node for node in whole.graph if node.op_type == "Gather" and node.name == "keep_last_position")
    source = hidden.inputs[0]
    assert source is not None
    whole.graph.outputs.append(source)
    refused = LastPositionEarly().run(whole)
    assert not refused.modified
    assert refused.refusals[0].endswith(f"the graph's output reads all positions of {source.name}")


def test_attention_that_rotates_is_not_cut(exported: dict[bool, ir.Model]) -> None:
    model = exported[True].clone()
    for step in (CollapseReshapes(), MultiplyMaskedRows(), KeepLastPosition(), LastPositionEarly()):
        result = step.run(model)
    assert any("it rotates by itself" in reason for reason in result.refusals)
    assert all(node.inputs[3] is None for node in model.graph if node.op_type == "GroupQueryAttention")


# ── AttendInParts ────────────────────────────────────────────────────────────────────────────────────────────────


def test_attention_is_split_under_a_condition(exported: dict[bool, ir.Model]) -> None:
    model = prepared(exported, True, "parts")
    result = PARTS.run(model)
    assert (result.applied, result.refusals) == (LAYERS, ())
    assert operators(model)["GroupQueryAttention"] == 0
    assert operators(model)["If"] == LAYERS
    branches = [
        attribute.as_graph() for node in model.graph if node.op_type == "If" for attribute in node.attributes.values()
    ]
    counts = [sum(node.op_type == "GroupQueryAttention" for node in branch) for branch in branches]
    assert sorted(counts) == [1] * LAYERS + [PARTS.parts] * LAYERS


def test_parts_and_whole_agree_where_the_split_begins(exported: dict[bool, ir.Model], tmp_path: Path) -> None:
    model = prepared(exported, True, "parts")
    whole = copy.deepcopy(run(model, tmp_path / "whole.onnx", 1, PARTS.smallest + 1, padding=2))
    PARTS.run(model)
    split = run(model, tmp_path / "split.onnx", 1, PARTS.smallest + 1, padding=2)
    for name, value in whole.items():
        np.testing.assert_allclose(split[name], value, atol=1e-5, err_msg=name)


def test_attention_that_rotates_or_has_a_window_stays_whole(exported: dict[bool, ir.Model]) -> None:
    rotating = exported[True].clone()
    turning = PARTS.run(rotating).refusals
    assert ["it rotates by itself" in reason for reason in turning] == [True] * LAYERS
    packed = PARTS.run(exported[False].clone()).refusals
    assert ["query, key and value are packed" in reason for reason in packed] == [True] * LAYERS
    window = prepared(exported, True, "parts")
    attentions = [node for node in window.graph if node.op_type == "GroupQueryAttention"]
    attentions[0].attributes["local_window_size"] = ir.AttrInt64("local_window_size", 4)
    result = PARTS.run(window)
    assert result.applied == LAYERS - 1
    assert "has the attribute local_window_size" in result.refusals[0]


# ── The benchmark ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_benchmark_runs_at_toy_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    benchmark = importlib.import_module("benchmarks.passes")
    size = benchmark.Size(
        model=name, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2 if name == "llama" else 4,
        vocabulary=64, tokens=200, context=8, threads=1,
    )  # fmt: skip
    result = benchmark.measure(size, 1)
    assert result["flops_ratio"]["1.0"] == 1.0
    assert 0.15 < result["flops_ratio"]["0.25"] < result["flops_ratio"]["0.5"] < 0.6
    assert result["counts"]["0.25"]["prefill"]["AttendInParts"] == (1 if name == "llama" else 0)
    assert result["counts"]["1.0"]["decode"]["UnflattenGemms"] == (0 if name == "llama" else 8)
    assert ("single_decode" in result) == (name == "gpt2")
    for times in (*result["single"].values(), *result["end_to_end"].values()):
        assert all(
            0 < time["low_ms"] <= time["high_ms"] and time["largest_difference"] < 1e-4 for time in times.values()
        )
    rows = ["all of these", *benchmark.PASSES[name], *([benchmark.IN_STEPS] if name == "gpt2" else [])]
    assert all(f"| {row} |" in benchmark.table_of_passes(result) for row in rows)


# ── UnfuseTransposes ─────────────────────────────────────────────────────────────────────────────────────────────


def fused_product(ranks: tuple[int, int], flags: Mapping[str, int], known: bool = True) -> ir.Model:
    """x and w through one FusedMatMul; of rank 2, w is (7, 5), else it has the batch of x in the middle."""
    shapes = {"x": (3, 2, 7)[-ranks[0] :], "w": (7, 5) if ranks[1] == 2 else (2, 7, 5)}
    inputs = [
        ir.Value(name=name, shape=ir.Shape(shape) if known else None, type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in shapes.items()
    ]
    product = ir.node("FusedMatMul", inputs, dict(flags), domain="com.microsoft", name="product")
    product.outputs[0].name, product.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 21, "com.microsoft": 1}
    return ir.Model(ir.Graph(inputs, product.outputs, nodes=[product], opset_imports=opsets, name="g"), ir_version=10)


def test_a_product_of_unequal_ranks_transposes_its_batch_by_itself():
    model = fused_product((3, 2), {"transBatchA": 1})
    x, w = np.random.default_rng(0).normal(size=(3, 2, 7)).astype("float32"), np.eye(7, 5, dtype="float32")

    def run() -> np.ndarray:
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
        return session.run(None, {"x": x, "w": w})[0]

    with pytest.raises(Exception, match="same rank"):
        run()
    result = UnfuseTransposes().run(model)
    assert (result.modified, result.applied, result.refusals) == (True, 1, ())
    np.testing.assert_allclose(run(), x.transpose(1, 0, 2) @ w, atol=1e-6)
    assert not UnfuseTransposes().run(model).modified


def test_products_of_equal_ranks_stay_and_unknown_ranks_are_refused():
    alike = fused_product((3, 3), {"transBatchA": 1})
    assert not UnfuseTransposes().run(alike).modified
    assert [node.op_type for node in alike.graph] == ["FusedMatMul"]
    plain = fused_product((3, 2), {})
    assert not UnfuseTransposes().run(plain).modified
    result = UnfuseTransposes().run(fused_product((3, 2), {"transBatchA": 1}, known=False))
    assert not result.modified
    assert result.refusals == ("product product: the rank of what it transposes is not recorded",)
