"""Data for the stages: whatever the caller gave becomes batches, and where nothing was given the model makes some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import (
    Batches,
    BatchSource,
    InputBatches,
    as_batches,
    evaluation_windows,
    input_specs,
    load_texts,
    main_input,
    pack,
    sample_sequences,
    tokenize,
)
from .distillation import DistillConfig
from .errors import BadInput
from .graph import Program, binds_by_position
from .source import Source, position_limit
from .tracing import fixed_sizes, is_pretrained, name_inputs

CALIBRATION_SEQUENCES = 128
OWN_SEQUENCES = 64  # sampling is slower than reading
CALIBRATION_LENGTH = 256
CALIBRATION_BATCH = 8
EVALUATION_LENGTH = 257
EVALUATION_STRIDE = 768
EVALUATION_WINDOWS = 32


def calibration_batches(
    program: Program, source: Source, data: Any, seed: int
) -> tuple[list[dict[str, Tensor]], str]:
    """Batches of named inputs for profiling, and a phrase that says where they came from."""
    if data is None:
        return _own_batches(program, source, seed)
    if _is_text(data):
        length = _length(source, program)
        sequences = _in_vocabulary(source, pack(_texts(data), _tokenizer(source), length, "calibration text"))
        return _batched(
            program, _spread(sequences, seed)
        ), f"{min(len(sequences), CALIBRATION_SEQUENCES)} text sequences"
    given = _named(program, _given(source, data, "calibration", limit=CALIBRATION_SEQUENCES))
    for index, batch in enumerate(given):
        if "input_ids" in batch:
            _check_positions(source, batch["input_ids"], f"calibration batch {index}")
    _check_sizes(program, given)
    return given, "the given batches"


def training_batches(program: Program, source: Source, data: Any, config: DistillConfig) -> tuple[BatchSource, str]:
    """What training reads from, and a phrase that says where it came from."""
    if data is None:
        if not _speaks(source):
            raise BadInput(f"{source.name} cannot make its own training data; pass train=batches")
        count = min(config.steps * config.batch, 2048)
        sequences = sample_sequences(source.model, count, min(config.length, _length(source)), config.seed)
        return Batches(sequences, config.batch, config.seed), "sequences sampled from the model itself"
    if _is_text(data):
        longest = position_limit(source.model)
        if config.length > longest:
            raise BadInput(
                f"training sequences have {config.length} tokens, the model {longest} positions; set length"
            )
        sequences = _in_vocabulary(source, pack(_texts(data), _tokenizer(source), config.length))
        _fill_all(program, "training text")
        return Batches(sequences, config.batch, config.seed), f"{len(sequences)} text sequences"
    if isinstance(data, Tensor) and not data.is_floating_point() and data.dim() == 2:
        main = main_input(source.model)
        as_batches([data], input_specs(source.model), name="train", main=main)
        _fill_all(program, "train", main)
        _check_positions(source, data, "train")
        return Batches(data, config.batch, config.seed, main), f"{len(data)} given sequences"
    return InputBatches(_named(program, _given(source, data, "train")), config.seed), "the given batches"


def tokens_of_step(batches: BatchSource) -> int:
    """Tokens in the first batch; rows of features count as such."""
    first = batches.batch(0)
    value = first if isinstance(first, Tensor) else next(iter(first.values()))
    return value.numel() if not value.is_floating_point() else value[..., 0].numel()


def evaluation_sequences(source: Source, data: Any) -> tuple[Tensor | None, int | None]:
    """Token windows `(windows, length)` and their stride, or Nones where there is nothing to evaluate on."""
    if data is None:
        return None, None
    if not _speaks(source):
        raise BadInput(f"{source.name} generates no text, so it has no perplexity to measure; leave evaluation out")
    if _is_text(data):
        length = min(EVALUATION_LENGTH, _length(source) + 1)
        tokens = tokenize(_texts(data), _tokenizer(source))
        return evaluation_windows(tokens, length, EVALUATION_STRIDE, EVALUATION_WINDOWS), EVALUATION_STRIDE
    if isinstance(data, Tensor) and data.dim() == 2 and not data.is_floating_point():
        as_batches([data], input_specs(source.model), name="evaluation")
        return data, None
    raise BadInput(
        "evaluation takes a text file, texts, or token windows (windows, tokens); got " + type(data).__name__
    )


def example_inputs(source: Source, data: Any) -> Any:
    """Inputs to trace with, from the caller's own batches; None where the model's inputs can be made up.

    Made-up inputs serve whatever they have names for: their mask has padding, which a batch of full sequences lacks,
    and tracing drops a mask that is all ones.
    """
    are_ids = isinstance(data, Tensor) and not data.is_floating_point()
    if data is None or _is_text(data) or (are_ids and is_pretrained(source.model)):
        return None
    first = next(iter(_given(source, data, "calibration")), None)
    if first is None or first.keys() <= input_specs(source.model).keys():
        return None
    if "attention_mask" in first and first["attention_mask"].shape[1] > 1:
        mask = first["attention_mask"].clone()
        mask[0, 0] = 0
        first = {**first, "attention_mask": mask}
    by_name = is_pretrained(source.model) or not binds_by_position(source.model, list(first))
    return first if by_name else tuple(first.values())


def reusable(data: Any) -> Any:
    """`data`, an iterator as a list: tracing, calibration and training may each read it from the start."""
    return list(data) if isinstance(data, Iterator) else data


def _is_text(data: Any) -> bool:
    return isinstance(data, str | Path) or (
        isinstance(data, list | tuple) and bool(data) and all(isinstance(item, str) for item in data)
    )


def _texts(data: Any) -> list[str]:
    return list(data) if isinstance(data, list | tuple) else load_texts(data)


def _tokenizer(source: Source) -> Any:
    if source.tokenizer is None:
        raise BadInput(f"{source.name} has no tokenizer, so text cannot be read; pass tokenizer=... or token ids")
    return source.tokenizer


def _length(source: Source, program: Program | None = None) -> int:
    """Tokens of sequences whose length is up to us: what the graph takes, where it takes one length alone."""
    fixed = {} if program is None else fixed_sizes(program)
    return fixed.get(("input_ids", 1), min(CALIBRATION_LENGTH, position_limit(source.model)))


def _in_vocabulary(source: Source, sequences: Tensor) -> Tensor:
    """Token ids of a text, once the model is known to have all of them: the tokenizer may be another one's."""
    as_batches([sequences], input_specs(source.model), name="text")
    return sequences


