"""How good a sentence encoder is: rank correlation with human similarity scores, and closeness to its teacher."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import BadInput, listed
from .probes import in_eval_mode


class SentencePair(NamedTuple):
    """Two sentences and how alike people found them, from 0 to 5."""

    first: str
    second: str
    score: float


def read_sts(path: str | Path) -> list[SentencePair]:
    """Reads a file of the STS benchmark: UTF-8 CSV without a header, `sentence1,sentence2,score`, scores from 0 to 5.

    Raises:
        BadInput: if the file is missing, empty or not UTF-8; or listing the lines that are no such row.
    """
    path = Path(path)
    pairs: list[SentencePair] = []
    problems: list[str] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                # A quoted sentence may hold a line end, so this is where the row stopped.
                found = _pair(row)
                if isinstance(found, str):
                    problems.append(f"{path}, line {reader.line_num}: {found}")
                else:
                    pairs.append(found)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8; re-encode the file") from error
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: not CSV ({error}); check its quotes") from error
    if problems:
        raise BadInput(listed(problems))
    if not pairs:
        raise BadInput(f"{path}: no row; each is sentence1,sentence2,score")
    return pairs


def _pair(row: list[str]) -> SentencePair | str:
    """The pair of a row, or what is wrong with it."""
    if len(row) != 3:
        return f"{len(row)} columns where sentence1,sentence2,score are 3; quote sentences that have a comma"
    first, second, text = row
    if not first.strip() or not second.strip():
        return "a sentence is empty"
    try:
        score = float(text)
    except ValueError:
        return f"the score {text!r} is no number; the file has no header"
    if not 0.0 <= score <= 5.0:
        return f"the score {text} is not from 0 to 5"
    return SentencePair(first, second, score)


def sentence_embeddings(
    model: nn.Module, tokenizer: Any, sentences: Sequence[str], max_length: int = 128, batch: int = 64
) -> Tensor:
    """Embeds sentences: the mean of the last hidden states over attended tokens, divided by its L2 norm.

    Args:
        model: an encoder of transformers; its output has `last_hidden_state` (batch, tokens, width).
        tokenizer: its tokenizer; marks such as CLS and SEP are added as it does by default, and are part of the mean.
        sentences: texts; tokens beyond `max_length`, marks included, are cut off.
        max_length: in tokens.
        batch: sentences per forward pass; those of one pass are of similar length.

    Returns:
        (sentences, width) float32 on the CPU, in the order given, each of norm 1.

    Raises:
        BadInput: no sentence, a tokenizer that cannot pad, or a model without hidden states in its output.
    """
    if not sentences:
        raise BadInput("no sentence is given; at least 1 is needed")
    if getattr(tokenizer, "pad_token", None) is None:
        raise BadInput("the tokenizer has no padding token to fill a batch with; set tokenizer.pad_token")
    device = next(model.parameters()).device
    by_length = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    pooled: list[Tensor] = []
    with in_eval_mode(model):
        for first in range(0, len(by_length), batch):
            texts = [sentences[index] for index in by_length[first : first + batch]]
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            pooled.append(_mean_of_attended(model, {name: value.to(device) for name, value in inputs.items()}).cpu())
    embeddings = torch.cat(pooled)
    return F.normalize(embeddings[torch.tensor(by_length).argsort()], dim=-1)


def _mean_of_attended(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(batch, width) float32."""
    with torch.autocast(inputs["input_ids"].device.type, enabled=False):
        output = model(**inputs)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise BadInput(
            f"{type(model).__name__} gives no last_hidden_state, so there is nothing to pool; "
            f"give the encoder without its head"
        )
    weights = inputs["attention_mask"].unsqueeze(-1).float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def spearman_on_pairs(
    model: nn.Module, tokenizer: Any, pairs: Sequence[SentencePair], *, max_length: int = 128, batch: int = 64
) -> float | None:
    """Spearman correlation, over pairs, of the cosine of their embeddings with their scores.

    Returns:
        None where all cosines are equal: a model that tells no sentences apart has no ranking.

    Raises:
        BadInput: fewer than two pairs, equal scores throughout, or as `sentence_embeddings`.
    """
    _check_pairs(pairs)
    sentences = _distinct(pairs)
    return _spearman(sentence_embeddings(model, tokenizer, sentences, max_length, batch), sentences, pairs)


