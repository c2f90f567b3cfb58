"""Refit: factors that know what the sites before them have become.

The damage measure finds each site's best factors for the inputs of an otherwise dense model. In the compressed model
a site gets other inputs x', because all sites before it are compressed as well, and part of what they lost can be
made up for. With M = E[x x'^T] and C' = E[x' x'^T] over calibration data,

    A'  =  A M C'^-1                      the rows see the teacher's input as the compressed one foretells it best
    B'  =  W M A'^T (A' C' A'^T)^-1       the least squares of ||W x - B' A' x'|| for these rows

Neither needs the gradients' moment: B keeps the column space that it chose, and for given rows B' is best under any
metric of the outputs. Teacher and student go through the traced graph as the two halves of one batch, so that one
pass is enough: when it comes to a site, everything before it has its final factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from .graph import SITE, Program, watched_by
from .passes.insert_branches import site_weight
from .values import Factored, Form, Removed, Site

Factors = tuple[Tensor, Tensor]  # A (rank, in_features), B (out_features, rank)

# Share of the mean eigenvalue added to the inputs' moment before it is inverted.
DAMPING = 1e-3


@torch.no_grad()
def refit(
    program: Program,
    forms: Mapping[str, Form],
    factors: Mapping[str, Factors],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    memory_bytes: int = 4 << 30,
) -> dict[str, Factors]:
    """The factors of every factored site, refitted in the order in which the graph runs them.

    A weight that the graph calls more than once keeps what it came with: by the second call the first is over.

    Args:
        program: traced, with real weights.
        forms: the plan: site name -> form.
        factors: site name -> factors to start from, at least of every factored site.
        batches: calibration inputs by name, batch first; an `attention_mask` masks padding out. They go through the
            model at once, as many of them as fit.
        memory_bytes: cap on the activations of the widest site, over all that goes through.
    """
    calls: dict[str, int] = {}
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and SITE in node.meta:
            calls[node.meta[SITE]] = calls.get(node.meta[SITE], 0) + 1
    inputs = _side_by_side(program, batches, memory_bytes)
    mask = inputs.get("attention_mask")
    keep = None if mask is None or mask.dim() != 2 else mask.bool()
    seen: dict[str, _Seen] = {}
    watchers: dict[str, _Refitter | _Silencer] = {}
    for site in program.sites:
        match forms.get(site.name):
            case Factored():
                A, B = factors[site.name]
                watchers[site.name] = _Refitter(program, site, (A, B), calls[site.name] == 1, keep, seen)
            case Removed():
                watchers[site.name] = _Silencer()
    if watchers:
        last = [node.meta[SITE] for node in program.graph.graph.nodes if node.meta.get(SITE) in watchers][-1]
        watchers[last].is_last = True
        with suppress(_Done):  # what comes after the last site, the head above all, is not needed
            watched_by(program, watchers).call_graph(inputs)
    found = {name: watcher.factors for name, watcher in watchers.items() if isinstance(watcher, _Refitter)}
    return {**factors, **found}


def _side_by_side(program: Program, batches: Sequence[Mapping[str, Tensor]], memory_bytes: int) -> dict[str, Tensor]:
    """All batches as one, twice: rows of the teacher, then the same rows of the student."""
    widest = max(site.in_features + site.out_features for site in program.sites)
    device = next(program.tree.parameters()).device
    batches = _of_one_length(batches)
    joined: dict[str, list[Tensor]] = {name: [] for name in batches[0]}
    held = 0
    for batch in batches:
        rows = max(value[..., 0].numel() if value.is_floating_point() else value.numel() for value in batch.values())
        held += 2 * 4 * rows * widest
        if held > memory_bytes and joined[next(iter(joined))]:
            break
        for name, value in batch.items():
            joined[name].append(value)
    return {name: torch.cat([*parts, *parts]).to(device) for name, parts in joined.items()}


def _of_one_length(batches: Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    """Batches that stack: shorter ones filled up where their mask says so, others than the first's shape left out."""
    longest = max((batch["attention_mask"].shape[-1] for batch in batches if _is_masked(batch)), default=0)
    filled = [_filled(batch, longest) if _is_masked(batch) else batch for batch in batches]
    shapes = [{name: value.shape[1:] for name, value in batch.items()} for batch in filled]
    return [batch for batch, shape in zip(filled, shapes, strict=True) if shape == shapes[0]]


