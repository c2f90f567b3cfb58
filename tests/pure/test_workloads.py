"""Workloads as text and as JSON, mixes, and what a mix costs."""

from __future__ import annotations

import pytest

from blora_compiler.errors import BadInput
from blora_compiler.values import Cost, Mix, Workload, mixed
from blora_compiler.workloads import at_the_end, check_fits, parse_workload, workload_from_json

PROMPT = Workload("prefill", 1, 2048)
STEP = Workload("decode", 1, 1, 2175)  # the 256 steps after 2048 tokens have 2048 ... 2303 behind them


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────

READ = [
    ("prefill 1x2048", PROMPT, "prefill 1x2048"),
    ("  prefill  1 x 2048 ", PROMPT, "prefill 1x2048"),
    ("prefill 1×2048", PROMPT, "prefill 1x2048"),  # noqa: RUF001  the multiplication sign people paste
    ("1x2048 prefill", PROMPT, "prefill 1x2048"),
    ("prefill 4x512@128", Workload("prefill", 4, 512, 128), "prefill 4x512@128"),
    ("decode 8@1024", Workload("decode", 8, 1, 1024), "decode 8@1024"),
    ("decode 1@0", Workload("decode", 1, 1, 0), "decode 1@0"),
    ("2 prefill 1x2048", Mix(((2, PROMPT),)), "2 prefill 1x2048"),
    ("7 decode 8@1024", Mix(((7, Workload("decode", 8, 1, 1024)),)), "7 decode 8@1024"),
    ("prefill 1x2048 + 256 decode steps", Mix(((1, PROMPT), (256, STEP))), "prefill 1x2048 + 256 decode 1@2175"),
    ("prefill 1x2048+256 decode", Mix(((1, PROMPT), (256, STEP))), "prefill 1x2048 + 256 decode 1@2175"),
    ("prefill 3x8@4 + 1 decode step", Mix(((1, Workload("prefill", 3, 8, 4)), (1, Workload("decode", 3, 1, 12)))),
     "prefill 3x8@4 + decode 3@12"),
    ("prefill 1x8 + 2 decode 4@16 + 3 prefill 2x2",
     Mix(((1, Workload("prefill", 1, 8)), (2, Workload("decode", 4, 1, 16)), (3, Workload("prefill", 2, 2)))),
     "prefill 1x8 + 2 decode 4@16 + 3 prefill 2x2"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "workload", "name"), READ, ids=[text for text, _, _ in READ])
def test_text_becomes_a_workload_and_its_name_reads_back(text, workload, name):
    assert parse_workload(text) == workload
    assert workload.name == name
    assert parse_workload(name) == workload


def test_the_dtype_reaches_every_part():
    mix = parse_workload("prefill 1x8 + 2 decode steps", "float16")
    assert [part.dtype for _, part in mix.parts] == ["float16", "float16"]
    assert mix.dtype == "float16"


def test_a_workload_is_its_own_only_part():
    assert PROMPT.parts == ((1, PROMPT),)


