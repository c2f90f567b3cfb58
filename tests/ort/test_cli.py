"""The command line: each command on an earlier one's output, pure JSON, and exit codes."""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import blora_compiler
from blora_compiler import analysis, artifact, benching, cli, family, lowering, saving
from blora_compiler.cli import _read_plan, device_of_target, dtype_of_target, parse_rules, run_settings
from blora_compiler.distillation import DistillConfig
from blora_compiler.errors import BadInput
from blora_compiler.source import BUNDLED_MODEL, BUNDLED_TRAIN_TEXT, BUNDLED_VALIDATION_TEXT
from blora_compiler.stages import Record
from tests.models import build


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with the bundled tokenizer, on disk."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    build("twice")  # seeds
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED_MODEL).save_pretrained(folder)
    return folder


def blora(*arguments, expect=0):
    """In a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "blora_compiler.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == expect, result.stderr[-2000:]
    return result


@pytest.fixture
def blora_cli(monkeypatch, capsys):
    """The same in this process, where starting one more would take longer than what it does."""

    def call(*arguments, expect=0):
        monkeypatch.setattr(sys, "argv", ["blora", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = SimpleNamespace(**dict(zip(("stdout", "stderr"), capsys.readouterr(), strict=True)))
        assert code == expect, said.stderr[-2000:]
        return said

    return call


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    result = blora(
        "compile", model, "--budget", "0.5", "--train", BUNDLED_TRAIN_TEXT, "--eval", BUNDLED_VALIDATION_TEXT,
        "--out", out, "--steps", 4, "--batch", 2, "--length", 32, "--rank-multiple", 4,
    )  # fmt: skip
    return out, result


def test_a_run_folder_has_every_steps_output(run):
    out, result = run
    names = {path.name for path in out.iterdir()}
    assert {"run.json", "plan.json", "distill", "model", "onnx", "onnx-dense", "report.md", "report.json"} <= names
    for stage in ("load", "trace", "profile", "plan", "insert", "distill", "fold", "export"):
        assert f"\n{stage}" in f"\n{result.stdout}"
    assert "prefill 1x" in result.stdout
    metrics = [json.loads(line) for line in (out / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 4
    assert metrics[-1]["executable"] == pytest.approx(
        json.loads((out / "report.json").read_text())["budget"]["planned_fraction"]
    )


def test_the_report_prints_again(blora_cli, run):
    out, _ = run
    assert blora_cli("report", out).stdout.strip() == (out / "report.md").read_text().strip()
    assert json.loads(blora_cli("report", out, "--json").stdout)["quality"]["teacher"]["stride"] == 768


def test_export_and_verify_start_from_the_run(blora_cli, run, tmp_path):
    out, _ = run
    parity = json.loads(blora_cli("export", out, "--out", tmp_path / "again", "--json").stdout)["parity"]
    assert parity["identical"] == parity["sequences"] > 0
    again = json.loads(blora_cli("verify", tmp_path / "again", "--model", out / "model", "--json").stdout)
    assert max(again["parity"]["errors"].values()) <= 1e-4
    assert "greedy generations" in blora_cli("verify", out).stdout


def test_generate_streams_what_its_json_holds(blora_cli, run):
    out, _ = run
    options = ("--prompt", "It was a", "--max-new-tokens", 6)
    streamed = blora_cli("generate", out, *options).stdout
    told = json.loads(blora_cli("generate", out / "onnx", *options, "--json").stdout)
    assert streamed.strip() == told["text"].strip()
    assert told["text"].startswith("It was a")
    drawn = [blora_cli("generate", out, *options, "--sample", "--seed", seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "temperature" in blora_cli("generate", out, *options, "--sample", "--temperature", -1, expect=2).stderr
    assert "holds no tokens" in blora_cli("generate", out, "--prompt", "", expect=2).stderr


def test_an_earlier_run_is_not_overwritten_by_accident(blora_cli, run, model):
    out, _ = run
    result = blora_cli("compile", model, "--budget", "0.5", "--out", out, expect=2)
    assert "--resume or replace it with --overwrite" in result.stderr


def test_what_cannot_start_replaces_nothing(blora_cli, run, model, tmp_path):
    out, _ = run
    empty = tmp_path / "empty.txt"
    empty.touch()
    replacing = ("--out", out, "--overwrite")
    held = sorted(path.relative_to(out) for path in out.rglob("*"))
    for arguments, message in (
        (("compile", model, "--budget", "0.5", "--out", out, "--resume", "--overwrite"), "leave one of them out"),
        (("compile", model, "--budget", "0,5", "--out", out, "--overwrite"), "budget"),
        (("compile", out / "mistyped", "--budget", "0.5", "--out", out, "--overwrite"), "mistyped"),
        (("compile", model, "--budget", "0.5", "--train", "nowhere.txt", *replacing), "no such file"),
        (("compile", model, "--budget", "0.5", "--train", empty, *replacing), "text is empty"),
        (("compile", model, "--budget", "0.5", "--target", "tpu", *replacing), "target is 'tpu'"),
    ):
        assert message in blora_cli(*arguments, expect=2).stderr
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == held


def test_a_run_that_computed_nothing_blocks_no_other(blora_cli, model, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    blora_cli("compile", model, "--budget", "0.5", "--train", empty, "--out", tmp_path / "run", expect=2)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_what_if_replaces_nothing_of_another_kind(blora_cli, model, tmp_path):
    text = tmp_path / "precious.txt"
    text.write_text("mine")
    for option in ("--html", "--csv", "--out"):
        result = blora_cli("whatif", model, "--budgets", "0.5", option, text, expect=2)
        assert "precious.txt does not end in" in result.stderr
    assert text.read_text() == "mine"


def test_options_of_drawing_need_it(blora_cli, run):
    out, _ = run
    for option in ("--temperature", "--top-k", "--seed"):
        result = blora_cli("generate", out, "--prompt", "Once", option, 1, expect=2)
        assert f"{option} is about drawing tokens" in result.stderr


def test_a_dry_run_of_a_given_plan_is_refused(blora_cli, run, model):
    out, _ = run
    result = blora_cli("compile", model, "--budget", "0.5", "--plan", out / "plan.json", "--dry-run", expect=2)
    assert "--plan gives one" in result.stderr


def test_a_changed_setting_cannot_resume(blora_cli, run, model):
    out, _ = run
    result = blora_cli("compile", model, "--budget", "0.4", "--out", out, "--resume", expect=2)
    assert "budget='0.5', now '0.4'" in result.stderr


def test_a_plan_prints_writes_and_is_applied_after_an_edit(blora_cli, model, tmp_path):
    path = tmp_path / "plan.json"
    result = blora_cli("plan", model, "--budget", "0.5", "--damage", "plain", "--rank-multiple", 4, "--out", path)
    assert "model.layers.1.mlp.down_proj" in result.stdout
    edited = json.loads(path.read_text())
    choice = next(choice for choice in edited["choices"] if choice["site"] == "model.layers.1.mlp.down_proj")
    assert choice["form"] == "dense"
    choice |= {"form": "factored", "rank": 20}  # and the cost of the dense form left beside it
    path.write_text(json.dumps(edited))
    blora_cli("compile", model, "--budget", "0.5", "--plan", path, "--rank-multiple", 4, "--damage", "plain",
          "--out", tmp_path / "run", "--no-export")  # fmt: skip
    applied = json.loads((tmp_path / "run" / "plan.json").read_text())
    saved = 2 * 128 * (64 * 32 - 20 * (64 + 32))  # at the 128 tokens of a prompt
    assert applied["cost"] == edited["cost"] - saved
    choice["cost"] -= saved
    assert [c["cost"] for c in applied["choices"]] == [c["cost"] for c in edited["choices"]]
    forms = [(c["site"], c["form"], c.get("rank")) for c in edited["choices"]]
    assert [(c["site"], c["form"], c.get("rank")) for c in applied["choices"]] == forms
    path.write_text(path.read_text()[:-40])
    result = blora_cli("compile", model, "--budget", "0.5", "--plan", path, "--out", tmp_path / "other", expect=2)
    assert "plan" in result.stderr


def test_a_dry_run_prints_the_plan_as_json_and_writes_nothing(model, tmp_path):
    result = blora(
        "compile", model, "--budget", "0.5", "--damage", "plain", "--dry-run", "--json", "--out", tmp_path / "no"
    )
    assert json.loads(result.stdout)["budget"] == "0.5"
    assert not (tmp_path / "no").exists()


def test_a_config_without_weights_is_planned_with_a_prior(blora_cli, model, tmp_path):
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    plan = json.loads(blora_cli("plan", tmp_path, "--budget", "0.5", "--rank-multiple", 4, "--json").stdout)
    assert plan["damage_kind"] == "prior"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--budget", "0.1", "--rule", "*.mlp.*=dense"), 3, "smallest feasible budget is"),
        (("--budget", "nonsense"), 2, "nonsense"),
        (("--budget", "0.5", "--rule", "oops"), 2, "write GLOB=dense"),
        (("--budget", "0.5", "--rule", "*=a:b"), 2, "ranks are whole numbers"),
        (("--budget", "0.5", "--workload", "decode 1@300"), 2, "needs 301 positions"),
        (("--budget", "0.5", "--rule", "*.up_porj=dense"), 2, "up_proj"),
        (("--budget", "0.5", "--no-such-option",), 2, "No such option"),
    ],
)  # fmt: skip
def test_exit_codes(blora_cli, model, arguments, code, message):
    assert message in blora_cli("plan", model, "--damage", "plain", *arguments, expect=code).stderr


def test_a_process_ends_with_the_message_and_the_exit_code(tmp_path):
    result = blora("plan", tmp_path / "missing", "--budget", "0.5", expect=2)
    assert result.stderr.startswith("blora: ") and "missing" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_things_are_bad_input(blora_cli, model, tmp_path):
    assert "--out is missing" in blora_cli("compile", model, "--budget", "0.5", expect=2).stderr
    assert "holds no report.json" in blora_cli("report", tmp_path, expect=2).stderr
    (tmp_path / "report.json").write_text("{}")
    assert "give a run folder" in blora_cli("report", tmp_path / "report.json", expect=2).stderr
    assert "holds a saved model" in blora_cli("export", tmp_path, expect=2).stderr
    config = tmp_path / "config.json"
    config.write_text("[1]")
    result = blora_cli("compile", model, "--budget", "0.5", "--out", tmp_path / "x", "--config", config, expect=2)
    assert "holds a list" in result.stderr


def test_a_resumed_run_may_save_its_checkpoints_at_another_pace():
    options = {"budget": "0.5", "distill": DistillConfig(steps=5)}
    other = {"budget": "0.5", "distill": DistillConfig(steps=5, checkpoint_every=3, keep_checkpoints=7)}
    assert run_settings("model", other) == run_settings("model", options)
    longer = {"budget": "0.5", "distill": DistillConfig(steps=6)}
    assert run_settings("model", longer) != run_settings("model", options)


def test_an_option_wins_over_the_config_file(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3, "steps": 4}))
    command = ["compile", "a model", "--budget", "0.5", "--config", str(tmp_path / "config.json"), "--out", "run"]
    asked = []
    monkeypatch.setattr(cli, "_run", lambda model, out, options, *how: asked.append(options))
    training = ["--steps", "7", "--train", "corpus.txt", "--learning-rate", "0.01"]
    for options in ([], ["--seed", "0"], ["--seed", "5", *training]):
        cli.app([*command, *options], standalone_mode=False)
    assert [options["seed"] for options in asked] == [3, 0, 5]
    distill = asked[2]["distill"]
    assert (distill.seed, distill.steps, distill.learning_rate) == (5, 7, 0.01)


# ── Options reach what does the work ─────────────────────────────────────────────────────────────────────────────


PLANNED = "--metric latency --scope model --device h200 --workload 'prefill 1x8' --calibration c.txt --interpolative"
PLAN_ARGUMENTS = {
    "metric": "latency", "scope": "model", "device": "h200", "workload": "prefill 1x8", "calibration": Path("c.txt"),
    "interpolative": True,
}  # fmt: skip


class Stopped(Exception):
    """Raised in the place of a command's work."""


