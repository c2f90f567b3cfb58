"""Plans as data: what they print, that they read back, what editing may and may not do, and that lies are caught."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_compiler.errors import BadInput, PlanInvalid
from blora_compiler.plan import Choice, Plan, check_plan, price_forms, reprice, with_digits
from blora_compiler.solver import solve
from blora_compiler.values import DTYPE_BYTES, METRICS, Dense, Factored, Removed, Workload
from tests.planning import SmoothDamage, planned, site, transformer

Q = "model.layers.0.self_attn.q_proj"
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
PROBLEM = planned(transformer(2), 0.5, fingerprints={"model": "abc"})
PLAN = solve(PROBLEM)


def edited(plan: Plan, forms: dict) -> Plan:
    """The plan with other forms and all its numbers left stale, as a text editor leaves them."""
    return replace(plan, choices=tuple(replace(c, form=forms.get(c.site, c.form)) for c in plan.choices))


# ── What a plan says ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_knows_the_form_of_every_site():
    assert PLAN.form(Q) == PLAN.forms[Q] == PLAN.choices[0].form
    assert PLAN.form("lm_head") == Dense()
    assert PLAN.excluded == ("lm_head",)
    assert PLAN.fraction == PLAN.cost / PLAN.baseline <= 0.5
    with pytest.raises(BadInput, match="the plan has no site 'lm_haed'; did you mean 'lm_head'"):
        PLAN.form("lm_haed")


@pytest.mark.parametrize("kind", ["whitened", "plain", "prior"])
def test_damage_is_none_where_nothing_measured_it(kind):
    plan = solve(planned(transformer(1), 0.5, SmoothDamage(kind=kind, unit="squared error")))
    assert plan.damage is None
    assert plan.objective > 0
    assert {choice.damage for choice in plan.choices} == {None}
    assert f"damage unknown ({kind})" in plan.summary()


def test_damage_is_the_sum_over_the_sites_when_measured():
    assert PLAN.damage == PLAN.objective == pytest.approx(sum(choice.damage for choice in PLAN.choices), rel=1e-12)


def test_the_summary_is_one_line_with_every_headline_number():
    forms = dict.fromkeys(PLAN.forms, Factored(8)) | {UP: Removed(), DOWN: Removed(), Q: Dense()}
    summary = price_forms(PROBLEM, forms, gap=None).summary()
    assert summary == (
        "keeps 0.1953 of 2.097 MFLOP (budget 0.5, scope sites): "
        "7 factored, 1 dense, 2 removed of 10 sites (1 excluded); "
        f"damage {price_forms(PROBLEM, forms, None).damage:.4g} nats per token (two-sided), gap unknown (edited)"
    )
    assert ", gap " in PLAN.summary()


def test_the_table_has_every_site_in_order_and_prints_anywhere():
    sites = [site("a[red]b[/red]", 64, 192), *transformer(1), site("tiny", 1, 1)]
    forms = {Q: Removed(), "model.layers.0.self_attn.v_proj": Removed(), "model.layers.0.self_attn.o_proj": Removed()}
    problem = planned(sites, 1.0)
    table = price_forms(
        problem, {**{s.name: Dense() for s in problem.counted}, **forms, UP: Factored(8)}, 0.0
    ).table()
    assert table.isascii()
    assert table.endswith("|\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert rows[0] == ["site", "form", "of dense", "cost", "share", "damage", "note"]
    assert [row[0] for row in rows[2:]] == ["a[red]b[/red]", *(s.name for s in sites[1:-2]), "tiny", "lm_head"]
    by_name = {row[0]: row for row in rows}
    assert by_name[Q][1:4] == ["removed", "0.0%", "0 FLOP"]
    assert by_name[Q][-1] == "with branch model.layers.0.self_attn"
    assert by_name[UP][1:4] == ["rank 8", "17.5%", "57.34 kFLOP"]
    assert by_name["tiny"][-1] == "dense: break-even 1 leaves no rank"
    assert by_name["lm_head"] == ["lm_head", "dense", "-", "-", "-", "-", "excluded"]


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────

AMOUNTS = st.integers(0, 10**30)
NUMBERS = st.floats(0, allow_nan=False, allow_infinity=False)
FORMS = st.one_of(st.just(Dense()), st.just(Removed()), st.integers(1, 10**6).map(Factored))
CHOICES = st.builds(Choice, st.text(), FORMS, AMOUNTS, AMOUNTS, st.none() | NUMBERS, st.text())
WORKLOADS = st.builds(
    Workload, st.just("prefill"), st.integers(1), st.integers(1), st.integers(0), st.sampled_from(list(DTYPE_BYTES))
)
PLANS = st.builds(
    Plan,
    choices=st.lists(CHOICES, max_size=4, unique_by=lambda choice: choice.site).map(tuple),
    excluded=st.just(()),
    metric=st.sampled_from(METRICS),
    scope=st.sampled_from(["sites", "model"]),
    budget=st.text(),
    limit=AMOUNTS,
    cost=AMOUNTS,
    baseline=AMOUNTS,
    fixed=AMOUNTS,
    damage_kind=st.sampled_from(["two-sided", "whitened", "plain", "prior"]),
    damage_unit=st.text(),
    objective=NUMBERS,
    gap=st.none() | NUMBERS,
    rank_multiple=st.integers(1, 64),
    workload=WORKLOADS,
    fingerprints=st.dictionaries(st.text(), st.text(), max_size=2),
)


@settings(max_examples=200)
@given(PLANS)
def test_a_plan_reads_back_equal_and_writes_the_same_text(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


def test_a_solved_plan_reads_back_equal():
    assert Plan.from_json(PLAN.to_json()) == PLAN
    record = json.loads(PLAN.to_json())
    assert next(iter(record)) == "schema"
    assert record["choices"][0].keys() >= {"site", "form", "cost", "dense_cost", "damage", "note"}


def damaged(**changes) -> str:
    """The plan's JSON with top-level fields replaced, or dropped where the new value is `...`."""
    record = json.loads(PLAN.to_json()) | changes
    return json.dumps({name: value for name, value in record.items() if value is not ...})


