"""Outline: what planning needs of a model, and nothing that takes weights or a whole graph to know.

Large models repeat a few layers many times. Where they provably do, a shortened copy is traced and its layers are
written out to the full count; everything that looks irregular is traced as it is. Either way the sites, operators
and refusals equal those of the full trace.

A repetition is believed when three things agree: the layers' modules, settings and parameter shapes, compared over
all layers of the model; two traced periods and one late layer, whose work must be the same but for the layer's
number; and the graph, where nothing outside the layers may read any layer but the last.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from .errors import BadInput
from .graph import Program
from .operators import innermost_module
from .source import NO_LIMIT, Source, position_limit, shape_of
from .tracing import generates, is_pretrained, trace
from .values import Operator, Refusal, Site

# Settings that only say where in the stack a layer stands.
POSITION_SETTINGS = {"layer_idx", "layer_index", "layer_id", "layer_number", "block_idx"}

Item = TypeVar("Item", bound=Site | Operator | Refusal)


@dataclass(frozen=True)
class Outline:
    """A model as planning sees it.

    Attributes:
        sites: every projection weight, in the order the graph first uses them.
        operators: everything else in the graph, as data.
        refusals: weights that look like projections and were left alone, with reasons.
        positions: longest sequence the model was made for, or None where it states none.
        can_generate: whether it is a language model with a key/value cache; None for modules that are no Hugging
            Face models, of which nobody says.
        name: for reports.
    """

    sites: tuple[Site, ...] = field(repr=False)
    operators: tuple[Operator, ...] = field(repr=False)
    refusals: tuple[Refusal, ...] = field(repr=False)
    positions: int | None
    can_generate: bool | None
    name: str


def outline(model: Source | nn.Module | str | Path | Any, inputs: Any = None) -> Outline:
    """The outline of a model, without its weights where they are not there.

    Args:
        model: a config, a folder with or without weights, a hub id, a module on any device, or a loaded source.
        inputs: example inputs as for `trace`; needed for modules that are no Hugging Face models.

    Raises:
        BadInput: the model cannot be found, cannot be traced, or has no projection weight at all.
    """
    source = model if isinstance(model, Source) else shape_of(model)
    parts = _repeated_trace(source.model, inputs)
    if parts is None:
        program = trace(source.model, inputs)
        parts = program.sites, program.operators, program.refusals
    return Outline(*parts, *_generation(source.model), source.name)


def outline_of(program: Program, name: str) -> Outline:
    """The outline of a model that was traced in full."""
    return Outline(program.sites, program.operators, program.refusals, *_generation(program.tree), name)


def _generation(model: Any) -> tuple[int | None, bool | None]:
    """Longest sequence (None where none is stated), and whether the model can generate."""
    if not is_pretrained(model):
        return None, None
    limit = position_limit(model)
    return None if limit == NO_LIMIT else limit, generates(model)


# ── Which layers repeat ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Repetition:
    """Layers of one list that repeat: after `lead` layers of any kind, layer i is like layer i + period.

    Attributes:
        path: of the module list.
        count: layers in it.
    """

    path: str
    count: int
    lead: int
    period: int

    @property
    def kept(self) -> tuple[int, ...]:
        """Layers of the shortened model: the lead, two periods, and the last layer that starts a period.

        The last one is there to catch what depends on a layer's number alone.
        """
        last = self.lead + (self.count - 1 - self.lead) // self.period * self.period
        return (*range(self.lead + 2 * self.period), last)

    def layer_of(self, path: str) -> int | None:
        """The number of the layer that a dotted path leads into, or None outside the layers."""
        found = re.match(rf"{re.escape(self.path)}\.(\d+)(?=\.|$)", path)
        return None if found is None else int(found[1])

    def moved(self, item: Item, by: int) -> Item:
        """The same thing `by` layers further on: layer numbers change in every path it holds."""
        changes: dict[str, Any] = {}
        for entry in fields(item):
            value = getattr(item, entry.name)
            if isinstance(value, str):
                changes[entry.name] = self._moved_path(value, by)
            elif isinstance(value, tuple) and value and isinstance(value[0], str):
                changes[entry.name] = tuple(self._moved_path(part, by) for part in value)
        return replace(item, **changes)

    def _moved_path(self, path: str, by: int) -> str:
        layer = self.layer_of(path)
        if layer is None:
            return path
        return f"{self.path}.{layer + by}{path[len(f'{self.path}.{layer}') :]}"


def find_repetition(model: nn.Module) -> Repetition | None:
    """The layers that repeat often enough for a shortened model to be worth tracing, or None.

    Only Hugging Face models are looked at: their layers run in order, one after the other, as written.
    """
    if not is_pretrained(model):
        return None
    lists = sorted(_outermost_lists(model), key=lambda entry: -len(entry[1]))
    if not lists or any(len(other) == len(lists[0][1]) for _, other in lists[1:]):
        return None  # a second list as long might be walked through beside the first
    path, layers = lists[0]
    kinds = _kinds_of_layers(model, layers)
    found = min(
        (Repetition(path, len(kinds), _irregular_lead(kinds, period), period) for period in range(1, len(kinds))),
        key=lambda repetition: len(repetition.kept),
        default=None,
    )
    return found if found is not None and len(found.kept) < found.count else None


def _outermost_lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield child_path, child
        else:
            yield from _outermost_lists(child, child_path)


def _kinds_of_layers(model: Any, layers: nn.ModuleList) -> list[int]:
    """A number for each layer, equal where nothing but the layer's place in the stack differs.

    Lists in the config with an entry a layer count too: a model may look there when it runs.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    per_layer = [
        value
        for config in configs
        for value in vars(config).values()
        if isinstance(value, list | tuple) and len(value) == len(layers)
    ]
    numbers: dict[Any, int] = {}
    return [
        numbers.setdefault((_description(layer), repr([value[index] for value in per_layer])), len(numbers))
        for index, layer in enumerate(layers)
    ]


