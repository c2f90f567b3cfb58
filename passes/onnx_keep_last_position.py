"""KeepLastPosition: a prefill graph computes its head for the last position alone.

    logits (batch, tokens, vocabulary) = head(hidden)     becomes
    logits (batch, 1, vocabulary)      = head(Gather(hidden, [-1], axis=1))

The gather goes in front of the longest chain of position-wise nodes that ends in the logits: the head's GEMM, or
both GEMMs of a factored head, with any bias, soft cap and norm around them. Where nothing in front of the output is
position-wise, it goes behind it: the result is the same, only no work is saved. Batches are padded on the left, so
the last column is the last token of every sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .onnx_edit import add_constant, is_constant
from .onnx_result import OnnxPassResult

_GEMMS = frozenset({"MatMul", "FusedMatMul"})
_NORMS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})
_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Tanh", "Sigmoid", "Erf", "Relu", "Gelu", "Cast", "Identity", "Clip"}
)


@dataclass(frozen=True)
class KeepLastPosition:
    """Keep only the last position (axis 1) of one output of rank 3. Changes nothing the second time.

    Attributes:
        output: the graph output's name.
    """

    output: str = "logits"

    def run(self, model: ir.Model) -> OnnxPassResult:
        """Edit `model` in place.

        Raises:
            ValueError: if the graph has no such output, or its rank is not 3.
        """
        logits = self._find_output(model.graph)
        assert logits.shape is not None
        if logits.shape[1] == 1:
            return OnnxPassResult(model, False)
        chain = [] if logits.uses() else _position_wise_chain(logits)  # others may read all positions
        if chain:
            _gather_before(model.graph, chain)
        else:
            _gather_behind(model.graph, logits)
        behind = () if chain else (f"nothing in front of {self.output} is position-wise: its work stays",)
        return OnnxPassResult(model, True, 1, behind)

    def _find_output(self, graph: ir.Graph) -> ir.Value:
        for value in graph.outputs:
            if value.name == self.output:
                if value.shape is None or len(value.shape) != 3:
                    raise ValueError(f"output {self.output!r} has shape {value.shape}; it must have three axes")
                return value
        raise ValueError(f"no output {self.output!r} among {[value.name for value in graph.outputs]}")


def _position_wise_chain(logits: ir.Value) -> list[tuple[ir.Node, int]]:
    """The nodes from the logits back to the first that mixes positions, each with its one input that varies."""
    chain: list[tuple[ir.Node, int]] = []
    value = logits
    while (node := value.producer()) is not None and (index := _position_wise_input(node)) is not None:
        source = node.inputs[index]
        assert source is not None
        chain.append((node, index))
        # A value that something else reads too must keep all its positions.
        if len(source.uses()) != 1 or source.is_graph_output():
            break
        value = source
    return chain


def _position_wise_input(node: ir.Node) -> int | None:
    """Which input carries the positions, if the node treats every position alike; else None."""
    varying = [index for index, value in enumerate(node.inputs) if value is not None and not is_constant(value)]
    if len(varying) != 1 or len(node.outputs) != 1:
        return None
    index = varying[0]
    source = node.inputs[index]
    if source is None or source.shape is None or len(source.shape) != 3:
        return None
    constants = [value for value in node.inputs if value is not None and value is not source]
    if node.op_type in _GEMMS:
        plain = index == 0 and not node.attributes.get_int("transA", 0)
        return index if plain and all(_rank(value) == 2 for value in constants) else None
    if node.op_type in _NORMS:
        return index if index == 0 and node.attributes.get_int("axis", -1) in (-1, 2) else None
    if node.op_type in _ELEMENTWISE:
        return index if all(_is_same_for_all_positions(value) for value in constants) else None
    return None


def _only_input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None, f"{node.op_type} {node.name} has no input"
    return value


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _is_same_for_all_positions(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and all(size == 1 for size in tuple(shape)[:-1])


def _gather_before(graph: ir.Graph, chain: list[tuple[ir.Node, int]]) -> None:
    first, index = chain[-1]
    source = first.inputs[index]
    assert source is not None
    gather, gathered = _gather_last(graph, source)
    graph.insert_before(first, gather)
    first.replace_input_with(index, gathered)
    for node, _ in chain:
        node.outputs[0].shape = _one_position(node.outputs[0])


def _gather_behind(graph: ir.Graph, logits: ir.Value) -> None:
    name = logits.name
    logits.name = f"{name}_all_positions"
    gather, gathered = _gather_last(graph, logits)
    gathered.name = name
    graph.append(gather)
    for position, output in enumerate(graph.outputs):
        if output is logits:
            graph.outputs[position] = gathered


def _gather_last(graph: ir.Graph, source: ir.Value) -> tuple[ir.Node, ir.Value]:
    index = add_constant(graph, "last_position", [-1])
    gather = ir.node("Gather", [source, index], attributes={"axis": 1}, name="keep_last_position")
    gathered = gather.outputs[0]
    gathered.name = "last_position_hidden"
    gathered.type, gathered.shape = source.type, _one_position(source)
    return gather, gathered


def _one_position(value: ir.Value) -> ir.Shape | None:
    if value.shape is None:
        return None
    return ir.Shape([value.shape[0], 1, *tuple(value.shape)[2:]])