def _speaks(source: Source) -> bool:
    """Whether the model continues token ids given alone, so that it can make sequences and has a perplexity."""
    can_generate = getattr(source.model, "can_generate", None)
    reads_another_side = getattr(getattr(source.model, "config", None), "is_encoder_decoder", False)
    return bool(can_generate and can_generate()) and not reads_another_side


def _spread(sequences: Tensor, seed: int) -> Tensor:
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    return sequences[order[:CALIBRATION_SEQUENCES]]


def _fill_all(program: Program, what: str, main: str = "input_ids") -> None:
    """Raise BadInput where the model was traced with inputs that token ids alone do not give."""
    if strays := sorted(program.inputs.keys() - {main, "attention_mask"}):
        raise BadInput(
            f"{what} gives {main} and attention_mask, and the model was traced with {', '.join(strays)} too; "
            f"give batches with all inputs, or trace without these"
        )


def _batched(program: Program, sequences: Tensor) -> list[dict[str, Tensor]]:
    _fill_all(program, "text")
    batches = []
    for ids in sequences.split(CALIBRATION_BATCH):
        batch = {"input_ids": ids}
        if "attention_mask" in program.inputs:
            batch["attention_mask"] = torch.ones_like(ids)
        batches.append(batch)
    return batches


def _given(source: Source, data: Any, name: str, limit: int | None = None) -> list[dict[str, Tensor]]:
    if isinstance(data, Tensor) and data.dim() == 2 and not data.is_floating_point():
        data = list(data[:limit].split(CALIBRATION_BATCH))
    elif not isinstance(data, Iterable):
        raise BadInput(f"{name} takes a text file, texts, token ids or batches, got {type(data).__name__}")
    return as_batches(data, input_specs(source.model), name=name, main=main_input(source.model))


def _named(program: Program, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The batches with exactly the inputs the program was traced with; a missing attention mask attends to all."""
    named = []
    for index, batch in enumerate(batches):
        complete = dict(batch)
        if "attention_mask" in program.inputs and "attention_mask" not in complete and "input_ids" in complete:
            complete["attention_mask"] = torch.ones_like(complete["input_ids"])
        missing = [name for name in program.inputs if name not in complete]
        if missing:
            raise BadInput(
                f"batch {index} has inputs {sorted(batch)}, but the model was traced with {list(program.inputs)}; "
                f"give each batch all of them"
            )
        for name, example in program.inputs.items():
            if complete[name].dim() != example.dim() or complete[name].shape[2:] != example.shape[2:]:
                raise BadInput(
                    f"batch {index}: {name} has shape {tuple(complete[name].shape)}, but the example has "
                    f"{tuple(example.shape)}; only batch and tokens may differ"
                )
            if complete[name].is_floating_point() and example.dtype == torch.float32:
                complete[name] = complete[name].float()  # as the example was, where it came in another precision
            if complete[name].dtype != example.dtype:
                raise BadInput(
                    f"batch {index}: {name} is {complete[name].dtype}, but the example is {example.dtype}; convert it"
                )
        mask = complete.get("attention_mask")
        if mask is not None and not bool(mask.any()):
            raise BadInput(f"batch {index}: its attention_mask is 0 everywhere, so no token counts; leave it out")
        named.append({name: complete[name] for name in program.inputs})
    return named


def _check_positions(source: Source, ids: Tensor, what: str) -> None:
    longest = position_limit(source.model)
    if ids.dim() == 2 and ids.shape[1] > longest:
        raise BadInput(f"{what} has {ids.shape[1]} tokens a sequence, the model {longest} positions; shorten it")


def _check_sizes(program: Program, batches: list[dict[str, Tensor]]) -> None:
    """Raise BadInput for batches that the graph, unlike the model, does not take."""
    for index, batch in enumerate(batches):
        for (name, axis), size in fixed_sizes(program).items():
            if batch[name].shape[axis] != size:
                raise BadInput(
                    f"batch {index}: {name} has {batch[name].shape[axis]} on axis {axis}, and the model's code was "
                    f"traced into a graph for {size} alone; pass inputs=... of the shape of these batches"
                )


def _can_be_made_up(source: Source) -> bool:
    try:
        name_inputs(source.model, None)
    except BadInput:
        return False
    return True


def _own_batches(program: Program, source: Source, seed: int) -> tuple[list[dict[str, Tensor]], str]:
    if _speaks(source):
        sequences = sample_sequences(source.model, OWN_SEQUENCES, min(128, _length(source, program)), seed)
        return _batched(program, sequences), f"{len(sequences)} sequences sampled from the model itself"
    named = name_inputs(source.model, None)[0] if _can_be_made_up(source) else {}
    if named.keys() == program.inputs.keys() and all(not value.is_floating_point() for value in named.values()):
        return [named], "random token ids (no data was given, and the model cannot generate any)"
    return [dict(program.inputs)], "the example inputs (no data was given)"
