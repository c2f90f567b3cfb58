"""Plans for many budgets at once: against brute force, the linear relaxation, and the solver's own plans."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import blora_compiler.sweep as sweep_module
from blora_compiler.budget import Budget
from blora_compiler.errors import BadInput, InfeasibleBudget
from blora_compiler.plan import Plan, check_plan
from blora_compiler.problem import DamageKind, Option, Problem
from blora_compiler.solver import TINY_DAMAGE, MilpSolver, solve
from blora_compiler.sweep import ACCEPTED_GAP, _Path, sweep
from blora_compiler.values import Dense, Factored, Form, Removed, Site
from tests.planning import (
    ConstantDamage,
    SmoothDamage,
    TableModel,
    every_selection,
    planned,
    site,
    table_problem,
    transformer,
)

# ── Small problems whose sets nest: site in group in branch ──────────────────────────────────────────────────────

COSTS = st.one_of(st.integers(0, 12), st.integers(0, 10**6).map(lambda cost: 2048 * cost), st.integers(0, 10**17))
ORDINARY_COSTS = st.integers(0, 10**6).map(lambda cost: 2048 * cost)
DAMAGES = st.one_of(st.integers(0, 5).map(float), st.floats(1e-9, 1), st.floats(-14, 6).map(lambda power: 10**power))


def nested_problem(
    tables: list[list[tuple[int, float]]], groups: set[int], removals: Mapping[int, float], branch_size: int = 3
) -> Problem:
    """A problem with these numbers, its own budget at the baseline.

    Args:
        tables: for each site (cost, damage) of its dense form, then of rank 1, 2, ...
        groups: indices g such that sites g and g + 1, of one branch, are offered together only.
        removals: index of a branch -> damage of removing it; a branch is `branch_size` neighbouring sites.
    """
    base = table_problem(tables)
    branch_of = [index // branch_size for index in range(len(tables))]
    sites = tuple(
        replace(member, branch=f"b{branch}" if branch in removals else None)
        for member, branch in zip(base.sites, branch_of, strict=True)
    )
    offered = [[option for option in base.options if option.covered == (member.name,)] for member in sites]
    options: list[Option] = []
    for index, of_site in enumerate(offered):
        if index in groups:
            options += [together(pair) for pair in product(of_site, offered[index + 1])]
        elif index - 1 not in groups:
            options += of_site
    damages = {(option.covered[0], option.forms[0][1]): option.damage for option in base.options}
    costs = {(option.covered[0], option.forms[0][1]): option.cost for option in base.options}
    for branch, damage in removals.items():
        members = [member for member in sites if member.branch == f"b{branch}"]
        options.append(Option(tuple((member.name, Removed()) for member in members), 0, damage))
        damages[members[-1].name, Removed()] = damage
    model = TableModel(costs, damages)
    return replace(base, sites=sites, options=tuple(options), cost_model=model, damage_model=model)


def together(options: tuple[Option, ...]) -> Option:
    forms = tuple(form for option in options for form in option.forms)
    return Option(forms, cost_of(options), damage_of(options))


def cost_of(selection: tuple[Option, ...]) -> int:
    return sum(option.cost for option in selection)


def damage_of(selection: tuple[Option, ...]) -> float:
    return math.fsum(option.damage for option in selection)


def amounts(*limits: int) -> list[Budget]:
    return [Budget(None, limit, "flops", f"{limit}FLOP") for limit in limits]


@st.composite
def problems_and_limits(draw, costs=COSTS):
    tables = draw(st.lists(st.lists(st.tuples(costs, DAMAGES), min_size=1, max_size=3), min_size=1, max_size=6))
    tables = [[(cost, 0.0), *rest] for (cost, _), *rest in tables]  # the dense form damages nothing
    if len(tables) >= 4 and draw(st.booleans()):  # some alike, so that there is something to aggregate
        tables[3:] = tables[: len(tables) - 3]
    groups = {index for index in draw(st.sets(st.sampled_from([0, 3]))) if index + 1 < len(tables)}
    removals = draw(st.dictionaries(st.integers(0, (len(tables) - 1) // 3), st.one_of(DAMAGES, st.just(1.0))))
    problem = nested_problem(tables, groups, removals)
    totals = sorted({cost_of(selection) for selection in every_selection(problem)})
    limits = draw(st.lists(st.one_of(st.sampled_from(totals), st.integers(0, totals[-1])), min_size=1, max_size=5))
    return problem, [max(0, limit - draw(st.integers(0, 1))) for limit in limits]


# ── Against brute force ──────────────────────────────────────────────────────────────────────────────────────────


def least_damages(problem: Problem, limits: list[int]) -> list[float | None]:
    """For each limit the damage of the best selection, or None where none fits."""
    totals = [(cost_of(selection), damage_of(selection)) for selection in every_selection(problem)]
    return [min((damage for cost, damage in totals if cost <= limit), default=None) for limit in limits]


@seed(20)
@settings(max_examples=200)
@given(problems_and_limits())
def test_no_plan_is_better_by_more_than_the_certified_gap(case):
    problem, limits = case
    for result, limit, best in zip(
        sweep(problem, amounts(*limits)), limits, least_damages(problem, limits), strict=True
    ):
        if best is None:
            assert isinstance(result, InfeasibleBudget)
            continue
        assert result.cost <= limit == result.limit
        check_plan(result, replace(problem, budget=amounts(limit)[0], limit=limit))
        if limit < problem.baseline:
            assert result.objective >= best * (1 - 1e-12)
            assert result.objective * (1 - result.gap) <= best * (1 + 1e-9) + 1e-30, (
                "the certificate promises too much"
            )


@seed(21)
@settings(max_examples=150)
@given(problems_and_limits(costs=ORDINARY_COSTS))
def test_the_gap_is_closed_where_costs_are_ordinary(case):
    problem, limits = case
    for result, best in zip(sweep(problem, amounts(*limits)), least_damages(problem, limits), strict=True):
        if isinstance(result, Plan):
            assert result.gap <= ACCEPTED_GAP or result.objective < TINY_DAMAGE
            assert result.limit >= problem.baseline or result.objective <= best * (1 + 2 * ACCEPTED_GAP) + 1e-30


@seed(22)
@settings(max_examples=200)
@given(problems_and_limits(), st.floats(-20, 3).map(lambda power: 10**power))
def test_every_price_proves_a_bound_that_holds_exactly(case, price):
    """Compared as fractions: not one unit in the last place too high."""
    problem, limits = case
    path = _Path.of(problem.options)
    totals = [
        (cost_of(selection), sum(Fraction(option.damage) for option in selection))
        for selection in every_selection(problem)
    ]
    assert path.least_cost == min(cost for cost, _ in totals)
    for limit in limits:
        fitting = [damage for cost, damage in totals if cost <= limit]
        if fitting:
            for tried in (price, path._where_the_path_fits(limit)[1]):
                assert path._relaxed(tried, limit).bound <= min(fitting)


@seed(23)
@settings(max_examples=100)
@given(problems_and_limits(costs=st.integers(0, 50)), st.data())
def test_the_bound_is_the_value_of_the_linear_relaxation(case, data):
    problem, limits = case
    path = _Path.of(problem.options)
    limit = max(path.least_cost, limits[0])
    names = [member.name for member in problem.counted]
    options = problem.options
    result = linprog(
        [option.damage for option in options],
        A_eq=np.array([[name in option.covered for option in options] for name in names], float),
        b_eq=np.ones(len(names)),
        A_ub=[[option.cost for option in options]],
        b_ub=[limit],
    )
    bound = path._relaxed(path._where_the_path_fits(limit)[1], limit).bound
    most = max(option.damage for option in options)
    assert bound == pytest.approx(result.fun, rel=1e-6, abs=1e-6 * most)


# ── Against the solver ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class DamageByRole:
    """What a prior says: the same for the same role in every layer."""

    kind: DamageKind = "prior"
    unit: str = "relative"
    power: float = 1.7

    def damage(self, site: Site, form: Form) -> float:
        weight = 1e-3 * (1 + len(site.role) % 4)
        match form:
            case Dense():
                return 0.0
            case Factored(rank):
                return weight * (1 - rank / min(site.in_features, site.out_features)) ** self.power
        return 3 * weight


FRACTIONS = [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


def budgets(*fractions: float | str) -> list[Budget]:
    return [Budget.parse(fraction) for fraction in fractions]


@pytest.mark.parametrize("damage", [SmoothDamage(), DamageByRole()], ids=["by site", "by role"])
@pytest.mark.parametrize("scope", ["sites", "model"])
def test_plans_are_as_good_as_the_solvers(damage, scope):
    sites = transformer(3, 256, 640)
    fractions = (0.2, 0.35, 0.6, 0.9)
    problem = planned(sites, 1.0, damage, scope=scope, rules={"lm_head": "exclude"})
    for fraction, plan in zip(fractions, sweep(problem, budgets(*fractions)), strict=True):
        alone = planned(sites, fraction, damage, scope=scope, rules={"lm_head": "exclude"})
        if isinstance(plan, InfeasibleBudget):  # scope model: the excluded head alone is above the least budgets
            with pytest.raises(InfeasibleBudget):
                solve(alone)
            continue
        solved = solve(alone)
        check_plan(plan, alone)
        assert plan.gap <= ACCEPTED_GAP
        assert plan.objective * (1 - plan.gap) <= solved.objective * (1 + 1e-12)
        assert solved.objective * (1 - solved.gap) <= plan.objective * (1 + 1e-12)
        assert (plan.limit, plan.budget, plan.fixed) == (solved.limit, solved.budget, solved.fixed)


def test_less_budget_is_never_less_damage_and_the_order_is_the_callers():
    problem = planned(transformer(5, 256, 640), 0.5, DamageByRole())
    fractions = [round(0.1 + 0.01 * step, 2) for step in range(90)]
    shuffled = random.Random(7).sample(fractions, len(fractions))
    plans = sweep(problem, budgets(*shuffled))
    assert [plan.budget for plan in plans] == [str(fraction) for fraction in shuffled]
    in_order = [plan.objective for _, plan in sorted(zip(shuffled, plans, strict=True), key=lambda pair: pair[0])]
    assert in_order == sorted(in_order, reverse=True)


def test_a_plan_of_a_smaller_budget_stands_where_it_is_better(monkeypatch):
    """Within the gap a larger budget can end with more damage; then the smaller one's plan is taken."""
    problem = planned(transformer(3, 256, 640), 0.5)
    path_selection = _Path.selection
    used: list[int] = []

    def selection(path, capacity):
        used.append(capacity)
        return path_selection(path, used[0] - 10**6 if len(used) > 1 else capacity)

    monkeypatch.setattr(sweep_module, "ACCEPTED_GAP", 1.0)
    monkeypatch.setattr(_Path, "selection", selection)
    smaller, larger = sweep(problem, budgets(0.4, 0.42))
    assert larger.forms == smaller.forms
    assert (larger.budget, larger.objective) == ("0.42", smaller.objective)


