"""Sites that share their first factor, in planning: what that costs, when it is offered, chosen and refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
from blora_compiler.cost_models.flops import FlopsCostModel
from blora_compiler.cost_models.kernels import gemm, group_kernels, pointwise
from blora_compiler.cost_models.latency import LatencyCostModel, weight_bytes_read
from blora_compiler.cost_models.roofline import RooflineClock

from blora_compiler.budget import Budget
from blora_compiler.errors import BadInput
from blora_compiler.plan import Plan, price_forms, reprice
from blora_compiler.problem import Problem, build_problem
from blora_compiler.solver import solve
from blora_compiler.sweep import sweep
from blora_compiler.values import Dense, Factored, Form, Site, Workload, form_from_json, form_to_json
from tests.made_devices import device
from tests.planning import SmoothDamage, planned, site
from tests.pure.test_kernels import K, Q, V

NAMES = ("q", "k", "v")
SHARED = Factored(24, NAMES)
WORKLOAD = Workload(tokens=16)


@dataclass(frozen=True)
class SharingDamage(SmoothDamage):
    """A shared first factor damages `factor` times as much as one of the site's own at the same rank."""

    factor: float = 1.0

    def can_share(self, sites: list[Site]) -> bool:
        return True

    def damage(self, site: Site, form: Form) -> float:
        if isinstance(form, Factored) and form.sharers:
            return self.factor * super().damage(site, Factored(min(form.rank, site.out_features)))
        return super().damage(site, form)


def attention(factor: float = 1.0, **arguments):
    return planned([Q, K, V, site("o", 64, 64)], damage_model=SharingDamage(factor=factor), **arguments)


# ── Costs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_factor_counts_once_with_the_first_site():
    costs = [FlopsCostModel().cost(s, SHARED, WORKLOAD) for s in (Q, K, V)]
    assert [cost.flops for cost in costs] == [2 * 16 * 24 * (64 + 64), 2 * 16 * 24 * 16, 2 * 16 * 24 * 16]
    assert sum(cost.params for cost in costs) == 24 * 64 + 24 * 96
    assert costs[0].activation_bytes == 4 * 16 * (64 + 2 * 24 + 64)
    assert costs[1].activation_bytes == 4 * 16 * (24 + 16)
    forms = dict.fromkeys(NAMES, SHARED)
    assert weight_bytes_read((Q, K, V), (), forms, WORKLOAD) == sum(cost.weight_bytes for cost in costs)


def test_two_gemms_and_one_split_run_for_all_of_them():
    kernels = [shared.kernel for shared in group_kernels((Q, K, V), (SHARED,) * 3, WORKLOAD)]
    assert kernels == [
        gemm(16, 64, 24, "sites"), gemm(16, 24, 96, "sites"), pointwise(2 * 16 * 96, "sites", "split"),
    ]  # fmt: skip
    shares = [shared.shares for shared in group_kernels((Q, K, V), (SHARED,) * 3, WORKLOAD)]
    assert all(dict(of_kernel) == pytest.approx({0: 64 / 96, 1: 16 / 96, 2: 16 / 96}) for of_kernel in shares)


def test_a_dense_site_beside_sharers_is_packed_with_their_first_factor():
    pair = Factored(8, ("k", "v"))
    kernels = group_kernels((Q, K, V), (Dense(), pair, pair), WORKLOAD)
    assert [shared.kernel for shared in kernels] == [
        gemm(16, 64, 72, "sites"), pointwise(2 * 16 * 72, "sites", "split"),
        gemm(16, 8, 32, "sites"), pointwise(2 * 16 * 32, "sites", "split"),
    ]  # fmt: skip
    assert dict(kernels[0].shares) == pytest.approx({0: 64 / 72, 1: 4 / 72, 2: 4 / 72})


# ── Offered and chosen ───────────────────────────────────────────────────────────────────────────────────────────


def shares(form: Form) -> bool:
    return isinstance(form, Factored) and bool(form.sharers)


def ranks_that_share(problem: Problem) -> list[int]:
    """The ranks of the options that share; each gives all its sites one form."""
    found = [dict(option.forms) for option in problem.options if any(shares(form) for _, form in option.forms)]
    assert all(set(forms) == set(NAMES) and len(set(forms.values())) == 1 for forms in found)
    return [forms["q"].rank for forms in found]


