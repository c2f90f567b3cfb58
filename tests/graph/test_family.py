"""A family: nested plans that meet every budget, members that are what the shared factors say, one checkpoint."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import blora_compiler as blora
import blora_compiler.family as family_module
from blora_compiler.budget import Budget
from blora_compiler.errors import BadInput
from blora_compiler.family import activate, loss_weight, member_of_step
from blora_compiler.graph import main_output
from blora_compiler.layers import NestedLinear
from blora_compiler.nesting import at_budget, size_of
from blora_compiler.plan import check_plan
from blora_compiler.values import Dense, Factored
from tests.models import build, example_inputs

BUDGETS = (0.2, 0.2001, 0.37, "42%", 0.6, 0.749, 0.75)
CONFIG = blora.DistillConfig(steps=8, batch=2, length=16, checkpoint_every=4, autocast="off", hidden_weight=0.0)


def sequences():
    return torch.randint(0, 128, (24, 16), generator=torch.Generator().manual_seed(1))


def family_of(model, **options):
    return blora.compile_family(model, 0.2, 0.75, train=sequences(), distill=CONFIG, rank_multiple=4, **options)


@pytest.fixture(scope="module")
def teacher():
    return build("llama")


@pytest.fixture(scope="module")
def family(teacher):
    return family_of(teacher)


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    return family.save(tmp_path_factory.mktemp("saved") / "family")


def outputs(module, compiled):
    with torch.no_grad():
        return main_output(module(**compiled.program.inputs))


def stored(folder):
    return (folder / "model.safetensors").stat().st_size


def test_ranks_never_fall_from_one_anchor_to_the_next(family):
    anchors = family.chain.anchors
    assert [float(anchors[0].budget), float(anchors[-1].budget)] == [0.2, 0.75]
    for smaller, larger in pairwise(anchors):
        assert all(size_of(smaller.forms[name]) <= size_of(larger.forms[name]) for name in larger.forms)
    assert anchors[0].forms != anchors[-1].forms


def test_a_first_factor_is_shared_in_all_members_that_factor_its_sites_or_in_none(family):
    plans = [*family.chain.anchors, *(family.plan_at(budget) for budget in BUDGETS)]
    sharing = set()
    for name in plans[0].forms:
        forms = [plan.forms[name] for plan in plans]
        sharers = {form.sharers for form in forms if isinstance(form, Factored)}
        assert len(sharers) <= 1
        sharing |= sharers - {()}
    assert sharing, "no group of this model shares"
    for names in sharing:
        modules = [dict(family.program.tree.named_modules())[name] for name in names]
        assert len({id(module.A) for module in modules}) == 1
        members = dict(family.at(0.2).module.named_modules())
        assert len({id(members[name].A) for name in names}) == 1
        assert members[names[0]].A is not modules[0].A


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_is_met_and_lies_between_its_neighbours(family, budget):
    plan = family.plan_at(budget)
    asked = Budget.parse(budget)
    assert plan.cost <= plan.limit == asked.limit(plan.baseline)
    check_plan(plan, at_budget(family.chain.problem, asked))
    fractions = [float(anchor.budget) for anchor in family.chain.anchors]
    low = max(i for i, fraction in enumerate(fractions) if fraction <= asked.fraction)
    high = min(i for i, fraction in enumerate(fractions) if fraction >= asked.fraction)
    for name, form in plan.forms.items():
        smallest, largest = (size_of(family.chain.anchors[i].forms[name]) for i in (low, high))
        assert smallest <= size_of(form) <= largest
    if low != high:  # a plan of its own, not the anchor below
        assert plan.objective <= family.chain.anchors[low].objective


@pytest.mark.parametrize("budget", [0.2, 0.37, 0.75])
def test_a_member_is_the_nested_model_at_its_ranks(family, budget):
    compiled = family.at(budget)
    shapes = {
        name: module.rank if hasattr(module, "rank") else Dense()
        for name, module in compiled.module.named_modules()
        if name in compiled.plan.forms
    }
    assert shapes == {name: getattr(form, "rank", form) for name, form in compiled.plan.forms.items()}
    activate(family.program.tree, compiled.plan.forms)
    expected = outputs(family.program.tree, compiled)
    activate(family.program.tree, family.chain.anchors[-1].forms)
    torch.testing.assert_close(outputs(compiled.module, compiled), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        main_output(compiled.program.call_graph(compiled.program.inputs)), expected, atol=1e-5, rtol=1e-5
    )


def test_asking_twice_gives_the_same_and_changing_a_member_does_not_reach_the_family(family):
    first, second = family.at(0.37), family.at(0.37)
    assert first.plan == second.plan
    before = outputs(second.module, second)
    assert torch.equal(outputs(first.module, first), before)
    with torch.no_grad():
        for name, parameter in first.module.named_parameters():
            if "norm" in name or name.endswith((".A", ".B")):
                parameter.add_(1.0)
    third = family.at(0.37)
    assert torch.equal(outputs(third.module, third), before)


def test_training_moves_shared_factors_and_norms_and_neither_dense_weights_nor_the_teacher(teacher, family):
    untrained = blora.compile_family(teacher, 0.2, 0.75, calibration=sequences(), rank_multiple=4)
    assert untrained.chain.anchors == family.chain.anchors
    before, after = untrained.program.tree.state_dict(), family.program.tree.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    pairs = {
        f"{name}.{part}"
        for name, module in family.program.tree.named_modules()
        if isinstance(module, NestedLinear)
        for part in "AB"
    }
    assert pairs <= moved
    assert all("norm" in name for name in moved - pairs)
    assert any(name.endswith(".dense") for name in before)
    assert outputs(untrained.at(0.37).module, untrained.at(0.37)).isfinite().all()


def test_untrained_factors_are_the_profiles_best_at_every_rank(teacher):
    from blora_compiler.calibration import calibration_batches
    from blora_compiler.family import ordered_factors
    from blora_compiler.source import load_source

    source = load_source(teacher)
    program = blora.trace(source.model)
    batches, _ = calibration_batches(program, source, sequences(), 0)
    profiled = blora.profile(program, batches)
    sharers = next(iter(profiled.shared))
    alone = next(site for site in program.sites if site.name not in sharers)
    pairs = {alone.name: Factored(12), **dict.fromkeys(sharers, Factored(12, sharers))}
    found = ordered_factors(profiled, program.sites, pairs)
    for rank in (1, 5, 12):
        best = {alone.name: profiled.starting_factors(alone, rank), **profiled.shared_factors(sharers, rank)}
        for name, (A, B) in found.items():
            best_a, best_b = best[name]
            torch.testing.assert_close(B[:, :rank] @ A[:rank], best_b @ best_a, atol=1e-5, rtol=1e-4)
    A, B = found[alone.name]
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    first, stacked = found[sharers[0]][0], torch.cat([found[name][1] for name in sharers])
    assert all(found[name][0] is first for name in sharers)
    torch.testing.assert_close(first.norm(dim=1), stacked.norm(dim=0))


def test_every_member_takes_steps_small_ones_at_first_and_large_ones_in_the_end():
    taken = [member_of_step(step, 400, 12, seed=3) for step in range(400)]
    assert set(taken) == set(range(12))
    parts = [statistics.mean(taken[start : start + 100]) for start in range(0, 400, 100)]
    assert parts == sorted(parts)
    assert parts[0] < 4
    assert parts[-1] > 7.5
    assert taken == [member_of_step(step, 400, 12, seed=3) for step in range(400)]
    assert member_of_step(0, 1, 12, seed=3) in range(12)


def test_a_loss_counts_by_the_root_of_its_members_damage(family):
    anchors = family.chain.anchors
    middle = anchors[len(anchors) // 2]
    weights = [loss_weight(anchor, middle) for anchor in anchors]
    assert weights == sorted(weights)
    assert weights[len(anchors) // 2] == 1.0
    for anchor, weight in zip(anchors, weights, strict=True):
        assert weight**2 * anchor.damage == pytest.approx(middle.damage)
    assert loss_weight(replace(anchors[0], objective=0.0), middle) == 1.0


def test_factors_start_as_what_measures_better(teacher, family):
    (record,) = (record for record in family.records if record.stage == "insert")
    refitted = record.facts["refitted"] < record.facts["as_profiled"]
    untrained = blora.compile_family(teacher, 0.2, 0.75, calibration=sequences(), rank_multiple=4)
    tokens = torch.cat(list(sequences().split(8)))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        expected = teacher(**inputs).logits.log_softmax(-1)
        found = untrained.at(record.facts["budget"]).module(**inputs).logits.log_softmax(-1)
    kl = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert kl == pytest.approx(min(record.facts["refitted"], record.facts["as_profiled"]), rel=0.2)
    assert refitted


def test_an_interrupted_run_continues_bit_for_bit(teacher, family, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    taken, stops = set(), {6}

    def recorded(step, *arguments):
        if step in stops:
            raise Stopped
        taken.add(step)
        return member_of_step(step, *arguments)

    monkeypatch.setattr(family_module, "member_of_step", recorded)
    with pytest.raises(Stopped):
        family_of(teacher, folder=tmp_path)
    assert taken == {0, 1, 2, 3, 4, 5}
    taken.clear()
    stops.clear()
    resumed = family_of(teacher, folder=tmp_path, resume=True)
    assert taken == {4, 5, 6, 7}
    expected = family.program.tree.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.program.tree.state_dict().items())


def test_what_is_saved_loads_back_as_the_same_members(family, saved):
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
    loaded = blora.load_family(saved)
    assert (loaded.smallest, loaded.largest) == (0.2, 0.75)
    for budget in (0.2, 0.37, 0.75):
        ours, theirs = family.at(budget), loaded.at(budget)
        assert ours.plan == theirs.plan
        assert torch.equal(outputs(ours.module, ours), outputs(theirs.module, theirs))


def test_the_checkpoint_is_at_most_1_3_times_its_largest_member(family, saved, tmp_path):
    assert any(form == Dense() for form in family.chain.anchors[-1].forms.values()), "no pair lies beside a weight"
    largest = family.at(0.75).save(tmp_path / "largest")
    assert stored(largest) < stored(saved) <= 1.3 * stored(largest)


@pytest.mark.parametrize("name", ["gpt2", "twice"])
def test_models_with_biases_and_with_weights_of_no_module(name, tmp_path):
    model = build(name)
    made = blora.compile_family(model, "30%", "60%", inputs=example_inputs(name), rank_multiple=4)
    made.save(tmp_path / "family")
    loaded = blora.load_family(tmp_path / "family", build(name) if name == "twice" else None)
    for budget in (0.3, 0.45, 0.6):
        ours, theirs = made.at(budget), loaded.at(budget)
        assert ours.plan == theirs.plan
        assert ours.plan.fraction <= budget
        with torch.no_grad():
            expected = main_output(ours.program.call_tree(ours.program.inputs))
            assert torch.equal(expected, main_output(theirs.program.call_tree(ours.program.inputs)))


@pytest.mark.parametrize("budget", [0.19, 0.76, 1, "10%", "3GFLOP"])
def test_budgets_outside_the_range_are_refused_with_the_range(family, budget):
    with pytest.raises(BadInput, match=r"0\.2 to 0\.75"):
        family.at(budget)


@pytest.mark.parametrize("budget", ["small", -0.3, None])
def test_budgets_that_are_none_are_refused(family, budget):
    with pytest.raises(BadInput, match="budget"):
        family.at(budget)


@pytest.mark.parametrize(
    ("smallest", "largest", "options"),
    [(0.75, 0.2, {}), (0.5, 0.5, {}), (0.2, 1.0, {}), ("1MB", "2MB", {}), (0.2, 0.7, {"metric": "latency"})],
)
def test_ranges_that_are_none_are_refused_before_any_work(smallest, largest, options):
    with pytest.raises(BadInput, match="family"):
        blora.compile_family(None, smallest, largest, **options)


def test_a_description_that_says_too_little_is_refused(tmp_path):
    (tmp_path / "family.json").write_text('{"format": 1}')
    with pytest.raises(
        BadInput, match=r"family\.json lacks some of \['aliases', .*'weights_sha256'\]; save the family"
    ):
        blora.load_family(tmp_path)


def test_folders_that_hold_no_whole_family_are_refused(saved, tmp_path):
    with pytest.raises(BadInput, match="holds no family"):
        blora.load_family(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    with pytest.raises(BadInput, match="not what"):
        blora.load_family(damaged)
    edited = tmp_path / "edited"
    shutil.copytree(saved, edited)
    description = json.loads((edited / "family.json").read_text())
    description["anchors"][3]["cost"] += 1
    (edited / "family.json").write_text(json.dumps(description))
    with pytest.raises(BadInput, match="contradicts"):
        blora.load_family(edited)
