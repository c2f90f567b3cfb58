"""Where a model comes from: a module in memory, a folder or a hub id. It becomes a frozen float32 teacher."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import BadInput
from .graph import frozen_copy

ASSETS = Path(__file__).parent / "assets"
BUNDLED_MODEL = ASSETS / "prose-llama-8m"
BUNDLED_TRAIN_TEXT = ASSETS / "prose" / "train.txt.xz"
BUNDLED_VALIDATION_TEXT = ASSETS / "prose" / "valid.txt.xz"

_LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")  # as most, MPT, and Whisper name it
NO_LIMIT = 1 << 30  # positions of a model whose configuration names no number of them
# What this compiler writes into a folder beside a config.json -> what the folder holds, and what reads it. As a
# model, transformers would make it up from the config, with random weights where the names do not fit.
_WRITTEN_HERE = {
    "blora.json": "a compressed model (blora.load reads it); a dense one is written by `Compiled.save(merged=True)`",
    "export.json": "an export to ONNX (blora.Artifact.load reads it)",
    "family.json": "a family (blora.load_family reads it)",
}


@dataclass(frozen=True)
class Source:
    """A model ready to be compressed.

    Attributes:
        model: the teacher, in eval mode and float32; shares storage with the caller's model where no cast was needed.
        tokenizer: of a Hugging Face folder, or None.
        name: for reports.
        note: what was changed to get here, or None.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    note: str | None = None


def load_source(model: nn.Module | str | Path, tokenizer: Any = None) -> Source:
    """The teacher behind whatever the caller named.

    Args:
        model: a module, a folder that `from_pretrained` reads, or a hub id; a config, or a folder that holds a config
            and no weights, gives a model on the meta device.
        tokenizer: used instead of the folder's own.

    Raises:
        BadInput: no such model, an ONNX file, or something that is no model.
    """
    if isinstance(model, nn.Module):
        return _from_module(model, tokenizer)
    if hasattr(model, "to_dict") and hasattr(model, "model_type"):
        return _from_config(model, tokenizer)
    if not isinstance(model, str | Path):
        raise BadInput(f"a model is an nn.Module, a folder or a hub id, got {type(model).__name__}")
    path = Path(model)
    if path.suffix == ".onnx":
        raise BadInput(
            f"{path}: an ONNX file is no PyTorch model; blora.compile and `blora compile` take it, this does not"
        )
    if path.is_file():
        raise BadInput(f"{path} is a file; give the folder that holds config.json and model.safetensors")
    _refuse_what_was_written_here(path)
    if (path / "config.json").exists() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        return _from_config(_read_config(str(model)), tokenizer, path.name)
    return _from_pretrained(str(model), tokenizer)


def shape_of(model: nn.Module | str | Path | Any) -> Source:
    """As `load_source`, but of a folder or a hub id only the config is read: no weights, a model on the meta device.

    Raises:
        BadInput: as `load_source`.
    """
    if not isinstance(model, str | Path) or Path(model).suffix == ".onnx" or Path(model).is_file():
        return load_source(model)
    _refuse_what_was_written_here(Path(model))
    return _from_config(_read_config(str(model)), None, Path(model).name)


def _refuse_what_was_written_here(folder: Path) -> None:
    for marker, content in _WRITTEN_HERE.items():
        if (folder / marker).is_file():
            raise BadInput(f"{folder} holds {content}; give the model that it was made of")


def is_meta(model: nn.Module) -> bool:
    """Whether a model has shapes and no weights."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def _from_config(config: Any, tokenizer: Any, name: str | None = None) -> Source:
    cls = _class_of_config(config)
    with torch.device("meta"):
        model = cls(config) if hasattr(cls, "base_model_prefix") else cls.from_config(config)
    return Source(
        frozen_copy(model).eval(), tokenizer, name or f"{config.model_type} config", "no weights: meta device"
    )


def random_weights(source: Source, seed: int = 0) -> nn.Module:
    """A model like one on the meta device, with random weights: for what depends on shapes alone.

    Raises:
        BadInput: the source is no Hugging Face model.
    """
    config = getattr(source.model, "config", None)
    if config is None:
        raise BadInput(f"{source.name} has no Hugging Face config; random weights are made from one")
    torch.manual_seed(seed)
    return frozen_copy(type(source.model)(config)).eval()


def _from_module(model: nn.Module, tokenizer: Any) -> Source:
    teacher = frozen_copy(model).eval()
    others = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    note = None
    if others:
        teacher = teacher.float()
        note = f"cast from {', '.join(sorted(others))} to float32, the type everything here is measured in"
    return Source(teacher, tokenizer, type(model).__name__, note)


def _from_pretrained(name: str, tokenizer: Any) -> Source:
    from safetensors import SafetensorError

    cls = model_class(name)
    try:
        model = cls.from_pretrained(name, dtype=torch.float32)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise BadInput(f"the weights of {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if tokenizer is None:
        tokenizer = _tokenizer_or_none(name)
    return Source(frozen_copy(model).eval(), tokenizer, Path(name).name)


def model_class(name: str) -> Any:
    """The transformers class that a folder's or hub model's config names.

    Raises:
        BadInput: nothing loadable under that name.
    """
    return _class_of_config(_read_config(name))


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        nearby = "" if Path(name).is_dir() else "there is no such folder here; "
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"no model can be loaded from {name!r}: {nearby}{reason}") from error


def _class_of_config(config: Any) -> Any:
    """The class a config names; a causal language model where it names none and there is one, else the base model."""
    import transformers

    architectures = getattr(config, "architectures", None) or []
    found = next((getattr(transformers, arch) for arch in architectures if hasattr(transformers, arch)), None)
    if found is not None:
        return found
    mappings = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MASKED_LM_MAPPING)
    causal, masked = (type(config) in mapping for mapping in mappings)
    return transformers.AutoModelForCausalLM if causal and not masked else transformers.AutoModel


def _tokenizer_or_none(name: str) -> Any:
    """The model's tokenizer, or None where it has none (an image model, a bare checkpoint)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None


def position_limit(model: nn.Module) -> int:
    """How many positions a model has, at least 1; `NO_LIMIT` where it names none (XLNet writes -1)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = (getattr(text, name, None) for name in _LIMITS)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), NO_LIMIT)
