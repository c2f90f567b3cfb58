"""Plans about time: what sites cost together, plans within a latency budget, and predictions of whole graphs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from blora_compiler.cost_models.kernels import SESSION, gemm, pointwise
from blora_compiler.cost_models.latency import LatencyCostModel, ScaledClock, kernels_of, weight_bytes_read
from blora_compiler.cost_models.measured import MeasuredClock
from blora_compiler.cost_models.prediction import LIMITS, Predictor, SiteWork
from blora_compiler.cost_models.roofline import RooflineClock

from blora_compiler.budget import Budget
from blora_compiler.errors import InfeasibleBudget
from blora_compiler.plan import check_plan, price_forms, reprice, with_digits
from blora_compiler.problem import Problem
from blora_compiler.solver import MilpSolver, cheapest_cover, solve
from blora_compiler.sweep import ACCEPTED_GAP, sweep
from blora_compiler.values import (
    AttentionShape,
    Dense,
    Factored,
    Form,
    Mix,
    Operator,
    Removed,
    Site,
    Workload,
)
from tests.made_devices import device, table
from tests.planning import every_selection, planned, site

PREFILL, DECODE = Workload(batch=2, tokens=8), Workload("decode", 2, 1, 40)
MIX = Mix(((1, PREFILL), (5, DECODE)))
WORKLOADS = [PREFILL, DECODE, MIX]
CLOCKS = {
    "roofline": RooflineClock(device(launch_ns=20)),
    "measured": MeasuredClock(table(), working_set=10**5),
}
names = pytest.mark.parametrize("clock", CLOCKS)
loads = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)


def block(layer: str = "0", width: int = 64, hidden: int = 96) -> list[Site]:
    """Attention with packed q/k/v, and a gated MLP with packed gate/up; both removable."""
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"

    def member(branch: str, role: str, into: int, out: int, group: str = "") -> Site:
        name = f"{branch}.{role}"
        return replace(site(name, into, out, branch=branch), group=f"{branch}.{group}" if group else name)

    return [
        member(attention, "q_proj", width, width, "qkv"),
        member(attention, "k_proj", width, width // 4, "qkv"),
        replace(member(attention, "v_proj", width, width // 4, "qkv"), bias="v.bias"),
        member(attention, "o_proj", width, width),
        member(mlp, "gate_proj", width, hidden, "gate_up"),
        member(mlp, "up_proj", width, hidden, "gate_up"),
        member(mlp, "down_proj", hidden, width),
    ]


HEAD = site("lm_head", 64, 200, kind="head", tied=True)
ATTENTION = Operator(
    "model.layers.0.self_attn.sdpa", "attention", flops="4*batch*4*tokens*(tokens + context)*16",
    activations="2*batch*64*tokens + 2*batch*16*(tokens + context)",
    attention=AttentionShape("batch", "4", "1", "tokens", "tokens + context", "16", "16"),
)  # fmt: skip
OPERATORS = (
    Operator("model.embed_tokens.embedding", "lookup", activations="batch*tokens*64", params=200 * 64,
             weight_reads="batch*tokens*64"),
    ATTENTION,
    Operator("model.norm.mul", "elementwise", elementwise="batch*tokens*64", activations="2*batch*tokens*64",
             params=64, owner="model.norm", owner_type="LlamaRMSNorm"),
)  # fmt: skip


def timed(clock: str = "roofline", budget="60%", sites: list[Site] | None = None, **arguments) -> Problem:
    """A latency problem of one block; a fraction is one of time."""
    asked = Budget.parse(budget, "latency")
    arguments = {"cost_model": LatencyCostModel(CLOCKS[clock]), "workload": PREFILL} | arguments
    problem = planned(sites or block(), "1ns", **arguments)
    return replace(problem, budget=asked, limit=asked.limit(problem.baseline))


def role(name: str) -> str:
    return name.rpartition(".")[2]


# ── Sites together ───────────────────────────────────────────────────────────────────────────────────────────────

QKV, GATE_UP = tuple(block()[:3]), tuple(block()[4:6])
MANY_FORMS: list[list[Form]] = [
    [Factored(8), Factored(20), Dense()], [Factored(4), Dense()], [Factored(12), Dense()],
]  # fmt: skip


@names
@pytest.mark.parametrize("workload", [PREFILL, DECODE], ids=lambda workload: workload.phase)
@pytest.mark.parametrize("generates", [False, True])
def test_all_combinations_at_once_are_the_sums_of_each(clock, workload, generates):
    model = LatencyCostModel(CLOCKS[clock], generates)
    for sites, forms in ((QKV, MANY_FORMS), (GATE_UP, MANY_FORMS[:2])):
        at_once = model.combination_times(sites, forms, workload)
        assert at_once.shape == tuple(map(len, forms))
        assert np.issubdtype(at_once.dtype, np.integer)
        one_by_one = [
            sum(cost.latency_ns for cost in model.group_costs(sites, combination, workload))
            for combination in product(*forms)
        ]
        assert at_once.ravel().tolist() == one_by_one


def test_a_shared_kernel_is_charged_by_columns_and_to_the_last_nanosecond():
    clock = CLOCKS["roofline"]
    costs = LatencyCostModel(clock).group_costs(QKV, (Factored(20), Dense(), Removed()), PREFILL)
    first, split = gemm(16, 64, 36, "sites"), pointwise(2 * 16 * 36, "sites", "split")
    second = clock.time_ns(gemm(16, 20, 64, "sites"), "float32")
    shared = [clock.time_ns(kernel, "float32") for kernel in (first, split)]
    assert costs[0].latency_ns == sum(round(time * 20 / 36) for time in shared) + second
    assert costs[0].latency_ns + costs[1].latency_ns == sum(shared) + second
    assert costs[2].latency_ns == costs[2].flops == 0
    assert costs[0].flops == 2 * 16 * 20 * (64 + 64), "counts are the exact model's"


def test_packing_saves_launches():
    model = LatencyCostModel(CLOCKS["measured"])
    together = sum(cost.latency_ns for cost in model.group_costs(QKV, [Factored(8)] * 3, DECODE))
    apart = sum(model.cost(one, Factored(8), DECODE).latency_ns for one in QKV)
    assert together < apart


@names
@loads
def test_an_option_costs_what_its_sites_cost_together(clock, workload):
    problem = timed(clock, workload=workload)
    assert [len(sites) for sites in problem.groups] == [3, 1, 2, 1]
    assert {len(option.covered) for option in problem.options if Removed() not in dict(option.forms).values()} <= {
        1, 2, 3,
    }  # fmt: skip
    dense = {member.name: Dense() for member in problem.counted}
    for option in problem.options:
        costs = problem.costs(dense | dict(option.forms))
        assert option.cost == sum(costs[name] for name in option.covered)
        assert option.damage == pytest.approx(
            math.fsum(problem.damage(member, dict(option.forms)[member.name])
                      for member in problem.counted if member.name in option.covered)
        )  # fmt: skip
    assert problem.baseline == sum(problem.dense_costs.values())


def test_a_mix_costs_the_sum_of_its_parts_by_weight():
    parts = {load.name: timed(workload=load).dense_costs for load in WORKLOADS}
    for name, cost in parts[MIX.name].items():
        assert cost == parts[PREFILL.name][name] + 5 * parts[DECODE.name][name]


def test_other_metrics_do_not_couple():
    problem = planned(block(), "50%", cost_model=LatencyCostModel(CLOCKS["roofline"]))
    assert problem.metric == "flops"
    assert [len(sites) for sites in problem.groups] == [1] * 7


# ── Plans ────────────────────────────────────────────────────────────────────────────────────────────────────────


def best_damages(problem: Problem, limits: list[int]) -> list[float]:
    """The least damage within each limit, by brute force."""
    totals = [(sum(o.cost for o in pick), math.fsum(o.damage for o in pick)) for pick in every_selection(problem)]
    assert len(totals) > 500, "too small a problem proves nothing"
    return [min((damage for cost, damage in totals if cost <= limit), default=math.inf) for limit in limits]


@names
@loads
def test_plans_are_the_best_by_brute_force_and_a_sweep_finds_them_too(clock, workload):
    problem = timed(clock, workload=workload, rank_multiple=16)
    budgets = [Budget.parse(f"{percent}%", "latency") for percent in (3, 40, 60, 75, 90, 100)]
    limits = [budget.limit(problem.baseline) for budget in budgets]
    swept = sweep(problem, budgets)
    for budget, limit, best, of_sweep in zip(budgets, limits, best_damages(problem, limits), swept, strict=True):
        asked = replace(problem, budget=budget, limit=limit)
        plan = solve(asked)  # which checks it
        for found, gap in ((plan, 2 * MilpSolver.relative_gap), (of_sweep, ACCEPTED_GAP)):
            check_plan(found, asked)
            assert best * (1 - 1e-12) <= found.objective <= best * (1 + gap) + 1e-12
            assert found.objective * (1 - found.gap) <= best * (1 + 1e-9)
            assert found.cost <= limit
            assert reprice(found, asked) == replace(found, gap=None)


def test_the_cheapest_cover_of_a_latency_problem_removes_both_branches():
    problem = timed(budget="1%")
    cover = cheapest_cover(problem.options)
    assert {form for option in cover for _, form in option.forms} == {Removed()}
    assert solve(problem).cost == 0


def test_launches_decide_that_dense_is_faster():
    slow_start = LatencyCostModel(RooflineClock(device(launch_ns=1e6)))
    problem = timed(budget="90%", cost_model=slow_start)
    together = "no combination of ranks with {} is faster than dense"
    alone = "dense is faster here than any rank offered"
    assert {role(name): note for name, note in problem.notes.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), together.format("q_proj, k_proj, v_proj")),
        **dict.fromkeys(("gate_proj", "up_proj"), together.format("gate_proj, up_proj")),
        "o_proj": alone,
        "down_proj": alone,
    }
    plan = price_forms(problem, {member.name: Dense() for member in problem.counted}, gap=None)
    assert {choice.note for choice in plan.choices} == set(problem.notes.values())
    # Some pairs of one site would take fewer FLOPs and bytes all the same.
    without_launches = timed(cost_model=LatencyCostModel(RooflineClock(device(launch_ns=0))))
    assert without_launches.notes == {}


def test_rules_hold_inside_a_group():
    rules = {"*.q_proj": "dense", "*.v_proj": {"min_rank": 16}, "*.k_proj": {"min_rank": 3, "max_rank": 7}}
    problem = timed(rules=rules)
    assert {role(name): note for name, note in problem.notes.items()} == {
        "q_proj": "dense by rule '*.q_proj'",
        "v_proj": "dense: min_rank 16 is not below break-even 13",
        "k_proj": "no multiple of 8 fits, unaligned",
    }
    of_group = [dict(option.forms) for option in problem.options if option.covered == tuple(s.name for s in QKV)]
    assert [forms[QKV[0].name] for forms in of_group] == [Dense()] * len(of_group)
    assert {forms[QKV[1].name] for forms in of_group} == {*map(Factored, range(3, 8)), Dense()}
    removed = {name for option in problem.options for name, form in option.forms if form == Removed()}
    assert {name.split(".")[3] for name in removed} == {"mlp"}, "attention has a site that must stay"


def test_why_a_site_stays_dense_comes_before_that_its_ranks_are_unaligned():
    rules = {"*.q_proj": "dense", "*.v_proj": {"min_rank": 16}, "*.k_proj": {"max_rank": 7}}
    slow_start = LatencyCostModel(RooflineClock(device(launch_ns=1e6)))
    problem = timed(rules=rules, cost_model=slow_start, sites=list(QKV))
    assert {role(name): note for name, note in problem.notes.items()} == {
        "q_proj": "dense by rule '*.q_proj'",
        "v_proj": "dense: min_rank 16 is not below break-even 13",
        "k_proj": "no combination of ranks with q_proj, k_proj, v_proj is faster than dense",
    }
    assert [len(option.forms) for option in problem.options] == [3]


def test_an_excluded_site_leaves_its_group():
    problem = timed(rules={"*.k_proj": "exclude"}, scope="model")
    assert [[role(member.name) for member in sites] for sites in problem.groups] == [
        ["q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    assert problem.fixed == LatencyCostModel(CLOCKS["roofline"]).cost(QKV[1], Dense(), PREFILL).latency_ns


def test_branches_that_read_one_input_are_decided_apart():
    """As in GPT-J and Phi: one norm feeds q/k/v and the MLP's first projection, and either branch may go."""
    sites = [replace(member, group="norm") if role(member.name) not in ("o_proj", "down_proj") else member
             for member in block()]  # fmt: skip
    problem = timed(sites=sites, rank_multiple=16)
    assert [len(members) for members in problem.groups] == [3, 1, 2, 1]
    (best,) = best_damages(problem, [problem.limit])
    assert solve(problem).objective == pytest.approx(best, rel=2 * MilpSolver.relative_gap)


