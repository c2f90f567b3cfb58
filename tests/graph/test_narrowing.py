"""MLPs with fewer inner channels: which go, what that damages, and that all that follows fits the narrower model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import blora_compiler as blora
from blora_compiler.distillation import DistillConfig
from blora_compiler.errors import BadInput, InfeasibleBudget
from blora_compiler.graph import main_output
from blora_compiler.layers import FactoredLinear
from blora_compiler.narrowing import Inner, Ordering, _ordered, inner_channels, narrow, order_channels, widths_at
from blora_compiler.plan import Plan
from blora_compiler.rules import resolve_rules
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Removed
from tests.models import build, example_inputs

# model -> (sites that put the channels out, the site that reads them) of its first block
MLPS = {
    "llama": (("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"), "model.layers.0.mlp.down_proj"),
    "gpt2": (("transformer.h.0.mlp.c_fc",), "transformer.h.0.mlp.c_proj"),
    "bert": (("encoder.layer.0.intermediate.dense",), "encoder.layer.0.output.dense"),
    "vit": (("vit.layers.0.mlp.fc1",), "vit.layers.0.mlp.fc2"),
}


class SideExit(nn.Module):
    """An MLP whose inner channels are also an output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        return self.down(hidden), hidden


class WidthWrittenDown(nn.Module):
    """An MLP whose forward names the width of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)).reshape(x.shape[0], x.shape[1], 32))


class CallsAgain(nn.Module):
    """An MLP whose inner channels come from the second call of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.up(x))))


