"""The planning problem as data: which forms each site may take, what each costs, and what each damages.

A problem says everything a solver needs and nothing about how to solve it:

    minimise    sum of damage over the chosen options
    such that   every counted site is covered by exactly one chosen option
                fixed + sum of cost over the chosen options <= limit

Costs are exact integers in one metric. An option usually covers one site. Removing a branch covers all its sites, and
a first factor that sites with one input share covers these; and where a model of time prices such sites together,
since their first GEMMs are one, every option covers the group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np

from .budget import Budget
from .errors import BadInput, listed
from .rules import RuleValue, SiteRule, resolve_rules
from .values import (
    AnyWorkload,
    Dense,
    Factored,
    Form,
    Metric,
    Operator,
    Refusal,
    Removed,
    Scope,
    Site,
    mixed,
    shared_break_even_rank,
    site_groups,
)

if TYPE_CHECKING:
    from .cost_models import CostModel, GroupCostModel

DamageKind = Literal["two-sided", "whitened", "plain", "prior"]

# A site gets at most this many ranks, and few sites get more: with few sites the steps between ranks must be fine
# for the total to come within 1 % of any budget, with many the steps of different sites interleave. The solver's
# time grows with the total.
RANKS_PER_SITE = 64
RANKS_IN_ALL = 36_000
# Sites whose costs couple are decided together: so many combinations of their forms are priced, a group and in all.
COMBINATIONS_PER_GROUP = 30_000
MOST_TOGETHER = 12  # sites of one group whose forms are combined; with two forms each, 4096 combinations
COMBINATIONS_IN_ALL = 600_000


class DamageModel(Protocol):
    """Predicts what a form of one site does to the model's output.

    Attributes:
        kind: which measure the numbers are in; only `"two-sided"` ones predict a rise of the mean KL.
        unit: of the numbers: `nats per token` for a two-sided measure with logits.
    """

    @property
    def kind(self) -> DamageKind:
        """Which measure the numbers are in."""
        ...

    @property
    def unit(self) -> str:
        """What the numbers count."""
        ...

    def damage(self, site: Site, form: Form) -> float:
        """At least 0, and 0 for Dense. For Removed: of dropping the site's output altogether."""
        ...


