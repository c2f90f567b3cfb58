"""The Artifact: a verified export on disk, opened in ONNX Runtime.

A folder holds its graphs (`prefill.onnx` and `decode.onnx`, or `model.onnx`), one `weights.data` that they share,
and `export.json`, the manifest; those that generate also the model's configuration, and its tokenizer if it has one.
Sessions of Hugging Face models are called through `transformers.exporters`' runner,
which binds inputs and outputs in place and rebuilds the cache object.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
import torch
from torch import Tensor
from transformers.exporters.metadata import ExportMetadata
from transformers.exporters.runners.runner_onnx import OnnxModelRunner

from .errors import BadInput, ProviderMissing
from .folders import file_sha256
from .runtime import SharedWeights, check_placement, load_cuda_libraries, record_placement

if TYPE_CHECKING:
    from .generation import Generator

MANIFEST, WEIGHTS, TOKENIZER = "export.json", "weights.data", "tokenizer_config.json"
FORMAT, FORMAT_VERSION = "blora-export", 1
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# The cores that this process may use, as it was started; empty where the system does not say.
CORES = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
_MANIFEST_KEYS = (
    "target", "dtype", "generation", "graphs", "files", "inputs", "node_sites", "unmapped_sites", "parity"
)  # fmt: skip


# ── What the manifest holds ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class InputSpec:
    """What one example input looked like: enough to draw others of its kind.

    Attributes:
        name: the keyword it is passed by, or the position's name for modules called by position.
        dtype: of torch, `"int64"`.
        shape: of the example.
        dynamic: axes that may have another size.
        low, high: range of the example's values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    dynamic: tuple[int, ...]
    low: float
    high: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputSpec:
        """The spec as the manifest holds it, with its lists as tuples again."""
        return cls(**{**data, "shape": tuple(data["shape"]), "dynamic": tuple(data["dynamic"])})

    def varies_with_tokens(self, first: InputSpec) -> bool:
        """Whether axis 1 is the number of tokens: it is open, and as long as that of the `first` input."""
        return 1 in self.dynamic and len(first.shape) > 1 and self.shape[1] == first.shape[1]


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime's outputs were from PyTorch's, when the export was verified.

    Attributes:
        dtype: of the export.
        tolerance: largest difference allowed.
        errors: setting (`"prefill 2x16 left-padded"`) -> largest difference of the outputs; where those are below 1,
            as a share of the largest one expected.
        sequences: greedy generations compared with PyTorch's.
        identical: how many of them were identical, token for token.
        new_tokens: tokens generated for each.
        rounding_tolerance: largest distance allowed where the export rounds inputs of quantised GEMMs to int8, as a
            share of the output's length; None where it has no such GEMM. `errors` are then those of its graphs
            computing in floats, against the model with the same weights rounded alike.
        rounding_errors: setting -> that distance.
    """

    dtype: str
    tolerance: float
    errors: Mapping[str, float] = field(default_factory=dict)
    sequences: int = 0
    identical: int = 0
    new_tokens: int = 0
    rounding_tolerance: float | None = None
    rounding_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def max_error(self) -> float:
        """The largest difference over all settings."""
        return max(self.errors.values(), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it; `Parity(**data)` reads it back."""
        return asdict(self)

    def __str__(self) -> str:
        line = f"{len(self.errors)} settings within {self.max_error:.2g} of PyTorch (tolerance {self.tolerance:.2g})"
        if self.sequences:
            line += f", {self.identical} of {self.sequences} greedy generations of {self.new_tokens} tokens identical"
        if self.rounding_tolerance is not None:
            worst = max(self.rounding_errors.values(), default=0.0)
            line += f"; with inputs in int8 within {worst:.1%} (tolerance {self.rounding_tolerance:.0%})"
        return line


# ── The artifact ─────────────────────────────────────────────────────────────────────────────────────────────────


