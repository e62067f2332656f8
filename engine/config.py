"""Every knob of a run: frozen dataclasses, checked when built. What can be derived is a property, not a field.

`parse` reads a YAML recipe and dotted command-line overrides (`--actor.zero_stage 3`); a name that does not exist is
refused. How memory is sharded is not here but in `ds_configs/`.
"""

import difflib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"

Config = TypeVar("Config")


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
class TrainedRoleConfig(FrozenRoleConfig):
    """A model with an optimizer, AdamW (actor, critic).

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
        _at_least("learning_rate", self.learning_rate, 0)
        _at_least("warmup_steps", self.warmup_steps, 0)
        _at_least("max_grad_norm", self.max_grad_norm, 0)
        _at_least("weight_decay", self.weight_decay, 0)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")


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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how long they may be.

    Attributes:
        train: a JSONL, JSON, CSV or Parquet file, or a hub name.
        train_subset, train_split: which part of a hub dataset.
        prompt_column: the column that holds the prompt; found among the usual names when not given.
        max_prompt_tokens: a longer prompt is treated as `over_length` says.
        over_length: `drop` (the count is printed), `error`, `truncate_left` (keep the end), `truncate_right`.
        max_samples: only the first so many rows.
    """

    train: str
    train_subset: str | None = None
    train_split: str = "train"
    prompt_column: str | None = None
    max_prompt_tokens: int = 512
    over_length: Literal["drop", "error", "truncate_left", "truncate_right"] = "drop"
    max_samples: int | None = None

    def __post_init__(self):
        _at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        if self.max_samples is not None:
            _at_least("data.max_samples", self.max_samples, 1)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the actor writes responses.

    Attributes:
        min_response_tokens: the end-of-sequence token cannot be drawn before so many tokens.
        temperature: divides the logits, here and in every log-probability that is compared with the rollout's.
        top_p, top_k: nucleus and top-k filters; 1.0 and 0 switch them off.
        samples_per_prompt: responses drawn for each prompt.
        micro_batch_size: responses decoded at the same time on one GPU; all of the rank's when not given.
        weights: under ZeRO-3, `gathered` holds the whole actor on every rank during the rollout (fast), `sharded`
            gathers every layer for every token, all ranks in step (slow, fits anywhere).
    """

    max_response_tokens: int = 128
    min_response_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples_per_prompt: int = 1
    micro_batch_size: int | None = None
    weights: Literal["gathered", "sharded"] = "gathered"

    def __post_init__(self):
        _at_least("rollout.max_response_tokens", self.max_response_tokens, 1)
        _at_least("rollout.samples_per_prompt", self.samples_per_prompt, 1)
        _at_least("rollout.top_k", self.top_k, 0)
        if self.micro_batch_size is not None:
            _at_least("rollout.micro_batch_size", self.micro_batch_size, 1)
        if not 0 <= self.min_response_tokens <= self.max_response_tokens:
            raise ValueError(
                f"rollout.min_response_tokens={self.min_response_tokens} must lie between 0 and "
                f"rollout.max_response_tokens={self.max_response_tokens}."
            )
        if not self.temperature > 0:
            raise ValueError(f"rollout.temperature={self.temperature} must be above 0: PPO needs sampled responses.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p={self.top_p} must lie in (0, 1].")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is written down. `metrics.jsonl` and `samples.jsonl` always are.

    Attributes:
        wandb: `offline` needs no account (`wandb sync OUT/wandb/offline-run-*` uploads later).
        samples_per_iteration: rows of `samples.jsonl` per iteration.
    """

    wandb: Literal["disabled", "offline", "online"] = "offline"
    project: str = "rlhf-engine"
    run_name: str | None = None
    samples_per_iteration: int = 4


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """One PPO run (Schulman et al. 2017; Ouyang et al. 2022).

    Attributes:
        critic: starts from the reward model's weights unless its own model is named; with a score function, from the
            actor's with a fresh head.
        ref: the actor's starting point unless its own model is named.
        zero_stage: of every role that does not name its own; `ds_config` is a DeepSpeed JSON file in its place.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU.
        rollout_batch_size: responses per iteration, all GPUs.
        minibatch_size: responses per optimizer step, all GPUs.
        micro_batch_size: responses of full length per forward pass, one GPU. Shorter responses share a forward pass
            as long as they stay within the same number of tokens; gradient accumulation is derived.
        kl_coef: of the per-token KL penalty between actor and ref in the reward.
        kl_target, kl_horizon: of the adaptive controllers, in nats per response and in responses.
        value_clip_range: around the values at rollout time.
        value_label: the critic's regression target.
        logits_chunk_tokens: so many tokens are projected to the vocabulary at a time.
        max_skipped_steps: so many steps skipped in a row for numbers that are not finite stop the run.
        distributed_timeout_s: a rank that waits longer for the others gives up.
    """

    actor: TrainedRoleConfig
    reward: RewardConfig
    data: DataConfig
    critic: CriticConfig = field(default_factory=CriticConfig)
    ref: FrozenRoleConfig = field(default_factory=FrozenRoleConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    output_dir: str
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] | None = None
    ds_config: str | None = None
    num_train_epochs: int = 1
    num_iterations: int | None = None

    rollout_batch_size: int = 128
    minibatch_size: int = 32
    micro_batch_size: int = 4
    ppo_epochs: int = 1

    kl_coef: float = 0.05
    kl_estimator: Literal["full", "k1", "k2", "k3"] = "k1"
    kl_controller: Literal["fixed", "ziegler", "schulman"] = "fixed"
    kl_target: float = 6.0
    kl_horizon: float = 10_000
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_label: Literal["gae", "monte_carlo", "temporal_difference"] = "gae"

    logits_chunk_tokens: int = 1024
    max_skipped_steps: int = 16
    distributed_timeout_s: int = 1800

    def __post_init__(self):
        for name in (
            "rollout_batch_size",
            "minibatch_size",
            "micro_batch_size",
            "ppo_epochs",
            "num_train_epochs",
            "logits_chunk_tokens",
            "max_skipped_steps",
            "distributed_timeout_s",
        ):
            _at_least(name, getattr(self, name), 1)
        if self.num_iterations is not None:
            _at_least("num_iterations", self.num_iterations, 1)
        for name in ("kl_coef", "clip_range", "value_clip_range", "kl_target"):
            _at_least(name, getattr(self, name), 0)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1].")
        if self.kl_controller != "fixed" and not (self.kl_target > 0 and self.kl_horizon > 0):
            raise ValueError(
                f"kl_controller={self.kl_controller} needs kl_target={self.kl_target} and kl_horizon={self.kl_horizon} "
                f"above 0."
            )
        if self.actor.model_name_or_path is None:
            raise ValueError("actor.model_name_or_path is not set: name the model to train.")
        samples = self.rollout.samples_per_prompt
        for name, divisor in (("minibatch_size", self.minibatch_size), ("rollout.samples_per_prompt", samples)):
            if self.rollout_batch_size % divisor:
                raise ValueError(
                    f"rollout_batch_size={self.rollout_batch_size} is not a multiple of {name}={divisor}. "
                    f"{self._sizes_for(self.micro_batch_size)}"
                )
        if self.reward.function is not None and (self.reward.zero_stage, self.reward.ds_config) != (None, None):
            raise ValueError("reward.function is a Python function: reward.zero_stage and reward.ds_config do nothing.")
        for role in ("actor", "critic", "ref", "reward"):
            self.ds_config_of(role)

    def check_world_size(self, world_size: int) -> None:
        """Refuse sizes that this many ranks cannot share out evenly.

        Raises:
            ValueError: names a size that works.
        """
        unit = self.micro_batch_size * world_size
        if self.minibatch_size % unit:
            raise ValueError(
                f"minibatch_size={self.minibatch_size} is not a multiple of micro_batch_size x world_size = "
                f"{self.micro_batch_size} x {world_size} = {unit}. {self._sizes_for(unit)}"
            )

    def _sizes_for(self, unit: int) -> str:
        """Which sizes would work where a minibatch has to be a multiple of `unit`."""
        minibatch = _next_multiple(self.minibatch_size, unit)
        rollout = _next_multiple(self.rollout_batch_size, math.lcm(minibatch, self.rollout.samples_per_prompt))
        sizes = {"minibatch_size": minibatch, "rollout_batch_size": rollout}
        return "Try" + "".join(f" --{name} {size}" for name, size in sizes.items() if size != getattr(self, name)) + "."

    @property
    def prompts_per_iteration(self) -> int:
        """Prompts per iteration, all GPUs."""
        return self.rollout_batch_size // self.rollout.samples_per_prompt

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps per iteration."""
        return self.ppo_epochs * (self.rollout_batch_size // self.minibatch_size)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one padded forward pass: `micro_batch_size` sequences of full length."""
        return self.micro_batch_size * (self.data.max_prompt_tokens + self.rollout.max_response_tokens)

    @property
    def rollout_micro_batch_size(self) -> int:
        """Responses decoded at the same time on one GPU."""
        return self.rollout.micro_batch_size or self.rollout_batch_size

    def model_of(self, role: Literal["actor", "critic", "ref", "reward"]) -> str | None:
        """The model a role starts from, after the defaults; None for a reward that is a function."""
        own = getattr(self, role).model_name_or_path
        if role == "critic":
            return own or self.reward.model_name_or_path or self.actor.model_name_or_path
        if role == "ref":
            return own or self.actor.model_name_or_path
        return own

    def ds_config_of(self, role: Literal["actor", "critic", "ref", "reward"]) -> Path:
        """The file in which a role's sharding is described. The role's own setting wins over the run's."""
        for where, prefix in ((getattr(self, role), f"{role}."), (self, "")):
            if where.zero_stage is not None and where.ds_config is not None:
                raise ValueError(f"Set {prefix}zero_stage or {prefix}ds_config, not both: the file names the stage.")
            if where.ds_config is not None:
                if not Path(where.ds_config).is_file():
                    raise ValueError(f"{prefix}ds_config={where.ds_config}: there is no such file.")
                return Path(where.ds_config)
            if where.zero_stage is not None:
                return DS_CONFIGS / f"zero{where.zero_stage}.json"
        return DS_CONFIGS / "zero2.json"


