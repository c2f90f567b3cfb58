"""attribution: the profile of a shipped graph, every GEMM at its site, every sum equal to the whole. No test reads a
clock: what is asserted is structure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from blora_compiler import attribution as attribution_module
from blora_compiler.artifact import Artifact
from blora_compiler.attribution import (
    KINDS,
    Attribution,
    NodeTime,
    ObservedNode,
    beside,
    block_columns,
    head_nodes,
    kind_of,
    node_overhead,
    profile_export,
    runs_of,
)
from blora_compiler.errors import BadInput
from blora_compiler.layers import FactoredLinear
from blora_compiler.lowering import lower
from blora_compiler.values import Dense, Factored, Site
from tests.models import build, tiny_llama

RANKS = {"q_proj": 8, "k_proj": 4, "v_proj": 12, "fc1": 8, "c_fc": 8, "query": 8}


class Perceptron(nn.Module):
    """Two projections, and nothing of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(48, 96)
        self.down = nn.Linear(96, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, tokens, 48) -> the same shape."""
        return self.down(torch.relu(self.up(x)))


def with_factors(model: nn.Module) -> nn.Module:
    """Projections named in `RANKS` become two GEMMs, all others stay dense."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in RANKS:
            weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            left, sizes, right = torch.linalg.svd(weight.detach(), full_matrices=False)
            rank = RANKS[child]
            pair = FactoredLinear(right[:rank], left[:, :rank] * sizes[:rank], module.bias)
            setattr(model.get_submodule(parent), child, pair)
    return model


def exported(name: str, folder: Path, **options: Any) -> Artifact:
    """One of the six tiny models, or the perceptron, as a verified export run by one thread."""
    torch.manual_seed(0)
    if name == "perceptron":
        lower(Perceptron().eval(), folder, inputs=(torch.randn(2, 8, 48),))
    elif name == "vit":
        lower(with_factors(build(name)), folder, inputs={"pixel_values": torch.randn(2, 3, 32, 32)})
    else:
        model = tiny_llama(layers=1).eval() if name == "llama" else build(name)
        lower(with_factors(model), folder, inputs={"input_ids": torch.randint(0, 128, (2, 8))}, **options)
    return Artifact.load(folder, threads=1)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("exports")
    generating = {"prompts": [[1, 2, 3]], "new_tokens": 2}
    found = {name: exported(name, folder / name) for name in ("bert", "vit", "perceptron")}
    return found | {name: exported(name, folder / name, **generating) for name in ("llama", "gpt2")}


CASES = [("llama", "prefill"), ("llama", "decode"), ("gpt2", "prefill"), ("gpt2", "decode"), ("bert", "model"),
         ("vit", "model"), ("perceptron", "model")]  # fmt: skip


# ── Whole models ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_every_gemm_is_at_its_site_and_everything_adds_up(
    exports: dict[str, Artifact], name: str, phase: Any
) -> None:
    artifact = exports[name]
    measured = profile_export(artifact, phase=phase, tokens=8, repeats=3)

    stamped = [site for sites in artifact.node_sites(phase).values() for site in sites]
    assert set(measured.sites) == set(stamped)
    assert measured.missing_sites == ()
    claimed = [site for node in measured.nodes for site in node.sites]
    assert sorted(claimed) == sorted(stamped), "each stamped node is found again exactly once"

    assert "unmapped" not in measured.kinds
    assert measured.unmapped_ms == 0.0
    assert set(measured.kinds) <= set(KINDS)
    assert not {"other", "copies"} & set(measured.kinds)
    assert sum(measured.kinds.values()) == pytest.approx(measured.total_ms)
    in_gemms = sum(node.ms for node in measured.nodes if node.kind in ("sites", "head"))
    assert sum(measured.sites.values()) == pytest.approx(in_gemms)
    for node in measured.nodes:
        assert 0.0 <= node.ms <= node.recorded_ms
        assert node.calls == 1
        assert sum(node.shares.values()) == pytest.approx(1.0 if node.sites else 0.0)
        assert (node.shared_by is None) == (not node.sites)
    ((provider, (count, ms)),) = measured.by_provider.items()
    assert (provider, count) == ("CPUExecutionProvider", len(measured.nodes))
    assert ms == pytest.approx(measured.total_ms - measured.kinds["session"])
    assert (measured.clock, measured.repeats) == ("kernels", 3)
    assert measured.overhead_ms == measured.recorded_ms - measured.total_ms