def test_a_budget_in_milliseconds():
    problem = planned(block(), "0.0009ms", cost_model=LatencyCostModel(CLOCKS["roofline"]), workload=PREFILL)
    assert (problem.metric, problem.limit) == ("latency", 900)
    assert problem.baseline > 900
    plan = solve(problem)
    assert 0 < plan.cost <= 900
    assert "(budget 0.0009ms, scope sites)" in plan.summary()


def test_a_budget_below_the_floor_names_the_floor():
    arguments = {"scope": "model", "operators": (*OPERATORS, SESSION)}
    problem = timed(budget="10ns", **arguments, rules={"lm_head": "exclude"}, sites=[*block(), HEAD])
    model = LatencyCostModel(CLOCKS["roofline"])
    by_hand = sum(model.operator_cost(operator, PREFILL).latency_ns for operator in (*OPERATORS, SESSION))
    assert problem.fixed == by_hand + model.cost(HEAD, Dense(), PREFILL).latency_ns
    with pytest.raises(InfeasibleBudget) as refusal:
        solve(problem)
    floor, dense = (with_digits(amount, "latency") for amount in (problem.fixed, problem.baseline))
    assert "budget 10ns allows 10 ns (10 ns), but the smallest feasible budget is " in str(refusal.value)
    assert (
        f": {floor} of {dense}; what binds: what no form changes (operators, excluded sites), 100.0% of that; "
        in (str(refusal.value))
    )
    assert refusal.value.smallest_fraction == pytest.approx(problem.fixed / problem.baseline)
    (swept,) = sweep(problem, [problem.budget])
    assert isinstance(swept, InfeasibleBudget)
    assert str(swept) == str(refusal.value)
    at_the_floor = replace(problem, limit=problem.fixed, budget=Budget.parse(f"{problem.fixed}ns"))
    assert set(solve(at_the_floor).forms.values()) == {Removed()}


