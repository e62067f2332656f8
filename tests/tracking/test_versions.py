"""versions.py: what a run says it was made with."""

import json
import platform
import subprocess
from datetime import datetime
from importlib.metadata import version

from engine.tracking.versions import git_commit, write_versions


def test_versions_are_written(tmp_path):
    before = datetime.now().astimezone().replace(microsecond=0)
    found = write_versions(tmp_path, device="NVIDIA H100 80GB HBM3", world_size=2)
    assert json.loads((tmp_path / "versions.json").read_text()) == found
    assert found["python"] == platform.python_version()
    for name in ("torch", "deepspeed", "transformers", "peft", "datasets", "wandb"):
        assert found[name] == version(name)
    assert (found["device"], found["world_size"]) == ("NVIDIA H100 80GB HBM3", 2)
    assert before <= datetime.fromisoformat(found["started"]) <= datetime.now().astimezone()
    assert set(found) - {"python", "torch", "deepspeed", "transformers", "peft", "datasets", "wandb"} == {
        *("engine", "git_commit", "device", "world_size", "started")
    }


def test_the_commit_is_that_of_a_checkout_and_of_nothing_around_it(tmp_path):
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True).stdout

    assert git_commit(tmp_path) is None
    git("init", "-q")
    assert git_commit(tmp_path) is None  # there is no commit yet
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD").strip()
    (tmp_path / "inside").mkdir()
    assert git_commit(tmp_path / "inside") is None
