"""Refit: factors that know what the sites before them have become.

The damage measure finds each site's best factors for the inputs of an otherwise dense model. In the compressed model
a site gets other inputs x', because all sites before it are compressed as well, and part of what they lost can be
made up for. With M = E[x x'^T] and C' = E[x' x'^T] over calibration data,

    A'  =  A M C'^-1                      the rows see the teacher's input as the compressed one foretells it best
    B'  =  W M A'^T (A' C' A'^T)^-1       the least squares of ||W x - B' A' x'|| for these rows

Neither needs the gradients' moment: B keeps the column space that it chose, and for given rows B' is best under any
metric of the outputs. Teacher and student go through the traced graph as the two halves of one batch, so that one
pass is enough: when it comes to a site, everything before it has its final factors.

Ordered factors, of which a family's member of rank r uses the first r rows and columns, are refitted at every rank
at once: with A' C' A'^T = L L^T, the rows L^-1 A' span, for each r, what the first r rows of A' span, and since they
are orthonormal to C', the least squares of each column of B' does not depend on how many others there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from .errors import BadInput
from .graph import SITE, Program, token_mask, watched_by
from .passes.insert_branches import site_weight
from .values import Factored, Form, Removed, Site

Factors = tuple[Tensor, Tensor]  # A (rank, in_features), B (out_features, rank)

# Share of each channel's own square that is added to it before the inputs' moment is inverted.
DAMPING = 1e-3
# Share of an output that running other examples beside it may change: kernels round by shape.
_SAME = 0.02


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

    Raises:
        BadInput: where the first axis is not the batch throughout; see `side_by_side_refusal`.
    """
    chosen = {name: pair for name, pair in factors.items() if isinstance(forms.get(name), Factored)}
    return {**factors, **_refit_in_order(program, forms, chosen, batches, _at_one_rank, memory_bytes)}


@torch.no_grad()
def refit_ordered(
    program: Program,
    forms: Mapping[str, Form],
    factors: Mapping[str, Factors],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    memory_bytes: int = 4 << 30,
) -> dict[str, Factors]:
    """Ordered factors, refitted at every rank to the inputs that they get in one member of a family.

    Args:
        forms: of that member; a dense site goes on as it is, and its factors are refitted all the same.
        factors: site name -> factors whose first r rows and columns are those of rank r, no smaller than in `forms`.
            Sites with one and the same A go on sharing one.
        program, batches, memory_bytes: as for `refit`.
    """
    found = _refit_in_order(program, forms, factors, batches, _at_every_rank, memory_bytes)
    sharing: dict[int, list[str]] = {}
    for name in found:
        sharing.setdefault(id(factors[name][0]), []).append(name)
    balanced: dict[str, Factors] = {}
    for names in sharing.values():
        A, parts = balance_components(found[names[0]][0], [found[name][1] for name in names])
        balanced |= {name: (A, part) for name, part in zip(names, parts, strict=True)}
    return {name: balanced[name] for name in found}


