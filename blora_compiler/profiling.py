"""Profile: what each form of each site would cost in quality, from one pass over calibration data.

For a site with input second moment C = E[x x^T] and output-gradient second moment G = E[g g^T],
half of tr(G (W - W') C (W - W')^T) estimates the rise of KL(teacher, student). The best W' of rank r is the truncated
SVD of G^1/2 W C^1/2 (any roots of the two will do), and half the sum of its dropped squared singular values is the
damage: nats per token, comparable across sites. `whitened` sets G = I (SVD-LLM's closed form), `plain` sets both to
I.

Sites that read one input have one C. With their G^1/2 W C^1/2 stacked, the truncated SVD gives the best A that all of
them can share: its rows serve every site, and the damage of the stack is the sum of what each site's rows of U lose.

g is the gradient of the SUM over tokens of -log p(token drawn from the model itself); C and G are means over
unmasked tokens. Models without logits have no such loss (the gradient of a distance to themselves is zero), so a
standard-normal probe of the output stands in: the damage is then half the squared output distance per output row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, fx, nn

from .data import fingerprint_of_tensors
from .errors import BadInput, did_you_mean
from .folders import disk_message
from .graph import (
    SITE,
    Program,
    float_leaves,
    main_output,
    output_mask,
    predicts,
    projection_input,
    sizes_of,
    token_mask,
    watched_by,
)
from .operators import VIEWS, size_names
from .values import Dense, Factored, Form, Removed, Site, shared_break_even_rank, site_groups

Sharers = tuple[str, ...]  # names of sites that read one input through one first factor, in site order
Kind = Literal["two-sided", "whitened", "plain", "prior"]

CACHE_FORMAT = 3  # goes up when a cached profile holds something else than before
DAMPING = 1e-4  # share of each channel's own square that is added to it, so that near-singular moments invert
_DEAD = 1e-12  # of the mean square: what a channel without data counts as


@dataclass(frozen=True)
class Spectrum:
    """One site's damage at every rank, and the factors that reach it.

    Attributes:
        tail: (k + 1,) damage at rank 0, 1, ... k, where k is the largest rank worth having.
        removal: damage of dropping the output altogether, its bias included.
        A: (k, in_features) rows ordered by importance, or None for a prior.
        B: (out_features, k); the best factors of rank r are `A[:r]` and `B[:, :r]`.
        lost: damage that is there in every form but removal: of the inner channels that the site no longer reads.
    """

    tail: np.ndarray
    removal: float
    A: Tensor | None = None
    B: Tensor | None = None
    lost: float = 0.0


@dataclass(frozen=True)
class Profile:
    """A damage model: `damage(site, form)` in the unit that `unit` names.

    Attributes:
        kind: how the damage was measured; `prior` means it was not.
        spectra: site name -> spectrum.
        unit: `nats per token` (two-sided, with logits), `output distance`, `squared error` or `none`.
        tokens: unmasked tokens it was measured on.
        seed: of the sampled tokens.
        shared: names of sites that can share their first factor -> site name -> spectrum of its part; their A is one.
    """

    kind: Kind
    spectra: Mapping[str, Spectrum] = field(repr=False)
    unit: str = "none"
    tokens: int = 0
    seed: int = 0
    shared: Mapping[Sharers, Mapping[str, Spectrum]] = field(default_factory=dict, repr=False)

    def can_share(self, sites: Sequence[Site]) -> bool:
        """Whether it was measured what a first factor shared by exactly these sites would cost."""
        return tuple(site.name for site in sites) in self.shared

    def spectrum(self, site: Site, form: Form) -> Spectrum:
        """What is known of a site in a form.

        Raises:
            BadInput: for a first factor shared by sites that were not measured together.
        """
        if not isinstance(form, Factored) or not form.sharers or self.kind == "prior":
            return self.spectra[site.name]
        if form.sharers not in self.shared or site.name not in form.sharers:
            raise BadInput(
                f"{site.name}: no first factor shared by {', '.join(form.sharers)} was measured; sites share one "
                f"where they read the same input, and a two-sided profile (or one of an ONNX file) says what it costs"
            )
        return self.shared[form.sharers][site.name]

    def damage(self, site: Site, form: Form) -> float:
        """Predicted damage of one site in one form, all other sites dense."""
        spectrum = self.spectrum(site, form)
        match form:
            case Dense():
                return spectrum.lost
            case Factored(rank):
                return spectrum.lost + float(spectrum.tail[min(rank, len(spectrum.tail) - 1)])
            case Removed():
                return spectrum.removal
        raise AssertionError(form)

    def scaled(self, factors: Mapping[str, float]) -> Profile:
        """The same factors with each named site's damages multiplied."""

        def scaled(spectra: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
            return {
                name: replace(
                    spectrum,
                    tail=spectrum.tail * factor,
                    removal=spectrum.removal * factor,
                    lost=spectrum.lost * factor,
                )
                for name, spectrum in spectra.items()
                for factor in (factors.get(name, 1.0),)
            }

        shared = {sharers: scaled(spectra) for sharers, spectra in self.shared.items()}
        return replace(self, spectra=scaled(self.spectra), shared=shared)

    def with_lost(self, damages: Mapping[str, float]) -> Profile:
        """The same with what each named site has lost of its inputs."""
        spectra = {
            name: replace(spectrum, lost=damages.get(name, spectrum.lost)) for name, spectrum in self.spectra.items()
        }
        return replace(self, spectra=spectra)

    def starting_factors(self, site: Site, rank: int) -> tuple[Tensor, Tensor]:
        """A0 (rank x in) and B0 (out x rank) of the best factorisation at `rank`, balanced.

        The product is what the damage measure asks for; the split is the symmetric one (both factors carry the root
        of the product's singular values), so that one learning rate suits both.
        """
        spectrum = self.spectra[site.name]
        if spectrum.A is None or spectrum.B is None:
            raise BadInput(f"{site.name}: a {self.kind} profile has no factors to start from; profile with weights")
        return _balanced(spectrum.A[:rank], spectrum.B[:, :rank])

    def shared_factors(self, sharers: Sharers, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Site name -> A0, one and the same for all, and the site's B0; balanced as one factorisation."""
        if sharers not in self.shared:
            raise BadInput(
                f"no first factor shared by {', '.join(sharers)} was measured; profile two-sided, with data"
            )
        spectra = [self.shared[sharers][name] for name in sharers]
        assert spectra[0].A is not None, "shared spectra are always measured"
        parts = [spectrum.B[:, :rank] for spectrum in spectra if spectrum.B is not None]
        A, B = _balanced(spectra[0].A[:rank], torch.cat(parts))
        return {name: (A, part) for name, part in zip(sharers, B.split([len(p) for p in parts]), strict=True)}


def _balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, both factors carrying the root of its singular values."""
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
    U, S, Vt = torch.linalg.svd(left.R @ right.R.T)
    root = S.sqrt()
    return (root[:, None] * Vt @ right.Q.T).float(), (left.Q @ U * root).float()


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────


def profile(
    program: Program,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    kind: Kind = "two-sided",
    seed: int = 0,
    memory_bytes: int = 4 << 30,
    full_width: int = 4096,
    cache: Path | None = None,
) -> Profile:
    """Measure the damage of every form of every site.

    Args:
        program: a traced program with real weights.
        batches: inputs by name, `(sequences, tokens)` each; an `attention_mask` masks padding out.
        kind: `two-sided`, or the baselines `whitened` (G = I) and `plain` (C = G = I, reads no data).
        seed: of the tokens or probes drawn.
        memory_bytes: cap on the moments held at once; sites are measured in blocks that fit, one data pass a block.
        full_width: outputs wider than this get a diagonal G, as output heads always do.
        cache: folder for the result, keyed by a fingerprint of weights, data and settings.

    Raises:
        BadInput: an unknown kind, weights that are not finite, no calibration data, batches of the wrong shape, or a
            cache that cannot be written or read.
    """
    check_kind(kind)
    check_weights(program)
    if kind == "prior":
        return prior(program.sites)
    batches = list(batches)  # read more than once
    key = _fingerprint(program, batches, kind, seed, full_width)
    if cache is not None and (stored := _load(cache, key)) is not None:
        return stored
    measured = kind != "plain"
    if measured and not batches:
        raise BadInput(
            f"a {kind} profile needs calibration data, and got 0 batches; pass calibration=... or use 'plain'"
        )
    spectra: dict[str, Spectrum] = {}
    shared: dict[Sharers, dict[str, Spectrum]] = {}
    tokens = 0
    unit = "squared error"
    blocks = moments_of(
        program, program.sites, batches if measured else (), seed=seed, with_gradients=kind == "two-sided",
        memory_bytes=memory_bytes, full_width=full_width,
    )  # fmt: skip
    for block, moments, found_unit in blocks:
        sites, tokens = [site for group in block for site in group], moments.output_rows
        unit = found_unit if kind == "two-sided" else unit
        weighed = {site.name: _weighed(program, site, moments, kind) for site in sites}
        spectra |= {site.name: _spectrum(program, site, weighed[site.name], moments) for site in sites}
        if kind == "two-sided":
            shared |= {
                tuple(site.name for site in group): shared_spectra(group, weighed, spectra)
                for group in block
                if len(group) > 1
            }
    spectra = {site.name: spectra[site.name] for site in program.sites}
    result = Profile(kind, spectra, unit, tokens, seed, shared)
    if cache is not None:
        _store(cache, key, result)
    return result


def check_kind(kind: str) -> None:
    """Raise BadInput for a measure of damage that there is not."""
    kinds = get_args(Kind)
    if kind not in kinds:
        raise BadInput(f"damage is measured by {', '.join(kinds)}, got {kind!r}{did_you_mean(str(kind), kinds)}")


def check_weights(program: Program) -> None:
    """Raise BadInput naming every parameter that holds a NaN or an infinity."""
    broken = [name for name, p in program.tree.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if broken:
        raise BadInput(
            f"{len(broken)} parameters hold NaN or infinite values: {', '.join(broken[:5])}; repair the model"
        )


def moments_of(
    program: Program,
    sites: Sequence[Site],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    seed: int,
    with_gradients: bool = True,
    memory_bytes: int = 4 << 30,
    full_width: int = 4096,
) -> Iterator[tuple[list[tuple[Site, ...]], Moments, str]]:
    """Blocks of site groups that fit into memory together, their moments, and the unit of damages made of these.

    Args:
        batches: as for `profile`; without any, nothing is measured.
    """
    for block in _blocks(sites, memory_bytes, full_width):
        moments = Moments([site for group in block for site in group], full_width, with_gradients)
        unit = _accumulate(program, batches, moments, seed) if batches else "squared error"
        moments.check_finite()
        yield block, moments, unit


def _blocks(sites: Sequence[Site], memory_bytes: int, full_width: int) -> Iterable[list[tuple[Site, ...]]]:
    """Groups of sites whose moments fit under the cap together. A single group may exceed it; then it goes alone."""
    block: list[tuple[Site, ...]] = []
    held = 0
    for group in site_groups(sites):
        need = 4 * (group[0].in_features ** 2 + sum(_gradient_entries(site, full_width) for site in group))
        if block and held + need > memory_bytes:
            yield block
            block, held = [], 0
        block.append(group)
        held += need
    if block:
        yield block


def _gradient_entries(site: Site, full_width: int) -> int:
    return site.out_features if _diagonal(site, full_width) else site.out_features**2


def _diagonal(site: Site, full_width: int) -> bool:
    return site.kind == "head" or site.out_features > full_width


class Moments:
    """Running sums of x x^T, x and g g^T for a block of sites. Sites of a group share their input's moments."""

    def __init__(self, sites: Sequence[Site], full_width: int, with_gradients: bool) -> None:
        self.sites = {site.name: site for site in sites}
        self.with_gradients = with_gradients
        self.full_width = full_width
        self.first_of_group = {site.group: site.name for site in reversed(sites)}
        self.inputs: dict[str, Tensor] = {}
        self.input_sums: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.output_rows = 0  # tokens (or examples) the loss was summed over

    def add_input(self, name: str, x: Tensor, keep: Tensor | None) -> None:
        """x: (..., in_features); keep: mask over rows, or None."""
        group = self.sites[name].group
        if self.first_of_group[group] != name:
            return
        rows = kept_rows(x.detach(), keep).float()
        self.inputs[group] = self.inputs.get(group, 0) + rows.T @ rows
        self.input_sums[group] = self.input_sums.get(group, 0) + rows.sum(0)
        self.rows[group] = self.rows.get(group, 0) + rows.shape[0]

    def add_gradient(self, name: str, g: Tensor, keep: Tensor | None) -> None:
        """g: (..., out_features)."""
        rows = kept_rows(g.detach(), keep).float()
        moment = rows.square().sum(0) if _diagonal(self.sites[name], self.full_width) else rows.T @ rows
        self.gradients[name] = self.gradients.get(name, 0) + moment

    def check_finite(self) -> None:
        """Raise BadInput naming a site whose moments are no numbers: they would count as never having seen data."""
        for name, moment in (*self.inputs.items(), *self.gradients.items()):
            if not bool(moment.isfinite().all()):
                raise BadInput(f"{name}: calibration data give NaN or infinite values there; look at the data's own")

    def input_moment(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """C (in x in) and the mean input (in,), or Nones where nothing was measured."""
        rows = self.rows.get(site.group, 0)
        if rows == 0:
            return None, None
        return self.inputs[site.group] / rows, self.input_sums[site.group] / rows

    def gradient_moment(self, site: Site) -> Tensor | None:
        """G (out x out), or its diagonal (out,), as a mean over output rows; summed over the calls of the weight."""
        moment = self.gradients.get(site.name)
        return None if moment is None else moment / self.output_rows


def kept_rows(value: Tensor, keep: Tensor | None) -> Tensor:
    """The unmasked rows of a value; every row of one that has no row per token (a pooled output).

    Args:
        value: (batch, tokens, features), (tokens, batch, features) or (batch * tokens, features).
        keep: (batch, tokens).
    """
    rows = value.reshape(-1, value.shape[-1])
    if keep is None or keep.numel() != rows.shape[0]:
        return rows
    sequence_first = value.shape[:-1] != keep.shape and value.shape[:-1] == keep.T.shape
    return rows[(keep.T if sequence_first else keep).reshape(-1)]


def _flattened_tokens_first(program: Program) -> set[str]:
    """Names of sites whose rows are tokens times batch in that order, as `nn.MultiheadAttention` flattens them.

    Nothing about the rows themselves tells; the last view that still had both axes does.
    """
    symbols = size_names(program.graph, list(program.inputs))
    found = set()
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and SITE in node.meta and projection_input(node).meta["val"].dim() == 2:
            source: Any = projection_input(node)
            while source.target in VIEWS and isinstance(source.args[0], fx.Node) and source.meta["val"].dim() < 3:
                source = source.args[0]
            if [symbols.get(str(size)) for size in sizes_of(source.meta["val"])[:2]] == ["tokens", "batch"]:
                found.add(node.meta[SITE])
    return found


class _Observer(nn.Module):
    """Stands after a projection in a copy of the graph; hands its input and its output's gradient to the moments."""

    def __init__(self, name: str, moments: Moments, state: dict[str, Tensor | None], turned: bool) -> None:
        super().__init__()
        self.name, self.moments, self.state, self.turned = name, moments, state, turned

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        keep = self.state["keep"]
        keep = keep.T if keep is not None and self.turned else keep
        self.moments.add_input(self.name, x, keep)
        if not self.moments.with_gradients:
            return y
        is_leaf = not y.requires_grad
        if is_leaf:
            y = y.detach().requires_grad_()
        y.register_hook(lambda g: self.moments.add_gradient(self.name, g, keep))
        return y.clone() if is_leaf else y  # what comes next may work in place, which leaves do not allow


def _accumulate(program: Program, batches: Sequence[Mapping[str, Tensor]], moments: Moments, seed: int) -> str:
    """Run every batch forward (and backward, where gradients are asked for); returns the unit."""
    state: dict[str, Tensor | None] = {"keep": None}
    turned = _flattened_tokens_first(program)
    watched = watched_by(program, {name: _Observer(name, moments, state, name in turned) for name in moments.sites})
    unit = "squared error"
    device, config = next(program.tree.parameters()).device, getattr(program.tree, "config", None)
    for index, given in enumerate(batches):
        batch = {name: value.to(device) for name, value in given.items()}
        state["keep"] = token_mask(batch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        with torch.set_grad_enabled(moments.with_gradients):
            output = watched.call_graph(batch)
            loss, unit, rows = _sampled_loss(output, config, output_mask(batch), generator)
            moments.output_rows += rows
            if moments.with_gradients:
                torch.autograd.backward(loss)
    return unit


def _sampled_loss(
    output: Any, config: Any, keep: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, str, int]:
    """The loss whose gradient's second moment is the curvature: its unit, and the rows it sums over."""
    rows = kept_rows(main_output(output), keep).float()
    if predicts(output, config):
        log_p = torch.log_softmax(rows, dim=-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(rows.device)
        return -log_p.gather(1, drawn).sum(), "nats per token", rows.shape[0]
    loss = sum(
        (
            (
                kept_rows(leaf, keep).float()
                * torch.randn(kept_rows(leaf, keep).shape, generator=generator).to(leaf.device)
            ).sum()
        )
        for leaf in float_leaves(output)
    )
    assert isinstance(loss, Tensor)
    return loss, "output distance", rows.shape[0]


# ── From moments to spectra ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Weighed:
    """A weight in the coordinates in which all errors count alike.

    Attributes:
        weight: (out, in) W as it is.
        matrix: (out, in) R_g^T W R_c, where R R^T is the moment of the gradients, or of the inputs.
        inverse_c, inverse_g: the way back, R_c^-1 and R_g^-T: a matrix, a diagonal as a vector, or None for the
            identity.
        scale: what squared singular values are multiplied by to be damages.
    """

    weight: Tensor
    matrix: Tensor
    inverse_c: Tensor | None
    inverse_g: Tensor | None
    scale: float


def _weighed(program: Program, site: Site, moments: Moments, kind: Kind) -> Weighed:
    weight = program.graph.get_parameter(site.weight).detach().double()
    weight = weight.T if site.transposed else weight
    C, _ = moments.input_moment(site)
    G = moments.gradient_moment(site)
    rows_per_output = 1.0
    if C is not None and moments.output_rows:
        rows_per_output = moments.rows[site.group] / moments.output_rows  # all calls of the weight together
    root_c, inverse_c = square_roots(C, site.in_features)
    root_g, inverse_g = (_transposed(part) for part in square_roots(G, site.out_features))
    matrix = _left(root_g, weight) @ root_c if root_c is not None else _left(root_g, weight)
    # G sums over the gradient's rows and divides by output rows, so it already holds rows_per_output; the whitened
    # measure has no G and needs it said.
    scale = 0.5 if kind == "two-sided" else 0.5 * rows_per_output
    if kind == "two-sided" and G is None:
        scale = 0.0  # no gradient reaches it: nothing the model returns depends on this site
    return Weighed(weight, matrix, inverse_c, inverse_g, scale)


def _spectrum(program: Program, site: Site, weighed: Weighed, moments: Moments) -> Spectrum:
    C, mean = moments.input_moment(site)
    removal = _removal_damage(program, site, weighed.weight, C, mean, moments.gradient_moment(site), weighed.scale)
    return own_spectrum(weighed, site.break_even_rank, removal)


def own_spectrum(weighed: Weighed, break_even_rank: int, removal: float) -> Spectrum:
    """The best factors of one weight at every rank up to break-even, and what they damage."""
    U, S, Vt = torch.linalg.svd(weighed.matrix, full_matrices=False)
    keep = min(break_even_rank, len(S))
    A = Vt[:keep] @ weighed.inverse_c if weighed.inverse_c is not None else Vt[:keep]
    B = _left(weighed.inverse_g, U[:, :keep] * S[:keep])
    return Spectrum(_tail(weighed.scale * S.square(), keep), removal, A.float(), B.float())


def shared_spectra(
    sites: Sequence[Site], weighed: Mapping[str, Weighed], alone: Mapping[str, Spectrum]
) -> dict[str, Spectrum]:
    """Site name -> its part of the best factorisation of the sites' stacked weights."""
    of_sites = [weighed[site.name] for site in sites]
    U, S, Vt = torch.linalg.svd(torch.cat([of_site.matrix for of_site in of_sites]), full_matrices=False)
    keep = min(shared_break_even_rank(sites), len(S))
    inverse_c = of_sites[0].inverse_c  # they read one input
    A = (Vt[:keep] @ inverse_c if inverse_c is not None else Vt[:keep]).float()
    found = {}
    for site, of_site, rows in zip(sites, of_sites, U.split([site.out_features for site in sites]), strict=True):
        tail = _tail(of_site.scale * (rows * S).square().sum(0), keep)
        B = _left(of_site.inverse_g, rows[:, :keep] * S[:keep]).float()
        found[site.name] = Spectrum(tail, alone[site.name].removal, A, B)
    return found


def _tail(damages: Tensor, keep: int) -> np.ndarray:
    """(keep + 1,) what is lost at rank 0, 1, ... keep, from the damage of each component, (components,)."""
    lost = damages.cpu().numpy()
    return np.concatenate([np.cumsum(lost[::-1])[::-1], [0.0]])[: keep + 1]


def square_roots(moment: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None]:
    """R and R^-1 of a damped moment R R^T; (size,) vectors for a diagonal; Nones for identity.

    Channels are brought to one scale first, so that a channel thousands of times larger than the others damps only
    itself: R = D^1/2 (D^-1/2 M D^-1/2 + damping)^1/2 with the moment's own diagonal D. Cholesky is not used: a moment
    from few tokens, or of an input with dead channels, is singular.
    """
    if moment is None:
        return None, None
    moment = moment.double()
    level = float(moment.mean() if moment.dim() == 1 else moment.diagonal().mean())
    if not level > 0.0:
        return None, None  # the site never saw data or never mattered: nothing to weigh by
    if moment.dim() == 1:
        root = (moment + DAMPING * moment.clamp_min(_DEAD * level)).sqrt()
        return root, 1 / root
    widths = moment.diagonal().clamp_min(_DEAD * level).sqrt()
    scaled = moment / torch.outer(widths, widths)
    values, vectors = torch.linalg.eigh((scaled + scaled.T) / 2)
    roots = (values.clamp_min(0.0) + DAMPING).sqrt()
    root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    return widths[:, None] * root, inverse / widths


def _transposed(factor: Tensor | None) -> Tensor | None:
    """Of a factor that may be a diagonal or absent."""
    return factor.T if factor is not None and factor.dim() == 2 else factor


def _left(factor: Tensor | None, matrix: Tensor) -> Tensor:
    """factor @ matrix, where the factor may be a diagonal or absent."""
    if factor is None:
        return matrix
    return factor[:, None] * matrix if factor.dim() == 1 else factor @ matrix


def _removal_damage(
    program: Program,
    site: Site,
    weight: Tensor,
    C: Tensor | None,
    mean: Tensor | None,
    G: Tensor | None,
    scale: float,
) -> float:
    """scale * tr(G E[y y^T]) with y = W x + bias."""
    product = weight @ C.double() if C is not None else weight
    second = product @ weight.T
    if site.bias is not None and mean is not None:
        bias = program.graph.get_parameter(site.bias).detach().double()
        cross = torch.outer(weight @ mean.double(), bias)
        second = second + cross + cross.T + torch.outer(bias, bias)
    if G is None:
        return float(scale * second.trace())
    return float(scale * ((G.double() * second.diagonal()).sum() if G.dim() == 1 else (G.double() * second).sum()))


# ── Without weights ──────────────────────────────────────────────────────────────────────────────────────────────

# How fast singular values of trained projections fall off, as sigma_i ~ i^-exponent. Queries and keys fall fastest;
# MLP projections are nearly flat. A rule of thumb for planning without weights, not a measurement.
PRIOR_EXPONENTS = {"query": 0.55, "key": 0.55, "q_proj": 0.55, "k_proj": 0.55}
PRIOR_EXPONENT = 0.35


def prior(sites: Sequence[Site]) -> Profile:
    """A spectral guess by role, for planning without weights: every site's output matters alike."""
    spectra = {}
    for site in sites:
        full = min(site.in_features, site.out_features)
        squares = np.arange(1, full + 1, dtype=np.float64) ** (-2 * PRIOR_EXPONENTS.get(site.role, PRIOR_EXPONENT))
        tail = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]]) / squares.sum()
        spectra[site.name] = Spectrum(tail[: min(site.break_even_rank, full) + 1], 1.0)
    return Profile("prior", spectra)


# ── Cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fingerprint(
    program: Program, batches: Sequence[Mapping[str, Tensor]], kind: str, seed: int, full_width: int
) -> str:
    tensors = chain(program.tree.named_parameters(), program.tree.named_buffers(), program.graph.named_buffers())
    weights = fingerprint_of_tensors(tensors)
    # With its constants, and with the graphs inside it: what is between weights.
    graphs = [str(module.graph) for module in program.graph.modules() if isinstance(module, fx.GraphModule)]
    code = hashlib.sha256("\n".join(graphs).encode()).hexdigest()
    data = fingerprint_of_tensors(
        (f"{i}.{name}", value) for i, batch in enumerate(batches) for name, value in batch.items()
    )
    settings = [CACHE_FORMAT, weights, code, data, kind, seed, full_width, DAMPING]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _store(cache: Path, key: str, result: Profile) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, spectrum in result.spectra.items():
        tensors |= _tensors_of(spectrum, name)
    for sharers, spectra in result.shared.items():
        for name, spectrum in spectra.items():
            tensors |= _tensors_of(spectrum, f"{name}|shared")
            if name != sharers[0]:  # one A is enough
                del tensors[f"{name}|shared|A"]
    facts = {"kind": result.kind, "unit": result.unit, "tokens": str(result.tokens), "seed": str(result.seed)}
    facts["shared"] = json.dumps([list(sharers) for sharers in result.shared])
    partial = cache / f"profile-{key}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(partial), metadata=facts)
        partial.replace(cache / f"profile-{key}.safetensors")
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise BadInput(disk_message(partial, error)) from error


def _tensors_of(spectrum: Spectrum, name: str) -> dict[str, Tensor]:
    assert spectrum.A is not None and spectrum.B is not None
    return {
        f"{name}|tail": torch.from_numpy(spectrum.tail.copy()),
        f"{name}|removal": torch.tensor([spectrum.removal], dtype=torch.float64),
        f"{name}|A": spectrum.A.contiguous(),
        f"{name}|B": spectrum.B.contiguous(),
    }


def _load(cache: Path, key: str) -> Profile | None:
    from safetensors import SafetensorError, safe_open

    path = cache / f"profile-{key}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = file.metadata()
            names = list(dict.fromkeys(entry.partition("|")[0] for entry in file.keys()))  # noqa: SIM118 - a file, no dict

            def read(name: str, A: Tensor) -> Spectrum:
                tail, removal, B = (file.get_tensor(f"{name}|{part}") for part in ("tail", "removal", "B"))
                return Spectrum(tail.numpy(), float(removal), A, B)

            spectra = {name: read(name, file.get_tensor(f"{name}|A")) for name in names}
            shared = {}
            for sharers in map(tuple, json.loads(facts["shared"])):
                A = file.get_tensor(f"{sharers[0]}|shared|A")
                shared[sharers] = {name: read(f"{name}|shared", A) for name in sharers}
    except SafetensorError as error:
        raise BadInput(f"the cached profile {path} is damaged ({error}); delete it to measure again") from error
    return Profile(facts["kind"], spectra, facts["unit"], int(facts["tokens"]), int(facts["seed"]), shared)
