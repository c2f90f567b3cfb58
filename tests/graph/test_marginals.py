"""Measured marginals: slopes as finite differences find them, damages as the folded model has them, better plans."""

from __future__ import annotations

import math

import pytest
import torch

import blora_compiler as blora
from blora_compiler.graph import main_output
from blora_compiler.marginals import NEXT_RANKS, measure_marginals
from blora_compiler.profiling import profile
from blora_compiler.rewriting import fold, insert, settle, starting_factors
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Factored, Removed
from tests.graph.test_refit import chain_case
from tests.models import build


def half_distance(program, forms, profiled, factors, batches) -> float:
    branched, _ = insert(program, forms, profiled, factors=factors)
    folded, _ = fold(settle(branched, forms), forms)
    found = []
    with torch.no_grad():
        for batch in batches:
            ours, theirs = (main_output(p.call_graph(batch)) for p in (folded, program))
            found.append(0.5 * float((ours - theirs).square().sum()) / ours[..., 0].numel())
    return sum(found) / len(found)


def test_damage_and_slopes_are_what_the_folded_model_shows():
    program, forms, profiled, batches, _ = chain_case()
    factors = {site.name: (s.A[: forms[site.name].rank], s.B[:, : forms[site.name].rank])
               for site in program.sites for s in (profiled.spectra[site.name],)}  # fmt: skip
    found = measure_marginals(program, forms, profiled, factors, batches)
    assert found.damage == pytest.approx(half_distance(program, forms, profiled, factors, batches), rel=1e-4)
    for name, (A, B) in factors.items():
        spectrum, rank = profiled.spectra[name], forms[name].rank
        last = min(rank + NEXT_RANKS, spectrum.A.shape[0])
        step = 1e-2
        wider = {**forms, name: Factored(last)}
        more = (torch.cat([A, spectrum.A[rank:last]]), torch.cat([B, step * spectrum.B[:, rank:last]], dim=1))
        less = (more[0], torch.cat([B, -step * spectrum.B[:, rank:last]], dim=1))
        up, down = (
            half_distance(program, wider, profiled, {**factors, name: pair}, batches) for pair in (more, less)
        )
        predicted = spectrum.tail[rank] - spectrum.tail[last]
        assert found.ratios[name] == pytest.approx(-0.5 * (up - down) / (2 * step) / predicted, rel=1e-2)


def test_language_models_are_measured_in_nats_and_removed_branches_stay_out():
    program = trace(build("llama"))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (3, 4, 24), generator=generator)
    batches = [{"input_ids": piece, "attention_mask": torch.ones_like(piece)} for piece in ids]
    batches = [{name: value for name, value in batch.items() if name in program.inputs} for batch in batches]
    profiled = profile(program, batches)
    branch = next(site.branch for site in program.sites if site.branch and "mlp" in site.branch)
    forms = {
        site.name: Removed() if site.name.startswith(branch) else Factored(8)
        for site in program.sites
        if site.kind == "projection"
    }
    factors = starting_factors(program.sites, forms, profiled)
    found = measure_marginals(program, forms, profiled, factors, batches)
    branched, _ = insert(program, forms, profiled, factors=factors)
    folded, _ = fold(settle(branched, forms), forms)
    kls = []
    with torch.no_grad():
        for batch in batches:
            ours, theirs = (main_output(p.call_graph(batch)).log_softmax(-1) for p in (folded, program))
            kls.append(float((theirs.exp() * (theirs - ours)).sum(-1).mean()))
    assert found.damage == pytest.approx(sum(kls) / 3, rel=1e-3)
    assert not any(name.startswith(branch) for name in found.ratios)


def test_ratios_scale_half_way_and_roles_speak_for_sites_without_gates():
    program, forms, profiled, batches, _ = chain_case()
    forms = {"first": Factored(4), "second": Dense()}
    factors = starting_factors(program.sites, forms, profiled)
    found = measure_marginals(program, forms, profiled, factors, batches)
    scaled = found.rescaled(profiled, program.sites, forms)
    factor = math.sqrt(found.ratios["first"])
    assert scaled.spectra["first"].tail == pytest.approx(factor * profiled.spectra["first"].tail)
    assert scaled.spectra["second"].tail == pytest.approx(profiled.spectra["second"].tail)  # of another role
    assert scaled.spectra["first"].A is profiled.spectra["first"].A


def test_a_compiled_plan_says_the_damage_that_was_measured():
    model = build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)  # louder than at random, so that there is a KL to measure
    ids = torch.randint(0, 128, (96, 32), generator=torch.Generator().manual_seed(3))
    told: list[blora.compiling.Record] = []
    plain, refitted = (
        blora.compile(model, 0.5, calibration=ids, evaluation=ids[:32], on_record=told.append, **how)
        for how in ({"rounds": 0, "refit": False}, {"rounds": 1})
    )
    records = [record for record in told if record.stage == "refit"]
    assert [len(record.facts["attempts"]) for record in records] in (
        [1, 2],
        [1, 4],
    )  # 2: the second plan is the first
    for compiled, record in zip((plain, refitted), records, strict=True):
        assert compiled.plan.damage == pytest.approx(min(tried["measured"] for tried in record.facts["attempts"]))
        assert compiled.plan.gap is not None
    # The first batches are those that damage is measured on.
    assert plain.plan.damage == pytest.approx(plain.quality["compressed"].kl, rel=0.05)


def test_baseline_measures_and_plans_without_factors_are_left_alone():
    told: list[blora.compiling.Record] = []
    blora.compile(build("llama"), 0.5, damage="whitened", on_record=told.append)
    blora.compile(build("llama"), 1.0, on_record=told.append)
    assert "refit" not in {record.stage for record in told}
