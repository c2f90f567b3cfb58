"""The small values that cross stage borders: sites, forms, operators, workloads, costs, refusals.

Nothing here imports torch. Sizes that depend on the input are strings over the symbols `batch`, `tokens` and
`context`; `Workload.evaluate` is the only place where they become numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal

from .errors import BadInput

Metric = Literal["flops", "latency", "bytes", "params"]
Scope = Literal["sites", "model"]
METRICS: tuple[Metric, ...] = ("flops", "latency", "bytes", "params")

# The unit of damages that are a share of each site's own output: sums of them compare plans of one model.
RELATIVE_ERROR = "relative output error"

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


# ── Forms: how a site runs after compression ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, order=True)
class Dense:
    """One GEMM with a full (out x in) weight."""

    def __str__(self) -> str:
        return "dense"


@dataclass(frozen=True, order=True)
class Factored:
    """Two GEMMs: A (rank x in), then B (out x rank).

    Attributes:
        rank: of the two factors.
        sharers: names of the sites that read one input through one and the same A, this site among them, in site
            order; all of them have this form. Empty where the site has an A of its own.
        interpolative: what A computes are `rank` of the outputs themselves, and B computes the others: the same
            matrices, written with rank^2 numbers less. Of sharers, it is the first one whose outputs A computes.
    """

    rank: int
    sharers: tuple[str, ...] = ()
    interpolative: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise BadInput(f"a factored form needs a rank of at least 1, got {self.rank!r}")
        if self.sharers and len(set(self.sharers)) < max(2, len(self.sharers)):
            raise BadInput(f"a first factor is shared by at least two different sites, got {list(self.sharers)}")

    def __str__(self) -> str:
        return (
            f"rank {self.rank}"
            + (" shared" if self.sharers else "")
            + (" interpolative" if self.interpolative else "")
        )

    def brings_first_factor(self, site_name: str) -> bool:
        """Whether A counts as this site's: each has its own, and the first sharer has the one they share."""
        return not self.sharers or self.sharers[0] == site_name

    def outputs_of_second(self, site: Site) -> int:
        """How many of a site's outputs the second GEMM computes; what is left came out of the first."""
        given = self.interpolative and self.brings_first_factor(site.name)
        return site.out_features - (self.rank if given else 0)


@dataclass(frozen=True, order=True)
class Removed:
    """No GEMM: the whole attention or MLP branch that the site belongs to is gone."""

    def __str__(self) -> str:
        return "removed"


Form = Dense | Factored | Removed


def form_to_json(form: Form) -> dict[str, Any]:
    """The form as `form_from_json` reads it."""
    match form:
        case Factored(rank, sharers, interpolative):
            return {
                "form": "factored", "rank": rank, **({"sharers": list(sharers)} if sharers else {}),
                **({"interpolative": True} if interpolative else {}),
            }  # fmt: skip
        case Dense() | Removed():
            return {"form": str(form)}


def form_from_json(data: Any, where: str) -> Form:
    """The form written as `{"form": "dense" | "removed"}` or `{"form": "factored", "rank": 64}`.

    Sites that share their first factor also have `"sharers"`, the list of all their names; where it computes some of
    the outputs themselves, `"interpolative": true`.

    Raises:
        BadInput: naming `where`, when the record is anything else.
    """
    match data:
        case {"form": "dense", **rest} if not rest:
            return Dense()
        case {"form": "removed", **rest} if not rest:
            return Removed()
        case {"form": "factored", "rank": int(rank), **rest} if set(rest) <= {"sharers", "interpolative"}:
            sharers, interpolative = rest.get("sharers", []), rest.get("interpolative", False)
            if isinstance(sharers, list) and _are_texts(sharers) and isinstance(interpolative, bool):
                return Factored(rank, tuple(sharers), interpolative)
    raise BadInput(
        f'{where}: {data!r} is no form; write {{"form": "dense"}}, {{"form": "removed"}} '
        f'or {{"form": "factored", "rank": 64}}, with "sharers": [names] where sites share their first factor, and '
        f'"interpolative": true where it computes outputs'
    )


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


