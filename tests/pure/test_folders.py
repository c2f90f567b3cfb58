"""Folders appear whole or not at all, and replacing an earlier result takes nothing with it that it did not write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from blora_compiler import folders
from blora_compiler.errors import BadInput
from blora_compiler.folders import staged_folder

MARKER = "marker.json"


def write(folder: Path, *names: str, indent: int | None = None) -> Path:
    with staged_folder(folder, MARKER) as staging:
        for name in names:
            (staging / name).write_text(name)
        (staging / MARKER).write_text(json.dumps({"kind": "test"}, indent=indent))
    return folder


@pytest.mark.parametrize("indent", [None, 2])
def test_an_earlier_result_is_replaced_whole(tmp_path: Path, indent: int | None) -> None:
    folder = write(tmp_path / "result", "a", "b", indent=indent)
    assert json.loads((folder / MARKER).read_text()) == {"kind": "test", "written": ["a", "b", MARKER]}
    write(folder, "c")
    assert sorted(path.name for path in folder.iterdir()) == ["c", MARKER]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_what_came_into_a_result_later_is_not_deleted_with_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "result", "a")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "export.json").write_text("{}")
    (folder / "notes.md").write_text("mine")
    with pytest.raises(BadInput, match=r"would be replaced, and holds notes\.md, onnx, which came there later"):
        write(folder, "b")
    assert (folder / "notes.md").read_text() == "mine"
    assert (folder / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("marker", ["{", '["a"]', '{"kind": "of an earlier version"}'])
def test_a_result_without_a_list_is_replaced_as_before(tmp_path: Path, marker: str) -> None:
    folder = write(tmp_path / "result", "a")
    (folder / MARKER).write_text(marker)
    write(folder, "b")
    assert sorted(path.name for path in folder.iterdir()) == ["b", MARKER]


def test_an_interrupt_between_the_renames_brings_the_earlier_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "result", "a")
    rename = os.rename

    def interrupted(source: Path, destination: Path) -> None:
        if Path(destination) == folder and Path(source).parent == tmp_path:
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(folders.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(folder, "b")
    assert (folder / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
