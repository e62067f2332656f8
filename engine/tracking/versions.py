"""What a run is made with."""

import json
import platform
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "datasets", "wandb")
ROOT = Path(__file__).resolve().parents[2]


def write_versions(output_dir: Path, *, device: str, world_size: int) -> dict[str, Any]:
    """Write `versions.json`.

    Args:
        device: what the ranks run on, as "NVIDIA H100 80GB HBM3" or "cpu".

    Returns:
        What is in it.
    """
    found = {
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "engine": _version("rlhf-engine"),
        "git_commit": git_commit(ROOT),
        "device": device,
        "world_size": world_size,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    (output_dir / "versions.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def git_commit(root: Path) -> str | None:
    """The commit that is checked out in a folder; None where it is no checkout's root, or there is no git."""
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    top, commit = said
    return commit if Path(top).resolve() == root.resolve() else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
