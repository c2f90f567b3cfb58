"""Refitted factors: the least squares they claim to be, and a student that is nearer its teacher for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blora_compiler as blora
from blora_compiler.errors import BadInput
from blora_compiler.graph import main_output
from blora_compiler.profiling import profile
from blora_compiler.refitting import DAMPING, refit, refit_ordered, side_by_side_refusal
from blora_compiler.rewriting import fold, insert, settle, starting_factors
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Factored, Removed
from tests.models import build, example_inputs


class Chain(nn.Module):
    """Two projections with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(3 * self.first(x)))


def chain_case() -> tuple:
    torch.manual_seed(3)
    model = Chain().eval()
    x = torch.randn(64, 10, 24) @ torch.randn(24, 24)
    program = trace(model, (x[:4],))
    (name,) = program.inputs
    batches = [{name: piece} for piece in x.split(16)]
    profiled = profile(program, batches)
    forms = {"first": Factored(4), "second": Factored(5)}
    return program, forms, profiled, batches, x


def test_the_first_site_keeps_its_rows_and_the_second_gets_its_least_squares():
    program, forms, profiled, batches, x = chain_case()
    start = starting_factors(program.sites, forms, profiled)
    found = refit(program, forms, start, batches)
    # Nothing is compressed before the first site: its inputs are the teacher's, and so its rows stay.
    torch.testing.assert_close(found["first"][0], start["first"][0], rtol=1e-4, atol=1e-5)

    model = program.tree
    teacher = torch.tanh(3 * model.first(x)).reshape(-1, 32).double()
    A, B = (factor.double() for factor in found["first"])
    student = torch.tanh(3 * (x.double() @ A.T @ B.T + model.first.bias.double())).reshape(-1, 32)
    C, M = student.T @ student, teacher.T @ student
    rows = start["second"][0].double() @ M @ torch.linalg.inv(C)
    # Up to what the damping of nearly empty directions changes.
    assert (
        (found["second"][0].double() - rows).norm()
        < 0.05 * rows.norm()
        < 0.2 * (start["second"][0].double() - rows).norm()
    )
    A = found["second"][0].double()
    best = model.second.weight.double() @ M @ A.T @ torch.linalg.inv(A @ C @ A.T)
    torch.testing.assert_close(found["second"][1].double(), best, rtol=1e-2, atol=1e-3)


def distance(program, forms, profiled, factors, batch) -> float:
    branched, _ = insert(program, forms, profiled, factors=factors)
    folded, _ = fold(settle(branched, forms), forms)
    with torch.no_grad():
        ours, theirs = (main_output(p.call_graph(batch)) for p in (folded, program))
    return float((ours - theirs).square().mean())


def test_a_refitted_chain_is_nearer_its_teacher():
    program, forms, profiled, batches, x = chain_case()
    start = starting_factors(program.sites, forms, profiled)
    found = refit(program, forms, start, batches)
    held_out = {next(iter(program.inputs)): x.flip(1)[:16] * 0.9}
    assert distance(program, forms, profiled, found, held_out) < 0.95 * distance(
        program, forms, profiled, start, held_out
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_real_shapes_refit_and_fold(kind):
    program = trace(build(kind), example_inputs(kind))
    batches = [{name: value.clone() for name, value in program.inputs.items()}] * 2
    profiled = profile(program, batches)
    forms = {
        site.name: Factored(8) if site.break_even_rank > 8 and site.kind == "projection" else Dense()
        for site in program.sites
    }
    found = refit(program, forms, starting_factors(program.sites, forms, profiled), batches)
    branched, _ = insert(program, forms, profiled, factors=found)
    fold(settle(branched, forms), forms)
    for site in program.sites:
        if isinstance(forms[site.name], Factored):
            A, B = found[site.name]
            assert A.shape == (8, site.in_features) and B.shape == (site.out_features, 8)
            assert A.isfinite().all() and B.isfinite().all()


def test_the_sites_after_a_removed_branch_see_the_stream_without_it():
    program = trace(build("llama"))
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 128, (8, 24), generator=generator)} for _ in range(2)]
    batches = [{**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in batches]
    batches = [{n: v for n, v in b.items() if n in program.inputs} for b in batches]
    profiled = profile(program, batches)
    branch = next(site.branch for site in program.sites if site.branch and "mlp" in site.branch)
    kept = {site.name: Dense() for site in program.sites if site.kind == "projection"}
    removed = {name: Removed() if name.startswith(branch) else form for name, form in kept.items()}
    after = [site.name for site in program.sites if site.kind == "projection" and site.name > branch + "~"][-1]
    for forms in (kept, removed):
        forms[after] = Factored(8)
    start = starting_factors(program.sites, kept, profiled)
    found = [refit(program, forms, start, batches)[after][0] for forms in (kept, removed)]
    torch.testing.assert_close(found[0], start[after][0], rtol=1e-3, atol=1e-4)
    assert (found[1] - found[0]).norm() > 100 * DAMPING**2 * found[0].norm()


def test_nothing_factored_leaves_everything():
    program = trace(build("llama"))
    assert refit(program, {site.name: Dense() for site in program.sites}, {}, [dict(program.inputs)]) == {}


def test_batches_of_several_lengths_all_count():
    model, inputs = build("bert"), example_inputs("bert")
    program = trace(model, inputs)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (12, 9), generator=generator)
    lengths = torch.tensor([9, 9, 9, 9, 6, 6, 6, 6, 4, 4, 4, 4])
    mask = (torch.arange(9) < lengths[:, None]).long()
    whole = {"input_ids": ids * mask, "attention_mask": mask}
    pieces = [
        {name: value[first : first + 4, : int(lengths[first])] for name, value in whole.items()}
        for first in (0, 4, 8)
    ]
    profiled = profile(program, pieces)
    forms = {site.name: Factored(4) if "layer" in site.name else Dense() for site in program.sites}
    start = starting_factors(program.sites, forms, profiled)
    together, apart, first = (refit(program, forms, start, given) for given in ([whole], pieces, pieces[:1]))
    for name, (A, _) in together.items():
        torch.testing.assert_close(apart[name][0], A, rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(first[name][0], A, rtol=1e-2, atol=1e-3) for name, (A, _) in together.items())


