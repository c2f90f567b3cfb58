"""Exports without their weights: made on one machine, filled with random ones and timed on another.

A graph of kilobytes says all that a speed depends on; gigabytes of random numbers need not travel. `strip` takes the
large weights out of an export and keeps everything small as it was (norms, biases, tables); `fill` puts in random
ones. What was filled is timed and not verified: there is nothing that it should compute.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from blora_compiler.artifact import MANIFEST, WEIGHTS, Artifact, file_record

SMALL, INDEX = "small.data", "small.json"
_LARGE = 1 << 16  # elements
_SCALE = 1 / 64  # of random weights: 4096 of them keep the length of what they multiply
_TILE = (1 << 24) + 43  # random numbers that are repeated; odd, so that no two tensors are equal


def strip(folder: Path) -> None:
    """Replace the weights file of an export by the parts of it that no large matrix is in."""
    large = ir.DataType[
        json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["dtype"].replace("32", "").upper()
    ]
    pieces: dict[int, int] = {}
    for graph in folder.glob("*.onnx"):
        for value in ir.load(graph).graph.initializers.values():
            tensor = value.const_value
            is_large = tensor is not None and tensor.dtype == large and tensor.size >= _LARGE
            if isinstance(tensor, ir.ExternalTensor) and not is_large:
                pieces[int(tensor.offset or 0)] = int(tensor.length or tensor.nbytes)
    with open(folder / WEIGHTS, "rb") as weights, open(folder / SMALL, "wb") as small:
        for offset in sorted(pieces):
            weights.seek(offset)
            small.write(weights.read(pieces[offset]))
    size = (folder / WEIGHTS).stat().st_size
    index = {"bytes": size, "pieces": [[offset, pieces[offset]] for offset in sorted(pieces)]}
    (folder / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
    (folder / WEIGHTS).unlink()


def fill(stripped: Path, folder: Path, threads: int | None = None) -> Artifact:
    """A copy of a stripped export with random weights, opened."""
    shutil.copytree(stripped, folder)
    index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    random = np.random.default_rng(0)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    tile = (_SCALE * random.standard_normal(_TILE, dtype=np.float32)).astype(manifest["dtype"]).tobytes()
    with open(folder / WEIGHTS, "wb") as weights:
        left = int(index["bytes"])
        while left > 0:
            left -= weights.write(tile[:left])
        small = (folder / SMALL).read_bytes()
        for offset, length in index["pieces"]:
            weights.seek(offset)
            weights.write(small[:length])
            small = small[length:]
    manifest["files"][WEIGHTS] = file_record(folder / WEIGHTS)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return Artifact(folder, manifest, threads)
