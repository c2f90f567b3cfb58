"""The paper's three mechanisms as ablations of the compiler's own row: same data, tokens, rate and seed.

    python benchmarks/mechanisms.py --prose train.txt.xz --tasks FOLDER --work RUNS --out RESULT.json \\
        --tokens 300000 --compile --autocast bfloat16

What is called retention, allocation and removal in the abstract has many readings; these are ours.

    (i)   retention      `LearnedRetention`: under one relaxed budget that closes, the dense part of a site stays as
                         long as it is worth its cost; what it was worth goes back to the solver
    (ii)  allocation     `shrinking_ranks`: train at a larger budget, multiply the factors out, profile the trained
                         weights, solve again for a smaller budget, and so on
    (iii) what remains   rules take a form away from the solver (`planned_within`): nothing dense, nothing removed, or
                         one whole branch removed that it would have kept
    (iv)  shared bases   `input_groups`: one first factor for all sites that read the same input, against one each

Rows that train are run with the queue of quality.py. All of them see the same batches in the same order, and end in a
plan of the same budget that stands before the last stretch of their training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import quality
import torch
from baselines import Later, Start, train_vectors
from quality import Bench, Job, Student, dense_branches
from torch import Tensor, nn

from blora_compiler import stages
from blora_compiler.data import Batches
from blora_compiler.distillation import distill, learning_rate_at
from blora_compiler.evaluate import perplexity_and_kl
from blora_compiler.graph import Program, bind, frozen_copy, set_module
from blora_compiler.layers import BranchedLinear, FactoredLinear, RemovedBranch
from blora_compiler.marginals import Marginals
from blora_compiler.nesting import between
from blora_compiler.plan import Plan, price_forms
from blora_compiler.problem import Option, Problem
from blora_compiler.profiling import Profile, Spectrum, profile
from blora_compiler.refitting import Factors, refit
from blora_compiler.replanning import Build
from blora_compiler.replanning import Start as StartingPoint
from blora_compiler.report import table as markdown
from blora_compiler.report import versions
from blora_compiler.rewriting import fold, settle, starting_factors
from blora_compiler.solver import solve
from blora_compiler.source import BUNDLED_MODEL, load_source
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Factored, Form, Removed, Site, form_from_json, form_to_json, site_groups

RATE, LABEL_WEIGHT = 1e-3, 0.0

# In nats; what must not be chosen is given this much damage.
PROHIBITIVE = 1e6


# ── Going on from a trained student ──────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def dense_twin(tree: nn.Module, teacher: nn.Module) -> nn.Module:
    """The teacher's module tree with a student's weights multiplied out: it computes what the student does.

    Every site gets the one matrix that its branch computes, dense part and retention included; the sites of a removed
    branch get zeros; norms and biases are the student's. Trace and profile take it as they take the teacher.

    Args:
        tree: branched, trained or not; stays as it is.
        teacher: whose modules it was made from.
    """
    twin = frozen_copy(teacher)
    for name, module in tree.named_modules():
        match module:
            case BranchedLinear():
                _set_parameter(twin, f"{name}.weight", module.weight)
                if module.bias is not None:
                    _set_parameter(twin, f"{name}.bias", module.bias)
            case RemovedBranch():
                for path, parameter in twin.get_submodule(name).named_parameters():
                    _set_parameter(twin, f"{name}.{path}", torch.zeros_like(parameter))
            case _:
                for path, parameter in module.named_parameters(recurse=False):
                    if parameter.dim() == 1:
                        _set_parameter(twin, f"{name}.{path}", parameter)
    return twin.eval()


def _set_parameter(root: nn.Module, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    root.get_submodule(owner)._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=False)


def fitted_start(
    program: Program,
    batches: Sequence[Mapping[str, Tensor]],
    profiled: Profile,
    build: Build,
    forms: Mapping[str, Form],
) -> StartingPoint:
    """A plan that is not the solver's for this program, with factors of its weights, refitted in their order."""
    problem, timed = build(profiled)
    factors = refit(program, forms, starting_factors(program.sites, forms, profiled), batches)
    return StartingPoint(profiled, problem, timed, price_forms(problem, forms, gap=None), factors)


# ── (i) Learned retention ────────────────────────────────────────────────────────────────────────────────────────

