"""CountPastByMask: a decode graph on a cache longer than its past; and what is left alone, with the reason."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from blora_compiler.passes.onnx_count_past_by_mask import CountPastByMask

BATCH, HEADS, SIZE = "batch", 2, 16
PAST = ("input.past_key_values.layers.0.keys", "input.past_key_values.layers.0.values")


def value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def constant(name: str, data: np.ndarray) -> ir.Value:
    found = ir.Value(name=name, const_value=ir.tensor(data, name=name))
    found.shape, found.dtype = ir.Shape(data.shape), ir.DataType(ir.tensor(data).dtype)
    return found


def decode_graph() -> ir.Model:
    """One attention as an exporter writes it: the lengths come from the shape of the past."""
    states = value("states", [BATCH, 1, 3 * HEADS * SIZE])
    mask = value("attention_mask", ["rows", "columns"], ir.DataType.INT64)
    caches = [value(name, [BATCH, HEADS, "past", SIZE]) for name in PAST]
    one, rows_like = constant("one", np.array([1], np.int64)), constant("one_row", np.array([1], np.int32))
    nodes = [
        ir.node("Shape", [caches[1]], attributes={"start": 2, "end": 3}, name="past_length"),
        ir.node("Shape", [caches[0]], attributes={"start": 0, "end": 1}, name="rows"),
    ]
    past, rows = nodes[0].outputs[0], nodes[1].outputs[0]
    nodes.append(ir.node("Add", [past, one], name="total"))
    nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], attributes={"to": 6}, name="total_int32"))
    total = nodes[-1].outputs[0]
    nodes.append(ir.node("Sub", [total, rows_like], name="last"))
    nodes.append(ir.node("Expand", [nodes[-1].outputs[0], rows], name="lasts"))
    lasts = nodes[-1].outputs[0]
    nodes.append(ir.node("Squeeze", [total], name="total_scalar"))
    inputs = [states, None, None, *caches, lasts, nodes[-1].outputs[0]]
    attention = ir.node(
        "GroupQueryAttention", inputs, attributes={"num_heads": HEADS, "kv_num_heads": HEADS},
        domain="com.microsoft", num_outputs=3, name="attention",
    )  # fmt: skip
    attention.outputs[0].name = "attended"
    for output, name in zip(attention.outputs[1:], PAST, strict=True):
        output.name = name.replace("input", "output")
        output.shape = ir.Shape([BATCH, HEADS, "present", SIZE])
    attention.outputs[0].shape = ir.Shape([BATCH, 1, HEADS * SIZE])
    for output in attention.outputs:
        output.dtype = ir.DataType.FLOAT
    graph = ir.Graph(
        [states, mask, *caches], attention.outputs, nodes=[*nodes, attention], initializers=[one, rows_like],
        opset_imports={"": 20, "com.microsoft": 1}, name="decode",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, capacity: int) -> list[np.ndarray]:
    """A step behind 5 tokens, in caches that are `capacity` long."""
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {
        "states": random.standard_normal((2, 1, 3 * HEADS * SIZE)).astype(np.float32),
        "attention_mask": np.ones((2, 6), np.int64),
    }
    for name in PAST:
        feeds[name] = np.full((2, HEADS, capacity, SIZE), 1e3, np.float32)
        feeds[name][:, :, :5] = random.standard_normal((2, HEADS, 5, SIZE))
    return session.run(None, {spec.name: feeds[spec.name] for spec in session.get_inputs()})


def test_outputs_stay_and_a_longer_cache_gives_the_same() -> None:
    before = run(decode_graph(), 5)
    model = decode_graph()
    assert CountPastByMask().reason_to_skip(model) is None
    assert CountPastByMask().run(model).modified
    for got, expected in zip(run(model, 5), before, strict=True):
        np.testing.assert_array_equal(got, expected)
    attended, keys, values = run(model, 9)
    np.testing.assert_array_equal(attended, before[0])
    np.testing.assert_array_equal(keys[:, :, :6], before[1])
    np.testing.assert_array_equal(values[:, :, :6], before[2])
    # What the pass is for: as exported, a longer cache is taken for a longer past.
    assert np.abs(run(decode_graph(), 9)[0] - before[0]).max() > 1


def test_the_second_time_changes_nothing() -> None:
    model = decode_graph()
    CountPastByMask().run(model)
    nodes = [node.name for node in model.graph]
    assert not CountPastByMask().run(model).modified
    assert [node.name for node in model.graph] == nodes
    assert [node.name for node in model.graph if node.op_type == "Shape"] == ["mask_columns", "rows"]
    assert all(output.shape is not None and output.dtype is not None for output in model.graph.node(0).outputs)


def test_a_cache_that_grows_by_a_concat_is_left_alone() -> None:
    model = decode_graph()
    cache = next(found for found in model.graph.inputs if found.name == PAST[0])
    grown = ir.node("Concat", [cache, cache], attributes={"axis": 2}, name="grow")
    grown.outputs[0].name = "grown"
    model.graph.insert_before(model.graph[0], grown)
    reason = CountPastByMask().reason_to_skip(model)
    assert reason == f"Concat grow reads {PAST[0]}; only GroupQueryAttention can extend a cache in place"
    assert not CountPastByMask().run(model).modified


def remove_mask(graph: ir.Graph) -> None:
    graph.inputs.remove(next(found for found in graph.inputs if found.name == "attention_mask"))


def rename_caches(graph: ir.Graph) -> None:
    for found in graph.inputs:
        found.name = found.name.replace("input.", "cache.")


def read_present(graph: ir.Graph) -> None:
    attention = next(node for node in graph if node.name == "attention")
    graph.append(ir.node("Identity", [attention.outputs[1]], name="reader"))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (remove_mask, "the graph does not read attention_mask, which would say how long the past is"),
        (rename_caches, "no input begins with 'input.past_key_values.'"),
        (read_present, "the graph reads the new cache of attention itself"),
    ],
)
def test_other_graphs_are_left_alone_and_say_why(edit, reason: str) -> None:
    model = decode_graph()
    edit(model.graph)
    assert CountPastByMask().reason_to_skip(model) == reason
    nodes = [node.name for node in model.graph]
    assert not CountPastByMask().run(model).modified
    assert [node.name for node in model.graph] == nodes
