"""Calibrate: a device's kernels swept, a few whole models run, one table written that latencies are read from.

Whole models tell what kernels timed alone cannot: what a call costs, and how much slower or faster each kind of work
is among its neighbours. They are small, have random weights and sizes off the grid, and are exported like any other.
All are exported first and then run in several passes, so that what disturbs one pass seldom disturbs the other.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .artifact import Artifact
from .cost_models.kernels import FUNCTIONS, Kernel, fused, gemm
from .cost_models.latency import kernels_of, weight_bytes_read
from .cost_models.measured import (
    FEATURES,
    UNCORRECTED,
    MeasuredClock,
    Table,
    fit_corrections,
    with_warm_weights,
)
from .errors import BadInput
from .folders import write_text
from .layers import DenseLinear, FactoredLinear
from .lowering import lower
from .outline import Outline, outline_of
from .sweeping import (
    PASSES,
    ROWS,
    SIZES,
    STEP_WEIGHTS,
    Journal,
    Place,
    attention_shapes,
    call_cost_ns,
    memory_bytes,
    stack_bytes,
    sweep_attention,
    sweep_gemms,
    sweep_pairs,
    sweep_pointwise,
    sweep_residency,
    sweep_steps,
)
from .timing import call_of, interleaved, on_first_core
from .tracing import generates, trace
from .values import Dense, Factored, Form, Site, Workload, shared_break_even_rank, site_groups

# Kept out of the benchmarks that judge the predictions: those use other models, sizes and budgets.
_LLAMA = (
    Workload("prefill", 1, 96), Workload("prefill", 4, 64), Workload("prefill", 1, 384),
    Workload("decode", 1, 1, 96), Workload("decode", 4, 1, 200), Workload("decode", 1, 1, 700),
)  # fmt: skip
_GPT2 = (
    Workload("prefill", 1, 80), Workload("prefill", 4, 72),
    Workload("decode", 1, 1, 120), Workload("decode", 4, 1, 220), Workload("decode", 1, 1, 600),
)  # fmt: skip
_BERT = (Workload("prefill", 1, 48), Workload("prefill", 8, 96), Workload("prefill", 2, 320))
KEPT_IN_CALIBRATION = 0.4
REPEATS = 24


@dataclass(frozen=True)
class WholeModel:
    """A small model that a calibration runs: made in code, random weights."""

    name: str
    make: Callable[[], nn.Module]
    workloads: tuple[Workload, ...]


def _llama(hidden: int, layers: int, heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers, vocab_size=2000,
            num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=1024,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _gpt2(hidden: int, layers: int, heads: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, vocab_size=2000, n_positions=1024,
                   bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


def _bert(hidden: int, layers: int, heads: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                   intermediate_size=4 * hidden, vocab_size=2000),
        add_pooling_layer=False,
    )  # fmt: skip


WHOLE_MODELS = (
    WholeModel("llama 384x4", lambda: _llama(384, 4, 6), _LLAMA),
    WholeModel("llama 768x3", lambda: _llama(768, 3, 12), _LLAMA),
    WholeModel("gpt2 384x4", lambda: _gpt2(384, 4, 6), _GPT2),
    WholeModel("bert 320x4", lambda: _bert(320, 4, 10), _BERT),
)


def table_path(place: Place) -> Path:
    """Where the table of this machine is kept: a folder named by BLORA_CACHE, or `~/.cache/blora`."""
    folder = Path(os.environ.get("BLORA_CACHE") or Path.home() / ".cache" / "blora")
    return folder / f"calibration-{place.provider}-{place.dtype}-{place.threads or 'all'}-threads.json"


def calibrate(
    place: Place | None = None,
    path: Path | None = None,
    *,
    rows: Sequence[int] = ROWS,
    sizes: Sequence[int] = SIZES,
    models: Sequence[WholeModel] = WHOLE_MODELS,
    again: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Table:
    """Sweep this machine and write its table; an interrupted sweep goes on where it stopped.

    Args:
        place: provider, dtype and threads.
        path: of the table; `table_path` by default.
        rows, sizes: the grid.
        models: run whole, for the corrections; with none, kernels are summed up uncorrected.
        again: forget what an interrupted sweep has found.
        tell: called with a line now and then.
    """
    place = place or Place()
    path = path or table_path(place)
    with on_first_core():
        return _calibrate(place, path, rows, sizes, models, again, tell)


def _calibrate(
    place: Place,
    path: Path,
    rows: Sequence[int],
    sizes: Sequence[int],
    models: Sequence[WholeModel],
    again: bool,
    tell: Callable[[str], None],
) -> Table:
    unfinished = path.with_suffix(".partial.jsonl")
    if again:
        unfinished.unlink(missing_ok=True)
    journal = Journal(unfinished, place.identity())
    if journal.restarted:
        tell(journal.restarted)
    table = sweep(place, journal, rows, sizes, tell)
    if models:
        runs = run_whole_models(table, models, place, tell)
        table = replace(table, corrections=fit_corrections(runs), runs=tuple(runs))
    write_text(path, table.to_json())
    unfinished.unlink(missing_ok=True)
    return table


def sweep(
    place: Place, journal: Journal, rows: Sequence[int], sizes: Sequence[int], tell: Callable[[str], None]
) -> Table:
    """The table of kernels alone, without corrections."""
    call_ns = call_cost_ns(place)
    tell("weights in and out of the caches")
    residency = sweep_residency(place, journal)
    tell("elementwise work, norms, attention")
    pointwise = {name: tuple(sweep_pointwise(place, journal, name, call_ns)) for name in FUNCTIONS}
    attention = sweep_attention(place, journal, attention_shapes(), call_ns)
    # One pass before the grid and one behind it: minutes apart.
    steps, pairs = [], []
    for number in range(1, PASSES + 1):
        tell(f"GEMMs between the points of the grid, and pairs, pass {number} of {PASSES}")
        steps.append(sweep_steps(place, journal, number, call_ns))
        pairs.append(sweep_pairs(place, journal, number, call_ns))
        if number == 1:
            times = sweep_gemms(place, journal, rows, sizes, call_ns, tell)
    fastest = {shape: min(found[shape] for found in steps) for shape in steps[0]}
    table = Table(
        **place.identity(),
        rows=tuple(rows),
        inner=tuple(sizes),
        columns=tuple(sizes),
        gemm_ns=tuple(times[m, k, n] for m in rows for k in sizes for n in sizes),
        **residency,
        attention=tuple(attention),
        pointwise=pointwise,
        memory_bytes=memory_bytes(place.provider),
        corrections=UNCORRECTED,
        row_steps=tuple(point for point in fastest.items() if point[0][1:] in STEP_WEIGHTS),
        column_steps=tuple(point for point in fastest.items() if point[0][1:] not in STEP_WEIGHTS),
    )
    table = with_warm_weights(table, partial(stack_bytes, place))
    runs = [pair_run(table, shape, min(found[shape] for found in pairs)) for shape in pairs[0]]
    return replace(table, pair_corrections=fit_corrections(runs), pair_runs=tuple(runs))


def pair_run(table: Table, shape: tuple[int, int, int, int], measured: tuple[float, float]) -> dict[str, Any]:
    """A pair that ran alone, by (rows, inner, rank, columns): its two GEMMs by feature, and what it took.

    Args:
        table: of kernels alone.
        shape: of the pair.
        measured: nanoseconds, and bytes of weights that the run read.
    """
    rows, inner, rank, columns = shape
    measured_ns, read = measured
    kernels = (gemm(rows, inner, rank, "sites"), gemm(rows, rank, columns, "sites"))
    return {
        "name": f"pair {rows} x {inner} -> {rank} -> {columns}",
        "features": summed_features(MeasuredClock(table, round(read)), kernels, table.dtype),
        "measured_ns": measured_ns,
    }


# ── Whole models ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Exported:
    """A model of the calibration, dense and compressed, ready to be timed."""

    model: WholeModel
    shape: Outline
    forms: Mapping[str, Mapping[str, Form]]
    exports: Mapping[str, Artifact]

    def run_name(self, name: str, load: Workload) -> str:
        """What a run is called in the table."""
        return f"{self.model.name} {name}, {load.name}{'' if self.shape.can_generate else ' (encoder)'}"


def run_whole_models(
    table: Table, models: Sequence[WholeModel], place: Place, tell: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Dense and compressed runs of some models: what their kernels sum up to, by feature, and what they took."""
    with tempfile.TemporaryDirectory() as folder:
        exported = []
        for position, model in enumerate(models):
            tell(f"exporting {model.name}, dense and at {KEPT_IN_CALIBRATION}")
            exported.append(_exported(model, Path(folder) / str(position), place))
        passes = []
        for number in range(1, PASSES + 1):
            tell(f"running whole models, pass {number} of {PASSES}")
            passes.append(
                {
                    (each.model.name, load): time_workload(each.exports, load, REPEATS)
                    for each in exported
                    for load in each.model.workloads
                }
            )
    return [
        {
            "name": each.run_name(name, load),
            "features": features_of(each.shape, of_sites, replace(load, dtype=place.dtype), table),
            "measured_ns": 1e6 * min(times[each.model.name, load][name] for times in passes),
        }
        for each in exported
        for load in each.model.workloads
        for name, of_sites in each.forms.items()
    ]


def _exported(model: WholeModel, folder: Path, place: Place) -> _Exported:
    torch.manual_seed(0)
    dense = model.make().eval()
    program = trace(dense)
    shape, inputs = outline_of(program, model.name), dict(program.inputs)
    forms: dict[str, dict[str, Form]] = {"dense": {}, "compressed": uniform_forms(shape.sites, KEPT_IN_CALIBRATION)}
    exports = {
        name: export_for_timing(in_forms(dense, shape.sites, of_sites), folder / name, place, inputs)
        for name, of_sites in forms.items()
    }
    return _Exported(model, shape, forms, exports)


def time_workload(exports: Mapping[str, Artifact], workload: Workload, repeats: int) -> dict[str, float]:
    """Median milliseconds of one run of a workload by every export, interleaved."""
    first = next(iter(exports.values()))
    phase = workload.phase if first.generation else "model"
    tokens = workload.context if phase == "decode" else workload.tokens
    calls = {name: call_of(artifact.pinned(), phase, workload.batch, tokens) for name, artifact in exports.items()}
    return {timing.name: timing.median_ms for timing in interleaved(workload.name, calls, repeats)}


def features_of(shape: Outline, forms: Mapping[str, Form], workload: Workload, table: Table) -> dict[str, float]:
    """What the kernels of a model in some forms sum up to, by feature, before corrections."""
    clock = MeasuredClock(table).for_working_set(weight_bytes_read(shape.sites, shape.operators, forms, workload))
    groups, operators = site_groups(shape.sites), fused(shape.operators)
    kernels = (kernel for kernel, _ in kernels_of(groups, operators, forms, workload, bool(shape.can_generate)))
    return summed_features(clock, kernels, workload.dtype)


