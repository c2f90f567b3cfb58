"""Each baseline keeps what it says, trains what it says, and leaves the teacher as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.baselines import (
    AdaptedLinear,
    Start,
    channel_scores,
    dense_control,
    depth_pruning,
    kept_fraction,
    kl_to,
    lora_distillation,
    plain_svd_uniform,
    projections,
    train,
    uniform_rank_distillation,
    uniform_ranks,
    whitened_lora_recovery,
    whitened_svd_uniform,
    width_pruning,
)
from blora_compiler.data import Batches, fingerprint_of_tensors
from blora_compiler.distillation import DistillConfig, distill
from blora_compiler.errors import BadInput
from blora_compiler.graph import Program
from blora_compiler.layers import FactoredLinear
from blora_compiler.profiling import Profile, profile
from blora_compiler.source import load_source
from blora_compiler.tracing import trace
from blora_compiler.values import Site

LAYERS, HIDDEN, CHANNELS, HEADS, KV_HEADS = 4, 64, 160, 4, 2
ATTENTION = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2  # parameters a block; two query heads read one key
BLOCK = ATTENTION + 3 * HIDDEN * CHANNELS
CONFIG = DistillConfig(
    steps=3, batch=4, length=12, learning_rate=1e-2, hidden_weight=0.0, retention_fraction=0.0, autocast="off"
)


def llama(seed: int = 0) -> LlamaForCausalLM:
    """A tiny Llama in eval mode whose random weights are large enough to matter, biases included."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=CHANNELS, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=96, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.15, attention_bias=True, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def tokens(count: int = 16, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Setting:
    """What baselines are made from."""

    teacher: nn.Module
    program: Program
    plain: Profile
    whitened: Profile
    sequences: Tensor


@pytest.fixture(scope="module")
def setting() -> Setting:
    teacher = load_source(llama()).model
    program = trace(teacher)
    sequences = tokens()
    batches = [{"input_ids": sequences, "attention_mask": torch.ones_like(sequences)}]
    profiles = {kind: profile(program, batches, kind=kind) for kind in ("plain", "whitened")}
    return Setting(teacher, program, profiles["plain"], profiles["whitened"], sequences)


Row = Callable[[Setting, float], Start]
ROWS: dict[str, Row] = {
    "plain_svd_uniform": lambda s, budget: plain_svd_uniform(s.teacher, s.program, s.plain, budget),
    "whitened_svd_uniform": lambda s, budget: whitened_svd_uniform(s.teacher, s.program, s.whitened, budget),
    "whitened_lora_recovery": lambda s, budget: whitened_lora_recovery(s.teacher, s.program, s.whitened, budget),
    "uniform_rank_distillation": lambda s, budget: uniform_rank_distillation(
        s.teacher, s.program, s.whitened, budget
    ),
    "depth_pruning": lambda s, budget: depth_pruning(s.teacher, s.sequences, budget),
    "width_pruning": lambda s, budget: width_pruning(s.teacher, s.sequences, budget),
    "lora_distillation": lambda s, budget: lora_distillation(s.teacher),
    "dense_control": lambda s, budget: dense_control(s.teacher),
}
UNTRAINED = ("plain_svd_uniform", "whitened_svd_uniform")
UNCOMPRESSED = ("lora_distillation", "dense_control")
TRAINED = tuple(name for name in ROWS if name not in UNTRAINED)
COMPRESSING = tuple(name for name in ROWS if name not in UNCOMPRESSED)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_same(left: Tensor, right: Tensor) -> None:
    assert float((left - right).abs().max()) <= 1e-4 * float(right.abs().max())


@pytest.fixture(autouse=True)
def _teacher_as_it_was(setting: Setting) -> Iterator[None]:
    def state() -> tuple[str, dict, list[int], list[bool]]:
        indices = [block.self_attn.layer_idx for block in setting.teacher.model.layers]
        flags = [parameter.requires_grad for parameter in setting.teacher.parameters()]
        config = copy.deepcopy(setting.teacher.config.to_dict())
        return fingerprint_of_tensors(setting.teacher.state_dict().items()), config, indices, flags

    before = state()
    yield
    assert state() == before
    assert all(not module._forward_pre_hooks for module in setting.teacher.modules())


