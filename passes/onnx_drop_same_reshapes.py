"""DropSameReshapes: a reshape to the shape that a tensor has already goes.

    Reshape(x, shape)      becomes      x                 where the result is recorded with the sizes of x

Models write such views to be sure of a shape; GPT-2 has one behind its last norm. They cost next to nothing, but
whoever looks for the positions of a prompt cannot see through a computed target shape (`LastPositionEarly`).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .onnx_collapse_reshapes import known_sizes
from .onnx_result import OnnxPassResult


@dataclass(frozen=True)
class DropSameReshapes:
    """Remove every reshape whose input has the recorded sizes of its result."""

    def run(self, model: ir.Model) -> OnnxPassResult:
        """Edit `model` in place."""
        applied, refusals = 0, []
        for node in [node for node in model.graph if _keeps_the_shape(node)]:
            result, source = node.outputs[0], node.inputs[0]
            assert source is not None
            if result.is_graph_output():
                refusals.append(f"reshape {node.name or result.name}: its result is an output of the graph")
                continue
            result.replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            applied += 1
        return OnnxPassResult(model, bool(applied), applied, tuple(refusals))


def _keeps_the_shape(node: ir.Node) -> bool:
    if node.op_type != "Reshape" or node.inputs[0] is None:
        return False
    sizes = known_sizes(node.outputs[0])
    return sizes is not None and sizes == known_sizes(node.inputs[0])