def with_choice(**changes) -> str:
    record = json.loads(PLAN.to_json())
    record["choices"][3] = {k: v for k, v in (record["choices"][3] | changes).items() if v is not ...}
    return json.dumps(record)


WORKLOAD = PLAN.workload.to_json()
DAMAGED = [
    ("", "plan.json: not JSON, line 1 column 1"),
    (PLAN.to_json()[:300], "plan.json: not JSON, line"),
    ("[1, 2]", "plan.json: holds a list, a plan is an object"),
    (damaged(schema=2), "plan.json: schema is 2, this version reads 1; write the plan again"),
    (damaged(schema=...), "plan.json: schema is None"),
    (damaged(limit=...), "plan.json: limit is missing"),
    (damaged(choices=...), "plan.json: choices is missing"),
    (damaged(bugdet="0.5"), "plan.json: 'bugdet' is no field of a plan; did you mean 'budget'"),
    (damaged(cost="12"), "plan.json: cost is '12', it must be an integer of at least 0"),
    (damaged(cost=True), "plan.json: cost is True, it must be an integer"),
    (damaged(cost=-1), "plan.json: cost is -1, it must be an integer of at least 0"),
    (damaged(baseline=1.5), "plan.json: baseline is 1.5"),
    (damaged(rank_multiple=0), "plan.json: rank_multiple is 0, it must be an integer of at least 1"),
    (damaged(objective=float("nan")), "plan.json: objective is nan, it must be a number of at least 0"),
    (damaged(objective=float("inf")), "plan.json: objective is inf"),
    (damaged(objective=10**400), "it must be a number of at least 0"),
    (damaged(gap="small"), "plan.json: gap is 'small', it must be a number of at least 0 or null"),
    (damaged(metric="speed"), "plan.json: metric is 'speed', it must be one of flops, latency, bytes, params"),
    (damaged(scope=["sites"]), "plan.json: scope is ['sites'], it must be one of sites, model"),
    (damaged(damage_kind="guess"), "plan.json: damage_kind is 'guess', it must be one of two-sided"),
    (damaged(excluded="lm_head"), "plan.json: excluded is 'lm_head', it must be a list of texts"),
    (damaged(fingerprints={"a": 1}), "plan.json: fingerprints is {'a': 1}, it must be an object of texts"),
    (damaged(choices={}), "plan.json: choices is {}, it must be a list"),
    (damaged(choices=[7]), "plan.json: choices[0] is 7, it must be an object"),
    (damaged(workload=[]), "plan.json: workload is [], it must be an object"),
    (damaged(workload={"batch": 1}), "plan.json: workload has the fields batch; it needs phase, batch, tokens"),
    (damaged(workload=WORKLOAD | {"batch": 0}), "plan.json: workload batch is 0; it must be an integer"),
    (damaged(workload=WORKLOAD | {"dtype": []}), "plan.json: "),
    (with_choice(form="factord"), "choices[3] (model.layers.0.mlp.up_proj): {'form': 'factord'"),
    (with_choice(form="dense", rank=8), "is no form; write {\"form\": \"dense\"}"),
    (with_choice(form="factored", rank=...), "is no form"),
    (with_choice(form="factored", rank=0), "choices[3]: a factored form needs a rank of at least 1, got 0"),
    (with_choice(form="factored", rank=True), "choices[3]: a factored form needs a rank of at least 1, got True"),
    (with_choice(form="factored", rank="8"), "is no form"),
    (with_choice(form=...), "plan.json: choices[3]: form is missing"),
    (with_choice(site=...), "plan.json: choices[3]: site is missing"),
    (with_choice(cost=None), "plan.json: choices[3]: cost is None, it must be an integer of at least 0"),
    (with_choice(rnk=8), "plan.json: choices[3]: 'rnk' is no field of a plan"),
    (with_choice(site=Q), f"plan.json: {Q} is listed 2 times; keep one"),
    (with_choice(site="lm_head"), "plan.json: lm_head is listed 2 times; keep one"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_damaged_json_is_refused_by_name(text, message):
    with pytest.raises(BadInput) as refusal:
        Plan.from_json(text, where="plan.json")
    assert message in str(refusal.value)


def test_everything_wrong_with_a_file_is_listed_at_once():
    record = json.loads(damaged(cost="12", gap=...))
    record["choices"][3]["form"] = "factord"
    record["choices"][4]["note"] = None
    with pytest.raises(BadInput) as refusal:
        Plan.from_json(json.dumps(record))
    message = str(refusal.value)
    assert all(
        part in message for part in ("4 problems", "cost is '12'", "gap is missing", "factord", "note is None")
    )


# ── Editing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_repricing_an_unchanged_plan_changes_only_the_gap():
    assert reprice(Plan.from_json(PLAN.to_json()), PROBLEM) == replace(PLAN, gap=None)


def test_repricing_trusts_only_the_forms():
    wanted = {name: Dense() if name == Q else Factored(9) for name in PLAN.forms}
    stale = replace(edited(PLAN, wanted), cost=1, baseline=2, objective=0.0, budget="0.9", metric="params")
    priced = reprice(stale, PROBLEM)
    assert priced.forms == wanted
    assert priced.cost == sum(PROBLEM.cost(s, wanted[s.name]) for s in PROBLEM.counted)
    assert (priced.budget, priced.metric, priced.limit) == ("0.5", "flops", PROBLEM.limit)
    assert priced.objective == pytest.approx(
        sum(PROBLEM.damage(s, wanted[s.name]) for s in PROBLEM.counted), rel=1e-12
    )
    check_plan(priced, PROBLEM)


CANNOT = {
    "an unknown site": ({"choices": (replace(PLAN.choices[0], site="model.layers.0.self_attn.q_prj"),)},
                        f"model.layers.0.self_attn.q_prj: no such site; did you mean '{Q}'"),
    "a missing site": ({"choices": PLAN.choices[1:]}, f"{Q}: has no form; add one"),
    "a repeated site": ({"choices": (*PLAN.choices, PLAN.choices[0])}, f"{Q} is listed 2 times; keep one"),
    "an excluded site": ({"choices": (*PLAN.choices, Choice("lm_head", Dense(), 0, 0, None)), "excluded": ()},
                         "lm_head: is excluded here and has no form; drop it from the choices"),
}  # fmt: skip
FORBIDDEN = {
    "above the full rank": ({Q: Factored(65)}, {}, f"{Q}: rank 65 is above the full rank 64 of 64 x 64; lower"),
    "at break-even": ({UP: Factored(46)}, {}, f"{UP}: rank 46 costs no less than the dense layer "
                      "(break-even 46 for 160 x 64); lower the rank or keep it dense"),
    "against a dense rule": ({Q: Factored(8)}, {"*q_proj": "dense"},
                             f"{Q}: rank 8, but rule '*q_proj' keeps it dense"),
    "below min_rank": ({Q: Factored(7)}, {"*q_proj": {"min_rank": 8}}, "rank 7 is below min_rank 8 of the rules"),
    "above max_rank": ({Q: Factored(9)}, {"*q_proj": {"max_rank": 8}}, "rank 9 is above max_rank 8 of the rules"),
    "half a branch": ({UP: Removed(), DOWN: Dense()}, {}, "model.layers.0.mlp: 1 of its 2 sites are removed but not "
                      f"{DOWN}; remove all of them or none"),
    "a branch a rule keeps": ({UP: Removed(), DOWN: Removed()}, {UP: {"min_rank": 8}},
                              "model.layers.0.mlp: removed, but a rule or a tied weight keeps one of its sites"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT)
def test_a_plan_for_other_sites_is_refused(case):
    changes, message = CANNOT[case]
    with pytest.raises(BadInput) as refusal:
        reprice(replace(PLAN, **changes), PROBLEM)
    assert message in str(refusal.value)


@pytest.mark.parametrize("case", FORBIDDEN)
def test_a_form_a_site_cannot_take_is_refused_and_caught(case):
    forms, rules, message = FORBIDDEN[case]
    base = {name: Dense() for name in PLAN.forms} | forms
    problem = planned(transformer(2), 1.0, rules=rules)
    with pytest.raises(BadInput) as refusal:
        reprice(edited(PLAN, base), problem)
    assert message in str(refusal.value)
    with pytest.raises(PlanInvalid) as defect:
        check_plan(edited(PLAN, base), problem)
    assert message in str(defect.value)


def test_removal_needs_a_branch():
    problem = planned([site("a"), site("b")], 1.0)
    plan = edited(solve(problem), {"a": Removed()})
    with pytest.raises(
        BadInput, match="a: removed, but it belongs to no removable branch; keep it dense or factor it"
    ):
        reprice(plan, problem)


def test_all_offenders_of_an_edit_are_listed_at_once():
    with pytest.raises(BadInput) as refusal:
        reprice(edited(PLAN, {Q: Factored(65), UP: Factored(46), DOWN: Removed()}), PROBLEM)
    message = str(refusal.value)
    assert "3 problems" in message
    assert all(part in message for part in (f"{Q}: rank 65", f"{UP}: rank 46", "model.layers.0.mlp: 1 of its 2"))


def test_an_edit_above_the_limit_names_both_numbers():
    with pytest.raises(BadInput) as refusal:
        reprice(edited(PLAN, dict.fromkeys(PLAN.forms, Dense())), PROBLEM)
    assert f"the plan costs {with_digits(PROBLEM.baseline, 'flops')}, above the limit " in str(refusal.value)
    assert f"limit {with_digits(PROBLEM.limit, 'flops')} of budget 0.5; lower some ranks or raise" in str(
        refusal.value
    )
    assert with_digits(2**20, "flops") == "1.049 MFLOP (1,048,576 FLOP)"


def test_a_removed_branch_may_be_edited_in():
    forms = dict.fromkeys(PLAN.forms, Factored(8)) | {UP: Removed(), DOWN: Removed()}
    priced = reprice(edited(PLAN, forms), PROBLEM)
    choices = {choice.site: choice for choice in priced.choices}
    assert (choices[UP].cost, choices[UP].damage) == (0, 0.0)
    assert choices[DOWN].damage == SmoothDamage().damage(PROBLEM.counted[4], Removed())


# ── The check that trusts nothing ────────────────────────────────────────────────────────────────────────────────

LIES = {
    "costs: says": {"choices": (replace(PLAN.choices[0], cost=PLAN.choices[0].cost - 1), *PLAN.choices[1:])},
    "dense costs: says": {"choices": (replace(PLAN.choices[0], dense_cost=1), *PLAN.choices[1:])},
    "order of sites: says": {"choices": (*PLAN.choices[1:], PLAN.choices[0])},
    "excluded: says ()": {"excluded": ()},
    "cost: says": {"cost": PLAN.cost - 1},
    "fixed: says 1, is 0": {"fixed": 1},
    "baseline: says": {"baseline": PLAN.baseline + 1},
    "limit: says": {"limit": PLAN.limit + 1},
    "objective: says": {"objective": PLAN.objective * (1 + 1e-8)},
    "gap 1.5 is not between 0 and 1": {"gap": 1.5},
    "gap -0.1 is not between": {"gap": -0.1},
    "has no form; add one": {"choices": PLAN.choices[1:]},
}


def test_a_true_plan_passes():
    check_plan(PLAN, PROBLEM)


@pytest.mark.parametrize("message", LIES)
def test_a_lie_is_caught(message):
    with pytest.raises(PlanInvalid) as defect:
        check_plan(replace(PLAN, **LIES[message]), PROBLEM)
    assert message in str(defect.value)


def test_a_plan_above_the_limit_is_caught_even_if_its_problem_says_otherwise():
    lax = replace(PROBLEM, limit=PROBLEM.baseline)
    plan = price_forms(lax, dict.fromkeys(PLAN.forms, Dense()), gap=0.0)
    with pytest.raises(PlanInvalid, match="cost 2,097,152 is above the limit 1,048,576"):
        check_plan(plan, lax)
