"""In-context-learning probes: does a model still pick up a function from a few examples in its prompt?

A task is a list of (input, output) pairs of one function. A question shows `k` of them and asks for the output of
another input; it is answered right if greedy generation up to the first newline is that output. Questions are a
function of task, `k` and seed, never of the model, so a student is asked what its teacher was asked, and their
answers can be compared one by one. docs/evaluation.md says exactly what each number is.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .errors import BadInput, did_you_mean, listed
from .source import position_limit

SCHEMA = 1
# An answer is generated for as many tokens as the right one has bytes, and some for white space and the newline.
_SPARE_TOKENS = 8

T = TypeVar("T")


# ── Tasks ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Pair(NamedTuple):
    """One example of a function; both texts as the file has them."""

    input: str
    output: str


@dataclass(frozen=True)
class Task:
    """Pairs of one function.

    Attributes:
        name: the file's name without its suffix.
        pairs: what queries come from, and shots as far as they suffice; each pair once.
        trained: pairs that the model was trained on. Never queries; shots only where `pairs` are too few.
    """

    name: str
    pairs: tuple[Pair, ...]
    trained: tuple[Pair, ...] = ()


def read_tasks(
    path: str | Path, held_out: bool = True, *, trained_fraction: float = 0.8, split_seed: int = 0
) -> list[Task]:
    """Reads function-style tasks, sorted by name. Each file is a JSON list of `{"input": text, "output": text}`.

    Args:
        path: a file, or a folder whose `.json` files are read, those of its subfolders too.
        held_out: keep for queries only what a model trained on the tasks has not seen. The list is shuffled by
            `random.Random(split_seed)`; its first `int(trained_fraction * n)` pairs were trained on, the rest were
            not, except where a pair is listed in both parts. False: all pairs may be asked and shown, for a model
            that was not trained on them.

    Raises:
        BadInput: naming the files that are missing, no JSON, no such list, or have a pair that cannot be asked.
    """
    path = Path(path)
    if not 0.0 <= trained_fraction < 1.0:
        raise BadInput(f"trained_fraction is {trained_fraction}; it is a share of the pairs, from 0 to below 1")
    files = sorted(path.rglob("*.json"), key=lambda file: file.stem) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"{path}: no .json file in this folder or below it; a task is a JSON list of pairs")
    repeated = [name for name, count in Counter(file.stem for file in files).items() if count > 1]
    if repeated:
        raise BadInput(f"{path}: several files are named {repeated[0]}.json; tasks are told apart by their names")
    problems: list[str] = []
    tasks: list[Task] = []
    for file in files:
        try:
            tasks.append(_split(file, _read_pairs(file), trained_fraction if held_out else 0.0, split_seed))
        except BadInput as error:
            problems.append(str(error))
    if problems:
        raise BadInput(listed(problems))
    return tasks


def _read_pairs(file: Path) -> list[Pair]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: byte {error.start} is not UTF-8; re-encode the file") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"{file}: not JSON ({error.msg} at line {error.lineno}, column {error.colno})") from error
    if not isinstance(content, list) or not content:
        raise BadInput(f'{file}: a task is a list of {{"input": text, "output": text}} with at least one pair')
    return [_pair(item, f"{file}: pair {index}") for index, item in enumerate(content)]


def _pair(item: object, where: str) -> Pair:
    match item:
        case {"input": str(shown), "output": str(answer)}:
            pass
        case _:
            raise BadInput(f'{where} is {str(item)[:80]}; write {{"input": text, "output": text}}')
    if not shown.strip() or not answer.strip():
        raise BadInput(f"{where}: the {'output' if shown.strip() else 'input'} is empty, so nothing can be asked")
    if "\n" in answer:
        raise BadInput(f"{where}: the output has a newline, but answers end at the first one; leave the pair out")
    return Pair(shown, answer)


def _split(file: Path, pairs: list[Pair], trained_fraction: float, split_seed: int) -> Task:
    shuffled = list(pairs)
    random.Random(split_seed).shuffle(shuffled)
    seen = int(trained_fraction * len(shuffled))
    trained = tuple(dict.fromkeys(shuffled[:seen]))
    rest = tuple(pair for pair in dict.fromkeys(shuffled[seen:]) if pair not in set(trained))
    if not rest:
        raise BadInput(f"{file}: all of its {len(pairs)} pairs were trained on, so none is left to ask; add pairs")
    return Task(file.stem, rest, trained)


# ── Questions ────────────────────────────────────────────────────────────────────────────────────────────────────


class Question(NamedTuple):
    """A prompt and the answer that counts as right, without white space around it."""

    prompt: str
    answer: str


def icl_questions(task: Task, k: int = 8, queries: int = 200, seed: int = 0) -> list[Question]:
    """The k-shot prompts of a task: `Q: {input}\\nA: {output}\\n\\n` for each shot, then `Q: {input}\\nA:`.

    Queries are the first `queries` of `task.pairs`. Each query draws its own shots, without repetition, from the
    pairs whose input is not the query's; the generator is seeded by `seed`, the task's name and the query, so a
    prompt does not depend on how many others there are. Shots come from `task.pairs`, and from `task.trained` as
    well only where there are fewer than `k` of the former (`uses_trained_shots`).

    Raises:
        BadInput: if `k` or `queries` is out of range, or even all pairs together are too few for `k` shots.
    """
    if k < 0 or queries < 1:
        raise BadInput(f"k is {k} and queries is {queries}; k is at least 0 and queries at least 1")
    pool = task.pairs + task.trained if uses_trained_shots(task, k) else task.pairs
    questions = []
    for query in task.pairs[:queries]:
        others = [pair for pair in pool if pair.input != query.input]
        if len(others) < k:
            raise BadInput(
                f"{task.name}: {k} shots are needed beside {query.input!r}, the task has {len(others)} pairs with "
                f"another input; lower k or add pairs"
            )
        shots = random.Random(json.dumps([seed, task.name, *query])).sample(others, k)
        shown = "".join(f"Q: {shot.input}\nA: {shot.output}\n\n" for shot in shots)
        questions.append(Question(f"{shown}Q: {query.input}\nA:", query.output.strip()))
    return questions


def uses_trained_shots(task: Task, k: int) -> bool:
    """Whether some query finds fewer than `k` shots among `task.pairs`, so that all draw from `task.trained` too."""
    most_of_one_input = max(Counter(pair.input for pair in task.pairs).values())
    return len(task.pairs) - most_of_one_input < k


def _fingerprint(questions: Sequence[Question]) -> str:
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()


# ── Results ──────────────────────────────────────────────────────────────────────────────────────────────────────


def wilson_interval(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: `right` out of `count` independent answers.

    Raises:
        BadInput: if there is no answer, or the confidence is not strictly between 0 and 1.
    """
    if count < 1:
        raise BadInput("an interval needs at least 1 answer, got 0")
    z = _deviations(confidence)
    share = right / count
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _deviations(confidence: float) -> float:
    """Standard deviations on either side of a mean that hold this share of a normal distribution."""
    if not 0.0 < confidence < 1.0:
        raise BadInput(f"confidence is {confidence}; it lies between 0 and 1, such as 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)


@dataclass(frozen=True)
class TaskScore:
    """How a model answered the questions of one task.

    Attributes:
        name: of the task.
        correct: one a question, in the order of `icl_questions`.
        available: pairs that could have been asked; more than `correct` where the number of queries was capped.
        constant_answer: the most frequent answer among the questions asked.
        constant_accuracy: what always giving that answer would score on them.
        trained_shots: whether shots were drawn from pairs the model was trained on, too.
        questions: SHA-256 of all prompts and answers; equal for two models that were asked the same.
    """

    name: str
    correct: tuple[bool, ...]
    available: int
    constant_answer: str
    constant_accuracy: float
    trained_shots: bool
    questions: str

    @property
    def count(self) -> int:
        """Number of questions."""
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        """Share of questions answered right."""
        return sum(self.correct) / self.count

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the accuracy."""
        return wilson_interval(sum(self.correct), self.count, confidence)

    def __str__(self) -> str:
        low, high = self.interval()
        return (
            f"{self.name}: {self.accuracy:.3f} [{low:.3f}, {high:.3f}] on {self.count} questions, "
            f"best constant answer {self.constant_accuracy:.3f}"
        )


@dataclass(frozen=True)
class ProbeResult:
    """The scores of one model, and how the questions were made.

    Attributes:
        tasks: in the order they were asked.
        k: shots in a prompt.
        queries: most questions a task.
        seed: of the shots.
    """

    tasks: tuple[TaskScore, ...]
    k: int
    queries: int
    seed: int

    @property
    def mean_accuracy(self) -> float:
        """Mean over tasks of their accuracies, whatever their numbers of questions."""
        return sum(task.accuracy for task in self.tasks) / len(self.tasks)

    def task(self, name: str) -> TaskScore:
        """The score of the named task.

        Raises:
            BadInput: if it was not asked.
        """
        found = next((task for task in self.tasks if task.name == name), None)
        if found is None:
            names = [task.name for task in self.tasks]
            raise BadInput(f"no score of task {name!r} among {len(names)}{did_you_mean(name, names)}")
        return found

    def table(self) -> str:
        """One line a task, and the mean."""
        return "\n".join([*map(str, self.tasks), f"mean of {len(self.tasks)} tasks: {self.mean_accuracy:.3f}"])

    def to_json(self) -> str:
        """All of it as text that `from_json` reads back as an equal result."""
        tasks = [{**vars(task), "correct": "".join("01"[right] for right in task.correct)} for task in self.tasks]
        return _json_text({"k": self.k, "queries": self.queries, "seed": self.seed, "tasks": tasks})

    @classmethod
    def from_json(cls, text: str, where: str = "probe result") -> ProbeResult:
        """The result that `to_json` wrote.

        Raises:
            BadInput: naming `where` (such as the file) and what makes the text no result.
        """
        return _from_json(text, where, _result_from_record)


def _result_from_record(record: dict[str, Any]) -> ProbeResult:
    tasks = tuple(
        TaskScore(
            name=str(item["name"]),
            correct=_answers_from_text(item["correct"]),
            available=int(item["available"]),
            constant_answer=str(item["constant_answer"]),
            constant_accuracy=float(item["constant_accuracy"]),
            trained_shots=bool(item["trained_shots"]),
            questions=str(item["questions"]),
        )
        for item in record["tasks"]
    )
    return ProbeResult(tasks, int(record["k"]), int(record["queries"]), int(record["seed"]))


def _answers_from_text(text: Any) -> tuple[bool, ...]:
    if not isinstance(text, str) or not text or set(text) - {"0", "1"}:
        raise ValueError(f"correct is {text!r:.40}, expected a text of 0 and 1")
    return tuple(digit == "1" for digit in text)


def _json_text(record: dict[str, Any]) -> str:
    return json.dumps({"schema": SCHEMA, **record}, indent=2, allow_nan=False) + "\n"


def _from_json(text: str, where: str, build: Callable[[dict[str, Any]], T]) -> T:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON ({error.msg} at line {error.lineno}, column {error.colno})") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise BadInput(f"{where}: schema is {schema!r}, this version reads {SCHEMA}; write it again with `to_json`")
    try:
        return build(record)
    except KeyError as error:
        raise BadInput(f"{where}: {error.args[0]!r} is missing; write it again with `to_json`") from error
    except (TypeError, ValueError) as error:
        raise BadInput(f"{where}: {error}; write it again with `to_json`") from error


# ── Asking a model ───────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Modules in eval mode without gradients; afterwards each is in the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in modes:  # not train(flag), which would set the modules inside alike
            module.training = flag


def icl_probe(
    model: nn.Module,
    tokenizer: Any,
    tasks: Iterable[Task],
    *,
    k: int = 8,
    queries: int = 200,
    seed: int = 0,
    batch: int = 16,
) -> ProbeResult:
    """Asks a causal language model the questions of each task and keeps which it answered right.

    Right means: greedy generation, cut at the first newline or end mark and stripped, equals the stripped output.
    One forward pass over prompt and answer decides that for nearly all questions, as it shows the token that greedy
    generation would have taken at each step. The few it leaves open, where the model starts to spell a possible
    answer in other tokens than the tokenizer, are generated. So it is what generation gives, up to ties in rounding.

    Args:
        model: a causal language model of transformers, in any floating dtype, on any one device.
        tokenizer: its tokenizer. A prompt begins with BOS where the tokenizer puts one.
        tasks: from `read_tasks`.
        k, queries, seed: see `icl_questions`.
        batch: questions per forward pass.

    Raises:
        BadInput: no task, two of one name, too few pairs for `k` shots, or prompts beyond the model's context;
            shots are never dropped to make them fit.
    """
    tasks = list(tasks)
    repeated = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if not tasks or repeated:
        raise BadInput(f"task {repeated[0]!r} is given twice" if repeated else "no task is given; give at least 1")
    questions = [icl_questions(task, k, queries, seed) for task in tasks]
    encoded = [[_encode(tokenizer, question) for question in asked] for asked in questions]
    _check_context(model, tasks, encoded, k)
    scores = []
    with in_eval_mode(model):
        for task, asked, tokens in zip(tasks, questions, encoded, strict=True):
            # Task by task, so that a score does not depend on which other tasks are asked, not even by rounding.
            correct = _answered_right(model, tokenizer, asked, tokens, batch)
            constant, times = Counter(question.answer for question in asked).most_common(1)[0]
            scores.append(
                TaskScore(
                    task.name,
                    correct,
                    len(task.pairs),
                    constant,
                    times / len(asked),
                    bool(task.trained) and uses_trained_shots(task, k),
                    _fingerprint(asked),
                )
            )
    return ProbeResult(tuple(scores), k, queries, seed)


class _Encoded(NamedTuple):
    """Token ids of a prompt, and those the tokenizer would give its right answer and the newline after it.

    The latter are empty where prompt and answer share a token.
    """

    prompt: list[int]
    answer: list[int]


def _encode(tokenizer: Any, question: Question) -> _Encoded:
    prompt = _token_ids(tokenizer, question.prompt)
    # As the next example would follow: some tokenizers have one token for two newlines, but not at the end of a text.
    whole = _token_ids(tokenizer, f"{question.prompt} {question.answer}\n\nQ:")
    if whole[: len(prompt)] != prompt:
        return _Encoded(prompt, [])
    rest = whole[len(prompt) :]
    ends = (count for count in range(1, len(rest) + 1) if "\n" in _text(tokenizer, rest[:count]))
    return _Encoded(prompt, rest[: next(ends, len(rest))])


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that goes on: a mark in front where the tokenizer puts one, none behind."""
    bos = tokenizer.bos_token_id
    marked = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    # verbose=False: a prompt that is too long is refused by `_check_context`, with numbers.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [bos, *ids] if marked else list(ids)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _check_context(model: nn.Module, tasks: Sequence[Task], encoded: Sequence[Sequence[_Encoded]], k: int) -> None:
    context = position_limit(model)
    problems = []
    for task, tokens in zip(tasks, encoded, strict=True):
        longest = max(len(item.prompt) + max(1, len(item.answer)) for item in tokens)
        if longest > context:
            problems.append(
                f"{task.name}: the longest of {len(tokens)} prompts with {k} shots has {longest} tokens with its "
                f"answer, {longest - context} more than the model's context of {context}; lower k or leave it out"
            )
    if problems:
        raise BadInput(listed(problems))


def _answered_right(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], encoded: Sequence[_Encoded], batch: int
) -> tuple[bool, ...]:
    ends = _end_marks(model, tokenizer)
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index].prompt) + len(encoded[index].answer))
    verdicts: dict[int, bool | None] = {}
    for first in range(0, len(by_length), batch):
        rows = by_length[first : first + batch]
        chosen = _greedy_choices(model, [encoded[row] for row in rows])
        for row, greedy in zip(rows, chosen, strict=True):
            verdicts[row] = _verdict(tokenizer, greedy, encoded[row].answer, questions[row].answer, ends)
    undecided = [row for row in by_length if verdicts[row] is None]
    for first in range(0, len(undecided), batch):
        rows = undecided[first : first + batch]
        most = max(len(questions[row].answer.encode()) for row in rows) + _SPARE_TOKENS
        texts = _generated(model, tokenizer, [encoded[row].prompt for row in rows], most)
        verdicts |= {row: text == questions[row].answer for row, text in zip(rows, texts, strict=True)}
    return tuple(bool(verdicts[row]) for row in range(len(encoded)))


