"""The wheel holds the two top-level folders inside the package, and the model; it imports on its own."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    # Built from a copy: setuptools writes build/ and egg-info beside the sources.
    source = tmp_path_factory.mktemp("source")
    for name in ("blora_compiler", "passes", "cost_models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_nothing_generic_lands_in_site_packages(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"blora_compiler"}


def test_the_wheel_has_passes_cost_models_and_the_bundled_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in ("passes/fold.py", "cost_models/flops.py", "py.typed", "assets/prose-llama-8m/model.safetensors",
                   "assets/prose/train.txt.xz"):  # fmt: skip
        assert f"blora_compiler/{needed}" in names


def test_it_imports_in_a_fresh_environment(wheel, tmp_path):
    """Installed without dependencies into an empty environment, which then borrows this one's libraries."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    import numpy

    borrowed = Path(numpy.__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(borrowed)!r});"
        "import blora_compiler, blora_compiler.passes, blora_compiler.cost_models.flops as flops;"
        "from blora_compiler.source import BUNDLED_MODEL;"
        "assert (BUNDLED_MODEL / 'model.safetensors').exists();"
        "print(blora_compiler.__file__); print(flops.__file__)"
    )
    result = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert all(line.startswith(str(site)) for line in result.stdout.split())


def test_the_editable_install_maps_the_same_names():
    import blora_compiler.cost_models
    import blora_compiler.passes

    assert Path(blora_compiler.passes.__file__) == ROOT / "passes" / "__init__.py"
    assert Path(blora_compiler.cost_models.__file__) == ROOT / "cost_models" / "__init__.py"
