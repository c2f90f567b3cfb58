"""What callers get wrong, each with the message they see, and what must survive compile, save and load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blora_compiler as blora
from blora_compiler import family, saving
from blora_compiler.artifact import MANIFEST
from blora_compiler.calibration import _given, evaluation_sequences, training_batches
from blora_compiler.errors import BadInput
from blora_compiler.folders import write_text
from blora_compiler.graph import main_output
from blora_compiler.layers import BranchedLinear
from blora_compiler.report import achieved
from blora_compiler.source import load_source
from tests.models import build, example_inputs

IDS = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(0))
SHORT = blora.DistillConfig(steps=2, batch=2, length=8)


def compiled(model: nn.Module, budget: float = 0.5, **options: Any) -> blora.Compiled:
    return blora.compile(model, budget, rank_multiple=1, **options)


def assert_trained(result: blora.Compiled, steps: int) -> None:
    """The stage ran, and what every training moves, norms and biases, is no longer the teacher's."""
    (record,) = (record for record in result.records if record.stage == "distill")
    assert record.summary.startswith(f"{steps} steps")
    teacher = dict(result.source.model.named_parameters())
    kept = {name: p for name, p in result.module.named_parameters() if p.ndim == 1 and name in teacher}
    assert kept and not all(torch.equal(p, teacher[name]) for name, p in kept.items())


class TakesFlag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        return self.layer(x) * (2 if double else 1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.second = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.out = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.out(x + self.second(x))


def with_hooked_weight() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(32, 32)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"calibration": IDS, "damage": "whitend"}, r"got 'whitend'; did you mean 'whitened'"),
        ("llama", {"calibration": IDS, "evaluation": IDS + 1000}, r"evaluation\[0\].* 1000 to 1127, .* 0 to 127"),
        ("bert", {"evaluation": IDS}, r"BertModel generates no text, so it has no perplexity"),
        (
            "twice",
            {"inputs": example_inputs("twice"), "calibration": [torch.ones(2, 8, 48).long()]},
            r"batch 0: x is torch.int64, but the example is torch.float32",
        ),
    ],
)
def test_data_that_does_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compiled(build(name), **options)


def test_an_input_that_is_no_tensor_is_not_dropped() -> None:
    with pytest.raises(BadInput, match="example input 'double' is bool, and only tensors can vary"):
        compiled(TakesFlag(), inputs={"x": torch.randn(2, 64), "double": True})


def test_a_module_that_cannot_be_copied() -> None:
    with pytest.raises(BadInput, match="Sequential cannot be copied: Only Tensors created explicitly"):
        compiled(with_hooked_weight(), inputs=(torch.randn(2, 32),))


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)  # type: ignore[operator]
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadInput, match=r"the weights of .* cannot be loaded"):
        compiled(str(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("marker", [saving.DESCRIPTION, MANIFEST, family.DESCRIPTION])
def test_what_was_written_here_is_no_model_to_start_from(marker: str, tmp_path: Path) -> None:
    """transformers would load it with random weights wherever a name does not fit."""
    build("llama").save_pretrained(tmp_path)
    assert blora.make_plan(tmp_path, 0.5, damage="plain").fraction <= 0.5
    (tmp_path / marker).write_text("{}", encoding="utf-8")
    for call in (lambda: blora.compile(tmp_path, 0.5), lambda: blora.whatif(tmp_path, [0.5])):
        with pytest.raises(BadInput, match="give the model that it was made of"):
            call()


@pytest.mark.parametrize("text", ['{"hidden_size": 64}', "{"])
def test_a_config_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="no model can be loaded from"):
        blora.make_plan(tmp_path, 0.5)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    with pytest.raises(BadInput, match="cannot write"):
        write_text(tmp_path / "file" / "plan.json", "{}")
    with pytest.raises(BadInput, match="cannot write"):
        compiled(build("llama"), calibration=IDS, folder=tmp_path / "file" / "run")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    result = compiled(build("llama"), calibration=IDS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(BadInput, match="nothing was left there, free some space"):
            result.save(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not any(tmp_path.iterdir())


def test_an_iterator_of_batches_is_read_more_than_once() -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        yield {"input_ids": IDS}

    result = compiled(build("llama"), train=batches(), distill=SHORT)
    assert result.plan.fraction <= 0.5
    assert_trained(result, 2)


def test_settling_leaves_the_program_it_was_given_alone() -> None:
    result = compiled(build("llama"), calibration=IDS)
    program = blora.trace(build("llama"))
    profiled = blora.profile(program, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}])
    branched, _ = blora.insert(program, result.plan.forms, profiled)
    blora.settle(branched, result.plan.forms)
    branches = [module for module in branched.tree.modules() if isinstance(module, BranchedLinear)]
    assert branches and all(float(branch.retention) == 1.0 for branch in branches)


def test_a_tied_head_that_stays_dense_stays_tied_through_training() -> None:
    result = compiled(build("llama"), train=IDS, distill=SHORT, rules={"lm_head": "dense"})
    assert_trained(result, 2)
    module: Any = result.module
    assert module.lm_head.weight is module.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "vit", "encoder", "twice"])