def test_ordered_factors_are_the_least_squares_at_every_rank_at_once():
    program, forms, profiled, batches, _ = chain_case()
    first, second = (profiled.spectra[name] for name in ("first", "second"))
    ordered = {"first": (first.A[:12], first.B[:, :12]), "second": (second.A[:8], second.B[:, :8])}
    found = refit_ordered(program, forms, ordered, batches)
    for rank in (1, 3, 8):
        # The same rows by themselves, behind the same first site.
        starts = {name: (A[:cut], B[:, :cut]) for (name, (A, B)), cut in zip(ordered.items(), (4, rank), strict=True)}
        alone = refit(program, {**forms, "second": Factored(rank)}, starts, batches)
        for name, cut in (("first", 4), ("second", rank)):
            A, B = found[name]
            product = B[:, :cut] @ A[:cut]
            expected = alone[name][1] @ alone[name][0]
            assert (product - expected).norm() < 0.01 * expected.norm()
    A, B = found["second"]
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


def test_a_site_that_the_member_leaves_dense_gets_its_factors_too():
    program, _, profiled, batches, _ = chain_case()
    first, second = (profiled.spectra[name] for name in ("first", "second"))
    ordered = {"first": (first.A[:12], first.B[:, :12]), "second": (second.A[:8], second.B[:, :8])}
    found = refit_ordered(program, {"first": Dense(), "second": Factored(3)}, ordered, batches)
    # Before the second site nothing is compressed: its rows span what they did, at every rank.
    start, rows = ordered["second"][0][:3].double(), found["second"][0][:3].double()
    coordinates = torch.linalg.lstsq(start.T, rows.T).solution
    assert (start.T @ coordinates - rows.T).norm() < 1e-3 * rows.norm()
    assert not torch.equal(found["first"][1], ordered["first"][1])


def test_ordered_factors_survive_data_with_fewer_directions_than_ranks():
    program, forms, profiled, _, x = chain_case()
    first, second = (profiled.spectra[name] for name in ("first", "second"))
    ordered = {"first": (first.A[:12], first.B[:, :12]), "second": (second.A[:8], second.B[:, :8])}
    found = refit_ordered(program, forms, ordered, [{next(iter(program.inputs)): x[:1, :2]}])
    assert all(factor.isfinite().all() for pair in found.values() for factor in pair)
    # Without data, the first site still does what its weight does as well as those rows can.
    A, B = (factor.double() for factor in found["first"])
    weight = program.tree.first.weight.double()
    best = weight @ torch.linalg.pinv(A) @ A
    assert (B @ A - weight).norm() < 1.5 * (best - weight).norm()


class SequenceFirst(nn.Module):
    """Attention over the first axis, as `nn.MultiheadAttention` has it by default; or turned to it inside."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.turned:
            x = x.transpose(0, 1)
        q, k, v = (part(x).transpose(0, 1) for part in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
        out = self.out(mixed.transpose(0, 1))
        return out.transpose(0, 1) if self.turned else out


@pytest.mark.parametrize(("turned", "said"), [(False, "depends on the others beside it"), (True, "does not count")])
def test_a_model_whose_first_axis_is_no_batch_is_not_refitted_and_says_so(turned, said, tmp_path):
    torch.manual_seed(0)
    model = SequenceFirst(turned).eval()
    data = [torch.randn(12, 6, 16) for _ in range(3)]
    program = trace(model, (data[0],))
    (name,) = program.inputs
    batches = [{name: piece} for piece in data]
    assert said in side_by_side_refusal(program, batches)
    forms = {site.name: Factored(3) for site in program.sites}
    profiled = profile(program, batches)
    with pytest.raises(BadInput, match=rf"cannot be refitted: .*{said}"):
        refit(program, forms, starting_factors(program.sites, forms, profiled), batches)
    compiled = blora.compile(model, 0.6, inputs=(data[0],), calibration=batches)
    (record,) = (record for record in compiled.records if record.stage == "refit")
    assert "not refitted" in record.summary and said in record.summary
    assert not any(attempt["refitted"] for attempt in record.facts["attempts"])


def test_models_with_the_batch_first_go_side_by_side():
    for name in ("llama", "bert", "vit", "gpt2"):
        program = trace(build(name), example_inputs(name))
        inputs = {key: torch.cat([value, value.flip(0)]) for key, value in program.inputs.items()}
        assert side_by_side_refusal(program, [inputs]) is None, name


class Returning(nn.Module):
    """The last weight is the first one too."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.a, self.c = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.c(torch.tanh(self.a(torch.tanh(self.outer(x)))))))


def test_a_weight_that_is_called_first_and_last_does_not_end_the_refit():
    program = trace(Returning().eval(), (torch.randn(4, 6, 24),))
    (name,) = program.inputs
    batches = [{name: torch.randn(16, 6, 24)}]
    forms = {site.name: Factored(4) for site in program.sites}
    start = starting_factors(program.sites, forms, profile(program, batches))
    found = refit(program, forms, start, batches)
    changed = {site: not torch.equal(found[site][1], start[site][1]) for site in forms}
    assert changed == {"outer": False, "a": True, "c": True}  # a weight with two inputs has no one least squares
