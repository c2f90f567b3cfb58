"""Whether a model fits the range of float16, asked before it is lowered: one forward pass in float32.

Residual streams of some models grow past 65504 in a few channels. In float16 those become infinite, then NaN; the
comparison at the end would refuse the file too, but could not say where it began.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BadInput
from .graph import binds_by_position
from .verification import cast_copy, without_fused_encoder_layers

LARGEST = {"float16": torch.finfo(torch.float16).max}


def check_range(tree: nn.Module, batches: Iterable[Mapping[str, Tensor]], dtype: str, by_keyword: bool) -> None:
    """Refuse a type whose range a weight, or the output of a module on one of the batches, exceeds.

    Only outputs of modules are seen, not what happens inside one: attention scores are not.

    Args:
        tree: the module to be lowered; not changed.
        batches: inputs by name, passed `by_keyword` or in order.
        dtype: of the export; types with the range of float32 are not checked, at no cost.

    Raises:
        BadInput: naming the first such module, its largest absolute value and the limit.
    """
    if dtype not in LARGEST:
        return
    limit = LARGEST[dtype]
    weights = {name: _largest(value) for name, value in tree.named_parameters()}
    _refuse("weight", {name: value for name, value in weights.items() if value > limit}, dtype)
    outputs = largest_outputs(tree, batches, by_keyword)
    _refuse("output of", {name: value for name, value in outputs.items() if value > limit}, dtype)


def largest_outputs(tree: nn.Module, batches: Iterable[Mapping[str, Tensor]], by_keyword: bool) -> dict[str, float]:
    """Module name -> largest absolute value it returned over all batches, in float32; in the order of their ends."""
    reference = cast_copy(tree, "float32")
    largest: dict[str, float] = {}

    def watch(name: str, module: nn.Module) -> None:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            values = [_largest(leaf) for leaf in _floating_leaves(output)]
            if values:
                largest[name] = max(largest.get(name, 0.0), *values)

        module.register_forward_hook(record)

    for name, module in reference.named_modules():
        watch(name or type(tree).__name__, module)
    with torch.no_grad(), without_fused_encoder_layers():
        for batch in batches:
            cast = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
            named = by_keyword or not binds_by_position(reference, list(cast))
            reference(**cast) if named else reference(*cast.values())
    return largest


def _refuse(what: str, exceeding: Mapping[str, float], dtype: str) -> None:
    if not exceeding:
        return
    first, value = next(iter(exceeding.items()))
    others = len(exceeding) - 1
    more = f" (and {others} more, up to {max(exceeding.values()):.4g})" if others else ""
    raise BadInput(
        f"{what} {first} reaches {value:.6g}, {dtype} ends at {LARGEST[dtype]:.0f}{more}: lower in float32, or on "
        f"CUDA in bfloat16, which has the range of float32"
    )


def _floating_leaves(output: Any) -> list[Tensor]:
    """The floating tensors in what a module returned. A cache among them holds what its layer's projections gave."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if not isinstance(output, tuple | list):
        return []
    return [leaf for part in output for leaf in _floating_leaves(part)]


def _largest(value: Tensor) -> float:
    """The largest absolute value; infinite where one is not finite, since that is no smaller."""
    if not value.numel() or not value.is_floating_point():
        return 0.0
    return float(value.detach().abs().max().nan_to_num(nan=torch.inf, posinf=torch.inf))
