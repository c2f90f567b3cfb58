"""Narrow: fewer inner channels in MLPs, before what is left is factored.

Low rank alone spends a small budget badly on an MLP: most of what a pair of rank r costs, r (n + m), is on the side
of its wide inner channels, and many of those hardly matter. A channel that goes takes a row of each weight that puts
it out and a column of the weight that reads it, and leaves its share of the budget to the ranks of all others.

With h the inner channels, H = E[h h^T] (about the mean where a bias can make up for it), W the weight that reads them
and G = E[g g^T] of its output gradients, dropping the channels R and refitting the others by least squares damages

    1/2 tr(G W_R (H^-1)_RR^-1 W_R^T)         W'_K  =  W_K - W_R (H^-1)_RR^-1 (H^-1)_RK

the two-sided measure of a profile under the optimal brain surgeon's update (Hassibi and Stork, 1993). Channels leave
one after the other, the least damage first. All MLPs share one price: of several, the one whose next block of
channels costs least, per weight that goes, gives it up.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from .errors import BadInput, InfeasibleBudget, listed
from .graph import SITE, Program, frozen_copy, projection_input, set_module
from .layers import DenseLinear
from .marginals import measure_marginals
from .passes.insert_branches import site_weight
from .problem import Problem
from .profiling import DAMPING, Profile, moments_of, profile
from .refitting import refit
from .replanning import apart
from .rewriting import starting_factors
from .rules import SiteRule
from .solver import solve
from .tracing import trace
from .values import Refusal, Site

# No MLP keeps less than this share of its channels: further down, removing the branch is the better word for it.
LEAST_KEPT = 0.25

aten = torch.ops.aten
# What may stand between the weights that put channels out and the one that reads them: each output element depends on
# the input elements at its own place alone.
ELEMENTWISE = {
    getattr(packet, name)
    for packets, names in (
        ("silu gelu relu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu selu celu mish", "default"),
        ("softplus silu_ relu_ hardswish_ hardtanh_ leaky_relu_ elu_ relu6 erf exp neg square clamp", "default"),
        ("clone alias detach contiguous dropout _to_copy", "default"),
        ("mul add sub div rsub", "Tensor Scalar"), ("pow", "Tensor_Scalar"), ("to type_as", "dtype default"),
    )
    for packet in (getattr(aten, word, None) for word in packets.split())
    for name in names.split()
    if packet is not None and hasattr(packet, name)
}  # fmt: skip
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class Inner:
    """The inner channels of one MLP.

    Attributes:
        producers: names of the sites whose outputs they are, in site order.
        consumer: name of the one site that reads them.
        width: how many there are.
        weights_each: weights that go with one channel.
    """

    producers: tuple[str, ...]
    consumer: str
    width: int
    weights_each: int


@dataclass(frozen=True)
class Ordering:
    """In which order the channels of one MLP would leave, and what that costs.

    Attributes:
        inner: whose channels.
        leaving: (channels,) indices, those that go first at the front; what is never to go is not in it.
        damages: (blocks,) what each block of `block` channels adds, in the profile's unit.
        block: channels that leave at once.
        moment: (width, width) H, about the mean where the site that reads the channels has a bias.
        mean: (width,) of the channels there, else None.
    """

    inner: Inner
    leaving: Tensor
    damages: np.ndarray
    block: int
    moment: Tensor
    mean: Tensor | None = None

    def damage(self, width: int) -> float:
        """Of keeping this many channels."""
        return float(self.damages[: self.blocks_gone(width)].sum())

    def blocks_gone(self, width: int) -> int:
        """Blocks that have left when this many channels are kept."""
        return (self.inner.width - width) // self.block

    def kept(self, width: int) -> Tensor:
        """(width,) indices of the channels that stay, in ascending order."""
        stays = torch.ones(self.inner.width, dtype=torch.bool)
        stays[self.leaving[: self.inner.width - width]] = False
        return stays.nonzero().flatten()


# ── Which channels are inner ones ────────────────────────────────────────────────────────────────────────────────


def inner_channels(program: Program, rules: Mapping[str, SiteRule]) -> tuple[list[Inner], list[Refusal]]:
    """Every set of channels that can be narrowed, and why the others cannot.

    Args:
        program: as traced.
        rules: of every site, by name; a site that has to stay dense, or is excluded, keeps its shape.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and SITE in node.meta:
            calls.setdefault(node.meta[SITE], []).append(node)
    found: list[Inner] = []
    refusals: list[Refusal] = []
    taken: set[str] = set()
    for site in program.sites:
        if site.kind == "head":
            continue
        inner = _inner_of(program, site, calls, rules)
        if isinstance(inner, Inner):
            both = [name for name in (*inner.producers, inner.consumer) if name in taken]
            if both:
                inner = f"keeps its inner channels: {both[0]} loses channels on its other side already"
        if isinstance(inner, Inner):
            found.append(inner)
            taken |= {*inner.producers, inner.consumer}
        elif inner is not None:
            refusals.append(Refusal(site.name, inner))
    return found, refusals