def test_parameters_counted_are_those_that_are_there(name: str) -> None:
    result = compiled(build(name), inputs=example_inputs(name))
    counted = achieved(result)["model"]["params"]
    assert counted["dense"] == sum(p.numel() for p in result.source.model.parameters())
    assert counted["compressed"] == sum(p.numel() for p in result.module.parameters())


def test_a_removed_branch_of_a_plain_module_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = compiled(Residual(), 0.15, inputs=(torch.randn(3, 10, 32),))
    assert blora.Removed() in result.plan.forms.values()
    loaded = blora.load(result.save(tmp_path / "model"), model=Residual())
    x = torch.randn(2, 5, 32)
    assert torch.equal(main_output(loaded.module(x)), main_output(result.module(x)))


def test_a_report_of_an_edited_plan_without_an_export() -> None:
    plan = compiled(build("bert")).plan
    edited = blora.Plan.from_json(plan.to_json())
    text = str(compiled(build("bert"), plan=edited).report())
    assert "output distance" in text and "gap unknown (edited plan)" in text


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_double_precision_modules_and_data_are_taken():
    torch.manual_seed(0)
    x = torch.randn(8, 4, 32).double()
    for net in (_Plain().double(), _Plain()):
        found = blora.compile(net, 0.5, inputs=(x,), calibration=[{"x": x}])
        assert found.module(x.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: blora.make_plan(build("llama"), 0.5, workload=3), "workload 3 is no workload and no text"),
        (lambda: blora.whatif(build("llama").config, [0.5], workload=3), "workload 3 is no workload and no text"),
        (lambda: blora.whatif(build("llama").config, [0.5], device=3), "device 3 is no name and no path"),
        (lambda: blora.make_plan(build("llama"), "0.25..0.5"), "is a range, which families have"),
        (
            lambda: blora.make_plan(build("llama"), 0.5, damage="x"),
            "damage is measured by two-sided, whitened, plain, prior, got 'x'",
        ),
        (lambda: blora.load(__file__), "test_bad_input.py is a file; name the folder of a saved model"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(call: Callable[[], Any], sentence: str):
    with pytest.raises(BadInput) as caught:
        call()
    assert sentence in str(caught.value)


def test_a_plan_on_shapes_alone_takes_no_data():
    with pytest.raises(BadInput, match="has no weights to measure the damage of"):
        blora.make_plan(build("llama").config, 0.5, calibration=IDS)


def test_half_precision_data_of_a_half_precision_module_is_taken():
    """The teacher is a float32 copy, so its data has to come along."""
    torch.manual_seed(0)
    x = torch.randn(8, 4, 32).half()
    found = blora.compile(_Plain().half(), 0.5, inputs=(x,), calibration=[{"x": x}])
    assert found.module(x.float()).dtype == torch.float32
    with pytest.raises(BadInput, match=r"x is torch.int64, but the example is torch.float32"):
        blora.compile(_Plain(), 0.5, inputs=(x,), calibration=[{"x": x.long()}])


def test_a_batch_that_masks_everything_is_named():
    model = build("bert")
    ids = torch.randint(5, 60, (4, 8))
    batches = [{"input_ids": ids, "attention_mask": mask} for mask in (torch.ones_like(ids), torch.zeros_like(ids))]
    with pytest.raises(BadInput, match="batch 1: its attention_mask is 0 everywhere"):
        blora.compile(model, 0.5, calibration=batches)


class _Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(50, 32), nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids))


@pytest.mark.parametrize("given", ["inputs", "calibration"])
def test_token_ids_of_a_plain_module_are_enough(given: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (16, 6))
    options = {"inputs": (ids,)} if given == "inputs" else {"calibration": ids}
    assert compiled(_Ids(), **options).plan.fraction <= 0.5


