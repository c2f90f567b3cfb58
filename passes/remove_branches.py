"""RemoveBranches: a whole attention or MLP module that the plan removes becomes a module that returns zeros.

x + branch(norm(x))   ->   x + 0          the branch's sites, and everything else inside it, are gone
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from blora_compiler.branches import stand_ins
from blora_compiler.graph import (
    SITE,
    Level,
    Program,
    branch_output,
    insert_module_call,
    module_stack,
    nodes_by_module,
    remove_dead_nodes,
    set_module,
)
from blora_compiler.layers import RemovedBranch
from blora_compiler.values import Form, Refusal, Removed

from .base import PassResult


@dataclass(frozen=True)
class RemoveBranches:
    """Remove every branch whose sites are all planned `Removed`."""

    forms: Mapping[str, Form]
    takes: Level = Level.BRANCHED
    gives: Level = Level.BRANCHED
    preserves_outputs: bool = False  # that is what removal costs; the plan's damage says how much

    def run(self, program: Program) -> PassResult:
        chosen, refusals = [], []
        for branch in dict.fromkeys(site.branch for site in program.sites if self._is_removed(site.name)):
            reason = self.reason_to_skip(program, branch)
            if reason is None:
                chosen.append(str(branch))
            else:
                refusals.append(Refusal(str(branch), reason))
        if not chosen:
            return PassResult(program, False, tuple(refusals))
        rewritten = program.copy()
        for branch, module in stand_ins(rewritten, chosen).items():
            remove_branch(rewritten, branch, module)
        return PassResult(rewritten, True, tuple(refusals), tuple(chosen))

    def _is_removed(self, name: str) -> bool:
        return isinstance(self.forms.get(name), Removed)

    def reason_to_skip(self, program: Program, branch: str | None) -> str | None:
        """Why a branch stays, or None."""
        if branch is None:
            return "belongs to no branch that can be removed as one module"
        kept = [site.name for site in program.sites if site.branch == branch and not self._is_removed(site.name)]
        if kept:
            return f"{kept[0]} is not planned removed, and a branch goes as a whole"
        if isinstance(program.tree.get_submodule(branch), RemovedBranch):
            return "is removed already"
        if branch_output(nodes_by_module(program.graph)[branch]) is None:
            return "no longer ends in one addition to the residual stream"
        return None


def remove_branch(program: Program, branch: str, module: RemovedBranch) -> None:
    """Put `module` in the branch's place, in both views of `program` (edited in place)."""
    inside = nodes_by_module(program.graph)[branch]
    output = branch_output(inside)
    assert output is not None
    (addition,) = [user for user in output.users if branch not in module_stack(user)]
    residual = next(argument for argument in addition.all_input_nodes if argument is not output)
    graph = program.graph.graph
    stand_in = insert_module_call(graph, addition, branch, (residual,))
    stand_in.meta |= {"val": output.meta["val"]}
    stand_in.meta.pop(SITE, None)
    if module.outputs > 1:
        with graph.inserting_after(stand_in):
            first = graph.call_function(operator.getitem, (stand_in, 0))
        first.meta = dict(stand_in.meta)
        stand_in.meta["val"] = (output.meta["val"], *([None] * (module.outputs - 1)))
        stand_in = first
    addition.replace_input_with(output, stand_in)
    remove_dead_nodes(graph, inside)  # what is written in there is read in there
    set_module(program.graph, branch, module)
    if not program.tree_is_graph:
        set_module(program.tree, branch, module)
    program.graph.recompile()
