"""The files of a run that gain lines as it goes on: one JSON object a line, each with its `iteration`."""

import json
import math
from pathlib import Path
from typing import Any

FILES = (
    *("metrics.jsonl", "samples.jsonl", "warnings.jsonl", "quarantine.jsonl"),
    *("evaluation.jsonl", "evaluation_samples.jsonl", "token_views.jsonl"),
)


def as_line(row: dict[str, Any]) -> str:
    """A row of a JSONL file. JSON has no NaN or inf: a number that is not finite is written as null."""
    plain = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def set_aside(path: Path) -> None:
    """Keep what an earlier run wrote under another name."""
    if path.exists() and path.stat().st_size > 0:  # a run that failed at its start leaves an empty one
        print(f"{path} is from an earlier run: kept as {path.stem}.previous{path.suffix}.", flush=True)
        path.replace(path.with_name(f"{path.stem}.previous{path.suffix}"))


def cut_after(path: Path, iteration: int) -> None:
    """Leave the lines of iterations up to this one; a line that broke off goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # not splitlines(): texts hold other ends of lines
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["iteration"] <= iteration:
            kept.append(f"{line}\n")
    half_done = path.with_name(path.name + ".partial")
    half_done.write_text("".join(kept), encoding="utf-8")
    half_done.replace(path)
