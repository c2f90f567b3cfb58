"""Trace: a trained model becomes a `Program`, with every projection weight a site or a stated refusal.

`torch.export` (non-strict) gives the graph; parameters are shared with the model, never copied. This file only
reads the graph. What counts as a projection, a group, a branch or a head is decided here and nowhere else.
"""

from __future__ import annotations

import inspect
import math
import operator as python_operator
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .branches import (
    Returns,
    memory_of,
    removable_branches,
    returned_with_cache,
    through_views,
    watched_returns,
)
from .errors import BadInput
from .graph import (
    CONSTANT_VIEWS,
    DECODER_INPUT,
    SITE,
    Program,
    frozen_copy,
    module_stack,
    nodes_by_module,
    projection_input,
    remove_dead_nodes,
    sizes_of,
    written_operands,
)
from .operators import (
    CONVOLUTIONS,
    GROUPED_PRODUCTS,
    REORDERINGS,
    VIEWS,
    describe_operators,
    element_count,
    last_only_nodes,
    multiplied,
    operation_name,
    size_names,
)
from .values import Operator, Refusal, Site

aten = torch.ops.aten

PLAIN_PRODUCTS = {aten.mm.default, aten.matmul.default}
PROJECTIONS = {aten.linear.default, aten.addmm.default} | PLAIN_PRODUCTS
# Products that may take a constant weight too, but in a layout no pair of factors is known for.
OTHER_PRODUCTS = {
    "bmm", "baddbmm", "einsum", "bilinear", "tensordot", "dot", "mv", "lstm", "gru", "rnn_tanh", "rnn_relu",
} | GROUPED_PRODUCTS  # fmt: skip


def trace(model: nn.Module, inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor | None = None) -> Program:
    """Trace `model` into a program.

    Args:
        model: any module `torch.export` accepts; it is put in eval mode on a structural copy, and not changed.
        inputs: example inputs, by name or by position, with at least 2 sequences; made up for Hugging Face models
            when None. Batch and tokens become dynamic.

    Returns:
        The program at level TRACED: same outputs as the model, parameters shared.

    Raises:
        BadInput: the model cannot be traced, or has no projection weight at all.
    """
    named, positional = name_inputs(model, inputs)
    constants = {"use_cache": False} if _takes_cache(model) else {}
    tree = frozen_copy(model).eval()
    with watched_returns(tree) as returns:
        graph, symbols = export_graph(tree, named, constants, positional)
    without_branches: list[Refusal] = []
    if constants:
        returns, without_branches = returned_with_cache(tree, returns, named, constants)
    _name_tied_weights_by_their_user(graph, tree)
    _write_as_linear(graph, tree)
    sites, refusals = _find_sites(graph, tree, symbols, returns)
    if any(not site.in_tree for site in sites):
        if is_pretrained(model):
            refused = [site for site in sites if not site.in_tree]
            refusals += [
                Refusal(site.name, "is used by a function, not by a Linear or Conv1D module") for site in refused
            ]
            sites = [site for site in sites if site.in_tree]
            _forget(graph, {site.name for site in refused})
        else:
            tree = graph
    if not sites:
        found = "; ".join(map(str, refusals[:5])) or "no matrix product with a constant weight was found"
        raise BadInput(f"{type(model).__name__} has no projection that can be compressed ({found})")
    constant_nodes = constants_of(graph.graph)
    last_only = last_only_nodes(graph.graph, symbols, constant_nodes)
    needed_everywhere = {node.meta[SITE] for node in graph.graph.nodes if SITE in node.meta and node not in last_only}
    sites = [replace(site, last_only=site.name not in needed_everywhere) for site in sites]
    operators = describe_operators(_other_work(graph), symbols, constant_nodes, last_only)
    return Program(
        tree=tree,
        graph=graph,
        sites=tuple(sites),
        operators=_count_parameters_once(operators, graph),
        refusals=(*refusals, *without_branches),
        inputs=named,
        constants=constants,
        positional=positional,
    )


# ── Inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is a Hugging Face `PreTrainedModel`."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def generates(model: nn.Module) -> bool:
    """Whether a model generates as a decoder alone with a key/value cache, for which it gets graphs of its own."""
    if not is_pretrained(model) or not model.can_generate():  # type: ignore[operator]
        return False
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return not is_encoder_decoder and "past_key_values" in inspect.signature(model.forward).parameters


def _takes_cache(model: nn.Module) -> bool:
    return is_pretrained(model) and "use_cache" in inspect.signature(model.forward).parameters


def name_inputs(
    model: nn.Module, inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor | None
) -> tuple[dict[str, Tensor], bool]:
    """Inputs by the names of `model.forward`'s arguments, and whether the model is called by position.

    Raises:
        BadInput: no inputs for a model whose inputs cannot be made up, fewer than 2 sequences, or
            something that is no tensor.
    """
    if inputs is None:
        inputs = _made_up_inputs(model)
    if isinstance(inputs, Mapping):
        named, positional = dict(inputs), False
    else:
        values = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        parameters = [
            name
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        if len(values) > len(parameters):
            raise BadInput(
                f"{len(values)} example inputs for {type(model).__name__}, whose forward takes {parameters}"
            )
        named, positional = dict(zip(parameters, values, strict=False)), not is_pretrained(model)
    named = {name: _widened(value, model) for name, value in named.items()}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise BadInput(
                f"example input {name!r} is {type(value).__name__}, and only tensors can vary; leave it out, "
                f"or wrap the model in a module whose forward takes tensors alone"
            )
        if value.dim() == 0 or value.shape[0] < 2:
            raise BadInput(
                f"example input {name!r} has shape {tuple(value.shape)}; give at least 2 sequences, "
                f"or the batch size would be fixed at 1"
            )
    return named, positional


def _widened(value: Any, model: nn.Module) -> Any:
    """Inputs of other precisions in float32 where the model is: teachers are float32 copies, whatever they were."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if is_float and first is not None and first.dtype == torch.float32 else value


def _made_up_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Padded token ids, or pixels, for a Hugging Face model. The mask is not all ones: tracing would drop it."""
    if not is_pretrained(model):
        raise BadInput(
            f"{type(model).__name__} is no Hugging Face model, so its inputs are unknown; "
            f"pass inputs=(tensor, ...) with at least 2 sequences, or calibration batches"
        )
    config: Any = model.config
    main = str(model.main_input_name)
    generator = torch.Generator().manual_seed(0)
    first = next(model.parameters())
    device = first.device
    if main == "pixel_values":
        size, channels = (getattr(config, name, None) for name in ("image_size", "num_channels"))
        if size is None or channels is None:
            raise BadInput(f"{type(model).__name__} states no image size; pass inputs={{...}} with example images")
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(2, channels, height, width, generator=generator)
        return {main: pixels.to(device, first.dtype)}
    if main != "input_ids":
        raise BadInput(f"{type(model).__name__} takes {main!r}; pass inputs={{...}} with example tensors")
    ids = torch.randint(0, config.get_text_config().vocab_size, (2, 16), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    made_up = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "is_encoder_decoder", False) and DECODER_INPUT in inspect.signature(model.forward).parameters:
        made_up[DECODER_INPUT] = ids.flip(1)
    return {name: value.to(device) for name, value in made_up.items()}


def _dynamic_dimensions(value: Tensor) -> dict[int, Any]:
    """Batch always; tokens where the second axis can be one (ids, masks, sequences of features; not images)."""
    auto = torch.export.Dim.AUTO
    is_sequence = value.dim() == 3 or (value.dim() == 2 and not value.is_floating_point())
    return {0: auto, 1: auto} if is_sequence else {0: auto}


def fixed_sizes(program: Program) -> dict[tuple[str, int], int]:
    """(input, axis) -> the only size that the graph takes, where batch or tokens could not be left open.

    A model whose code loops over its tokens has another graph for each length.
    """
    fixed = {}
    for node in program.graph.graph.find_nodes(op="placeholder"):
        name, value = str(node.target), node.meta.get("val")
        if name in program.inputs and isinstance(value, Tensor):
            for axis in _dynamic_dimensions(program.inputs[name]):
                size = sizes_of(value)[axis]
                if isinstance(size, int) or size.is_number:
                    fixed[name, axis] = int(size)
    return fixed


def has_computed_sizes(program: Program) -> bool:
    """Whether sizes in the graph depend on values, so that those of the example are all that is known."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    values = [node.meta.get("val") for node in program.graph.graph.nodes]
    return any(free_unbacked_symbols(value) for value in values if isinstance(value, Tensor))


def export_graph(
    tree: nn.Module, named: Mapping[str, Tensor], constants: Mapping[str, Any], positional: bool
) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph of `tree`, and the name (`batch` or `tokens`) of each symbol in it.

    Raises:
        BadInput: torch.export cannot trace the model; its first line of explanation is kept.
    """
    shapes: dict[str, Any] = {name: _dynamic_dimensions(value) for name, value in named.items()}
    shapes |= dict.fromkeys(constants)
    args = tuple(named.values()) if positional else ()
    kwargs = dict(constants) if positional else {**named, **constants}
    dynamic: Any = tuple(shapes[name] for name in named) if positional else shapes
    try:
        # Under a caller's no_grad, the parts of a model that switch gradients off themselves would trace differently.
        with torch.enable_grad(), warnings.catch_warnings():
            # torch.export announces its own deprecations here; none of them is the caller's to act on.
            warnings.simplefilter("ignore")
            exported = torch.export.export(tree, args, kwargs, dynamic_shapes=dynamic, strict=False)
            graph = exported.module(check_guards=False)
    except Exception as error:  # torch.export raises many types; the first line says what it could not trace
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(f"torch.export could not trace {type(tree).__name__}: {reason[0]}") from error
    assert isinstance(graph, fx.GraphModule)
    _drop_assertions(graph)
    names = size_names(graph, list(named))
    return graph, names | _computed_sizes(graph, {**named, **constants}, names)


def _computed_sizes(graph: fx.GraphModule, given: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """Symbol -> what it is in the example, for sizes that the graph computes from values. Few models have any."""
    values = [node.meta.get("val") for node in graph.graph.nodes]
    symbols = {str(s) for value in values if isinstance(value, Tensor) for size in sizes_of(value)
               if not isinstance(size, int) for s in size.free_symbols}  # fmt: skip
    inputs = [given.get(str(node.target)) for node in graph.graph.find_nodes(op="placeholder")]
    if symbols <= known.keys() or any(isinstance(value, Tensor) and value.is_meta for value in inputs):
        return {}
    recorder = _SizeRecorder(graph)
    with torch.no_grad():
        recorder.run(*inputs, enable_io_processing=False)
    return {symbol: size for symbol, size in recorder.found.items() if symbol not in known}


class _SizeRecorder(fx.Interpreter):
    """Runs a graph and keeps the numbers that its computed sizes have."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        result, value = super().run_node(n), n.meta.get("val")
        if isinstance(value, torch.SymInt) and isinstance(result, int):
            self.found[str(value.node.expr)] = str(result)
        return result


def _drop_assertions(graph: fx.GraphModule) -> None:
    """Erase dtype and device assertions, nested ones too: they would pin both, and keep dead branches alive."""
    for part in graph.modules():
        if isinstance(part, fx.GraphModule):
            for node in list(part.graph.nodes):
                if node.target is aten._assert_tensor_metadata.default:
                    part.graph.erase_node(node)
            part.recompile()


def _write_as_linear(graph: fx.GraphModule, tree: nn.Module) -> None:
    """`x W^T`, and `+ b` after it, become one `linear` where a Linear's own class writes its product out so."""
    for path, inside in nodes_by_module(graph).items():
        module = tree.get_submodule(path)
        if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
            continue
        for product in [node for node in graph.graph.nodes if node in inside and node.target in PLAIN_PRODUCTS]:
            weight = _source(product.args[1])
            if _constant(graph, weight) is not module.weight or _stored_in_by_out(product):
                continue
            last, bias = product, None
            for user in product.users if len(product.users) == 1 else ():
                operands = [operand for operand in user.args if operand is not product]
                is_sum = user.target is aten.add.Tensor and not user.kwargs and len(operands) == 1
                if is_sum and user in inside and _constant(graph, operands[0]) is module.bias is not None:
                    last, bias = user, operands[0]
            with graph.graph.inserting_before(last):
                linear = graph.graph.call_function(aten.linear.default, (product.args[0], weight, bias))
            linear.meta = dict(last.meta)
            last.replace_all_uses_with(linear)
    remove_dead_nodes(graph.graph)
    graph.recompile()


# ── Sites ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _find_sites(
    graph: fx.GraphModule, tree: nn.Module, symbols: Mapping[str, str], returns: Returns
) -> tuple[list[Site], list[Refusal]]:
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    refusals: dict[str, Refusal] = {}
    constants = constants_of(graph.graph)
    for node in graph.graph.nodes:
        weight = _constant_weight(node, constants)
        if weight is None:
            for other, what in _other_weights(node, constants):
                if isinstance(_attribute(graph, other), nn.Parameter):
                    refusals[other] = Refusal(other, what)
            continue
        reason = _reason_to_refuse(graph, node, _attribute(graph, weight))
        if reason is None:
            calls[weight].append(node)
        else:
            refusals[weight] = Refusal(weight, reason)
    for weight, nodes in calls.items():
        if len({_bias(node) for node in nodes}) > 1:
            refusals[weight] = Refusal(weight, f"its {len(nodes)} calls add different biases, and a site has one")
    refusals |= {refusal.site: refusal for refusal in _refuse_nested(graph)}
    for weight in set(calls) & set(refusals):  # one call that cannot be a site spoils the weight's other calls
        del calls[weight]

    paths = _paths_by_parameter(tree)
    looked_up = {
        id(_attribute(graph, str(node.target)))
        for node in graph.graph.find_nodes(op="get_attr")
        if not all(map(_reads_as_projection, node.users))
    }
    groups = _group_names(graph.graph, calls)
    nodes_of = nodes_by_module(graph)
    sites = [
        _describe_site(weight, nodes, graph, tree, symbols, paths, looked_up, groups[weight], nodes_of)
        for weight, nodes in calls.items()
    ]
    for site in sites:
        for node in calls[site.weight]:
            node.meta[SITE] = site.name
    branches = removable_branches(graph, returns, sites)
    return [replace(site, branch=branches.get(site.name)) for site in sites], list(refusals.values())


def _constant_weight(node: fx.Node, constants: Mapping[fx.Node, str]) -> str | None:
    """Path of the parameter that a matrix product takes as its weight, or None if it is no such product."""
    if node.op != "call_function":
        return None
    if node.target in PROJECTIONS:
        return constants.get(_weight_operand(node))
    if operation_name(node) in OTHER_PRODUCTS:
        return next((constants[operand] for operand in node.all_input_nodes if operand in constants), None)
    return None


def _other_weights(node: fx.Node, constants: Mapping[fx.Node, str]) -> Iterator[tuple[str, str]]:
    """Paths of constants that a node multiplies by like a projection, but in no layout of one, and what that is."""
    left: Any = node.args[0] if node.target in PLAIN_PRODUCTS else None
    if left in constants:
        yield constants[left], "the weight is on the left of the product, where it mixes positions"
    kernel: Any = node.args[1] if node.target in CONVOLUTIONS and node.args[6:] in ((), (1,)) else None  # no groups
    if kernel in constants and all(size == 1 for size in kernel.meta["val"].shape[2:]):
        yield constants[kernel], f"the kernel of {operation_name(node)}, of width 1; a Linear would be a site"


def _refuse_nested(graph: fx.GraphModule) -> list[Refusal]:
    """Weights of products in graphs inside this one: without gradients, under autocast, or on a condition."""
    refusals = []
    for node in graph.graph.nodes:
        operands = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        values = [_constant(graph, operand) for operand in operands]
        nested = [index for index, value in enumerate(values) if isinstance(value, fx.GraphModule)]
        for index in nested:
            inner: Any = values[index]
            # Such an operator takes its graphs first, then what each of them is called with.
            given = dict(zip(inner.graph.find_nodes(op="placeholder"), operands[nested[-1] + 1 :], strict=False))
            for product in inner.graph.nodes:
                weight = _source(_weight_operand(product)) if product.target in PROJECTIONS else None
                outer = given.get(weight)
                if outer is not None and isinstance(_constant(graph, outer), nn.Parameter):
                    reason = f"it is read inside {operation_name(node)}, a graph of its own that is not looked into"
                    refusals.append(Refusal(str(outer.target), reason))
    return refusals


def _constant(graph: fx.GraphModule, operand: Any) -> Any:
    """What an operand holds if it reads an attribute of the graph module, else None."""
    is_read = isinstance(operand, fx.Node) and operand.op == "get_attr"
    return _attribute(graph, str(operand.target)) if is_read else None


def _source(weight: Any) -> Any:
    """What a product's weight is before its transposes."""
    while isinstance(weight, fx.Node) and weight.target in CONSTANT_VIEWS:
        weight = weight.args[0]
    return weight


def constants_of(graph: fx.Graph) -> dict[fx.Node, str]:
    """Node -> the first constant it is computed from, for every node that depends on constants alone.

    One pass in graph order; asking node by node would walk the graph again for each.
    """
    known: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = str(node.target)
        elif node.op == "call_function" and node.all_input_nodes and all(n in known for n in node.all_input_nodes):
            known[node] = known[node.all_input_nodes[0]]
    return known


def projection_shapes(graph: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """Weight path -> shape as stored, of every matrix product with a constant weight in a graph."""
    constants = constants_of(graph.graph)
    weights = [_constant_weight(node, constants) for node in graph.graph.nodes]
    return {path: tuple(_attribute(graph, path).shape) for path in weights if path is not None}


def _weight_operand(node: fx.Node) -> Any:
    """The weight of a projection node, as the node takes it."""
    return node.args[2 if node.target is aten.addmm.default else 1]


def _reason_to_refuse(graph: fx.GraphModule, node: fx.Node, weight: Any) -> str | None:
    """Why a matrix product with a constant weight cannot be a site, or None if it can."""
    if operation_name(node) in GROUPED_PRODUCTS:
        return f"the weight holds {len(weight)} routed experts, and a low-rank form of those is not known"
    if node.target not in PROJECTIONS:
        return f"{node.target} is no linear, addmm, mm or matmul, so its low-rank form is not known"
    if not isinstance(weight, nn.Parameter):
        return "the weight is a buffer, not a trained parameter"
    if weight.dim() != 2:
        return f"the weight has {weight.dim()} axes {tuple(weight.shape)}, not 2"
    if not weight.is_floating_point():
        return f"the weight is {weight.dtype}, not a floating-point type"
    path = _weight_operand(node)
    while path.op != "get_attr":
        if path.target not in CONSTANT_VIEWS:
            return f"the weight passes through {path.target} before the product"
        path = path.args[0]
    if node.target is aten.addmm.default:
        bias = node.args[0]
        if dict(node.kwargs) or not isinstance(bias, fx.Node) or bias.op != "get_attr" or bias.meta["val"].dim() != 1:
            return "addmm adds something that is no constant bias vector"
    elif _bias(node) is not None and not isinstance(_attribute(graph, str(_bias(node))), nn.Parameter):
        return "its bias is no trained parameter"
    return None


def _describe_site(
    weight: str,
    nodes: list[fx.Node],
    graph: fx.GraphModule,
    tree: nn.Module,
    symbols: Mapping[str, str],
    paths: Mapping[int, list[str]],
    looked_up: set[int],
    group: str,
    nodes_of: Mapping[str, set[fx.Node]],
) -> Site:
    node = nodes[0]
    tensor = _attribute(graph, weight)
    transposed = _stored_in_by_out(node)
    out_features, in_features = reversed(tensor.shape) if transposed else tensor.shape
    owner_path = weight.rpartition(".")[0]
    is_plain = _is_plain_projection(tree.get_submodule(owner_path), nodes, nodes_of[owner_path])
    in_tree = is_plain and all(module_stack(call)[-1:] == [owner_path] for call in nodes)
    name = owner_path if is_plain else weight
    others = [path for path in paths.get(id(tensor), []) if path != weight]
    aliases = tuple(
        sorted({alias for path in others for alias in (path, path.rpartition(".")[0])} | {weight} - {name})
    )
    return Site(
        name=name,
        weight=weight,
        in_features=int(in_features),
        out_features=int(out_features),
        rows=tuple(_rows(call, int(out_features), symbols) for call in nodes),
        group=group,
        bias=_bias(node),
        aliases=aliases,
        transposed=transposed,
        kind="head" if _is_head(name, weight, nodes, tree) else "projection",
        tied=id(tensor) in looked_up,
        in_tree=in_tree,
    )


def _stored_in_by_out(node: fx.Node) -> bool:
    """Whether the parameter is laid out (in x out). `linear` takes (out x in); products take (in x out), unless the
    parameter passes through an odd number of transposes."""
    transposed = node.target is not aten.linear.default
    operand = _weight_operand(node)
    while operand.op != "get_attr":
        transposed = not transposed
        operand = operand.args[0]
    return transposed


def _is_plain_projection(module: nn.Module, calls: list[fx.Node], inside: set[fx.Node]) -> bool:
    """Whether `module` computes a projection and nothing else, so that another module can stand in its place.

    Args:
        calls: of its weight.
        inside: all that was traced in it.
    """
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, nn.Linear | Conv1D):
        return False
    return type(module).forward in (nn.Linear.forward, Conv1D.forward) or inside == set(calls)


def _bias(node: fx.Node) -> str | None:
    operand = node.args[0] if node.target is aten.addmm.default else node.args[2] if len(node.args) > 2 else None
    return str(operand.target) if isinstance(operand, fx.Node) else None


def _rows(node: fx.Node, out_features: int, symbols: Mapping[str, str]) -> str:
    return multiplied(element_count(node.meta["val"].shape[:-1], symbols))


def _is_head(name: str, weight: str, nodes: list[fx.Node], tree: nn.Module) -> bool:
    """The output embeddings of a Hugging Face model, or a layer outside its base model that feeds the output."""
    if not is_pretrained(tree):
        return False
    model: Any = tree
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is _attribute(tree, weight):
        return True
    base = model.base_model_prefix
    return model.base_model is not model and not name.startswith(f"{base}.") and any(map(_feeds_output, nodes))


def _feeds_output(node: fx.Node) -> bool:
    return any(user.op == "output" or (user.target in VIEWS and _feeds_output(user)) for user in node.users)


def _paths_by_parameter(tree: nn.Module) -> dict[int, list[str]]:
    paths: dict[int, list[str]] = defaultdict(list)
    for path, parameter in tree.named_parameters(remove_duplicate=False):
        paths[id(parameter)].append(path)
    return paths


def _group_names(graph: fx.Graph, calls: Mapping[str, list[fx.Node]]) -> dict[str, str]:
    """Sites that read the same input share a group, named by the first of them: `...q_proj+k_proj+v_proj`.

    A weight called several times reads several inputs and stays alone. What is written to between two reads is two
    inputs.
    """
    members: dict[Any, list[str]] = defaultdict(list)
    written: dict[fx.Node, int] = defaultdict(int)
    times_written: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.target in PROJECTIONS:
            times_written[node] = written[memory_of(projection_input(node))]
        for operand in written_operands(node):
            written[memory_of(operand)] += 1
    for weight, nodes in calls.items():
        first = nodes[0]
        key = (_rows_of(projection_input(first)), times_written[first]) if len(nodes) == 1 else weight
        members[key].append(weight)
    names: dict[str, str] = {}
    for weights in members.values():
        owners = [weight.removesuffix(".weight") for weight in weights]
        name = "+".join([owners[0], *(owner.rpartition(".")[2] for owner in owners[1:])])
        names |= dict.fromkeys(weights, name)
    return names


def _rows_of(node: fx.Node) -> fx.Node:
    """The node whose rows this one holds: all of them, whole and in their order. A slice holds others."""
    while node.op == "call_function" and node.target in VIEWS - REORDERINGS and isinstance(node.args[0], fx.Node):
        ours, theirs = (sizes_of(view.meta["val"]) for view in (node, node.args[0]))
        if not ours or not theirs or ours[-1] != theirs[-1] or math.prod(ours) != math.prod(theirs):
            break
        node = node.args[0]
    return node


# ── The rest of the graph ────────────────────────────────────────────────────────────────────────────────────────


def _other_work(graph: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_function"
        and SITE not in node.meta
        and node.target not in VIEWS
        and node.target is not python_operator.getitem
        and _is_tensor(node.meta.get("val"))
    ]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value)
    )