@pytest.fixture
def arrived(tmp_path, monkeypatch):
    """The arguments of the work of every command, by name; the work itself is not done."""
    found = {}

    def noted(work):
        signature = inspect.signature(work)

        def note(*arguments, **named):
            given = signature.bind(*arguments, **named).arguments
            found.update({**given, **given.get("options", {})})
            raise Stopped

        return note

    def exported(folder, target="cpu", dtype=None, *, quantize=None):
        """As `Compiled.export`."""

    member = SimpleNamespace(save=lambda folder: None, export=noted(exported))
    loaded = SimpleNamespace(
        module=None, inputs=None, sites=(), at=lambda budget: member,
        tokenizer=lambda: lambda *_, **__: {"input_ids": torch.zeros(1, 2)},
        generator=lambda: SimpleNamespace(generate=noted(lambda **options: None)),
    )  # fmt: skip
    for name in (family.DESCRIPTION, saving.DESCRIPTION):
        (tmp_path / name).write_text("{}")
    for where, name in ((family, "load_family"), (saving, "load"), (artifact.Artifact, "load")):
        monkeypatch.setattr(where, name, lambda folder: loaded)
    for where, name in (
        (cli, "_run"), (blora_compiler, "make_plan"), (benching, "bench"), (lowering, "lower"), (analysis, "whatif")
    ):  # fmt: skip
        monkeypatch.setattr(where, name, noted(getattr(where, name)))
    return found


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (f"compile m --budget 0.5 --out x --dtype float16 {PLANNED}", {**PLAN_ARGUMENTS, "dtype": "float16"}),
        (f"compile m --budget 0.5 --dry-run {PLANNED}", PLAN_ARGUMENTS),
        (f"plan m --budget 0.5 {PLANNED}", PLAN_ARGUMENTS),
        (
            "whatif m --metric bytes --scope model --dtype float16",
            {"metric": "bytes", "scope": "model", "dtype": "float16"},
        ),
        (
            "bench m --context 7 --copies 3 --dtype float16 --threads 2 --seed 5",
            {"context": 7, "copies": 3, "dtype": "float16", "threads": 2, "seed": 5},
        ),
        ("at RUN --budget 0.3 --out RUN/x --target cuda --dtype float16", {"target": "cuda", "dtype": "float16"}),
        ("export RUN --target cuda --dtype float16", {"target": "cuda", "dtype": "float16"}),
        (
            "generate RUN --prompt hi --sample --top-k 7 --temperature 0.5",
            {"do_sample": True, "top_k": 7, "temperature": 0.5},
        ),
    ],
    ids=lambda value: " ".join(value.split()[:1]) if isinstance(value, str) else "",
)
def test_options_arrive_where_the_work_is_done(arrived, tmp_path, command, arguments):
    with pytest.raises(Stopped):
        cli.app(shlex.split(command.replace("RUN", str(tmp_path))), standalone_mode=False)
    assert {name: arrived.get(name) for name in arguments} == arguments


