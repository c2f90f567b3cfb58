"""Reading, packing, batch order, input checks and self-sampling."""

from __future__ import annotations

import json
import lzma

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from blora_compiler import data
from blora_compiler.errors import BadInput


class Letters:
    """A tokenizer: one token per character, with the marks it is told to have."""

    sep_token_id = None

    def __init__(self, eos: int | None = None, bos: int | None = None) -> None:
        self.eos_token_id, self.bos_token_id = eos, bos

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        assert not verbose
        return {"input_ids": [ord(letter) for letter in text]}


def _llama(bos: int | None = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=bos, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_three_formats_give_the_same_documents(tmp_path):
    text = "Grüße,\u2028 und\nmehr"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    lines = [json.dumps({"text": text}, ensure_ascii=False), "", json.dumps({"text": "two", "id": 2})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert data.load_texts(tmp_path / "a.txt") == data.load_texts(tmp_path / "a.txt.xz") == [text]
    assert data.load_texts(str(tmp_path / "a.jsonl")) == [text, "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", r"text is read from \.txt, \.txt\.xz, \.jsonl"),
        ("a.txt", None, "cannot be read .*check the path"),
        ("a.txt", b"ab\xff", "byte 2 is not UTF-8"),
        ("a.txt.xz", b"no xz", "not a complete xz file"),
        ("a.txt.xz", lzma.compress(b"hello" * 99)[:-20], "not a complete xz file"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', "line 2: no text in"),
        ("a.jsonl", b'{"text": 5}', "line 1: no text in"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        data.load_texts(tmp_path / name)
    assert name in str(caught.value)


# ── Packing ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tokenizer", "stream"),
    [
        (Letters(eos=0), [97, 98, 0, 99, 0]),
        (Letters(eos=0, bos=7), [97, 98, 0, 99, 0]),
        (Letters(bos=7), [97, 98, 7, 99, 7]),
        (Letters(), [97, 98, 99]),
    ],
)
def test_documents_are_joined_with_the_mark_there_is(tokenizer, stream):
    assert data.tokenize(["ab", "", "c"], tokenizer).tolist() == stream


def test_pack_drops_the_tail():
    packed = data.pack(["abcdefg"], Letters(), length=3)
    assert packed.dtype == torch.int64
    assert packed.tolist() == [[97, 98, 99], [100, 101, 102]]


@pytest.mark.parametrize("texts", [[], [""], ["ab"]])
def test_too_little_text_says_the_numbers(texts):
    found = sum(len(text) for text in texts)
    with pytest.raises(BadInput, match=f"training set is empty: {found} tokens found, one sequence needs 5"):
        data.pack(texts, Letters(), length=5)


def test_evaluation_windows_start_at_multiples_of_the_stride():
    windows = data.evaluation_windows(torch.arange(100), length=5, stride=20, count=3)
    assert windows[:, 0].tolist() == [0, 20, 40]
    assert windows[1].tolist() == [20, 21, 22, 23, 24]
    assert len(data.evaluation_windows(torch.arange(100), length=5, stride=20)) == 5
    with pytest.raises(BadInput, match="has 3 tokens, one window needs 5"):
        data.evaluation_windows(torch.arange(3), length=5)


# ── Order ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batches_depend_on_seed_and_step_alone():
    sequences = torch.arange(10).view(10, 1).expand(10, 4)
    forward = [data.Batches(sequences, 3, seed=5).batch(step) for step in range(20)]
    backward = [data.Batches(sequences, 3, seed=5).batch(step) for step in reversed(range(20))][::-1]
    other = [data.Batches(sequences, 3, seed=6).batch(step) for step in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(forward, other, strict=True))


@pytest.mark.parametrize("size", [1, 3, 10, 25])
def test_every_epoch_shows_every_sequence_once_in_a_new_order(size):
    batches = data.Batches(torch.arange(10).view(10, 1), size, seed=0)
    seen = torch.cat([batches.batch(step) for step in range(-(-30 // size))]).flatten()[:30].view(3, 10)
    assert all(epoch.sort().values.tolist() == list(range(10)) for epoch in seen)
    assert seen[0].tolist() != seen[1].tolist() != seen[2].tolist()


def test_ready_made_batches_come_once_an_epoch():
    inputs = [{"x": torch.full((1,), float(i))} for i in range(4)]
    source = data.InputBatches(inputs, seed=1)
    assert sorted(float(source.batch(step)["x"]) for step in range(4, 8)) == [0, 1, 2, 3]


def test_fingerprints_tell_sources_apart():
    a = torch.arange(6).view(2, 3)
    sources = [data.Batches(a, 1, 0), data.Batches(a + 1, 1, 0), data.Batches(a, 2, 0), data.Batches(a, 1, 1)]
    sources += [data.Batches(a.view(3, 2), 1, 0), data.InputBatches([{"x": a}], 0), data.InputBatches([{"y": a}], 0)]
    assert len({source.fingerprint() for source in sources}) == len(sources)
    assert data.Batches(a.clone(), 1, 0).fingerprint() == sources[0].fingerprint()


def test_empty_sources_are_refused():
    with pytest.raises(BadInput, match=r"training set is empty: its shape is \(0, 4\)"):
        data.Batches(torch.zeros(0, 4).long(), 1, 0)
    with pytest.raises(BadInput, match="at least 1 sequence, got 0"):
        data.Batches(torch.zeros(1, 4).long(), 0, 0)
    with pytest.raises(BadInput, match="0 batches found"):
        data.InputBatches([], 0)


# ── Batches the caller made ──────────────────────────────────────────────────────────────────────────────────────


def test_tensors_and_mappings_become_keyword_inputs():
    specs = data.input_specs(_llama())
    ids, mask = torch.ones(2, 5).long(), torch.ones(2, 5).long()
    made = data.as_batches([ids, {"input_ids": ids.int(), "attention_mask": mask}], specs, name="train")
    assert [sorted(inputs) for inputs in made] == [["input_ids"], ["attention_mask", "input_ids"]]
    assert [list(inputs) for inputs in data.as_batches(ids, specs, name="train")] == [["input_ids"]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(5).long(), r"calibration\[1\]\['input_ids'\] has shape \(5,\), the model takes \(any, any\)"),
        (torch.ones(2, 5, 3).long(), r"has shape \(2, 5, 3\), the model takes \(any, any\)"),
        (torch.ones(2, 0).long(), r"has shape \(2, 0\).*none may be 0"),
        (torch.ones(2, 5), r"\['input_ids'\] has dtype float32, the model takes int64"),
        (torch.full((2, 5), 50), r"token ids from 50 to 50, the model knows 0 to 49"),
        (torch.full((2, 5), -1), r"token ids from -1 to -1, the model knows 0 to 49"),
        ({"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 4).long()},
         r"attention_mask is \(2, 4\) but input_ids is \(2, 5\)"),
        ("text", r"calibration\[1\] is str; give a tensor, or a mapping"),
        ({"input_ids": [1, 2]}, r"calibration\[1\] is dict; give a tensor, or a mapping"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_are_named(batch, message):
    with pytest.raises(BadInput, match=message):
        data.as_batches([torch.ones(2, 5).long(), batch], data.input_specs(_llama()), name="calibration")


def test_images_are_checked_against_the_configured_size():
    vit = ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                  num_attention_heads=2)
    )  # fmt: skip
    specs = data.input_specs(vit)
    assert list(data.as_batches([torch.zeros(2, 3, 16, 16)], specs, name="train")[0]) == ["pixel_values"]
    with pytest.raises(BadInput, match=r"\(2, 3, 8, 8\), the model takes \(any, 3, 16, 16\) float32"):
        data.as_batches([torch.zeros(2, 3, 8, 8)], specs, name="train")


def test_modules_that_say_nothing_are_not_checked():
    module = nn.Linear(3, 3)
    assert data.input_specs(module) == {}
    assert data.main_input(module) == "input"
    made = data.as_batches([torch.zeros(2, 3)], {}, name="train", main=data.main_input(module))
    assert list(made[0]) == ["input"]
    with pytest.raises(BadInput, match="train is empty: 0 batches"):
        data.as_batches([], {}, name="train")


# ── Sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bos", [1, None])
def test_samples_come_from_the_models_own_distribution(bos):
    model = _llama(bos).train()
    with torch.no_grad():
        model.lm_head.weight[7] += 40 * model.model.norm.weight / 32**0.5
    state = torch.get_rng_state()
    sampled = data.sample_sequences(model, count=5, length=6, seed=3, batch=2)
    assert sampled.shape == (5, 6)
    assert sampled.dtype == torch.int64
    assert 0 <= int(sampled.min()) <= int(sampled.max()) < 50
    if bos is not None:
        assert (sampled[:, 0] == bos).all()
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sampled, data.sample_sequences(model, count=5, length=6, seed=3, batch=2))
    assert not torch.equal(sampled, data.sample_sequences(model, count=5, length=6, seed=4, batch=2))


def test_a_certain_model_samples_its_certainty():
    class Counting(nn.Module):
        """Says that the next token is the last one plus 1; keeps no cache."""

        def __init__(self) -> None:
            super().__init__()
            self.config = LlamaConfig(vocab_size=9, bos_token_id=2)
            self.scale = nn.Parameter(torch.tensor(1e4))

        def forward(self, input_ids, past_key_values, use_cache):
            output = nn.functional.one_hot((input_ids + 1) % 9, 9) * self.scale
            return type("Output", (), {"logits": output})()

    assert data.sample_sequences(Counting(), 2, 5, seed=0).tolist() == [[2, 3, 4, 5, 6]] * 2