def test_text_for_a_model_that_reads_more_than_text_is_refused() -> None:
    from blora_compiler.calibration import _fill_all
    from blora_compiler.tracing import trace

    model = build("bert")
    ids = torch.randint(5, 60, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with pytest.raises(BadInput, match="was traced with token_type_ids too"):
        _fill_all(trace(model, inputs), "text")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda source: evaluation_sequences(source, 17), r"evaluation takes a text file, .*; got int"),
        (lambda source: _given(source, 17, "train"), "train takes a text file, texts, token ids or batches, got int"),
        (
            lambda source: training_batches(None, replace(source, model=build("bert")), None, SHORT),
            "cannot make its own training data; pass train=batches",
        ),
    ],
)
def test_data_that_are_none_say_what_is_taken(read: Callable[[Any], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read(load_source(build("llama")))


def test_windows_one_token_longer_than_the_positions_are_scored() -> None:
    model = build("gpt2")
    windows = torch.randint(0, 128, (2, model.config.n_positions + 1))
    assert blora.evaluate.perplexity_and_kl(model, None, windows).perplexity > 1


def test_a_tree_that_is_its_graph_loads_without_a_removed_branch(tmp_path: Path) -> None:
    class Functional(Residual):
        """Its last product is no module's, so that the graph is what gets compressed."""

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            return nn.functional.linear(x + self.second(x), self.out.weight)

    torch.manual_seed(0)
    result = compiled(Functional(), 0.15, inputs=(torch.randn(3, 10, 32),))
    assert result.program.tree_is_graph and blora.Removed() in result.plan.forms.values()
    loaded = blora.load(result.save(tmp_path / "model"), model=Functional())
    x = torch.randn(2, 5, 32)
    assert torch.equal(main_output(loaded.module(x)), main_output(result.module(x)))


def test_modes_of_submodules_are_put_back() -> None:
    from blora_compiler.data import sample_sequences
    from blora_compiler.probes import in_eval_mode

    model = build("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    sample_sequences(model, 1, 3, seed=0)
    assert [module.training for module in model.modules()] == before


def test_more_stored_logits_than_there_are_is_refused(tmp_path: Path) -> None:
    from blora_compiler.offline import write_teacher_topk

    with pytest.raises(BadInput, match="129 logits a token are to be stored, and the vocabulary has 128"):
        write_teacher_topk(build("llama"), IDS, 129, tmp_path / "topk")


def test_the_rate_knows_the_tokens_that_a_step_has() -> None:
    from blora_compiler.calibration import tokens_of_step
    from blora_compiler.data import Batches, InputBatches

    assert tokens_of_step(Batches(IDS, 4, 0)) == 4 * 16
    assert tokens_of_step(InputBatches([{"x": torch.randn(2, 5, 32)}], 0)) == 10


def test_a_student_of_a_half_precision_module_loads_in_the_precision_it_was_trained_in(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).half()
    c = blora.compile(net, 0.5, inputs=(torch.randn(4, 16).half(),), rank_multiple=1)
    c.save(tmp_path / "small")
    loaded = blora.load(tmp_path / "small", model=net)
    x = torch.randn(3, 16)
    torch.testing.assert_close(loaded(x), c.module(x))
    assert next(net.parameters()).dtype == torch.float16


class Scorer(nn.Module):
    """A language model whose only argument is not called `input_ids`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 50)

    def forward(self, idx: Tensor) -> Tensor:
        return self.out(torch.relu(self.mix(self.embed(idx))))


def test_token_ids_train_a_plain_module_whatever_its_argument_is_called() -> None:
    ids = torch.randint(0, 50, (8, 6))
    c = compiled(Scorer(), train=ids, inputs=(ids[:2],), distill=blora.DistillConfig(steps=2, batch=2))
    assert_trained(c, 2)
    assert c.module(ids).shape == (8, 6, 50)


class ListInList(nn.Module):
    """Layers as lists of parts: the inner lists are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.layers:
            x = x + second(torch.relu(first(x)))
        return x


def test_blocks_in_lists_of_lists_are_matched() -> None:
    x = torch.randn(4, 6, 16)
    c = compiled(ListInList(), train=[x], inputs=(x,), distill=blora.DistillConfig(steps=1, hidden_weight=0.5))
    assert_trained(c, 1)
    assert "without the hidden-state term" not in str(c.report())
    assert c.module(x).shape == x.shape


class WithLoss(nn.Module):
    """Returns a number beside its output, as models with an auxiliary loss do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        return self.b(torch.relu(h)), h.square().mean()


def test_single_numbers_among_the_outputs_are_no_outputs() -> None:
    x = torch.randn(4, 6, 16)
    c = compiled(WithLoss(), train=[x], inputs=(x,), distill=blora.DistillConfig(steps=1))
    assert_trained(c, 1)
    assert c.module(x)[0].shape == x.shape


def test_calibration_data_that_are_no_numbers_are_refused() -> None:
    x = torch.randn(4, 6, 16)
    x[1, 2, 3] = float("nan")
    with pytest.raises(BadInput, match="calibration data give NaN or infinite values"):
        compiled(WithLoss(), calibration=[x], inputs=(torch.randn(2, 6, 16),))


def test_ids_beyond_the_positions_are_refused_by_name() -> None:
    ids = torch.randint(0, 100, (4, 300))
    for name in ("train", "calibration"):
        with pytest.raises(BadInput, match="has 300 tokens a sequence, the model 128 positions"):
            compiled(build("gpt2"), **{name: ids})


def test_an_earlier_run_in_the_folder_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "metrics.jsonl").write_text("{}\n")
    records: list[Any] = []
    with pytest.raises(BadInput, match="exists already; resume that run"):
        compiled(build("llama"), train=IDS, distill=SHORT, folder=tmp_path, on_record=records.append)
    assert records == [] and not (tmp_path / "plan.json").exists()


def test_measures_of_weights_are_refused_without_any() -> None:
    with pytest.raises(BadInput, match="has no weights, which damage='whitened' is measured on"):
        blora.make_plan(build("llama").config, 0.5, damage="whitened")
