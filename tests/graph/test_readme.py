"""The README's numbers are those of the committed result file."""

from __future__ import annotations

import html
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"


def test_the_table_in_the_readme_is_what_the_benchmark_printed():
    spec = importlib.util.spec_from_file_location("end_to_end", ROOT / "benchmarks" / "end_to_end.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table(json.loads(RESULT.read_text())) in (ROOT / "README.md").read_text()


def test_the_committed_result_meets_what_the_project_promises():
    result = json.loads(RESULT.read_text())
    quarter = result["budgets"]["0.25"]
    table = json.loads((ROOT / "benchmarks" / "results" / "quality-prose-llama-8m.json").read_text())["table"]
    (first_plan,) = (
        line for line in table if (line["row"], line["budget"]) == ("ours, first plan, not refitted", 0.25)
    )
    assert quarter["quality"]["compressed"]["kl"] <= 0.4 * first_plan["kl"]
    assert quarter["budget"]["planned_fraction"] <= 0.25
    assert max(quarter["parity"]["errors"].values()) <= 1e-4
    assert result["meta_plan"]["seconds"] < 30
    assert result["meta_plan"]["peak_gigabytes"] < 3


def test_the_errors_of_predictions_are_those_of_the_committed_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import prediction

    result = json.loads((ROOT / "benchmarks" / "results" / "prediction-cpu.json").read_text())
    assert prediction.summarise(result["kernels"], result["end_to_end"]) == result["summary"]
    assert len(result["kernels"]) >= 40 and len(result["end_to_end"]) >= 8
    assert prediction.table(result) in (ROOT / "docs" / "cost-models.md").read_text()


def test_the_budgets_in_time_are_those_of_the_committed_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import latency_budget

    result = json.loads((ROOT / "benchmarks" / "results" / "latency-budget-cpu.json").read_text())
    assert len(result["cases"]) == len(latency_budget.CASES)
    assert latency_budget.table(result) in (ROOT / "docs" / "cost-models.md").read_text()


def test_the_quality_table_is_what_its_runs_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality

    result = json.loads((ROOT / "benchmarks" / "results" / "quality-prose-llama-8m.json").read_text())
    runs = {str(index): run for index, run in enumerate(result["runs"])}
    lines = quality.summarise(runs, result["tokens"], result["teacher"]["perplexity"])
    assert lines == result["table"]
    assert quality.table(lines) in (ROOT / "docs" / "quality.md").read_text()


def test_the_speeds_in_the_readme_are_those_of_the_committed_passes_benchmark():
    timed = json.loads((ROOT / "benchmarks" / "results" / "passes-cpu.json").read_text())["end_to_end"]
    readme = (ROOT / "README.md").read_text()
    for phase, name in (("prefill", "prefill 1x512"), ("decode", "decode 1x1, context 256")):
        median = {case: run["median_ms"] for case, run in timed[phase].items()}
        ratios = [
            median[f"1.0 {which}"] / median[f"{budget} {which}"]
            for budget in (0.5, 0.25)
            for which in ("none", "all")
        ]
        assert f"| {name} | " + " | ".join(f"{ratio:.2f}x" for ratio in ratios) + " |" in readme


def test_the_table_of_small_batches_is_that_of_the_committed_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import end_to_end

    result = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    _, _, rest = (ROOT / "docs" / "why-not-faster.md").read_text().partition("<!-- SMALL BATCH -->")
    assert rest.partition("<!-- END SMALL BATCH -->")[0].strip() == end_to_end.small_batches(result)


def test_the_throughput_over_batches_is_that_of_the_committed_benchmark():
    result = json.loads((ROOT / "benchmarks" / "results" / "throughput-cpu.json").read_text())
    found = {(line["setting"], line["name"]): line for line in result["summary"]}
    predicted = {(time["setting"], time["name"]): time["predicted_ms"] for time in result["modules"]}
    rows = []
    for setting in dict.fromkeys(setting for setting, _ in found):
        names = [(setting, name) for name in ("dense", "0.5 uniform", "0.25 uniform")]
        dense, *others = (found[name] for name in names)
        speeds = [f"{side['tokens_per_second']:.0f} ({side['speedup']:.2f}x)" for side in others]
        ratios = [f"{predicted[name] / found[name]['median_ms']:.2f}" for name in names if name in predicted]
        cells = (setting, f"{dense['tokens_per_second']:.0f}", *speeds, " ".join(ratios) or "-")
        rows.append(f"| {' | '.join(cells)} |")
    page = (ROOT / "docs" / "why-not-faster.md").read_text()
    assert _between(page, "THROUGHPUT").splitlines()[2:] == rows
    off = [abs(ms / found[name]["median_ms"] - 1) for name, ms in predicted.items()]
    speedups = [
        abs(predicted[setting, "dense"] / ms / found[setting, side]["speedup"] - 1)
        for (setting, side), ms in predicted.items()
        if side != "dense"
    ]
    said = [f"{sum(errors) / len(errors):.0%}".replace("%", " %") for errors in (off, speedups)]
    assert f"{said[0]} of the milliseconds and {said[1]} of the speed-ups on average" in " ".join(page.split())


def test_the_numbers_of_a_million_tokens_are_those_of_their_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality

    result = json.loads((ROOT / "benchmarks" / "results" / "quality-1m-tokens.json").read_text())
    assert {run["tokens"] for run in result["runs"] if run["rate"] is not None} == {result["tokens"]}
    assert quality.table_of_runs(result) in (ROOT / "docs" / "quality.md").read_text()


def test_the_numbers_of_two_million_tokens_are_those_of_their_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality

    page = (ROOT / "docs" / "quality.md").read_text()
    result = json.loads((ROOT / "benchmarks" / "results" / "quality-2m-tokens.json").read_text())
    trained = [run for run in result["runs"] if run["rate"] is not None]
    assert {(run["tokens"], run["batch"]) for run in trained} == {(result["tokens"], result["batch"])}
    assert quality.table_of_runs(result) in page
    assert _between((ROOT / "README.md").read_text(), "GLANCE") == quality.at_a_glance(result)
    assert quality.table([line for line in result["table"] if line["rate"] is None]) in page
    import plots

    drawn = plots.description_of(plots.curves_of(result))
    assert html.escape(drawn, quote=False) in (ROOT / "docs" / "quality.svg").read_text()
    for name in ("quality-3m-tokens.json", "quality-calibration.json"):
        assert quality.table_of_runs(json.loads((ROOT / "benchmarks" / "results" / name).read_text())) in page


def test_the_distance_of_members_to_dedicated_students_is_that_of_the_committed_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import dial

    result = json.loads((ROOT / "benchmarks" / "results" / "dial-prose-llama-8m.json").read_text())
    assert dial.table(result) in (ROOT / "docs" / "method.md").read_text()
    for row in dial.table(result).splitlines()[2:]:
        perplexity, kl = row.strip("| ").rpartition("| ")[2].split(" / ")
        assert perplexity in (ROOT / "README.md").read_text() and kl in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("budget", ["0.5", "0.25"])
def test_the_sentence_encoder_is_as_good_as_its_result_says(budget):
    result = json.loads((ROOT / "benchmarks" / "results" / f"sentence-encoder-{budget}.json").read_text())
    found, page = result["found"], (ROOT / "docs" / "quality.md").read_text()
    row = (
        budget,
        f"{found['spearman compressed']:.4f}",
        f"{found['spearman dense']:.4f}",
        result["settings"]["steps"],
    )
    assert f"| {' | '.join(map(str, row))} |" in page
    assert found["spearman compressed"] >= {"0.5": 0.862, "0.25": 0.85}[budget]


def test_the_tables_of_modules_and_of_the_gpu_are_what_their_scripts_print(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import modules
    import speed

    page = (ROOT / "docs" / "why-not-faster.md").read_text()
    for name, file in (("GPU MODULES", "modules-cuda.json"), ("CPU MODULES", "modules-cpu.json")):
        result = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
        assert _between(page, name) == modules.compact(modules.timings_in(result))
    result = json.loads((ROOT / "benchmarks" / "results" / "speed-cuda.json").read_text())
    assert _between(page, "GPU SPEED") == speed.compact(result)


def _between(page: str, name: str) -> str:
    return page.partition(f"<!-- {name} -->")[2].partition(f"<!-- END {name} -->")[0].strip()


def test_the_speeds_of_the_target_sizes_are_those_of_the_committed_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speed

    result = json.loads((ROOT / "benchmarks" / "results" / "speed-cpu.json").read_text())
    _, _, rest = (ROOT / "docs" / "why-not-faster.md").read_text().partition("<!-- SPEED -->")
    assert rest.partition("<!-- END SPEED -->")[0].strip() == speed.compact(result)
    assert set(result["cases"]) >= {f"{model} {kept} uniform" for model in ("llama 1024x8", "minilm shape")
                                    for kept in (0.5, 0.25)}  # fmt: skip


def test_the_times_of_gpt2_are_those_of_the_committed_passes_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import passes

    result = json.loads((ROOT / "benchmarks" / "results" / "passes-gpt2-cpu.json").read_text())
    page = (ROOT / "docs" / "why-not-faster.md").read_text()
    _, _, rest = page.partition("<!-- GPT2 -->")
    assert rest.partition("<!-- END GPT2 -->")[0].strip() == passes.report(result)
    prompts = [result["single"][kept] for kept in ("1.0", "0.25")]
    in_steps = [times[passes.IN_STEPS]["median_ms"] / times["all"]["median_ms"] for times in prompts]
    said = "not to: {:.2f}x the time of the dense prompt, {:.2f}x of the one at 0.25".format(*in_steps)
    assert said in " ".join(page.split())
    # What the graphs compute is the same, whichever passes ran.
    assert all(run["largest_difference"] < 1e-4 for times in prompts for run in times.values())


@pytest.mark.parametrize(
    ("mark", "file"), [("FITTED", "quantization-cpu.json"), ("TRAINED", "quantization-trained-cpu.json")]
)
def test_the_tables_of_quantised_weights_are_what_their_files_say(monkeypatch, mark, file):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quantization

    result = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
    _, _, rest = (ROOT / "docs" / "quantization.md").read_text().partition(f"<!-- {mark} -->")
    assert rest.partition(f"<!-- END {mark} -->")[0].strip() == quantization.report(result["rows"])


def test_what_rounding_adds_to_the_kl_is_as_the_page_says():
    rows = {}
    for file in ("quantization-cpu.json", "quantization-trained-cpu.json"):
        rows |= json.loads((ROOT / "benchmarks" / "results" / file).read_text())["rows"]
    kl = {name: row["quality"]["kl"] for name, row in rows.items()}
    forms = ("low rank 0.25, trained", "low rank 0.5", "low rank 0.25", "dense")
    added = [f"{kl[f'{form} + int4'] - kl[form]:.3f}" for form in forms]
    page = " ".join((ROOT / "docs" / "quantization.md").read_text().split())
    assert (
        "int4 adds {} to the KL of the trained student, {} at 0.5 and {} to the untrained quarter".format(*added)
        in page
    )
    assert f"the {added[3]} that it adds to the dense model" in page
    assert all(kl[f"{form} + int8"] - kl[form] < 0.002 for form in forms)


def test_the_table_of_architectures_is_that_of_the_committed_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import architectures

    result = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())
    assert list(result["models"]) == list(architectures.ARCHITECTURES)
    assert _between((ROOT / "docs" / "architectures.md").read_text(), "ARCHITECTURES") == architectures.report(result)


def test_an_architecture_that_fails_is_in_the_table_with_its_reason(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import architectures

    broken = architectures.encoder("bert", **{**architectures.PLAIN, "hidden_act": "no such function"})
    named = {"convnext": architectures.ARCHITECTURES["convnext"], "broken": broken}
    monkeypatch.setattr(architectures, "ARCHITECTURES", named)
    found = {name: architectures.tried(name, export=False) for name in named}
    assert (found["convnext"]["outcome"], found["convnext"]["sites"]) == ("passed", 4)
    assert found["broken"]["outcome"] == "failed" and "no such function" in found["broken"]["message"]
    row = architectures.report({"models": {"broken": found["broken"]}}).splitlines()[-1]
    assert row.startswith("| broken |") and "failed in build" in row
