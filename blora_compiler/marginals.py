"""Marginals: what the next few ranks of each site are worth where a plan is, measured in one backward pass.

Damages of single sites are measured in an otherwise dense model and added up. Deep in compression they do not add:
the sum comes out several times too low, and by different factors for different sites, so that the plan is not the
best one either. Near a plan the truth is cheap. With the student in the plan's forms, each factored site is given
some more components behind gates that are closed, and one backward pass of the true damage D gives its slope in
every gate. Where D is quadratic in a gate, opening it is worth minus half the slope at its closed end:

    ratio of a site  =  -1/2 sum over the next components of dD/dg  /  what the profile says of the same components

A profile whose damages are scaled by these ratios agrees with the model about the trade that the solver makes at the
plan, and the solver is asked again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .graph import Program, float_leaves, main_output, output_mask, predicts, watched_by
from .losses import kl_from_logits
from .profiling import Profile, Spectrum, kept_rows
from .values import Factored, Form, Removed, Site

NEXT_RANKS = 16
# A site's ratio counts within these bounds: further out it says that the slope was lost in noise.
SMALLEST_RATIO, LARGEST_RATIO = 0.05, 50.0


@dataclass(frozen=True)
class Marginals:
    """What a plan really costs, and what its sites' next ranks are worth.

    Attributes:
        damage: of the whole plan, untrained, in the profile's unit.
        ratios: measured over predicted worth, of every factored site that has ranks left.
    """

    damage: float
    ratios: Mapping[str, float]

    def rescaled(self, profile: Profile, sites: Sequence[Site], forms: Mapping[str, Form]) -> Profile:
        """The profile with each site's damages brought half of the way (in logarithms) to these ratios.

        Half, because a ratio holds at this plan and the next plan is another one. Dense and removed sites have no
        gate to measure; they move with the factored sites of their role.
        """
        bounded = {name: min(max(ratio, SMALLEST_RATIO), LARGEST_RATIO) for name, ratio in self.ratios.items()}
        by_role: dict[str, list[float]] = {}
        for site in sites:
            if site.name in bounded:
                by_role.setdefault(site.role, []).append(math.log(bounded[site.name]))
        usual = {role: math.exp(sum(logs) / len(logs)) for role, logs in by_role.items()}
        counted = [site for site in sites if site.name in forms]
        return profile.scaled(
            {site.name: math.sqrt(bounded.get(site.name, usual.get(site.role, 1.0))) for site in counted}
        )


def measure_marginals(
    program: Program,
    forms: Mapping[str, Form],
    profile: Profile,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    batches: Sequence[Mapping[str, Tensor]],
    teacher: Program | None = None,
) -> Marginals:
    """Run teacher and student over the batches, forward and backward.

    Args:
        program: traced, with real weights.
        forms: the plan: site name -> form.
        profile: of the components that come next; damages in nats per token, or output distances.
        factors: site name -> A, B that the student starts with.
        batches: inputs by name; an `attention_mask` masks padding out. Each goes through on its own.
        teacher: what the damage is a distance to, where that is not `program` with all sites dense.
    """
    gated: dict[str, _Gated] = {}
    watchers: dict[str, nn.Module] = {}
    for site in program.sites:
        match forms.get(site.name):
            case Factored():
                spectrum = profile.spectrum(site, forms[site.name])
                watchers[site.name] = gated[site.name] = _Gated(program, site, spectrum, factors[site.name])
            case Removed():
                watchers[site.name] = _Silent()
    student = watched_by(program, watchers)
    device, config = next(program.tree.parameters()).device, getattr(program.tree, "config", None)
    total = 0.0
    for given in batches:
        batch = {name: value.to(device) for name, value in given.items()}
        with torch.no_grad():
            reference = (teacher or program).call_graph(batch)
        with torch.enable_grad():  # the caller may have none
            damage = _damage(student.call_graph(batch), reference, config, output_mask(batch)) / len(batches)
            if damage.requires_grad:
                damage.backward()
        total += float(damage.detach())
    predicted = {name: site.predicted for name, site in gated.items()}
    slopes = {name: site.slope() for name, site in gated.items()}
    return Marginals(total, {name: slopes[name] / worth for name, worth in predicted.items() if worth > 0})


def _damage(output: object, reference: object, config: object, keep: Tensor | None) -> Tensor:
    """The profile's measure between two outputs: nats per token, or half the squared distance per output row."""
    if predicts(output, config):
        ours, theirs = (kept_rows(main_output(side), keep) for side in (output, reference))
        return kl_from_logits(ours.float(), theirs.float())
    distances = [
        0.5 * (kept_rows(ours, keep).float() - kept_rows(theirs, keep).float()).square().sum()
        for ours, theirs in zip(float_leaves(output), float_leaves(reference), strict=True)
    ]
    return torch.stack(distances).sum() / kept_rows(main_output(output), keep).shape[0]


class _Gated(nn.Module):
    """Stands after a site and computes it by its factors, with closed gates on the components that come next."""

    def __init__(self, program: Program, site: Site, spectrum: Spectrum, factors: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        assert spectrum.A is not None and spectrum.B is not None, "only measured profiles have factors"
        (A, B), rank = factors, factors[0].shape[0]
        last = max(rank, min(rank + NEXT_RANKS, spectrum.A.shape[0]))
        like = program.graph.get_parameter(site.weight)
        self.A = torch.cat([A, spectrum.A[rank:last].to(A)]).to(like)
        self.B = torch.cat([B, spectrum.B[:, rank:last].to(B)], dim=1).to(like)
        self.bias = None if site.bias is None else program.graph.get_parameter(site.bias).detach()
        self.open = torch.ones(rank).to(like)
        self.closed = nn.Parameter(torch.zeros(last - rank).to(like))
        end = len(spectrum.tail) - 1
        self.predicted = float(spectrum.tail[min(rank, end)] - spectrum.tail[min(last, end)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gates = torch.cat([self.open, self.closed])
        return nn.functional.linear(nn.functional.linear(x, self.A) * gates, self.B, self.bias)

    def slope(self) -> float:
        """What opening all closed gates is worth."""
        return 0.0 if self.closed.grad is None else -0.5 * float(self.closed.grad.sum())


class _Silent(nn.Module):
    """Stands after a site of a removed branch."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(y)