def test_a_dense_model_that_fits_no_cache_is_its_own_baseline():
    profile = device(cache_bytes=50_000, cache_bandwidth=1e12, launch_ns=20)
    cold, warm = (LatencyCostModel(RooflineClock(profile, working_set)) for working_set in (60_000, 40_000))
    problem = timed(cost_model=warm, dense_cost_model=cold, workload=DECODE)
    assert problem.dense_costs == timed(cost_model=cold, workload=DECODE).dense_costs
    dense = {member.name: Dense() for member in problem.counted}
    warm_total = sum(timed(cost_model=warm, workload=DECODE).dense_costs.values())
    assert problem.baseline == sum(problem.dense_costs.values()) > warm_total
    assert problem.total(dense) == warm_total
    plan = solve(problem)
    assert [choice.dense_cost for choice in plan.choices] == list(problem.dense_costs.values())
    assert {choice.site: choice.cost for choice in plan.choices} == problem.costs(plan.forms)
    assert plan.baseline == problem.baseline


@pytest.mark.parametrize(("budget", "stays_dense"), [("1s", True), ("100%", False)])
def test_a_model_that_runs_slower_than_its_baseline_stays_dense_only_where_both_fit(budget, stays_dense):
    slow, fast = (LatencyCostModel(ScaledClock(RooflineClock(device()), by)) for by in (1.1, 1.0))
    problem = timed(budget=budget, cost_model=slow, dense_cost_model=fast, workload=DECODE)
    plan = solve(problem)
    assert (set(plan.forms.values()) == {Dense()}) == stays_dense
    assert plan.cost <= problem.limit


