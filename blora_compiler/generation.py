"""The Generator: an export behind `generate()` of transformers, in a process that never sees the PyTorch model.

Sampling, stopping, streaming and beams are transformers' own `GenerationMixin`; each step runs one graph in ONNX
Runtime. The cache either grows by a copy each step, as the graphs return it, or lives in buffers of one size that the
decode graph extends in place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.exporters.utils import get_leaf_tensors
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from .artifact import Artifact, positions_of
from .errors import BadInput

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_PAST_INPUT, _PAST_OUTPUT = "input.", "output."


# ── Behind generate() ────────────────────────────────────────────────────────────────────────────────────────────


class Generator(GenerationMixin):
    """`generate()` of an export, as Hugging Face models have it.

    Greedy search, sampling, beams, streamers, stopping criteria, left padding and a cache kept between calls work as
    they do there. Assisted generation does not: the decode graph takes one token at a time.

    Attributes:
        artifact: the export; its sessions are opened on first use.
        max_length: tokens that a cache of fixed size holds for each sequence; None where it grows.
        config: of the model.
        generation_config: the model's defaults.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    input_modalities = ("text",)
    _is_stateful = False
    _supported_generation_modes = (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    )

    def __init__(self, artifact: Artifact, max_length: int | None = None) -> None:
        """Read the configurations; no session is opened yet.

        Raises:
            BadInput: if the export cannot generate, holds no configuration, or cannot run on a cache of fixed size.
        """
        if not artifact.generation:
            raise BadInput(
                f"this export has graphs {', '.join(artifact.graphs)}; generating needs prefill and decode"
            )
        if max_length is not None:
            _check_fixed_cache(artifact, max_length)
        self.artifact = artifact
        self.max_length = max_length
        self.config = _read_config(artifact.folder)
        self.generation_config = GenerationConfig.from_pretrained(artifact.folder)

    @property
    def device(self) -> torch.device:
        """Where tokens, masks and scores are. The graphs may run elsewhere: the runner binds integers on the host."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the export's arithmetic."""
        dtype: torch.dtype = getattr(torch, self.artifact.dtype)
        return dtype

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """As `forward`."""
        return self.forward(*args, **kwargs)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One step: a prompt without a cache, or any number of tokens behind one.

        Args:
            input_ids: (batch, tokens) int64.
            attention_mask: (batch, cached + tokens), 0 where padded; None where nothing is.
            position_ids: taken from the mask instead, as the graphs were verified with.
            past_key_values: the cache that an earlier step returned; None or an empty one starts anew.
            use_cache: whether to return the cache.

        Returns:
            `logits` (batch, 1, vocabulary) of the last token, and the cache. With a cache of fixed size, the next
            step writes to the same logits.

        Raises:
            BadInput: if the mask does not fit, a prompt ends in padding, or a cache of fixed size is full.
        """
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise BadInput(f"{name} is set, but the exported graphs return logits and a cache only; leave it out")
        cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        mask = _checked_mask(attention_mask, input_ids, cached)
        if cached == 0:
            logits, cache = self._start(input_ids, mask)
        else:
            logits, cache = self._continue(input_ids, mask, past_key_values, cached)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)

    def _start(self, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        output = self.artifact.prefill(input_ids, mask)
        if self.max_length is None:
            return output.logits, output.past_key_values
        return output.logits, FixedCache(self.artifact, output.past_key_values, self.max_length)

    def _continue(self, input_ids: Tensor, mask: Tensor, cache: Any, cached: int) -> tuple[Tensor, Any]:
        """One decode step a token: after a prompt there is one, after a user's next message there may be many."""
        logits = None
        for index in range(input_ids.shape[1]):
            seen = mask[:, : cached + index + 1]
            token = input_ids[:, index : index + 1]
            if isinstance(cache, FixedCache):
                logits = cache.decode(token, seen)
            else:
                output = self.artifact.decode(token, seen, cache)
                logits, cache = output.logits, output.past_key_values
        assert logits is not None, "generate never calls with no tokens"
        return logits, cache

    # What GenerationMixin asks of a model beside `forward`.

    def can_generate(self) -> bool:
        """Always: the constructor checked it."""
        return True

    def is_remote_code(self) -> bool:
        """Never: no code comes with an export."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None to choose from: the graphs are fixed."""
        return {}

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called before the first step. There is nothing to prepare, and this is the time to refuse."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise BadInput(
                f"cache_implementation is {generation_config.cache_implementation!r}; an export's cache grows, or "
                f"has a fixed size: artifact.generator(max_length=...)"
            )
        if generation_config.prefill_chunk_size is not None:
            raise BadInput("prefill_chunk_size is set; the prefill graph takes a whole prompt, leave it out")
        self.artifact.check_positions(max_cache_length)
        if self.max_length is not None and max_cache_length > self.max_length:
            raise BadInput(
                f"up to {max_cache_length} tokens would be cached and the cache holds {self.max_length}; ask for "
                f"fewer new tokens, or open artifact.generator(max_length={max_cache_length})"
            )


