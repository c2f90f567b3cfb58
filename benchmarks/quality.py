"""Quality at a budget: this compiler beside every baseline, on the same model, text, tokens, rates and seeds.

    python benchmarks/quality.py --prose train.txt.xz --tasks FOLDER --work RUNS --out RESULT.json [--tokens 1000000]

The model is the bundled one. Every trained row sees the same sequences: prose, and runs of the tasks' training pairs;
the validation text and the pairs that its model was not trained on are never among them. Each row is trained with
every rate of the grid at seed 0, and with the rate that is best on a selection text (prose that is neither trained on
nor reported) at the other seeds. Every run goes into the result, not the best one.

Runs are written one by one to --work, those of an earlier --out first. A run that is there is not repeated, and
several processes may share the folder, so the script can be stopped and started again at will.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import baselines
import numpy as np
import torch
from baselines import Start
from torch import Tensor, nn

from blora_compiler import evaluate, stages
from blora_compiler.budget import Budget
from blora_compiler.data import Batches, evaluation_windows, fingerprint_of_tensors, load_texts, tokenize
from blora_compiler.distillation import Autocast, DistillConfig
from blora_compiler.evaluate import perplexity_and_kl
from blora_compiler.layers import BranchedLinear
from blora_compiler.plan import Plan
from blora_compiler.profiling import profile
from blora_compiler.replanning import Start as StartingPoint
from blora_compiler.report import versions
from blora_compiler.rewriting import fold, settle
from blora_compiler.solver import solve
from blora_compiler.source import BUNDLED_MODEL, BUNDLED_VALIDATION_TEXT, load_source
from blora_compiler.tracing import trace
from blora_compiler.values import Dense

BUDGETS = (0.75, 0.5, 0.25)
RATES = (1e-3, 2.5e-3)
SEEDS = (0, 1, 2)
BATCH, LENGTH = 8, 256
WINDOWS, WINDOW, STRIDE = 96, 257, 768
SELECTION_WINDOWS = 32
CALIBRATION = 128  # sequences
TASK_SHARE = 0.25  # of the training sequences, unless another is asked for
# Of the text's own likelihood beside the KL, unless another is asked for: the teacher is undertrained, so the text
# still has something to teach, at the price of some KL.
LABEL_WEIGHT = 0.3
DATA_SEED = 20261123


# ── Data ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Text:
    """Everything the runs read, as token ids.

    Attributes:
        train: (sequences, LENGTH) in the order in which training sees them first.
        calibration: (CALIBRATION, LENGTH) prose of the training part, and runs of the tasks where asked for.
        selection: (SELECTION_WINDOWS, WINDOW) prose of the training part that no run trains on.
        validation: (WINDOWS, WINDOW) of the bundled validation text.
    """

    train: Tensor
    calibration: Tensor
    selection: Tensor
    validation: Tensor


def read_text(
    prose: Path, tasks: Path, tokens: int, work: Path, tokenizer: Any, task_share: float = TASK_SHARE,
    calibration_tasks: float = 0.0,
) -> Text:  # fmt: skip
    """The data of a benchmark of so many training tokens; tokenised once and kept in the work folder.

    Args:
        task_share: of runs of the tasks' training pairs among the training sequences; the rest is prose.
        calibration_tasks: the same of the calibration sequences.
    """
    generator = torch.Generator().manual_seed(DATA_SEED)
    stream = _prose(prose, work, tokenizer)
    held_out, stream = stream[: SELECTION_WINDOWS * WINDOW], stream[SELECTION_WINDOWS * WINDOW :]
    sequences = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    sequences = sequences[torch.randperm(len(sequences), generator=generator)]
    wanted = -(-tokens // LENGTH)
    of_tasks, calibrating = round(task_share * wanted), round(calibration_tasks * CALIBRATION)
    runs = task_runs(tasks, of_tasks, tokenizer)
    calibration = sequences[: CALIBRATION - calibrating]
    if calibrating:  # batches are taken in order, and damage is measured on the first ones: they have to be mixed
        calibration = torch.cat([calibration, task_runs(tasks, calibrating, tokenizer)])
        calibration = calibration[torch.randperm(CALIBRATION, generator=torch.Generator().manual_seed(DATA_SEED))]
    train = torch.cat([sequences[CALIBRATION : CALIBRATION + wanted - of_tasks], runs])
    validation = tokenize(load_texts(BUNDLED_VALIDATION_TEXT), tokenizer)
    return Text(
        train=train[torch.randperm(len(train), generator=generator)],
        calibration=calibration,
        selection=held_out.view(SELECTION_WINDOWS, WINDOW),
        validation=evaluation_windows(validation, WINDOW, STRIDE, WINDOWS),
    )


def _prose(path: Path, work: Path, tokenizer: Any) -> Tensor:
    """The prose as one stream of tokens."""
    kept = work / "prose.npy"
    if not kept.exists():
        text = lzma.decompress(path.read_bytes()).decode() if path.suffix == ".xz" else path.read_text()
        work.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, tokenize([text], tokenizer).numpy().astype(np.int32))
        partial.replace(kept)
    return torch.from_numpy(np.load(kept).astype(np.int64))


def task_runs(folder: Path, count: int, tokenizer: Any) -> Tensor:
    """(count, LENGTH): in each sequence `Q: x, A: y` pairs of one task, of those that its model was trained on."""
    generator = np.random.default_rng(DATA_SEED)
    tasks = [_training_pairs(path) for path in sorted(folder.rglob("*.json"))]
    rows = []
    for index in range(count):
        pairs = tasks[index % len(tasks)]
        row: list[int] = []
        while len(row) < LENGTH:
            pair = pairs[generator.integers(len(pairs))]
            row += tokenizer(f"Q: {pair['input']}\nA: {pair['output']}\n\n", add_special_tokens=False)["input_ids"]
        rows.append(row[:LENGTH])
    return torch.tensor(rows)


def _training_pairs(path: Path) -> list[dict[str, Any]]:
    """The first four fifths after the shuffle that the model's training used."""
    import random

    pairs = json.loads(path.read_text(encoding="utf-8"))
    random.Random(0).shuffle(pairs)
    return pairs[: int(0.8 * len(pairs))]


