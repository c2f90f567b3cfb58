"""Draw the pictures of the README and docs from their result files.

python benchmarks/plots.py plan benchmarks/results/cpu.json --budget 0.25 --out docs/where-the-compute-went.svg
python benchmarks/plots.py quality benchmarks/results/quality-2m-tokens.json --out docs/quality.svg

`plan` shows each projection, layer by role, with the share of its FLOPs kept; `quality` what each row of a table of
`benchmarks/quality.py` keeps of the teacher, over the FLOPs that it keeps.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

plt.rcParams.update({"font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "blora", "font.size": 10})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pictures = parser.add_subparsers(dest="picture", required=True)
    for name in ("plan", "quality"):
        picture = pictures.add_parser(name)
        picture.add_argument("result", type=Path)
        picture.add_argument("--out", type=Path, required=True)
    pictures.choices["plan"].add_argument("--budget", default="0.25")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    if options.picture == "plan":
        draw_plan(result["budgets"][options.budget], options.out)
    else:
        draw_quality(result, options.out)


def draw_plan(data: Mapping[str, Any], out: Path) -> None:
    """Layers by roles: the share of each projection's FLOPs that a plan keeps."""
    cells = {}
    for site in data["sites"]:
        layer = int(re.search(r"\.(\d+)\.", site["site"]).group(1))
        cells[layer, site["site"].rpartition(".")[2]] = site
    layers = sorted({layer for layer, _ in cells})
    roles = list(dict.fromkeys(role for _, role in cells))
    kept = [[cells[layer, role]["cost"] / cells[layer, role]["dense_cost"] for role in roles] for layer in layers]
    figure, axes = plt.subplots(figsize=(7.6, 0.52 * len(layers) + 1.6))
    image = axes.imshow(kept, cmap="YlGnBu", vmin=0, vmax=max(0.6, *(max(row) for row in kept)), aspect="auto")
    for row, layer in enumerate(layers):
        for column, role in enumerate(roles):
            share = kept[row][column]
            text = f"{share:.0%}\n{cells[layer, role]['form']}"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=8, color="white" if share > 0.35 else "#1a1a1a"
            )
    axes.set_xticks(range(len(roles)), roles)
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.tick_params(length=0)
    axes.set_title(
        f"{data['model']} at budget {data['budget']['asked']}: share of each projection's FLOPs that is kept",
        fontsize=10,
    )
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)
    figure.tight_layout()
    write(figure, out)


@dataclass(frozen=True)
class Curve:
    """One row of a quality table over its budgets.

    Attributes:
        fraction: of the projections' FLOPs kept, rising.
        values: by measure (a key of MEASURES), one a fraction: mean, lowest and highest of the seeds; a measure that
            was not taken of every point is not there.
    """

    fraction: tuple[float, ...]
    values: Mapping[str, tuple[tuple[float, float, float], ...]]

    def __str__(self) -> str:
        """Its numbers, for those who cannot see the picture."""
        return "; ".join(
            f"{measure} "
            + ", ".join(f"{mean:.3g} at {at:.2f}" for at, (mean, *_) in zip(self.fraction, taken, strict=True))
            for measure, taken in self.values.items()
        )


MEASURES = {"KL": "KL to the teacher, nats per token", "perplexity": "perplexity, of the teacher's",
            "retention": "in-context learning kept"}  # fmt: skip
# Colour-blind safe; what was trained is drawn in full, what was not in dashes.
STYLES = {
    "ours, the best of its rows": "#0072b2", "ours": "#56b4e9", "uniform ranks distilled": "#e69f00",
    "whitened SVD + LoRA recovery": "#009e73", "width pruning": "#cc79a7", "depth pruning": "#d55e00",
    "ours, the best of its rows, untrained": "#0072b2", "whitened SVD": "#999999",
}  # fmt: skip
UNTRAINED = ("ours, the best of its rows, untrained", "whitened SVD")


def curves_of(result: Mapping[str, Any]) -> dict[str, Curve]:
    """The rows of a quality table, by the names of STYLES. The best row at a budget is that of the lowest KL."""
    lines = [line for line in result["table"] if line["budget"] < 1]
    best = {}
    for name, trained in (("ours, the best of its rows", True), ("ours, the best of its rows, untrained", False)):
        ours = [line for line in lines if line["row"].startswith("ours") and (line["rate"] is not None) is trained]
        of_budgets = [
            [line for line in ours if line["budget"] == at] for at in sorted({line["budget"] for line in ours})
        ]
        best[name] = [min(of_budget, key=lambda line: line["kl"]) for of_budget in of_budgets]
    rows = {name: best.get(name) or [line for line in lines if line["row"] == name] for name in STYLES}
    return {name: _curve(of_row, result) for name, of_row in rows.items() if of_row}


def _curve(lines: list[Mapping[str, Any]], result: Mapping[str, Any]) -> Curve:
    lines = sorted(lines, key=lambda line: line["fraction"])
    teacher = result["teacher"]["perplexity"]
    values = {
        "KL": tuple((line["kl"], *line["kl_range"]) for line in lines),
        "perplexity": tuple(
            (line["perplexity_ratio"], *(perplexity / teacher for perplexity in line["perplexity_range"]))
            for line in lines
        ),
    }
    kept = [
        [
            run["probes"]["retention"]["value"] for run in result["runs"]
            if all(run[key] == line[key] for key in ("row", "budget", "rate")) and run["probes"]
        ]
        for line in lines
    ]  # fmt: skip
    if all(kept):
        values["retention"] = tuple((statistics.mean(seeds), min(seeds), max(seeds)) for seeds in kept)
    return Curve(tuple(line["fraction"] for line in lines), values)


def draw_quality(result: Mapping[str, Any], out: Path) -> None:
    """What each row keeps of the teacher over the FLOPs that it keeps; bars are the range of the seeds."""
    curves = curves_of(result)
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(11, 4.6))
    for axes, (measure, heading) in zip(panels, MEASURES.items(), strict=True):
        for name, curve in curves.items():
            if measure not in curve.values:
                continue
            means, lows, highs = zip(*curve.values[measure], strict=True)
            spread = [[mean - low for mean, low in zip(means, lows, strict=True)],
                      [high - mean for mean, high in zip(means, highs, strict=True)]]  # fmt: skip
            axes.errorbar(
                curve.fraction, means, spread, label=name, color=STYLES[name], marker="o", markersize=4, capsize=2,
                linestyle="--" if name in UNTRAINED else "-", zorder=3 if name.startswith("ours") else 2,
            )  # fmt: skip
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("share of the projections' FLOPs kept")
        axes.set_xticks((0.25, 0.5, 0.75))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:2]:
        axes.set_yscale("log")
    ratios = (1, 1.1, 1.2, 1.5, 2)
    panels[1].set_yticks(ratios, [f"{ratio:g}" for ratio in ratios])
    panels[1].yaxis.set_minor_locator(NullLocator())
    for axes in panels[1:]:
        axes.axhline(1, color="#1a1a1a", linewidth=0.8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    write(figure, out, description_of(curves))


def description_of(curves: Mapping[str, Curve]) -> str:
    """The numbers that a picture of quality shows, a line a row."""
    return "\n".join(f"{name}: {curve}" for name, curve in curves.items())


def write(figure: Figure, out: Path, description: str | None = None) -> None:
    """Save a picture, the same bytes from the same numbers."""
    figure.savefig(out, facecolor="white", metadata={"Date": None, "Description": description})


if __name__ == "__main__":
    main()
