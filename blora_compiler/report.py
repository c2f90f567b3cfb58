"""The report: what was asked, planned and achieved, what it cost in quality, and what it saves in time."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cost_models.flops import whole_graph_cost
from .timing import Timing
from .values import Cost, Dense, Form, Metric, format_amount
from .workloads import workload_from_json

if TYPE_CHECKING:
    from .artifact import Artifact
    from .compiling import Compiled

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "accelerate", "scipy")
SLOWEST_SITES = 12
COUNTED: tuple[Metric, ...] = ("flops", "params", "bytes")


@dataclass(frozen=True)
class Report:
    """Prints as markdown; `data` is the same as JSON values."""

    data: Mapping[str, Any]

    def __str__(self) -> str:
        return render(self.data)

    def to_json(self) -> str:
        return json.dumps(self.data, indent=2) + "\n"


def build_report(
    compiled: Compiled,
    artifact: Artifact | None,
    timings: Sequence[Timing] | None,
    spent: Sequence[Mapping[str, Any]] = (),
) -> Report:
    """Gather everything a reader should know about a compiled model, as JSON values."""
    plan = compiled.plan
    data = {
        "model": compiled.source.name,
        "budget": {
            "asked": plan.budget,
            "metric": plan.metric,
            "scope": plan.scope,
            "planned_fraction": plan.fraction,
            "damage": plan.damage,
            "damage_kind": plan.damage_kind,
            "damage_unit": plan.damage_unit,
            "gap": plan.gap,
        },
        "achieved": achieved(compiled),
        "workload": plan.workload.to_json(),
        "sites": [
            {"site": c.site, "form": str(c.form), "cost": c.cost, "dense_cost": c.dense_cost, "damage": c.damage,
             "note": c.note}
            for c in plan.choices
        ],
        "excluded": list(plan.excluded),
        "quality": {name: quality.to_json() for name, quality in compiled.quality.items()},
        "parity": None if artifact is None else artifact.parity.to_json(),
        "export": None if artifact is None else describe_export(artifact),
        "timings": [timing.to_json() for timing in timings or ()],
        "time_spent": list(spent),
        "stages": [
            {"stage": r.stage, "seconds": round(r.seconds, 2), "summary": r.summary, "facts": dict(r.facts),
             "refusals": [str(refusal) for refusal in r.refusals]}
            for r in compiled.records
        ],
        "versions": versions(),
    }  # fmt: skip
    return Report(data)


def achieved(compiled: Compiled) -> dict[str, dict[str, dict[str, float]]]:
    """Counted on the modules that were really installed: scope -> metric -> dense, compressed, fraction."""
    program, plan = compiled.program, compiled.plan
    forms = {name: installed_form(program, name, form) for name, form in plan.forms.items()}
    result: dict[str, dict[str, dict[str, float]]] = {}
    counted = [site for site in program.sites if site.name in forms]
    for scope, sites, operators in (("sites", counted, ()), ("model", program.sites, program.operators)):
        dense = whole_graph_cost([site.whole for site in sites], operators, {}, plan.workload)
        now = whole_graph_cost(sites, operators, forms, plan.workload)
        result[scope] = {metric: _compared(dense, now, metric) for metric in COUNTED}
    return result


def installed_form(program: Any, name: str, planned: Form) -> Form:
    """The form the module at `name` has, read off the module; the plan's word where none was installed."""
    from .layers import DenseLinear, FactoredLinear
    from .values import Factored

    match program.form_module(name):
        case FactoredLinear() as module:
            sites = [site.name for site in program.sites]
            sharers = [site for site in sites if getattr(program.form_module(site), "A", None) is module.A]
            first = program.form_module(sharers[0])
            return Factored(module.rank, tuple(sharers) if len(sharers) > 1 else (), first.given_from is not None)
        case DenseLinear():
            return Dense()
    return planned


def _compared(dense: Cost, now: Cost, metric: Metric) -> dict[str, float]:
    before, after = dense.in_metric(metric), now.in_metric(metric)
    return {"dense": before, "compressed": after, "fraction": after / before if before else 1.0}


def describe_export(artifact: Artifact) -> dict[str, Any]:
    """Where the export is and how large, beside its unique parameter bytes."""
    on_disk = sum(path.stat().st_size for path in artifact.files)
    return {
        "folder": artifact.folder.name,
        "target": artifact.target,
        "dtype": artifact.dtype,
        "files": [path.name for path in artifact.files],
        "bytes": on_disk,
        "parameter_bytes": artifact.manifest["parameter_bytes"],
        "unmapped_sites": list(artifact.unmapped_sites),
        "rewrites": rewrite_lines(artifact.manifest),
        "quantization": describe_quantization(artifact),
    }


