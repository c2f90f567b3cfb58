"""The what-if analysis as one HTML file: every number, style and script inside it, nothing to fetch.

The page only shows. Each stop of its slider is a point of the analysis, found by its budget's text; it never
interpolates, and the numbers it shows are the numbers of `WhatIf.to_json()`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import BadInput

TEMPLATES = Path(__file__).parent / "assets" / "whatif"
SCHEMA = 1
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def render_page(data: Mapping[str, Any]) -> str:
    """The whole HTML text of the page that shows `data`, the JSON values of a what-if analysis (schema 1).

    Raises:
        BadInput: if the schema is another one, a selection has no point or too many, a point has not one form per
            site, a number is not finite, the name of the model is not text that UTF-8 can write, or plotly is not
            installed.
    """
    check_analysis(data)
    try:
        data["model"].encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"the name of the model, {data['model']!r}, is no text that a file can hold ({error.reason}); "
            "give the model another name"
        ) from error
    parts = {
        "title": html.escape(f"What if: {data['model']}"),
        "css": _template("page.css"),
        "analysis": embed_json(share_intensities(data)),
        "plotly": _plotly_script(),
        "script": _template("page.js"),
    }
    # One pass over the template alone: a model may be named "{{script}}".
    return PLACEHOLDER.sub(lambda match: parts[match[1]], _template("page.html"))


def check_analysis(data: Mapping[str, Any]) -> None:
    """Raise BadInput unless every selection that the page offers has exactly one point, with one form per site."""
    if data.get("schema") != SCHEMA:
        raise BadInput(
            f"the analysis has schema {data.get('schema')!r}, this page shows schema {SCHEMA}; "
            "run the analysis again with this version"
        )
    offered = {
        (device["name"], workload["name"], budget)
        for device in data["devices"]
        for workload in data["workloads"]
        for budget in data["budgets"]
    }
    if not offered:
        raise BadInput(
            f"the analysis has {len(data['devices'])} devices, {len(data['workloads'])} workloads and "
            f"{len(data['budgets'])} budgets; a page needs at least one of each"
        )
    solved = [(point["device"], point["workload"], point["budget"]) for point in data["points"]]
    if len(solved) != len(offered) or set(solved) != offered:
        odd = sorted(offered.symmetric_difference(solved)) or [s for s in solved if solved.count(s) > 1]
        raise BadInput(
            f"the analysis has {len(solved)} points for {len(offered)} selections of device, workload and budget; "
            f"first that does not match: {odd[0]}; give each selection one point"
        )
    for point in data["points"]:
        _check_forms(point, len(data["sites"]))


def _check_forms(point: Mapping[str, Any], sites: int) -> None:
    for field in ("forms", "intensity"):
        values = point[field]
        if point["feasible"] and values is not None and len(values) != sites:
            raise BadInput(
                f"{point['device']}, {point['workload']}, budget {point['budget']}: {len(values)} entries in "
                f"{field!r} for {sites} sites; give one per site, null for an excluded one"
            )


def share_intensities(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same analysis with each distinct `intensity` entry written once, in `intensities`, and indices to it.

    Layers of one shape and rank have equal entries, so this is what keeps the file of a 70B shape small. The page
    puts the entries back before anything reads them.
    """
    numbers: dict[tuple[float | str, ...], int] = {}

    def index(entry: list[float | str] | None) -> int | None:
        return None if entry is None else numbers.setdefault(tuple(entry), len(numbers))

    points = [
        {**point, "intensity": point["intensity"] and [index(entry) for entry in point["intensity"]]}
        for point in data["points"]
    ]
    return {**data, "points": points, "intensities": [list(entry) for entry in numbers]}


def embed_json(values: Any) -> str:
    """JSON that may stand inside a script element: no `<` is left that could end it.

    Raises:
        BadInput: if a number is not finite, which JSON cannot say.
    """
    try:
        text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise BadInput(f"the analysis cannot be written as JSON ({error}); unknown is null, never nan") from error
    return text.replace("<", "\\u003c")


def _plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise BadInput(
            "the page draws with plotly, which is not installed; install it with `pip install plotly`, "
            "or ask for JSON or CSV instead"
        ) from error
    script: str = get_plotlyjs()
    return script


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
