"""bench: structure, sums and refusals at toy size. What is asserted of times is that they add up."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

import blora_compiler as blora
from blora_compiler import sweeping
from blora_compiler.artifact import Artifact
from blora_compiler.bench_result import DENSE, BenchResult, ModuleTime, Side, require_matplotlib
from blora_compiler.benching import (
    Load,
    _loads,
    _notes,
    _share_of_run,
    alone_ms,
    kept_of,
    last_level_cache_bytes,
    planned_forms,
    rotating,
)
from blora_compiler.cli import app
from blora_compiler.errors import BadInput
from blora_compiler.measuring import export_for_timing, in_forms
from blora_compiler.outline import outline
from blora_compiler.predicting import this_or_why_not
from blora_compiler.source import load_source, random_weights
from blora_compiler.sweeping import Place
from blora_compiler.timing import Timing, call_of
from blora_compiler.tracing import generates, trace
from blora_compiler.values import Factored
from tests.models import build, example_inputs, tiny_bert, tiny_llama, tiny_vit

SETTINGS = (
    Load("prefill", 1, 8), Load("decode", 2, 6), Load("decode", 2, 6, cache="fixed"), Load("end to end", 1, 6, 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    tiny_llama(layers=1).config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def result(config_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLORA_CACHE", str(tmp_path_factory.mktemp("empty")))
        return blora.bench(config_folder, (0.5,), rounds=3, settings=SETTINGS, copies=2)


def test_every_side_is_timed_at_every_setting(result):
    assert [side.name for side in result.sides] == [
        DENSE,
        "0.5 uniform",
        "0.5 shared",
        "0.5 interpolative",
        "0.5 narrow",
        "0.5 prior",
    ]
    assert result.settings == tuple(load.setting for load in SETTINGS)
    assert len(result.timings) == len(SETTINGS) * len(result.sides)
    assert all(timing.low_ms <= timing.median_ms <= timing.high_ms for timing in result.timings)


def test_speedups_and_throughput_are_ratios_of_the_medians(result):
    for setting in result.settings:
        assert result.speedup(setting, DENSE) == 1.0
        here = result.timing(setting, "0.5 uniform").median_ms
        assert result.speedup(setting, "0.5 uniform") * here == pytest.approx(result.timing(setting, DENSE).median_ms)
    step = "decode 2x1, context 6"
    assert result.throughput(step, DENSE) == pytest.approx(2e3 / result.timing(step, DENSE).median_ms)


def test_modules_are_profiled_where_one_graph_runs_and_their_kinds_add_up(result):
    assert {time.setting for time in result.modules} == {load.setting for load in SETTINGS[:2]}
    assert all(result.module_speedup(load.setting, "0.5 uniform") is None for load in SETTINGS[2:])
    for time in result.modules:
        assert sum(time.kinds.values()) == pytest.approx(time.total_ms)
        assert time.sites_ms > 0
        assert time.predicted_ms is None
        assert "calibrat" in time.note
        assert time.copies == 0


def test_profiles_of_launches_say_nothing_about_modules():
    found = made_up()
    assert found.module_speedup("prefill 2x8", "0.25 uniform") == 3.0
    launches = replace(found, modules=tuple(replace(time, clock="launches") for time in found.modules))
    assert launches.module_speedup("prefill 2x8", "0.25 uniform") is None
    assert launches.to_json()["modules"][0]["clock"] == "launches"


def test_bfloat16_is_refused_before_any_work():
    with pytest.raises(BadInput, match="has no bfloat16"):
        blora.bench("no model at all", (0.5,), target="cuda", dtype="bfloat16")


def test_gemms_are_timed_alone_and_put_over_the_modules(result):
    for time in result.modules:
        assert time.alone_ms is not None and time.alone_share == pytest.approx(time.alone_ms / time.sites_ms)
    summary = {(row["setting"], row["name"]): row for row in result.to_json()["summary"]}
    assert summary[SETTINGS[0].setting, DENSE]["gemms_alone_over_modules"] > 0
    assert summary[SETTINGS[2].setting, DENSE]["gemms_alone_over_modules"] is None


@pytest.mark.parametrize(("rows", "weight_bytes", "nodes"), [(128, 1 << 20, 32), (1, 1 << 20, 64), (1, 1 << 30, 256)])
def test_few_rows_wait_for_their_weights_and_many_do_not(rows, weight_bytes, nodes, monkeypatch):
    """16 KB of weights a product: 32 of them where they may stay in the cache, else as many as the model holds."""
    made = []

    class Stack:
        def time_ns(self, feeds, call_ns):
            assert feeds["x"].shape == (rows, 64)
            return 7.0 - len(made)

    def stack(place, inner, columns, count):
        made.append((inner, columns, count))
        return Stack()

    monkeypatch.setattr(sweeping, "gemm_stack", stack)
    assert sweeping.gemm_alone_ns(Place(), (rows, 64, 64), 0.0, weight_bytes) == 7.0 - sweeping.PASSES
    assert made == [(64, 64, nodes)] * sweeping.PASSES


def test_a_fixed_cache_is_timed_beside_the_growing_one(result):
    growing, fixed = (load.setting for load in SETTINGS[1:3])
    assert fixed == growing + ", fixed cache"
    for side in result.sides:
        assert result.timing(fixed, side.name).median_ms > 0
    assert result.tokens[fixed] == 2
    assert "which a step extends in place" in result.markdown()


def test_every_decode_is_asked_for_with_each_cache():
    cpu, cuda = (_loads(target, True, True, (1, 4), 8, 16, 2) for target in ("cpu", "cuda"))
    assert [load.cache for load in cpu if load.phase == "decode"] == ["growing", "fixed"] * 2
    assert [load.cache for load in cuda if load.phase == "decode"] == [
        "growing", "fixed", "captured", "captured fixed"
    ] * 2  # fmt: skip
    assert [load.batch for load in cpu if load.phase == "end to end"] == [1, 4]
    assert _loads("cpu", False, True, (2,), 8, 16, 2) == [Load("model", 2, 8)]
    assert _loads("cpu", False, False, (2,), 8, 16, 2) == [Load("model", 2, 0)]  # an image has one size


def test_sides_without_a_fixed_cache_are_timed_without_and_say_why(run_folder, not_calibrated, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run_folder, moved)
    manifest = json.loads((moved / "onnx" / "export.json").read_text(encoding="utf-8"))
    manifest["fixed_cache_refusal"] = "Concat reads the past"
    (moved / "onnx" / "export.json").write_text(json.dumps(manifest), encoding="utf-8")
    asked = (*SETTINGS[:3], Load("decode", 1, 6, cache="captured"))
    found = blora.bench(moved, rounds=1, settings=asked, memory=False, profile=False)
    assert found.settings == tuple(load.setting for load in SETTINGS[:2])
    assert "fixed cache was left out; 0.5 plan: Concat reads the past." in found.markdown()
    assert "captured was left out; a CUDA graph needs target 'cuda'" in found.markdown()
    with pytest.raises(BadInput, match="no cache of fixed size to time: Concat reads the past"):
        SETTINGS[2].call(Artifact.load(moved / "onnx"))


def test_sides_state_what_their_plan_keeps_and_what_they_weigh(result, config_folder):
    dense, uniform, shared, interpolative, narrow, prior = result.sides
    assert dense.kept == 1.0 and prior.kept <= 0.5
    assert 0.4 <= interpolative.kept <= 0.6 and 0.4 <= narrow.kept <= 0.6
    assert 0.4 <= shared.kept <= 0.6 and shared.file_bytes < dense.file_bytes
    sites = outline(config_folder).sites
    plan = blora.make_plan(config_folder, 0.5, rules={"*": {"min_rank": 8}, "*head": "exclude"})
    assert prior.kept == pytest.approx(kept_of(sites, plan.forms))
    assert uniform.file_bytes < dense.file_bytes
    assert all(set(side.peak_bytes) == {load.setting for load in SETTINGS[:2]} for side in result.sides)


def test_the_result_says_how_it_was_measured_and_survives_json(result):
    data = json.loads(json.dumps(result.to_json()))
    assert data["setup"]["copies"] == 2
    assert any("2 copies" in note for note in data["setup"]["notes"])
    assert len(data["summary"]) == len(result.timings)
    text = result.markdown()
    assert "random" in text and "no prediction" in text and "0.5 uniform" in text


def test_a_plot_is_written(result, tmp_path):
    result.plot(tmp_path / "speed.svg")
    assert "<svg" in (tmp_path / "speed.svg").read_text(encoding="utf-8")


def test_a_picture_of_an_unknown_kind_is_refused_before_it_is_drawn(tmp_path):
    with pytest.raises(BadInput, match=r"speed\.txt: no picture is drawn as \.txt; there are .*\.svg"):
        require_matplotlib(tmp_path / "speed.txt")


def test_without_matplotlib_the_message_says_what_to_install(result, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"blora-compiler\[plot\]"):
        result.plot(tmp_path / "speed.svg")


def test_an_unknown_side_is_refused_with_the_known_ones(result):
    with pytest.raises(BadInput, match=r"0\.5 prior"):
        result.timing(result.settings[0], "0.3 uniform")


def test_predictions_stand_beside_measurements_on_a_calibrated_machine(calibrated):
    found = blora.bench(
        tiny_llama(layers=1).config, (0.5,), plans=("uniform",), rounds=1, settings=SETTINGS[:1], memory=False
    )
    assert [time.name for time in found.modules] == [DENSE, "0.5 uniform"]
    for time in found.modules:
        assert time.predicted_ms is not None and 0 < time.predicted_sites_ms < time.predicted_ms


def test_encoders_run_their_one_graph(not_calibrated):
    found = blora.bench(
        tiny_bert().config, (0.5,), plans=("uniform",), batches=(2,), tokens=8, rounds=1, memory=False
    )
    assert found.settings == ("model 2x8",)
    assert found.tokens["model 2x8"] == 16


def test_images_have_no_length_and_no_tokens(not_calibrated):
    found = blora.bench(tiny_vit().config, (0.5,), plans=("uniform",), batches=(2,), rounds=1, memory=False)
    assert found.settings == ("model, batch 2",)
    assert {time.setting for time in found.modules} == {"model, batch 2"}
    assert found.throughput("model, batch 2", DENSE) is None
    assert found.time_rows()[0][-1] == "-"


def test_what_generates_without_a_cache_or_from_an_encoder_runs_its_one_graph():
    """Mamba and T5 say that they can generate, and are exported as one graph."""
    assert generates(tiny_llama(layers=1)) and not generates(tiny_bert())
    with torch.device("meta"):
        others = [AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=8, num_hidden_layers=1))]
        others += [AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", d_model=8, d_kv=4, num_layers=1))]
    assert all(model.can_generate() and not generates(model) for model in others)


def test_a_plan_by_the_prior_is_about_the_model_at_hand():
    """Its config may name another class, whose sites have other names."""
    model = tiny_bert()
    model.config.architectures = ["BertForMaskedLM"]
    sites, forms = planned_forms(trace(model), 0.5, "prior")
    assert forms and set(forms) <= {site.name for site in sites}
    assert 0.3 <= kept_of(sites, forms) <= 0.5


def test_quantised_weights_are_named_and_have_no_gemms_and_no_prediction_to_compare_with():
    artifact = SimpleNamespace(target="cpu", dtype="float32", quantize="int8", threads=None)
    side = SimpleNamespace(name="0.5 plan", artifact=artifact)
    assert "; but weights are stored 0.5 plan in int8." in _notes(1, "as asked", [side], SETTINGS)[0]
    assert alone_ms(None, frozenset(), artifact, {}) is None
    assert this_or_why_not(artifact) == (None, "no prediction: weights in int8, and the calibration is of floats")


def test_calls_take_turns():
    seen: list[int] = []
    run = rotating([lambda: seen.append(0), lambda: seen.append(1)])
    for _ in range(4):
        run()
    assert seen == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": ("400MB",), "plans": ("uniform",), "tokens": 8}, "need a share"),
        ({"plans": ("best",)}, "plans"),
        ({"budgets": ()}, "give a budget"),
        ({"tokens": 0}, "tokens is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"batches": (1, 0)}, "batch is 0"),
        ({"tokens": 128}, "positions, the model has 128"),
        ({"target": "tpu"}, "tpu"),
    ],
)
def test_what_cannot_be_benched_is_refused(config_folder, options, message):
    with pytest.raises(BadInput, match=message):
        blora.bench(config_folder, **options)


@pytest.fixture(scope="module")
def run_folder(config_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `blora compile` leaves behind, as far as a bench reads it."""
    run = tmp_path_factory.mktemp("run")
    dense = random_weights(load_source(config_folder))
    program = trace(dense)
    plan = blora.make_plan(config_folder, 0.5, rules={"*": {"min_rank": 8}, "*head": "exclude"})
    for part, forms in (("onnx-dense", {}), ("onnx", plan.forms)):
        export_for_timing(in_forms(dense, program.sites, forms), run / part, Place(), dict(program.inputs))
    (run / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    (run / "run.json").write_text(json.dumps({"model": str(config_folder)}), encoding="utf-8")
    return run


def test_a_run_folder_is_timed_as_it_lies(run_folder, not_calibrated):
    found = blora.bench(run_folder, rounds=1, settings=SETTINGS[:1], memory=False)
    assert [side.name for side in found.sides] == [DENSE, "0.5 plan"]
    assert found.sides[1].kept <= 0.5
    assert found.module_speedup(SETTINGS[0].setting, "0.5 plan") > 0


def test_a_run_whose_model_is_gone_is_timed_without_predictions(run_folder, not_calibrated, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run_folder, moved)
    (moved / "run.json").write_text(json.dumps({"model": str(tmp_path / "gone")}), encoding="utf-8")
    found = blora.bench(moved, rounds=1, settings=SETTINGS[:1], memory=False)
    assert "cannot be read" in found.markdown()


def test_a_plan_in_bytes_does_not_say_what_flops_a_run_kept(run_folder, config_folder, tmp_path):
    plan = blora.make_plan(config_folder, 0.5, metric="bytes", rules={"*head": "exclude"})
    with pytest.raises(BadInput, match=r"report\.json cannot be read"):
        _share_of_run(tmp_path, plan)
    report = {"achieved": {"sites": {"flops": {"fraction": 0.4375}}}}
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert _share_of_run(tmp_path, plan) == 0.4375


def test_a_run_exported_for_something_else_is_refused(run_folder):
    with pytest.raises(BadInput, match="float16"):
        blora.bench(run_folder, dtype="float16")


def test_a_run_without_its_dense_export_is_refused(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "export.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BadInput, match="onnx-dense"):
        blora.bench(tmp_path)


def test_a_run_without_its_plan_is_refused(tmp_path, monkeypatch):
    for part in ("onnx", "onnx-dense"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "export.json").write_text("{}", encoding="utf-8")
    alike = SimpleNamespace(target="cpu", dtype="float32", generation=True)
    monkeypatch.setattr(Artifact, "load", lambda *_: alike)
    with pytest.raises(
        BadInput, match=r"holds no readable plan\.json and run\.json \(.*No such file.*\); give a run"
    ):
        blora.bench(tmp_path)


def test_what_no_timing_can_be_made_of_is_refused():
    program = trace(build("twice"), example_inputs("twice"))
    with pytest.raises(BadInput, match=r"no MLP can be narrowed \(none was found\)"):
        planned_forms(program, 0.5, "narrow")
    with pytest.raises(BadInput, match=r"w: .* cannot be put into a model for timing; only factored modules can"):
        in_forms(program.tree, program.sites, {"w": Factored(4)})


def test_the_command_writes_json_and_markdown(config_folder, tmp_path):
    done = CliRunner().invoke(
        app,
        ["bench", str(config_folder), "--budget", "0.5", "--plan", "uniform", "--tokens", "8", "--rounds", "1",
         "--new-tokens", "2", "--no-memory", "--no-profile", "--out", str(tmp_path / "b.json"),
         "--markdown", str(tmp_path / "b.md")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["setup"]["target"] == "cpu"
    assert "| setting |" in (tmp_path / "b.md").read_text(encoding="utf-8")


@pytest.fixture
def speed_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "speed.py"
    spec = importlib.util.spec_from_file_location("speed", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(path.parent))  # as it is where the script runs
    monkeypatch.setitem(sys.modules, "speed", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_the_speed_script_resumes_by_case(speed_script, tmp_path, capsys, monkeypatch):
    script, out = speed_script, tmp_path / "speed.json"
    arguments = ["--toy", "--rounds", "1", "--plan", "uniform", "--out", str(out)]
    script.main([*arguments, "--case", "encoder"])
    assert list(json.loads(out.read_text(encoding="utf-8"))["cases"]) == ["toy encoder 0.5 uniform"]
    script.main(arguments)
    assert set(json.loads(out.read_text(encoding="utf-8"))["cases"]) == {
        "toy encoder 0.5 uniform",
        "toy llama 0.5 uniform",
    }
    monkeypatch.setattr(script.blora, "bench", None)  # nothing is left to run
    capsys.readouterr()
    script.main(arguments)
    assert "modules/ratio" in capsys.readouterr().out


def test_the_cases_on_cuda_are_those_that_the_targets_are_stated_for(speed_script):
    """Built, not run: a 4096-wide Llama of eight blocks, 2048 and 8x512 tokens, captured steps of 1, 16 and 64."""
    cases = speed_script.cases("cuda", toy=False)
    assert {case.budget for case in cases} == {0.5, 0.22}
    assert {case.plan for case in cases} == {"uniform", "shared", "interpolative", "narrow", "prior"}
    for case in cases:
        config = case.config()
        assert (config.hidden_size, config.num_hidden_layers) == (4096, 8)
        assert {("prefill", 1, 2048), ("prefill", 8, 512)} <= {(s.phase, s.batch, s.tokens) for s in case.settings}
        for cache in ("captured", "captured fixed"):
            assert {s.batch for s in case.settings if s.phase == "decode" and s.cache == cache} == {1, 16, 64}


def test_graphs_without_weights_are_filled_and_timed(speed_script, tmp_path, capsys):
    """Made on one machine, timed on another: what an export weighs stays behind, what it computes does not change."""
    script = speed_script
    graphs, out = tmp_path / "graphs", tmp_path / "speed.json"
    chosen = ["--toy", "--case", "llama", "--plan", "shared"]
    script.main([*chosen, "--prepare", str(graphs)])
    assert not list(graphs.rglob("weights.data")) and len(list(graphs.rglob("side.json"))) == 2
    assert sum(path.stat().st_size for path in graphs.rglob("*") if path.is_file()) < 400_000
    timed = [*chosen, "--prepared", str(graphs), "--rounds", "1", "--no-memory", "--out", str(out)]
    script.main([*timed, "--device", "h200"])
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert list(cases) == [f"toy llama, {load.setting}" for load in script.TOY_LLAMA]
    for case in cases.values():
        assert [side["name"] for side in case["sides"]] == ["dense", "0.5 shared"]
        assert all(timing["median_ms"] > 0 for timing in case["timings"])
    predicted = cases["toy llama, prefill 1x16"]["summary"]
    assert all(row["predicted_ms"] > 0 for row in predicted)
    printed = capsys.readouterr().out
    assert "| toy llama 0.5 shared | prefill 1x16 |" in printed and "| predicted ms | predicted |" in printed
    with pytest.raises(SystemExit):
        script.main(["--toy"])


def test_what_is_filled_in_leaves_small_tensors_as_they_were(speed_script, tmp_path):
    from unweighted import fill

    speed_script.main(["--toy", "--case", "encoder", "--plan", "uniform", "--prepare", str(tmp_path / "graphs")])
    stripped = tmp_path / "graphs" / "toy-encoder" / "dense"
    artifact = fill(stripped, tmp_path / "filled")
    found = {
        name: value.const_value.numpy()
        for name, value in ir.load(tmp_path / "filled" / "model.onnx").graph.initializers.items()
    }
    norms = [value for name, value in found.items() if name.endswith("LayerNorm.weight")]
    assert norms and all((value == 1).all() for value in norms)
    words = found["embeddings.word_embeddings.weight"]
    assert words.size == 30522 * 64 and 0.01 < words.std() < 0.02
    call_of(artifact, "model", 2, 8)()


def test_the_modules_alone_are_timed_dense_against_compressed(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import modules

    modules.main(["--toy", "--rounds", "1", "--out", str(tmp_path / "modules.json")])
    result = json.loads((tmp_path / "modules.json").read_text(encoding="utf-8"))
    assert len(result["timings"]) == 4  # two plans, two prompts
    for one in result["timings"]:
        assert one["flops_ratio"] == pytest.approx(2.0, rel=0.05)
        assert one["speedup"] == pytest.approx(one["dense_ms"] / one["ms"])
        assert one["alone_ms"] > 0
    assert "FLOPs ratio" in capsys.readouterr().out
    again = ["--toy", "--report-only", "--device", "cpu-amx", "--out", str(tmp_path / "modules.json")]
    modules.main(again)
    beside = json.loads((tmp_path / "modules.json").read_text(encoding="utf-8"))
    assert [one["ms"] for one in beside["timings"]] == [one["ms"] for one in result["timings"]]
    assert all(one["predicted_dense_ms"] > 0 and one["predicted_ms"] > 0 for one in beside["timings"])
    made = [modules.Timed("m", 0.22, "shared", "1x8", rows, 4.5, 4.2, ms, 1.0) for rows, ms in ((8, 1.2), (16, 1.0))]
    assert modules.reaches(made) == 16
    assert modules.reaches(made[:1]) is None
    assert "4.05x from 16 rows on" in modules.compact(made)
    _, budgets, prompts = modules.CUDA["llama 4096"]
    assert budgets == (0.5, 0.22) and {(1, 2048), (8, 512)} <= set(prompts)


def test_a_sequence_of_products_holds_each_of_them():
    products = [(4, 16, 8), (4, 16, 24), (2, 8, 16)]
    found = sweeping.gemm_sequence(Place(), products)
    outputs = found.stack.session.run(None, found.feeds)
    assert [output.shape for output in outputs] == [(4, 8), (4, 24), (2, 16)]
    assert found.time_ns() > 0


# ── Numbers made up by hand ──────────────────────────────────────────────────────────────────────────────────────

SETUP = {"model": "made up", "target": "cpu", "dtype": "float32", "threads": 0, "rounds": 9, "copies": 1, "notes": []}


def made_up(dense_ms: float = 8.0, small_ms: float = 5.0) -> BenchResult:
    return BenchResult(
        SETUP,
        (Side("dense", 1.0, 4_000_000, "within 0"), Side("0.25 uniform", 0.25, 1_000_000, "within 0")),
        (
            Timing("prefill 2x8", "dense", dense_ms, 7.0, 9.0, 9),
            Timing("prefill 2x8", "0.25 uniform", small_ms, 4, 6, 9),
        ),
        (
            ModuleTime("prefill 2x8", "dense", 6.0, {"sites": 6.0, "session": 2.0}, 8.0, 5.5, 7.5, alone_ms=4.5),
            ModuleTime("prefill 2x8", "0.25 uniform", 2.0, {"sites": 2.0, "session": 3.0}, 5.0, note="why not"),
        ),
        {"prefill 2x8": 16},
    )


def test_ratios():
    result = made_up()
    assert result.speedup("prefill 2x8", "0.25 uniform") == 1.6
    assert result.module_speedup("prefill 2x8", "0.25 uniform") == 3.0
    assert result.sides[1].flops_ratio == 4.0
    assert result.throughput("prefill 2x8", "dense") == 2000.0


def test_the_summary_says_how_much_of_the_flops_ratio_the_modules_reach():
    _, small = made_up().to_json()["summary"]
    assert small["module_speedup_over_flops_ratio"] == 0.75
    assert made_up().to_json()["modules"][0]["alone_share"] == 0.75


def test_tables_show_measured_beside_predicted_and_notes_once():
    text = made_up().markdown()
    assert (
        "| prefill 2x8 | dense | 8.00 [7.00, 9.00] | 1.00x | 6.00 | 1.00x | 1.00x | 100 % | 75 % | 7.50 | 2000 |"
        in text
    )
    assert "| 1.60x | 2.00 | 3.00x | 4.00x | 75 % | - | - | 3200 |" in text
    assert text.count("why not") == 1
    assert "0.25 uniform" in made_up().terminal()


@pytest.mark.parametrize(
    ("load", "setting", "tokens"),
    [
        (Load("prefill", 8, 512), "prefill 8x512", 4096),
        (Load("decode", 16, 256), "decode 16x1, context 256", 16),
        (Load("decode", 16, 256, cache="captured"), "decode 16x1, context 256, captured", 16),
        (Load("model", 8, 128), "model 8x128", 1024),
        (Load("model", 8, 0), "model, batch 8", 0),
        (Load("end to end", 2, 64, 10), "end to end 2x64 + 10 steps", 20),
    ],
)
def test_a_load_names_itself_and_counts_its_tokens(load, setting, tokens):
    assert (load.setting, load.tokens_a_run) == (setting, tokens)


def test_the_last_level_cache_is_the_largest_that_the_system_states(tmp_path: Path):
    assert last_level_cache_bytes(tmp_path) is None
    for index, size in enumerate(("32K", "1M", "512K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n", encoding="utf-8")
    assert last_level_cache_bytes(tmp_path) == 1 << 20