class Probes:
    """The function tasks: frozen by the teacher's answers, then asked of students."""

    def __init__(self, folder: Path, work: Path, tokenizer: Any) -> None:
        self.tokenizer, tasks = tokenizer, evaluate.read_tasks(folder)
        kept = work / "teacher-probe.json"
        if not kept.exists():
            kept.write_text(evaluate.icl_probe(load_source(BUNDLED_MODEL).model, tokenizer, tasks).to_json())
        self.teacher = evaluate.ProbeResult.from_json(kept.read_text(), str(kept))
        self.frozen = evaluate.freeze_tasks(self.teacher)
        self.tasks = self.frozen.select(tasks)

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        found = evaluate.icl_probe(
            model, self.tokenizer, self.tasks, k=self.frozen.k, queries=self.frozen.queries, seed=self.frozen.seed
        )
        kept = evaluate.retention(found, self.teacher, self.frozen)
        accuracies = {score.name: score.accuracy for score in found.tasks}
        return {"retention": asdict(kept), "accuracy": accuracies}


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Student:
    """What a row ends with.

    Attributes:
        model: in its final form.
        fraction: share of the projections' cost that it keeps.
        note: what was decided, in one line.
        seconds: of what comes before training, and of training.
        facts: more about the run, as JSON values.
    """

    model: nn.Module
    fraction: float
    note: str
    seconds: Mapping[str, float]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Bench:
    """The teacher, its data, and a start for every row; what several rows need is made once."""

    def __init__(
        self, text: Text, work: Path, probe: Callable[[nn.Module], dict[str, Any]], probed: Collection[str],
        compile: bool, autocast: Autocast,
    ) -> None:  # fmt: skip
        self.text, self.work, self.probe, self.probed = text, work, probe, probed
        self.compile, self.autocast = compile, autocast
        self.forms: dict[int, Mapping[str, Any]] = {}  # of this compiler's trees, by identity
        self.source = load_source(BUNDLED_MODEL)
        self.teacher: Any = self.source.model

    @cached_property
    def program(self) -> Any:
        return trace(self.teacher)

    @cached_property
    def calibration(self) -> list[dict[str, Tensor]]:
        return [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in self.text.calibration.split(BATCH)
        ]

    @cache  # noqa: B019 - one bench a process
    def profile_of(self, kind: Any) -> Any:
        return profile(self.program, self.calibration, kind=kind, cache=self.work / "profiles")

    def build(self, budget: float, program: Any, profiled: Any, interpolative: bool = False) -> Any:
        """The knapsack of a budget, as `compile` poses it."""
        request = stages.Request(Budget.parse(budget), interpolative=interpolative)
        return request.of_program("prose-llama-8m", program, profiled)

    @cache  # noqa: B019 - one bench a process
    def planned(
        self, budget: float, rounds: int = 1, refits: bool = True, interpolative: bool = False, narrow: bool = False
    ) -> tuple[Any, Any]:
        """The program that this compiler plans at a budget, and the plan with its starting factors."""
        build_on = partial(self.build, budget, interpolative=interpolative)
        data = fingerprint_of_tensors([("calibration", self.text.calibration)])[:12]
        kind = ("-interpolative" if interpolative else "") + ("-narrow" if narrow else "")
        kept = self.work / "plans" / f"{budget}-{rounds}-{refits}{kind}-{data}.pt"
        text, factors = torch.load(kept) if kept.exists() else (None, None)
        known = None if text is None else Plan.from_json(text)
        program, measured = stages.narrow_mlps(
            self.program, self.profile_of("two-sided"), self.calibration, build_on, narrow, known,
            refits, self.work / "profiles",
        ).value  # fmt: skip
        build = partial(build_on, program)
        if known is not None:
            return program, StartingPoint(measured, build(measured)[0], None, known, factors)
        plan = solve(build(measured)[0])
        found = stages.measure_plan(
            program, self.calibration, measured, build, plan, rounds, refits, None, self.program
        ).value
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save((found.plan.to_json(), found.factors), kept)
        return program, found

    def ours(self, budget: float, trains: bool = True, **planning: Any) -> Start:
        """The compiler's own student at the start of its training; `finish` settles and folds it."""
        return self.start_of(*self.planned(budget, **planning), trains)

    def start_of(self, program: Any, found: Any, trains: bool) -> Start:
        """The student of a plan of a program, with its starting factors."""
        branched = stages.insert_branches(program, found, trains).value
        forms = self.forms[id(branched.tree)] = found.plan.forms

        def finish(tree: nn.Module) -> nn.Module:
            settled = settle(replace(branched, tree=tree), forms)
            return fold(settled, forms)[0].tree

        return Start(branched.tree, finish, found.plan.fraction, found.plan.summary())

    def start(self, row: str, budget: float) -> Start:
        whitened = (self.teacher, self.program)
        match row:
            case "plain SVD":
                return baselines.plain_svd_uniform(*whitened, self.profile_of("plain"), budget)
            case "whitened SVD":
                return baselines.whitened_svd_uniform(*whitened, self.profile_of("whitened"), budget)
            case "whitened SVD + LoRA recovery":
                return baselines.whitened_lora_recovery(*whitened, self.profile_of("whitened"), budget)
            case "uniform ranks distilled":
                return baselines.uniform_rank_distillation(*whitened, self.profile_of("whitened"), budget)
            case "depth pruning":
                return baselines.depth_pruning(self.teacher, self.text.calibration, budget)
            case "depth pruning, rounded up":
                return baselines.depth_pruning(self.teacher, self.text.calibration, budget, rounded="up")
            case "width pruning":
                return baselines.width_pruning(self.teacher, self.text.calibration, budget)
            case "LoRA distillation":
                return baselines.lora_distillation(self.teacher)
            case "dense control":
                return baselines.dense_control(self.teacher)
            case "ours, first plan, not refitted":
                return self.ours(budget, trains=False, rounds=0, refits=False)
            case "ours, first plan":
                return self.ours(budget, trains=False, rounds=0)
            case "ours, untrained":
                return self.ours(budget, trains=False)
            case "ours":
                return self.ours(budget)
            case "ours, not refitted":
                return self.ours(budget, rounds=0, refits=False)
            case "ours, interpolative":
                return self.ours(budget, interpolative=True)
            case "ours, interpolative, untrained":
                return self.ours(budget, trains=False, interpolative=True)
            case "ours, narrow":
                return self.ours(budget, narrow=True)
            case "ours, narrow, untrained":
                return self.ours(budget, trains=False, narrow=True)
            case "ours, narrow, interpolative":
                return self.ours(budget, narrow=True, interpolative=True)
            case "ours, narrow, interpolative, untrained":
                return self.ours(budget, trains=False, narrow=True, interpolative=True)
        raise ValueError(row)

    def run(self, job: Job) -> dict[str, Any]:
        """One row of the table."""
        student = self.student(job)
        quality = perplexity_and_kl(student.model, self.teacher, self.text.validation, stride=STRIDE)
        selection = perplexity_and_kl(student.model, self.teacher, self.text.selection)
        return {
            **asdict(job), "fraction": student.fraction, "note": student.note, "validation": quality.to_json(),
            "selection": selection.to_json(), "autocast": self.autocast,
            "probes": self.probe(student.model) if job.row in self.probed else {}, "seconds": student.seconds,
            **({"facts": student.facts} if student.facts else {}),
        }  # fmt: skip

    def student(self, job: Job) -> Student:
        """The row's student in its final form, trained where the job has a rate."""
        began = time.perf_counter()
        start = self.start(job.row, job.budget)
        prepared = time.perf_counter()
        model = start.finish(start.tree) if job.rate is None else self.train(start, job)
        seconds = {"start": prepared - began, "training": time.perf_counter() - prepared}
        return Student(model, start.fraction, start.note, seconds)

    def train(self, start: Start, job: Job) -> nn.Module:
        """The row's student, trained and in its final form."""
        dense = dense_branches(start.tree, self.forms.get(id(start.tree), {}))
        batches = Batches(self.text.train, job.batch, job.seed)
        return baselines.train(start, self.teacher, batches, self.config(job), retained=dense, progress=False)

    def config(self, job: Job) -> DistillConfig:
        """The settings of a job's training."""
        return DistillConfig(
            steps=job.tokens // (job.batch * LENGTH), batch=job.batch, length=LENGTH, learning_rate=job.rate,
            seed=job.seed,
            label_weight=job.label_weight, hidden_weight=job.hidden_weight, retention_fraction=job.retention,
            autocast=self.autocast, compile=self.compile,
        )  # fmt: skip


