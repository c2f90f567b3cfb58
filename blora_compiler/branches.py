"""Branches: which attention and MLP modules can be removed as a whole, and what has to stand in their place.

A branch is added to the residual stream, so zeros can stand for it. Its callers expect more of it than its graph
shows: a tensor or a tuple, and keys and values in the cache. Both are observed while it runs, not guessed from names.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import BadInput
from .graph import SITE, Program, branch_output, call, nodes_by_module, sizes_of, written_operands
from .layers import CacheEntry, RemovedBranch, cache_in, first_tensor
from .operators import VIEWS
from .values import Refusal, Site

Returns = dict[str, int]  # path of a module -> how many values it returned; 1 is a bare tensor


@contextmanager
def watched_returns(tree: nn.Module) -> Iterator[Returns]:
    """Records, while it is open, what the modules of `tree` return that zeros could be returned for.

    That is a tensor of the shape of the first one that the module was given, alone or as the first of a tuple; and
    nothing else that it was given, which whoever called it may want back.
    """
    returns: Returns = {}

    def watch(path: str) -> Any:
        def watched(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            returns.pop(path, None)
            values = output if type(output) in (tuple, list) and len(output) > 1 else (output,)
            given, first = first_tensor(args, kwargs), values[0]
            if given is None or not isinstance(first, Tensor) or sizes_of(given) != sizes_of(first):
                return
            handed_on = {id(value) for value in (*args, *kwargs.values()) if value is not None}
            if not any(id(value) in handed_on for value in values):
                returns[path] = len(values)

        return watched

    hooks = [
        module.register_forward_hook(watch(path), with_kwargs=True)
        for path, module in tree.named_modules()
        if path and next(module.children(), None) is not None
    ]
    try:
        yield returns
    finally:
        for hook in hooks:
            hook.remove()


def returned_with_cache(
    tree: nn.Module, returns: Returns, inputs: Mapping[str, Tensor], constants: Mapping[str, Any]
) -> tuple[Returns, list[Refusal]]:
    """Of `returns`, what modules also return while the model keeps a key/value cache, as it does when it generates.

    Args:
        tree: a model that takes `use_cache`.
        returns: what was recorded without one.
        inputs: an example, by name.

    Returns:
        That; and why there is none, where the model fails with a cache.
    """
    if next(tree.parameters()).is_meta:
        return returns, []
    try:
        with torch.no_grad(), watched_returns(tree) as cached:
            tree(**inputs, **{**constants, "use_cache": True})
    except Exception as error:  # of any type: the model is not ours
        reason = f"no branch can be removed: with a key/value cache the model fails ({type(error).__name__}: {error})"
        return {}, [Refusal(type(tree).__name__, reason)]
    return {path: count for path, count in returns.items() if cached.get(path) == count}, []


def removable_branches(graph: fx.GraphModule, returns: Returns, sites: Iterable[Site]) -> dict[str, str]:
    """Site name -> path of the attention or MLP module that is added to the residual stream and can be dropped.

    Such a module contains at least two sites, and what leaves it is one tensor, used only as an operand of one
    addition of the same shape: its last site's product and nothing else, or that site's damage would not be the
    branch's. It writes into no tensor from outside. The outermost such module counts.
    """
    sites = list(sites)
    candidates: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        parts = site.name.split(".")
        for length in range(1, len(parts)):
            candidates[".".join(parts[:length])].append(site.name)
    nodes = nodes_by_module(graph)
    by_name = {site.name: site for site in sites}
    branches: dict[str, str] = {}
    for path, members in sorted(candidates.items(), key=lambda item: item[0].count(".")):
        if len(members) < 2 or path not in returns or any(name in branches for name in members):
            continue
        leaving = branch_output(nodes[path])
        if leaving is None or not all(by_name[name].in_tree for name in members):
            continue
        writes_outside = any(memory_of(w) not in nodes[path] for node in nodes[path] for w in written_operands(node))
        if not writes_outside and through_views(leaving).meta.get(SITE) == members[-1]:
            branches |= dict.fromkeys(members, path)
    return branches


def stand_ins(program: Program, branches: Sequence[str]) -> dict[str, RemovedBranch]:
    """Path -> a module that returns zeros in the way that the branch's callers expect. The tree runs once to show it.

    Raises:
        BadInput: a branch did not run, or returned something that zeros cannot stand for.
    """
    if program.tree_is_graph:  # called by the graph alone, which takes the tensor
        return {branch: RemovedBranch() for branch in branches}
    constants: dict[str, Any] = {name: True if name == "use_cache" else v for name, v in program.constants.items()}
    with torch.no_grad(), watched_returns(program.tree) as returns, _watched_cache(program.tree, branches) as entries:
        call(program.tree, program.inputs, constants, program.positional)
    if unknown := [branch for branch in branches if branch not in returns]:
        raise BadInput(f"{unknown[0]} returns something that zeros cannot stand for; plan its sites otherwise")
    return {branch: RemovedBranch(returns[branch], entries.get(branch)) for branch in branches}


@contextmanager
def _watched_cache(tree: nn.Module, branches: Sequence[str]) -> Iterator[dict[str, CacheEntry]]:
    """Path -> the entry that a module begins in a key/value cache, where it does."""
    before: dict[str, Mapping[int, CacheEntry]] = {}
    begun: dict[str, CacheEntry] = {}

    def at_start(path: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        before[path] = _held(cache_in(args, kwargs))

    def at_end(path: str, _module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        for layer, entry in _held(cache_in(args, kwargs)).items():
            if layer not in before[path]:
                begun[path] = entry

    hooks = []
    for path in branches:
        module = tree.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(partial(at_start, path), with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(at_end, path), with_kwargs=True))
    try:
        yield begun
    finally:
        for hook in hooks:
            hook.remove()


def _held(cache: Any) -> Mapping[int, CacheEntry]:
    """Layer -> the shape of its keys and values (batch, heads, tokens, size), where it has any."""
    held = {}
    for index, layer in enumerate(getattr(cache, "layers", ())):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == values.dim() == 4:
            held[index] = CacheEntry(index, keys.shape[1], keys.shape[3], values.shape[3])
    return held


def memory_of(node: fx.Node) -> fx.Node:
    """The node that made the memory a result lies in, as far as views and writes in place tell."""
    while True:
        before = next(iter(written_operands(node)), None) or _shown(node) or through_views(node)
        if before is node:
            return node
        node = before


def _shown(node: fx.Node) -> fx.Node | None:
    """What a node is a view of by its operator's own declaration, or one of several views of; else None."""
    schema: Any = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(a.alias_info is not None for a in schema.arguments[:1])
    source = node.args[0] if node.op == "call_function" and (is_view or node.target is operator.getitem) else None
    return source if isinstance(source, fx.Node) else None


def through_views(node: fx.Node) -> fx.Node:
    """The node that made the values which this one only shows."""
    while node.op == "call_function" and node.target in VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
