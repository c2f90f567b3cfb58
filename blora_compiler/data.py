"""Text and tensors into batches: reading, packing, sampling, and the order in which training sees them.

Which batch a step sees is a pure function of the seed and the step, so a resumed run needs no sampler state.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import lzma
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import BadInput

TEXT_SUFFIXES = (".txt", ".txt.xz", ".jsonl")


# ── Text to token sequences ──────────────────────────────────────────────────────────────────────────────────────


def check_readable(*given: Any) -> None:
    """Refuse, before any work, files that no text can be read from; other data are looked at where they are used.

    Raises:
        BadInput: a file is missing or has another suffix.
    """
    for value in given:
        if isinstance(value, str | Path):
            _check_suffix(Path(value))
            if not Path(value).is_file():
                raise BadInput(f"{value}: there is no such file; check the path")


def _check_suffix(path: Path) -> None:
    if not path.name.endswith(TEXT_SUFFIXES):
        raise BadInput(f"{path}: text is read from {', '.join(TEXT_SUFFIXES)}; convert it to one of these")


def load_texts(path: str | Path) -> list[str]:
    """The documents in a file: one in `.txt` and `.txt.xz`, one a line in `.jsonl` (`{"text": "..."}`). UTF-8.

    Raises:
        BadInput: if the file is missing, has another suffix, is not UTF-8, is damaged, or a JSON line has no text.
    """
    path = Path(path)
    _check_suffix(path)
    try:
        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except lzma.LZMAError as error:
        raise BadInput(f"{path}: not a complete xz file ({error}); fetch or compress it again") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8; re-encode the file") from error
    return _texts_of_json_lines(text, path) if path.suffix == ".jsonl" else [text]


def _texts_of_json_lines(content: str, path: Path) -> list[str]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin, which it would take for line ends.
    numbered = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    return [_text_of_json_line(line, f"{path}, line {number}") for number, line in numbered]


def _text_of_json_line(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON ({error.msg} at column {error.colno}); one object a line") from error
    match record:
        case {"text": str(text)}:
            return text
    raise BadInput(f'{where}: no text in {line[:80]!r}; write {{"text": "..."}}')


def tokenize(texts: Iterable[str], tokenizer: Any) -> Tensor:
    """All documents as one stream of token ids, (tokens,) int64, with the tokenizer's end mark after each.

    The mark is EOS, else SEP, else BOS; a tokenizer without any of them joins documents with nothing.
    """
    marks = (tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None), tokenizer.bos_token_id)
    end = next(([mark] for mark in marks if mark is not None), [])
    stream: list[int] = []
    for text in texts:
        # verbose=False: a warning that a document is longer than the model's context says nothing here.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream += [*ids, *end] if ids else []
    return torch.tensor(stream, dtype=torch.long)


def pack(texts: Iterable[str], tokenizer: Any, length: int, name: str = "training set") -> Tensor:
    """Documents joined by `tokenize` and cut into sequences, (sequences, length) int64; the tail is dropped.

    Raises:
        BadInput: if there are fewer tokens than one sequence needs.
    """
    stream = tokenize(texts, tokenizer)
    if stream.numel() < length:
        raise BadInput(
            f"the {name} is empty: {stream.numel()} tokens found, one sequence needs {length}; "
            f"give more text or a shorter sequence length"
        )
    count = stream.numel() // length
    return stream[: count * length].view(count, length)


def evaluation_windows(token_ids: Tensor, length: int = 257, stride: int = 768, count: int = 96) -> Tensor:
    """Windows of a token stream, (windows, length): window i starts at token `stride * i`; at most `count` of them.

    Raises:
        BadInput: if not even one window fits.
    """
    if token_ids.numel() < length:
        raise BadInput(
            f"the evaluation text has {token_ids.numel()} tokens, one window needs {length}; give more text"
        )
    return token_ids.unfold(0, length, stride)[:count].contiguous()


# ── Which batch a step sees ──────────────────────────────────────────────────────────────────────────────────────


class BatchSource(Protocol):
    """What training reads from."""

    def batch(self, step: int) -> Tensor | dict[str, Tensor]:
        """The batch of a step (from 0): (batch, length) token ids, or the model's keyword inputs."""
        ...

    def fingerprint(self) -> str:
        """Tells apart any two sources that would give different batches."""
        ...