def test_the_problems_own_budget_is_ignored():
    sites = transformer(2)
    asked = budgets(0.3, 0.7)
    assert sweep(planned(sites, 0.05), asked) == sweep(planned(sites, 1.0), asked)


# ── Ends of the scale ────────────────────────────────────────────────────────────────────────────────────────────


def test_budget_one_changes_nothing_even_where_less_would_cost_nothing():
    problem = planned(transformer(2), 0.5, ConstantDamage(0.0))
    (plan,) = sweep(problem, budgets(1.0))
    assert set(plan.forms.values()) == {Dense()}
    assert (plan.cost, plan.objective, plan.gap) == (problem.baseline, 0.0, 0.0)


def test_infeasible_budgets_come_back_as_the_error_the_solver_raises():
    sites, rules = transformer(2, 256, 640), {"*.layers.0.*": "dense", "*.layers.1.mlp.down_proj": {"min_rank": 64}}
    refused, planned_one, refused_amount = sweep(planned(sites, 0.5, rules=rules), budgets(0.3, 0.9, "10FLOP"))
    with pytest.raises(InfeasibleBudget) as raised:
        solve(planned(sites, 0.3, rules=rules))
    assert isinstance(refused, InfeasibleBudget)
    assert isinstance(planned_one, Plan)
    assert str(refused) == str(raised.value)
    assert refused.binding == raised.value.binding
    assert "budget 10FLOP allows 10 FLOP" in str(refused_amount)
    problem = planned(sites, 0.5, rules=rules)
    least, below = sweep(problem, budgets(refused.smallest_fraction, math.nextafter(refused.smallest_fraction, 0.0)))
    assert least.cost == least.limit
    assert isinstance(below, InfeasibleBudget)


