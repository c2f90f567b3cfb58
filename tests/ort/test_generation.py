"""The Generator: an export generates as the PyTorch model does, in a process that has no PyTorch model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from blora_compiler.artifact import Artifact
from blora_compiler.errors import BadInput
from blora_compiler.generation import FixedCache
from blora_compiler.lowering import lower
from tests.models import build

VOCABULARY = 128


def qwen() -> nn.Module:
    """As Qwen: biases on q/k/v alone, grouped heads, a head of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def mistral() -> nn.Module:
    """Every layer sees a window of the last tokens only, shorter than the prompts."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=128, sliding_window=4, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


MADE_HERE = {"qwen": qwen, "mistral": mistral}


@pytest.fixture(scope="module", params=["llama", "gpt2", *MADE_HERE])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    """A model with a generation config of its own, and its export opened from disk."""
    model = MADE_HERE[request.param]() if request.param in MADE_HERE else build(request.param)
    model.generation_config.pad_token_id = 0
    folder = tmp_path_factory.mktemp(request.param) / "export"
    lower(model, folder, inputs={"input_ids": torch.randint(1, VOCABULARY, (2, 8))}, new_tokens=8)
    return model, Artifact.load(folder, threads=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("llama") / "export"
    return lower(build("llama"), folder, inputs={"input_ids": torch.randint(1, VOCABULARY, (2, 8))}, new_tokens=4)


def padded() -> dict[str, Tensor]:
    """Three prompts of unequal length, the shorter two padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_generates_what_pytorch_generates(pair: tuple[nn.Module, Artifact], setting: str) -> None:
    model, artifact = pair
    options = {**padded(), **SETTINGS[setting], "max_new_tokens": 12}
    torch.manual_seed(7)
    expected = model.generate(**options)
    torch.manual_seed(7)
    assert torch.equal(artifact.generator().generate(**options), expected)
    assert expected.shape[1] > 9


@pytest.mark.parametrize("setting", ["greedy", "sampling", "beams"])
def test_a_cache_of_fixed_size_changes_nothing(pair: tuple[nn.Module, Artifact], setting: str) -> None:
    model, artifact = pair
    if model.config.model_type == "gpt2":
        with pytest.raises(BadInput, match=r"no cache of fixed size: Concat .* reads input.past_key_values"):
            artifact.generator(max_length=32)
        return
    options = {**padded(), **SETTINGS[setting], "max_new_tokens": 12}
    torch.manual_seed(7)
    growing = artifact.generator().generate(**options)
    torch.manual_seed(7)
    assert torch.equal(artifact.generator(max_length=20).generate(**options), growing)


