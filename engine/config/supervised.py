"""The settings of the stages that learn from given responses: SFT, reward model, DPO."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.config.checkpoint import CheckpointConfig
from engine.config.checks import at_least, ds_config_of, next_multiple
from engine.config.data import DemonstrationDataConfig, PreferenceDataConfig, SupervisedDataConfig
from engine.config.roles import FrozenRoleConfig, OptimizerConfig, check_ref_is_own, check_trainable
from engine.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(OptimizerConfig):
    """What the three stages have in common. An iteration is one optimizer step.

    Attributes:
        data: what is learned from, and what is held out.
        tracking: what is written down.
        checkpoint: when a run can be gone on with.
        output_dir: the run's folder; made where it is missing.
        resume: `auto` goes on from the newest checkpoint in `output_dir`, or begins where there is none; `never`
            removes what checkpoints there are. A run is not begun beside them when not given.
        seed: of what the run draws: fresh heads and adapters, what is held out, the order of examples, dropout. A
            `random://` model has its own, `&seed=`.
        dtype: of weights and what is computed with them; `auto` is bfloat16 on a GPU and float32 on a CPU.
        zero_stage: of every role that does not name its own; 2 when not given.
        ds_config: a DeepSpeed JSON file in place of `zero_stage`.
        num_train_epochs: times through the data; `num_iterations` is a number of optimizer steps in its place.
        num_iterations: optimizer steps; as many as `num_train_epochs` come to when not given.
        minibatch_size: examples (demonstrations, pairs) per optimizer step, all GPUs.
        micro_batch_size: examples of full length per forward pass, one GPU. Shorter ones share a forward pass as
            long as they stay within the same number of tokens; gradient accumulation is derived.
        packing: lay the examples of a forward pass one after another into one row instead of padding each to the
            longest. No example sees another.
        eval_every: optimizer steps between evaluations; there is one before the first and one after the last step.
        logits_chunk_tokens: so many tokens are projected to the vocabulary at a time.
        max_skipped_steps: so many steps skipped in a row for numbers that are not finite stop the run.
        distributed_timeout_s: a rank that waits longer for the others gives up.
    """

    data: SupervisedDataConfig
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    output_dir: str
    resume: Literal["auto", "never"] | None = None
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] | None = None
    ds_config: str | None = None
    num_train_epochs: int = 1
    num_iterations: int | None = None
    minibatch_size: int = 32
    micro_batch_size: int = 4
    packing: bool = False
    eval_every: int | None = None

    learning_rate: float = 1e-5
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"

    logits_chunk_tokens: int = 1024
    max_skipped_steps: int = 16
    distributed_timeout_s: int = 1800

    def __post_init__(self):
        super().__post_init__()
        sizes = ("minibatch_size", "micro_batch_size", "num_train_epochs", "logits_chunk_tokens")
        for name in (*sizes, "max_skipped_steps", "distributed_timeout_s"):
            at_least(name, getattr(self, name), 1)
        for name in ("num_iterations", "eval_every"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)

    def check_world_size(self, world_size: int) -> None:
        """Refuse sizes that this many ranks cannot share out evenly.

        Raises:
            ValueError: names a size that works.
        """
        unit = self.micro_batch_size * world_size
        if self.minibatch_size % unit:
            raise ValueError(
                f"minibatch_size={self.minibatch_size} is not a multiple of micro_batch_size x world_size = "
                f"{self.micro_batch_size} x {world_size} = {unit}. "
                f"Try --minibatch_size {next_multiple(self.minibatch_size, unit)}."
            )

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one forward pass: `micro_batch_size` sequences of full length."""
        return self.micro_batch_size * self.data.max_length


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """One run of supervised fine-tuning.

    Attributes:
        model: the language model to start from.
        loss_on: the tokens that are learned: of the `response`, or of the whole `sequence`.
    """

    model: FrozenRoleConfig
    data: DemonstrationDataConfig
    loss_on: Literal["response", "sequence"] = "response"

    def __post_init__(self):
        super().__post_init__()
        check_named("model", self.model)
        check_trainable("model", self.model, self)

    @property
    def models(self) -> dict[str, str]:
        """The models that the run starts from, by role."""
        return {"model": self.model.model_name_or_path}

    def ds_config_of(self, role: Literal["model"]) -> Path:
        """The file in which a role's sharding is described. The role's own setting wins over the run's."""
        return ds_config_of((getattr(self, role), f"{role}."), (self, ""))


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(SupervisedConfig):
    """One run of reward-model training (Bradley & Terry 1952; Ouyang et al. 2022).

    Attributes:
        reward: the language model, or earlier reward model, to start from.
    """

    reward: FrozenRoleConfig
    data: PreferenceDataConfig

    def __post_init__(self):
        super().__post_init__()
        check_named("reward", self.reward)
        check_trainable("reward", self.reward, self)

    @property
    def models(self) -> dict[str, str]:
        """The models that the run starts from, by role."""
        return {"reward": self.reward.model_name_or_path}

    def ds_config_of(self, role: Literal["reward"]) -> Path:
        """The file in which a role's sharding is described. The role's own setting wins over the run's."""
        return ds_config_of((getattr(self, role), f"{role}."), (self, ""))