# ── What is kept ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("name", COMPRESSING)
def test_keeps_at_most_the_budget_and_nearly_all_of_it(setting, name, budget):
    start = ROWS[name](setting, budget)
    final = start.finish(start.tree)
    kept = sum(p.numel() for name, p in final.named_parameters() if "_proj" in name and p.dim() == 2)
    assert start.fraction == kept_fraction(final, setting.teacher) == kept / (LAYERS * BLOCK)
    # The step that fits no more: a multiple of channels in every block, a block, or a rank at the smallest projection
    # that is not held by its break-even, as those of 64 x 32 are at rank 16.
    step = {"width_pruning": 8 * 3 * HIDDEN * LAYERS, "depth_pruning": BLOCK}.get(name, 8 * (HIDDEN + HIDDEN))
    assert budget - step / (LAYERS * BLOCK) < start.fraction <= budget
    assert start.note


@pytest.mark.parametrize("name", UNCOMPRESSED)
def test_rows_without_compression_keep_everything(setting, name):
    assert ROWS[name](setting, 1.0).fraction == 1.0


def test_an_unfinished_tree_has_no_cost(setting):
    with pytest.raises(BadInput, match="q_proj is a AdaptedLinear, which is no final form"):
        kept_fraction(lora_distillation(setting.teacher).tree, setting.teacher)


def sites(*shapes: tuple[int, int]) -> list[Site]:
    return [
        Site(f"s{i}", f"s{i}.weight", into, out, rows=("tokens",), group=f"g{i}")
        for i, (into, out) in enumerate(shapes)
    ]


def test_ranks_keep_the_same_share_at_every_site():
    # Shares of a half are ranks 80, 53.3 and 117.9. Rounding to 80, 48 and 112 leaves 12288 of 245760: enough for one
    # more multiple at each small site (3840), then for none at the large one (9728), then for one more small one.
    shapes = [(320, 320), (320, 160), (320, 160), (320, 896)]
    ranks = uniform_ranks(sites(*shapes), 0.5)
    assert ranks == {"s0": 80, "s1": 64, "s2": 56, "s3": 112}
    # Small sites cannot go below one multiple, and do not reach break-even (21.3 for 64 x 32).
    assert uniform_ranks(sites((64, 32), (320, 320)), 0.06) == {"s0": 8, "s1": 8}
    assert uniform_ranks(sites((64, 32), (320, 320)), 1.0) == {"s0": 16, "s1": 152}


def test_budgets_below_the_smallest_step_are_refused(setting):
    with pytest.raises(BadInput, match=r"rank 8 at every site keeps 0\.2\d+ of the cost, the budget is 0\.1"):
        whitened_svd_uniform(setting.teacher, setting.program, setting.whitened, 0.1)
    with pytest.raises(BadInput, match=r"one of 4 blocks keeps more than the budget of 0\.2; raise"):
        depth_pruning(setting.teacher, setting.sequences, 0.2)
    with pytest.raises(BadInput, match=r"1 of 2 key/value groups and 8 MLP channels keep 0\.1786 of the cost"):
        width_pruning(setting.teacher, setting.sequences, 0.17)
    with pytest.raises(BadInput, match=r"2 of 2 key/value groups and 8 MLP channels keep 0\.3214 of the cost"):
        width_pruning(setting.teacher, setting.sequences, 0.25, kv_groups=2)


def test_a_profile_of_another_kind_is_refused(setting):
    with pytest.raises(BadInput, match="the profile is of kind 'plain', this baseline needs 'whitened'"):
        uniform_rank_distillation(setting.teacher, setting.program, setting.plain, 0.5)
    with pytest.raises(BadInput, match="the profile is of kind 'whitened', this baseline needs 'plain'"):
        plain_svd_uniform(setting.teacher, setting.program, setting.whitened, 0.5)


# ── What trains ──────────────────────────────────────────────────────────────────────────────────────────────────

# Names of the matrices that train in each row; vectors train in all of them.
TRAINING_MATRICES = {
    "whitened_lora_recovery": ("down", "up"),
    "uniform_rank_distillation": ("A", "B"),
    "depth_pruning": ("weight",),
    "width_pruning": ("weight",),
    "lora_distillation": ("down", "up"),
    "dense_control": ("weight",),
}