def parse(config_class: type[Config], args: Sequence[str] | None = None) -> Config:
    """A config from the command line: `--config FILE` and dotted overrides, later ones winning.

    Prints and ends the program on `--print_config` or `--help`.

    Raises:
        ValueError: an unknown name, or a value that does not fit.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    parser = ArgumentParser(
        description=config_class.__doc__.splitlines()[0],
        exit_on_error=False,
        allow_abbrev=False,  # a typo that happens to be a prefix of a name is still a typo
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML recipe")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_class_arguments(config_class)
    try:
        values = parser.instantiate(parser.parse_args(args))
    except ArgumentError as error:
        raise ValueError(f"{error}{_meant(str(error), parser)}\nSee --help for every name.") from None
    return config_class(**{name: values[name] for name in config_class.__dataclass_fields__})


def run(main: Callable[[], None]) -> None:
    """A launch script's main: a mistake of the user's ends it with the message that names it and exit code 1.

    A message is all there is to know of a ValueError that the engine itself raises. From anywhere else it is a bug,
    and keeps its traceback.
    """
    try:
        main()
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals["__name__"].split(".")[0] not in ("engine", "__main__"):
            raise
        sys.exit(f"ValueError: {error}")


def _meant(message: str, parser) -> str:
    """The names nearest to a misspelt one, if any."""
    names = [action.dest for action in parser._actions]  # jsonargparse 4.53 lists them nowhere public
    unknown = [word.lstrip("-").split("=")[0] for word in message.split() if word.startswith("--")]
    near = difflib.get_close_matches(unknown[0], names, n=3) if unknown else []
    return f". Did you mean {' or '.join(f'--{name}' for name in near)}?" if near else ""


def as_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries: what `config.yaml` holds, and enough to start the run again."""
    return asdict(config)


def resolved_dtype(dtype: str, *, on_gpu: bool) -> str:
    """`auto` spelled out."""
    return dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32"


def _at_least(name: str, value: float, minimum: float) -> None:
    if not value >= minimum:
        raise ValueError(f"{name}={value} must be at least {minimum}.")


def _next_multiple(value: int, unit: int) -> int:
    return -(-value // unit) * unit
