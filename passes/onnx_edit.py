"""What passes over ONNX graphs share: constants put into a graph, and constants told from what is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def constant(name: str, array: np.ndarray | Sequence[int]) -> ir.Value:
    """A named constant with its shape and type, in no graph yet. Whole numbers are int64, as ONNX wants sizes."""
    array = array if isinstance(array, np.ndarray) else np.array(array, np.int64)
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))


def add_constant(graph: ir.Graph, name: str, array: np.ndarray | Sequence[int]) -> ir.Value:
    """The same, as an initializer of a graph that has none of that name."""
    value = constant(name, array)
    graph.register_initializer(value)
    return value


def is_constant(value: ir.Value) -> bool:
    """An initializer, or the transpose of one (a head too large for the exporter to fold)."""
    if value.const_value is not None:
        return True
    node = value.producer()
    if node is None or node.op_type != "Transpose" or node.inputs[0] is None:
        return False
    return is_constant(node.inputs[0])


def free_name(graph: ir.Graph, name: str) -> str:
    """`name`, or the first variation of it that no value or node of the graph has."""
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph.all_nodes():
        taken |= {node.name, *(output.name for output in node.outputs)}
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