def dense_branches(tree: nn.Module, forms: Mapping[str, Any]) -> frozenset[str]:
    """Names of the sites that train through a branch and end dense."""
    branched = [name for name, module in tree.named_modules() if isinstance(module, BranchedLinear)]
    return frozenset(name for name in branched if forms[name] == Dense())


# ── The queue ────────────────────────────────────────────────────────────────────────────────────────────────────

UNTRAINED = (
    "plain SVD", "whitened SVD", "ours, first plan, not refitted", "ours, first plan", "ours, untrained",
    "ours, interpolative, untrained", "ours, narrow, untrained", "ours, narrow, interpolative, untrained",
)  # fmt: skip
TRAINED = (
    "ours", "whitened SVD + LoRA recovery", "uniform ranks distilled", "depth pruning", "width pruning",
    "depth pruning, rounded up", "ours, interpolative", "ours, narrow", "ours, narrow, interpolative",
)  # fmt: skip
# These save nothing, so they are the same at every budget, and are run once.
DENSE = ("dense control", "LoRA distillation")


@dataclass(frozen=True)
class Job:
    """One run: a row of the table at a budget, with a rate and a seed; no rate is no training."""

    row: str
    budget: float
    rate: float | None = None
    seed: int = 0
    tokens: int = 0
    label_weight: float = LABEL_WEIGHT
    hidden_weight: float = 0.0
    retention: float = 0.0
    task_share: float = TASK_SHARE
    batch: int = BATCH
    calibration_tasks: float = 0.0

    @property
    def key(self) -> str:
        """Its file's name."""
        words = [self.row.replace(" ", "-").replace(",", ""), str(self.budget)]
        words += [f"calibration{self.calibration_tasks:g}"] if self.calibration_tasks else []
        if self.rate is not None:
            words += [f"rate{self.rate:g}", f"seed{self.seed}", f"tokens{self.tokens}"]
            words += [f"label{self.label_weight:g}"] if self.label_weight != LABEL_WEIGHT else []
            words += [f"hidden{self.hidden_weight:g}"] if self.hidden_weight else []
            words += [f"fade{self.retention:g}"] if self.retention else []
            words += [f"tasks{self.task_share:g}"] if self.task_share != TASK_SHARE else []
            words += [f"batch{self.batch}"] if self.batch != BATCH else []
        return "_".join(words)


