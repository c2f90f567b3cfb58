"""Interpolative forms, shipped: the products that their price counts, stamped, and refused where not built."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from blora_compiler.cost_models.latency import kernels_of

import blora_compiler as blora
from blora_compiler.artifact import Artifact
from blora_compiler.compiling import Compiled
from blora_compiler.errors import BadInput
from blora_compiler.values import Workload, site_groups
from tests.ort.test_sharing_exports import every_group_shares


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return every_group_shares(interpolative=True)


@pytest.fixture(scope="module")
def artifact(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compiled.export(tmp_path_factory.mktemp("interpolative") / "onnx")


@pytest.mark.parametrize(
    ("graph", "load"), [("prefill", Workload("prefill", 2, 7)), ("decode", Workload("decode", 2, 1, 6))]
)
def test_the_graph_has_the_products_that_the_price_counts(compiled, artifact, graph, load):
    model = ir.load(artifact.folder / f"{graph}.onnx")
    found = [
        (node.outputs[0].shape[1] == 1, *node.inputs[1].const_value.shape)
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1].const_value is not None
    ]
    kernels = kernels_of(site_groups(compiled.program.sites), (), compiled.plan.forms, load, generates=True)
    predicted = [
        (kernel.shape[0] == load.batch, *kernel.shape[1:])  # at one position, or at all
        for kernel, _ in kernels
        if (kernel.op, kernel.kind) == ("gemm", "sites")
    ]
    assert sorted(found) == sorted(predicted)


def test_every_site_is_stamped_and_the_file_no_larger_than_its_parameters(artifact):
    assert artifact.unmapped_sites == ()
    assert (artifact.folder / "weights.data").stat().st_size < 1.1 * artifact.manifest["parameter_bytes"]


def test_the_last_block_of_a_prompt_runs_at_one_position_as_with_plain_pairs(artifact, tmp_path):
    plain = every_group_shares().export(tmp_path / "plain").manifest["passes"]["prefill"]
    given = artifact.manifest["passes"]["prefill"]
    assert given["LastPositionEarly"]["applied"] >= plain["LastPositionEarly"]["applied"] > 0


@pytest.mark.parametrize(
    "options", [{"quantize": "int8"}, {"quantize": "int4"}, {"target": "cuda", "dtype": "bfloat16"}]
)
def test_coarse_rounding_is_refused(compiled, tmp_path, options):
    with pytest.raises(BadInput, match="rounds too coarsely"):
        compiled.export(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_onnx_file_takes_no_such_plan(compiled, tmp_path):
    linear = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
    torch.onnx.export(linear, (torch.randn(2, 64),), tmp_path / "net.onnx", dynamo=True, verbose=False)
    with pytest.raises(BadInput, match="interpolative forms"):
        blora.compile(tmp_path / "net.onnx", 0.5, plan=compiled.plan)
    with pytest.raises(BadInput, match="interpolative: its pairs are plain ones"):
        blora.compile(tmp_path / "net.onnx", 0.5, interpolative=True)