def _inner_of(
    program: Program, consumer: Site, calls: Mapping[str, list[fx.Node]], rules: Mapping[str, SiteRule]
) -> Inner | str | None:
    """The channels that this site reads, a reason why they stay, or None where they are no inner channels at all."""
    if len(calls.get(consumer.name, ())) != 1:
        return None
    (product,) = calls[consumer.name]
    width = consumer.in_features
    members, producers, open_ends = set(), [], [projection_input(product)]
    while open_ends:
        node = open_ends.pop()
        if node in members:
            continue
        if _width(node) != width:
            return None
        members.add(node)
        if node.op == "call_function" and SITE in node.meta:
            producers.append(node.meta[SITE])
        elif node.op == "call_function" and (node.target in ELEMENTWISE or node.target in VIEWS):
            tensors = [operand for operand in node.all_input_nodes if _width(operand) is not None]
            open_ends += tensors if node.target in ELEMENTWISE else tensors[:1]
        elif producers:
            return f"keeps its inner channels: {node.target} is not known to work on each of them alone"
        else:
            return None
    outside = [user for node in members for user in node.users if user not in members and user is not product]
    if outside:
        return f"its inputs are also read by {outside[0].name}, so they are no inner channels"
    sites = [site for site in program.sites if site.name in producers]
    if program.tree_is_graph:
        return "keeps its inner channels: weights without a module of their own make the graph the model"
    for site in (*sites, consumer):
        if reason := _reason_to_keep(site, calls, rules):
            return f"keeps its inner channels: {site.name} {reason}"
    weights_each = consumer.out_features + sum(site.in_features for site in sites)
    return Inner(tuple(site.name for site in sites), consumer.name, width, weights_each)


def _width(node: fx.Node) -> int | None:
    """The size of the last axis of what a node gives, None for what is no tensor."""
    shape = getattr(node.meta.get("val"), "shape", None)
    return int(shape[-1]) if shape is not None and len(shape) and isinstance(shape[-1], int) else None


def _reason_to_keep(site: Site, calls: Mapping[str, list[fx.Node]], rules: Mapping[str, SiteRule]) -> str | None:
    rule = rules[site.name]
    if rule.mode != "auto":
        return f"has the rule {rule.source!r}" if rule.source else f"is {rule.mode}"
    if site.tied:
        return "is tied to another weight"
    if len(calls[site.name]) != 1:
        return f"is called {len(calls[site.name])} times"
    return None


# ── In which order they leave ────────────────────────────────────────────────────────────────────────────────────