def ablations(tokens: int) -> list[Job]:
    """One change at a time to the compiler's own row, at 0.25."""
    usual = Job("ours", 0.25, RATES[-1], 0, tokens)
    return [
        usual, replace(usual, row="ours, not refitted"), replace(usual, label_weight=0.0),
        replace(usual, label_weight=1.0), replace(usual, hidden_weight=0.1), replace(usual, retention=0.3),
    ]  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What of the table is asked for, each in the order in which it is worth having."""

    tokens: int
    rows: Sequence[str]
    budgets: Sequence[float]
    rates: Sequence[float]
    seeds: Sequence[int]
    label_weight: float = LABEL_WEIGHT
    task_share: float = TASK_SHARE
    batch: int = BATCH
    calibration_tasks: float = 0.0

    def job(self, row: str, budget: float, rate: float, seed: int) -> Job:
        """A trained run of the table."""
        return Job(
            row, budget, rate, seed, self.tokens, label_weight=self.label_weight, task_share=self.task_share,
            batch=self.batch, calibration_tasks=self.calibration_tasks,
        )  # fmt: skip


def jobs_of(wanted: Wanted, done: Mapping[str, Mapping[str, Any]]) -> Iterator[Job]:
    """What is left to run, in the order in which it is worth having; without tokens only what needs no training."""
    budgets, rates = wanted.budgets, wanted.rates
    untrained = [
        Job(row, budget, calibration_tasks=wanted.calibration_tasks)
        for budget in budgets for row in UNTRAINED if row in wanted.rows
    ]  # fmt: skip
    yield from (job for job in untrained if job.key not in done)
    if not wanted.tokens:
        return
    cells = [(row, budget) for row in wanted.rows if row in TRAINED for budget in budgets]
    cells += [(row, 1.0) for row in wanted.rows if row in DENSE]
    grid_jobs = [wanted.job(row, budget, rate, 0) for rate in rates for row, budget in cells]
    yield from (job for job in grid_jobs if job.key not in done)
    for row, budget in cells:
        grid = [done[job.key] for rate in rates if (job := wanted.job(row, budget, rate, 0)).key in done]
        if len(grid) == len(rates):
            best = min(grid, key=lambda run: run["selection"]["kl"])["rate"]
            more = [wanted.job(row, budget, best, seed) for seed in wanted.seeds if seed]
            yield from (job for job in more if job.key not in done)


def take_over(result: Path, work: Path) -> None:
    """Put the runs of an earlier result into the work folder, so that they are not repeated and stay in the next."""
    known = json.loads(result.read_text())["runs"] if result.exists() else []
    (work / "runs").mkdir(parents=True, exist_ok=True)
    for run in known:
        job = Job(**{name: run[name] for name in Job.__dataclass_fields__ if name in run})
        path = work / "runs" / f"{job.key}.json"
        if not path.exists():
            path.write_text(json.dumps(run, indent=1) + "\n")


def read_runs(work: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((work / "runs").glob("*.json"))}


@contextmanager
def claimed(work: Path, key: str) -> Iterator[bool]:
    """Whether this process may run a job; no other one does meanwhile. A claim of a process that died is void."""
    path = work / "claims" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not Path(f"/proc/{path.read_text() or 0}").exists():
        path.unlink(missing_ok=True)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        yield False
        return
    try:
        os.write(handle, str(os.getpid()).encode())
        yield True
    finally:
        os.close(handle)
        path.unlink(missing_ok=True)


def work_through(bench: Bench, work: Path, jobs: Callable[[dict[str, Any]], Iterator[Job]]) -> None:
    """Run what no one else runs until nothing is left."""
    (work / "runs").mkdir(parents=True, exist_ok=True)
    while True:
        for job in jobs(read_runs(work)):
            path = work / "runs" / f"{job.key}.json"
            with claimed(work, job.key) as mine:
                if not mine or path.exists():
                    continue
                record = bench.run(job)
                path.with_suffix(".partial").write_text(json.dumps(record, indent=1) + "\n")
                path.with_suffix(".partial").replace(path)
                print(describe(record), flush=True)
                break
        else:
            return


def describe(run: Mapping[str, Any]) -> str:
    quality, seconds = run["validation"], run["seconds"]
    return (
        f"{run['row']:<32} {run['budget']:<5} rate {run['rate'] or 0:<8g} seed {run['seed']}  "
        f"kept {run['fraction']:.4f}  perplexity {quality['perplexity']:7.2f}  KL {quality['kl']:.4f}  "
        f"{seconds['training']:5.0f} s"
    )


# ── Results ──────────────────────────────────────────────────────────────────────────────────────────────────────


def summarise(
    runs: Mapping[str, Mapping[str, Any]],
    tokens: int,
    teacher: float,
    label_weight: float = LABEL_WEIGHT,
    task_share: float = TASK_SHARE,
    batch: int = BATCH,
    calibration_tasks: float = 0.0,
) -> list[dict[str, Any]]:
    """A line a row and budget: the seeds at the rate that is best on the selection text, as mean and range."""
    lines = []
    cells = dict.fromkeys((run["row"], run["budget"]) for run in runs.values())
    for row, budget in cells:
        of_cell = [
            run for run in runs.values()
            if (run["row"], run["budget"], run.get("calibration_tasks", 0.0)) == (row, budget, calibration_tasks)
            and (run["rate"] is None or _is_of_table(run, (tokens, label_weight, task_share, batch)))
        ]  # fmt: skip
        if not of_cell:
            continue
        first = [run for run in of_cell if run["seed"] == 0]
        rate = min(first, key=lambda run: run["selection"]["kl"])["rate"]
        seeds = [run for run in of_cell if run["rate"] == rate]
        kls, perplexities = ([run["validation"][name] for run in seeds] for name in ("kl", "perplexity"))
        lines.append(
            {
                "row": row, "budget": budget, "fraction": seeds[0]["fraction"], "rate": rate, "seeds": len(seeds),
                "rates": len({run["rate"] for run in first}),
                "kl": statistics.mean(kls), "kl_range": [min(kls), max(kls)],
                "perplexity": statistics.mean(perplexities),
                "perplexity_range": [min(perplexities), max(perplexities)],
                "perplexity_ratio": statistics.mean(perplexities) / teacher,
            }
        )  # fmt: skip
    return sorted(lines, key=lambda line: (-line["budget"], line["kl"]))


def _is_of_table(run: Mapping[str, Any], settings: tuple[int, float, float, int]) -> bool:
    """Whether a trained run has the table's tokens, likelihood, tasks and batch, and is not of an ablation."""
    has = (run["tokens"], run["label_weight"], run.get("task_share", TASK_SHARE), run.get("batch", BATCH))
    return has == settings and not run["hidden_weight"] and not run["retention"]


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    from blora_compiler.report import table as markdown

    rows = [
        (
            f"{line['budget']:g}", line["row"], f"{line['fraction']:.3f}", f"{line['perplexity']:.2f}",
            f"{line['perplexity_ratio']:.3f}", f"{line['kl']:.4f}",
            "" if line["rate"] is None else f"{line['rate']:g}", str(line["seeds"]),
        )
        for line in lines
    ]  # fmt: skip
    return markdown(("budget", "row", "kept", "perplexity", "of the teacher's", "KL", "rate", "seeds"), rows)