def summed_features(clock: MeasuredClock, kernels: Iterable[Kernel], dtype: str) -> dict[str, float]:
    """The amounts of all features over some kernels."""
    total = dict.fromkeys(FEATURES, 0.0)
    for kernel in kernels:
        for name, amount in clock.features(kernel, dtype).items():
            total[name] += amount
    return total


def uniform_forms(
    sites: Iterable[Site],
    kept: float,
    multiple: int = 8,
    shares_first_factors: bool = False,
    interpolative: bool = False,
) -> dict[str, Form]:
    """Every projection at the same share of its break-even rank, in multiples; heads stay dense.

    Args:
        shares_first_factors: sites that read one input have one first factor, and the same share of the break-even
            rank that they have together.
        interpolative: first factors compute outputs; the ranks keep the same share of the weights, and are higher,
            also than plans allow (which stay below the break-even of plain pairs).
    """
    sites = list(sites)
    forms: dict[str, Form] = {}
    for group in site_groups(sites) if shares_first_factors else [(site,) for site in sites]:
        too_many = shared_break_even_rank(group)
        exact = kept * too_many
        if interpolative:  # rank (into + out - rank) weights
            into, out = group[0].in_features, sum(site.out_features for site in group)
            exact = (into + out - math.sqrt((into + out) ** 2 - 4 * kept * into * out)) / 2
            too_many = min(into, group[0].out_features)
        rank = max(multiple, round(exact / multiple) * multiple)
        small = group[0].kind == "head" or rank >= too_many
        sharers = tuple(site.name for site in group) if len(group) > 1 else ()
        forms |= {site.name: Dense() if small else Factored(rank, sharers, interpolative) for site in group}
    return {site.name: forms[site.name] for site in sites}


def in_forms(model: nn.Module, sites: Iterable[Site], forms: Mapping[str, Form]) -> nn.Module:
    """A copy of a model with random factors where a site is factored: for timing, which no value changes."""
    tree = copy.deepcopy(model)
    first_factors: dict[str, nn.Parameter] = {}  # by the site whose it is, or the first of those that share it
    for site in sites:
        form = forms.get(site.name, Dense())
        if isinstance(form, Dense) and site.narrowed_from is None:
            continue
        bias = None if site.bias is None else torch.zeros(site.out_features)
        if isinstance(form, Dense):
            weight = torch.randn(site.out_features, site.in_features) / site.in_features**0.5
            tree.set_submodule(site.name, DenseLinear(weight, bias))
            continue
        if not isinstance(form, Factored) or not site.in_tree:
            raise BadInput(f"{site.name}: {form} cannot be put into a model for timing; only factored modules can")
        owner = form.sharers[0] if form.sharers else site.name
        if owner not in first_factors:
            first_factors[owner] = nn.Parameter(torch.randn(form.rank, site.in_features) / site.in_features**0.5)
        second = form.outputs_of_second(site)
        B = torch.randn(second, form.rank) / form.rank**0.5
        given_from = 0 if second < site.out_features else None
        tree.set_submodule(site.name, FactoredLinear(first_factors[owner], B, bias, given_from))
    return tree


def export_for_timing(
    tree: nn.Module, folder: Path, place: Place, inputs: Mapping[str, Tensor] | tuple[Tensor, ...]
) -> Artifact:
    """A model lowered as any other, its prompts short: what is timed is verified too."""
    artifact = lower(
        tree, folder, inputs=inputs, target=place.provider,  # type: ignore[arg-type]
        dtype=place.dtype, new_tokens=2, prompts=[[1, 2, 3, 4, 5]] if generates(tree) else None,
    )  # fmt: skip
    return Artifact(artifact.folder, artifact.manifest, threads=place.threads or None)
