"""The files of a run that gain lines as it goes on: one JSON object a line, each with its `iteration`.

metrics.jsonl             the iteration's metrics, by the names of `engine.tracking`;
                          after the first of a planned run also memory/planned_gib
samples.jsonl             prompt, response, score, kl, length: a few of an iteration's responses
evaluation.jsonl          the held-out prompts' metrics; iteration 0 is before training
evaluation_samples.jsonl  as samples.jsonl, with initial_response and initial_score
token_views.jsonl         one response token by token
warnings.jsonl            warning, sentence: what looks wrong in an iteration's numbers
quarantine.jsonl          responses with which a step could not be taken
"""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

FILES = (
    *("metrics.jsonl", "samples.jsonl", "warnings.jsonl", "quarantine.jsonl"),
    *("evaluation.jsonl", "evaluation_samples.jsonl", "token_views.jsonl"),
)


def as_line(row: dict[str, Any]) -> str:
    """A row of a JSONL file. JSON has no NaN or inf: a number that is not finite is written as null."""
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def set_aside(path: Path) -> None:
    """Keep what an earlier run wrote under another name."""
    if path.exists() and path.stat().st_size > 0:  # a run that failed at its start leaves an empty one
        print(f"{path} is from an earlier run: kept as {path.stem}.previous{path.suffix}.", flush=True)
        path.replace(path.with_name(f"{path.stem}.previous{path.suffix}"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole, also of a file that ends within a character; none where there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text("utf-8", "replace").split("\n"):  # not splitlines(): texts hold other ends of lines
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def cut_after(path: Path, iteration: int) -> None:
    """Leave the lines of iterations up to this one; a line that broke off goes too."""
    if not path.exists():
        return
    kept = [as_line(row) for row in rows_of(path) if row["iteration"] <= iteration]
    half_done = path.with_name(path.name + ".partial")
    half_done.write_text("".join(kept), encoding="utf-8")
    half_done.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
