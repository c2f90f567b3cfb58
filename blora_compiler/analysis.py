"""What-if: what budgets would do to a model on devices and workloads, in seconds and without its weights.

    model or config -> outline -> one planning problem a workload (a device too, where time is the budget)
                    -> one sweep over all budgets -> each plan priced kernel by kernel on each device

Every point is a solved plan with a certified gap; nothing between two budgets is interpolated.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .budget import Budget
from .clocks import Target, in_dtype, target_of
from .cost_models.flops import FlopsCostModel, whole_graph_cost
from .cost_models.kernels import fused
from .cost_models.latency import LatencyCostModel, weight_bytes_read
from .cost_models.prediction import Predictor, SiteWork
from .errors import BadInput, InfeasibleBudget
from .folders import write_text
from .outline import Outline, outline
from .plan import Plan
from .problem import DamageModel, build_problem
from .profiling import Profile, prior
from .rules import RuleValue
from .solver import cheapest_cover, smallest_fraction
from .sweep import sweep
from .values import (
    AnyWorkload,
    Cost,
    Dense,
    Factored,
    Form,
    Metric,
    Operator,
    Removed,
    Scope,
    Site,
    Workload,
    format_amount,
)
from .workloads import as_workload, check_fits

SCHEMA = 1
DEFAULT_BUDGETS = tuple(round(0.05 * step, 2) for step in range(2, 21))
DEFAULT_DEVICES = ("h200",)
DEFAULT_LENGTH = 2048


def whatif(
    model: Any,
    budgets: Sequence[float | int | str] = DEFAULT_BUDGETS,
    device: str | Path | Sequence[str | Path] = DEFAULT_DEVICES,
    workload: str | AnyWorkload | Sequence[str | AnyWorkload] | None = None,
    *,
    metric: Metric | None = None,
    scope: Scope = "sites",
    rules: Mapping[str, RuleValue] | None = None,
    profile: DamageModel | None = None,
    rank_multiple: int = 8,
    dtype: str | None = None,
    inputs: Any = None,
    table: Path | None = None,
) -> WhatIf:
    """What each budget would make of a model: form by form, in FLOPs, bytes and milliseconds.

    Args:
        model: a config, a folder with or without weights, a hub id, or a module. Weights are never read.
        budgets: what to keep, each as `compile` takes it; all in one metric.
        device: one or several: a known name, the path of a profile, or `this` for the calibrated machine.
        workload: one or several, as `parse_workload` reads them or as values; a prompt of 2048 tokens and a step
            behind as many by default, or of what the model has positions for.
        metric: what a fraction is a fraction of: `flops` (default), `bytes`, `params`, or `latency`.
        scope, rules, rank_multiple: as `compile` takes them.
        profile: the damage of the model's sites, from `blora_compiler.profile`; without it plans are made with a
            spectral prior and no damage is predicted.
        dtype: of the weights; each device's own by default.
        inputs: example inputs, for modules that are no Hugging Face models.
        table: the calibration of `this` machine, where it is not kept in its usual place.

    Returns:
        A point for every device, workload and budget.

    Raises:
        BadInput: an unknown device, a workload the model has no positions for, budgets in different metrics, a name
            that is listed twice, or anything `compile` would refuse.
    """
    asked = _parsed_budgets(budgets, metric)
    targets = [target_of(name, dtype, table) for name in _listed(device, "devices")]
    _refuse_repeated("device", [target.device.name for target in targets])
    shape = outline(model, inputs)
    named = _default_workloads(shape) if workload is None else _listed(workload, "workloads")
    loads = [as_workload(load) for load in named]
    _refuse_repeated("workload", [load.name for load in loads])
    for load in loads:
        check_fits(load, shape.positions, shape.can_generate, shape.name)
    damage = _of_own_factors(profile) if profile is not None else prior(shape.sites)
    question = _Question(shape, tuple(asked), scope, dict(rules or {}), damage, rank_multiple)
    points: list[dict[str, Any]] = []
    smallest: list[dict[str, Any]] = []
    plans: dict[tuple[str, str, str], Plan] = {}
    answers: dict[Any, _Answer] = {}
    for target in targets:
        for load in loads:
            typed = in_dtype(load, dtype or target.device.dtype)
            timed = asked[0].metric == "latency"
            key = (target.device.name if timed else typed.dtype, load.name)
            if key not in answers:
                answers[key] = question.solve(typed, target if timed else None)
            pricing = _Pricing(question, target, typed)
            answer = answers[key]
            where = {"device": target.device.name, "workload": load.name}
            smallest.append({**where, "fraction": answer.smallest})
            for budget, plan in zip(asked, answer.plans, strict=True):
                points.append({**where, "budget": budget.text, **pricing.point(plan)})
                if isinstance(plan, Plan):
                    plans[target.device.name, load.name, budget.text] = plan
    damage_model = question.damage
    data = {
        "schema": SCHEMA,
        "model": shape.name,
        "metric": asked[0].metric,
        "scope": scope,
        "damage_kind": damage_model.kind,
        "damage_unit": damage_model.unit,
        "sites": [_site_record(site) for site in shape.sites],
        "devices": [_device_record(target, dtype or target.device.dtype) for target in targets],
        "workloads": [_workload_record(load) for load in loads],
        "budgets": [budget.text for budget in asked],
        "points": points,
        "smallest": smallest,
        "refusals": [str(refusal) for refusal in shape.refusals],
    }
    return WhatIf(data, plans)


@dataclass(frozen=True)
class WhatIf:
    """The answers, as data.

    Attributes:
        data: everything, as `to_json` writes it.
        plans: (device, workload, budget) names -> the plan behind the point; infeasible points have none.
    """

    data: Mapping[str, Any] = field(repr=False)
    plans: Mapping[tuple[str, str, str], Plan] = field(repr=False)

    def point(self, budget: float | str, device: str | None = None, workload: str | None = None) -> dict[str, Any]:
        """The numbers of one point.

        Args:
            budget: as it was asked, or written another way: `0.25`, `"25%"`.
            device: by name; the first one by default.
            workload: as it was asked, or by the name that came of it; the first one by default.

        Raises:
            BadInput: if there is no such point.
        """
        load = self.data["workloads"][0]["name"] if workload is None else as_workload(workload).name
        where = (device or self.data["devices"][0]["name"], load)
        wanted = _amount(budget)
        for point in self.data["points"]:
            if (point["device"], point["workload"]) == where and _amount(point["budget"]) == wanted:
                return dict(point)
        raise BadInput(
            f"no point at budget {budget} for {where[1]!r} on {where[0]}; budgets are "
            f"{', '.join(self.data['budgets'])}, devices {', '.join(d['name'] for d in self.data['devices'])}, "
            f"workloads {', '.join(repr(w['name']) for w in self.data['workloads'])}"
        )

    def table(self) -> str:
        """Every point as text, one table a device and workload."""
        return "\n".join(
            _rendered(
                f"{self.data['model']}: {workload['name']} on {device['title']} ({device['dtype']}"
                f"{'' if device['measured'] else ', not measured: from its datasheet'})",
                [
                    p
                    for p in self.data["points"]
                    if (p["device"], p["workload"]) == (device["name"], workload["name"])
                ],
            )
            for device in self.data["devices"]
            for workload in self.data["workloads"]
        )

    def compare(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
        """Two points side by side, each chosen by `budget`, `device` and `workload` as `point` takes them."""
        return _side_by_side(self.point(**first), self.point(**second))

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON; also written to `path` if one is given."""
        text = json.dumps(self.data)
        if path is not None:
            write_text(Path(path), text + "\n")
        return text

    def to_csv(self, path: str | Path | None = None) -> str:
        """One line a point; forms are left to the JSON. Also written to `path` if one is given."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, [*_COLUMNS, "binds", "reason"], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for point in self.data["points"]:
            binds = max(point["binds"], key=point["binds"].get) if point["feasible"] else ""
            writer.writerow({**point, "binds": binds})
        if path is not None:
            write_text(Path(path), stream.getvalue())
        return stream.getvalue()

    def to_html(self, path: str | Path) -> Path:
        """One page that needs nothing else, not even a network; see docs/what-if.md for what it shows."""
        from .page import render_page

        write_text(Path(path), render_page(self.data))
        return Path(path)


# ── Solving ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Answer:
    plans: list[Plan | InfeasibleBudget]
    smallest: float


@dataclass(frozen=True)
class _Question:
    """What is asked, whatever the device and the workload."""

    shape: Outline
    budgets: tuple[Budget, ...]
    scope: Scope
    rules: Mapping[str, RuleValue]
    damage: DamageModel
    rank_multiple: int

    def solve(self, workload: AnyWorkload, target: Target | None) -> _Answer:
        """Plans for all budgets, from one sweep. With a target, its time is what the budgets are about."""
        operators: Sequence[Operator] = self.shape.operators
        cost_model: Any = FlopsCostModel()
        if target is not None:
            # One price list for all budgets: that of weights that stay in no cache, as in the dense model.
            dense = weight_bytes_read(self.shape.sites, operators, {}, workload.parts[0][1])
            cost_model = LatencyCostModel(target.clock.for_working_set(dense), bool(self.shape.can_generate))
            operators = fused(operators)
        problem = build_problem(
            self.shape.sites, budget=self.budgets[0], cost_model=cost_model, damage_model=self.damage,
            workload=workload, rules=self.rules, scope=self.scope, operators=operators,
            rank_multiple=self.rank_multiple,
        )  # fmt: skip
        cheapest = problem.fixed + sum(option.cost for option in cheapest_cover(problem.options))
        return _Answer(sweep(problem, self.budgets), smallest_fraction(cheapest, problem.baseline))


class _Pricing:
    """Prices plans on one device at one workload."""

    def __init__(self, question: _Question, target: Target, workload: AnyWorkload) -> None:
        self.shape, self.target, self.workload = question.shape, target, workload
        self.predictor = Predictor(
            self.shape.sites, self.shape.operators, workload, target.clock, bool(self.shape.can_generate)
        )
        self.around = whole_graph_cost((), self.shape.operators, {}, workload)
        self.dense = self.predictor.predict({})
        self.dense_counts = self._counts({})

    def point(self, plan: Plan | InfeasibleBudget) -> dict[str, Any]:
        """Everything the schema holds about one plan."""
        if isinstance(plan, InfeasibleBudget):
            return {"feasible": False, "reason": str(plan), **dict.fromkeys(_POINT_FIELDS)}
        forms = plan.forms
        now, dense = self.predictor.predict(forms), self.dense
        counts, dense_counts = self._counts(forms), self.dense_counts
        counted = [site for site in self.shape.sites if site.name in forms]
        peak, dense_peak = (c.weight_bytes + w.running_bytes for c, w in ((counts, now), (dense_counts, dense)))
        return {
            "feasible": True,
            "reason": None,
            "fraction": plan.fraction,
            "gap": plan.gap,
            "damage": plan.damage,
            "flops": counts.flops,
            "flops_dense": dense_counts.flops,
            "bytes": counts.weight_bytes,
            "bytes_dense": dense_counts.weight_bytes,
            "params": counts.params,
            "params_dense": dense_counts.params,
            "sites_flops": whole_graph_cost(counted, (), forms, self.workload).flops,
            "sites_flops_dense": whole_graph_cost(counted, (), {}, self.workload).flops,
            "ms": now.milliseconds,
            "ms_dense": dense.milliseconds,
            "sites_ms": now.site_milliseconds,
            "sites_ms_dense": dense.site_milliseconds,
            "phases": [_phase(a, b) for a, b in zip(now.parts, dense.parts, strict=True)],
            "speedup": dense.milliseconds / now.milliseconds,
            "peak_memory_bytes": peak,
            "peak_memory_bytes_dense": dense_peak,
            "fits": peak <= self.target.device.memory_bytes,
            "binds": now.binds,
            "changed": sum(form != Dense() for form in forms.values()),
            "forms": [_code(forms.get(site.name)) for site in self.shape.sites],
            "intensity": [
                _intensity(now.work[site.name]) if site.name in forms and site.name in now.work else None
                for site in self.shape.sites
            ],
        }

    def _counts(self, forms: Mapping[str, Form]) -> Cost:
        """FLOPs of the workload, and bytes and parameters stored, of the whole graph: exact integers."""
        if any(isinstance(form, Removed) for form in forms.values()):
            return whole_graph_cost(self.shape.sites, self.shape.operators, forms, self.workload)
        return whole_graph_cost(self.shape.sites, (), forms, self.workload) + self.around


def _phase(now: tuple[int, Workload, int], dense: tuple[int, Workload, int]) -> dict[str, Any]:
    weight, part, nanoseconds = now
    new_tokens = part.batch * part.tokens
    return {
        "phase": part.phase,
        "weight": weight,
        "ms": 1e-6 * nanoseconds,
        "ms_dense": 1e-6 * dense[2],
        "tokens_per_s": 1e9 * new_tokens / nanoseconds,
        "tokens_per_s_dense": 1e9 * new_tokens / dense[2],
    }


def _intensity(work: SiteWork) -> list[Any]:
    return [work.flops / work.bytes_moved, 1e9 * work.flops / work.nanoseconds, work.binds]


def _of_own_factors(damage: DamageModel) -> DamageModel:
    """The same without first factors that sites share: an analysis shows each site by itself."""
    return replace(damage, shared={}) if isinstance(damage, Profile) else damage


def _code(form: Form | None) -> int | None:
    match form:
        case Dense():
            return -1
        case Removed():
            return 0
        case Factored(rank):
            return rank
    return None


# ── Records and tables ───────────────────────────────────────────────────────────────────────────────────────────

_COLUMNS = (
    "device", "workload", "budget", "feasible", "fraction", "gap", "damage", "flops", "flops_dense", "bytes",
    "bytes_dense", "params", "params_dense", "sites_flops", "sites_flops_dense", "ms", "ms_dense", "sites_ms",
    "sites_ms_dense", "speedup", "peak_memory_bytes", "peak_memory_bytes_dense", "fits", "changed",
)  # fmt: skip
_POINT_FIELDS = (*_COLUMNS[4:], "phases", "binds", "forms", "intensity")


def _default_workloads(shape: Outline) -> list[str]:
    positions = DEFAULT_LENGTH + 1 if shape.positions is None else shape.positions
    prompt = f"prefill 1x{min(DEFAULT_LENGTH, positions)}"
    return [prompt] if shape.can_generate is False else [prompt, f"decode 1@{min(DEFAULT_LENGTH, positions - 1)}"]


def _listed(value: Any, what: str) -> list[Any]:
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not found:
        raise BadInput(f"an empty list of {what} was given; name at least one")
    return found


def _refuse_repeated(what: str, names: Sequence[str]) -> None:
    """Points are told apart by name: two profiles that share one would share their answers too."""
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise BadInput(f"{what} {repeated} is listed {names.count(repeated)} times; keep one")


def _parsed_budgets(budgets: Sequence[float | int | str], metric: Metric | None) -> list[Budget]:
    asked = [Budget.parse(budget, metric) for budget in _listed(budgets, "budgets")]
    metrics = sorted({budget.metric for budget in asked})
    if len(metrics) > 1:
        raise BadInput(f"the budgets are about {' and '.join(metrics)}; give all in one metric")
    if len({budget.fraction is None for budget in asked}) > 1:
        raise BadInput("some budgets are shares and some are amounts, which have no order; give all in one way")
    _refuse_repeated("budget", [budget.text for budget in asked])
    return sorted(asked, key=lambda budget: budget.fraction or budget.amount or 0)


def _site_record(site: Site) -> dict[str, Any]:
    parts = site.name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return {
        "name": site.name,
        "layer": None if number is None else int(parts[number]),
        "role": site.name if number is None else ".".join(parts[number + 1 :]) or site.role,
        "in": site.in_features,
        "out": site.out_features,
        "group": site.group,
        "break_even": site.break_even_rank,
    }


def _device_record(target: Target, dtype: str) -> dict[str, Any]:
    device = target.device
    return {
        "name": device.name, "title": device.title, "measured": device.measured, "source": device.source,
        "dtype": dtype, "peak_flops": device.peak(dtype), "bandwidth": device.bandwidth,
        "launch_ns": device.launch_ns, "memory_bytes": device.memory_bytes,
    }  # fmt: skip


def _workload_record(load: AnyWorkload) -> dict[str, Any]:
    keys = ("phase", "batch", "tokens", "context")
    parts = [{"weight": weight, **{key: getattr(part, key) for key in keys}} for weight, part in load.parts]
    return {"name": load.name, "parts": parts}


def _amount(budget: float | str) -> tuple[float | None, int | None]:
    """A budget without the words it was asked in: its fraction or its amount."""
    parsed = Budget.parse(budget)
    return parsed.fraction, parsed.amount


def _rendered(title: str, points: Sequence[Mapping[str, Any]]) -> str:
    from rich.console import Console
    from rich.table import Table as RichTable

    sheet = RichTable(title=title, title_justify="left")
    columns = ("budget", "FLOPs", "weights", "ms", "speed-up", "tokens/s", "memory", "damage", "changed", "binds")
    for column in columns:
        sheet.add_column(column, justify="left" if column == "binds" else "right")
    for point in points:
        sheet.add_row(point["budget"], *(_cells(point) if point["feasible"] else ["infeasible", *[""] * 8]))
    console = Console(width=118, record=True, file=io.StringIO())
    console.print(sheet)
    return console.export_text()


def _cells(point: Mapping[str, Any]) -> list[str]:
    limit = max(point["binds"], key=lambda name: point["binds"][name])
    return [
        f"{point['flops'] / point['flops_dense']:.1%}",
        format_amount(point["bytes"], "bytes"),
        f"{point['ms']:.4g}",
        f"{point['speedup']:.2f}x",
        " / ".join(f"{phase['tokens_per_s']:.4g}" for phase in point["phases"]),
        format_amount(point["peak_memory_bytes"], "bytes") + ("" if point["fits"] else " (too much)"),
        "-" if point["damage"] is None else f"{point['damage']:.3g}",
        str(point["changed"]),
        f"{limit} {point['binds'][limit]:.0%}",
    ]


def _side_by_side(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    from rich.console import Console
    from rich.table import Table as RichTable

    sheet = RichTable(title="side by side", title_justify="left")
    for column in ("", *(f"{p['budget']}, {p['workload']}, {p['device']}" for p in (first, second)), "ratio"):
        sheet.add_column(column, justify="right" if column else "left")
    for name in _COLUMNS[4:]:
        one, two = first[name], second[name]
        both = isinstance(one, int | float) and isinstance(two, int | float) and not isinstance(one, bool) and one
        ratio = f"{two / one:.3f}" if both else ""
        sheet.add_row(
            name, *("-" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in (one, two)), ratio
        )
    console = Console(width=118, record=True, file=io.StringIO())
    console.print(sheet)
    return console.export_text()
