"""lower: six kinds of model become verified ONNX files, weights stored once, every site found again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn

from blora_compiler import artifact as artifact_module
from blora_compiler import folders
from blora_compiler import lowering as lower_module
from blora_compiler.artifact import Artifact
from blora_compiler.errors import BadInput, ParityFailed, ProviderMissing
from blora_compiler.layers import BranchedLinear, FactoredLinear, RemovedBranch
from blora_compiler.lowering import checked_example, lower, write_graphs
from tests.models import build

VOCABULARY, WIDTH = 96, 32


# ── Models ───────────────────────────────────────────────────────────────────────────────────────────────────────


def factored(weight: Tensor, bias: Tensor | None, rank: int = 8) -> FactoredLinear:
    """The best rank-`rank` pair for `weight` (out, in)."""
    left, sizes, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    root = sizes[:rank].sqrt()
    return FactoredLinear(root[:, None] * right[:rank], left[:, :rank] * root, bias)


def factor_projections(model: nn.Module, *suffixes: str) -> nn.Module:
    """Replace every projection whose name ends in one of `suffixes` by two GEMMs."""
    for name, module in list(model.named_modules()):
        if name.endswith(suffixes):
            weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, factored(weight, module.bias))
    return model


def tiny_llama(layers: int = 1) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=WIDTH,
        n_layer=1,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tiny_bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return transformers.BertForSequenceClassification(config).eval()


def tiny_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config).eval()


def tiny_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 1).eval()


class CalledTwice(nn.Module):
    """One weight that no submodule owns, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, WIDTH) -> the same shape."""
        return nn.functional.linear(torch.tanh(nn.functional.linear(x, self.w)), self.w)


def traced_with_factors(model: nn.Module) -> nn.Module:
    """`CalledTwice` as a traced graph module whose projections call a factored module under the weight's name."""
    axes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    graph = torch.export.export(model, (torch.randn(2, 6, WIDTH),), dynamic_shapes=(axes,)).module(check_guards=False)
    pair = factored(graph.w, None)
    del graph._parameters["w"]
    graph.add_module("w", pair)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        with graph.graph.inserting_before(node):
            call = graph.graph.call_module("w", (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def token_ids(batch: int = 2, tokens: int = 8) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (batch, tokens))}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def llama_export(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    """A Llama of two layers: factored attention, one removed MLP, the other dense; exported once for many tests."""
    torch.manual_seed(0)
    tree = factor_projections(tiny_llama(layers=2), "q_proj", "k_proj", "v_proj", "o_proj")
    tree.model.layers[1].mlp = RemovedBranch()
    sites = [f"model.layers.{layer}.{site}" for layer in (0, 1) for site in ("self_attn.q_proj", "mlp.gate_proj")]
    folder = tmp_path_factory.mktemp("llama") / "export"
    return tree, lower(tree, folder, inputs=token_ids(), site_names=[*sites, "lm_head"], metadata={"budget": 0.25})


# ── Whole paths ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_llama_is_verified_and_generates(llama_export: tuple[nn.Module, Artifact]) -> None:
    _, exported = llama_export
    assert exported.graphs == ("prefill", "decode")
    assert exported.parity.max_error < 1e-4
    assert (exported.parity.sequences, exported.parity.identical) == (16, 16)
    assert {"prefill 1x1", "decode 3x16 left-padded", "decode 3x33"} <= set(exported.parity.errors)
    assert exported.manifest["metadata"] == {"budget": 0.25}
    configs = {"config.json", "generation_config.json"}
    graphs = {"prefill.onnx", "decode.onnx", "weights.data", "export.json"}
    assert {path.name for path in exported.files} == graphs | configs


def test_prefill_computes_the_last_position_only(llama_export: tuple[nn.Module, Artifact]) -> None:
    _, exported = llama_export
    logits = exported.session("prefill").get_outputs()[0]
    assert (logits.name, logits.shape[1:]) == ("logits", [1, VOCABULARY])


def test_every_tensor_is_stored_once(llama_export: tuple[nn.Module, Artifact]) -> None:
    tree, exported = llama_export
    unique_bytes = sum(parameter.nbytes for parameter in tree.parameters())
    stored = (exported.folder / "weights.data").stat().st_size
    # Alignment of a few dozen small tensors is not 2 % of a real model, but it may be of this one.
    assert stored <= 1.02 * unique_bytes + 64 * len(list(tree.parameters()))


def test_nodes_map_back_to_sites(llama_export: tuple[nn.Module, Artifact]) -> None:
    _, exported = llama_export
    for name in exported.graphs:
        computed = exported.node_sites(name)
        named = [site for sites in computed.values() for site in sites]
        # A and B of q_proj; the head; the removed MLP of layer 1 is no site any more.
        assert named.count("model.layers.0.self_attn.q_proj") == 2
        assert named.count("lm_head") == 1
        assert named.count("model.layers.0.mlp.gate_proj") == 1
        assert "model.layers.1.mlp.gate_proj" not in named
        graph = ir.load(exported.folder / f"{name}.onnx").graph
        assert set(computed) <= {node.name for node in graph}
    assert exported.unmapped_sites == ()


def test_files_hold_no_paths_of_the_machine(llama_export: tuple[nn.Module, Artifact]) -> None:
    _, exported = llama_export
    for path in exported.files:
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(exported.folder).encode() not in content


def test_generate_stops_at_the_end_token_and_fills_with_it(llama_export: tuple[nn.Module, Artifact]) -> None:
    _, exported = llama_export
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    free = exported.generate(ids, mask, max_new_tokens=8)
    end = int(free[0, 4])
    stopped = exported.generate(ids, mask, max_new_tokens=8, eos_token_id=end)
    first_end = (free[0, 3:] == end).nonzero()[0] + 4
    assert torch.equal(stopped[0, :first_end], free[0, :first_end])
    assert bool((stopped[0, first_end:] == end).all())


def test_load_gives_the_same_artifact(llama_export: tuple[nn.Module, Artifact]) -> None:
    _, exported = llama_export
    loaded = Artifact.load(exported.folder, threads=1)
    assert loaded.parity == exported.parity
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded.generate(ids, max_new_tokens=4), exported.generate(ids, max_new_tokens=4))


