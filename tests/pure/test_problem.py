"""Which options a site gets, what they cost, and what counts in which scope."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from blora_compiler.cost_models.flops import FlopsCostModel
from hypothesis import given
from hypothesis import strategies as st

from blora_compiler.errors import BadInput
from blora_compiler.problem import RANKS_PER_SITE, Problem, candidate_ranks
from blora_compiler.rules import SiteRule
from blora_compiler.values import Cost, Dense, Factored, Operator, Removed, Workload
from tests.planning import ConstantDamage, SmoothDamage, planned, site, transformer


def forms_of(problem: Problem, name: str) -> list:
    return [option.forms[0][1] for option in problem.options if option.covered == (name,)]


def test_an_open_site_gets_aligned_ranks_below_break_even_and_dense():
    problem = planned([site("a", 64, 192)])  # break-even 48
    assert forms_of(problem, "a") == [*(Factored(rank) for rank in (8, 16, 24, 32, 40)), Dense()]
    option = problem.options[1]
    assert option.cost == 2 * 16 * 16 * (64 + 192)
    assert option.damage == SmoothDamage().damage(problem.sites[0], Factored(16))
    assert problem.options[-1].cost == problem.baseline == 2 * 16 * 64 * 192
    assert problem.limit == problem.baseline // 2
    assert problem.fixed == 0


@dataclass(frozen=True)
class SlowPairs:
    """A model of time in which a pair pays a launch: it beats dense at low ranks only."""

    def cost(self, site, form, workload):
        match form:
            case Dense():
                return Cost(latency_ns=1000)
            case Factored(rank):
                return Cost(latency_ns=700 + 20 * rank)
        return Cost(latency_ns=0)

    def operator_cost(self, operator, workload):
        return Cost(latency_ns=5)


def test_only_forms_cheaper_than_dense_in_the_metric_are_offered():
    problem = planned([site("a", 64, 192)], "800ns", cost_model=SlowPairs())
    assert forms_of(problem, "a") == [Factored(8), Dense()]
    assert (problem.metric, problem.baseline, problem.limit) == ("latency", 1000, 800)


def test_a_site_where_no_form_is_cheaper_stays_dense_and_says_so():
    problem = planned([site("a", 64, 192)], "800ns", cost_model=SlowPairs(), rules={"a": {"min_rank": 16}})
    assert forms_of(problem, "a") == [Dense()]
    assert problem.notes == {"a": "dense is faster here than any rank offered"}


RULES = [
    ({"a": {"min_rank": 20}}, [24, 32, 40], ""),
    ({"a": {"max_rank": 20}}, [8, 16], ""),
    ({"a": {"min_rank": 16, "max_rank": 16}}, [16], ""),
    ({"a": {"min_rank": 17, "max_rank": 19}}, [17, 18, 19], "no multiple of 8 fits, unaligned"),
    ({"a": {"max_rank": 3}}, [1, 2, 3], "no multiple of 8 fits, unaligned"),
    ({"a": {"min_rank": 48}}, [], "dense: min_rank 48 is not below break-even 48"),
    ({"a": "dense"}, [], "dense by rule 'a'"),
]


@pytest.mark.parametrize(("rules", "ranks", "note"), RULES)
def test_rules_bound_the_ranks(rules, ranks, note):
    problem = planned([site("a", 64, 192), site("b")], rules=rules)
    assert forms_of(problem, "a") == [*map(Factored, ranks), Dense()]
    assert problem.notes.get("a", "") == note


def test_a_small_site_falls_back_to_unaligned_ranks():
    problem = planned([site("a", 8, 8), site("b", 1, 1)])
    assert forms_of(problem, "a") == [Factored(1), Factored(2), Factored(3), Dense()]
    assert forms_of(problem, "b") == [Dense()]
    assert problem.notes["b"] == "dense: break-even 1 leaves no rank"


@given(
    st.integers(1, 20_000),
    st.integers(1, 20_000),
    st.sampled_from([1, 8, 64]),
    st.integers(1, 300),
    st.integers(1, 300),
)
def test_candidate_ranks_obey_every_bound(into, out, multiple, one, other):
    rule = SiteRule(min_rank=min(one, other), max_rank=max(one, other))
    member = site("a", into, out)
    ranks = candidate_ranks(member, rule, multiple)
    assert len(ranks) <= RANKS_PER_SITE
    assert ranks == sorted(set(ranks))
    allowed = range(rule.min_rank, min(rule.max_rank, member.break_even_rank - 1) + 1)
    aligned = [rank for rank in allowed if rank % multiple == 0]
    assert set(ranks) <= set(aligned or allowed)
    assert bool(ranks) == bool(allowed)
    if ranks:
        assert (ranks[0], ranks[-1]) == ((aligned or allowed)[0], (aligned or allowed)[-1]), (
            "thinning keeps both ends"
        )


def test_thinning_is_fine_at_low_ranks_and_leaves_no_wide_gap():
    ranks = candidate_ranks(site("a", 8192, 8192), SiteRule(), 8)
    steps = [after - before for before, after in pairwise(ranks)]
    assert 55 <= len(ranks) <= 64
    assert steps[0] == 8
    assert max(steps) <= 4096 // 30


def test_few_sites_get_all_their_ranks():
    assert len(planned([site("a", 8192, 8192)]).options) == 511 + 1  # 4096 / 8 multiples below break-even, and dense


def test_dominated_options_go_and_equal_damage_stays():
    class Stairs:
        kind, unit = "two-sided", "nats per token"

        def damage(self, site, form):  # rank 24 is worse than 16 and dearer; 32 and 40 tie
            return {8: 4.0, 16: 2.0, 24: 3.0, 32: 1.0, 40: 1.0}[form.rank]

    assert forms_of(planned([site("a", 64, 192)], damage_model=Stairs()), "a") == [
        *map(Factored, (8, 16, 32, 40)),
        Dense(),
    ]


# ── Branches ─────────────────────────────────────────────────────────────────────────────────────────────────────


def removals(problem: Problem) -> list:
    return [option for option in problem.options if Removed() in dict(option.forms).values()]


def test_a_branch_may_be_removed_as_a_whole_at_the_damage_of_its_last_site():
    sites = transformer(1)
    problem = planned(sites)
    attention, mlp = removals(problem)
    assert attention.covered == tuple(member.name for member in sites[:3])
    assert mlp.covered == tuple(member.name for member in sites[3:5])
    assert attention.cost == mlp.cost == 0
    assert mlp.damage == SmoothDamage().damage(sites[4], Removed())


@pytest.mark.parametrize("rule", ["dense", "exclude", {"min_rank": 8}])
def test_a_rule_on_one_site_keeps_its_branch(rule):
    problem = planned(transformer(1), rules={"*.q_proj": rule})
    assert [option.covered[0] for option in removals(problem)] == ["model.layers.0.mlp.up_proj"]


def test_a_max_rank_keeps_no_branch_and_a_tied_weight_does():
    assert len(removals(planned(transformer(1), rules={"*.q_proj": {"max_rank": 8}}))) == 2
    sites = transformer(1)
    sites[4] = replace(sites[4], tied=True)
    assert [option.covered[0] for option in removals(planned(sites))] == ["model.layers.0.self_attn.q_proj"]


# ── Scope ────────────────────────────────────────────────────────────────────────────────────────────────────────

OPERATORS = [
    Operator("attention", "attention", flops="100*tokens"),
    Operator("norm", "elementwise", elementwise="tokens"),
]


def test_scope_sites_counts_neither_excluded_sites_nor_operators():
    sites = transformer(1)
    problem = planned(sites, operators=OPERATORS)
    weights = sum(member.weight_count for member in sites[:-1])
    assert (problem.fixed, problem.baseline) == (0, 2 * 16 * weights)
    assert problem.excluded == ("lm_head",)
    assert "lm_head" not in {name for option in problem.options for name in option.covered}


def test_scope_model_counts_everything():
    sites = transformer(1)
    problem = planned(sites, scope="model", operators=OPERATORS)
    assert problem.fixed == 100 * 16 + 2 * 16 * sites[-1].weight_count
    assert problem.baseline == problem.fixed + 2 * 16 * sum(member.weight_count for member in sites[:-1])
    assert problem.excluded == ("lm_head",)


@pytest.mark.parametrize("metric", ["bytes", "params"])
def test_a_tied_head_is_never_cheaper_factored_in_storage(metric):
    sites = [replace(member, kind="projection") for member in transformer(1)]
    problem = planned(sites, f"1{'kB' if metric == 'bytes' else 'kparams'}", rules={"lm_head": "compress"})
    assert problem.metric == metric
    assert forms_of(problem, "lm_head") == [Dense()]


def test_equality_ignores_the_models_that_price():
    sites = transformer(1)
    assert planned(sites) == planned(sites, cost_model=FlopsCostModel())
    assert planned(sites) != planned(sites, 0.4)
    assert planned(sites, fingerprints={"model": "abc"}).fingerprints == {"model": "abc"}


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
def test_damages_that_are_no_numbers_name_every_site(value):
    with pytest.raises(BadInput) as refusal:
        planned(transformer(1), damage_model=ConstantDamage(value))
    message = str(refusal.value)
    assert f"model.layers.0.mlp.up_proj: the two-sided damage of rank 8 is {value}" in message
    assert "must be finite and at least 0; look for NaN or infinite values in this site's weights" in message
    assert "model.layers.0.self_attn.o_proj" in message
    assert "damage of removed" in message


WRONG = [
    ({"sites": []}, "the model has no projection"),
    ({"rules": {"*": "exclude"}}, "all 11 sites are excluded (model.layers.0.self_attn.q_proj, "),
    ({"scope": "graph"}, "scope is 'graph'; use 'sites' or 'model'"),
    ({"rank_multiple": 0}, "rank_multiple is 0; it must be an integer of at least 1"),
    ({"rank_multiple": True}, "rank_multiple is True"),
    ({"rules": {"*.gone": "dense"}}, "'*.gone' matches none"),
    ({"budget": "12ms"}, "this cost carries no latency; use a cost model of time"),
    ({"workload": Workload(), "sites": [replace(site("a"), rows=("images",))]}, "size 'images' has no integer value"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_refusals(arguments, message):
    arguments = {"sites": transformer(2)} | arguments
    with pytest.raises(BadInput) as refusal:
        planned(**arguments)
    assert message in str(refusal.value)
