"""A compiler for transformer compression: one number in, a smaller verified model out.

    import blora_compiler as blora

    c = blora.compile(model, budget=0.25)
    c.export("out/")

Names load on first use, so that importing the package stays light. No submodule shares a name with a function here:
importing one would hide the other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis import WhatIf, whatif
    from .artifact import Artifact
    from .bench_result import BenchResult
    from .benching import bench
    from .compiling import Compiled, compile, make_plan
    from .distillation import DistillConfig, distill
    from .errors import (
        BadInput,
        BloraError,
        DistillationDiverged,
        GraphInvalid,
        InfeasibleBudget,
        ParityFailed,
        ProviderMissing,
    )
    from .family import Family, compile_family, load_family
    from .lowering import lower
    from .measuring import calibrate
    from .onnx_compiling import CompiledOnnx, compile_onnx
    from .plan import Plan
    from .profiling import profile
    from .refitting import refit
    from .replanning import replan
    from .rewriting import fold, insert, rewrite, settle
    from .saving import load
    from .solver import solve
    from .tracing import trace
    from .values import Cost, Dense, Factored, Mix, Removed, Site, Workload
    from .verification import verify
    from .workloads import parse_workload

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOME = {
    "compile": "compiling",
    "Compiled": "compiling",
    "compile_onnx": "onnx_compiling",
    "CompiledOnnx": "onnx_compiling",
    "make_plan": "compiling",
    "compile_family": "family",
    "Family": "family",
    "load_family": "family",
    "whatif": "analysis",
    "WhatIf": "analysis",
    "calibrate": "measuring",
    "bench": "benching",
    "BenchResult": "bench_result",
    "load": "saving",
    # Each stage alone; `compile` is these in order.
    "trace": "tracing",
    "profile": "profiling",
    "solve": "solver",
    "refit": "refitting",
    "replan": "replanning",
    "rewrite": "rewriting",
    "insert": "rewriting",
    "distill": "distillation",
    "settle": "rewriting",
    "fold": "rewriting",
    "lower": "lowering",
    "verify": "verification",
    # Values.
    "Plan": "plan",
    "DistillConfig": "distillation",
    "Artifact": "artifact",
    "Workload": "values",
    "Mix": "values",
    "parse_workload": "workloads",
    "Site": "values",
    "Dense": "values",
    "Factored": "values",
    "Removed": "values",
    "Cost": "values",
    # Errors.
    "BloraError": "errors",
    "BadInput": "errors",
    "InfeasibleBudget": "errors",
    "ParityFailed": "errors",
    "ProviderMissing": "errors",
    "GraphInvalid": "errors",
    "DistillationDiverged": "errors",
}

__all__ = [
    "compile",
    "Compiled",
    "compile_onnx",
    "CompiledOnnx",
    "make_plan",
    "compile_family",
    "Family",
    "load_family",
    "whatif",
    "WhatIf",
    "calibrate",
    "bench",
    "BenchResult",
    "load",
    "trace",
    "profile",
    "solve",
    "refit",
    "replan",
    "rewrite",
    "insert",
    "distill",
    "settle",
    "fold",
    "lower",
    "verify",
    "Plan",
    "DistillConfig",
    "Artifact",
    "Workload",
    "Mix",
    "parse_workload",
    "Site",
    "Dense",
    "Factored",
    "Removed",
    "Cost",
    "BloraError",
    "BadInput",
    "InfeasibleBudget",
    "ParityFailed",
    "ProviderMissing",
    "GraphInvalid",
    "DistillationDiverged",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'blora_compiler' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
