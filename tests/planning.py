"""Sites, damages and problems for the planning tests: made in code, priced by tables, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from blora_compiler.cost_models.flops import FlopsCostModel

from blora_compiler.budget import Budget
from blora_compiler.problem import DamageKind, Option, Problem, build_problem, fixed_and_baseline
from blora_compiler.rules import SiteRule
from blora_compiler.values import Cost, Dense, Factored, Form, Operator, Removed, Site, Workload


def site(name: str, into: int = 64, out: int = 64, **fields) -> Site:
    return Site(name, f"{name}.weight", into, out, rows=("batch*tokens",), group=name, **fields)


def transformer(layers: int, width: int = 64, hidden: int = 160) -> list[Site]:
    """Attention and MLP projections of a small Llama, its head, each branch removable."""
    sites = []
    for layer in range(layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        sites += [
            site(f"{attention}.{role}", width, width, branch=attention) for role in ("q_proj", "v_proj", "o_proj")
        ]
        sites += [
            site(f"{mlp}.up_proj", width, hidden, branch=mlp),
            site(f"{mlp}.down_proj", hidden, width, branch=mlp),
        ]
    return [*sites, site("lm_head", width, 1000, kind="head", tied=True, aliases=("model.embed_tokens",))]


@dataclass(frozen=True)
class SmoothDamage:
    """Falls with the rank as trained weights do; sites differ by a factor fixed by their name."""

    kind: DamageKind = "two-sided"
    unit: str = "nats per token"
    level: float = 1e-3

    def damage(self, site: Site, form: Form) -> float:
        weight = self.level * (1 + sum(site.name.encode()) % 17)
        match form:
            case Dense():
                return 0.0
            case Factored(rank):
                return weight * (1 - rank / min(site.in_features, site.out_features)) ** 2
            case Removed():
                return 20 * weight
        raise AssertionError(form)


@dataclass(frozen=True)
class ConstantDamage:
    """The same for every form but the dense one."""

    value: float
    kind: DamageKind = "two-sided"
    unit: str = "nats per token"

    def damage(self, site: Site, form: Form) -> float:
        return 0.0 if form == Dense() else self.value


def planned(
    sites: list[Site],
    budget: float | int | str = 0.5,
    damage_model: SmoothDamage | ConstantDamage | None = None,
    **arguments,
) -> Problem:
    """`build_problem` with the exact cost model, a smooth damage and 16 tokens."""
    arguments = {"workload": Workload(tokens=16), "cost_model": FlopsCostModel()} | arguments
    return build_problem(
        sites, budget=Budget.parse(budget), damage_model=damage_model or SmoothDamage(), **arguments
    )  # fmt: skip


# ── Problems with arbitrary numbers ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TableModel:
    """A cost model and a damage model in one: numbers by (site name, form)."""

    costs: Mapping[tuple[str, Form], int]
    damages: Mapping[tuple[str, Form], float]
    kind: DamageKind = "two-sided"
    unit: str = "nats per token"

    def cost(self, site: Site, form: Form, workload: Workload) -> Cost:
        return Cost(flops=self.costs.get((site.name, form), 0))

    def operator_cost(self, operator: Operator, workload: Workload) -> Cost:
        return Cost()

    def damage(self, site: Site, form: Form) -> float:
        return self.damages.get((site.name, form), 0.0)


def table_problem(
    tables: list[list[tuple[int, float]]], removals: Mapping[int, float] | None = None, amount: int | None = None
) -> Problem:
    """A problem with these numbers.

    Args:
        tables: for each site (cost, damage) of its dense form, then of rank 1, 2, ...
        removals: index of a branch -> damage of removing it; branches are pairs of neighbouring sites.
        amount: the budget in FLOPs; the whole baseline by default.
    """
    removals = removals or {}
    sites = tuple(site(f"s{i}", branch=f"b{i // 2}" if i // 2 in removals else None) for i in range(len(tables)))
    numbers = {
        (sites[i].name, Factored(rank) if rank else Dense()): pair
        for i, table in enumerate(tables)
        for rank, pair in enumerate(table)
    }
    options = [Option(((name, form),), cost, damage) for (name, form), (cost, damage) in numbers.items()]
    damages = {key: damage for key, (_, damage) in numbers.items()}
    for branch, damage in removals.items():
        members = [member for member in sites if member.branch == f"b{branch}"]
        options.append(Option(tuple((member.name, Removed()) for member in members), 0, damage))
        damages[members[-1].name, Removed()] = damage
    model = TableModel({key: cost for key, (cost, _) in numbers.items()}, damages)
    baseline = sum(table[0][0] for table in tables)
    limit = baseline if amount is None else amount
    problem = Problem(
        sites=sites,
        rules={member.name: SiteRule() for member in sites},
        options=tuple(options),
        notes={},
        baseline=baseline,
        limit=limit,
        fixed=0,
        metric="flops",
        scope="sites",
        budget=Budget(None, limit, "flops", f"{limit}FLOP"),
        workload=Workload(),
        damage_kind="two-sided",
        damage_unit="nats per token",
        rank_multiple=1,
        operators=(),
        fingerprints={},
        cost_model=model,
        damage_model=model,
    )
    assert fixed_and_baseline(problem) == (0, baseline)
    return problem


def every_selection(problem: Problem) -> Iterator[tuple[Option, ...]]:
    """All ways to cover each site exactly once, by brute force."""
    by_sites: dict[tuple[str, ...], list[Option]] = {}
    for option in problem.options:
        by_sites.setdefault(option.covered, []).append(option)
    names = [member.name for member in problem.counted]
    for groups in _partitions(tuple(names), list(by_sites)):
        yield from product(*(by_sites[group] for group in groups))


def _partitions(names: tuple[str, ...], groups: list[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    if not names:
        yield []
        return
    for group in groups:
        if group[0] == names[0] and set(group) <= set(names):
            rest = tuple(name for name in names if name not in group)
            yield from ([group, *others] for others in _partitions(rest, groups))