def test_budgets_of_another_metric_are_refused_all_at_once():
    with pytest.raises(BadInput) as refusal:
        sweep(planned(transformer(1)), budgets(0.5, "12ms", "4MB"))
    message = str(refusal.value)
    assert "2 problems" in message
    assert (
        "budget 12ms counts latency, but the problem counts flops; "
        "give a budget in flops, or build the problem for latency" in message
    )
    assert "budget 4MB counts bytes, but the problem counts flops" in message


def test_no_budgets_no_plans():
    assert sweep(planned(transformer(1)), []) == []


@pytest.mark.parametrize("damage", [SmoothDamage(), ConstantDamage(0.0)], ids=["smooth", "none"])
@pytest.mark.parametrize("sites", [transformer(2, 256, 640), [site("a", 8192, 8192)]], ids=["ten sites", "one site"])
def test_the_budget_is_used_to_one_percent(damage, sites):
    for plan in sweep(planned(sites, 0.5, damage), budgets(0.2, 0.25, 0.35, 0.5, 0.75, 0.9, 0.99)):
        assert 0.99 * plan.limit <= plan.cost <= plan.limit


# ── Odd numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("much", [500, 10**15, 10**20])
def test_one_unit_of_cost_decides(much):
    """Also where a double cannot tell one unit, and where 64 bits do not hold the sum."""
    table = [(2 * much, 0.0), (much + 1, 1.0), (much, 5.0)]
    plans = sweep(table_problem([table, table]), amounts(2 * much, 2 * much + 1, 2 * much + 2))
    assert [plan.objective for plan in plans] == [10.0, 6.0, 2.0]
    assert [plan.cost for plan in plans] == [2 * much, 2 * much + 1, 2 * much + 2]


