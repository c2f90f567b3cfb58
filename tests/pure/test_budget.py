"""Every way to write a budget, every way to write it wrongly, and exact limits."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blora_compiler.budget import Budget
from blora_compiler.errors import BadInput
from blora_compiler.values import METRICS, format_amount

FRACTIONS = [(0.25, 0.25), ("0.25", 0.25), ("25%", 0.25), (" 12.5 % ", 0.125), (1, 1.0), (1.0, 1.0), ("1", 1.0),
             ("100%", 1.0), (np.float32(0.5), 0.5), (np.int64(1), 1.0), (1e-3, 0.001)]  # fmt: skip
AMOUNTS = [
    ("12ms", "latency", 12_000_000), ("800us", "latency", 800_000), ("800\u00b5s", "latency", 800_000),
    ("0.5s", "latency", 500_000_000), ("7 ns", "latency", 7), ("3.2GFLOP", "flops", 3_200_000_000),
    ("3.2 GFLOPs", "flops", 3_200_000_000), ("400MB", "bytes", 400_000_000), ("1.5GB", "bytes", 1_500_000_000),
    ("400MiB", "bytes", 400 * 2**20), ("5Mparams", "params", 5_000_000), ("1e3 params", "params", 1000),
    ("2.9B", "bytes", 2),
]  # fmt: skip


@pytest.mark.parametrize(("written", "fraction"), FRACTIONS)
def test_fractions(written, fraction):
    budget = Budget.parse(written)
    assert (budget.fraction, budget.amount, budget.metric) == (fraction, None, "flops")
    assert Budget.parse(written, "bytes").metric == "bytes"


@pytest.mark.parametrize(("written", "metric", "amount"), AMOUNTS)
def test_amounts_carry_their_metric(written, metric, amount):
    for asked in (None, metric):
        assert Budget.parse(written, asked) == Budget(None, amount, metric, written)
    assert Budget.parse(written).limit(10**30) == amount


def test_text_is_kept_as_it_was_asked():
    assert [str(Budget.parse(value)) for value in (0.25, 1, "25%", " 12ms ")] == ["0.25", "1", "25%", "12ms"]


WRONG = [
    (0, None, "budget 0 keeps nothing; give the fraction to keep"),
    ("0%", None, "budget '0%' keeps nothing"),
    ("0ms", None, "budget '0ms' keeps nothing"),
    ("0.3B", None, "budget '0.3B' keeps nothing"),
    (1.5, None, "budget 1.5 would keep more than everything: a fraction is at most 1, which changes nothing"),
    ("150%", None, "budget '150%' would keep more than everything"),
    ("12", None, "it has no unit: if it was meant as an amount, write \"12%\" or one such as \"12ms\""),
    (12, "bytes", 'write "12%" or one such as "400MB"'),
    (4096, None, 'write one such as "12ms"'),
    (-1, None, "budget -1 is negative"),
    ("-5ms", None, "budget '-5ms' is negative"),
    ("abc", None, "budget 'abc' is not a number"),
    ("", None, "budget '' is not a number"),
    (math.nan, None, "budget nan is not a number"),
    (math.inf, None, "budget inf is not a number"),
    (True, None, "budget True is no number and no text"),
    (None, None, "budget None is no number and no text"),
    ([0.5], None, "budget [0.5] is no number and no text"),
    ("12mss", None, "'mss' is no unit; did you mean 'ms'"),
    ("3 bananas", None, "'bananas' is no unit; "),
    ("1e9999ms", None, "'e9999ms' is no unit"),
    ("12ms", "flops", "budget '12ms' is an amount of latency, but metric='flops' was asked; use metric='latency', "
     'or an amount such as "3.2GFLOP"'),
    (0.5, "speed", "metric 'speed' is unknown; use one of flops, latency, bytes, params"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "metric", "message"), WRONG)
def test_refusals_say_what_is_wrong_and_what_is_legal(written, metric, message):
    with pytest.raises(BadInput) as refusal:
        Budget.parse(written, metric)
    assert message in str(refusal.value)


@given(st.integers(1, 10**4), st.integers(1, 10**25))
def test_limit_is_the_exact_floor_of_the_decimal_that_was_written(ten_thousandths, baseline):
    written = Fraction(ten_thousandths, 10**4)
    limit = Budget.parse(float(written)).limit(baseline)
    assert limit <= written * baseline < limit + 1


def test_limit_is_not_lost_to_binary_rounding():
    assert Budget.parse("29%").limit(100) == 29
    assert int(0.29 * 100) == 28, "the plain way to compute it would be off by one here"
    assert Budget.parse(0.25).limit(7) == 1
    assert Budget.parse(1.0).limit(2**70 + 1) == 2**70 + 1


@pytest.mark.parametrize("metric", METRICS)
@given(amount=st.integers(1, 9999), power=st.integers(0, 9))
def test_what_the_package_prints_can_be_given_as_a_budget(metric, amount, power):
    budget = Budget.parse(format_amount(amount * 10**power, metric))
    assert (budget.amount, budget.metric) == (amount * 10**power, metric)
