"""Plans for many budgets from one walk along the lower convex hull of all that can be chosen.

The sets of sites that options cover nest or are disjoint. Each set is therefore covered either by one option of its
own or by covers of the sets inside it, and for any price m >= 0 per unit of cost the least value of damage + m cost

    value(set) = min( min over its own options of damage + m cost,  sum of value(inner set) )

splits over the sets. Two things follow.

1. sum of value(outermost set) - m capacity is a lower bound on the damage of every plan, for ANY price m. At the best
   price it is the exact value of the linear relaxation, for matrices of nested sets are totally unimodular. Every
   bound here is computed by this formula over all options, whatever the price was found by.
2. The best prices are the slopes of hulls. The points (cost, damage) of a set are those of its own options and the
   corners of the sum of the hulls inside it; its hull is the lower convex hull of these. One edge of a hull exchanges
   some options for cheaper ones. All edges, sorted once by price (damage added per cost saved), are the path that the
   relaxation takes as the budget falls from dense to nothing; a budget is one binary search on it.

Sets with the same numbers (the layers of a model whose damages are a prior) are one KIND with so many copies, and a
selection is a count of options per kind, so the work grows with what differs and not with depth.

The edge at which a budget is reached is taken whole, as often as needed. What that leaves unused is filled by
exchanging one or two options at a time, each pair the best among all pairs, until the certified gap is closed. Where
it stays above `ACCEPTED_GAP`, an integer program over counts per kind is solved, which few options and no symmetry
make small; and where even that does not close it (numbers too far apart for one scaling), `MilpSolver` plans this
budget alone. Costs are exact integers throughout, and what HiGHS returns is only ever read as counts.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, islice, pairwise
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from .budget import Budget
from .errors import BadInput, InfeasibleBudget, listed
from .plan import Plan, check_plan, price_forms
from .problem import Option, Problem
from .solver import MilpSolver, Selection, c_output_on_stderr, certified_gap, cheapest_cover, infeasible

# A plan with a wider certified gap is sought again by an integer program.
ACCEPTED_GAP = 1e-4
_SOUGHT_GAP = 0.9 * ACCEPTED_GAP  # by the integer program; what its tolerances blur fits between the two
# Exchanges stop here: closer than what any damage measure means, and far enough from what is accepted.
_GOOD_GAP = 1e-5
_MOST_EXCHANGES = 100
_MOST_PAIRS_TRIED = 64
# What scaled costs and damages sum to, as in the solver; and by how much HiGHS's bound may be wrong for each option
# chosen, for its tolerance on dual values is 1e-7.
_SCALED_SUM = 1e4
_DUAL_TOLERANCE = 1e-6
# The bound is a difference of sums of non-negative numbers. Each of them passes through a handful of roundings of
# 2^-53: cost to float, times price, plus damage, and a product and an `fsum` for every level that sets nest.
_ROUNDING = 2.0**-48
_LARGEST_INT64_TOTAL = 2**62


def sweep(problem: Problem, budgets: Sequence[Budget]) -> list[Plan | InfeasibleBudget]:
    """A plan with a certified gap for each budget, or the error that says why there is none, in the order asked.

    Every plan is checked as `solve` checks its own. A larger budget never has more damage than a smaller one.

    Args:
        problem: what to plan; its own budget and limit are ignored.
        budgets: all in the problem's metric, in any order.

    Raises:
        BadInput: for budgets in another metric, naming all of them.
    """
    _check_metrics(problem, budgets)
    asked = [replace(problem, budget=budget, limit=budget.limit(problem.baseline)) for budget in budgets]
    path = _Path.of(problem.options)
    results: dict[int, Plan | InfeasibleBudget] = {}
    smaller: Plan | None = None
    for index in sorted(range(len(asked)), key=lambda index: asked[index].limit):
        result = results[index] = _result(asked[index], path, smaller)
        if isinstance(result, Plan):
            check_plan(result, asked[index])
            smaller = result
    return [results[index] for index in range(len(asked))]


def _check_metrics(problem: Problem, budgets: Sequence[Budget]) -> None:
    wrong = [
        f"budget {budget} counts {budget.metric}, but the problem counts {problem.metric}; "
        f"give a budget in {problem.metric}, or build the problem for {budget.metric}"
        for budget in budgets
        if budget.metric != problem.metric
    ]
    if wrong:
        raise BadInput(listed(wrong))


def _result(problem: Problem, path: _Path, smaller: Plan | None) -> Plan | InfeasibleBudget:
    """The plan for the problem's own limit; `smaller` is the plan of a smaller budget, which fits too."""
    if problem.dense_fits:
        return MilpSolver().solve(problem)  # dense without a search: that rule is the solver's
    capacity = problem.limit - problem.fixed
    if capacity < path.least_cost:
        return infeasible(problem, cheapest_cover(problem.options))
    selection, bound = path.selection(capacity)
    plan = price_forms(problem, dict(chain.from_iterable(option.forms for option in selection)), gap=None)
    if smaller is not None and smaller.objective < plan.objective:
        plan = price_forms(problem, smaller.forms, gap=None)
    gap = certified_gap(plan.objective, bound)
    plan = replace(plan, gap=gap)
    return plan if gap <= ACCEPTED_GAP else _searched(problem, plan, bound)


