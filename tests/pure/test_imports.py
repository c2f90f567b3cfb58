"""Who may import whom, and how light the package is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each layer may import itself and the layers before it.
LAYERS = [
    {"errors", "values", "folders"},
    {"budget", "rules", "workloads", "plan", "problem", "operators", "graph", "layers", "branches", "page"},
    {"solver", "nesting", "sweep", "passes", "cost_models", "profiling", "losses", "checkpoint", "data"}
    | {"onnx_sites", "runtime"},
    {
        "source", "tracing", "outline", "evaluate", "probes", "encoders", "objective", "offline", "artifact",
        "generation", "onnx_inputs",
    },
    {
        "rewriting", "distillation", "verification", "overflow", "lowering", "timing", "sweeping", "calibration",
        "onnx_files", "quantization", "export_quality",
    },
    {
        "capture", "measuring", "refitting", "marginals", "report", "attribution", "saving", "onnx_profiling",
        "onnx_verification",
    },
    {"clocks", "latency_budget", "predicting"},
    {"replanning"},
    {"narrowing"},
    {"stages", "analysis"},
    {"onnx_compiling"},
    {"compiling"},
    {"family", "bench_result", "benching"},
    {"cli"},
]  # fmt: skip

NO_TORCH = {
    "errors",
    "values",
    "folders",
    "budget",
    "rules",
    "workloads",
    "plan",
    "problem",
    "solver",
    "nesting",
    "sweep",
    "page",
}
NO_TORCH |= {"cost_models"}


def modules() -> dict[str, list[Path]]:
    found = {path.stem: [path] for path in (ROOT / "blora_compiler").glob("*.py") if path.stem != "__init__"}
    return found | {name: sorted((ROOT / name).glob("*.py")) for name in ("passes", "cost_models")}


def imports(path: Path) -> set[str]:
    """Modules of this package, and `torch`, that a file imports; names under TYPE_CHECKING do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    # `passes` and `cost_models` lie beside the package here, and inside it once installed.
    package = ["blora_compiler"] if path.parent.name == "blora_compiler" else ["blora_compiler", path.parent.name]
    names: list[list[str]] = []
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = node.module.split(".") if node.module else []
            names += [[*start, *module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
    ours = {name[1] for name in names if name[0] == "blora_compiler" and len(name) > 1}
    return ours | {"torch" for name in names if name[0] == "torch"}


@pytest.mark.parametrize(
    ("folder", "line", "expected"),
    [
        ("blora_compiler", "from .solver import solve", "solver"),
        ("blora_compiler", "from . import problem, plan", "problem plan"),
        ("blora_compiler", "from .cost_models.flops import FlopsCostModel", "cost_models"),
        ("passes", "from ..solver import solve", "solver"),
        ("passes", "from ..cost_models.flops import FlopsCostModel", "cost_models"),
        ("passes", "from .. import problem", "problem"),
        ("passes", "from .base import PassResult", "passes"),
        ("cost_models", "def f():\n    import blora_compiler.solver", "solver"),
        ("cost_models", "from blora_compiler import solver", "solver"),
        ("cost_models", "from blora_compiler.solver import solve", "solver"),
        ("cost_models", "import os, torch.nn", "torch"),
        ("cost_models", "from torch.nn import Linear", "torch"),
        ("cost_models", "import blora_compiler, torchvision\nif TYPE_CHECKING:\n    import torch", ""),
    ],
)
def test_every_way_to_import_is_seen(folder, line, expected, tmp_path):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "written.py"
    path.write_text(line)
    assert imports(path) == set(expected.split())


def test_every_module_has_a_layer_and_imports_only_downwards():
    rank = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    assert set(modules()) == set(rank), "give a new module a layer, and drop a removed one"
    upward = [
        f"{name} imports {other}"
        for name, paths in modules().items()
        for path in paths
        for other in imports(path) & set(rank)
        if rank[other] > rank[name]
    ]
    assert upward == []


def test_passes_import_no_cost_model_and_no_solver():
    assert modules()["passes"], "the folder of the passes was not found"
    for path in modules()["passes"]:
        assert not imports(path) & {"cost_models", "solver", "problem"}, path


def test_planning_imports_no_torch():
    offenders = [str(path) for name in NO_TORCH for path in modules()[name] if "torch" in imports(path)]
    assert offenders == []


def test_importing_the_package_loads_nothing_heavy():
    heavy = "('torch', 'transformers', 'onnx', 'scipy', 'rich')"
    code = f"import sys, blora_compiler; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )


def test_every_public_name_resolves():
    code = "import blora_compiler as b; print([n for n in b.__all__ if getattr(b, n, None) is None])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
