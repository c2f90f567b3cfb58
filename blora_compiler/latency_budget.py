"""Latency budgets: plans priced by a clock, and on this machine measured and solved again until they keep their word.

    solve -> export -> time -> (scale the clock to what was measured) -> solve ...

1. Prices depend on how many bytes of weights a pass reads, since few of them stay in the caches, and that depends on
   the plan. Pricing starts with the cheapest plan's bytes and goes on with those of the plan found, until they agree.
   A cache's edge can lie between: what fits it leaves room, and what uses the room no longer fits. Then the largest
   plan is taken whose own bytes keep it within the budget.
2. A prediction is off by a few percent. For the device `this`, the plan is exported with the weights it would start
   training from (speed does not depend on them), timed beside the dense model in one run, and the clock is scaled by
   measured over predicted. A plan that is slower than 1.05 of the budget, or needlessly small, is solved again, at
   most twice. Of the plans that were timed the last one is taken, or the one before it that kept the budget best.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .artifact import Artifact
from .attribution import block_columns, profile_export
from .clocks import Target
from .cost_models.kernels import fused
from .cost_models.latency import LatencyCostModel, ScaledClock, weight_bytes_read
from .errors import BadInput, InfeasibleBudget
from .measuring import time_workload
from .plan import Plan
from .problem import Problem, build_problem
from .solver import cheapest_cover, solve
from .values import AnyWorkload, Dense, Form, Operator, Site, Workload

Export = Callable[[Mapping[str, Form], Path], Artifact]

AT_MOST = 1.05  # of the budget may be measured
AT_LEAST = 0.90  # of the budget is used, or the plan is smaller than it has to be
RE_SOLVES = 2
REPEATS = 15
_SETTLED = 1.02
_MOST_SOLVES = 4
_HALVINGS = 10


@dataclass(frozen=True)
class Attempt:
    """One plan that was timed.

    Attributes:
        predicted_ms, measured_ms: of what the budget counts.
        dense_ms: the same of the dense model, in the same run.
        allowed_ms: by the budget; a share of `dense_ms` where a fraction was asked.
    """

    predicted_ms: float
    measured_ms: float
    dense_ms: float
    allowed_ms: float

    @property
    def used(self) -> float:
        """Measured over allowed."""
        return self.measured_ms / self.allowed_ms

    def to_json(self) -> dict[str, float]:
        """JSON values, with the share used."""
        return {
            "predicted_ms": self.predicted_ms, "measured_ms": self.measured_ms, "dense_ms": self.dense_ms,
            "allowed_ms": self.allowed_ms, "used": self.used,
        }  # fmt: skip


@dataclass(frozen=True)
class Met:
    """How a latency budget was met, or not.

    Attributes:
        plan, problem: what is taken, priced by the clock as it was scaled for it.
        attempts: every plan that was timed, in order; none where the device is not at hand.
        taken: the attempt that timed the plan.
        floor: why no plan was left to try at the measured times, or nothing.
    """

    plan: Plan
    problem: Problem
    attempts: tuple[Attempt, ...]
    taken: Attempt | None = None
    floor: str = ""

    @property
    def summary(self) -> str:
        """One line for the record."""
        taken = self.taken
        if taken is None:
            return ""
        times = f"measured {taken.measured_ms:.3f} ms of {taken.allowed_ms:.3f} ms allowed ({taken.used:.2f})"
        solved = f"after {len(self.attempts) - 1} re-solves"
        if taken.used <= AT_MOST:
            return f"{times}, {solved}"
        return f"{times}: NOT MET {solved}; {self.why_not}"

    @property
    def why_not(self) -> str:
        """What kept the last plan from meeting the budget."""
        if self.floor:
            return f"by the measured times, {self.floor}"
        last = self.attempts[-1]
        first = self.attempts[0]
        noise = abs(last.dense_ms / first.dense_ms - 1)
        if noise > AT_MOST - 1:
            return (
                f"the dense model itself took {first.dense_ms:.3f} ms, then {last.dense_ms:.3f} ms: other work on "
                f"this machine moves the times by {noise:.0%}; run again when it is idle"
            )
        return (
            f"predicted {last.predicted_ms:.3f} ms even after scaling, so this plan's kernels are slower together "
            f"than the calibration says; calibrate again, or lower the budget by {1 - 1 / last.used:.0%}"
        )


@dataclass(frozen=True)
class TimedProblem:
    """A planning problem whose budget is about time on one device.

    Attributes:
        target: the device.
        generates: whether the model is lowered with a key/value cache.
        arguments: of `build_problem`, all but the cost models and the operators.
        operators: of the model, as traced.
    """

    target: Target
    generates: bool
    arguments: Mapping[str, Any]
    operators: tuple[Operator, ...]

    def problem(self, scale: float = 1.0, dense_scale: float = 1.0) -> Problem:
        """The problem priced for the weights that its plan will read; see the first step above.

        Args:
            scale, dense_scale: measured over predicted time, of the compressed and of the dense model.

        Raises:
            InfeasibleBudget: the budget is below what cannot be compressed; names that floor.
        """
        everywhere_cold = self._priced(0, scale, dense_scale)
        cheapest = dict(pair for option in cheapest_cover(everywhere_cold.options) for pair in option.forms)
        read = self._bytes_read(cheapest)
        floor: Problem | None = None
        for _ in range(_MOST_SOLVES):
            problem = self._priced(read, scale, dense_scale)
            try:
                forms = solve(problem).forms
            except InfeasibleBudget:
                if floor is None:
                    raise
                return self._at_the_edge(floor, scale, dense_scale)
            floor = floor or problem
            needed = self._bytes_read(forms)
            if needed <= _SETTLED * read:
                break
            read = needed
        assert floor is not None
        own = self._priced(needed, scale, dense_scale) if _SETTLED * needed < read else problem
        if own.total(forms) >= AT_LEAST * own.limit:
            return problem
        # Priced for more bytes than it reads, the plan leaves much of the budget.
        larger = self._at_the_edge(floor, scale, dense_scale)
        return larger if solve(larger).objective < solve(problem).objective else problem

    def _at_the_edge(self, floor: Problem, scale: float, dense_scale: float) -> Problem:
        """The problem whose plan is the largest that its own bytes keep within the budget.

        Args:
            floor: priced for the cheapest plan's bytes, and feasible.
        """
        least = floor.fixed + sum(option.cost for option in cheapest_cover(floor.options))
        low, high, found = least, floor.limit, floor
        limit = low
        for _ in range(_HALVINGS):
            forms = solve(replace(floor, limit=limit)).forms
            own = self._priced(self._bytes_read(forms), scale, dense_scale)
            spent = own.total(forms)
            if spent <= own.limit:
                low, found = limit, replace(own, limit=spent)
            elif limit == least:
                solve(own)  # raises, unless other forms are cheaper at these prices
                return own
            else:
                high = limit
            limit = (low + high) // 2
        return found

    def _priced(self, read: int, scale: float, dense_scale: float) -> Problem:
        """The problem for a compressed model that reads so many bytes of weights in a pass."""
        return build_problem(
            **self.arguments,
            operators=fused(self.operators),
            cost_model=self._prices(read, scale),
            dense_cost_model=self._prices(self._bytes_read({}), dense_scale),
        )

    def _prices(self, read: int, scale: float) -> LatencyCostModel:
        return LatencyCostModel(ScaledClock(self.target.clock.for_working_set(read), scale), self.generates)

    def _bytes_read(self, forms: Mapping[str, Form]) -> int:
        _, first = self.arguments["workload"].parts[0]
        return weight_bytes_read(self.arguments["sites"], self.operators, forms, first)


def meet(
    timed: TimedProblem, problem: Problem, plan: Plan, export: Callable[[Mapping[str, Form], Path], Artifact]
) -> Met:
    """Time a plan on this machine, and solve again where it misses the budget; see the second step above.

    Args:
        timed: the problem's origin.
        problem, plan: as first priced and solved.
        export: lowers the model in the given forms (dense where none is given) to a folder.

    A machine so much slower than predicted that no plan is left keeps what was timed; the result names the floor.
    """
    attempts: list[Attempt] = []
    timed_plans: list[tuple[Plan, Problem]] = []

    def met(floor: str = "") -> Met:
        kept = [index for index, attempt in enumerate(attempts) if attempt.used <= AT_MOST]
        is_over = attempts[-1].used > AT_MOST
        index = max(kept, key=lambda index: attempts[index].used) if is_over and kept else len(attempts) - 1
        return Met(*timed_plans[index], tuple(attempts), attempts[index], floor)

    scale = dense_scale = 1.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = export({}, folder / "dense")
        while True:
            exports = {"dense": dense, "compressed": export(plan.forms, folder / f"compressed-{len(attempts)}")}
            attempts.append(_attempt(problem, plan, exports))
            timed_plans.append((plan, problem))
            last = attempts[-1]
            if AT_LEAST <= last.used <= AT_MOST or len(attempts) > RE_SOLVES or _cannot_change(problem, plan, last):
                return met()
            scale *= last.measured_ms / last.predicted_ms
            dense_scale *= last.dense_ms / (1e-6 * problem.baseline)
            try:
                slower = timed.problem(scale, dense_scale)
                plan, problem = solve(slower), slower
            except InfeasibleBudget as error:
                return met(str(error))


def _cannot_change(problem: Problem, plan: Plan, last: Attempt) -> bool:
    """A plan with room left that is dense already has nothing to give back; one of nothing has no scale to learn."""
    is_dense = all(form == Dense() for form in plan.forms.values())
    return last.used < AT_LEAST and (is_dense or last.predicted_ms == 0)


def _attempt(problem: Problem, plan: Plan, exports: Mapping[str, Artifact]) -> Attempt:
    times = time_by_scope(problem.sites, plan, exports)
    budget = problem.budget
    allowed = 1e-6 * budget.amount if budget.amount is not None else (budget.fraction or 1.0) * times["dense"]
    return Attempt(1e-6 * plan.cost, times["compressed"], times["dense"], allowed)


def time_by_scope(sites: Sequence[Site], plan: Plan, exports: Mapping[str, Artifact]) -> dict[str, float]:
    """Milliseconds of what a plan's budget counts, of the exports `dense` and `compressed`, timed beside each other.

    With scope `model` that is a whole run of the plan's workload, with scope `sites` the counted sites in ONNX
    Runtime's own profile.
    """
    times = {"dense": 0.0, "compressed": 0.0}
    for weight, part in plan.workload.parts:
        if plan.scope == "model":
            found = time_workload(exports, part, REPEATS)
        else:
            found = _site_times(sites, plan, exports, part)
        times = {name: times[name] + weight * found[name] for name in times}
    return times


def _site_times(
    sites: Sequence[Site], plan: Plan, exports: Mapping[str, Artifact], part: Workload
) -> dict[str, float]:
    times = {}
    for name, artifact in exports.items():
        phase: Any = part.phase if artifact.generation else "model"
        found = profile_export(
            artifact, batch=part.batch, tokens=part.context if phase == "decode" else part.tokens, phase=phase,
            repeats=REPEATS, columns=block_columns(sites, plan.forms if name == "compressed" else {}),
        ).sites  # fmt: skip
        times[name] = sum(found.get(site, 0.0) for site in plan.forms)
    return times


def check_runnable(workload: AnyWorkload) -> None:
    """Refuse a workload that no exported graph runs, before it is timed.

    Raises:
        BadInput: a prefill behind a cache.
    """
    for _, part in workload.parts:
        if part.phase == "prefill" and part.context:
            raise BadInput(
                f"workload {part.name}: the exported prefill graph has no cache in front of it, so {part.context} "
                f"cached tokens cannot be timed; use context 0, or plan for a device that is not timed"
            )