def _searched(problem: Problem, known: Plan, bound: float) -> Plan:
    """The better of a known plan and the solver's own, the latter with the tighter of both certificates."""
    found = MilpSolver().solve(problem)
    if known.objective < found.objective:
        return known
    assert found.gap is not None
    return replace(found, gap=min(found.gap, certified_gap(found.objective, bound)))


# ── Nested sets, and those that are alike ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Node:
    """One set of sites that options cover.

    Attributes:
        kind: index of its kind.
        size: how many sites it has.
        options: those that cover exactly this set.
        inside: the sets that together make it up, or none where they leave a site uncovered.
    """

    kind: int
    size: int
    options: Selection
    inside: tuple[_Node, ...]


# For every kind inside a set: the position of its sets on the hull, and how many of them are one further.
Corner = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Kind:
    """What alike sets have in common: their ways to be covered, as columns.

    The first `own` columns are the options over exactly the set. The others are corners of the sum of the hulls of
    the sets inside it, from the costliest to the cheapest.

    Attributes:
        costs, damages: column -> exact cost, damage.
        own: how many columns are options.
        inside: (kind, how many of it) for the sets inside.
        corners: for each column after the first `own` and every kind in `inside`: the position on its hull, and how
            many sets of the kind are one further.
        hull: columns on the lower convex hull, from the costliest to the cheapest.
        prices: damage added per cost saved on each edge of the hull; never falling.
    """

    costs: tuple[int, ...]
    damages: tuple[float, ...]
    own: int
    inside: tuple[tuple[int, int], ...]
    corners: tuple[Corner, ...]
    hull: tuple[int, ...]
    prices: tuple[float, ...]

    @classmethod
    def of(
        cls, options: Sequence[tuple[int, float]], inside: tuple[tuple[int, int], ...], kinds: list[_Kind]
    ) -> _Kind:
        """The kind with these (cost, damage) of its own and, inside, so many sets of kinds that are known."""
        costs, damages = [cost for cost, _ in options], [damage for _, damage in options]
        corners: list[Corner] = []
        for cost, damage, positions in _corners_of_sum([(kinds[kind], copies) for kind, copies in inside]):
            costs.append(cost)
            damages.append(damage)
            corners.append(positions)
        hull, prices = _lower_hull(costs, damages)
        return cls(tuple(costs), tuple(damages), len(options), inside, tuple(corners), hull, prices)


