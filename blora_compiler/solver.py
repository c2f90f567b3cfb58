"""From a problem to a plan: an exact multiple-choice knapsack, with a certified gap.

With one binary x per option, damage d, cost c and the matrix S (sites x options) of which option covers which site:

    minimise d . x      such that   S x = 1,   c . x <= capacity,   x in {0, 1}

1. The cheapest cover, exact in integers, tells whether any plan fits at all.
2. The linear relaxation gives dual values: a price y per site and m <= 0 per unit of cost. For ANY such prices,
   sum(y) + m capacity + sum(min(0, r)) with r = d - S^T y - m c is a lower bound on the best plan, so the bound is
   recomputed here instead of being believed. No plan better than a known one has an option whose bound + r is above
   the known damage.
3. The integer program runs on few options: those the relaxation uses; if the gap is still too wide, about four a site
   with the smallest r; and if it still is, all that rule 2 leaves. What a selection leaves of the budget is spent at
   once. Solving the whole program gives the same answer and takes up to a hundred times as long.

Numbers are scaled for HiGHS, whose tolerances are absolute (1e-7 to 1e-6). Costs are scaled so that the dense sites
sum to 1e4: a tolerance is then 1e-10 of them. Damages are scaled so that those of a known plan sum to 1e4; options
with more damage than that plan are left out. When the plan found is more than a thousand times better, it becomes the
known plan and everything is scaled again, so that no small difference drowns in a large damage elsewhere. What HiGHS
returns is only ever read as a selection: its damage is summed again, its cost in exact integers, and a selection that
a tolerance let above the capacity is refused and sought again below it.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import ROUND_UP, Context
from fractions import Fraction
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csc_array

from .errors import BloraError, InfeasibleBudget
from .plan import Plan, check_plan, price_forms, with_digits
from .problem import Option, Problem
from .values import Dense, Factored, Form, Removed, Site

Selection = tuple[Option, ...]

# Below this, in nats or whatever the damage is in, an objective counts as zero when the gap is formed.
TINY_DAMAGE = 1e-12
# What the dense sites' costs, and a known plan's damages, sum to in the numbers HiGHS sees. With objectives between
# 1e1 and 1e4 its absolute tolerances of 1e-7 to 1e-6 stay far below the gap.
_SCALED_SUM = 1e4
_SCALE_AGAIN_BELOW = 1e-3
_UNSCALABLE = 1e-280  # sums this small, zero among them, cannot be scaled within a double
_MOST_SCALINGS = 6
_MOST_TIGHTENINGS = 60

# What a status of scipy's means here when the result holds no solution; one that holds a solution is an answer in any
# case, if perhaps not the best. Where there is nothing, the plan known so far stands, and its gap tells.
_STATUS_WITHOUT_SOLUTION: dict[int, Literal["nothing", "defect"]] = {
    0: "defect",  # optimal
    1: "nothing",  # iteration or time limit
    2: "nothing",  # infeasible: rounding can say so when exactly one plan fits
    3: "defect",  # unbounded
    4: "nothing",  # numerical trouble, or the node limit (which leaves a solution as a rule)
}


class Solver(Protocol):
    """Finds a plan for a problem."""

    def solve(self, problem: Problem) -> Plan:
        """A plan within the problem's limit."""
        ...


def solve(problem: Problem, solver: Solver | None = None) -> Plan:
    """The plan with the least damage within the budget, checked independently of the solver that found it.

    The plan never costs more than `problem.limit`. What the best plan leaves of the budget is spent on costlier forms
    that damage no more, so it is also as close below the limit as such forms allow; at a limit that fits the dense
    model, every site stays dense.

    Args:
        problem: see `build_problem`.
        solver: how to search; `MilpSolver()` by default.

    Raises:
        InfeasibleBudget: no plan fits; names the smallest budget that does, and what binds.
    """
    plan = (solver or MilpSolver()).solve(problem)
    check_plan(plan, problem)
    return plan


