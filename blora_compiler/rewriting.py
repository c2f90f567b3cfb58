"""Rewrite: run passes in order, and check after each one that it kept its word."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import BadInput, GraphInvalid, ParityFailed
from .graph import Program, call, main_output, move, output_distance, verify_level, view_distance
from .layers import BranchedLinear, DenseLinear
from .profiling import Profile
from .tracing import export_graph, projection_shapes
from .values import Dense, Factored, Form, Refusal, Removed, Site

if TYPE_CHECKING:
    from .passes import Pass, PassResult

logger = logging.getLogger(__name__)

# Shares of the largest output. The two views run the same kernels on the same tensors; a pass that claims to preserve
# outputs may reorder float32 sums. More than this is a bug.
VIEW_TOLERANCE = 1e-6
PRESERVED_TOLERANCE = 1e-4


Results = list[tuple[str, "PassResult"]]  # name of a pass, and what it did


def rewrite(program: Program, passes: Sequence[Pass]) -> tuple[Program, Results]:
    """Apply `passes` in order.

    After each: the level's rules, both views alike, and, where the pass claims it, the outputs as before.

    Returns:
        The rewritten program and what each pass did.

    Raises:
        GraphInvalid: a pass was given, or left, the wrong level, or broke the graph's rules.
        ParityFailed: the views, or the outputs before and after, disagree.
    """
    results: Results = []
    for step in passes:
        name = type(step).__name__
        if program.level != step.takes:
            raise GraphInvalid(f"{name} takes level {step.takes.name}, and got {program.level.name}; check the order")
        result = step.run(program)
        verify_level(result.program, name)
        if result.modified:
            _check_outputs(program, result.program, name, step.preserves_outputs)
            if result.program.level != step.gives:
                raise GraphInvalid(f"{name} gives level {step.gives.name}, and left {result.program.level.name}")
        logger.info(result.summary(name))
        results.append((name, result))
        program = result.program
    return program, results


def _check_outputs(before: Program, after: Program, name: str, preserves: bool) -> None:
    if next(before.tree.parameters()).device.type == "meta":
        return
    scale = output_scale(before)
    allowed = VIEW_TOLERANCE * scale
    between_views = view_distance(after)
    if not between_views <= allowed:
        raise ParityFailed(
            f"after {name} the graph and the module tree differ by {between_views:.3g}, above {allowed:.3g}"
        )
    if preserves:
        allowed = PRESERVED_TOLERANCE * scale
        with torch.no_grad():
            change = output_distance(before.call_graph(before.inputs), after.call_graph(before.inputs))
        if not change <= allowed:
            raise ParityFailed(f"{name} must preserve outputs, and changed them by {change:.3g}, above {allowed:.3g}")


def output_scale(program: Program) -> float:
    """Largest absolute value of the main output on the example inputs."""
    with torch.no_grad():
        return float(main_output(program.call_graph(program.inputs)).abs().max())


# ── The two stages made of passes ────────────────────────────────────────────────────────────────────────────────


def insert(
    program: Program,
    forms: Mapping[str, Form],
    profile: Profile,
    *,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    dense_branch_rank: int = 0,
    train_embeddings: bool = False,
) -> tuple[Program, Results]:
    """Insert the trainable branches that `forms` asks for, and drop the branches it removes.

    Args:
        factors: site name -> A0, B0 to start from where they are not the profile's own; see `refit`.
        dense_branch_rank: rank of the branch through which sites that stay dense may train; 0 leaves them frozen.
        train_embeddings: train a private copy of the embeddings (and a tied head) too.

    Raises:
        BadInput: a form that cannot be given to its site; all of them are listed.
    """
    from .passes import InsertBranches, RemoveBranches

    starts = {**starting_factors(program.sites, forms, profile, dense_branch_rank), **(factors or {})}
    inserted, results = rewrite(
        program,
        [
            InsertBranches(forms, starts, train_embeddings),
            RemoveBranches(forms),  # second: what it removes needs no branch, and its sites are left alone before
        ],
    )
    (_, branches), (_, removals) = results
    unmet = [refusal for refusal in branches.refusals if isinstance(forms.get(refusal.site), Factored)]
    if unmet or removals.refusals:
        raise BadInput("the plan does not apply: " + "; ".join(map(str, (*unmet, *removals.refusals))))
    return inserted, results


def starting_factors(
    sites: Sequence[Site], forms: Mapping[str, Form], profile: Profile, dense_branch_rank: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Starting factors A0, B0 of every site that trains through a branch."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for site in sites:
        match forms.get(site.name):
            case Factored(rank, sharers) if sharers:
                if site.name not in found:
                    found |= profile.shared_factors(sharers, rank)
            case Factored(rank):
                found[site.name] = profile.starting_factors(site, rank)
            case Dense() if dense_branch_rank and not site.tied:  # trained, it would no longer be the lookup's weight
                rank = min(dense_branch_rank, site.in_features, site.out_features)
                found[site.name] = profile.starting_factors(site, rank)
    return found


def branched_sites(program: Program) -> list[str]:
    """Names of the sites that carry a trainable branch."""
    return [site.name for site in program.sites if isinstance(program.form_module(site.name), BranchedLinear)]


def check_given_outputs(program: Program, forms: Mapping[str, Form]) -> None:
    """Raise BadInput, before anything trains, where an interpolative form has no factors worth having."""
    from .passes.fold import reasons_not_to_fold

    if reasons := reasons_not_to_fold(program, forms):
        raise BadInput("not every site folds: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))


def settle(program: Program, forms: Mapping[str, Form]) -> Program:
    """Set every factored site's retention to its final 0 without training."""
    from .passes.insert_branches import close_retention

    return move(program, lambda tree: close_retention(tree, forms))