def balance_components(A: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same products, each component split evenly between its row and its columns: no rank is the one to balance.

    Args:
        A: (rank, in_features).
        parts: the B (out_features, rank) of each site that A is for.
    """
    balance = (torch.cat(list(parts)).norm(dim=0) / A.norm(dim=1).clamp_min(1e-12)).sqrt()
    # In rows, as a saved family is read back: the order of memory is the order in which sums are rounded.
    return (A * balance[:, None]).contiguous(), [(B / balance.clamp_min(1e-12)).contiguous() for B in parts]


def _refit_in_order(
    program: Program,
    forms: Mapping[str, Form],
    factors: Mapping[str, Factors],
    batches: Sequence[Mapping[str, Tensor]],
    solve: Solve,
    memory_bytes: int,
) -> dict[str, Factors]:
    """The refitted factors of the sites that have some, one after the other."""
    if (refusal := side_by_side_refusal(program, batches)) is not None:
        raise BadInput(f"factors cannot be refitted: {refusal}")
    calls: dict[str, int] = {}
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and SITE in node.meta:
            calls[node.meta[SITE]] = calls.get(node.meta[SITE], 0) + 1
    inputs = _side_by_side(program, batches, memory_bytes)
    keep = token_mask(inputs)
    seen: dict[str, _Seen] = {}
    watchers: dict[str, _Refitter | _Silencer] = {}
    for site in program.sites:
        form = forms.get(site.name)
        if site.name in factors:
            shown = form.rank if isinstance(form, Factored) else None
            refits = solve if calls[site.name] == 1 else None
            watchers[site.name] = _Refitter(program, site, factors[site.name], shown, refits, keep, seen)
        elif isinstance(form, Removed):
            watchers[site.name] = _Silencer()
    if watchers:
        last = [node.meta[SITE] for node in program.graph.graph.nodes if node.meta.get(SITE) in watchers][-1]
        watchers[last].calls_left = calls[last]
        with suppress(_Done):  # what comes after the last site, the head above all, is not needed
            watched_by(program, watchers).call_graph(inputs)
    return {name: watcher.factors for name, watcher in watchers.items() if isinstance(watcher, _Refitter)}


@torch.no_grad()
def side_by_side_refusal(program: Program, batches: Sequence[Mapping[str, Tensor]]) -> str | None:
    """Why teacher and student cannot go through a model as two halves of one batch; None where they can.

    The first axis has to be the batch, in every input and at every site, and no example may see another one. Some
    models put the sequence first, or turn it to the front inside. Two small pieces are run alone and together.
    """
    rows = _of_one_length(batches)
    joined = {name: torch.cat([batch[name] for batch in rows[:4]]) for name in rows[0]}
    examples = min(len(value) for value in joined.values())
    if examples < 2:
        return None  # one example at a time: that the first axis counts them is all that is known
    size = min(2, examples // 2)
    device = next(program.tree.parameters()).device
    pieces = [{name: value[part].to(device) for name, value in joined.items()}
              for part in (slice(0, size), slice(size, 2 * size), slice(0, 2 * size))]  # fmt: skip
    seen: list[dict[str, Tensor]] = []
    for piece in pieces:
        outputs: dict[str, Tensor] = {}
        watchers = {site.name: _Recorder(site.name, outputs) for site in program.sites}
        try:
            watched_by(program, watchers).call_graph(piece)
        except (RuntimeError, ValueError, IndexError) as error:
            return f"the model does not run on {size} examples of the calibration data ({str(error)[:200]})"
        seen.append(outputs)
    for name, together in seen[2].items():
        first, second = (part.get(name) for part in seen[:2])
        if first is None or second is None:
            continue
        if together.ndim < 2 or together.shape != (len(first) + len(second), *first.shape[1:]):
            return f"at {name}, the first axis does not count examples"
        alone = torch.cat([first, second]).float()
        if not (together.float() - alone).norm() <= _SAME * alone.norm():
            return f"at {name}, what one example gives depends on the others beside it: is the batch the first axis?"
    return None


class _Recorder(nn.Module):
    """Stands after a site and keeps its output."""

    def __init__(self, name: str, outputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.name, self.outputs = name, outputs

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.outputs[self.name] = y
        return y


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
    mask = token_mask(batch)
    return mask is not None and all(value.shape == mask.shape for value in batch.values())


def _filled(batch: Mapping[str, Tensor], length: int) -> Mapping[str, Tensor]:
    return {name: nn.functional.pad(value, (0, length - value.shape[1])) for name, value in batch.items()}


class _Done(Exception):
    """The last site is refitted."""


def _one_call_less(calls: int | None) -> int | None:
    if calls == 1:
        raise _Done
    return None if calls is None else calls - 1


class _Seen:
    """What one input showed: the moments that the sites which read it share."""

    def __init__(self, teacher: Tensor, student: Tensor) -> None:
        self.of = student
        ours = student.float()
        self.cross = (teacher.float().T @ ours).double()  # M, up to the number of rows
        self.inner = (ours.T @ ours).double()  # C'
        own = self.inner.diagonal()
        damped = self.inner + DAMPING * own.clamp_min(1e-12 * own.mean() + 1e-30).diag()
        # As the identity and a correction, so that directions without data keep the factors they have.
        correction = torch.linalg.solve(damped, (self.cross - self.inner).T).T
        self.foretold = torch.eye(len(self.inner)).to(correction) + correction  # M C'^-1


Solve = Callable[[Tensor, Factors, _Seen], Factors]  # weight, factors in float64, moments -> refitted factors


def _at_one_rank(weight: Tensor, factors: Factors, seen: _Seen) -> Factors:
    A, B = factors
    A = A @ seen.foretold
    gram = _damped(A @ seen.inner @ A.T)
    target = weight @ seen.cross @ A.T
    return A, B + torch.linalg.solve(gram, (target - B @ gram).T).T


def _at_every_rank(weight: Tensor, factors: Factors, seen: _Seen) -> Factors:
    A = factors[0] @ seen.foretold
    # Directions without data are worth a little, or B would not know what to do with them.
    little = DAMPING**2 * seen.inner.diagonal().mean() * torch.eye(len(seen.inner)).to(seen.inner)
    lower = torch.linalg.cholesky(_damped(A @ (seen.inner + little) @ A.T))
    A = torch.linalg.solve_triangular(lower, A, upper=False)
    return A, weight @ (seen.cross + little) @ A.T


def _damped(gram: Tensor) -> Tensor:
    """Rows that are all zero (of a weight that is zero) have no mean to be damped by."""
    return gram + (DAMPING**2 * gram.diagonal().mean() + 1e-30) * torch.eye(len(gram)).to(gram)


class _Refitter(nn.Module):
    """Stands after a site, takes both halves of the batch, and gives the student's half its refitted output.

    Args:
        shown: how many of the ranks the student's half is computed with; None leaves it dense.
        solve: the refit, or None where the factors stay.
        keep: (batch, tokens) of both halves, False where there is padding.
        seen: moments by group of sites.
    """

    def __init__(
        self,
        program: Program,
        site: Site,
        factors: Factors,
        shown: int | None,
        solve: Solve | None,
        keep: Tensor | None,
        seen: dict[str, _Seen],
    ) -> None:
        super().__init__()
        self.weight = site_weight(program, site)
        self.bias = None if site.bias is None else program.graph.get_parameter(site.bias).detach()
        self.group, self.factors, self.shown, self.solve = site.group, factors, shown, solve
        self.keep, self.seen = keep, seen
        self.calls_left: int | None = None  # of the last site: it may be called earlier too

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.solve is not None:
            self.factors = self._refitted(self.solve, *self._halves(x))
        self.calls_left = _one_call_less(self.calls_left)
        if self.shown is None:
            return y
        A, B = (factor.to(x) for factor in self.factors)
        half = y.shape[0] // 2
        hidden = nn.functional.linear(x[half:], A[: self.shown])
        return torch.cat([y[:half], nn.functional.linear(hidden, B[:, : self.shown], self.bias)])

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        teacher, student = rows.chunk(2)
        if self.keep is None or self.keep.numel() != rows.shape[0]:
            return teacher, student
        kept = self.keep.reshape(-1).chunk(2)[0]
        return teacher[kept], student[kept]

    def _refitted(self, solve: Solve, teacher: Tensor, student: Tensor) -> Factors:
        seen = self.seen.get(self.group)
        if seen is None or not torch.equal(seen.of, student):
            seen = self.seen[self.group] = _Seen(teacher, student)
        A, B = (factor.double().to(student.device) for factor in self.factors)
        A, B = solve(self.weight.double(), (A, B), seen)
        return A.float(), B.float()


class _Silencer(nn.Module):
    """Stands after a site of a removed branch: the student's half is zero."""

    calls_left: int | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls_left = _one_call_less(self.calls_left)
        half = y.shape[0] // 2
        return torch.cat([y[:half], torch.zeros_like(y[half:])])
