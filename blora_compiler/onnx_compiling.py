"""Compile an ONNX file to an ONNX file: the stages in order.

    file -> find sites -> count rows -> profile -> plan -> factor -> verify -> file

Problem, solver, rules, plan and report are those of every model. What differs: damage is a relative output error, as
a graph without gradients allows, nothing trains, and whatever is no site stays as it is in the file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import stages
from .budget import Budget
from .cost_models.flops import FlopsCostModel, whole_graph_cost
from .errors import BadInput, listed
from .onnx_files import (
    check_out,
    describe_files,
    external_tensors,
    fingerprint,
    is_onnx_path,
    opened,
    read_model,
    staged_file,
    weight_bytes,
    write_model,
)
from .onnx_inputs import Feed, given_feeds, random_feeds, unknown_integers
from .onnx_profiling import count_rows, factors_of, profile_sites
from .onnx_sites import OnnxSites, find_sites
from .onnx_verification import Factors, OnnxParity, verification_feeds, verify_onnx
from .passes.onnx_factor_sites import FactorSites
from .passes.onnx_pack_first_factors import PackFirstFactors
from .plan import Plan
from .problem import Problem, build_problem
from .profiling import Profile
from .report import COUNTED, Report, versions
from .rules import RuleValue, resolve_rules
from .stages import Journal, Outcome, Record
from .values import AnyWorkload, Factored, Metric, Site, Workload
from .workloads import parse_workload


@dataclass(frozen=True)
class OnnxArtifact:
    """A compressed file that was verified and stands in its place.

    Attributes:
        files: name of the graph, and of its weights where they do not fit into it -> bytes.
        path: the graph.
        parity: how it compares with the same weights unfactored, and how far it is from the original.
        parameter_bytes: of its initializers.
    """

    path: Path
    files: Mapping[str, int]
    parity: OnnxParity
    parameter_bytes: int


@dataclass(frozen=True)
class CompiledOnnx:
    """A plan for an ONNX file, and the verified file once it is saved.

    Attributes:
        path: the file it was made for, which stays as it is.
        plan: which site runs how, at what cost.
        records: one per stage, in order.
        sites: what was found in the graph.
        profile: damages and factors of the sites.
        feeds: setting -> inputs that a saved file is compared on.
        fingerprint: of the file when the plan was made.
        artifact: the saved file, or None.
    """

    path: Path
    plan: Plan
    records: tuple[Record, ...]
    sites: tuple[Site, ...] = field(repr=False)
    profile: Profile = field(repr=False)
    feeds: Mapping[str, Feed] = field(repr=False)
    fingerprint: str
    artifact: OnnxArtifact | None = None

    def save(
        self, out: str | Path, *, overwrite: bool = False, on_record: Callable[[Record], None] | None = None
    ) -> CompiledOnnx:
        """Write the compressed file, verified. Returns the same with its artifact.

        Raises:
            BadInput: the place is taken, cannot be written to, or the original has changed since.
            ParityFailed: the file computes something else; nothing is left at `out`.
        """
        journal = Journal(on_record)
        artifact = journal.run("factor", write_verified, self, Path(out), overwrite)
        return replace(self, artifact=artifact, records=(*self.records, *journal.records))

    def report(self) -> Report:
        """What was asked, planned and achieved; prints as markdown."""
        return Report(_report_data(self))


def compile_onnx(
    path: str | Path,
    budget: float | int | str,
    out: str | Path | None = None,
    *,
    metric: Metric | None = None,
    workload: str | AnyWorkload | None = None,
    rules: Mapping[str, RuleValue] | None = None,
    calibration: Any = None,
    plan: Plan | None = None,
    seed: int = 0,
    rank_multiple: int = 8,
    overwrite: bool = False,
    on_record: Callable[[Record], None] | None = None,
) -> CompiledOnnx:
    """Compress the matrix products of an ONNX file to a budget, without training.

    Args:
        path: the ONNX file. Its external data may only lie in its own folder.
        budget: the share to keep (`0.25`, `"25%"`) or an amount with a unit, of the sites.
        out: where the verified file goes; None leaves that to `save`.
        metric: `flops` (default), `bytes` or `params`.
        workload: shape of the run that rows are counted in; a prompt of 1 x 128 by default. Axes that the file fixes
            stay as they are.
        rules: glob on site names -> `dense`, `exclude`, `compress` or `{"min_rank": .., "max_rank": ..}`.
        calibration: an `.npz` file of arrays by input name, batch first, a mapping of that kind, or a list of these.
            Without it inputs are random, which makes a poor measure.
        plan: apply this plan instead of solving for one.
        seed: of random inputs.
        rank_multiple: ranks are multiples of this.
        overwrite: replace an earlier `out`.
        on_record: called as each stage ends.

    Raises:
        BadInput: something given cannot be used; the message says what to change.
        InfeasibleBudget: no plan is that small; names the smallest that is.
        ParityFailed: the file computes something else; nothing is left at `out`.
    """
    path = Path(path)
    asked = Budget.parse(budget, metric)
    if asked.metric == "latency":
        raise BadInput(f"budget {asked.text} is a time, and an ONNX file has no model of time; use flops or bytes")
    _refuse_interpolative(plan)
    load = _workload(workload)
    journal = Journal(on_record)
    with tempfile.TemporaryDirectory(prefix="blora-onnx-") as folder:
        scratch = Path(folder)
        found = journal.run("load", _find, path)
        if out is not None:
            check_out(Path(out), path, read_model(path), overwrite)
        load = replace(load, dtype=found.dtype)
        resolve_rules(rules, [site.planned(()) for site in found.sites])
        feeds, origin = _feeds(path, calibration, load, seed, scratch)
        sites = journal.run("rows", _count, path, found, feeds, load, seed, scratch)
        profiled = journal.run("profile", _profile, path, feeds, origin, seed, scratch)
        problem = _problem(sites, profiled, asked, load, rules, rank_multiple)
        chosen = journal.run("plan", stages.choose_forms, problem, plan, None)
        settings = verification_feeds(path, feeds, load, seed, scratch)
    compiled = CompiledOnnx(path, chosen, tuple(journal.records), sites, profiled, settings, fingerprint(path))
    return compiled if out is None else compiled.save(out, overwrite=overwrite, on_record=on_record)


def _refuse_interpolative(plan: Plan | None) -> None:
    forms = {} if plan is None else plan.forms
    if found := [name for name, form in forms.items() if isinstance(form, Factored) and form.interpolative]:
        raise BadInput(
            f"the plan has interpolative forms ({', '.join(found[:3])}), and an ONNX file gets plain pairs; make a "
            f"plan without interpolative"
        )


def refuse_options(given: Mapping[str, Any]) -> None:
    """Raise BadInput listing every option that an ONNX file has no use for and that is set to something."""
    reasons = {
        "train": "nothing trains", "evaluation": "there is no tokenizer to measure text with",
        "eval": "there is no tokenizer to measure text with",
        "distill": "nothing trains", "steps": "nothing trains", "length": "nothing trains", "batch": "nothing trains",
        "learning_rate": "nothing trains", "config": "nothing trains", "inputs": "give calibration arrays",
        "tokenizer": "calibration is arrays", "device": "there is no model of time for it",
        "folder": "the result is one file", "resume": "there is no run folder", "target": "it is verified on the CPU",
        "dtype": "weights keep their type", "no_export": "the result is the file",
        "quantize": "weights keep their type", "interpolative": "its pairs are plain ones",
        "narrow": "its other nodes keep their shapes", "rounds": "plans are not tried on it",
    }  # fmt: skip
    wrong = [f"{name}: {reasons[name]}" for name, value in given.items() if value is not None and value is not False]
    if wrong:
        raise BadInput(f"an ONNX file is compiled without these options: {listed(wrong)}; leave them out")


def refuse_damage_and_scope(damage: str, scope: str) -> None:
    """Raise BadInput for measures that need gradients or weigh nothing, and for counts of a whole graph."""
    if damage not in ("two-sided", "whitened"):  # two-sided is the default, which has no gradients to go by here
        raise BadInput(f"damage is {damage!r}; for an ONNX file it is always 'whitened', relative to each output")
    if scope != "sites":
        raise BadInput(f"scope is {scope!r}; for an ONNX file only the sites are counted: leave it out")


# ── The stages ───────────────────────────────────────────────────────────────────────────────────────────────────


def _find(path: Path) -> Outcome[OnnxSites]:
    if not is_onnx_path(path):
        raise BadInput(f"{path} does not end in .onnx; name an ONNX file")
    model = read_model(path)
    found = find_sites(model)
    if not found.sites:
        why = "; ".join(str(refusal) for refusal in found.refusals[:3]) or "it holds no MatMul and no Gemm"
        raise BadInput(
            f"{path} has 0 matrix products with a constant 2-D weight, so there is nothing to compress ({why})"
        )
    calls = sum(len(site.calls) for site in found.sites)
    summary = (
        f"{len(found.sites)} sites in {calls} of {len(list(model.graph))} nodes, {found.dtype}; "
        f"{len(found.refusals)} products left alone"
    )
    return Outcome(found, summary, refusals=found.refusals)


def _feeds(path: Path, calibration: Any, load: Workload, seed: int, scratch: Path) -> tuple[list[Feed], str]:
    model = read_model(path)
    with opened(read_model(path), scratch, str(path)) as session:
        if calibration is None:
            unknown = unknown_integers(model, session)
            guess = (
                f" ({', '.join(unknown)}: 0 and 1 only, as nothing in the graph tells its range)" if unknown else ""
            )
            return random_feeds(model, session, load, seed), f"random inputs by the graph's own signature{guess}"
        return given_feeds(calibration, session), "the calibration arrays given"


def _count(
    path: Path, found: OnnxSites, feeds: list[Feed], load: Workload, seed: int, scratch: Path
) -> Outcome[tuple[Site, ...]]:
    """Rows at the workload; where made-up inputs of that shape do not run, those of the first calibration run."""
    model = read_model(path)
    where = f"one run at {load.name}"
    try:
        with opened(read_model(path), scratch, str(path)) as session:
            feed = random_feeds(model, session, load, seed, runs=1)[0]
        rows = count_rows(path, feed, scratch)
    except BadInput:
        rows, where = count_rows(path, feeds[0], scratch), "the first calibration run"
    sites = tuple(site.planned(rows[site.name]) for site in found.sites)
    return Outcome(sites, f"counted in {where} where the file leaves them open", {"rows": rows, "counted_in": where})


def _profile(path: Path, feeds: list[Feed], origin: str, seed: int, scratch: Path) -> Outcome[Profile]:
    profiled = profile_sites(path, feeds, scratch, seed=seed)
    summary = (
        f"{profiled.kind} damage of {len(profiled.spectra)} sites from {origin}, {len(feeds)} runs ({profiled.unit})"
    )
    return Outcome(profiled, summary, {"unit": profiled.unit, "rows": profiled.tokens, "data": origin})


def _problem(
    sites: tuple[Site, ...],
    profiled: Profile,
    asked: Budget,
    load: Workload,
    rules: Mapping[str, RuleValue] | None,
    rank_multiple: int,
) -> Problem:
    return build_problem(
        sites=sites, budget=asked, damage_model=profiled, workload=load, rules=rules, scope="sites",
        rank_multiple=rank_multiple, fingerprints=stages.fingerprints(sites, profiled), operators=(),
        cost_model=FlopsCostModel(),
    )  # fmt: skip


def write_verified(compiled: CompiledOnnx, out: Path, overwrite: bool) -> Outcome[OnnxArtifact]:
    """Write the file beside its place, verify it, and let it take its place."""
    path = compiled.path
    model = read_model(path)
    check_out(out, path, model, overwrite)
    if fingerprint(path) != compiled.fingerprint:
        raise BadInput(f"{path} has changed since the plan was made; compile it again")
    factors = _factors(compiled)
    result = FactorSites(factors).run(model)
    assert not result.refusals, f"the plan names sites that {path} does not have: {result.refusals}"
    packed = PackFirstFactors(result.first_factors).run(model)
    dtype = compiled.plan.workload.dtype
    with staged_file(out) as staged:
        if result.modified or external_tensors(read_model(path)):
            files = write_model(model, staged)
        else:
            files = (Path(shutil.copyfile(path, staged)),)  # nothing changes, to the byte
        parity = verify_onnx(staged, path, factors, compiled.feeds, dtype, staged.parent)
        described = describe_files(files)
    artifact = OnnxArtifact(out, described, parity, weight_bytes(model))
    summary = f"{len(result.changed)} sites rewritten, {packed.applied} of their first products packed; {parity}"
    facts = {"errors": dict(parity.parity.errors), "distances": dict(parity.distances), "packed": packed.to_json()}
    return Outcome(artifact, summary, facts)


def _factors(compiled: CompiledOnnx) -> Factors:
    return factors_of(compiled.profile, compiled.sites, compiled.plan.forms)


def _report_data(compiled: CompiledOnnx) -> dict[str, Any]:
    """What `report.render` prints: the same entries as for any model, those of text, time and training empty."""
    plan, artifact = compiled.plan, compiled.artifact
    counted = [site for site in compiled.sites if site.name in plan.forms]
    dense, now = (whole_graph_cost(counted, (), forms, plan.workload) for forms in ({}, plan.forms))
    kept = {metric: (dense.in_metric(metric), now.in_metric(metric)) for metric in COUNTED}
    return {
        "model": compiled.path.name,
        "budget": {
            "asked": plan.budget,
            "metric": plan.metric,
            "scope": plan.scope,
            "planned_fraction": plan.fraction,
            "damage": plan.damage,
            "damage_kind": plan.damage_kind,
            "damage_unit": plan.damage_unit,
            "gap": plan.gap,
        },
        "achieved": {
            "sites": {
                metric: {"dense": before, "compressed": after, "fraction": after / before if before else 1.0}
                for metric, (before, after) in kept.items()
            }
        },
        "workload": plan.workload.to_json(),
        "sites": [
            {"site": c.site, "form": str(c.form), "cost": c.cost, "dense_cost": c.dense_cost, "damage": c.damage}
            for c in plan.choices
        ],
        "excluded": list(plan.excluded),
        "quality": {},
        "parity": None if artifact is None else artifact.parity.parity.to_json(),
        "export": None if artifact is None else _describe(artifact),
        "timings": [],
        "time_spent": [],
        "stages": [
            {
                "stage": record.stage,
                "seconds": round(record.seconds, 2),
                "summary": record.summary,
                "facts": dict(record.facts),
                "refusals": [str(refusal) for refusal in record.refusals],
            }
            for record in compiled.records
        ],
        "versions": versions(),
    }


def _describe(artifact: OnnxArtifact) -> dict[str, Any]:
    return {
        "folder": artifact.path.parent.name,
        "target": "cpu",
        "dtype": artifact.parity.parity.dtype,
        "files": list(artifact.files),
        "bytes": sum(artifact.files.values()),
        "parameter_bytes": artifact.parameter_bytes,
        "unmapped_sites": [],
        "distances": dict(artifact.parity.distances),
    }


def _workload(workload: str | AnyWorkload | None) -> Workload:
    load = Workload() if workload is None else workload
    load = parse_workload(load) if isinstance(load, str) else load
    if not isinstance(load, Workload):
        raise BadInput(f"workload {load.name} is a mix, and an ONNX file is one graph; name one of its parts")
    return load