def order_channels(
    program: Program,
    inners: Sequence[Inner],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    block: int = 8,
    seed: int = 0,
) -> list[Ordering]:
    """Measure what every channel is worth, in one pass over the calibration data.

    Args:
        program: as traced, with real weights.
        batches: inputs by name, as for `profile`.
        block: channels that leave at once; widths stay multiples of it where they were.
    """
    of_consumer = {inner.consumer: inner for inner in inners}
    sites = [site for site in program.sites if site.name in of_consumer]
    found: dict[str, Ordering] = {}
    for block_of_sites, moments, _ in moments_of(program, sites, batches, seed=seed):
        for site in (site for group in block_of_sites for site in group):
            H, mean = moments.input_moment(site)
            G = moments.gradient_moment(site)
            if H is None or mean is None:
                raise BadInput(f"{site.name}: no calibration batch reaches it; give other data, or leave narrow out")
            H, mean = H.double().cpu(), None if site.bias is None else mean.double().cpu()
            if mean is not None:  # the bias makes up for the mean of what goes
                H -= torch.outer(mean, mean)
            weight = site_weight(program, site).double().cpu()
            found[site.name] = _ordered(
                of_consumer[site.name], weight, H, mean, None if G is None else G.double().cpu(), block
            )
    return [found[inner.consumer] for inner in inners]


