"""ShareWeights: several graphs read one weights file, in which every tensor is stored once.

Prefill and decode hold the same weights under different names, and a tied head may hold the transpose of the
embedding. In order, for every initializer of at least `smallest` bytes:

1. A tensor equal in content, shape and type to a stored one reads the same bytes.
2. A matrix equal to the transpose of a stored one reads it through a `Transpose` node. ONNX Runtime folds that node
   when it loads the session, so a run pays nothing for it.
3. Any other tensor is appended to the file.

Tensors that a lookup reads come first, so that the lookup keeps its own layout and the GEMM gets the transpose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

# Pages of memory-mapped files: large tensors start on one, small ones only where vector loads like it.
_PAGE_BYTES, _VECTOR_BYTES, _LARGE_BYTES = 4096, 64, 1 << 20

_Key = tuple[str, tuple[int, ...], bytes]


@dataclass(frozen=True)
class ShareWeights:
    """Move the initializers of several graphs into one file, each distinct tensor once.

    Attributes:
        file: where to write; graphs refer to it by its name, so they must be saved beside it.
        smallest: initializers below this many bytes stay inside the graphs.
    """

    file: Path
    smallest: int = 256

    def run(self, models: Mapping[str, ir.Model]) -> int:
        """Edit every model in place and write the file. Returns the bytes written.

        Raises:
            OSError: if the file cannot be written.
        """
        stored: dict[_Key, ir.ExternalTensor] = {}
        with open(self.file, "wb") as stream:
            for model in models.values():
                for value in self._lookups_first(model.graph):
                    self._store(model.graph, value, stored, stream)
            return stream.tell()

    def _lookups_first(self, graph: ir.Graph) -> list[ir.Value]:
        large = [
            value
            for value in graph.initializers.values()
            if value.const_value is not None and value.const_value.nbytes >= self.smallest
        ]
        return sorted(large, key=lambda value: not _is_lookup_table(value))

    def _store(
        self, graph: ir.Graph, value: ir.Value, stored: dict[_Key, ir.ExternalTensor], stream: BinaryIO
    ) -> None:
        tensor = value.const_value
        assert tensor is not None
        array = np.ascontiguousarray(tensor.numpy())
        key = _key(tensor.dtype, array)
        if key not in stored and array.ndim == 2:
            transposed = stored.get(_key(tensor.dtype, np.ascontiguousarray(array.T)))
            if transposed is not None:
                _read_transposed(graph, value, transposed)
                return
        if key not in stored:
            stored[key] = self._append(stream, array, tensor.dtype)
        value.const_value = _renamed(stored[key], value.name)

    def _append(self, stream: BinaryIO, array: np.ndarray, dtype: ir.DataType) -> ir.ExternalTensor:
        alignment = _PAGE_BYTES if array.nbytes >= _LARGE_BYTES else _VECTOR_BYTES
        stream.write(b"\0" * (-stream.tell() % alignment))
        offset = stream.tell()
        # 1: of numpy itself; bfloat16 is a registered type, 2, and has no buffer
        stream.write(array.data if array.dtype.isbuiltin == 1 else array.tobytes())
        return ir.ExternalTensor(
            self.file.name,
            offset,
            array.nbytes,
            dtype,
            shape=ir.Shape(array.shape),
            name="",
            base_dir=str(self.file.parent),
        )


def _is_lookup_table(value: ir.Value) -> bool:
    return any(use.node.op_type == "Gather" and use.idx == 0 for use in value.uses())


def _key(dtype: ir.DataType, array: np.ndarray) -> _Key:
    return dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest()


def _renamed(tensor: ir.ExternalTensor, name: str | None) -> ir.ExternalTensor:
    assert name is not None, "an initializer always has a name"
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=name,
        base_dir=tensor.base_dir,
    )


def _read_transposed(graph: ir.Graph, value: ir.Value, stored: ir.ExternalTensor) -> None:
    """Every use of the initializer `value` reads the transpose of `stored` instead."""
    assert value.name is not None
    source = next(_initializers_of(graph, stored), None)
    if source is None:
        source = ir.Value(name=f"{value.name}_stored", const_value=_renamed(stored, f"{value.name}_stored"))
        source.shape, source.dtype = ir.Shape(stored.shape), stored.dtype
        graph.register_initializer(source)
    transpose = ir.node("Transpose", [source], attributes={"perm": [1, 0]}, name=f"transpose_{value.name}")
    transposed = transpose.outputs[0]
    transposed.name, transposed.shape, transposed.dtype = f"{value.name}_transposed", value.shape, value.dtype
    graph.insert_before(graph[0], transpose)
    value.replace_all_uses_with(transposed)
    del graph.initializers[value.name]


def _initializers_of(graph: ir.Graph, stored: ir.ExternalTensor) -> Iterator[ir.Value]:
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and _place(tensor) == _place(stored):
            yield value


def _place(tensor: ir.ExternalTensor) -> tuple[object, ...]:
    """Where its bytes are, and as what they are read: a graph may have external data of its own, too."""
    return tensor.base_dir, tensor.location, tensor.offset, tensor.dtype, tuple(tensor.shape)