@dataclass(frozen=True)
class Option:
    """One thing a solver may choose: forms for one or several sites at once.

    The site sets of a problem's options nest or are disjoint (a branch contains its sites), never overlap in part.

    Attributes:
        forms: (site name, form) pairs, in site order.
        cost: of all of them together, in the problem's metric.
        damage: of all of them together, in the problem's damage measure.
    """

    forms: tuple[tuple[str, Form], ...]
    cost: int
    damage: float

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of the sites it gives a form."""
        return tuple(name for name, _ in self.forms)


@dataclass(frozen=True)
class Problem:
    """Everything that decides a plan.

    Attributes:
        sites: all sites of the model, excluded ones too.
        rules: the rule of every site, by name.
        options: what may be chosen; each counted site has at least its dense form.
        notes: why a site has fewer forms than usual, by name.
        baseline: cost of everything that counts while all sites are dense.
        limit: the integer cost that no plan may exceed.
        fixed: the part of baseline and cost that no choice changes: 0 with scope `sites`; operators and excluded
            sites with scope `model`.
        metric, scope, budget, workload, rank_multiple, interpolative: as asked.
        damage_kind, damage_unit: the measure of the damages, and what its numbers count.
        operators: what the graph holds beside the sites.
        fingerprints: of the model and the data behind the numbers.
        cost_model, damage_model: price any form, also one that is no option.
        dense_cost_model: prices the baseline, where that differs: a dense model may not fit the caches that a
            compressed one stays in.
    """

    sites: tuple[Site, ...]
    rules: Mapping[str, SiteRule]
    options: tuple[Option, ...] = field(repr=False)
    notes: Mapping[str, str]
    baseline: int
    limit: int
    fixed: int
    metric: Metric
    scope: Scope
    budget: Budget
    workload: AnyWorkload
    damage_kind: DamageKind
    damage_unit: str
    rank_multiple: int
    operators: tuple[Operator, ...] = field(repr=False)
    fingerprints: Mapping[str, str]
    cost_model: CostModel = field(compare=False, repr=False)
    damage_model: DamageModel = field(compare=False, repr=False)
    dense_cost_model: CostModel | None = field(default=None, compare=False, repr=False)
    interpolative: bool = False

    @cached_property
    def counted(self) -> tuple[Site, ...]:
        """The sites that get a form, in order."""
        return tuple(site for site in self.sites if self.rules[site.name].mode != "exclude")

    @property
    def excluded(self) -> tuple[str, ...]:
        """Names of the sites that stay dense and are no part of the decision, in order."""
        return tuple(site.name for site in self.sites if self.rules[site.name].mode == "exclude")

    @cached_property
    def removable_branches(self) -> dict[str, tuple[Site, ...]]:
        """The branches that may go as a whole, with their sites in order."""
        return removable_branches(self.sites, self.rules)

    @cached_property
    def sharing_groups(self) -> tuple[tuple[Site, ...], ...]:
        """The counted sites that may share their first factor: open ones whose damage is known for that."""
        model = self.damage_model
        if not hasattr(model, "can_share"):
            return ()
        return tuple(
            group
            for group in site_groups(self.counted)
            if len(group) > 1
            and all(self.rules[site.name].mode != "dense" for site in group)
            and model.can_share(group)
        )

    @cached_property
    def groups(self) -> tuple[tuple[Site, ...], ...]:
        """The counted sites, those together whose costs couple in this metric."""
        return _groups(self.counted, self.cost_model, self.metric)

    def cost(self, site: Site, form: Form) -> int:
        """Cost of one site on its own in one form, in the problem's metric."""
        return mixed(partial(self.cost_model.cost, site, form), self.workload).in_metric(self.metric)

    def costs(self, forms: Mapping[str, Form]) -> dict[str, int]:
        """Cost of every counted site while all have the given forms; they sum to what the sites cost together."""
        return self._costs(self.cost_model, forms, self.groups)

    def total(self, forms: Mapping[str, Form]) -> int:
        """Cost of everything that counts while all counted sites have the given forms."""
        return self.fixed + sum(self.costs(forms).values())

    @property
    def dense_fits(self) -> bool:
        """Whether nothing has to change: the dense model is within the limit, by the prices of either."""
        dense = {site.name: Dense() for site in self.counted}
        return self.baseline <= self.limit and self.total(dense) <= self.limit

    @cached_property
    def dense_costs(self) -> dict[str, int]:
        """Cost of every counted site in the dense model."""
        dense = {site.name: Dense() for site in self.counted}
        whole = tuple(tuple(site.whole for site in group) for group in self.groups)
        return self._costs(self.dense_cost_model or self.cost_model, dense, whole)

    def _costs(
        self, model: CostModel, forms: Mapping[str, Form], groups: Iterable[tuple[Site, ...]]
    ) -> dict[str, int]:
        found: dict[str, int] = {}
        for sites in groups:
            of_group = [forms[site.name] for site in sites]
            costs = _group_costs(model, sites, of_group, self.workload, self.metric)
            found |= {site.name: cost for site, cost in zip(sites, costs, strict=True)}
        return {site.name: found[site.name] for site in self.counted}

    def damage(self, site: Site, form: Form) -> float:
        """Damage of one site in one form: 0 for Dense, but for a site whose MLP has lost inner channels.

        A removed branch damages through its last site's output alone.

        Raises:
            BadInput: if the damage model's number is negative or not finite.
        """
        inside_a_branch = site.branch is not None and self._last_sites[site.branch] != site.name
        whole = isinstance(form, Dense) and site.narrowed_from is None
        if whole or (isinstance(form, Removed) and inside_a_branch):
            return 0.0
        damage = float(self.damage_model.damage(site, form))
        if not math.isfinite(damage) or damage < 0:
            raise BadInput(
                f"{site.name}: the {self.damage_kind} damage of {form} is {damage}, it must be finite and "
                f"at least 0; look for NaN or infinite values in this site's weights or in the calibration data"
            )
        return damage

    @cached_property
    def _last_sites(self) -> dict[str, str]:
        return {site.branch: site.name for site in self.sites if site.branch is not None}


