"""What a bench found, as data, as markdown, as a terminal table and as a plot."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import BadInput
from .folders import write_text
from .report import table
from .timing import Timing

DENSE = "dense"


@dataclass(frozen=True)
class Side:
    """One export that took part.

    Attributes:
        name: `dense`, or the budget and how it was planned: `0.5 uniform`.
        kept: share of the projections' dense FLOPs that its plan keeps.
        file_bytes: of its graphs and its one weights file.
        parity: how close ONNX Runtime came to PyTorch when it was exported.
        peak_bytes: setting -> what opening its sessions and running once added to a fresh process's peak memory.
    """

    name: str
    kept: float
    file_bytes: int
    parity: str
    peak_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def flops_ratio(self) -> float:
        """Dense FLOPs of the projections over this plan's: the most that they can gain where FLOPs bind."""
        return 1.0 / self.kept


@dataclass(frozen=True)
class ModuleTime:
    """Where one run of one graph of one side went, by ONNX Runtime's own profile. Milliseconds.

    Attributes:
        setting, name: as in `Timing`.
        sites_ms: of the projections that the plan counts.
        kinds: kind of work -> its time; they add up to `total_ms`.
        total_ms: of the run, unrecorded.
        predicted_sites_ms, predicted_ms: by the calibrated clock, or None.
        note: why there is no prediction, or nothing.
        alone_ms: of the same GEMMs timed one by one, each at its fastest; None where that was not done.
        copies: nodes that copied between host and device in one run.
        clock: what the profile's times are: of `kernels`, or (CUDA) of their `launches`, which say nothing about how
            long the modules take.
    """

    setting: str
    name: str
    sites_ms: float
    kinds: Mapping[str, float]
    total_ms: float
    predicted_sites_ms: float | None = None
    predicted_ms: float | None = None
    note: str = ""
    alone_ms: float | None = None
    copies: int = 0
    clock: Literal["kernels", "launches"] = "kernels"

    @property
    def alone_share(self) -> float | None:
        """How close the modules come to the sum of their GEMMs: 1 is all that better lowering could reach."""
        return None if self.alone_ms is None or self.sites_ms <= 0 else self.alone_ms / self.sites_ms


