"""Predicted beside measured: where an export's time goes, by ONNX Runtime's profile and by the calibrated clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .artifact import Artifact
from .attribution import Attribution, Row, beside, block_columns, profile_export
from .clocks import Target, this_table, this_target
from .cost_models.prediction import Predictor
from .errors import BadInput
from .measuring import table_path
from .outline import Outline
from .sweeping import Place
from .values import Form, Workload


@dataclass(frozen=True)
class TimeSpent:
    """Where one graph's time goes.

    Attributes:
        attribution: measured.
        predicted_ms: of the whole graph; None where this machine is not calibrated.
        rows: predicted beside measured, by kind of work and by site; predictions are None where there is none.
        note: why there is no prediction, or nothing.
    """

    attribution: Attribution
    predicted_ms: float | None
    rows: tuple[Row, ...]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON values, without the single nodes."""
        return {
            "setting": self.attribution.setting,
            "measured_ms": self.attribution.total_ms,
            "predicted_ms": self.predicted_ms,
            "rows": [row.to_json() for row in self.rows],
            "note": self.note,
        }


def time_spent(
    shape: Outline,
    forms: Mapping[str, Form],
    artifact: Artifact,
    *,
    batch: int = 1,
    tokens: int = 256,
    repeats: int = 20,
    target: Target | None = None,
) -> list[TimeSpent]:
    """Profile every graph of an export, and predict the same from its plan.

    Args:
        shape: of the model as traced.
        forms: of its sites.
        artifact: the export of the model in these forms.
        batch, tokens: a prompt's shape; a decode step stands behind a cache of `tokens`.
        repeats: recorded runs.
        target: a calibrated machine; by default this one, if it is calibrated.
    """
    target, note = (target, "") if target is not None else this_or_why_not(artifact)
    columns = block_columns(shape.sites, forms)
    found = []
    for phase in ("prefill", "decode") if artifact.generation else ("model",):
        measured = profile_export(artifact, batch=batch, tokens=tokens, repeats=repeats, phase=phase, columns=columns)
        if target is None:
            found.append(TimeSpent(measured, None, tuple(beside(measured, {}, {})), note))
            continue
        workload = workload_of(phase, batch, tokens, artifact.dtype)
        whole = Predictor(shape.sites, shape.operators, workload, target.clock, artifact.generation).predict(forms)
        by_site = {site.name: 1e-6 * whole.by_site[site.name] for site in shape.sites if site.name in whole.by_site}
        by_kind = {kind: 1e-6 * time for kind, time in whole.by_kind.items()}
        found.append(TimeSpent(measured, whole.milliseconds, tuple(beside(measured, by_site, by_kind))))
    return found


def workload_of(phase: str, batch: int, tokens: int, dtype: str) -> Workload:
    """What a graph of an export is run at, as a workload."""
    if phase == "decode":
        return Workload("decode", batch, 1, tokens, dtype)
    return Workload("prefill", batch, tokens, 0, dtype)


def this_or_why_not(artifact: Artifact) -> tuple[Target | None, str]:
    """This machine as calibrated for an export's provider and dtype, or None and the reason why not."""
    if artifact.quantize is not None:
        return None, f"no prediction: weights in {artifact.quantize}, and the calibration is of floats"
    place = Place(artifact.target, artifact.dtype, artifact.threads or 0)
    try:
        path = table_path(place)
    except BadInput as error:
        return None, f"no prediction: {error}"
    try:
        table = this_table(place, path)
    except BadInput as error:
        # The reason goes into reports and results, which travel: the table's name is enough there, not where it lies.
        return None, f"no prediction: {str(error).replace(str(path), path.name)}"
    return this_target(table), ""
