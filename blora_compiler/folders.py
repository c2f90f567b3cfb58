"""Folders that appear whole or not at all: work happens beside the target and takes its name at the end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import BadInput

_WRITTEN = "written"  # of a marker: names of what was written with it


@contextmanager
def staged_folder(folder: Path, marker: str) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place if the block succeeds, and is deleted if it fails.

    Args:
        marker: a JSON file that tells an earlier result of the same kind, which may be replaced, and gets the list of
            what was written beside it. A folder with anything else in it is somebody's, and is left alone.

    Raises:
        BadInput: the place is taken, the disk is full, or it cannot be written to.
    """
    check_target(folder, marker)
    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield staging
        _list_written(staging, marker)
        _take_place(staging, folder)
    except OSError as error:
        raise BadInput(disk_message(folder, error)) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def check_target(folder: Path, marker: str) -> None:
    """Raise BadInput unless `folder` is free, empty, or an earlier result, with `marker` in it and nothing added."""
    try:
        is_taken = folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file()
    except OSError as error:
        raise BadInput(disk_message(folder, error)) from error
    if is_taken:
        raise BadInput(
            f"{folder} exists and is no earlier result (it has no {marker}); choose another folder or empty it"
        )
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} exists and is a file; choose another folder")
    if added := _added(folder, marker):
        raise BadInput(
            f"{folder} would be replaced, and holds {', '.join(added[:3])}, which came there later; move that away, "
            f"or choose another folder"
        )


def _list_written(folder: Path, marker: str) -> None:
    """Add to the marker the names of everything in the folder."""
    text = (folder / marker).read_text(encoding="utf-8")
    described = {**json.loads(text), _WRITTEN: sorted(path.name for path in folder.iterdir())}
    indent = 1 if text.count("\n") > 1 else None
    (folder / marker).write_text(json.dumps(described, indent=indent) + "\n", encoding="utf-8")


def _added(folder: Path, marker: str) -> list[str]:
    """What is in an earlier result and was not written with it; nothing where that is not on record."""
    try:
        written = json.loads((folder / marker).read_text(encoding="utf-8"))[_WRITTEN]
    except (OSError, ValueError, TypeError, KeyError):  # a damaged marker, or one of an earlier version
        return []
    return sorted({path.name for path in folder.iterdir()} - set(written))


def _take_place(staging: Path, folder: Path) -> None:
    """Rename `staging` to `folder`. An earlier result steps aside first, and comes back if the renaming fails."""
    staging.chmod(0o755)  # mkdtemp makes it private
    if not folder.exists():
        os.rename(staging, folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        os.rename(folder, aside / folder.name)
        os.rename(staging, folder)
    except BaseException:  # an interrupt too: what stood there is the only copy
        if not folder.exists():
            os.rename(aside / folder.name, folder)
        with suppress(OSError):
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing.

    Raises:
        BadInput: the disk is full or the place cannot be written to.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):  # the place itself may be what is wrong
            partial.unlink()
        raise BadInput(disk_message(path, error)) from error


def disk_message(path: Path, error: Exception) -> str:
    """What to tell the user about a failed write. safetensors reports a full disk by a type of its own, as text."""
    if not isinstance(error, OSError):
        return f"cannot write {path}: {error}; nothing was left there, free some space or choose another place"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk filled up while writing {path} ({error.strerror}); nothing was left there, free some space"
    return f"cannot write {path}: {error.strerror or error}; nothing was left there, choose a place you can write"
