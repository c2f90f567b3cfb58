"""Distillation ends exactly at the plan, never trains the teacher, and says what it cannot do."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import blora_compiler.distillation as training
from blora_compiler.data import Batches, InputBatches
from blora_compiler.distillation import DistillConfig, distill, learning_rate_at, retention_at
from blora_compiler.errors import BadInput, DistillationDiverged
from blora_compiler.layers import BranchedLinear
from blora_compiler.objective import Objective, choose_comparison, shared_blocks
from blora_compiler.offline import SHARD, write_teacher_topk

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, initializer_range=0.3, pad_token_id=None, **SIZES)
    return LlamaForCausalLM(config)


def branched(teacher: nn.Module, rank: int = 4, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """A structural copy that shares every tensor but the branches (truncated SVD) and private norm weights."""
    shared = [*teacher.parameters(), *teacher.buffers()]
    tree = copy.deepcopy(teacher, {id(tensor): tensor for tensor in shared})
    for name, module in list(tree.named_modules()):
        owner, _, child = name.rpartition(".")
        if type(module) is nn.Linear and child not in skip:
            left, singular, right = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            # Left in the memory order the SVD gives (columns first): training and resuming must not assume rows.
            b0, a0 = left[:, :rank] * singular[:rank], right[:rank].clone()
            bias = None if module.bias is None else module.bias.detach().clone()
            branch = BranchedLinear(module.weight.detach() - b0 @ a0, a0, b0, bias)
            setattr(tree.get_submodule(owner), child, branch)
        elif type(module).__name__.endswith("Norm") and module.weight is not None:
            module.weight = nn.Parameter(module.weight.detach().clone())
    return tree


def tokens(count: int = 12, length: int = 8) -> torch.Tensor:
    return torch.randint(0, 50, (count, length), generator=torch.Generator().manual_seed(1))


def config(**changes) -> DistillConfig:
    return DistillConfig(**{"steps": 6, "batch": 4, "length": 8, "autocast": "off", "checkpoint_every": 2, **changes})


def run(tree, teacher, settings=None, **options):
    settings = settings or config()
    batches = Batches(tokens(), settings.batch, settings.seed)
    return distill(tree, teacher, batches, settings, **{"progress": False, **options})


def sites(tree: nn.Module) -> dict[str, BranchedLinear]:
    return {name: module for name, module in tree.named_modules() if isinstance(module, BranchedLinear)}


# ── Where it ends ────────────────────────────────────────────────────────────────────────────────────────────────


def test_ends_exactly_at_the_plan():
    teacher = llama()
    tree = branched(teacher)
    retained = "model.layers.1.mlp.down_proj"
    dense = sites(tree)[retained].residual.clone()
    result = run(tree, teacher, retained=frozenset({retained}))
    for name, site in sites(tree).items():
        if name == retained:
            assert float(site.retention) == 1.0
            assert torch.equal(site.residual, dense)
        else:
            assert float(site.retention) == 0.0
            assert site.residual is None
    assert (result.steps, result.resumed_from, result.tokens) == (6, 0, 6 * 4 * 8)
    assert result.comparison == "head"
    assert result.metrics is result.checkpoint is None


def test_the_dense_part_is_gone_before_the_last_stretch():
    teacher = llama()
    tree = branched(teacher)
    seen = []
    run(tree, teacher, on_step=lambda record: seen.append((record["retention"], sites(tree))))
    assert [retention for retention, _ in seen] == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
def test_training_lowers_the_distance_and_leaves_float32_weights(autocast):
    teacher = llama()
    tree = branched(teacher)
    records = []
    settings = config(steps=40, learning_rate=5e-3, retention_fraction=0.0, autocast=autocast)
    run(tree, teacher, settings, on_step=records.append)
    assert sum(r["kl"] for r in records[-5:]) < 0.6 * sum(r["kl"] for r in records[:5])
    assert all(r["hidden"] > 0 for r in records)
    assert {p.dtype for p in tree.parameters()} == {torch.float32}
    assert "forward" not in vars(tree)
    with torch.no_grad():
        assert tree(input_ids=tokens()).logits.dtype == torch.float32
    assert all(not module._forward_hooks for model in (tree, teacher) for module in model.modules())


def test_a_step_without_weight_moves_nothing():
    teacher = llama()
    settings = config(weight_decay=0.0, gradient_clip=1e9, retention_fraction=0.0)
    tree = branched(teacher)
    before = {name: parameter.detach().clone() for name, parameter in tree.named_parameters()}
    run(tree, teacher, settings, loss_weight=lambda step: 0.0)
    assert all(torch.equal(p, before[name]) for name, p in tree.named_parameters() if not name.endswith("retention"))
    # The optimizer divides by the size of what it has seen: only weights that differ between steps make a difference.
    trees = [branched(teacher) for _ in range(3)]
    for tree, weight in zip(trees, (lambda step: 1.0, lambda step: 8.0, lambda step: 1.0 + step), strict=True):
        run(tree, teacher, settings, loss_weight=weight)
    once, eight, rising = (torch.cat([site.A.flatten() for site in sites(tree).values()]) for tree in trees)
    torch.testing.assert_close(once, eight, atol=1e-4, rtol=1e-3)
    assert (once - rising).norm() > 10 * (once - eight).norm()


def test_full_retention_starts_as_the_teacher():
    teacher = llama()
    records = []
    run(branched(teacher), teacher, config(retention_fraction=0.9), on_step=records.append)
    assert records[0]["kl"] < 1e-6
    assert records[0]["hidden"] < 1e-9
    assert records[-1]["kl"] > 1e-3


# ── The teacher ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_teacher_flags_and_random_state_stay_as_they_were():
    teacher = llama().train()
    tree = branched(teacher).train()
    next(teacher.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    flags = [p.requires_grad for p in teacher.parameters()]
    state = torch.get_rng_state()
    private = {name: p.detach().clone() for name, p in tree.named_parameters()}
    run(tree, teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert all(p.grad is None for model in (tree, teacher) for p in model.parameters())
    assert teacher.training
    assert tree.training
    assert torch.equal(torch.get_rng_state(), state)
    moved = {name for name, p in tree.named_parameters() if not torch.equal(private[name], p)}
    trainable = {name for name in private if name.endswith((".A", ".B", ".gates", "norm.weight", "retention"))}
    assert moved == trainable


def test_writing_to_the_teacher_is_caught():
    teacher = llama()

    def spoil(_record):
        with torch.no_grad():
            teacher.lm_head.weight.mul_(2)

    with pytest.raises(AssertionError, match=r"training wrote to the teacher: \['lm_head.weight'\]"):
        run(branched(teacher), teacher, on_step=spoil)


def test_a_parameter_in_the_teachers_memory_is_caught():
    teacher = llama()
    tree = branched(teacher)
    tree.model.norm.weight = nn.Parameter(teacher.model.norm.weight.data)
    with pytest.raises(AssertionError, match=r"model\.norm\.weight would train the teacher's memory"):
        run(tree, teacher)


# ── Schedules and settings ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_retention_falls_from_one_to_exactly_zero(shape, fraction, steps):
    settings = config(steps=steps, retention_fraction=fraction, retention_shape=shape)
    values = [retention_at(step, settings) for step in range(steps)]
    end = settings.retention_steps
    assert values[-1] == 0.0
    assert all(value > 0 for value in values[:end])
    assert values[end:] == [0.0] * (steps - end)
    assert values == sorted(values, reverse=True)
    assert values[0] == (1.0 if end else 0.0)


def test_learning_rate_warms_up_and_falls_to_zero():
    settings = config(steps=100, warmup_fraction=0.1, learning_rate=2.0)
    rates = [learning_rate_at(step, settings) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert learning_rate_at(0, config(steps=1, warmup_fraction=0.0)) == 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be a whole number of at least 1"),
        ({"batch": 1.5}, "batch is 1.5; it must be a whole number"),
        ({"checkpoint_every": True}, "checkpoint_every is True"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"length": 1}, "length is 1; it must be a whole number of at least 2"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be a number above 0"),
        ({"gradient_clip": float("inf")}, "gradient_clip is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be a number of at least 0"),
        ({"warmup_fraction": 1.0}, "warmup_fraction is 1.0; it must be at least 0 and below 1"),
        ({"retention_fraction": 1.0}, "retention_fraction is 1.0; it must be at least 0 and below 1"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); it must be two numbers"),
        ({"retention_shape": "step"}, "retention_shape is 'step'; it must be 'linear' or 'cosine'"),
        ({"autocast": "fp16"}, "autocast is 'fp16'; it must be 'auto', 'bfloat16' or 'off'"),
        ({"teacher_topk": 0}, "teacher_topk is 0"),
        ({"kl_weight": 0, "hidden_weight": 0}, "all 0, so nothing would be trained"),
        ({"teacher_topk": 5, "hidden_weight": 1.0}, "needs the teacher's block outputs; set hidden_weight=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        config(**changes)


def test_settings_are_equal_after_json():
    settings = config(betas=(0.8, 0.99), retention_shape="cosine", teacher_topk=None)
    assert DistillConfig.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(BadInput, match=r"unknown distillation settings \['epochs'\]; known are autocast, batch"):
        DistillConfig.from_json({"epochs": 3})


# ── Metrics and folders ──────────────────────────────────────────────────────────────────────────────────────────


def test_metrics_keep_relaxed_and_executable_apart(tmp_path, capsys):
    teacher = llama()
    retained = "model.layers.0.mlp.up_proj"

    def cost(retention):
        assert retention[retained] == 1.0
        values = list(retention.values())
        return sum(values) / len(values), sum(value > 0 for value in values) / len(values)

    result = run(
        branched(teacher), teacher, folder=tmp_path / "new" / "run", retained=frozenset({retained}),
        executable_cost=cost, progress=True,
    )  # fmt: skip
    records = training.read_metrics(result.metrics)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["executable"] for record in records] == pytest.approx([1, 1, 1, 1 / 14, 1 / 14, 1 / 14])
    assert records[1]["relaxed"] == pytest.approx((13 * 2 / 3 + 1) / 14)
    assert set(records[0]) == {
        "step", "loss", "kl", "hidden", "label", "lr", "gradient_norm", "retention", "relaxed", "executable",
        "tokens", "seconds",
    }  # fmt: skip
    assert records[-1]["loss"] == result.loss
    assert result.checkpoint.name == "step-000006"
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "distill" in shown.err
    assert "budget 7.1%" in shown.err


def test_an_earlier_run_is_not_overwritten_unasked(tmp_path):
    teacher = llama()
    run(branched(teacher), teacher, folder=tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(BadInput, match=r"metrics.jsonl exists already; resume that run, overwrite it, or choose"):
        run(branched(teacher), teacher, folder=tmp_path)
    with pytest.raises(BadInput, match="exclude each other"):
        run(branched(teacher), teacher, folder=tmp_path, resume=True, overwrite=True)
    with pytest.raises(BadInput, match="resume needs the folder"):
        run(branched(teacher), teacher, resume=True)
    again = run(branched(teacher), teacher, config(steps=2), folder=tmp_path, overwrite=True)
    assert [record["step"] for record in training.read_metrics(again.metrics)] == [1, 2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert (tmp_path / "plan.json").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    teacher = llama()
    with pytest.raises(BadInput, match=r"file/run: cannot be written \(.*\); choose another folder"):
        run(branched(teacher), teacher, folder=tmp_path / "file" / "run")


def test_a_tree_without_anything_to_train_is_refused():
    teacher = llama()
    with pytest.raises(BadInput, match="0 parameters of this tree can train"):
        run(teacher, teacher)
    with pytest.raises(BadInput, match=r"retained names \['model.nowhere'\] are no branched sites"):
        run(branched(teacher), teacher, retained=frozenset({"model.nowhere"}))


def test_a_distributed_launch_is_refused(monkeypatch):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", property(lambda _self: 2))
    teacher = llama()
    with pytest.raises(BadInput, match="runs in 1 process but was launched in 2"):
        run(branched(teacher), teacher)


# ── Divergence ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("broken_step", [0, 4])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, broken_step):
    teacher = llama()
    tree = branched(teacher)
    weights: dict[str, torch.Tensor] = {}

    def spoil(record):
        if record["step"] == broken_step:
            weights.update({name: p.detach().clone() for name, p in tree.named_parameters()})
            tree.model.register_forward_hook(_nan_output)

    if broken_step == 0:
        spoil({"step": 0})
    kept = "no checkpoint was written yet" if broken_step == 0 else "last good checkpoint is .*step-000004"
    with pytest.raises(DistillationDiverged, match=f"loss of step {broken_step + 1} is nan.*{kept}.*Try a lower"):
        run(tree, teacher, config(hidden_weight=0.0), folder=tmp_path, on_step=spoil)
    moved = {name for name, p in tree.named_parameters() if not torch.equal(weights[name], p)}
    assert all(name.endswith(".retention") for name in moved)
    if broken_step:
        checkpoint = training.load_latest(tmp_path / "checkpoints")[0]
        assert checkpoint.step == 4
        assert all(torch.isfinite(t).all() for t in checkpoint.tensors.values() if t.is_floating_point())


def _nan_output(_module, _inputs, output):
    output.last_hidden_state = output.last_hidden_state * float("nan")
    return output


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    teacher = llama()
    tree = branched(teacher)
    tree.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DistillationDiverged, match=r"gradient norm of step 1 is (inf|nan).*autocast='off'"):
        run(tree, teacher)


# ── What is compared ─────────────────────────────────────────────────────────────────────────────────────────────


def gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    small = {"vocab_size": 50, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.5}
    return Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=1.0, attn_implementation="eager", **small, **SIZES))


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=50, **SIZES))


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SIZES))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4))


IDS = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])}


def drawn(*shape: int) -> torch.Tensor:
    """The same numbers whenever this file is imported."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CASES = {
    "llama": (llama, IDS, "head", ("lm_head",)),
    "llama, compressed head": (llama, IDS, "logits", ()),
    "gemma2, soft-capped": (gemma2, IDS, "logits", ("lm_head",)),
    "bert": (bert, IDS, "outputs", ()),
    "vit": (vit, {"pixel_values": drawn(2, 3, 16, 16)}, "outputs", ("classifier",)),
    "plain": (plain, {"input": drawn(3, 6)}, "outputs", ()),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_model_trains(case):
    make, inputs, comparison, skip = CASES[case]
    teacher = make()
    tree = branched(teacher, rank=2, skip=skip)
    assert choose_comparison(tree.eval(), teacher.eval(), inputs) == comparison
    source = InputBatches([inputs], seed=0)
    hidden_weight = 0.1 if shared_blocks(tree, teacher) else 0.0
    assert (hidden_weight == 0.0) == (case == "plain")
    settings = config(steps=12, retention_fraction=0.0, learning_rate=5e-3, hidden_weight=hidden_weight)
    records = []
    result = distill(tree, teacher, source, settings, progress=False, on_step=records.append)
    assert result.comparison == comparison
    assert records[-1]["loss"] < 0.95 * records[0]["loss"]