def _checked_mask(mask: Tensor | None, input_ids: Tensor, cached: int) -> Tensor:
    """The mask (batch, cached + tokens) int64, all ones where none was given."""
    batch, tokens = input_ids.shape
    if mask is None:
        return input_ids.new_ones((batch, cached + tokens))
    if mask.shape != (batch, cached + tokens):
        raise BadInput(
            f"attention_mask has shape {tuple(mask.shape)}; input_ids {tuple(input_ids.shape)} behind {cached} "
            f"cached tokens need {(batch, cached + tokens)}"
        )
    if not bool((mask[:, -1] == 1).all()):
        raise BadInput("a row of attention_mask ends in padding; pad shorter prompts on the left")
    return mask.to(input_ids.dtype)


# ── Cache of fixed size ──────────────────────────────────────────────────────────────────────────────────────────


class FixedCache:
    """Keys and values in buffers of one size, which the decode graph reads and extends in place.

    Input and output of every layer are bound once to the same memory, so a step copies nothing and allocates nothing.

    Attributes:
        buffers: graph name (`past_key_values.layers.0.keys`) -> (batch, heads, capacity, head size).
        capacity: tokens that fit, padding included.
        length: tokens that are in.
    """

    is_compileable = False  # asked by GenerationMixin, which would compile the model and build masks of four axes

    def __init__(self, artifact: Artifact, prompt: Any, capacity: int) -> None:
        """Copy the cache that `prefill` returned.

        Raises:
            BadInput: if the prompt is longer than `capacity`.
        """
        self.capacity, self.length = capacity, int(prompt.get_seq_length())
        if self.length > capacity:
            raise BadInput(
                f"the prompt has {self.length} tokens and the cache holds {capacity}; open a generator with a larger "
                f"max_length, or shorten the prompt"
            )
        states = get_leaf_tensors({"past_key_values": prompt})
        self.buffers = {name: _enlarged(tensor, capacity) for name, tensor in states.items()}
        self._session = artifact.session("decode")
        self._binding = self._session.io_binding()
        first = next(iter(self.buffers.values()))
        self._device, batch = first.device, first.shape[0]
        self._logits = self._new_logits(batch)
        for name, buffer in self.buffers.items():
            _bind(self._binding.bind_input, f"{_PAST_INPUT}{name}", buffer)
            _bind(self._binding.bind_output, f"{_PAST_OUTPUT}{name}", buffer)
        _bind(self._binding.bind_output, "logits", self._logits)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that are in, padding included; the same for every layer."""
        return self.length

    def decode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run one more token (batch, 1); the mask (batch, length + 1) covers it.

        Returns:
            (batch, 1, vocabulary) logits. The next call writes to the same memory.

        Raises:
            BadInput: if the cache is full.
        """
        if self.length == self.capacity:
            raise BadInput(f"the cache of {self.capacity} tokens is full; open a generator with a larger max_length")
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": positions_of(attention_mask)[:, -1:],
        }
        # Bound by address: they must live until the run has ended.
        bound = {
            spec.name: given[spec.name].contiguous() for spec in self._session.get_inputs() if spec.name in given
        }
        for name, tensor in bound.items():
            _bind(self._binding.bind_input, name, tensor)
        if self._device.type == "cuda":  # ONNX Runtime has a stream of its own: what torch wrote has to be there
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        self.length += 1
        return self._logits

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx[i]`, as beam search asks for after each step."""
        for buffer in self.buffers.values():
            filled = buffer[:, :, : self.length]
            filled.copy_(filled.index_select(0, beam_idx.to(buffer.device)))

    def _new_logits(self, batch: int) -> Tensor:
        spec = next(spec for spec in self._session.get_outputs() if spec.name == "logits")
        dtype = next(iter(self.buffers.values())).dtype
        return torch.empty((batch, 1, int(spec.shape[-1])), dtype=dtype)


def _enlarged(states: Tensor, capacity: int) -> Tensor:
    """(batch, heads, tokens, head size) at the front of a buffer with room for `capacity` tokens."""
    batch, heads, tokens, size = states.shape
    # Zeros, not `empty`: nothing reads behind the length, but if anything ever did, it should not be a NaN.
    buffer = states.new_zeros((batch, heads, capacity, size))
    buffer[:, :, :tokens] = states
    return buffer


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    element_type = int(ir.tensor_adapters.from_torch_dtype(tensor.dtype))
    bind(name, tensor.device.type, tensor.device.index or 0, element_type, list(tensor.shape), tensor.data_ptr())


def _check_fixed_cache(artifact: Artifact, max_length: int) -> None:
    if max_length < 1:
        raise BadInput(f"max_length is {max_length}; a cache of fixed size holds at least 1 token")
    reason = artifact.fixed_cache_refusal
    if reason is not None:
        raise BadInput(f"this export has no cache of fixed size: {reason}; leave max_length out")


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_configs(model: Any, folder: Path) -> None:
    """Write a Hugging Face model's configuration and generation defaults, for `Generator` to read.

    Where the model was loaded from is left out: it is a path of this machine.
    """
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    _write_json(folder / CONFIG, config)
    defaults = model.generation_config.to_dict()
    defaults.pop("_from_model_config", None)
    _write_json(folder / GENERATION_CONFIG, {name: value for name, value in defaults.items() if value is not None})


def _read_config(folder: Path) -> Any:
    for name in (CONFIG, GENERATION_CONFIG):
        if not (folder / name).is_file():
            raise BadInput(f"{folder} holds no {name}: it was exported by an earlier version; export the model again")
    try:
        return AutoConfig.from_pretrained(folder)
    except ValueError:  # a class of the user's own; generating reads only what every configuration has
        return PreTrainedConfig.from_pretrained(folder)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
