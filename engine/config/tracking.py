"""What a run writes down."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is written down. `metrics.jsonl` and `samples.jsonl` always are.

    Attributes:
        wandb: `offline` needs no account (`wandb sync OUT/wandb/offline-run-*` uploads later); without a key `online`
            is `offline`.
        project: the one in W&B that the run belongs to.
        run_name: in W&B, which makes one up when not given.
        samples_per_iteration: rows of `samples.jsonl` per iteration.
    """

    wandb: Literal["disabled", "offline", "online"] = "offline"
    project: str = "rlhf-engine"
    run_name: str | None = None
    samples_per_iteration: int = 4
