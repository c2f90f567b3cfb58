"""Narrower MLPs, shipped: exported, quantised, compiled and timed from the command line, each with its own shapes."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
from blora_compiler.cost_models.latency import kernels_of
from typer.testing import CliRunner

import blora_compiler as blora
from blora_compiler.benching import kept_of
from blora_compiler.cli import app
from blora_compiler.errors import BadInput
from blora_compiler.plan import Plan
from blora_compiler.values import Workload, site_groups
from tests.models import build


@pytest.fixture(scope="module")
def compiled():
    return blora.compile(build("llama"), 0.5, narrow=0.6)


def test_the_graph_has_the_narrower_products_that_the_price_counts(compiled, tmp_path):
    artifact = compiled.export(tmp_path / "onnx")
    assert artifact.unmapped_sites == ()
    model = ir.load(artifact.folder / "decode.onnx")
    found = sorted(
        tuple(node.inputs[1].const_value.shape)
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1].const_value is not None
    )
    load = Workload("decode", 2, 1, 6)
    kernels = kernels_of(site_groups(compiled.program.sites), (), compiled.plan.forms, load, generates=True)
    assert found == sorted(k.shape[1:] for k, _ in kernels if (k.op, k.kind) == ("gemm", "sites"))
    assert {shape[0] for shape in compiled.plan.shapes.values()} & {rows for shape in found for rows in shape}


def test_an_export_says_what_was_fused_and_rewritten(compiled, tmp_path):
    from blora_compiler.report import rewrite_lines

    artifact = compiled.export(tmp_path / "onnx")
    lines = rewrite_lines(artifact.manifest)
    assert any(line.startswith("decode: fused into") and "GroupQueryAttention" in line for line in lines)
    assert any(line.startswith("prefill: ") and "LastPositionEarly" in line for line in lines)
    refusals = [
        reason
        for results in artifact.manifest["passes"].values()
        for one in results.values()
        for reason in one["refusals"]
    ]
    assert len(refusals) > 0, "else the next line says nothing"
    assert all(any(reason in line for line in lines) for reason in refusals)
    assert "fused into" in str(compiled.report(artifact))
    assert rewrite_lines({"parameter_bytes": 1}) == []  # of an export from before passes were listed


def test_weights_in_eight_bits(compiled, tmp_path):
    artifact = compiled.export(tmp_path / "onnx", quantize="int8")
    assert artifact.manifest["quantization"]["quantize"] == "int8"


def test_compiles_and_times_from_the_command_line(tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    tiny = build("llama")
    tiny.save_pretrained(model)
    result = CliRunner().invoke(
        app, ["compile", str(model), "--budget", "0.5", "--narrow", "0.6", "--out", str(run), "--json"]
    )
    assert result.exit_code == 0, result.output
    plan = Plan.from_json((run / "plan.json").read_text())
    assert plan.shapes
    assert "of 160 outputs" in (run / "report.md").read_text()
    bench = CliRunner().invoke(
        app, ["bench", str(run), "--tokens", "8", "--rounds", "2", "--new-tokens", "2", "--json"]
    )
    assert bench.exit_code == 0, bench.output
    (side,) = [side for side in json.loads(bench.output)["sides"] if side["name"] != "dense"]
    assert side["kept"] == pytest.approx(plan.fraction, abs=1e-3)
    assert side["kept"] == kept_of(plan.narrowed(blora.trace(tiny).sites), plan.forms)
    wrong = CliRunner().invoke(app, ["plan", str(model), "--budget", "0.5", "--narrow", "some"])
    assert isinstance(wrong.exception, BadInput)
    assert "--narrow 'some' is no share" in str(wrong.exception)