@pytest.mark.parametrize("name", TRAINED)
def test_private_parameters_train_and_the_rest_is_the_teachers(setting, name):
    tree = ROWS[name](setting, 0.5).tree
    theirs = {p.untyped_storage().data_ptr() for p in setting.teacher.parameters()}
    for path, parameter in tree.named_parameters():
        in_projection = "_proj." in path
        trains = parameter.dim() == 1 or (in_projection and path.endswith(TRAINING_MATRICES[name]))
        assert parameter.requires_grad == trains, path
        shared = parameter.untyped_storage().data_ptr() in theirs
        assert not (shared and trains), path
        assert shared or trains or name == "whitened_lora_recovery", path
    assert not tree.get_input_embeddings().weight.requires_grad
    assert tree.get_output_embeddings().weight is tree.get_input_embeddings().weight


@pytest.mark.parametrize("name", UNTRAINED)
def test_untrained_rows_have_nothing_to_train(setting, name):
    tree = ROWS[name](setting, 0.5).tree
    assert not any(parameter.requires_grad for parameter in tree.parameters())
    with pytest.raises(BadInput, match="0 parameters of this tree can train"):
        distill(tree, setting.teacher, Batches(tokens(), 4, 0), CONFIG, progress=False)


def snapshot(tree: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in tree.named_parameters()}


@pytest.mark.parametrize("name", TRAINED)
def test_training_moves_what_trains_and_finishing_keeps_the_outputs(setting, name):
    start = ROWS[name](setting, 0.5)
    before = snapshot(start.tree)
    # Another model to follow: rows that start as their own teacher have no gradient towards it.
    distill(start.tree, llama(seed=7), Batches(tokens(), 4, 0), CONFIG, progress=False)
    after = snapshot(start.tree)
    for path, parameter in start.tree.named_parameters():
        assert torch.equal(before[path], after[path]) != parameter.requires_grad, path

    final = start.finish(start.tree)
    ids = tokens(seed=2)
    assert_same(logits(final, ids), logits(start.tree, ids))
    assert not torch.allclose(logits(final, ids), logits(setting.teacher, ids))
    assert kept_fraction(final, setting.teacher) == start.fraction
    assert {type(module) for module in projections(final).values()} <= {nn.Linear, FactoredLinear} or (
        name == "lora_distillation"
    )
    assert all(torch.equal(parameter, after[path]) for path, parameter in start.tree.named_parameters())


def assert_generates_with_its_cache(final: nn.Module) -> None:
    """The same tokens as running the whole prefix again each time."""
    prompt = tokens(count=2, length=5, seed=3)
    expected = prompt
    for _ in range(6):
        expected = torch.cat([expected, logits(final, expected)[:, -1:].argmax(-1)], dim=1)
    generated = final.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("name", ROWS)
def test_the_final_form_generates_with_its_cache(setting, name):
    start = ROWS[name](setting, 0.5)
    assert_generates_with_its_cache(start.finish(start.tree))


# ── Adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_adapters_start_without_effect(setting):
    ids = tokens(seed=2)
    whitened = whitened_svd_uniform(setting.teacher, setting.program, setting.whitened, 0.5)
    recovery = whitened_lora_recovery(setting.teacher, setting.program, setting.whitened, 0.5)
    assert torch.equal(logits(recovery.tree, ids), logits(whitened.tree, ids))
    assert torch.equal(logits(recovery.finish(recovery.tree), ids), logits(whitened.tree, ids))
    assert recovery.fraction == whitened.fraction
    for start in (lora_distillation(setting.teacher), dense_control(setting.teacher)):
        assert torch.equal(logits(start.tree, ids), logits(setting.teacher, ids))


