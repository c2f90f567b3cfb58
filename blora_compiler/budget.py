"""The one number a user gives: the fraction of the dense cost to keep, or an amount with a unit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import NoReturn

from .errors import BadInput, did_you_mean
from .values import METRICS, Metric

_DECIMAL_PREFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY_PREFIXES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def _unit_table() -> dict[str, tuple[Metric, int]]:
    """Every unit that can be written, with its metric and its size in that metric's smallest step."""
    units: dict[str, tuple[Metric, int]] = {
        "ns": ("latency", 1),
        "us": ("latency", 10**3),
        "\u00b5s": ("latency", 10**3),  # micro sign
        "\u03bcs": ("latency", 10**3),  # Greek mu, which looks the same
        "ms": ("latency", 10**6),
        "s": ("latency", 10**9),
    }
    for prefix, size in _DECIMAL_PREFIXES.items():
        units |= {f"{prefix}{name}": ("flops", size) for name in ("FLOP", "FLOPs")}
        units |= {f"{prefix}{name}": ("params", size) for name in ("param", "params")}
    for prefix, size in (_DECIMAL_PREFIXES | _BINARY_PREFIXES).items():
        units[f"{prefix}B"] = ("bytes", size)
    return units


_UNITS = _unit_table()
_EXAMPLES: dict[Metric, str] = {"flops": "3.2GFLOP", "latency": "12ms", "bytes": "400MB", "params": "5Mparams"}
# Exponents stop at three digits: Fraction("1e999999999") would fill the memory before it could be refused.
_WRITTEN = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?)\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Budget:
    """How much of the dense cost may remain, in one metric.

    Attributes:
        fraction: of the baseline, above 0 and at most 1; None when an amount was asked.
        amount: FLOPs, nanoseconds, bytes or parameters; None when a fraction was asked.
        metric: what is counted.
        text: the budget as it was asked, for people.
    """

    fraction: float | None
    amount: int | None
    metric: Metric
    text: str

    @classmethod
    def parse(cls, value: float | int | str, metric: Metric | None = None) -> Budget:
        """The budget written as `0.25`, `"25%"`, `"12ms"`, `"3.2GFLOP"`, `"400MB"` or `"5Mparams"`.

        Args:
            value: a fraction above 0 and at most 1 (1 changes nothing), or an amount with a unit.
            metric: what a fraction is a fraction of; None means the unit's metric, or flops for a fraction.

        Raises:
            BadInput: for anything else, and for a unit that belongs to another metric.
        """
        if metric is not None and metric not in METRICS:
            raise BadInput(f"metric {metric!r} is unknown; use one of {', '.join(METRICS)}")
        text = _text_of(value)
        if ".." in text:
            raise BadInput(f"budget {value!r} is a range, which families have; name one number here")
        written = _WRITTEN.fullmatch(text)
        if written is None:
            raise BadInput(f"budget {value!r} is not a number; {_what_is_legal(metric)}")
        number, unit = Fraction(written[1]), written[2]
        if number < 0:
            raise BadInput(f"budget {value!r} is negative; {_what_is_legal(metric)}")
        if unit in ("", "%"):
            return cls(_checked_fraction(number, unit, value, metric), None, metric or "flops", text)
        return _amount_budget(number, unit, value, metric, text)

    def limit(self, baseline: int) -> int:
        """The integer cost that must never be exceeded, for a dense cost of `baseline`.

        Exact: a fraction counts as the decimal number that was written, not as its nearest binary one.
        """
        if self.amount is not None:
            return self.amount
        return math.floor(Fraction(repr(self.fraction)) * baseline)

    def __str__(self) -> str:
        return self.text


def _text_of(value: object) -> str:
    """`value` as text, with the shortest decimal digits that mean the same number."""
    match value:
        case bool():
            pass
        case str():
            return value.strip()
        case Integral():
            return str(int(value))
        case Real():
            return repr(float(value))
    raise BadInput(f"budget {value!r} is no number and no text; {_what_is_legal(None)}")


def _what_is_legal(metric: Metric | None) -> str:
    amounts = [f'"{_EXAMPLES[metric]}"'] if metric else [f'"{example}"' for example in _EXAMPLES.values()]
    return f'give the fraction to keep, such as 0.25 or "25%", or an amount with a unit, such as {", ".join(amounts)}'


def _checked_fraction(number: Fraction, unit: str, value: object, metric: Metric | None) -> float:
    """`number` (in percent where `unit` says so) as a fraction above 0 and at most 1."""
    fraction = number / 100 if unit else number
    if float(fraction) == 0.0:
        raise BadInput(f"budget {value!r} keeps nothing; {_what_is_legal(metric)}")
    if fraction > 1:
        _refuse_more_than_everything(number, unit, value, metric)
    return float(fraction)


def _refuse_more_than_everything(number: Fraction, unit: str, value: object, metric: Metric | None) -> NoReturn:
    problem = f"budget {value!r} would keep more than everything: a fraction is at most 1, which changes nothing"
    if unit:
        raise BadInput(f"{problem}; {_what_is_legal(metric)}")
    percent = f'"{float(number):g}%" or ' if 2 <= number <= 100 else ""
    example = _EXAMPLES[metric or "latency"]
    raise BadInput(f'{problem}; it has no unit: if it was meant as an amount, write {percent}one such as "{example}"')


def _amount_budget(number: Fraction, unit: str, value: object, metric: Metric | None, text: str) -> Budget:
    """The budget for `number` of `unit`, rounded down to whole FLOPs, nanoseconds, bytes or parameters."""
    if unit not in _UNITS:
        raise BadInput(f"budget {value!r}: {unit!r} is no unit{did_you_mean(unit, _UNITS)}; {_what_is_legal(metric)}")
    metric_of_unit, size = _UNITS[unit]
    if metric is not None and metric != metric_of_unit:
        raise BadInput(
            f"budget {value!r} is an amount of {metric_of_unit}, but metric={metric!r} was asked; "
            f'use metric={metric_of_unit!r}, or an amount such as "{_EXAMPLES[metric]}"'
        )
    amount = math.floor(number * size)
    if amount == 0:
        raise BadInput(f"budget {value!r} keeps nothing; {_what_is_legal(metric_of_unit)}")
    return Budget(None, amount, metric_of_unit, text)
