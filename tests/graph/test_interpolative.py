"""Interpolative forms on models: folding changes nothing, the rows are chosen well, what is saved comes back."""

from __future__ import annotations

import pytest
import torch
from blora_compiler.passes.fold import WORST_GROWTH, _first_factor, first_factors
from torch.utils.flop_counter import FlopCounterMode

import blora_compiler as blora
from blora_compiler.errors import BadInput
from blora_compiler.graph import main_output
from blora_compiler.layers import BranchedLinear, FactoredLinear
from blora_compiler.report import installed_form
from blora_compiler.rewriting import fold, insert, settle
from blora_compiler.values import Dense, Factored, Form
from tests.graph.test_sharing import FAMILIES, case, sharing
from tests.models import build


def interpolative(forms: dict[str, Form]) -> dict[str, Form]:
    return {name: Factored(form.rank, form.sharers, True) for name, form in forms.items()}


@pytest.mark.parametrize("name", [*FAMILIES, "gpt2"])
def test_folding_keeps_outputs(name):
    """Own and shared first factors, with gates that are not 1, with biases (bert, gpt2) and transposed (gpt2)."""
    program, _, profiled, forms = case(name)
    forms = interpolative(forms)
    settled = settle(insert(program, forms, profiled)[0], forms)
    for module in settled.tree.modules():
        if isinstance(module, BranchedLinear):
            module.gates.data.uniform_(0.5, 1.5)
    with torch.no_grad():
        before = main_output(settled.call_tree(settled.inputs))
        folded, _ = fold(settled, forms)
        after = main_output(folded.call_tree(folded.inputs))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    for site, form in forms.items():
        module = folded.form_module(site)
        assert installed_form(folded, site, Dense()) == form
        assert module.B.shape == (form.outputs_of_second(program.site(site)), form.rank)
        assert module.weight.shape == (program.site(site).out_features, program.site(site).in_features)
    for sharers in sharing(forms):
        assert len({id(folded.form_module(site).A) for site in sharers}) == 1


def test_the_module_computes_the_weight_it_shows():
    generator = torch.Generator().manual_seed(0)
    A, B, bias = (torch.randn(shape, generator=generator) for shape in ((4, 10), (8, 4), (12,)))
    x = torch.randn(2, 3, 10, generator=generator)
    for given_from in (0, 5, 8):
        module = FactoredLinear(A, B, bias, given_from)
        torch.testing.assert_close(module(x), x @ module.weight.T + bias)
        assert module.out_features == 12
        torch.testing.assert_close(module.weight[given_from : given_from + 4], A)


def test_rows_at_an_end_are_taken_where_they_will_do_and_others_where_not():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(8, 20, generator=generator), torch.randn(64, 8, generator=generator)
    B[:8] = torch.eye(8)
    form = Factored(8, interpolative=True)
    assert _first_factor(form, A, [B]).start == 0
    B[:8, 0] = B[:8, 1]  # of rank 7
    B[56:, 0] = B[56:, 1]
    first = _first_factor(form, A, [B])
    assert 0 < first.start < 56 and first.growth < 30
    torch.testing.assert_close((B.double() @ first.inverse @ first.A.double()).float(), B @ A, rtol=1e-4, atol=1e-4)


def test_growth_counts_what_every_sharer_multiplies():
    """Rows that suit the first site may hardly hold a direction that another one needs."""
    generator = torch.Generator().manual_seed(0)
    A, first, other = (torch.randn(shape, generator=generator) for shape in ((8, 20), (64, 8), (32, 8)))
    first[:, 0] *= 1e-5
    form = Factored(8, ("a", "b"), True)
    assert _first_factor(form, A, [first]).growth < 30
    assert _first_factor(form, A, [first, other]).growth > WORST_GROWTH


@pytest.mark.parametrize("site", ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"])
def test_a_second_factor_that_cannot_be_inverted_is_refused_with_its_sharers(site):
    program, _, profiled, forms = case()
    forms = interpolative(forms)
    settled = settle(insert(program, forms, profiled)[0], forms)
    settled.form_module(site).B.data[:, 0] = 0.0
    with pytest.raises(BadInput, match="neighbouring rows of its B will do as outputs") as refused:
        fold(settled, forms)
    assert all(name in str(refused.value) for name in forms[site].sharers or (site,))


def test_a_closed_gate_is_no_reason_to_refuse():
    program, _, profiled, forms = case()
    forms = interpolative(forms)
    settled = settle(insert(program, forms, profiled)[0], forms)
    settled.form_module("model.layers.0.mlp.down_proj").gates.data[0] = 0.0
    growths = [first.growth for first in first_factors(settled, forms).values()]
    assert max(growths) < WORST_GROWTH
    fold(settled, forms)


def test_a_model_compiles_to_the_flops_that_the_plan_counts_and_comes_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 128, (4, 24), generator=generator) for _ in range(2)]
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]
    plain, given = (
        blora.compile(build("llama"), 0.5, calibration=batches, rank_multiple=4, interpolative=each)
        for each in (False, True)
    )
    assert given.plan.fraction <= 0.5 and given.plan.objective < plain.plan.objective

    def flops(module: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(input_ids=torch.ones(1, given.plan.workload.tokens, dtype=torch.long))
        return counter.get_total_flops()

    saved = given.plan.baseline - given.plan.cost
    assert flops(given.source.model) - flops(given.module) == saved
    given.save(tmp_path / "saved")
    loaded = blora.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded.module(input_ids=ids[0]).logits, given.module(input_ids=ids[0]).logits)
    assert loaded.plan == given.plan
    given.save(tmp_path / "merged", merged=True)
    merged = type(given.source.model).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=ids[0]).logits, given.module(input_ids=ids[0]).logits, rtol=1e-4, atol=1e-4
        )