def _drawn(count: int, first: int, amount: int, seed: int) -> Tensor:
    """(amount,) indices below `count` at positions `first...` of an endless row of seeded permutations."""
    drawn: list[Tensor] = []
    position = first
    while position < first + amount:
        epoch, offset = divmod(position, count)
        generator = torch.Generator().manual_seed(int.from_bytes(_digest(f"{seed}/{epoch}".encode())[:7]))
        piece = torch.randperm(count, generator=generator)[offset : offset + first + amount - position]
        drawn.append(piece)
        position += len(piece)
    return torch.cat(drawn)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass(frozen=True, eq=False)
class Batches:
    """Token sequences in a seeded order, each seen once an epoch.

    Attributes:
        sequences: (sequences, length) int64.
        size: sequences per batch; may exceed the number of sequences.
        seed: of the order.
        main: the input that takes them.
    """

    sequences: Tensor
    size: int
    seed: int
    main: str = "input_ids"

    def __post_init__(self) -> None:
        if self.sequences.ndim != 2 or self.sequences.shape[0] == 0:
            raise BadInput(
                f"the training set is empty: its shape is {tuple(self.sequences.shape)}, "
                f"at least (1, length) is needed"
            )
        if self.size < 1:
            raise BadInput(f"a batch needs at least 1 sequence, got {self.size}")

    def rows(self, step: int) -> Tensor:
        """(size,) which sequences the step sees."""
        return _drawn(self.sequences.shape[0], step * self.size, self.size, self.seed)

    def batch(self, step: int) -> Tensor:
        """(size, length) token ids of the step."""
        return self.sequences[self.rows(step)]

    def fingerprint(self) -> str:
        """Covers the sequences, the batch size and the seed."""
        return f"{fingerprint_of_tensor(self.sequences)}/{self.size}/{self.seed}"


@dataclass(frozen=True, eq=False)
class InputBatches:
    """Ready-made batches of keyword inputs, as `as_batches` returns them, in a seeded order; one a step."""

    inputs: list[dict[str, Tensor]]
    seed: int

    def __post_init__(self) -> None:
        if not self.inputs:
            raise BadInput("the training set is empty: 0 batches found, at least 1 is needed")

    def batch(self, step: int) -> dict[str, Tensor]:
        """The keyword inputs of the step."""
        return self.inputs[int(_drawn(len(self.inputs), step, 1, self.seed))]

    def fingerprint(self) -> str:
        """Covers all inputs and the seed."""
        return f"{fingerprint_of_tensors(item for b in self.inputs for item in sorted(b.items()))}/{self.seed}"


def fingerprint_of_tensor(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes; a tensor on the meta device has none."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel() and tensor.device.type != "meta":
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}:{fingerprint_of_tensor(tensor)};".encode())
    return digest.hexdigest()


# ── Batches the caller made ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class InputSpec:
    """What one input of a model may look like.

    Attributes:
        shape: one entry per dimension; None where any size will do.
        dtype: an integer input accepts any integer dtype, a floating one any floating dtype.
        below: token ids must be smaller than this; None where the values are no ids.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    below: int | None = None

    def __str__(self) -> str:
        return f"({', '.join('any' if size is None else str(size) for size in self.shape)}) {_short(self.dtype)}"


def input_specs(model: nn.Module) -> dict[str, InputSpec]:
    """What is known of a model's inputs, the main one first. Empty for modules that say nothing about themselves."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        return {}
    specs: dict[str, InputSpec] = {}
    if main == "pixel_values":
        size, channels = (
            getattr(config, name, None) for name in ("image_size", "num_channels")
        )  # SegFormer has none
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        specs[main] = InputSpec((None, channels, height, width), torch.float32)
    elif main == "input_ids":
        specs[main] = InputSpec((None, None), torch.int64, below=config.get_text_config().vocab_size)
        specs["attention_mask"] = InputSpec((None, None), torch.int64)
    return specs