def test_logits_of_a_fixed_cache_equal_those_of_a_growing_one(llama: Artifact) -> None:
    """Step by step, bit for bit, up to the last place of the buffer."""
    prompt = padded()
    mask = prompt["attention_mask"]
    output = llama.prefill(prompt["input_ids"], mask)
    cache = FixedCache(llama, output.past_key_values, 13)
    addresses = {name: buffer.data_ptr() for name, buffer in cache.buffers.items()}
    for step in range(4):
        token = output.logits[:, -1:].argmax(dim=-1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        output = llama.decode(token, mask, output.past_key_values)
        assert torch.equal(cache.decode(token, mask), output.logits), step
    for index, layer in enumerate(output.past_key_values.layers):
        assert torch.equal(cache.buffers[f"past_key_values.layers.{index}.keys"], layer.keys)
    assert {name: buffer.data_ptr() for name, buffer in cache.buffers.items()} == addresses
    with pytest.raises(BadInput, match="the cache of 13 tokens is full"):
        cache.decode(token, torch.cat([mask, mask.new_ones(3, 1)], dim=1))


def test_the_mask_of_ones_may_be_left_out(pair: tuple[nn.Module, Artifact]) -> None:
    model, artifact = pair
    ids = torch.randint(1, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(artifact.generator().generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_streamers_and_stopping_criteria_work(pair: tuple[nn.Module, Artifact]) -> None:
    model, artifact = pair

    class Collected(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    class AfterEleven(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 11)

    ids = torch.randint(1, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(3))
    streamer = Collected()
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": VOCABULARY + 1}
    generated = artifact.generator().generate(
        ids, streamer=streamer, stopping_criteria=StoppingCriteriaList([AfterEleven()]), **options
    )
    assert generated.shape == (1, 11)
    assert streamer.tokens == generated[0].tolist()
    assert streamer.ended
    end = int(generated[0, 8])
    stopped = artifact.generator().generate(ids, **{**options, "eos_token_id": end})
    assert torch.equal(stopped, model.generate(ids, **{**options, "eos_token_id": end}))
    assert int(stopped[0, -1]) == end


@pytest.mark.parametrize("max_length", [None, 40])
def test_a_conversation_goes_on_behind_its_cache(llama: Artifact, max_length: int | None) -> None:
    """A second message of several tokens behind the cache of the first gives what both at once give."""
    generator = llama.generator(max_length)
    first = torch.randint(1, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(3))
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": VOCABULARY + 1}
    said = generator.generate(first, return_dict_in_generate=True, **options)
    second = torch.cat([said.sequences, torch.tensor([[9, 8, 7]])], dim=1)
    again = generator.generate(second, past_key_values=said.past_key_values, **options)
    assert torch.equal(again, generator.generate(second, **options))


def test_the_models_own_generation_defaults_are_used(tmp_path: Path) -> None:
    model = build("llama")
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = [VOCABULARY + 1]
    folder = tmp_path / "export"
    lower(model, folder, inputs={"input_ids": torch.randint(1, VOCABULARY, (2, 8))}, new_tokens=4)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(Artifact.load(folder).generator().generate(ids), model.generate(ids))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_it_runs_in_a_process_of_its_own_without_the_model(llama: Artifact) -> None:
    code = (
        "import sys, torch, blora_compiler as blora\n"
        "artifact = blora.Artifact.load(sys.argv[1])\n"
        "tokens = artifact.generator().generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)\n"
        "assert not any('models.llama.modeling' in name for name in sys.modules)\n"
        "print(tokens[0].tolist())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(llama.folder)], capture_output=True, text=True, check=True
    )
    expected = llama.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, eos_token_id=0)
    assert json.loads(result.stdout) == expected[0].tolist()


def test_configuration_files_are_part_of_the_export(llama: Artifact, tmp_path: Path) -> None:
    import shutil

    assert {"config.json", "generation_config.json"} <= {path.name for path in llama.files}
    changed = tmp_path / "changed"
    shutil.copytree(llama.folder, changed)
    (changed / "generation_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"generation_config\.json has 2 bytes"):
        Artifact.load(changed)


def test_an_export_without_configuration_says_so(llama: Artifact, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no config\.json: it was exported by an earlier version"):
        Artifact(tmp_path, llama.manifest).generator()


def test_what_cannot_generate_says_so(tmp_path: Path) -> None:
    exported = lower(build("bert"), tmp_path / "bert", inputs={"input_ids": torch.ones(2, 8, dtype=torch.int64)})
    with pytest.raises(BadInput, match="generating needs prefill and decode"):
        exported.generator()
    with pytest.raises(BadInput, match="holds no tokenizer"):
        exported.tokenizer()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size is set"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is set"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "ends in padding"),
        ({"attention_mask": torch.tensor([[0, 1]])}, r"attention_mask has shape \(1, 2\)"),
        ({"prompt_lookup_num_tokens": 2}, "only supports"),
        ({"no_such_option": 2}, "no_such_option"),
    ],
)
def test_what_an_export_cannot_do_is_refused(llama: Artifact, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama.generator().generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, **options)


def test_more_tokens_than_the_model_has_positions_are_refused(llama: Artifact) -> None:
    limit = llama.manifest["positions"]
    prompt = torch.tensor([[3, 4, 5]])
    with pytest.raises(BadInput, match=rf"up to {limit + 1} tokens would be cached, the model has {limit} positions"):
        llama.generate(prompt, max_new_tokens=limit - 1)
    with pytest.raises(BadInput, match=f"the model has {limit} positions"):
        llama.generator().generate(prompt, max_new_tokens=limit + 8)


def test_a_cache_too_small_is_refused_before_the_first_step(llama: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = llama.generator(max_length=10)
    assert generator.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=8).shape[1] <= 11
    monkeypatch.setattr(Artifact, "prefill", None)
    with pytest.raises(BadInput, match="up to 11 tokens would be cached and the cache holds 10"):
        generator.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=9)
    with pytest.raises(BadInput, match="max_length is 0"):
        llama.generator(max_length=0)
