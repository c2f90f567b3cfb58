"""What-if on tiny configs: every number against the cost models, or against the arithmetic written out here."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from blora_compiler.cost_models.devices import FOLDER
from blora_compiler.cost_models.flops import FlopsCostModel
from blora_compiler.cost_models.prediction import Predictor

import blora_compiler as blora
from blora_compiler import analysis, cli
from blora_compiler.analysis import WhatIf
from blora_compiler.clocks import in_dtype, target_of
from blora_compiler.errors import BadInput
from blora_compiler.outline import Outline, outline
from blora_compiler.profiling import profile
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Factored, Form, Mix, Removed, Site, Workload
from blora_compiler.workloads import parse_workload
from tests.models import build
from tests.planning import SmoothDamage

LAYERS, HIDDEN, WIDE, HEADS, KV_HEADS, HEAD, VOCAB = 3, 64, 160, 4, 2, 16, 128
BUDGETS = (0.3, 0.5, 1.0)
DEVICES = ("h200", "cpu-amx")
WORKLOADS = ("prefill 1x64", "decode 2@32", "prefill 1x32 + 8 decode steps")
WIDTH = {"h200": 2, "cpu-amx": 4}  # bytes of an element in the dtype each runs


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {
        "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


@lru_cache
def shape() -> Outline:
    return outline(llama_config())


OUTLINES: dict[str, Outline] = {}


@pytest.fixture(autouse=True, scope="module")
def _each_config_is_traced_once() -> Iterator[None]:
    """Tracing takes a second and does not depend on what is asked."""

    def outlined(model: Any, inputs: Any = None) -> Outline:
        key = str(model) if isinstance(model, str | Path) else repr(model)
        if key not in OUTLINES:
            OUTLINES[key] = outline(model, inputs)
        return OUTLINES[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "outline", outlined)
        yield


@pytest.fixture(scope="module")
def answers() -> WhatIf:
    return blora.whatif(llama_config(), BUDGETS, DEVICES, WORKLOADS, rank_multiple=4)


@pytest.fixture(scope="module")
def removing() -> WhatIf:
    """The same with a damage by site, as if it were measured: where it is, whole branches may go."""
    return blora.whatif(llama_config(), (0.05, 0.3, 1.0), DEVICES, WORKLOADS, rank_multiple=4, profile=SmoothDamage())


@pytest.fixture
def solved(answers, removing) -> list[tuple[Mapping[str, Any], Any]]:
    return [*every_point(answers), *every_point(removing)]


def every_point(answers: WhatIf) -> list[tuple[Mapping[str, Any], Any]]:
    """Each feasible point and the plan behind it."""
    keys = ("device", "workload", "budget")
    return [(p, answers.plans[tuple(p[k] for k in keys)]) for p in answers.data["points"] if p["feasible"]]


def workload_of(point: Mapping[str, Any]) -> Any:
    return in_dtype(parse_workload(point["workload"]), target_of(point["device"]).device.dtype)


# ── The schema ───────────────────────────────────────────────────────────────────────────────────────────────────

NUMBER = (int, float)
TYPES: dict[str, Any] = {
    "device": str, "workload": str, "budget": str, "feasible": bool, "reason": type(None), "fraction": float,
    "gap": float, "damage": type(None), "flops": int, "flops_dense": int, "bytes": int, "bytes_dense": int,
    "params": int, "params_dense": int, "sites_flops": int, "sites_flops_dense": int, "ms": float, "ms_dense": float,
    "sites_ms": float, "sites_ms_dense": float, "phases": list, "speedup": float, "peak_memory_bytes": int,
    "peak_memory_bytes_dense": int, "fits": bool, "binds": dict, "changed": int, "forms": list, "intensity": list,
}  # fmt: skip
SITE = {"name": str, "layer": (int, type(None)), "role": str, "in": int, "out": int, "group": str, "break_even": int}
DEVICE = {"name": str, "title": str, "measured": bool, "source": str, "dtype": str, "peak_flops": NUMBER,
          "bandwidth": NUMBER, "launch_ns": NUMBER, "memory_bytes": NUMBER}  # fmt: skip
PART = {"weight": int, "phase": str, "batch": int, "tokens": int, "context": int}
PHASE = {"phase": str, "weight": int, "ms": float, "ms_dense": float, "tokens_per_s": float,
         "tokens_per_s_dense": float}  # fmt: skip


def assert_typed(record: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    assert record.keys() == types.keys()
    wrong = {name: record[name] for name, kind in types.items() if not isinstance(record[name], kind)}
    assert wrong == {}


def test_every_field_is_there_and_typed(answers):
    data = json.loads(answers.to_json())
    assert data == answers.data
    assert {name: data[name] for name in ("schema", "model", "metric", "scope", "damage_kind", "damage_unit")} == {
        "schema": 1, "model": "llama config", "metric": "flops", "scope": "sites", "damage_kind": "prior",
        "damage_unit": "none",
    }  # fmt: skip
    assert data["budgets"] == ["0.3", "0.5", "1.0"]
    for site in data["sites"]:
        assert_typed(site, SITE)
    for device in data["devices"]:
        assert_typed(device, DEVICE)
    for workload in data["workloads"]:
        for part in workload["parts"]:
            assert_typed(part, PART)
    for point in data["points"]:
        assert_typed(point, TYPES)
        assert [type(code) for code in point["forms"]] == [int] * (len(data["sites"]) - 1) + [type(None)]
        for phase in point["phases"]:
            assert_typed(phase, PHASE)
    for entry in data["smallest"]:
        assert_typed(entry, {"device": str, "workload": str, "fraction": float})


def test_points_come_by_device_workload_and_rising_budget():
    answers = blora.whatif(llama_config(), (1.0, "30%", 0.5), DEVICES, WORKLOADS)
    order = [(p["device"], p["workload"], p["budget"]) for p in answers.data["points"]]
    names = ("prefill 1x64", "decode 2@32", "prefill 1x32 + 8 decode 1@35")
    assert order == [(d, w, b) for d in DEVICES for w in names for b in ("30%", "0.5", "1.0")]
    assert [workload["name"] for workload in answers.data["workloads"]] == list(names)
    assert [(s["device"], s["workload"]) for s in answers.data["smallest"]] == [
        (d, w) for d in DEVICES for w in names
    ]


def test_sites_are_named_by_layer_and_role(answers):
    sites = answers.data["sites"]
    assert sites[7] == {
        "name": "model.layers.1.self_attn.q_proj", "layer": 1, "role": "self_attn.q_proj", "in": 64, "out": 64,
        "group": sites[8]["group"], "break_even": 32,
    }  # fmt: skip
    assert (sites[-1]["name"], sites[-1]["layer"], sites[-1]["role"]) == ("lm_head", None, "lm_head")
    assert len(sites) == 7 * LAYERS + 1


def test_a_point_is_found_by_what_was_asked(answers):
    first = answers.data["points"][0]
    assert answers.point(0.3) == answers.point("0.3", "h200", WORKLOADS[0]) == answers.point("30%") == first
    assert answers.point(1)["budget"] == "1.0"
    steps = answers.point(0.5, "h200", "prefill 1x32 + 8 decode steps")
    assert steps["workload"] == "prefill 1x32 + 8 decode 1@35"
    assert answers.point(1.0, "cpu-amx", "decode 2@32")["device"] == "cpu-amx"
    with pytest.raises(BadInput) as error:
        answers.point(0.4, "h200", "decode 2@32")
    assert str(error.value) == (
        "no point at budget 0.4 for 'decode 2@32' on h200; budgets are 0.3, 0.5, 1.0, devices h200, cpu-amx, "
        "workloads 'prefill 1x64', 'decode 2@32', 'prefill 1x32 + 8 decode 1@35'"
    )


# ── Counts ───────────────────────────────────────────────────────────────────────────────────────────────────────

PER_LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * HEAD + 3 * HIDDEN * WIDE  # weights of its projections
NORMS = (2 * LAYERS + 1) * HIDDEN


def dense_flops(batch: int, tokens: int, context: int) -> int:
    """Projections, head, and the two products of attention in every layer."""
    rows, keys = batch * tokens, context + tokens
    attention = 4 * batch * HEADS * tokens * keys * HEAD
    return 2 * rows * (LAYERS * PER_LAYER + HIDDEN * VOCAB) + LAYERS * attention


@pytest.mark.parametrize("device", DEVICES)
def test_dense_counts_by_hand(answers, device):
    flops = {
        "prefill 1x64": dense_flops(1, 64, 0),
        "decode 2@32": dense_flops(2, 1, 32),
        "prefill 1x32 + 8 decode 1@35": dense_flops(1, 32, 0) + 8 * dense_flops(1, 1, 35),
    }
    params = LAYERS * PER_LAYER + VOCAB * HIDDEN + NORMS  # the head is the embedding: stored once
    rows = {"prefill 1x64": 64, "decode 2@32": 2, "prefill 1x32 + 8 decode 1@35": 40}
    for workload, total in flops.items():
        point = answers.point(1.0, device, workload)
        assert point["flops"] == point["flops_dense"] == total
        assert point["params"] == point["params_dense"] == params
        assert point["bytes"] == point["bytes_dense"] == WIDTH[device] * params
        assert point["sites_flops"] == point["sites_flops_dense"] == 2 * rows[workload] * LAYERS * PER_LAYER


def site_cost(site: Site, form: Form, workload: Any) -> tuple[int, int, int]:
    """FLOPs over all parts, and bytes and parameters, which are stored once."""
    model = FlopsCostModel()
    costs = [(weight, model.cost(site, form, part)) for weight, part in workload.parts]
    return sum(weight * cost.flops for weight, cost in costs), costs[0][1].weight_bytes, costs[0][1].params


def test_compressed_counts_are_dense_ones_less_what_the_forms_save(solved):
    for point, plan in solved:
        workload = workload_of(point)
        saved = [0, 0, 0]
        for site in shape().sites[:-1]:
            dense, now = (site_cost(site, form, workload) for form in (Dense(), plan.forms[site.name]))
            saved = [total + a - b for total, a, b in zip(saved, dense, now, strict=True)]
        of_sites = saved[0]
        gone = {site.branch for site in shape().sites[:-1] if plan.forms[site.name] == Removed()}
        for operator in shape().operators:  # what a branch does beside its projections goes with it
            if any(operator.name.startswith(f"{branch}.") for branch in gone):
                costs = [(weight, FlopsCostModel().operator_cost(operator, part)) for weight, part in workload.parts]
                saved[0] += sum(weight * cost.flops for weight, cost in costs)
        assert (saved[0] > of_sites) == any(branch.endswith("self_attn") for branch in gone)
        for name, less in zip(("flops", "bytes", "params"), saved, strict=True):
            assert point[f"{name}_dense"] - point[name] == less
        assert point["sites_flops_dense"] - point["sites_flops"] == of_sites
        assert point["fraction"] == plan.fraction == point["sites_flops"] / point["sites_flops_dense"]
        assert plan.fraction <= float(point["budget"]) and point["gap"] == plan.gap <= 1e-4


def test_forms_are_those_of_the_plan(solved):
    for point, plan in solved:
        for site, code in zip(shape().sites, point["forms"], strict=True):
            match plan.forms.get(site.name):
                case None:
                    assert (site.name, code) == ("lm_head", None)
                case Dense():
                    assert code == -1
                case Removed():
                    assert code == 0
                case Factored(rank):
                    assert code == rank < site.break_even_rank
        assert point["changed"] == sum(form != Dense() for form in plan.forms.values())
    codes = {code for point, _ in solved for code in point["forms"]}
    assert {-1, 0, None} <= codes and max(code or 0 for code in codes) > 0


def test_a_guess_never_removes_a_branch_and_a_measure_may(answers, removing):
    removed = [[0 in point["forms"] for point, _ in every_point(each)] for each in (answers, removing)]
    assert not any(removed[0]) and any(removed[1])
    assert [each.data["damage_kind"] for each in (answers, removing)] == ["prior", "two-sided"]
    damages = [point["damage"] for point, _ in every_point(removing)[: len(BUDGETS)]]
    assert damages[0] > damages[1] > damages[2] == 0.0


def test_on_flops_the_device_decides_the_time_alone(answers):
    alike = ("budget", "fraction", "gap", "flops", "flops_dense", "params", "sites_flops", "forms", "changed")
    for name in (workload["name"] for workload in answers.data["workloads"]):
        for budget in BUDGETS:
            first, second = (answers.point(budget, device, name) for device in DEVICES)
            assert {k: first[k] for k in alike} == {k: second[k] for k in alike}
            assert second["bytes"] == 2 * first["bytes"] and second["ms"] != first["ms"]


# ── Time and memory ──────────────────────────────────────────────────────────────────────────────────────────────


def test_times_are_the_predictors(solved):
    for point, plan in solved:
        workload = workload_of(point)
        predictor = Predictor(shape().sites, shape().operators, workload, target_of(point["device"]).clock, True)
        now, dense = predictor.predict(plan.forms), predictor.predict({})
        assert (point["ms"], point["ms_dense"]) == (now.milliseconds, dense.milliseconds)
        assert (point["sites_ms"], point["sites_ms_dense"]) == (now.site_milliseconds, dense.site_milliseconds)
        assert point["speedup"] == point["ms_dense"] / point["ms"]
        assert point["binds"] == now.binds and sum(point["binds"].values()) == pytest.approx(1, rel=1e-12)
        assert sum(phase["weight"] * phase["ms"] for phase in point["phases"]) == pytest.approx(
            point["ms"], rel=1e-12
        )
        for phase, (weight, part) in zip(point["phases"], workload.parts, strict=True):
            assert (phase["phase"], phase["weight"]) == (part.phase, weight)
            for kind in ("", "_dense"):
                rate = 1e3 * part.batch * part.tokens / phase[f"ms{kind}"]
                assert phase[f"tokens_per_s{kind}"] == pytest.approx(rate, rel=1e-12)


def test_keeping_everything_changes_nothing(solved):
    for point, plan in solved:
        if point["budget"] == "1.0":
            assert point["speedup"] == 1.0 and point["fraction"] == 1.0 and point["changed"] == 0
            pairs = [name for name in TYPES if f"{name}_dense" in TYPES]
            assert {name: point[name] for name in pairs} == {name: point[f"{name}_dense"] for name in pairs}
            assert all(phase["ms"] == phase["ms_dense"] for phase in point["phases"])
            assert plan.objective == 0.0


def test_what_a_site_reaches(solved):
    """One site alone in its group, its GEMMs written out."""
    o_proj = [site.name for site in shape().sites].index("model.layers.1.self_attn.o_proj")
    clock = target_of("h200").clock
    for point, plan in solved:
        found = point["intensity"][o_proj]
        form = plan.forms["model.layers.1.self_attn.o_proj"]
        if form == Removed():
            assert found is None
            continue
        if (point["device"], point["workload"]) != ("h200", "prefill 1x64"):
            continue
        from blora_compiler.cost_models.kernels import gemm

        inner = form.rank if isinstance(form, Factored) else None
        kernels = (
            [gemm(64, 64, inner, "sites"), gemm(64, inner, 64, "sites")] if inner else [gemm(64, 64, 64, "sites")]
        )
        moved = 2 * sum(kernel.weights + kernel.activations for kernel in kernels)
        flops = sum(kernel.flops for kernel in kernels)
        seconds = 1e-9 * sum(clock.time_ns(kernel, "float16") for kernel in kernels)
        assert found == [pytest.approx(flops / moved), pytest.approx(flops / seconds), "launch"]
        assert point["intensity"][-1] is None  # the head is excluded


@pytest.mark.parametrize("device", DEVICES)
def test_peak_memory_of_grouped_queries_by_hand(answers, device):
    """Weights, keys and values of all layers, and the widest kernel: the gate and up outputs being split."""
    width = WIDTH[device]
    for workload, rows, cached in (("prefill 1x64", 64, 64), ("decode 2@32", 2, 2 * 33)):
        point = answers.point(1.0, device, workload)
        cache = LAYERS * 2 * cached * KV_HEADS * HEAD
        widest = max(2 * rows * 2 * WIDE, cached * HEAD * 2 * KV_HEADS + rows * 2 * HIDDEN)
        assert point["peak_memory_bytes"] == point["bytes"] + width * (cache + widest)
        assert point["fits"]
    mixed = answers.point(1.0, device, "prefill 1x32 + 8 decode 1@35")
    most = max(36 * KV_HEADS * HEAD * 2 * LAYERS + max(4 * WIDE, 2 * 36 * KV_HEADS * HEAD + 2 * HIDDEN),
               32 * KV_HEADS * HEAD * 2 * LAYERS + 2 * 32 * 2 * WIDE)  # fmt: skip
    assert mixed["peak_memory_bytes"] == mixed["bytes"] + width * most


def test_the_cache_holds_as_many_heads_as_there_are_keys():
    grouped, full = (
        blora.whatif(llama_config(num_key_value_heads=heads), [1.0], "h200", "decode 4@200").point(1.0)
        for heads in (2, 4)
    )
    for point, heads in ((grouped, 2), (full, 4)):
        cached = 4 * 201 * heads * HEAD * 2
        widest = max(4 * 4 * WIDE, cached + 4 * 2 * HIDDEN)
        assert point["peak_memory_bytes"] - point["bytes"] == 2 * (LAYERS * cached + widest)


def test_a_device_that_is_too_small_is_said(tmp_path):
    profile_of_h200 = json.loads((FOLDER / "h200.json").read_text())
    tight = {**profile_of_h200, "name": "tight", "memory_bytes": 10_000_000}
    (tmp_path / "tight.json").write_text(json.dumps(tight))
    answers = blora.whatif(
        llama_config(hidden_size=512, intermediate_size=1536), [0.2, 1.0], tmp_path / "tight.json", "prefill 1x16"
    )
    small, dense = answers.point(0.2), answers.point(1.0)
    assert small["peak_memory_bytes"] < 10_000_000 < dense["peak_memory_bytes"]
    assert (small["fits"], dense["fits"]) == (True, False)
    assert answers.table().count("(too much)") == 1


# ── Mixtures of experts ──────────────────────────────────────────────────────────────────────────────────────────


def test_experts_count_by_the_share_that_is_routed_to_them():
    from transformers import MixtralConfig

    experts, chosen = 4, 2
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=VOCAB, max_position_embeddings=256, num_local_experts=experts,
        num_experts_per_tok=chosen, tie_word_embeddings=False, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    answers = blora.whatif(config, [0.5, 1.0], "h200", ["prefill 1x64", "decode 1@32"])
    projections = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * HEAD
    expert = 3 * HIDDEN * WIDE
    for workload, tokens, keys in (("prefill 1x64", 64, 64), ("decode 1@32", 1, 33)):
        point = answers.point(1.0, workload=workload)
        a_layer = 2 * tokens * (projections + HIDDEN * experts + chosen * expert) + 4 * HEADS * tokens * keys * HEAD
        assert point["flops"] == 2 * a_layer + 2 * tokens * HIDDEN * VOCAB
        assert point["sites_flops"] == 2 * 2 * tokens * projections
        held = 2 * (projections + HIDDEN * experts + experts * expert + 2 * HIDDEN)
        assert point["params"] == held + 2 * VOCAB * HIDDEN + HIDDEN
        assert point["bytes"] == 2 * point["params"]
    assert len(answers.data["refusals"]) >= 1 and "experts" in " ".join(answers.data["refusals"])


# ── Budgets ──────────────────────────────────────────────────────────────────────────────────────────────────────


def wide_config() -> Any:
    """Wide enough for the projections to take most of the time on any device."""
    return llama_config(
        hidden_size=4096, intermediate_size=11264, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2
    )


def test_budgets_in_milliseconds():
    dense = blora.whatif(wide_config(), [1.0], "cpu-amx", "prefill 1x256").point(1.0)["ms_dense"]
    asked = [f"{share * dense:.6f}ms" for share in (0.5, 0.7, 1.01)]
    timed = blora.whatif(wide_config(), asked[::-1], "cpu-amx", "prefill 1x256", scope="model")
    assert (timed.data["metric"], timed.data["budgets"]) == ("latency", asked)
    for point, plan in every_point(timed):
        assert point["ms"] <= float(point["budget"][:-2])
        # With no cache that holds these weights, a plan costs what is predicted for it.
        assert point["ms"] == pytest.approx(1e-6 * plan.cost, rel=1e-12)
        assert point["fraction"] == pytest.approx(point["ms"] / point["ms_dense"], rel=1e-12)
    assert [point["ms"] / float(point["budget"][:-2]) > 0.95 for point, _ in every_point(timed)] == [True] * 3


def test_a_share_of_the_time_is_another_plan_on_each_device():
    answers = blora.whatif(wide_config(), [0.5, 0.8], DEVICES, "prefill 1x256", metric="latency")
    for budget in ("0.5", "0.8"):
        first, second = (answers.plans[device, "prefill 1x256", budget] for device in DEVICES)
        assert first.metric == second.metric == "latency"
        assert first.baseline != second.baseline and first.forms != second.forms
    for point, plan in every_point(answers):
        assert plan.fraction <= float(point["budget"])
        assert point["sites_ms"] / point["sites_ms_dense"] <= float(point["budget"]) + 0.05  # heads are counted too


def test_infeasible_points_say_why_and_nothing_else():
    answers = blora.whatif(llama_config(), [0.001, 0.9], "h200", WORKLOADS[0], rules={"*": {"min_rank": 8}})
    point = answers.point(0.001)
    smallest = answers.data["smallest"][0]["fraction"]
    assert not point["feasible"] and 0.001 < smallest < 0.9
    assert point["reason"].startswith("budget 0.001 allows ") and "(min_rank by rule '*')" in point["reason"]
    empty = set(TYPES) - {"device", "workload", "budget", "feasible", "reason"}
    assert {name: point[name] for name in empty} == dict.fromkeys(empty)
    assert set(answers.plans) == {("h200", WORKLOADS[0], "0.9")}
    # The smallest budget that is named is feasible, and the next below it is not.
    again = blora.whatif(llama_config(), [smallest, 0.999 * smallest], "h200", WORKLOADS[0],
                         rules={"*": {"min_rank": 8}})  # fmt: skip
    assert [p["feasible"] for p in again.data["points"]] == [False, True]
    rows = list(csv.DictReader(io.StringIO(answers.to_csv())))
    assert (rows[0]["feasible"], rows[0]["ms"], rows[0]["binds"], rows[0]["reason"]) == (
        "False", "", "", point["reason"],
    )  # fmt: skip
    assert "infeasible" in answers.table() and "infeasible" not in answers.table().split("0.9", 1)[1]


def test_rules_scope_and_a_mix_as_values():
    mix = Mix(((1, Workload(tokens=32)), (8, Workload("decode", 1, 1, 35))))
    answers = blora.whatif(llama_config(), [0.6], "h200", mix, rules={"*.layers.0.*": "dense", "lm_head": "compress"},
                           scope="model")  # fmt: skip
    point = answers.point(0.6)
    assert point["workload"] == WORKLOADS[2].replace("steps", "1@35")
    assert point["forms"][:7] == [-1] * 7 and point["forms"][-1] is not None
    assert point["fraction"] == pytest.approx(point["flops"] / point["flops_dense"], rel=1e-12)


def test_one_dtype_for_all_devices():
    answers = blora.whatif(llama_config(), [1.0], DEVICES, WORKLOADS[0], dtype="float32")
    assert [device["dtype"] for device in answers.data["devices"]] == ["float32", "float32"]
    assert answers.point(1.0, "h200")["bytes"] == answers.point(1.0, "cpu-amx")["bytes"]


# ── With weights, and without ────────────────────────────────────────────────────────────────────────────────────


def test_with_a_profile_damage_is_predicted():
    model = build("llama")
    program = trace(model)
    ids = torch.randint(0, 128, (4, 16))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    damages = profile(program, batches)
    answers = blora.whatif(model, [0.25, 0.5, 0.75, 1.0], "h200", "prefill 1x64", profile=damages, rank_multiple=4)
    assert (answers.data["damage_kind"], answers.data["damage_unit"]) == ("two-sided", "nats per token")
    assert answers.data["model"] == "LlamaForCausalLM"
    found = [point["damage"] for point, _ in every_point(answers)]
    assert found == [plan.damage for _, plan in every_point(answers)]
    assert found == sorted(found, reverse=True) and found[0] > 0 and found[-1] == 0.0
    for _, plan in every_point(answers):
        forms = [(site, plan.forms[site.name]) for site in program.sites if site.name in plan.forms]
        last = {site.branch: site.name for site, _ in forms}
        counted = (
            damages.damage(site, form) for site, form in forms
            if form != Dense() and (form != Removed() or last[site.branch] == site.name)
        )  # fmt: skip
        assert plan.damage == pytest.approx(sum(counted), rel=1e-9)


def test_nothing_is_allocated_for_a_config(monkeypatch):
    """A shape of 60 GB. Every tensor that becomes a parameter has to be on the meta device."""
    devices: set[str] = set()
    register = torch.nn.Module.register_parameter

    def watched(module: torch.nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None:
            devices.add(parameter.device.type)
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", watched)
    before = peak_bytes()
    answers = blora.whatif(
        llama_config(hidden_size=16384, intermediate_size=53248, num_attention_heads=128, num_key_value_heads=8,
                     num_hidden_layers=5, vocab_size=128_256, tie_word_embeddings=False),
        [0.25, 0.5], "h200", "decode 1@128",
    )  # fmt: skip
    assert devices == {"meta"}
    assert answers.point(0.5)["params_dense"] > 15e9
    assert peak_bytes() - before < 1 << 30


def peak_bytes() -> int:
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workload": "prefill 1x512"}, "workload prefill 1x512 needs 512 positions (0 cached and 512 new), "
                                        "llama config has 256; shorten the prompt or the context"),
        ({"workload": ["prefill 1x8", "decode 1@256"]}, "needs 257 positions (256 cached and 1 new)"),
        ({"workload": "prefill"}, "workload 'prefill': 'prefill' cannot be read"),
        ({"workload": []}, "an empty list of workloads was given; name at least one"),
        ({"workload": ["prefill 1x8", Workload(tokens=8)]}, "workload prefill 1x8 is listed 2 times; keep one"),
        ({"device": "h201"}, "device 'h201' is unknown; did you mean 'h200'"),
        ({"device": ("h200", "nothing.json")}, "device profile nothing.json does not exist"),
        ({"device": ()}, "an empty list of devices was given; name at least one"),
        ({"device": ["h200", "H200"]}, "device h200 is listed 2 times; keep one"),
        ({"budgets": [0.5, "12ms"]}, "the budgets are about flops and latency; give all in one metric"),
        ({"budgets": [0.5, "1MFLOP"]}, "some budgets are shares and some are amounts"),
        ({"budgets": ["12ms", "3GFLOP", "4MB"]}, "the budgets are about bytes and flops and latency"),
        ({"budgets": [0.5, 0.25, "0.5"]}, "budget 0.5 is listed 2 times; keep one"),
        ({"budgets": []}, "an empty list of budgets was given; name at least one"),
        ({"budgets": [0.5, 1.5]}, "budget 1.5 would keep more than everything"),
        ({"budgets": ["12ms"], "metric": "flops"}, "is an amount of latency, but metric='flops' was asked"),
        ({"metric": "speed"}, "metric 'speed' is unknown"),
        ({"scope": "graph"}, "scope is 'graph'; use 'sites' or 'model'"),
        ({"rules": {"*.nothing": "dense"}}, "*.nothing"),
        ({"dtype": "bfloat16", "device": "t4"}, "device 't4' has no bfloat16 arithmetic"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(change, message):
    asked: dict[str, Any] = {"budgets": [0.5], "device": "h200", "workload": "prefill 1x8"} | change
    with pytest.raises(BadInput) as error:
        blora.whatif(llama_config(), **asked)
    assert message in str(error.value)


def test_two_profiles_of_one_name_are_refused(tmp_path):
    """A user's copy of a profile with other numbers and the old name would share its answers."""
    copied = json.loads((FOLDER / "h200.json").read_text()) | {"launch_ns": 9000}
    (tmp_path / "mine.json").write_text(json.dumps(copied))
    with pytest.raises(BadInput, match="device h200 is listed 2 times; keep one"):
        blora.whatif(llama_config(), [0.5], ["h200", tmp_path / "mine.json"], "prefill 1x8", metric="latency")