def _ordered(inner: Inner, weight: Tensor, H: Tensor, mean: Tensor | None, G: Tensor | None, block: int) -> Ordering:
    """Take channel after channel away, keeping the weights of the others and the inverse of H up to date.

    A block is as many channels as leave before the large update, that of the inverse, is made up for; each channel of
    it is chosen knowing the others, so that of two that are alike one stays.
    """
    W, inverse = weight.clone(), torch.linalg.inv(_damped(H))
    diagonal = inverse.diagonal().clone()
    gone = torch.zeros(inner.width, dtype=torch.bool)
    leaving, damages = [], []
    for _ in range(int((1 - LEAST_KEPT) * inner.width) // block):
        felt = (_weighed(G, W) * W).sum(0)  # w_j^T G w_j of each channel
        columns: list[Tensor] = []  # of the inverse, each over the root of its pivot
        total = 0.0
        for _ in range(block):
            channel = int((felt / diagonal.clamp_min(1e-300)).masked_fill(gone, float("inf")).argmin())
            column = inverse[:, channel] - sum((one * one[channel] for one in columns), torch.zeros(()))
            share = column / column[channel]  # of this channel that each other one takes over
            total += 0.5 * float(felt[channel] / column[channel])
            lost = W[:, channel].clone()
            felt += share.square() * felt[channel] - 2 * share * (_weighed(G, lost[:, None])[:, 0] @ W)
            W -= torch.outer(lost, share)
            columns.append(column / column[channel].sqrt())
            diagonal -= columns[-1].square()
            gone[channel] = True
            leaving.append(channel)
        taken = torch.stack(columns, dim=1)
        inverse.addmm_(taken, taken.T, alpha=-1)
        damages.append(max(total, 0.0))
    return Ordering(inner, torch.tensor(leaving, dtype=torch.long), np.array(damages), block, H.float(), mean)


def _weighed(G: Tensor | None, W: Tensor) -> Tensor:
    """G W, G being a matrix, a diagonal, or nothing where no output depends on the site."""
    if G is None:
        return torch.zeros_like(W)
    return G[:, None] * W if G.dim() == 1 else G @ W


def _damped(H: Tensor) -> Tensor:
    return H + (DAMPING * H.diagonal().mean() + 1e-30) * torch.eye(len(H), dtype=H.dtype, device=H.device)


# ── How many stay ────────────────────────────────────────────────────────────────────────────────────────────────


def widths_at(orderings: Sequence[Ordering], share: float) -> dict[str, int]:
    """Consumer -> channels kept, such that this share of all their weights stays, as nearly as blocks allow.

    Args:
        share: above 0, at most 1. MLPs that have given up all they may stop there, so more may stay.
    """
    to_go = (1 - share) * sum(ordering.inner.width * ordering.inner.weights_each for ordering in orderings)
    widths = {ordering.inner.consumer: ordering.inner.width for ordering in orderings}
    # One block too cheap for where it stands must not hide behind a dear one: prices never fall along an ordering.
    prices = [
        np.maximum.accumulate(ordering.damages) / (ordering.inner.weights_each * ordering.block)
        for ordering in orderings
    ]
    queue = [(float(price[0]), index, 0) for index, price in enumerate(prices) if len(price)]
    heapq.heapify(queue)
    while queue:
        _, index, block = heapq.heappop(queue)
        inner, size = orderings[index].inner, orderings[index].block
        if to_go < 0.5 * size * inner.weights_each:
            break
        to_go -= size * inner.weights_each
        widths[inner.consumer] -= size
        if block + 1 < len(prices[index]):
            heapq.heappush(queue, (float(prices[index][block + 1]), index, block + 1))
    return widths


def narrowed_alike(
    sites: Sequence[Site], inners: Sequence[Inner], share: float, multiple: int = 8
) -> tuple[Site, ...]:
    """The sites in the shapes they have where every MLP keeps this share of its inner channels, in multiples."""
    changed = {site.name: site for site in sites}
    for inner in inners:
        width = max(multiple, round(share * inner.width / multiple) * multiple)
        for name in (*inner.producers, inner.consumer):
            site = changed[name]
            shape = (site.out_features, width) if name == inner.consumer else (width, site.in_features)
            changed[name] = replace(
                site, out_features=shape[0], in_features=shape[1],
                narrowed_from=(site.whole.out_features, site.whole.in_features),
            )  # fmt: skip
    return tuple(changed[site.name] for site in sites)


def narrow(program: Program, orderings: Sequence[Ordering], widths: Mapping[str, int]) -> Program:
    """The program with so many inner channels left in each MLP, the weights that read them refitted.

    This is no pass over the graph: every shape between the weights changes, so the narrower tree is traced anew.

    Args:
        program: that the orderings were measured on.
        widths: consumer -> channels kept; those it does not name keep all.

    Returns:
        A new program, or the given one where nothing goes; its sites know the shapes they had.

    Raises:
        BadInput: a width that is not there, or a model that does not run with other widths.
    """
    tree = frozen_copy(program.tree)
    changing = [one for one in orderings if widths.get(one.inner.consumer, one.inner.width) != one.inner.width]
    if not changing:
        return program
    for ordering in changing:
        inner, width = ordering.inner, widths[ordering.inner.consumer]
        least = inner.width - len(ordering.leaving)
        if not least <= width < inner.width:
            raise BadInput(f"{inner.consumer}: {width} of {inner.width} channels asked for; keep {least} at least")
        kept = ordering.kept(width)
        for site in map(program.site, inner.producers):
            weight, bias = site_weight(program, site), _bias(program, site)
            set_module(tree, site.name, _frozen(weight[kept], None if bias is None else bias[kept]))
        set_module(tree, inner.consumer, _refitted(program, ordering, kept))
    try:
        traced = trace(tree, tuple(program.inputs.values()) if program.positional else dict(program.inputs))
    except (BadInput, RuntimeError) as error:  # a forward that has the width written into it
        raise BadInput(
            f"{type(program.tree).__name__} does not run with narrower MLPs ({str(error).splitlines()[0]}); leave "
            f"narrow out, or keep them as they are by a rule"
        ) from error
    shapes = {site.name: (site.out_features, site.in_features) for site in program.sites}
    if strange := shapes.keys() ^ {site.name for site in traced.sites}:
        raise BadInput(
            f"{type(program.tree).__name__} shows other weights once its MLPs are narrower "
            f"({listed(sorted(strange))}); leave narrow out"
        )
    sites = tuple(
        site
        if shapes[site.name] == (site.out_features, site.in_features)
        else replace(site, narrowed_from=shapes[site.name])
        for site in traced.sites
    )
    return replace(traced, sites=sites)


def _bias(program: Program, site: Site) -> Tensor | None:
    return None if site.bias is None else program.graph.get_parameter(site.bias).detach()


def _frozen(weight: Tensor, bias: Tensor | None) -> DenseLinear:
    return DenseLinear(weight.contiguous(), bias).requires_grad_(False).eval()


def _refitted(program: Program, ordering: Ordering, kept: Tensor) -> DenseLinear:
    """What reads the channels left: nearest to the output before, on average over the calibration data."""
    site = program.site(ordering.inner.consumer)
    stored = site_weight(program, site)
    weight, H = stored.double().cpu(), _damped(ordering.moment.double())
    refitted = torch.linalg.solve(H[kept][:, kept], H[kept] @ weight.T).T
    bias = _bias(program, site)
    if bias is not None and ordering.mean is not None:
        moved = weight @ ordering.mean - refitted @ ordering.mean[kept]
        bias = (bias.double().cpu() + moved).to(bias)
    return _frozen(refitted.to(stored), bias)


# ── How many are best ────────────────────────────────────────────────────────────────────────────────────────────

Build = Callable[[Program, Profile], Problem]


@dataclass(frozen=True)
class Narrowed:
    """A program of some width, and its profile, in which what its MLPs have lost counts as damage.

    Attributes:
        share: of the inner channels' weights that stays.
    """

    share: float
    program: Program = field(repr=False)
    profile: Profile = field(repr=False)


@dataclass(frozen=True)
class Tried:
    """What the best plan at a width damages before training, measured; infinite where the budget has no plan."""

    share: float
    damage: float

    def __str__(self) -> str:
        return f"{self.damage:.4g} at {self.share:.2f}" if math.isfinite(self.damage) else f"none at {self.share:.2f}"


def narrowed(
    program: Program,
    profiled: Profile,
    batches: Sequence[Mapping[str, Tensor]],
    orderings: Sequence[Ordering],
    widths: Mapping[str, int],
    cache: Path | None = None,
) -> tuple[Program, Profile]:
    """A program narrowed to these widths, and its profile.

    Args:
        program, profiled: of the teacher, at full width.
        cache: folder for the profile.
    """
    narrower = narrow(program, orderings, widths)
    measured = profile(narrower, batches, kind=profiled.kind, seed=profiled.seed, cache=cache)
    lost = {one.inner.consumer: one.damage(widths.get(one.inner.consumer, one.inner.width)) for one in orderings}
    return narrower, measured.with_lost(lost)


def best_width(
    program: Program,
    profiled: Profile,
    batches: Sequence[Mapping[str, Tensor]],
    build: Build,
    orderings: Sequence[Ordering],
    shares: Sequence[float],
    refits: bool = True,
    cache: Path | None = None,
) -> tuple[Narrowed, list[Tried]]:
    """Of the widths offered, the one whose plan damages least, and what was found at each.

    Args:
        program, profiled: of the teacher, at full width.
        build: the problem of a program and its profile.
        shares: to try after the full width, from wide to narrow; where the damage rises, the rest is left out.
        refits: measure each plan with refitted factors.
        cache: folder for the profiles.

    Raises:
        InfeasibleBudget: no width has a plan for the budget; of the narrowest.
    """
    best = Narrowed(1.0, program, profiled)
    tried: list[Tried] = []
    for share in (1.0, *shares):
        here = best
        if share < 1.0:
            widths = widths_at(orderings, share)
            here = Narrowed(share, *narrowed(program, profiled, batches, orderings, widths, cache))
        try:
            damage = _damage(program, here, batches, build, refits)
        except InfeasibleBudget:
            if share == min(1.0, *shares):
                raise
            damage = math.inf
        least = min((one.damage for one in tried), default=math.inf)
        tried.append(Tried(share, damage))
        if damage < least:
            best = here
        elif math.isfinite(damage):
            break
    return best, tried


def _damage(
    teacher: Program, tried: Narrowed, batches: Sequence[Mapping[str, Tensor]], build: Build, refits: bool
) -> float:
    program, profiled = tried.program, tried.profile
    forms = solve(build(program, profiled)).forms
    fitting, measuring = apart(batches)
    factors = starting_factors(program.sites, forms, profiled)
    if refits:
        factors = refit(program, forms, factors, fitting)
    return measure_marginals(program, forms, profiled, factors, measuring, teacher).damage
