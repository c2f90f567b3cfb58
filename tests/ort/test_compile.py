"""Six kinds of model go the whole way at 0.5: compile, fold, export, parity; and what is saved loads back."""

from __future__ import annotations

import json

import pytest
import torch

import blora_compiler as blora
from blora_compiler import saving
from blora_compiler.errors import BadInput, InfeasibleBudget, ParityFailed
from blora_compiler.graph import main_output
from blora_compiler.layers import FactoredLinear
from blora_compiler.source import BUNDLED_MODEL, BUNDLED_TRAIN_TEXT, BUNDLED_VALIDATION_TEXT
from blora_compiler.values import Factored
from tests.models import MODELS, build, example_inputs


def compiled_at(name, budget=0.5, **options):
    return blora.compile(build(name), budget, inputs=example_inputs(name), rank_multiple=4, **options)


def call(compiled, module):
    with torch.no_grad():
        inputs = compiled.program.inputs
        return main_output(module(*inputs.values()) if compiled.program.positional else module(**inputs))


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_way_at_one_half(name, tmp_path):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    c = blora.compile(model, 0.5, inputs=example_inputs(name), rank_multiple=4)
    assert 0.495 <= c.plan.fraction <= 0.5 or name == "twice"  # one site: the ranks are its only steps
    assert c.plan.fraction <= 0.5
    assert any(isinstance(module, FactoredLinear) for module in c.module.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "the teacher moved"
    artifact = c.export(tmp_path / "onnx")
    assert artifact.parity.max_error <= 1e-4
    assert artifact.unmapped_sites == ()
    assert (
        {"prefill", "decode"} <= set(artifact.graphs) if name in ("llama", "gpt2") else artifact.graphs == ("model",)
    )
    if artifact.generation:
        assert artifact.parity.identical == artifact.parity.sequences > 8


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_loads_back_and_computes_the_same(name, tmp_path):
    c = compiled_at(name)
    c.save(tmp_path / "saved")
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} <= {".json", ".safetensors"}
    loaded = blora.load(tmp_path / "saved", None if name in ("llama", "gpt2", "bert", "vit") else build(name))
    assert torch.equal(call(c, loaded.module), call(c, c.module))
    assert loaded.plan == c.plan
    if name in ("llama", "gpt2"):
        ids = torch.tensor([[3, 4, 5]])
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(loaded.module.generate(ids, **options), c.module.generate(ids, **options))