def _description(layer: nn.Module) -> tuple[Any, ...]:
    """The modules of a layer with their settings, and the shape and type of every tensor in it."""
    modules = tuple((path, type(module), _settings(module)) for path, module in layer.named_modules())
    tensors = tuple(
        (path, tuple(tensor.shape), tensor.dtype)
        for tensors in (layer.named_parameters(), layer.named_buffers())
        for path, tensor in tensors
    )
    return modules, tensors


def _settings(module: nn.Module) -> str:
    """Numbers, switches and names that a module holds, apart from its place in the stack."""
    plain = (bool, int, float, str, tuple, type(None))
    return repr(
        [(n, v) for n, v in sorted(vars(module).items()) if n not in POSITION_SETTINGS and isinstance(v, plain)]
    )


def _irregular_lead(kinds: Sequence[int], period: int) -> int:
    """How many layers stand before the first one from which on each is like the one a period later."""
    lead = len(kinds) - period
    while lead > 0 and kinds[lead - 1] == kinds[lead - 1 + period]:
        lead -= 1
    return lead


# ── Tracing a shortened model ────────────────────────────────────────────────────────────────────────────────────


def _repeated_trace(
    model: nn.Module, inputs: Any
) -> tuple[tuple[Site, ...], tuple[Operator, ...], tuple[Refusal, ...]] | None:
    """Sites, operators and refusals of a model whose layers repeat, or None where it has to be traced whole."""
    repetition = find_repetition(model)
    if repetition is None:
        return None
    try:
        program = trace(_shortened(model, repetition.path, repetition.kept), inputs)
    except BadInput:
        return None  # it cannot run with fewer layers; if it cannot run at all, the whole trace says why
    if _skips_layers(program.graph, repetition):
        return None
    sites = _written_out(program.sites, [site.name for site in program.sites], repetition)
    operators = _written_out(program.operators, [operator.owner for operator in program.operators], repetition)
    refusals = _written_out(program.refusals, [refusal.site for refusal in program.refusals], repetition)
    if sites is None or operators is None or refusals is None:
        return None
    return sites, operators, refusals


def _shortened(model: nn.Module, path: str, kept: Sequence[int]) -> nn.Module:
    """`model` with only some layers of the list at `path`. Modules on the way there are new, all others shared."""
    clone = type(model).__new__(type(model))
    clone.__dict__ = dict(vars(model))
    clone._modules = dict(model._modules)
    name, _, rest = path.partition(".")
    child = model.get_submodule(name)
    if rest:
        clone._modules[name] = _shortened(child, rest, kept)
    else:
        assert isinstance(child, nn.ModuleList)
        clone._modules[name] = nn.ModuleList(child[index] for index in kept)
    return clone


