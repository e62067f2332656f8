"""A healthy run to look at, and the ways in which `test_examination.py` spoils it."""

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import ranks
import tiny
import yaml

from engine.models.random_init import local_name

WORDS = ["what is 2 and 3?", "name three", "count up to four", "tell a story", "why so", "go on", "sing", "end"]
ROWS = [{"prompt": [{"role": "user", "content": words}], "answer": str(at)} for at, words in enumerate(WORDS)]
HELD_OUT = [{"prompt": [{"role": "user", "content": words}]} for words in ("add 1", "hum")]


class Run:
    """A PPO run's recipe, data and models in a folder; `settings()` are the flags to start it with."""

    def __init__(self, folder: Path, patch):
        self.folder, self.patch, self.given = folder, patch, {}
        for role, name in (("actor", tiny.LLAMA), ("reward", tiny.score_head(tiny.LLAMA))):
            shutil.copytree(local_name(name), folder / role)
        self.write_rows(ROWS)
        tiny.write_rows(folder / "held_out.jsonl", HELD_OUT)
        self.recipe: dict[str, Any] = dict(
            actor=dict(model_name_or_path=str(folder / "actor"), learning_rate=1e-3),
            reward=dict(model_name_or_path=str(folder / "reward"), function="tiny:share_of_small_letters"),
            data=dict(train=str(folder / "rows.jsonl"), eval=str(folder / "held_out.jsonl"), max_prompt_tokens=64),
            rollout=dict(max_response_tokens=12),
            evaluation=dict(metrics=["tiny:share_of_small_letters"]),
            tracking=dict(wandb="offline"),
            output_dir=str(folder / "out"),
            dtype="float32",
            num_iterations=3,
            rollout_batch_size=8,
            minibatch_size=4,
            micro_batch_size=2,
        )
        patch.setenv("MASTER_PORT", str(ranks.free_port()))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "ops"))
        for name in ("MASTER_ADDR", "RANK", "SLURM_PROCID", "NODE_RANK", "WANDB_API_KEY", "WANDB_BASE_URL", "CXX"):
            patch.delenv(name, raising=False)
        usual = {resource.RLIMIT_NOFILE: (1024, 4096)}
        patch.setattr("resource.getrlimit", lambda name: usual.get(name, (resource.RLIM_INFINITY,) * 2))

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        tiny.write_rows(self.folder / "rows.jsonl", rows)

    def append(self, line: str) -> None:
        """To the data."""
        with open(self.folder / "rows.jsonl", "a") as file:
            file.write(line + "\n")

    def set(self, **values: Any) -> None:
        """Settings of the recipe, those of a group as `data__train=...`."""
        for name, value in values.items():
            group, _, inner = name.partition("__")
            if inner:
                self.recipe.setdefault(group, {})[inner] = value
            else:
                self.recipe[name] = value

    def edit(self, file: str, **values: Any) -> None:
        """Fields of a JSON file of a model."""
        path = self.folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def copy_of(self, role: str, name: str) -> Path:
        """Another folder with a role's model."""
        return Path(shutil.copytree(self.folder / role, self.folder / name))

    def only_these_programs(self, *names: str, also: str = "") -> None:
        """PATH holds these, and the folders of `also`."""
        folder = self.folder / "bin"
        folder.mkdir()
        for name in names:
            (folder / name).symlink_to(shutil.which(name))
        self.patch.setenv("PATH", os.pathsep.join(filter(None, [str(folder), also])))

    def program(self, name: str, text: str) -> None:
        """A shell script that PATH finds first."""
        folder = self.folder / "scripts"
        folder.mkdir()
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
        self.patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def hostfile(self, text: str) -> None:
        (self.folder / "hosts").write_text(text)
        self.given["hostfile"] = str(self.folder / "hosts")

    def settings(self) -> list[str]:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return ["--config", str(path)]