# How fast retention follows the worth of dense parts.
FOLLOWING = 0.1
# Of the worth seen so far, in what a step believes; one batch says little.
MEMORY = 0.9
# Where learning hands over to a new plan: of the dense compute of the factored sites, what is still open then. The
# new plan's factors come from these weights, so directions that the first plan had dropped must still be there.
OPEN_AT_THE_END = 0.25


@dataclass(frozen=True, eq=False)
class LearnedRetention:
    """d of every factored site, learned beside the weights under the Lagrangian of a relaxed budget that closes.

        minimise   KL(d, weights)
        such that  sum of c d  <=  (1 - (1 - end) t / steps) sum of c,     0 <= d <= 1

    with c the dense cost of a site. At step t, with v = -dKL/dd / c of this batch (smoothed) the worth of a site's
    dense part per unit of cost, and lambda the price of the budget,

        d  <-  clip( d + FOLLOWING (v - lambda) / V )          V: sum of D over sum of c, which scales a step

    Dual ascent on lambda is carried to its end at every step, which is a bisection: the sum of c d falls with lambda,
    so one lambda meets the budget exactly. With end = 0 every d is exactly 0 from step `steps` on.

    What it learns: with the factors at hand, damage is quadratic in what is missing of the dense part, so the profile
    says that the slope at d is -2 (1 - d) D. `ratios` are the slopes that training saw over those, summed over steps.

    Attributes:
        sites: the factored ones, in training.
        costs: dense cost of each.
        damages: D, what the profile says of each in its form.
        steps: until the budget is closed to `end`.
        end: the share of dense cost left open.
    """

    sites: Mapping[str, BranchedLinear]
    costs: Mapping[str, float]
    damages: Mapping[str, float]
    steps: int
    end: float = 0.0
    slopes: dict[str, float] = field(default_factory=dict)  # dKL/dd of the last batch
    worth: dict[str, float] = field(default_factory=dict)  # smoothed, per unit of cost
    seen: dict[str, float] = field(default_factory=dict)  # sum of slopes, measured
    said: dict[str, float] = field(default_factory=dict)  # and predicted
    prices: list[float] = field(default_factory=list)  # lambda, step by step

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Gradients of d are taken and kept from the optimizer; afterwards as before."""
        handles = []
        for name, site in self.sites.items():
            site.retention.requires_grad_(True)
            handles.append(site.retention.register_post_accumulate_grad_hook(partial(self._take, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for site in self.sites.values():
                site.retention.requires_grad_(False)

    def _take(self, name: str, retention: Tensor) -> None:
        assert retention.grad is not None
        self.slopes[name] = float(retention.grad)
        retention.grad = None

    def retention(self) -> dict[str, float]:
        """d of every site now."""
        return {name: float(site.retention.detach()) for name, site in self.sites.items()}

    def before_step(self, step: int) -> None:
        """Frees the dense parts once the budget is closed."""
        if step >= self.steps and self.end == 0.0:
            for site in self.sites.values():
                if site.residual is not None:
                    site.retention.requires_grad_(False)
                    site.drop_dense()

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """Moves every d after a step of the optimizer."""
        step = int(metrics["step"])  # steps taken so far
        if step > self.steps:
            return
        now = self.retention()
        for name, slope in self.slopes.items():
            self.seen[name] = self.seen.get(name, 0.0) - slope
            self.said[name] = self.said.get(name, 0.0) + 2.0 * (1.0 - now[name]) * self.damages[name]
            fresh = -slope / self.costs[name]
            self.worth[name] = MEMORY * self.worth.get(name, fresh) + (1.0 - MEMORY) * fresh
        share = 1.0 - (1.0 - self.end) * step / self.steps
        moved, price = self._moved(now, share * sum(self.costs.values()))
        self.prices.append(price)
        for name, site in self.sites.items():
            site.retention.data.fill_(moved[name])

    def _moved(self, now: Mapping[str, float], limit: float) -> tuple[dict[str, float], float]:
        """The step of every d at the price that meets the limit, and that price."""
        scale = sum(self.damages.values()) / sum(self.costs.values())

        def at(price: float) -> dict[str, float]:
            wanted = {name: FOLLOWING * (self.worth.get(name, 0.0) - price) / scale for name in now}
            return {name: min(max(now[name] + move, 0.0), 1.0) for name, move in wanted.items()}

        def cost(retention: Mapping[str, float]) -> float:
            return sum(self.costs[name] * d for name, d in retention.items())

        if limit <= 0.0:
            return dict.fromkeys(now, 0.0), max(self.worth.values(), default=0.0)
        low, high = 0.0, scale
        while cost(at(high)) > limit:
            high *= 2.0
        for _ in range(50):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if cost(at(middle)) > limit else (low, middle)
        return at(high), high

    def ratios(self) -> dict[str, float]:
        """Site name -> what its dense part was worth in training over what the profile said."""
        return {name: self.seen[name] / said for name, said in self.said.items() if said > 0.0}


# ── (iii) Forms taken away from the solver ───────────────────────────────────────────────────────────────────────


def without_dense(problem: Problem) -> Problem:
    return between(problem, lambda _site, form: form != Dense())


def without_removal(problem: Problem) -> Problem:
    return between(problem, lambda _site, form: form != Removed())


def removing(problem: Problem, branch: str) -> Problem:
    """The problem in which everything but the removal of this branch costs its sites more damage than any plan has.

    Its sites keep their other options, because the solver looks for a way back from every removal.
    """
    members = {site.name for site in problem.removable_branches[branch]}

    def priced(option: Option) -> Option:
        keeps = any(name in members and form != Removed() for name, form in option.forms)
        return replace(option, damage=PROHIBITIVE) if keeps else option

    return replace(problem, options=tuple(map(priced, problem.options)))


def cheapest_removal(problem: Problem) -> tuple[str, Plan]:
    """The branch whose removal leaves the least damage within the budget, and the plan that goes with it."""
    plans = {branch: solve(removing(problem, branch)) for branch in problem.removable_branches}
    branch = min(plans, key=lambda branch: plans[branch].objective)
    return branch, plans[branch]


def forms_ablation(problems: Mapping[float, Problem]) -> list[dict[str, Any]]:
    """Predicted damage at each budget with all forms, with a kind forbidden, and with a branch removed by force."""
    rows = []
    for budget, problem in problems.items():
        free = solve(problem)
        branch, removal = cheapest_removal(problem)
        kinds = [type(form) for form in free.forms.values()]
        rows.append(
            {
                "budget": budget, "damage": free.damage, "dense": kinds.count(Dense), "removed": kinds.count(Removed),
                "without_dense": solve(without_dense(problem)).damage,
                "without_removal": solve(without_removal(problem)).damage,
                "branch": branch, "with_branch_removed": removal.damage,
            }
        )  # fmt: skip
    return rows


# ── (iv) One first factor for sites that read the same input ─────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Curve:
    """Damage of one pair of factors, of one site or of several stacked, by rank.

    Attributes:
        sites: whose outputs it gives, in order.
        unit_cost: parameters a rank.
        tail: (ranks + 1,) damage at rank 0, 1, ...
        A: (ranks, in_features) and B: (sum of out_features, ranks); the best pair of rank r is `A[:r]`, `B[:, :r]`.
        dense: parameters of the sites as they are, which is the other choice; None where there is none.
    """

    sites: tuple[Site, ...]
    unit_cost: int
    tail: Tensor
    A: Tensor = field(repr=False)
    B: Tensor = field(repr=False)
    dense: int | None

    def factors(self, rank: int) -> dict[str, Factors]:
        """A and each site's part of B at a rank, balanced as a profile's starting factors are."""
        spectrum = Spectrum(self.tail.numpy(), 0.0, self.A, self.B)
        A, B = Profile("two-sided", {self.sites[0].name: spectrum}).starting_factors(self.sites[0], rank)
        parts = B.split([site.out_features for site in self.sites])
        return {site.name: (A, part) for site, part in zip(self.sites, parts, strict=True)}

    def best(self, price: float, multiple: int) -> tuple[float, int, float, int | None]:
        """The least damage + price * cost over ranks and dense: that sum, cost, damage, rank (None: dense)."""
        ranks = torch.arange(multiple, len(self.tail), multiple)
        sums = self.tail[ranks] + price * self.unit_cost * ranks
        place = int(sums.argmin())
        rank = int(ranks[place])
        found = (float(sums[place]), self.unit_cost * rank, float(self.tail[rank]), rank)
        if self.dense is not None and price * self.dense < found[0]:
            return price * self.dense, self.dense, 0.0, None
        return found


@dataclass(frozen=True, eq=False)
class InputGroup:
    """Sites that read the same input: a pair each, or one first factor and a second one each."""

    name: str
    separate: tuple[Curve, ...]
    shared: Curve | None

    @property
    def dense(self) -> int:
        return sum(curve.dense or 0 for curve in self.separate)


def input_groups(sites: Sequence[Site], profiled: Profile) -> list[InputGroup]:
    """Both kinds of curves of every group, from a two-sided profile; heads are left out."""
    found = []
    for members in site_groups([site for site in sites if site.kind != "head"]):
        names = tuple(site.name for site in members)
        separate = tuple(_curve((site,), [profiled.spectra[site.name]]) for site in members)
        shared = None
        if profiled.can_share(members):
            shared = _curve(members, [profiled.shared[names][name] for name in names])
        found.append(InputGroup(members[0].group, separate, shared))
    return found


def _curve(sites: tuple[Site, ...], spectra: Sequence[Spectrum]) -> Curve:
    """The curve of spectra that have one A: damages add up, second factors are stacked."""
    into, outputs = sites[0].in_features, sum(site.out_features for site in sites)
    tail = torch.from_numpy(sum(spectrum.tail for spectrum in spectra))
    A, parts = spectra[0].A, [spectrum.B for spectrum in spectra if spectrum.B is not None]
    assert A is not None, "only measured profiles have factors"
    return Curve(sites, into + outputs, tail, A, torch.cat(parts), into * outputs if len(sites) == 1 else None)


Kind = str  # "separate", "shared" or "either"


def allocate(
    groups: Sequence[InputGroup], limit: float, kind: Kind, multiple: int = 8
) -> tuple[list[tuple[Curve, int | None]], int, float]:
    """Ranks for all groups within a cost: curves with the rank of each (None: dense), cost and predicted damage.

    By the price at which the cheapest choices just fit, so of the plans on the convex hull the best.

    Args:
        kind: `separate` pairs, `shared` first factors wherever there is a group, or `either`, group by group.
    """

    def at(price: float) -> tuple[list[tuple[Curve, int | None]], int, float]:
        chosen: list[tuple[Curve, int | None]] = []
        cost, damage = 0, 0.0
        for group in groups:
            ways: list[tuple[Curve, ...]] = []
            if kind != "shared" or group.shared is None:
                ways.append(group.separate)
            if kind != "separate" and group.shared is not None:
                ways.append((group.shared,))
            tried = [[(curve, *curve.best(price, multiple)) for curve in way] for way in ways]
            for curve, _, spent, damaged, rank in min(tried, key=lambda way: sum(choice[1] for choice in way)):
                chosen.append((curve, rank))
                cost, damage = cost + spent, damage + damaged
        return chosen, cost, damage

    low, high = 0.0, 1.0
    while at(high)[1] > limit and high < 1e12:
        high *= 2.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if at(middle)[1] > limit else (low, middle)
    return at(high)


@torch.no_grad()
def with_products(teacher: nn.Module, chosen: Sequence[tuple[Curve, int | None]]) -> nn.Module:
    """The teacher with the product of its chosen factors at each site: what an untrained student computes."""
    twin = frozen_copy(teacher)
    for curve, rank in chosen:
        if rank is None:
            continue
        rows = (curve.B[:, :rank] @ curve.A[:rank]).float().split([site.out_features for site in curve.sites])
        for site, weight in zip(curve.sites, rows, strict=True):
            _set_parameter(twin, f"{site.name}.weight", weight.T if site.transposed else weight)
    return twin


def factored_tree(
    program: Program,
    teacher: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    chosen: Sequence[tuple[Curve, int | None]],
) -> nn.Module:
    """The teacher with trainable factors in place of its projections; sites that share their first one hold one A.

    Refitted as the compiler's own: that turns A into A M C'^-1, with moments of the input alone, so what was shared
    stays shared. Norms and biases train; what the plan leaves dense does not.
    """
    forms: dict[str, Form] = {site.name: Dense() for site in program.sites if site.kind != "head"}
    own: dict[str, Factors] = {}
    for curve, rank in chosen:
        if rank is not None:
            own |= curve.factors(rank)
            forms |= {site.name: Factored(rank) for site in curve.sites}
    fitted = refit(program, forms, own, batches)
    tree = frozen_copy(teacher)
    for curve, rank in chosen:
        if rank is None:
            continue
        A = nn.Parameter(fitted[curve.sites[0].name][0].contiguous())
        for site in curve.sites:
            again, B = fitted[site.name]
            assert torch.allclose(again, A, rtol=1e-3, atol=1e-5), f"{site.name}: its first factor is another one"
            set_module(tree, site.name, FactoredLinear(A, B.contiguous(), tree.get_submodule(site.name).bias))
    train_vectors(tree)
    return tree.eval()


def shared_ablation(
    groups: Sequence[InputGroup], shares: Sequence[float], budgets: Sequence[float],
    measure: Callable[[Sequence[tuple[Curve, int | None]]], dict[str, float]],
) -> dict[str, Any]:  # fmt: skip
    """Shared against separate first factors: predicted, group by group at equal cost, and the whole model's."""
    by_group = [
        {
            "group": [site.name for site in group.shared.sites], "share": share,
            **{kind: allocate([group], share * group.dense, kind, 1)[2] for kind in ("separate", "shared")},
        }
        for group in groups if group.shared is not None for share in shares
    ]  # fmt: skip
    dense = sum(group.dense for group in groups)
    models = []
    for budget in budgets:
        for kind in ("separate", "shared", "either"):
            chosen, cost, damage = allocate(groups, budget * dense, kind)
            sharing = sum(len(curve.sites) > 1 for curve, _ in chosen)
            models.append(
                {
                    "budget": budget, "first_factors": kind, "fraction": cost / dense, "damage": damage,
                    "groups_that_share": sharing, **measure(chosen),
                }
            )  # fmt: skip
    return {"groups": by_group, "models": models}


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# Budgets of the rounds, as multiples of the last one's, and the part of the steps that each takes.
SHRINKING, SAME = (1.8, 1.32, 1.0), (1.0, 1.0, 1.0)
PARTS = (0.25, 0.25, 0.5)
# Part of the steps over which retention is learned, and over which the scheduled one fades.
FADE = 0.5

