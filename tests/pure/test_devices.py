"""Device profiles: those that ship, a user's own, and everything that makes a file no profile."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from blora_compiler.cost_models.devices import FOLDER, THIS, THIS_CUDA, device_from_json, device_names, load_device

from blora_compiler.errors import BadInput
from tests.made_devices import PROFILE, device

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.json"))


def write(folder, name, **changes):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**PROFILE, "name": name, **changes}), encoding="utf-8")
    return path


# ── What ships ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_promised_devices_ship():
    assert SHIPPED == ["a100", "cpu-amx", "h100", "h200", "l4", "rtx4090", "t4"]
    assert device_names() == sorted([*SHIPPED, THIS, THIS_CUDA])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_and_says_where_its_numbers_come_from(name):
    profile = load_device(name)
    assert profile.name == name
    assert load_device(name.upper()) == profile == load_device(FOLDER / f"{name}.json")
    assert not profile.measured
    assert "not measured" in profile.source
    assert len(profile.source.split()) > 10
    assert profile.peak(profile.dtype) >= profile.peak_flops["float32"]
    # Arithmetic outruns memory everywhere, by 10 to 1000 FLOPs a byte.
    assert 10 < profile.peak(profile.dtype) / profile.bandwidth < 1000
    assert any(rows <= 16 for rows, _, _ in profile.tiles), "decode needs a tile with few rows"
    assert max(relative for *_, relative in profile.tiles) == 1.0


def test_a_dtype_the_device_lacks_is_refused():
    with pytest.raises(BadInput) as refusal:
        load_device("t4").peak("bfloat16")
    assert str(refusal.value) == (
        "device 't4' has no bfloat16 arithmetic; use float32 or float16, or add peak_flops.bfloat16 to its profile"
    )


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("h20", "; did you mean 'h200'?"),
        ("RTX-4090", "; did you mean 'rtx4090'?"),
        ("toaster", ""),
    ],
)
def test_an_unknown_name_offers_the_nearest(asked, near):
    with pytest.raises(BadInput) as refusal:
        load_device(asked)
    assert str(refusal.value) == (
        f"device {asked!r} is unknown{near}; use one of {', '.join(device_names())}, or the path of a profile (.json)"
    )


# ── A user's own ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_profile_is_read_by_its_path_and_again_after_an_edit(tmp_path):
    path = write(tmp_path, "mine", units=7)
    assert load_device(path) == load_device(str(path)) == device(name="mine", units=7, tiles=((1, 1, 1.0),))
    before = path.stat().st_mtime_ns
    write(tmp_path, "mine", units=8)
    while path.stat().st_mtime_ns == before:
        path.touch()
    assert load_device(path).units == 8


def test_a_path_without_a_file_is_refused(tmp_path):
    path = tmp_path / "none.json"
    with pytest.raises(BadInput) as refusal:
        load_device(path)
    assert str(refusal.value) == (
        f"device profile {path} does not exist; the known devices are {', '.join(device_names())}"
    )


def test_a_folder_of_profiles_adds_names_and_wins(tmp_path, monkeypatch):
    write(tmp_path, "Mine")
    write(tmp_path, "h200", title="an H200 that was measured", measured=True)
    monkeypatch.setenv("BLORA_DEVICES", str(tmp_path))
    assert device_names() == sorted([*SHIPPED, THIS, THIS_CUDA, "mine"])
    assert load_device("mine").name == "Mine"
    assert load_device("h200").measured
    monkeypatch.delenv("BLORA_DEVICES")
    assert not load_device("h200").measured


# ── What is no profile ───────────────────────────────────────────────────────────────────────────────────────────


def refusal_of(data) -> str:
    with pytest.raises(BadInput) as refusal:
        device_from_json(data, "x.json")
    return str(refusal.value)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(BadInput, match=rf"^device profile {path} cannot be read as JSON: Expecting property name"):
        load_device(path)


def test_json_that_is_no_object_is_refused():
    assert refusal_of([]) == "x.json: holds a list, a device profile is an object"


@pytest.mark.parametrize("name", PROFILE)
def test_each_missing_field_is_named(name):
    assert refusal_of({key: value for key, value in PROFILE.items() if key != name}) == (
        f"device profile x.json: {name} is missing"
    )


FLOPS = "1e+08 to 1e+18 FLOP/s"
TILES = "it must be a list of [rows, columns, relative efficiency]: whole sizes from 1 to 4096, efficiencies up to 1"
ABSURD = [
    ("name", "", "it must be text"),
    ("title", 3, "it must be text"),
    ("source", " ", "it must be text"),
    ("provider", "tpu", "it must be 'cpu' or 'cuda'"),
    ("measured", 1, "it must be true or false"),
    ("dtype", "int8", "it must be one of float32, float16, bfloat16"),
    ("dtype", ["float32"], "it must be one of float32, float16, bfloat16"),
    ("peak_flops", {}, "it must map float32, float16, bfloat16 to FLOP/s"),
    ("peak_flops", 1e12, "it must map float32, float16, bfloat16 to FLOP/s"),
    ("peak_flops", {"int8": 1e12}, "it has the unknown dtype 'int8'; known are float32, float16, bfloat16"),
    ("peak_flops", {"float32": 1e12, "float16": 312}, f"it must hold {FLOPS} for float16"),
    ("bandwidth", 0, "it must lie between 1e+08 and 1e+15"),
    ("bandwidth", "2TB", "it must be a number"),
    ("bandwidth", True, "it must be a number"),
    ("bandwidth", float("nan"), "it must be a number"),
    ("bandwidth", 10**400, "it must lie between 1e+08 and 1e+15"),
    ("memory_bytes", 80, "it must lie between 1e+07 and 1e+14"),
    ("launch_ns", -1, "it must lie between 0 and 1e+07"),
    ("session_ns", 1e10, "it must lie between 0 and 1e+09"),
    ("cache_bytes", -1, "it must lie between 0 and 1e+12"),
    ("cache_bandwidth", 0, "it must lie between 1e+08 and 1e+16"),
    ("units", 0, "it must lie between 1 and 100000"),
    ("depth", -1, "it must lie between 0 and 100000"),
    ("align", 0, "it must lie between 1 and 1024"),
    ("misaligned", 0, "it must lie between 0.001 and 1"),
    ("efficiency", 80, "it must lie between 0.001 and 1"),
    ("attention_efficiency", 1.01, "it must lie between 0.001 and 1"),
    *(("tiles", tiles, TILES) for tiles in (
        [], "64x64", [[64, 64]], [64, 64, 1.0], [[0.5, 64, 1.0]], [[64, 0, 1.0]], [[64, 64, 0]], [[64, 64, 1.5]],
    )),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "wrong"), ABSURD)
def test_each_absurd_field_is_named(name, value, wrong):
    assert refusal_of({**PROFILE, name: value}) == f"device profile x.json: {name} is {value!r}, {wrong}"


def test_the_default_dtype_needs_a_peak():
    assert refusal_of({**PROFILE, "dtype": "bfloat16"}) == (
        "device profile x.json: dtype is 'bfloat16', but peak_flops has float32, float16 alone"
    )


def test_everything_that_is_wrong_is_listed_at_once():
    wrong = {**PROFILE, "launch_ns": -1, "bandwith": 1e11, "efficiency": 2}
    del wrong["title"]
    assert refusal_of(wrong) == (
        "device profile x.json: 4 problems:\n"
        "  - title is missing\n"
        "  - 'bandwith' is no field of a profile; did you mean 'bandwidth' or 'cache_bandwidth'?\n"
        "  - launch_ns is -1, it must lie between 0 and 1e+07\n"
        "  - efficiency is 2, it must lie between 0.001 and 1"
    )


def test_a_good_profile_is_taken_as_it_is():
    assert device_from_json(PROFILE, "x.json") == replace(device(), tiles=((1, 1, 1.0),))
