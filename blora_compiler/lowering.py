"""lower: a folded tree becomes ONNX files, and is handed out only after ONNX Runtime reproduced it.

Generative Hugging Face models become a prefill and a decode graph with a key/value cache; other Hugging Face models
one graph through the same exporter, fused for the target; everything else one graph through `torch.onnx.export`.
All graphs of an export read one weights file, in which every tensor is stored once.

The files are written and verified in a temporary folder beside the final one and renamed into place at the end.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from .artifact import FORMAT, FORMAT_VERSION, MANIFEST, WEIGHTS, Artifact, InputSpec, check_provider, file_record
from .errors import BadInput, listed
from .folders import check_target, staged_folder
from .generation import write_configs
from .graph import binds_by_position
from .layers import BranchedLinear, FactoredLinear, RemovedBranch, has_given_outputs
from .overflow import check_range
from .passes.onnx_attend_in_parts import AttendInParts
from .passes.onnx_collapse_reshapes import CollapseReshapes
from .passes.onnx_count_past_by_mask import CountPastByMask
from .passes.onnx_drop_same_reshapes import DropSameReshapes
from .passes.onnx_keep_last_position import KeepLastPosition
from .passes.onnx_last_position_early import LastPositionEarly
from .passes.onnx_multiply_masked_rows import MultiplyMaskedRows
from .passes.onnx_result import OnnxPassResult
from .passes.onnx_rotate_before_attention import RotateBeforeAttention
from .passes.onnx_share_weights import ShareWeights
from .passes.onnx_stamp_sites import StampSites, stamped_sites
from .passes.onnx_strip_metadata import StripMetadata
from .passes.onnx_unflatten_gemms import UnflattenGemms
from .passes.onnx_unfuse_transposes import UnfuseTransposes
from .quantization import ModelColumns, Quantize, check_quantize, quantize_graph
from .source import NO_LIMIT, position_limit
from .tracing import generates, is_pretrained
from .values import DTYPE_BYTES
from .verification import (
    NEW_TOKENS,
    cast_copy,
    left_padded,
    quantization_loss,
    verify,
    without_fused_encoder_layers,
)

Target = Literal["cpu", "cuda"]
_DEFAULT_DTYPES = {"cpu": "float32", "cuda": "float16"}
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")


class Rewrite(Protocol):
    """An ONNX pass that makes a graph faster, and says how often it could."""

    def run(self, model: ir.Model) -> OnnxPassResult: ...


def lower(
    tree: nn.Module,
    folder: str | Path,
    *,
    inputs: Mapping[str, Tensor] | tuple[Tensor, ...],
    target: Target = "cpu",
    dtype: str | None = None,
    generation: bool | None = None,
    quantize: Quantize | None = None,
    site_names: Sequence[str] = (),
    prompts: Sequence[Sequence[int]] | None = None,
    tolerance: float | None = None,
    new_tokens: int = NEW_TOKENS,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Artifact:
    """Export a tree to ONNX, verify the files against it, and put them in `folder`. The tree is not changed.

    Args:
        tree: the folded model: an `nn.Module`, a Hugging Face model, or a traced graph module.
        folder: where the export goes; an earlier export there is replaced, anything else is left alone.
        inputs: an example batch of at least 2, by keyword or by position.
        target: the execution provider to fuse for and to verify on.
        dtype: `"float32"`, `"float16"`, or `"bfloat16"` (CUDA only); None is float32 on the CPU, float16 on CUDA.
        generation: whether to export prefill and decode graphs; None does so where the model can generate.
        quantize: `"int8"` or `"int4"` stores the weights of sites in that many bits (CPU only); None in `dtype`.
        site_names: the sites whose nodes the manifest must name; empty takes every projection module.
        prompts, tolerance, new_tokens: see `verify`.
        metadata: JSON values to keep in the manifest.
        tokenizer: of a Hugging Face model, to be written beside the graphs.

    Raises:
        BadInput: where the arguments, the model or the folder cannot be used, float16 would overflow, or the export
            would round interpolative pairs too coarsely.
        ProviderMissing: where the target's execution provider is absent or fell back.
        ParityFailed: where ONNX Runtime does not reproduce the tree.
    """
    folder = Path(folder)
    check_quantize(quantize, target)
    dtype = checked_dtype(dtype, target)
    check_target(folder, MANIFEST)
    _check_tree(tree)
    _check_given_outputs(tree, dtype, quantize)
    if dtype == "bfloat16" and not is_pretrained(tree):
        raise BadInput(f"{type(tree).__name__} is a plain module; bfloat16 is for Hugging Face models")
    example = checked_example(tree, inputs)
    can_generate = generates(tree)
    generation = can_generate if generation is None else generation
    if generation and not can_generate:
        raise BadInput(f"{type(tree).__name__} has no cached generation; pass generation=False to export one graph")
    check_range(tree, _range_batches(example, prompts if generation else None), dtype, is_pretrained(tree))
    with staged_folder(folder, MANIFEST) as staging:
        manifest = write_graphs(tree, staging, example, target, dtype, generation, quantize, site_names)
        manifest["metadata"] = dict(metadata or {})
        limit = position_limit(tree)
        manifest["positions"] = None if limit == NO_LIMIT else limit
        manifest["prompts"] = None if prompts is None else [list(prompt) for prompt in prompts]
        manifest["files"] |= _write_companions(tree if generation else None, tokenizer, staging)
        # The files are verified as they lie on disk, by the code that will open them later.
        written = Artifact(staging, manifest)
        parity = verify(written, tree, prompts=prompts, tolerance=tolerance, new_tokens=new_tokens)
        manifest["parity"] = parity.to_json()
        if quantize is not None:
            manifest["quantization"]["loss"] = quantization_loss(written, tree)
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Artifact.load(folder)


# ── What may be lowered ──────────────────────────────────────────────────────────────────────────────────────────


def checked_dtype(dtype: str | None, target: str) -> str:
    """The type to lower to on a target: the one asked for, or the target's own.

    Raises:
        BadInput: no such target, or a type that it does not run.
        ProviderMissing: the target's provider is not installed here.
    """
    if target not in _DEFAULT_DTYPES:
        raise BadInput(f"target is {target!r}; use 'cpu' or 'cuda'")
    check_provider(target)
    dtype = dtype or _DEFAULT_DTYPES[target]
    if dtype not in DTYPE_BYTES:
        raise BadInput(f"dtype is {dtype!r}; use one of {', '.join(DTYPE_BYTES)}")
    if dtype == "bfloat16" and target == "cpu":
        raise BadInput("dtype 'bfloat16' cannot be verified on target 'cpu' (no bfloat16 MatMul there); use 'cuda'")
    return dtype


def _check_given_outputs(tree: nn.Module, dtype: str, quantize: str | None) -> None:
    """Refuse to round interpolative pairs to few bits: what their first product loses, the second one multiplies."""
    rounding = quantize or (dtype if dtype == "bfloat16" else None)
    if rounding is not None and has_given_outputs(tree):
        raise BadInput(
            f"the model has interpolative pairs, which multiply rounding errors about tenfold, and {rounding} rounds "
            f"too coarsely for that; compile it without interpolative, or export it in float32 or float16"
        )


def _check_tree(tree: nn.Module) -> None:
    """A tree that still trains, or holds values that are not finite, is refused before any work."""
    branched = [name for name, module in tree.named_modules() if isinstance(module, BranchedLinear)]
    if branched:
        raise BadInput(f"{len(branched)} sites still carry a trainable branch ({branched[0]}, ...); fold them first")
    broken = [name for name, value in tree.named_parameters() if not bool(torch.isfinite(value).all())]
    if broken:
        raise BadInput(f"{len(broken)} parameters hold values that are not finite ({broken[0]}, ...)")


def checked_example(tree: nn.Module, inputs: Mapping[str, Tensor] | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The example by name, with a batch of at least 2 (a batch of 1 would be exported as a constant)."""
    example = dict(inputs) if isinstance(inputs, Mapping) else _named_by_position(tree, tuple(inputs))
    if not example:
        raise BadInput("inputs is empty; pass an example batch")
    for name, value in example.items():
        if not isinstance(value, Tensor) or value.ndim < 1:
            raise BadInput(f"input {name!r} is {type(value).__name__}; each must be a tensor with a batch axis")
        if value.shape[0] < 2:
            raise BadInput(f"input {name!r} has a batch of {value.shape[0]}; the example needs at least 2")
        if not value.numel():
            raise BadInput(f"input {name!r} has shape {tuple(value.shape)}; every axis must have at least one entry")
    example = {name: value.detach().cpu() for name, value in example.items()}  # where the tree is lowered
    takes_mask = is_pretrained(tree) and "attention_mask" in inspect.signature(tree.forward).parameters
    if takes_mask and "input_ids" in example:
        example["attention_mask"] = _padded_mask(example)
    return example


