"""A decode step of one shape: every input and output at one address, on CUDA captured once and replayed as a graph.

Capturing needs shapes that are known when the session opens. The files leave batch and cache length open, so the
session is opened for one size of each (`Artifact.at_sizes`), which also folds the arithmetic on shapes. A captured
step therefore serves one cache length: it is for timing what launches cost, not for generating. The runner of
`transformers.exporters` replays graphs too, through tensors of a torch that has CUDA; timing needs only ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime

from .artifact import Artifact
from .errors import BadInput, ParityFailed
from .timing import check_fixed_cache, extended_in_place, generation_feeds

# Both sides run the same kernels on the same numbers; what may differ is how ONNX Runtime fused them.
_TOLERANCE = 1e-2


class ReplayedRun:
    """Runs a session again and again on the same memory: what changes is copied into its inputs.

    Where the session captures CUDA graphs, the first run does; the outputs that it allocated stay bound for replays.
    """

    def __init__(
        self,
        session: Any,
        feeds: Mapping[str, np.ndarray],
        device: str,
        in_place: Mapping[str, str] | None = None,
    ) -> None:
        """Bind everything and run once.

        Args:
            session: of ONNX Runtime.
            feeds: input -> values, whose shapes are final.
            device: as `OrtValue` names it.
            in_place: output -> the input whose memory it is written to.
        """
        self._session, self._binding = session, session.io_binding()
        self._inputs = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value.copy(), device, 0) for name, value in feeds.items()
        }
        self._names = [output.name for output in session.get_outputs()]
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name in self._names:
            if in_place is not None and name in in_place:
                self._binding.bind_ortvalue_output(name, self._inputs[in_place[name]])
            else:
                self._binding.bind_output(name, device, 0)
        self()
        self._outputs = self._binding.get_outputs()
        for name, value in zip(self._names, self._outputs, strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def __call__(self) -> None:
        """One run, ended only when the device has finished."""
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def change(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Copy other values of the same shapes into the inputs."""
        for name, value in feeds.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(value))

    def output(self, name: str) -> np.ndarray:
        """What the last run wrote."""
        found: np.ndarray = self._outputs[self._names.index(name)].numpy().copy()
        return found


def captured_decode(artifact: Artifact, batch: int, context: int, fixed: bool = False) -> Callable[[], None]:
    """A decode step behind `context` cached tokens, captured as a CUDA graph, checked, ready to be replayed.

    Args:
        artifact: for CUDA.
        batch: sequences.
        context: cached tokens.
        fixed: keep the cache in buffers for twice as many, which the step extends in place.

    Raises:
        BadInput: if the export is not for CUDA, or ONNX Runtime does not capture its graph.
        ParityFailed: if a replay with changed inputs does not compute what a plain run computes.
    """
    if artifact.target != "cuda":
        raise BadInput(f"a CUDA graph needs target 'cuda', this export is for {artifact.target!r}; leave it out")
    if fixed:
        check_fixed_cache(artifact)
    session = artifact.session("decode")
    feeds = generation_feeds(artifact, "decode", batch, context, room=2 * context if fixed else None)
    in_place = extended_in_place(session, feeds) if fixed else {}
    try:
        opened = artifact.at_sizes("decode", sizes_of(session, feeds))
        captured = ReplayedRun(opened, feeds, artifact.target, in_place)
    except (RuntimeError, BadInput) as error:  # ONNX Runtime's exceptions derive from the first
        raise BadInput(f"ONNX Runtime does not capture decode {batch}x1 behind {context} tokens: {error}") from error
    check_replays(captured, ReplayedRun(session, feeds, artifact.target, in_place), feeds)
    return captured


def sizes_of(session: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Name of an open axis -> its size in these inputs."""
    return {
        axis: size
        for spec in session.get_inputs()
        for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(axis, str)
    }


def check_replays(captured: ReplayedRun, plain: ReplayedRun, feeds: Mapping[str, np.ndarray]) -> None:
    """Replay with two other tokens and caches, and compare with runs of a session that captures nothing.

    Raises:
        ParityFailed: naming the difference, or that a replay does not read what was changed.
    """
    seen: list[np.ndarray] = []
    for token, scale in ((2, 0.5), (3, 0.25)):
        changed = {
            name: np.full_like(value, token if name == "input_ids" else scale)  # the caches hold ones
            for name, value in feeds.items()
            if name == "input_ids" or value.dtype.kind == "f"
        }
        for run in (captured, plain):
            run.change(changed)
            run()
        replayed, expected = captured.output("logits"), plain.output("logits")
        error, allowed = _distance(replayed, expected), _TOLERANCE * float(np.abs(expected).max())
        if not error <= allowed:
            raise ParityFailed(
                f"a captured decode step replayed with token {token} is {error:.2g} from a plain one, allowed are "
                f"{allowed:.2g}; time the step without capturing it"
            )
        seen.append(expected)
    if _distance(*seen) <= _TOLERANCE * float(np.abs(seen[0]).max()):
        raise ParityFailed(
            "two different tokens gave the same logits, so nothing tells whether a replay reads its inputs; "
            "check that the weights are not all zero"
        )


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max())
