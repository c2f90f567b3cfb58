"""A run that was killed and resumed equals the uninterrupted one bit for bit; damaged checkpoints are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import blora_compiler as blora
import blora_compiler.distillation as training
from blora_compiler import checkpoint as checkpoints
from blora_compiler import stages
from blora_compiler.budget import Budget
from blora_compiler.checkpoint import Checkpoint, list_checkpoints, load_latest, save_checkpoint
from blora_compiler.errors import BadInput
from blora_compiler.plan import Plan
from blora_compiler.profiling import profile
from blora_compiler.solver import solve
from blora_compiler.tracing import trace
from tests.models import build

HERE = Path(__file__).parent
STEPS = 8

# Runs in a process of its own, so that it can be killed for good. `dropout` makes the run depend on the random state.
CHILD = textwrap.dedent(
    """
    import os, signal, sys, torch
    sys.path.insert(0, {here!r})
    import test_distill as toy
    from safetensors.torch import save_file
    from blora_compiler import checkpoint
    from torch import nn

    folder, kill_at, kill_where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    class AlwaysNoisy(nn.Module):
        def forward(self, x):
            return x + 0.01 * torch.randn_like(x)

    def before_step(step):
        with open(folder + "/taken.txt", "a") as file:
            file.write(f"{{step}}\\n")

    def on_step(record):
        if kill_where == "step" and record["step"] == kill_at:
            die()

    if kill_where in ("tensors", "manifest", "rename"):
        real_json, real_replace, real_save = checkpoint.write_json, os.replace, checkpoint.save_file
        due = f"step-{{kill_at:06d}}"

        def write_json(path, data):
            if kill_where == "manifest" and due in str(path) and path.name == "manifest.json":
                path.write_text('{{"tensors')
                die()
            real_json(path, data)

        def save(tensors, path):
            real_save(tensors, path)
            if kill_where == "tensors" and due in str(path):
                os.truncate(path, path.stat().st_size // 2)
                die()

        def replace(source, target):
            if kill_where == "rename" and due in str(target):
                die()
            real_replace(source, target)

        checkpoint.write_json, checkpoint.save_file, os.replace = write_json, save, replace

    teacher = toy.llama()
    tree = toy.branched(teacher)
    for layer in tree.model.layers:
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, AlwaysNoisy())
    settings = toy.config(steps={steps}, checkpoint_every=2, learning_rate=1e-2)
    from pathlib import Path
    toy.run(tree, teacher, settings, folder=Path(folder), resume=True, before_step=before_step, on_step=on_step)
    save_file({{n: t.contiguous() for n, t in tree.state_dict().items()}}, folder + "/tree.safetensors")
    """
).format(here=str(HERE), steps=STEPS)


def _run_child(folder: Path, kill_at: int = 0, where: str = "never") -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(kill_at), where],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def _outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "tree.safetensors"), [{**record, "seconds": None} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert _run_child(folder) == 0
    return _outcome(folder)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("kills", "starts"),
    [
        ([(1, "step")], [0, 0]),  # before the first checkpoint
        ([(3, "step"), (7, "step")], [0, 2, 6]),  # while dense parts are there, and after they are gone
        ([(4, "tensors"), (8, "rename")], [0, 2, 6]),
        ([(2, "rename"), (6, "manifest")], [0, 0, 4]),
    ],
    ids=str,
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, uninterrupted, kills, starts):
    for step, where in kills:
        assert _run_child(tmp_path, step, where) == -signal.SIGKILL
        assert load_latest(tmp_path / "checkpoints")[1] == []
    assert _run_child(tmp_path) == 0
    ends = [*(step for step, _ in kills), STEPS]
    expected = [step for start, end in zip(starts, ends, strict=True) for step in range(start, end)]
    assert [int(line) for line in (tmp_path / "taken.txt").read_text().splitlines()] == expected
    weights, records = _outcome(tmp_path)
    wanted_weights, wanted_records = uninterrupted
    assert records == wanted_records
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert weights.keys() == wanted_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], wanted_weights[name])] == []
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000006", "step-000008"]


# ── In one process ───────────────────────────────────────────────────────────────────────────────────────────────


def _toy():
    sys.path.insert(0, str(HERE))
    try:
        import test_distill
    finally:
        sys.path.remove(str(HERE))
    return test_distill


def _finished(folder: Path, **changes):
    toy = _toy()
    teacher = toy.llama()
    tree = toy.branched(teacher)
    return tree, toy.run(tree, teacher, toy.config(**changes), folder=folder, resume=True)


def test_resuming_a_finished_run_gives_its_result(tmp_path):
    first, _ = _finished(tmp_path)
    tree, result = _finished(tmp_path)
    assert (result.steps, result.resumed_from) == (6, 6)
    assert result.checkpoint.name == "step-000006"
    assert result.loss == _toy().training.read_metrics(result.metrics)[-1]["loss"]
    both = zip(first.state_dict().values(), tree.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"config.learning_rate was None and is now 0.5\. Restore these"),
        ({"steps": 9, "seed": 3}, "config.steps was 6 and is now 9; config.seed was 0 and is now 3; data was"),
    ],
)
def test_another_runs_checkpoint_is_refused(tmp_path, changes, message):
    _finished(tmp_path)
    with pytest.raises(BadInput, match=message):
        _finished(tmp_path, **changes)


def test_how_often_checkpoints_are_written_may_change(tmp_path):
    _finished(tmp_path)
    _finished(tmp_path, checkpoint_every=5, keep_checkpoints=1)


def test_another_teacher_is_refused(tmp_path):
    _finished(tmp_path)
    toy = _toy()
    teacher = toy.llama()
    with torch.no_grad():
        teacher.lm_head.weight[0, 0] += 1
    with pytest.raises(BadInput, match=r"teacher was '[0-9a-f]{64}' and is now '[0-9a-f]{64}'; tree was"):
        toy.run(toy.branched(teacher), teacher, toy.config(), folder=tmp_path, resume=True)


def test_the_recorded_precision_is_used_again(tmp_path, monkeypatch):
    toy = _toy()
    monkeypatch.setattr(toy.training, "bfloat16_pays", lambda *_: True)
    _finished(tmp_path, autocast="auto")
    monkeypatch.setattr(toy.training, "bfloat16_pays", lambda *_: pytest.fail("decided twice"))
    _finished(tmp_path, autocast="auto")


def test_another_thread_count_is_said(tmp_path, monkeypatch):
    _finished(tmp_path)
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    with pytest.warns(UserWarning, match=f"used {before} threads and now has {before + 1}"):
        _finished(tmp_path)


def test_a_damaged_newest_checkpoint_is_said_and_the_older_one_used(tmp_path):
    first, _ = _finished(tmp_path)
    _corrupt(tmp_path / "checkpoints" / "step-000006" / "tensors.safetensors")
    hashes = r"its SHA-256 is [0-9a-f]{64} but the manifest says [0-9a-f]{64}"
    with pytest.warns(UserWarning, match=rf"(?s)step-000006/tensors.safetensors: damaged, {hashes}.*back to step 4"):
        second, result = _finished(tmp_path)
    assert (result.steps, result.resumed_from) == (6, 4)
    both = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    assert load_latest(tmp_path / "checkpoints")[0].step == 6


def test_when_all_are_damaged_nothing_is_guessed(tmp_path):
    _finished(tmp_path)
    (tmp_path / "checkpoints" / "step-000004" / "state.json").unlink()
    (tmp_path / "checkpoints" / "step-000006" / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match=r"(?s)all 2 checkpoints are damaged:.*manifest.json.*state.json.*is missing"):
        _finished(tmp_path)


def test_an_interrupted_compilation_goes_on_where_it_was(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    steps, stops = [], [3]
    rate_at = training.learning_rate_at

    def recorded(step, config):
        if step in stops:
            raise Stopped
        steps.append(step)
        return rate_at(step, config)

    def compiled(folder, **options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        x = torch.randn(4, 6, 16)
        config = blora.DistillConfig(steps=5, checkpoint_every=2, learning_rate=1e-2, hidden_weight=0.0)
        return blora.compile(
            net, 0.5, inputs=(x,), train=[x, 2 * x], distill=config, rank_multiple=1, folder=folder, **options
        )

    expected = compiled(tmp_path / "whole")
    monkeypatch.setattr(training, "learning_rate_at", recorded)
    with pytest.raises(Stopped):
        compiled(tmp_path / "run")
    assert steps == [0, 0, 1, 2]  # the first is for the optimizer, before any step
    with pytest.raises(BadInput, match="exists already; resume that run"):
        compiled(tmp_path / "run")
    steps.clear()
    stops.clear()
    found = compiled(tmp_path / "run", resume=True)
    assert steps == [0, 2, 3, 4]
    assert found.plan == expected.plan
    both = zip(expected.module.state_dict().values(), found.module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


def _corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ── The checkpoint folder ────────────────────────────────────────────────────────────────────────────────────────


def _checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"a": torch.arange(3.0), "scalar": torch.tensor(float(step))}, {"note": "x"})


def test_only_the_newest_are_kept_and_read_back(tmp_path):
    for step in (1, 2, 10, 1234567):
        save_checkpoint(tmp_path, _checkpoint(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000010", "step-1234567"]
    found, damaged = load_latest(tmp_path)
    assert damaged == []
    assert (found.step, found.state) == (1234567, {"note": "x"})
    assert torch.equal(found.tensors["a"], torch.arange(3.0))
    assert load_latest(tmp_path / "nowhere") == (None, [])


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, _checkpoint(1), keep=2)

    def full(tensors, path):
        save_file(tensors, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(BadInput, match=r"step-000002: the checkpoint cannot be written \(No space left on device\)"):
        save_checkpoint(tmp_path, _checkpoint(2), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_teacher_of_another_activation_is_another_teacher():
    from copy import deepcopy

    from blora_compiler.offline import fingerprint_of_module

    model = build("llama")
    other = deepcopy(model)
    assert fingerprint_of_module(other) == fingerprint_of_module(model)
    other.config.hidden_act = "relu"
    assert fingerprint_of_module(other) != fingerprint_of_module(model)


def test_a_plan_of_another_budget_is_not_resumed(tmp_path):
    from blora_compiler.budget import Budget
    from blora_compiler.stages import resumed_plan

    net = build("llama")
    plan = blora.make_plan(net, 0.5, metric="latency", device="h200", workload="prefill 8x64")
    timed = replace(plan, fingerprints={**plan.fingerprints, "timed": "measured 1 ms of 1 ms allowed"})
    (tmp_path / "plan.json").write_text(timed.to_json())
    assert resumed_plan(Budget.parse(0.5, "latency"), tmp_path, True).forms == plan.forms
    assert resumed_plan(Budget.parse(0.9, "latency"), tmp_path, True) is None
    # Interrupted between the solver and the clock: what was never timed is not what came of timing.
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert resumed_plan(Budget.parse(0.5, "latency"), tmp_path, True) is None


def test_a_plan_to_resume_is_one_for_the_same_request():
    program = trace(build("llama"))
    profiled = profile(program, [], kind="plain")
    request = stages.Request(Budget.parse(0.5), rank_multiple=4)
    problem, _ = request.of_program("llama", program, profiled)
    plan = solve(problem)
    found = Plan.from_json(replace(plan, fingerprints={**plan.fingerprints, stages.TIMED: "1 ms"}).to_json())
    stages.check_resumed(found, problem)
    changes = {
        "scope": {"scope": "model"}, "excluded": {"rules": {"*.0.*": "exclude"}},
        "rank_multiple": {"rank_multiple": 8}, "workload": {"workload": "prefill 1x64"},
    }  # fmt: skip
    for name, change in changes.items():
        other, _ = replace(request, **change).of_program("llama", program, profiled)
        with pytest.raises(BadInput, match=f"was made for another {name}"):
            stages.check_resumed(found, other)
    other, _ = request.of_program("llama", program, profile(program, [dict(program.inputs)]))
    with pytest.raises(BadInput, match="was made for another damage"):
        stages.check_resumed(found, other)