def _greedy_choices(model: nn.Module, rows: Sequence[_Encoded]) -> list[list[int]]:
    """For each row and each token of its answer, the likeliest token after prompt and the answer so far.

    Padded on the right: a causal model's earlier positions do not see what follows, and positions count from 0.
    """
    device = _device(model)
    inputs = [row.prompt + row.answer[:-1] for row in rows]
    longest = max(map(len, inputs))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in inputs], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in inputs], device=device)
    first = min(len(row.prompt) for row in rows) - 1
    asked: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # Logits of the prompts would be most of the memory, with a large vocabulary.
        asked["logits_to_keep"] = torch.arange(first, longest, device=device)
    with torch.autocast(device.type, enabled=False):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **asked).logits
    likeliest = logits[:, -(longest - first) :].argmax(-1).tolist()
    starts = [len(row.prompt) - 1 - first for row in rows]
    return [
        choices[start : start + len(row.answer)] for choices, start, row in zip(likeliest, starts, rows, strict=True)
    ]


def _verdict(tokenizer: Any, greedy: list[int], expected: list[int], answer: str, ends: set[int]) -> bool | None:
    """Whether greedy generation answers right; None where the first token off the expected ones leaves it open.

    Up to and including that token, `greedy` is what generation would have given.
    """
    for index, token in enumerate(greedy):
        text = _text(tokenizer, greedy[:index] if token in ends else greedy[: index + 1])
        if token in ends or "\n" in text:
            return _first_line(text) == answer
        if token != expected[index]:
            # A character may be spread over tokens; its first part decodes to a replacement character.
            begun = text.rstrip("\N{REPLACEMENT CHARACTER}").lstrip()
            return None if answer.startswith(begun) or begun.rstrip() == answer else False
    return None


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0].strip()