def test_the_callers_tree_is_untouched(tmp_path: Path) -> None:
    tree = tiny_encoder().train()
    before = {name: (id(value), value.clone()) for name, value in tree.named_parameters()}
    lower(tree, tmp_path / "e", inputs=(torch.randn(2, 6, WIDTH),), dtype="float16")
    assert tree.training
    for name, value in tree.named_parameters():
        assert (id(value), value.dtype, value.requires_grad) == (before[name][0], torch.float32, True)
        assert torch.equal(value, before[name][1])


Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor] | tuple[Tensor, ...]], tuple[str, ...]]
CASES: dict[str, Case] = {
    "bert": (lambda: factor_projections(tiny_bert(), "query", "intermediate.dense"), token_ids, ()),
    "vit": (
        lambda: factor_projections(tiny_vit(), "q_proj", "fc1", "query", "intermediate.dense"),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
        (),
    ),
    "encoder": (
        lambda: factor_projections(tiny_encoder(), "linear1", "linear2"),
        lambda: (torch.randn(2, 6, WIDTH),),
        ("layers.0.linear1", "layers.0.linear2", "layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj"),
    ),
    "functional": (CalledTwice, lambda: (torch.randn(2, 6, WIDTH),), ("w",)),
    "graph module": (lambda: traced_with_factors(CalledTwice()), lambda: (torch.randn(2, 6, WIDTH),), ("w",)),
}


@pytest.mark.parametrize("case", CASES)
def test_models_of_one_graph(case: str, tmp_path: Path) -> None:
    make, inputs, sites = CASES[case]
    exported = lower(make(), tmp_path / "export", inputs=inputs(), site_names=sites)
    assert exported.graphs == ("model",)
    assert exported.unmapped_sites == ()
    assert exported.parity.max_error < 1e-4
    assert {site.split(",")[0] for site in exported.parity.errors} >= {"model 1x1" if case != "vit" else "model 1x3"}


def test_gpt2_generates_and_shares_its_tied_head(tmp_path: Path) -> None:
    tree = factor_projections(tiny_gpt2(), "c_attn", "c_fc")
    exported = lower(tree, tmp_path / "export", inputs=token_ids(), new_tokens=16)
    assert exported.parity.identical == 16
    assert exported.unmapped_sites == ()
    table = tree.transformer.wte.weight
    graph = ir.load(exported.folder / "decode.onnx").graph
    same_size = [value for value in graph.initializers.values() if value.const_value.nbytes == table.nbytes]
    assert [tuple(value.shape) for value in same_size] == [(VOCABULARY, WIDTH)]


def test_a_causal_model_can_be_exported_as_one_graph(tmp_path: Path) -> None:
    exported = lower(tiny_llama(), tmp_path / "export", inputs=token_ids(), generation=False)
    assert [output.name for output in exported.session("model").get_outputs()] == ["logits"]
    assert "model 3x16 left-padded, logits" in exported.parity.errors
    with pytest.raises(BadInput, match="generating needs prefill and decode"):
        exported.generate(torch.tensor([[1]]), max_new_tokens=1)


