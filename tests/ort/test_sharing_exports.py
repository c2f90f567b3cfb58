"""Sites that share their first factor, shipped: two GEMMs a group, stamped for all, predicted, saved and loaded."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from blora_compiler.cost_models.latency import kernels_of

import blora_compiler as blora
from blora_compiler.artifact import Artifact
from blora_compiler.compiling import Compiled
from blora_compiler.graph import main_output
from blora_compiler.layers import FactoredLinear
from blora_compiler.values import Factored, Workload, site_groups
from tests.models import build

RANK = 24  # a factor of more than 1024 elements: smaller ones exporters find to be equal by themselves
LAYER = "model.layers.0"
QKV = tuple(f"{LAYER}.self_attn.{role}_proj" for role in "qkv")
GATE_UP = (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj")


def every_group_shares(interpolative: bool = False) -> Compiled:
    """A tiny Llama whose plan is edited by hand."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 128, (4, 24), generator=generator) for _ in range(2)]
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]
    plan = blora.compile(build("llama"), 0.9, calibration=batches, rank_multiple=4).plan
    forms = {choice.site: Factored(8, (), interpolative) for choice in plan.choices}
    for layer in (LAYER, "model.layers.1"):
        for names in (QKV, GATE_UP):
            named = tuple(name.replace(LAYER, layer) for name in names)
            forms |= dict.fromkeys(named, Factored(RANK, named, interpolative))
    choices = tuple(replace(choice, form=forms[choice.site]) for choice in plan.choices)
    edited = replace(plan, choices=choices)
    return blora.compile(build("llama"), 0.9, calibration=batches, plan=edited, rank_multiple=4)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return every_group_shares()


@pytest.fixture(scope="module")
def artifact(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compiled.export(tmp_path_factory.mktemp("shared") / "onnx")


@pytest.mark.parametrize(
    ("graph", "load"), [("prefill", Workload("prefill", 2, 7)), ("decode", Workload("decode", 2, 1, 6))]
)
def test_a_group_ships_as_the_gemms_that_its_price_counts(compiled, artifact, graph, load):
    model = ir.load(artifact.folder / f"{graph}.onnx")
    found = []
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1].const_value is not None:
            found.append(tuple(node.inputs[1].const_value.shape))
    kernels = kernels_of(site_groups(compiled.program.sites), (), compiled.plan.forms, load, generates=True)
    predicted = [kernel.shape[1:] for kernel, _ in kernels if (kernel.op, kernel.kind) == ("gemm", "sites")]
    assert sorted(found) == sorted(predicted)
    assert (64, RANK) in found and (RANK, 128) in found and (RANK, 320) in found
    assert (artifact.folder / "weights.data").stat().st_size < 1.1 * artifact.manifest["parameter_bytes"]


def test_the_first_gemm_is_stamped_for_all_its_sites(artifact):
    assert artifact.unmapped_sites == ()
    stamps = [tuple(sites) for sites in artifact.node_sites("decode").values()]
    for sharers in (QKV, GATE_UP):
        assert stamps.count(sharers) == 2, f"one first and one second GEMM of {sharers}"
        assert not any(len(sites) == 1 and sites[0] in sharers for sites in stamps)


def test_what_is_saved_holds_the_factor_once_and_loads_back_as_one(compiled, tmp_path):
    compiled.save(tmp_path / "saved")
    loaded = blora.load(tmp_path / "saved")
    for sharers in (QKV, GATE_UP):
        modules = [loaded.module.get_submodule(name) for name in sharers]
        assert all(isinstance(module, FactoredLinear) for module in modules)
        assert len({id(module.A) for module in modules}) == 1
    inputs = compiled.program.inputs
    with torch.no_grad():
        ours, theirs = (main_output(model(**inputs)) for model in (compiled.module, loaded.module))
    assert torch.equal(ours, theirs)
    again = blora.lower(loaded.module, tmp_path / "again", inputs=loaded.inputs, site_names=loaded.sites)
    assert again.manifest["parameter_bytes"] == sum(p.nbytes for p in compiled.module.parameters())


def test_quantised_weights_are_found_in_it_too(compiled, tmp_path):
    artifact = compiled.export(tmp_path / "int8", quantize="int8")
    names = artifact.manifest["quantization"]["parameters"]
    assert f"{QKV[0]}.A" in names and all(f"{name}.B" in names for name in (*QKV, *GATE_UP))


def test_report_and_merged_weights(compiled, tmp_path):
    assert "rank 24 shared" in compiled.plan.table()
    compiled.save(tmp_path / "merged", merged=True)
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        ours, theirs = (main_output(model(**compiled.program.inputs)) for model in (compiled.module, merged))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


class Heads(torch.nn.Module):
    """Three projections of one input, with biases: a plain module, exported by another exporter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(64, out) for out in (64, 48, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.tanh(self.q(x)), self.k(x) * self.v(x)], -1)


def test_a_plain_module_multiplies_its_input_once(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 6, 64)
    dense = blora.compile(Heads().eval(), 0.9, inputs=(x,), calibration=[x], rank_multiple=4)
    names = ("q", "k", "v")
    choices = tuple(replace(choice, form=Factored(RANK, names)) for choice in dense.plan.choices)
    plan = replace(dense.plan, choices=choices)
    c = blora.compile(Heads().eval(), 0.9, inputs=(x,), calibration=[x], plan=plan, rank_multiple=4)
    artifact = c.export(tmp_path / "onnx")
    shapes = [
        tuple(node.inputs[1].const_value.shape)
        for node in ir.load(artifact.folder / "model.onnx").graph
        if node.op_type in ("MatMul", "Gemm") and node.inputs[1].const_value is not None
    ]
    assert sorted(shapes) == [(RANK, 48), (RANK, 48), (RANK, 64), (64, RANK)]
    assert all("forward" not in vars(module) for module in c.module.modules()), "the tree is as it was"