def as_batches(
    batches: Iterable[Any], specs: Mapping[str, InputSpec], *, name: str, main: str = "input_ids"
) -> list[dict[str, Tensor]]:
    """Tensors or mappings of tensors, as a caller gives them, into the model's keyword inputs.

    Args:
        batches: each item a tensor (the model's first input) or a mapping of input name to tensor. One tensor
            alone is one batch.
        specs: what the inputs may look like, from `input_specs`; inputs not named there are not checked.
        name: what the caller knows these as (`calibration`, `train`), for messages.
        main: the first input's name where `specs` is empty.

    Raises:
        BadInput: naming the batch and the input, with the shape or dtype found and the one expected.
    """
    main = next(iter(specs), main)
    items = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    if not items:
        raise BadInput(f"{name} is empty: 0 batches found, at least 1 is needed")
    normalised = [_as_inputs(item, main, f"{name}[{index}]") for index, item in enumerate(items)]
    for index, inputs in enumerate(normalised):
        _check_inputs(inputs, specs, f"{name}[{index}]")
    return normalised


def main_input(model: nn.Module) -> str:
    """Name of the input a bare tensor goes to: what the model declares, else the first argument of `forward`."""
    declared = getattr(model, "main_input_name", None)
    return declared or next(iter(inspect.signature(model.forward).parameters), "input")


def _as_inputs(item: Any, main: str, where: str) -> dict[str, Tensor]:
    if isinstance(item, Tensor):
        return {main: item}
    if isinstance(item, Mapping) and all(isinstance(value, Tensor) for value in item.values()):
        return dict(item)
    raise BadInput(f"{where} is {type(item).__name__}; give a tensor, or a mapping of input names to tensors")


def _check_inputs(inputs: Mapping[str, Tensor], specs: Mapping[str, InputSpec], where: str) -> None:
    for name, spec in specs.items():
        if name in inputs:
            _check_input(inputs[name], spec, f"{where}[{name!r}]")
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is not None and ids is not None and mask.shape != ids.shape:
        raise BadInput(
            f"{where}: attention_mask is {tuple(mask.shape)} but input_ids is {tuple(ids.shape)}; make them alike"
        )


def _check_input(tensor: Tensor, spec: InputSpec, where: str) -> None:
    fits = tensor.ndim == len(spec.shape) and all(
        wanted in (None, size) for size, wanted in zip(tensor.shape, spec.shape, strict=True)
    )
    if not fits or 0 in tensor.shape:
        raise BadInput(f"{where} has shape {tuple(tensor.shape)}, the model takes {spec}; none may be 0")
    if tensor.dtype.is_floating_point != spec.dtype.is_floating_point:
        raise BadInput(f"{where} has dtype {_short(tensor.dtype)}, the model takes {_short(spec.dtype)}")
    if spec.below is not None and not 0 <= int(tensor.min()) <= int(tensor.max()) < spec.below:
        raise BadInput(
            f"{where} holds token ids from {int(tensor.min())} to {int(tensor.max())}, "
            f"the model knows 0 to {spec.below - 1}; use the model's own tokenizer"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ── Data from the model itself ───────────────────────────────────────────────────────────────────────────────────


def sample_sequences(model: nn.Module, count: int, length: int, seed: int, batch: int = 32) -> Tensor:
    """Sequences drawn from a causal language model at temperature 1, (count, length) int64, on the CPU.

    Each starts with BOS, or with a uniformly random token where the model has none; an end mark does not stop it.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        parts = [
            _sample_batch(model, min(batch, count - done), length, config, generator)
            for done in range(0, count, batch)
        ]
    finally:
        for module, flag in modes:
            module.training = flag
    return torch.cat(parts).cpu()


@torch.no_grad()
def _sample_batch(model: nn.Module, rows: int, length: int, config: Any, generator: torch.Generator) -> Tensor:
    """(rows, length); uses the model's cache where it returns one, else runs the whole prefix again."""
    device = generator.device
    if config.bos_token_id is not None:
        last = torch.full((rows, 1), config.bos_token_id, device=device)
    else:
        last = torch.randint(config.vocab_size, (rows, 1), device=device, generator=generator)
    sequences, cache = last, None
    while sequences.shape[1] < length:
        inputs = sequences if cache is None else last
        outputs = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = getattr(outputs, "past_key_values", None)
        probabilities = torch.softmax(outputs.logits[:, -1].float(), dim=-1)
        last = torch.multinomial(probabilities, 1, generator=generator)
        sequences = torch.cat([sequences, last], dim=1)
    return sequences[:, :length]
