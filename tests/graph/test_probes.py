"""In-context-learning probes: the questions, who answers them right, and what is concluded from that."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blora_compiler.errors import BadInput
from blora_compiler.evaluate import (
    FrozenTasks,
    Pair,
    ProbeResult,
    Task,
    TaskScore,
    freeze_tasks,
    generate_answers,
    icl_probe,
    icl_questions,
    paired_differences,
    read_tasks,
    retention,
    uses_trained_shots,
    wilson_interval,
)
from blora_compiler.saving import Loaded
from blora_compiler.source import BUNDLED_MODEL

_NOUNS = (
    "apple banana cherry grape lemon mango orange peach pear plum lion tiger horse sheep rabbit monkey camel "
    "goat mouse donkey table chair window bottle candle hammer ladder mirror pillow basket river mountain garden "
    "island forest valley meadow harbour village castle"
)
WORDS = _NOUNS.split()


def written(folder: Path, name: str, pairs: list[tuple[str, str]]) -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps([{"input": shown, "output": answer} for shown, answer in pairs]))
    return file


# ── A tokenizer and a model that can be read ─────────────────────────────────────────────────────────────────────


class Letters:
    """One token a character, and one for each of a few words with the space before them."""

    eos_token_id, pad_token_id, bos_token = 0, 0, "^"

    def __init__(self, words: tuple[str, ...] = (), starts_texts: bool = False) -> None:
        self.words = {f" {word}": 128 + index for index, word in enumerate(words)}
        self.names = {number: word for word, number in self.words.items()}
        self.bos_token_id = ord("^")
        self.starts_texts = starts_texts

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        pattern = "|".join([*map(re.escape, self.words), "(?s:.)"])
        ids = [self.words.get(part, ord(part[0])) for part in re.findall(pattern, text)]
        marked = self.starts_texts and add_special_tokens
        return {"input_ids": [self.bos_token_id, *ids] if marked else ids}

    def decode(self, ids: list[int], **settings: Any) -> str:
        return "".join(self.names.get(number, chr(number)) for number in ids)


class Scripted(nn.Module):
    """Answers the last `Q:` of what it has read with the tokens that `reply` gives for the question's input."""

    def __init__(self, tokenizer: Letters, reply: Callable[[str], list[int]], context: int = 1 << 20) -> None:
        super().__init__()
        self.tokenizer, self.reply = tokenizer, reply
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.generation_config = SimpleNamespace(eos_token_id=None, own="settings")
        self.generated = 0
        self.seen: list[list[int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        assert not self.training
        logits = torch.zeros(*input_ids.shape, 256)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            self.seen.append([token for token, attended in zip(ids, mask, strict=True) if attended])
            for column in range(len(ids)):
                read = [token for token, attended in zip(ids[: column + 1], mask, strict=False) if attended]
                logits[row, column, self._next(read)] = 1.0
        return SimpleNamespace(logits=logits)

    def _next(self, read: list[int]) -> int:
        colons = [index for index in range(1, len(read)) if read[index - 1 : index + 1] == [ord("A"), ord(":")]]
        if not colons:
            return ord("?")
        asked = self.tokenizer.decode(read[: colons[-1] - 1]).rpartition("Q: ")[2].strip()
        said, wanted = read[colons[-1] + 1 :], self.reply(asked)
        return wanted[len(said)] if said == wanted[: len(said)] and len(said) < len(wanted) else ord("\n")

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **settings: Any) -> Tensor:
        assert not hasattr(self.generation_config, "own")
        self.generated += len(input_ids)
        for _ in range(max_new_tokens):
            following = self(input_ids, attention_mask).logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, following], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(following)], dim=1)
            if bool(settings["stopping_criteria"](input_ids, None).all()):
                break
        return input_ids


