"""Time two or more exports against each other: interleaved in one run, medians and spread.

Speed is a ratio. Machines are shared and noisy, so each repeat runs every candidate once, in turn, and what is
reported is the median over repeats with the quartiles beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .artifact import Artifact


@dataclass(frozen=True)
class Timing:
    """One candidate at one setting.

    Attributes:
        setting: for example `prefill 1x256`.
        name: which candidate.
        median_ms, low_ms, high_ms: median and quartiles over the repeats.
        repeats: how many.
    """

    setting: str
    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def interleaved(setting: str, runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> list[Timing]:
    """Time each of `runs` in turn, `repeats` times over, after `warmup` untimed rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(warmup + repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return [_timing(setting, name, values) for name, values in seconds.items()]


def _timing(setting: str, name: str, seconds: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return Timing(setting, name, 1e3 * middle, 1e3 * low, 1e3 * high, len(seconds))


def time_exports(
    artifacts: Mapping[str, Artifact], *, batch: int = 1, tokens: int = 256, repeats: int = 15
) -> list[Timing]:
    """Prefill and decode of generating exports, or the one graph of others, side by side.

    Args:
        artifacts: name -> export; all of the same kind of model.
        batch, tokens: prompt shape; decode takes one step behind a cache of `tokens`.
        repeats: timed rounds.
    """
    first = next(iter(artifacts.values()))
    if not first.generation:
        return interleaved(
            f"model, batch {batch}", {name: _one_graph(a, batch, tokens) for name, a in artifacts.items()}, repeats
        )
    prefill = {name: _prefill(artifact, batch, tokens) for name, artifact in artifacts.items()}
    decode = {name: _decode(artifact, batch, tokens) for name, artifact in artifacts.items()}
    return interleaved(f"prefill {batch}x{tokens}", prefill, repeats) + interleaved(
        f"decode {batch}x1, context {tokens}", decode, 3 * repeats
    )


def _prompt(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.ones(
        batch, tokens, dtype=torch.int64
    )  # speed does not depend on the values, and any vocabulary has 1
    return ids, torch.ones_like(ids)


def _prefill(artifact: Artifact, batch: int, tokens: int) -> Callable[[], Any]:
    ids, mask = _prompt(batch, tokens)
    return lambda: artifact.prefill(ids, mask)


def _decode(artifact: Artifact, batch: int, tokens: int) -> Callable[[], Any]:
    ids, mask = _prompt(batch, tokens)
    cache = artifact.prefill(ids, mask).past_key_values
    longer = torch.cat([mask, mask[:, :1]], dim=1)
    return lambda: artifact.decode(ids[:, :1], longer, cache)


def _one_graph(artifact: Artifact, batch: int, tokens: int) -> Callable[[], Any]:
    from .verification import Setting, example_like

    setting = Setting(batch, tokens)
    feeds = {spec.name: example_like(spec, artifact.inputs, setting).numpy() for spec in artifact.inputs}
    session = artifact.session("model")
    known = {value.name for value in session.get_inputs()}
    feeds = {name: value for name, value in feeds.items() if name in known}
    return lambda: session.run(None, feeds)
