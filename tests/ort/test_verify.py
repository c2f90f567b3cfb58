"""verify: refuses files that do not compute what the tree computes, and says where; and the passes it guards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from blora_compiler.passes.onnx_keep_last_position import KeepLastPosition
from blora_compiler.passes.onnx_rotate_before_attention import RotateBeforeAttention
from blora_compiler.passes.onnx_share_weights import ShareWeights
from blora_compiler.passes.onnx_stamp_sites import StampSites, stamped_sites
from blora_compiler.passes.onnx_strip_metadata import StripMetadata
from torch import Tensor, nn

from blora_compiler.artifact import Artifact, InputSpec, Parity, file_record, positions_of
from blora_compiler.errors import BadInput, ParityFailed
from blora_compiler.lowering import lower
from blora_compiler.onnx_verification import _compare
from blora_compiler.verification import (
    TOLERANCES,
    Setting,
    _Check,
    cast_copy,
    default_prompts,
    example_like,
    left_padded,
    verify,
)

VOCABULARY = 96


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    tree = tiny_llama()
    ids = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    return tree, lower(tree, tmp_path_factory.mktemp("verify") / "export", inputs={"input_ids": ids}, new_tokens=8)


def edited(artifact: Artifact, folder: Path, name: str, edit: Callable[[ir.Graph], None]) -> Artifact:
    """A copy of the export with one graph changed behind the manifest's back."""
    shutil.copytree(artifact.folder, folder)
    model = ir.load(folder / f"{name}.onnx")
    edit(model.graph)
    ir.save(model, folder / f"{name}.onnx")
    return Artifact(folder, artifact.manifest)


def scale_output(graph: ir.Graph, factor: float) -> None:
    """Multiply the logits by `factor`."""
    logits = graph.outputs[0]
    scale = ir.Value(name="scale", const_value=ir.tensor(np.array(factor, np.float32), name="scale"))
    graph.register_initializer(scale)
    multiply = ir.node("Mul", [logits, scale])
    graph.append(multiply)
    output = multiply.outputs[0]
    output.name, logits.name, output.shape, output.type = logits.name, "unscaled", logits.shape, logits.type
    graph.outputs[0] = output


# ── What passes ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_export_on_disk_is_verified_against_its_tree(exported: tuple[nn.Module, Artifact]) -> None:
    tree, artifact = exported
    parity = verify(artifact.folder, tree, new_tokens=8)
    assert parity == artifact.parity
    assert f"{len(parity.errors)} settings within" in str(parity)
    assert sum("fixed" in setting for setting in parity.errors) >= 1
    assert "16 of 16 greedy generations of 8 tokens identical" in str(parity)


def test_the_trees_type_and_mode_do_not_matter_and_stay(exported: tuple[nn.Module, Artifact]) -> None:
    tree, artifact = exported
    double = cast_copy(tree, "float32").double().train()
    config = double.generation_config
    verify(artifact, double, new_tokens=2)
    assert double.training
    assert double.generation_config is config
    assert next(double.parameters()).dtype == torch.float64


def test_new_tokens_are_capped_by_the_models_positions(exported: tuple[nn.Module, Artifact]) -> None:
    tree, artifact = exported
    prompt = list(range(58))
    assert verify(artifact, tree, prompts=[prompt], new_tokens=64).new_tokens == 6
    with pytest.raises(BadInput, match="the longest prompt has 64 tokens, the model 64 positions"):
        verify(artifact, tree, prompts=[[1] * 64])
    with pytest.raises(BadInput, match=r"prompts of at least one token, got lengths \[1, 0\]"):
        verify(artifact, tree, prompts=[[1], []])
    with pytest.raises(BadInput, match="a prompt holds token 96, the vocabulary has 96"):
        verify(artifact, tree, prompts=[[96]])


# ── What fails ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_slightly_wrong_graph_is_refused(name: str, exported: tuple[nn.Module, Artifact], tmp_path: Path) -> None:
    tree, artifact = exported
    wrong = edited(artifact, tmp_path / "wrong", name, lambda graph: scale_output(graph, 1.0005))
    with pytest.raises(ParityFailed, match=rf"{name} 1x1: ONNX Runtime gives .*, PyTorch .* the tolerance"):
        verify(wrong, tree)