def _skips_layers(graph: fx.GraphModule, repetition: Repetition) -> bool:
    """Whether something outside the layers reads a layer's result that is not the last one's.

    Such work (a concatenation over all layers, say) grows with the number of layers.
    """
    last = len(repetition.kept) - 1
    layers = {node: repetition.layer_of(innermost_module(node)[0]) for node in graph.graph.nodes}
    return any(
        layers[node] is None and layers[operand] not in (None, last) and isinstance(operand.meta.get("val"), Tensor)
        for node in graph.graph.nodes
        if node.op == "call_function"
        for operand in node.all_input_nodes
    )


# ── Writing the layers out ───────────────────────────────────────────────────────────────────────────────────────


def _written_out(items: Sequence[Item], paths: Sequence[str], repetition: Repetition) -> tuple[Item, ...] | None:
    """The items of a shortened model as the whole model has them, or None where its layers do not repeat.

    Args:
        items: in graph order, or several such runs one after the other (refusals come by reason).
        paths: where each one lies.
    """
    last_only = {item.name for item in items if not isinstance(item, Refusal) and item.last_only}
    alike = [_as_in_other_layers(item, last_only, repetition) for item in items]
    result: list[Item] = []
    for run in _runs(alike, list(map(repetition.layer_of, paths))):
        whole = _whole_run(run, repetition)
        if whole is None:
            return None
        result += whole
    return tuple(_as_in_last_layer(item, last_only, repetition) for item in result)


def _as_in_other_layers(item: Item, last_only: Collection[str], repetition: Repetition) -> Item:
    """Of the last layer, what is not like the layers before: it may be needed at the last position alone."""
    if isinstance(item, Refusal) or repetition.layer_of(item.name) != len(repetition.kept) - 1:
        return item
    return replace(item, last_only=repetition.moved(item, -repetition.period).name in last_only)


def _as_in_last_layer(item: Item, last_only: Collection[str], repetition: Repetition) -> Item:
    """The reverse, for the whole model's last layer."""
    if isinstance(item, Refusal) or repetition.layer_of(item.name) != repetition.count - 1:
        return item
    in_shortened = repetition.moved(item, len(repetition.kept) - repetition.count)
    return replace(item, last_only=in_shortened.name in last_only)


def _runs(items: Sequence[Item], layers: Sequence[int | None]) -> Iterator[list[tuple[Item, int | None]]]:
    """Stretches in which the layer's number never falls, each item with its layer."""
    run: list[tuple[Item, int | None]] = []
    highest = 0
    for item, layer in zip(items, layers, strict=True):
        if layer is not None:
            if layer < highest:
                yield run
                run = []
            highest = layer
        run.append((item, layer))
    if run:
        yield run


def _whole_run(run: Sequence[tuple[Item, int | None]], repetition: Repetition) -> list[Item] | None:
    """What comes before the layers, all the layers, and what comes after; None where that is not the order."""
    before: list[Item] = []
    after: list[Item] = []
    layers: list[list[Item]] = [[] for _ in repetition.kept]
    for item, layer in run:
        if layer is None:
            (after if any(layers) else before).append(item)
        elif after:
            return None  # work between two layers that belongs to neither
        else:
            layers[layer].append(item)
    repeated = _all_layers(layers, repetition)
    return None if repeated is None else [*before, *repeated, *after]


def _all_layers(layers: Sequence[Sequence[Item]], repetition: Repetition) -> list[Item] | None:
    """Every layer of the whole model from those of the shortened one, or None if these do not repeat."""
    lead, period = repetition.lead, repetition.period
    for index in range(lead, lead + period + 1):
        if [repetition.moved(item, period) for item in layers[index]] != list(layers[index + period]):
            return None
    result = [item for layer in layers[:lead] for item in layer]
    for number in range(lead, repetition.count):
        template = lead + (number - lead) % period
        result += [repetition.moved(item, number - template) for item in layers[template]]
    return result
