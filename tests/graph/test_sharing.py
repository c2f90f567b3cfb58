"""Sites that share their first factor, on models: the best factors, one parameter in training, folding, saving."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from blora_compiler.data import Batches
from blora_compiler.distillation import DistillConfig, distill
from blora_compiler.errors import BadInput
from blora_compiler.graph import Level, Program, main_output
from blora_compiler.layers import BranchedLinear, FactoredLinear
from blora_compiler.marginals import measure_marginals
from blora_compiler.profiling import DAMPING, Moments, Profile, _accumulate, profile
from blora_compiler.refitting import refit
from blora_compiler.report import installed_form
from blora_compiler.rewriting import fold, insert, settle, starting_factors
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Factored, Form, site_groups
from tests.models import build, example_inputs

RANK = 12
FAMILIES = ("llama", "bert", "vit")  # the models with sites that read one input
LAYER = "model.layers.0"
GATE_UP = (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj")


def case(name: str = "llama") -> tuple[Program, list[Mapping[str, torch.Tensor]], Profile, dict[str, Form]]:
    """A traced model, batches, its profile, and forms in which every group shares."""
    program = trace(build(name), example_inputs(name))
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        batch = dict(program.inputs)
        for key, value in batch.items():
            if value.is_floating_point():
                batch[key] = torch.randn(value.shape, generator=generator)
            elif key == "input_ids":
                batch[key] = torch.randint(1, 100, value.shape, generator=generator)
        batches.append(batch)
    forms: dict[str, Form] = {site.name: Factored(8) for site in program.sites if site.kind != "head"}
    for group in site_groups(program.sites):
        names = tuple(site.name for site in group)
        if len(names) > 1:
            forms |= dict.fromkeys(names, Factored(RANK, names))
    return program, batches, profile(program, batches), forms


def sharing(forms: Mapping[str, Form]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(form.sharers for form in forms.values() if isinstance(form, Factored) and form.sharers))


# ── The measure ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_sharing_damages_lies_between_own_factors_of_the_rank_and_of_half_the_rank():
    """Shared at rank r, it can hold the best r/2 rows of each of two sites, and no more than r for one."""
    program, _, profiled, _ = case()
    sites = [program.site(name) for name in GATE_UP]
    shared, own, half = (
        [profiled.damage(site, form) for site in sites]
        for form in (Factored(RANK, GATE_UP), Factored(RANK), Factored(RANK // 2))
    )
    assert all(least <= damage for least, damage in zip(own, shared, strict=True))
    assert sum(own) < sum(shared) <= sum(half)


def test_the_measured_damage_is_that_of_the_factors():
    """tr(G E C E^T) / 2 of what the factors lose, with the moments that the profile was made from."""
    program, batches, profiled, _ = case()
    names = (f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.k_proj", f"{LAYER}.self_attn.v_proj")
    factors = profiled.shared_factors(names, RANK)
    assert len({id(A) for A, _ in factors.values()}) == 1
    moments = Moments([program.site(name) for name in names], 4096, with_gradients=True)
    _accumulate(program, batches, moments, profiled.seed)
    for name, (A, B) in factors.items():
        site = program.site(name)
        lost = program.graph.get_parameter(site.weight).double() - B.double() @ A.double()
        C, G = moments.input_moment(site)[0].double(), moments.gradient_moment(site).double()
        damped = [M + DAMPING * M.diagonal().diag() for M in (C, G)]
        expected = 0.5 * torch.trace(damped[1] @ lost @ damped[0] @ lost.T)
        assert profiled.damage(site, Factored(RANK, names)) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("kind", ["whitened", "plain"])
def test_only_a_two_sided_profile_measures_sharing(kind):
    program, batches, _, _ = case()
    measured = profile(program, batches, kind=kind)
    gate, up = (program.site(name) for name in GATE_UP)
    assert not measured.can_share((gate, up))
    with pytest.raises(BadInput, match=r"no first factor shared by .* was measured"):
        measured.damage(gate, Factored(RANK, GATE_UP))


def test_a_small_memory_cap_keeps_groups_together(tmp_path):
    program, batches, profiled, _ = case()
    pieces = profile(program, batches, memory_bytes=1, cache=tmp_path)
    again = profile(program, batches, memory_bytes=1, cache=tmp_path)
    assert profiled.shared.keys() == pieces.shared.keys() == again.shared.keys() and len(profiled.shared) == 4
    for name in GATE_UP:
        expected = torch.tensor(profiled.shared[GATE_UP][name].tail)
        torch.testing.assert_close(torch.tensor(pieces.shared[GATE_UP][name].tail), expected, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(torch.tensor(again.shared[GATE_UP][name].tail), expected, rtol=1e-4, atol=1e-9)
        assert torch.equal(again.shared[GATE_UP][name].B, pieces.shared[GATE_UP][name].B)
    assert again.shared[GATE_UP][GATE_UP[0]].A is again.shared[GATE_UP][GATE_UP[1]].A


# ── Through the stages ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
def test_insert_keeps_outputs_and_trains_one_parameter(name):
    program, _, profiled, forms = case(name)
    inserted, _ = insert(program, forms, profiled)
    assert inserted.level == Level.BRANCHED
    for sharers in sharing(forms):
        modules = [inserted.form_module(site) for site in sharers]
        assert all(isinstance(module, BranchedLinear) for module in modules)
        assert len({id(module.A) for module in modules}) == 1
        assert len({id(module.B) for module in modules}) == len(sharers)
    assert sharing(forms)


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_keeps_outputs_and_the_factor_one(name):
    program, batches, profiled, forms = case(name)
    starts = refit(program, forms, starting_factors(program.sites, forms, profiled), batches)
    settled = settle(insert(program, forms, profiled, factors=starts)[0], forms)
    for module in settled.tree.modules():  # as after training: gates fold into what no other site has
        if isinstance(module, BranchedLinear):
            module.gates.data.uniform_(0.5, 1.5)
    with torch.no_grad():
        before = main_output(settled.call_tree(settled.inputs))
        folded, _ = fold(settled, forms)
        after = main_output(folded.call_tree(folded.inputs))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    for sharers in sharing(forms):
        modules = [folded.form_module(site) for site in sharers]
        assert all(isinstance(module, FactoredLinear) for module in modules)
        assert len({id(module.A) for module in modules}) == 1
        assert not any(module.A is settled.form_module(site).A for module, site in zip(modules, sharers, strict=True))
        assert installed_form(folded, sharers[0], Dense()) == forms[sharers[0]]
    stored = sum(parameter.numel() for parameter in folded.tree.parameters())
    separate = sum(tensor.numel() for tensor in folded.tree.state_dict().values())
    assert stored < separate


def test_refitting_keeps_the_factor_one_and_marginals_see_it():
    program, batches, profiled, forms = case()
    start = starting_factors(program.sites, forms, profiled)
    fitted = refit(program, forms, start, batches)
    for sharers in sharing(forms):
        for site in sharers[1:]:
            torch.testing.assert_close(fitted[site][0], fitted[sharers[0]][0], rtol=1e-5, atol=1e-6)
    marginals = measure_marginals(program, forms, profiled, fitted, batches)
    assert marginals.damage > 0 and set(GATE_UP) <= set(marginals.ratios)
    rescaled = marginals.rescaled(profiled, program.sites, forms)
    gate = program.site(GATE_UP[0])
    for form in (Factored(RANK), Factored(RANK, GATE_UP)):  # one factor for both ways, or they would not compare
        assert rescaled.damage(gate, form) / profiled.damage(gate, form) == pytest.approx(
            rescaled.damage(gate, Factored(4)) / profiled.damage(gate, Factored(4))
        )


def test_training_moves_the_factor_for_all_its_sites():
    program, _, profiled, forms = case()
    inserted, _ = insert(program, forms, profiled)
    first = inserted.form_module(GATE_UP[0])
    before = first.A.detach().clone()
    config = DistillConfig(steps=3, batch=2, length=16, learning_rate=1e-3, autocast="off", retention_fraction=0.0)
    sequences = torch.randint(1, 100, (6, 16), generator=torch.Generator().manual_seed(2))
    distill(inserted.tree, program.tree, Batches(sequences, 2, seed=0), config, progress=False)
    assert not torch.equal(first.A, before)
    assert inserted.form_module(GATE_UP[1]).A is first.A