# ── What the graph consists of ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Site:
    """One projection weight W (out x in), however often it is called: the unit of decision.

    Attributes:
        name: path of the module that owns the weight, or the parameter's path where no module does.
        weight: the parameter's path as the graph names it.
        aliases: every other path of the same parameter (tied weights) and of its owners; rules match these too.
        in_features, out_features: of W as y = W x, whatever the storage order.
        transposed: stored in x out (GPT-2's Conv1D, `x @ w`).
        bias: path of the bias parameter, or None.
        rows: one size expression per call: how many rows the GEMM has, e.g. `"batch*tokens"`.
        group: name of the set of sites that read the same input.
        branch: path of the removable attention or MLP module this site belongs to, or None.
        kind: `"head"` for output heads (they feed the model's logits from a vocabulary-sized weight).
        tied: the parameter is also read by something that is no projection (an embedding lookup).
        in_tree: the owning module is exactly this projection, so the tree view can hold its replacement.
        last_only: the model's output at a position needs this result at that position alone. Where only the last
            position is kept, as in the prefill of a graph that generates, it is one row a sequence.
        narrowed_from: (out_features, in_features) in the teacher, where an MLP has lost inner channels since.
    """

    name: str
    weight: str
    in_features: int
    out_features: int
    rows: tuple[str, ...]
    group: str
    bias: str | None = None
    aliases: tuple[str, ...] = ()
    transposed: bool = False
    branch: str | None = None
    kind: Literal["projection", "head"] = "projection"
    tied: bool = False
    in_tree: bool = True
    last_only: bool = False
    narrowed_from: tuple[int, int] | None = None

    @property
    def whole(self) -> Site:
        """The site as the teacher has it, which is what its cost is compared with."""
        if self.narrowed_from is None:
            return self
        out_features, in_features = self.narrowed_from
        return replace(self, out_features=out_features, in_features=in_features, narrowed_from=None)

    @property
    def break_even_rank(self) -> int:
        """Smallest rank whose two GEMMs take no fewer FLOPs than the dense one."""
        return -(-self.in_features * self.out_features // (self.in_features + self.out_features))

    @property
    def weight_count(self) -> int:
        return self.in_features * self.out_features

    @property
    def role(self) -> str:
        """The last part of the name that is no number: `up_proj`, `c_attn`; alike in every layer."""
        parts = [part for part in self.name.split(".") if not part.isdigit()]
        return parts[-1] if parts else self.name


def can_pack(sites: Sequence[Site]) -> bool:
    """Whether the first GEMMs of these sites become one: one input, one call each, nothing tied, no head.

    Those of different branches do not: one may be removed without the other.
    """
    first = sites[0]
    return all(
        site.group == first.group and site.branch == first.branch and len(site.rows) == 1 and site.rows == first.rows
        and site.in_features == first.in_features and site.kind == "projection" and not site.tied
        for site in sites
    )  # fmt: skip


def shared_break_even_rank(sites: Sequence[Site]) -> int:
    """Smallest rank at which sites with one first factor take no fewer FLOPs than dense; they read one input."""
    into, out = sites[0].in_features, sum(site.out_features for site in sites)
    return -(-into * out // (into + out))


def site_groups(sites: Iterable[Site]) -> list[tuple[Site, ...]]:
    """Sites in order, those together whose first GEMMs become one."""
    sites = list(sites)
    alike: dict[tuple[str, str | None], list[Site]] = {}
    for site in sites:
        alike.setdefault((site.group, site.branch), []).append(site)
    groups = [
        group
        for members in alike.values()
        for group in ([tuple(members)] if can_pack(members) else [(member,) for member in members])
    ]
    position = {site.name: index for index, site in enumerate(sites)}
    return sorted(groups, key=lambda group: position[group[0].name])


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention over all sequences and heads; each a size expression.

    Attributes:
        batch: sequences.
        heads: query heads.
        kv_heads: key and value heads before they are repeated for the queries: what the cache holds.
        queries: new tokens a sequence.
        keys: tokens attended to, those of the cache included.
        head_size: of queries and keys.
        value_size: of values.
        rotary: queries are rotated on their way in, which decides what exporters fuse.
    """

    batch: str
    heads: str
    kv_heads: str
    queries: str
    keys: str
    head_size: str
    value_size: str
    rotary: bool = False


@dataclass(frozen=True)
class Operator:
    """Everything in the graph that is no site, reduced to what a cost model needs.

    Sizes are expressions over `batch`, `tokens` and `context`.

    Attributes:
        name: the module it was traced in and what it does there: `model.norm.mean`; a second one gets `_1`.
        kind: `attention`, `matmul`, `convolution`, `experts` (a routed expert product), `lookup`, `elementwise`, or
            `session`: what one call costs whatever the graph holds, which models of time add.
        flops: multiply-adds counted twice, as `torch.utils.flop_counter` does; "0" for elementwise work.
        elementwise: number of output elements of elementwise or reduction work.
        activations: elements read and written that are no weights; keys and values before they are repeated.
        params: elements of constant parameters held (an embedding holds more than a lookup reads).
        weight_reads: elements of constant weights read in one call.
        owner: path of the innermost module it was traced in, `""` for the model itself.
        owner_type: class name of that module: `LlamaRMSNorm`.
        attention: sizes of attention: of a fused one, or, where it is written out, at its product with the values.
        last_only: as of a `Site`.
    """

    name: str
    kind: Literal["attention", "matmul", "convolution", "experts", "lookup", "elementwise", "session"]
    flops: str = "0"
    elementwise: str = "0"
    activations: str = "0"
    params: int = 0
    weight_reads: str = "0"
    owner: str = ""
    owner_type: str = ""
    attention: AttentionShape | None = None
    last_only: bool = False


@dataclass(frozen=True)
class Refusal:
    """Something that was left alone, and why. `site` names a site, a parameter, a node, or the model's class."""

    site: str
    reason: str

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}"


# ── Workload and cost ────────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=65536)
def _evaluate(expression: str, batch: int, tokens: int, context: int) -> int | None:
    """The integer value of `expression`, or None if something in it stays unknown. Cached: 560 sites ask the same."""
    import sympy

    names = sympy.symbols("batch tokens context")
    size = sympy.sympify(expression, locals={str(name): name for name in names})
    size = size.subs(dict(zip(names, (batch, tokens, context), strict=True)))
    return int(size) if size.is_Integer else None


@dataclass(frozen=True)
class Workload:
    """The shapes a cost is asked for.

    Attributes:
        phase: `"prefill"` (many new tokens) or `"decode"` (one new token a step).
        batch: sequences at once.
        tokens: new tokens a sequence: the prompt in prefill, 1 in decode.
        context: tokens already in the cache.
        dtype: arithmetic and storage type of the weights.
    """

    phase: Literal["prefill", "decode"] = "prefill"
    batch: int = 1
    tokens: int = 128
    context: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode"):
            raise BadInput(f"workload phase is {self.phase!r}; use 'prefill' or 'decode'")
        for name, least in (("batch", 1), ("tokens", 1), ("context", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise BadInput(f"workload {name} is {value!r}; it must be an integer of at least {least}")
        if self.phase == "decode" and self.tokens != 1:
            raise BadInput(
                f"a decode workload has 1 new token a step, got tokens={self.tokens}; use context for the past"
            )
        if self.dtype not in DTYPE_BYTES:
            raise BadInput(f"workload dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPE_BYTES)}")

    @property
    def last_position(self) -> Workload:
        """The same sequences, their last token alone being new: what is left where only its result is kept."""
        return replace(self, tokens=1, context=self.context + self.tokens - 1)

    def evaluate(self, expression: str) -> int:
        """The size `expression` at this workload.

        Raises:
            BadInput: if the expression has a symbol that a workload does not define.
        """
        if expression.isdigit():
            return int(expression)
        size = _evaluate(expression, self.batch, self.tokens, self.context)
        if size is None:
            raise BadInput(
                f"size {expression!r} has no integer value at {self}; only batch, tokens and context are known"
            )
        return size

    @property
    def parts(self) -> tuple[tuple[int, Workload], ...]:
        """(weight, workload) pairs, as a mix has them: itself, once."""
        return ((1, self),)

    @property
    def name(self) -> str:
        """As `parse_workload` reads it: `prefill 1x2048`, `decode 1@256`."""
        if self.phase == "decode":
            return f"decode {self.batch}@{self.context}"
        return f"prefill {self.batch}x{self.tokens}" + (f"@{self.context}" if self.context else "")

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Mix:
    """Several workloads run by one model: `1 x 2048 prefill + 256 decode steps`.

    Attributes:
        parts: (how often, workload) pairs, all of one dtype, at least one.
    """

    parts: tuple[tuple[int, Workload], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise BadInput("a mix of workloads needs at least one part")
        for weight, part in self.parts:
            if not isinstance(weight, int) or isinstance(weight, bool) or weight < 1:
                raise BadInput(f"{part.name} has weight {weight!r} in the mix; it must be an integer of at least 1")
        dtypes = sorted({part.dtype for _, part in self.parts})
        if len(dtypes) > 1:
            raise BadInput(f"the parts of a mix run one model, but have the dtypes {', '.join(dtypes)}; choose one")

    @property
    def dtype(self) -> str:
        """Of all parts."""
        return self.parts[0][1].dtype

    @property
    def name(self) -> str:
        """As `parse_workload` reads it: `prefill 1x2048 + 256 decode 1@2176`."""
        return " + ".join((f"{weight} " if weight > 1 else "") + part.name for weight, part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {"mix": [{"weight": weight, **part.to_json()} for weight, part in self.parts]}


AnyWorkload = Workload | Mix


@dataclass(frozen=True)
class Cost:
    """What something takes. Adds field by field; unknown latency stays unknown.

    Attributes:
        flops: floating-point operations of GEMMs, attention and convolutions (a multiply-add is two).
        elementwise: elements produced by everything else; not part of `flops`.
        weight_bytes: bytes of parameters stored.
        activation_bytes: bytes of activations read and written.
        params: number of parameters stored.
        latency_ns: nanoseconds, or None where no model of time was asked.
    """

    flops: int = 0
    elementwise: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    params: int = 0
    latency_ns: int | None = None

    def __add__(self, other: Cost) -> Cost:
        latency = None if self.latency_ns is None or other.latency_ns is None else self.latency_ns + other.latency_ns
        return Cost(
            self.flops + other.flops,
            self.elementwise + other.elementwise,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.params + other.params,
            latency,
        )

    def in_metric(self, metric: Metric) -> int:
        """The one number a budget in `metric` is about: FLOPs, nanoseconds, bytes of weights, or parameters.

        Raises:
            BadInput: for latency, when no model of time was asked.
        """
        match metric:
            case "flops":
                return self.flops
            case "bytes":
                return self.weight_bytes
            case "params":
                return self.params
            case "latency":
                if self.latency_ns is None:
                    raise BadInput("this cost carries no latency; use a cost model of time, or metric='flops'")
                return self.latency_ns
        raise BadInput(f"metric {metric!r} is unknown; use one of {', '.join(METRICS)}")


ZERO_COST = Cost(latency_ns=0)


def mixed(price: Callable[[Workload], Cost], workload: AnyWorkload) -> Cost:
    """The cost of a workload or a mix: work and time add up by weight; what is stored is stored once."""
    if isinstance(workload, Workload):
        return price(workload)
    total = ZERO_COST
    for weight, part in workload.parts:
        cost = price(part)
        latency = None if cost.latency_ns is None else weight * cost.latency_ns
        total += Cost(weight * cost.flops, weight * cost.elementwise, 0, weight * cost.activation_bytes, 0, latency)
    return replace(total, weight_bytes=cost.weight_bytes, params=cost.params)


@dataclass(frozen=True)
class Unit:
    """How numbers of a metric are printed."""

    suffix: str
    steps: tuple[tuple[float, str], ...] = field(default=((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")))

    def format(self, amount: float) -> str:
        for size, prefix in self.steps:
            if abs(amount) >= size:
                return f"{amount / size:.4g} {prefix}{self.suffix}"
        return f"{amount:.4g} {self.suffix}"


UNITS: dict[str, Unit] = {
    "flops": Unit("FLOP"),
    "bytes": Unit("B"),
    "params": Unit("params"),
    "latency": Unit("s", ((1e9, ""), (1e6, "m"), (1e3, "u"), (1.0, "n"))),
}


def format_amount(amount: float, metric: Metric) -> str:
    """`amount` with its unit: `3.2 GFLOP`, `400 MB`, `8.3 Mparams`, `12 ms`."""
    return UNITS[metric].format(amount)
