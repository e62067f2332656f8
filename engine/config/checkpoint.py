"""What a run leaves behind so that it can go on, and which of its settings may then be others."""

from dataclasses import asdict, dataclass
from typing import Any

from engine.config.checks import at_least


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run can be gone on with. A run that is asked to stop always saves.

    Attributes:
        every: iterations between checkpoints.
        minutes: between checkpoints, besides; null for none.
        keep: so many checkpoints stay, the newest ones.
    """

    every: int | None = None
    minutes: float | None = 30.0
    keep: int = 2

    def __post_init__(self):
        at_least("checkpoint.keep", self.keep, 1)
        if self.every is not None:
            at_least("checkpoint.every", self.every, 1)
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"checkpoint.minutes={self.minutes} must be above 0.")


# Settings that a run may go on with other values of: they decide where, how fast and how long, not what an iteration
# computes (but that a learning rate which falls with the iterations falls with the new number of them). Of models and
# data it is their content that has to be the same; it is compared by its digest.
FREE = {
    *("output_dir", "resume", "checkpoint", "tracking", "num_iterations", "num_train_epochs", "eval_every"),
    *("micro_batch_size", "logits_chunk_tokens", "rollout.micro_batch_size", "rollout.weights"),
    *("max_skipped_steps", "distributed_timeout_s", "kl_guard", "reward.timeout_s", "reward.retries", "reward.url"),
    *("evaluation.every", "evaluation.samples", "evaluation.metrics"),
    *("data.train", "data.eval", "data.chat_template", "pretraining.data.train", "pretraining.data.chat_template"),
}
FREE_OF_EVERY_ROLE = {"zero_stage", "ds_config", "gradient_checkpointing", "model_name_or_path"}


def settings_that_stay(config: Any) -> dict[str, Any]:
    """The settings, by their dotted names, that a run has to go on with as they were."""
    return {
        name: value
        for name, value in _flat(asdict(config))
        if name.split(".")[-1] not in FREE_OF_EVERY_ROLE and not any(f"{name}.".startswith(f"{free}.") for free in FREE)
    }


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in settings.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows
