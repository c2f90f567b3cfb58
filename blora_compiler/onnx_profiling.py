"""Profile an ONNX graph through ONNX Runtime: rows and input moments of every site, and the damage of every rank.

The graph is run with extra outputs: for each value that sites read, x^T x summed over the rows of a run, computed in
the graph itself so that no activation has to be kept. With C = E[x x^T] the damage of a weight W' is

    E |(W - W') x|^2 / E |W x|^2

the share of the site's output energy (its bias aside) that is lost: 0 for dense, 1 for a weight of zeros, and the
same for equally good ranks whatever a site's scale. The best W' of rank r is the truncated SVD of W C^1/2. No
gradient is asked for, so what the error does to the model's output is not known: the sum over sites ranks plans, and
predicts no loss. Sites that read one value may share A: that of the stacked W C^1/2, each over its site's own energy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from .errors import BadInput
from .onnx_files import opened, read_model
from .onnx_inputs import Feed
from .onnx_sites import OnnxSite, find_sites, reads_columns
from .passes.onnx_edit import add_constant
from .profiling import Profile, Sharers, Spectrum, Weighed, own_spectrum, shared_spectra, square_roots
from .rewriting import starting_factors
from .values import RELATIVE_ERROR, Form, Site

_PREFIX = "blora_probe"
_PROBE_TYPES = {"Shape": ir.DataType.INT64, "MatMul": ir.DataType.FLOAT}  # of the outputs; the rest is inferred


def static_rows(site: OnnxSite) -> list[int | None]:
    """The rows of each call as far as the file says; None where an axis is open."""
    found: list[int | None] = []
    for node, x in zip(site.calls, site.inputs, strict=True):
        sizes = None if x.shape is None else [_known(size) for size in x.shape]
        outer = None if sizes is None else (sizes[1:] if reads_columns(node) else sizes[:-1])
        is_known = outer is not None and None not in outer
        found.append(int(np.prod([size for size in outer if size is not None])) if is_known and outer else None)
    return found


def _known(size: int | ir.SymbolicDim) -> int | None:
    text = str(size if isinstance(size, int) else size.value)
    return int(text) if text.isdigit() else None


def count_rows(path: Path, feed: Feed, scratch: Path) -> dict[str, list[int]]:
    """Site name -> the rows of each call, from the file where it says them, else from one run.

    Raises:
        BadInput: the graph does not run on the feed.
    """
    model = read_model(path)
    sites = find_sites(model).sites
    probes = _add_probes(model, sites, moments=False)
    with opened(model, scratch, str(path)) as session:
        shapes = run(session, [f"{name}_rows" for name in probes.values()], feed)
    counted = {key: int(shape[0]) for key, shape in zip(probes, shapes, strict=True)}
    return {
        site.name: [
            counted[_key(node, x)] if known is None else known
            for known, node, x in zip(static_rows(site), site.calls, site.inputs, strict=True)
        ]
        for site in sites
    }


def profile_sites(
    path: Path, feeds: Sequence[Feed], scratch: Path, *, seed: int = 0, memory_bytes: int = 2 << 30
) -> Profile:
    """The relative output error of every rank of every site, and the factors that reach it.

    Args:
        feeds: inputs by name, one run each.
        scratch: folder for temporary files of models that do not fit into memory messages.
        memory_bytes: cap on the moments held at once; sites are measured in blocks that fit, one pass a block.

    Raises:
        BadInput: the graph does not run on a feed, an input of a site is not finite, or a weight is not.
    """
    spectra: dict[str, Spectrum] = {}
    shared: dict[Sharers, dict[str, Spectrum]] = {}
    rows = 0
    sites = find_sites(read_model(path)).sites
    for block in _blocks(sites, memory_bytes):
        model = read_model(path)
        chosen = [site for site in find_sites(model).sites if site.name in block]
        moments = _moments(model, chosen, feeds, scratch, str(path))
        weighed: dict[str, Weighed] = {}
        for site in chosen:
            total, count = _of_site(site, moments)
            weighed[site.name] = _weighed(site, total, count)
            spectra[site.name] = own_spectrum(weighed[site.name], site.planned(()).break_even_rank, 1.0)
            rows = max(rows, count)
        for readers in _readers(chosen):
            planned = [site.planned(()) for site in readers]
            shared[tuple(site.name for site in planned)] = shared_spectra(planned, weighed, spectra)
    return Profile("whitened", {site.name: spectra[site.name] for site in sites}, RELATIVE_ERROR, rows, seed, shared)


def _readers(sites: Sequence[OnnxSite]) -> list[list[OnnxSite]]:
    """Sites with one call each that multiply the same value from the same side, where there are several."""
    by_value: dict[str, list[OnnxSite]] = {}
    for site in sites:
        if len(site.calls) == 1 and not reads_columns(site.calls[0]):
            by_value.setdefault(_key(site.calls[0], site.inputs[0]), []).append(site)
    return [readers for readers in by_value.values() if len(readers) > 1]


def _blocks(sites: Sequence[OnnxSite], memory_bytes: int) -> Iterator[set[str]]:
    """Names of consecutive sites whose moments (float64 here, float32 in the session) fit under the cap together."""
    block: set[str] = set()
    held: dict[str, int] = {}
    for site in sites:
        keys = {_key(node, x): 12 * site.in_features**2 for node, x in zip(site.calls, site.inputs, strict=True)}
        if block and sum((held | keys).values()) > memory_bytes:
            yield block
            block, held = set(), {}
        block.add(site.name)
        held |= keys
    if block:
        yield block


def _key(node: ir.Node, x: ir.Value) -> str:
    return f"{x.name}{' by column' if reads_columns(node) else ''}"


def _add_probes(model: ir.Model, sites: Sequence[OnnxSite], moments: bool) -> dict[str, str]:
    """Add outputs that describe what each site reads, once a value. Returns key of the value -> their prefix.

    `PREFIX_rows` is the shape (rows, in) and `PREFIX_moment` the sum of x x^T over the rows of a run, in float32.
    """
    graph = model.graph
    probes: dict[str, str] = {}
    for site in sites:
        for node, x in zip(site.calls, site.inputs, strict=True):
            if _key(node, x) in probes:
                continue
            prefix = probes[_key(node, x)] = f"{_PREFIX}_{len(probes)}"
            if reads_columns(node):
                x = _added(graph, "Transpose", [x], f"{prefix}_turned", perm=[1, 0])  # noqa: PLW2901 - the same values
            sizes = add_constant(graph, f"{prefix}_sizes", [-1, site.in_features])
            rows = _added(graph, "Reshape", [x, sizes], f"{prefix}_flat")
            graph.outputs.append(_added(graph, "Shape", [rows], f"{prefix}_rows"))
            if moments:
                wide = _added(graph, "Cast", [rows], f"{prefix}_wide", to=int(ir.DataType.FLOAT))
                columns = _added(graph, "Transpose", [wide], f"{prefix}_columns", perm=[1, 0])
                graph.outputs.append(_added(graph, "MatMul", [columns, wide], f"{prefix}_moment"))
    return probes


def _added(
    graph: ir.Graph, op: str, inputs: Sequence[ir.Value], name: str, **attributes: int | list[int]
) -> ir.Value:
    node = ir.node(op, inputs, attributes=attributes, name=name)
    node.outputs[0].name = name
    if op in _PROBE_TYPES:
        node.outputs[0].dtype = _PROBE_TYPES[op]
    graph.append(node)
    return node.outputs[0]


def _moments(
    model: ir.Model, sites: Sequence[OnnxSite], feeds: Sequence[Feed], scratch: Path, name: str
) -> dict[str, tuple[np.ndarray, int]]:
    """Key of a value -> the sum of x x^T (in, in) over all feeds, and its rows."""
    probes = _add_probes(model, sites, moments=True)
    wanted = [f"{prefix}_{what}" for prefix in probes.values() for what in ("moment", "rows")]
    sums: dict[str, tuple[np.ndarray, int]] = {}
    with opened(model, scratch, name) as session:
        for feed in feeds:
            found = run(session, wanted, feed)
            for key, moment, shape in zip(probes, found[::2], found[1::2], strict=True):
                total, count = sums.get(key, (np.zeros(moment.shape), 0))
                sums[key] = (total + moment, count + int(shape[0]))
    return sums


def _of_site(site: OnnxSite, moments: Mapping[str, tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
    found = [moments[_key(node, x)] for node, x in zip(site.calls, site.inputs, strict=True)]
    return sum(total for total, _ in found), sum(count for _, count in found)  # type: ignore[return-value]


def _weighed(site: OnnxSite, total: np.ndarray, rows: int) -> Weighed:
    """W C^1/2 over the root of the energy of the site's output, so that squared errors are shares of it."""
    weight = torch.from_numpy(np.ascontiguousarray(site.matrix()).astype(np.float64))
    if not bool(weight.isfinite().all()):
        raise BadInput(f"{site.name}: its weight {site.weight.name} holds NaN or infinite values; repair the model")
    if not np.isfinite(total).all():
        raise BadInput(f"{site.name}: its input is not finite on the calibration data; check the data and the model")
    root, inverse = square_roots(torch.from_numpy(total / rows) if rows else None, site.in_features)
    matrix = weight if root is None else weight @ root
    level = float(matrix.norm()) or 1.0
    return Weighed(weight, matrix / level, inverse, torch.full((len(weight),), level, dtype=torch.float64), 1.0)


def factors_of(
    profile: Profile, sites: Sequence[Site], forms: Mapping[str, Form]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Site name -> A (rank, in) and B (out, rank), balanced, of every factored site; sharers have one array A."""
    found = starting_factors(sites, forms, profile)
    arrays = {id(A): A.numpy() for A, _ in found.values()}
    return {name: (arrays[id(A)], B.numpy()) for name, (A, B) in found.items()}


def run(session: onnxruntime.InferenceSession, outputs: Sequence[str] | None, feed: Feed) -> list[np.ndarray]:
    """One run of a session.

    Raises:
        BadInput: what ONNX Runtime says about these inputs.
    """
    try:
        return session.run(None if outputs is None else list(outputs), feed)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        shapes = ", ".join(f"{name} {array.shape}" for name, array in feed.items())
        raise BadInput(
            f"the graph does not run on inputs of the shapes {shapes}: {error}; give calibration arrays that it takes"
        ) from error
