"""The teacher's output distributions, written once and read during training, so that the teacher need not run.

    <folder>/description.json           which teacher, which sequences, k and temperature
    <folder>/shard-00000.safetensors    values, indices (int32) and rest of `SHARD` sequences

Each shard appears whole or not at all, so an interrupted writing is continued where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint import write_json
from .data import fingerprint_of_tensor, fingerprint_of_tensors
from .errors import BadInput
from .folders import disk_message
from .losses import TopK, reduce_to_topk

SHARD = 64  # sequences
_DESCRIPTION = "description.json"


@dataclass(frozen=True)
class TeacherTopK:
    """Stored teacher distributions of `count` sequences; one at a time is read from the disk."""

    folder: Path
    count: int

    def read(self, rows: Tensor) -> TopK:
        """rows: (batch,) sequence numbers -> values (batch, length, k), indices the same, rest (batch, length)."""
        return TopK(*(torch.stack(parts) for parts in zip(*(self._read_one(int(row)) for row in rows), strict=True)))

    def _read_one(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        shard, offset = divmod(row, SHARD)
        with safe_open(_shard_path(self.folder, shard), framework="pt") as file:
            values, indices, rest = (file.get_slice(name)[offset] for name in ("values", "indices", "rest"))
        return values, indices.long(), rest


_NOT_OF_A_MODEL = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"})


def fingerprint_of_module(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, and over a Hugging Face config."""
    settings = ""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_diff_dict"):
        # Activations and epsilons are in no tensor. Where it was loaded from and by which version do not count.
        said = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_OF_A_MODEL}
        settings = json.dumps(said, sort_keys=True, default=str)
    tensors = fingerprint_of_tensors([*module.named_parameters(), *module.named_buffers()])
    return hashlib.sha256(f"{settings}{tensors}".encode()).hexdigest()


def write_teacher_topk(
    model: nn.Module, sequences: Tensor, k: int, folder: Path, *, temperature: float = 1.0, batch: int = 8
) -> TeacherTopK:
    """Runs a causal language model over all sequences and stores its k largest logits per token.

    Shards that are already there are kept.

    Args:
        model: called as `model(input_ids=...)`, must return `.logits`.
        sequences: (sequences, length) token ids.
        k: entries per token.
        folder: created where missing.
        temperature: the stored logits are divided by it.
        batch: sequences per forward pass.

    Raises:
        BadInput: if the folder holds the output of another teacher, other data or other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description: dict[str, Any] = {
        "teacher": fingerprint_of_module(model),
        "sequences": fingerprint_of_tensor(sequences),
        "k": k,
        "temperature": temperature,
    }
    _claim(folder, description)
    for shard, start in enumerate(range(0, len(sequences), SHARD)):
        path = _shard_path(folder, shard)
        if not path.exists():
            _write_shard(path, _topk_of(model, sequences[start : start + SHARD], k, temperature, batch))
    return TeacherTopK(folder, len(sequences))


def _claim(folder: Path, description: dict[str, Any]) -> None:
    """Writes the description, or compares it with the one already there."""
    path = folder / _DESCRIPTION
    if not path.exists():
        temporary = path.with_suffix(".writing")
        write_json(temporary, description)
        os.replace(temporary, path)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: damaged ({error}); remove the folder {folder}") from error
    for name, wanted in description.items():
        if found.get(name) != wanted:
            raise BadInput(
                f"{folder}: stored teacher logits have {name} {found.get(name)!r}, this run needs {wanted!r}; "
                f"remove the folder or choose another one"
            )


@torch.no_grad()
def _topk_of(model: nn.Module, sequences: Tensor, k: int, temperature: float, batch: int) -> TopK:
    device = next(model.parameters()).device
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    if k > vocabulary:
        raise BadInput(f"{k} logits a token are to be stored, and the vocabulary has {vocabulary}; store fewer")
    parts = [
        reduce_to_topk(model(input_ids=piece.to(device)).logits, k, temperature) for piece in sequences.split(batch)
    ]
    return TopK(*(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)))


def _write_shard(path: Path, topk: TopK) -> None:
    temporary = path.with_suffix(".writing")
    try:
        save_file({"values": topk.values, "indices": topk.indices.int(), "rest": topk.rest}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise BadInput(disk_message(path, error)) from error


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"
