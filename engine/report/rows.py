"""Rows of a run's JSONL files, cut down to what a page can hold."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_POINTS = 20_000  # of a curve
MOST_CHARACTERS = 3_000_000  # of one file's rows in the page
LONGEST_TEXT = 20_000  # characters


@dataclass(frozen=True)
class Rows:
    """A file's rows, and how many of its lines are none."""

    rows: list[dict[str, Any]]
    unreadable: int


def rows_of(path: Path) -> Rows:
    """The rows of a JSONL file that have an `iteration`; the last line may be half written. A file that is not there
    has none.
    """
    if not path.is_file():
        return Rows([], 0)
    rows, unreadable = [], 0
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in filter(str.strip, file):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                rows.append(plain(row))
            else:
                unreadable += 1
    return Rows(rows, unreadable)


def plain(value: Any) -> Any:
    """The value as JSON can say it in few characters: six digits of a number, null for one that is not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{value[:LONGEST_TEXT]} … ({len(value):,} characters in all)"
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value


def curves(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of rows as columns: {"x": iterations, "columns": {name: {"y": numbers}}, "rows_per_point": n}.

    A column that some rows lack has an "x" of its own. null is a number that was not finite: a gap. Of rows with the
    same iteration the last counts. Beyond MOST_POINTS rows a point is the mean of neighbours.
    """
    by_iteration = {row["iteration"]: row for row in rows}
    ordered = [by_iteration[iteration] for iteration in sorted(by_iteration)]
    rows_per_point = max(1, math.ceil(len(ordered) / MOST_POINTS))
    if rows_per_point > 1:
        ordered = [_mean(ordered[i : i + rows_per_point]) for i in range(0, len(ordered), rows_per_point)]
    columns = {}
    for name in dict.fromkeys(name for row in ordered for name in row if name != "iteration"):
        points = [(row["iteration"], row[name]) for row in ordered if name in row]
        if not all(y is None or (isinstance(y, (int, float)) and not isinstance(y, bool)) for _, y in points):
            continue
        columns[name] = {"y": [y for _, y in points]}
        if len(points) < len(ordered):
            columns[name]["x"] = [x for x, _ in points]
    return {"x": [row["iteration"] for row in ordered], "columns": columns, "rows_per_point": rows_per_point}


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for several: means of what is finite, at the last one's iteration."""
    mean: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        finite = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
        mean[name] = plain(sum(finite) / len(finite)) if finite else None
    return mean | {"iteration": rows[-1]["iteration"]}


def thinned(rows: list[dict[str, Any]], most_characters: int = MOST_CHARACTERS) -> dict[str, Any]:
    """Rows of evenly spread iterations, first and last among them, that take up about `most_characters`:
    {"rows": [...], "iterations": of how many}.
    """
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["iteration"], []).append(row)
    iterations = sorted(groups)
    size = sum(len(json.dumps(row)) for row in rows)
    if size > most_characters:
        kept = max(2, len(iterations) * most_characters // size)
        last = len(iterations) - 1
        iterations = [iterations[i] for i in sorted({round(k * last / (kept - 1)) for k in range(kept)})]
    return {"rows": [row for iteration in iterations for row in groups[iteration]], "iterations": len(groups)}