def build_problem(
    sites: Iterable[Site],
    *,
    budget: Budget,
    cost_model: CostModel,
    damage_model: DamageModel,
    workload: AnyWorkload,
    dense_cost_model: CostModel | None = None,
    rules: Mapping[str, RuleValue] | None = None,
    scope: Scope = "sites",
    operators: Iterable[Operator] = (),
    rank_multiple: int = 8,
    interpolative: bool = False,
    fingerprints: Mapping[str, str] | None = None,
    refusals: Iterable[Refusal] = (),
) -> Problem:
    """The problem of choosing a form for each site under one budget.

    An open site may stay dense or take a rank: multiples of `rank_multiple` below break-even that cost strictly less
    than dense, within the rules' bounds. Where no multiple lies within them (small sites, tight bounds), every rank
    within them is offered instead. Open sites that read one input may take one rank and one first factor together,
    below the break-even of all of them. A branch whose sites are all open, without `min_rank` and untied, may be
    removed where damage was measured.
    Options that another one beats in damage at no more cost are left out; equal damage is not beaten, so that a
    budget can still be used in full.

    Args:
        sites: all sites of the model, in execution order.
        budget: what to keep; its metric decides what is counted.
        cost_model, damage_model: price the forms.
        workload: the shapes the costs are for.
        dense_cost_model: prices the baseline; `cost_model` by default.
        rules: globs -> rules, see `resolve_rules`.
        scope: `"sites"` counts the sites that are not excluded; `"model"` counts everything in the graph, so there an
            excluded site is dense and counted.
        operators: what the graph holds beside the sites; counted with scope `"model"` only.
        rank_multiple: alignment of the ranks offered.
        interpolative: offer ranks in interpolative form, which has rank^2 weights less; heads keep plain pairs.
        fingerprints: of the model and the data, kept in the plan.
        refusals: weights that are no sites, for the error where nothing is left to plan.

    Raises:
        BadInput: no sites, none that counts, rules or arguments that cannot be used, damages that are no numbers.
    """
    sites = tuple(sites)
    _check_arguments(sites, scope, rank_multiple)
    if interpolative and budget.metric == "latency":
        raise BadInput(
            "interpolative=True multiplies fewer numbers and copies more; with a budget in time leave it out, or "
            "give the budget in flops, bytes or params"
        )
    problem = Problem(
        sites=sites,
        rules=resolve_rules(rules, sites),
        options=(),
        notes={},
        baseline=0,
        limit=0,
        fixed=0,
        metric=budget.metric,
        scope=scope,
        budget=budget,
        workload=workload,
        damage_kind=damage_model.kind,
        damage_unit=damage_model.unit,
        rank_multiple=rank_multiple,
        interpolative=interpolative,
        operators=tuple(operators),
        fingerprints=dict(fingerprints or {}),
        cost_model=cost_model,
        dense_cost_model=dense_cost_model,
        damage_model=damage_model,
    )
    if not problem.counted:
        others = [f"; no site is {refusal}" for refusal in [*refusals][:3]]
        raise BadInput(
            f"all {len(sites)} sites are excluded ({_first(site.name for site in sites)}), so there is nothing to "
            f'plan; give at least one a rule such as {{"{sites[0].name}": "compress"}}' + "".join(others)
        )
    fixed, baseline = fixed_and_baseline(problem)
    problem = replace(problem, fixed=fixed, baseline=baseline, limit=budget.limit(baseline))
    if baseline <= 0:
        raise BadInput(
            f"all that counts has no {budget.metric} to save: its weights are read elsewhere too and stay; give "
            f"the budget in flops"
        )
    options, notes = _options_and_notes(problem)
    return replace(problem, options=options, notes=notes)


def fixed_and_baseline(problem: Problem) -> tuple[int, int]:
    """What no choice changes, and the cost of everything that counts while all sites are dense."""
    fixed = _fixed(problem, problem.cost_model)
    return fixed, _fixed(problem, problem.dense_cost_model or problem.cost_model) + sum(problem.dense_costs.values())