def _count_parameters_once(operators: Iterable[Operator], graph: fx.GraphModule) -> tuple[Operator, ...]:
    """Charge each parameter that no site owns to the first operator that reads it."""
    charged = {id(_attribute(graph, str(target))) for target in _site_parameters(graph)}
    constants = constants_of(graph.graph)
    result = []
    for node, operator in zip(_other_work(graph), operators, strict=True):
        held = 0
        for argument in node.all_input_nodes:
            path = constants.get(through_views(argument))  # a class token is expanded to the batch first
            tensor = None if path is None else _attribute(graph, path)
            if isinstance(tensor, nn.Parameter) and id(tensor) not in charged:
                charged.add(id(tensor))
                held += tensor.numel()
        result.append(replace(operator, params=held))
    return tuple(result)


def _site_parameters(graph: fx.GraphModule) -> list[str]:
    """Bias vectors of sites; their weights may also be lookups, which then hold them."""
    biases = [_bias(node) for node in graph.graph.nodes if SITE in node.meta]
    return [bias for bias in biases if bias is not None]


def _name_tied_weights_by_their_user(graph: fx.GraphModule, tree: nn.Module) -> None:
    """Give the projections of a tied parameter one name, and each other use the name of the module it is in.

    torch.export names all uses of a tied parameter alike (`lm_head.weight` for the lookup too), so replacing the
    head would take the lookup's table away. Two projections with one weight stay one site.
    """
    paths = _paths_by_parameter(tree)
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        aliases = paths.get(id(_attribute(graph, str(node.target))), [])
        if len(aliases) < 2:
            continue
        projections = [user for user in node.users if _reads_as_projection(user)]
        for user in list(node.users):
            named_after = projections[0] if user in projections else user
            owner = (module_stack(named_after) or [""])[-1]
            alias = next((path for path in aliases if path.rpartition(".")[0] == owner), str(node.target))
            if alias != node.target:
                with graph.graph.inserting_before(node):
                    renamed = graph.graph.get_attr(alias)
                renamed.meta = dict(node.meta)
                user.replace_input_with(node, renamed)
    remove_dead_nodes(graph.graph)
    graph.recompile()


def _reads_as_projection(user: fx.Node) -> bool:
    """Whether a use of a parameter is as the weight of a product, perhaps through a transpose."""
    return user.target in PROJECTIONS or (
        user.target in CONSTANT_VIEWS and any(_reads_as_projection(further) for further in user.users)
    )


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def _forget(graph: fx.GraphModule, names: set[str]) -> None:
    for node in graph.graph.nodes:
        if node.meta.get(SITE) in names:
            del node.meta[SITE]
