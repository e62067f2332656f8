"""What is said of a run when it ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import DPOConfig, PPOConfig, RewardModelConfig, SFTConfig, SupervisedConfig
from engine.tracking.files import rows_of

STAGES = {PPOConfig: "PPO", SFTConfig: "SFT", RewardModelConfig: "reward-model training", DPOConfig: "DPO"}
LESS_TELLING = ("eval/score_std", "eval/kl_ref_mean", "eval/length_mean", "eval/eos_fraction")
PLAN = "memory_plan.json"


def summary(
    config: PPOConfig | SupervisedConfig, *, done: int, of: int, shown: Sequence[str], wandb: str | None
) -> str:
    """What was run, what became of its metrics, and where everything is: from what the run has written.

    Args:
        done, of: iterations that are over, and that the run is to have.
        shown: the metrics to tell the first and the last value of; a single value stands alone.
        wandb: how to see the W&B run.
    """
    out = Path(config.output_dir)
    metrics, evaluation = rows_of(out / "metrics.jsonl"), rows_of(out / "evaluation.jsonl")
    unit = "iterations" if isinstance(config, PPOConfig) else "steps"
    trained = next(iter(config.models.values()))
    if done < of:
        began = f"Stopped after {done} of {of} {unit} of {STAGES[type(config)]} on {trained}"
    else:
        began = f"Done: {done} {unit} of {STAGES[type(config)]} on {trained}"
    told = {name: _first_to_last(metrics, name) for name in shown}
    evaluated = [name for name in (evaluation[-1] if evaluation else {}) if name not in ("iteration", *LESS_TELLING)]
    told |= {name: _first_to_last(evaluation, name) for name in evaluated}
    warnings = rows_of(out / "warnings.jsonl")
    told["warnings"] = f"{len(warnings)}, in {out}/warnings.jsonl" if warnings else "none"
    if done < of:
        told["go on"] = "the same command with --resume auto"
    else:
        told["models"] = ", ".join(str(folder) for folder in _exported(out))
    told["metrics"] = f"{out}/metrics.jsonl" + (f", {out}/samples.jsonl" if (out / "samples.jsonl").exists() else "")
    told["report"] = f"python launch/report.py {out}"
    told["W&B"] = wandb
    return "\n".join([began, *(f"  {name:<22}{said}" for name, said in told.items() if said)])


def written_plan(output_dir: Path) -> dict[str, Any] | None:
    """What the run was predicted to need: `memory_plan.json`, where there is one and it can be read."""
    try:
        plan = json.loads((output_dir / PLAN).read_text())
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and isinstance(plan.get("peak_bytes"), int | float) else None


def remove_plan(output_dir: Path) -> None:
    """That of an earlier run, for one that makes none."""
    (output_dir / PLAN).unlink(missing_ok=True)


def _first_to_last(rows: list[dict[str, Any]], name: str) -> str | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return " -> ".join(f"{value:.4g}" for value in (values[:1] + values[1:][-1:])) or None


def _exported(out: Path) -> list[Path]:
    """Folders that a model can be loaded from."""
    return sorted({path.parent for name in ("config.json", "adapter_config.json") for path in out.glob(f"*/{name}")})