def test_an_output_that_is_not_finite_is_refused(exported: tuple[nn.Module, Artifact], tmp_path: Path) -> None:
    tree, artifact = exported
    wrong = edited(artifact, tmp_path / "wrong", "decode", lambda graph: scale_output(graph, float("inf")))
    with pytest.raises(ParityFailed, match=r"decode 1x1: .* of 96 values from ONNX Runtime are not finite"):
        verify(wrong, tree)


def test_a_missing_output_position_is_refused(exported: tuple[nn.Module, Artifact], tmp_path: Path) -> None:
    def drop_half_of_the_vocabulary(graph: ir.Graph) -> None:
        head = graph.outputs[0].producer()
        split = ir.node("Split", [graph.outputs[0]], attributes={"axis": 2, "num_outputs": 2}, num_outputs=2)
        assert head is not None
        graph.append(split)
        graph.outputs[0].name, split.outputs[0].name = "whole", "logits"
        split.outputs[0].type = graph.outputs[0].type
        graph.outputs[0] = split.outputs[0]

    tree, artifact = exported
    wrong = edited(artifact, tmp_path / "wrong", "prefill", drop_half_of_the_vocabulary)
    with pytest.raises(ParityFailed, match=r"returns shape \(1, 1, 48\), PyTorch \(1, 1, 96\)"):
        verify(wrong, tree)


def test_a_tree_with_other_weights_is_refused(exported: tuple[nn.Module, Artifact]) -> None:
    tree, artifact = exported
    other = cast_copy(tree, "float32")
    # A new tensor: the copy shares storage with the tree.
    other.model.norm.weight = nn.Parameter(other.model.norm.weight * 1.001)
    with pytest.raises(ParityFailed, match="pass a larger tolerance if this is acceptable"):
        verify(artifact, other)


def test_generations_that_differ_are_refused_in_float32(exported: tuple[nn.Module, Artifact]) -> None:
    tree, artifact = exported
    other = cast_copy(tree, "float32")
    # Within a huge tolerance, yet another model: only the generations can tell.
    other.model.norm.weight = nn.Parameter(-other.model.norm.weight.detach())
    with pytest.raises(ParityFailed, match=r"greedy generation, prompt \d: token \d+ is \d+ in ONNX Runtime and \d+"):
        verify(artifact, other, tolerance=1e6)