def test_a_plot_goes_where_the_option_says(tmp_path, monkeypatch):
    drawn = []
    result = SimpleNamespace(to_json=dict, terminal=str, plot=drawn.append)
    monkeypatch.setattr(benching, "bench", lambda *_, **__: result)
    cli.app(["bench", "m", "--plot", str(tmp_path / "b.svg")], standalone_mode=False)
    assert drawn == [tmp_path / "b.svg"]


def test_a_rule_given_twice_adds_its_bounds_and_the_last_one_comes_last():
    assert parse_rules(["*down=64:", "*=dense", "*down=:256"]) == {
        "*": "dense", "*down": {"min_rank": 64, "max_rank": 256}
    }  # fmt: skip
    assert list(parse_rules(["*down=64:", "*=dense", "*down=:256"])) == ["*", "*down"]
    assert parse_rules(["a=dense", "a=8:16"]) == {"a": {"min_rank": 8, "max_rank": 16}}


def test_a_budget_in_time_is_about_the_device_that_is_exported_for():
    assert device_of_target("cuda", "12ms", None) == device_of_target("cuda", "0.5", "latency") == "this-cuda"
    assert device_of_target("cuda", "0.5", None) is device_of_target("cpu", "12ms", None) is None
    assert device_of_target("cuda", "0.2..0.5", None) is None
    assert (dtype_of_target("cuda"), dtype_of_target("cpu")) == ("float16", None)


