"""The command line: `blora compile | at | demo | plan | whatif | calibrate | bench | export | verify | generate |
report`.

Every command is a few lines over the library. A run folder holds each step's output, so that the later commands
start from an earlier one's:

    run/run.json  plan.json  distill/  model/  onnx/  onnx-dense/  report.md  report.json
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import BadInput, BloraError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A compiler for transformer compression: one number in, a smaller verified model out.",
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="a Hugging Face folder or hub id")]
BudgetOption = Annotated[str, typer.Option("--budget", help='share to keep: 0.25, "25%", or an amount: "400MB"')]
RangeOption = Annotated[
    str, typer.Option("--budget", help='share to keep: 0.25, "25%", or an amount: "400MB"; 0.2..0.75: a family')
]
MetricOption = Annotated[str | None, typer.Option("--metric", help="flops (default), latency, bytes or params")]
ScopeOption = Annotated[str, typer.Option("--scope", help="sites: the projections; model: everything in the graph")]
RuleOption = Annotated[
    list[str] | None, typer.Option("--rule", help="GLOB=dense|exclude|compress|MIN:MAX, repeatable")
]
SeedOption = Annotated[int, typer.Option("--seed", help="of sampling and of the order of training data")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON to stdout and nothing else")]
CalibrationOption = Annotated[Path | None, typer.Option("--calibration", help="text (.txt, .txt.xz, .jsonl)")]
DamageOption = Annotated[str, typer.Option("--damage", help="two-sided, whitened, plain or prior")]
MultipleOption = Annotated[int, typer.Option("--rank-multiple", help="ranks are multiples of this")]
InterpolativeOption = Annotated[
    bool, typer.Option("--interpolative", help="let first factors compute outputs: higher ranks, a copy more a run")
]
NarrowOption = Annotated[
    str | None, typer.Option("--narrow", help="let MLPs lose inner channels: auto, or the share of them to keep")
]
TargetOption = Annotated[str, typer.Option("--target", help="execution provider to lower for: cpu or cuda")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="whose time a latency budget is about: a name, a profile, `this`")
]
WorkloadOption = Annotated[
    str | None, typer.Option("--workload", help='as "prefill 1x2048", "decode 1@256", or parts joined by +')
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, float16 or (cuda) bfloat16")]
QuantizeOption = Annotated[
    str | None, typer.Option("--quantize", help="int8 or int4: store the weights of projections so (cpu)")
]

# The demo's settings: what a visitor can wait for on two cores, and large enough to show the method at work.
DEMO_BUDGET = "0.25"
DEMO_STEPS, DEMO_BATCH = 600, 4


TIMED_TOKENS = 256  # prompt length of the timings


def main() -> None:
    """Run the command line; errors of this package end it with a message and their exit code."""
    try:
        app(standalone_mode=False)
    except BloraError as error:
        print(f"blora: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except typer.Exit as ended:
        raise SystemExit(ended.exit_code) from ended
    except typer.Abort as aborted:
        raise SystemExit(130) from aborted
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error; which class that is depends on typer's version
            print(f"blora: {error.format_message()}", file=sys.stderr)
            raise SystemExit(BadInput.exit_code) from error
        raise


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


@app.command()
def compile(
    model: ModelArgument,
    budget: RangeOption,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="run folder (of an ONNX file: the file); needed unless --dry-run"),
    ] = None,
    train: Annotated[Path | None, typer.Option("--train", help="text to distill on; none: no training")] = None,
    calibration: CalibrationOption = None,
    evaluation: Annotated[Path | None, typer.Option("--eval", help="text to measure quality on")] = None,
    metric: MetricOption = None,
    scope: ScopeOption = "sites",
    device: DeviceOption = None,
    workload: WorkloadOption = None,
    rule: RuleOption = None,
    steps: Annotated[int | None, typer.Option("--steps", help="training steps (1000)")] = None,
    length: Annotated[int | None, typer.Option("--length", help="tokens per training sequence (256)")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="sequences per training step (8)")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="peak learning rate; goes with the damage")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="of sampling and of the order of training data (0)")
    ] = None,
    damage: DamageOption = "two-sided",
    rank_multiple: MultipleOption = 8,
    interpolative: InterpolativeOption = False,
    narrow: NarrowOption = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="apply this plan.json instead of solving")] = None,
    target: TargetOption = "cpu",
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    export: Annotated[bool, typer.Option("--export/--no-export", help="lower to ONNX and time it")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run in --out")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and its cost, and stop")] = False,
    as_json: JsonOption = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="JSON file of DistillConfig values; options win over it")
    ] = None,
) -> None:
    """Compress MODEL to a budget, distill it, verify it in ONNX Runtime, and report.

    An .onnx file is compressed to an .onnx file, without training; --calibration is then an .npz of its inputs.
    """
    from .distillation import DistillConfig
    from .onnx_files import is_onnx_path

    check_quantize_option(quantize, target, export)
    if quantize is not None and interpolative:
        raise BadInput(f"--quantize {quantize} rounds too coarsely for --interpolative pairs; leave one of them out")
    given = {"steps": steps, "length": length, "batch": batch, "learning_rate": learning_rate, "seed": seed}
    options: dict[str, Any]
    if is_onnx_path(model):
        unused = {**given, "seed": None, "train": train, "eval": evaluation, "device": device, "config": config,
                  "dtype": dtype, "target": target != "cpu", "no_export": not export, "resume": resume,
                  "quantize": quantize, "interpolative": interpolative, "narrow": narrow}  # fmt: skip
        options = {"metric": metric, "workload": workload, "rules": parse_rules(rule or []), "seed": seed or 0,
                   "rank_multiple": rank_multiple, "calibration": calibration,
                   "plan": None if plan is None else _read_plan(plan)}  # fmt: skip
        _run_onnx(model, budget, out, damage, scope, unused, options, overwrite, dry_run, as_json)
        return
    distill = DistillConfig.from_json(_read_config(config) | {k: v for k, v in given.items() if v is not None})
    options = {
        "budget": budget, "metric": metric, "scope": scope, "rules": parse_rules(rule or []), "damage": damage,
        "calibration": calibration, "seed": distill.seed, "rank_multiple": rank_multiple,
        "device": device or device_of_target(target, budget, metric), "dtype": dtype or dtype_of_target(target),
        "workload": workload, "interpolative": interpolative, "narrow": parse_narrow(narrow),
    }  # fmt: skip
    if dry_run:
        if ".." in budget:
            raise BadInput(f"--dry-run prints one plan, and {budget} is a range; name one budget")
        if plan is not None:
            raise BadInput("--dry-run prints the plan that would be solved for, and --plan gives one; leave one out")
        _print_plan(model, options, train, as_json)
        return
    if out is None:
        raise BadInput("--out is missing: name the folder that receives the run, or use --dry-run")
    if export:
        from .lowering import checked_dtype

        checked_dtype(dtype, target)
    if ".." in budget:
        unused = {"--eval": evaluation, "--device": device, "--plan": plan, "--damage": damage != "two-sided",
                  "--quantize": quantize, "--interpolative": interpolative, "--narrow": narrow,
                  "--target": target != "cpu", "--dtype": dtype, "--no-export": not export}  # fmt: skip
        run_family(model, out, options, train, distill, unused, resume, overwrite, as_json)
        return
    options |= {"train": train, "evaluation": evaluation, "distill": distill if train else None,
                "plan": None if plan is None else _read_plan(plan)}  # fmt: skip
    _run(model, out, options, target, dtype, quantize, export, resume, overwrite, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="run folder")] = Path("demo-run"),
    budget: BudgetOption = DEMO_BUDGET,
    steps: Annotated[int, typer.Option("--steps", help="training steps")] = DEMO_STEPS,
    seed: SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run in --out")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress the bundled language model to a quarter of its projections' compute, in minutes on two cores."""
    from .source import BUNDLED_MODEL, BUNDLED_TRAIN_TEXT, BUNDLED_VALIDATION_TEXT

    options = {
        "budget": budget, "train": BUNDLED_TRAIN_TEXT, "evaluation": BUNDLED_VALIDATION_TEXT, "seed": seed,
        "distill": demo_config(steps, seed), "narrow": True,
    }  # fmt: skip
    _run(str(BUNDLED_MODEL), out, options, "cpu", None, None, True, resume, overwrite, as_json)


