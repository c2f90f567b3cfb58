"""Plans of a family: one student whose members share ordered factors, so that ranks only grow with the budget.

    anchors          a dozen budgets from the smallest to the largest, solved from the largest down; a site's form at
                     one anchor is never larger than at the next
    in between       the knapsack is solved at exactly the budget that was asked, each site's form between those that
                     the two neighbouring anchors gave it

Sites that read one input share their first factor in every member that factors them, or in none: at the largest
anchor that factors any of them it is decided which.

A site that is dense in the largest member and factored in a smaller one stores both its weight and a pair. The pair's
rank is capped so that all such pairs together fit what the family may weigh beyond its largest member.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .budget import Budget
from .errors import BadInput
from .plan import Plan
from .problem import DamageKind, Option, Problem
from .solver import solve
from .values import Dense, Factored, Form, Removed, Site, shared_break_even_rank

ANCHORS = 12
# Of the largest member's weights: what pairs beside dense weights may add. The promise is 0.3; the rest is for what
# is stored beside the weights.
EXTRA_SHARE = 0.27


@dataclass(frozen=True)
class DamageTable:
    """A damage model as plain numbers, so that a family can be saved and still plan.

    Attributes:
        kind, unit: of the profile it was read from.
        factored: site name -> damage at rank 1, 2, ... below break-even.
        removed: site name -> damage of dropping its output.
        shared: the same as `factored` for sites that share their first factor, by all their names.
    """

    kind: DamageKind
    unit: str
    factored: Mapping[str, Sequence[float]]
    removed: Mapping[str, float]
    shared: Mapping[tuple[str, ...], Mapping[str, Sequence[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem) -> DamageTable:
        """The damages of every counted site of `problem` at every rank it could have."""
        model = problem.damage_model

        def damages(site: Site, ranks: int, sharers: tuple[str, ...] = ()) -> list[float]:
            return [model.damage(site, Factored(rank, sharers)) for rank in range(1, ranks)]

        groups = {tuple(site.name for site in sites): sites for sites in problem.sharing_groups}
        return cls(
            problem.damage_kind,
            problem.damage_unit,
            {site.name: damages(site, site.break_even_rank) for site in problem.counted},
            {site.name: model.damage(site, Removed()) for site in problem.counted},
            {
                names: {site.name: damages(site, shared_break_even_rank(sites), names) for site in sites}
                for names, sites in groups.items()
            },
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "kind": self.kind,
            "unit": self.unit,
            "factored": {name: list(damages) for name, damages in self.factored.items()},
            "removed": dict(self.removed),
            "shared": [{name: list(damages) for name, damages in sites.items()} for sites in self.shared.values()],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DamageTable:
        """The table that was written."""
        shared = {tuple(sites): sites for sites in data["shared"]}
        return cls(data["kind"], data["unit"], data["factored"], data["removed"], shared)

    def can_share(self, sites: Sequence[Site]) -> bool:
        """Whether it is known what a first factor shared by exactly these sites costs."""
        return tuple(site.name for site in sites) in self.shared

    def damage(self, site: Site, form: Form) -> float:
        """As the profile said it."""
        match form:
            case Factored(rank, sharers) if sharers:
                return self.shared[sharers][site.name][rank - 1]
            case Factored(rank):
                return self.factored[site.name][rank - 1]
            case Removed():
                return self.removed[site.name]
        return 0.0


def _share(anchor: Plan) -> float:
    """The share of the compute that an anchor keeps, however its budget was written."""
    fraction = Budget.parse(anchor.budget, anchor.metric).fraction
    assert fraction is not None, "a family's range is of shares"
    return fraction


@dataclass(frozen=True)
class PlanChain:
    """The plans of a family's members.

    Attributes:
        problem: at the largest budget, with the options that any member may use.
        anchors: plans from the smallest budget to the largest; ranks never fall from one to the next.
    """

    problem: Problem
    anchors: tuple[Plan, ...]

    @property
    def smallest(self) -> float:
        return _share(self.anchors[0])

    @property
    def largest(self) -> float:
        return _share(self.anchors[-1])

    def plan_at(self, budget: float | int | str) -> Plan:
        """The plan with the least damage at exactly this budget whose forms lie between the neighbouring anchors'.

        Raises:
            BadInput: for anything but a fraction within the family's range.
        """
        asked = member_budget(budget, self.problem, self.smallest, self.largest)
        fractions = [_share(anchor) for anchor in self.anchors]
        if asked.fraction in fractions:
            anchor = self.anchors[fractions.index(asked.fraction)]
            return replace(anchor, budget=asked.text)
        above = next(index for index, fraction in enumerate(fractions) if fraction > (asked.fraction or 0.0))
        low, high = self.anchors[above - 1].forms, self.anchors[above].forms
        return solve(
            between(at_budget(self.problem, asked), lambda name, form: fits_within(low[name], form, high[name]))
        )

    def pairs(self) -> dict[str, Factored]:
        """Site name -> the pair it stores, of the most ranks that any member uses; sites without one left out."""
        smallest, largest = self.anchors[0].forms, self.anchors[-1].forms
        offered: dict[str, list[Factored]] = {name: [] for name in largest}
        for option in self.problem.options:
            for name, form in option.forms:
                if isinstance(form, Factored):
                    offered[name].append(form)
        pairs = {}
        for name, form in largest.items():
            if isinstance(form, Factored):
                pairs[name] = form
            elif isinstance(low := smallest[name], Factored):
                pairs[name] = max(other for other in offered[name] if other.sharers == low.sharers)
        return pairs


def member_budget(budget: float | int | str, problem: Problem, smallest: float, largest: float) -> Budget:
    """The budget of one member, checked against the family's range.

    Raises:
        BadInput: it is no fraction, or lies outside.
    """
    asked = Budget.parse(budget, problem.metric)
    if asked.fraction is None or not smallest <= asked.fraction <= largest:
        raise BadInput(
            f"budget {asked.text} is outside this family, whose members keep {smallest:g} to {largest:g} of "
            f"{problem.metric}; ask for a fraction in that range, or compile for that budget alone"
        )
    return asked


def plan_chain(problem: Problem, smallest: float, largest: float, weights: int, anchors: int = ANCHORS) -> PlanChain:
    """Anchors from `largest` down to `smallest`, evenly spaced in the logarithm of the budget.

    Args:
        problem: at the largest budget. Branches are not removed in a family, and tied weights stay dense: neither
            has factors to share.
        weights: parameters of the whole dense model, what no plan touches included.
        anchors: how many; at least 2.

    Raises:
        InfeasibleBudget: no plan is as small as the smallest member.
    """
    tied = {site.name for site in problem.sites if site.tied}

    def can_nest(name: str, form: Form) -> bool:
        return not isinstance(form, Removed) and (name not in tied or isinstance(form, Dense))

    problem = between(problem, can_nest)
    top = solve(problem)
    problem = between(problem, _within_weight(problem, top, weights))
    plans = [top]
    for index in range(1, anchors):
        fraction = round(largest * (smallest / largest) ** (index / (anchors - 1)), 4)
        fraction = smallest if index == anchors - 1 else fraction
        above = plans[-1].forms
        asked = at_budget(problem, Budget.parse(fraction, problem.metric))
        plans.append(solve(between(asked, lambda name, form, above=above: fits_within(None, form, above[name]))))  # type: ignore[misc]
    return PlanChain(problem, tuple(reversed(plans)))


def _within_weight(problem: Problem, top: Plan, weights: int) -> Callable[[str, Form], bool]:
    """Whether a form may occur in a family with this largest member: caps pairs beside dense weights."""
    sites = {site.name: site for site in problem.counted}
    forms = top.forms
    saved = sum(
        sites[name].weight_count - _numbers_of(form, sites[name])
        for name, form in forms.items()
        if isinstance(form, Factored)
    )
    can_split = {name for option in problem.options for name, form in option.forms if isinstance(form, Factored)}
    beside = sum(sites[name].weight_count for name in can_split if forms[name] == Dense())
    share = EXTRA_SHARE * (weights - saved) / beside if beside else math.inf

    def allowed(name: str, form: Form) -> bool:
        if forms[name] != Dense() or not isinstance(form, Factored):
            return fits_within(None, form, forms[name])
        together = [sites[other] for other in form.sharers or (name,)]
        numbers = sum(_numbers_of(form, site) for site in together)
        return numbers <= share * sum(site.weight_count for site in together)

    return allowed


def _numbers_of(form: Factored, site: Site) -> int:
    """How many numbers a site's own part of a pair is."""
    return form.rank * (site.out_features + (site.in_features if form.brings_first_factor(site.name) else 0))


def at_budget(problem: Problem, budget: Budget) -> Problem:
    """The same problem with another budget."""
    return replace(problem, budget=budget, limit=budget.limit(problem.baseline))


def between(problem: Problem, allowed: Callable[[str, Form], bool]) -> Problem:
    """The problem with only those options all of whose forms are allowed; `allowed(site name, form)`."""

    def may_stay(option: Option) -> bool:
        return all(allowed(name, form) for name, form in option.forms)

    return replace(problem, options=tuple(option for option in problem.options if may_stay(option)))


def fits_within(low: Form | None, form: Form, high: Form) -> bool:
    """Whether a form is no smaller than `low` (None: anything is), no larger than `high`, and of the same factors."""
    if not size_of(form) <= size_of(high) or (low is not None and size_of(form) < size_of(low)):
        return False
    pairs = [other for other in (low, form, high) if isinstance(other, Factored)]
    return not isinstance(form, Factored) or len({pair.sharers for pair in pairs}) == 1


def size_of(form: Form) -> float:
    """Forms in the order of their size: removed, ranks, dense."""
    match form:
        case Factored(rank):
            return float(rank)
        case Dense():
            return math.inf
    return 0.0