@pytest.mark.parametrize(
    ("name", "phase", "kinds"),
    [
        ("llama", "prefill", {"sites", "head", "attention", "norm", "elementwise", "lookup", "shape", "session"}),
        ("llama", "decode", {"sites", "head", "attention", "norm", "elementwise", "lookup", "shape", "session"}),
        ("bert", "model", {"sites", "attention", "norm", "elementwise", "lookup", "shape", "session"}),
        ("vit", "model", set(KINDS) - {"experts", "unmapped", "copies", "other"}),
        ("perceptron", "model", {"sites", "elementwise", "session"}),
    ],
)
def test_kinds_of_work(exports: dict[str, Artifact], name: str, phase: Any, kinds: set[str]) -> None:
    measured = profile_export(exports[name], phase=phase, tokens=8, repeats=1)
    assert set(measured.kinds) == kinds
    heads = [node.sites for node in measured.nodes if node.kind == "head"]
    assert heads == {"llama": [("lm_head",)], "vit": [("classifier",)]}.get(name, [])


def test_unfused_attention_counts_products_of_activations(exports: dict[str, Artifact]) -> None:
    measured = profile_export(exports["bert"], phase="model", tokens=8, repeats=1)
    attention = [node.op for node in measured.nodes if node.kind == "attention"]
    assert sorted(attention) == sorted(["FusedMatMul", "Softmax", "MatMul"] * 2)


def test_a_renamed_node_keeps_its_site(exports: dict[str, Artifact]) -> None:
    artifact = exports["bert"]
    measured = profile_export(artifact, phase="model", tokens=8, repeats=1)
    (pooler,) = [node for node in measured.nodes if "pooler.dense" in node.sites]
    assert pooler.op == "FusedGemm"
    assert pooler.name not in artifact.node_sites("model"), "ONNX Runtime no longer renames it: drop this test"


def test_products_of_sites_are_the_gemms_that_ran(exports: dict[str, Artifact]) -> None:
    """A prompt of 2 x 8 through 48 -> 96 -> 48; and in the Llama, sites alone have products, of at most its width."""
    found = profile_export(exports["perceptron"], phase="model", batch=2, tokens=8, repeats=1)
    assert [node.product for node in found.nodes if node.product] == [(16, 48, 96), (16, 96, 48)]
    found = profile_export(exports["llama"], phase="decode", batch=2, tokens=8, repeats=1)
    assert {bool(node.product) for node in found.nodes} == {True, False}
    for node in found.nodes:
        assert bool(node.product) == bool(node.sites)
        assert not node.product or node.product[0] == 2


def test_what_is_no_site_is_the_head_or_unmapped(exports: dict[str, Artifact]) -> None:
    full = exports["llama"]
    names = {f"model.layers.0.{site}" for site in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}
    stamps = {
        graph: {node: kept for node, sites in nodes.items() if (kept := [site for site in sites if site in names])}
        for graph, nodes in full.manifest["node_sites"].items()
    }
    manifest = {**full.manifest, "node_sites": stamps, "unmapped_sites": ["model.layers.0.mlp.gate_proj"]}
    artifact = Artifact(full.folder, manifest, threads=1)
    measured = profile_export(artifact, phase="prefill", tokens=8, repeats=1)
    (head,) = [node for node in measured.nodes if node.kind == "head"]
    assert (head.sites, head.shared_by) == ((), None)
    assert head_nodes(artifact, "prefill") == {head.name}
    assert set(measured.sites) == names
    assert measured.missing_sites == ("model.layers.0.mlp.gate_proj",)
    unmapped = [node for node in measured.nodes if node.kind == "unmapped"]
    assert len(unmapped) == 3, "the second GEMMs of k and v, and gate and up in one"
    assert measured.unmapped_ms == measured.kinds["unmapped"] == pytest.approx(sum(node.ms for node in unmapped))


def test_decode_is_recorded_and_prefill_is_not(exports: dict[str, Artifact]) -> None:
    measured = profile_export(exports["llama"], phase="decode", tokens=8, repeats=2)
    assert measured.setting == "decode 1x1, context 8"
    source = {node.name for node in ir.load(exports["llama"].folder / "decode.onnx").graph}
    assert any(node.name in source for node in measured.nodes if node.op == "GroupQueryAttention")


