"""The run's W&B run, on global rank 0."""

from pathlib import Path
from typing import Any

from engine.config import TrackingConfig


def wandb_run(output_dir: Path, config: TrackingConfig, run_config: dict[str, Any], wandb_id: str | None):
    """Begin it, or go on with the one of this id; None where W&B is disabled or does not start."""
    if config.wandb == "disabled":
        return None
    try:
        import wandb

        run = wandb.init(
            project=config.project,
            name=config.run_name,
            dir=str(output_dir),
            config=run_config,
            mode=config.wandb,
            id=wandb_id,
            resume=None if wandb_id is None else "allow",
            settings=wandb.Settings(silent=True),
        )
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        return run
    except Exception as error:  # the network, the disk, the service: none may end the run
        print(f"W&B did not start ({type(error).__name__}: {error}); going on without it.", flush=True)
        return None
