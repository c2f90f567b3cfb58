"""The damage measure: its optimality, its normalisation, and moments that are hard to invert."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.utils import ModelOutput

from blora_compiler.errors import BadInput
from blora_compiler.graph import main_output, predicts
from blora_compiler.profiling import DAMPING, Moments, Spectrum, _spectrum, _weighed, moments_of, prior, profile
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Factored, Removed
from tests.models import build, example_inputs


def llama_batches(count: int = 8, tokens: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (count, 4, tokens), generator=generator)
    return [{"input_ids": piece, "attention_mask": torch.ones_like(piece)} for piece in ids]


def test_the_damage_is_what_the_formula_says_for_explicit_moments():
    program = trace(build("twice"), example_inputs("twice"))
    (site,) = program.sites
    moments = Moments([site], full_width=4096, with_gradients=True)
    x, g = torch.randn(500, 48) @ torch.randn(48, 48), torch.randn(500, 48) @ torch.randn(48, 48)
    moments.add_input("w", x, None)
    moments.add_gradient("w", g, None)
    moments.output_rows = 500
    spectrum = _spectrum(program, site, _weighed(program, site, moments, "two-sided"), moments)
    W, C, G = program.graph.w.double(), (x.T @ x / 500).double(), (g.T @ g / 500).double()
    C += DAMPING * C.diagonal().diag()
    G += DAMPING * G.diagonal().diag()
    for rank in (4, 16):
        D = W - spectrum.B[:, :rank].double() @ spectrum.A[:rank].double()
        assert 0.5 * (G @ D @ C @ D.T).trace() == pytest.approx(spectrum.tail[rank], rel=1e-3)
        U, S, Vt = torch.linalg.svd(W)
        plain = W - (U[:, :rank] * S[:rank]) @ Vt[:rank]
        assert 0.5 * (G @ plain @ C @ plain.T).trace() > 1.01 * spectrum.tail[rank], (
            "plain SVD cannot beat the optimum"
        )


def test_it_predicts_the_kl_of_a_single_small_change():
    """One site at a time, at high rank, the second-order estimate must be right within sampling noise."""
    model = build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(
                    8
                )  # a freshly initialised model says nearly nothing; louder weights give a KL to measure
    program = trace(model)
    batches = llama_batches(24)
    profiled = profile(program, batches)
    assert profiled.unit == "nats per token"
    site = program.site("model.layers.1.mlp.down_proj")
    rank = site.break_even_rank * 3 // 4
    A, B = profiled.starting_factors(site, rank)
    module = model.get_submodule(site.name)
    total = rows = 0.0
    for batch in batches:
        with torch.no_grad():
            before = torch.log_softmax(main_output(model(**batch)), -1)
            kept = module.weight.data
            module.weight.data = B @ A
            after = torch.log_softmax(main_output(model(**batch)), -1)
            module.weight.data = kept
        total += float((before.exp() * (before - after)).sum())
        rows += before.shape[0] * before.shape[1]
    assert profiled.damage(site, Factored(rank)) == pytest.approx(total / rows, rel=0.5)


def test_a_mean_loss_would_be_off_so_the_measure_does_not_depend_on_batch_length():
    """Twice the tokens in a sequence must not change the scale (a mean loss is off by the token count squared)."""
    program = trace(build("llama"))
    short, long = profile(program, llama_batches(8, 16)), profile(program, llama_batches(8, 64))
    site = program.site("model.layers.0.mlp.up_proj")
    ratio = short.damage(site, Factored(8)) / long.damage(site, Factored(8))
    assert 0.5 < ratio < 2.0


def test_damage_falls_with_rank_and_is_zero_when_dense():
    program = trace(build("bert"))
    profiled = profile(program, [dict(program.inputs)])
    assert profiled.unit == "output distance"
    for site in program.sites:
        damages = [profiled.damage(site, Factored(rank)) for rank in (1, 8, 16)]
        assert damages == sorted(damages, reverse=True)
        assert profiled.damage(site, Dense()) == 0
        assert profiled.damage(site, Removed()) > 0


def test_factors_of_the_plain_profile_are_the_truncated_svd():
    program = trace(build("gpt2"))
    profiled = profile(program, [], kind="plain")
    site = program.site("transformer.h.0.mlp.c_fc")
    A, B = profiled.starting_factors(site, 8)
    W = program.graph.get_parameter(site.weight).T
    U, S, Vt = torch.linalg.svd(W)
    torch.testing.assert_close(B @ A, (U[:, :8] * S[:8]) @ Vt[:8], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(A @ A.T, B.T @ B, atol=1e-4, rtol=1e-3)  # balanced


def test_moments_from_fewer_tokens_than_channels_do_not_fail():
    program = trace(build("llama"))
    one = [{"input_ids": torch.zeros(2, 2, dtype=torch.int64), "attention_mask": torch.ones(2, 2, dtype=torch.int64)}]
    profiled = profile(program, one)
    for site in program.sites:
        spectrum = profiled.spectra[site.name]
        assert isinstance(spectrum, Spectrum)
        assert torch.isfinite(spectrum.A).all()
        assert torch.isfinite(spectrum.B).all()


def test_padding_does_not_count():
    program = trace(build("llama"))
    (plain,) = llama_batches(1)
    padded = {
        "input_ids": torch.cat([torch.full((4, 5), 7), plain["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(4, 5, dtype=torch.int64), plain["attention_mask"]], 1),
    }
    a, b = profile(program, [plain], kind="whitened"), profile(program, [padded], kind="whitened")
    assert a.tokens == b.tokens
    site = program.site("model.layers.0.self_attn.q_proj")  # before any attention: only the mask can differ
    assert a.damage(site, Factored(8)) == pytest.approx(b.damage(site, Factored(8)), rel=1e-4)


class _SequenceFirst(nn.Module):
    """Turns the tokens to the front before its projection, as XLNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.projection(x.transpose(0, 1)).transpose(0, 1) * attention_mask[..., None]