@app.command()
def plan(
    model: ModelArgument,
    budget: BudgetOption,
    out: Annotated[Path | None, typer.Option("--out", help="write the plan here as JSON")] = None,
    calibration: CalibrationOption = None,
    metric: MetricOption = None,
    scope: ScopeOption = "sites",
    device: DeviceOption = None,
    workload: WorkloadOption = None,
    rule: RuleOption = None,
    seed: SeedOption = 0,
    damage: DamageOption = "two-sided",
    rank_multiple: MultipleOption = 8,
    interpolative: InterpolativeOption = False,
    narrow: NarrowOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Solve for a plan and print it. A MODEL folder with a config and no weights is planned with a spectral prior."""
    from .folders import write_text

    options = {
        "budget": budget, "metric": metric, "scope": scope, "rules": parse_rules(rule or []), "damage": damage,
        "calibration": calibration, "seed": seed, "rank_multiple": rank_multiple, "device": device, "dtype": dtype,
        "workload": workload, "interpolative": interpolative, "narrow": parse_narrow(narrow),
    }  # fmt: skip
    solved = _print_plan(model, options, None, as_json)
    if out is not None:
        write_text(out, solved.to_json())


@app.command()
def whatif(
    model: ModelArgument,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="comma-separated: 0.25,0.5 or 8ms,12ms (0.1 to 1 by 0.05)")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", help="a name, a profile (.json), `this`; may be repeated (h200)")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", help='as "prefill 1x2048 + 256 decode steps"; may be repeated'),
    ] = None,
    metric: MetricOption = None,
    scope: ScopeOption = "sites",
    rule: RuleOption = None,
    dtype: DtypeOption = None,
    rank_multiple: MultipleOption = 8,
    calibration: CalibrationOption = None,
    seed: SeedOption = 0,
    html: Annotated[Path | None, typer.Option("--html", help="write one self-contained page here")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="write one line a point here")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="write everything here as JSON")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="BUDGET[;DEVICE[;WORKLOAD]]; give it twice to see two points side by side"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What budgets would do to MODEL on devices and workloads. A config is enough; no weights are read or allocated.

    With --calibration TEXT the model's weights are read and the damage of every plan is predicted too.
    """
    from .analysis import DEFAULT_BUDGETS, DEFAULT_DEVICES
    from .analysis import whatif as analyse

    for path, suffix in ((html, ".html"), (csv, ".csv"), (out, ".json")):
        if path is not None and path.suffix != suffix:
            raise BadInput(f"{path} does not end in {suffix}, and what is there would be replaced by such a file")
    if compare and len(compare) != 2:
        raise BadInput(f"--compare was given {len(compare)} times; give it twice, once for each side")
    options: dict[str, Any] = {
        "budgets": DEFAULT_BUDGETS if budgets is None else [text.strip() for text in budgets.split(",")],
        "device": device or DEFAULT_DEVICES, "workload": workload or None, "metric": metric,
        "scope": scope, "rules": parse_rules(rule or []), "dtype": dtype, "rank_multiple": rank_multiple,
    }  # fmt: skip
    if calibration is not None:
        options["profile"] = _profile_of(model, calibration, seed)
    answers = analyse(model, **options)
    text = answers.compare(*(_point_asked(side) for side in compare)) if compare else answers.table()
    _say(as_json, answers.data, text)
    for path, write in ((html, answers.to_html), (csv, answers.to_csv), (out, answers.to_json)):
        if path is not None:
            write(path)


@app.command()
def calibrate(
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or float16")] = "float32",
    target: TargetOption = "cpu",
    threads: Annotated[int, typer.Option("--threads", help="of a session; 0 leaves it to ONNX Runtime")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="write the table here instead of its usual place")] = None,
    again: Annotated[bool, typer.Option("--again", help="forget what an interrupted sweep has found")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sweep this machine with ONNX Runtime, so that `--device this` predicts times. Resumes where it stopped."""
    from .clocks import this_target
    from .measuring import calibrate as sweep_device
    from .measuring import table_path
    from .sweeping import Place

    place = Place(target, dtype, threads)
    say: Callable[[str], None] = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    table = sweep_device(place, out, again=again, tell=say)
    device = this_target(table).device
    facts = {
        "device": table.device, "runtime": table.runtime, "dtype": table.dtype, "path": str(out or table_path(place)),
        "peak_flops": device.peak_flops[table.dtype], "bandwidth": device.bandwidth,
        "corrections": dict(table.corrections), "whole_model_runs": len(table.runs),
    }  # fmt: skip
    _say(as_json, facts, f"{device.title}: {device.peak_flops[table.dtype] / 1e9:.0f} GFLOP/s in GEMMs, "
                         f"{device.bandwidth / 1e9:.0f} GB/s; written to {facts['path']}")  # fmt: skip


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a run folder, a model folder, or one with a config")],
    budget: Annotated[
        list[str] | None, typer.Option("--budget", help="share to keep; repeatable (0.5, 0.25); not for run folders")
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", help="uniform, shared, interpolative, narrow or (the solver's) prior; repeatable"),
    ] = None,
    target: TargetOption = "cpu",
    dtype: DtypeOption = None,
    threads: Annotated[int, typer.Option("--threads", help="of a session; 0 leaves it to ONNX Runtime")] = 0,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="sequences; repeatable (1)")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="of a prompt")] = TIMED_TOKENS,
    context: Annotated[int | None, typer.Option("--context", help="cached before a decode step (--tokens)")] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="decode steps of the end-to-end run")] = 16,
    rounds: Annotated[int, typer.Option("--rounds", help="timed runs a side and setting")] = 15,
    copies: Annotated[int | None, typer.Option("--copies", help="sessions a side whose weights take turns")] = None,
    profile: Annotated[bool, typer.Option("--profile/--no-profile", help="time the compressed modules too")] = True,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="measure peak memory too")] = True,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", help="write everything here as JSON")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="write the tables here")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="draw the speed-ups here (.svg, .png)")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time dense against compressed: lowered alike, in turns of one run. A config is enough; nothing is trained."""
    from .bench_result import require_matplotlib
    from .benching import bench as measure
    from .folders import write_text

    if plot is not None:
        require_matplotlib(plot)
    result = measure(
        model, budget or ("0.5", "0.25"), plans=plan or None, target=target, dtype=dtype, threads=threads,
        batches=batch or (1,), tokens=tokens, context=context, new_tokens=new_tokens, rounds=rounds, copies=copies,
        profile=profile, memory=memory, seed=seed,
        tell=(lambda line: None) if as_json else (lambda line: print(line, flush=True)),
    )  # fmt: skip
    _say(as_json, result.to_json(), result.terminal())
    # After the times were said: whatever becomes of the files, these are not lost.
    if out is not None:
        result.write(out)
    if markdown is not None:
        write_text(markdown, result.markdown() + "\n")
    if plot is not None:
        result.plot(plot)


def _profile_of(model: str, calibration: Path, seed: int) -> Any:
    """The damage of a model's sites, measured on a text."""
    from .calibration import calibration_batches, example_inputs
    from .profiling import profile
    from .source import is_meta, load_source
    from .tracing import trace

    source = load_source(model)
    if is_meta(source.model):
        raise BadInput(f"--calibration {calibration}: {model} has no weights to measure damage on; leave it out")
    program = trace(source.model, example_inputs(source, calibration))
    batches, _ = calibration_batches(program, source, calibration, seed)
    return profile(program, batches, seed=seed)


def _point_asked(side: str) -> dict[str, Any]:
    """`"0.25;h200;prefill 1x2048"` as the arguments of `WhatIf.point`."""
    names = ("budget", "device", "workload")
    parts = [part.strip() for part in side.split(";")]
    if len(parts) > len(names):
        raise BadInput(f"--compare {side!r} has {len(parts)} parts; write BUDGET[;DEVICE[;WORKLOAD]]")
    return {name: part for name, part in zip(names, parts, strict=False) if part}


@app.command()
def at(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="what `blora compile --budget 0.2..0.75 --out RUN` wrote")
    ],
    budget: Annotated[str, typer.Option("--budget", help="share to keep, within the family's range")],
    out: Annotated[Path, typer.Option("--out", help="receives model/ and onnx/")],
    target: TargetOption = "cpu",
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    export: Annotated[bool, typer.Option("--export/--no-export", help="lower to ONNX")] = True,
    as_json: JsonOption = False,
) -> None:
    """One member of a trained family: saved, exported and verified, without training."""
    from .family import DESCRIPTION, load_family

    folder = next((f for f in (run, run / "family") if (f / DESCRIPTION).exists()), None)
    if folder is None:
        raise BadInput(f"neither {run} nor {run / 'family'} holds a family ({DESCRIPTION})")
    check_quantize_option(quantize, target, export)
    compiled = load_family(folder).at(budget)
    compiled.save(out / "model")
    artifact = compiled.export(out / "onnx", target, dtype, quantize=quantize) if export else None
    facts = {"folder": str(out), "fraction": compiled.plan.fraction, "parity": None}
    if artifact is not None:
        facts |= _export_facts(artifact)
    lines = [] if artifact is None else _export_lines(artifact)
    _say(as_json, facts, "\n".join([compiled.plan.summary(), *lines]))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, or a folder written by Compiled.save")],
    out: Annotated[Path | None, typer.Option("--out", help="export folder; RUN/onnx by default")] = None,
    target: TargetOption = "cpu",
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lower a saved compressed model to ONNX, verified."""
    from .lowering import lower
    from .saving import load

    loaded = load(_saved_folder(run))
    artifact = lower(
        loaded.module, out or run / "onnx", inputs=loaded.inputs, target=target, dtype=dtype,  # type: ignore[arg-type]
        site_names=loaded.sites, tokenizer=loaded.tokenizer, quantize=quantize,  # type: ignore[arg-type]
    )  # fmt: skip
    facts = {"files": [str(path) for path in artifact.files], **_export_facts(artifact)}
    _say(as_json, facts, "\n".join(_export_lines(artifact)))


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, or an export folder")],
    model: Annotated[Path | None, typer.Option("--model", help="the saved model; RUN/model by default")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare an export with the saved model it came from, again."""
    from .artifact import MANIFEST, Artifact
    from .saving import load
    from .verification import verify as compare

    folder = run if (run / MANIFEST).exists() else run / "onnx"
    artifact = Artifact.load(folder)
    parity = compare(artifact, load(_saved_folder(model or folder.parent)).module)
    _say(as_json, {"folder": str(folder), "parity": parity.to_json()}, parity)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a run folder, or an export folder")],
    prompt: Annotated[str, typer.Option("--prompt", help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="tokens to add at most")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="draw tokens instead of taking the likeliest")] = False,
    temperature: Annotated[float | None, typer.Option("--temperature", help="with --sample (1.0)")] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="with --sample: draw among this many; 0: all (50)")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="with --sample (0)")] = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt with an export, printing words as they come."""
    import torch
    from transformers import TextStreamer

    from .artifact import MANIFEST, Artifact

    for name, value in (("temperature", temperature), ("top-k", top_k), ("seed", seed)):
        if value is not None and not sample:
            raise BadInput(f"--{name} is about drawing tokens; add --sample, or leave it out")
    artifact = Artifact.load(folder if (folder / MANIFEST).exists() else folder / "onnx")
    tokenizer = artifact.tokenizer()
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not encoded["input_ids"].numel():
        raise BadInput("--prompt holds no tokens; write at least a word")
    drawn: dict[str, Any] = {}
    if sample:
        drawn = {"temperature": 1.0 if temperature is None else temperature, "top_k": 50 if top_k is None else top_k}
    torch.manual_seed(seed or 0)
    try:
        tokens = artifact.generator().generate(
            **encoded, do_sample=sample, max_new_tokens=max_new_tokens, **drawn,
            streamer=None if as_json else TextStreamer(tokenizer, skip_special_tokens=True),
        )  # fmt: skip
    except ValueError as error:  # transformers' own words about its own options
        raise BadInput(str(error)) from error
    if as_json:
        _say(True, {"text": tokenizer.decode(tokens[0], skip_special_tokens=True), "tokens": tokens[0].tolist()}, "")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    as_json: JsonOption = False,
) -> None:
    """Print the report of an earlier run."""
    from .report import render

    path = run / "report.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        text = render(data)
    except FileNotFoundError as error:
        raise BadInput(f"{run} holds no report.json; run `blora compile ... --out {run}` to its end first") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror or error}); give a run folder") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is damaged ({error!r}); run the compilation again") from error
    _say(as_json, data, text)


def demo_config(steps: int | None = None, seed: int = 0) -> Any:
    """How the demo and its benchmark train."""
    from .distillation import DistillConfig

    return DistillConfig(
        steps=DEMO_STEPS if steps is None else steps,
        batch=DEMO_BATCH,
        hidden_weight=0.0,
        retention_fraction=0.0,
        seed=seed,
    )


# ── What the commands share ──────────────────────────────────────────────────────────────────────────────────────


def _run(
    model: str,
    out: Path,
    options: dict[str, Any],
    target: str,
    dtype: str | None,
    quantize: str | None,
    wants_export: bool,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compile into a run folder; save, export, time and report."""
    from . import compile as compile_model
    from .folders import write_text
    from .lowering import lower
    from .source import position_limit
    from .timing import time_exports

    say: Callable[[Any], None] = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    tell = _claim_run_folder(out, run_settings(model, options), resume, overwrite, say)
    compiled = compile_model(
        model, folder=out, resume=resume, overwrite=overwrite, progress=not as_json, on_record=tell, **options
    )
    compiled.save(out / "model")
    artifact, timings, spent = None, [], []
    if wants_export:
        prompts = validation_prompts(compiled, options.get("evaluation"))
        alike: dict[str, Any] = {"target": target, "dtype": dtype, "prompts": prompts}
        artifact = compiled.export(out / "onnx", quantize=quantize, **alike)
        for line in _export_lines(artifact):
            say(f"export     {line}")
        if quantize is not None:
            compiled = with_export_quality(compiled, artifact, options.get("evaluation"))
        dense = lower(compiled.source.model, out / "onnx-dense", inputs=dict(compiled.program.inputs), **alike)
        tokens = min(TIMED_TOKENS, position_limit(compiled.module) - 1)  # decode takes one position more
        timings = time_exports({"dense": dense, "compressed": artifact}, tokens=tokens)
        spent = compiled.time_spent(artifact, tokens=tokens)
    result = compiled.report(artifact, timings, spent)
    write_text(out / "report.json", result.to_json())
    write_text(out / "report.md", str(result))
    _say(as_json, dict(result.data), f"\n{summary_table(result.data)}\n")
    say(f"Written to {out}: " + ", ".join(sorted(p.name + ("/" if p.is_dir() else "") for p in out.iterdir())))