def test_the_two_halves_of_lora_recovery_train_one_factors_adapters_each(setting):
    start = whitened_lora_recovery(setting.teacher, setting.program, setting.whitened, 0.5)
    asked = []

    class Asked(Batches):
        def batch(self, step: int) -> Tensor:
            asked.append(step)
            return super().batch(step)

    seen = []

    def look(record) -> None:
        training = {p for p, parameter in start.tree.named_parameters() if parameter.requires_grad}
        seen.append({path.split(".")[-2] for path in training if path.endswith(("down", "up"))})
        assert any(path.endswith("layernorm.weight") for path in training)

    before = logits(start.tree, tokens(seed=2))
    config = DistillConfig(**{**CONFIG.to_json(), "betas": (0.9, 0.95), "steps": 5})
    final = train(start, setting.teacher, Asked(tokens(), 4, 0), config, progress=False, on_step=look)
    assert seen == [{"B"}, {"B"}, {"A"}, {"A"}, {"A"}]
    assert list(dict.fromkeys(asked)) == [0, 1, 2, 3, 4]
    assert not torch.allclose(logits(final, tokens(seed=2)), before)
    assert kept_fraction(final, setting.teacher) == start.fraction


def test_training_without_stages_is_one_run(setting):
    distances = []
    for use in (
        lambda start, *rest: train(start, *rest, progress=False),
        lambda start, *rest: distill(start.tree, *rest, progress=False) and start.finish(start.tree),
    ):
        start = uniform_rank_distillation(setting.teacher, setting.program, setting.whitened, 0.5)
        final = use(start, setting.teacher, Batches(tokens(), 4, 0), CONFIG)
        distances.append(kl_to(setting.teacher, tokens(seed=2))(final))
    assert distances[0] == distances[1]


def test_adapters_merge_into_the_weight():
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    adapted = AdaptedLinear(linear.weight, linear.bias, 3, torch.Generator().manual_seed(0))
    nn.init.normal_(adapted.up)
    x = torch.randn(4, 6)
    expected = linear(x) + x @ adapted.down.T @ adapted.up.T
    assert torch.allclose(adapted(x), expected, atol=1e-6)
    assert torch.allclose(adapted.merged()(x), expected, atol=1e-6)


# ── SVD ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_svd_is_best_in_what_it_minimises(setting):
    """Plain: the weight. Whitened: the outputs on the calibration data, inputs as in the dense model."""
    plain = projections(plain_svd_uniform(setting.teacher, setting.program, setting.plain, 0.5).tree)
    whitened = projections(whitened_svd_uniform(setting.teacher, setting.program, setting.whitened, 0.5).tree)
    inputs = {}
    watched = llama()
    for name, module in projections(watched).items():
        module.register_forward_pre_hook(
            lambda _module, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2))
        )
    logits(watched, setting.sequences)
    for name, dense in projections(setting.teacher).items():
        x = inputs[name]
        assert plain[name].rank == whitened[name].rank
        output_errors = [float(((form[name].weight - dense.weight) @ x.T).norm()) for form in (plain, whitened)]
        weight_errors = [float((form[name].weight - dense.weight).norm()) for form in (plain, whitened)]
        assert output_errors[1] < 0.999 * output_errors[0], name
        assert weight_errors[0] < 0.999 * weight_errors[1], name
        dropped = torch.linalg.svdvals(dense.weight)[plain[name].rank :]
        assert weight_errors[0] == pytest.approx(float(dropped.norm()), rel=1e-3)


# ── Pruning ──────────────────────────────────────────────────────────────────────────────────────────────────────


