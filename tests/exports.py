"""One run of the exporter for equal models: it takes most of the time that the `ort` tests need.

What an exporter makes is a function of the model, its weights, the example's shapes and the settings. Files of tests
build the same small models again and again, so the graphs of those seen before are handed out again, as copies.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from blora_compiler.lowering import ExportedGraphs

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
# Held by every module: its children, tensors and hooks, which are looked at by themselves.
_OF_ALL_MODULES = frozenset(vars(nn.Module()))

Export = Callable[..., ExportedGraphs]  # as `export_graphs`


class Unknown(Exception):
    """A model holds something that no fingerprint is known for."""


def remembering(export: Export) -> Export:
    """The same exporter, which remembers the graphs of Hugging Face models."""
    kept: dict[str, ExportedGraphs] = {}

    def remembered(lowered: nn.Module, example: Mapping[str, Tensor], *settings: Any) -> ExportedGraphs:
        try:
            key = _fingerprint(lowered, example, settings)
        except Unknown:
            return export(lowered, example, *settings)
        if key not in kept:
            kept[key] = _copied(export(lowered, example, *settings), with_weights=True)
        return _copied(kept[key])

    return remembered


def _fingerprint(lowered: nn.Module, example: Mapping[str, Tensor], settings: tuple[Any, ...]) -> str:
    """Of everything that an exporter could see."""
    if not isinstance(lowered, PreTrainedModel):
        raise Unknown
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in example.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes() if value.dtype != torch.bfloat16 else b"")
    numbers: dict[int, int] = {}  # tied tensors have one number
    for path, module in lowered.named_modules(remove_duplicate=False):
        held = {name: value for name, value in vars(module).items() if name not in _OF_ALL_MODULES}
        if any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks")):
            raise Unknown
        digest.update(f"{path} {type(module).__module__} {type(module).__qualname__} {_described(held)}".encode())
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                number = numbers.setdefault(id(tensor), len(numbers))
                digest.update(f"{name} {number} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _described(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{_described(value[key])}" for key in sorted(value, key=repr)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_described, value)) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(map(_described, value))) + "}"
    if isinstance(value, PreTrainedConfig | GenerationConfig):
        return str(value.to_json_string(use_diff=False))
    if isinstance(value, Tensor | nn.Module):
        raise Unknown  # outside of what a module registers
    if callable(value) and getattr(value, "__module__", None) and "<" not in getattr(value, "__qualname__", "<"):
        return f"{value.__module__}.{value.__qualname__}"
    raise Unknown


def _copied(exported: ExportedGraphs, with_weights: bool = False) -> ExportedGraphs:
    """Graphs of one's own. With weights of one's own as well: the exporter's are the model's, which may change."""
    models = {name: model.clone() for name, model in exported.models.items()}
    for model in models.values() if with_weights else ():
        for name, value in model.graph.initializers.items():
            assert value.const_value is not None, f"{name} has no value"
            value.const_value = ir.tensor(value.const_value.numpy().copy(), value.const_value.dtype, name=name)
    return ExportedGraphs(models, copy.deepcopy(exported.metadata))