# ── Printed and written ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_has_a_line_for_every_point(answers):
    text = answers.table()
    for device in answers.data["devices"]:
        for workload in answers.data["workloads"]:
            title = f"llama config: {workload['name']} on {device['title']} ({device['dtype']}, not measured"
            assert title in " ".join(text.split())
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    points = answers.data["points"]
    assert [row[0] for row in rows] == [point["budget"] for point in points]
    assert [row[1] for row in rows] == [f"{point['flops'] / point['flops_dense']:.1%}" for point in points]
    assert [row[4] for row in rows] == [f"{point['speedup']:.2f}x" for point in points]
    assert [row[8] for row in rows] == [str(point["changed"]) for point in points]


def test_csv_has_a_line_for_every_point(answers, tmp_path):
    text = answers.to_csv(tmp_path / "points.csv")
    assert (tmp_path / "points.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(answers.data["points"])
    for row, point in zip(rows, answers.data["points"], strict=True):
        numbers = [name for name, kind in TYPES.items() if kind in (int, float)]
        assert {name: float(row[name]) for name in numbers} == {name: point[name] for name in numbers}
        assert row["binds"] == max(point["binds"], key=point["binds"].get)
        assert (row["feasible"], row["damage"], row["reason"]) == ("True", "", "")


def test_json_and_html_are_written(answers, tmp_path):
    text = answers.to_json(tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text()) == json.loads(text) == answers.data
    assert answers.to_html(tmp_path / "page.html") == tmp_path / "page.html"
    assert (tmp_path / "page.html").read_text().startswith("<!")


def test_two_points_side_by_side(answers):
    text = answers.compare({"budget": 0.5}, {"budget": "0.5", "device": "cpu-amx"})
    rows = {cells[0]: cells[1:] for cells in cells_of(text)}
    first, second = answers.point(0.5), answers.point(0.5, "cpu-amx")
    assert rows["flops"] == [str(first["flops"]), str(second["flops"]), "1.000"]
    assert rows["ms"] == [f"{first['ms']:.6g}", f"{second['ms']:.6g}", f"{second['ms'] / first['ms']:.3f}"]
    assert rows["fits"] == ["True", "True", ""] and rows["damage"] == ["-", "-", ""]
    assert "h200" in text and "cpu-amx" in text and "ratio" in text


def cells_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a config and no weights."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama_config().save_pretrained(path)
    return path


@pytest.fixture
def blora_cli(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blora", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def test_the_command_prints_and_writes_what_the_api_gives(blora_cli, folder, tmp_path):
    files = [tmp_path / f"all.{kind}" for kind in ("json", "csv", "html")]
    code, out, _ = blora_cli(
        "whatif", folder, "--budgets", "0.3, 0.5,1.0", "--device", "h200", "--device", "cpu-amx",
        "--workload", WORKLOADS[0], "--workload", WORKLOADS[1], "--rank-multiple", 4, "--out", files[0],
        "--csv", files[1], "--html", files[2], "--json",
    )  # fmt: skip
    api = blora.whatif(folder, ["0.3", "0.5", "1.0"], DEVICES, WORKLOADS[:2], rank_multiple=4)
    assert code == 0
    assert json.loads(out) == json.loads(files[0].read_text()) == api.data
    assert files[1].read_text() == api.to_csv()
    assert "What if: tiny-llama" in files[2].read_text()


def test_the_command_compares_two_points(blora_cli, folder):
    asked = ("whatif", folder, "--budgets", "0.3,0.5", "--workload", WORKLOADS[0], "--workload", WORKLOADS[1])
    code, out, _ = blora_cli(*asked, "--compare", "0.3", "--compare", f"0.5; h200 ; {WORKLOADS[1]}")
    api = blora.whatif(folder, ["0.3", "0.5"], "h200", WORKLOADS[:2])
    assert code == 0
    assert out.strip() == api.compare({"budget": "0.3"}, {"budget": "0.5", "workload": WORKLOADS[1]}).strip()


def test_the_command_has_defaults_worth_printing(blora_cli, tmp_path):
    llama_config(max_position_embeddings=4096).save_pretrained(tmp_path)
    code, out, _ = blora_cli("whatif", tmp_path)
    assert code == 0
    assert len(cells_of(out)) == 2 * 19
    assert "prefill 1x2048 on NVIDIA H200" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "h201"), "device 'h201' is unknown; did you mean 'h200'"),
        (("--budgets", "0.5,12ms"), "the budgets are about flops and latency"),
        (("--budgets", "0.5,,0.6"), "budget '' is not a number"),
        (("--workload", "prefill 1x512"), "needs 512 positions"),
        (("--compare", "0.5"), "--compare was given 1 times; give it twice, once for each side"),
        (("--compare", "0.5;a;b;c", "--compare", "0.5"), "--compare '0.5;a;b;c' has 4 parts"),
        (("--budgets", "0.5", "--compare", "0.4", "--compare", "0.5"), "no point at budget 0.4"),
        (("--rule", "oops"), "write GLOB=dense"),
        (("--calibration", "nothing.txt"), "has no weights to measure damage on; leave it out"),
        (("--frobnicate",), "No such option"),
    ],
)
def test_bad_input_ends_the_command_with_2(blora_cli, folder, arguments, message):
    defaults = () if "--workload" in arguments else ("--workload", "prefill 1x8")
    code, out, err = blora_cli("whatif", folder, *defaults, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("blora: ") and message in err


def test_the_command_predicts_damage_from_a_text(blora_cli, tmp_path):
    from transformers import AutoTokenizer, LlamaForCausalLM

    from blora_compiler.source import BUNDLED_MODEL, BUNDLED_VALIDATION_TEXT

    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(vocab_size=4096, num_hidden_layers=1)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BUNDLED_MODEL).save_pretrained(tmp_path)
    code, out, _ = blora_cli(
        "whatif", tmp_path, "--budgets", "0.3,0.6", "--workload", "prefill 1x8", "--calibration",
        BUNDLED_VALIDATION_TEXT, "--json",
    )  # fmt: skip
    data = json.loads(out)
    assert code == 0 and data["damage_kind"] == "two-sided"
    low, high = (point["damage"] for point in data["points"])
    assert low > high > 0


def test_the_default_workloads_are_as_long_as_the_model_has_positions():
    names = [load["name"] for load in blora.whatif(llama_config(), [0.5]).data["workloads"]]
    assert names == ["prefill 1x256", "decode 1@255"]
    longer = blora.whatif(llama_config(max_position_embeddings=8192), [0.5])
    assert [load["name"] for load in longer.data["workloads"]] == ["prefill 1x2048", "decode 1@2048"]
    encoder = blora.whatif(build("bert").config, [0.5])
    assert [load["name"] for load in encoder.data["workloads"]] == ["prefill 1x512"]
