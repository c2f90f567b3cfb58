"""Who may import whom, and how light the package is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

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


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules of this package, and `torch`, that a file imports; names under TYPE_CHECKING do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level and path.parent.name == "blora_compiler":
                found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
            elif module.startswith("blora_compiler."):
                found.add(module.split(".")[1])
            elif module.split(".")[0] == "torch":
                found.add("torch")
        elif isinstance(node, ast.Import):
            found |= {"torch" for alias in node.names if alias.name.split(".")[0] == "torch"}
    return found


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
