"""Draw where the compute went: each projection of a result file, layer by role, with the share of its FLOPs kept.

python benchmarks/plot_plan.py benchmarks/results/cpu.json --budget 0.25 --out docs/where-the-compute-went.svg
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = json.loads(options.result.read_text())["budgets"][options.budget]
    draw(data, options.out)


def draw(data: dict, out: Path) -> None:
    cells = {}
    for site in data["sites"]:
        layer = int(re.search(r"\.(\d+)\.", site["site"]).group(1))
        cells[layer, site["site"].rpartition(".")[2]] = site
    layers = sorted({layer for layer, _ in cells})
    roles = list(dict.fromkeys(role for _, role in cells))
    kept = [[cells[layer, role]["cost"] / cells[layer, role]["dense_cost"] for role in roles] for layer in layers]
    plt.rcParams.update({"font.family": "sans-serif", "svg.fonttype": "none", "font.size": 10})
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
    figure.savefig(out, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