def _is_masked(batch: Mapping[str, Tensor]) -> bool:
    """Whether every input is one number a token, and a mask says which of them count."""
    mask = batch.get("attention_mask")
    return mask is not None and mask.ndim == 2 and all(value.shape == mask.shape for value in batch.values())


def _filled(batch: Mapping[str, Tensor], length: int) -> Mapping[str, Tensor]:
    return {name: nn.functional.pad(value, (0, length - value.shape[1])) for name, value in batch.items()}


class _Done(Exception):
    """The last site is refitted."""


class _Seen:
    """What one input showed: the moments that the sites which read it share."""

    def __init__(self, teacher: Tensor, student: Tensor) -> None:
        self.of = student
        ours = student.float()
        self.cross = (teacher.float().T @ ours).double()  # M, up to the number of rows
        self.inner = (ours.T @ ours).double()  # C'
        damped = self.inner + DAMPING * self.inner.diagonal().mean() * torch.eye(len(self.inner)).to(self.inner)
        # As the identity and a correction, so that directions without data keep the factors they have.
        correction = torch.linalg.solve(damped, (self.cross - self.inner).T).T
        self.foretold = torch.eye(len(self.inner)).to(correction) + correction  # M C'^-1


class _Refitter(nn.Module):
    """Stands after a site, takes both halves of the batch, and gives the student's half its refitted output."""

    def __init__(
        self,
        program: Program,
        site: Site,
        factors: Factors,
        refits: bool,
        keep: Tensor | None,
        seen: dict[str, _Seen],
    ) -> None:
        super().__init__()
        self.weight = site_weight(program, site)
        self.bias = None if site.bias is None else program.graph.get_parameter(site.bias).detach()
        self.group, self.factors, self.refits = site.group, factors, refits
        self.keep, self.seen = keep, seen
        self.is_last = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.refits:
            self.factors = self._refitted(*self._halves(x))
        if self.is_last:
            raise _Done
        A, B = (factor.to(x) for factor in self.factors)
        half = y.shape[0] // 2
        ours = nn.functional.linear(nn.functional.linear(x[half:], A), B, self.bias)
        return torch.cat([y[:half], ours])

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        teacher, student = rows.chunk(2)
        if self.keep is None or self.keep.numel() != rows.shape[0]:
            return teacher, student
        kept = self.keep.reshape(-1).chunk(2)[0]
        return teacher[kept], student[kept]

    def _refitted(self, teacher: Tensor, student: Tensor) -> Factors:
        seen = self.seen.get(self.group)
        if seen is None or not torch.equal(seen.of, student):
            seen = self.seen[self.group] = _Seen(teacher, student)
        A, B = (factor.double().to(student.device) for factor in self.factors)
        A = A @ seen.foretold
        gram = A @ seen.inner @ A.T
        # Rows that are all zero (of a weight that is zero) have no mean to be damped by.
        gram += (DAMPING**2 * gram.diagonal().mean() + 1e-30) * torch.eye(len(gram)).to(gram)
        target = self.weight.double() @ seen.cross @ A.T
        B = B + torch.linalg.solve(gram, (target - B @ gram).T).T
        return A.float(), B.float()


class _Silencer(nn.Module):
    """Stands after a site of a removed branch: the student's half is zero."""

    is_last = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.is_last:
            raise _Done
        half = y.shape[0] // 2
        return torch.cat([y[:half], torch.zeros_like(y[half:])])