class _Flattened(nn.Module):
    """Flattens what has its tokens first before the projection, as `nn.MultiheadAttention` does."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(0, 1)
        rows = self.projection(turned.reshape(-1, 8))
        return rows.view(turned.shape).transpose(0, 1) * attention_mask[..., None]


@pytest.mark.parametrize("kind", [_SequenceFirst, _Flattened])
def test_padding_does_not_count_where_the_tokens_come_first(kind):
    torch.manual_seed(0)
    x, mask = torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.int64)
    mask[0, :4], mask[1, :1] = 0, 0
    batches = [{"x": torch.where(mask[..., None] == 0, 100.0, x), "attention_mask": mask}]
    program = trace(kind().eval(), batches[0])
    ((_, moments, _),) = moments_of(program, program.sites, batches, seed=0)
    second, mean = moments.input_moment(program.site("projection"))
    kept = x[mask.bool()]
    torch.testing.assert_close(second, kept.T @ kept / len(kept))
    torch.testing.assert_close(mean, kept.mean(0))


def test_a_small_memory_cap_gives_the_same_numbers_in_more_passes():
    program = trace(build("llama"))
    batches = llama_batches(2)
    whole, pieces = profile(program, batches), profile(program, batches, memory_bytes=100_000)
    for site in program.sites:
        torch.testing.assert_close(
            torch.tensor(whole.spectra[site.name].tail),
            torch.tensor(pieces.spectra[site.name].tail),
            rtol=1e-4,
            atol=1e-9,
        )


def test_the_cache_gives_back_the_same_profile_and_notices_other_data(tmp_path):
    program = trace(build("llama"))
    first = profile(program, llama_batches(2), cache=tmp_path)
    (path,) = tmp_path.glob("profile-*.safetensors")
    stamp = path.stat().st_mtime_ns
    again = profile(program, llama_batches(2), cache=tmp_path)
    assert path.stat().st_mtime_ns == stamp
    assert all((first.spectra[s.name].tail == again.spectra[s.name].tail).all() for s in program.sites)
    profile(program, llama_batches(3), cache=tmp_path)
    assert len(list(tmp_path.glob("profile-*.safetensors"))) == 2
    path.write_bytes(b"garbage")
    with pytest.raises(BadInput, match="is damaged"):
        profile(program, llama_batches(2), cache=tmp_path)


def test_nan_weights_are_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"NaN or infinite values: model.layers.1.mlp.up_proj.weight"):
        profile(trace(model), llama_batches(1))


def test_no_calibration_data_is_bad_input():
    with pytest.raises(BadInput, match="got 0 batches"):
        profile(trace(build("llama")), [])


def test_the_prior_needs_no_weights_and_has_no_factors():
    program = trace(build("llama"))
    guess = prior(program.sites)
    site = program.sites[0]
    assert guess.damage(site, Factored(8)) > guess.damage(site, Factored(16)) > 0
    with pytest.raises(BadInput, match="has no factors to start from"):
        guess.starting_factors(site, 8)


def test_the_callers_model_keeps_its_flags_and_gradients():
    model = build("llama")
    profile(trace(model), llama_batches(1))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert isinstance(model, nn.Module)


def test_an_activation_in_place_behind_the_first_site_gives_the_same_profile():
    def damages(inplace: bool) -> list[float]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=inplace), nn.Linear(32, 16))
        x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1))
        program = trace(net, (x,))
        profiled = profile(program, [{"input": x}])
        return [profiled.damage(site, Factored(8)) for site in program.sites]

    assert damages(True) == pytest.approx(damages(False))


class _Gain(nn.Module):
    """One projection whose input has one channel of another size, and an activation behind it."""

    def __init__(self, gain: float = 1.0, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(32, 48), nn.Linear(48, 16), activation or nn.ReLU()
        self.register_buffer("gain", torch.ones(32))
        self.gain[0] = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x * self.gain)))


def test_one_massive_channel_does_not_drown_the_others():
    """What it carries is in a bias-like direction of its own; the rest must be factored as if it were not there."""
    torch.manual_seed(0)
    x = torch.randn(64, 8, 32) @ torch.randn(32, 32).triu() / 4
    errors = {}
    for gain in (1.0, 1e5):
        torch.manual_seed(1)
        model = _Gain(gain).eval()
        with torch.no_grad():
            model.up.weight[:, 0] = 0.0  # nothing reads it, so nothing of the function changes
        program = trace(model, (x[:4],))
        (name,) = program.inputs
        profiled = profile(program, [{name: piece} for piece in x.split(16)])
        A, B = profiled.starting_factors(program.site("up"), 8)
        rest = (model.up.weight - B @ A)[:, 1:]
        errors[gain] = float((x[..., 1:] @ rest.detach().T).square().mean().sqrt())
    assert errors[1e5] == pytest.approx(errors[1.0], rel=0.05)


def test_the_cache_notices_what_is_between_the_weights(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 4, 32)
    state = _Gain().state_dict()

    def profiled(gain: float, activation: nn.Module) -> tuple[float, int]:
        model = _Gain(gain, activation).eval()
        model.load_state_dict({**state, "gain": model.gain})
        program = trace(model, (x[:4],))
        (name,) = program.inputs
        found = profile(program, [{name: x}], cache=tmp_path)
        return float(found.spectra["up"].tail[4]), len(list(tmp_path.glob("profile-*.safetensors")))

    first, count = profiled(1.0, nn.ReLU())
    assert count == 1 and profiled(1.0, nn.ReLU()) == (first, 1)
    other_code, count = profiled(1.0, nn.GELU())
    assert count == 2 and other_code != first
    other_buffer, count = profiled(3.0, nn.ReLU())
    assert count == 3 and other_buffer != first


class _UnderNoGrad(nn.Module):
    """What runs without gradients is a graph inside the graph."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        with torch.no_grad():
            gate = (x * self.gain).sigmoid()
        return self.down(torch.relu(self.up(x * gate)))


