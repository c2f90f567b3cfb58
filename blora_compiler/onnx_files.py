"""Reading and writing ONNX files: weights come from the model's own folder, and a file appears whole or not at all.

Weights may lie in files beside the graph (external data). Their locations are part of the file, so they are checked
before anything is read: relative, without `..`, and inside the folder with all links followed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime

from .artifact import session_options
from .errors import BadInput, listed
from .folders import disk_message, file_sha256

SUFFIX = ".onnx"
DATA_SUFFIX = ".data"  # of the weights file beside a model whose weights do not fit into it
_FIRST_IR = 4  # the first in which initializers need not be graph inputs
# A protobuf message ends at 2 GiB; graph and small tensors need some of it.
EMBEDDED_BYTES = 1_900_000_000


def is_onnx_path(model: object) -> bool:
    """Whether `model` names an ONNX file, by its ending: whether it exists and can be read is for `read_model`."""
    return isinstance(model, str | Path) and str(model).lower().endswith(SUFFIX)


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_model(path: Path) -> ir.Model:
    """The model in a file; weights in external data are mapped, not read.

    Raises:
        BadInput: no such file, no ONNX model, parts that cannot be kept, or external data outside the folder.
    """
    proto = _parsed(path)
    _check_kept(path, proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # the IR's own errors share no base class
        raise BadInput(f"{path} is no ONNX model that can be read: {error}") from error
    _check_external_data(path, model)
    for tensor in external_tensors(model):
        tensor.base_dir = str(path.parent.resolve())
    return model


def _parsed(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise BadInput(f"{path} does not exist; name an ONNX file")
    if not path.is_file():
        raise BadInput(f"{path} is a folder and no ONNX file; name the {SUFFIX} file in it")
    if not path.stat().st_size:
        raise BadInput(f"{path} is empty (0 bytes) and no ONNX file")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # protobuf's DecodeError, in whichever module this version has it
        raise BadInput(f"{path} is no ONNX file ({error}); export the model again") from error
    if not proto.graph.node:
        raise BadInput(f"{path} is no ONNX model with a graph: it holds 0 nodes; export the model again")
    return proto


def _check_kept(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse what a rewritten file would silently lack."""
    parts = {"sparse initializers": len(proto.graph.sparse_initializer), "training records": len(proto.training_info)}
    lost = [f"{count} {name}" for name, count in parts.items() if count]
    if lost:
        raise BadInput(f"{path} holds {' and '.join(lost)}, which would be lost; export the model without them")
    if proto.ir_version < _FIRST_IR:
        raise BadInput(
            f"{path} has IR version {proto.ir_version}, whose weights must be inputs too, and factors are not; "
            f"convert it to version {_FIRST_IR} or later"
        )


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """Every tensor whose bytes lie in another file: initializers and constants, those of subgraphs too."""
    found = []
    for graph in (model.graph, *model.functions.values()):
        tensors: list[Any] = []
        if isinstance(graph, ir.Graph):
            tensors += [value.const_value for value in graph.initializers.values()]
            tensors += [v.const_value for sub in graph.subgraphs() for v in sub.initializers.values()]
        for node in graph.all_nodes():
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    tensors.append(attribute.value)
                elif attribute.type == ir.AttributeType.TENSORS:
                    tensors += attribute.value
        found += [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    return found


def _check_external_data(path: Path, model: ir.Model) -> None:
    problems = []
    for tensor in external_tensors(model):
        problem = _reason_to_refuse(path, tensor)
        if problem:
            problems.append(f"{tensor.name}: {problem}")
    if problems:
        raise BadInput(f"{path}: external data cannot be used: {listed(problems)}")


def _reason_to_refuse(path: Path, tensor: ir.ExternalTensor) -> str | None:
    folder, location = path.parent.resolve(), str(tensor.location)
    for pure in (PurePosixPath(location), PureWindowsPath(location)):
        if pure.is_absolute() or pure.drive or ".." in pure.parts:
            return f"its location {location!r} leaves the model's folder; keep weights beside the model"
    file = folder / location
    if not file.resolve().is_relative_to(folder):
        return f"its location {location!r} is a link out of the model's folder; copy the files, not the links"
    if not file.is_file():
        return f"its file {location!r} is missing; copy it beside the model"
    end = (tensor.offset or 0) + (tensor.length or 0)
    if end > file.stat().st_size:
        return f"its bytes end at {end}, but {location!r} has {file.stat().st_size}; the file was cut short"
    return None


def fingerprint(path: Path) -> str:
    """sha256 over the graph's file and the files of its external data, a piece at a time."""
    locations = {str(tensor.location) for tensor in external_tensors(ir.load(path))}
    digest = hashlib.sha256()
    for file in (path, *(path.parent.resolve() / location for location in sorted(locations))):
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()


# ── Running ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def opened(model: ir.Model, folder: Path, name: str) -> Iterator[onnxruntime.InferenceSession]:
    """A session on a model in memory, on the CPU.

    Args:
        folder: where a temporary file goes if the weights are too large to pass in memory.
        name: what messages call the model.

    Raises:
        BadInput: if ONNX Runtime cannot load it.
    """
    with tempfile.TemporaryDirectory(prefix=".blora-", dir=folder) as scratch:
        if weight_bytes(model) <= EMBEDDED_BYTES:
            _load_weights(model)
            source: Any = ir.to_proto(model).SerializeToString()
        else:
            place = Path(scratch) / "model.onnx"
            try:
                source = write_model(model, place)[0]
            except OSError as error:
                raise BadInput(disk_message(place, error)) from error
        yield open_on_cpu(source, name)


def open_on_cpu(source: bytes | Path, name: str) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Raises:
        BadInput: if ONNX Runtime cannot load it.
    """
    given = source if isinstance(source, bytes) else str(source)
    try:
        return onnxruntime.InferenceSession(given, session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise BadInput(f"ONNX Runtime cannot load {name}: {error}") from error


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers and of the constants in nodes."""
    held = [v.const_value for v in model.graph.initializers.values()]
    held += [a.value for n in model.graph for a in n.attributes.values() if a.type == ir.AttributeType.TENSOR]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def data_path(path: Path) -> Path:
    """The weights file of a model whose weights do not fit into it."""
    return path.with_name(path.name + DATA_SUFFIX)


def write_model(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write a model, its weights inside or, where they are too many, in one file beside it. Returns the files."""
    if weight_bytes(model) <= EMBEDDED_BYTES:
        _load_weights(model)
        ir.save(model, path)
        return (path,)
    _load_constants(model)
    ir.save(model, path, external_data=data_path(path).name)
    return (path, data_path(path))


def _load_weights(model: ir.Model) -> None:
    """Take all external data into the model."""
    ir.external_data.load_to_model(model)
    _load_constants(model)


def _load_constants(model: ir.Model) -> None:
    """The same for constants in nodes, which `load_to_model` leaves: ONNX Runtime would look in the wrong folder."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    (held,) = ir.external_data.convert_tensors_from_external([attribute.value])
                    node.attributes[name] = ir.AttrTensor(name, held)


def check_out(out: Path, path: Path, model: ir.Model, overwrite: bool) -> None:
    """Refuse, before any work, a place that is taken or that the model is read from.

    Raises:
        BadInput: naming what is there.
    """
    if not is_onnx_path(out):
        raise BadInput(f"{out} does not end in {SUFFIX}; an ONNX file is compiled to an ONNX file")
    read = {path.resolve(), *((path.parent.resolve() / str(t.location)).resolve() for t in external_tensors(model))}
    for place in (out, data_path(out)):
        if place.resolve() in read:
            raise BadInput(f"{place} is what {path} is read from; choose another name for the result")
        if place.is_dir():
            raise BadInput(f"{place} is a folder; name a {SUFFIX} file")
        if place.exists() and not overwrite:
            raise BadInput(f"{place} exists; replace it with overwrite=True (--overwrite), or choose another name")


@contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """A path in a temporary folder beside `out`; what was written there takes its place if the block succeeds.

    Raises:
        BadInput: the disk is full or the place cannot be written to.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
            staged = Path(staging) / out.name
            yield staged
            has_data = data_path(staged).exists()
            # Weights first: a graph never stands there without them.
            for written, place in ((data_path(staged), data_path(out)), (staged, out)):
                if written.exists():
                    os.replace(written, place)
            if not has_data:  # those of the graph that was replaced, which nothing reads any more
                data_path(out).unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(disk_message(out, error)) from error


def describe_files(files: Iterable[Path]) -> dict[str, int]:
    """File name -> bytes."""
    return {file.name: file.stat().st_size for file in files}