def test_the_head_path_and_the_logits_path_agree():
    teacher, inputs = llama().eval(), IDS
    tree = branched(teacher).eval()
    for site in sites(tree).values():
        site.retention.data.zero_()
    objectives = [Objective(tree, teacher, kind, temperature=1.5, hidden_weight=0.3) for kind in ("head", "logits")]
    for one, other in zip(*(objective(inputs) for objective in objectives), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_padding_does_not_count():
    teacher = llama().eval()
    tree = branched(teacher).eval()
    for site in sites(tree).values():
        site.retention.data.zero_()
    objective = Objective(tree, teacher, "head", hidden_weight=1.0)
    changed = IDS["input_ids"].clone()
    changed[0, 4] = 33
    with torch.no_grad():
        one, other = objective(IDS), objective({**IDS, "input_ids": changed})
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=0.0)


def test_block_matching_without_blocks_is_refused():
    teacher = plain()
    with pytest.raises(BadInput, match=r"hidden_weight is 0\.1 but 0 blocks of this model hold a branched"):
        distill(branched(teacher), teacher, InputBatches([{"input": torch.randn(3, 6)}], 0), config(), progress=False)


def test_a_model_without_floating_outputs_is_refused():
    class Chooser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 4)

        def forward(self, x):
            return self.up(x).argmax(-1)

    teacher = Chooser()
    source = InputBatches([{"x": torch.randn(3, 6)}], 0)
    with pytest.raises(BadInput, match="returns Tensor with 0 floating tensors; nothing can be matched"):
        distill(branched(teacher), teacher, source, config(hidden_weight=0.0), progress=False)