def test_the_profile_leaves_no_file_and_the_artifact_as_it_was(
    exports: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(attribution_module.tempfile, "tempdir", None)
    artifact = exports["perceptron"]
    before = artifact.session("model")
    profile_export(artifact, phase="model", tokens=8, repeats=1)
    assert artifact.session("model") is before
    assert list(tmp_path.iterdir()) == []
    assert {path.name for path in artifact.folder.iterdir()} == {path.name for path in artifact.files}


# ── Packed GEMMs ─────────────────────────────────────────────────────────────────────────────────────────────────


def packed(measured: Attribution, count: int) -> NodeTime:
    """The first node that computes `count` sites."""
    return next(node for node in measured.nodes if len(node.sites) == count)


def test_packed_gemms_are_shared_by_ranks_where_factored_and_evenly_where_not(exports: dict[str, Artifact]) -> None:
    measured = profile_export(exports["llama"], phase="prefill", tokens=8, repeats=1)
    first = packed(measured, 3)
    assert first.shared_by == "columns"
    assert [site.split(".")[-1] for site in first.sites] == ["q_proj", "k_proj", "v_proj"]
    assert list(first.shares.values()) == pytest.approx([8 / 24, 4 / 24, 12 / 24])
    gate_up = packed(measured, 2)
    assert (gate_up.shared_by, list(gate_up.shares.values())) == ("evenly", [0.5, 0.5])
    assert "nodes compute several sites and are shared evenly" in measured.table()


def test_two_dense_sites_beside_a_factored_one_leave_their_columns_unknown(exports: dict[str, Artifact]) -> None:
    measured = profile_export(exports["bert"], phase="model", tokens=8, repeats=1)
    assert packed(measured, 3).shared_by == "evenly"


@pytest.mark.parametrize(
    ("known", "sites", "total", "widths"),
    [
        ({"q": 8, "k": 64}, ["q", "k"], 72, {"q": 8, "k": 64}),
        ({"q": 8}, ["q", "k"], 72, {"q": 8, "k": 64}),  # one dense site has what the others leave
        ({"q": 8}, ["q", "k", "v"], 72, {}),
        ({"q": 8, "k": 64}, ["q", "k"], 73, {}),  # columns of a projection that is no site lie between
        ({"q": 72}, ["q", "k"], 72, {}),
        ({}, ["q"], 72, {}),
    ],
)
def test_columns_read_off_the_graph_must_fill_the_gemm(
    known: dict[str, int], sites: list[str], total: int, widths: dict[str, int]
) -> None:
    assert attribution_module._filled(known, sites, total) == widths


def test_columns_that_the_caller_knows_decide(exports: dict[str, Artifact]) -> None:
    names = exports["bert"].node_sites("model")
    trio = next(sites for sites in names.values() if len(sites) == 3)
    sites = [Site(name, f"{name}.weight", 64, 64, ("batch*tokens",), "group") for name in trio]
    columns = block_columns(sites, {trio[0]: Factored(8), trio[1]: Dense()})
    assert columns == {trio[0]: 8, trio[1]: 64, trio[2]: 64}
    measured = profile_export(exports["bert"], phase="model", tokens=8, repeats=1, columns=columns)
    first = packed(measured, 3)
    assert (first.shared_by, dict(first.shares)) == (
        "columns",
        pytest.approx(dict(zip(trio, (8 / 136, 64 / 136, 64 / 136), strict=True))),
    )


# ── Names and kinds, by hand ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("runtime_name", "found"),
    [
        ("node_linear", ["node_linear"]),
        ("node_linear_1", ["node_linear_1"]),
        ("node_linear_11", []),
        ("fused node_linear_1", ["node_linear_1"]),
        ("node_linear/MatMulScaleFusion/", ["node_linear"]),
        ("fused node_linear/MatMulAddFusion/", ["node_linear"]),
        ("/block/MatMul/MatMulAddFusion/", ["/block/MatMul"]),
        ("my_node_linear", []),
        ("node_linear.1", []),
    ],
)
def test_names_are_found_only_as_whole_parts(runtime_name: str, found: list[str]) -> None:
    finder = attribution_module._NameFinder(["node_linear", "node_linear_1", "/block/MatMul"])
    assert finder.names_in(runtime_name) == found


def test_without_stamps_nothing_is_found() -> None:
    assert attribution_module._NameFinder([]).names_in("node_linear") == []