LEGAL = (
    'write "prefill 1x2048" (batch x tokens), "decode 8@1024" (batch@context), or a mix such as '
    '"prefill 1x2048 + 256 decode steps"'
)
UNREADABLE = [
    ("", f"workload '': '' cannot be read; {LEGAL}"),
    ("prefill 2048", f"workload 'prefill 2048': 'prefill 2048' cannot be read; {LEGAL}"),
    ("decode 8x1024", f"workload 'decode 8x1024': 'decode 8x1024' cannot be read; {LEGAL}"),
    ("prefill 1x8 +", f"workload 'prefill 1x8 +': '' cannot be read; {LEGAL}"),
    ("256 decode steps", "workload '256 decode steps': '256 decode steps' follows no prefill, so its batch and "
     'context are unknown; write "256 decode BATCH@CONTEXT"'),
    ("decode 1@8 + 4 decode steps", "workload 'decode 1@8 + 4 decode steps': '4 decode steps' follows no prefill, "
     'so its batch and context are unknown; write "4 decode BATCH@CONTEXT"'),
    ("prefill 0x8", "workload batch is 0; it must be an integer of at least 1"),
    ("prefill 8x0", "workload tokens is 0; it must be an integer of at least 1"),
    ("0 prefill 1x8", "prefill 1x8 has weight 0 in the mix; it must be an integer of at least 1"),
    ("0 decode 1@8", "decode 1@8 has weight 0 in the mix; it must be an integer of at least 1"),
    ("prefill 1x8 + 0 decode steps", "decode 1@7 has weight 0 in the mix; it must be an integer of at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), UNREADABLE, ids=[text for text, _ in UNREADABLE])
def test_text_that_is_no_workload_is_refused(text, message):
    with pytest.raises(BadInput) as refusal:
        parse_workload(text)
    assert str(refusal.value) == message


def test_an_unknown_dtype_is_refused():
    with pytest.raises(BadInput, match="workload dtype 'int3' is unknown; use one of float32, float16, bfloat16"):
        parse_workload("prefill 1x8", "int3")


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workload", [workload for _, workload, _ in READ], ids=[name for *_, name in READ])
def test_json_reads_back(workload):
    assert workload_from_json(workload.to_json(), "plan.json") == workload


ONE = Workload().to_json()
FIELDS = "phase, batch, tokens, context, dtype"
NO_WORKLOADS = [
    (None, f"f: workload has the fields None; it needs {FIELDS}"),
    ({"batch": 1}, f"f: workload has the fields batch; it needs {FIELDS}"),
    ({**ONE, "more": 1}, f"f: workload has the fields {FIELDS}, more; it needs {FIELDS}"),
    ({**ONE, "batch": 0}, "f: workload batch is 0; it must be an integer of at least 1"),
    ({**ONE, "phase": "train"}, "f: workload phase is 'train'; use 'prefill' or 'decode'"),
    ({**ONE, "phase": "decode"},
     "f: a decode workload has 1 new token a step, got tokens=128; use context for the past"),
    ({**ONE, "dtype": ["float32"]}, "f: .*unhashable"),
    ({"mix": [ONE]}, r"f: workload mix\[0\] is {.*}; it needs a weight and the fields of a workload"),
    ({"mix": [3]}, r"f: workload mix\[0\] is 3; it needs a weight and the fields of a workload"),
    ({"mix": [{"weight": 1, **ONE}, {"weight": 1}]},
     rf"f: workload mix\[1\]: workload has the fields ; it needs {FIELDS}"),
    ({"mix": []}, "f: a mix of workloads needs at least one part"),
    ({"mix": [{"weight": "2", **ONE}]},
     "f: prefill 1x128 has weight '2' in the mix; it must be an integer of at least 1"),
    ({"mix": [{"weight": 1, **ONE}, {"weight": 1, **ONE, "dtype": "float16"}]},
     "f: the parts of a mix run one model, but have the dtypes float16, float32; choose one"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), NO_WORKLOADS)
def test_json_that_is_no_workload_is_refused(record, message):
    with pytest.raises(BadInput, match=f"^{message}"):
        workload_from_json(record, "f")


# ── Mixes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weight", [0, -1, 1.0, True])
def test_a_weight_is_a_positive_integer(weight):
    with pytest.raises(BadInput, match=rf"prefill 1x128 has weight {weight} in the mix; it must be an integer of"):
        Mix(((weight, Workload()),))


def test_work_adds_up_by_weight_and_what_is_stored_is_stored_once():
    prices = {PROMPT: Cost(100, 10, 8, 50, 2, 7), STEP: Cost(3, 1, 8, 5, 2, 4)}
    assert mixed(prices.__getitem__, PROMPT) == prices[PROMPT]
    assert mixed(prices.__getitem__, Mix(((2, PROMPT), (256, STEP)))) == Cost(
        flops=2 * 100 + 256 * 3,
        elementwise=2 * 10 + 256,
        weight_bytes=8,
        activation_bytes=2 * 50 + 256 * 5,
        params=2,
        latency_ns=2 * 7 + 256 * 4,
    )


def test_a_mix_without_a_model_of_time_has_no_latency():
    assert mixed(lambda part: Cost(flops=1), Mix(((1, PROMPT), (2, STEP)))) == Cost(flops=3)


# ── Positions ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_workload_longer_than_the_model_is_refused():
    mix = Mix(((1, PROMPT), (256, STEP)))
    check_fits(mix, None, True, "llama")
    check_fits(mix, 2304, True, "llama")
    with pytest.raises(BadInput) as refusal:
        check_fits(mix, 2303, True, "llama")
    assert str(refusal.value) == (
        "workload decode 1@2303 needs 2304 positions (2303 cached and 1 new), llama has 2303; "
        "shorten the prompt or the context"
    )


def test_steps_that_continue_a_prompt_end_behind_more_than_they_have_on_average():
    assert at_the_end(STEP) == (STEP,)
    assert at_the_end(Mix(((1, PROMPT), (256, STEP)))) == (PROMPT, Workload("decode", 1, 1, 2303))
    others = Mix(((1, PROMPT), (255, STEP.last_position), (2, Workload("decode", 2, 1, 2048))))
    assert at_the_end(others) == (PROMPT, Workload("decode", 1, 1, 2302), others.parts[2][1])
    elsewhere = Mix(((1, PROMPT), (10, STEP)))
    assert at_the_end(elsewhere) == (PROMPT, STEP), "steps that stand behind something else are as written"


@pytest.mark.parametrize("load", [STEP, Workload("prefill", 1, 8, 16)])
def test_a_workload_behind_a_cache_is_for_models_that_keep_one(load):
    check_fits(load, None, None, "a module")
    with pytest.raises(BadInput, match="reads a key/value cache, and bert is not run with one"):
        check_fits(load, None, False, "bert")