def mean_cosine(student: Tensor, teacher: Tensor) -> float:
    """Mean over sentences of the cosine between a student's and a teacher's embedding.

    Args:
        student, teacher: (sentences, width), of the same sentences in the same order; any norm.

    Raises:
        BadInput: if the shapes differ, or there is no sentence.
    """
    if student.shape != teacher.shape or student.ndim != 2 or not len(student):
        raise BadInput(
            f"embeddings of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared; both are "
            f"(sentences, width), with at least 1 sentence"
        )
    return float(F.cosine_similarity(student.double(), teacher.double(), dim=-1).mean())


@dataclass(frozen=True)
class EncoderQuality:
    """What was measured of a sentence encoder, and on what.

    Attributes:
        spearman: rank correlation of cosines with scores over `pairs`; None where all cosines are equal.
        mean_cosine: to the teacher's embeddings, over `sentences`; None without a teacher.
        pairs: number of scored pairs.
        sentences: number of distinct sentences in them.
        max_length: tokens that a sentence was cut to.
    """

    spearman: float | None
    mean_cosine: float | None
    pairs: int
    sentences: int
    max_length: int

    def __str__(self) -> str:
        spearman = "undefined (all cosines are equal)" if self.spearman is None else f"{self.spearman:.4f}"
        distance = "" if self.mean_cosine is None else f", mean cosine to the teacher {self.mean_cosine:.4f}"
        return f"Spearman {spearman}{distance} ({self.pairs} pairs, {self.sentences} sentences)"

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def encoder_quality(
    student: nn.Module,
    teacher: nn.Module | None,
    tokenizer: Any,
    pairs: Sequence[SentencePair],
    *,
    max_length: int = 128,
    batch: int = 64,
) -> EncoderQuality:
    """Scores a sentence encoder: `spearman_on_pairs`, and `mean_cosine` to the teacher over the pairs' sentences.

    Args:
        student, teacher: see `sentence_embeddings`; both read the same tokens.
        tokenizer: of both.
        pairs: from `read_sts`.
        max_length, batch: see `sentence_embeddings`.

    Raises:
        BadInput: as `spearman_on_pairs` and `mean_cosine`.
    """
    _check_pairs(pairs)
    sentences = _distinct(pairs)
    embeddings = sentence_embeddings(student, tokenizer, sentences, max_length, batch)
    closeness = None
    if teacher is not None:
        closeness = mean_cosine(embeddings, sentence_embeddings(teacher, tokenizer, sentences, max_length, batch))
    spearman = _spearman(embeddings, sentences, pairs)
    return EncoderQuality(spearman, closeness, len(pairs), len(sentences), max_length)


def _check_pairs(pairs: Sequence[SentencePair]) -> None:
    if len({pair.score for pair in pairs}) < 2:
        raise BadInput(f"{len(pairs)} pairs without two different scores rank nothing; give more pairs")


def _distinct(pairs: Sequence[SentencePair]) -> list[str]:
    return list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))


def _spearman(embeddings: Tensor, sentences: Sequence[str], pairs: Sequence[SentencePair]) -> float | None:
    from scipy.stats import spearmanr

    rows = {text: index for index, text in enumerate(sentences)}
    first = embeddings[[rows[pair.first] for pair in pairs]]
    second = embeddings[[rows[pair.second] for pair in pairs]]
    cosines = (first.double() * second.double()).sum(dim=-1).tolist()
    if len(set(cosines)) < 2:
        return None
    correlation = float(spearmanr(cosines, [pair.score for pair in pairs]).statistic)
    return None if math.isnan(correlation) else correlation