def rewrite_lines(manifest: Mapping[str, Any]) -> list[str]:
    """What each graph of an export was fused and rewritten into, a line a graph, and a line for each refusal."""
    lines = []
    for graph, results in manifest.get("passes", {}).items():
        fusions = manifest.get("fusions", {}).get(graph, {})
        applied = {label: result["applied"] for label, result in results.items() if label != "QuantizeWeights"}
        parts = [(counted(fusions), "fused into"), (counted(applied), "rewritten by")]
        lines.append(f"{graph}: " + "; ".join(f"{how} {what}" for what, how in parts if what))
        lines += [
            f"{graph}: {label} left alone: {reason}"
            for label, result in results.items() if label != "QuantizeWeights" for reason in result["refusals"]
        ]  # fmt: skip
    return lines


def counted(counts: Mapping[str, int]) -> str:
    """`12 x MatMul, 3 x Gelu`."""
    return ", ".join(f"{count} x {name}" for name, count in counts.items() if count)


def describe_quantization(artifact: Artifact) -> dict[str, Any] | None:
    """Which GEMMs of an export are quantised, which are not and why, and how far its outputs moved; None if none."""
    if artifact.quantize is None:
        return None
    passes = {graph: results["QuantizeWeights"] for graph, results in artifact.manifest["passes"].items()}
    return {
        "quantize": artifact.quantize,
        "loss": artifact.manifest["quantization"]["loss"],
        "gemms": {graph: result["applied"] for graph, result in passes.items()},
        "refusals": [f"{graph}: {reason}" for graph, result in passes.items() for reason in result["refusals"]],
    }


def quantization_lines(described: Mapping[str, Any]) -> list[str]:
    """What a reader is told about `describe_quantization`: a headline, then a line for each GEMM left in floats."""
    counts = ", ".join(f"{count} of {graph}" for graph, count in described["gemms"].items())
    return [
        f"weights in {described['quantize']}: GEMMs {counts}; outputs on random inputs moved by at most "
        f"{described['loss']:.1%} of their length from the model before quantisation",
        *(f"not quantised, {refusal}" for refusal in described["refusals"]),
    ]


def versions() -> dict[str, str]:
    """What produced the numbers."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ── Markdown ─────────────────────────────────────────────────────────────────────────────────────────────────────


def render(data: Mapping[str, Any]) -> str:
    """The report as markdown, from its JSON values alone: `blora report` prints old runs with it."""
    sections = [
        _headline(data),
        _achieved_section(data),
        _quality_section(data),
        _time_section(data),
        _spent_section(data),
        _export_section(data),
        _sites_section(data),
        _stages_section(data),
        "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table; numbers are right-aligned."""
    body = [[str(cell) for cell in row] for row in rows]
    alignment = ["---" if index == 0 else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [list(header), alignment, *body])


def _headline(data: Mapping[str, Any]) -> str:
    budget = data["budget"]
    damage = "not measured" if budget["damage"] is None else f"{budget['damage']:.4f} {budget['damage_unit']}"
    gap = "unknown (edited plan)" if budget["gap"] is None else f"{budget['gap']:.1e}"
    return (
        f"# {data['model']} at budget {budget['asked']}\n\n"
        f"Planned {budget['planned_fraction']:.4f} of the dense {budget['metric']} (scope {budget['scope']}); "
        f"predicted damage before training: {damage}; optimality gap {gap}."
    )


def _achieved_section(data: Mapping[str, Any]) -> str:
    rows = [
        (f"{scope}: {metric}", format_amount(v["dense"], metric), format_amount(v["compressed"], metric),
         f"{v['fraction']:.4f}")
        for scope, metrics in data["achieved"].items()
        for metric, v in metrics.items()
    ]  # fmt: skip
    workload = workload_from_json(data["workload"], "report.json")
    where = f"{workload.name}, {workload.dtype}"
    return f"## Achieved\n\nCounted on the installed modules; {where}.\n\n" + table(
        ("", "dense", "compressed", "kept"), rows
    )


def _quality_section(data: Mapping[str, Any]) -> str:
    if not data["quality"]:
        return "## Quality\n\nNot measured: no evaluation text was given."
    any_row = next(iter(data["quality"].values()))
    rows = [
        (
            name,
            f"{q['perplexity']:.2f}",
            *("-" if q[key] is None else f"{q[key]:.4f}" for key in ("kl", "top1_agreement")),
        )
        for name, q in data["quality"].items()
    ]
    stride = "" if any_row["stride"] is None else f", stride {any_row['stride']}"
    return (
        f"## Quality\n\n{any_row['tokens']} predictions, windows of {any_row['length']} tokens{stride}, float32.\n\n"
        + table(("", "perplexity", "KL to teacher (nats/token)", "top-1 agreement"), rows)
    )