def observed(
    op: str, inputs: Sequence[str], outputs: Sequence[str], parameters: int = 0, us: float = 5.0
) -> ObservedNode:
    arguments = {
        "op_name": op,
        "input_type_shape": [{dtype: [2, 4]} for dtype in inputs],
        "output_type_shape": [{dtype: [2, 4]} for dtype in outputs],
        "parameter_size": str(parameters),
    }
    return ObservedNode(op.lower(), arguments, 1, us)


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        (observed("MatMul", ["float", "float"], ["float"]), "attention"),
        (observed("MatMul", ["float"], ["float"]), "unmapped"),  # prepacked on the CPU
        (observed("MatMul", ["float16", "float16"], ["float16"], parameters=64), "unmapped"),  # as on CUDA
        (observed("GroupQueryAttention", ["float", "int32"], ["float", "float", "float"]), "attention"),
        (observed("SkipSimplifiedLayerNormalization", ["float"] * 3, ["float"], parameters=64), "norm"),
        (observed("Gather", ["float", "int64"], ["float"], parameters=512), "lookup"),
        (observed("Gather", ["float", "int64"], ["float"]), "elementwise"),  # a row of an activation
        (observed("Gather", ["int64", "int64"], ["int64"], parameters=8), "shape"),
        (observed("EmbedLayerNormalization", ["int32", "float"], ["float", "int32"], parameters=512), "lookup"),
        (observed("LessOrEqual", ["int64", "int64"], ["bool"]), "shape"),
        (observed("Reshape", ["float", "int64"], ["float"], parameters=16), "shape"),
        (observed("Cast", ["bool"], ["float"]), "elementwise"),
        (observed("Conv", ["float"], ["float"], parameters=64), "convolution"),
        (observed("QMoE", ["float", "float"], ["float"], parameters=64), "experts"),
        (observed("MemcpyToHost", ["float"], ["float"]), "copies"),
        (observed("Loop", ["int64", "bool"], ["float"]), "other"),
        (replace(observed("If", ["bool"], ["float"]), name="attention_in_parts_0"), "attention"),
    ],
)  # fmt: skip
def test_kind_of_one_node(node: ObservedNode, kind: str) -> None:
    assert kind_of(node) == kind


