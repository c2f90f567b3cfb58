"""Every error this package raises on purpose, under one base.

A message says what is wrong, where, which two numbers or names disagree, and what to do.
`exit_code` is what the command line returns for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class BloraError(Exception):
    """Base of all errors raised on purpose by blora_compiler."""

    exit_code = 1


class BadInput(BloraError, ValueError):
    """The caller's model, budget, rules, data or files cannot be used as they are."""

    exit_code = 2


class InfeasibleBudget(BloraError):
    """No plan meets the budget; names the smallest feasible one and the sites that bind.

    Attributes:
        smallest_fraction: the smallest fraction of the baseline that any plan can reach.
        binding: names of the sites whose rules or forms keep the cost above the budget.
    """

    exit_code = 3

    def __init__(self, message: str, smallest_fraction: float, binding: tuple[str, ...]) -> None:
        super().__init__(message)
        self.smallest_fraction = smallest_fraction
        self.binding = binding


class ParityFailed(BloraError):
    """Two views that must compute the same do not: graph and tree, or a lowered file and its source."""

    exit_code = 4


class ProviderMissing(BloraError):
    """The ONNX Runtime execution provider that was asked for is absent, or fell back to another one."""

    exit_code = 5


class GraphInvalid(BloraError):
    """A pass left the graph in a state its level does not allow. Always a defect of the pass."""


class DistillationDiverged(BloraError):
    """The training loss or a gradient became non-finite; the last good checkpoint is kept."""


class PlanInvalid(BloraError):
    """A solver returned a plan that its own problem contradicts. Always a defect of the solver."""


# ── Parts that many messages share ───────────────────────────────────────────────────────────────────────────────


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"` for the names nearest to `word`, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=3)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def listed(problems: Sequence[str], most: int = 20) -> str:
    """All problems in one message: alone on the line, or one a line below each other, the tail as a count."""
    if len(problems) == 1:
        return problems[0]
    shown = [f"  - {problem}" for problem in problems[:most]]
    if len(problems) > most:
        shown.append(f"  - and {len(problems) - most} more")
    return f"{len(problems)} problems:\n" + "\n".join(shown)