@dataclass(frozen=True)
class MilpSolver:
    """Linear relaxation, then HiGHS's branch and bound on the options that can still matter.

    Attributes:
        relative_gap: stop when no plan can be better than `objective * (1 - relative_gap)`.
        node_limit: most branch-and-bound nodes of the last integer program; the ones before it, which need not be
            proven, get a tenth. A limit on work, unlike one on time, gives the same plan on every machine; the plan's
            gap tells when it was hit.
    """

    relative_gap: float = 5e-5
    node_limit: int = 5_000

    def solve(self, problem: Problem) -> Plan:
        """See `solve`; the result is not checked here."""
        if problem.dense_fits:
            return price_forms(problem, {site.name: Dense() for site in problem.counted}, gap=0.0)
        cover = cheapest_cover(problem.options)
        if problem.fixed + sum(option.cost for option in cover) > problem.limit:
            raise infeasible(problem, cover)
        chosen, bound = self._least_damage(problem, spend_what_is_left(problem, cover))
        plan = price_forms(problem, dict(chain.from_iterable(option.forms for option in chosen)), gap=None)
        return replace(plan, gap=certified_gap(plan.objective, bound))

    def _least_damage(self, problem: Problem, known: Selection) -> tuple[Selection, float]:
        """A selection that fits, and a lower bound on the damage of all that do. `known` is one that fits."""
        bound = 0.0
        for _ in range(_MOST_SCALINGS):
            before = _damage(known)
            if before <= max(bound, _UNSCALABLE):
                break
            known, found_bound = self._improve(problem, known)
            bound = max(bound, found_bound)
            if _damage(known) > _SCALE_AGAIN_BELOW * before:
                break
        return known, bound

    def _improve(self, problem: Problem, known: Selection) -> tuple[Selection, float]:
        """Steps 2 and 3 at one scaling: a selection no worse than `known`, and a lower bound."""
        program = _Program.of(problem, known)
        bound, reduced_damage, in_relaxation = _relaxation(program)
        for taking_part in (in_relaxation, program.nearest(reduced_damage)):
            known, _ = self._better(problem, program, known, taking_part, self.node_limit // 10)
            if certified_gap(_damage(known), bound) <= self.relative_gap:
                return known, bound
        worth_trying = bound + program.unscaled(reduced_damage) <= _damage(known)
        known, bound_among_them = self._better(problem, program, known, worth_trying, self.node_limit)
        # Whatever uses an option left out is no better than the plan known by then.
        return known, max(bound, min(bound_among_them, _damage(known)))

    def _better(
        self, problem: Problem, program: _Program, known: Selection, taking_part: np.ndarray, node_limit: int
    ) -> tuple[Selection, float]:
        """The better of `known` and the best selection of the options taking part, and a bound on the latter."""
        found, bound = self._branch_and_bound(program, taking_part | program.among(known), node_limit)
        if found is not None:
            known = min(known, spend_what_is_left(problem, found), key=_damage)
        return known, bound

    def _branch_and_bound(
        self, program: _Program, taking_part: np.ndarray, node_limit: int
    ) -> tuple[Selection | None, float]:
        """The best selection of the options taking part (a mask), or None, and a lower bound on such selections."""
        columns = np.flatnonzero(taking_part)
        bound, tightened_by = 0.0, 0
        for _ in range(_MOST_TIGHTENINGS):
            result = self._run_highs(program, columns, program.right_side(tightened_by), node_limit)
            if not _has_answer(result):
                break
            if tightened_by == 0:  # a tightened program says nothing about what it cut off
                bound = max(0.0, float(program.unscaled(result.mip_dual_bound)))
            selected = columns[result.x > 0.5]
            excess = sum(program.costs[column] for column in selected) - program.capacity
            if excess <= 0:
                return tuple(program.options[column] for column in selected), bound
            tightened_by = max(excess, 2 * tightened_by)
        return None, bound

    def _run_highs(self, program: _Program, columns: np.ndarray, right_side: float, node_limit: int) -> Any:
        with c_output_on_stderr():
            return milp(
                program.damages[columns],
                integrality=np.ones(len(columns)),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(program.covers[:, columns], 1, 1),
                    LinearConstraint(program.weights[None, columns], -np.inf, right_side),
                ],
                options={"mip_rel_gap": self.relative_gap, "node_limit": node_limit},
            )