def test_float16_on_the_cpu_is_verified_with_its_own_tolerance(tmp_path: Path) -> None:
    exported = lower(CalledTwice(), tmp_path / "export", inputs=(torch.randn(2, 6, WIDTH),), dtype="float16")
    assert exported.parity.tolerance == 5e-2
    assert 0 < exported.parity.max_error < 5e-3
    assert exported.session("model").get_inputs()[0].type == "tensor(float16)"


def test_unmapped_sites_are_reported(tmp_path: Path) -> None:
    class Lookup(CalledTwice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.w[0]

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.idle = Lookup(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    exported = lower(Unused(), tmp_path / "e", inputs=(torch.randn(2, 6, WIDTH),), site_names=["inner.w", "idle"])
    assert exported.unmapped_sites == ("idle",)


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


def plain_inputs() -> tuple[Tensor, ...]:
    return (torch.randn(2, 6, WIDTH),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "tpu"}, "target is 'tpu'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": "bfloat16"}, "cannot be verified on target 'cpu'"),
        ({"generation": True}, "CalledTwice has no cached generation"),
        ({"inputs": ()}, "inputs is empty"),
        ({"inputs": (torch.randn(1, 6, WIDTH),)}, "has a batch of 1; the example needs at least 2"),
        ({"inputs": (torch.randn(2, 0, WIDTH),)}, "every axis must have at least one entry"),
        ({"inputs": (3,)}, "input 'x' is int"),
        ({"site_names": ["v"]}, r"1 sites are not in the tree \(v\)"),
    ],
)
def test_bad_arguments_are_named(changes: dict, message: str, tmp_path: Path) -> None:
    arguments = {"inputs": plain_inputs(), **changes}
    with pytest.raises(BadInput, match=message):
        lower(CalledTwice(), tmp_path / "export", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_short_examples_of_language_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"input_ids has shape \(2, 3\)"):
        lower(tiny_llama(), tmp_path / "export", inputs=token_ids(tokens=3))


def test_models_of_other_graphs_than_prefill_and_decode_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exporter:
        def export_for_generation(self, *_: object) -> SimpleNamespace:
            return SimpleNamespace(components={"encoder": None, "decoder": None})

    monkeypatch.setattr(transformers.exporters, "OnnxExporter", Exporter)
    with pytest.raises(BadInput, match="LlamaForCausalLM is exported as encoder, decoder; only models that are one"):
        lower_module._export_hugging_face(tiny_llama(), token_ids(), "cpu", True)


def test_trees_that_still_train_are_refused(tmp_path: Path) -> None:
    tree = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    tree[0] = BranchedLinear(torch.zeros(WIDTH, WIDTH), torch.randn(4, WIDTH), torch.randn(WIDTH, 4), None)
    with pytest.raises(BadInput, match=r"1 sites still carry a trainable branch \(0, ...\); fold them first"):
        lower(tree, tmp_path / "export", inputs=plain_inputs())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tree = CalledTwice()
    with torch.no_grad():
        tree.w[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"1 parameters hold values that are not finite \(w, ...\)"):
        lower(tree, tmp_path / "export", inputs=plain_inputs())


def test_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    class FixedBatch(CalledTwice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(2, 6, WIDTH)

    with pytest.raises(BadInput, match="the export fixed the batch of input 'x' to 2"):
        lower(FixedBatch(), tmp_path / "export", inputs=plain_inputs())
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_its_provider_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderMissing, match="needs CUDAExecutionProvider, this ONNX Runtime has CPUExecution"):
        lower(CalledTwice(), tmp_path / "export", inputs=plain_inputs(), target="cuda")


def test_bfloat16_graphs_are_written_with_their_weights_once(tmp_path: Path) -> None:
    """All of it but running them: no kernel of the CPU takes the type, and numpy has it from elsewhere."""
    model = build("llama")
    example = checked_example(model, {"input_ids": torch.ones(2, 8, dtype=torch.int64)})
    manifest = write_graphs(model, tmp_path, example, "cuda", "bfloat16", generation=True)
    assert manifest["unmapped_sites"] == [] and manifest["fixed_cache_refusal"] is None
    tensors = [
        value.const_value.numpy().astype("float32")
        for value in ir.load(tmp_path / "decode.onnx").graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.dtype == ir.DataType.BFLOAT16
    ]
    head = model.lm_head.weight.detach().bfloat16().float().numpy()
    assert any(np.array_equal(tensor, head) or np.array_equal(tensor, head.T) for tensor in tensors)
    assert (tmp_path / "weights.data").stat().st_size < 1.3 * manifest["parameter_bytes"] + 65536


def test_bfloat16_of_a_plain_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(BadInput, match="CalledTwice is a plain module; bfloat16 is for Hugging Face"):
        lower(CalledTwice(), tmp_path / "export", inputs=plain_inputs(), target="cuda", dtype="bfloat16")