def _fixed(problem: Problem, model: CostModel) -> int:
    if problem.scope != "model":
        return 0
    excluded = [site for site in problem.sites if problem.rules[site.name].mode == "exclude"]
    costs = [mixed(partial(model.operator_cost, operator), problem.workload) for operator in problem.operators]
    costs += [mixed(partial(model.cost, site, Dense()), problem.workload) for site in excluded]
    return sum(cost.in_metric(problem.metric) for cost in costs)


# ── Sites whose costs couple ─────────────────────────────────────────────────────────────────────────────────────


def _couples(model: CostModel, metric: Metric) -> bool:
    """Only time couples sites: what they compute and store adds up."""
    return metric == "latency" and hasattr(model, "combination_times")


def _groups(sites: Sequence[Site], model: Any, metric: Metric) -> tuple[tuple[Site, ...], ...]:
    if not _couples(model, metric):
        return tuple((site,) for site in sites)
    return tuple(model.groups(sites))


def _group_costs(
    model: Any, sites: Sequence[Site], forms: Sequence[Form], workload: AnyWorkload, metric: Metric
) -> list[int]:
    if len(sites) == 1:
        return [mixed(partial(model.cost, sites[0], forms[0]), workload).in_metric(metric)]
    parts = [(weight, model.group_costs(sites, forms, part)) for weight, part in workload.parts]
    return [sum(weight * costs[index].in_metric(metric) for weight, costs in parts) for index in range(len(sites))]


def removable_branches(sites: Sequence[Site], rules: Mapping[str, SiteRule]) -> dict[str, tuple[Site, ...]]:
    """Branch name -> its sites, for branches whose sites are all open, without `min_rank` and untied."""
    branches: dict[str, list[Site]] = {}
    for site in sites:
        if site.branch is not None:
            branches.setdefault(site.branch, []).append(site)

    def may_go(site: Site) -> bool:
        rule = rules[site.name]
        return rule.mode == "auto" and rule.min_rank is None and not site.tied

    return {branch: tuple(members) for branch, members in branches.items() if all(map(may_go, members))}


def candidate_ranks(site: Site, rule: SiteRule, rank_multiple: int, most: int = RANKS_PER_SITE) -> list[int]:
    """The ranks offered for an open site: aligned, below break-even, within the rule's bounds, at most `most`."""
    return _ranks_below(site.break_even_rank, [rule], rank_multiple, most)