def _lower_hull(costs: Sequence[int], damages: Sequence[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The columns on the lower convex hull, from costliest to cheapest, and the price of each edge.

    Starts at the least damage, at its costliest: equal damage is no reason to spend less. Columns on a straight line
    stay, for they are finer steps. Of equal columns the last one stays: what is open before what is removed.
    """
    hull: list[int] = []
    prices: list[float] = []
    for column in sorted(range(len(costs)), key=lambda column: (-costs[column], damages[column], -column)):
        if hull and costs[column] == costs[hull[-1]]:
            continue
        price = 0.0
        while hull:
            price = (damages[column] - damages[hull[-1]]) / (costs[hull[-1]] - costs[column])
            if price >= (prices[-1] if prices else 0.0):
                prices.append(price)
                break
            hull.pop()
            if prices:
                prices.pop()
        hull.append(column)
    return tuple(hull), tuple(prices)


def _corners_of_sum(parts: Sequence[tuple[_Kind, int]]) -> Iterator[tuple[int, float, Corner]]:
    """(cost, damage, corner) of the points on the lower hull of the parts' Minkowski sum, one set moving at a time.

    From the costliest on, so that small damages are added before large ones.
    """
    if not parts:
        return
    places = [(0, 0)] * len(parts)
    cost = sum(copies * kind.costs[kind.hull[0]] for kind, copies in parts)
    damage = math.fsum(copies * kind.damages[kind.hull[0]] for kind, copies in parts)
    yield cost, damage, tuple(places)
    edges = [(price, part) for part, (kind, _) in enumerate(parts) for price in kind.prices]
    for _, part in sorted(edges, key=lambda edge: edge[0]):
        kind, copies = parts[part]
        position = places[part][0]
        costlier, cheaper = kind.hull[position], kind.hull[position + 1]
        for further in range(1, copies + 1):
            places[part] = (position, further) if further < copies else (position + 1, 0)
            cost += kind.costs[cheaper] - kind.costs[costlier]
            damage += kind.damages[cheaper] - kind.damages[costlier]
            yield cost, damage, tuple(places)


def _outermost_nodes(options: Iterable[Option]) -> tuple[list[_Node], list[_Kind]]:
    """The outermost sets with all that is inside them, and the kinds they are of, inner kinds before outer ones."""
    offered: dict[tuple[str, ...], list[Option]] = {}
    for option in options:
        offered.setdefault(option.covered, []).append(option)
    kinds: list[_Kind] = []
    kind_of: dict[object, int] = {}
    around: dict[str, _Node] = {}
    for names in sorted(offered, key=len):
        inside = tuple({id(around[name]): around[name] for name in names if name in around}.values())
        already_covered = sum(name in around for name in names)
        assert already_covered == sum(node.size for node in inside), (
            f"an option over {names} overlaps another in part"
        )
        if already_covered < len(names):
            inside = ()
        numbers = tuple((option.cost, option.damage) for option in offered[names])
        kinds_inside = tuple(sorted(Counter(node.kind for node in inside).items()))
        if (numbers, kinds_inside) not in kind_of:
            kind_of[numbers, kinds_inside] = len(kinds)
            kinds.append(_Kind.of(numbers, kinds_inside, kinds))
        node = _Node(kind_of[numbers, kinds_inside], len(names), tuple(offered[names]), inside)
        around.update(dict.fromkeys(names, node))
    return list({id(node): node for node in around.values()}.values()), kinds


# ── The path of the relaxation ───────────────────────────────────────────────────────────────────────────────────

# How many sets of a kind are covered by which of its own columns; columns are numbered through all kinds.
Counts = Counter[int]


@dataclass(frozen=True)
class _Edge:
    """One step down the hull of an outermost kind, which all of its sets can take.

    Attributes:
        kind: which.
        position: on the hull, of the costlier end.
        copies: how many sets there are.
        saving: the exact cost that it saves each.
        price: the damage it adds per cost saved.
        saved_share: how much of the costliest form's cost is saved after it.
    """

    kind: int
    position: int
    copies: int
    saving: int
    price: float
    saved_share: float


@dataclass(frozen=True)
class _Relaxed:
    """What one price proves.

    Attributes:
        bound: no selection within the capacity has less damage.
        reduced: (columns,) what choosing a column adds to the bound at least.
    """

    bound: float
    reduced: np.ndarray


@dataclass(frozen=True)
class _Path:
    """All columns of all kinds in a row, and the edges in the order in which a falling budget takes them."""

    nodes: list[_Node]
    kinds: list[_Kind]

    @classmethod
    def of(cls, options: Iterable[Option]) -> _Path:
        """The path through these options."""
        return cls(*_outermost_nodes(options))

    # ── What does not depend on the budget ──

    @cached_property
    def outermost(self) -> Counter[int]:
        """Kind -> how many outermost sets are of it."""
        return Counter(node.kind for node in self.nodes)

    @cached_property
    def edges(self) -> list[_Edge]:
        """Sorted by price; the edges of one kind stay in their order, for neither sort key falls along a hull.

        Where prices tie (a measure that is zero everywhere), all kinds give way alike and removing comes last.
        """
        edges = []
        for kind, copies in self.outermost.items():
            content = self.kinds[kind]
            most = content.costs[content.hull[0]]
            for position, (price, (costlier, cheaper)) in enumerate(
                zip(content.prices, pairwise(content.hull), strict=True)
            ):
                saving, cost_after = content.costs[costlier] - content.costs[cheaper], content.costs[cheaper]
                edges.append(_Edge(kind, position, copies, saving, price, (most - cost_after) / most))
        return sorted(edges, key=lambda edge: (edge.price, edge.saved_share))

    @cached_property
    def edge_kinds(self) -> np.ndarray:
        """(edges,) the kind of each edge."""
        return np.array([edge.kind for edge in self.edges], dtype=int)

    @cached_property
    def saved(self) -> list[int]:
        """After each edge: the exact cost saved so far."""
        return list(accumulate(edge.copies * edge.saving for edge in self.edges))

    @cached_property
    def start_cost(self) -> int:
        """The exact cost before the first edge, where the damage is least."""
        return sum(
            copies * self.kinds[kind].costs[self.kinds[kind].hull[0]] for kind, copies in self.outermost.items()
        )

    @property
    def least_cost(self) -> int:
        """The exact cost of the cheapest selection."""
        return self.start_cost - (self.saved[-1] if self.saved else 0)

    @cached_property
    def starts(self) -> np.ndarray:
        """(kinds + 1,) number of the first column of each kind, and the number of all columns."""
        return np.cumsum([0, *(len(kind.costs) for kind in self.kinds)])

    @cached_property
    def kind_of_column(self) -> np.ndarray:
        """(columns,) the kind of each column."""
        return np.repeat(np.arange(len(self.kinds)), np.diff(self.starts))

    @cached_property
    def is_own(self) -> np.ndarray:
        """(columns,) whether the column is an option; the others are corners of what is inside."""
        own = np.array([kind.own for kind in self.kinds])
        return np.arange(self.starts[-1]) - self.starts[self.kind_of_column] < own[self.kind_of_column]

    @cached_property
    def costs(self) -> np.ndarray:
        """(columns,) exact: Python's integers where a sum might leave 64 bits."""
        most = sum(copies * max(self.kinds[kind].costs) for kind, copies in self.outermost.items())
        kept_as = np.int64 if most < _LARGEST_INT64_TOTAL else object
        return np.array([cost for kind in self.kinds for cost in kind.costs], dtype=kept_as)

    @cached_property
    def float_costs(self) -> np.ndarray:
        """(columns,) costs, rounded."""
        return self.costs.astype(float)

    @cached_property
    def damages(self) -> np.ndarray:
        """(columns,) damages."""
        return np.array([damage for kind in self.kinds for damage in kind.damages])

    # ── One budget ──

    def selection(self, capacity: int) -> tuple[Selection, float]:
        """A selection that costs at most `capacity`, and a lower bound on the damage of all that do.

        `capacity` is at least `least_cost`.
        """
        counts, price = self._where_the_path_fits(capacity)
        relaxed = self._relaxed(price, capacity)
        self._exchange(counts, capacity, relaxed)
        bound = relaxed.bound
        if certified_gap(self._damage(counts), bound) > ACCEPTED_GAP:
            counts, bound = self._search(counts, capacity, relaxed)
        self._spend(counts, capacity)
        return self._options(counts), bound

    def _where_the_path_fits(self, capacity: int) -> tuple[Counts, float]:
        """The first selection along the path that fits, and the price there.

        Of the edge that reaches the capacity, as few sets as needed take it.
        """
        to_save = self.start_cost - capacity
        reached = bisect_left(self.saved, max(0, to_save))
        places = self._places_after(reached)
        price = 0.0
        if to_save > 0:
            edge, price = self.edges[reached], self.edges[reached].price
            taking = -(-(to_save - (self.saved[reached - 1] if reached else 0)) // edge.saving)
            places[edge.kind, edge.position] -= taking
            places[edge.kind, edge.position + 1] += taking
        counts: Counts = Counter()
        for (kind, position), copies in places.items():
            counts[int(self.starts[kind]) + self.kinds[kind].hull[position]] += copies
        self._open(counts)
        return +counts, price

    def _places_after(self, reached: int) -> Counter[tuple[int, int]]:
        """(kind, position on its hull) -> outermost sets there when exactly the edges before `reached` are taken."""
        positions = np.bincount(self.edge_kinds[:reached], minlength=len(self.kinds))
        return Counter({(kind, int(positions[kind])): copies for kind, copies in self.outermost.items()})

    def _open(self, counts: Counts) -> None:
        """Replace corners by what they consist of, until only options are counted."""
        while corners := [column for column in counts if not self.is_own[column]]:
            for column in corners:
                copies = counts.pop(column)
                kind = self.kinds[self.kind_of_column[column]]
                corner = kind.corners[column - int(self.starts[self.kind_of_column[column]]) - kind.own]
                for (inner, inner_copies), (position, further) in zip(kind.inside, corner, strict=True):
                    first, hull = int(self.starts[inner]), self.kinds[inner].hull
                    counts[first + hull[position]] += copies * (inner_copies - further)
                    if further:
                        counts[first + hull[position + 1]] += copies * further

    def _relaxed(self, price: float, capacity: int) -> _Relaxed:
        """The lower bound that this price per unit of cost proves; see the head of this file."""
        with np.errstate(over="ignore", invalid="ignore"):  # absurd numbers prove nothing, which is checked below
            values = self.damages + price * self.float_costs
            least = np.minimum.reduceat(np.where(self.is_own, values, np.inf), self.starts[:-1])
            for kind, content in enumerate(self.kinds):
                if content.inside:
                    opened = math.fsum(copies * least[inner] for inner, copies in content.inside)
                    least[kind] = min(least[kind], opened)
            reduced = values - least[self.kind_of_column]
        total = math.fsum(copies * float(least[kind]) for kind, copies in self.outermost.items())
        paid = price * capacity
        bound = total - paid - _ROUNDING * (total + paid)
        return _Relaxed(max(0.0, bound) if math.isfinite(bound) else 0.0, reduced)

    # ── Filling what is left ──

    def _left(self, counts: Counts, capacity: int) -> int:
        """The exact cost that may still be added."""
        return capacity - sum(copies * int(self.costs[column]) for column, copies in counts.items())

    def _exchange(self, counts: Counts, capacity: int, relaxed: _Relaxed) -> None:
        """Exchange one or two columns at a time, the best pair first, until the gap is good or nothing helps.

        Damage = bound + reduced damages + price x what is left, none of them negative: a column whose reduced damage
        is above the present distance to the bound can be part of nothing better.
        """
        for _ in range(_MOST_EXCHANGES):
            damage = self._damage(counts)
            if certified_gap(damage, relaxed.bound) <= _GOOD_GAP:
                break
            exchanges = self._exchanges(counts, relaxed.reduced <= damage - relaxed.bound)
            pair = _best_pair(exchanges, counts, self._left(counts, capacity))
            if not pair:
                break
            for source, target in pair:
                self._swap(counts, source, target, copies=1)

    def _spend(self, counts: Counts, capacity: int) -> None:
        """Exchange columns for costlier ones that damage no more, the least damage first, while the budget allows.

        For the reason that `spend_what_is_left` in the solver gives. Where no single exchange fits any more, two that
        damage no more may still add up to a larger cost that does.
        """
        everything = np.ones(len(self.costs), bool)
        while True:
            left = self._left(counts, capacity)
            exchanges = self._exchanges(counts, everything)
            free = exchanges.at(np.flatnonzero(exchanges.more_damage <= 0))
            fitting = np.flatnonzero((free.more_cost > 0) & (free.more_cost <= left))
            if len(fitting):
                least = fitting[free.more_damage[fitting] == free.more_damage[fitting].min()]
                best = least[np.argmax(free.more_cost[least])]
                copies = min(counts[free.sources[best]], left // int(free.more_cost[best]))
                self._swap(counts, int(free.sources[best]), int(free.targets[best]), copies)
                continue
            pair = _best_pair(replace(free, more_damage=-free.more_cost.astype(float)), counts, left)
            if not pair:
                return
            for source, target in pair:
                self._swap(counts, source, target, copies=1)

    def _exchanges(self, counts: Counts, worth: np.ndarray) -> _Exchanges:
        """Every exchange of a column that is counted for one of the same kind that is worth it."""
        counted = np.array(sorted(counts))
        first = self.starts[self.kind_of_column[counted]]
        sizes = self.starts[self.kind_of_column[counted] + 1] - first
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        sources, targets = np.repeat(counted, sizes), np.repeat(first, sizes) + within
        possible = worth[targets] & (targets != sources)
        sources, targets = sources[possible], targets[possible]
        more_cost = self.costs[targets] - self.costs[sources]
        return _Exchanges(sources, targets, more_cost, self.damages[targets] - self.damages[sources])

    def _swap(self, counts: Counts, source: int, target: int, copies: int) -> None:
        """Count `target` instead of `source` so many times."""
        counts[source] -= copies
        if not counts[source]:
            del counts[source]
        counts[target] += copies
        self._open(counts)

    def _damage(self, counts: Counts) -> float:
        return math.fsum(count * float(self.damages[column]) for column, count in counts.items())

    # ── Where exchanges do not suffice ──

    def _search(self, counts: Counts, capacity: int, relaxed: _Relaxed) -> tuple[Counts, float]:
        """The better of `counts` and what an integer program over kinds finds, and a lower bound.

        Alike sets would make the solver's program, which has a variable for every option of every set, slow: it would
        prove the same thing for each order of them. Here the variables are how often each column is counted, and how
        many sets of each kind are opened:

            columns of a kind + opened sets of it = outermost sets of it + those inside opened sets
        """
        damage = self._damage(counts)
        worth = self.is_own & (relaxed.reduced <= damage - relaxed.bound)
        worth[list(counts)] = True
        columns = np.flatnonzero(worth)
        result = self._run_highs(columns, capacity, damage)
        if result.x is None:
            return counts, relaxed.bound
        inexact = _DUAL_TOLERANCE * sum(node.size for node in self.nodes)
        bound_among_them = (result.mip_dual_bound - inexact) * damage / _SCALED_SUM
        # What uses a column left out is no better than `counts`.
        bound = max(relaxed.bound, min(bound_among_them, damage))
        copies = (round(value) for value in result.x)  # of the columns; those of opened sets follow and are not read
        found = +Counter(dict(zip(columns.tolist(), copies, strict=False)))
        fits = self._left(found, capacity) >= 0  # a tolerance can let it above
        return (found if fits and self._damage(found) < damage else counts), bound

    def _run_highs(self, columns: np.ndarray, capacity: int, damage: float) -> Any:
        """HiGHS's answer; its variables are the counts of the columns, then how many of each openable kind open."""
        openable = [kind for kind, content in enumerate(self.kinds) if content.inside]
        cost_scale, nothing = _SCALED_SUM / self.start_cost, np.zeros(len(openable))
        entries = [(kind, variable, 1) for variable, kind in enumerate(self.kind_of_column[columns])]
        for variable, kind in enumerate(openable, start=len(columns)):
            entries.append((kind, variable, 1))
            entries += [(inner, variable, -copies) for inner, copies in self.kinds[kind].inside]
        rows, variables, values = (np.array(part) for part in zip(*entries, strict=True))
        sets = csr_array((values, (rows, variables)), shape=(len(self.kinds), len(columns) + len(openable)))
        outermost = [self.outermost[kind] for kind in range(len(self.kinds))]
        costs = np.append(self.float_costs[columns] * cost_scale, nothing)
        with c_output_on_stderr():
            return milp(
                np.append(self.damages[columns] * (_SCALED_SUM / damage), nothing),
                integrality=np.ones(len(costs)),
                bounds=Bounds(0, np.inf),
                constraints=[
                    LinearConstraint(sets, outermost, outermost),
                    LinearConstraint(costs[None, :], -np.inf, capacity * cost_scale),
                ],
                options={"mip_rel_gap": _SOUGHT_GAP, "node_limit": MilpSolver.node_limit},
            )

    # ── The way back ──

    def _options(self, counts: Counts) -> Selection:
        """The selection that the counts stand for: alike sets take their columns in model order."""
        waiting: dict[int, list[_Node]] = {}
        for node in self.nodes:
            waiting.setdefault(node.kind, []).append(node)
        selection: list[Option] = []
        for kind in reversed(range(len(self.kinds))):  # outer kinds first
            nodes = iter(waiting.get(kind, ()))
            for column in range(self.kinds[kind].own):
                covered = islice(nodes, counts[int(self.starts[kind]) + column])
                selection += [node.options[column] for node in covered]
            for inner in chain.from_iterable(node.inside for node in nodes):
                waiting.setdefault(inner.kind, []).append(inner)
        return tuple(selection)


# ── Exchanges ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Exchanges:
    """Columns that could make way for others of their kind.

    Attributes:
        sources, targets: (exchanges,) the column that goes, and the one that comes in its place.
        more_cost: (exchanges,) the exact cost that this adds.
        more_damage: (exchanges,) the damage that this adds.
    """

    sources: np.ndarray
    targets: np.ndarray
    more_cost: np.ndarray
    more_damage: np.ndarray

    def at(self, indices: np.ndarray) -> _Exchanges:
        """Only these, in this order."""
        return _Exchanges(
            self.sources[indices], self.targets[indices], self.more_cost[indices], self.more_damage[indices]
        )


def _best_pair(exchanges: _Exchanges, counts: Counts, left: int) -> list[tuple[int, int]]:
    """The one or two (source, target) that together lower the damage most and add at most `left`, or none.

    For each first exchange the best second one has the least damage among all that are cheap enough: one sorting by
    cost and a binary search each, instead of all pairs.
    """
    # An exchange of nothing (-1) for nothing lets a pair be a single one.
    with_nothing = _Exchanges(
        np.append(exchanges.sources, -1),
        np.append(exchanges.targets, -1),
        np.append(exchanges.more_cost, 0),
        np.append(exchanges.more_damage, 0.0),
    )
    by_cost = with_nothing.at(np.argsort(with_nothing.more_cost, kind="stable"))
    more_cost, more_damage = by_cost.more_cost, by_cost.more_damage
    least = np.minimum.accumulate(more_damage)
    least_at = np.maximum.accumulate(np.where(more_damage == least, np.arange(len(least)), 0))
    fitting = np.searchsorted(more_cost, left - more_cost, side="right")
    first = np.flatnonzero(fitting)
    second = least_at[fitting[first] - 1]
    added = more_damage[first] + more_damage[second]
    for pair in _smallest(added, _MOST_PAIRS_TRIED):
        if added[pair] >= 0:
            break
        both = (int(first[pair]), int(second[pair]))
        swaps = [(int(by_cost.sources[i]), int(by_cost.targets[i])) for i in both if by_cost.sources[i] >= 0]
        needed = Counter(source for source, _ in swaps)
        if all(counts[source] >= copies for source, copies in needed.items()):
            return swaps
    return []


def _smallest(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of the smallest values, in order."""
    if len(values) > most:
        few = np.argpartition(values, most)[:most]
        return few[np.argsort(values[few], kind="stable")]
    return np.argsort(values, kind="stable")
