"""The solver against brute force, against its own certificate, at tight budgets, and when nothing fits."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blora_compiler.solver as solver_module
from blora_compiler.budget import Budget
from blora_compiler.errors import BloraError, InfeasibleBudget, PlanInvalid
from blora_compiler.plan import Plan, check_plan
from blora_compiler.problem import Option
from blora_compiler.solver import (
    MilpSolver,
    c_output_on_stderr,
    certified_gap,
    cheapest_cover,
    smallest_fraction,
    solve,
    spend_what_is_left,
)
from blora_compiler.values import Dense, Factored, Operator, Removed
from tests.planning import ConstantDamage, SmoothDamage, every_selection, planned, site, table_problem, transformer

# ── Against brute force ──────────────────────────────────────────────────────────────────────────────────────────

# From one unit to more than a double resolves, and from far below the solver's tolerances to far above.
COSTS = st.one_of(st.integers(0, 12), st.integers(0, 10**6).map(lambda cost: 2048 * cost), st.integers(0, 10**17))
DAMAGES = st.one_of(st.integers(0, 5).map(float), st.floats(1e-9, 1), st.floats(-14, 6).map(lambda power: 10**power))


@st.composite
def problems(draw, costs=COSTS):
    tables = draw(st.lists(st.lists(st.tuples(costs, DAMAGES), min_size=1, max_size=4), min_size=1, max_size=4))
    tables = [[(cost, 0.0), *rest] for (cost, _), *rest in tables]  # the dense form damages nothing
    removals = draw(st.dictionaries(st.integers(0, (len(tables) - 1) // 2), DAMAGES))
    totals = sorted({cost_of(selection) for selection in every_selection(table_problem(tables, removals))})
    amount = draw(st.one_of(st.sampled_from(totals), st.integers(totals[0], max(totals))))
    return table_problem(tables, removals, max(amount - draw(st.integers(0, 1)), 0))


def cost_of(selection: tuple[Option, ...]) -> int:
    return sum(option.cost for option in selection)


def damage_of(selection: tuple[Option, ...]) -> float:
    return math.fsum(option.damage for option in selection)


@settings(max_examples=250)
@given(problems())
def test_no_plan_is_better_by_more_than_the_certified_gap(problem):
    fitting = [selection for selection in every_selection(problem) if cost_of(selection) <= problem.limit]
    if not fitting:
        with pytest.raises(InfeasibleBudget) as refusal:
            solve(problem)
        cheapest = min(map(cost_of, every_selection(problem)))
        assert refusal.value.smallest_fraction == smallest_fraction(cheapest, problem.baseline)
        return
    plan = solve(problem)
    best = min(map(damage_of, fitting))
    assert plan.cost <= problem.limit
    assert plan.objective >= best * (1 - 1e-12)
    assert plan.objective * (1 - plan.gap) <= best * (1 + 1e-9) + 1e-30, "the certificate promises too much"


@settings(max_examples=250)
@given(problems(costs=st.integers(0, 10**6).map(lambda cost: 2048 * cost)))
def test_the_gap_is_closed_where_costs_are_ordinary(problem):
    """Ordinary: distinguishable beside the solver's tolerance, as multiples of rows x features are."""
    fitting = [selection for selection in every_selection(problem) if cost_of(selection) <= problem.limit]
    if fitting:
        best = min(map(damage_of, fitting))
        plan = solve(problem)
        assert plan.objective <= best * (1 + 2 * MilpSolver.relative_gap) + 1e-30
        assert plan.gap <= 2 * MilpSolver.relative_gap or plan.objective < solver_module.TINY_DAMAGE


@settings(max_examples=100)
@given(problems())
def test_the_cheapest_cover_is_exact(problem):
    cover = cheapest_cover(problem.options)
    assert sorted(name for option in cover for name in option.covered) == sorted(s.name for s in problem.counted)
    cost, damage = min((cost_of(selection), damage_of(selection)) for selection in every_selection(problem))
    assert cost_of(cover) == cost
    assert damage_of(cover) == pytest.approx(damage, rel=1e-12)


