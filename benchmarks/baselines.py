"""What a plan is compared with: the usual ways to spend the same budget, each one function.

A budget is the share of the projections' multiply-adds to keep, which for projections is also the share of their
parameters; embeddings and the output head are not counted and never train. Each function takes the teacher, a
Llama-like causal language model in float32, leaves it untouched, and returns a `Start`:

    plain_svd_uniform           truncated SVD of the weights, every site at the same share             not trained
    whitened_svd_uniform        the same ranks, SVD after input whitening (SVD-LLM)                    not trained
    whitened_lora_recovery      those factors frozen, adapters beside each (SVD-LLM's second stage)    trained
    uniform_rank_distillation   those factors trained themselves                                       trained
    depth_pruning               whole blocks dropped                                                   trained
    width_pruning               channels of MLPs and key/value groups of attentions dropped            trained
    lora_distillation           nothing dropped, adapters beside the frozen projections                trained
    dense_control               nothing dropped, the projections trained themselves                    trained

In all trained rows norm weights (and biases) train too, as they do in a student of the compiler, so that rows differ
in what happens at the projections and in nothing else. The last two start as the teacher itself. With a loss that is
only the distance to the teacher they have nothing to learn, and the optimizer would turn the rounding errors of a
gradient of zero into steps: they say something only where the loss also looks at the text (`label_weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blora_compiler.budget import Budget
from blora_compiler.data import BatchSource
from blora_compiler.distillation import DistillConfig, distill
from blora_compiler.errors import BadInput
from blora_compiler.graph import Program, frozen_copy, set_module
from blora_compiler.layers import DenseLinear, FactoredLinear
from blora_compiler.losses import head_kl
from blora_compiler.profiling import Profile
from blora_compiler.values import Site

# Ranks and widths are multiples of this, as the compiler's are.
MULTIPLE = 8

KLToTeacher = Callable[[nn.Module], float]


@dataclass(frozen=True, eq=False)
class Start:
    """A baseline before its training.

    Attributes:
        tree: the model to train, or to evaluate as it is. What trains is private; all else is frozen and shares the
            teacher's memory.
        finish: the (trained) tree in its final form, which computes the same. The tree stays as it is; the result
            may share its tensors.
        fraction: share of the projections' cost that the final form keeps, counted on it.
        note: what was decided, in one line.
        stages: called with the tree before each of so many equal parts of the training, to say what trains in it;
            empty where everything trains all the time.
    """

    tree: nn.Module
    finish: Callable[[nn.Module], nn.Module]
    fraction: float
    note: str
    stages: tuple[Callable[[nn.Module], None], ...] = ()


def train(start: Start, teacher: nn.Module, batches: BatchSource, config: DistillConfig, **options: Any) -> nn.Module:
    """Distil a baseline and bring it into its final form.

    A baseline with stages takes an equal part of `config.steps` in each, every part with its own optimizer and
    learning-rate schedule; the batches are the ones that a single run would see, in the same order.

    Args:
        options: further arguments of `distill`. A folder holds one run, so it fits baselines without stages only.

    Raises:
        BadInput: fewer steps than stages.
    """
    if not start.stages:
        distill(start.tree, teacher, batches, config, **options)
        return start.finish(start.tree)
    parts = len(start.stages)
    bounds = pairwise(config.steps * part // parts for part in range(parts + 1))
    for choose, (first, last) in zip(start.stages, bounds, strict=True):
        choose(start.tree)
        distill(start.tree, teacher, Later(batches, first), replace(config, steps=last - first), **options)
    return start.finish(start.tree)


@dataclass(frozen=True, eq=False)
class Later:
    """The batches from step `first` on."""

    batches: BatchSource
    first: int

    def batch(self, step: int) -> Tensor | dict[str, Tensor]:
        return self.batches.batch(self.first + step)

    def fingerprint(self) -> str:
        return f"{self.batches.fingerprint()}/from {self.first}"


# ── Low rank everywhere ──────────────────────────────────────────────────────────────────────────────────────────


def plain_svd_uniform(teacher: nn.Module, program: Program, profile: Profile, budget: float) -> Start:
    """Every projection replaced by the truncated SVD of its weight, each at the same share of its cost.

    The closest pair to W in the Frobenius norm (Eckart and Young, 1936). Nothing trains. Ranks: `uniform_ranks`.

    Args:
        program: of `trace(teacher)`.
        profile: of kind `plain`.
        budget: the share to keep.

    Raises:
        BadInput: a profile of another kind, or a budget that the smallest ranks exceed.
    """
    return _factored(teacher, program, profile, budget, kind="plain", trains=False)


def whitened_svd_uniform(teacher: nn.Module, program: Program, profile: Profile, budget: float) -> Start:
    """As `plain_svd_uniform`, but the pair closest in the outputs on calibration data.

    With C = E[x x^T] of the inputs x of a site, the truncated SVD of W C^1/2, times C^-1/2: SVD-LLM's closed form
    (Wang et al., ICLR 2025, arXiv 2403.07378), with the symmetric root where they take a Cholesky factor, which
    gives the same product. All sites see the inputs that the dense model has. Nothing trains.

    Args:
        profile: of kind `whitened`.
    """
    return _factored(teacher, program, profile, budget, kind="whitened", trains=False)


def uniform_rank_distillation(teacher: nn.Module, program: Program, profile: Profile, budget: float) -> Start:
    """As `whitened_svd_uniform`; the factors, norms and biases train."""
    return _factored(teacher, program, profile, budget, kind="whitened", trains=True)


def whitened_lora_recovery(
    teacher: nn.Module, program: Program, profile: Profile, budget: float, *, rank: int = 8, seed: int = 0
) -> Start:
    """As `whitened_svd_uniform`, then both factors of every site stay frozen and learn through low-rank adapters.

    SVD-LLM's second stage ("sequential low-rank approximation"): first the adapters of the factors next to the
    output (B of `y = B A x`) train, then those of the factors next to the input (A), each for half of the steps;
    that is what `train` does. A plain `distill` of the tree trains both at once. Rank 8 is theirs. Ours are: the
    scale (alpha = rank, hence 1, where their code has alpha = 16; with Adam this moves the best learning rate and
    little else), no dropout, that norms and biases train in both halves, and the loss, which is whatever all rows
    are trained with in place of instruction data. Adapters start at zero and are merged at the end, so they add
    nothing to the cost.

    Args:
        profile: of kind `whitened`.
        rank: of every adapter.
        seed: of the adapters' first factors.
    """
    plain = _factored(teacher, program, profile, budget, kind="whitened", trains=False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in projections(plain.tree).items():
        assert isinstance(module, FactoredLinear)
        set_module(plain.tree, name, AdaptedFactors(module, rank, generator))
    train_vectors(plain.tree)
    stages = (lambda tree: _train_adapters_of(tree, "B"), lambda tree: _train_adapters_of(tree, "A"))
    note = f"{plain.note}; both factors frozen, adapters of rank {rank} beside each, B's first, then A's"
    return _start(plain.tree, teacher, _merged, note, stages)


def _train_adapters_of(tree: nn.Module, factor: Literal["A", "B"]) -> None:
    for module in tree.modules():
        if isinstance(module, AdaptedFactors):
            for name, adapted in (("A", module.A), ("B", module.B)):
                adapted.down.requires_grad_(name == factor)
                adapted.up.requires_grad_(name == factor)


def _factored(
    teacher: nn.Module, program: Program, profile: Profile, budget: float, *, kind: str, trains: bool
) -> Start:
    """Every projection as the two factors that the profile has for its uniform rank."""
    if profile.kind != kind:
        raise BadInput(
            f"the profile is of kind {profile.kind!r}, this baseline needs {kind!r}; profile with kind={kind!r}"
        )
    tree = frozen_copy(teacher)
    sites = [program.site(name) for name in projections(tree)]
    ranks = uniform_ranks(sites, budget)
    for site in sites:
        A, B = profile.starting_factors(site, ranks[site.name])
        bias = projections(tree)[site.name].bias
        factored = FactoredLinear(A.contiguous(), B.contiguous(), bias)
        set_module(tree, site.name, factored.requires_grad_(trains))
    if trains:
        train_vectors(tree)
    return _start(tree, teacher, _as_it_is, f"{kind} SVD, {_listed_ranks(ranks)}")


def uniform_ranks(sites: Sequence[Site], budget: float, multiple: int = MULTIPLE) -> dict[str, int]:
    """Ranks by name, such that every site keeps the same share of its cost, as nearly as multiples allow.

    A site of m x n keeps `r (m + n) / (m n)` of its cost at rank r, which is the share of its break-even rank. From
    the smallest multiple on, the site that keeps the smallest share (of several, the first) gets the next multiple,
    while the total stays within the budget and the rank below break-even; a site that can have no more stays as it
    is, and the others go on. So all ranks are rounded down, then up again from the smallest share on, and in the end
    small sites take what is too little for a large one: what is left over is less than one multiple costs at any
    site (that is not held by its break-even).

    Raises:
        BadInput: a budget below what the smallest multiple costs everywhere.
    """
    dense = sum(site.weight_count for site in sites)
    limit = Budget.parse(budget).limit(dense)
    ranks = {site.name: multiple for site in sites}
    spent = sum(multiple * (site.in_features + site.out_features) for site in sites)
    if spent > limit:
        raise BadInput(
            f"rank {multiple} at every site keeps {spent / dense:.4f} of the cost, the budget is {budget}; "
            f"raise the budget"
        )

    def share(site: Site) -> Fraction:
        return Fraction(ranks[site.name] * (site.in_features + site.out_features), site.weight_count)

    may_rise = list(sites)
    while may_rise:
        site = min(may_rise, key=share)
        step = multiple * (site.in_features + site.out_features)
        below_break_even = (ranks[site.name] + multiple) * (site.in_features + site.out_features) < site.weight_count
        if below_break_even and spent + step <= limit:
            ranks[site.name] += multiple
            spent += step
        else:
            may_rise.remove(site)
    return ranks


def _listed_ranks(ranks: Mapping[str, int]) -> str:
    """`q_proj 40-48, ...`: the ranks of each role, over all blocks."""
    by_role: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        by_role.setdefault(name.rpartition(".")[2], []).append(rank)
    spans = {role: (min(of_role), max(of_role)) for role, of_role in by_role.items()}
    return "ranks " + ", ".join(f"{role} {a}" if a == b else f"{role} {a}-{b}" for role, (a, b) in spans.items())


# ── Adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────


class AdaptedLinear(nn.Module):
    """A frozen projection with a trainable adapter beside it: `y = W x + bias + up (down x)`.

    LoRA (Hu et al., 2021, arXiv 2106.09685) with alpha = rank, so that its scale is 1, and no dropout. `up` starts at
    zero, so the start computes what the projection did; `down` starts as the reference implementation draws it.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, rank: int, generator: torch.Generator):
        """Args:
        weight: (out_features, in_features); kept as it is.
        bias: (out_features,) or None.
        rank: of the adapter.
        """
        super().__init__()
        out_features, in_features = weight.shape
        self.weight = weight
        self.bias = bias
        bound = in_features**-0.5  # what kaiming_uniform_(a=sqrt(5)) comes to
        drawn = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(drawn.to(weight))
        self.up = nn.Parameter(weight.new_zeros(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)

    def merged_weight(self) -> Tensor:
        """(out_features, in_features): the one matrix this computes."""
        return (self.weight + self.up @ self.down).detach()

    def merged(self) -> nn.Module:
        """The projection with its adapter added to the weight."""
        return DenseLinear(self.merged_weight(), self.bias)


class AdaptedFactors(nn.Module):
    """A factored projection, both factors frozen with an adapter beside each: `y = (B + up down) (A + up down) x`."""

    def __init__(self, factored: FactoredLinear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.A = AdaptedLinear(factored.A, None, rank, generator)
        self.B = AdaptedLinear(factored.B, factored.bias, rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        return self.B(self.A(x))

    def merged(self) -> nn.Module:
        """Two factors of the same rank, each with its adapter added."""
        return FactoredLinear(self.A.merged_weight(), self.B.merged_weight(), self.B.bias)


def _merged(tree: nn.Module) -> nn.Module:
    """A copy in which every adapter has become part of what it stood beside."""
    final = frozen_copy(tree)
    for kind in (AdaptedFactors, AdaptedLinear):  # the pairs first: they consist of the others
        for name, module in [(name, module) for name, module in final.named_modules() if isinstance(module, kind)]:
            set_module(final, name, module.merged().requires_grad_(False))
    return final


# ── Nothing dropped ──────────────────────────────────────────────────────────────────────────────────────────────


def lora_distillation(teacher: nn.Module, *, rank: int = 16, seed: int = 0) -> Start:
    """Standard LoRA distillation: projections frozen, an adapter beside each, merged at the end. Saves nothing.

    Norms and biases train too. It starts as the teacher itself; see the module for what that means for the loss.

    Args:
        rank: of every adapter.
        seed: of the adapters' first factors.
    """
    tree = frozen_copy(teacher)
    generator = torch.Generator().manual_seed(seed)
    for name, module in projections(tree).items():
        set_module(tree, name, AdaptedLinear(module.weight, module.bias, rank, generator))
    train_vectors(tree)
    return _start(tree, teacher, _merged, f"projections frozen, adapters of rank {rank} beside each")


def dense_control(teacher: nn.Module) -> Start:
    """The teacher trained further: what the same tokens and the same loss do without any compression.

    Projections, norms and biases train; embeddings and the output head stay, as in every other row. It starts as the
    teacher itself; see the module for what that means for the loss.
    """
    tree = frozen_copy(teacher)
    _train_projections(tree)
    train_vectors(tree)
    return _start(tree, teacher, _as_it_is, "nothing dropped; projections and norms train")


# ── Pruning ──────────────────────────────────────────────────────────────────────────────────────────────────────


def depth_pruning(
    teacher: nn.Module, sequences: Tensor, budget: float, *, rounded: Literal["down", "up"] = "down"
) -> Start:
    """Whole decoder blocks dropped until the budget is met; what remains trains, dense.

    One block at a time: the one without which, given those dropped before, the mean KL from the teacher on
    `sequences` is smallest (of several, the first). Greedy removal with a new comparison after each is SLEB's way
    (Song et al., 2024, arXiv 2402.09025); training what remains is that of Shortened LLaMA (Kim et al., 2024, arXiv
    2402.02834), which ranks all blocks once.

    A few blocks cannot hit every budget: `fraction` says what was reached. `rounded="up"` stops one block earlier
    where the budget falls between two counts, so that the pair of them brackets it; that one is above the budget.

    Args:
        sequences: (sequences, tokens) calibration tokens; each removal runs the model once a remaining block.
        budget: the share to keep.
        rounded: to the largest number of blocks within the budget, or to the smallest that is not below it.

    Raises:
        BadInput: a budget below one block.
    """
    blocks = _blocks(teacher)
    costs = [_cost(block) for block in blocks]
    limit = Budget.parse(budget).limit(sum(costs))
    distance = kl_to(teacher, sequences)
    kept = list(range(len(blocks)))
    dropped: list[int] = []
    while sum(costs[index] for index in kept) > limit:
        without = {index: [other for other in kept if other != index] for index in kept}
        if rounded == "up" and all(sum(costs[other] for other in rest) < limit for rest in without.values()):
            break
        if len(kept) == 1:
            raise BadInput(f"one of {len(blocks)} blocks keeps more than the budget of {budget}; raise the budget")
        index = min(kept, key=lambda index: distance(_with_blocks(teacher, without[index])))
        kept.remove(index)
        dropped.append(index)
    tree = _with_blocks(teacher, kept)
    _train_projections(tree)
    train_vectors(tree)
    note = f"blocks {kept} of {len(blocks)} kept, dropped in the order {dropped}"
    return _start(tree, teacher, _as_it_is, note)


def _with_blocks(teacher: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A frozen copy that runs only these of the teacher's blocks, in their order."""
    tree: Any = frozen_copy(teacher)
    tree.base_model.layers = nn.ModuleList(_blocks(tree)[index] for index in kept)
    tree.config.num_hidden_layers = len(kept)  # how many entries a key/value cache gets
    if getattr(tree.config, "layer_types", None):
        tree.config.layer_types = [tree.config.layer_types[index] for index in kept]
    for place, block in enumerate(_blocks(tree)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # which entry of the cache it reads and writes
    return tree


def width_pruning(
    teacher: nn.Module,
    sequences: Tensor,
    budget: float,
    *,
    kv_groups: int | None = None,
    multiple: int = MULTIPLE,
) -> Start:
    """Channels of every MLP, and key/value groups of every attention, dropped to meet the budget; the rest trains.

    A channel scores the mean size of its activation times the norm of the column it meets in the next projection
    (`channel_scores`): for an MLP channel that is |act(gate) * up| and the column of `down_proj`. In each block those
    with the highest scores stay, equally many in all blocks. A key/value group is a key/value head with all query
    heads that read it; it scores the sum of its channels at the input of `o_proj`. Mean activations on calibration
    data as in Minitron (Muralidharan et al., 2024, arXiv 2407.14679), times a norm of the weight as in Wanda (Sun et
    al., 2023, arXiv 2306.11695).

    How the budget is divided: with g key/value groups kept in each attention, the MLPs take the largest multiple of
    channels that fits. Of all g for which at least one multiple fits, all groups included (MLPs alone are pruned),
    the one whose mean KL from the teacher on `sequences`, before training, is smallest. Where attention alone exceeds
    the budget, groups have to go. Before training is not after it: on the bundled model one more group than this
    chooses ended lower after 100 steps, at budgets 0.25 and 0.5, so a fair comparison also tries the neighbours
    (`kv_groups`) and shows the best.

    The result runs and generates, but `save_pretrained` refuses it where the hidden size is no multiple of the number
    of heads left, which is a rule of the config class and not of the model.

    Args:
        sequences: (sequences, tokens) calibration tokens.
        budget: the share to keep.
        kv_groups: key/value groups to keep in each attention, instead of trying all.
        multiple: widths of MLPs are multiples of this.

    Raises:
        BadInput: no channel fits beside the groups asked for, or beside a single one.
    """
    blocks = _blocks(teacher)
    dense = _cost(teacher)
    limit = Budget.parse(budget).limit(dense)
    all_groups = blocks[0].self_attn.k_proj.out_features // blocks[0].self_attn.head_dim
    all_channels = blocks[0].mlp.down_proj.in_features
    group_cost = sum(_cost(block.self_attn) for block in blocks) // all_groups
    channel_cost = sum(_cost(block.mlp) for block in blocks) // all_channels
    offered = range(all_groups, 0, -1) if kv_groups is None else (kv_groups,)
    widths = {
        groups: min((limit - groups * group_cost) // channel_cost // multiple * multiple, all_channels)
        for groups in offered
    }
    if dense <= limit:
        widths = {all_groups: all_channels}  # which need not be a multiple
    widths = {groups: channels for groups, channels in widths.items() if channels > 0}
    if not widths:
        least = (min(offered) * group_cost + multiple * channel_cost) / dense
        raise BadInput(
            f"{min(offered)} of {all_groups} key/value groups and {multiple} MLP channels keep {least:.4f} of the "
            f"cost, the budget is {budget}; raise the budget or keep fewer groups"
        )
    scores = channel_scores(teacher, sequences)
    distance = kl_to(teacher, sequences)
    trees = {groups: _narrowed(teacher, scores, groups, channels) for groups, channels in widths.items()}
    distances = {groups: distance(tree) for groups, tree in trees.items()}
    chosen = min(distances, key=lambda groups: distances[groups])
    tree = trees[chosen]
    _train_projections(tree)
    train_vectors(tree)
    tried = ", ".join(f"{groups}+{widths[groups]}: {distances[groups]:.3f}" for groups in distances)
    note = (
        f"{chosen} of {all_groups} key/value groups and {widths[chosen]} of {all_channels} MLP channels kept in each "
        f"block; KL before training by groups+channels {tried}"
    )
    return _start(tree, teacher, _as_it_is, note)


@torch.no_grad()
def channel_scores(teacher: nn.Module, sequences: Tensor, batch: int = 8) -> dict[str, Tensor]:
    """(in_features,) scores of the inputs of every `o_proj` and `down_proj`, by name.

    The mean size of the channel over all tokens, times the Euclidean norm of the column of the weight that it meets.
    """
    model: Any = frozen_copy(teacher)  # hooks are put on the copy, and go with it
    watched = {name: module for name, module in projections(model).items() if name.endswith(("o_proj", "down_proj"))}
    sums = {name: module.weight.new_zeros(module.in_features) for name, module in watched.items()}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            sums[name] += inputs[0].abs().flatten(0, -2).sum(0)

        return add

    for name, module in watched.items():
        module.register_forward_pre_hook(watch(name))
    for ids in sequences.split(batch):
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return {name: sums[name] / sequences.numel() * module.weight.norm(dim=0) for name, module in watched.items()}


def _narrowed(teacher: nn.Module, scores: Mapping[str, Tensor], groups: int, channels: int) -> nn.Module:
    """A copy with this many key/value groups and MLP channels in each block: those with the highest scores."""
    tree: Any = frozen_copy(teacher)
    name_of = {module: name for name, module in projections(tree).items()}
    for block in _blocks(tree):
        mlp, attention = block.mlp, block.self_attn
        kept = _best(scores[name_of[mlp.down_proj]], channels)
        _narrow(mlp.gate_proj, rows=kept)
        _narrow(mlp.up_proj, rows=kept)
        _narrow(mlp.down_proj, columns=kept)
        mlp.intermediate_size = channels

        all_groups = attention.k_proj.out_features // attention.head_dim
        kept = _best(scores[name_of[attention.o_proj]].view(all_groups, -1).sum(1), groups)
        queries = _members(kept, attention.q_proj.out_features // all_groups)
        keys = _members(kept, attention.head_dim)
        _narrow(attention.q_proj, rows=queries)
        _narrow(attention.k_proj, rows=keys)
        _narrow(attention.v_proj, rows=keys)
        _narrow(attention.o_proj, columns=queries)
    config, attention = tree.config, _blocks(tree)[0].self_attn
    config.head_dim = attention.head_dim  # else taken to be hidden size / heads
    config.num_attention_heads = groups * attention.num_key_value_groups
    config.num_key_value_heads = groups
    config.intermediate_size = channels
    return tree


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the highest scores, in ascending order."""
    return scores.topk(count).indices.sort().values


def _members(groups: Tensor, size: int) -> Tensor:
    """Indices of all members of groups of `size` neighbours."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _narrow(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep only these outputs, or inputs, of a frozen linear layer. New tensors; the old ones stay as they are."""
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    linear.out_features, linear.in_features = weight.shape


# ── What the baselines share ─────────────────────────────────────────────────────────────────────────────────────


def kept_fraction(tree: nn.Module, teacher: nn.Module) -> float:
    """Share of the teacher's projection cost that `tree`, in its final form, keeps.

    Counted in parameters of projection matrices, which is the same share of their multiply-adds: every one of them
    is applied once to every token. Output head and embeddings are in neither number, biases and norms neither.

    Raises:
        BadInput: a matrix in a module that is no final form, such as an adapter.
    """
    return _cost(tree) / _cost(teacher)


def projections(model: nn.Module) -> dict[str, Any]:
    """Every projection in its final form by name: linear and factored modules, the output head excepted."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, FactoredLinear)) and module is not head
    }


def _cost(model: nn.Module) -> int:
    """Parameters of all projection matrices."""
    known = set(projections(model).values())
    if hasattr(model, "get_output_embeddings"):
        known.add(model.get_output_embeddings())
    for name, module in model.named_modules():
        matrices = [key for key, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
        if matrices and module not in known and not isinstance(module, nn.Embedding):
            raise BadInput(f"{name} is a {type(module).__name__}, which is no final form; finish the tree first")
    return sum(
        module.A.numel() + module.B.numel() if isinstance(module, FactoredLinear) else module.weight.numel()
        for module in projections(model).values()
    )


def _start(
    tree: nn.Module,
    teacher: nn.Module,
    finish: Callable[[nn.Module], nn.Module],
    note: str,
    stages: tuple[Callable[[nn.Module], None], ...] = (),
) -> Start:
    return Start(tree.eval(), finish, kept_fraction(finish(tree), teacher), note, stages)


def _as_it_is(tree: nn.Module) -> nn.Module:
    """The final form of a tree that trains in its final form."""
    return tree


def train_vectors(tree: nn.Module) -> None:
    """Give the tree private, trainable norm weights and biases."""
    for module in tree.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 1:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))


def _train_projections(tree: nn.Module) -> None:
    """Give the tree private, trainable weights at every projection."""
    for module in projections(tree).values():
        module.weight = nn.Parameter(module.weight.detach().clone())


def _blocks(model: Any) -> nn.ModuleList:
    """The decoder blocks of a Llama-like model."""
    return model.base_model.layers


@torch.no_grad()
def kl_to(teacher: nn.Module, sequences: Tensor, batch: int = 8) -> KLToTeacher:
    """A function that measures the mean KL(teacher || model) on these tokens, in nats per token.

    Args:
        sequences: (sequences, tokens) token ids. The teacher runs once, here; its hidden states are kept.
    """
    pieces = sequences.split(batch)
    reference = [_last_hidden(teacher, ids) for ids in pieces]

    @torch.no_grad()
    def distance(model: nn.Module) -> float:
        total = sum(
            float(head_kl(_last_hidden(model, ids), _head(model), hidden, _head(teacher), reduction="sum"))
            for ids, hidden in zip(pieces, reference, strict=True)
        )
        return total / sequences.numel()

    return distance


def _last_hidden(model: Any, ids: Tensor) -> Tensor:
    """(sequences * tokens, features) that the output head reads."""
    return model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state.flatten(0, -2)


def _head(model: Any) -> Tensor:
    """(vocabulary, features) weight of the output head."""
    return model.get_output_embeddings().weight