def test_what_no_form_changes_is_part_of_both_models_in_full_scope():
    profile = device(cache_bytes=50_000, cache_bandwidth=1e12, launch_ns=20)
    cold, warm = (LatencyCostModel(RooflineClock(profile, working_set)) for working_set in (60_000, 40_000))
    arguments = {"scope": "model", "operators": OPERATORS, "rules": {"lm_head": "exclude"}, "workload": DECODE}
    problem = timed(sites=[*block(), HEAD], cost_model=warm, dense_cost_model=cold, **arguments)
    both_cold = timed(sites=[*block(), HEAD], cost_model=cold, **arguments)
    assert problem.baseline == both_cold.baseline
    assert problem.fixed < both_cold.fixed, "the head is read from the cache"
    assert solve(problem).cost == problem.fixed + sum(problem.costs(solve(problem).forms).values())


# ── Clocks ───────────────────────────────────────────────────────────────────────────────────────────────────────


@names
def test_a_scaled_clock_multiplies_every_time(clock):
    scaled = ScaledClock(CLOCKS[clock], 1.5)
    kernel = gemm(2, 64, 96, "sites")
    assert scaled.time_ns(kernel, "float32") == round(1.5 * CLOCKS[clock].time_ns(kernel, "float32"))
    assert scaled.limit(kernel, "float32") == CLOCKS[clock].limit(kernel, "float32")
    moved = scaled.for_working_set(10**6)
    expected = CLOCKS[clock].for_working_set(10**6).time_ns(kernel, "float32")
    assert moved.time_ns(kernel, "float32") == round(1.5 * expected)
    assert ScaledClock(CLOCKS[clock], 0.0).time_ns(kernel, "float32") == 1