@settings(max_examples=100)
@given(problems())
def test_spending_what_is_left_never_damages_and_never_overspends(problem):
    cover = cheapest_cover(problem.options)
    limit = max(problem.limit, cost_of(cover))
    spent = spend_what_is_left(replace(problem, limit=limit), cover)
    assert cost_of(cover) <= cost_of(spent) <= limit
    assert damage_of(spent) <= damage_of(cover)
    assert sorted(name for option in spent for name in option.covered) == sorted(s.name for s in problem.counted)


# ── Tight budgets, odd numbers ───────────────────────────────────────────────────────────────────────────────────


def test_one_unit_of_cost_decides():
    tables = [[(1000, 0.0), (501, 1.0), (500, 5.0)], [(1000, 0.0), (501, 1.0), (500, 5.0)]]
    assert [solve(table_problem(tables, amount=amount)).objective for amount in (1000, 1001, 1002)] == [
        10.0,
        6.0,
        2.0,
    ]


def test_a_selection_above_the_limit_by_less_than_the_tolerance_is_refused():
    """One FLOP too many in 1e15 is invisible to HiGHS, and the best selection here is exactly that."""
    much = 10**15
    tables = [
        [(2 * much + 1, 0.0), (much + 1, 1.0), (much, 2.0)],
        [(2 * much + 1, 0.0), (much + 1, 1.0), (much, 2.0)],
    ]
    plan = solve(table_problem(tables, amount=2 * much + 1))
    assert plan.cost == 2 * much + 1
    assert plan.objective == 3.0
    plan = solve(table_problem(tables, amount=2 * much))
    assert (plan.cost, plan.objective) == (2 * much, 4.0)


def test_small_damages_count_beside_large_ones():
    """Removing costs 1e6 nats, the choice that matters is between 1e-9 and 3e-9."""
    tables = [[(100, 0.0), (50, 1e-9 * (3 - i % 3)), (1, 1e6)] for i in range(12)]
    plan = solve(table_problem(tables, amount=1000))
    assert plan.objective == pytest.approx(4e-9, rel=1e-9)
    assert plan.gap <= 1e-4


def test_damages_too_small_to_scale_count_as_none():
    plan = solve(table_problem([[(100, 0.0), (50, 5e-324)], [(100, 0.0), (40, 2e-313)]], amount=150))
    assert plan.cost <= 150
    assert plan.gap < 1e-290


def test_a_branch_goes_when_that_is_best_and_stays_when_not():
    tables = [[(100, 0.0), (50, 1.0)], [(100, 0.0), (50, 1.0)], [(100, 0.0), (50, 1.0)]]
    gone = solve(table_problem(tables, {0: 0.5}, amount=100))
    assert gone.forms == {"s0": Removed(), "s1": Removed(), "s2": Dense()}
    assert gone.cost == 100
    assert solve(table_problem(tables, {0: 9.0}, amount=200)).forms["s0"] != Removed()


def test_budget_one_changes_nothing_even_where_less_would_cost_nothing():
    problem = planned(transformer(2), 1.0, ConstantDamage(0.0))
    plan = solve(problem)
    assert set(plan.forms.values()) == {Dense()}
    assert (plan.cost, plan.fraction, plan.objective, plan.gap) == (problem.baseline, 1.0, 0.0, 0.0)


def test_an_amount_above_the_baseline_changes_nothing():
    assert set(solve(planned(transformer(1), "1TFLOP")).forms.values()) == {Dense()}