def test_the_cache_notices_what_is_in_a_graph_inside_the_graph(tmp_path):
    torch.manual_seed(0)
    x, state = torch.randn(32, 4, 32), _UnderNoGrad(1.0).state_dict()
    damages = []
    for gain in (1.0, -3.0):
        model = _UnderNoGrad(gain).eval()
        model.load_state_dict(state)
        program = trace(model, (x[:4],))
        damages.append(float(profile(program, [{"x": x}], cache=tmp_path).spectra["up"].tail[4]))
    assert len(list(tmp_path.glob("profile-*.safetensors"))) == 2
    assert damages[0] != damages[1]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (ModelOutput(logits=torch.zeros(2, 5, 128)), True),  # over the vocabulary
        (ModelOutput(logits=torch.zeros(2, 3), loss=torch.zeros(())), True),  # over the labels
        (ModelOutput(logits=torch.zeros(2, 5, 128), encoder_last_hidden_state=torch.zeros(2, 4, 8)), True),
        (ModelOutput(logits=torch.zeros(2, 7, 3), pred_boxes=torch.zeros(2, 7, 4)), False),  # a detector's
        (ModelOutput(logits=torch.zeros(2, 5)), False),  # a score a token
        (ModelOutput(logits=torch.zeros(2, 3, 8, 8)), False),  # a map of pixels
        (ModelOutput(last_hidden_state=torch.zeros(2, 5, 128)), False),
    ],
)
def test_logits_are_taken_for_distributions_where_they_are(output, expected):
    config = LlamaConfig(vocab_size=128, num_labels=3)
    assert predicts(output, config) == expected


def test_what_only_another_output_needs_is_damaged_too():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.labels, self.boxes = nn.Linear(16, 16), nn.Linear(16, 6), nn.Linear(16, 8)

        def forward(self, x):
            hidden = torch.tanh(self.shared(x))
            return ModelOutput(logits=self.labels(hidden), pred_boxes=self.boxes(hidden))

    program = trace(Detector().eval(), (torch.randn(4, 7, 16),))
    (name,) = program.inputs
    profiled = profile(program, [{name: torch.randn(4, 7, 16)}])
    assert profiled.unit == "output distance"
    assert all(profiled.damage(site, Factored(1)) > 1e-3 for site in program.sites)