class ReadsItsTable(nn.Module):
    """An MLP whose first weight is a table of embeddings too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(32, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.up.weight = self.table.weight

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.table(ids))))


def traced(name):
    torch.manual_seed(0)
    return trace(build(name), example_inputs(name))


def channels_of(program, rules=None):
    return inner_channels(program, resolve_rules(rules, program.sites))


def batches_of(program, count=4):
    torch.manual_seed(1)
    made = []
    for _ in range(count):
        made.append(
            {
                name: torch.randint(0, 100, value.shape)
                if not value.is_floating_point()
                else torch.randn(value.shape)
                for name, value in program.inputs.items()
            }
        )
        if "attention_mask" in made[-1]:
            made[-1]["attention_mask"] = torch.ones_like(program.inputs["attention_mask"])
    return made


@pytest.mark.parametrize("name", MLPS)
def test_finds_the_mlps_and_nothing_else(name):
    program = traced(name)
    found, refusals = channels_of(program)
    assert len(found) == 2
    assert (found[0].producers, found[0].consumer) == MLPS[name]
    assert found[0].width == program.site(found[0].consumer).in_features
    assert not refusals


def test_says_why_channels_stay():
    program = traced("llama")
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    for rule in ({up: "dense"}, {down: "exclude"}):
        found, refusals = channels_of(program, rule)
        assert [inner.consumer for inner in found] == ["model.layers.1.mlp.down_proj"]
        assert [refusal.site for refusal in refusals] == [down]
        assert next(iter(rule)) in refusals[0].reason
    found, refusals = channels_of(trace(SideExit(), (torch.randn(2, 4, 16),)))
    assert not found
    assert "also read by" in refusals[0].reason
    found, refusals = channels_of(traced("encoder"))
    assert not found
    assert [refusal.site for refusal in refusals] == ["layers.0.linear2", "layers.1.linear2"]
    assert "without a module" in refusals[0].reason


@pytest.mark.parametrize(
    ("net", "example", "reason"),
    [
        (CallsAgain, lambda: torch.randn(2, 4, 16), "up is called 2 times"),
        (ReadsItsTable, lambda: torch.randint(0, 32, (2, 4)), "up is tied to another weight"),
    ],
)
def test_channels_of_weights_with_another_use_stay(net, example, reason):
    found, refusals = channels_of(trace(net().eval(), (example(),)))
    assert not found
    assert [str(refusal) for refusal in refusals] == [f"down: keeps its inner channels: {reason}"]


def test_of_two_mlps_that_share_a_weight_one_is_narrowed():
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    found, refusals = channels_of(trace(net, (torch.randn(2, 4, 16),)))
    assert [inner.consumer for inner in found] == ["2"]
    assert [str(refusal) for refusal in refusals] == [
        "4: keeps its inner channels: 2 loses channels on its other side already"
    ]
    assert blora.compile(net, 0.6, inputs=(torch.randn(4, 6, 16),), narrow=0.6).plan.shapes.keys() == {"0", "2"}


def test_damages_are_those_of_the_refitted_weight():
    """Every prefix of the order, against 1/2 tr(G (W - W') H (W - W')^T) of the least-squares refit from scratch."""
    torch.manual_seed(0)
    W = torch.randn(6, 24, dtype=torch.float64)
    x = torch.randn(400, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    g = torch.randn(400, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    H, G = x.T @ x / 400, g.T @ g / 400
    inner = Inner(("up",), "down", 24, 12)
    for moment in (G, G.diagonal()):
        found = _ordered(inner, W, H, None, moment, 4)
        full = moment if moment.dim() == 2 else torch.diag(moment)
        for width in (24, 20, 16, 12, 8):
            kept = found.kept(width)
            assert len(kept) == width
            refitted = torch.zeros_like(W)
            refitted[:, kept] = torch.linalg.lstsq(x[:, kept], x @ W.T).solution.T
            off = W - refitted
            assert found.damage(width) == pytest.approx(0.5 * float((full * (off @ H @ off.T)).sum()), rel=1e-2)


def test_of_two_channels_that_are_alike_one_stays():
    """Each looks free beside the other, also within one block."""
    torch.manual_seed(0)
    x = torch.randn(1000, 16, dtype=torch.float64).repeat(1, 2)
    x += 0.01 * torch.randn(x.shape, dtype=torch.float64)
    W = torch.randn(8, 32, dtype=torch.float64)
    found = _ordered(Inner(("up",), "down", 32, 16), W, x.T @ x / 1000, None, torch.eye(8).double(), 8)
    kept = found.kept(16)
    assert sorted((kept % 16).tolist()) == list(range(16))
    assert found.damage(16) < 0.01 * found.damage(8)


def test_one_price_for_all():
    """Blocks go where they damage least per weight, never out of order, and as many as the share says."""

    def ordering(name, damages, each=10):
        inner = Inner((f"{name}.up",), name, 40, each)
        leaving = torch.arange(8 * len(damages))
        return Ordering(inner, leaving, np.array(damages), 8, torch.eye(40))

    cheap, dear = ordering("cheap", [1.0, 2.0, 3.0]), ordering("dear", [10.0, 0.1, 0.1])
    assert widths_at([cheap, dear], 1.0) == {"cheap": 40, "dear": 40}
    assert widths_at([cheap, dear], 0.7) == {"cheap": 16, "dear": 40}
    assert widths_at([cheap, dear], 0.5) == {"cheap": 16, "dear": 24}  # the block behind the dear one is as dear
    assert widths_at([cheap, dear], 0.01) == {"cheap": 16, "dear": 16}  # no more may go
    by_the_weight = ordering("heavy", [2.0, 4.0], each=40)
    assert widths_at([cheap, by_the_weight], 0.85) == {"cheap": 40, "heavy": 32}


def test_a_bias_makes_up_for_the_mean_of_what_goes():
    """Channels that hardly vary cost nothing where the site that reads them has a bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Sigmoid(), nn.Linear(32, 16)).eval()
    with torch.no_grad():
        model[0].weight[8:16] = 0.0  # constants, by their biases
    program = trace(model, (torch.randn(2, 4, 16),))
    found, _ = channels_of(program)
    orderings = order_channels(program, found, batches_of(program))
    assert set(orderings[0].leaving[:8].tolist()) == set(range(8, 16))
    narrower = narrow(program, orderings, {"2": 24})
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(narrower.tree(x), model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", MLPS)
def test_what_nothing_reads_goes_first_and_costs_nothing(name):
    model = build(name).eval()
    program = trace(model, example_inputs(name))
    idle = torch.arange(3, 27)
    for inner in channels_of(program)[0]:
        site = program.site(inner.consumer)
        weight = program.graph.get_parameter(site.weight)
        with torch.no_grad():
            (weight.T if site.transposed else weight)[:, idle] = 0.0
    found, _ = channels_of(program)
    orderings = order_channels(program, found, batches_of(program))
    assert all(set(ordering.leaving[:24].tolist()) == set(idle.tolist()) for ordering in orderings)
    narrower = narrow(program, orderings, {inner.consumer: inner.width - 24 for inner in found})
    with torch.no_grad():
        before, after = (main_output(one.call_tree(program.inputs)) for one in (program, narrower))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert [site.name for site in narrower.sites] == [site.name for site in program.sites]
    for before_site, after_site in zip(program.sites, narrower.sites, strict=True):
        assert (after_site.whole.out_features, after_site.whole.in_features) == (
            before_site.out_features, before_site.in_features,
        )  # fmt: skip
    first = found[0]
    assert narrower.site(first.consumer).in_features == first.width - 24
    assert all(narrower.site(producer).out_features == first.width - 24 for producer in first.producers)


def test_a_forward_that_names_its_width_is_refused():
    program = trace(WidthWrittenDown(), (torch.randn(2, 4, 16),))
    found, _ = channels_of(program)
    orderings = order_channels(program, found, batches_of(program))
    with pytest.raises(BadInput, match="does not run with narrower MLPs"):
        narrow(program, orderings, {"down": 16})
    with pytest.raises(BadInput, match="keep 8 at least"):
        narrow(program, orderings, {"down": 4})


@pytest.mark.parametrize("name", MLPS)
def test_compiles_within_the_budget_and_comes_back(name, tmp_path):
    """The budget is of the teacher's cost; what is saved loads, merged and not; the plan reads back and applies."""
    torch.manual_seed(0)
    model = build(name)
    inputs = example_inputs(name)
    c = blora.compile(model, 0.5, inputs=inputs, narrow=0.6, interpolative=name == "llama")
    plain = blora.make_plan(model, 0.5, inputs=inputs)
    assert c.plan.baseline == plain.baseline
    assert c.plan.cost <= c.plan.limit == plain.limit
    assert c.plan.shapes
    assert "narrowed" in c.plan.summary()
    assert " of 1" in c.plan.table() or " of 2" in c.plan.table()
    assert c.report().data["achieved"]["sites"]["flops"]["fraction"] == pytest.approx(c.plan.fraction)
    rows: dict[torch.Tensor, int] = {}  # of the product with each weight that is there
    for choice in c.plan.choices:
        module = c.program.form_module(choice.site) or c.module.get_submodule(choice.site)
        weights = (module.A, module.B) if isinstance(module, FactoredLinear) else (module.weight,)
        rows |= dict.fromkeys(weights, c.plan.workload.evaluate(c.program.site(choice.site).rows[0]))
    assert sum(2 * weight.numel() * count for weight, count in rows.items()) == c.plan.cost
    assert Plan.from_json(c.plan.to_json()) == c.plan

    c.save(tmp_path / "small")
    loaded = blora.load(tmp_path / "small", model=None if hasattr(model, "config") else build(name))
    example = c.program.inputs
    with torch.no_grad():
        expected = main_output(c.program.call_tree(example))
        found = loaded.module(*example.values()) if c.program.positional else loaded.module(**example)
    torch.testing.assert_close(main_output(found), expected)
    if hasattr(model, "config"):
        c.save(tmp_path / "merged", merged=True)
        stock = type(model).from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            torch.testing.assert_close(main_output(stock(**example)), expected, rtol=1e-3, atol=1e-3)

    again = blora.compile(model, 0.5, inputs=inputs, plan=c.plan)
    assert again.plan.shapes == c.plan.shapes
    assert again.plan.forms == c.plan.forms


def test_a_plain_module_comes_back(tmp_path):
    """One that is narrower and nothing else: it damages, it trains, and its cost is the plan's while it does."""

    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).eval()

    batches = [torch.randn(4, 6, 16) for _ in range(4)]
    c = blora.compile(
        build(), 0.7, calibration=batches, narrow=0.6, train=batches, distill=DistillConfig(steps=3, batch=4),
        folder=tmp_path / "run", overwrite=True,
    )  # fmt: skip
    assert set(c.plan.forms.values()) == {Dense()}
    assert c.plan.damage > 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["executable"] == pytest.approx(c.plan.fraction)
    c.save(tmp_path / "small")
    loaded = blora.load(tmp_path / "small", model=build())
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(x), c.module(x))


