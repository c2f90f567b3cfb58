"""FoldToFactors and FoldToDense: a trained branch becomes the one GEMM, or the one pair of GEMMs, that ships.

    FoldToFactors   d = 0:   B diag(g) A x + bias                     ->  B (diag(g) A) x + bias         two GEMMs
                             where sites share A                     ->  (B diag(g)) A x + bias         A still one
    FoldToDense     any d:   d (W - B0 A0) x + B diag(g) A x + bias   ->  (d (W - B0 A0) + B diag(g) A) x + bias

`dense + branch` is algebraically one matrix again, so no folded site ever runs both side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blora_compiler.graph import Level, Program, install
from blora_compiler.layers import BranchedLinear, DenseLinear, FactoredLinear
from blora_compiler.values import Dense, Factored, Form, Refusal, Site

from .base import PassResult


@dataclass(frozen=True)
class FoldToFactors:
    """Fold every site planned `Factored` whose dense part has faded out."""

    forms: Mapping[str, Form]
    takes: Level = Level.BRANCHED
    gives: Level = Level.BRANCHED
    preserves_outputs: bool = True

    def run(self, program: Program) -> PassResult:
        sites = [site for site in program.sites if isinstance(self.forms.get(site.name), Factored)]
        return _fold(self, program, sites)

    def reason_to_skip(self, program: Program, site: Site) -> str | None:
        """Why a site stays as it is, or None."""
        branch = _branch(program, site)
        if branch is None:
            return "has no trainable branch to fold"
        retention = float(branch.retention.detach())
        if retention != 0.0:
            return f"its dense part still has retention {retention:g}, and only 0 folds to factors; train to the end"
        return None

    def folded(self, branch: BranchedLinear, shared: nn.Parameter | None) -> nn.Module:
        if shared is not None:
            return FactoredLinear(shared, branch.B * branch.gates, _own(branch.bias))
        return FactoredLinear(branch.gates[:, None] * branch.A, branch.B.detach().clone(), _own(branch.bias))


@dataclass(frozen=True)
class FoldToDense:
    """Fold every site planned `Dense` that trained through a branch."""

    forms: Mapping[str, Form]
    takes: Level = Level.BRANCHED
    gives: Level = Level.BRANCHED
    preserves_outputs: bool = True

    def run(self, program: Program) -> PassResult:
        sites = [site for site in program.sites if isinstance(self.forms.get(site.name), Dense)]
        return _fold(self, program, sites)

    def reason_to_skip(self, program: Program, site: Site) -> str | None:
        """Why a site stays as it is, or None."""
        branch = _branch(program, site)
        if branch is None:
            return "is dense already"
        if branch.residual is None:
            return "its dense part was dropped in training, so it can only fold to factors"
        return None

    def folded(self, branch: BranchedLinear, shared: nn.Parameter | None) -> nn.Module:
        return DenseLinear(branch.weight, _own(branch.bias))


@dataclass(frozen=True)
class FinishFolding:
    """Raise the level once no branch is left; refuse, naming them, while any is."""

    takes: Level = Level.BRANCHED
    gives: Level = Level.FOLDED
    preserves_outputs: bool = True

    def run(self, program: Program) -> PassResult:
        left = [site for site in program.sites if _branch(program, site) is not None]
        if left:
            return PassResult(program, False, tuple(Refusal(site.name, "still has its branch") for site in left))
        return PassResult(replace(program.copy(), level=Level.FOLDED), True)


def _branch(program: Program, site: Site) -> BranchedLinear | None:
    module = program.form_module(site.name)
    return module if isinstance(module, BranchedLinear) else None


def _own(bias: Tensor | None) -> Tensor | None:
    """The bias as a tensor of its own: what happens to the folded module must not reach the branch."""
    return None if bias is None else bias.detach().clone()


def _fold(rule: FoldToFactors | FoldToDense, program: Program, sites: list[Site]) -> PassResult:
    reasons = {site.name: rule.reason_to_skip(program, site) for site in sites}
    refusals = tuple(Refusal(name, reason) for name, reason in reasons.items() if reason is not None)
    chosen = [site for site in sites if reasons[site.name] is None]
    if not chosen:
        return PassResult(program, False, refusals)
    rewritten = program.copy()
    first_factors: dict[str, nn.Parameter] = {}  # by the first of the sites that share one
    for site in chosen:
        branch, form = _branch(program, site), rule.forms[site.name]
        assert branch is not None
        shared = None
        if isinstance(form, Factored) and form.sharers:
            shared = first_factors.setdefault(form.sharers[0], nn.Parameter(branch.A.detach().clone()))
        with torch.no_grad():
            install(rewritten, site, rule.folded(branch, shared).requires_grad_(False))
    return PassResult(rewritten, True, refusals, tuple(site.name for site in chosen))
