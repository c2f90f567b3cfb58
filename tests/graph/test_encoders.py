"""Sentence encoders: embeddings and correlations are what their definitions say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from blora_compiler.errors import BadInput
from blora_compiler.evaluate import (
    SentencePair,
    encoder_quality,
    mean_cosine,
    read_sts,
    sentence_embeddings,
    spearman_on_pairs,
)
from tests.models import build

_VOCABULARY = "a the cat dog sat ran on under mat tree very old red fast"
WORDS = _VOCABULARY.split()
SENTENCES = ["the cat sat", "a very old dog ran fast under the red tree", "dog", "the mat on the tree", "a cat ran"]
PAIRS = [
    SentencePair(SENTENCES[0], SENTENCES[4], 3.0),
    SentencePair(SENTENCES[1], SENTENCES[2], 1.5),
    SentencePair(SENTENCES[3], SENTENCES[0], 2.0),
    SentencePair(SENTENCES[2], SENTENCES[2], 5.0),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    marks = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    words = Tokenizer(WordLevel(marks | {word: 4 + index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def test_an_embedding_is_the_normalised_mean_over_attended_tokens(tokenizer):
    model = build("bert").train()
    found = sentence_embeddings(model, tokenizer, SENTENCES, batch=2)
    assert found.shape == (5, 64)
    assert found.dtype == torch.float32
    assert model.training
    assert torch.allclose(found.norm(dim=-1), torch.ones(5))
    model.eval()
    for sentence, embedding in zip(SENTENCES, found, strict=True):
        with torch.no_grad():  # alone, so that there is no padding
            mean = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(embedding, mean / mean.norm(), atol=1e-6, rtol=1e-5)


def test_long_sentences_are_cut(tokenizer):
    model = build("bert")
    cut = sentence_embeddings(model, tokenizer, [SENTENCES[1]], max_length=5)
    torch.testing.assert_close(cut, sentence_embeddings(model, tokenizer, ["a very old"]))


def test_spearman_ranks_cosines_against_scores(tokenizer):
    model = build("bert")
    first, second = (
        sentence_embeddings(model, tokenizer, texts) for texts in zip(*[p[:2] for p in PAIRS], strict=True)
    )
    cosines = torch.cosine_similarity(first, second).tolist()
    expected = spearmanr(cosines, [pair.score for pair in PAIRS]).statistic
    assert spearman_on_pairs(model, tokenizer, PAIRS) == pytest.approx(expected)


def test_quality_holds_both_measures_and_what_they_were_taken_on(tokenizer):
    model = build("bert")
    same = encoder_quality(model, model, tokenizer, PAIRS, max_length=64)
    assert same.mean_cosine == pytest.approx(1.0)
    assert same.spearman == spearman_on_pairs(model, tokenizer, PAIRS, max_length=64)
    assert (same.pairs, same.sentences, same.max_length) == (4, 5, 64)
    assert str(same).endswith(", mean cosine to the teacher 1.0000 (4 pairs, 5 sentences)")
    assert same.to_json()["pairs"] == 4
    torch.manual_seed(1)
    other = type(model)(model.config)
    student = encoder_quality(other, model, tokenizer, PAIRS)
    ours, theirs = (sentence_embeddings(m, tokenizer, SENTENCES) for m in (other, model))
    assert student.mean_cosine == pytest.approx(float((ours * theirs).sum(-1).mean()), abs=1e-6)
    assert encoder_quality(model, None, tokenizer, PAIRS).mean_cosine is None


def test_an_encoder_that_tells_nothing_apart_has_no_correlation(tokenizer):
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(4))

        def forward(self, input_ids: Any, **others: Any) -> Any:
            return SimpleNamespace(last_hidden_state=self.one.expand(*input_ids.shape, 4))

    assert spearman_on_pairs(Constant(), tokenizer, PAIRS) is None
    assert "Spearman undefined (all cosines are equal)" in str(encoder_quality(Constant(), None, tokenizer, PAIRS))


def test_what_cannot_be_embedded_or_compared_is_refused(tokenizer):
    model = build("bert")
    with pytest.raises(BadInput, match="no sentence is given"):
        sentence_embeddings(model, tokenizer, [])
    with pytest.raises(BadInput, match="has no padding token"):
        sentence_embeddings(model, SimpleNamespace(pad_token=None), ["a"])
    with pytest.raises(BadInput, match="LlamaForCausalLM gives no last_hidden_state"):
        sentence_embeddings(build("llama"), _without_types(tokenizer), ["a"])
    with pytest.raises(BadInput, match="4 pairs without two different scores rank nothing"):
        spearman_on_pairs(model, tokenizer, [pair._replace(score=1.0) for pair in PAIRS])
    with pytest.raises(BadInput, match=r"shapes \(2, 3\) and \(3, 3\) cannot be compared"):
        mean_cosine(torch.ones(2, 3), torch.ones(3, 3))


def _without_types(tokenizer: Any) -> Any:
    def call(texts: list[str], **settings: Any) -> dict[str, torch.Tensor]:
        inputs = tokenizer(texts, **settings)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    call.pad_token = "[PAD]"  # type: ignore[attr-defined]
    return call


def test_mean_cosine_ignores_norms():
    first = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    second = torch.tensor([[6.0, 8.0], [5.0, 0.0]])
    assert mean_cosine(first, second) == pytest.approx(0.5)


def test_sts_rows_are_read_with_quotes_and_commas(tmp_path):
    file = tmp_path / "sts.csv"
    file.write_text("A man, alone.,A man.,3.25\n".replace("A man, alone.", '"A man, ""alone""."') + "One,Two,0\n")
    assert read_sts(file) == [SentencePair('A man, "alone".', "A man.", 3.25), SentencePair("One", "Two", 0.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n", "sts.csv, line 1: 2 columns where sentence1,sentence2,score are 3"),
        ("a,b,1\na,b,c,1\n", "sts.csv, line 2: 4 columns"),
        ("sentence1,sentence2,score\n", "line 1: the score 'score' is no number; the file has no header"),
        ("a,b,5.5\n", "line 1: the score 5.5 is not from 0 to 5"),
        ("a,b,nan\n", "line 1: the score nan is not from 0 to 5"),
        ("a, ,1\n", "line 1: a sentence is empty"),
        ('"a\nb",c,7\n', "line 2: the score 7 is not"),
        ('a,"b"x,1\n', "line 1: not CSV"),
        ("a,b\nc,d\n", r"2 problems:\n  - .*line 1.*\n  - .*line 2"),
        ("", "sts.csv: no row; each is sentence1,sentence2,score"),
        (b"\xff", "sts.csv: byte 0 is not UTF-8"),
    ],
)
def test_malformed_sts_files_are_refused_by_line_and_reason(tmp_path, content, message):
    file = tmp_path / "sts.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message):
        read_sts(file)


def test_a_missing_sts_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.csv: cannot be read \(No such file or directory\); check the path"):
        read_sts(tmp_path / "gone.csv")