# ── Stored teacher logits ────────────────────────────────────────────────────────────────────────────────────────


def test_stored_logits_of_the_whole_vocabulary_train_like_the_teacher(tmp_path):
    teacher = llama()
    # Without a dense part from the first step on: with one, the first gradients are rounding errors, which the
    # optimizer makes as large as any others, and they differ from machine to machine.
    settings = config(hidden_weight=0.0, temperature=2.0, retention_fraction=0.0)
    live, stored = [], []
    run(branched(teacher), teacher, settings, on_step=live.append)
    stored_settings = dataclasses.replace(settings, teacher_topk=50)
    run(branched(teacher), teacher, stored_settings, folder=tmp_path, on_step=stored.append)
    assert [r["kl"] for r in stored] == pytest.approx([r["kl"] for r in live], rel=1e-3, abs=1e-6)


def test_stored_logits_are_continued_and_checked(tmp_path):
    teacher = llama().eval()
    sequences = tokens(SHARD + 3)
    store = write_teacher_topk(teacher, sequences, 5, tmp_path)
    shards = sorted(tmp_path.glob("shard-*.safetensors"))
    assert len(shards) == 2
    first_written = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    write_teacher_topk(teacher, sequences, 5, tmp_path)
    assert shards[0].stat().st_mtime_ns == first_written
    assert shards[1].exists()

    rows = torch.tensor([SHARD + 1, 0])
    values, indices, rest = store.read(rows)
    with torch.no_grad():
        logits = teacher(input_ids=sequences[rows]).logits
    torch.testing.assert_close(values, logits.topk(5).values)
    assert torch.equal(indices, logits.topk(5).indices)
    torch.testing.assert_close(torch.logaddexp(values.logsumexp(-1), rest), logits.logsumexp(-1))

    for changed, message in (
        ({"k": 6}, "have k 5, this run needs 6"),
        ({"temperature": 2.0}, "have temperature 1.0, this run needs 2.0"),
        ({"sequences": sequences + 1}, "have sequences '[0-9a-f]{64}', this run needs"),
    ):
        with pytest.raises(BadInput, match=message):
            write_teacher_topk(**{"model": teacher, "sequences": sequences, "k": 5, "folder": tmp_path, **changed})
    (tmp_path / "description.json").write_text("{")
    with pytest.raises(BadInput, match=r"description.json: damaged .*remove the folder"):
        write_teacher_topk(teacher, sequences, 5, tmp_path)