def test_ranks_go_up_to_the_break_even_of_all_sites_together():
    assert ranks_that_share(attention()) == [8, 16, 24, 32]  # below 64 * 96 / (64 + 96) = 38.4
    assert K.break_even_rank == 13


@pytest.mark.parametrize(
    ("rules", "ranks"),
    [
        ({"k": "dense"}, []), ({"q": {"min_rank": 16}, "v": {"max_rank": 24}}, [16, 24]),
        ({"k": {"max_rank": 4}}, [1, 2, 3, 4]), ({"q": {"min_rank": 16}, "k": {"max_rank": 8}}, []),
    ],
)  # fmt: skip
def test_rules_of_every_site_hold(rules, ranks):
    assert ranks_that_share(attention(rules=rules)) == ranks


def test_a_damage_model_that_knows_nothing_of_it_offers_nothing():
    assert ranks_that_share(planned([Q, K, V])) == []


@pytest.mark.parametrize(("factor", "pays"), [(1.0, True), (50.0, False)])
@pytest.mark.parametrize("budget", [0.3, 0.5])
def test_it_is_chosen_where_it_damages_less(factor, pays, budget):
    problem = attention(factor, budget=budget)
    plan = solve(problem)
    assert any(map(shares, plan.forms.values())) == pays
    assert plan.cost <= plan.limit
    (swept,) = sweep(problem, [Budget.parse(budget)])
    assert isinstance(swept, Plan)
    assert swept.objective == pytest.approx(plan.objective, rel=1e-3)


@pytest.mark.parametrize(("factor", "pays"), [(0.01, True), (50.0, False)])
def test_under_a_budget_in_time_it_competes_with_every_combination(factor, pays):
    problem = build_problem(
        [replace(s, in_features=16 * s.in_features, out_features=16 * s.out_features) for s in (Q, K, V)],
        budget=Budget.parse("60%", "latency"),
        cost_model=LatencyCostModel(RooflineClock(device(launch_ns=1))),
        damage_model=SharingDamage(factor=factor),
        workload=WORKLOAD,
    )
    plan = solve(problem)
    assert any(map(shares, plan.forms.values())) == pays
    assert plan.cost <= plan.limit


# ── Plans by hand ────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_keeps_the_sharers():
    assert form_from_json(form_to_json(SHARED), "here") == SHARED
    plan = solve(attention(budget=0.4))
    assert Plan.from_json(plan.to_json()) == plan
    assert "first factor with k, v" in plan.table()


@pytest.mark.parametrize("sharers", [["q"], ["q", "q"], [1, 2], "qk"])
def test_sharers_that_are_none_are_refused(sharers):
    with pytest.raises(BadInput):
        form_from_json({"form": "factored", "rank": 8, "sharers": sharers}, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": Factored(16, NAMES)}, "but k has rank 16 shared; give all of them one rank"),
        ({"k": Factored(8)}, "but k has rank 8; give all of them one rank"),
        ({"o": SHARED}, "o: shares its first factor with q, k, v, but is not among them"),
        (dict.fromkeys(NAMES, Factored(40, NAMES)), "rank 40 costs no less than the dense layer \\(break-even 39"),
        (dict.fromkeys(("q", "k"), Factored(8, ("q", "k"))), "no first factor can be shared by q, k"),
    ],
)
def test_a_plan_edited_by_hand_is_told_what_does_not_fit(changes, message):
    problem = attention(budget=0.9)
    forms = {**dict.fromkeys(NAMES, SHARED), "o": Factored(8)}
    plan = price_forms(problem, forms, gap=None)
    assert reprice(plan, problem) == plan
    edited = [replace(choice, form=changes.get(choice.site, choice.form)) for choice in plan.choices]
    with pytest.raises(BadInput, match=message):
        reprice(replace(plan, choices=tuple(edited)), problem)


def test_an_older_plan_file_reads_as_before():
    plan = solve(planned([Q, K, V]))
    record = json.loads(plan.to_json())
    assert all("sharers" not in choice for choice in record["choices"])