@pytest.mark.parametrize(("name", "rules"), [("llama", {}), ("gpt2", {}), ("llama", {"lm_head": "compress"})])
def test_merged_weights_load_in_plain_transformers(name, rules, tmp_path):
    from transformers import AutoModelForCausalLM

    c = compiled_at(name, rules=rules)
    c.save(tmp_path / "merged", merged=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any(isinstance(module, FactoredLinear) for module in stock.modules())
    torch.testing.assert_close(call(c, stock), call(c, c.module), atol=1e-5, rtol=1e-4)


def test_a_merged_save_replaces_merged_saves_alone(tmp_path, monkeypatch):
    c = compiled_at("llama")
    build("llama").save_pretrained(tmp_path / "theirs")
    held = (tmp_path / "theirs" / "model.safetensors").read_bytes()
    with pytest.raises(BadInput, match="is no earlier result"):
        c.save(tmp_path / "theirs", merged=True)
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() == held
    for _ in range(2):
        c.save(tmp_path / "merged", merged=True)
    held = (tmp_path / "merged" / "model.safetensors").read_bytes()
    monkeypatch.setattr(saving, "_filled_up", lambda whole, weight, bias: (2 * weight, bias))
    with pytest.raises(ParityFailed, match=r"the merged model differs from the compressed one by .*, above "):
        c.save(tmp_path / "merged", merged=True)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == held


def test_a_removed_branch_survives_saving_merging_and_exporting(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build("llama")
    base = json.loads(blora.make_plan(model, 1.0).to_json())
    for choice in base["choices"]:
        if ".1.mlp." in choice["site"] or ".0.self_attn." in choice["site"]:
            choice["form"] = "removed"
    plan = blora.Plan.from_json(json.dumps(base))
    c = blora.compile(model, 0.9, plan=plan)
    assert c.plan.fraction < 0.9
    c.save(tmp_path / "saved")
    assert torch.equal(call(c, blora.load(tmp_path / "saved").module), call(c, c.module))
    c.save(tmp_path / "merged", merged=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(call(c, stock), call(c, c.module), atol=1e-5, rtol=1e-4)
    assert c.export(tmp_path / "onnx").parity.max_error <= 1e-4


def test_a_budget_of_one_changes_nothing():
    model = build("llama")
    c = blora.compile(model, 1.0)
    assert c.plan.fraction == 1.0
    assert torch.equal(call(c, c.module), call(c, model))


@pytest.mark.long
def test_the_bundled_model_distills_a_little_and_generates_in_onnx_runtime(tmp_path):
    """The product's main path on the real model, with a few training steps."""
    c = blora.compile(
        BUNDLED_MODEL,
        "50%",
        train=BUNDLED_TRAIN_TEXT,
        evaluation=BUNDLED_VALIDATION_TEXT,
        distill=blora.DistillConfig(
            steps=6, batch=4, length=128, retention_fraction=0.5, hidden_weight=0.1, learning_rate=1e-4
        ),
        folder=tmp_path / "run",
    )
    assert 0.495 <= c.plan.fraction <= 0.5
    quality = c.quality
    assert quality["teacher"].perplexity == pytest.approx(51.77, abs=0.05)
    assert quality["untrained"].kl < 0.09  # the model's README has 0.067 for this allocation
    assert quality["compressed"].kl < 1.1 * quality["untrained"].kl  # six tiny steps can do neither good nor harm
    artifact = c.export(tmp_path / "onnx")
    assert artifact.parity.max_error <= 1e-4
    assert artifact.parity.identical == artifact.parity.sequences
    on_disk = sum(path.stat().st_size for path in artifact.files if path.suffix in (".onnx", ".data"))
    assert on_disk <= 1.02 * sum(parameter.nbytes for parameter in c.module.parameters())
    ids = torch.tensor([c.source.tokenizer("It was a dark night, and")["input_ids"]])
    mine = artifact.generate(ids, max_new_tokens=12)
    assert torch.equal(
        mine, c.module.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    )
    report = c.report(artifact)
    assert "# prose-llama-8m at budget 50%" in str(report)
    assert json.loads(report.to_json())["achieved"]["sites"]["flops"]["fraction"] == pytest.approx(c.plan.fraction)


def test_float16_exports_are_verified_with_their_own_tolerance(tmp_path):
    artifact = compiled_at("llama").export(tmp_path / "half", dtype="float16")
    assert 1e-5 < artifact.parity.max_error <= artifact.parity.tolerance == 5e-2


# ── Plans given by hand ──────────────────────────────────────────────────────────────────────────────────────────


def test_an_edited_plan_is_applied_and_counted_anew():
    model = build("llama")
    plan = blora.make_plan(model, 0.5, rank_multiple=4, damage="plain")  # which nothing measures, or prices, again
    edited = json.loads(plan.to_json())
    choice = next(choice for choice in edited["choices"] if choice["form"] == "dense")
    name, dense = choice["site"], choice["cost"]
    choice |= {"form": "factored", "rank": 5}  # and the cost of the dense form left beside it
    c = blora.compile(model, 0.5, plan=blora.Plan.from_json(json.dumps(edited)), rank_multiple=4, damage="plain")
    assert c.plan.forms == {**plan.forms, name: Factored(5)}
    site = c.program.site(name)
    counted = 2 * plan.workload.tokens * 5 * (site.in_features + site.out_features)
    assert next(found.cost for found in c.plan.choices if found.site == name) == counted < dense
    assert c.plan.cost == plan.cost - dense + counted
    assert c.module.get_submodule(name).A.shape == (5, site.in_features)


def test_a_plan_for_another_model_is_refused():
    plan = blora.make_plan(build("gpt2"), 0.5)
    with pytest.raises(BadInput, match=r"transformer\.h\.0\.attn\.c_attn"):
        blora.compile(build("llama"), 0.5, plan=plan)


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (0, "0"),
        (1.5, "1.5"),
        (-1, "-1"),
        ("abc", "abc"),
        ("12", "unit"),
        ("12ms", "no calibration table"),
    ],
)
def test_budgets_that_cannot_be_met_say_why(budget, message, not_calibrated):
    with pytest.raises(BadInput, match=message):
        blora.compile(build("llama"), budget)


def test_an_infeasible_budget_names_the_smallest_feasible_one_and_what_binds():
    with pytest.raises(InfeasibleBudget, match="smallest feasible") as caught:
        blora.compile(build("llama"), 0.05, rules={"*.mlp.*": "dense"})
    assert 0.05 < caught.value.smallest_fraction < 1
    assert any(".mlp." in name for name in caught.value.binding)
    plan = blora.make_plan(build("llama"), caught.value.smallest_fraction, rules={"*.mlp.*": "dense"})
    assert plan.fraction <= caught.value.smallest_fraction


def test_a_rule_that_matches_nothing_offers_the_nearest_names():
    with pytest.raises(BadInput, match=r"down_porj.*down_proj"):
        blora.compile(build("llama"), 0.5, rules={"*.down_porj": "dense"})


def test_nan_weights_are_named_before_any_work():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(BadInput, match="NaN or infinite values"):
        blora.compile(model, 0.5)


def test_calibration_of_the_wrong_shape_names_both_shapes():
    with pytest.raises(BadInput, match=r"calibration\[0\].*\(2, 3, 4\)"):
        blora.compile(build("llama"), 0.5, calibration=[torch.ones(2, 3, 4, dtype=torch.int64)])
    with pytest.raises(BadInput, match=r"only batch and tokens may differ"):
        blora.compile(build("encoder"), 0.5, inputs=(torch.randn(2, 8, 64),), calibration=[torch.randn(2, 8, 32)])


def test_token_ids_above_the_vocabulary_are_refused():
    with pytest.raises(BadInput, match=r"500 to 500, the model knows 0 to 127"):
        blora.compile(build("llama"), 0.5, calibration=torch.full((2, 8), 500))


def test_an_empty_training_set_is_refused(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(BadInput, match="0 tokens"):
        blora.compile(BUNDLED_MODEL, 0.5, train=empty, calibration=torch.ones(2, 8, dtype=torch.int64))


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(BadInput, match="has no tokenizer"):
        blora.compile(build("llama"), 0.5, calibration=["some text"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/model-anywhere", "no model can be loaded"),
        (17, "got int"),
        ("model.onnx", "does not exist; name an ONNX file"),
    ],
)
def test_something_that_is_no_model_is_refused(model, message):
    with pytest.raises(BadInput, match=message):
        blora.compile(model, 0.5)


def test_loading_what_is_not_there_or_damaged_says_so(tmp_path):
    with pytest.raises(BadInput, match=r"blora\.json is missing"):
        blora.load(tmp_path)
    folder = compiled_at("gpt2").save(tmp_path / "saved")
    description = (folder / "blora.json").read_text()
    (folder / "blora.json").write_text(description.replace('"factored"', '"sparse"'))
    with pytest.raises(BadInput, match=r"unknown module kind 'sparse' in blora\.json; save the model again"):
        blora.load(folder)
    (folder / "blora.json").write_text(description)
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(BadInput, match="cannot be read"):
        blora.load(folder)
    (folder / "blora.json").write_text("{}")
    with pytest.raises(BadInput, match="lacks"):
        blora.load(folder)
    plain = compiled_at("twice").save(tmp_path / "plain")
    with pytest.raises(BadInput, match="pass model=an instance of it"):
        blora.load(plain)
    with pytest.raises(BadInput, match=r"has a module at w, but Sequential has sites \['0'\]"):
        blora.load(plain, torch.nn.Sequential(torch.nn.Linear(48, 48)))


def test_merging_a_plain_module_is_refused(tmp_path):
    with pytest.raises(BadInput, match="is no Hugging Face model"):
        compiled_at("twice").save(tmp_path / "merged", merged=True)
    assert not (tmp_path / "merged").exists()


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="is no earlier result"):
        compiled_at("twice").save(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    import errno

    import safetensors.torch

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(BadInput, match="the disk filled up"):
        compiled_at("twice").save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