def test_the_head_is_found_behind_soft_capping_and_only_at_logits(
    exports: dict[str, Artifact], tmp_path: Path
) -> None:
    def saved(output: str) -> Artifact:
        x = ir.Value(name="x", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
        hidden = ir.node("MatMul", [x, x], name="hidden")
        norm = ir.node("Relu", [hidden.outputs[0]], name="relu")
        head = ir.node("MatMul", [norm.outputs[0], x], name="head")
        capped = ir.node("Tanh", [head.outputs[0]], name="tanh")
        capped.outputs[0].name = output
        graph = ir.Graph([x], [capped.outputs[0]], nodes=[hidden, norm, head, capped], opset_imports={"": 20})
        ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
        return Artifact(tmp_path, exports["perceptron"].manifest)

    assert head_nodes(saved("logits"), "model") == {"head"}
    assert head_nodes(saved("last_hidden_state"), "model") == frozenset()


# ── The trace and the overhead, by hand ──────────────────────────────────────────────────────────────────────────


def event(name: str, start: int, duration: int, op: str = "Add") -> dict[str, Any]:
    category = "Session" if name == "model_run" else "Node"
    return {"cat": category, "name": name, "ts": start, "dur": duration, "args": {"op_name": op}}


def test_nodes_belong_to_the_run_they_started_in_and_bodies_to_their_loop() -> None:
    events = [
        event("warm_kernel_time", 5, 2),  # before any run, as constant folding would be
        event("a_kernel_time", 11, 4),
        event("b_kernel_time", 15, 3),
        event("b_fence_after", 18, 1),
        event("model_run", 10, 10),
        event("model_run", 30, 40),
        event("body_kernel_time", 33, 5),
        event("body_kernel_time", 40, 5),
        event("loop_kernel_time", 31, 20, op="Loop"),
        event("c_kernel_time", 51, 2),
    ]
    first, second = runs_of(events, expected=2)
    assert [node["name"] for node in first.nodes] == ["a_kernel_time", "b_kernel_time"]
    assert [node["name"] for node in second.nodes] == ["loop_kernel_time", "c_kernel_time"]
    assert (first.microseconds, second.microseconds) == (10, 40)


def test_a_profile_that_lost_runs_is_refused() -> None:
    with pytest.raises(BadInput, match=r"holds 1 of 3 runs in 1 events; ONNX Runtime keeps 1000000: ask for fewer"):
        runs_of([event("model_run", 10, 10)], expected=3)


@pytest.mark.parametrize(
    ("unrecorded_us", "overhead_us"),
    [
        (24.0, 2.0),  # 30 recorded in three nodes: 2 each were recording
        (30.0, 0.0),
        (50.0, 0.0),  # the rest is the session's, not the nodes'
        (3.0, 5.0),  # never more than the shortest node
    ],
)
def test_the_overhead_makes_the_nodes_add_up(unrecorded_us: float, overhead_us: float) -> None:
    nodes = [observed("Add", ["float"], ["float"], us=us) for us in (5.0, 10.0, 15.0)]
    assert node_overhead(nodes, unrecorded_us) == pytest.approx(overhead_us)


def test_a_graph_without_nodes_has_no_overhead() -> None:
    assert node_overhead([], 10.0) == 0.0


# ── Reporting ────────────────────────────────────────────────────────────────────────────────────────────────────


def example() -> Attribution:
    """Ten milliseconds: two sites in one GEMM, a norm on the CPU beside a CUDA graph, and the rest."""
    return Attribution(
        setting="prefill 1x8", clock="kernels", repeats=5, total_ms=10.0, recorded_ms=12.0, node_overhead_us=1.5,
        nodes=(
            NodeTime("qk", "MatMul", "sites", "CUDA", 1, 6.0, 6.0, {"q": 0.75, "k": 0.25}, "columns"),
            NodeTime("n", "LayerNormalization", "norm", "CPU", 1, 3.0, 3.0),
        ),
        missing_sites=("gone",),
    )  # fmt: skip


def test_json_reads_back_equal_and_holds_the_sums(exports: dict[str, Artifact]) -> None:
    measured = profile_export(exports["llama"], phase="prefill", tokens=8, repeats=1)
    for one in (example(), measured):
        data = json.loads(json.dumps(one.to_json()))
        assert Attribution.from_json(data) == one
        assert (data["sites"], data["kinds"]) == (one.sites, one.kinds)
    assert example().to_json()["by_provider"] == {"CUDA": {"nodes": 1, "ms": 6.0}, "CPU": {"nodes": 1, "ms": 3.0}}


def test_the_table_says_what_was_measured_and_what_was_assumed() -> None:
    text = example().table()
    assert text.startswith(
        "prefill 1x8: 10.000 ms, median of 5 runs; recording added 2.000 ms, of which 1.5 us a node"
    )
    for row in (
        "| sites | 6.000 | 60.0 % | 1 |",
        "| norm | 3.000 | 30.0 % | 1 |",
        "| session | 1.000 | 10.0 % | - |",
        "| q | 4.500 | 45.0 % |",
        "| k | 1.500 | 15.0 % |",
    ):
        assert row in text
    assert text.index("| q |") < text.index("| k |")
    assert "stamped with: gone" in text
    assert "evenly" not in text
    assert "launches" not in text
    assert "GPU's work is in `session`" in replace(example(), clock="launches").table()
    assert "| site |" not in replace(example(), nodes=()).table()


def test_beside_shows_what_only_one_side_has() -> None:
    rows = beside(example(), {"q": 4.0, "gone": 2.0}, {"sites": 6.5, "attention": 0.25, "norm": 3.0})
    assert [(row.scope, row.name, row.predicted_ms, row.measured_ms, row.error_ms) for row in rows] == [
        ("kind", "session", None, pytest.approx(1.0), pytest.approx(-1.0)),
        ("kind", "sites", 6.5, 6.0, 0.5),
        ("kind", "attention", 0.25, None, 0.25),
        ("kind", "norm", 3.0, 3.0, 0.0),
        ("site", "gone", 2.0, None, 2.0),
        ("site", "k", None, 1.5, -1.5),
        ("site", "q", 4.0, 4.5, -0.5),
    ]
    assert rows[1].to_json() == {
        "scope": "kind", "name": "sites", "predicted_ms": 6.5, "measured_ms": 6.0, "error_ms": 0.5,
    }  # fmt: skip


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_phase_that_the_export_lacks_is_refused(exports: dict[str, Artifact]) -> None:
    with pytest.raises(BadInput, match=r"phase is 'decode'; the export in .*bert has model"):
        profile_export(exports["bert"], phase="decode")
    with pytest.raises(BadInput, match=r"no graph 'decode' in .*; it has model"):
        exports["bert"].recording("decode", Path("unused"))


@pytest.mark.parametrize("name", ["batch", "tokens", "repeats"])
def test_numbers_below_one_are_refused(exports: dict[str, Artifact], name: str) -> None:
    with pytest.raises(BadInput, match=rf"{name} is 0; profiling an export needs at least 1"):
        profile_export(exports["bert"], phase="model", **{name: 0})


def test_a_failing_run_still_ends_its_profile(exports: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    recording = Artifact.recording

    def seen(artifact: Artifact, name: str, prefix: Path) -> Artifact:
        folders.append(prefix.parent)
        return recording(artifact, name, prefix)

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(Artifact, "recording", seen)
    monkeypatch.setattr(attribution_module, "interleaved", failing)
    with pytest.raises(RuntimeError, match="interrupted"):
        profile_export(exports["perceptron"], phase="model", tokens=8, repeats=1)
    (folder,) = folders
    assert not folder.exists()