def test_a_graph_with_too_few_outputs_is_refused(tmp_path: Path) -> None:
    class TwoOutputs(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x * 2

    artifact = lower(TwoOutputs(), tmp_path / "export", inputs=(torch.randn(2, 3),))
    wrong = edited(artifact, tmp_path / "wrong", "model", lambda graph: graph.outputs.pop())
    with pytest.raises(ParityFailed, match="ONNX Runtime returns 1 outputs"):
        verify(wrong, TwoOutputs())


# ── Small parts ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_left_padding_and_positions() -> None:
    ids, mask = left_padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions_of(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_default_prompts_are_eight_of_unequal_length_and_always_the_same() -> None:
    prompts = default_prompts(tiny_llama())
    assert len({len(prompt) for prompt in prompts}) == 8
    assert prompts == default_prompts(tiny_llama())


def test_examples_are_drawn_like_the_one_that_was_given() -> None:
    ids = InputSpec("input_ids", "int64", (2, 8), (0, 1), 3.0, 9.0)
    mask = InputSpec("attention_mask", "int64", (2, 8), (0, 1), 0.0, 1.0)
    extra = InputSpec("extra", "float32", (2, 5), (0, 1), 1.0, 2.0)
    flags = InputSpec("flags", "bool", (2, 8), (0, 1), 0.0, 1.0)
    specs, setting = (ids, mask, extra, flags), Setting(3, 16, padded=True)
    drawn = [example_like(spec, specs, setting) for spec in specs]
    assert [tuple(value.shape) for value in drawn] == [(3, 16), (3, 16), (3, 5), (3, 16)]
    assert set(drawn[0].flatten().tolist()) <= set(range(3, 10))
    assert drawn[1][:, :4].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert bool(((drawn[2] >= 1) & (drawn[2] <= 2)).all())
    assert bool(drawn[3].any()) and not bool(drawn[3][:, 0].any())
    unset = InputSpec("flags", "bool", (2, 8), (0, 1), 0.0, 0.0)
    assert not bool(example_like(unset, (ids, unset), setting).any())


def test_casting_keeps_ties_shares_memory_and_spares_computed_buffers() -> None:
    tree = tiny_llama()
    same, half = cast_copy(tree, "float32"), cast_copy(tree, "float16")
    assert same.lm_head.weight is same.model.embed_tokens.weight
    assert same.lm_head.weight.data_ptr() == tree.lm_head.weight.data_ptr()
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert half.lm_head.weight.dtype == torch.float16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_parity_survives_json() -> None:
    parity = Parity("float32", 1e-4, {"prefill 1x7": 2e-6}, 16, 16, 64)
    assert Parity(**parity.to_json()) == parity
    assert parity.max_error == 2e-6


# ── Passes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def parse(text: str, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX's text form, its named initializers given as arrays."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n{text}')
    for value in list(model.graph.inputs):
        if value.name in weights:
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    return model


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


HEAD = """head (float[b,t,4] x, float[4,3] A, float[3,6] B, float[6] bias) => (float[b,t,6] logits)
<float[b,t,3] low, float[b,t,6] high>
{ low = MatMul(x, A) high = MatMul(low, B) logits = Add(high, bias) }"""


def test_keep_last_position_goes_in_front_of_both_gemms_of_a_factored_head() -> None:
    arrays = {"A": weights(4, 3), "B": weights(3, 6), "bias": weights(6)}
    model = parse(HEAD, **arrays)
    x = weights(2, 5, 4, seed=1)
    whole = run(model, x=x)[0]
    assert KeepLastPosition("logits").run(model).refusals == ()
    np.testing.assert_array_equal(run(model, x=x)[0], whole[:, -1:])
    assert [node.op_type for node in model.graph] == ["Gather", "MatMul", "MatMul", "Add"]
    assert not KeepLastPosition("logits").run(model).modified


BEHIND = ("nothing in front of logits is position-wise: its work stays",)


@pytest.mark.parametrize(
    ("text", "constants", "operators", "refusals"),
    [
        (
            "g (float[b,t,4] x, int64[1] axis) => (float[b,t,4] logits) { logits = CumSum <reverse=0> (x, axis) }",
            {"axis": np.array([1])}, ["CumSum", "Gather"], BEHIND,
        ),
        (  # one row for each position
            "g (float[b,5,4] x, float[5,4] rows) => (float[b,5,4] logits) { logits = Add(x, rows) }",
            {"rows": weights(5, 4, seed=1)}, ["Add", "Gather"], BEHIND,
        ),
        (
            """g (float[b,5,4] x, float[5,4] rows) => (float[b,5,4] logits) <float[b,5,4] sum>
            { sum = Add(x, rows) logits = Tanh(sum) }""",
            {"rows": weights(5, 4, seed=1)}, ["Add", "Gather", "Tanh"], (),
        ),
        (  # the features of x are the positions of the result
            """g (float[b,5,4] x, float[5,6] w) => (float[b,4,6] logits)
            { logits = com.microsoft.FusedMatMul <transA=1> (x, w) }""",
            {"w": weights(5, 6, seed=1)}, ["FusedMatMul", "Gather"], BEHIND,
        ),
    ],
    ids=["a sum over positions", "a row for each", "behind a row for each", "a product of the transpose"],
)  # fmt: skip
def test_keep_last_position_goes_behind_what_mixes_positions(
    text: str, constants: dict[str, np.ndarray], operators: list[str], refusals: tuple[str, ...]
) -> None:
    model = parse(text, **constants)
    x = weights(2, 5, 4)
    whole = run(model, x=x)[0]
    done = KeepLastPosition("logits").run(model)
    assert (done.modified, done.refusals) == (True, refusals)
    assert [node.op_type for node in model.graph] == operators
    np.testing.assert_array_equal(run(model, x=x)[0], whole[:, -1:])
    assert [output.name for output in model.graph.outputs] == ["logits"]


def test_keep_last_position_names_a_missing_or_flat_output() -> None:
    model = parse("g (float[b,4] x) => (float[b,4] logits) { logits = Tanh(x) }")
    with pytest.raises(ValueError, match="it must have three axes"):
        KeepLastPosition("logits").run(model)
    with pytest.raises(ValueError, match=r"no output 'scores' among \['logits'\]"):
        KeepLastPosition("scores").run(model)


def test_share_weights_stores_equal_and_transposed_tensors_once(tmp_path: Path) -> None:
    table = weights(64, 16)
    lookup = "lookup (int64[b] i, float[64,16] table, float[16,64] head) => (float[b,64] y) <float[b,16] h> "
    lookup += "{ h = Gather(table, i) y = MatMul(h, head) }"
    models = {name: parse(lookup, table=table, head=table.T.copy()) for name in ("one", "two")}
    ids = np.array([3, 5], np.int64)
    before = run(models["one"], i=ids)[0]
    written = ShareWeights(tmp_path / "weights.data").run(models)
    assert written == table.nbytes
    for name, model in models.items():
        ir.save(model, tmp_path / f"{name}.onnx")
        after = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx").run(None, {"i": ids})[0]
        np.testing.assert_allclose(after, before, rtol=1e-6)
    again = ShareWeights(tmp_path / "again.data").run(models)
    assert (again, (tmp_path / "again.data").read_bytes()) == (written, (tmp_path / "weights.data").read_bytes())


def test_share_weights_reads_no_other_file_of_the_graph_for_its_own(tmp_path: Path) -> None:
    """At the same offset as what is stored, in another file, there is another tensor."""
    table, other = weights(64, 16), weights(64, 16, seed=1)
    (tmp_path / "other.bin").write_bytes(other.tobytes())
    one = parse("g (float[b,64] x, float[64,16] table) => (float[b,16] y) { y = MatMul(x, table) }", table=table)
    text = "g (float[b,16] x, float[64,16] other, float[16,64] head) => (float[b,16] y) <float[b,64] h> "
    two = parse(text + "{ h = MatMul(x, head) y = MatMul(h, other) }", head=table.T.copy(), other=other)
    two.graph.initializers["other"].const_value = ir.ExternalTensor(
        "other.bin", 0, other.nbytes, ir.DataType.FLOAT, shape=ir.Shape(other.shape), name="other", base_dir=tmp_path
    )
    x = weights(3, 16, seed=2)
    ShareWeights(tmp_path / "weights.data").run({"one": one, "two": two})
    ir.save(two, tmp_path / "two.onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "two.onnx").run(None, {"x": x})
    np.testing.assert_allclose(found, x @ table.T @ other, rtol=1e-4, atol=1e-4)


def test_share_weights_keeps_types_apart_small_tensors_inside_and_every_name(tmp_path: Path) -> None:
    twin = weights(8, 16)
    arrays = {"same": twin, "bits": twin.view(np.int32), "small": weights(16)}  # equal bytes, as two types
    text = """g (float[8,16] x, float[8,16] same, int32[8,16] bits, float[16] small) =>
    (float[8,16] y, int32[8,16] z) <float[8,16] sum>
    { sum = Add(x, same) y = Add(sum, small) z = Identity(bits) }"""
    model = parse(text, **arrays)
    x = weights(8, 16, seed=1)
    before = run(model, x=x)
    assert ShareWeights(tmp_path / "weights.data", smallest=twin.nbytes).run({"g": model}) == 2 * twin.nbytes
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert {name: value.name for name, value in held.items()} == {name: name for name in arrays}
    assert [name for name, value in held.items() if isinstance(value, ir.ExternalTensor)] == ["same", "bits"]
    ir.save(model, tmp_path / "g.onnx")
    for actual, wanted in zip(
        onnxruntime.InferenceSession(tmp_path / "g.onnx").run(None, {"x": x}), before, strict=True
    ):
        np.testing.assert_array_equal(actual, wanted)


def test_stamp_sites_reads_packed_transposed_and_unknown_weights() -> None:
    q, k, unknown = weights(6, 4, seed=1), weights(3, 4, seed=2), weights(2, 4, seed=3)
    text = """g (float[b,t,4] x, float[4,11] packed, float[6,4] turned) => (float[b,t,11] y, float[b,t,6] z)
    { y = MatMul(x, packed) z = com.microsoft.FusedMatMul <transB=1> (x, turned) }"""
    model = parse(text, packed=np.concatenate([q.T, unknown.T, k.T], axis=1), turned=q)
    assert StampSites({("q",): [q], ("k",): [k], ("absent",): [weights(5, 4, seed=4)]}).run(model).modified
    assert list(stamped_sites(model).values()) == [["q", "k"], ["q"]]
    assert not StampSites({("q",): [q], ("k",): [k]}).run(model).modified


def test_stamp_sites_lets_the_scope_decide_between_equal_weights() -> None:
    weight = weights(6, 4)
    text = "g (float[b,4] x, float[4,6] w) => (float[b,6] y) { y = MatMul(x, w) }"
    model = parse(text, w=weight.T.copy())
    model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layers.1', 'linear']"
    StampSites({("layers.0",): [weight], ("layers.1",): [weight]}).run(model)
    assert list(stamped_sites(model).values()) == [["layers.1"]]
    StripMetadata().run(model)
    assert list(model.graph[0].metadata_props) == ["blora.sites"]
    StampSites({("layers.0",): [weight], ("layers.1",): [weight]}).run(model)
    assert list(stamped_sites(model).values()) == [["layers.0", "layers.1"]]


def test_strip_metadata_is_done_the_second_time() -> None:
    model = parse("g (float[b] x) => (float[b] y) { y = Tanh(x) }")
    model.graph[0].metadata_props["pkg.torch.onnx.stack_trace"] = "File ..."
    model.graph.doc_string = "notes"
    assert StripMetadata().run(model).modified
    assert not StripMetadata().run(model).modified


def test_prompts_padded_differently_leave_rightly_rotated_keys(exported: tuple[nn.Module, Artifact]) -> None:
    """Without the pass, ONNX Runtime's fused attention rotates every row at the first row's positions."""
    tree, artifact = exported
    ids, mask = left_padded([[5, 6, 7, 8], [9, 10]])
    actual = artifact.prefill(ids, mask).past_key_values.layers[0].keys
    with torch.no_grad():
        expected = tree(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).past_key_values
    torch.testing.assert_close(actual[1, :, 2:], expected.layers[0].keys[1, :, 2:], atol=1e-5, rtol=0)
    graph = ir.load(artifact.folder / "prefill.onnx")
    assert not RotateBeforeAttention().run(graph).modified
    assert {"RotaryEmbedding", "GroupQueryAttention"} <= {node.op_type for node in graph.graph}


def test_a_changed_file_has_another_record(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    record = file_record(path)
    path.write_bytes(b"two")
    assert file_record(path)["bytes"] == record["bytes"]
    assert file_record(path)["sha256"] != record["sha256"]


@pytest.mark.parametrize("size", [1e-2, 1.0, 40.0])
def test_small_outputs_are_compared_by_their_size(size: float) -> None:
    """A tenth of outputs of a hundredth is no rounding, though it is below any absolute tolerance of float16."""
    expected = size * torch.tensor([[1.0, -0.5, 0.25]])
    check = _Check("float16", TOLERANCES["float16"])
    check.compare("fine", expected * (1 + 1e-4), expected)
    with pytest.raises(ParityFailed, match="wrong: ONNX Runtime gives"):
        check.compare("wrong", expected + 0.1 * min(size, 1.0), expected)
    nothing = _Check("float32", TOLERANCES["float32"])
    nothing.compare("all but zero", torch.full((1, 2), 1e-9), torch.zeros(1, 2))
    fine, wrong = (expected.numpy() * factor for factor in (1 + 1e-4, 1.1))
    assert _compare("fine", fine, expected.numpy(), TOLERANCES["float16"], "float16") < 2e-4
    with pytest.raises(ParityFailed, match=r"differ by 0\.1 of the largest output"):
        _compare("wrong", wrong, expected.numpy(), TOLERANCES["float16"], "float16")
