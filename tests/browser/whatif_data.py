"""What-if analyses made in code: the JSON of schema 1, as random as a page's tests need and as real as it looks.

The numbers follow a roofline on sites of a Llama shape, so that pictures of them are worth looking at. They are not
the package's cost model: a page must show what it is given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Analysis = dict[str, Any]

OTHER_WORK = 0.045  # attention and norms, as a share of the time of the projections

DEVICES = [
    {"name": "h200", "title": "NVIDIA H200 SXM", "measured": False, "source": "datasheet, 2024", "dtype": "float16",
     "peak_flops": 9.89e14, "bandwidth": 4.8e12, "launch_ns": 2500, "memory_bytes": 1.41e11},
    {"name": "a100", "title": "NVIDIA A100 SXM 80 GB", "measured": False, "source": "datasheet, 2021",
     "dtype": "float16", "peak_flops": 3.12e14, "bandwidth": 2.039e12, "launch_ns": 3000, "memory_bytes": 8.0e10},
    {"name": "this", "title": "This machine (16 cores, AVX-512)", "measured": True, "source": "blora calibrate",
     "dtype": "float32", "peak_flops": 1.9e12, "bandwidth": 8.2e10, "launch_ns": 1800, "memory_bytes": 1.28e11},
]  # fmt: skip

WORKLOADS = [
    {"name": "prefill 1x2048", "parts": [
        {"weight": 1, "phase": "prefill", "batch": 1, "tokens": 2048, "context": 0}]},
    {"name": "decode 8@4096", "parts": [
        {"weight": 1, "phase": "decode", "batch": 8, "tokens": 1, "context": 4096}]},
    {"name": "prefill 1x2048 + 256 decode 1@2176", "parts": [
        {"weight": 1, "phase": "prefill", "batch": 1, "tokens": 2048, "context": 0},
        {"weight": 256, "phase": "decode", "batch": 1, "tokens": 1, "context": 2176}]},
]  # fmt: skip

# role -> (in, out) as multiples of the width
ROLES = {
    "self_attn.q_proj": (1.0, 1.0),
    "self_attn.k_proj": (1.0, 0.125),
    "self_attn.v_proj": (1.0, 0.125),
    "self_attn.o_proj": (1.0, 1.0),
    "mlp.gate_proj": (1.0, 3.5),
    "mlp.up_proj": (1.0, 3.5),
    "mlp.down_proj": (3.5, 1.0),
}

SHARED_INPUT = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv")
SHARED_INPUT |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up")


def make_analysis(
    seed: int = 0,
    *,
    model: str = "Llama-3-70B shape",
    layers: int = 80,
    width: int = 8192,
    budgets: Sequence[str] = tuple(f"{5 * step / 100:g}" for step in range(1, 21)),
    devices: Sequence[Mapping[str, Any]] = tuple(DEVICES),
    workloads: Sequence[Mapping[str, Any]] = tuple(WORKLOADS),
    damage: bool = True,
    floor: Callable[[str, str], float] = lambda device, workload: 0.12 if "decode" in workload else 0.06,
) -> Analysis:
    """A full analysis; budgets below `floor(device, workload)` are infeasible."""
    draw = random.Random(seed)
    sites = [_site(layer, role, width) for layer in range(layers) for role in ROLES]
    if layers:
        sites.append({"name": "lm_head", "layer": None, "role": "lm_head", "in": width, "out": 16 * width,
                      "group": "lm_head", "break_even": 16 * width // 17})  # fmt: skip
    needs = [_need(site, layers, draw) for site in sites]
    return {
        "schema": 1, "model": model, "metric": "flops", "scope": "sites",
        "damage_kind": "two-sided" if damage else "prior", "damage_unit": "nats per token",
        "sites": sites, "devices": [dict(d) for d in devices], "workloads": [dict(w) for w in workloads],
        "budgets": list(budgets),
        "points": [
            _point(sites, needs, device, workload, budget, floor(device["name"], workload["name"]), damage)
            for device in devices for workload in workloads for budget in budgets
        ],
        "smallest": [
            {"device": d["name"], "workload": w["name"], "fraction": floor(d["name"], w["name"]) * 0.9871}
            for d in devices for w in workloads
        ],
    }  # fmt: skip


def _site(layer: int, role: str, width: int) -> dict[str, Any]:
    into, out = (int(share * width) for share in ROLES[role])
    group = f"model.layers.{layer}.{SHARED_INPUT.get(role, role)}"
    return {"name": f"model.layers.{layer}.{role}", "layer": layer, "role": role, "in": into, "out": out,
            "group": group, "break_even": into * out // (into + out)}  # fmt: skip


def _need(site: Mapping[str, Any], layers: int, draw: random.Random) -> float:
    """How much of its cost a site deserves: the ends of the model and its values, keys and downs more."""
    if site["layer"] is None:
        return 0.0
    depth = site["layer"] / max(layers - 1, 1)
    ends = 0.55 + 1.5 * (2 * depth - 1) ** 6 + 0.35 * (1 - depth)
    role = {"v_proj": 1.7, "k_proj": 0.8, "q_proj": 0.75, "o_proj": 1.15, "down_proj": 1.3}
    return ends * role.get(site["role"].split(".")[-1], 1.0) * draw.uniform(0.82, 1.22)


def _point(sites, needs, device, workload, budget, floor, damage) -> dict[str, Any]:
    key = {"device": device["name"], "workload": workload["name"], "budget": budget}
    if float(budget) < floor:
        reason = f"the sites that stay dense alone need {floor * 0.9871:.4f} of the baseline, above {budget}"
        return {**key, "feasible": False, "reason": reason} | dict.fromkeys(_FIELDS)
    forms = _forms(sites, needs, float(budget))
    dense = [-1 if form is not None else None for form in forms]
    now, before = _measure(sites, forms, device, workload), _measure(sites, dense, device, workload)
    counted = [i for i, form in enumerate(forms) if form is not None]
    fraction = now["sites_flops"] / before["sites_flops"] if counted else 1.0
    return {
        **key, "feasible": True, "reason": None, "fraction": fraction, "gap": 3.1e-5 * (1 - fraction),
        "damage": 0.021 * (1 / fraction - 1) ** 1.4 if damage else None,
        **{name: now[name] for name in ("flops", "bytes", "params", "ms", "sites_flops", "sites_ms")},
        **{f"{name}_dense": before[name] for name in ("flops", "bytes", "params", "ms", "sites_flops", "sites_ms")},
        "phases": [
            {**a, "ms_dense": b["ms"], "tokens_per_s_dense": b["tokens_per_s"]}
            for a, b in zip(now["phases"], before["phases"], strict=True)
        ],
        "speedup": before["ms"] / now["ms"],
        "peak_memory_bytes": now["memory"], "peak_memory_bytes_dense": before["memory"],
        "fits": now["memory"] <= device["memory_bytes"],
        "binds": now["binds"], "changed": sum(forms[i] != -1 for i in counted), "forms": forms,
        "intensity": now["intensity"],
    }  # fmt: skip


_FIELDS = (
    "fraction", "gap", "damage", "flops", "flops_dense", "bytes", "bytes_dense", "params", "params_dense",
    "sites_flops", "sites_flops_dense", "ms", "ms_dense", "sites_ms", "sites_ms_dense", "phases", "speedup",
    "peak_memory_bytes", "peak_memory_bytes_dense", "fits", "binds", "changed", "forms", "intensity",
)  # fmt: skip


def _forms(sites, needs, budget: float) -> list[int | None]:
    """Ranks in steps of 64, dense where a site would keep over 0.9 of its cost; two branches go when it is tight."""

    def share(need: float, scale: float) -> float:
        kept = need * scale
        return 1.0 if kept > 0.9 else kept

    weights = [site["in"] * site["out"] * (site["layer"] is not None) for site in sites]
    low, high = 0.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        spent = sum(share(need, middle) * weight for need, weight in zip(needs, weights, strict=True))
        low, high = (middle, high) if spent <= budget * sum(weights) else (low, middle)
    forms: list[int | None] = []
    deepest = max((site["layer"] or 0 for site in sites), default=0)
    for site, need in zip(sites, needs, strict=True):
        if site["layer"] is None:
            forms.append(None)
        elif budget < 0.3 and "self_attn" in site["role"] and site["layer"] in (deepest * 5 // 8, deepest * 3 // 4):
            forms.append(0)
        elif share(need, low) == 1.0 or budget >= 1:
            forms.append(-1)
        else:
            step = min(64, site["break_even"])
            forms.append(max(step, round(share(need, low) * site["break_even"] / step) * step))
    return forms


def _measure(sites, forms, device, workload) -> dict[str, Any]:
    """Counts and roofline times of the whole workload."""
    size = 2 if device["dtype"] == "float16" else 4
    weights = [_weights(site, form) for site, form in zip(sites, forms, strict=True)]
    total: dict[str, Any] = {"flops": 0, "sites_flops": 0, "sites_ms": 0.0, "ms": 0.0, "phases": []}
    binds = {"compute": 0.0, "bandwidth": 0.0, "launch": 0.0}
    intensity: list[list[Any] | None] = [None] * len(sites)
    for part in workload["parts"]:
        rows = part["batch"] * part["tokens"]
        ms = 0.0
        for index, (site, form, count) in enumerate(zip(sites, forms, weights, strict=True)):
            kernels = 0 if form == 0 else 2 if form and form > 0 else 1
            flops = 2 * rows * count
            moved = size * (count + rows * (site["in"] + site["out"] + max(form or 0, 0) * 2))
            times = {"compute": flops / device["peak_flops"] / 0.82, "bandwidth": moved / device["bandwidth"] / 0.9,
                     "launch": kernels * device["launch_ns"] * 1e-9 * (1 + rows / 4096)}  # fmt: skip
            what = max(times, key=lambda name: times[name])
            seconds = times[what] + times["launch"] * 0.4
            ms += seconds * 1e3
            binds[what] += seconds * 1e3 * part["weight"]
            total["flops"] += flops * part["weight"]
            if form is not None:
                total["sites_flops"] += flops * part["weight"]
                if form != 0:
                    intensity[index] = [flops / moved, flops / seconds, what]
        total["sites_ms"] += ms * part["weight"]
        ms *= 1 + OTHER_WORK
        ms += 1e-6
        total["ms"] += ms * part["weight"]
        total["phases"].append({"phase": part["phase"], "weight": part["weight"], "ms": ms,
                                "tokens_per_s": rows / ms * 1e3})  # fmt: skip
    spent = sum(binds.values()) or 1.0
    params = sum(weights) + 1_052_770_304
    cache = max(p["batch"] * (p["tokens"] + p["context"]) for p in workload["parts"]) * len(sites) * 600
    return total | {
        "params": params, "bytes": params * size, "memory": params * size + cache * size + 123_456_789,
        "binds": {name: value / spent for name, value in binds.items()}, "intensity": intensity,
    }  # fmt: skip


def _weights(site, form) -> int:
    dense = site["in"] * site["out"]
    return dense if form in (-1, None) else form * (site["in"] + site["out"])