@pytest.mark.parametrize("fraction", [0.2, 0.25, 0.35, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("damage", [SmoothDamage(), ConstantDamage(0.0)], ids=["smooth", "none"])
@pytest.mark.parametrize("sites", [transformer(2, 256, 640), [site("a", 8192, 8192)]], ids=["ten sites", "one site"])
def test_the_budget_is_used_to_one_percent(fraction, damage, sites):
    plan = solve(planned(sites, fraction, damage))
    assert 0.99 * plan.limit <= plan.cost <= plan.limit


def test_scope_model_keeps_the_whole_graph_within_the_budget():
    sites = transformer(2, 256, 640)
    operators = [Operator("attention", "attention", flops="200000*tokens")]
    problem = planned(sites, 0.8, scope="model", operators=operators)
    plan = solve(problem)
    assert plan.fixed == 200000 * 16 + 2 * 16 * sites[-1].weight_count
    assert 0.99 * plan.limit <= plan.cost <= plan.limit == int(0.8 * plan.baseline)
    assert plan.cost == plan.fixed + sum(choice.cost for choice in plan.choices)


def test_the_same_problem_gives_the_same_plan():
    problem = planned(transformer(6, 256, 640), 0.4)
    assert solve(problem) == solve(problem)


def test_less_budget_is_never_less_damage():
    objectives = [
        solve(planned(transformer(4, 256, 640), f)).objective for f in (0.15, 0.2, 0.3, 0.45, 0.6, 0.8, 0.95)
    ]
    assert objectives == sorted(objectives, reverse=True)


# ── When nothing fits ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_infeasible_budget_names_the_smallest_one_and_what_binds():
    sites = transformer(2, 256, 640)
    rules = {"*.layers.0.*": "dense", "*.layers.1.mlp.down_proj": {"min_rank": 64}}
    with pytest.raises(InfeasibleBudget) as refusal:
        solve(planned(sites, 0.3, rules=rules))
    error = refusal.value
    assert error.exit_code == 3
    assert error.binding[:2] == ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
    message = str(error)
    assert "budget 0.3 allows 10.07 MFLOP (10,066,329 FLOP), but the smallest feasible budget is " in message
    assert f"what binds: {error.binding[0]} (dense by rule '*.layers.0.*'), " in message
    assert "% of that" in message
    feasible = solve(planned(sites, error.smallest_fraction, rules=rules))
    just_below = math.nextafter(error.smallest_fraction, 0.0)
    with pytest.raises(InfeasibleBudget):
        solve(planned(sites, just_below, rules=rules))
    assert feasible.cost == feasible.limit


def test_a_rank_that_a_rule_demands_binds():
    rules = {"*.mlp.down_proj": {"min_rank": 24}}
    with pytest.raises(InfeasibleBudget, match=r"up_proj at rank 8, .*") as refusal:
        solve(planned(transformer(1), 0.01, rules=rules))
    assert refusal.value.binding == ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj")
    assert "down_proj at rank 24 (min_rank by rule '*.mlp.down_proj')" in str(refusal.value)


def test_the_fraction_printed_in_the_message_is_feasible():
    rules = {"*": {"min_rank": 8}, "lm_head": "exclude"}
    with pytest.raises(InfeasibleBudget) as refusal:
        solve(planned(transformer(3), 0.01, rules=rules))
    printed = str(refusal.value).split("smallest feasible budget is ")[1].split(":")[0]
    plan = solve(planned(transformer(3), printed, rules=rules))
    assert {str(form) for form in plan.forms.values()} == {"rank 8"}


def test_what_no_form_changes_is_named_first_with_scope_model():
    operators = [Operator("attention", "attention", flops="9000000")]
    with pytest.raises(
        InfeasibleBudget, match=r"what binds: what no form changes \(operators, excluded sites\), 100.0%"
    ):
        solve(planned(transformer(1), 0.1, scope="model", operators=operators))


@given(st.integers(1, 10**20), st.data())
def test_the_smallest_fraction_is_enough_and_the_next_below_is_not(baseline, data):
    cost = data.draw(st.integers(1, baseline))
    fraction = smallest_fraction(cost, baseline)
    assert Budget(fraction, None, "flops", "").limit(baseline) >= cost
    below = math.nextafter(fraction, 0.0)
    assert Budget(below, None, "flops", "").limit(baseline) < cost or cost / baseline == fraction


# ── The door to HiGHS ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [0, 3])
def test_a_status_that_cannot_be_is_reported(status, monkeypatch):
    result = SimpleNamespace(status=status, x=None, message="the solver's words")
    monkeypatch.setattr(solver_module, "linprog", lambda *args, **options: result)
    with pytest.raises(BloraError, match=f"HiGHS failed with status {status}: the solver's words"):
        solve(planned(transformer(1)))


@pytest.mark.parametrize("status", [1, 2, 4])
@pytest.mark.parametrize("program", ["linprog", "milp"])
def test_without_an_answer_the_plan_fits_and_its_gap_is_honest(status, program, monkeypatch):
    best = solve(planned(transformer(2), 0.3))
    result = SimpleNamespace(status=status, x=None, message="")
    monkeypatch.setattr(solver_module, program, lambda *args, **options: result)
    plan = solve(planned(transformer(2), 0.3))
    assert plan.cost <= plan.limit
    assert plan.objective >= best.objective
    assert plan.objective * (1 - plan.gap) <= best.objective * (1 + 1e-9)


def test_a_node_limit_shows_in_the_gap_and_not_in_an_error():
    rng = np.random.default_rng(0)
    tables = [[(97, 0.0), *((int(c), float(d)) for c, d in rng.integers(1, 90, (6, 2)))] for _ in range(40)]
    problem = table_problem(tables, amount=1009)
    hurried, patient = (
        MilpSolver(1e-9, node_limit=1).solve(problem),
        MilpSolver(1e-9, node_limit=10_000).solve(problem),
    )
    check_plan(hurried, problem)
    assert patient.gap <= 1e-9
    assert hurried.objective * (1 - hurried.gap) <= patient.objective <= hurried.objective


def test_a_tightened_program_certifies_nothing(monkeypatch):
    """As if a tolerance had let a selection far above the capacity: what is sought below it misses the best plan."""
    run_highs = MilpSolver._run_highs

    def loose_at_first(self, program, columns, right_side, node_limit):
        tightened = right_side < program.right_side()
        return run_highs(self, program, columns, right_side if tightened else 10 * right_side, node_limit)

    monkeypatch.setattr(MilpSolver, "_run_highs", loose_at_first)
    problem = table_problem([[(11, 0.0), (1, 10.0)], [(6, 0.0), (1, 6.0)], [(6, 0.0), (1, 6.0)]], amount=13)
    best = min(damage_of(selection) for selection in every_selection(problem) if cost_of(selection) <= problem.limit)
    plan = solve(problem)
    assert (best, plan.objective) == (10.0, 12.0)
    assert plan.objective * (1 - plan.gap) <= best * (1 + 1e-9)


def test_a_wrong_solver_is_caught():
    @dataclass(frozen=True)
    class Overspender:
        def solve(self, problem) -> Plan:
            return solve(replace(problem, limit=problem.baseline))

    with pytest.raises(PlanInvalid, match="is above the limit"):
        solve(planned(transformer(1), 0.5), Overspender())


def test_the_gap_is_relative_to_the_objective():
    assert certified_gap(2.0, 1.5) == 0.25
    assert certified_gap(1.0, 1.0 + 1e-9) == 0.0
    assert certified_gap(0.0, 0.0) == 0.0


@pytest.mark.skipif(sys.platform == "win32", reason="there is no libc to print with")
def test_what_c_code_prints_while_solving_stays_out_of_standard_output(capfd):
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    with c_output_on_stderr():
        libc.puts(b"chatter")
        os.write(1, b"and more\n")
    libc.puts(b"after")
    libc.fflush(None)
    printed = capfd.readouterr()
    assert printed.out.split() == ["before", "after"]
    assert sorted(printed.err.split()) == ["and", "chatter", "more"]


# ── Size ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_large_model_is_solved_to_the_gap(capsys):
    """560 sites x 65 forms. The time is printed, not asserted: it depends on what else the machine does."""
    sites = [site for layer in transformer(112, 4096, 11008)[:-1] for site in (layer,)]
    problem = planned(sites, 0.25)
    start = time.perf_counter()
    plan = solve(problem)
    with capsys.disabled():
        print(f"\n{len(sites)} sites, {len(problem.options)} options: solved in {time.perf_counter() - start:.2f} s")
    assert plan.gap <= 1e-4
    assert 0.9999 * plan.limit <= plan.cost <= plan.limit
    assert any(isinstance(form, Factored) for form in plan.forms.values())