LEARNED, LEARNED_AGAIN = "learned retention", "learned retention, solved again"
SHRUNK, AGAIN = "shrinking ranks", "same budget, solved again"
# Later stretches start at the rate that one schedule over all steps would have by then, not at its peak again.
FALLING = ", falling rate"
NO_DENSE, NO_REMOVAL, ONE_REMOVED = "nothing dense", "nothing removed", "one branch removed"
ROWS = (LEARNED, LEARNED_AGAIN, SHRUNK, SHRUNK + FALLING, LEARNED_AGAIN + FALLING, ONE_REMOVED, AGAIN)
# The plan of `allocate` with refitted factors: what sharing is worth in training, beside a control that differs in
# nothing else (the compiler's own row is solved again with measured marginals, too).
SEPARATE, SHARED = "separate first factors", "shared first factors"
# A row that trains another row's last plan from the teacher's weights on: what is the plan worth without its history?
PLANS_OF = {f"the plan of {row}": row for row in (LEARNED_AGAIN, SHRUNK)}


class Mechanisms(Bench):
    """The rows of quality.py, and those of this file."""

    def student(self, job: Job) -> Student:
        match job.row.removesuffix(FALLING):
            case "learned retention":
                return self.learned_retention(job, solved_again=False)
            case "learned retention, solved again":
                return self.learned_retention(job, solved_again=True)
            case "shrinking ranks":
                return self.shrinking_ranks(job, SHRINKING)
            case "same budget, solved again":
                return self.shrinking_ranks(job, SAME)
            case row if row in PLANS_OF:
                return self.plan_of(job, PLANS_OF[row])
        return super().student(job)

    def start(self, row: str, budget: float) -> Start:
        match row:
            case "nothing dense":
                return self.start_of(self.program, self.planned_within(budget, without_dense), trains=True)
            case "nothing removed":
                return self.start_of(self.program, self.planned_within(budget, without_removal), trains=True)
            case "separate first factors":
                return self.factored_start(budget, "separate")
            case "shared first factors":
                return self.factored_start(budget, "either")
            case "one branch removed":
                branch, _ = cheapest_removal(self.build(budget, self.program, self.profile_of("two-sided"))[0])
                return self.start_of(
                    self.program, self.planned_within(budget, partial(removing, branch=branch)), trains=True
                )
        return super().start(row, budget)

    @cached_property
    def groups(self) -> list[InputGroup]:
        return input_groups(self.program.sites, self.profile_of("two-sided"))

    def factored_start(self, budget: float, kind: Kind) -> Start:
        """Factors by `allocate`, first ones shared where that is allowed and pays."""
        dense = sum(group.dense for group in self.groups)
        chosen, cost, damage = allocate(self.groups, budget * dense, kind)
        sharing = sum(len(curve.sites) > 1 for curve, _ in chosen)
        note = f"{sharing} groups share their first factor; damage {damage:.4f} predicted"
        tree = factored_tree(self.program, self.teacher, self.calibration, chosen)
        return Start(tree, lambda tree: tree, cost / dense, note)

    def planned_within(self, budget: float, narrow: Callable[[Problem], Problem]) -> StartingPoint:
        """The compiler's plan where only some forms are offered, with its starting factors."""

        def build(profiled: Profile) -> Any:
            problem, timed = self.build(budget, self.program, profiled)
            return narrow(problem), timed

        measured = self.profile_of("two-sided")
        plan = solve(build(measured)[0])
        return stages.measure_plan(
            self.program, self.calibration, measured, build, plan, 1, True, None
        ).value  # fmt: skip

    def learned_retention(self, job: Job, solved_again: bool) -> Student:
        """Retention learned over the first part of the steps; then the plan goes on, or what it taught is solved.

        Solved again: each damage curve of the first plan's profile is scaled by the root of the learned ratio of its
        site, as measured marginals are, and the knapsack is asked again; the new plan's factors are those of the
        trained weights, and the last stretch has its own optimizer and learning-rate schedule.
        """
        clock = _Clock()
        _, found = self.planned(job.budget)
        branched, forms = stages.insert_branches(self.program, found, True).value, found.plan.forms
        steps = self.config(job).steps
        fading = max(1, round(FADE * steps))
        factored = {
            name: module
            for name, module in branched.tree.named_modules()
            if isinstance(module, BranchedLinear) and isinstance(forms[name], Factored)
        }
        learning = LearnedRetention(
            factored,
            {name: found.problem.dense_costs[name] / found.problem.baseline for name in factored},
            {site.name: found.profile.damage(site, forms[site.name]) for site in self.program.sites
             if site.name in factored},
            fading,
            OPEN_AT_THE_END if solved_again else 0.0,
        )  # fmt: skip
        clock.lap("start")
        self.stretch(branched, forms, job, 0, fading if solved_again else steps, learning)
        clock.lap("training")
        facts = {"ratios": learning.ratios(), "prices": learning.prices, "retention": learning.retention()}
        if solved_again:
            build = partial(self.build, job.budget, self.program)
            taught = Marginals(0.0, learning.ratios()).rescaled(found.profile, self.program.sites, forms)
            plan = solve(build(taught)[0])
            facts["moved"] = moved(forms, plan.forms)
            forms = plan.forms
            program = trace(dense_twin(branched.tree, self.teacher))
            start = fitted_start(program, self.calibration, profile(program, self.calibration), build, forms)
            branched = stages.insert_branches(program, start, True).value
            clock.lap("start")
            self.stretch(branched, forms, job, fading, steps)
            clock.lap("training")
        return self.finished(branched, forms, job, clock, facts)

    def shrinking_ranks(self, job: Job, multiples: Sequence[float]) -> Student:
        """Rounds at falling budgets; each plans for the weights that the one before has trained.

        Between rounds the student is multiplied out into the teacher's module tree and profiled there; the knapsack,
        its measured marginals and the refit then work as they do on a teacher, for the student as it is. The
        distance that training lowers is the one to the teacher all along. Each round has its own optimizer and
        learning-rate schedule.
        """
        clock = _Clock()
        steps = self.config(job).steps
        bounds = [round(sum(PARTS[:part]) * steps) for part in range(len(PARTS) + 1)]
        program, rounds = self.program, []
        for index, multiple in enumerate(multiples):
            budget = round(min(1.0, job.budget * multiple), 4)
            found = self.planned(budget)[1] if index == 0 else self.planned_on(program, budget)
            branched, forms = stages.insert_branches(program, found, True).value, found.plan.forms
            clock.lap("start")
            self.stretch(branched, forms, job, bounds[index], bounds[index + 1])
            clock.lap("training")
            twin = dense_twin(branched.tree, self.teacher)
            kl = perplexity_and_kl(twin, self.teacher, self.text.selection).kl
            rounds.append({"budget": budget, "predicted": found.plan.damage, "selection_kl": kl})
            program = trace(twin)
        first = self.planned(job.budget)[1].plan.forms
        facts = {"rounds": rounds, "moved": moved(first, forms)}
        return self.finished(branched, forms, job, clock, facts)

    def planned_on(self, program: Program, budget: float) -> StartingPoint:
        """The compiler's plan of a trained student, as it makes one of a teacher."""
        build = partial(self.build, budget, program)
        measured = profile(program, self.calibration)
        plan = solve(build(measured)[0])
        return stages.measure_plan(program, self.calibration, measured, build, plan, 1, True, None).value

    def plan_of(self, job: Job, row: str) -> Student:
        """Another row's last plan, trained from the teacher's weights on with a hard start."""
        clock = _Clock()
        earlier = quality.read_runs(self.work)[replace(job, row=row).key]
        forms = {name: form_from_json(form, name) for name, form in earlier["facts"]["forms"].items()}
        measured = self.profile_of("two-sided")
        problem, _ = self.build(job.budget, self.program, measured)
        plan = price_forms(problem, forms, gap=None)
        found = stages.measure_plan(
            self.program, self.calibration, measured, partial(self.build, job.budget, self.program), plan, 0, True,
            None,
        ).value  # fmt: skip
        branched = stages.insert_branches(self.program, found, True).value
        clock.lap("start")
        self.stretch(branched, forms, job, 0, self.config(job).steps)
        clock.lap("training")
        return self.finished(branched, forms, job, clock, {"untrained": found.plan.damage})

    def stretch(
        self, branched: Program, forms: Mapping[str, Form], job: Job, first: int, last: int,
        learning: LearnedRetention | None = None,
    ) -> None:  # fmt: skip
        """Trains a job's steps from `first` to `last` with an optimizer and a learning-rate schedule of their own."""
        if self.compile:
            torch.compiler.reset()  # graphs of the stretch before count towards a limit
        whole = self.config(job)
        rate = learning_rate_at(first, whole) if first and job.row.endswith(FALLING) else whole.learning_rate
        config = replace(whole, steps=last - first, learning_rate=rate)
        kept = dense_branches(branched.tree, forms)
        with nullcontext() if learning is None else learning.watching():
            distill(
                branched.tree, self.teacher, Later(Batches(self.text.train, job.batch, job.seed), first), config,
                retained=kept if learning is None else kept | learning.sites.keys(),
                before_step=None if learning is None else learning.before_step,
                on_step=None if learning is None else learning.on_step, progress=False,
            )  # fmt: skip
        bind(branched)

    def finished(
        self, branched: Program, forms: Mapping[str, Form], job: Job, clock: _Clock, facts: Mapping[str, Any]
    ) -> Student:
        """The student in its final form, with the cost counted on the plan."""
        model = fold(settle(branched, forms), forms)[0].tree
        problem, _ = self.build(job.budget, self.program, self.profile_of("two-sided"))
        plan = price_forms(problem, forms, gap=None)
        shown = {name: form_to_json(form) for name, form in forms.items()}
        return Student(model, plan.fraction, plan.summary(), clock.seconds, {**facts, "forms": shown})