def fold(program: Program, forms: Mapping[str, Form]) -> tuple[Program, Results]:
    """Turn each site into its final form: one GEMM, one pair, or nothing.

    Raises:
        BadInput: a site that should fold still carries a dense part, or the plan names forms the program lacks.
    """
    from .passes import FinishFolding, FoldToDense, FoldToFactors

    finished, results = rewrite(program, [FoldToFactors(forms), FoldToDense(forms), FinishFolding()])
    _, done = results[-1]
    if not done.modified:
        left = {refusal.site for refusal in done.refusals}
        reasons = [r for _, result in results[:-1] for r in result.refusals if r.site in left]
        raise BadInput("not every site folds: " + "; ".join(map(str, reasons or done.refusals)))
    check_fresh_trace(finished, forms)
    return finished, results


def check_fresh_trace(program: Program, forms: Mapping[str, Form]) -> None:
    """Trace the folded tree anew: it must show the same sites in the same forms, and compute the same.

    Raises:
        ParityFailed: naming the first site whose GEMMs are not what the plan says, or the two outputs.
    """
    if program.tree_is_graph:
        return  # there is one view only
    fresh, _ = export_graph(program.tree, program.inputs, program.constants, program.positional)
    shapes = projection_shapes(fresh)
    for site in program.sites:
        form = forms.get(site.name, Dense())
        if isinstance(form, Factored) and site.name in form.sharers:
            _name_after_the_first(shapes, form.sharers)
        expected = _expected_gemms(program, site, form)
        prefix = f"{site.name}."
        found = {name: shape for name, shape in shapes.items() if name.startswith(prefix) or name == site.weight}
        if found != expected:
            raise ParityFailed(f"{site.name}: a fresh trace finds GEMMs {found}, the plan says {expected}")
    with torch.no_grad():
        again = call(fresh, program.inputs, program.constants, program.positional)
        distance = output_distance(program.call_graph(program.inputs), again)
    allowed = PRESERVED_TOLERANCE * output_scale(program)
    if not distance <= allowed:
        raise ParityFailed(f"a fresh trace of the folded tree differs by {distance:.3g}, above {allowed:.3g}")


def _name_after_the_first(shapes: dict[str, tuple[int, ...]], sharers: Sequence[str]) -> None:
    """A trace names a shared factor after any one of its sites; give it to the first."""
    names = [f"{name}.A" for name in sharers if f"{name}.A" in shapes]
    if len(names) == 1:
        shapes[f"{sharers[0]}.A"] = shapes.pop(names[0])


def _expected_gemms(program: Program, site: Site, form: Form) -> dict[str, tuple[int, int]]:
    match form:
        case Dense():
            trained = isinstance(program.form_module(site.name), DenseLinear)  # folded from a branch: stored out x in
            stored = (
                (site.in_features, site.out_features)
                if site.transposed and not trained
                else (site.out_features, site.in_features)
            )
            return {site.weight: stored}
        case Factored(rank) as form:
            second = {f"{site.name}.B": (form.outputs_of_second(site), rank)}
            if not form.brings_first_factor(site.name):
                return second
            return {f"{site.name}.A": (rank, site.in_features), **second}
        case Removed():
            return {}
    raise AssertionError(form)


def refusals_of(results: Results) -> tuple[Refusal, ...]:
    """All refusals of a run of passes, each once."""
    return tuple(dict.fromkeys(refusal for _, result in results for refusal in result.refusals))


def summary_of(results: Results) -> str:
    """One line a pass, joined."""
    return "; ".join(result.summary(name) for name, result in results)
