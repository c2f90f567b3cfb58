"""What the code of some architectures does that the usual ones do not: each was a failure once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blora_compiler.passes import RemoveBranches
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

import blora_compiler as blora
from blora_compiler.branches import stand_ins
from blora_compiler.errors import BadInput
from blora_compiler.graph import Level, Program
from blora_compiler.layers import CacheEntry, RemovedBranch
from blora_compiler.objective import Objective
from blora_compiler.rewriting import rewrite
from blora_compiler.saving import _empty_module
from blora_compiler.source import NO_LIMIT, position_limit
from blora_compiler.tracing import has_computed_sizes, trace
from blora_compiler.values import Removed

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 64}
SIDES = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def made(kind: str, auto: type = AutoModelForCausalLM, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **TOKENS, **settings)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def codegen() -> PreTrainedModel:
    return made("codegen", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)


def deepseek() -> PreTrainedModel:
    return made(
        "deepseek_v3", **{**SMALL, "num_hidden_layers": 2}, num_key_value_heads=4, n_routed_experts=2,
        num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=32, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1, max_position_embeddings=64,
    )  # fmt: skip


def without(program: Program, branch: str) -> Program:
    forms = {site.name: Removed() for site in program.sites if site.branch == branch}
    assert forms
    return rewrite(replace(program, level=Level.BRANCHED), [RemoveBranches(forms)])[0]


# ── Linear layers of their own kind ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_that_writes_its_product_out_is_a_site(bias):
    model = made("falcon", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, bias=bias)
    c = blora.compile(model, 0.5, rank_multiple=2, calibration=torch.randint(3, 64, (8, 16)), refit=False)
    names = [site.name.rpartition(".")[2] for site in c.program.sites]
    assert names == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"]
    assert [site.bias is not None for site in c.program.sites] == [bias] * 4 + [False]
    assert any(form.rank for form in c.plan.forms.values() if hasattr(form, "rank"))
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            c.module(ids).logits, c.graph(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        )


class Router(nn.Linear):
    """Computes more than its product, so no other projection can stand for it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ self.weight.T + self.bias, -1)


class Routed(PreTrainedModel):
    config_class = type(AutoConfig.for_model("llama"))

    def __init__(self, config: object) -> None:
        super().__init__(config)
        self.first, self.router = nn.Linear(16, 16), Router(16, 4)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.router(self.first(x))


def test_a_linear_that_computes_more_is_none():
    program = trace(Routed(AutoConfig.for_model("llama")), {"x": torch.randn(2, 3, 16)})
    assert [site.name for site in program.sites] == ["first"]
    assert [str(refusal) for refusal in program.refusals] == [
        "router.weight: is used by a function, not by a Linear or Conv1D module"
    ]


def test_where_only_the_head_is_left_the_error_says_what_the_rest_was():
    class OnlyHead(Routed):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.lm_head = nn.Linear(4, 64)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(self.router(x))

    inputs = {"x": torch.randn(2, 3, 16)}
    with pytest.raises(BadInput, match=r"all 1 sites are excluded .*; no site is router\.weight: is used by a fun"):
        blora.compile(OnlyHead(AutoConfig.for_model("llama")), 0.5, inputs=inputs)


# ── Branches ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("build", [codegen, deepseek])
def test_removed_attention_answers_as_its_callers_expect(build):
    """CodeGen passes its cache under another name, and DeepSeek's keys are wider than its values, and written to."""
    program = trace(build())
    for branch in dict.fromkeys(site.branch for site in program.sites if site.branch):
        tree = without(program, branch).tree
        ids = torch.randint(3, 64, (3, 5))  # not 2: a bare tensor of two rows unpacks like a pair
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert torch.equal(tree.generate(ids, **settings), tree.generate(ids, **settings, use_cache=False)), branch
        cache = tree(ids, use_cache=True).past_key_values
        assert [layer.get_seq_length() for layer in cache.layers] == [5, 5], branch


def test_a_removed_attention_keeps_the_shape_of_its_keys_and_values():
    program = trace(deepseek())
    stand_in = stand_ins(program, ["model.layers.0.self_attn"])["model.layers.0.self_attn"]
    assert (stand_in.outputs, stand_in.cache) == (2, CacheEntry(layer=0, heads=1, key_size=16, value_size=4))
    entry = {"kind": "removed", "outputs": 2, "cache_shape": [4, 8], "layer_idx": 3}  # as earlier versions saved it
    assert _empty_module(entry, (0, 0)).cache == CacheEntry(3, 4, 8, 8)
    with pytest.raises(
        BadInput, match=r"model\.layers returns something that zeros cannot stand for; plan its sites"
    ):
        stand_ins(program, ["model.layers"])  # a list, which nothing calls


