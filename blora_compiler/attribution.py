"""Where the time of a shipped graph goes: ONNX Runtime's own profile, its nodes mapped to sites and kinds of work.

What is measured, and what is done to it:

1. One session records a profile while another, of the same graph, runs without; they take turns, round by round.
2. Recording costs time. Most of it lies between the nodes and is never counted: the total is the unrecorded median.
   The rest, a microsecond or two, lies inside every node's own time and is taken off again. Its size is the one
   number for which the nodes add up to the unrecorded run, at most what the shortest node took, at least nothing.
3. What the nodes do not account for is the kind `session`: binding inputs, dispatching kernels, the caller's side.
   So the kinds always add up to the total. `session` can come out below zero where the machine was busier in the
   recorded rounds than in the others; it is shown as it is.
4. ONNX Runtime renames nodes that it fuses (`fused node_Gemm_283`, `node_MatMul_332/MatMulScaleFusion/`). A node
   computes the sites of every stamped name that is a whole part of its own name. A node that was fused away under
   another name altogether is `unmapped`: shown, not guessed.
5. A GEMM that computes several sites (packed q/k/v) is shared between them by the columns that each has there: given
   by the caller, or read off the second GEMMs of factored sites, else evenly; each node says which.

On CUDA the profile of ONNX Runtime's released packages times launches, not kernels: the GPU works on after the node
has returned, and the waiting ends up in `session`. `Attribution.clock` says so.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from .artifact import Artifact
from .errors import BadInput
from .passes.onnx_attend_in_parts import PREFIX
from .timing import TIMED_IN_A_TURN, UNTIMED_IN_A_TURN, call_of, interleaved, setting_of
from .values import Factored, Form, Site

Phase = Literal["prefill", "decode", "model"]
Clock = Literal["kernels", "launches"]
SharedBy = Literal["whole", "columns", "evenly"]

# Kinds of work, in the order they are shown. `unmapped` is the time of GEMMs that no site claims; `copies` are those
# between devices; `session` is everything outside the nodes.
KINDS = (
    "sites", "head", "attention", "norm", "elementwise", "lookup", "experts", "convolution", "shape", "unmapped",
    "copies", "other", "session",
)  # fmt: skip

_MOST_EVENTS = 1_000_000  # ONNX Runtime drops what comes after.

_GEMMS = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "GemmFastGelu", "MatMulNBits", "MatMulInteger",
                    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"})  # fmt: skip
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention",
                        "PackedMultiHeadAttention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention",
                        "Softmax", "BiasSoftmax"})  # fmt: skip
_GATHERS = frozenset({"Gather", "GatherElements", "GatherND", "GatherBlockQuantized", "EmbedLayerNormalization"})
_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "ReorderInput", "ReorderOutput"})
_EXPERTS = frozenset({"MoE", "QMoE"})
_COPIES = frozenset({"MemcpyToHost", "MemcpyFromHost"})
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
_FREE_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
# What may stand between a head and the logits: its bias, casts, soft-capping.
_AFTER_A_HEAD = _FREE_VIEWS | {"Add", "Cast", "Div", "Mul", "Tanh"}
_FLOATS = frozenset({"float", "float16", "bfloat16", "double"})


# ── What is reported ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class NodeTime:
    """One node of the graph as ONNX Runtime ran it.

    Attributes:
        name, op: its name and operator type after ONNX Runtime's own fusions.
        kind: of work, one of `KINDS`.
        provider: the execution provider it ran on.
        calls: how often it runs in one run of the graph.
        recorded_ms: median of its time in one run, as recorded.
        ms: the same without what recording cost.
        shares: site -> the fraction of the node that is this site's; they add up to 1, or there are none.
        shared_by: how the shares were found: one site owns the `whole` node, by `columns`, or `evenly` for want of
            them; None where no site is computed.
        product: (rows, inner, columns) of a GEMM that computes sites; empty for every other node.
    """

    name: str
    op: str
    kind: str
    provider: str
    calls: int
    recorded_ms: float
    ms: float
    shares: Mapping[str, float] = field(default_factory=dict)
    shared_by: SharedBy | None = None
    product: tuple[int, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites it computes, in the order of their columns."""
        return tuple(self.shares)


