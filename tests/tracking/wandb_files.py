"""What an offline `.wandb` file holds, by wandb's own reader."""

import json
import subprocess
from pathlib import Path
from typing import Any

from wandb.util import get_core_path


def records(file: Path) -> list[dict[str, Any]]:
    """Its records, in order: each with its `type`, and under that name what it says."""
    command = [get_core_path(), "leet", "inspect", "-no-observability", "-json", "-run-file", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in said.splitlines()]


def of_type(file: Path, kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records(file) if record["type"] == kind]


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, call by call, under dotted names."""
    return [item["item"] for item in of_type(file, "history")]


def config(file: Path) -> dict[str, Any]:
    """The run's, all updates together."""
    return {name: value for run in of_type(file, "run") for name, value in run["config"]["update"].items()}
