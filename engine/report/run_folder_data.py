"""What a page says of one run: its folder as one JSON object. A missing or broken file costs its own section only."""

import json
from pathlib import Path
from typing import Any

import yaml

from engine.report.rows import Rows, curves, plain, rows_of, thinned

# Files whose rows are shown one iteration at a time.
LOOKED_THROUGH = ("samples", "evaluation_samples", "token_views")


def run_folder_data(folder: Path, name: str) -> dict[str, Any]:
    """The object of a run's folder; `assets/report.js` reads it.

    Args:
        name: what the run is called in the page.
    """
    notes: list[str] = []
    rows = {file: _noted(folder / f"{file}.jsonl", notes) for file in ("metrics", "evaluation", *LOOKED_THROUGH)}
    config_text, settings = _config(folder / "config.yaml", notes)
    measured = {file: curves(rows[file]) for file in ("metrics", "evaluation")}
    if (per_point := measured["metrics"]["rows_per_point"]) > 1:
        notes.append(f"A point of a curve is the mean of {per_point} neighbouring rows of metrics.jsonl.")
    return {
        "name": name,
        **measured,
        **{file: thinned(rows[file]) for file in LOOKED_THROUGH},
        "warnings": _noted(folder / "warnings.jsonl", notes),
        "quarantined": len(_noted(folder / "quarantine.jsonl", notes)),
        "memory_plan": _object(folder / "memory_plan.json", notes),
        "versions": _object(folder / "versions.json", notes),
        "config": config_text,
        "settings": settings,
        "notes": notes,
    }


def _noted(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of a file; what could not be read is noted."""
    try:
        found = rows_of(path)
    except OSError as error:
        found = Rows([], 0)
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
    if found.unreadable:
        lines = "1 line is" if found.unreadable == 1 else f"{found.unreadable} lines are"
        notes.append(f"{path.name}: {lines} no JSON object with an iteration, and left out.")
    return found.rows


def _object(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file; None without one."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}.")
        return None
    return plain(found) if isinstance(found, dict) else None


def _config(path: Path, notes: list[str]) -> tuple[str | None, dict[str, str]]:
    """The text of a run's config.yaml, and its settings by dotted names."""
    if not path.is_file():
        return None, {}
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {error}.")
        return None, {}
    return text, dict(_dotted(found)) if isinstance(found, dict) else {}


def _dotted(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(`actor.learning_rate`, "0.001") for each setting."""
    found = []
    for name, value in settings.items():
        if isinstance(value, dict):
            found += _dotted(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", "" if value is None else str(value)))
    return found