def _run_onnx(
    model: str,
    budget: str,
    out: Path | None,
    damage: str,
    scope: str,
    unused: Mapping[str, Any],
    options: dict[str, Any],
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compile an ONNX file into an ONNX file, or print its plan."""
    from .onnx_compiling import compile_onnx, refuse_damage_and_scope, refuse_options

    refuse_damage_and_scope(damage, scope)
    refuse_options(unused)
    if out is None and not dry_run:
        raise BadInput("--out is missing: name the .onnx file to write, or use --dry-run")
    say: Callable[[Any], None] = (lambda line: None) if as_json or dry_run else (lambda line: print(line, flush=True))
    compiled = compile_onnx(model, budget, None if dry_run else out, overwrite=overwrite, on_record=say, **options)
    if dry_run:
        _say(as_json, json.loads(compiled.plan.to_json()), compiled.plan.table())
        return
    _say(as_json, dict(compiled.report().data), f"\n{compiled.plan.table()}")
    assert compiled.artifact is not None
    say(f"Written to {out}: " + ", ".join(f"{name} ({size:,} B)" for name, size in compiled.artifact.files.items()))


def run_family(
    model: str,
    out: Path,
    options: dict[str, Any],
    train: Path | None,
    distill: Any,
    unused: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compile a family into a run folder; `blora at` takes members out of it."""
    from .family import compile_family

    budget = options["budget"]
    if given := [name for name, value in unused.items() if value]:
        raise BadInput(f"--budget {budget} is a range, and {', '.join(given)} is for one budget; leave it out")
    of_one_budget = ("budget", "device", "dtype", "damage", "interpolative", "narrow")
    options = {name: value for name, value in options.items() if name not in of_one_budget}
    try:
        smallest, largest = (float(end) for end in budget.split(".."))
    except ValueError as error:
        raise BadInput(f"--budget {budget!r} is no range; write two fractions, as in 0.2..0.75") from error
    options |= {"train": train, "distill": distill if train else None}
    say: Callable[[Any], None] = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    tell = _claim_run_folder(out, run_settings(model, {"budget": budget, **options}), resume, overwrite, say)
    family = compile_family(
        model, smallest, largest, folder=out, resume=resume, overwrite=overwrite, progress=not as_json,
        on_record=tell, **options,
    )  # fmt: skip
    family.save(out / "family")
    facts = {"smallest": family.smallest, "largest": family.largest, "folder": str(out / "family")}
    _say(as_json, facts, f"Written to {out / 'family'}; take members with: blora at {out} --budget 0.37 --out member")


def dtype_of_target(target: str) -> str | None:
    """What exports for a target are in unless `--dtype` says otherwise; None leaves it to the device."""
    from .clocks import DTYPES

    return DTYPES["cuda"] if target == "cuda" else None


def device_of_target(target: str, budget: str, metric: Any) -> str | None:
    """Whose time a budget in time is about where no `--device` says so; None is this machine's processor."""
    from .budget import Budget
    from .cost_models.devices import THIS_CUDA

    in_time = ".." not in budget and Budget.parse(budget, metric).metric == "latency"
    return THIS_CUDA if target == "cuda" and in_time else None


def parse_narrow(text: str | None) -> bool | float:
    """What `--narrow` says: nothing, `auto`, or a share of the inner channels."""
    if text is None or text == "auto":
        return text is not None
    try:
        return float(text)
    except ValueError as error:
        raise BadInput(f"--narrow {text!r} is no share; write auto, or a number such as 0.7") from error


def check_quantize_option(quantize: str | None, target: str, exports: bool) -> None:
    """Raise BadInput, before any work, where `--quantize` could do nothing."""
    if quantize is None:
        return
    if not exports:
        raise BadInput(f"--quantize {quantize} is about the export, and --no-export skips it; leave one of them out")
    from .quantization import check_quantize

    check_quantize(quantize, target)


def _export_facts(artifact: Any) -> dict[str, Any]:
    from .report import describe_quantization

    return {"parity": artifact.parity.to_json(), "quantization": describe_quantization(artifact)}


def _export_lines(artifact: Any) -> list[str]:
    """How close an export is, and what was fused, rewritten and quantised, one line each."""
    from .report import describe_quantization, quantization_lines, rewrite_lines

    described = describe_quantization(artifact)
    lines = rewrite_lines(artifact.manifest)
    return [str(artifact.parity), *lines, *([] if described is None else quantization_lines(described))]


def with_export_quality(compiled: Any, artifact: Any, evaluation: Any) -> Any:
    """The compiled model with the quality of its export beside its own, where there is text to measure it on."""
    from dataclasses import replace

    from .calibration import evaluation_sequences
    from .export_quality import export_quality

    windows, stride = evaluation_sequences(compiled.source, evaluation)
    if windows is None or not artifact.generation:
        return compiled
    found = export_quality(artifact, compiled.source.model, windows, stride=stride)
    return replace(compiled, quality={**compiled.quality, artifact.quantize: found})


def validation_prompts(compiled: Any, evaluation: Any, count: int = 8) -> list[list[int]] | None:
    """Prompts of unequal length from the evaluation text, for the greedy comparison; None leaves it to `lower`."""
    from .calibration import evaluation_sequences
    from .source import position_limit

    windows, _ = evaluation_sequences(compiled.source, evaluation)
    if windows is None:
        return None
    longest = max(2, position_limit(compiled.module) // 2)  # leaves room to generate
    return [row[: min(5 + 4 * index, longest)].tolist() for index, row in enumerate(windows[:count])]


def summary_table(data: Mapping[str, Any]) -> str:
    """The few numbers a visitor came for."""
    from rich.console import Console
    from rich.table import Table

    sheet = Table(title=f"{data['model']} at budget {data['budget']['asked']}")
    for column in ("", "dense", "compressed", ""):
        sheet.add_column(column, justify="left" if not column else "right")
    for metric, label in (("flops", "projection FLOPs"), ("params", "projection parameters")):
        entry = data["achieved"]["sites"][metric]
        sheet.add_row(label, f"{entry['dense']:,}", f"{entry['compressed']:,}", f"kept {entry['fraction']:.1%}")
    quality = data["quality"]
    if {"teacher", "untrained", "compressed"} <= quality.keys():
        ratio = quality["compressed"]["perplexity"] / quality["teacher"]["perplexity"]
        values = [f"{quality[name]['perplexity']:.2f}" for name in ("teacher", "compressed")]
        sheet.add_row("perplexity", *values, f"x {ratio:.3f}; untrained {quality['untrained']['perplexity']:.2f}")
        before, after = quality["untrained"]["kl"], quality["compressed"]["kl"]
        sheet.add_row("KL to teacher", "0", f"{after:.4f}", f"untrained {before:.4f}")
    medians = {(t["setting"], t["name"]): t["median_ms"] for t in data["timings"]}
    for setting in dict.fromkeys(setting for setting, _ in medians):
        dense, small = medians[setting, "dense"], medians[setting, "compressed"]
        sheet.add_row(setting, f"{dense:.2f} ms", f"{small:.2f} ms", f"{dense / small:.2f}x")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(sheet)
    return console.export_text()


def _print_plan(model: str, options: dict[str, Any], train: Path | None, as_json: bool) -> Any:
    from . import make_plan

    options = dict(options)
    if options["calibration"] is None:
        options["calibration"] = train
    solved = make_plan(model, **options)
    _say(as_json, json.loads(solved.to_json()), solved.table())
    return solved


def run_settings(model: str, options: Mapping[str, Any]) -> dict[str, str]:
    """What `run.json` holds: everything that a run's result depends on, and a resumed one has to repeat."""
    from .distillation import DistillConfig

    values = {
        name: value.deciding() if isinstance(value, DistillConfig) else value for name, value in options.items()
    }
    return {"model": model, **{name: str(value) for name, value in values.items() if value is not None}}


def _claim_run_folder(
    out: Path, settings: dict[str, Any], resume: bool, overwrite: bool, say: Callable[[Any], None]
) -> Callable[[Any], None]:
    """Start, continue or replace a run; somebody else's folder is never touched.

    Returns:
        What to call with each record: it says it, and at the profile's lets go of what `overwrite` replaces. By then
        the model is loaded and its data were read; a mistyped name costs no earlier run, and leaves none behind.
    """
    from .folders import check_target, write_text

    if resume and overwrite:
        raise BadInput("--resume continues what the folder holds and --overwrite removes it; leave one of them out")
    check_target(out, "run.json")
    path = out / "run.json"
    if path.exists() and not resume and not overwrite:
        raise BadInput(f"{out} holds an earlier run; continue it with --resume or replace it with --overwrite")
    if path.exists() and resume:
        try:
            earlier = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{path} is damaged ({error}); start again with --overwrite") from error
        changed = [k for k in {**earlier, **settings} if earlier.get(k) != settings.get(k)]
        if changed:
            k = sorted(changed)[0]
            raise BadInput(f"{out} was started with {k}={earlier.get(k)!r}, now {settings.get(k)!r}; use --overwrite")
    begun = False

    def tell(record: Any) -> None:
        nonlocal begun
        if not begun and record.stage == "profile":
            begun = True
            if overwrite:
                _remove_earlier_outputs(out)
            write_text(path, json.dumps(settings, indent=2) + "\n")
        say(record)

    return tell


def _remove_earlier_outputs(out: Path) -> None:
    """Clear what an earlier run left, so that no file of it can pass for this one's. Profiles are kept by content."""
    import shutil

    for name in ("plan.json", "report.md", "report.json"):
        (out / name).unlink(missing_ok=True)
    for name in ("model", "onnx", "onnx-dense", "distill", "family"):
        shutil.rmtree(out / name, ignore_errors=True)


def _saved_folder(run: Path) -> Path:
    from .saving import DESCRIPTION

    for folder in (run, run / "model"):
        if (folder / DESCRIPTION).exists():
            return folder
    raise BadInput(f"neither {run} nor {run / 'model'} holds a saved model ({DESCRIPTION})")


def parse_rules(rules: list[str]) -> dict[str, Any]:
    """`["*.layers.0.*=dense", "*down_proj=64:256"]` as the mapping that `compile` takes."""
    parsed: dict[str, Any] = {}
    for rule in rules:
        glob, equals, value = rule.partition("=")
        if not equals or not glob:
            raise BadInput(
                f"--rule {rule!r} has no '='; write GLOB=dense, GLOB=exclude, GLOB=compress or GLOB=MIN:MAX"
            )
        low, colon, high = value.partition(":")
        earlier = parsed.pop(glob, None)  # the last of two rules comes last, and bounds add to bounds
        if colon:
            try:
                bounds = {name: int(v) for name, v in (("min_rank", low), ("max_rank", high)) if v}
                parsed[glob] = {**earlier, **bounds} if isinstance(earlier, dict) else bounds
            except ValueError as error:
                raise BadInput(f"--rule {rule!r}: ranks are whole numbers, as in *down_proj=64:256") from error
        else:
            parsed[glob] = value
    return parsed


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"--config {path} cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise BadInput(f"--config {path} holds a {type(data).__name__}; write an object with DistillConfig values")
    return data


def _read_plan(path: Path) -> Any:
    from .plan import Plan

    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--plan {path} cannot be read ({error})") from error


def _say(as_json: bool, data: Any, text: Any) -> None:
    print(json.dumps(data, indent=2) if as_json else str(text))


if __name__ == "__main__":
    main()