def reference_kl(teacher: nn.Module, model: nn.Module, ids: Tensor) -> float:
    p, q = (torch.log_softmax(logits(m, ids).double(), -1) for m in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_kl_to_the_teacher_is_what_the_logits_say(setting):
    student = llama(seed=3)
    measured = kl_to(setting.teacher, setting.sequences, batch=5)(student)
    assert measured == pytest.approx(reference_kl(setting.teacher, student, setting.sequences), rel=1e-4)


def without(model: LlamaForCausalLM, *dropped: int) -> LlamaForCausalLM:
    model.model.layers = nn.ModuleList(b for i, b in enumerate(model.model.layers) if i not in dropped)
    return model


def test_depth_pruning_drops_the_block_that_is_missed_least_each_time(setting):
    def missed(*dropped: int) -> float:
        return reference_kl(setting.teacher, without(llama(), *dropped), setting.sequences)

    first = min(range(LAYERS), key=missed)
    second = min((i for i in range(LAYERS) if i != first), key=lambda i: missed(first, i))
    start = depth_pruning(setting.teacher, setting.sequences, 0.5)
    kept = [i for i in range(LAYERS) if i not in (first, second)]
    assert start.note == f"blocks {kept} of 4 kept, dropped in the order {[first, second]}"
    ids = tokens(seed=2)
    assert_same(logits(start.tree, ids), logits(without(llama(), first, second), ids))
    assert start.tree.config.num_hidden_layers == 2
    assert [block.self_attn.layer_idx for block in start.tree.model.layers] == [0, 1]


def test_blocks_that_do_nothing_go_and_the_others_get_new_places_in_the_cache(setting):
    model = llama()
    with torch.no_grad():
        for index in (0, 2):
            block = model.model.layers[index]
            for parameter in (*block.self_attn.o_proj.parameters(), *block.mlp.down_proj.parameters()):
                parameter.zero_()
    teacher = load_source(model).model
    start = depth_pruning(teacher, setting.sequences, 0.5)
    assert start.note.startswith("blocks [1, 3] of 4 kept")
    assert [block.self_attn.layer_idx for block in start.tree.model.layers] == [0, 1]
    assert_same(logits(start.tree, tokens(seed=2)), logits(teacher, tokens(seed=2)))
    assert_generates_with_its_cache(start.tree)


@pytest.mark.parametrize(("budget", "down", "up"), [(0.4, 1, 2), (0.5, 2, 2), (0.9, 3, 4), (1.0, 4, 4)])
def test_depth_pruning_rounds_either_way(setting, budget, down, up):
    for rounded, blocks in (("down", down), ("up", up)):
        start = depth_pruning(setting.teacher, setting.sequences, budget, rounded=rounded)
        assert len(start.tree.model.layers) == blocks
        assert start.fraction == blocks / LAYERS


def test_channels_score_their_mean_size_times_the_column_they_meet(setting):
    scores = channel_scores(setting.teacher, setting.sequences, batch=5)
    assert scores.keys() == {
        f"model.layers.{i}.{role}" for i in range(LAYERS) for role in ("self_attn.o_proj", "mlp.down_proj")
    }
    watched = llama()
    mlp = watched.model.layers[1].mlp
    inputs = []
    mlp.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    logits(watched, setting.sequences)
    with torch.no_grad():
        hidden = nn.functional.silu(mlp.gate_proj(inputs[0])) * mlp.up_proj(inputs[0])
        expected = hidden.abs().mean((0, 1)) * mlp.down_proj.weight.norm(dim=0)
    assert torch.allclose(scores["model.layers.1.mlp.down_proj"], expected, rtol=1e-4)


def with_dead_parts() -> LlamaForCausalLM:
    """Half of the channels of every MLP, and in each attention one of the two groups, write nothing."""
    model = llama()
    with torch.no_grad():
        for i, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight[:, i % 2 :: 2] = 0.0
            dead = slice(HIDDEN // 2) if i % 2 else slice(HIDDEN // 2, None)
            block.self_attn.o_proj.weight[:, dead] = 0.0
    return model


def test_width_pruning_finds_what_does_nothing(setting):
    """Half of each is exactly a budget of a half, and nothing is lost; two groups and 48 channels lose something."""
    teacher = load_source(with_dead_parts()).model
    start = width_pruning(teacher, setting.sequences, 0.5)
    assert start.note.startswith("1 of 2 key/value groups and 80 of 160 MLP channels kept in each block; KL before")
    assert "2+48: " in start.note
    assert "1+80: 0.000" in start.note or "1+80: -0.000" in start.note
    assert start.fraction == 0.5
    ids = tokens(seed=2)
    assert_same(logits(start.tree, ids), logits(teacher, ids))
    config = start.tree.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 80)
    assert config.head_dim == HIDDEN // HEADS


def test_width_pruning_takes_the_groups_it_is_told(setting):
    start = width_pruning(setting.teacher, setting.sequences, 0.5, kv_groups=2)
    assert start.note.startswith("2 of 2 key/value groups and 48 of 160 MLP channels kept")
    assert start.fraction == 0.5


def test_width_pruning_to_everything_is_the_teacher(setting):
    start = width_pruning(setting.teacher, setting.sequences, 1.0)
    assert start.fraction == 1.0
    ids = tokens(seed=2)
    assert_same(logits(start.tree, ids), logits(setting.teacher, ids))
