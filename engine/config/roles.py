"""One model of a run: where it comes from, how it is sharded, and how it is trained if it is."""

from dataclasses import dataclass
from typing import Literal

from engine.config.checks import at_least


@dataclass(frozen=True, kw_only=True)
class FrozenRoleConfig:
    """A model without an optimizer (ref, reward).

    Attributes:
        model_name_or_path: a Hugging Face folder, a hub name, or `random://llama?hidden_size=64` for a fresh model.
        zero_stage: 0 to 3, this role's own; the run's `zero_stage` when not given. Without gradients and optimizer
            there is nothing for stages 1 and 2 to shard: they replicate the weights, as stage 0 does.
        ds_config: a DeepSpeed JSON file in place of `zero_stage`.
    """

    model_name_or_path: str | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    ds_config: str | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule, and what the backward pass keeps.

    Attributes:
        learning_rate: the peak; reached after `warmup_steps` optimizer steps and then changed by `lr_scheduler`.
        max_grad_norm: gradients are scaled down to this global norm; 0 switches clipping off.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
    """

    learning_rate: float = 1e-6
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False

    def __post_init__(self):
        at_least("learning_rate", self.learning_rate, 0)
        at_least("warmup_steps", self.warmup_steps, 0)
        at_least("max_grad_norm", self.max_grad_norm, 0)
        at_least("weight_decay", self.weight_decay, 0)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class TrainedRoleConfig(OptimizerConfig, FrozenRoleConfig):
    """A model with an optimizer (actor, critic)."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig(TrainedRoleConfig):
    """The critic learns faster than the actor unless told otherwise."""

    learning_rate: float = 5e-6


@dataclass(frozen=True, kw_only=True)
class RewardConfig(FrozenRoleConfig):
    """Where the score of a whole response comes from: a reward model, or a Python function.

    Attributes:
        function: `module:function`. Called with `prompts` and `responses` (lists of text) and one keyword per column
            of the dataset (a list each); returns one number per response.
    """

    function: str | None = None

    def __post_init__(self):
        if (self.function is None) == (self.model_name_or_path is None):
            raise ValueError(
                "A run needs one source of scores: set --reward.model_name_or_path (a reward model) or "
                "--reward.function (module:function), "
                + ("not both." if self.function is not None else "neither is set.")
            )
        if self.function is not None and self.function.count(":") != 1:
            raise ValueError(f"reward.function={self.function!r} is not of the form module:function.")


def resolved_dtype(dtype: str, *, on_gpu: bool) -> str:
    """`auto` spelled out."""
    return dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"
