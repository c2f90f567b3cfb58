"""InsertBranches: each planned projection becomes a frozen dense part beside a trainable low-rank branch.

    y = W x + bias   ->   y = d * (W - B0 A0) x + B diag(g) A x + bias      with A = A0, B = B0, g = 1, d = 1

so the outputs stay those of the teacher up to rounding. Norm weights and biases become private copies that train.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blora_compiler.graph import Level, Program, bind, install
from blora_compiler.layers import BranchedLinear
from blora_compiler.values import Dense, Factored, Form, Refusal, Removed, Site

from .base import PassResult


@dataclass(frozen=True)
class InsertBranches:
    """Insert a trainable branch at every site that has starting factors.

    Attributes:
        forms: the plan: site name -> form.
        starts: site name -> (A0 (rank x in), B0 (out x rank)). A factored site needs its plan's rank; a dense site
            may have a branch of any rank, to train through, or none, to stay exactly as it is.
        train_embeddings: also give embedding and head weights that stay dense a private, trainable copy.
    """

    forms: Mapping[str, Form]
    starts: Mapping[str, tuple[Tensor, Tensor]]
    train_embeddings: bool = False
    takes: Level = Level.TRACED
    gives: Level = Level.BRANCHED
    preserves_outputs: bool = True

    def run(self, program: Program) -> PassResult:
        chosen, refusals = [], []
        for site in program.sites:
            reason = self.reason_to_skip(site)
            if reason is None:
                chosen.append(site)
            else:
                refusals.append(Refusal(site.name, reason))
        rewritten = replace(program.copy(), level=Level.BRANCHED)
        modules: dict[str, BranchedLinear] = {}
        for site in chosen:
            form = self.forms[site.name]
            first = modules.get(form.sharers[0]) if isinstance(form, Factored) and form.sharers else None
            A, B = self.starts[site.name]
            modules[site.name] = branched_module(program, site, A if first is None else first.A, B)
            install(rewritten, site, modules[site.name])
        give_private_parameters(rewritten, self.train_embeddings)
        return PassResult(rewritten, True, tuple(refusals), tuple(site.name for site in chosen))

    def reason_to_skip(self, site: Site) -> str | None:
        """Why a site gets no branch, or None."""
        form = self.forms.get(site.name)
        if form is None:
            return "is excluded from the plan"
        if isinstance(form, Removed):
            return f"its branch {site.branch} is removed as a whole"
        start = self.starts.get(site.name)
        if start is None:
            return "is planned dense" if isinstance(form, Dense) else f"has no starting factors for {form}"
        rank = start[0].shape[0]
        if isinstance(form, Factored) and rank != form.rank:
            return f"its starting factors have rank {rank}, but the plan says {form}"
        return None


def branched_module(program: Program, site: Site, A: Tensor, B: Tensor) -> BranchedLinear:
    """The training module of one site. A: (rank, in_features), B: (out_features, rank); a parameter is not copied."""
    weight = site_weight(program, site)
    bias = None if site.bias is None else program.graph.get_parameter(site.bias)
    B = B.to(weight).clone()
    if not isinstance(A, nn.Parameter):
        A = A.to(weight).clone()
    return BranchedLinear(weight - B @ A, A, B, None if bias is None else bias.detach().clone())


def site_weight(program: Program, site: Site) -> Tensor:
    """The dense weight of a traced site as (out_features, in_features), whatever its storage order."""
    weight = program.graph.get_parameter(site.weight).detach()
    return weight.T if site.transposed else weight


def give_private_parameters(program: Program, embeddings: bool = False) -> None:
    """Replace norm weights, biases and, if asked, dense embeddings by trainable copies, tied ones staying tied."""
    copies: dict[int, nn.Parameter] = {}
    table_owners = (
        {id(module.weight) for module in program.tree.modules() if isinstance(module, nn.Embedding)}
        if embeddings
        else set()
    )
    for module in program.tree.modules():
        if isinstance(module, BranchedLinear):
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_floating_point():
                continue
            if parameter.dim() == 1 or id(parameter) in table_owners:
                private = copies.setdefault(
                    id(parameter), nn.Parameter(parameter.detach().clone(), requires_grad=True)
                )
                module._parameters[name] = private
    bind(program)
    if program.tree_is_graph:
        program.graph.recompile()


def close_retention(module: nn.Module, forms: Mapping[str, Form]) -> None:
    """Give every factored site of `module` a retention of 0, as the end of the training schedule does.

    The parameter is replaced, not written to: structural copies of the program share it.
    """
    for name, branch in module.named_modules():
        if isinstance(branch, BranchedLinear) and isinstance(forms[name], Factored):
            branch.retention = nn.Parameter(torch.zeros_like(branch.retention), requires_grad=False)
            branch.drop_dense()
