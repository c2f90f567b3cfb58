"""Any plan the types allow applies and verifies, or is refused with reasons."""

from __future__ import annotations

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_compiler.errors import BadInput
from blora_compiler.graph import Level, main_output, view_distance
from blora_compiler.profiling import profile
from blora_compiler.rewriting import fold, insert, settle
from blora_compiler.tracing import trace
from blora_compiler.values import Dense, Factored, Removed
from tests.models import build, example_inputs

NAMES = ("llama", "gpt2", "bert", "encoder", "twice")


@functools.cache
def prepared(name):
    program = trace(build(name), example_inputs(name))
    return program, profile(program, [], kind="plain")


@st.composite
def plans(draw):
    """A form, or none, for each site; whole branches are sometimes removed, so that removal is not always refused."""
    name = draw(st.sampled_from(NAMES))
    program, _ = prepared(name)
    pairs, low_pairs = (st.builds(Factored, st.integers(1, most), st.just(()), st.booleans()) for most in (40, 20))
    any_form = st.one_of(st.just(Dense()), pairs, st.none(), st.just(Removed()))
    mostly = st.one_of(st.just(Dense()), low_pairs)
    wild = draw(st.integers(0, 9)) == 0
    forms = {site.name: draw(any_form if wild else mostly) for site in program.sites}
    for branch in sorted({site.branch for site in program.sites if site.branch}):
        if draw(st.integers(0, 3)) == 0:
            forms |= {site.name: Removed() for site in program.sites if site.branch == branch}
    return name, {site: form for site, form in forms.items() if form is not None}


@settings(max_examples=15)
@given(plans())
def test_any_plan_applies_and_verifies_or_is_refused_with_reasons(plan):
    name, forms = plan
    program, profiled = prepared(name)
    try:
        branched, _ = insert(program, forms, profiled)
    except BadInput as refused:
        assert "the plan does not apply: " in str(refused)
        return
    folded, _ = fold(settle(branched, forms), forms)
    assert folded.level == Level.FOLDED
    assert view_distance(folded) == 0
    with torch.no_grad():
        assert main_output(folded.call_graph(folded.inputs)).isfinite().all()