# ── Predictions ──────────────────────────────────────────────────────────────────────────────────────────────────

FORMS: dict[str, Form] = {
    **{member.name: Factored(8) for member in QKV[:2]},
    **{member.name: Removed() for member in block() if "mlp" in member.name},
}


def predictor(clock: str = "roofline", workload=MIX, generates: bool = True) -> Predictor:
    return Predictor((*block(), HEAD), OPERATORS, workload, CLOCKS[clock], generates)


@names
@loads
@pytest.mark.parametrize("forms", [{}, FORMS], ids=["dense", "compressed"])
def test_sums_by_site_by_kind_and_by_limit_are_the_whole(clock, workload, forms):
    found = predictor(clock, workload).predict(forms)
    assert found.nanoseconds == sum(weight * time for weight, _, time in found.parts)
    for sums in (found.by_site, found.by_kind, found.by_limit):
        assert math.fsum(sums.values()) == pytest.approx(found.nanoseconds, rel=1e-12)
    assert list(found.binds) == list(LIMITS)
    assert math.fsum(found.binds.values()) == pytest.approx(1.0, rel=1e-12)
    assert set(found.by_kind) == {"sites", "head", "attention", "norm", "lookup", "session"}
    removed = {name for name, form in forms.items() if form == Removed()}
    everything = {member.name for member in (*block(), HEAD)} | {operator.name for operator in (*OPERATORS, SESSION)}
    assert set(found.by_site) == everything - removed
    assert set(found.work) == {member.name for member in (*block(), HEAD)} - removed
    assert found.milliseconds == pytest.approx(1e-6 * found.nanoseconds)
    assert found.site_milliseconds == pytest.approx(1e-6 * (found.by_kind["sites"] + found.by_kind["head"]))


@names
@loads
@pytest.mark.parametrize("generates", [False, True])
def test_a_prediction_is_what_the_plan_was_priced_at(clock, workload, generates):
    read = weight_bytes_read((*block(), HEAD), (*OPERATORS, SESSION), FORMS, workload.parts[0][1])
    asks = predictor(clock, workload, generates)
    at_one_working_set = replace(asks, clock=_Still(CLOCKS[clock].for_working_set(read)))
    problem = planned(
        [*block(), HEAD], "1s", scope="model", operators=(*OPERATORS, SESSION), workload=workload,
        cost_model=LatencyCostModel(CLOCKS[clock].for_working_set(read), generates),
    )  # fmt: skip
    forms = {member.name: FORMS.get(member.name, Dense()) for member in problem.counted}
    assert at_one_working_set.predict(FORMS).nanoseconds == price_forms(problem, forms, gap=None).cost