@dataclass(frozen=True)
class BenchResult:
    """Dense against compressed exports, all lowered alike and timed in turns of one run.

    Attributes:
        setup: what was run, where and how: model, target, dtype, threads, copies, versions, and what is not in the
            numbers.
        sides: the exports, dense first.
        timings: one a setting and side.
        modules: the same settings by ONNX Runtime's profile; end-to-end settings have none.
        tokens: setting -> tokens that one run handles (prefill, encoders) or makes (decode), for the throughput; 0
            where inputs are no tokens.
    """

    setup: Mapping[str, Any]
    sides: tuple[Side, ...]
    timings: tuple[Timing, ...]
    modules: tuple[ModuleTime, ...]
    tokens: Mapping[str, int]

    @property
    def settings(self) -> tuple[str, ...]:
        """In the order they were run."""
        return tuple(dict.fromkeys(timing.setting for timing in self.timings))

    def timing(self, setting: str, name: str) -> Timing:
        """One side's time at one setting.

        Raises:
            BadInput: if that was not timed.
        """
        for timing in self.timings:
            if (timing.setting, timing.name) == (setting, name):
                return timing
        raise BadInput(
            f"{name!r} was not timed at {setting!r}; there are {', '.join(self.settings)} "
            f"of {', '.join(side.name for side in self.sides)}"
        )

    def speedup(self, setting: str, name: str) -> float:
        """Dense median over this side's, end to end."""
        return self.timing(setting, DENSE).median_ms / self.timing(setting, name).median_ms

    def module(self, setting: str, name: str) -> ModuleTime | None:
        """One side's profile at one setting, or None where none was taken."""
        found = (time for time in self.modules if (time.setting, time.name) == (setting, name))
        return next(found, None)

    def module_speedup(self, setting: str, name: str) -> float | None:
        """The same of the compressed modules alone; None where no profile was taken, or none of kernels."""
        dense, here = self.module(setting, DENSE), self.module(setting, name)
        if dense is None or here is None or here.sites_ms <= 0 or here.clock == "launches":
            return None
        return dense.sites_ms / here.sites_ms

    def module_share(self, setting: str, side: Side) -> float | None:
        """How much of the plan's FLOPs ratio the modules reach; None where no profile was taken."""
        of_modules = self.module_speedup(setting, side.name)
        return None if of_modules is None else of_modules / side.flops_ratio

    def throughput(self, setting: str, name: str) -> float | None:
        """Tokens a second; None where inputs are no tokens."""
        tokens = self.tokens[setting]
        return 1e3 * tokens / self.timing(setting, name).median_ms if tokens else None

    def to_json(self) -> dict[str, Any]:
        """JSON values, the ratios included."""
        return {
            "setup": dict(self.setup),
            "sides": [{**asdict(side), "flops_ratio": side.flops_ratio} for side in self.sides],
            "timings": [timing.to_json() for timing in self.timings],
            "modules": [{**asdict(time), "alone_share": time.alone_share} for time in self.modules],
            "summary": [self._summary(setting, side) for setting in self.settings for side in self.sides],
        }

    def _summary(self, setting: str, side: Side) -> dict[str, Any]:
        time = self.module(setting, side.name)
        return {
            "setting": setting,
            "name": side.name,
            "median_ms": self.timing(setting, side.name).median_ms,
            "speedup": self.speedup(setting, side.name),
            "module_speedup": self.module_speedup(setting, side.name),
            "module_speedup_over_flops_ratio": self.module_share(setting, side),
            "gemms_alone_over_modules": None if time is None else time.alone_share,
            "tokens_per_second": self.throughput(setting, side.name),
        }

    def write(self, path: Path) -> None:
        """Write `to_json` to a file."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    # ── For people ───────────────────────────────────────────────────────────────────────────────────────────────

    def time_rows(self) -> list[tuple[str, ...]]:
        """Setting, side, median and quartiles, speed-ups and what they reach, predicted, throughput: as text."""
        rows: list[tuple[str, ...]] = []
        for setting in self.settings:
            for side in self.sides:
                throughput = self.throughput(setting, side.name)
                timing, time = self.timing(setting, side.name), self.module(setting, side.name)
                of_modules = self.module_speedup(setting, side.name)
                rows.append(
                    (
                        setting,
                        side.name,
                        f"{timing.median_ms:.2f} [{timing.low_ms:.2f}, {timing.high_ms:.2f}]",
                        f"{self.speedup(setting, side.name):.2f}x",
                        "-" if time is None else f"{time.sites_ms:.2f}",
                        "-" if of_modules is None else f"{of_modules:.2f}x",
                        f"{side.flops_ratio:.2f}x",
                        _share(self.module_share(setting, side)),
                        _share(None if time is None else time.alone_share),
                        "-" if time is None or time.predicted_ms is None else f"{time.predicted_ms:.2f}",
                        "-" if throughput is None else f"{throughput:.0f}",
                    )
                )
        return rows

    def side_rows(self) -> list[tuple[str, ...]]:
        """Side, share kept, size on disk, peak memory, parity: as text."""
        return [
            (
                side.name,
                f"{side.kept:.4f}",
                f"{side.file_bytes / 1e6:.1f}",
                ", ".join(f"{setting}: {peak / 1e6:.0f}" for setting, peak in side.peak_bytes.items()) or "-",
                side.parity,
            )
            for side in self.sides
        ]

    def markdown(self) -> str:
        """Both tables, the conditions and the notes."""
        return "\n\n".join(
            (
                f"# {self.setup['model']}",
                self._conditions(),
                table(TIME_HEADER, self.time_rows()),
                table(SIDE_HEADER, self.side_rows()),
                "\n".join(f"- {note}" for note in self._notes()),
            )
        )

    def terminal(self) -> str:
        """The same for a terminal."""
        from rich.console import Console
        from rich.table import Table

        console = Console(width=170, record=True, file=io.StringIO())
        for header, rows in ((TIME_HEADER, self.time_rows()), (SIDE_HEADER, self.side_rows())):
            sheet = Table(title=str(self.setup["model"]) if header is TIME_HEADER else None)
            for index, column in enumerate(header):
                sheet.add_column(column, justify="right" if index > 1 else "left")
            for row in rows:
                sheet.add_row(*row)
            console.print(sheet)
        return "\n".join((console.export_text(), self._conditions(), *(f"- {note}" for note in self._notes())))

    def _conditions(self) -> str:
        setup = self.setup
        counts = sorted({timing.repeats for timing in self.timings})
        runs = " or ".join(map(str, counts))
        return (
            f"{setup['target']}, {setup['dtype']}, {setup['threads'] or 'all'} threads, {runs} timed runs a side and "
            f"setting, in turns; medians and quartiles in milliseconds."
        )

    def _notes(self) -> list[str]:
        return [*self.setup["notes"], *_distinct(time.note for time in self.modules if time.note)]

    def plot(self, path: Path) -> None:
        """Draw the speed-ups, end to end and of the modules alone, beside the FLOPs ratio.

        Raises:
            BadInput: matplotlib is not installed.
        """
        require_matplotlib(path)
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        others = [side for side in self.sides if side.name != DENSE]
        labels = [f"{setting}\n{side.name}" for setting in self.settings for side in others]
        pairs = [(setting, side) for setting in self.settings for side in others]
        places = range(len(pairs))
        figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.55 * len(pairs)), layout="constrained")
        axes.barh([p + 0.2 for p in places], [self.speedup(s, side.name) for s, side in pairs], 0.38,
                  label="end to end", color="#3b6ea5")  # fmt: skip
        axes.barh([p - 0.2 for p in places], [self.module_speedup(s, side.name) or 0.0 for s, side in pairs], 0.38,
                  label="compressed modules", color="#9bbb59")  # fmt: skip
        axes.plot([side.flops_ratio for _, side in pairs], list(places), "k|", markersize=16, label="FLOPs ratio")
        axes.set_yticks(list(places), labels)
        axes.invert_yaxis()
        axes.axvline(1.0, color="#888888", linewidth=0.8)
        axes.set_xlabel(f"speed-up over dense, {self.setup['model']}")
        axes.legend(loc="best")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)


TIME_HEADER = (
    "setting",
    "side",
    "ms",
    "speed-up",
    "modules ms",
    "modules",
    "FLOPs ratio",
    "modules / ratio",
    "GEMMs alone",
    "predicted ms",
    "tokens/s",
)
SIDE_HEADER = ("side", "kept", "MB on disk", "peak MB added", "parity")


def require_matplotlib(path: Path) -> None:
    """Refuse to draw where that will not be possible, before anything is measured.

    Raises:
        BadInput: matplotlib is not installed, or does not draw such files.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise BadInput(f"{path}: drawing needs matplotlib, which is missing; pip install 'blora-compiler[plot]'")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise BadInput(f"{path}: no picture is drawn as {path.suffix or 'a file without an ending'}; there are "
                       f"{', '.join(f'.{kind}' for kind in sorted(kinds))}")  # fmt: skip


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
