"""Profile: what each form of each site would cost in quality, from one pass over calibration data.

For a site with input second moment C = E[x x^T] and output-gradient second moment G = E[g g^T],
half of tr(G (W - W') C (W - W')^T) estimates the rise of KL(teacher, student). The best W' of rank r is the
truncated SVD of G^1/2 W C^1/2, and half the sum of its dropped squared singular values is the damage: nats per
token, comparable across sites. `whitened` sets G = I (SVD-LLM's closed form), `plain` sets both to I.

g is the gradient of the SUM over tokens of -log p(token drawn from the model itself); C and G are means over
unmasked tokens. Models without logits have no such loss (the gradient of a distance to themselves is zero), so a
standard-normal probe of the output stands in: the damage is then half the squared output distance per output row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .errors import BadInput, did_you_mean
from .folders import disk_message
from .graph import Program, main_output, watched_by
from .values import Dense, Factored, Form, Removed, Site

Kind = Literal["two-sided", "whitened", "plain", "prior"]

DAMPING = 1e-4  # share of the mean eigenvalue added to every eigenvalue, so that near-singular moments invert


@dataclass(frozen=True)
class Spectrum:
    """One site's damage at every rank, and the factors that reach it.

    Attributes:
        tail: (k + 1,) damage at rank 0, 1, ... k, where k is the largest rank worth having.
        removal: damage of dropping the output altogether, its bias included.
        A: (k, in_features) rows ordered by importance, or None for a prior.
        B: (out_features, k); the best factors of rank r are `A[:r]` and `B[:, :r]`.
    """

    tail: np.ndarray
    removal: float
    A: Tensor | None = None
    B: Tensor | None = None


@dataclass(frozen=True)
class Profile:
    """A damage model: `damage(site, form)` in the unit that `unit` names.

    Attributes:
        kind: how the damage was measured; `prior` means it was not.
        spectra: site name -> spectrum.
        unit: `nats per token` (two-sided, with logits), `output distance`, `squared error` or `none`.
        tokens: unmasked tokens it was measured on.
        seed: of the sampled tokens.
    """

    kind: Kind
    spectra: Mapping[str, Spectrum] = field(repr=False)
    unit: str = "none"
    tokens: int = 0
    seed: int = 0

    def damage(self, site: Site, form: Form) -> float:
        """Predicted damage of one site in one form, all other sites dense."""
        spectrum = self.spectra[site.name]
        match form:
            case Dense():
                return 0.0
            case Factored(rank):
                return float(spectrum.tail[min(rank, len(spectrum.tail) - 1)])
            case Removed():
                return spectrum.removal
        raise AssertionError(form)

    def scaled(self, factors: Mapping[str, float]) -> Profile:
        """The same factors with each named site's damages multiplied."""
        spectra = {
            name: replace(spectrum, tail=spectrum.tail * factor, removal=spectrum.removal * factor)
            for name, spectrum in self.spectra.items()
            for factor in (factors.get(name, 1.0),)
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
        left, right = torch.linalg.qr(spectrum.B[:, :rank].double()), torch.linalg.qr(spectrum.A[:rank].double().T)
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
    if kind not in get_args(Kind):
        raise BadInput(
            f"damage is measured by {', '.join(get_args(Kind))}, got {kind!r}{did_you_mean(kind, get_args(Kind))}"
        )
    check_weights(program)
    if kind == "prior":
        return prior(program.sites)
    key = _fingerprint(program, batches, kind, seed, full_width)
    if cache is not None and (stored := _load(cache, key)) is not None:
        return stored
    measured = kind != "plain"
    if measured and not batches:
        raise BadInput(
            f"a {kind} profile needs calibration data, and got 0 batches; pass calibration=... or use 'plain'"
        )
    spectra: dict[str, Spectrum] = {}
    tokens = 0
    unit = "squared error"
    for block in _blocks(program.sites, memory_bytes, full_width):
        moments = _Moments(block, full_width, with_gradients=kind == "two-sided")
        if measured:
            unit, tokens = _accumulate(program, batches, moments, seed)
        spectra |= {site.name: _spectrum(program, site, moments, kind) for site in block}
    unit = unit if kind == "two-sided" else "squared error"
    result = Profile(kind, {site.name: spectra[site.name] for site in program.sites}, unit, tokens, seed)
    if cache is not None:
        _store(cache, key, result)
    return result


def check_weights(program: Program) -> None:
    """Raise BadInput naming every parameter that holds a NaN or an infinity."""
    broken = [name for name, p in program.tree.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if broken:
        raise BadInput(
            f"{len(broken)} parameters hold NaN or infinite values: {', '.join(broken[:5])}; repair the model"
        )


def _blocks(sites: Sequence[Site], memory_bytes: int, full_width: int) -> Iterable[list[Site]]:
    """Consecutive sites whose moments fit under the cap together. A single site may exceed it; then it goes alone."""
    block: list[Site] = []
    held = 0
    for site in sites:
        need = 4 * (site.in_features**2 + _gradient_entries(site, full_width))
        if block and held + need > memory_bytes:
            yield block
            block, held = [], 0
        block.append(site)
        held += need
    if block:
        yield block


def _gradient_entries(site: Site, full_width: int) -> int:
    return site.out_features if _diagonal(site, full_width) else site.out_features**2


def _diagonal(site: Site, full_width: int) -> bool:
    return site.kind == "head" or site.out_features > full_width


class _Moments:
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
    """The unmasked rows of a value; every row of one that has no row per token (a pooled output)."""
    rows = value.reshape(-1, value.shape[-1])
    if keep is None or keep.numel() != rows.shape[0]:
        return rows
    return rows[keep.reshape(-1)]


class _Observer(nn.Module):
    """Stands after a projection in a copy of the graph; hands its input and its output's gradient to the moments."""

    def __init__(self, name: str, moments: _Moments, state: dict[str, Tensor | None]) -> None:
        super().__init__()
        self.name, self.moments, self.state = name, moments, state

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        keep = self.state["keep"]
        self.moments.add_input(self.name, x, keep)
        if not self.moments.with_gradients:
            return y
        if not y.requires_grad:
            y = y.detach().requires_grad_()
        y.register_hook(lambda g: self.moments.add_gradient(self.name, g, keep))
        return y


def _accumulate(
    program: Program, batches: Sequence[Mapping[str, Tensor]], moments: _Moments, seed: int
) -> tuple[str, int]:
    """Run every batch forward (and backward, where gradients are asked for); returns the unit and the token count."""
    state: dict[str, Tensor | None] = {"keep": None}
    watched = watched_by(program, {name: _Observer(name, moments, state) for name in moments.sites})
    unit = "squared error"
    device = next(program.tree.parameters()).device
    for index, given in enumerate(batches):
        batch = {name: value.to(device) for name, value in given.items()}
        mask = batch.get("attention_mask")
        state["keep"] = None if mask is None or mask.dim() != 2 else mask.bool()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        with torch.set_grad_enabled(moments.with_gradients):
            output = watched.call_graph(batch)
            loss, unit, rows = _sampled_loss(output, state["keep"], generator)
            moments.output_rows += rows
            if moments.with_gradients:
                torch.autograd.backward(loss)
    return unit, moments.output_rows


def _sampled_loss(output: Any, keep: Tensor | None, generator: torch.Generator) -> tuple[Tensor, str, int]:
    """The loss whose gradient's second moment is the curvature: its unit, and the rows it sums over."""
    rows = kept_rows(main_output(output), keep).float()
    if hasattr(output, "logits") and rows.shape[-1] > 1:
        log_p = torch.log_softmax(rows, dim=-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(rows.device)
        return -log_p.gather(1, drawn).sum(), "nats per token", rows.shape[0]
    outputs = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    loss = sum(
        (
            (
                kept_rows(leaf, keep).float()
                * torch.randn(kept_rows(leaf, keep).shape, generator=generator).to(leaf.device)
            ).sum()
        )
        for leaf in outputs
        if leaf.is_floating_point()
    )
    assert isinstance(loss, Tensor)
    return loss, "output distance", rows.shape[0]


# ── From moments to spectra ──────────────────────────────────────────────────────────────────────────────────────


def _spectrum(program: Program, site: Site, moments: _Moments, kind: Kind) -> Spectrum:
    weight = program.graph.get_parameter(site.weight).detach().double()
    weight = weight.T if site.transposed else weight
    C, mean = moments.input_moment(site)
    G = moments.gradient_moment(site)
    rows_per_output = 1.0
    if C is not None and moments.output_rows:
        rows_per_output = moments.rows[site.group] / moments.output_rows  # all calls of the weight together
    root_c, inverse_c = square_roots(C, site.in_features)
    root_g, inverse_g = square_roots(G, site.out_features)
    scaled = _left(root_g, weight) @ root_c if root_c is not None else _left(root_g, weight)
    U, S, Vt = torch.linalg.svd(scaled, full_matrices=False)
    keep = min(site.break_even_rank, len(S))
    squares = S.square().numpy()
    # G sums over the gradient's rows and divides by output rows, so it already holds rows_per_output; the whitened
    # measure has no G and needs it said.
    scale = 0.5 if kind == "two-sided" else 0.5 * rows_per_output
    if kind == "two-sided" and G is None:
        scale = 0.0  # no gradient reaches it: nothing the model returns depends on this site
    tail = scale * np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])[: keep + 1]
    A = Vt[:keep] @ inverse_c if inverse_c is not None else Vt[:keep]
    B = _left(inverse_g, U[:, :keep] * S[:keep])
    return Spectrum(tail, _removal_damage(program, site, weight, C, mean, G, scale), A.float(), B.float())


def square_roots(moment: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None]:
    """M^1/2 and M^-1/2 of a damped moment, by eigendecomposition; (size,) vectors for a diagonal; Nones for identity.

    Cholesky is not used: a moment from few tokens, or of an input with dead channels, is singular.
    """
    if moment is None:
        return None, None
    moment = moment.double()
    level = float(moment.mean() if moment.dim() == 1 else moment.diagonal().mean())
    if not level > 0.0:
        return None, None  # the site never saw data or never mattered: nothing to weigh by
    if moment.dim() == 1:
        root = (moment + DAMPING * level).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    roots = (values.clamp_min(0.0) + DAMPING * level).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


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


def fingerprint_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.device.type != "meta":
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(
    program: Program, batches: Sequence[Mapping[str, Tensor]], kind: str, seed: int, full_width: int
) -> str:
    weights = fingerprint_tensors(program.tree.named_parameters())
    data = fingerprint_tensors(
        (f"{i}.{name}", value) for i, batch in enumerate(batches) for name, value in batch.items()
    )
    return hashlib.sha256(json.dumps([weights, data, kind, seed, full_width, DAMPING]).encode()).hexdigest()[:32]


def _store(cache: Path, key: str, result: Profile) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, spectrum in result.spectra.items():
        assert spectrum.A is not None and spectrum.B is not None
        tensors |= {
            f"{name}|tail": torch.from_numpy(spectrum.tail.copy()),
            f"{name}|removal": torch.tensor([spectrum.removal], dtype=torch.float64),
            f"{name}|A": spectrum.A.contiguous(),
            f"{name}|B": spectrum.B.contiguous(),
        }
    facts = {"kind": result.kind, "unit": result.unit, "tokens": str(result.tokens), "seed": str(result.seed)}
    partial = cache / f"profile-{key}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(partial), metadata=facts)
        partial.replace(cache / f"profile-{key}.safetensors")
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise BadInput(disk_message(partial, error)) from error


def _load(cache: Path, key: str) -> Profile | None:
    from safetensors import SafetensorError, safe_open

    path = cache / f"profile-{key}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = file.metadata()
            names = list(dict.fromkeys(entry.rpartition("|")[0] for entry in file.keys()))  # noqa: SIM118 - a file, no dict
            spectra = {
                name: Spectrum(
                    file.get_tensor(f"{name}|tail").numpy(),
                    float(file.get_tensor(f"{name}|removal")),
                    file.get_tensor(f"{name}|A"),
                    file.get_tensor(f"{name}|B"),
                )
                for name in names
            }
    except SafetensorError as error:
        raise BadInput(f"the cached profile {path} is damaged ({error}); delete it to measure again") from error
    return Profile(facts["kind"], spectra, facts["unit"], int(facts["tokens"]), int(facts["seed"]))