class _Still:
    """A clock that keeps its working set."""

    def __init__(self, clock) -> None:
        self.time_ns, self.limit = clock.time_ns, clock.limit

    def for_working_set(self, weight_bytes: int) -> _Still:
        return self


def test_the_work_of_a_site_by_hand():
    found = predictor(workload=Mix(((1, PREFILL), (3, DECODE)))).predict(FORMS)
    q, rows = found.work[QKV[0].name], 16 + 3 * 2
    first_gemm = 64 * 32  # packed: rank 8 of q, rank 8 of k, 16 dense columns of v
    assert q.flops == pytest.approx(2 * rows * 8 * (64 + 64))
    weights, moved = 4 * (8 / 32 * first_gemm + 8 * 64), rows * (8 / 32 * (64 + 32) + 8 + 64)
    assert q.bytes_moved == pytest.approx(4 * weights + 4 * moved)
    assert math.fsum(q.by_limit.values()) == pytest.approx(q.nanoseconds)
    assert found.work["lm_head"].flops == 2 * (2 + 3 * 2) * 64 * 200, "only the last position of each sequence"
    everywhere = predictor(workload=PREFILL, generates=False).predict(FORMS)
    assert everywhere.work["lm_head"].flops == 2 * 16 * 64 * 200


def test_what_binds_a_site_is_what_most_of_its_time_is():
    assert SiteWork(by_limit={"compute": 1.0, "bandwidth": 3.0, "launch": 2.0}).binds == "bandwidth"


def test_running_memory_is_the_cache_and_the_widest_kernel():
    cache = 2 * 41 * (16 + 16)  # 2 sequences, one key and value head of 16, 41 tokens
    groups = [QKV, GATE_UP, *([member] for member in (block()[3], block()[6], HEAD))]
    kernels = kernels_of(groups, (*OPERATORS, SESSION), {}, DECODE, generates=True)
    widest = max(kernel.activations for kernel, _ in kernels)
    assert predictor(workload=DECODE).predict({}).running_bytes == 4 * (cache + widest)
    assert predictor(workload=DECODE, generates=False).predict({}).running_bytes == 4 * widest
    prefill = predictor(workload=PREFILL).predict({}).running_bytes
    assert predictor().predict({}).running_bytes == max(prefill, 4 * (cache + widest)), "the part that needs most"


def test_fewer_bytes_of_weights_run_from_the_cache():
    profile = device(cache_bytes=60_000, cache_bandwidth=1e13)
    of_plan = Predictor(tuple(block()), (), DECODE, RooflineClock(profile), generates=True)
    dense, compressed = of_plan.predict({}), of_plan.predict(FORMS)
    assert weight_bytes_read(block(), (), {}, DECODE) == 4 * sum(member.weight_count for member in block()) > 60_000
    assert weight_bytes_read(block(), (), FORMS, DECODE) == 4 * (8 * 128 + 8 * 80 + 64 * 16 + 64 * 64) < 60_000
    o_proj = block()[3].name
    assert compressed.by_site[o_proj] < dense.by_site[o_proj], "the same kernel, from the cache"


def test_lookups_read_what_they_look_up():
    assert weight_bytes_read((), OPERATORS, {}, replace(DECODE, dtype="float16")) == 2 * 2 * 64


def test_of_many_sites_of_one_input_as_many_are_combined_as_can_be_counted():
    """A projection a head: eighteen sites of one group, of which twelve are decided together."""
    heads = [replace(site(f"head{index}", 64, 96), group="x") for index in range(18)]
    problem = timed(sites=heads)
    offered = {name: set() for name in (head.name for head in heads)}
    for option in problem.options:
        for name, form in option.forms:
            offered[name].add(type(form))
    assert offered["head0"] == {Dense, Factored}
    assert offered["head17"] == {Dense} and "18 sites read one input" in problem.notes["head17"]