def _ranks_below(break_even: int, rules: Sequence[SiteRule], rank_multiple: int, most: int) -> list[int]:
    """At most `most` aligned ranks below break-even and within the bounds of all rules; unaligned ones if none is."""
    lowest = max(rule.min_rank or 1 for rule in rules)
    highest = min([break_even - 1, *(rule.max_rank for rule in rules if rule.max_rank is not None)])
    first_aligned = -(-lowest // rank_multiple) * rank_multiple
    aligned = range(first_aligned, highest + 1, rank_multiple)
    return _thinned(aligned or range(lowest, highest + 1), most)


def _thinned(ranks: Sequence[int], most: int) -> list[int]:
    """At most `most` of the ranks: both ends, and between them steps that grow with the square root of the position.

    Even steps would miss the low ranks, where damage falls fastest and tight budgets live; geometric ones would leave
    gaps of a tenth of the site near the top.
    """
    if len(ranks) <= most:
        return list(ranks)
    if most <= 1:
        return [ranks[len(ranks) // 2]]
    step = (math.sqrt(len(ranks)) - 1) / (most - 1)
    positions = {round((1 + index * step) ** 2) - 1 for index in range(most)}
    return [ranks[position] for position in sorted(positions)]


def _options_and_notes(problem: Problem) -> tuple[tuple[Option, ...], dict[str, str]]:
    most = max(RANKS_PER_SITE, RANKS_IN_ALL // len(problem.counted))
    options: list[Option] = []
    notes: dict[str, str] = {}
    broken: list[str] = []
    for sites in problem.groups:
        try:
            if len(sites) == 1:
                of_group, notes[sites[0].name] = _options_of_site(problem, sites[0], most)
            else:
                of_group, of_sites = _options_of_group(problem, sites)
                notes |= of_sites
            options += of_group
        except BadInput as error:
            broken.append(str(error))
    for sites in problem.sharing_groups:
        try:
            options += _options_that_share(problem, sites, most)
        except BadInput as error:
            broken.append(str(error))
    # A spectral prior looks at weights' shapes: it cannot know what a whole branch is worth.
    branches = {} if problem.damage_kind == "prior" else problem.removable_branches
    for members in branches.values():
        try:
            options.append(_removal(problem, members))
        except BadInput as error:
            broken.append(str(error))
    if broken:
        raise BadInput(listed(broken))
    return tuple(_without_dominated(options)), {name: note for name, note in notes.items() if note}


def _options_of_group(problem: Problem, sites: Sequence[Site]) -> tuple[list[Option], dict[str, str]]:
    """The combinations of forms of sites that are decided together which no other one beats, and notes by site."""
    in_all = COMBINATIONS_IN_ALL // max(1, len(problem.groups))
    per_site = int(max(64, min(COMBINATIONS_PER_GROUP, in_all)) ** (1 / len(sites)))
    forms: list[list[Form]] = []
    notes: dict[str, str] = {}
    for index, site in enumerate(sites):
        rule, is_one_too_many = problem.rules[site.name], index >= MOST_TOGETHER
        ranks = (
            [] if rule.mode == "dense" or is_one_too_many
            else candidate_ranks(site, rule, problem.rank_multiple, max(1, per_site - 1))
        )  # fmt: skip
        forms.append([*map(Factored, ranks), Dense()])
        if rule.mode == "dense":
            notes[site.name] = f"dense by rule {rule.source!r}"
        elif is_one_too_many:
            notes[site.name] = (
                f"stays dense: {len(sites)} sites read one input, and {MOST_TOGETHER} are decided at once"
            )
        elif not ranks:
            notes[site.name] = _why_only_dense(site, rule)
        elif ranks[0] % problem.rank_multiple:
            notes[site.name] = f"no multiple of {problem.rank_multiple} fits, unaligned"
    model = cast("GroupCostModel", problem.cost_model)  # only such a model has groups of several sites
    costs = sum(weight * model.combination_times(sites, forms, part) for weight, part in problem.workload.parts)
    by_site = [
        np.array([problem.damage(site, form) for form in of_site]) for site, of_site in zip(sites, forms, strict=True)
    ]
    damages = reduce(np.add.outer, by_site)
    chosen = _undominated(np.asarray(costs).ravel(), damages.ravel())
    if len(chosen) == 1:
        faster = f"no combination of ranks with {', '.join(s.role for s in sites)} is faster than dense"
        notes |= {site.name: faster for site, of_site in zip(sites, forms, strict=True) if len(of_site) > 1}
    options = []
    for position in chosen:
        places = np.unravel_index(position, damages.shape)
        picked = [(site.name, of_site[place]) for site, of_site, place in zip(sites, forms, places, strict=True)]
        options.append(Option(tuple(picked), int(np.asarray(costs)[places]), float(damages[places])))
    return options, notes


def _options_that_share(problem: Problem, sites: Sequence[Site], most: int) -> list[Option]:
    """One rank and one first factor for sites that read the same input, where that costs less than dense."""
    names = tuple(site.name for site in sites)
    dense = _option_of_sites(problem, sites, Dense())
    rules = [problem.rules[name] for name in names]
    ranks = _ranks_below(shared_break_even_rank(sites), rules, problem.rank_multiple, most)
    # What the first factor computes has to be outputs of one site, the first.
    forms = [Factored(rank, names, problem.interpolative and rank < sites[0].out_features) for rank in ranks]
    options = [_option_of_sites(problem, sites, form) for form in forms]
    return [option for option in options if option.cost < dense.cost]


def _option_of_sites(problem: Problem, sites: Sequence[Site], form: Form) -> Option:
    """The same form for several sites that read one input."""
    forms = [form] * len(sites)
    costs = (
        _group_costs(problem.cost_model, sites, forms, problem.workload, problem.metric)
        if _couples(problem.cost_model, problem.metric)
        else [problem.cost(site, form) for site in sites]
    )
    damage = sum(problem.damage(site, form) for site in sites)
    return Option(tuple((site.name, form) for site in sites), sum(costs), damage)


def _undominated(costs: np.ndarray, damages: np.ndarray) -> list[int]:
    """Positions with less damage than everything that costs no more; the last position, all dense, among them."""
    order = np.lexsort((damages, costs))
    least = np.minimum.accumulate(damages[order])
    is_better = np.concatenate([[True], damages[order][1:] < least[:-1]])
    found = [int(position) for position in order[is_better] if costs[position] < costs[-1]]
    return [*found, len(costs) - 1]


def _options_of_site(problem: Problem, site: Site, most: int) -> tuple[list[Option], str]:
    """The options that cover this site alone, and why there are fewer than usual (or nothing)."""
    dense = _option(problem, site, Dense())
    rule = problem.rules[site.name]
    if rule.mode == "dense":
        return [dense], f"dense by rule {rule.source!r}"
    ranks = candidate_ranks(site, rule, problem.rank_multiple, most)
    if not ranks:
        return [dense], _why_only_dense(site, rule)
    given = problem.interpolative and site.kind != "head"
    factored = [_option(problem, site, Factored(rank, interpolative=given)) for rank in ranks]
    cheaper = [option for option in factored if option.cost < dense.cost]
    if not cheaper:
        faster = "dense is faster here than any rank offered"
        return [dense], faster if problem.metric == "latency" else f"no rank takes fewer {problem.metric} than dense"
    note = "" if ranks[0] % problem.rank_multiple == 0 else f"no multiple of {problem.rank_multiple} fits, unaligned"
    return [*cheaper, dense], note


def _option(problem: Problem, site: Site, form: Form) -> Option:
    return Option(((site.name, form),), problem.cost(site, form), problem.damage(site, form))


def _removal(problem: Problem, members: Sequence[Site]) -> Option:
    """Removing a whole branch. Operators inside it still count with scope `model`: the cost is never understated."""
    return Option(
        tuple((site.name, Removed()) for site in members),
        sum(problem.cost(site, Removed()) for site in members),
        sum(problem.damage(site, Removed()) for site in members),
    )


def _why_only_dense(site: Site, rule: SiteRule) -> str:
    if rule.min_rank is not None and rule.min_rank >= site.break_even_rank:
        return f"dense: min_rank {rule.min_rank} is not below break-even {site.break_even_rank}"
    return f"dense: break-even {site.break_even_rank} leaves no rank"


def _without_dominated(options: Sequence[Option]) -> list[Option]:
    """Options no other one over the same sites beats: less damage at no more cost, or the same of both."""
    alike: dict[tuple[str, ...], list[Option]] = {}
    for option in options:
        alike.setdefault(option.covered, []).append(option)
    return [option for group in alike.values() for option in _pareto_front(group)]


def _pareto_front(options: Sequence[Option]) -> list[Option]:
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.damage)):
        # In this order the last one kept has the least damage so far, and only a repetition has the same cost too.
        if kept and (option.damage > kept[-1].damage or option.cost == kept[-1].cost):
            continue
        kept.append(option)
    return kept


def _check_arguments(sites: Sequence[Site], scope: str, rank_multiple: int) -> None:
    if not sites:
        raise BadInput(
            "the model has no projection (no linear layer or matrix product with a constant weight of its own), "
            "so there is nothing to compress; check that the right part of the model was traced"
        )
    assert len({site.name for site in sites}) == len(sites), "two sites share a name"
    if scope not in ("sites", "model"):
        raise BadInput(f"scope is {scope!r}; use 'sites' or 'model'")
    if not isinstance(rank_multiple, int) or isinstance(rank_multiple, bool) or rank_multiple < 1:
        raise BadInput(f"rank_multiple is {rank_multiple!r}; it must be an integer of at least 1")


def _first(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