def _time_section(data: Mapping[str, Any]) -> str:
    timings = [Timing(**entry) for entry in data["timings"]]
    if not timings:
        return "## Time\n\nNot measured."
    dense = {t.setting: t for t in timings if t.name == "dense"}
    rows, slower = [], []
    for t in timings:
        ratio = dense[t.setting].median_ms / t.median_ms if t.setting in dense else None
        spread = f"{t.low_ms:.2f} - {t.high_ms:.2f}"
        rows.append((t.setting, t.name, f"{t.median_ms:.2f}", spread, "-" if ratio is None else f"{ratio:.2f}x"))
        if t.name != "dense" and ratio is not None and ratio < 1.0:
            slower.append(f"{t.setting} ({ratio:.2f}x)")
    quantization = (data["export"] or {}).get("quantization")
    small = "two small GEMMs" + (", or GEMMs that unpack their weights," if quantization else "")
    verdict = (
        f"**Compression lost time at {', '.join(slower)}**: {small} took longer there than the dense one."
        if slower
        else "Compression lost time at none of these settings."
    )
    alike = f"alike but for weights in {quantization['quantize']}" if quantization else "alike"
    return (
        f"## Time\n\nONNX Runtime, dense and compressed exported {alike}, interleaved in one run; medians.\n\n"
        + table(("setting", "model", "median ms", "quartiles", "speed-up"), rows)
        + f"\n\n{verdict}"
    )


def _spent_section(data: Mapping[str, Any]) -> str:
    """Where the time goes: kinds of work, and the slowest sites. Reports of older runs have none."""
    spent = data.get("time_spent") or []
    if not spent:
        return ""
    parts = ["## Where the time goes", "ONNX Runtime's profile of the compressed graphs; milliseconds in one run."]
    for graph in spent:
        predicted = "" if graph["predicted_ms"] is None else f", predicted {graph['predicted_ms']:.3f} ms"
        parts.append(f"**{graph['setting']}**: measured {graph['measured_ms']:.3f} ms{predicted}.")
        if graph["note"]:
            parts.append(graph["note"])
        kinds = [row for row in graph["rows"] if row["scope"] == "kind"]
        sites = [row for row in graph["rows"] if row["scope"] == "site"]
        parts.append(table(("kind of work", "predicted", "measured"), [_spent_row(row) for row in _slowest(kinds)]))
        if sites:
            shown = _slowest(sites)[:SLOWEST_SITES]
            parts.append(table(("slowest sites", "predicted", "measured"), [_spent_row(row) for row in shown]))
    return "\n\n".join(parts)


def _slowest(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: -(row["measured_ms"] or row["predicted_ms"] or 0.0))


def _spent_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["name"], *("-" if row[k] is None else f"{row[k]:.3f}" for k in ("predicted_ms", "measured_ms"))


def _export_section(data: Mapping[str, Any]) -> str:
    export, parity = data["export"], data["parity"]
    if export is None or parity is None:
        return "## Export\n\nNot exported."
    worst = max(parity["errors"].values(), default=0.0)
    lines = [
        f"{', '.join(export['files'])}: {format_amount(export['bytes'], 'bytes')} on disk, "
        f"{export['bytes'] / export['parameter_bytes']:.3f} of the unique parameter bytes; "
        f"{export['target']}, {export['dtype']}.",
        f"Verified in ONNX Runtime: {len(parity['errors'])} settings, largest difference {worst:.2g} "
        f"(tolerance {parity['tolerance']:.2g}); {parity['identical']} of {parity['sequences']} greedy generations "
        f"of {parity['new_tokens']} tokens identical.",
    ]
    if export.get("quantization"):  # reports of older runs say nothing about it
        lines += ["", *(f"- {line}" for line in quantization_lines(export["quantization"])), ""]
    if export.get("rewrites"):
        lines += ["", *(f"- {line}" for line in export["rewrites"]), ""]
    if export["unmapped_sites"]:
        lines.append(f"No node could be mapped back to: {', '.join(export['unmapped_sites'])}.")
    return "## Export\n\n" + "\n".join(lines).rstrip()


def _sites_section(data: Mapping[str, Any]) -> str:
    rows = [
        (s["site"], s["form"], f"{s['cost'] / s['dense_cost']:.3f}" if s["dense_cost"] else "-",
         "-" if s["damage"] is None else f"{s['damage']:.5f}", s.get("note", ""))  # older reports have none
        for s in data["sites"]
    ]  # fmt: skip
    text = "## Sites\n\n" + table(("site", "form", "kept", "damage", "note"), rows)
    if data["excluded"]:
        text += f"\n\nExcluded from the budget: {', '.join(data['excluded'])}."
    return text


def _stages_section(data: Mapping[str, Any]) -> str:
    rows = [(s["stage"], f"{s['seconds']:.1f}", s["summary"].replace("|", "/")) for s in data["stages"]]
    refusals = [f"- {s['stage']}: {refusal}" for s in data["stages"] for refusal in s["refusals"]]
    text = "## Stages\n\n" + table(("stage", "seconds", "what it did"), rows)
    return text + ("\n\nLeft alone:\n\n" + "\n".join(dict.fromkeys(refusals)) if refusals else "")