class _Clock:
    """Adds up seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def moved(before: Mapping[str, Form], after: Mapping[str, Form]) -> int:
    """How many sites have another form."""
    return sum(before[name] != form for name, form in after.items())


# ── The queue and the result ─────────────────────────────────────────────────────────────────────────────────────


def jobs_of(budgets: Sequence[float], tokens: int, done: Mapping[str, Any]) -> Iterator[Job]:
    """What is left to run: for each budget the compiler's own row, hard and fading, then the mechanisms.

    Forbidding a form matters where the plan uses it, so those rows come at every budget, and what is not used is said
    by `forms_ablation`.
    """
    for budget in budgets:
        usual = Job("ours", budget, RATE, 0, tokens, LABEL_WEIGHT)
        rows = [Job(SEPARATE, budget), Job(SHARED, budget), usual, replace(usual, retention=FADE)]
        rows += [replace(usual, row=row) for row in (SEPARATE, SHARED)]
        rows += [replace(usual, row=row) for row, of in PLANS_OF.items() if replace(usual, row=of).key in done]
        rows += [replace(usual, row=row) for row in ROWS]
        yield from (job for job in rows if job.key not in done)


def name_of(run: Mapping[str, Any]) -> str:
    return run["row"] + (f", fading over {run['retention']:g} of the steps" if run["retention"] else "")


def table(result: Mapping[str, Any]) -> str:
    """Every run, the best of each budget first; those without tokens are not trained."""
    runs = sorted(result["runs"], key=lambda run: (-run["budget"], run["tokens"], run["validation"]["kl"]))
    rows = [
        (
            f"{run['budget']:g}", name_of(run), f"{run['fraction']:.3f}", f"{run['tokens']:,}",
            f"{run['validation']['perplexity']:.2f}", f"{run['validation']['kl']:.4f}",
            f"{run['selection']['kl']:.4f}",
        )
        for run in runs
    ]  # fmt: skip
    return markdown(("budget", "row", "kept", "tokens", "perplexity", "KL", "KL on the selection text"), rows)


def forms_table(result: Mapping[str, Any]) -> str:
    """Predicted damage with all forms offered, and how much more it is without."""
    rows = [
        (
            f"{line['budget']:g}", f"{line['damage']:.4f}", str(line["dense"]), str(line["removed"]),
            f"{line['without_dense'] / line['damage']:.3f}", f"{line['without_removal'] / line['damage']:.3f}",
            f"{line['with_branch_removed'] / line['damage']:.3f}", line["branch"].removeprefix("model."),
        )
        for line in result["forms"]
    ]  # fmt: skip
    titles = ("budget", "damage", "dense sites", "removed sites", "x without dense", "x without removal")
    return markdown((*titles, "x with one branch removed", "that branch"), rows)


def shared_table(result: Mapping[str, Any]) -> str:
    """The whole model with separate and shared first factors, untrained."""
    rows = [
        (
            f"{line['budget']:g}", line["first_factors"], f"{line['fraction']:.3f}", str(line["groups_that_share"]),
            f"{line['damage']:.4f}", f"{line['kl']:.4f}", f"{line['perplexity']:.2f}",
        )
        for line in result["shared"]["models"]
    ]  # fmt: skip
    return markdown(("budget", "first factors", "kept", "groups that share", "predicted", "KL", "perplexity"), rows)


def kept(path: Path, compute: Callable[[], Any]) -> Any:
    """What was computed once, from its file."""
    if not path.exists():
        path.write_text(json.dumps(compute(), indent=1) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = quality.parser_of(__doc__, 300_000)
    parser.add_argument("--budgets", type=float, nargs="+", default=(0.25,), help="of the rows that train")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_source(BUNDLED_MODEL).tokenizer
    text = quality.read_text(options.prose, options.tasks, options.tokens, options.work, tokenizer)
    bench = Mechanisms(text, options.work, lambda model: {}, (), options.compile, options.autocast)

    def measure(chosen: Sequence[tuple[Curve, int | None]]) -> dict[str, float]:
        model = with_products(bench.teacher, chosen)
        found = perplexity_and_kl(model, bench.teacher, text.validation, stride=quality.STRIDE)
        return {"kl": found.kl, "perplexity": found.perplexity}

    def shared() -> dict[str, Any]:
        return shared_ablation(bench.groups, (0.1, 0.15, 0.25, 0.5, 0.75), (0.15, 0.25, 0.5), measure)

    def forms() -> list[dict[str, Any]]:
        profiled = bench.profile_of("two-sided")
        budgets = (0.05, 0.1, 0.15, 0.25, 0.5, 0.75)
        return forms_ablation({budget: bench.build(budget, profiled)[0] for budget in budgets})

    analyses = {
        "forms": kept(options.work / "forms.json", forms),
        "shared": kept(options.work / "shared.json", shared),
    }
    print(f"{forms_table(analyses)}\n\n{shared_table(analyses)}\n", flush=True)
    if not options.report_only:
        quality.work_through(bench, options.work, lambda done: jobs_of(options.budgets, options.tokens, done))
    result = {
        "versions": versions(), "rate": RATE, "label_weight": LABEL_WEIGHT, "task_share": quality.TASK_SHARE,
        "teacher": perplexity_and_kl(bench.teacher, None, text.validation, stride=quality.STRIDE).to_json(),
        "runs": list(quality.read_runs(options.work).values()), **analyses,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