def test_small_damages_count_beside_large_ones():
    tables = [[(100, 0.0), (50, 1e-9 * (3 - i % 3)), (1, 1e6)] for i in range(12)]
    (plan,) = sweep(table_problem(tables), amounts(1000))
    assert plan.objective == pytest.approx(4e-9, rel=1e-9)
    assert plan.gap <= ACCEPTED_GAP


def test_a_price_beyond_a_double_proves_nothing_and_breaks_nothing():
    bound = _Path.of(table_problem([[(10**9, 0.0), (10**8, 1.0)]]).options)._relaxed(1e307, 10**8).bound
    assert bound == 0.0


def test_equal_damage_is_spent_and_a_branch_put_back():
    """Removing the branch and keeping its sites at the least rank damage alike; what fits is the better reading."""
    problem = table_problem([[(100, 0.0), (10, 1.0), (11, 1.0)], [(100, 0.0), (10, 1.0)], [(50, 0.0)]], {0: 2.0})
    full, removed = sweep(problem, amounts(71, 69))
    assert full.forms == {"s0": Factored(2), "s1": Factored(1), "s2": Dense()}
    assert removed.forms == {"s0": Removed(), "s1": Removed(), "s2": Dense()}


def test_sets_inside_that_leave_a_site_open_cannot_stand_in_for_the_whole():
    """A site that is offered as part of the branch only."""
    problem = nested_problem([[(10, 0.0), (4, 1.0)], [(10, 0.0)], [(10, 0.0), (5, 1.0)]], set(), {0: 9.0})
    without_middle = [option for option in problem.options if option.covered != ("s1",)]
    whole = Option((("s0", Dense()), ("s1", Dense()), ("s2", Dense())), 30, 0.0)
    path = _Path.of([*without_middle, whole])
    selection, bound = path.selection(29)
    assert [option.damage for option in selection] == [9.0]
    assert path.least_cost == 0
    assert bound <= 9.0


def test_options_that_overlap_in_part_are_a_defect():
    first = Option((("a", Dense()), ("b", Dense())), 1, 0.0)
    second = Option((("b", Dense()), ("c", Dense()), ("d", Dense())), 1, 0.0)
    with pytest.raises(AssertionError, match="overlaps another in part"):
        _Path.of([first, second])


# ── Alike sets are one kind ──────────────────────────────────────────────────────────────────────────────────────


def test_identical_layers_make_no_more_work():
    few, many = (_Path.of(planned(transformer(n, 256, 640), 0.5, DamageByRole()).options) for n in (2, 40))
    assert len(few.kinds) == len(many.kinds) == 3  # attention's sites, two MLP sites, two branches
    assert len(few.edges) == len(many.edges)
    assert many.start_cost == many.saved[-1] + many.least_cost


