"""A tiny PPO run by its launch script, and what can be compared of it."""

import hashlib
import json
import re
from pathlib import Path

import tiny
import yaml
from processes import Ranks

from engine.config import as_dict

UNCOMPARABLE = ("time/", "speed/", "memory/")
NUM_ITERATIONS = 4
FLAGS = ("--checkpoint.every", "1")


def recipe(folder: Path, **overrides) -> Path:
    """The file of a run: 8 responses an iteration and 3 in every other, 2 epochs of 2 steps and of one, an average, an
    adaptive coefficient.
    """
    given = dict(
        num_iterations=NUM_ITERATIONS,
        ema_decay=0.9,
        kl_controller="ziegler",
        kl_horizon=50.0,
        prompts=[f"{word} " * (1 + number % 3) for number, word in enumerate("abcdefghijk")],
        tracking__samples_per_iteration=8,
    )
    config = tiny.ppo_config(folder, **given | overrides)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_dict(config)))
    return path


def start(recipe: Path, out: Path, *flags: str, **given) -> Ranks:
    """The run, into `out`; its logs lie beside."""
    logs = out.with_name(f"{out.name}_logs_{len(list(out.parent.glob(f'{out.name}_logs_*')))}")
    command = ("launch/train_ppo.py", "--config", str(recipe), "--output_dir", str(out), *FLAGS, *flags)
    return Ranks(logs, *command, **given)


def finish(recipe: Path, out: Path, *flags: str) -> str:
    """Run to the end, where there is one; what rank 0 said."""
    with start(recipe, out, *flags) as run:
        codes = run.codes()
        assert codes == [0, 0], run.said(0)[-3000:] + run.said(1)[-3000:]
        return run.said(0)


def metrics(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: v for name, v in line.items() if not name.startswith(UNCOMPARABLE)} for line in lines]


def outcome(out: Path) -> dict:
    """All that a run leaves, but for times."""
    weights = {
        name: hashlib.sha256((out / name / "model.safetensors").read_bytes()).hexdigest()
        for name in ("actor", "actor_ema", "critic")
    }
    return {"metrics": metrics(out), "samples": (out / "samples.jsonl").read_text(), **weights}


def recovered(recipe: Path, out: Path, whole: dict, tally, *flags: str) -> str:
    """Go on with a run to its end, and count what it lost against the one that was never interrupted.

    Returns:
        What rank 0 said.

    Raises:
        AssertionError: the two are not the same.
    """
    logged = len(metrics(out))
    said = finish(recipe, out, "--resume", "auto", *flags)
    after = outcome(out)
    (began,) = re.findall(r"Going on from .*iteration_0*(\d+)\.$", said, flags=re.MULTILINE) or ["0"]
    lost = set(whole["samples"].splitlines()) - set(after["samples"].splitlines())
    tally(recovered=after == whole, iterations_lost=max(0, logged - int(began)), rows_lost=len(lost))
    assert after == whole
    return said
