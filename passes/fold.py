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
from collections.abc import Mapping, Sequence
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
        return _fold(self, program, sites, first_factors(program, self.forms))

    def reason_to_skip(self, program: Program, site: Site, firsts: Mapping[str, FirstFactor]) -> str | None:
        """Why a site stays as it is, or None."""
        branch = _branch(program, site)
        if branch is None:
            return "has no trainable branch to fold"
        retention = float(branch.retention.detach())
        if retention != 0.0:
            return f"its dense part still has retention {retention:g}, and only 0 folds to factors; train to the end"
        return _reason_of_growth(firsts[site.name])

    def folded(self, site: Site, branch: BranchedLinear, first: FirstFactor | None) -> nn.Module:
        """The pair of GEMMs."""
        form = self.forms[site.name]
        assert isinstance(form, Factored) and first is not None
        _, B = _pair(branch, form)
        if first.inverse is None:
            return FactoredLinear(first.A, B.detach().clone(), _own(branch.bias))
        given_from = None
        if form.brings_first_factor(site.name):
            given_from = first.start
            B = torch.cat([B[: first.start], B[first.start + form.rank :]])
        return FactoredLinear(first.A, (B.double() @ first.inverse).to(B), _own(branch.bias), given_from)


@dataclass(frozen=True, eq=False)
class FirstFactor:
    """The A of a site, or of all its sharers, as it will ship.

    Attributes:
        A: (rank, in_features).
        start: in interpolative form the first of the rows P of B that become the identity, in the site that brings A.
        inverse: (rank, rank) P^-1 in float64, which every B behind A is multiplied by; None outside that form.
        growth: norm of all B P^-1 but the identity over the root of the rank: how much larger rounding errors come
            out than go in.
    """

    A: nn.Parameter
    start: int = 0
    inverse: Tensor | None = None
    growth: float = 0.0


@torch.no_grad()
def first_factors(program: Program, forms: Mapping[str, Form]) -> dict[str, FirstFactor]:
    """Site name -> its first factor, one and the same for sharers, of all branched sites planned `Factored`."""
    found: dict[str, FirstFactor] = {}
    for site in program.sites:
        form = forms.get(site.name)
        if not isinstance(form, Factored) or site.name in found:
            continue
        names = form.sharers or (site.name,)
        branches = [branch for name in names if (branch := _branch(program, program.site(name))) is not None]
        if branches:
            pairs = [_pair(branch, form) for branch in branches]
            found |= dict.fromkeys(names, _first_factor(form, pairs[0][0], [B for _, B in pairs]))
    return found


def reasons_not_to_fold(program: Program, forms: Mapping[str, Form]) -> dict[str, str]:
    """Site name -> why its interpolative form has no factors worth having: to be known before anything trains."""
    interpolative = {n: form for n, form in forms.items() if isinstance(form, Factored) and form.interpolative}
    firsts = first_factors(program, interpolative)
    return {name: reason for name, first in firsts.items() if (reason := _reason_of_growth(first)) is not None}


def _reason_of_growth(first: FirstFactor) -> str | None:
    if first.growth <= WORST_GROWTH:
        return None
    return (
        f"no {first.A.shape[0]} neighbouring rows of its B will do as outputs: rounding errors would grow "
        f"{first.growth:.2g} times, at most {WORST_GROWTH:.0f} is allowed; plan it without interpolative"
    )


def _pair(branch: BranchedLinear, form: Factored) -> tuple[Tensor, Tensor]:
    """A and B with the gates in what no other site has."""
    if form.sharers:
        return branch.A, branch.B * branch.gates
    return branch.gates[:, None] * branch.A, branch.B


def _first_factor(form: Factored, A: Tensor, Bs: Sequence[Tensor]) -> FirstFactor:
    """The factor of sites with these B (out, rank), the one that brings it in front.

    In interpolative form the rows to give are neighbours: those at an end, whose outputs are put in their place
    without a cut, where they are nearly as good as the best of some places.
    """
    if not form.interpolative:
        return FirstFactor(nn.Parameter(A.detach().clone()))
    B, rest = Bs[0], Bs[1:]

    def inverse_from(start: int, dtype: torch.dtype) -> tuple[Tensor, float]:
        end = start + form.rank
        inverse, failed = torch.linalg.inv_ex(B[start:end].to(dtype))
        others = torch.cat([B[:start], B[end:], *rest]).to(dtype) @ inverse
        growth = float(others.norm()) / form.rank**0.5
        return inverse, math.inf if failed or not math.isfinite(growth) else growth

    last = len(B) - form.rank
    places = dict.fromkeys(last * place // (PLACES_TRIED - 1) for place in range(PLACES_TRIED))
    growths = {start: inverse_from(start, torch.float32)[1] for start in places}
    best, at_end = min(places, key=growths.__getitem__), min((0, last), key=growths.__getitem__)
    start = at_end if growths[at_end] <= NEARLY_AS_GOOD * growths[best] else best
    inverse, growth = inverse_from(start, torch.float64)
    return FirstFactor(nn.Parameter(B[start : start + form.rank] @ A), start, inverse, growth)


@dataclass(frozen=True)
class FoldToDense:
    """Fold every site planned `Dense` that trained through a branch."""

    forms: Mapping[str, Form]
    takes: Level = Level.BRANCHED
    gives: Level = Level.BRANCHED
    preserves_outputs: bool = True

    def run(self, program: Program) -> PassResult:
        sites = [site for site in program.sites if isinstance(self.forms.get(site.name), Dense)]
        return _fold(self, program, sites, {})

    def reason_to_skip(self, program: Program, site: Site, firsts: Mapping[str, FirstFactor]) -> str | None:
        """Why a site stays as it is, or None."""
        branch = _branch(program, site)
        if branch is None:
            return "is dense already"
        if branch.residual is None:
            return "its dense part was dropped in training, so it can only fold to factors"
        return None

    def folded(self, site: Site, branch: BranchedLinear, first: FirstFactor | None) -> nn.Module:
        """The one GEMM."""
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


def _fold(
    rule: FoldToFactors | FoldToDense, program: Program, sites: list[Site], firsts: Mapping[str, FirstFactor]
) -> PassResult:
    reasons = {site.name: rule.reason_to_skip(program, site, firsts) for site in sites}
    refusals = tuple(Refusal(name, reason) for name, reason in reasons.items() if reason is not None)
    chosen = [site for site in sites if reasons[site.name] is None]
    if not chosen:
        return PassResult(program, False, refusals)
    rewritten = program.copy()
    for site in chosen:
        branch = _branch(program, site)
        assert branch is not None
        with torch.no_grad():
            module = rule.folded(site, branch, firsts.get(site.name))
        install(rewritten, site, module.requires_grad_(False))
    return PassResult(rewritten, True, refusals, tuple(site.name for site in chosen))