def test_models_that_do_not_generate_keep_their_place_in_the_cache_too():
    model = made("llama", AutoModel, **{**SMALL, "num_hidden_layers": 2}, max_position_embeddings=64)
    tree = without(trace(model), "layers.0.self_attn").tree
    ids = torch.randint(3, 64, (3, 5))
    with torch.no_grad():
        cache = tree(ids[:, :4], use_cache=True).past_key_values
        step = tree(ids[:, 4:], past_key_values=cache).last_hidden_state
        torch.testing.assert_close(step, tree(ids, use_cache=False).last_hidden_state[:, 4:])


def test_what_a_branch_returns_only_with_a_cache_counts_too():
    """RWKV's attention hands a state back while it generates, and its callers go on with it."""
    program = trace(made("rwkv", hidden_size=32, num_hidden_layers=2, rescale_every=0))
    assert {site.branch for site in program.sites if ".attention." in site.name} == {None}


def test_no_branch_is_removable_where_the_model_fails_with_a_cache_and_that_is_said():
    class Forgets(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> object:
            if use_cache:
                raise NotImplementedError("none")
            return super().forward(input_ids, attention_mask, use_cache=False)

    model = Forgets(AutoConfig.for_model("llama", **{**SMALL, "num_hidden_layers": 1}, vocab_size=64))
    program = trace(model)
    assert {site.branch for site in program.sites} == {None}
    assert [str(refusal) for refusal in program.refusals] == [
        "Forgets: no branch can be removed: with a key/value cache the model fails (NotImplementedError: none)"
    ]


def test_a_saved_student_without_an_attention_generates(tmp_path):
    model, ids = codegen(), torch.randint(3, 64, (3, 5))
    names = [site.name for site in trace(model).sites if site.branch == "transformer.h.0.attn"]
    plan = blora.make_plan(model, 0.9, rank_multiple=2, refit=False)
    choices = [replace(c, form=Removed() if c.site in names else c.form) for c in plan.choices]
    plan = replace(plan, choices=tuple(choices))
    c = blora.compile(model, 0.9, plan=plan, rank_multiple=2, refit=False)
    c.save(tmp_path / "student")
    again = blora.load(tmp_path / "student").module
    assert isinstance(again.transformer.h[0].attn, RemovedBranch)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(ids, **settings), c.module.generate(ids, **settings))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def mixed(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Bare(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)


class HandsOn(Branch):
    """Returns what it was given as well, which a stand-in would have to know."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.mixed(x), scale


class Narrows(Branch):
    """Is given something of another shape first."""

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        return self.mixed(x)


class Writes(Branch):
    """Writes into what it was given, which others may read."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x.mul_(2.0))


class WritesToAPart(Branch):
    def forward(self, x: Tensor) -> Tensor:
        x.chunk(2, -1)[0].mul_(2.0)
        return self.mixed(x)


class Residual(PreTrainedModel):
    config_class = type(AutoConfig.for_model("llama"))

    def __init__(self, config: object, branch: nn.Module) -> None:
        super().__init__(config)
        self.first, self.branch = nn.Linear(16, 16), branch

    def forward(self, x: Tensor) -> Tensor:
        x, scale = self.first(x), x.new_ones(16)
        match self.branch:
            case HandsOn():
                added, scale = self.branch(x, scale=scale)
                return (x + added) * scale
            case Narrows():
                return x + self.branch(scale, x)
        return x + self.branch(x)


@pytest.mark.parametrize(
    ("kind", "removable"),
    [(Bare, True), (HandsOn, False), (Narrows, False), (Writes, False), (WritesToAPart, False)],
)
def test_only_branches_that_zeros_can_stand_for_are_removable(kind, removable):
    program = trace(Residual(AutoConfig.for_model("llama"), kind()), {"x": torch.randn(2, 3, 16)})
    assert {site.branch for site in program.sites if site.name != "first"} == {"branch" if removable else None}


# ── Graphs of one length, and computed sizes ─────────────────────────────────────────────────────────────────────


class Scan(nn.Module):
    """Loops over its tokens, so its graph is for one length."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = torch.zeros_like(x[:, 0]), []
        for step in self.into(x).unbind(1):
            state = 0.5 * state + step
            outputs.append(state)
        return self.out(torch.stack(outputs, 1))


def test_data_of_another_length_than_the_graphs_is_refused_by_name():
    batches = [torch.randn(4, 12, 8)]
    with pytest.raises(BadInput, match=r"batch 0: x has 12 on axis 1, .* a graph for 5 alone; pass inputs="):
        blora.compile(Scan(), 0.75, inputs=(torch.randn(2, 5, 8),), calibration=batches, rank_multiple=1)
    # The graph is calibrated on; the model itself trains, at any length.
    settings = {"train": [torch.randn(4, 7, 8)], "distill": blora.DistillConfig(steps=1)}
    c = blora.compile(
        Scan(), 0.75, inputs=(torch.randn(2, 12, 8),), calibration=batches, rank_multiple=1, refit=False, **settings
    )
    assert c.module(torch.randn(3, 12, 8)).shape == (3, 12, 8)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_loops_over_its_tokens_is_calibrated_at_the_length_it_was_traced_with():
    model = made("mamba", hidden_size=16, num_hidden_layers=1, state_size=4, expand=1)
    records = []
    c = blora.compile(model, 0.75, rank_multiple=1, refit=False, on_record=records.append)
    assert "costs are for 16 tokens" in next(r.summary for r in records if r.stage == "trace")
    ids = torch.randint(3, 64, (2, 7))
    assert c.module(ids).logits.shape == (2, 7, 64)


def test_sizes_that_a_model_computes_from_values_are_those_of_the_example():
    model = made(
        "deberta", AutoModel, **SMALL, relative_attention=True, pos_att_type=["c2p"], max_position_embeddings=64
    )
    program = trace(model)
    assert has_computed_sizes(program) and not has_computed_sizes(trace(made("llama", **SMALL)))
    assert len(program.sites) == 5
    assert all(
        operator.flops.replace("batch", "").replace("tokens", "").count("u") == 0 for operator in program.operators
    )


def test_configurations_that_name_no_limit_or_no_size():
    xlnet = made("xlnet", AutoModel, d_model=32, n_layer=1, n_head=4, d_inner=64)
    assert position_limit(xlnet) == NO_LIMIT
    assert position_limit(made("mpt", d_model=32, n_heads=4, n_layers=1, max_seq_len=48)) == 48
    assert blora.make_plan(xlnet, 0.5, rank_multiple=2).forms
    vision = made(
        "segformer", AutoModelForImageClassification, num_encoder_blocks=1, depths=[1], sr_ratios=[1],
        hidden_sizes=[16], patch_sizes=[3], strides=[2], num_attention_heads=[2], mlp_ratios=[2],
        decoder_hidden_size=16,
    )  # fmt: skip
    with pytest.raises(BadInput, match=r"states no image size; pass inputs="):
        trace(vision)
    images = [{"pixel_values": torch.randn(2, 3, 32, 32)}]
    assert blora.compile(vision, 0.5, inputs=images[0], calibration=images, rank_multiple=1, refit=False).plan.forms


# ── Encoder-decoders ─────────────────────────────────────────────────────────────────────────────────────────────


def both_sides(batch: int, tokens: int, answer: int) -> dict[str, Tensor]:
    inputs = {
        "input_ids": torch.randint(3, 64, (batch, tokens)),
        "decoder_input_ids": torch.randint(3, 64, (batch, answer)),
    }
    inputs |= {name.replace("input_ids", "attention_mask"): torch.ones_like(ids) for name, ids in inputs.items()}
    inputs["attention_mask"][0, -2:] = 0
    inputs["decoder_attention_mask"][0, -3:] = 0
    return inputs


@pytest.mark.parametrize("answer", [5, 8])
def test_an_encoder_decoder_is_compared_on_the_tokens_of_its_decoder(answer):
    teacher, student = made("bart", AutoModelForSeq2SeqLM, **SIDES), made("bart", AutoModelForSeq2SeqLM, **SIDES)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = both_sides(3, 8, answer)
    padded = dict(inputs, decoder_input_ids=inputs["decoder_input_ids"].clone())
    padded["decoder_input_ids"][0, -3:] = 7
    unmasked = dict(inputs, decoder_input_ids=inputs["decoder_input_ids"].clone())
    unmasked["decoder_input_ids"][1, -3:] = 7
    for comparison in ("logits", "head"):
        objective = Objective(student, teacher, comparison, label_weight=0.5)
        with torch.no_grad():
            loss, same, other = (float(objective(given).loss) for given in (inputs, padded, unmasked))
        assert loss == pytest.approx(same, rel=1e-5)
        assert loss != pytest.approx(other, rel=1e-3)


def test_an_encoder_decoder_is_compressed_and_trained(tmp_path):
    model = made("bart", AutoModelForSeq2SeqLM, **SIDES)
    untrained = blora.compile(model, 0.5, rank_multiple=2, refit=False)  # on inputs of its own
    assert set(untrained.program.inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}
    batches = [both_sides(4, 9, 6) for _ in range(2)]
    settings = blora.DistillConfig(steps=2, hidden_weight=0.1)
    c = blora.compile(model, 0.5, calibration=batches, train=batches, distill=settings, rank_multiple=2, refit=False)
    c.save(tmp_path / "student")
    again = blora.load(tmp_path / "student").module
    ids = torch.randint(3, 64, (3, 7))
    assert torch.equal(again.generate(ids, max_new_tokens=5), c.module.generate(ids, max_new_tokens=5))
    with pytest.raises(BadInput, match="give each batch all of them"):
        blora.compile(model, 0.5, train=torch.randint(3, 64, (8, 16)))
    assert set(trace(model.get_encoder()).inputs) == {"input_ids", "attention_mask"}