def test_aggregated_equals_unaggregated():
    """Changing every damage in its last digits makes each layer a kind of its own, and nothing else."""
    problem = planned(transformer(4, 256, 640), 0.5, DamageByRole())
    told_apart = [
        replace(option, damage=option.damage * (1 + 1e-14 * (index + 1)))
        for index, option in enumerate(problem.options)
    ]
    aggregated, separate = _Path.of(problem.options), _Path.of(told_apart)
    assert len(separate.kinds) > 4 * len(aggregated.kinds)
    for fraction in FRACTIONS:
        capacity = Budget.parse(fraction).limit(problem.baseline)
        bounds = [
            path._relaxed(path._where_the_path_fits(capacity)[1], capacity).bound for path in (aggregated, separate)
        ]
        assert bounds[0] == pytest.approx(bounds[1], rel=1e-10)
        if fraction not in (0.2, 0.5, 0.9):
            continue  # the integer program of sets told apart takes its time
        (one, bound), (other, other_bound) = aggregated.selection(capacity), separate.selection(capacity)
        assert max(cost_of(one), cost_of(other)) <= capacity
        assert damage_of(one) == pytest.approx(damage_of(other), rel=2 * ACCEPTED_GAP)
        assert max(bound, other_bound) <= min(damage_of(one), damage_of(other)) * (1 + 1e-10)


# ── When exchanges do not suffice ────────────────────────────────────────────────────────────────────────────────


def hard_problem() -> Problem:
    """Few sites whose costs fit together badly: the relaxation alone proves little."""
    rng = np.random.default_rng(3)
    tables = [[(97, 0.0), *((int(c), float(d)) for c, d in rng.integers(1, 90, (4, 2)))] for _ in range(8)]
    return table_problem([*tables, *tables], {0: 60.0, 2: 75.0})


def test_the_integer_program_over_kinds_closes_the_gap_alone(monkeypatch):
    limits = range(160, 1000, 90)
    solved = [solve(replace(hard_problem(), limit=limit, budget=amounts(limit)[0])) for limit in limits]

    def refused(self, problem):
        raise AssertionError(f"a plan of its own for {problem.budget}")

    monkeypatch.setattr(MilpSolver, "solve", refused)
    searched: list[int] = []
    run_highs = _Path._run_highs
    monkeypatch.setattr(_Path, "_run_highs", lambda *args: searched.append(args[2]) or run_highs(*args))
    plans = sweep(hard_problem(), amounts(*limits))
    assert searched
    assert [plan.objective for plan in plans] == pytest.approx([plan.objective for plan in solved], rel=ACCEPTED_GAP)
    assert max(plan.gap for plan in plans) <= ACCEPTED_GAP


def test_without_its_answer_the_solver_plans_that_budget(monkeypatch):
    expected = sweep(hard_problem(), amounts(500))[0]
    monkeypatch.setattr(sweep_module, "milp", lambda *args, **options: SimpleNamespace(x=None))
    (plan,) = sweep(hard_problem(), amounts(500))
    assert plan.gap <= ACCEPTED_GAP
    assert plan.objective == pytest.approx(expected.objective, rel=ACCEPTED_GAP)


def test_the_better_plan_stands_when_the_solver_finds_none_as_good(monkeypatch):
    problem = planned(transformer(2), 0.5)
    best = sweep(problem, budgets(0.5))[0]
    worse = solve(planned(transformer(2), 0.4))
    monkeypatch.setattr(sweep_module, "ACCEPTED_GAP", -1.0)
    monkeypatch.setattr(MilpSolver, "solve", lambda self, problem: worse)
    assert sweep(problem, budgets(0.5))[0].objective == pytest.approx(best.objective, rel=ACCEPTED_GAP)


# ── Size ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_twenty_budgets_of_a_large_model_need_no_search_of_their_own(capsys, monkeypatch):
    """880 sites x 65 forms, layers alike. The time is printed, not asserted: the machine decides."""
    problem = planned(transformer(176, 4096, 11008), 0.5, DamageByRole())
    searches: list[str] = []
    solve_alone = MilpSolver.solve
    monkeypatch.setattr(
        MilpSolver, "solve", lambda self, problem: searches.append(problem.budget.text) or solve_alone(self, problem)
    )
    start = time.perf_counter()
    plans = sweep(problem, budgets(*(round(0.05 * step, 2) for step in range(1, 20))))
    with capsys.disabled():
        print(f"\n{len(problem.counted)} sites, {len(problem.options)} options: ", end="")
        print(f"{len(plans)} budgets in {time.perf_counter() - start:.2f} s")
    assert searches == []
    assert max(plan.gap for plan in plans) <= ACCEPTED_GAP
