"""One dial against dedicated students, on the bundled model.

    python benchmarks/dial.py --tokens 600000 --autocast bfloat16 --out benchmarks/results/dial-prose-llama-8m.json

A family is trained once on N tokens. At budgets drawn from a seed its members are compared with students that were
compiled for that budget alone and trained on N / 3 tokens each, with the same loss, text, batches and precision, and
with the members and students before any training. Windows: 96 of 257 tokens, stride 768, of the bundled validation
text. Every result is written as soon as it is there, and a second call with the same settings goes on from them; the
family's training resumes from its checkpoints in --work.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

import blora_compiler as blora
from blora_compiler.data import evaluation_windows, load_texts, tokenize
from blora_compiler.evaluate import perplexity_and_kl
from blora_compiler.source import BUNDLED_MODEL, BUNDLED_TRAIN_TEXT, BUNDLED_VALIDATION_TEXT, Source, load_source

LENGTH, STRIDE, WINDOWS = 257, 768, 96
SMALLEST, LARGEST = 0.2, 0.75
BATCH, TOKENS_A_ROW = 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=300_000, help="of the family; a dedicated student gets a third")
    parser.add_argument("--budgets", type=int, default=3, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autocast", default="auto")
    parser.add_argument("--work", type=Path, default=Path("dial-run"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    source = load_source(BUNDLED_MODEL)
    windows = evaluation_windows(
        tokenize(load_texts(BUNDLED_VALIDATION_TEXT), source.tokenizer), LENGTH, STRIDE, WINDOWS
    )
    steps = arguments.tokens // (BATCH * TOKENS_A_ROW)
    settings = {
        "smallest": SMALLEST, "largest": LARGEST, "seed": arguments.seed, "family_steps": steps,
        "dedicated_steps": steps // 3, "family_tokens": steps * BATCH * TOKENS_A_ROW,
        "dedicated_tokens": steps // 3 * BATCH * TOKENS_A_ROW, "budgets": drawn(arguments.budgets, arguments.seed),
        "windows": WINDOWS, "length": LENGTH, "stride": STRIDE, "autocast": arguments.autocast, "threads": 1,
    }  # fmt: skip
    result = read_earlier(arguments.out, settings)
    common = {"batch": BATCH, "length": TOKENS_A_ROW, "hidden_weight": 0.0, "retention_fraction": 0.0,
              "seed": arguments.seed, "autocast": arguments.autocast}  # fmt: skip
    bench = Bench(source, windows, result, arguments.out)
    family = blora.compile_family(
        BUNDLED_MODEL, SMALLEST, LARGEST, train=BUNDLED_TRAIN_TEXT, folder=arguments.work / "family", resume=True,
        distill=blora.DistillConfig(steps=steps, checkpoint_every=25, **common), on_record=print,
    )  # fmt: skip
    untrained = blora.compile_family(
        BUNDLED_MODEL, SMALLEST, LARGEST, calibration=BUNDLED_TRAIN_TEXT, folder=arguments.work / "family"
    )
    bench.weigh(family, arguments.work)
    for budget in settings["budgets"]:
        bench.measure("family", budget, lambda budget=budget: family.at(budget))
        bench.measure("family untrained", budget, lambda budget=budget: untrained.at(budget))
        bench.measure(
            "dedicated", budget, lambda budget=budget: dedicated(budget, steps // 3, common, arguments.work)
        )
    for budget in (SMALLEST, LARGEST):
        bench.measure("family", budget, lambda budget=budget: family.at(budget))
    print(table(result))


def drawn(count: int, seed: int) -> list[float]:
    """Budgets with two digits, one in each of `count` equal parts of the range, so that they spread."""
    generator = random.Random(seed)
    step = (LARGEST - SMALLEST) / count
    return [round(SMALLEST + (part + generator.random()) * step, 2) for part in range(count)]


def dedicated(budget: float, steps: int, common: dict[str, Any], work: Path) -> Any:
    """A student compiled for one budget, with all that `compile` does by default."""
    config = blora.DistillConfig(steps=steps, checkpoint_every=25, **common)
    return blora.compile(
        BUNDLED_MODEL, budget, train=BUNDLED_TRAIN_TEXT, distill=config, folder=work / f"dedicated-{budget}",
        resume=True, on_record=print,
    )  # fmt: skip


def read_earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted call with the same settings has found; nothing of any other."""
    if path.exists():
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
        if earlier["settings"] == settings:
            return earlier
    return {"settings": settings, "rows": []}


class Bench:
    """Measures compiled models and keeps every number in the file."""

    def __init__(self, source: Source, windows: torch.Tensor, result: dict[str, Any], path: Path) -> None:
        self.source, self.windows, self.result, self.path = source, windows, result, path
        if "teacher" not in result:
            result["teacher"] = perplexity_and_kl(source.model, None, windows, stride=STRIDE).to_json()

    def measure(self, row: str, budget: float, make: Any) -> None:
        """Adds a row, unless an earlier call has."""
        if any(done["row"] == row and done["budget"] == budget for done in self.result["rows"]):
            return
        started = time.perf_counter()
        compiled = make()
        made = time.perf_counter() - started
        quality = perplexity_and_kl(compiled.module, self.source.model, self.windows, stride=STRIDE)
        entry = {"row": row, "budget": budget, "kept": compiled.plan.fraction, "seconds_to_make": round(made, 2)}
        entry |= {"perplexity": quality.perplexity, "kl": quality.kl, "top1_agreement": quality.top1_agreement}
        self.result["rows"].append(entry)
        self.keep()
        print(entry, flush=True)

    def weigh(self, family: blora.Family, work: Path) -> None:
        """The size of the family's checkpoint against its largest member's."""
        folders = family.save(work / "saved-family"), family.at(LARGEST).save(work / "saved-largest")
        sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in folders]
        self.result["bytes"] = {"family": sizes[0], "largest": sizes[1], "ratio": sizes[0] / sizes[1]}
        self.result["records"] = [str(record) for record in family.records]
        self.keep()

    def keep(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Members before and after training beside the students trained for their budget alone."""
    from blora_compiler.report import table as markdown

    rows = {(row["row"], row["budget"]): row for row in result["rows"]}

    def cells(budget: float) -> tuple[str, ...]:
        untrained, member, student = (rows[row, budget] for row in ("family untrained", "family", "dedicated"))
        ratio = f"{member['perplexity'] / student['perplexity']:.3f} / {member['kl'] / student['kl']:.2f}"
        both = (f"{row['perplexity']:.2f} / {row['kl']:.4f}" for row in (untrained, member, student))
        return f"{budget:g}", *both, ratio

    headings = ("budget", "member, untrained: perplexity / KL", "member", "student", "member / student")
    return markdown(headings, [cells(budget) for budget in result["settings"]["budgets"]])


if __name__ == "__main__":
    main()
