"""Replan: try a plan on the model before anything trains, and plan again with what that shows.

    plan -> starting factors, own and refitted -> measured damage and marginals -> rescaled profile -> plan -> ...

Of all that was tried, the plan and the factors with the least measured damage stay, and the profile is scaled so that
it predicts that damage: a sum of single-site estimates becomes a number that the model has shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from .graph import Program
from .latency_budget import TimedProblem
from .marginals import Marginals, measure_marginals
from .plan import Plan, reprice
from .problem import Problem
from .profiling import Profile
from .refitting import Factors, refit
from .rewriting import starting_factors
from .solver import solve
from .values import Dense

Build = Callable[[Profile], tuple[Problem, TimedProblem | None]]

T = TypeVar("T")

# Of the calibration batches, those that damage is measured on.
MEASURED_BATCHES = 4


@dataclass(frozen=True)
class Start:
    """Where training starts: a plan, and what it was decided with.

    Attributes:
        profile: the damage model of the problem.
        problem, timed: that the plan solves; `timed` where the budget is about time.
        plan: site -> form.
        factors: starting factors of its factored sites; None where the profile's own stand.
    """

    profile: Profile
    problem: Problem
    timed: TimedProblem | None
    plan: Plan
    factors: Mapping[str, Factors] | None


@dataclass(frozen=True)
class Attempt:
    """A plan with its starting factors, measured.

    Attributes:
        plan: what was tried.
        refitted: whether its factors were fitted to what the sites before give.
        damage: measured, untrained, in the profile's unit.
    """

    plan: Plan
    refitted: bool
    damage: float
    profile: Profile = field(repr=False)
    factors: Mapping[str, Factors] = field(repr=False)
    marginals: Marginals = field(repr=False)

    def __str__(self) -> str:
        how = "refitted" if self.refitted else "as profiled"
        return f"{self.damage:.4g} measured {how} where {self.plan.damage:.4g} was predicted"

    def to_json(self) -> dict[str, Any]:
        """What the report shows of it."""
        return {"predicted": self.plan.damage, "measured": self.damage, "refitted": self.refitted}


def can_measure(profile: Profile, plan: Plan) -> bool:
    """Whether there is a damage to compare with, and anything to trade."""
    changes = any(not isinstance(form, Dense) for form in plan.forms.values())
    return profile.kind == "two-sided" and (changes or bool(plan.shapes))


def apart(batches: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """Batches to fit factors to, and batches to measure damage on.

    What factors were fitted to flatters them, so those are others where there are enough.
    """
    enough = len(batches) > 2 * MEASURED_BATCHES
    return batches[MEASURED_BATCHES:] if enough else batches, batches[:MEASURED_BATCHES]


def replan(
    program: Program,
    batches: Sequence[Mapping[str, Tensor]],
    profile: Profile,
    build: Build,
    plan: Plan,
    rounds: int = 1,
    refits: bool = True,
    teacher: Program | None = None,
) -> tuple[Start, list[Attempt]]:
    """Try a plan, and up to `rounds` others that are solved with what was measured at the one before.

    Args:
        program: traced, with real weights.
        batches: calibration inputs by name.
        profile: measured, two-sided.
        build: the problem for a profile.
        plan: to begin with.
        rounds: 0 keeps this plan.
        refits: try refitted factors beside the profile's own.
        teacher: what the damage is a distance to, where the program is narrower than it.
    """
    fitting, measuring = apart(batches)

    def attempts_at(plan: Plan, profile: Profile) -> list[Attempt]:
        own = starting_factors(program.sites, plan.forms, profile)
        choices = [(False, own)]
        if refits:
            choices.append((True, refit(program, plan.forms, own, fitting)))
        found = []
        for refitted, factors in choices:
            marginals = measure_marginals(program, plan.forms, profile, factors, measuring, teacher)
            found.append(Attempt(plan, refitted, marginals.damage, profile, factors, marginals))
        return found

    tried = attempts_at(plan, profile)
    for _ in range(rounds):
        best = min(tried, key=lambda attempt: attempt.damage)
        profile = best.marginals.rescaled(best.profile, program.sites, best.plan.forms)
        plan = solve(build(profile)[0])
        if plan.forms == best.plan.forms:
            break
        tried += attempts_at(plan, profile)
    best = min(tried, key=lambda attempt: attempt.damage)
    profile = best.profile
    if best.plan.damage and best.damage > 0:  # a change too small for float32 can come out at or below 0
        profile = profile.scaled(dict.fromkeys(profile.spectra, best.damage / best.plan.damage))
    problem, timed = build(profile)
    plan = replace(reprice(best.plan, problem), gap=best.plan.gap)  # scaled all alike, damages rank plans as before
    return Start(profile, problem, timed, plan, best.factors if best.refitted else None), tried