class Artifact:
    """An export folder, ready to run. `lower` and `Artifact.load` make it; both only from verified files.

    Attributes:
        folder: where the files are.
        manifest: `export.json` as it was read.
        threads: threads of each session's kernels; None leaves the choice to ONNX Runtime.
        low_memory: whether sessions on the CPU read the weights file in place.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], threads: int | None = None, low_memory: bool = False
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.threads = threads
        self.low_memory = low_memory
        self._pinned = False
        self._weights = None if self.target == "cpu" else SharedWeights(self.target)
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._runners: dict[str, OnnxModelRunner] = {}

    @classmethod
    def load(cls, folder: str | Path, threads: int | None = None, low_memory: bool = False) -> Artifact:
        """Open an export that was verified when it was written. Every file is read once, to check its hash.

        Args:
            folder: what `export` wrote.
            threads: of each session's kernels; None leaves the choice to ONNX Runtime.
            low_memory: on the CPU, read the weights in place from the file, mapped into memory once for all sessions
                and processes. By default each session packs a copy of its own for its GEMMs, which makes short
                prompts much faster (see docs/why-not-faster.md). On CUDA one copy serves all sessions anyway.

        Raises:
            BadInput: if the folder holds no export, or its files are not the ones that were verified.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder / MANIFEST)
        for name, expected in manifest["files"].items():
            _check_file(folder / name, expected)
        return cls(folder, manifest, threads, low_memory)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the export: graphs, weights, manifest."""
        return tuple(self.folder / name for name in (*self.manifest["files"], MANIFEST))

    @property
    def target(self) -> str:
        """The execution provider it was fused for and verified on: `"cpu"` or `"cuda"`."""
        return str(self.manifest["target"])

    @property
    def dtype(self) -> str:
        """The type of its weights and arithmetic."""
        return str(self.manifest["dtype"])

    @property
    def generation(self) -> bool:
        """Whether it has prefill and decode graphs, and so `generate`."""
        return bool(self.manifest["generation"])

    @property
    def graphs(self) -> tuple[str, ...]:
        """The names that `session` takes."""
        return tuple(self.manifest["graphs"])

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What the example inputs looked like."""
        return tuple(InputSpec.from_json(spec) for spec in self.manifest["inputs"])

    @property
    def takes_any_length(self) -> bool:
        """Whether the number of tokens is open; images, for one, have a size that is fixed."""
        return self.generation or any(spec.varies_with_tokens(self.inputs[0]) for spec in self.inputs)

    @property
    def parity(self) -> Parity:
        """How close it came to PyTorch when it was verified."""
        return Parity(**self.manifest["parity"])

    @property
    def quantize(self) -> str | None:
        """How the weights of its GEMMs are quantised: `"int8"`, `"int4"`, or None."""
        return (self.manifest.get("quantization") or {}).get("quantize")

    @property
    def unmapped_sites(self) -> tuple[str, ...]:
        """Sites that no node of any graph could be traced back to."""
        return tuple(self.manifest["unmapped_sites"])

    def node_sites(self, name: str) -> dict[str, list[str]]:
        """Node name -> the sites it computes (a packed GEMM computes several), in one graph.

        Raises:
            BadInput: if there is no graph of that name.
        """
        self._check_graph(name)
        return {node: list(sites) for node, sites in self.manifest["node_sites"][name].items()}

    def session(self, name: str) -> onnxruntime.InferenceSession:
        """The graph in ONNX Runtime, opened on first use: `"prefill"`, `"decode"`, or `"model"`.

        Raises:
            BadInput: if there is no graph of that name, or ONNX Runtime cannot load it.
            ProviderMissing: if the target's execution provider is absent, or the session fell back to another one.
        """
        self._check_graph(name)
        if name not in self._sessions:
            self._sessions[name] = self._open(name)
        return self._sessions[name]

    def pinned(self) -> Artifact:
        """The same export with sessions of its own whose threads stay on cores of their own: for timing.

        A scheduler may put both threads of a small session on one core and leave them there for seconds, which
        doubles every time measured meanwhile.
        """
        copy = self._copy()
        copy._pinned = True
        return copy

    def _copy(self) -> Artifact:
        """The same export without sessions; on a GPU it reads the same weights."""
        copy = Artifact(self.folder, self.manifest, self.threads, self.low_memory)
        copy._pinned, copy._weights = self._pinned, self._weights
        return copy

    def _open(
        self, name: str, profile_prefix: Path | None = None, sizes: Mapping[str, int] | None = None
    ) -> onnxruntime.InferenceSession:
        return open_session(
            self.folder / f"{name}.onnx", self.target, self.threads, profile_prefix, self._pinned, self._weights,
            self.low_memory, sizes,
        )  # fmt: skip

    def at_sizes(self, name: str, sizes: Mapping[str, int]) -> onnxruntime.InferenceSession:
        """The graph opened for one shape alone, which folds its arithmetic on shapes; on CUDA it captures its first
        run as a CUDA graph and replays it afterwards, so that inputs and outputs must stay where they are.

        Args:
            name: of the graph.
            sizes: open axis of an input -> its size.

        Raises:
            BadInput: if there is no graph of that name, or ONNX Runtime cannot load it.
            ProviderMissing: as of `session`.
        """
        self._check_graph(name)
        return self._open(name, sizes=sizes)

    def runner(self, name: str) -> OnnxModelRunner:
        """The session of a Hugging Face model's graph, called by keyword like the model itself.

        Raises:
            BadInput: if there is no graph of that name, or it came from a plain module.
        """
        session = self.session(name)
        if name not in self._runners:
            metadata = self.manifest["graphs"][name]["metadata"]
            if metadata is None:
                raise BadInput(f"graph {name!r} came from a plain module; call session({name!r}).run instead")
            self._runners[name] = OnnxModelRunner(ExportMetadata.from_dict(metadata), session)
        return self._runners[name]

    def recording(self, name: str, profile_prefix: Path) -> Artifact:
        """The same export with a session of its own for one graph, which records a profile of every run.

        Other graphs keep the sessions that are open here. Ending the profile is the caller's part
        (`session(name).end_profiling()`, which returns the file's path).

        Raises:
            BadInput: if there is no graph of that name, or ONNX Runtime cannot load it.
            ProviderMissing: if the target's execution provider is absent, or the session fell back to another one.
        """
        self._check_graph(name)
        recorded = self._open(name, profile_prefix)
        copy = self._copy()
        copy._sessions = {**self._sessions, name: recorded}
        return copy

    @property
    def fixed_cache_refusal(self) -> str | None:
        """Why decoding cannot run on a cache of fixed size; None where it can."""
        return self.manifest.get("fixed_cache_refusal", "it was exported by an earlier version")

    def generator(self, max_length: int | None = None) -> Generator:
        """The export behind `generate()` of transformers: sampling, beams, streamers, stopping criteria.

        Args:
            max_length: keep the cache in buffers for this many tokens a sequence (prompt, padding and new ones),
                which the decode graph extends in place; None lets it grow by a copy each step.

        Raises:
            BadInput: if the export cannot generate, or not on a cache of fixed size.
        """
        from .generation import Generator

        return Generator(self, max_length)

    def check_positions(self, needed: int) -> None:
        """Raise BadInput if the model has fewer positions than tokens are to be cached."""
        positions = self.manifest.get("positions")  # None: no limit, or exported by an earlier version
        if positions is not None and needed > positions:
            raise BadInput(
                f"up to {needed} tokens would be cached, the model has {positions} positions; ask for fewer"
            )

    def tokenizer(self) -> Any:
        """The tokenizer that was exported with the model.

        Raises:
            BadInput: if the export carries none.
        """
        from transformers import AutoTokenizer

        if TOKENIZER not in self.manifest["files"]:
            raise BadInput(f"{self.folder} holds no tokenizer; export a model that has one, or pass token ids")
        return AutoTokenizer.from_pretrained(self.folder)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """Continue prompts greedily, with the key/value cache. `generator().generate` can do more.

        Args:
            input_ids: (batch, tokens) int64, shorter prompts padded on the left.
            attention_mask: (batch, tokens), 0 where padded; None where nothing is.
            max_new_tokens: tokens to add at most.
            eos_token_id: token that ends a sequence; the rest of that row is filled with it. None: never end early.

        Returns:
            (batch, tokens + new tokens) int64, prompts included.

        Raises:
            BadInput: if the export has no prefill and decode graphs, or the arguments do not fit each other.
        """
        if not self.generation:
            raise BadInput(f"this export has graphs {', '.join(self.graphs)}; generating needs prefill and decode")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        _check_prompts(input_ids, mask, max_new_tokens)
        self.check_positions(int(mask.sum(1).max()) + max_new_tokens - 1)
        tokens = input_ids
        finished = torch.zeros(len(tokens), dtype=torch.bool)
        output = self.prefill(input_ids, mask)
        for step in range(max_new_tokens):
            following = output.logits[:, -1].argmax(dim=-1).to(tokens)
            if eos_token_id is not None:
                following = following.masked_fill(finished, eos_token_id)
                finished |= following == eos_token_id
            tokens = torch.cat([tokens, following[:, None]], dim=1)
            if step + 1 == max_new_tokens or bool(finished.all()):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = self.decode(following[:, None], mask, output.past_key_values)
        return tokens

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Run a prompt (batch, tokens). The output has `logits` (batch, 1, vocabulary) and `past_key_values`."""
        positions = positions_of(attention_mask)
        return self.runner("prefill")(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)

    def decode(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any) -> Any:
        """Run one more token (batch, 1) behind the cache; the mask (batch, context + 1) covers both."""
        positions = positions_of(attention_mask)[:, -1:]
        return self.runner("decode")(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=past_key_values,
        )

    def _check_graph(self, name: str) -> None:
        if name not in self.graphs:
            raise BadInput(f"no graph {name!r} in {self.folder}; it has {', '.join(self.graphs)}")

    def __repr__(self) -> str:
        return f"Artifact({self.folder}, {self.target}, {self.dtype}, graphs: {', '.join(self.graphs)})"


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position of every token among the attended ones of its row; 0 in the left padding. (batch, tokens) -> same."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)


def _check_prompts(input_ids: Tensor, mask: Tensor, max_new_tokens: int) -> None:
    if input_ids.ndim != 2 or not input_ids.numel():
        raise BadInput(f"input_ids has shape {tuple(input_ids.shape)}; it must be (batch, tokens), neither zero")
    if mask.shape != input_ids.shape:
        raise BadInput(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}")
    if not bool((mask[:, -1] == 1).all()):
        raise BadInput("a row of attention_mask ends in padding; pad shorter prompts on the left")
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {max_new_tokens}; it must be at least 1")


# ── ONNX Runtime ─────────────────────────────────────────────────────────────────────────────────────────────────


def check_provider(target: str) -> None:
    """Refuse a target that this machine's ONNX Runtime has no execution provider for.

    Raises:
        ProviderMissing: naming what is there instead.
    """
    available = onnxruntime.get_available_providers()
    if target != "cpu" and PROVIDERS[target] in available:
        load_cuda_libraries()
    if PROVIDERS[target] not in available:
        raise ProviderMissing(
            f"target {target!r} needs {PROVIDERS[target]}, this ONNX Runtime has {', '.join(available)}; "
            f"install 'onnxruntime-gpu[cuda,cudnn]', or use target='cpu'"
        )


def open_session(
    path: Path,
    target: str,
    threads: int | None = None,
    profile_prefix: Path | None = None,
    pinned: bool = False,
    weights: SharedWeights | None = None,
    low_memory: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> onnxruntime.InferenceSession:
    """Open one graph on the target's execution provider and on no other.

    Args:
        path: the graph's file.
        target: `"cpu"` or `"cuda"`.
        threads: of each kernel; None leaves the choice to ONNX Runtime.
        profile_prefix: where to record a profile of every run, as a path that a time stamp is added to; None records
            none.
        pinned: keep each thread on a core of its own; see `session_options`.
        weights: on the device already, for this session to read beside others; None lets it load its own.
        low_memory: read weights in place and pack no copy of them; see `Artifact.load`.
        sizes: open axis -> the one size that it will have; on CUDA the first run is then captured and replayed.

    Raises:
        BadInput: if ONNX Runtime cannot load the file.
        ProviderMissing: if the provider is absent, or the session or a node that computes fell back.
    """
    check_provider(target)
    options = session_options(threads, pinned)
    if low_memory:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if target != "cpu":
        record_placement(options)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    # The CPU provider behind CUDA runs shape arithmetic; whether CUDA itself came up is checked on the session.
    wanted: list[Any] = list(dict.fromkeys((PROVIDERS[target], PROVIDERS["cpu"])))
    for axis, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(axis, size)
    if sizes is not None and target == "cuda":
        wanted[0] = (PROVIDERS[target], {"enable_cuda_graph": "1"})
    if weights is not None:
        weights.supply(path, options)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise BadInput(f"ONNX Runtime cannot load {path}: {error}") from error
    if session.get_providers()[0] != PROVIDERS[target]:
        raise ProviderMissing(
            f"{path.name} was to run on {PROVIDERS[target]}, but ONNX Runtime fell back to "
            f"{session.get_providers()[0]}; check that the driver, CUDA and cuDNN match onnxruntime-gpu, "
            f"or use target='cpu'\n{load_cuda_libraries()}".rstrip()
        )
    if weights is not None:
        weights.keep_with(session)
    if target != "cpu":
        check_placement(session, path.name, PROVIDERS[target])
    return session


def session_options(
    threads: int | None = None, pinned: bool = False, alone: bool = False
) -> onnxruntime.SessionOptions:
    """How every session here runs.

    Args:
        threads: of each kernel; None or 0 leaves the choice to ONNX Runtime.
        pinned: keep each thread on a core of its own: the calling thread's is the first that this process may use
            (see `timing.on_first_core`). Only for timing: a server has other work for its cores.
        alone: no other session runs while this one is alive, so that its threads may stay awake between its runs. A
            run of a few small kernels is otherwise over before they have woken up, now and then.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Warnings name the shape nodes that run on the CPU by design.
    # Threads of a session that has just run would spin for tens of milliseconds more and halve the speed of the next
    # session on the same cores: decode behind prefill, or two models timed in turn.
    if not alone:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads:
        options.intra_op_num_threads = threads
    if pinned and CORES:
        count = min(threads or len(CORES), len(CORES))
        options.intra_op_num_threads = count
        if count > 1:
            others = ";".join(str(core + 1) for core in CORES[1:count])  # ONNX Runtime counts cores from 1
            options.add_session_config_entry("session.intra_op_thread_affinities", others)
    return options


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def file_record(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the manifest keeps them."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise BadInput(f"{path} is missing, though {MANIFEST} lists it; export the model again")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise BadInput(f"{path} has {size} bytes, {expected['bytes']} when it was verified; export the model again")
    if file_record(path)["sha256"] != expected["sha256"]:
        raise BadInput(f"{path} is not the file that was verified (its hash differs); export the model again")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path.parent} holds no export: {MANIFEST} is missing") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}; export the model again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadInput(f"{path} is no manifest of this compiler; point at a folder that `export` wrote")
    if manifest.get("version") != FORMAT_VERSION:
        raise BadInput(f"{path} has format version {manifest.get('version')}, this version reads {FORMAT_VERSION}")
    missing = [key for key in _MANIFEST_KEYS if key not in manifest]
    if missing:
        raise BadInput(f"{path} is damaged: {', '.join(missing)} missing; export the model again")
    return manifest
