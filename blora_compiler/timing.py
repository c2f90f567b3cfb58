"""Time two or more exports against each other: interleaved in one run, medians and spread.

Speed is a ratio. Machines are shared and noisy, so candidates take short turns, and what is reported is the median
over all turns with the quartiles beside it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BadInput

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


# A candidate's turn: untimed runs until caches and threads are its own again, as they are where it runs alone, then
# timed ones.
UNTIMED_IN_A_TURN, TIMED_IN_A_TURN = 4, 3


def interleaved(setting: str, runs: Mapping[str, Callable[[], Any]], repeats: int) -> list[Timing]:
    """Time `runs` in turns of a few runs each, until each has been timed at least `repeats` times."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with on_first_core():
        for _ in range(-(-repeats // TIMED_IN_A_TURN)):
            for name, run in runs.items():
                for _ in range(UNTIMED_IN_A_TURN):
                    run()
                for _ in range(TIMED_IN_A_TURN):
                    started = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - started)
    return [_timing(setting, name, values) for name, values in seconds.items()]


@contextmanager
def on_first_core() -> Iterator[None]:
    """The calling thread on the first core that this process may use; threads of pinned sessions have the others."""
    from .artifact import CORES

    if not CORES:
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CORES[0]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


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
    timings: list[Timing] = []
    for phase in ("prefill", "decode") if first.generation else ("model",):
        calls = {name: call_of(artifact.pinned(), phase, batch, tokens) for name, artifact in artifacts.items()}
        rounds = 3 * repeats if phase == "decode" else repeats  # a step is short, so its noise is larger
        timings += interleaved(setting_of(phase, batch, tokens if first.takes_any_length else 0), calls, rounds)
    return timings


def setting_of(phase: str, batch: int, tokens: int) -> str:
    """What `Timing.setting` says of a phase: `prefill 1x256`; no tokens are no length that one could choose."""
    if phase == "decode":
        return f"decode {batch}x1, context {tokens}"
    return f"{phase} {batch}x{tokens}" if tokens else f"{phase}, batch {batch}"


def call_of(artifact: Artifact, phase: str, batch: int, tokens: int) -> Callable[[], Any]:
    """A call that runs one phase once: `"prefill"`, `"decode"` behind a cache of `tokens`, or `"model"`.

    Inputs are made and bound beforehand, so that what is timed is ONNX Runtime: calling a graph through a generation
    loop in Python costs a small model as much again as its kernels.
    """
    feeds = (
        generation_feeds(artifact, phase, batch, tokens) if artifact.generation else _feeds(artifact, batch, tokens)
    )
    return bound_call(artifact.session(phase), feeds, artifact.target)


def fixed_cache_call(artifact: Artifact, batch: int, context: int) -> Callable[[], None]:
    """A decode step behind `context` tokens in buffers for twice as many, which it extends in place.

    Raises:
        BadInput: if the export cannot decode on a cache of fixed size.
    """
    check_fixed_cache(artifact)
    feeds = generation_feeds(artifact, "decode", batch, context, room=2 * context)
    session = artifact.session("decode")
    return bound_call(session, feeds, artifact.target, extended_in_place(session, feeds))


def check_fixed_cache(artifact: Artifact) -> None:
    """Refuse an export that cannot decode on a cache of fixed size."""
    if artifact.fixed_cache_refusal is not None:
        raise BadInput(f"no cache of fixed size to time: {artifact.fixed_cache_refusal}; time the growing one")


def extended_in_place(session: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Output -> input of the caches that a decode step extends."""
    extended = {output.name: output.name.replace("output.", "input.", 1) for output in session.get_outputs()}
    return {output: name for output, name in extended.items() if output != name and name in feeds}


def bound_call(
    session: Any, feeds: Mapping[str, np.ndarray], provider: str, in_place: Mapping[str, str] | None = None
) -> Callable[[], None]:
    """One run of a session with inputs and outputs bound on the device, ended only when the device has finished.

    Args:
        session: of ONNX Runtime.
        feeds: input -> values.
        provider: the device, as `OrtValue` names it.
        in_place: output -> the input whose memory it is written to.
    """
    import onnxruntime

    binding = session.io_binding()
    kept = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value, provider, 0) for name, value in feeds.items()}
    for name, value in kept.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        if in_place is not None and output.name in in_place:
            binding.bind_ortvalue_output(output.name, kept[in_place[output.name]])
        else:
            binding.bind_output(output.name, provider, 0)

    def call() -> None:
        assert len(kept) == len(feeds)  # the bound inputs live as long as the call
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call


def generation_feeds(
    artifact: Artifact, phase: str, batch: int, tokens: int, room: int | None = None
) -> dict[str, np.ndarray]:
    """Token 1 everywhere, which any vocabulary has; speed does not depend on values. No padding, a cache of ones.

    The cache holds `tokens`, and its buffers are made for `room` of them where they are to have a fixed size.
    """
    new, context = (tokens, 0) if phase == "prefill" else (1, tokens)
    known = {
        "input_ids": np.ones((batch, new), np.int64),
        "attention_mask": np.ones((batch, context + new), np.int64),
        "position_ids": np.tile(np.arange(context, context + new, dtype=np.int64), (batch, 1)),
    }
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds = {}
    for value in artifact.session(phase).get_inputs():
        if value.name in known:
            feeds[value.name] = known[value.name]
        elif len(value.shape) == 4 and value.type in dtypes:
            # Keys or values: (batch, heads, cached tokens, head size).
            shape = (batch, int(value.shape[1]), room or context, int(value.shape[3]))
            feeds[value.name] = np.ones(shape, dtypes[value.type])
        else:
            raise BadInput(
                f"graph {phase!r} has the input {value.name} ({value.type}, {value.shape}), which is neither tokens "
                f"nor a key/value cache in float32 or float16; it cannot be timed"
            )
    return feeds


def _feeds(artifact: Artifact, batch: int, tokens: int) -> dict[str, np.ndarray]:
    """Inputs like those the export was made with, at another batch and length."""
    from .verification import Setting, example_like

    setting = Setting(batch, tokens)
    feeds = {spec.name: example_like(spec, artifact.inputs, setting).numpy() for spec in artifact.inputs}
    known = {value.name for value in artifact.session("model").get_inputs()}
    return {name: value for name, value in feeds.items() if name in known}