def test_a_removed_branch_of_a_narrowed_mlp_is_saved(tmp_path):
    model = build("llama")
    c = blora.compile(model, 0.5, narrow=0.6)
    forms = {name: Removed() if ".0.mlp." in name else form for name, form in c.plan.forms.items()}
    edited = replace(c.plan, choices=tuple(replace(one, form=forms[one.site]) for one in c.plan.choices))
    removed = blora.compile(model, 0.5, plan=edited)
    removed.save(tmp_path / "merged", merged=True)
    stock = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = main_output(removed.program.call_tree(removed.program.inputs))
        torch.testing.assert_close(main_output(stock(**removed.program.inputs)), expected, rtol=1e-3, atol=1e-3)


def test_what_no_full_width_plan_reaches_a_narrower_one_may():
    """Multiples of 8 leave a small MLP no rank below break-even: only fewer channels make it cheaper."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 12)).eval()
    inputs, rules = (torch.randn(4, 3, 12),), {"*": {"min_rank": 8}}
    with pytest.raises(InfeasibleBudget):
        blora.make_plan(net, 0.7, inputs=inputs, rules=rules)
    plan = blora.make_plan(net, 0.7, inputs=inputs, rules=rules, narrow=True)
    assert plan.shapes
    assert plan.fraction <= 0.7
    with pytest.raises(InfeasibleBudget):
        blora.make_plan(net, 0.05, inputs=inputs, rules=rules, narrow=True)


def test_true_takes_the_width_that_damages_least():
    torch.manual_seed(0)
    c = blora.compile(build("llama"), 0.3, narrow=True)
    (record,) = [record for record in c.records if record.stage == "narrow"]
    tried = record.facts["tried"]
    assert tried[0]["share"] == 1.0
    best = min(tried, key=lambda one: one["damage"])
    whole = sum(width for width in (160, 160))
    kept = sum(c.program.site(f"model.layers.{index}.mlp.down_proj").in_features for index in (0, 1))
    assert kept / whole == pytest.approx(best["share"], abs=0.06)


def test_what_cannot_be_narrowed_says_so():
    model = build("llama")
    plan = blora.make_plan(model, 0.5)
    for options, why in (
        ({"narrow": 0.1}, "from 0.25 to 1"),
        ({"narrow": 1.5}, "from 0.25 to 1"),
        ({"narrow": "auto"}, "give True"),
        ({"narrow": True, "plan": plan}, "how wide its MLPs are"),
        ({"narrow": True, "damage": "whitened"}, "two-sided"),
        ({"narrow": True, "metric": "latency"}, "budget in time"),
    ):
        with pytest.raises(BadInput, match=why):
            blora.compile(model, 0.5, **options)
    with pytest.raises(BadInput, match="no weights to choose channels by"):
        blora.make_plan(model.config, 0.5, narrow=True)
    with pytest.raises(BadInput, match="its other nodes keep their shapes"):
        blora.make_plan("missing.onnx", 0.5, narrow=True)
    c = blora.compile(model, 1.0, narrow=True)
    assert not c.plan.shapes  # a budget that keeps everything changes nothing


def test_a_plan_of_other_widths_is_refused():
    model = build("llama")
    plan = blora.make_plan(model, 0.5, narrow=0.6)
    text = plan.to_json()
    name, (rows, columns) = "model.layers.0.mlp.gate_proj", plan.shapes["model.layers.0.mlp.gate_proj"]
    broken = Plan.from_json(
        text.replace(
            f'"shape": [\n        {rows},\n        {columns}',
            f'"shape": [\n        {rows + 8},\n        {columns}',
            1,
        )
    )
    with pytest.raises(BadInput, match=name):
        blora.compile(model, 0.5, plan=broken)
    with pytest.raises(BadInput, match="plan narrows MLPs, which needs a two-sided"):
        blora.compile(model, 0.5, plan=plan, damage="whitened")
    with pytest.raises(BadInput, match=r"cannot be narrowed here .*has the rule"):
        blora.compile(model, 0.5, plan=plan, rules={"*.mlp.*": "dense"})
    with pytest.raises(BadInput, match="two sizes"):
        Plan.from_json(text.replace('"shape": [', '"shape": [0, ', 1))