def parser_of(description: str | None, tokens: int) -> argparse.ArgumentParser:
    """What every benchmark of this kind asks for: data, folders, and how to train."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path, required=True, help="training prose, .txt or .txt.xz")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of function tasks, as JSON lists of pairs")
    parser.add_argument("--work", type=Path, required=True, help="keeps the runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--report-only", action="store_true", help="write the result from the runs that are there")
    parser.add_argument("--autocast", choices=("off", "bfloat16"), default="off", help="of training, in every row")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--threads", type=int, default=1)
    return parser


# Settings of a run that have a column where the runs of a table differ in them: default, heading.
SETTINGS: dict[str, tuple[float, str]] = {
    "batch": (BATCH, "batch"), "task_share": (TASK_SHARE, "tasks in training"),
    "calibration_tasks": (0.0, "tasks in calibration"), "seed": (0, "seed"),
}  # fmt: skip


def table_of_runs(result: Mapping[str, Any]) -> str:
    """Every trained run by itself, with its share of the teacher's accuracy on the tasks where it was asked."""
    from blora_compiler.report import table as markdown

    rows = []
    trained = [run for run in result["runs"] if run["rate"] is not None]
    differing = [name for name, (usual, _) in SETTINGS.items() if len({run.get(name, usual) for run in trained}) > 1]
    for run in sorted(trained, key=lambda run: (-run["budget"], run["label_weight"], run["validation"]["kl"])):
        perplexity, kept = run["validation"]["perplexity"], run["probes"].get("retention")
        rows.append(
            (
                f"{run['budget']:g}", run["row"],
                *(f"{run.get(name, SETTINGS[name][0]):g}" for name in differing),
                f"{run['label_weight']:g}", f"{run['rate']:g}", f"{perplexity:.2f}",
                f"{perplexity / result['teacher']['perplexity']:.3f}", f"{run['validation']['kl']:.4f}",
                "" if kept is None else f"{kept['value']:.3f} ({kept['low']:.3f} to {kept['high']:.3f})",
            )
        )  # fmt: skip
    headings = ("likelihood", "rate", "perplexity", "of the teacher's", "KL", "retention")
    return markdown(("budget", "row", *(SETTINGS[name][1] for name in differing), *headings), rows)


