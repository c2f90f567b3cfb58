"""Interpolative forms, in planning: what they cost, when they are offered, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from blora_compiler.cost_models.flops import FlopsCostModel
from blora_compiler.cost_models.kernels import gemm, group_kernels, pointwise
from blora_compiler.cost_models.latency import weight_bytes_read

from blora_compiler.errors import BadInput
from blora_compiler.measuring import uniform_forms
from blora_compiler.plan import Plan, reprice
from blora_compiler.solver import solve
from blora_compiler.values import Dense, Factored, Workload, form_from_json, form_to_json
from tests.planning import planned, site, transformer
from tests.pure.test_kernels import K, Q, V
from tests.pure.test_sharing_plans import NAMES, SharingDamage

WORKLOAD = Workload(tokens=16)
SHARED = Factored(24, NAMES, interpolative=True)


def test_a_pair_costs_rank_squared_less():
    wide = site("up", 64, 160)
    plain, given = (FlopsCostModel().cost(wide, Factored(24, (), each), WORKLOAD) for each in (False, True))
    assert plain.params - given.params == 24**2
    assert given.flops == 2 * 16 * 24 * (64 + 160 - 24)
    assert given.activation_bytes == 4 * 16 * (64 + 24 + 24 + 160 - 24)
    assert weight_bytes_read([wide], (), {"up": Factored(24, (), True)}, WORKLOAD) == given.weight_bytes


def test_of_sharers_the_first_site_is_given_its_outputs():
    costs = [FlopsCostModel().cost(each, SHARED, WORKLOAD).params for each in (Q, K, V)]
    assert costs == [24 * (64 + 64 - 24), 24 * 16, 24 * 16]


def test_kernels_are_the_smaller_products_and_a_copy():
    wide = site("up", 64, 160)
    alone = [shared.kernel for shared in group_kernels([wide], [Factored(24, (), True)], WORKLOAD)]
    assert alone == [gemm(16, 64, 24, "sites"), gemm(16, 24, 136, "sites"), pointwise(2 * 16 * 160, "sites", "split")]
    together = [shared.kernel for shared in group_kernels((Q, K, V), (SHARED,) * 3, WORKLOAD)]
    assert together == [
        gemm(16, 64, 24, "sites"), gemm(16, 24, 72, "sites"), pointwise(2 * 16 * 72, "sites", "split"),
        pointwise(2 * 16 * 64, "sites", "split"),
    ]  # fmt: skip


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.25])
def test_the_same_budget_buys_less_damage(budget):
    sites = transformer(2)
    plain, given = (solve(planned(sites, budget, interpolative=each, rank_multiple=1)) for each in (False, True))
    assert given.cost <= given.limit == plain.limit
    assert given.objective < plain.objective
    factored = [form for name, form in given.forms.items() if isinstance(form, Factored) and name != "lm_head"]
    assert factored and all(form.interpolative for form in factored)
    assert not any(form.interpolative for form in plain.forms.values() if isinstance(form, Factored))


def test_sharers_are_offered_it_only_where_the_first_has_the_outputs():
    narrow_first = [replace(K, rows=Q.rows), Q, V]
    problem = planned(narrow_first, damage_model=SharingDamage(), interpolative=True, rank_multiple=4)
    together = [form for option in problem.options for _, form in option.forms[:1] if len(option.forms) == 3]
    offered = {form.rank: form.interpolative for form in together if isinstance(form, Factored)}
    assert offered[8] and offered[12] and not any(given for rank, given in offered.items() if rank >= 16)
    assert any(rank >= 16 for rank in offered)


def test_a_budget_in_time_refuses_it():
    with pytest.raises(BadInput, match=r"interpolative=True .* with a budget in time leave it out"):
        planned([site("a")], "5ms", interpolative=True)


def test_plans_carry_it_through_json():
    plan = solve(planned([Q, K, V, site("o")], 0.4, damage_model=SharingDamage(), interpolative=True))
    again = Plan.from_json(plan.to_json())
    assert again == plan and any(form.interpolative for form in again.forms.values() if isinstance(form, Factored))
    for form in (Factored(8, (), True), SHARED, Factored(8)):
        assert form_from_json(json.loads(json.dumps(form_to_json(form))), "here") == form
    assert "interpolative" not in form_to_json(Factored(8))
    for wrong in ({"interpolative": 1}, {"interpolative": None}, {"sharers": "q"}, {"given": True}):
        with pytest.raises(BadInput, match="here"):
            form_from_json({"form": "factored", "rank": 8, **wrong}, "here")


def test_more_shared_outputs_than_the_first_site_has_are_refused():
    problem = planned([K, Q, V], 0.9, damage_model=SharingDamage())
    names = ("k", "q", "v")
    plan = solve(problem)
    edited = replace(plan, choices=tuple(replace(choice, form=Factored(24, names, True)) for choice in plan.choices))
    with pytest.raises(BadInput, match=r"k: has 16 outputs, and rank 24 shared interpolative would compute 24"):
        reprice(edited, problem)


@pytest.mark.parametrize("kept", [0.25, 0.5, 0.75])
def test_uniform_forms_keep_the_share_asked_for(kept):
    sites = [site("a", 256, 256), site("b", 256, 1024), site("c", 1024, 256)]
    forms = uniform_forms(sites, kept, interpolative=True)
    for each in sites:
        form = forms[each.name]
        assert form.interpolative and form.rank >= kept * each.break_even_rank
        share = FlopsCostModel().cost(each, form, WORKLOAD).params / each.weight_count
        assert share == pytest.approx(kept, abs=8 * (256 + 1024) / (256 * 1024))
    assert uniform_forms(sites, 1.0, interpolative=True) == dict.fromkeys("abc", Dense())


def test_heads_keep_plain_pairs():
    sites = [site("a"), site("lm_head", 64, 1000, kind="head")]
    problem = planned(sites, 0.4, rules={"lm_head": "compress"}, interpolative=True)
    offered = [pair for option in problem.options for pair in option.forms if isinstance(pair[1], Factored)]
    assert {(name, form.interpolative) for name, form in offered} == {("a", True), ("lm_head", False)}
    plan = solve(problem)
    edited = replace(plan, choices=tuple(replace(each, form=Factored(16, (), True)) for each in plan.choices))
    with pytest.raises(BadInput, match="lm_head: interpolative, but a head's outputs"):
        reprice(edited, problem)


def test_a_rank_beyond_plain_pairs_break_even_is_refused_for_what_it_is():
    problem = planned([site("a")], 0.9)
    plan = solve(problem)
    edited = replace(plan, choices=tuple(replace(each, form=Factored(40, (), True)) for each in plan.choices))
    with pytest.raises(BadInput, match="a: rank 40 is not below 32, the break-even of plain pairs"):
        reprice(edited, problem)
