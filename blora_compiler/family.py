"""One dial: a family of compressed models in one checkpoint, any member of which is there at once.

    family = blora.compile_family(model, smallest=0.2, largest=0.75, train="corpus.txt")
    family.at(0.37).export("out/")

Every site holds ordered factors (`NestedLinear`), and a member of rank r uses the first r rows and columns. Each
training step is taken by one member, drawn at random: small ones at first, large ones in the end. All of them train
the same factors, norms and biases. Dense weights stay the teacher's.

Four things keep members that are near the teacher from being bent for those that are far from it: factors start
refitted to what the sites before them give in a large member; large members take the last steps, which are short; the
learning rate is a large member's; and a step's loss counts by the root of its member's damage, so that all members
move the factors by about as much.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import stages
from .budget import Budget
from .calibration import reusable, tokens_of_step, training_batches
from .compiling import Compiled
from .cost_models.flops import FlopsCostModel
from .data import check_readable
from .distillation import DistillConfig, distill, learning_rate_for
from .errors import BadInput, PlanInvalid
from .folders import disk_message, file_sha256, staged_folder
from .graph import Level, Program, bind, install, verify_level
from .layers import DenseLinear, FactoredLinear, NestedLinear
from .marginals import measure_marginals
from .nesting import DamageTable, PlanChain, at_budget, between, plan_chain
from .passes.insert_branches import give_private_parameters, site_weight
from .plan import Plan, check_plan
from .problem import Problem, build_problem
from .profiling import Profile
from .refitting import Factors, balance_components, refit_ordered, side_by_side_refusal
from .replanning import apart
from .rules import RuleValue
from .saving import (
    WEIGHTS,
    describe_input,
    inputs_of_saved_shapes,
    read_weights,
    saved_inputs,
    saved_tokenizer,
    stock_model,
    unique_tensors,
)
from .source import Source
from .stages import Journal, Outcome, Record
from .tracing import is_pretrained, trace
from .values import AnyWorkload, Dense, Factored, Form, Metric, Scope, Site, form_from_json, form_to_json
from .workloads import workload_from_json

FORMAT = 2
DESCRIPTION = "family.json"
# A draw u from 0 to 1 picks the member at u ** skew of the way from the smallest to the largest.
FIRST_SKEW, LAST_SKEW = 3.0, 0.2
COMPILED_MEMBERS = 6  # with torch.compile only so many members train: each is compiled on its own


@dataclass(frozen=True)
class Family:
    """A trained student of which every budget between `smallest` and `largest` is a member.

    Attributes:
        program: the student with a `NestedLinear` at every counted site.
        chain: the plans of its members.
        source: the teacher (after `load_family`: its architecture), tokenizer and name.
        records: one per stage, in order; empty after `load_family`.
        rules: as asked.
    """

    program: Program = field(repr=False)
    chain: PlanChain = field(repr=False)
    source: Source = field(repr=False)
    records: tuple[Record, ...] = ()
    rules: Mapping[str, RuleValue] = field(default_factory=dict)

    @property
    def smallest(self) -> float:
        """The least that a member keeps."""
        return self.chain.smallest

    @property
    def largest(self) -> float:
        """The most that a member keeps."""
        return self.chain.largest

    def plan_at(self, budget: float | int | str) -> Plan:
        """The plan of the member at exactly this budget.

        Raises:
            BadInput: the budget is no fraction between `smallest` and `largest`.
        """
        return self.chain.plan_at(budget)

    def at(self, budget: float | int | str) -> Compiled:
        """The member at this budget, its weights its own: nothing is trained, and the family does not change.

        Raises:
            BadInput: as `plan_at`.
        """
        plan = self.plan_at(budget)
        folded = member(self.program, plan.forms)
        return Compiled(folded.tree, folded.graph, plan, self.records, folded, self.source)

    def save(self, folder: str | Path) -> Path:
        """Write the family as safetensors and JSON; `load_family` reads it back.

        Raises:
            BadInput: the folder cannot be written to, or holds something else.
        """
        from safetensors import SafetensorError

        folder = Path(folder)
        try:
            with staged_folder(folder, marker=DESCRIPTION) as staging:
                _write(self, staging)
        except SafetensorError as error:
            raise BadInput(disk_message(folder, error)) from error
        return folder


# ── Compiling ────────────────────────────────────────────────────────────────────────────────────────────────────


def compile_family(
    model: nn.Module | str | Path,
    smallest: float = 0.2,
    largest: float = 0.75,
    *,
    metric: Metric | None = None,
    scope: Scope = "sites",
    workload: str | AnyWorkload | None = None,
    rules: Mapping[str, RuleValue] | None = None,
    calibration: Any = None,
    train: Any = None,
    distill: DistillConfig | None = None,
    inputs: Any = None,
    tokenizer: Any = None,
    seed: int = 0,
    rank_multiple: int = 8,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    on_record: Callable[[Record], None] | None = None,
) -> Family:
    """Compress a model to all budgets between two fractions at once. Arguments not listed are those of `compile`.

    Members keep every branch, sites that read one input share their first factor in all members or in none, and the
    loss has no hidden-state term, as the members that it would serve differ.

    Args:
        smallest, largest: fractions of the metric that the smallest and the largest member keep.
        metric: `flops` (default), `bytes` or `params`.

    Raises:
        BadInput: something given cannot be used; the message says what to change.
        InfeasibleBudget: no plan is as small as `smallest`.
    """
    asked = _checked_range(smallest, largest, metric)
    check_readable(calibration, train)
    calibration, train = reusable(calibration), reusable(train)
    folder = None if folder is None else Path(folder)
    data = train if calibration is None else calibration
    config = distill or DistillConfig(seed=seed)
    journal = Journal(on_record)
    source = journal.run("load", stages.load, model, tokenizer)
    program = journal.run("trace", stages.trace_model, source, inputs, data, rules)
    profiled, batches = journal.run(
        "profile", stages.measure_damage, source, program, data, "two-sided", seed, folder
    )
    request = stages.Request(asked, workload, rules, scope, rank_multiple)
    problem, _ = request.of_program(source.name, program, profiled)
    low, high = (Budget.parse(end, metric).fraction for end in (smallest, largest))
    chain = journal.run("plan", _plan_members, program, problem, low, high)
    nested = journal.run("insert", _insert, program, chain, profiled, batches)
    if train is not None or distill is not None:
        nested = journal.run(
            "distill", _distill, source, nested, chain, train, config, folder, resume, overwrite, progress
        )
    return Family(nested, chain, source, tuple(journal.records), dict(rules or {}))


def _checked_range(smallest: float, largest: float, metric: Metric | None) -> Budget:
    low, high = Budget.parse(smallest, metric), Budget.parse(largest, metric)
    if low.fraction is None or high.fraction is None or not low.fraction < high.fraction < 1.0:
        raise BadInput(
            f"a family goes from a smaller to a larger fraction below 1, and got {low.text} and {high.text}; "
            f"write, say, smallest=0.2, largest=0.75"
        )
    if high.metric == "latency":
        raise BadInput("a family is planned in flops, bytes or params, not in latency; choose one of these")
    return high


def _plan_members(
    program: Program, problem: Problem, smallest: float | None, largest: float | None
) -> Outcome[PlanChain]:
    assert smallest is not None and largest is not None, "the range was looked at"
    weights = sum(p.numel() for p in program.tree.parameters())
    problem = replace(problem, damage_model=DamageTable.of(problem))
    chain = plan_chain(problem, smallest, largest, weights)
    return Outcome(chain, f"{len(chain.anchors)} anchors; smallest {chain.anchors[0].summary()}")


def _insert(
    program: Program, chain: PlanChain, profiled: Profile, batches: Sequence[Mapping[str, Tensor]]
) -> Outcome[Program]:
    """The program with a nested module at every site that the members decide about.

    Factors are refitted to one member's inputs: one near the large end, whose inputs are close to those of all
    others. Where that measures worse, or cannot be done, they stay as they were profiled.
    """
    own = ordered_factors(profiled, program.sites, chain.pairs())
    member = chain.anchors[-2]
    fitting, measuring = apart(batches)
    why_not = side_by_side_refusal(program, fitting)
    starts = [own] if why_not is not None else [own, refit_ordered(program, member.forms, own, fitting)]

    def damage(factors: Mapping[str, Factors]) -> float:
        of_member = {
            name: (factors[name][0][: form.rank], factors[name][1][:, : form.rank])
            for name, form in member.forms.items()
            if isinstance(form, Factored)
        }
        return measure_marginals(program, member.forms, profiled, of_member, measuring).damage

    damages = [damage(factors) for factors in starts]
    nested = nest(program, chain, starts[damages.index(min(damages))])
    refitted = f"not refitted: {why_not}" if why_not is not None else f"{damages[1]:.4g} refitted"
    summary = (
        f"{len(own)} of {len(program.sites)} sites with shared ordered factors; at {member.budget} "
        f"{damages[0]:.4g} measured as profiled, {refitted} ({profiled.unit})"
    )
    facts = {"budget": member.budget, "as_profiled": damages[0], "refitted": damages[1] if len(damages) > 1 else None}
    return Outcome(nested, summary, facts)


def ordered_factors(profiled: Profile, sites: Sequence[Site], pairs: Mapping[str, Factored]) -> dict[str, Factors]:
    """Site name -> A and B whose first r rows and columns are the best factors of every rank r; sharers have one A.

    `starting_factors` is not of use here: it mixes the components to balance one rank.
    """
    by_name = {site.name: site for site in sites}
    found: dict[str, Factors] = {}
    for name, form in pairs.items():
        if name in found:
            continue
        names = form.sharers or (name,)
        spectra = [profiled.spectrum(by_name[other], form) for other in names]
        firsts = [spectrum.A for spectrum in spectra if spectrum.A is not None]
        seconds = [spectrum.B[:, : form.rank] for spectrum in spectra if spectrum.B is not None]
        assert len(firsts) == len(seconds) == len(names), f"{name} was profiled without factors"
        A, parts = balance_components(firsts[0][: form.rank], seconds)
        found |= {other: (A, part) for other, part in zip(names, parts, strict=True)}
    return found


def nest(program: Program, chain: PlanChain, starts: Mapping[str, Factors]) -> Program:
    """A traced program as a family's: level BRANCHED, showing the largest member.

    Args:
        starts: site name -> ordered factors; sites that are dense in every member have none and stay as they are.
    """
    nested = replace(program.copy(), level=Level.BRANCHED)
    largest = chain.anchors[-1].forms
    firsts: dict[str, nn.Parameter] = {}
    for name, form in chain.pairs().items():
        A, B = starts[name]
        site = program.site(name)
        weight = site_weight(program, site)
        bias = None if site.bias is None else program.graph.get_parameter(site.bias).detach().clone()
        first = firsts.setdefault(form.sharers[0] if form.sharers else name, nn.Parameter(A.to(weight).clone()))
        module = NestedLinear(weight if largest[name] == Dense() else None, first, B.to(weight), bias)
        if module.dense is not None:
            module.dense.requires_grad_(False)
        install(nested, site, module)
    give_private_parameters(nested)
    verify_level(nested, "nest")
    return nested


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────


def member_of_step(step: int, steps: int, members: int, seed: int) -> int:
    """Which of `members`, counted from the smallest, takes this step: small ones at first, large ones in the end.

    Small members have far to go, and large ones are near the teacher all along: they get the steps that are short.
    """
    progress = step / max(1, steps - 1)
    skew = FIRST_SKEW * (LAST_SKEW / FIRST_SKEW) ** progress
    return int(members * random.Random(f"{seed}:{step}").random() ** skew)


def loss_weight(member: Plan, middle: Plan) -> float:
    """What the loss of a member's steps is multiplied with, so that its gradients are as long as the middle one's.

    A gradient of the KL goes with the root of the KL, and the optimizer divides by the root mean square of the last
    ones: those of small members would be most of it.
    """
    if not member.damage or not middle.damage or min(member.damage, middle.damage) <= 0:
        return 1.0
    return math.sqrt(middle.damage / member.damage)


def activate(tree: nn.Module, forms: Mapping[str, Form]) -> None:
    """Set every nested site to the form of one member."""
    for name, module in tree.named_modules():
        if isinstance(module, NestedLinear):
            form = forms[name]
            module.active = form.rank if isinstance(form, Factored) else None


def _distill(
    source: Source,
    nested: Program,
    chain: PlanChain,
    train: Any,
    config: DistillConfig,
    folder: Path | None,
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> Outcome[Program]:
    """The same program, all its members trained in turns."""
    batches, origin = training_batches(nested, source, train, config)
    anchors = chain.anchors
    members = _evenly(anchors, COMPILED_MEMBERS) if config.compile else anchors
    config = replace(config, hidden_weight=0.0)
    middle, near = anchors[len(anchors) // 2], anchors[len(anchors) * 3 // 4]
    if config.learning_rate is None and near.damage is not None and near.damage_unit == "nats per token":
        config = replace(config, learning_rate=learning_rate_for(near.damage, tokens_of_step(batches)))

    def member_at(step: int) -> Plan:
        return members[member_of_step(step, config.steps, len(members), config.seed)]

    result = distill(
        nested.tree,
        source.model,
        batches,
        config,
        folder=None if folder is None else folder / "distill",
        before_step=lambda step: activate(nested.tree, member_at(step).forms),
        loss_weight=lambda step: loss_weight(member_at(step), middle),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    activate(nested.tree, anchors[-1].forms)
    bind(nested)
    facts = {"config": config.to_json(), "tokens": result.tokens, "seconds": result.seconds, "data": origin}
    summary = f"{result.steps} steps by {len(members)} members in turns, {result.tokens} tokens from {origin}"
    return Outcome(nested, summary, facts)


def _evenly(anchors: Sequence[Plan], most: int) -> list[Plan]:
    last = len(anchors) - 1
    return [anchors[i] for i in sorted({round(k * last / (most - 1)) for k in range(most)})]


# ── One member ───────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def member(nested: Program, forms: Mapping[str, Form]) -> Program:
    """The folded program of one member: copies of the first ranks, so that nothing done to it reaches the family."""
    folded = replace(nested.copy(), level=Level.FOLDED)
    firsts: dict[str, nn.Parameter] = {}
    for site in nested.sites:
        module = nested.form_module(site.name)
        if not isinstance(module, NestedLinear):
            continue
        form = forms[site.name]
        bias = None if module.bias is None else module.bias.detach().clone()
        if isinstance(form, Factored):
            A, B = module.factors(form.rank)
            owner = form.sharers[0] if form.sharers else site.name
            first = firsts.setdefault(owner, nn.Parameter(A.detach().clone(), requires_grad=False))
            install(folded, site, FactoredLinear(first, B.clone(), bias).requires_grad_(False))
        else:
            assert module.dense is not None, f"{site.name} has no dense weight in this family"
            install(folded, site, DenseLinear(module.dense.detach().clone(), bias).requires_grad_(False))
    give_private_parameters(folded)
    folded.tree.requires_grad_(False)
    verify_level(folded, "member")
    return folded


# ── Saving and loading ───────────────────────────────────────────────────────────────────────────────────────────


def _write(family: Family, folder: Path) -> None:
    from safetensors.torch import save_file

    tree: Any = family.program.tree
    tensors, aliases = unique_tensors(tree)
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    problem = family.chain.problem
    damages = problem.damage_model
    assert isinstance(damages, DamageTable)
    description = {
        "format": FORMAT,
        "model": family.source.name,
        "weights_sha256": file_sha256(folder / WEIGHTS),
        "aliases": aliases,
        "positional": family.program.positional,
        "inputs": {name: describe_input(value) for name, value in family.program.inputs.items()},
        "anchors": [json.loads(anchor.to_json()) for anchor in family.chain.anchors],
        "rules": dict(family.rules),
        "damage": damages.to_json(),
        "offered": _offered(problem),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")
    if is_pretrained(tree):
        config = copy.deepcopy(tree.config)
        config.architectures = [type(tree).__name__]
        config.save_pretrained(folder)
        if tree.can_generate():
            tree.generation_config.save_pretrained(folder)
    if family.source.tokenizer is not None:
        family.source.tokenizer.save_pretrained(folder)


def _offered(problem: Problem) -> dict[str, list[Any]]:
    """Site name -> the pairs that members may use."""
    offered: dict[str, list[Any]] = {site.name: [] for site in problem.counted}
    for option in problem.options:
        for name, form in option.forms:
            if isinstance(form, Factored):
                offered[name].append(form_to_json(form))
    return offered


def load_family(folder: str | Path, model: nn.Module | None = None) -> Family:
    """Read back what `Family.save` wrote.

    Args:
        model: for plain modules, an instance of the original architecture (its weights are not used).

    Raises:
        BadInput: no family there, a damaged or edited file, or a plain module without `model`.
    """
    folder = Path(folder)
    description = _read(folder)
    source, traced = _architecture(folder, description, model)
    try:
        chain = _chain_of(traced, description)
    except (PlanInvalid, KeyError, TypeError, IndexError) as error:
        raise BadInput(f"{folder / DESCRIPTION} contradicts itself or its model ({error}); save it again") from error
    sites = {site.name: site for site in traced.sites}
    starts = {
        name: (torch.zeros(form.rank, sites[name].in_features), torch.zeros(sites[name].out_features, form.rank))
        for name, form in chain.pairs().items()
    }
    nested = nest(traced, chain, starts)
    read_weights(folder, nested.tree, description["aliases"])
    nested.tree.eval()
    return Family(nested, chain, source, (), description["rules"])


def _read(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{folder} holds no family: {DESCRIPTION} is missing") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}); save the family again") from error
    needed = {"format", "model", "weights_sha256", "aliases", "positional", "inputs", "anchors", "rules", "damage"}
    if not isinstance(description, dict) or (needed | {"offered"}) - description.keys():
        raise BadInput(f"{path} lacks some of {sorted(needed | {'offered'})}; save the family again")
    if description["format"] != FORMAT:
        raise BadInput(f"{path} has format {description['format']}, this version reads {FORMAT}; save it again")
    weights = folder / WEIGHTS
    if not weights.exists() or file_sha256(weights) != description["weights_sha256"]:
        raise BadInput(f"{weights} is missing or not what {DESCRIPTION} was written with; copy the family again")
    return description


def _architecture(folder: Path, description: Mapping[str, Any], model: nn.Module | None) -> tuple[Source, Program]:
    if (folder / "config.json").exists():
        model = stock_model(folder).eval()
        named = saved_inputs(model, description)
    elif model is None:
        raise BadInput(f"{folder} holds a plain module ({description['model']}); pass model=an instance of it")
    else:
        model = copy.deepcopy(model).float().eval().requires_grad_(False)
        named = inputs_of_saved_shapes(description)
    program = trace(model, tuple(named.values()) if description["positional"] else named)
    source = Source(model, saved_tokenizer(folder), description["model"], "read from a family, without the teacher")
    return source, program


def _chain_of(program: Program, description: Mapping[str, Any]) -> PlanChain:
    """The chain as saved, every anchor counted anew.

    Raises:
        PlanInvalid: an anchor is not what its own problem says.
    """
    anchors = tuple(Plan.from_json(json.dumps(entry), DESCRIPTION) for entry in description["anchors"])
    largest = anchors[-1]
    problem = build_problem(
        program.sites,
        budget=Budget.parse(largest.budget, largest.metric),
        cost_model=FlopsCostModel(),
        damage_model=DamageTable.from_json(description["damage"]),
        workload=workload_from_json(largest.workload.to_json(), DESCRIPTION),
        rules=description["rules"],
        scope=largest.scope,
        operators=program.operators,
        rank_multiple=largest.rank_multiple,
        fingerprints=largest.fingerprints,
    )
    offered = {name: {form_from_json(form, name) for form in forms} for name, forms in description["offered"].items()}

    def is_offered(name: str, form: Form) -> bool:
        return form == Dense() or form in offered[name]

    problem = between(problem, is_offered)
    dense_below = {name for name, form in largest.forms.items() if form != Dense()}
    problem = between(problem, lambda name, form: form != Dense() or name not in dense_below)
    for anchor in anchors:
        check_plan(anchor, at_budget(problem, Budget.parse(anchor.budget, anchor.metric)))
    return PlanChain(problem, anchors)
