"""The mechanisms' rows: twins compute what students do, retention meets its budget, rounds end in their plan."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blora_compiler import stages
from blora_compiler.budget import Budget
from blora_compiler.graph import main_output
from blora_compiler.layers import BranchedLinear
from blora_compiler.profiling import profile
from blora_compiler.rewriting import insert, starting_factors
from blora_compiler.solver import solve
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Factored, Removed
from tests.models import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mechanisms():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import mechanisms

        yield mechanisms


@pytest.fixture(scope="module")
def setting():
    teacher = build("llama")
    for parameter in teacher.parameters():
        if parameter.dim() == 2:
            parameter.data *= 4.0  # so that projections matter
    program = trace(teacher)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (4, 4, 24), generator=generator)
    batches = [{"input_ids": piece, "attention_mask": torch.ones_like(piece)} for piece in ids]
    return SimpleNamespace(teacher=teacher, program=program, batches=batches, profile=profile(program, batches))


def problem_at(setting, budget: float):
    return stages.Request(Budget.parse(budget)).of_program("tiny", setting.program, setting.profile)[0]


def outputs(model: nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        return main_output(model(**batch))


def factored_sites(branched) -> dict[str, BranchedLinear]:
    return {name: module for name, module in branched.tree.named_modules() if isinstance(module, BranchedLinear)}


# ── The twin ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_twin_computes_what_the_student_does_and_traces_like_the_teacher(mechanisms, setting):
    branch = next(site.branch for site in setting.program.sites if site.branch and "mlp" in site.branch)
    forms = {
        site.name: Removed() if site.branch == branch else Dense() if "v_proj" in site.name else Factored(8)
        for site in setting.program.sites
        if site.kind != "head"
    }
    branched, _ = insert(setting.program, forms, setting.profile, dense_branch_rank=4)
    with torch.no_grad():
        for module in branched.tree.modules():
            if isinstance(module, BranchedLinear):
                module.A.add_(0.1 * torch.randn_like(module.A))
                module.retention.fill_(0.3)
        for name, parameter in branched.tree.named_parameters():
            if "norm" in name:
                parameter.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in setting.teacher.state_dict().items()}
    twin = mechanisms.dense_twin(branched.tree, setting.teacher)
    batch = setting.batches[0]
    expected = outputs(branched.tree, batch)
    assert (outputs(twin, batch) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (outputs(setting.teacher, batch) - expected).abs().max() > 0.1 * expected.abs().max()
    assert all(torch.equal(before[name], tensor) for name, tensor in setting.teacher.state_dict().items())
    again = trace(twin)
    assert [site.name for site in again.sites] == [site.name for site in setting.program.sites]
    assert not any(parameter.requires_grad for parameter in twin.parameters())


# ── Learned retention ────────────────────────────────────────────────────────────────────────────────────────────


def learning_of(mechanisms, setting, steps: int, end: float = 0.0):
    problem = problem_at(setting, 0.4)
    forms = {site.name: Factored(8) for site in problem.counted}
    branched, _ = insert(setting.program, forms, setting.profile)
    sites = factored_sites(branched)
    learning = mechanisms.LearnedRetention(
        sites,
        {name: problem.dense_costs[name] / problem.baseline for name in sites},
        {site.name: setting.profile.damage(site, forms[site.name]) for site in problem.counted},
        steps,
        end,
    )
    return learning, branched, forms


def open_share(learning) -> float:
    total = sum(learning.costs.values())
    return sum(learning.costs[name] * d for name, d in learning.retention().items()) / total


def test_every_step_meets_the_relaxed_budget_and_the_worthier_site_stays_open(mechanisms, setting):
    learning, _, _ = learning_of(mechanisms, setting, steps=20)
    worthy, idle, *_ = learning.sites
    scale = sum(learning.damages.values()) / sum(learning.costs.values())
    for step in range(1, 21):
        for name in learning.sites:
            worth = {worthy: 2.0, idle: 0.0}.get(name, 1.0)
            learning.slopes[name] = -worth * scale * learning.costs[name]
        learning.on_step({"step": step})
        assert open_share(learning) == pytest.approx(1 - step / 20, abs=1e-6)
        if step == 10:
            halfway = learning.retention()
            assert halfway[worthy] == 1.0 and halfway[idle] < 0.1
    assert set(learning.retention().values()) == {0.0}
    assert len(learning.prices) == 20 and all(price >= 0.0 for price in learning.prices)


def test_learning_may_end_with_part_of_the_dense_compute_open(mechanisms, setting):
    learning, _, _ = learning_of(mechanisms, setting, steps=5, end=0.25)
    for step in range(1, 8):
        learning.on_step({"step": step})
    assert open_share(learning) == pytest.approx(0.25, abs=1e-6)
    learning.before_step(7)
    assert all(site.residual is not None for site in learning.sites.values())


def test_ratios_are_the_slopes_seen_over_those_that_the_profile_says(mechanisms, setting):
    """Untrained and with all other sites dense, the slope at d is -2 (1 - d) D as far as damage is quadratic."""
    learning, branched, _ = learning_of(mechanisms, setting, steps=10)
    name = next(iter(learning.sites))
    with learning.watching():
        learning.sites[name].retention.data.fill_(0.9)
        for batch in setting.batches:
            ours = torch.log_softmax(main_output(branched.tree(**batch)), -1)
            theirs = torch.log_softmax(outputs(setting.teacher, batch), -1)
            (theirs.exp() * (theirs - ours)).sum(-1).mean().backward()
            assert all(site.retention.grad is None for site in learning.sites.values()), "kept from the optimizer"
            learning.on_step({"step": 0})
            learning.sites[name].retention.data.fill_(0.9)
    assert learning.ratios()[name] == pytest.approx(1.0, rel=0.5)
    assert not any(site.retention.requires_grad for site in learning.sites.values())


# ── Forms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_forbidding_forms_never_helps_and_does_what_it_says(mechanisms, setting):
    problem = problem_at(setting, 0.75)
    (line,) = mechanisms.forms_ablation({0.75: problem})
    free = solve(problem)
    assert line["damage"] == free.damage and line["dense"] > 0
    tolerance = 1 - 1e-4  # of the certified gap
    assert line["without_dense"] > free.damage
    assert line["without_removal"] >= tolerance * free.damage
    assert line["with_branch_removed"] >= tolerance * line["without_removal"]
    branch, plan = mechanisms.cheapest_removal(problem)
    members = {site.name for site in problem.sites if site.branch == branch}
    assert {name for name, form in plan.forms.items() if form == Removed()} == members
    assert plan.cost <= problem.limit


# ── Shared first factors ─────────────────────────────────────────────────────────────────────────────────────────


def test_separate_curves_are_the_profile_s_and_a_shared_basis_never_beats_them_at_equal_rank(mechanisms, setting):
    groups = mechanisms.input_groups(setting.program.sites, setting.profile)
    assert sorted(len(group.separate) for group in groups) == [1, 1, 1, 1, 2, 2, 3, 3]
    for group in groups:
        for curve in group.separate:
            tail = torch.from_numpy(setting.profile.spectra[curve.sites[0].name].tail.copy())
            assert torch.allclose(curve.tail[: len(tail)], tail, rtol=1e-6)
        if group.shared is not None:
            assert group.shared.unit_cost == group.separate[0].sites[0].in_features + sum(
                curve.sites[0].out_features for curve in group.separate
            )
            for rank in range(1, 20):
                assert group.shared.tail[rank] >= sum(curve.tail[rank] for curve in group.separate)


def test_the_allocation_is_the_best_of_all_at_its_own_cost(mechanisms, setting):
    group = next(g for g in mechanisms.input_groups(setting.program.sites, setting.profile) if len(g.separate) == 2)
    limit = 0.5 * group.dense
    chosen, cost, damage = mechanisms.allocate([group], limit, "separate")
    assert 0 < cost <= limit and len(chosen) == 2
    choices = [[*range(8, len(curve.tail), 8), None] for curve in group.separate]
    for picked in itertools.product(*choices):
        pairs = list(zip(group.separate, picked, strict=True))
        spent = sum(curve.dense if rank is None else rank * curve.unit_cost for curve, rank in pairs)
        damaged = sum(0.0 if rank is None else float(curve.tail[rank]) for curve, rank in pairs)
        assert spent > cost or damaged >= damage * (1 - 1e-9)


def test_products_of_shared_factors_have_the_damage_that_their_curve_says(mechanisms, setting):
    group = next(g for g in mechanisms.input_groups(setting.program.sites, setting.profile) if len(g.separate) == 3)
    twin = mechanisms.with_products(setting.teacher, [(group.shared, 16)])
    weights = [twin.get_submodule(site.name).weight for site in group.shared.sites]
    assert torch.linalg.matrix_rank(torch.cat(weights), rtol=1e-4) == 16
    result = mechanisms.shared_ablation([group], (0.25,), (0.5,), lambda chosen: {"kl": 0.0, "perplexity": 1.0})
    either, separate, shared = (
        next(line["damage"] for line in result["models"] if line["first_factors"] == kind)
        for kind in ("either", "separate", "shared")
    )
    assert either <= min(separate, shared) * (1 + 1e-9) or either == pytest.approx(min(separate, shared), rel=0.2)


def test_a_refit_leaves_shared_what_was_shared_and_training_counts_it_once(mechanisms, setting):
    groups = mechanisms.input_groups(setting.program.sites, setting.profile)
    chosen = [
        (curve, 16) for group in groups for curve in ([group.shared] if group.shared is not None else group.separate)
    ]
    tree = mechanisms.factored_tree(setting.program, setting.teacher, setting.batches, chosen)
    block = tree.model.layers[1]
    attention, mlp = block.self_attn, block.mlp
    assert attention.q_proj.A is attention.k_proj.A is attention.v_proj.A and mlp.gate_proj.A is mlp.up_proj.A
    assert attention.o_proj.A is not attention.q_proj.A
    matrices = sum(p.numel() for n, p in tree.named_parameters() if p.requires_grad and p.dim() == 2)
    assert matrices == sum(16 * curve.unit_cost for curve, _ in chosen)
    batch = setting.batches[0]
    expected, products = outputs(setting.teacher, batch), mechanisms.with_products(setting.teacher, chosen)
    refitted, own = (float((outputs(model, batch) - expected).square().sum()) for model in (tree, products))
    assert refitted < own


# ── Whole rows ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bench(mechanisms, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(mechanisms.quality, "BATCH", 4)
    monkeypatch.setattr(mechanisms.quality, "LENGTH", 24)
    ids = torch.randint(0, 128, (32, 24), generator=torch.Generator().manual_seed(2))
    text = mechanisms.quality.Text(ids, ids[:16], ids[:4], ids[:4])
    bench = mechanisms.Mechanisms(text, tmp_path, lambda model: {}, (), False, "off")
    bench.teacher = setting.teacher
    return bench


def job_of(mechanisms, row: str):
    return mechanisms.Job(row, 0.4, 1e-3, 0, 8 * 4 * 24, 0.0, batch=4)


@pytest.mark.parametrize(
    "row",
    [
        "learned retention",
        "learned retention, solved again",
        "shrinking ranks",
        "one branch removed",
        "shared first factors",
    ],
)
def test_a_row_ends_within_its_budget_and_says_what_it_did(mechanisms, bench, row):
    record = bench.run(job_of(mechanisms, row))
    assert 0.35 <= record["fraction"] <= 0.4
    assert json.loads(json.dumps(record)) == record
    facts = record.get("facts", {})
    if row == "learned retention":
        assert set(facts["retention"].values()) == {0.0}
    if row == "learned retention, solved again":
        assert len(facts["prices"]) == 4 and max(facts["retention"].values()) > 0.0
    if row == "shrinking ranks":
        assert [entry["budget"] for entry in facts["rounds"]] == [0.72, 0.528, 0.4]


def test_later_stretches_start_at_their_place_in_one_schedule_where_the_rate_falls(mechanisms, bench, monkeypatch):
    rates: dict[str, list[float]] = {}
    for row in ("shrinking ranks", "shrinking ranks, falling rate"):
        seen = rates.setdefault(row, [])
        monkeypatch.setattr(
            mechanisms, "distill", lambda *args, seen=seen, **options: seen.append(args[3].learning_rate)
        )
        bench.student(job_of(mechanisms, row))
    assert rates["shrinking ranks"] == [1e-3, 1e-3, 1e-3]
    first, second, last = rates["shrinking ranks, falling rate"]
    assert first == 1e-3 and second < 0.97 * first and last < 0.7 * second


def test_another_row_s_plan_is_trained_from_the_teacher_on(mechanisms, bench):
    forms = bench.planned(0.4)[1].plan.forms
    first = next(name for name, form in forms.items() if isinstance(form, Factored))
    forms = {**forms, first: Factored(8)}
    earlier = job_of(mechanisms, "shrinking ranks")
    runs = bench.work / "runs"
    runs.mkdir(parents=True)
    shown = {name: mechanisms.form_to_json(form) for name, form in forms.items()}
    (runs / f"{earlier.key}.json").write_text(json.dumps({"facts": {"forms": shown}}))
    (row,) = (row for row, of in mechanisms.PLANS_OF.items() if of == earlier.row)
    student = bench.student(replace(earlier, row=row))
    assert student.facts["forms"] == shown
    assert student.model.get_submodule(first).rank == 8


def test_the_queue_asks_for_a_plan_s_row_only_once_that_plan_is_there(mechanisms):
    first = {job.row for job in mechanisms.jobs_of((0.25,), 1000, {})}
    assert first == {"ours", mechanisms.SEPARATE, mechanisms.SHARED, *mechanisms.ROWS}
    done = {job.key: {} for job in mechanisms.jobs_of((0.25,), 1000, {})}
    assert {job.row for job in mechanisms.jobs_of((0.25,), 1000, done)} == set(mechanisms.PLANS_OF)


def test_starting_factors_of_a_fitted_start_have_the_plan_s_ranks(mechanisms, setting):
    problem = problem_at(setting, 0.4)
    forms = solve(problem).forms
    start = mechanisms.fitted_start(
        setting.program, setting.batches, setting.profile, lambda profiled: (problem, None), forms
    )
    own = starting_factors(setting.program.sites, forms, setting.profile)
    assert {name: A.shape[0] for name, (A, _) in start.factors.items()} == {
        name: A.shape[0] for name, (A, _) in own.items()
    }
    assert start.plan.forms == forms


def test_the_tables_of_the_method_are_what_the_committed_result_says(mechanisms):
    result = json.loads((ROOT / "benchmarks" / "results" / "mechanisms-prose-llama-8m.json").read_text())
    page = (ROOT / "docs" / "method.md").read_text()
    for table in (mechanisms.table, mechanisms.forms_table, mechanisms.shared_table):
        assert table(result) in page
    trained = [run for run in result["runs"] if run["tokens"]]
    assert {(run["tokens"], run["rate"], run["label_weight"], run["autocast"]) for run in trained} == {
        (300_000, 1e-3, 0.0, "bfloat16")
    }
    assert all(run["fraction"] <= run["budget"] for run in result["runs"])