@dataclass(frozen=True)
class Attribution:
    """Where the time of one run of one graph goes. All times are milliseconds.

    Attributes:
        setting: for example `prefill 1x256`, as `Timing` names it.
        clock: what node times are: of `kernels` (CPU), or of their `launches` (CUDA).
        repeats: recorded runs, and as many unrecorded ones.
        total_ms: median of the unrecorded runs, as the caller sees them.
        recorded_ms: median of the recorded runs, as the caller sees them.
        node_overhead_us: microseconds taken off every call of every node for being recorded.
        nodes: every node that ran, in order.
        missing_sites: sites of the export that no node of this graph was stamped with.
    """

    setting: str
    clock: Clock
    repeats: int
    total_ms: float
    recorded_ms: float
    node_overhead_us: float
    nodes: tuple[NodeTime, ...]
    missing_sites: tuple[str, ...] = ()

    @property
    def sites(self) -> dict[str, float]:
        """Site -> its time, heads that are sites included; in the order the graph runs them."""
        found: dict[str, float] = defaultdict(float)
        for node in self.nodes:
            for site, share in node.shares.items():
                found[site] += share * node.ms
        return dict(found)

    @property
    def kinds(self) -> dict[str, float]:
        """Kind of work -> its time; they add up to `total_ms`. Kinds that the graph has none of are left out."""
        found: dict[str, float] = defaultdict(float)
        for node in self.nodes:
            found[node.kind] += node.ms
        found["session"] = self.total_ms - sum(found.values())
        return {kind: found[kind] for kind in KINDS if kind in found}

    @property
    def by_provider(self) -> dict[str, tuple[int, float]]:
        """Execution provider -> how many nodes it ran, and their time."""
        names = dict.fromkeys(node.provider for node in self.nodes)
        times = {name: [node.ms for node in self.nodes if node.provider == name] for name in names}
        return {name: (len(values), sum(values)) for name, values in times.items()}

    @property
    def unmapped_ms(self) -> float:
        """Time of GEMMs with a constant weight that are neither a site's nor the head's."""
        return self.kinds.get("unmapped", 0.0)

    @property
    def overhead_ms(self) -> float:
        """What recording cost one run."""
        return self.recorded_ms - self.total_ms

    def to_json(self) -> dict[str, Any]:
        """JSON values, sums included; `from_json` reads them back."""
        return {
            **asdict(self),
            "sites": self.sites,
            "kinds": self.kinds,
            "by_provider": {name: {"nodes": count, "ms": ms} for name, (count, ms) in self.by_provider.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Attribution:
        """The attribution that `to_json` wrote."""
        stored = {key: value for key, value in data.items() if key not in ("sites", "kinds", "by_provider")}
        nodes = tuple(NodeTime(**{**node, "product": tuple(node.get("product", ()))}) for node in data["nodes"])
        return cls(**{**stored, "nodes": nodes, "missing_sites": tuple(data["missing_sites"])})

    def table(self) -> str:
        """Markdown: the kinds of work, then the sites, the slowest first."""
        from .report import table  # the report renders attributions

        nodes = {kind: sum(node.kind == kind for node in self.nodes) or "-" for kind in KINDS}
        kinds = [(kind, f"{ms:.3f}", _percent(ms, self.total_ms), nodes[kind]) for kind, ms in self.kinds.items()]
        slowest = sorted(self.sites.items(), key=lambda item: -item[1])
        sites = [(site, f"{ms:.3f}", _percent(ms, self.total_ms)) for site, ms in slowest]
        parts = [self._headline(), table(("kind of work", "ms", "share", "nodes"), kinds)]
        if sites:
            parts.append(table(("site", "ms", "share"), sites))
        return "\n\n".join(parts)

    def _headline(self) -> str:
        lines = [
            f"{self.setting}: {self.total_ms:.3f} ms, median of {self.repeats} runs; recording added "
            f"{self.overhead_ms:.3f} ms, of which {self.node_overhead_us:.1f} us a node were taken off again."
        ]
        evenly = sum(node.shared_by == "evenly" for node in self.nodes)
        if evenly:
            lines.append(
                f"{evenly} of {len(self.nodes)} nodes compute several sites and are shared evenly: how many columns "
                f"each site has there is not known."
            )
        if self.clock == "launches":
            lines.append("Node times are of launches; the GPU's work is in `session`.")
        if self.missing_sites:
            lines.append(f"No node of this graph was stamped with: {', '.join(self.missing_sites)}.")
        return "\n".join(lines)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


@dataclass(frozen=True)
class Row:
    """Predicted beside measured, for one site or one kind of work. None: only the other side has it.

    Attributes:
        scope: `"kind"` or `"site"`.
        name: of the site or the kind.
        predicted_ms, measured_ms: milliseconds in one run.
    """

    scope: Literal["kind", "site"]
    name: str
    predicted_ms: float | None
    measured_ms: float | None

    @property
    def error_ms(self) -> float:
        """Predicted less measured; what only one side has counts in full."""
        return (self.predicted_ms or 0.0) - (self.measured_ms or 0.0)

    def to_json(self) -> dict[str, Any]:
        """JSON values, the error included."""
        return {**asdict(self), "error_ms": self.error_ms}


def beside(
    attribution: Attribution, predicted: Mapping[str, float], predicted_kinds: Mapping[str, float]
) -> list[Row]:
    """Predicted times beside measured ones: the kinds, then the sites, each with the largest error first.

    Args:
        attribution: what was measured.
        predicted: site -> milliseconds.
        predicted_kinds: kind of work -> milliseconds, by the names of `KINDS`; another name gets a row of its own.
    """
    return [
        *_rows("kind", predicted_kinds, attribution.kinds),
        *_rows("site", predicted, attribution.sites),
    ]


def _rows(scope: Literal["kind", "site"], predicted: Mapping[str, float], measured: Mapping[str, float]) -> list[Row]:
    names = dict.fromkeys((*measured, *predicted))
    rows = [Row(scope, name, predicted.get(name), measured.get(name)) for name in names]
    return sorted(rows, key=lambda row: -abs(row.error_ms))


def block_columns(sites: Iterable[Site], forms: Mapping[str, Form]) -> dict[str, int]:
    """Site -> the columns it has in a packed GEMM: its rank if factored, all its outputs if dense.

    Of sites that share their first factor the second ones are packed, and have all their outputs there.
    """
    found = {}
    for site in sites:
        form = forms.get(site.name)
        if isinstance(form, Factored):
            found[site.name] = form.outputs_of_second(site) if form.sharers else form.rank
        else:
            found[site.name] = site.out_features
    return found


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────


def profile_export(
    artifact: Artifact,
    *,
    batch: int = 1,
    tokens: int = 256,
    repeats: int = 20,
    phase: Phase,
    columns: Mapping[str, int] | None = None,
) -> Attribution:
    """Record ONNX Runtime's profile of one graph, and say which site and which kind of work took which time.

    Args:
        artifact: the export; its own session of the graph runs unrecorded beside the recorded one.
        batch, tokens: as in `time_exports`: a prompt's shape; a decode step stands behind a cache of `tokens`.
        repeats: recorded runs at least, warm-up not counted; they come in turns of three.
        phase: which graph: `"prefill"` or `"decode"` of a generating export, `"model"` of another.
        columns: site -> its columns in packed GEMMs (`block_columns`), to share their time by.

    Raises:
        BadInput: if the export has no such graph, a number is below 1, or the profile would outgrow ONNX Runtime's
            own limit.
    """
    _check_request(artifact, phase, {"batch": batch, "tokens": tokens, "repeats": repeats})
    setting = setting_of(phase, batch, tokens if artifact.takes_any_length else 0)
    with tempfile.TemporaryDirectory() as folder:
        artifact = artifact.pinned()
        plain = call_of(artifact, phase, batch, tokens)
        recording = artifact.recording(phase, Path(folder) / "profile")
        try:
            calls = {"plain": plain, "recorded": call_of(recording, phase, batch, tokens)}
            unrecorded, recorded = interleaved(setting, calls, repeats)
        finally:
            path = recording.session(phase).end_profiling()
        events = json.loads(Path(path).read_text(encoding="utf-8"))
    turn = UNTIMED_IN_A_TURN + TIMED_IN_A_TURN
    every_run = runs_of(events, turn * -(-repeats // TIMED_IN_A_TURN))
    runs = [run for position, run in enumerate(every_run) if position % turn >= UNTIMED_IN_A_TURN]
    observed = _observed_nodes(runs)
    # The caller's side of a run is not in the profile, and recording does not change it.
    outside_us = 1e3 * recorded.median_ms - statistics.median(run.microseconds for run in runs)
    overhead_us = node_overhead(observed, 1e3 * unrecorded.median_ms - outside_us)
    stamped = artifact.node_sites(phase)
    return Attribution(
        setting=setting,
        clock="launches" if artifact.target == "cuda" else "kernels",
        repeats=recorded.repeats,
        total_ms=unrecorded.median_ms,
        recorded_ms=recorded.median_ms,
        node_overhead_us=overhead_us,
        nodes=_node_times(observed, overhead_us, stamped, head_nodes(artifact, phase), columns or {}),
        missing_sites=_missing_sites(artifact, stamped),
    )


def _check_request(artifact: Artifact, phase: str, numbers: Mapping[str, int]) -> None:
    if phase not in artifact.graphs:
        raise BadInput(f"phase is {phase!r}; the export in {artifact.folder} has {', '.join(artifact.graphs)}")
    for name, value in numbers.items():
        if value < 1:
            raise BadInput(f"{name} is {value}; profiling an export needs at least 1")


def _missing_sites(artifact: Artifact, stamped: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Sites of the export, from all of its graphs, that this graph's nodes do not name."""
    exported = [site for name in artifact.graphs for sites in artifact.node_sites(name).values() for site in sites]
    here = {site for sites in stamped.values() for site in sites}
    return tuple(site for site in dict.fromkeys((*exported, *artifact.unmapped_sites)) if site not in here)


def head_nodes(artifact: Artifact, graph: str) -> frozenset[str]:
    """Names of the GEMMs that an output named `logits` comes straight from, whether they are sites or not."""
    model = ir.load(artifact.folder / f"{graph}.onnx")  # weights stay on disk
    found = set()
    for output in model.graph.outputs:
        if str(output.name).split(".")[-1] != "logits":
            continue
        node = output.producer()
        while node is not None and node.op_type in _AFTER_A_HEAD:
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        if node is not None and node.op_type in _GEMMS:
            found.add(str(node.name))
    return frozenset(found)


# ── Reading the trace ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class RecordedRun:
    """One `model_run` of the trace, and the node events in it."""

    microseconds: float
    nodes: tuple[Mapping[str, Any], ...]


def runs_of(events: Sequence[Mapping[str, Any]], expected: int) -> list[RecordedRun]:
    """The runs in a trace of ONNX Runtime, in order. Nodes inside another node (a loop's body) are left to that one.

    Raises:
        BadInput: if fewer runs than expected were kept.
    """
    ordered = sorted(events, key=lambda event: event["ts"])
    runs = [event for event in ordered if event["name"] == "model_run"]
    if len(runs) < expected or len(events) >= _MOST_EVENTS:
        raise BadInput(
            f"the profile holds {len(runs)} of {expected} runs in {len(events)} events; ONNX Runtime keeps "
            f"{_MOST_EVENTS}: ask for fewer repeats"
        )
    starts = [run["ts"] for run in runs]
    inside: list[list[Mapping[str, Any]]] = [[] for _ in runs]
    busy_until = 0
    for event in ordered:
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time") or event["ts"] < starts[0]:
            continue
        if event["ts"] < busy_until:
            continue
        if event["args"]["op_name"] in _CONTROL_FLOW:
            busy_until = event["ts"] + event["dur"]
        inside[bisect_right(starts, event["ts"]) - 1].append(event)
    return [RecordedRun(run["dur"], tuple(nodes)) for run, nodes in zip(runs, inside, strict=True)]


@dataclass(frozen=True)
class ObservedNode:
    """A node's event, alike in every run, and its median time (microseconds) over the calls of one run."""

    name: str
    arguments: Mapping[str, Any]
    calls: int
    microseconds: float

    @property
    def op(self) -> str:
        return str(self.arguments["op_name"])

    @property
    def inputs(self) -> list[tuple[str, list[int]]]:
        """(type, shape) of the inputs that the kernel still reads: prepacked weights are gone."""
        return _types_and_shapes(self.arguments["input_type_shape"])

    @property
    def outputs(self) -> list[tuple[str, list[int]]]:
        """(type, shape) of the outputs."""
        return _types_and_shapes(self.arguments["output_type_shape"])

    @property
    def has_constant_weight(self) -> bool:
        """Whether one operand is a constant. The CPU prepacks the weights of GEMMs, which removes the input."""
        return int(self.arguments["parameter_size"]) > 0 or len(self.inputs) < 2


def _types_and_shapes(listed: Sequence[Mapping[str, list[int]]]) -> list[tuple[str, list[int]]]:
    return [pair for entry in listed for pair in entry.items()]


def _observed_nodes(runs: Sequence[RecordedRun]) -> list[ObservedNode]:
    """Every node that ran, in the order of its first call. Names need not be unique; the index beside them is."""
    arguments: dict[tuple[str, str], Mapping[str, Any]] = {}
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    calls: dict[tuple[str, str], int] = {}
    for run in runs:
        here: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in run.nodes:
            key = (event["name"].removesuffix("_kernel_time"), str(event["args"].get("node_index")))
            arguments.setdefault(key, event["args"])
            here[key].append(event["dur"])
        for key, durations in here.items():
            times[key].append(sum(durations))
            calls[key] = len(durations)
    return [ObservedNode(key[0], arguments[key], calls[key], statistics.median(times[key])) for key in arguments]


def node_overhead(nodes: Sequence[ObservedNode], unrecorded_us: float) -> float:
    """Microseconds that recording added to each call: with them taken off, the nodes add up to the unrecorded run.

    At most what the shortest node took in a call, so that no node's time becomes negative; at least nothing, since
    what a run takes beyond its nodes is not theirs.
    """
    if not nodes:
        return 0.0
    shortest = min(node.microseconds / node.calls for node in nodes)
    excess = sum(node.microseconds for node in nodes) - unrecorded_us
    return min(max(excess / sum(node.calls for node in nodes), 0.0), shortest)


# ── Nodes to sites and kinds ─────────────────────────────────────────────────────────────────────────────────────


def _node_times(
    observed: Sequence[ObservedNode],
    overhead_us: float,
    stamped: Mapping[str, Sequence[str]],
    heads: frozenset[str],
    columns: Mapping[str, int],
) -> tuple[NodeTime, ...]:
    finder = _NameFinder((*stamped, *heads))
    sources = {id(node): finder.names_in(node.name) for node in observed}
    sites = {
        id(node): list(dict.fromkeys(site for name in sources[id(node)] for site in stamped.get(name, ())))
        for node in observed
    }
    inner = _inner_sizes((node, sites[id(node)]) for node in observed)
    times = []
    for node in observed:
        shares, shared_by = _shares(node, sites[id(node)], columns, inner)
        is_head = any(name in heads for name in sources[id(node)])
        times.append(
            NodeTime(
                name=node.name,
                op=node.op,
                kind="head" if is_head else "sites" if shares else kind_of(node),
                provider=str(node.arguments["provider"]),
                calls=node.calls,
                recorded_ms=1e-3 * node.microseconds,
                ms=1e-3 * (node.microseconds - node.calls * overhead_us),
                shares=shares,
                shared_by=shared_by,
                product=_product(node) if shares and node.op in _GEMMS else (),
            )
        )
    return tuple(times)


def _product(node: ObservedNode) -> tuple[int, ...]:
    """(rows, inner, columns) of a GEMM, all axes in front of the last one counted as rows."""
    given, made = node.inputs[0][1], node.outputs[0][1]
    return (math.prod(made[:-1]), given[-1], made[-1])


class _NameFinder:
    """Finds names of the file's nodes inside the names that ONNX Runtime gives to what it made of them."""

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted(set(names), key=len, reverse=True)
        # A whole part only: `node_linear` is no part of `node_linear_1`. Fusions put a word and a space before a
        # name, or a slash and their own name behind it.
        anything = "|".join(map(re.escape, longest_first))
        self._pattern = re.compile(rf"(?<![^\s/])(?:{anything})(?![^\s/])") if longest_first else None

    def names_in(self, name: str) -> list[str]:
        """The known names that are whole parts of `name`, in order."""
        return [] if self._pattern is None else list(dict.fromkeys(self._pattern.findall(name)))


def _inner_sizes(nodes: Iterable[tuple[ObservedNode, Sequence[str]]]) -> dict[str, int]:
    """Site -> the last axis that a GEMM of this site alone reads: of a packed factored site, the rank."""
    return {sites[0]: node.inputs[0][1][-1] for node, sites in nodes if len(sites) == 1 and node.inputs[0][1]}


def _shares(
    node: ObservedNode, sites: Sequence[str], columns: Mapping[str, int], inner: Mapping[str, int]
) -> tuple[dict[str, float], SharedBy | None]:
    """Site -> its fraction of the node, and how that was found.

    Sizes read off other nodes are used only if they fill this node's output; one unknown size is what they leave.
    """
    if not sites:
        return {}, None
    if len(sites) == 1:
        return {sites[0]: 1.0}, "whole"
    widths = {site: columns[site] for site in sites if site in columns}
    if len(widths) < len(sites):
        widths = _filled({site: inner[site] for site in sites if site in inner}, sites, node.outputs[0][1][-1])
    if not widths:
        return {site: 1.0 / len(sites) for site in sites}, "evenly"
    total = sum(widths.values())
    return {site: widths[site] / total for site in sites}, "columns"


def _filled(known: Mapping[str, int], sites: Sequence[str], total: int) -> dict[str, int]:
    """The widths of all sites if `known` determines them, else none."""
    unknown = [site for site in sites if site not in known]
    rest = total - sum(known.values())
    if known and len(unknown) == 1 and rest > 0:
        return {**known, unknown[0]: rest}
    return dict(known) if not unknown and rest == 0 else {}


def kind_of(node: ObservedNode) -> str:
    """The kind of work of a node that computes no site and no head.

    Products of two activations are attention: scores, or the mixing of values. Work on integers and booleans (sizes,
    positions, masks) and views that move nothing are `shape`; whatever else handles floating-point activations
    (activations, residuals, rotary embeddings, transposes, splits) is `elementwise`.
    """
    if node.op in _GEMMS:
        return "unmapped" if node.has_constant_weight else "attention"
    if node.op == "If" and PREFIX in node.name:
        return "attention"
    by_operator = (
        (_ATTENTION, "attention"), (_CONVOLUTIONS, "convolution"), (_EXPERTS, "experts"), (_COPIES, "copies"),
        (_CONTROL_FLOW, "other"), (_FREE_VIEWS, "shape"),
    )  # fmt: skip
    for operators, kind in by_operator:
        if node.op in operators:
            return kind
    if all(dtype not in _FLOATS for dtype, _ in node.outputs):
        return "shape"
    if node.op in _GATHERS and node.has_constant_weight:
        return "lookup"
    return "norm" if node.op.endswith(("Normalization", "LayerNorm")) else "elementwise"
