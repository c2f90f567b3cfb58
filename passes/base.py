"""What a pass is: a frozen description of a rewrite that takes a program and returns a new one.

A pass checks everything, then changes a copy. What it leaves alone it reports as refusals, with reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from blora_compiler.graph import Level, Program
from blora_compiler.values import Refusal


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        program: the rewritten program; the input program itself when nothing changed.
        modified: whether anything changed.
        refusals: what the pass left alone, and why.
        changed: names of the sites or branches that were rewritten.
    """

    program: Program
    modified: bool
    refusals: tuple[Refusal, ...] = ()
    changed: tuple[str, ...] = ()

    def summary(self, name: str) -> str:
        """One line: `FoldToFactors: 40 rewritten, 2 left alone (lm_head: planned dense)`."""
        line = f"{name}: {len(self.changed)} rewritten"
        if self.refusals:
            line += (
                f", {len(self.refusals)} left alone ({self.refusals[0]}{', ...' if len(self.refusals) > 1 else ''})"
            )
        return line


class Pass(Protocol):
    """One rewrite.

    Attributes:
        takes: the level the program must have.
        gives: the level it has afterwards.
        preserves_outputs: whether the outputs stay the same up to rounding; the driver checks it if so.
    """

    @property
    def takes(self) -> Level: ...

    @property
    def gives(self) -> Level: ...

    @property
    def preserves_outputs(self) -> bool: ...

    def run(self, program: Program) -> PassResult: ...