def as_tokens(tokenizer: Letters, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


CAPITALS = Task("capitals", tuple(Pair(word, word.upper()) for word in WORDS[:20]))


# ── Reading tasks ────────────────────────────────────────────────────────────────────────────────────────────────


def test_held_out_pairs_are_those_after_the_seeded_split(tmp_path):
    pairs = [(word, word.upper()) for word in WORDS]
    written(tmp_path, "upper", pairs)
    expected = list(pairs)
    random.Random(0).shuffle(expected)
    (task,) = read_tasks(tmp_path)
    assert task.name == "upper"
    assert task.trained == tuple(expected[:32])
    assert task.pairs == tuple(expected[32:])
    (everything,) = read_tasks(tmp_path / "upper.json", held_out=False)
    assert everything.pairs == tuple(expected)
    assert everything.trained == ()


def test_a_pair_in_both_parts_of_the_split_counts_as_trained_on(tmp_path):
    pairs = [(word, word.upper()) for word in WORDS]
    (task,) = read_tasks(written(tmp_path, "twice", [*pairs, *pairs[:20]]))
    assert not set(task.pairs) & set(task.trained)
    assert len(task.pairs) + len(task.trained) == 40
    assert 0 < len(task.pairs) < 12, "the last 12 of 60 places hold some pairs that are trained on, too"


def test_a_folder_is_read_with_its_subfolders_in_order_of_names(tmp_path):
    for name in ("b/zebra", "a/lion", "apple"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path, name, [("x", "y"), ("z", "w")])
    assert [task.name for task in read_tasks(tmp_path, held_out=False)] == ["apple", "lion", "zebra"]
    (tmp_path / "b" / "apple.json").write_text("[]")
    with pytest.raises(BadInput, match=r"several files are named apple\.json; tasks are told apart by their names"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not JSON \(Expecting property name .* at line 1, column 2\)"),
        ("{}", "a task is a list of .* with at least one pair"),
        ("[]", "a task is a list of .* with at least one pair"),
        ('[{"input": "a", "output": "b"}, {"input": "a"}]', "pair 1 is {'input': 'a'}; write {\"input\": text"),
        ('[{"input": "a", "output": 5}]', "pair 0 is .*5}; write"),
        ('[{"input": " ", "output": "b"}]', "pair 0: the input is empty"),
        ('[{"input": "a", "output": ""}]', "pair 0: the output is empty"),
        ('[{"input": "a", "output": "b\\nc"}]', "pair 0: the output has a newline"),
        ('[{"input": "a", "output": "b"}, {"input": "a", "output": "b"}]', "all of its 2 pairs were trained on"),
        (b"\xff", "byte 0 is not UTF-8"),
    ],
)
def test_a_malformed_task_is_refused_by_file_and_reason(tmp_path, content, message):
    (tmp_path / "task.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=rf"task\.json: {message}"):
        read_tasks(tmp_path)


def test_all_malformed_files_are_listed_and_missing_ones_named(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text("[]")
    with pytest.raises(BadInput, match=r"2 problems:\n  - .*one\.json: .*\n  - .*two\.json: "):
        read_tasks(tmp_path)
    with pytest.raises(BadInput, match=r"gone\.json: cannot be read \(No such file or directory\)"):
        read_tasks(tmp_path / "gone.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"empty: no \.json file in this folder"):
        read_tasks(tmp_path / "empty")
    with pytest.raises(BadInput, match=r"trained_fraction is 1\.0; it is a share"):
        read_tasks(tmp_path, trained_fraction=1.0)


# ── Questions ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_is_shots_in_the_format_of_training_and_an_open_query():
    task = Task("few", (Pair("a b", "c"), Pair("d", " E f "), Pair("g", "h")))
    questions = icl_questions(task, k=2)
    shots = {"a b": "Q: a b\nA: c\n\n", "d": "Q: d\nA:  E f \n\n", "g": "Q: g\nA: h\n\n"}
    for query, answer, question in zip(("a b", "d", "g"), ("c", "E f", "h"), questions, strict=True):
        one, other = (shot for name, shot in shots.items() if name != query)
        assert question.prompt in (f"{one}{other}Q: {query}\nA:", f"{other}{one}Q: {query}\nA:")
        assert question.answer == answer
    assert icl_questions(task, k=0)[0].prompt == "Q: a b\nA:"


def test_prompts_are_frozen_by_the_seed_and_do_not_depend_on_other_queries():
    all_of_them = icl_questions(CAPITALS, k=3)
    assert icl_questions(CAPITALS, k=3) == all_of_them
    assert icl_questions(CAPITALS, k=3, queries=5) == all_of_them[:5]
    assert icl_questions(CAPITALS, k=3, seed=1) != all_of_them
    shots = [question.prompt.count("\n\n") for question in all_of_them]
    assert shots == [3] * 20
    # The stable form of one prompt: results of different versions are compared by it.
    assert all_of_them[0].prompt == "Q: sheep\nA: SHEEP\n\nQ: tiger\nA: TIGER\n\nQ: grape\nA: GRAPE\n\nQ: apple\nA:"


def test_no_shot_shares_the_query_input_and_trained_pairs_fill_up_only_where_needed():
    pairs = (Pair("Clark Park", "Ohio"), Pair("Clark Park", "Utah"), Pair("x", "1"), Pair("y", "2"))
    task = Task("parks", pairs, trained=(Pair("Clark Park", "Iowa"), Pair("z", "3")))
    assert not uses_trained_shots(task, 2)
    first = icl_questions(task, k=2)[0].prompt
    assert sorted(re.findall(r"A: (.*)", first)) == ["1", "2"]
    assert uses_trained_shots(task, 3)
    filled = icl_questions(task, k=3)[0].prompt
    assert sorted(re.findall(r"A: (.*)", filled)) == ["1", "2", "3"]
    with pytest.raises(BadInput, match="parks: 4 shots are needed beside 'Clark Park', the task has 3 pairs with"):
        icl_questions(task, k=4)
    with pytest.raises(BadInput, match="k is -1 and queries is 200"):
        icl_questions(task, k=-1)


# ── Who answers right ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("starts_texts", [False, True])
@pytest.mark.parametrize("end", ["\n", "\n\nQ:", "  \n", "\0"])
def test_a_model_that_is_always_right_scores_one(starts_texts, end):
    letters = Letters(starts_texts=starts_texts)
    model = Scripted(letters, lambda asked: as_tokens(letters, f" {asked.upper()}{end}")).train()
    result = icl_probe(model, letters, [CAPITALS], k=3, batch=7)
    (score,) = result.tasks
    assert score.accuracy == result.mean_accuracy == 1.0
    assert (score.count, score.available, score.constant_accuracy) == (20, 20, 1 / 20)
    assert model.training
    assert all((ids[0] == ord("^")) == starts_texts and ids.count(ord("^")) == starts_texts for ids in model.seen)


def test_only_answers_that_are_the_output_count():
    letters = Letters()
    wrong = {
        "apple": "APPLES\n",
        "banana": "BANAN\n",
        "cherry": "cherry\n",
        "grape": "\nGRAPE\n",
        "lemon": "LEMON x\n",
    }
    model = Scripted(letters, lambda asked: as_tokens(letters, " " + wrong.get(asked, f"{asked.upper()}\n")))
    correct = icl_probe(model, letters, [CAPITALS], k=2).tasks[0].correct
    assert [pair.input for pair, right in zip(CAPITALS.pairs, correct, strict=True) if not right] == list(wrong)
    assert model.generated == 1, "after `LEMON ` a newline would still make it right; all others one pass decides"


def test_an_answer_in_other_tokens_than_the_tokenizers_is_generated_to_be_sure():
    letters = Letters(words=("APPLE", "GRAPE", "PLUM", "PEAR"))
    spelled = {"apple": " APPLE\n", "grape": " GRAPES\n", "peach": "  PEACH \n"}
    model = Scripted(
        letters,
        lambda asked: (
            [ord(c) for c in spelled[asked]] if asked in spelled else as_tokens(letters, f" {asked.upper()}\n")
        ),
    )
    correct = dict(zip(CAPITALS.pairs, icl_probe(model, letters, [CAPITALS], k=2).tasks[0].correct, strict=True))
    assert [pair.input for pair, right in correct.items() if not right] == ["grape"]
    assert model.generated == 3
    assert model.generation_config.own == "settings"


def test_a_tokenizer_that_joins_prompt_and_answer_is_asked_by_generation():
    class Joins(Letters):
        def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
            # The colon before an answer and the space behind it are one token.
            return super().__call__(text.replace("A: ", "A") if text.endswith("\n\nQ:") else text)

    joins = Joins()
    model = Scripted(joins, lambda asked: [ord(c) for c in f" {asked.upper()}\n"])
    assert icl_probe(model, joins, [CAPITALS], k=1).mean_accuracy == 1.0
    assert model.generated == 20


def test_prompts_beyond_the_context_are_refused_with_numbers():
    letters = Letters()
    model = Scripted(letters, lambda asked: [10], context=60)
    lengths = [len(q.prompt) + 1 + len(q.answer) + 1 for q in icl_questions(CAPITALS, k=4)]
    message = (
        rf"capitals: the longest of 20 prompts with 4 shots has {max(lengths)} tokens with its answer, "
        rf"{max(lengths) - 60} more than the model's context of 60; lower k"
    )
    with pytest.raises(BadInput, match=message):
        icl_probe(model, letters, [CAPITALS], k=4)
    assert icl_probe(model, letters, [CAPITALS], k=1).k == 1
    with pytest.raises(BadInput, match=r"longest prompt has 60 tokens, 1 too many for an answer within .* of 60"):
        generate_answers(model, letters, ["x" * 60])


def test_no_task_and_a_task_given_twice_are_refused():
    with pytest.raises(BadInput, match="no task is given; give at least 1"):
        icl_probe(nn.Linear(1, 1), Letters(), [])
    with pytest.raises(BadInput, match="task 'capitals' is given twice"):
        icl_probe(nn.Linear(1, 1), Letters(), [CAPITALS, CAPITALS])


def bundled_tasks(folder: Path) -> list[Task]:
    """Functions that the bundled model knows, does not know, and knows in part."""
    draw = random.Random(0)
    triples = [draw.sample(WORDS, 3) for _ in range(40)]
    written(folder, "first_of_3", [(", ".join(triple), triple[0]) for triple in triples])
    written(folder, "lower_first", [(word.capitalize(), word[0]) for word in WORDS])
    written(folder, "length", [(word, str(len(word))) for word in WORDS])
    written(folder, "backwards", [(word, word[::-1]) for word in WORDS])
    return read_tasks(folder, held_out=False)


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def test_one_pass_agrees_with_generation_on_the_bundled_model(bundled, tmp_path):
    model, tokenizer = bundled
    tasks = bundled_tasks(tmp_path)
    result = icl_probe(model, tokenizer, tasks, k=4, batch=8)
    for task, score in zip(tasks, result.tasks, strict=True):
        questions = icl_questions(task, k=4)
        said = generate_answers(model, tokenizer, [question.prompt for question in questions], batch=8)
        assert score.correct == tuple(text == q.answer for text, q in zip(said, questions, strict=True)), task.name
        assert score.questions == icl_probe(model, tokenizer, [task], k=4).tasks[0].questions
    accuracies = [score.accuracy for score in result.tasks]
    assert max(accuracies) > 0.5, "agreement says little where nothing is right"
    assert min(accuracies) < 0.1, "or where everything is"


def test_generation_is_greedy_whatever_the_model_prefers(bundled):
    from transformers import GenerationConfig

    model, tokenizer = bundled
    prompts = [question.prompt for question in icl_questions(CAPITALS, k=3, queries=6)]
    plain = generate_answers(model, tokenizer, prompts)
    plan: Any = None  # a probe reads none
    loaded: Any = Loaded(model, plan, {}, ())
    assert generate_answers(loaded, tokenizer, prompts) == plain
    own = model.generation_config
    preferred = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=9.0, eos_token_id=0)
    try:
        model.generation_config = preferred
        assert generate_answers(model, tokenizer, prompts, batch=1) == plain
        assert model.generation_config is preferred
    finally:
        model.generation_config = own


# ── What is concluded ────────────────────────────────────────────────────────────────────────────────────────────


def score(
    name: str, correct: list[bool], constant: float = 0.1, available: int = 200, questions: str = "q"
) -> TaskScore:
    return TaskScore(name, tuple(correct), available, "x", constant, False, questions)


def share(right: int, count: int) -> list[bool]:
    return [index < right for index in range(count)]


def result(*tasks: TaskScore, k: int = 8) -> ProbeResult:
    return ProbeResult(tasks, k, 200, 0)


def test_wilson_intervals_are_those_computed_by_hand():
    # z = 1.959964, z^2 = 3.841459; (0.8 + 0.192073 -+ 1.959964 sqrt(0.016 + 0.00960365)) / 1.384146
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    # With nothing right the interval is 0 to z^2 / (n + z^2).
    assert wilson_interval(0, 20) == pytest.approx((0.0, 3.841459 / 23.841459), abs=1e-6)
    assert wilson_interval(20, 20)[1] == 1.0
    low, high = wilson_interval(8, 10, 0.5)
    assert 0.49 < low < 0.8 < high < 0.943
    with pytest.raises(BadInput, match="at least 1 answer, got 0"):
        wilson_interval(0, 0)
    with pytest.raises(BadInput, match=r"confidence is 95; it lies between 0 and 1"):
        wilson_interval(1, 2, 95)


def test_paired_differences_are_those_computed_by_hand():
    teacher = result(score("t", [True] * 6 + [False] * 4))
    student = result(score("t", [True] * 3 + [False] * 3 + [True] + [False] * 3))
    (found,) = paired_differences(student, teacher)
    assert (found.only_student, found.only_teacher, found.count) == (1, 3, 10)
    assert found.difference == pytest.approx(-0.2)
    # (1 + 1 - 3 - 1) / 12 -+ 1.959964 sqrt((2/12 + 4/12 - (2/12)^2) / 12)
    assert (found.low, found.high) == pytest.approx((-0.555471, 0.222137), abs=1e-5)
    assert found.p_value == 2 * (1 + 4) / 2**4
    assert str(found).startswith("t: 0.400 against 0.600, difference -0.200 [-0.555, +0.222], p 0.62")

    (same,) = paired_differences(teacher, teacher)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    assert same.low < 0 < same.high, "agreement on 10 questions is no certainty"


def test_the_frozen_list_has_tasks_that_beat_every_constant_answer_for_sure():
    # Wilson's lower end for 120 of 200 is 0.5308.
    tasks = [
        score("in", share(120, 200), 0.53),
        score("out", share(120, 200), 0.54),
        score("small", share(9, 10), 0.2, 10),
    ]
    frozen = freeze_tasks(result(*tasks))
    assert frozen.names == ["in", "small"]
    assert frozen.tasks[0].low == pytest.approx(0.5308, abs=1e-4)
    assert frozen.left_out == (
        ("out", "accuracy 0.600 is at least 0.531, not above the 0.540 of always answering 'x'"),
    )
    assert "left out: out: accuracy 0.600" in frozen.table()
    assert FrozenTasks.from_json(frozen.to_json()) == frozen
    with pytest.raises(BadInput, match=r"too few questions to freeze few \(50 of 163\); ask .* queries=200 or more"):
        freeze_tasks(result(score("few", share(50, 50), available=163)))
    assert freeze_tasks(result(score("few", share(50, 50), available=163)), queries=50).names == ["few"]


def test_a_student_is_asked_the_tasks_of_the_list_in_its_order():
    frozen = freeze_tasks(result(score("b", share(200, 200)), score("a", share(200, 200)), score("c", share(0, 200))))
    tasks = [Task(name, (Pair("x", "y"),)) for name in "abc"]
    assert [task.name for task in frozen.select(tasks)] == ["b", "a"]
    with pytest.raises(BadInput, match="the frozen list has b, not found among the 1 tasks given"):
        frozen.select(tasks[:1])


def test_an_identical_student_retains_everything():
    teacher = result(score("a", share(150, 200)), score("b", share(30, 40), available=40))
    found = retention(teacher, teacher, freeze_tasks(teacher))
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    assert (found.tasks, found.count, found.teacher_accuracy) == (2, 240, 0.75)
    assert str(found).startswith("retention 1.000 [1.000, 1.000]: mean accuracy 0.750 of 0.750 over 2 tasks")
    assert found.to_json()["value"] == 1.0


def test_retention_is_a_ratio_of_means_over_tasks_with_a_paired_interval():
    teacher = result(score("a", share(200, 200)), score("b", share(20, 40), available=40))
    student = result(score("a", share(100, 200)), score("b", share(20, 40), available=40))
    frozen = freeze_tasks(teacher)
    found = retention(student, teacher, frozen)
    assert found.value == pytest.approx((0.5 + 0.5) / (1.0 + 0.5))
    assert found == retention(student, teacher, frozen)
    assert found.low < found.value < found.high
    # Task b is answered alike, so pairing leaves of it only how it weighs: half width near 1.96 sd of the ratio,
    # sd^2 = (0.5 0.5 / 200 + (1 - 2/3)^2 0.5 0.5 / 40) / 1.5^2.
    half = 1.96 * ((0.25 / 200 + 0.25 / 40 / 9) / 2.25) ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    # The teacher beside the student's own share of b drawn apart would have been wider than this.
    alone = retention(student, teacher, freeze_tasks(result(teacher.tasks[0])))
    assert alone.value == 0.5
    assert (alone.high - alone.low) / 2 == pytest.approx(1.96 * (0.25 / 200) ** 0.5, rel=0.05)


def test_other_questions_cannot_be_compared():
    teacher = result(score("a", share(200, 200)))
    frozen = freeze_tasks(teacher)
    other = result(score("a", share(200, 200), questions="r"), k=4)
    with pytest.raises(
        BadInput, match=r"a: the student was asked other questions .*\(k 4, 200 queries, seed 0 against k 8"
    ):
        retention(other, teacher, frozen)
    with pytest.raises(
        BadInput, match=r"a: asked with other questions than those frozen \(k 8, 200 queries, seed 0\)"
    ):
        retention(other, other, frozen)
    with pytest.raises(BadInput, match=r"no score of task 'a' among 1; did you mean 'aa'\?"):
        retention(result(score("aa", [True])), teacher, frozen)
    with pytest.raises(BadInput, match="no task is on the frozen list"):
        retention(teacher, teacher, freeze_tasks(result(score("a", share(0, 200)))))
    with pytest.raises(BadInput, match="the teacher answered nothing right"):
        retention(teacher, result(score("a", share(0, 200))), frozen)
    with pytest.raises(BadInput, match="confidence is 2"):
        retention(teacher, teacher, frozen, confidence=2)


def test_results_and_lists_read_back_equal_and_refuse_other_text():
    probed = result(score("a", [True, False, True], available=3), score("b", [False]))
    assert ProbeResult.from_json(probed.to_json()) == probed
    assert "a: 0.667 [0.208, 0.939] on 3 questions, best constant answer 0.100" in probed.table()
    assert probed.table().endswith("mean of 2 tasks: 0.333")
    text = probed.to_json()
    for broken, message in [
        ("{", r"r\.json: not JSON \(Expecting property name"),
        ("[]", r"r\.json: schema is None, this version reads 1; write it again"),
        (text.replace('"schema": 1', '"schema": 9'), r"r\.json: schema is 9"),
        (text.replace('"available"', '"other"'), r"r\.json: 'available' is missing"),
        (text.replace('"101"', '"1?1"'), r"r\.json: correct is '1\?1', expected a text of 0 and 1"),
        (text.replace('"k": 8', '"k": "many"'), r"r\.json: invalid literal"),
    ]:
        with pytest.raises(BadInput, match=message):
            ProbeResult.from_json(broken, "r.json")
    with pytest.raises(BadInput, match="frozen tasks: 'confidence' is missing"):
        FrozenTasks.from_json(freeze_tasks(probed, queries=1).to_json().replace('"confidence"', '"x"'))
