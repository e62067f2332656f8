"""One model of a run: where it comes from, how it is sharded, and how it is trained if it is."""

from dataclasses import dataclass
from typing import Any, Literal

from engine.config.checks import at_least
from engine.config.secrets import without_secrets


@dataclass(frozen=True, kw_only=True)
class FrozenRoleConfig:
    """A model without an optimizer (ref, reward).

    Attributes:
        model_name_or_path: a Hugging Face folder, a hub name, or `random://llama?hidden_size=64` for a fresh model.
        zero_stage: 0 to 3, this role's own; the run's `zero_stage` when not given. Without gradients and optimizer
            there is nothing for stages 1 and 2 to shard: they replicate the weights, as stage 0 does.
        ds_config: a DeepSpeed JSON file in place of `zero_stage`.
        quantization: `nf4` keeps the weights of the linear layers in 4 bits and computes in the run's dtype (Dettmers
            et al. 2023, https://arxiv.org/abs/2305.14314); a model that is trained then needs `lora`.
    """

    model_name_or_path: str | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    ds_config: str | None = None
    quantization: Literal["nf4"] | None = None


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """A low-rank adapter, trained in place of the weights.

        W + alpha / r * B A        (Hu et al. 2021, https://arxiv.org/abs/2106.09685)

    Attributes:
        r: the adapter's rank; 0 switches it off.
        alpha: the adapter is scaled by alpha / r.
        dropout: of what goes into the adapter, in training. Every rank draws its own, so that with dropout a run's
            numbers depend on how many ranks there are.
        target_modules: names of the linear layers to adapt, as `q_proj`; all of the backbone's when not given. A scalar
            head is trained as a whole, beside the adapter.
        learning_rate: the adapter's; the role's when not given. A scalar head keeps the role's.
        export: `merged` writes a plain model, which the next stage can start from; `adapter` a PEFT folder.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    target_modules: list[str] | None = None
    learning_rate: float | None = None
    export: Literal["merged", "adapter"] = "merged"

    def __post_init__(self):
        at_least("lora.r", self.r, 0)
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha} must be above 0: the adapter would do nothing.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be at least 0 and below 1.")
        if self.learning_rate is not None:
            at_least("lora.learning_rate", self.learning_rate, 0)
        if self.target_modules == []:
            raise ValueError("lora.target_modules is empty. Leave it out to adapt every linear layer of the backbone.")


@dataclass(frozen=True, kw_only=True)
class SteadyLoRAConfig(LoRAConfig):
    """A low-rank adapter without dropout, trained in place of the weights.

    PPO compares log-probabilities and values of the same weights taken at different moments, and noise between them
    would be read as a change of policy.
    """

    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.dropout > 0:
            raise ValueError(
                f"lora.dropout={self.dropout}: PPO compares log-probabilities and values of the same weights taken at "
                f"different moments, and dropout would make them differ. Set it to 0."
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule, and what the backward pass keeps.

    Attributes:
        learning_rate: the peak; reached after `warmup_steps` optimizer steps and then changed by `lr_scheduler`.
        lr_scheduler: after the warm-up: `constant`, or down to 0 at the run's end, `linear` or as a `cosine`.
        warmup_steps: optimizer steps in which the learning rate rises from 0.
        weight_decay: of matrices, as AdamW has it; vectors (norms, biases) have none.
        adam_beta1: how much of its past the mean of gradients keeps in a step.
        adam_beta2: the same of the mean of their squares.
        adam_epsilon: added to the root of the second moment. Where a gradient is as small as this, rounding decides how
            far a weight moves; PPO is often run with 1e-5 (Huang et al. 2024, https://arxiv.org/abs/2403.17031).
        max_grad_norm: gradients are scaled down to this global norm; 0 switches clipping off.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        lora: train an adapter in place of the weights; `lora: {}` takes the defaults.
    """

    learning_rate: float = 1e-6
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    lora: LoRAConfig | None = None

    def __post_init__(self):
        at_least("learning_rate", self.learning_rate, 0)
        at_least("warmup_steps", self.warmup_steps, 0)
        at_least("max_grad_norm", self.max_grad_norm, 0)
        at_least("weight_decay", self.weight_decay, 0)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        if not self.adam_epsilon > 0:
            raise ValueError(f"adam_epsilon={self.adam_epsilon} must be above 0.")

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained in place of the weights."""
        return self.lora is not None and self.lora.r > 0

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The adapter's form, as `engine.models.lora.add_adapter` takes it; None without one."""
        fields = ("r", "alpha", "dropout", "target_modules")
        return {name: getattr(self.lora, name) for name in fields} if self.has_adapter else None

    @property
    def adapter_learning_rate(self) -> float:
        """After the default."""
        own = self.lora.learning_rate if self.has_adapter else None
        return self.learning_rate if own is None else own

    @property
    def export_form(self) -> Literal["merged", "adapter"]:
        """What is written at the end; without an adapter, `merged` is the model itself."""
        return self.lora.export if self.has_adapter else "merged"


