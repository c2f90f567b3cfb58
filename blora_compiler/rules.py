"""What the user fixed about single sites: globs on names, resolved to one rule a site."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any, Literal

from .errors import BadInput, did_you_mean, listed
from .values import Site

RuleValue = Literal["dense", "exclude", "compress"] | Mapping[str, int]

_MODES: dict[str, Literal["auto", "dense", "exclude"]] = {"dense": "dense", "exclude": "exclude", "compress": "auto"}
_BOUNDS = ("min_rank", "max_rank")
_HOW_TO_WRITE = '"dense", "exclude", "compress" or {"min_rank": 64, "max_rank": 512}'


@dataclass(frozen=True)
class SiteRule:
    """What the rules leave open for one site.

    Attributes:
        mode: `"auto"`: the solver decides; `"dense"`: stays dense and counts; `"exclude"`: stays dense and is in
            neither numerator nor denominator (with scope `model` everything counts, so there it means `"dense"`).
        min_rank, max_rank: bounds on the rank of a factored form; both inclusive. Dense is always allowed; a
            `min_rank` also forbids removing the site.
        source: the glob that decided last, or None where no rule matched.
    """

    mode: Literal["auto", "dense", "exclude"] = "auto"
    min_rank: int | None = None
    max_rank: int | None = None
    source: str | None = None


def resolve_rules(rules: Mapping[str, RuleValue] | None, sites: Sequence[Site]) -> dict[str, SiteRule]:
    """The rule of every site, by site name.

    Globs are case sensitive and match a site's name and each of its aliases. Rules apply in the order given, field
    by field: `"dense"`, `"exclude"` and `"compress"` set the mode and leave earlier rank bounds alone;
    `{"min_rank", "max_rank"}` sets the bounds it names and the mode to auto. Output heads start as `"exclude"`,
    everything else as auto; a glob as wide as `"*"` matches heads too.

    Args:
        rules: glob -> rule, applied in order.
        sites: all sites of the model.

    Raises:
        BadInput: listing every rule that is none, matches nothing (nearest names offered) or contradicts another.
    """
    rules = {} if rules is None else rules
    if not isinstance(rules, Mapping):
        raise BadInput(f"rules are {type(rules).__name__}, not a mapping; write {{glob: rule}} with {_HOW_TO_WRITE}")
    matched = {glob: _sites_matching(glob, sites) for glob in rules if isinstance(glob, str)}
    problems = [problem for glob, value in rules.items() for problem in _problems_of_rule(glob, value)]
    problems += [_nothing_matched(glob, sites) for glob, names in matched.items() if not names]
    if problems:
        raise BadInput(f"rules: {listed(problems)}")
    drafts = {site.name: _Draft("exclude" if site.kind == "head" else "auto") for site in sites}
    for glob, names in matched.items():
        for name in names:
            drafts[name].apply(glob, rules[glob])
    _refuse_contradictions(drafts)
    return {name: draft.finished() for name, draft in drafts.items()}


class _Draft:
    """One site's rule while globs are applied to it: every field with the glob that set it."""

    def __init__(self, mode: Literal["auto", "dense", "exclude"]) -> None:
        self.mode = mode
        self.source: str | None = None
        self.bounds: dict[str, tuple[int, str]] = {}

    def apply(self, glob: str, value: RuleValue) -> None:
        self.source = glob
        if isinstance(value, str):
            self.mode = _MODES[value]
            return
        self.mode = "auto"
        self.bounds |= {bound: (rank, glob) for bound, rank in value.items()}

    def contradiction(self) -> str | None:
        """The two globs whose bounds leave no rank, as a sentence, or None."""
        if self.mode != "auto" or len(self.bounds) < 2:
            return None
        (least, least_glob), (most, most_glob) = self.bounds["min_rank"], self.bounds["max_rank"]
        if least <= most:
            return None
        return (
            f"{least_glob!r} asks for min_rank {least} and {most_glob!r} for max_rank {most}, which leaves no rank; "
            f"change one of them"
        )

    def finished(self) -> SiteRule:
        if self.mode != "auto":
            return SiteRule(self.mode, source=self.source)
        ranks = {bound: rank for bound, (rank, _) in self.bounds.items()}
        return SiteRule(self.mode, ranks.get("min_rank"), ranks.get("max_rank"), self.source)


def _sites_matching(glob: str, sites: Sequence[Site]) -> list[str]:
    pattern = re.compile(translate(glob))
    return [site.name for site in sites if any(pattern.match(name) for name in (site.name, *site.aliases))]


def _problems_of_rule(glob: Any, value: Any) -> list[str]:
    """What is wrong with the rule as written, whatever it matches."""
    if not isinstance(glob, str):
        return [f"{glob!r} is no glob; write the site's name as text"]
    if isinstance(value, str):
        if value in _MODES:
            return []
        return [f"{glob!r}: {value!r} is no rule{did_you_mean(value, _MODES)}; use {_HOW_TO_WRITE}"]
    if not isinstance(value, Mapping) or not value:
        return [f"{glob!r}: {value!r} is no rule; use {_HOW_TO_WRITE}"]
    problems = [
        f"{glob!r}: {bound!r} is unknown{did_you_mean(str(bound), _BOUNDS)}; use {_HOW_TO_WRITE}"
        for bound in value
        if bound not in _BOUNDS
    ]
    problems += [
        f"{glob!r}: {bound} is {value[bound]!r}; it must be an integer of at least 1"
        for bound in _BOUNDS
        if bound in value and not _is_rank(value[bound])
    ]
    if not problems and len(value) == 2 and value["min_rank"] > value["max_rank"]:
        least, most = value["min_rank"], value["max_rank"]
        problems.append(f"{glob!r}: min_rank {least} is above max_rank {most}; swap or drop one")
    return problems


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _nothing_matched(glob: str, sites: Sequence[Site]) -> str:
    """That `glob` matches no site, with the nearest full names and the nearest roles in every layer."""
    roles = list(dict.fromkeys(site.role for site in sites))
    names = [name for site in sites for name in (site.name, *site.aliases)]
    in_every_layer = [f"*.{role}" for role in roles]
    hint = did_you_mean(glob, [*names, *in_every_layer]) or did_you_mean(f"*.{glob.strip('*?.')}", in_every_layer)
    return f"{glob!r} matches none of the {len(sites)} sites{hint}; the roles here are {_some(roles)}"


def _refuse_contradictions(drafts: Mapping[str, _Draft]) -> None:
    """Raise with each pair of contradicting globs once, whatever number of sites they share."""
    sites_of: dict[str, list[str]] = {}
    for name, draft in drafts.items():
        if problem := draft.contradiction():
            sites_of.setdefault(problem, []).append(name)
    if sites_of:
        raise BadInput(f"rules: {listed([f'{_some(names)}: {problem}' for problem, names in sites_of.items()])}")


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