def at_a_glance(result: Mapping[str, Any]) -> str:
    """What our best trained row keeps at each budget, against the teacher, the dense control and the other rows.

    Means over the seeds there are; ours and others alike are taken at the rate, and by the KL, of `summarise`.
    """
    from blora_compiler.report import table as markdown

    def best(budget: float, *, ours: bool, trained: bool) -> Mapping[str, Any]:
        return min(
            (
                line for line in result["table"]
                if line["budget"] == budget and line["row"] not in DENSE
                and line["row"].startswith("ours") is ours and (line["rate"] is not None) is trained
            ),
            key=lambda line: line["kl"],
        )  # fmt: skip

    (control,) = (line for line in result["table"] if line["row"] == "dense control")
    columns = []
    for budget in BUDGETS:
        ours, other = (best(budget, ours=whose, trained=True) for whose in (True, False))
        untrained, svd = (best(budget, ours=whose, trained=False) for whose in (True, False))
        kept = [
            run["probes"]["retention"]["value"] for run in result["runs"]
            if (run["row"], run["budget"], run["rate"]) == (ours["row"], budget, ours["rate"])
        ]  # fmt: skip
        columns.append(
            (
                ours["row"], str(ours["seeds"]), f"{ours['perplexity_ratio']:.3f}",
                f"{ours['perplexity'] / control['perplexity']:.3f}",
                f"{ours['kl'] / other['kl']:.2f} ({other['row']})",
                f"{untrained['kl'] / svd['kl']:.2f} ({svd['row']})", f"{statistics.mean(kept):.2f}",
            )
        )  # fmt: skip
    names = (
        "row", "seeds", "perplexity, of the teacher's", "perplexity, of the dense control's",
        "KL, of the best other trained row's", "KL before training, of the best other row's",
        "in-context learning kept",
    )  # fmt: skip
    return markdown(("budget", *(f"{budget:g}" for budget in BUDGETS)), list(zip(names, *columns, strict=True)))


