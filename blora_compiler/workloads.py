"""Workloads as people write them and as files hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from .errors import BadInput
from .values import AnyWorkload, Mix, Workload

_LEGAL = (
    'write "prefill 1x2048" (batch x tokens), "decode 8@1024" (batch@context), or a mix such as '
    '"prefill 1x2048 + 256 decode steps"'
)
_TIMES = r"\s*[x\u00d7]\s*"
_PREFILL = re.compile(rf"(?:(\d+)\s+)?prefill\s+(\d+){_TIMES}(\d+)(?:\s*@\s*(\d+))?")
_PREFILL_LAST = re.compile(rf"(\d+){_TIMES}(\d+)\s+prefill")
_DECODE = re.compile(r"(?:(\d+)\s+)?decode\s+(\d+)\s*@\s*(\d+)")
_DECODE_STEPS = re.compile(r"(\d+)\s+decode(?:\s+steps?)?")


def parse_workload(text: str, dtype: str = "float32") -> AnyWorkload:
    """The workload that a text names.

    `prefill 4x512` is 4 prompts of 512 tokens, `decode 4@512` one more token for each of 4 sequences behind 512
    cached ones. Parts joined by `+` make a mix, each with how often it runs in front: `2 prefill 1x128`. `256 decode
    steps` continue the prefill before them: same batch, and the context that the steps have on average.

    Args:
        text: as above.
        dtype: arithmetic and storage type of the weights.

    Raises:
        BadInput: if a part cannot be read, or its numbers are no workload.
    """
    parts: list[tuple[int, Workload]] = []
    for term in str(text).split("+"):
        parts.append(_parse_part(term.strip(), text, parts[-1][1] if parts else None, dtype))
    weight, only = parts[0]
    return only if len(parts) == 1 and weight == 1 else Mix(tuple(parts))


def as_workload(value: Any, dtype: str = "float32") -> AnyWorkload:
    """A workload given as a value, or as text.

    Raises:
        BadInput: it is neither, or a text that names none.
    """
    if isinstance(value, Workload | Mix):
        return value
    if isinstance(value, str):
        return parse_workload(value, dtype)
    raise BadInput(f"workload {value!r} is no workload and no text; write it as 'prefill 1x2048' or 'decode 8@2048'")


def _parse_part(term: str, text: str, before: Workload | None, dtype: str) -> tuple[int, Workload]:
    if found := _PREFILL.fullmatch(term):
        weight, batch, tokens, context = found.groups()
        return int(weight or 1), Workload("prefill", int(batch), int(tokens), int(context or 0), dtype)
    if found := _PREFILL_LAST.fullmatch(term):
        return 1, Workload("prefill", int(found[1]), int(found[2]), 0, dtype)
    if found := _DECODE.fullmatch(term):
        return int(found[1] or 1), Workload("decode", int(found[2]), 1, int(found[3]), dtype)
    if found := _DECODE_STEPS.fullmatch(term):
        if before is None or before.phase != "prefill":
            raise BadInput(
                f"workload {text!r}: {term!r} follows no prefill, so its batch and context are unknown; "
                f'write "{found[1]} decode BATCH@CONTEXT"'
            )
        steps = int(found[1])
        context = before.context + before.tokens + (steps - 1) // 2
        return steps, Workload("decode", before.batch, 1, context, dtype)
    raise BadInput(f"workload {text!r}: {term!r} cannot be read; {_LEGAL}")


def workload_from_json(record: Any, where: str) -> AnyWorkload:
    """The workload that `to_json` wrote.

    Raises:
        BadInput: naming `where`, for anything else.
    """
    if isinstance(record, Mapping) and set(record) == {"mix"} and isinstance(record["mix"], list):
        parts = []
        for position, item in enumerate(record["mix"]):
            at = f"{where}: workload mix[{position}]"
            if not isinstance(item, Mapping) or "weight" not in item:
                raise BadInput(f"{at} is {item!r}; it needs a weight and the fields of a workload")
            rest = {name: value for name, value in item.items() if name != "weight"}
            parts.append((item["weight"], _one_from_json(rest, at)))
        try:
            return Mix(tuple(parts))
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from error
    return _one_from_json(record, where)


def _one_from_json(record: Any, where: str) -> Workload:
    known = [f.name for f in fields(Workload)]
    if not isinstance(record, Mapping) or set(record) != set(known):
        has = ", ".join(map(str, record)) if isinstance(record, Mapping) else repr(record)
        raise BadInput(f"{where}: workload has the fields {has}; it needs {', '.join(known)}")
    try:
        return Workload(**record)
    except (BadInput, TypeError) as error:  # TypeError: a list or an object where a word belongs
        raise BadInput(f"{where}: {error}") from error


def at_the_end(workload: AnyWorkload) -> tuple[Workload, ...]:
    """The parts of a workload, each behind the longest cache that it meets.

    Decode steps that continue the prefill before them are written with the context that they have on average.
    """
    parts: list[Workload] = []
    start: tuple[int, int] | None = None  # sequences and tokens that the last prefill leaves in the cache
    for count, part in workload.parts:
        last = part
        if part.phase == "prefill":
            start = part.batch, part.context + part.tokens
        elif start is not None and (part.batch, part.context) == (start[0], start[1] + (count - 1) // 2):
            last = replace(part, context=start[1] + count - 1)
        parts.append(last)
    return tuple(parts)


def check_fits(workload: AnyWorkload, positions: int | None, can_generate: bool | None, model: str) -> None:
    """Refuse a workload that is longer than the model's positions reach, or needs a cache that it does not have.

    Args:
        positions: of the model; None where it names no number of them.
        can_generate: whether it keeps a key/value cache; None where that is not known.
        model: its name.

    Raises:
        BadInput: naming both lengths, or what is missing.
    """
    for part in at_the_end(workload):
        if can_generate is False and part.context:
            raise BadInput(
                f"workload {part.name} reads a key/value cache, and {model} is not run with one; give a prefill such "
                f"as 'prefill {part.batch}x128'"
            )
        needed = part.tokens + part.context
        if positions is not None and needed > positions:
            raise BadInput(
                f"workload {part.name} needs {needed} positions ({part.context} cached and {part.tokens} new), "
                f"{model} has {positions}; shorten the prompt or the context"
            )