def test_stored_logits_need_a_folder_and_sequences():
    teacher = llama()
    with pytest.raises(BadInput, match="teacher_topk=5 stores logits of token sequences in the run's folder"):
        run(branched(teacher), teacher, config(teacher_topk=5, hidden_weight=0.0))


# ── Timing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_auto_precision_takes_what_was_faster(monkeypatch):
    teacher = llama()
    for cast, full in ((1.0, 2.0), (2.0, 1.0)):
        times = iter([cast, full])
        monkeypatch.setattr(training, "_best_time", lambda *_, times=times: next(times))
        assert run(branched(teacher), teacher, config(steps=1, autocast="auto")).autocast == (cast < full)


def test_the_learning_rate_goes_with_the_root_of_the_damage():
    at_a_quarter, at_a_half = training.learning_rate_for(0.31, 2048), training.learning_rate_for(0.31 / 4, 2048)
    assert at_a_quarter == pytest.approx(1e-3)
    assert at_a_half == pytest.approx(5e-4)
    assert training.learning_rate_for(10.0, 2048) == 1e-3
    assert training.learning_rate_for(0.0, 2048) == 1e-4
    assert training.learning_rate_for(0.31, 512) == pytest.approx(5e-4)


def test_training_on_embeddings_brings_their_directions_together():
    from blora_compiler.losses import pooled_distance

    teacher = bert()
    tree = branched(teacher, rank=2)
    settings = config(
        steps=30, retention_fraction=0.0, learning_rate=5e-3, kl_weight=0.0, hidden_weight=0.0, pooled_weight=1.0
    )
    losses = []
    distill(
        tree, teacher, InputBatches([IDS], seed=0), settings, progress=False,
        on_step=lambda record: losses.append(record["loss"]),
    )  # fmt: skip
    with torch.no_grad():
        sides = [model.eval()(**IDS).last_hidden_state for model in (tree, teacher)]
    distance = float(pooled_distance(*sides, IDS.get("attention_mask")))
    assert distance < 0.7 * losses[0]
    assert losses[-1] == pytest.approx(distance, rel=0.5)


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [(llama, IDS, "has a vocabulary"), (plain, {"input": torch.randn(3, 6)}, "needs an output of shape")],
)
def test_embeddings_are_only_compared_where_there_are_any(make, inputs, message):
    teacher = make()
    settings = config(hidden_weight=0.0, pooled_weight=1.0, retention_fraction=0.0)
    with pytest.raises(BadInput, match=message):
        distill(branched(teacher), teacher, InputBatches([inputs], 0), settings, progress=False)