@dataclass(frozen=True, kw_only=True)
class DPOConfig(SupervisedConfig):
    """One run of direct preference optimisation (Rafailov et al. 2023).

    Attributes:
        model: the language model to train.
        ref: the model's starting point unless another is named; where an adapter is trained, that is the model itself
            with the adapter switched off, and no second one is built to be asked online.
        loss: `dpo`, or `ipo` (Azar et al. 2023).
        beta: how strongly the model is held to the ref.
        label_smoothing: the share of pairs taken to be labelled the wrong way round (conservative DPO); for `dpo`.
        sft_coef: of the chosen responses' negative log-likelihood per token, which is added (Pang et al. 2024); it
            keeps them from losing probability together with the rejected ones.
        ref_logprobs: `online` keeps the ref in memory; `precomputed` asks it once, keeps the answers in a cache and
            frees it.
    """

    model: FrozenRoleConfig
    data: PreferenceDataConfig
    ref: FrozenRoleConfig = field(default_factory=FrozenRoleConfig)
    learning_rate: float = 1e-6
    loss: Literal["dpo", "ipo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_coef: float = 0.0
    ref_logprobs: Literal["online", "precomputed"] = "online"

    def __post_init__(self):
        super().__post_init__()
        check_named("model", self.model)
        check_trainable("model", self.model, self)
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0.")
        at_least("sft_coef", self.sft_coef, 0)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5.")
        if self.label_smoothing > 0 and self.loss != "dpo":
            raise ValueError(f"label_smoothing={self.label_smoothing} belongs to loss=dpo; loss={self.loss} has none.")
        if self.data.margin_column is not None and self.loss != "dpo":
            raise ValueError(f"data.margin_column belongs to loss=dpo; loss={self.loss} has no margin.")
        if self.ref_is_the_model:
            check_ref_is_own(self.ref, "model")

    @property
    def models(self) -> dict[str, str]:
        """The models that the run starts from, by role."""
        return {"model": self.model.model_name_or_path, "ref": self.ref_name}

    @property
    def ref_name(self) -> str:
        """The ref's model, after the default."""
        return self.ref.model_name_or_path or self.model.model_name_or_path

    @property
    def ref_quantization(self) -> Literal["nf4"] | None:
        """The ref's, after the default: a ref that is the model's starting point has that one's bits."""
        own, named = self.ref.quantization, self.ref.model_name_or_path is not None
        return own if own is not None or named else self.model.quantization

    @property
    def ref_is_the_model(self) -> bool:
        """Whether the ref is the model with its adapter switched off."""
        return self.has_adapter and self.ref.model_name_or_path is None and self.ref_logprobs == "online"

    def ds_config_of(self, role: Literal["model", "ref"]) -> Path:
        """The file in which a role's sharding is described. The role's own setting wins over the run's."""
        return ds_config_of((getattr(self, role), f"{role}."), (self, ""))


def check_named(role: str, config: FrozenRoleConfig) -> None:
    """
    Raises:
        ValueError: the role has no model.
    """
    if config.model_name_or_path is None:
        raise ValueError(f"{role}.model_name_or_path is not set: name the model to train.")
