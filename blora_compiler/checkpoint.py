"""Training checkpoints: written whole or not at all, checked before they are trusted.

    <root>/step-000123/
        tensors.safetensors     trainable tensors, optimizer state and the random state, by name
        state.json              everything that is no tensor, and the fingerprint of the run
        manifest.json           SHA-256 of the two

A checkpoint is written under a temporary name, flushed to the disk and renamed, so that a process killed at any
moment leaves either a complete checkpoint or a leftover that the next run removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import BadInput
from .folders import file_sha256

_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".writing-"
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where a run stands after `step` steps.

    Attributes:
        step: number of optimizer steps taken.
        tensors: name -> tensor, all that training changes.
        state: JSON values.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class Damage:
    """A checkpoint that must not be used, and why."""

    path: Path
    reason: str


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:06d}"


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `checkpoint` under `root`, then removes all but the newest `keep`.

    Raises:
        BadInput: if the folder is full or not writable; nothing is left under the final name.
    """
    final = checkpoint_path(root, checkpoint.step)
    temporary = root / f"{_TEMPORARY}{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(temporary, checkpoint)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _flush(root)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise BadInput(
            f"{final}: the checkpoint cannot be written ({_reason(error)}); "
            f"free space there or choose another folder, then resume"
        ) from error
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first. Leftovers of interrupted writes are not among them."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def remove_leftovers(root: Path) -> None:
    """Removes what interrupted writes left behind."""
    for leftover in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def load_latest(root: Path) -> tuple[Checkpoint | None, list[Damage]]:
    """The newest checkpoint that is whole, and those newer than it that are damaged.

    Raises:
        BadInput: if there are checkpoints and all are damaged.
    """
    paths = list_checkpoints(root)
    damaged: list[Damage] = []
    for path in reversed(paths):
        try:
            return load_checkpoint(path), damaged
        except BadInput as error:
            damaged.append(Damage(path, str(error)))
    if damaged:
        listed = "\n".join(f"  {damage.reason}" for damage in damaged)
        raise BadInput(
            f"{root}: all {len(damaged)} checkpoints are damaged:\n{listed}\n"
            f"restore one from a copy, or start again with overwrite"
        )
    return None, []


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint after comparing every file with the manifest.

    Raises:
        BadInput: naming the file and both hashes, if one is missing or differs.
    """
    manifest = _read_json(path / _MANIFEST)
    for name in (_TENSORS, _STATE):
        _check_hash(path / name, manifest.get(name, "nothing"))
    state = _read_json(path / _STATE)
    return Checkpoint(state["step"], load_file(path / _TENSORS), state["state"])


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    save_file({name: t.detach().contiguous() for name, t in checkpoint.tensors.items()}, folder / _TENSORS)
    write_json(folder / _STATE, {"step": checkpoint.step, "state": checkpoint.state})
    write_json(folder / _MANIFEST, {name: file_sha256(folder / name) for name in (_TENSORS, _STATE)})
    for name in (_TENSORS, _STATE, _MANIFEST):
        _flush(folder / name)
    _flush(folder)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON values as UTF-8 text, one entry a line."""
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: damaged, {_reason(error)}; remove its folder or restore it from a copy") from error


def _check_hash(path: Path, expected: str) -> None:
    found = file_sha256(path) if path.is_file() else "missing"
    if found != expected:
        raise BadInput(
            f"{path}: damaged, its SHA-256 is {found} but the manifest says {expected}; "
            f"remove its folder or restore it from a copy"
        )


def _flush(path: Path) -> None:
    """Forces a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders; its renames are journalled.
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
