"""What a session on a GPU needs beside its graph: the libraries, the weights once, and proof of where its nodes run.

Nothing here is needed on the CPU. There each session packs the weights into a layout of its own for its GEMMs, which
Python's interface cannot share between sessions; see `Artifact.load` for the one way around it.
"""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from .errors import ProviderMissing

# Nodes that must not fall back to the CPU behind another provider. Sizes, positions and masks may stay there.
_COMPUTING = frozenset({
    "Attention", "BiasGelu", "Conv", "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul", "Gelu", "Gemm",
    "GroupQueryAttention", "LayerNormalization", "MatMul", "MatMulNBits", "MultiHeadAttention", "QuickGelu",
    "RotaryEmbedding", "Sigmoid", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Softmax", "Tanh",
})  # fmt: skip
_SHARED_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)  # that numpy has, and so ONNX Runtime can copy from it


@functools.cache
def load_cuda_libraries() -> str:
    """Load CUDA and cuDNN from their packages, where they are installed as such.

    Returns:
        What ONNX Runtime says of libraries that it did not find; nothing where it found all.
    """
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # it prints and does not raise
        onnxruntime.preload_dlls()
    return printed.getvalue().strip()


def record_placement(options: onnxruntime.SessionOptions) -> None:
    """Let a session remember which provider each node was given to: what `check_placement` reads."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def check_placement(session: onnxruntime.InferenceSession, name: str, provider: str) -> None:
    """Refuse a session in which a node that computes runs elsewhere. Shape arithmetic may stay on the host.

    `session.disable_cpu_ep_fallback` would refuse that too, and with it every graph of variable length. Where no node
    that computes is on the host, no activation is copied there and back inside the layers.

    Args:
        session: opened with the options of `record_placement`.
        name: of the graph, for the message.
        provider: where its nodes belong.

    Raises:
        ProviderMissing: naming the first such nodes.
    """
    elsewhere = [
        f"{node.op_type} {node.name} on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type in _COMPUTING
    ]
    if elsewhere:
        raise ProviderMissing(
            f"{len(elsewhere)} nodes of {name} that belong on {provider} were placed elsewhere "
            f"({', '.join(elsewhere[:3])}): {provider} has no kernel for them in this type; "
            f"lower in another dtype, or use target='cpu'"
        )


class SharedWeights:
    """Tensors of one weights file, each on the device once, for all sessions whose graphs read that file.

    ONNX Runtime uses a tensor given to it in place where it lies on the device that the session wants it on, and else
    loads its own. What it makes of weights itself (the folded transpose of a tied head) stays private to a session;
    so do bfloat16 tensors, which numpy does not have.
    """

    def __init__(self, device: str) -> None:
        """Nothing is loaded yet.

        Args:
            device: as `OrtValue` names it, `"cuda"` or `"cpu"`.
        """
        self._device = device
        self._values: dict[tuple[object, ...], onnxruntime.OrtValue] = {}
        self._owners: list[onnxruntime.OrtValue] = []

    def supply(self, graph: Path, options: onnxruntime.SessionOptions) -> int:
        """Give a session that is about to be opened the weights of its graph. Returns how many tensors it got.

        The session reads them by address: whoever keeps it has to keep this object too (see `keep_with`).

        Raises:
            ProviderMissing: if the device takes no tensors.
        """
        supplied = 0
        for name, value in ir.load(graph).graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.dtype in _SHARED_TYPES:
                options.add_initializer(name, self._value(tensor))
                supplied += 1
        return supplied

    def keep_with(self, session: onnxruntime.InferenceSession) -> None:
        """Live as long as the session does, which may be longer than its artifact."""
        session.weights_by_address = self

    def _value(self, tensor: ir.ExternalTensor) -> onnxruntime.OrtValue:
        key = (str(tensor.location), tensor.offset, tensor.dtype, tuple(tensor.shape))
        if key not in self._values:
            try:
                owner = onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy(), self._device, 0)
            except RuntimeError as error:  # the library of the provider, the driver, or its memory
                raise ProviderMissing(
                    f"weight {tensor.name!r} ({tensor.nbytes} bytes) could not be put on {self._device!r}: {error}; "
                    f"check that the driver, CUDA and cuDNN match onnxruntime-gpu and that memory is free, "
                    f"or use target='cpu'\n{load_cuda_libraries()}"
                ) from error
            # A session takes no tensor that owns its memory, as one on a device does; it takes a view of one.
            self._owners.append(owner)
            self._values[key] = onnxruntime.OrtValue.from_dlpack(owner)
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)
