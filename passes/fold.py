"""FoldToFactors and FoldToDense: a trained branch becomes the one GEMM, or the one pair of GEMMs, that ships.

    FoldToFactors   d = 0:   B diag(g) A x + bias                     ->  B (diag(g) A) x + bias         two GEMMs
                             where sites share A                     ->  (B diag(g)) A x + bias         A still one
                             in interpolative form                   ->  (B P^-1) (P A) x + bias        P rows of B
    FoldToDense     any d:   d (W - B0 A0) x + B diag(g) A x + bias   ->  (d (W - B0 A0) + B diag(g) A) x + bias

`dense + branch` is algebraically one matrix again, so no folded site ever runs both side by side.

In interpolative form (Cheng, Gimbutas, Martinsson and Rokhlin, 2005) the first GEMM gives `rank` of the outputs: with
P those rows of B, B P^-1 has the identity in their place, which is neither stored nor multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blora_compiler.graph import Level, Program, install
from blora_compiler.layers import BranchedLinear, DenseLinear, FactoredLinear
from blora_compiler.values import Dense, Factored, Form, Refusal, Site

from .base import PassResult

# Where interpolative form looks for rows to give, how much more rounding an end may cost than the best of them, and
# from what growth of rounding errors on the factors are refused.
PLACES_TRIED = 9
NEARLY_AS_GOOD = 2.0
WORST_GROWTH = 1e3


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
        form = self.forms[site.name]
        assert isinstance(form, Factored)
        if form.interpolative and form.brings_first_factor(site.name):
            growth = _given_rows(branch.B * branch.gates).growth
            if not growth <= WORST_GROWTH:
                return (
                    f"no {form.rank} neighbouring rows of its B will do as outputs: rounding errors would grow "
                    f"{growth:.2g} times, at most {WORST_GROWTH:.0f} is allowed; plan it without interpolative"
                )
        return None

    def folded(
        self, branch: BranchedLinear, form: Form, first: _FirstFactor | None
    ) -> tuple[nn.Module, _FirstFactor]:
        """The pair, and its first factor. first: what the first of its sharers brought, for the others."""
        assert isinstance(form, Factored)
        bias = _own(branch.bias)
        A, B = (branch.A, branch.B * branch.gates) if form.sharers else (branch.gates[:, None] * branch.A, branch.B)
        if first is not None:
            second = B.detach().clone() if first.inverse is None else B @ first.inverse
            return FactoredLinear(first.A, second, bias), first
        if not form.interpolative:
            own = _FirstFactor(nn.Parameter(A.detach().clone()))
            return FactoredLinear(own.A, B.detach().clone(), bias), own
        rows = _given_rows(B)
        own = _FirstFactor(nn.Parameter(B[rows.start : rows.end] @ A), rows.inverse)
        return FactoredLinear(own.A, rows.others, bias, rows.start), own


@dataclass(frozen=True, eq=False)
class _FirstFactor:
    """A first factor, and in interpolative form the P^-1 (rank, rank) that every B behind it is multiplied by."""

    A: nn.Parameter
    inverse: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _GivenRows:
    """Neighbouring rows of B (out, rank) that become the identity, from `start` to before `end`.

    Attributes:
        inverse: (rank, rank) P^-1 of these rows P.
        others: (out - rank, rank) the other rows times P^-1: what the second GEMM multiplies by.
        growth: norm of `others` over the root of the rank: how much larger rounding errors come out than go in.
    """

    start: int
    end: int
    inverse: Tensor
    others: Tensor
    growth: float


def _given_rows(B: Tensor) -> _GivenRows:
    """The rows to give: at an end, whose outputs are put in their place without a cut, where those are nearly as good
    as the best of some places."""
    B = B.detach()
    out, rank = B.shape

    def rows_from(start: int, dtype: torch.dtype) -> _GivenRows:
        end = start + rank
        inverse, failed = torch.linalg.inv_ex(B[start:end].to(dtype))
        others = torch.cat([B[:start], B[end:]]).to(dtype) @ inverse
        growth = math.inf if failed or not others.isfinite().all() else float(others.norm()) / rank**0.5
        return _GivenRows(start, end, inverse.to(B), others.to(B), growth)

    places = dict.fromkeys((out - rank) * place // (PLACES_TRIED - 1) for place in range(PLACES_TRIED))
    growths = {start: rows_from(start, torch.float32).growth for start in places}
    best, at_end = min(places, key=growths.__getitem__), min((0, out - rank), key=growths.__getitem__)
    chosen = at_end if growths[at_end] <= NEARLY_AS_GOOD * growths[best] else best
    return rows_from(chosen, torch.float64)


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

    def folded(self, branch: BranchedLinear, form: Form, first: _FirstFactor | None) -> tuple[nn.Module, None]:
        """The one matrix; it has no first factor."""
        return DenseLinear(branch.weight, _own(branch.bias)), None


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
    first_factors: dict[str, _FirstFactor] = {}  # by the first of the sites that share one
    for site in chosen:
        branch, form = _branch(program, site), rule.forms[site.name]
        assert branch is not None
        sharers = form.sharers if isinstance(form, Factored) else ()
        with torch.no_grad():
            module, first = rule.folded(branch, form, first_factors.get(sharers[0]) if sharers else None)
        if sharers and first is not None:
            first_factors[sharers[0]] = first
        install(rewritten, site, module.requires_grad_(False))
    return PassResult(rewritten, True, refusals, tuple(site.name for site in chosen))
