"""Small promises of the public surface that no other test holds."""

from __future__ import annotations

from dataclasses import replace

import torch

import blora_compiler as blora
from blora_compiler.layers import BranchedLinear, FactoredLinear
from tests.models import build


def test_every_stage_can_be_called_alone():
    from blora_compiler.cost_models.flops import FlopsCostModel

    from blora_compiler.budget import Budget
    from blora_compiler.problem import build_problem

    program = blora.trace(build("llama"))
    ids = torch.randint(1, 128, (4, 16))
    damage = blora.profile(program, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    problem = build_problem(
        program.sites, budget=Budget.parse(0.5), cost_model=FlopsCostModel(), damage_model=damage,
        workload=blora.Workload(tokens=16), rank_multiple=4,
    )  # fmt: skip
    plan = blora.solve(problem)
    batches = [dict(program.inputs)]
    start, attempts = blora.replan(
        program, batches, damage, lambda scaled: (replace(problem, damage_model=scaled), None), plan, rounds=0
    )
    assert start.plan.forms == plan.forms and len(attempts) == 2
    factors = blora.refit(program, plan.forms, attempts[0].factors, batches)
    branched, _ = blora.insert(program, plan.forms, damage, factors=factors)
    folded, _ = blora.fold(blora.settle(branched, plan.forms), plan.forms)
    assert plan.fraction <= 0.5
    assert blora.Plan.from_json(plan.to_json()) == plan
    assert any(isinstance(module, FactoredLinear) for module in folded.tree.modules())


def test_code_that_looks_at_a_projections_weight_finds_one():
    A, B, residual = torch.randn(3, 5), torch.randn(7, 3), torch.randn(7, 5)
    assert torch.equal(FactoredLinear(A, B, None).weight, B @ A)
    branch = BranchedLinear(residual, A, B, None)
    x = torch.randn(2, 5)
    torch.testing.assert_close(x @ branch.weight.T, branch(x))


def test_a_loaded_model_is_called_like_the_model_it_was(tmp_path):
    c = blora.compile(build("llama"), 0.5, rank_multiple=4)
    loaded = blora.load(c.save(tmp_path / "saved"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, c.module(input_ids=ids).logits)
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 6)
    assert loaded.config.model_type == "llama"


class Pair(torch.nn.Module):
    """Two square weights of which the second may be the first one transposed."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.a, self.m, self.b = (torch.nn.Linear(32, 32, bias=False) for _ in range(3))
        self.gain = torch.nn.Parameter(torch.tensor(1.5))
        if transposed:
            self.b.weight = torch.nn.Parameter(self.a.weight.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * self.b(torch.relu(self.m(torch.relu(self.a(self.norm(x))))))


def test_loading_leaves_the_given_instance_alone_and_a_transposed_view_is_no_tie(tmp_path):
    x = torch.randn(4, 8, 32)
    rules = {"a": "dense", "b": "dense", "m": {"max_rank": 8}}
    compiled = blora.compile(Pair(transposed=True), 0.9, inputs=(x,), calibration=[{"x": x}], rules=rules)
    compiled.save(tmp_path / "model")
    instance = Pair()
    before = {name: value.clone() for name, value in instance.state_dict().items()}
    loaded = blora.load(tmp_path / "model", model=instance)
    assert all(torch.equal(value, before[name]) for name, value in instance.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(x), compiled.module(x))
