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
    """Where the score of a whole response comes from: a reward model, a Python function, an HTTP service, or the
    weighted sum of several; and what becomes of it before it is a reward.

    Attributes:
        function: `module:function`, plain or async. Called with `prompts` and `responses` (lists of text) and one
            keyword per column of the dataset (a list each); returns one number per response.
        url: of a service that is sent the same as JSON; see `engine.rollout.score_service`.
        model_weight, function_weight, url_weight: of the sum.
        timeout_s: how long a call of the function, or one attempt at the service, may take.
        retries: further attempts at a service that is down, slow or overloaded.
        on_error: what to do with responses that a function or service fails to score: `stop` the run, or `mask` them,
            which leaves them out of training and counts them.
        running_normalisation: shift and scale scores by the mean and deviation of all scores so far.
        clip: scores are then kept within +-clip.
        missing_eos_penalty: taken off the score of a response that was cut off.
        overlong_penalty, overlong_tokens: taken off the score of a long response, growing from 0 to `overlong_penalty`
            over the last `overlong_tokens` before `rollout.max_response_tokens`.
    """

    function: str | None = None
    url: str | None = None
    model_weight: float = 1.0
    function_weight: float = 1.0
    url_weight: float = 1.0
    timeout_s: float | None = None
    retries: int = 3
    on_error: Literal["stop", "mask"] = "stop"
    running_normalisation: bool = False
    clip: float | None = None
    missing_eos_penalty: float = 0.0
    overlong_penalty: float = 0.0
    overlong_tokens: int = 0

    def __post_init__(self):
        if (self.model_name_or_path, self.function, self.url) == (None, None, None):
            raise ValueError(
                "A run needs a source of scores: set --reward.model_name_or_path (a reward model), --reward.function "
                "(module:function) or --reward.url (a service); neither is set."
            )
        if self.function is not None and self.function.count(":") != 1:
            raise ValueError(f"reward.function={self.function!r} is not of the form module:function.")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"reward.url={self.url!r} does not begin with http:// or https://.")
        for name in ("retries", "missing_eos_penalty", "overlong_penalty", "overlong_tokens"):
            at_least(f"reward.{name}", getattr(self, name), 0)
        for name in ("timeout_s", "clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"reward.{name}={getattr(self, name)} must be above 0.")
        if (self.overlong_penalty > 0) != (self.overlong_tokens > 0):
            raise ValueError("reward.overlong_penalty and reward.overlong_tokens go together: set both, or neither.")


def resolved_dtype(dtype: str, *, on_gpu: bool) -> str:
    """`auto` spelled out."""
    return dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"