def test_a_silent_fallback_is_an_error(
    llama_export: tuple[nn.Module, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA listed, but the session comes up on the CPU: what happens where the driver or cuDNN does not match."""
    _, exported = llama_export
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: real(path, options, providers=["CPUExecutionProvider"]),
    )
    monkeypatch.setattr(artifact_module, "load_cuda_libraries", lambda: "Failed to load libcublas.so")
    with pytest.raises(
        ProviderMissing, match=r"was to run on CUDAExecutionProvider, but .* fell back to CPU[\s\S]*libcublas"
    ):
        artifact_module.open_session(exported.folder / "decode.onnx", "cuda")


# ── Folders ──────────────────────────────────────────────────────────────────────────────────────────────────────


def export_plain(folder: Path) -> Artifact:
    return lower(CalledTwice(), folder, inputs=plain_inputs())


def test_a_new_export_replaces_an_old_one_only_when_it_passed(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export_plain(folder)
    old = (folder / "weights.data").read_bytes()
    torch.manual_seed(1)
    with pytest.raises(ParityFailed):
        lower(CalledTwice(), folder, inputs=plain_inputs(), tolerance=0.0)
    assert (folder / "weights.data").read_bytes() == old
    export_plain(folder)
    assert (folder / "weights.data").read_bytes() != old
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"exists and is no earlier result \(it has no export.json\)"):
        export_plain(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="exists and is a file"):
        export_plain(tmp_path / "file")


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"cannot write .*nothing was left there"):
        export_plain(tmp_path / "file" / "export")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lower_module.ir, "save", no_space)
    with pytest.raises(BadInput, match=r"the disk filled up while writing .*No space left on device"):
        export_plain(tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rename_brings_the_old_export_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, staging = tmp_path / "export", tmp_path / "staging"
    folder.mkdir()
    (folder / "export.json").write_text("old")
    staging.mkdir()
    rename = os.rename

    def refuse_staging(source: Path, destination: Path) -> None:
        if source == staging:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse_staging)
    with pytest.raises(OSError, match="Permission denied"):
        folders._take_place(staging, folder)
    assert (folder / "export.json").read_text() == "old"


# ── Damaged exports ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def plain_export(tmp_path: Path) -> Path:
    return export_plain(tmp_path / "export").folder


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_parity(folder: Path) -> None:
    path = folder / "export.json"
    manifest = json.loads(path.read_text())
    del manifest["parity"]
    path.write_text(json.dumps(manifest))


def flip_a_byte(folder: Path) -> None:
    path = folder / "weights.data"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "export.json").unlink(), "holds no export: export.json is missing"),
        (lambda folder: (folder / "export.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "export.json").write_text("[]"), "is no manifest of this compiler"),
        (lambda folder: edit_manifest(folder, version=99), "has format version 99, this version reads 1"),
        (drop_parity, "is damaged: parity missing"),
        (lambda folder: (folder / "weights.data").unlink(), "is missing, though export.json lists it"),
        (lambda folder: (folder / "weights.data").write_bytes(b"short"), "has 5 bytes, 4096 when it was verified"),
        (flip_a_byte, "is not the file that was verified"),
    ],
)
def test_damaged_exports_are_refused(damage: Callable[[Path], object], message: str, plain_export: Path) -> None:
    damage(plain_export)
    with pytest.raises(BadInput, match=message):
        Artifact.load(plain_export)


def test_a_graph_that_onnxruntime_cannot_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(BadInput, match=r"ONNX Runtime cannot load .*model\.onnx"):
        artifact_module.open_session(tmp_path / "model.onnx", "cpu")


def test_wrong_calls_of_an_artifact_are_named(llama_export: tuple[nn.Module, Artifact], plain_export: Path) -> None:
    _, exported = llama_export
    with pytest.raises(BadInput, match=r"no graph 'model' in .*; it has prefill, decode"):
        exported.session("model")
    with pytest.raises(BadInput, match="came from a plain module"):
        Artifact.load(plain_export).runner("model")
    ids = torch.tensor([[1, 2]])
    with pytest.raises(BadInput, match=r"input_ids has shape \(0, 2\)"):
        exported.generate(ids[:0], max_new_tokens=1)
    with pytest.raises(BadInput, match=r"attention_mask has shape \(1, 1\), input_ids \(1, 2\)"):
        exported.generate(ids, ids[:, :1], max_new_tokens=1)
    with pytest.raises(BadInput, match="pad shorter prompts on the left"):
        exported.generate(ids, torch.tensor([[1, 0]]), max_new_tokens=1)
    with pytest.raises(BadInput, match="max_new_tokens is 0"):
        exported.generate(ids, max_new_tokens=0)
