"""Where DeepSpeed's compiled operators are kept, and the files there that tell how far a build has come.

Knows neither torch nor deepspeed, so that it can be asked where they do not import.
"""

import os
import sys
from pathlib import Path

BUILD_QUEUE = "rlhf_engine.flock"  # in the folder; held by the process that builds, see `comm`
FINISHED, LOCK = "finished", "lock"  # in an operator's folder: ours, and torch's while it builds


def folder_of_builds(torch_version: str, deepspeed_version: str) -> Path:
    """TORCH_EXTENSIONS_DIR, or a folder of our own: builds for other versions are of no use."""
    built_for = f"py{sys.version_info.major}{sys.version_info.minor}_torch{torch_version}_ds{deepspeed_version}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache / "rlhf_engine" / "ops" / built_for))