def _end_marks(model: nn.Module, tokenizer: Any) -> set[int]:
    """Token ids that end a text, by the tokenizer and by the model's own generation settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    marks = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return {int(mark) for mark in marks if mark is not None}


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def generate_answers(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 32, batch: int = 16
) -> list[str]:
    """What a causal language model says after each prompt: greedy, up to a newline or end mark, stripped.

    With a key/value cache, prompts padded on the left, until every row of the batch has ended. Penalties and sampling
    in the model's own generation settings are put aside.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompts: texts, such as those of `icl_questions`.
        max_new_tokens: tokens an answer may have; fewer where the model's context ends before.
        batch: prompts per call.

    Raises:
        BadInput: a prompt leaves no room for an answer in the model's context.
    """
    encoded = [_token_ids(tokenizer, prompt) for prompt in prompts]
    context = position_limit(model)
    longest = max(map(len, encoded), default=0)
    if longest >= context:
        raise BadInput(
            f"the longest prompt has {longest} tokens, {longest + 1 - context} too many for an answer within the "
            f"model's context of {context}; shorten it"
        )
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    answers = [""] * len(encoded)
    with in_eval_mode(model):
        for first in range(0, len(by_length), batch):
            rows = by_length[first : first + batch]
            texts = _generated(model, tokenizer, [encoded[row] for row in rows], max_new_tokens)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
    return answers


def _generated(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    from transformers import StoppingCriteriaList

    device = _device(model)
    ends = _end_marks(model, tokenizer)
    longest = max(map(len, prompts))
    padding = next((mark for mark in (tokenizer.pad_token_id, *sorted(ends)) if mark is not None), 0)
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)

    def has_newline(tokens: Tensor, scores: Any, **others: Any) -> Tensor:
        found = ["\n" in _text(tokenizer, row) for row in tokens[:, longest:].tolist()]
        return torch.tensor(found, device=tokens.device)

    with _plain_generation(model, sorted(ends), padding), torch.autocast(device.type, enabled=False):
        tokens = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=min(max_new_tokens, position_limit(model) - longest),
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([has_newline]),
        )
    return [_first_line(_text(tokenizer, _until(row, ends))) for row in tokens[:, longest:].tolist()]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def _plain_generation(model: Any, ends: list[int], padding: int) -> Iterator[None]:
    """The model with generation settings that only say where a text ends; its own come back afterwards.

    `generate` fills whatever a caller leaves open from the model's settings, so leaving a penalty out is not enough.
    """
    from transformers import GenerationConfig

    held = model if isinstance(model, nn.Module) else model.module  # what was loaded from a folder is no module
    own = held.generation_config
    held.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=padding)
    try:
        yield
    finally:
        held.generation_config = own


# ── Student beside teacher ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PairedDifference:
    """A student and a teacher on the same questions of one task.

    Attributes:
        name: of the task.
        count: questions.
        student_accuracy, teacher_accuracy: shares answered right.
        only_student, only_teacher: questions that one of them alone answered right.
        low, high: interval of student's minus teacher's accuracy, after Bonett and Price.
        p_value: McNemar's exact test that neither is better, two-sided.
        confidence: of the interval.
    """

    name: str
    count: int
    student_accuracy: float
    teacher_accuracy: float
    only_student: int
    only_teacher: int
    low: float
    high: float
    p_value: float
    confidence: float

    @property
    def difference(self) -> float:
        """Student's minus teacher's accuracy."""
        return (self.only_student - self.only_teacher) / self.count

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.student_accuracy:.3f} against {self.teacher_accuracy:.3f}, difference "
            f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p {self.p_value:.2g}"
        )


def paired_differences(
    student: ProbeResult, teacher: ProbeResult, confidence: float = 0.95
) -> list[PairedDifference]:
    """Student against teacher, task by task and question by question, in the student's order of tasks.

    Raises:
        BadInput: if the teacher was not asked a task, or was asked other questions.
    """
    _check_same_questions(student, teacher, [task.name for task in student.tasks])
    return [_paired(task, teacher.task(task.name), confidence) for task in student.tasks]


def _paired(student: TaskScore, teacher: TaskScore, confidence: float) -> PairedDifference:
    _, gained, lost, _ = _outcomes(student, teacher)
    count = student.count
    # Bonett and Price (2012): the normal interval of paired proportions, with one made-up question for either side.
    # It stays honest where the two agree on every question, which a bootstrap would call certainty.
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = _deviations(confidence) * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return PairedDifference(
        student.name,
        count,
        student.accuracy,
        teacher.accuracy,
        gained,
        lost,
        max(-1.0, up - down - half),
        min(1.0, up - down + half),
        _mcnemar(gained, lost),
        confidence,
    )


def _outcomes(student: TaskScore, teacher: TaskScore) -> tuple[int, int, int, int]:
    """Questions that both answered right, the student alone, the teacher alone, neither."""
    seen = Counter(zip(student.correct, teacher.correct, strict=True))
    return seen[True, True], seen[True, False], seen[False, True], seen[False, False]


def _mcnemar(gained: int, lost: int) -> float:
    """Chance of a split at least as uneven, if each question the two disagree on is a fair coin."""
    disagreements = gained + lost
    tail = sum(math.comb(disagreements, wins) for wins in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**disagreements)


def _check_same_questions(student: ProbeResult, teacher: ProbeResult, names: Sequence[str]) -> None:
    """Raise BadInput unless both were asked the same questions of these tasks."""
    differ = [name for name in names if student.task(name).questions != teacher.task(name).questions]
    if differ:
        settings = [f"k {result.k}, {result.queries} queries, seed {result.seed}" for result in (student, teacher)]
        raise BadInput(
            f"{', '.join(differ)}: the student was asked other questions than the teacher ({settings[0]} against "
            f"{settings[1]}); ask both with the same settings and the same task files"
        )


# ── The list of tasks that count ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class FrozenTask:
    """A task that counts, and what the teacher scored on it.

    Attributes:
        name: of the task.
        count: questions.
        accuracy: the teacher's.
        low: lower end of the accuracy's interval.
        constant_accuracy: of the best constant answer; below `low`.
        questions: SHA-256 of the questions.
    """

    name: str
    count: int
    accuracy: float
    low: float
    constant_accuracy: float
    questions: str


@dataclass(frozen=True)
class FrozenTasks:
    """Which tasks count, decided by the teacher's answers alone, before any student is asked.

    Attributes:
        tasks: those that count, in the order they were asked.
        left_out: (name, reason) of the others.
        k, queries, seed: how the questions are made; pass them to `icl_probe`.
        confidence: of the intervals behind the decision.
    """

    tasks: tuple[FrozenTask, ...]
    left_out: tuple[tuple[str, str], ...]
    k: int
    queries: int
    seed: int
    confidence: float

    @property
    def names(self) -> list[str]:
        """Names of the tasks that count."""
        return [task.name for task in self.tasks]

    def select(self, tasks: Iterable[Task]) -> list[Task]:
        """Those of the given tasks that count, in the order of this list.

        Raises:
            BadInput: if one of the list is missing.
        """
        given = {task.name: task for task in tasks}
        missing = [name for name in self.names if name not in given]
        if missing:
            raise BadInput(f"the frozen list has {', '.join(missing)}, not found among the {len(given)} tasks given")
        return [given[name] for name in self.names]

    def table(self) -> str:
        """One line a task that counts, then one a task left out, with the reason."""
        kept = [
            f"{task.name}: {task.accuracy:.3f}, at least {task.low:.3f} on {task.count} questions, "
            f"best constant answer {task.constant_accuracy:.3f}"
            for task in self.tasks
        ]
        return "\n".join([*kept, *(f"left out: {name}: {reason}" for name, reason in self.left_out)])

    def to_json(self) -> str:
        """All of it as text that `from_json` reads back as an equal list."""
        return _json_text(
            {
                "k": self.k,
                "queries": self.queries,
                "seed": self.seed,
                "confidence": self.confidence,
                "tasks": [vars(task) for task in self.tasks],
                "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
            }
        )

    @classmethod
    def from_json(cls, text: str, where: str = "frozen tasks") -> FrozenTasks:
        """The list that `to_json` wrote.

        Raises:
            BadInput: naming `where` (such as the file) and what makes the text no list.
        """
        return _from_json(text, where, _frozen_from_record)


def _frozen_from_record(record: dict[str, Any]) -> FrozenTasks:
    tasks = tuple(
        FrozenTask(
            name=str(item["name"]),
            count=int(item["count"]),
            accuracy=float(item["accuracy"]),
            low=float(item["low"]),
            constant_accuracy=float(item["constant_accuracy"]),
            questions=str(item["questions"]),
        )
        for item in record["tasks"]
    )
    left_out = tuple((str(item["name"]), str(item["reason"])) for item in record["left_out"])
    numbers = (int(record["k"]), int(record["queries"]), int(record["seed"]), float(record["confidence"]))
    return FrozenTasks(tasks, left_out, *numbers)


def freeze_tasks(teacher: ProbeResult, *, queries: int = 200, confidence: float = 0.95) -> FrozenTasks:
    """The tasks a teacher can do: the lower end of its accuracy's Wilson interval is above the best constant answer.

    Args:
        teacher: its result, with at least `queries` questions a task, or all that a task has.
        queries: fewest questions that may decide, where the task has them.
        confidence: of the interval.

    Raises:
        BadInput: if a task was decided on fewer questions than that.
    """
    short = [task for task in teacher.tasks if task.count < min(queries, task.available)]
    if short:
        numbers = ", ".join(f"{task.name} ({task.count} of {task.available})" for task in short)
        raise BadInput(f"too few questions to freeze {numbers}; ask the teacher with queries={queries} or more")
    kept: list[FrozenTask] = []
    left_out: list[tuple[str, str]] = []
    for task in teacher.tasks:
        low, _ = task.interval(confidence)
        if low > task.constant_accuracy:
            kept.append(FrozenTask(task.name, task.count, task.accuracy, low, task.constant_accuracy, task.questions))
        else:
            reason = (
                f"accuracy {task.accuracy:.3f} is at least {low:.3f}, not above the {task.constant_accuracy:.3f} of "
                f"always answering {task.constant_answer!r}"
            )
            left_out.append((task.name, reason))
    return FrozenTasks(tuple(kept), tuple(left_out), teacher.k, teacher.queries, teacher.seed, confidence)


@dataclass(frozen=True)
class Retention:
    """How much of the teacher's in-context learning a student kept, over the frozen tasks.

    Attributes:
        value: `student_accuracy / teacher_accuracy`.
        low, high: interval of the value, by paired bootstrap over questions.
        student_accuracy, teacher_accuracy: means over tasks of their accuracies, whatever their numbers of questions.
        tasks: number of tasks.
        count: questions over all of them.
        confidence: of the interval.
        samples: of the bootstrap.
        seed: of the bootstrap.
    """

    value: float
    low: float
    high: float
    student_accuracy: float
    teacher_accuracy: float
    tasks: int
    count: int
    confidence: float
    samples: int
    seed: int

    def __str__(self) -> str:
        return (
            f"retention {self.value:.3f} [{self.low:.3f}, {self.high:.3f}]: mean accuracy "
            f"{self.student_accuracy:.3f} of {self.teacher_accuracy:.3f} over {self.tasks} tasks, "
            f"{self.count} questions"
        )

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dict(vars(self))


def retention(
    student: ProbeResult,
    teacher: ProbeResult,
    frozen: FrozenTasks,
    *,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Retention:
    """Mean accuracy of the student over the frozen tasks, divided by that of the teacher on the same questions.

    The interval is a percentile bootstrap: within each task questions are drawn anew with replacement, each with both
    models' answers. Tasks are not drawn, so it speaks of these tasks and not of tasks in general.

    Raises:
        BadInput: the list is empty, a task was not asked or was asked with other questions than those frozen, or the
            teacher answered nothing right.
    """
    if not frozen.tasks:
        raise BadInput("no task is on the frozen list, so nothing can be retained; probe a teacher that can do some")
    _deviations(confidence)  # checks its range
    _check_same_questions(student, teacher, frozen.names)
    changed = [task.name for task in frozen.tasks if teacher.task(task.name).questions != task.questions]
    if changed:
        raise BadInput(
            f"{', '.join(changed)}: asked with other questions than those frozen (k {frozen.k}, {frozen.queries} "
            f"queries, seed {frozen.seed}); ask again with these, or freeze again"
        )
    students = [student.task(name) for name in frozen.names]
    teachers = [teacher.task(name) for name in frozen.names]
    ours, theirs = (sum(task.accuracy for task in scores) / len(scores) for scores in (students, teachers))
    if theirs == 0:
        raise BadInput("the teacher answered nothing right on the frozen list; give the result it was frozen from")
    generator = np.random.default_rng(seed)
    sums = np.zeros((2, samples))
    for ours_here, theirs_here in zip(students, teachers, strict=True):
        # Drawing questions with replacement is drawing how many of each of the four outcomes there are.
        shares = np.array(_outcomes(ours_here, theirs_here)) / ours_here.count
        both, gained, lost, _ = generator.multinomial(ours_here.count, shares, size=samples).T
        sums += np.stack([both + gained, both + lost]) / ours_here.count
    # A sample without any right answer of the teacher has no ratio; only a handful of questions can give one.
    ratios = sums[0][sums[1] > 0] / sums[1][sums[1] > 0]
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Retention(
        ours / theirs,
        float(low),
        float(high),
        ours,
        theirs,
        len(students),
        sum(task.count for task in students),
        confidence,
        samples,
        seed,
    )