def _range_batches(
    example: Mapping[str, Tensor], prompts: Sequence[Sequence[int]] | None
) -> list[Mapping[str, Tensor]]:
    """What to watch activations on: the example, and the prompts, which are more like the text to come."""
    if not prompts:
        return [example]
    input_ids, mask = left_padded(prompts)
    return [example, {"input_ids": input_ids, "attention_mask": mask}]


def _named_by_position(tree: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    named = [name for name in inspect.signature(tree.forward).parameters if name not in ("args", "kwargs")]
    names = [*named, *(f"input_{index}" for index in range(len(named), len(inputs)))][: len(inputs)]
    return dict(zip(names, inputs, strict=True))


def _padded_mask(example: Mapping[str, Tensor]) -> Tensor:
    """The attention mask with padding in it: an exporter drops a mask of ones from the graph's inputs."""
    input_ids = example["input_ids"]
    if input_ids.ndim != 2 or input_ids.shape[1] < 4:
        raise BadInput(f"input_ids has shape {tuple(input_ids.shape)}; exporting needs (batch, tokens) of at least 4")
    mask = example.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.clone()
    if bool(mask.all()):
        mask[0, : input_ids.shape[1] // 4] = 0
    return mask


# ── Export ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ExportedGraphs:
    """Graph name -> the graph, and what the exporter recorded about it (None for plain modules)."""

    models: dict[str, ir.Model]
    metadata: dict[str, dict[str, Any] | None]


def export_graphs(
    lowered: nn.Module, example: Mapping[str, Tensor], target: Target, generation: bool
) -> ExportedGraphs:
    """The graphs as the exporter leaves them, before any rewrite.

    Args:
        lowered: the tree in the precision of the export.
        example: as `checked_example` returns it.
        target: what transformers' exporter fuses for.
        generation: prefill and decode graphs instead of one.
    """
    dtype = next((p.dtype for p in lowered.parameters() if p.is_floating_point()), torch.float32)
    example = {name: value.to(dtype) if value.is_floating_point() else value for name, value in example.items()}
    with torch.no_grad(), quiet_exporters(), without_fused_encoder_layers(), _first_factors_once(lowered):
        if not is_pretrained(lowered):
            return _export_plain(lowered, example)
        return _export_hugging_face(lowered, example, target, generation)


def _export_hugging_face(
    lowered: nn.Module, example: Mapping[str, Tensor], target: Target, generation: bool
) -> ExportedGraphs:
    from transformers import GenerationConfig
    from transformers.exporters import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic=True, ort_fusions=target)
    # The copy's own settings: sampling, beams or an early end would change the calls that the exporter records.
    lowered.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    if generation:
        exported = OnnxExporter().export_for_generation(lowered, {**example, **_whole_cache(lowered)}, config)
        if set(exported.components) != {"prefill", "decode"}:
            raise BadInput(
                f"{type(lowered).__name__} is exported as {', '.join(exported.components)}; only models that are one "
                f"prefill and one decode graph can be lowered"
            )
    else:
        lowered.config.use_cache = False  # type: ignore[union-attr]
        exported = OnnxExporter().export(lowered, dict(example), replace(config, dynamic_shapes=_open_axes(example)))
    return ExportedGraphs(
        {name: component.program for name, component in exported.components.items()},
        {name: asdict(component.metadata) for name, component in exported.components.items()},
    )


def _open_axes(example: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Of images the batch alone, as in tracing: with open heights and widths, Swin's export does not end.

    None, which leaves every axis open, where there are no images.
    """
    if not any(_is_image(value) for value in example.values()):
        return None
    return {
        name: dict.fromkeys(range(1 if _is_image(value) else value.dim()), torch.export.Dim.AUTO)
        for name, value in example.items()
    }


def _is_image(value: Tensor) -> bool:
    return value.dim() == 4 and value.is_floating_point()


def _whole_cache(lowered: nn.Module) -> dict[str, Any]:
    """For a model whose cache would keep a window of the last tokens: an empty cache that keeps all of them.

    The exporter writes such a cache as one that keeps everything, the window being in the mask, but leaves inputs in
    the graph that no other cache could feed.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=lowered.config).layers
    keeps_a_window = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
    if keeps_a_window and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return {"past_key_values": DynamicCache()}
    return {}


def _export_plain(lowered: nn.Module, example: Mapping[str, Tensor]) -> ExportedGraphs:
    """One graph; batch (axis 0) and tokens (axis 1) vary wherever the module allows it."""
    axes = {name: dict.fromkeys(range(min(2, value.ndim)), torch.export.Dim.AUTO) for name, value in example.items()}
    if binds_by_position(lowered, list(example)):
        shapes = _for_signature(lowered, tuple(axes.values()))
        program = torch.export.export(lowered, tuple(example.values()), dynamic_shapes=shapes)
    else:
        order = [name for name in inspect.signature(lowered.forward).parameters if name in example]
        example = {name: example[name] for name in order}
        axes = {name: axes[name] for name in order}
        program = torch.export.export(lowered, (), dict(example), dynamic_shapes=axes)
    exported = torch.onnx.export(program, input_names=list(example), dynamo=True, optimize=True, verbose=False)
    assert exported is not None
    return ExportedGraphs({"model": exported.model}, {"model": None})


def _for_signature(module: nn.Module, axes: tuple[dict[int, Any], ...]) -> Any:
    """Dynamic shapes in the form of the module's arguments: `*args` wants all of its shapes as one entry."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return (axes,) if kinds[:1] == [inspect.Parameter.VAR_POSITIONAL] else axes


@contextlib.contextmanager
def _first_factors_once(lowered: nn.Module) -> Iterator[None]:
    """While this lasts, sites that share their first factor multiply one input by it once.

    An exporter would write each site's product, with a transposed copy of the factor each, and find only small ones
    to be equal; what it traces has to say it.
    """
    by_factor: dict[int, list[FactoredLinear]] = {}
    for module in lowered.modules():
        if isinstance(module, FactoredLinear):
            by_factor.setdefault(id(module.A), []).append(module)
    sharers = [modules for modules in by_factor.values() if len(modules) > 1]
    for modules in sharers:
        product = _Product()
        for module in modules:
            module.forward = partial(product.forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in chain.from_iterable(sharers):
            del module.forward


@dataclass(eq=False)
class _Product:
    """The last input that was multiplied by a first factor, and what came out."""

    given: Tensor | None = None
    made: Tensor | None = None

    def forward(self, module: FactoredLinear, x: Tensor) -> Tensor:
        """What `module` computes of x."""
        if self.given is not x or self.made is None:
            self.given, self.made = x, nn.functional.linear(x, module.A)
        return module.second(self.made)


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silence what exporting says to everyone: progress lines, and advice about choices made on purpose here.

    Errors still raise. Warnings of other libraries and of the model's own code pass.
    """
    from transformers.exporters import exporter_dynamo

    # "experimental, version drift", "dynamic=True without dynamic_shapes", "dimension specialised to 1" (the decode
    # step): verification answers all three for every file. The exporter's logger is named after its file's path.
    loggers = [logging.getLogger(name) for name in ("transformers", "torch._export", "torch.onnx", "onnxscript")]
    loggers.append(exporter_dynamo.logger)
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # OnnxExporter exposes no `verbose`
        # torch.onnx copies pytree specs whose class torch itself deprecated.
        warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_graphs(
    tree: nn.Module,
    folder: Path,
    example: Mapping[str, Tensor],
    target: Target,
    dtype: str,
    generation: bool,
    quantize: Quantize | None = None,
    site_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Export a tree, run the ONNX passes, write graphs and weights: all of `lower` that needs no provider.

    Nothing is verified yet, so `lower` is what users call.

    Args:
        tree: not changed.
        folder: exists.
        example: as `checked_example` returns it.
        target, dtype, generation, quantize, site_names: as of `lower`, decided.

    Returns:
        The manifest, without what verification and companions add.
    """
    lowered = cast_copy(tree, dtype)
    exported = export_graphs(lowered, example, target, generation)
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "target": target,
        "dtype": dtype,
        "generation": generation,
        "parameter_bytes": sum(parameter.nbytes for parameter in lowered.parameters()),
        "versions": _versions(),
        **_write_files(exported, lowered, site_names, folder, target, quantize),
        "inputs": [asdict(spec) for spec in _input_specs(example, exported)],
    }


def _write_files(
    exported: ExportedGraphs,
    lowered: nn.Module,
    site_names: Sequence[str],
    folder: Path,
    target: Target,
    quantize: Quantize | None,
) -> dict[str, Any]:
    """Run the ONNX passes, write graphs and weights, and return the manifest entries that describe them."""
    matrices = _site_matrices(lowered, site_names)
    repairs = {name: UnfuseTransposes().run(model) for name, model in exported.models.items()}
    rewrites = {name: rewrite_for_speed(name, model, target) for name, model in exported.models.items()}
    for name, repair in repairs.items():
        if repair.modified or repair.refusals:
            rewrites[name]["UnfuseTransposes"] = repair
    fixed_cache = {}
    if "decode" in exported.models:
        fixed_cache = {"fixed_cache_refusal": _fix_cache(exported.models["decode"])}
    for model in exported.models.values():
        StampSites(matrices).run(model)  # before quantising and sharing: content is looked up in the initializers
        StripMetadata().run(model)  # after stamping: scopes are metadata
    quantization = {} if quantize is None else _quantize(exported.models, lowered, quantize, rewrites)
    ShareWeights(folder / WEIGHTS).run(exported.models)
    for name, model in exported.models.items():
        ir.save(model, folder / f"{name}.onnx")
    node_sites = {name: stamped_sites(model) for name, model in exported.models.items()}
    mapped = {site for nodes in node_sites.values() for sites in nodes.values() for site in sites}
    return {
        "graphs": {name: _describe(name, exported) for name in exported.models},
        "files": {name: file_record(folder / name) for name in (*(f"{n}.onnx" for n in exported.models), WEIGHTS)},
        "node_sites": node_sites,
        "unmapped_sites": [name for name in dict.fromkeys(chain.from_iterable(matrices)) if name not in mapped],
        "fusions": {name: fused_operators(model) for name, model in exported.models.items()},
        "passes": {
            name: {label: result.to_json() for label, result in results.items()} for name, results in rewrites.items()
        },
        **fixed_cache,
        **quantization,
    }


def _quantize(
    models: Mapping[str, ir.Model],
    lowered: nn.Module,
    quantize: Quantize,
    rewrites: Mapping[str, dict[str, OnnxPassResult]],
) -> dict[str, Any]:
    """Quantise every graph and add the results to `rewrites`. Returns the manifest's entry.

    Raises:
        BadInput: where no GEMM could be quantised.
    """
    of_model = ModelColumns.of(lowered)
    results = {name: quantize_graph(name, model, quantize, of_model.all) for name, model in models.items()}
    for name, result in results.items():
        rewrites[name]["QuantizeWeights"] = result
    columns = frozenset().union(*(result.columns for result in results.values()))
    if not columns:
        reasons = [f"{name}: {reason}" for name, result in results.items() for reason in result.refusals]
        raise BadInput(f"quantize={quantize!r}: no GEMM can be quantised: {listed(reasons)}; leave quantize out")
    return {"quantization": {"quantize": quantize, "parameters": of_model.within(columns)}}


def _fix_cache(decode: ir.Model) -> str | None:
    """Make a decode graph independent of the cache's size. Returns why not, where it cannot be."""
    reason = CountPastByMask().reason_to_skip(decode)
    CountPastByMask().run(decode)
    return reason


def _write_companions(model: nn.Module | None, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write what generating needs beside the graphs, and return the records of the files that were added."""
    before = set(folder.iterdir())
    if model is not None:
        write_configs(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return {path.name: file_record(path) for path in sorted(set(folder.iterdir()) - before) if path.is_file()}


def rewrite_for_speed(
    name: str, model: ir.Model, target: Target, without: Collection[str] = ()
) -> dict[str, OnnxPassResult]:
    """The passes that make one graph faster, in order. Pass -> how often it applied, and its refusals.

    Args:
        name: of the graph.
        model: edited in place.
        target: parts of an attention pay on the CPU only.
        without: names of passes to leave out, to measure what each is worth.
    """
    results: dict[str, OnnxPassResult] = {}

    def run(rewrite: Rewrite) -> None:
        label = type(rewrite).__name__
        if label not in without:
            results[label] = rewrite.run(model)

    run(UnflattenGemms())  # first: where it leaves a view, the next two may find that it can go
    run(DropSameReshapes())  # what is between two views is then between the two that differ
    run(CollapseReshapes())  # with the views gone, shapes are known that the others ask for
    if name == "prefill":
        run(RotateBeforeAttention())  # attention that does not rotate can be cut at any position
    run(MultiplyMaskedRows())  # a guard between two views would stop the last position on its way up
    if name == "prefill":
        run(KeepLastPosition("logits"))
        run(LastPositionEarly())  # goes on from the gather that the head's got
    if name == "prefill" and target == "cpu":
        run(AttendInParts())  # last: no other pass looks under an `If`
    return results


def fused_operators(model: ir.Model) -> dict[str, int]:
    """Operator -> how often a graph has it, of those that stand for several of ONNX's own."""
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return dict(Counter(node.op_type for node in nodes if node.domain == "com.microsoft").most_common())


def _describe(name: str, exported: ExportedGraphs) -> dict[str, Any]:
    graph = exported.models[name].graph
    return {
        "inputs": [_describe_value(value) for value in graph.inputs],
        "outputs": [_describe_value(value) for value in graph.outputs],
        "metadata": exported.metadata[name],
    }


def _describe_value(value: ir.Value) -> dict[str, Any]:
    shape = None if value.shape is None else [size if isinstance(size, int) else str(size) for size in value.shape]
    return {"name": value.name, "dtype": None if value.dtype is None else value.dtype.name.lower(), "shape": shape}


def _input_specs(example: Mapping[str, Tensor], exported: ExportedGraphs) -> list[InputSpec]:
    """What each example input looked like, and which of its axes the (first) graph left open."""
    graph = next(iter(exported.models.values())).graph
    kept = {value.name: value for value in graph.inputs}
    specs = []
    for name, value in example.items():
        shape = kept[name].shape if name in kept else None
        dynamic = () if shape is None else tuple(axis for axis, size in enumerate(shape) if not _is_fixed(size))
        numbers = value.double()
        low, high = float(numbers.min()), float(numbers.max())
        dtype = str(value.dtype).removeprefix("torch.")
        specs.append(InputSpec(name, dtype, tuple(value.shape), dynamic, low, high))
    _check_batch_is_open(specs[0])
    return specs


def _is_fixed(size: int | ir.SymbolicDim) -> bool:
    """A dynamic export names some fixed sizes as symbols (`"32"`)."""
    return isinstance(size, int) or str(size.value).isdigit()


def _check_batch_is_open(spec: InputSpec) -> None:
    if 0 not in spec.dynamic:
        raise BadInput(
            f"the export fixed the batch of input {spec.name!r} to {spec.shape[0]}: the model's code depends on it; "
            f"make the forward independent of the batch size"
        )


def _versions() -> dict[str, str]:
    import onnxruntime

    installed = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {**installed, "onnxruntime": onnxruntime.__version__}


# ── Sites ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _site_matrices(lowered: nn.Module, site_names: Sequence[str]) -> dict[tuple[str, ...], list[np.ndarray]]:
    """Sites -> the matrices that their GEMMs hold, in both storage orders. Sites in removed branches are left out.

    One site and its own matrices; sites that share their first factor, and that one.

    Raises:
        BadInput: naming every site that the tree does not have.
    """
    names = list(site_names) or [name for name, module in lowered.named_modules() if _is_projection(module)]
    removed = [name for name, module in lowered.named_modules() if isinstance(module, RemovedBranch)]
    remaining = [name for name in names if not any(f"{name}.".startswith(f"{branch}.") for branch in removed)]
    found = {name: _weights_of(lowered, name) for name in remaining}
    unknown = [name for name, weights in found.items() if not weights]
    if unknown:
        raise BadInput(f"{len(unknown)} sites are not in the tree ({', '.join(unknown[:3])}); trace this tree again")
    sharers: dict[int, tuple[str, ...]] = {}
    for name, weights in found.items():
        if len(weights) == 2:  # A and B; a whole weight that is called twice is one site, and its calls have scopes
            sharers[id(weights[0])] = (*sharers.get(id(weights[0]), ()), name)
    matrices: dict[tuple[str, ...], list[np.ndarray]] = {}
    for name, weights in found.items():
        for weight in weights:
            holders = sharers.get(id(weight), (name,))
            if name == holders[0]:
                matrices.setdefault(holders, []).extend((_numpy(weight), _numpy(weight.T)))
    return matrices


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, FactoredLinear | nn.Linear) or type(module).__name__ == "Conv1D"


def _weights_of(lowered: nn.Module, name: str) -> list[Tensor]:
    """The weights of a site that is a module, or a parameter that no module of its own holds."""
    owner_path, _, attribute = name.rpartition(".")
    try:
        owner = getattr(lowered.get_submodule(owner_path), attribute)
    except AttributeError:
        return []
    if isinstance(owner, FactoredLinear):
        return [owner.A, owner.B]
    weight = owner if isinstance(owner, Tensor) else getattr(owner, "weight", None)
    return [weight] if isinstance(weight, Tensor) and weight.ndim == 2 else []


def _numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes as onnx_ir presents them, bfloat16 included."""
    return ir.tensor(tensor.detach().contiguous()).numpy()
