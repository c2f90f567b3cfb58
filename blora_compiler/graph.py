"""The program: one set of weights seen as an fx graph and as a module tree, and the few edits both allow.

The graph view is costed, planned and verified; the tree view trains, generates, saves and loads. A rewrite builds
one module instance and `install` puts it in both places, so there is never a second copy to keep in step.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import BadInput, GraphInvalid, ParityFailed
from .layers import BranchedLinear, DenseLinear, FactoredLinear, NestedLinear, RemovedBranch
from .values import Operator, Refusal, Site


class Level(IntEnum):
    """What the graph may contain. Each level adds to or takes from the one before."""

    TRACED = 0  # aten operators only
    BRANCHED = 1  # + Branched- or NestedLinear at planned sites, RemovedBranch; folded modules as sites finish
    FOLDED = 2  # no BranchedLinear or NestedLinear any more


ALLOWED_MODULES: dict[Level, tuple[type[nn.Module], ...]] = {
    Level.TRACED: (),
    Level.BRANCHED: (BranchedLinear, NestedLinear, DenseLinear, FactoredLinear, RemovedBranch),
    Level.FOLDED: (DenseLinear, FactoredLinear, RemovedBranch),
}

# Views a weight may pass through on its way into a product.
CONSTANT_VIEWS = {
    torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default,
    torch.ops.aten.numpy_T.default,
}  # fmt: skip

DECODER_INPUT = "decoder_input_ids"  # what only the decoder of two sides takes
SITE = "blora_site"  # node.meta key: the name of the site (or removed branch) that a node computes


@dataclass(frozen=True)
class Program:
    """A traced model on its way to a smaller one. Passes take one and return a new one.

    Attributes:
        tree: the model as its author wrote it. Where weights are used without a module of their own, this is `graph`.
        graph: the fx graph from `torch.export`; symbolic in batch and tokens.
        sites: every projection weight, in the order the graph first uses them.
        operators: everything else in the graph, as data.
        refusals: weights that look like projections and were left alone, with reasons.
        inputs: the example inputs it was traced with, by name.
        constants: arguments that were fixed while tracing (`use_cache=False`).
        level: what the graph may contain now.
    """

    tree: nn.Module
    graph: fx.GraphModule
    sites: tuple[Site, ...]
    operators: tuple[Operator, ...]
    refusals: tuple[Refusal, ...]
    inputs: Mapping[str, Tensor]
    constants: Mapping[str, Any] = field(default_factory=dict)
    positional: bool = False
    level: Level = Level.TRACED

    @property
    def tree_is_graph(self) -> bool:
        return self.tree is self.graph

    def site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def copy(self) -> Program:
        """A structural copy: new modules and nodes, the same parameters and buffers."""
        memo: dict[int, Any] = {}
        for view in (self.tree, self.graph):
            memo |= {id(tensor): tensor for tensor in _tensors(view)}
        graph = _deep_copy(self.graph, memo)
        tree = graph if self.tree_is_graph else _deep_copy(self.tree, memo)
        return replace(self, tree=tree, graph=graph)

    def call_graph(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the graph view on inputs given by name."""
        return call(self.graph, inputs, self.constants, self.positional)

    def call_tree(self, inputs: Mapping[str, Tensor]) -> Any:
        """Run the tree view on inputs given by name."""
        return call(self.tree, inputs, self.constants, self.positional)

    def form_module(self, name: str) -> nn.Module | None:
        """The module a rewrite installed under `name`, or None while the site is as traced."""
        for node in self.graph.graph.find_nodes(op="call_module", target=name):
            return self.graph.get_submodule(str(node.target))
        return None


