"""Plain modules: inputs go by their names, and what is behind a boolean input is compared like the rest."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import blora_compiler as blora
from blora_compiler.artifact import Artifact
from blora_compiler.errors import ParityFailed
from blora_compiler.verification import verify

SHAPE = (4, 6, 32)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, scale=None, shift=None):
        x = x if scale is None else x * scale
        return self.b(torch.relu(self.a(x if shift is None else x + shift)))


class Less(Shifted):
    def forward(self, x, y):
        return self.b(torch.relu(self.a(x - 2 * y)))


class Keyword(Shifted):
    def forward(self, *, x):
        return self.b(torch.relu(self.a(x)))


class Flagged(Shifted):
    def forward(self, x, flag):
        return torch.where(flag[:, None, None], 7.0, self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize(("kind", "names"), [(Shifted, ("x", "shift")), (Less, ("y", "x")), (Keyword, ("x",))])
@pytest.mark.parametrize("given", [True, False], ids=["inputs", "calibration alone"])
def test_inputs_go_by_name_whatever_their_order(kind, names, given, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [{name: torch.randn(SHAPE) for name in names} for _ in range(3)]
    compiled = blora.compile(kind().eval(), 0.5, calibration=batches, inputs=batches[0] if given else None)
    compiled.export(tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    with torch.no_grad():
        expected = compiled.module(**batches[1])
    (found,) = session.run(None, {name: value.numpy() for name, value in batches[1].items()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_a_file_that_is_wrong_where_a_flag_is_true_does_not_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(SHAPE), torch.tensor([True, False, True, False]))
    compiled = blora.compile(Flagged().eval(), 0.5, calibration=[dict(zip(("x", "flag"), inputs, strict=True))],
                             inputs=inputs)  # fmt: skip
    artifact = compiled.export(tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    sevens = [value for value in model.graph.initializer if not value.external_data]
    sevens = [value for value in sevens if (numpy_helper.to_array(value) == 7.0).all()]
    assert len(sevens) == 1
    sevens[0].CopyFrom(numpy_helper.from_array(-14 * numpy_helper.to_array(sevens[0]), sevens[0].name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ParityFailed):
        verify(Artifact(tmp_path, artifact.manifest), compiled.module)


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(32, 64) / 6), nn.Parameter(torch.randn(64, 32) / 8)

    def forward(self, x):
        h = x @ self.w
        h[:, 0] = 0.0
        return torch.relu(h) @ self.v


def test_what_is_written_through_a_view_stays_in_the_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Written().eval(), torch.randn(SHAPE)
    compiled = blora.compile(net, 1.0, calibration=[{"x": torch.randn(SHAPE)}], inputs=(x,))
    artifact = compiled.export(tmp_path)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(compiled.module(x), expected)
    (found,) = artifact.session("model").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
