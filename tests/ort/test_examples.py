"""Every example runs, at toy size, so that they stay true."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_no_example_is_left_out():
    tested = {"compress_a_language_model", "plan_without_weights", "plain_module", "sentence_encoder", "what_if"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.long
def test_compress_a_language_model(tmp_path):
    text = example("compress_a_language_model")(
        ["--budget", "0.6", "--steps", "2", "--length", "32", "--out", str(tmp_path)]
    )
    assert text.startswith("It was a dark night, and")
    assert len(text) > len("It was a dark night, and") + 10


def test_plan_without_weights():
    plan = example("plan_without_weights")(["--layers", "8", "--width", "1024"])
    assert plan.fraction <= 0.25
    assert plan.damage is None
    assert {str(form) for site, form in plan.forms.items() if ".layers.0." in site} == {
        "dense"
    } or plan.fraction < 0.25


def test_what_if(tmp_path):
    arguments = ["--layers", "4", "--width", "1024", "--budgets", "0.3", "1.0", "--out", str(tmp_path / "page.html")]
    answers = example("what_if")(arguments)
    assert answers.point(0.3)["speedup"] > answers.point(1.0)["speedup"] == 1.0
    assert (tmp_path / "page.html").stat().st_size > 1_000_000


def test_plain_module(tmp_path):
    distance = example("plain_module")(["--steps", "3", "--out", str(tmp_path / "onnx")])
    assert 0 < distance < 0.5


def test_sentence_encoder(tmp_path):
    import json
    import string

    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    letters = list(string.ascii_lowercase)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        vocab_size=len(vocabulary), max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "encoder"
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    words = ["a cat sleeps", "the dog runs off", "two men play chess", "rain falls on a lake", "she reads"]
    sentences = [f"{first} while {second}" for first in words for second in words]
    (tmp_path / "sentences.txt").write_text("\n".join(sentences))
    rows = [
        f'"{first}","{second}",{index % 6}.0' for index, (first, second) in enumerate(itertools.pairwise(sentences))
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    found = example("sentence_encoder")(
        ["--model", str(folder), "--sentences", str(tmp_path / "sentences.txt"),
         "--pairs", str(tmp_path / "pairs.csv"),
         "--steps", "3", "--batch", "8", "--length", "32", "--repeats", "1", "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert set(found) == {"speedup 1x32", "speedup 8x32", "spearman dense", "spearman compressed"}
    exported = json.loads((tmp_path / "out" / "onnx" / "export.json").read_text())
    assert exported