def main() -> None:
    parser = parser_of(__doc__, 3_000_000)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--ablations", action="store_true", help="the ablations instead of the table")
    parser.add_argument("--untrained", action="store_true", help="the rows that need no training, and no others")
    parser.add_argument(
        "--rows", nargs="+", default=[*UNTRAINED, *TRAINED, *DENSE], help="by their names in the table"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="the grid, in the order of its runs")
    parser.add_argument("--label-weight", type=float, default=LABEL_WEIGHT, help="of the text's likelihood, all rows")
    parser.add_argument("--task-share", type=float, default=TASK_SHARE, help="of the training sequences, all rows")
    parser.add_argument(
        "--calibration-tasks", type=float, default=0.0, help="share of task runs in the calibration text, all rows"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences a step, all rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the final rate; the grid runs at 0")
    parser.add_argument(
        "--probe", nargs="+", default=[], metavar="ROW", help="ask these rows the function tasks, too"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_source(BUNDLED_MODEL).tokenizer
    text = read_text(
        options.prose, options.tasks, options.tokens, options.work, tokenizer, options.task_share,
        options.calibration_tasks,
    )  # fmt: skip
    unknown = sorted({*options.rows, *options.probe} - {*UNTRAINED, *TRAINED, *DENSE})
    if unknown:
        parser.error(f"no row is called {', '.join(unknown)}; there are {', '.join([*UNTRAINED, *TRAINED, *DENSE])}")
    take_over(options.out, options.work)
    asked = Probes(options.tasks, options.work, tokenizer) if options.probe else None
    bench = Bench(text, options.work, asked or (lambda model: {}), options.probe, options.compile, options.autocast)
    if not options.report_only:
        if options.ablations:
            wanted = ablations(options.tokens)
            work_through(bench, options.work, lambda done: (job for job in wanted if job.key not in done))
        else:
            tokens = 0 if options.untrained else options.tokens
            asked_for = Wanted(
                tokens, options.rows, options.budgets, options.rates, options.seeds, options.label_weight,
                options.task_share, options.batch, options.calibration_tasks,
            )  # fmt: skip
            work_through(bench, options.work, lambda done: jobs_of(asked_for, done))
    runs = read_runs(options.work)
    teacher = perplexity_and_kl(bench.teacher, None, text.validation, stride=STRIDE)
    lines = summarise(
        runs, options.tokens, teacher.perplexity, options.label_weight, options.task_share, options.batch,
        options.calibration_tasks,
    )  # fmt: skip
    result = {
        "versions": versions(), "tokens": options.tokens, "label_weight": options.label_weight,
        "rates": sorted({run["rate"] for run in runs.values() if run["rate"]}),
        "task_share": options.task_share, "calibration_tasks": options.calibration_tasks, "batch": options.batch,
        "teacher": teacher.to_json(), "table": lines, "runs": list(runs.values()),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"teacher {teacher}\n{table(lines)}")


if __name__ == "__main__":
    main()