@dataclass(frozen=True)
class _Program:
    """The arrays HiGHS sees, and the way back.

    Attributes:
        options: column -> option.
        costs: column -> exact cost, in units of the common divisor.
        capacity: what they may sum to.
        covers: (sites, options), 1 where the option covers the site.
        weights: (options,), costs scaled.
        damages: (options,), damages scaled.
        cost_scale, damage_scale: what `costs` and damages were multiplied by.
    """

    options: Selection
    costs: tuple[int, ...]
    capacity: int
    covers: csc_array
    weights: np.ndarray
    damages: np.ndarray
    cost_scale: float
    damage_scale: float

    @classmethod
    def of(cls, problem: Problem, known: Selection) -> _Program:
        """The program over the options that a plan better than `known` could contain."""
        most_damage = _damage(known)
        options = tuple(option for option in problem.options if option.damage <= most_damage)
        unit = math.gcd(*(option.cost for option in options)) or 1
        costs = tuple(option.cost // unit for option in options)
        # A baseline by another clock may lie below the fixed part.
        cost_scale = _SCALED_SUM / ((max(problem.baseline, problem.limit) - problem.fixed) / unit)
        damage_scale = _SCALED_SUM / most_damage
        return cls(
            options=options,
            costs=costs,
            capacity=(problem.limit - problem.fixed) // unit,
            covers=_covering_matrix(problem, options),
            weights=np.array([cost * cost_scale for cost in costs]),
            damages=np.array([option.damage for option in options]) * damage_scale,
            cost_scale=cost_scale,
            damage_scale=damage_scale,
        )

    def right_side(self, tightened_by: int = 0) -> float:
        """The scaled capacity, less so many units of cost."""
        return (self.capacity - tightened_by) * self.cost_scale

    def unscaled(self, damage: Any) -> Any:
        """Scaled damage, a number or an array, in the problem's own measure."""
        return damage / self.damage_scale

    def among(self, selection: Selection) -> np.ndarray:
        """(options,) mask of the columns in `selection`."""
        wanted = {id(option) for option in selection}
        return np.fromiter((id(option) in wanted for option in self.options), bool, len(self.options))

    def nearest(self, reduced_damage: np.ndarray) -> np.ndarray:
        """(options,) mask of the columns with the least reduced damage: about four a site."""
        count = 4 * self.covers.shape[0] + 200
        if count >= len(reduced_damage):
            return np.ones(len(reduced_damage), bool)
        least = np.zeros(len(reduced_damage), bool)
        least[np.argpartition(reduced_damage, count)[:count]] = True
        return least


def _covering_matrix(problem: Problem, options: Selection) -> csc_array:
    """(sites, options), 1 where the option covers the site."""
    row_of = {site.name: row for row, site in enumerate(problem.counted)}
    rows = np.array([row_of[name] for option in options for name, _ in option.forms])
    starts = np.cumsum([0, *(len(option.forms) for option in options)])
    return csc_array((np.ones(len(rows)), rows, starts), shape=(len(row_of), len(options)))


def _relaxation(program: _Program) -> tuple[float, np.ndarray, np.ndarray]:
    """A lower bound on the damage, the scaled reduced damage r of each option (options,), and which options it uses.

    The bound is computed from the dual values, not read from the solver: it holds for any of them, and is 0 for none.
    """
    sites = program.covers.shape[0]
    with c_output_on_stderr():
        result = linprog(
            program.damages,
            A_eq=program.covers,
            b_eq=np.ones(sites),
            A_ub=program.weights[None, :],
            b_ub=[program.right_side()],
            bounds=(0, 1),
        )
    site_prices, cost_price, used = np.zeros(sites), 0.0, np.zeros(len(program.options), bool)
    if _has_answer(result):
        used = result.x > 0
        site_prices, cost_price = result.eqlin.marginals, min(0.0, result.ineqlin.marginals[0])
    reduced = program.damages - program.covers.T @ site_prices - cost_price * program.weights
    bound = site_prices.sum() + cost_price * program.right_side() + np.minimum(reduced, 0.0).sum()
    return max(0.0, float(program.unscaled(bound))), reduced, used


def _has_answer(result: Any) -> bool:
    """Whether a result of HiGHS, linear or integer, holds a solution.

    Raises:
        BloraError: for a status that no bounded program can have.
    """
    if result.x is not None:
        return True
    if _STATUS_WITHOUT_SOLUTION[result.status] == "defect":
        raise BloraError(
            f"HiGHS failed with status {result.status}: {result.message}; a program with bounded variables has "
            f"no such status, so please report it with the problem that was solved"
        )
    return False


@contextmanager
def c_output_on_stderr() -> Iterator[None]:
    """While this lasts, what C code prints goes to standard error: HiGHS 1.12 now and then prints a debugging line
    whatever its options say (ERGO-Code/HiGHS#2783), which would spoil JSON written to standard output.
    """
    if sys.platform == "win32":  # no libc whose buffers could be flushed by name
        yield
        return
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


# ── What is exact ────────────────────────────────────────────────────────────────────────────────────────────────


def cheapest_cover(options: Iterable[Option]) -> Selection:
    """Of the selections that cover every site once, the cheapest, exact in integers; among equals the least damage.

    Site sets nest, so one walk from small sets to large ones finds it: a set is covered either by its own cheapest
    option or by the best covers of the sets inside it.
    """
    cheapest: dict[tuple[str, ...], Option] = {}
    for option in options:
        rival = cheapest.setdefault(option.covered, option)
        if (option.cost, option.damage) < (rival.cost, rival.damage):
            cheapest[option.covered] = option
    cover_around: dict[str, Selection] = {}
    for names in sorted(cheapest, key=len):
        best: Selection = (cheapest[names],)
        inside = _without_repetition(cover_around[name] for name in names if name in cover_around)
        inside_names = {name for option in inside for name in option.covered}
        assert inside_names <= set(names), f"the option over {names} overlaps another one in part"
        if len(inside_names) == len(names):
            best = min(inside, best, key=_cost_and_damage)
        cover_around.update(dict.fromkeys(names, best))
    return _without_repetition(cover_around.values())


def _without_repetition(covers: Iterable[Selection]) -> Selection:
    """All options of the covers, a cover that several sites share only once."""
    return tuple(chain.from_iterable({id(cover): cover for cover in covers}.values()))


def spend_what_is_left(problem: Problem, selection: Selection) -> Selection:
    """Swap options for costlier ones that damage no more, while the budget allows.

    The best selection leaves cost unused when options tie in damage (a rank-deficient weight, a measure that is zero
    everywhere) or lie within the gap. Users ask for a budget to have it used, and more rank at equal predicted damage
    is the safer reading of an estimate.
    """
    selection = _unremoved(problem, selection)
    chosen = {option.covered: option for option in selection}
    left = problem.limit - problem.fixed - sum(option.cost for option in selection)
    swapped = True
    while swapped:
        swapped = False
        swaps = [
            option
            for option in problem.options
            if (now := chosen.get(option.covered)) and _is_free_upgrade(now, option, left)
        ]
        swaps.sort(key=lambda option: (option.damage - chosen[option.covered].damage, -option.cost))
        for option in swaps:
            now = chosen[option.covered]
            if _is_free_upgrade(now, option, left):
                chosen[option.covered] = option
                left -= option.cost - now.cost
                swapped = True
    return tuple(chosen.values())


def _unremoved(problem: Problem, selection: Selection) -> Selection:
    """The selection with removed branches put back where the cheapest forms of their sites fit and damage no more."""
    left = problem.limit - problem.fixed - sum(option.cost for option in selection)
    covers = [option for option in problem.options if not _removes(option)]
    inside: dict[str, list[Option]] = {}
    for option in covers:
        inside.setdefault(option.covered[0], []).append(option)
    opened: list[Option] = []
    for option in selection:
        if not _removes(option):
            opened.append(option)
            continue
        parts = cheapest_cover(chain.from_iterable(inside.get(name, ()) for name in option.covered))
        extra = sum(part.cost for part in parts) - option.cost
        if extra <= left and _damage(parts) <= option.damage:
            left -= extra
            opened += parts
        else:
            opened.append(option)
    return tuple(opened)


def _removes(option: Option) -> bool:
    return any(isinstance(form, Removed) for _, form in option.forms)


def _is_free_upgrade(now: Option, option: Option, left: int) -> bool:
    return 0 < option.cost - now.cost <= left and option.damage <= now.damage


def certified_gap(objective: float, bound: float) -> float:
    """(objective - bound) / max(objective, TINY_DAMAGE): how much better, relatively, any other plan could be."""
    return max(0.0, objective - bound) / max(objective, TINY_DAMAGE)


def _damage(selection: Iterable[Option]) -> float:
    return math.fsum(option.damage for option in selection)


def _cost_and_damage(selection: Selection) -> tuple[int, float]:
    return sum(option.cost for option in selection), _damage(selection)


# ── When nothing fits ────────────────────────────────────────────────────────────────────────────────────────────


def infeasible(problem: Problem, cover: Selection) -> InfeasibleBudget:
    """The error that says how far the budget is from the cheapest plan, and what that plan spends most on."""
    smallest = problem.fixed + sum(option.cost for option in cover)
    fraction = smallest_fraction(smallest, problem.baseline)
    forms = dict(chain.from_iterable(option.forms for option in cover))
    costs = problem.costs(forms)
    binding = sorted((site for site in problem.counted if costs[site.name]), key=lambda site: -costs[site.name])[:5]
    reasons = [f"{_why(problem, site, forms[site.name])}, {_share(costs[site.name], smallest)}" for site in binding]
    if problem.fixed:
        reasons.insert(0, f"what no form changes (operators, excluded sites), {_share(problem.fixed, smallest)}")
    shown = Context(prec=4, rounding=ROUND_UP).create_decimal(repr(fraction))
    allowed, least, dense = (
        with_digits(amount, problem.metric) for amount in (problem.limit, smallest, problem.baseline)
    )
    message = (
        f"budget {problem.budget} allows {allowed}, but the smallest feasible budget is {shown}: {least} of {dense}; "
        f"what binds: {'; '.join(reasons)}; raise the budget to that, or loosen the rules of these sites"
    )
    return InfeasibleBudget(message, fraction, tuple(site.name for site in binding))


def smallest_fraction(cost: int, baseline: int) -> float:
    """The least float whose share of `baseline`, as `Budget.limit` counts it, reaches `cost`."""
    fraction = cost / baseline
    while math.floor(Fraction(repr(fraction)) * baseline) < cost:
        fraction = math.nextafter(fraction, math.inf)
    return fraction


def _why(problem: Problem, site: Site, form: Form) -> str:
    """The site, its cheapest form, and the rule behind it where there is one."""
    rule = problem.rules[site.name]
    if isinstance(form, Factored) and rule.min_rank is not None:
        return f"{site.name} at {form} (min_rank by rule {rule.source!r})"
    note = problem.notes.get(site.name)
    return f"{site.name} ({note})" if note else f"{site.name} at {form}"


def _share(cost: int, total: int) -> str:
    return f"{cost / total:.1%} of that"