def test_a_plan_that_is_no_text_is_named(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match=r"--plan .*plan\.json cannot be read"):
        _read_plan(tmp_path / "plan.json")


def test_the_demo_compresses_and_trains_the_bundled_model(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_run", lambda *arguments: asked.append(arguments))
    for options in ([], ["--budget", "0.5", "--steps", "3", "--seed", "2", "--out", "here", "--resume", "--json"]):
        cli.app(["demo", *options], standalone_mode=False)
    (model, out, usual, *how), (_, there, short, *other) = asked
    assert (model, out, how) == (str(BUNDLED_MODEL), Path("demo-run"), ["cpu", None, None, True, False, False, False])
    assert usual == {
        "budget": "0.25", "train": BUNDLED_TRAIN_TEXT, "evaluation": BUNDLED_VALIDATION_TEXT, "seed": 0,
        "distill": cli.demo_config(), "narrow": True,
    }  # fmt: skip
    assert (there, other) == (Path("here"), ["cpu", None, None, True, True, False, True])
    assert (short["budget"], short["seed"], short["distill"]) == ("0.5", 2, cli.demo_config(3, 2))


def test_a_range_of_budgets_compiles_a_family(tmp_path, monkeypatch, capsys):
    @dataclass(frozen=True)
    class Made:
        smallest: float
        largest: float

        def save(self, folder):
            folder.mkdir(exist_ok=True)

    asked = []

    def compile_family(model, smallest, largest, **options):
        options["on_record"](Record("profile", 0.0, "a stage"))
        asked.append((model, options))
        return Made(smallest, largest)

    monkeypatch.setattr("blora_compiler.family.compile_family", compile_family)
    out = tmp_path / "run"
    command = ["compile", "a model", "--budget", "0.2..0.75", "--out", str(out), "--metric", "params"]
    cli.app([*command, "--train", "corpus.txt", "--steps", "7", "--rule", "lm_head=dense"], standalone_mode=False)
    ((model, options),) = asked
    assert model == "a model"
    assert {"device", "damage", "interpolative", "narrow", "budget"} & set(options) == set()
    assert (options["metric"], options["train"], options["distill"].steps) == ("params", Path("corpus.txt"), 7)
    assert (options["rules"], options["folder"], options["resume"]) == ({"lm_head": "dense"}, out, False)
    assert (out / "family").is_dir()
    assert f"blora at {out} --budget 0.37" in capsys.readouterr().out
    cli.app([*command, "--overwrite", "--json"], standalone_mode=False)
    assert asked[1][1]["distill"] is None
    assert json.loads(capsys.readouterr().out) == {"smallest": 0.2, "largest": 0.75, "folder": str(out / "family")}
