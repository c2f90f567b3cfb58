"""UnfuseTransposes: a product that transposes over its batch gets operands of one rank, or a transpose of its own.

    FusedMatMul(x, w, transBatchA=1)      becomes      FusedMatMul(Transpose(x, perm=[1, 0, 2]), w)

ONNX Runtime refuses such a product at its first run where the ranks of its operands differ. Fusions make them:
`nn.MultiheadAttention` with the batch first, as in SigLIP's pooling, puts tokens first before it multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .onnx_result import OnnxPassResult

_FLAGS = ("transBatchA", "transBatchB")  # of the first operand, and of the second


@dataclass(frozen=True)
class UnfuseTransposes:
    """Take the transposes over the batch out of products whose operands have different ranks."""

    def run(self, model: ir.Model) -> OnnxPassResult:
        """Edit `model` in place."""
        applied, refusals = 0, []
        for node in [node for node in model.graph if node.op_type == "FusedMatMul" and any(_flagged(node))]:
            ranks = [None if value is None or value.shape is None else len(value.shape) for value in node.inputs]
            if None not in ranks and len(set(ranks)) == 1:
                continue
            name = node.name or node.outputs[0].name
            if any(rank is None for rank, flagged in zip(ranks, _flagged(node), strict=True) if flagged):
                refusals.append(f"product {name}: the rank of what it transposes is not recorded")
                continue
            for index, (rank, flagged) in enumerate(zip(ranks, _flagged(node), strict=True)):
                if flagged and rank is not None:
                    # The first axis goes behind the batch, as the operator's documentation has it.
                    perm = [*range(1, rank - 1), 0, rank - 1]
                    turned = ir.node(
                        "Transpose", [node.inputs[index]], {"perm": perm}, name=f"{name}_{_FLAGS[index]}"
                    )
                    model.graph.insert_before(node, turned)
                    node.replace_input_with(index, turned.outputs[0])
                    del node.attributes[_FLAGS[index]]
            applied += 1
        return OnnxPassResult(model, bool(applied), applied, tuple(refusals))


def _flagged(node: ir.Node) -> list[bool]:
    return [flag in node.attributes and node.attributes[flag].as_int() == 1 for flag in _FLAGS]
