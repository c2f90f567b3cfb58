"""Which rule each site ends up with, and what every bad rule is told."""

from __future__ import annotations

import pytest

from blora_compiler.errors import BadInput
from blora_compiler.rules import SiteRule, resolve_rules
from tests.planning import transformer

SITES = transformer(2)
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def test_without_rules_everything_is_open_and_heads_are_excluded():
    rules = resolve_rules(None, SITES)
    assert list(rules) == [site.name for site in SITES]
    assert rules.pop("lm_head") == SiteRule("exclude")
    assert set(rules.values()) == {SiteRule("auto")}


CASES = {
    "dense": ({"*.layers.0.*": "dense"}, UP, SiteRule("dense", source="*.layers.0.*")),
    "exclude": ({"*up_proj": "exclude"}, UP, SiteRule("exclude", source="*up_proj")),
    "bounds": ({"*down_proj": {"min_rank": 16}}, DOWN, SiteRule("auto", 16, None, "*down_proj")),
    "a single name": ({UP: "dense"}, UP, SiteRule("dense", source=UP)),
    "a question mark": ({"*.layers.?.mlp.up_proj": "dense"}, UP, SiteRule("dense", source="*.layers.?.mlp.up_proj")),
    "case counts": ({"*UP_PROJ*": "dense", "*up_proj": "compress"}, UP, None),
    "untouched": ({"*.layers.0.*": "dense"}, DOWN, SiteRule("auto")),
    "later wins": ({"*": "dense", "*up_proj": "compress"}, UP, SiteRule("auto", source="*up_proj")),
    "earlier loses": ({"*up_proj": "compress", "*": "dense"}, UP, SiteRule("dense", source="*")),
    "bounds open a dense site": (
        {"*": "dense", "*up_proj": {"max_rank": 8}}, UP, SiteRule("auto", None, 8, "*up_proj")),
    "bounds add up field by field": (
        {"*": {"min_rank": 8, "max_rank": 64}, "*up_proj": {"max_rank": 32}}, UP,
        SiteRule("auto", 8, 32, "*up_proj")),
    "compress keeps earlier bounds": (
        {"*": {"min_rank": 8}, "*up_proj": "compress"}, UP, SiteRule("auto", 8, None, "*up_proj")),
    "a dense site has no bounds": (
        {"*": {"min_rank": 8}, "*up_proj": "dense"}, UP, SiteRule("dense", source="*up_proj")),
    "a head by compress": ({"lm_head": "compress"}, "lm_head", SiteRule("auto", source="lm_head")),
    "a head by bounds": ({"lm_head": {"max_rank": 32}}, "lm_head", SiteRule("auto", None, 32, "lm_head")),
    "a head by dense": ({"lm_head": "dense"}, "lm_head", SiteRule("dense", source="lm_head")),
    "an alias": ({"*embed_tokens": "compress"}, "lm_head", SiteRule("auto", source="*embed_tokens")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_rule_of_one_site(case):
    rules, name, expected = CASES[case]
    if expected is None:
        with pytest.raises(BadInput, match=r"'\*UP_PROJ\*' matches none"):
            resolve_rules(rules, SITES)
        return
    assert resolve_rules(rules, SITES)[name] == expected


WRONG = [
    ("dense", "rules are str, not a mapping"),
    ({"*": "densee"}, "'*': 'densee' is no rule; did you mean 'dense'?; use \"dense\", \"exclude\""),
    ({"*": 64}, "'*': 64 is no rule; use"),
    ({"*": {}}, "'*': {} is no rule; use"),
    ({7: "dense"}, "7 is no glob; write the site's name as text"),
    ({"*": {"min_rnk": 8}}, "'*': 'min_rnk' is unknown; did you mean 'min_rank'"),
    ({"*": {"min_rank": 0}}, "'*': min_rank is 0; it must be an integer of at least 1"),
    ({"*": {"max_rank": True}}, "'*': max_rank is True; it must be an integer of at least 1"),
    ({"*": {"max_rank": 8.0}}, "'*': max_rank is 8.0; it must be"),
    ({"*": {"min_rank": 9, "max_rank": 8}}, "'*': min_rank 9 is above max_rank 8; swap or drop one"),
    ({"*.dwn_proj": "dense"}, "'*.dwn_proj' matches none of the 11 sites; did you mean '*.down_proj'"),
    ({"down_prj": "dense"}, "did you mean '*.down_proj'"),
    ({"*??dwn_pr*": "dense"}, "did you mean '*.down_proj'"),
    ({"model.layers.9.mlp.up_proj": "dense"}, "did you mean 'model.layers.1.mlp.up_proj'"),
    ({"*nothing.like.it*": "dense"}, "matches none of the 11 sites; the roles here are q_proj, v_proj, o_proj"),
    ({"*": {"min_rank": 64}, "*up_proj": {"max_rank": 32}},
     "model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj: '*' asks for min_rank 64 and '*up_proj' for max_rank"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "message"), WRONG, ids=[str(rules) for rules, _ in WRONG])
def test_refusals(rules, message):
    with pytest.raises(BadInput) as refusal:
        resolve_rules(rules, SITES)
    assert message in str(refusal.value)


def test_all_offenders_are_listed_at_once():
    with pytest.raises(BadInput) as refusal:
        resolve_rules({"*": "densee", "*.gone": "dense", "*up_proj": {"min_rank": -1}}, SITES)
    message = str(refusal.value)
    assert "3 problems" in message
    assert all(part in message for part in ("densee", "'*.gone' matches none", "min_rank is -1"))


def test_a_contradiction_that_a_later_rule_resolves_is_none():
    rules = {"*": {"min_rank": 64}, "*up_proj": {"max_rank": 32}, UP: "dense", "*.1.*up_proj": {"min_rank": 8}}
    assert resolve_rules(rules, SITES)[UP].mode == "dense"