def binds_by_position(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether inputs of these names, in this order, are what `forward` takes by position; else names decide."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return True
    ordered = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return ordered[: len(names)] == list(names) or not known.issuperset(names)


def call(module: nn.Module, inputs: Mapping[str, Tensor], constants: Mapping[str, Any], positional: bool) -> Any:
    """Call `module` the way it was traced: by position for plain modules, by name for Hugging Face models."""
    if positional:
        return module(*inputs.values(), **constants)
    return module(**inputs, **constants)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters share storage with `module`'s and do not train.

    Each parameter is a new object, so freezing or thawing it never touches the caller's flags; tied parameters stay
    tied. Buffers are copied: a forward may write into them.

    Raises:
        BadInput: the module holds tensors that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return _deep_copy(module, memo)


def _deep_copy(module: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, without torch's warning about how its own tree specs are compared while they are copied."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
        try:
            return copy.deepcopy(module, memo)
        except RuntimeError as error:  # a weight that is computed by hooks, as the old weight_norm does
            raise BadInput(f"{type(module).__name__} cannot be copied: {str(error).splitlines()[0]}") from error


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def token_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """(batch, tokens) which tokens of a batch count, or None where all do.

    The two sides of an encoder-decoder have other tokens, and no mask is about the rows of both: there all count.
    """
    mask = None if DECODER_INPUT in batch else batch.get("attention_mask")
    return None if mask is None or mask.dim() != 2 else mask.bool()


def output_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """(batch, tokens) tokens whose outputs count, or None where all do: an encoder-decoder's are the decoder's."""
    mask = batch.get("decoder_attention_mask" if DECODER_INPUT in batch else "attention_mask")
    return None if mask is None or mask.dim() != 2 else mask.bool()


def main_output(output: Any) -> Tensor:
    """The tensor a model is judged by: logits, else the last hidden state, else the first tensor it returns."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise ParityFailed(f"the model returned no tensor, but {type(output).__name__}; nothing can be compared")


# Beside logits, these are on the way to them or made of them; whatever else a model returns is a result of its own.
_ON_THE_WAY = ("loss", "hidden_states", "attentions", "past_key_values", "last_hidden_state", "cross_attentions")


def predicts(output: Any, config: Any) -> bool:
    """Whether a model's logits are all that it is judged by, and are distributions over their last axis.

    Boxes beside them (DETR) are judged too; scores of tokens (ELECTRA's discriminator) or of pixels are none.

    Args:
        config: the model's, or None; a module without one is believed.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[-1] < 2:
        return False
    names = list(output.keys()) if hasattr(output, "keys") else list(getattr(output, "_fields", ()))
    others = [name for name in names if name != "logits" and not name.endswith(_ON_THE_WAY)]
    if any(float_leaves(getattr(output, name, None)) for name in others):
        return False
    if config is None or not hasattr(config, "get_text_config"):
        return True
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    return logits.shape[-1] == vocabulary or (logits.dim() <= 3 and logits.shape[-1] == config.num_labels)


def float_leaves(output: Any) -> list[Tensor]:
    """All tensors of floats that a model returns, single numbers left out: such a number is a loss."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim()]


def sizes_of(tensor: Tensor) -> tuple[Any, ...]:
    """Sizes as numbers and expressions: comparing these never decides what an open size is."""
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in tensor.shape)


def module_stack(node: fx.Node) -> list[str]:
    """Paths of the modules a node was traced in, outermost first."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    return [path for path, owner in entries if not str(path).startswith("_empty_nn_module_stack")]


def insert_module_call(graph: fx.Graph, before: fx.Node, path: str, arguments: tuple[fx.Node, ...]) -> fx.Node:
    """Insert `call_module[path](*arguments)` with the metadata of `before`: shape, dtype, origin and site.

    Every node a pass adds comes through here: a node without metadata makes later passes skip it without a word.
    """
    with graph.inserting_before(before):
        node = graph.create_node("call_module", path, arguments)  # call_module() would want the module there already
    node.meta = dict(before.meta)
    return node


def install(program: Program, site: Site, module: nn.Module) -> None:
    """Put `module` in the site's place, in both views of `program` (edited in place: pass a copy).

    The first installation replaces the aten nodes by calls of the module; later ones only swap the module.
    """
    graph = program.graph.graph
    for node in [node for node in graph.nodes if node.meta.get(SITE) == site.name and node.op == "call_function"]:
        call_node = insert_module_call(graph, node, site.name, (projection_input(node),))
        node.replace_all_uses_with(call_node)
        operands = node.all_input_nodes
        graph.erase_node(node)
        for operand in operands:  # the old weight may lie where the module goes, so no node may still read it
            _erase_unused_constant(graph, operand)
        if program.tree_is_graph and site.bias is not None:
            _drop_unread_parameter(program.graph, site.bias)  # a module has its own copy now
    set_module(program.graph, site.name, module)
    if not program.tree_is_graph:
        set_module(program.tree, site.name, module)
    remove_dead_nodes(graph)
    program.graph.recompile()


def _erase_unused_constant(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a constant that nothing reads any more, with the transposes it was read through."""
    if node.users or node.op not in ("get_attr", "call_function"):
        return
    operands = node.all_input_nodes
    if node.op == "get_attr" or (len(operands) == 1 and node.target in CONSTANT_VIEWS):
        graph.erase_node(node)
        for operand in operands:
            _erase_unused_constant(graph, operand)


def _drop_unread_parameter(graph: fx.GraphModule, path: str) -> None:
    """Delete a parameter that no node reads: a graph that is the tree would store it for nothing."""
    owner_path, _, name = path.rpartition(".")
    if not graph.graph.find_nodes(op="get_attr", target=path):
        graph.get_submodule(owner_path)._parameters.pop(name, None)


def remove_dead_nodes(graph: fx.Graph, unread: Collection[fx.Node] = ()) -> None:
    """Drop every node that no output needs. fx alone would keep attention: it counts its dropout as a side effect.

    What writes into a tensor stays: who reads that tensor, or a view of it, does not name the write.

    Args:
        unread: nodes whose writes nothing outside of them reads.
    """

    def stays(node: fx.Node) -> bool:
        return node.op in ("placeholder", "output") or (_writes(node) and node not in unread)

    graph.eliminate_dead_code(is_impure_node=stays)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator writes into."""
    if not _writes(node):
        return []
    arguments: Any = getattr(node.target, "_schema").arguments  # noqa: B009 - fx types targets as callables or names
    written = []
    for index, argument in enumerate(arguments):
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            written.append(value)
    return written


def projection_input(node: fx.Node) -> fx.Node:
    """The activation operand of a projection node: `linear(x, w)`, `addmm(bias, x, w)`, `mm(x, w)`, ..."""
    position = 1 if node.target is torch.ops.aten.addmm.default else 0
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    return operand


def watched_by(program: Program, watchers: Mapping[str, nn.Module]) -> Program:
    """A copy whose graph view hands every call of a named site to a module, which returns the output to go on with.

    Args:
        watchers: site name -> module, called as `module(x, y)` with x (..., in_features) and y (..., out_features).
    """
    watched = program.copy()
    graph = watched.graph.graph
    for node in list(graph.nodes):
        watcher = watchers.get(node.meta.get(SITE, ""))
        if watcher is None or node.op not in ("call_function", "call_module"):
            continue
        path = f"_watcher_{node.name}"
        watched.graph.add_module(path, watcher)
        operand = projection_input(node) if node.op == "call_function" else node.args[0]
        with graph.inserting_after(node):
            call_node = graph.call_module(path, (operand, node))
        call_node.meta = dict(node.meta)
        node.replace_all_uses_with(call_node, delete_user_cb=lambda user, own=call_node: user is not own)
    watched.graph.recompile()
    return watched


def nodes_by_module(graph: fx.GraphModule) -> dict[str, set[fx.Node]]:
    """Module path -> the nodes traced in it or below it, constants left out."""
    members: dict[str, set[fx.Node]] = defaultdict(set)
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            for path in module_stack(node):
                members[path].add(node)
    return members


def branch_output(inside: set[fx.Node]) -> fx.Node | None:
    """The node that carries a module's result into a residual addition, if that is all that leaves it.

    Args:
        inside: the nodes of the module, from `nodes_by_module`.
    """
    leaving = {node for node in inside if any(user not in inside for user in node.users)}
    if len(leaving) != 1:
        return None
    (node,) = leaving
    outside_users = [user for user in node.users if user not in inside]
    if len(outside_users) != 1 or outside_users[0].target is not torch.ops.aten.add.Tensor:
        return None
    (addition,) = outside_users
    residual = next((argument for argument in addition.all_input_nodes if argument is not node), None)
    if residual is None or residual in inside or residual.meta["val"].shape != node.meta["val"].shape:
        return None
    return node


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Set `root.path = module`, replacing a parameter of that name if there is one."""
    parent_path, _, name = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    if name in parent._parameters:
        del parent._parameters[name]
    parent.add_module(name, module)


def bind(program: Program) -> None:
    """Point every name in the graph at the tree's object of that name (the tree may have been trained or moved)."""
    if program.tree_is_graph:
        return
    for node in program.graph.graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            set_module(program.graph, target, program.tree.get_submodule(target))
        elif node.op == "get_attr":
            owner_path, _, name = target.rpartition(".")
            owner = _submodule_or_none(program.tree, owner_path)
            if owner is not None and isinstance(getattr(owner, name, None), Tensor):
                graph_owner = program.graph.get_submodule(owner_path)
                store = graph_owner._parameters if name in owner._parameters else graph_owner._buffers
                store[name] = getattr(owner, name)
    program.graph.recompile()


def _submodule_or_none(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:  # a constant that torch.export lifted lives in the graph view alone
        return None


def move(program: Program, change: Callable[[nn.Module], Any]) -> Program:
    """A copy with `change` applied to the tree (training, folding in place), the graph bound to the result again."""
    moved = program.copy()
    change(moved.tree)
    bind(moved)
    return moved


# ── Verification ─────────────────────────────────────────────────────────────────────────────────────────────────


def verify_level(program: Program, after: str) -> None:
    """Check that the graph contains what its level allows, carries metadata, and shares its modules with the tree.

    Args:
        after: name of the pass that just ran, for the message.

    Raises:
        GraphInvalid: naming the level, the pass, the node and the broken rule.
    """

    def broken(node: fx.Node | None, rule: str) -> GraphInvalid:
        where = "" if node is None else f"node {node.name}: "
        return GraphInvalid(f"level {program.level.name} after {after}: {where}{rule}")

    graph = program.graph.graph
    try:
        graph.lint()
    except RuntimeError as error:
        raise broken(None, f"the graph does not lint ({error})") from error
    for node in graph.nodes:
        if node.op == "call_module":
            module = program.graph.get_submodule(str(node.target))
            allowed = ALLOWED_MODULES[program.level]
            if not isinstance(module, allowed):
                names = ", ".join(kind.__name__ for kind in allowed) or "no modules"
                raise broken(node, f"calls a {type(module).__name__}, but this level allows {names}")
            if _submodule_or_none(program.tree, str(node.target)) is not module:
                raise broken(node, f"{node.target} is another instance in the module tree than in the graph")
        if node.op in ("call_module", "call_function") and "val" not in node.meta:
            raise broken(node, "has no recorded shape and dtype; insert nodes through insert_module_call")


def view_distance(program: Program, inputs: Mapping[str, Tensor] | None = None) -> float:
    """Largest absolute difference between what the two views compute on `inputs` (default: the example inputs)."""
    if program.tree_is_graph:
        return 0.0
    inputs = program.inputs if inputs is None else inputs
    with torch.no_grad():
        return output_distance(program.call_graph(inputs), program.call_tree(inputs))


def output_distance(first: Any, second: Any) -> float:
    """Largest absolute difference of the main outputs of two models."""
    return float((main_output(first).float() - main_output(second).float()).abs().max())