@dataclass(frozen=True, kw_only=True)
class TrainedRoleConfig(OptimizerConfig, FrozenRoleConfig):
    """A model with an optimizer (actor, critic)."""

    lora: SteadyLoRAConfig | None = None


@dataclass(frozen=True, kw_only=True)
class CriticConfig(TrainedRoleConfig):
    """The critic, which learns faster than the actor unless told otherwise."""

    learning_rate: float = 5e-6


@dataclass(frozen=True, kw_only=True)
class RewardConfig(FrozenRoleConfig):
    """Where the score of a whole response comes from, and what becomes of it before it is a reward.

    A reward model, a Python function, an HTTP service, or the weighted sum of several.

    Attributes:
        function: `module:function`, plain or async. Called with `prompts` and `responses` (lists of text) and one
            keyword per column of the dataset (a list each); returns one number per response. In a run with an
            environment there is one more, `conversations`: of each episode all messages, those of the prompt too;
            `responses` are then the actor's turns, joined by newlines.
        url: of a service that is sent the same as JSON; see `engine.rollout.score_service`.
        model_weight: of the reward model's score in the sum.
        function_weight: of the function's.
        url_weight: of the service's.
        timeout_s: how long a call of the function, or one attempt at the service, may take.
        retries: further attempts at a service that is down, slow or overloaded.
        on_error: what to do with responses that a function or service fails to score: `stop` the run, or `mask` them,
            which leaves them out of training and counts them.
        running_normalisation: shift and scale scores by the mean and deviation of all scores so far.
        clip: scores are then kept within +-clip.
        missing_eos_penalty: taken off the score of a response that was cut off.
        overlong_penalty: taken off the score of a long response, growing from 0 to this over the last
            `overlong_tokens` before `rollout.max_response_tokens`.
        overlong_tokens: over how many tokens the penalty grows.
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
            raise ValueError(f"reward.url={without_secrets(self.url)} does not begin with http:// or https://.")
        for name in ("retries", "missing_eos_penalty", "overlong_penalty", "overlong_tokens"):
            at_least(f"reward.{name}", getattr(self, name), 0)
        for name in ("timeout_s", "clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"reward.{name}={getattr(self, name)} must be above 0.")
        if (self.overlong_penalty > 0) != (self.overlong_tokens > 0):
            raise ValueError("reward.overlong_penalty and reward.overlong_tokens go together: set both, or neither.")


def resolved_dtype(dtype: str, *, on_gpu: bool) -> str:
    """`auto` spelled out.

    Raises:
        ValueError: float16 on a CPU, where DeepSpeed does not train in it.
    """
    if dtype == "float16" and not on_gpu:
        raise ValueError("dtype=float16 needs a GPU: on a CPU take float32 or bfloat16.")
    return dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"


def check_trainable(role: str, model: FrozenRoleConfig, optimizer: OptimizerConfig) -> None:
    """
    Args:
        role: the prefix of the model's flags.

    Raises:
        ValueError: weights of 4 bits would have to be trained.
    """
    if model.quantization is not None and not optimizer.has_adapter:
        lora = f"{role}.lora.r" if isinstance(optimizer, FrozenRoleConfig) else "lora.r"
        raise ValueError(
            f"{role}.quantization={model.quantization}: weights of 4 bits cannot be trained. Train an adapter on top "
            f"of them, --{lora} 8, or leave {role}.quantization out."
        )


def check_ref_is_own(ref: FrozenRoleConfig, role: str) -> None:
    """
    Args:
        role: whose model, without its adapter, is the ref unless another is named.

    Raises:
        ValueError: a setting of a ref that is not built.
    """
    for name in ("zero_stage", "ds_config", "quantization"):
        if getattr(ref, name) is not None:
            raise ValueError(
                f"The ref is the {role} with its adapter switched off, so ref.{name} does nothing: leave it out, or "
                f"name a ref of its own with --ref.model_name_or_path."
            )
