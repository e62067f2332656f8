"""The settings of a PPO run."""

import math
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from engine.config.checkpoint import CheckpointConfig
from engine.config.checks import at_least, ds_config_of, next_multiple
from engine.config.data import DataConfig
from engine.config.evaluation import EvaluationConfig
from engine.config.guards import KLGuardConfig
from engine.config.roles import (
    CriticConfig,
    FrozenRoleConfig,
    RewardConfig,
    TrainedRoleConfig,
    check_ref_is_own,
    check_trainable,
)
from engine.config.rollout import PretrainingConfig, RolloutConfig
from engine.config.tracking import TrackingConfig

AdvantageEstimator = Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """One PPO run (Schulman et al. 2017; Ouyang et al. 2022).

    Attributes:
        actor: the model that writes responses and is trained.
        reward: where a response's score comes from.
        data: the prompts that are answered and learned from, and those that are held out.
        critic: starts from the reward model's weights unless its own model is named; with a score function, from the
            actor's with a fresh head.
        ref: the actor's starting point unless its own model is named; where the actor trains an adapter, that is the
            actor itself with the adapter switched off, and no second model is built.
        rollout: how responses are written.
        tracking: what is written down.
        checkpoint: when a run can be gone on with.
        evaluation: how the prompts of `data.eval` are asked.
        kl_guard: what happens where the actor runs away from the ref.
        pretraining: a language-model loss beside PPO's; none when not given.
        shared_trunk: one model in memory in place of four: actor and critic are one adapter (`actor.lora`) with two
            heads, trained together; the ref is the model without it; the reward model, where there is one, is another
            adapter of the same model, as reward-model training exports it with `lora.export: adapter`.
        output_dir: the run's folder; made where it is missing.
        resume: `auto` goes on from the newest checkpoint in `output_dir`, or begins where there is none; `never`
            removes what checkpoints there are. A run is not begun beside them when not given.
        seed: of what the run draws: fresh heads and adapters, the order of prompts, responses. A `random://` model has
            its own, `&seed=`.
        dtype: of weights and what is computed with them; `auto` is bfloat16 on a GPU and float32 on a CPU.
        zero_stage: of every role that does not name its own; 2 when not given. `auto` takes the cheapest stages that
            fit, by the memory plan; they are chosen when the run starts.
        ds_config: a DeepSpeed JSON file in place of `zero_stage`.
        num_train_epochs: times through the prompts; `num_iterations` is a number of iterations in its place.
        num_iterations: of generation and training; as many as `num_train_epochs` come to when not given.
        rollout_batch_size: responses per iteration, all GPUs.
        minibatch_size: responses per optimizer step, all GPUs.
        micro_batch_size: responses of full length per forward pass, one GPU. Shorter responses share a forward pass
            as long as they stay within the same number of tokens; gradient accumulation is derived.
        ppo_epochs: how often an iteration's responses are trained on.
        advantage_estimator: `gae` with a critic, or one of the critic-free ones, which compare the responses to a
            prompt (`rollout.samples_per_prompt` of them) or look at the rewards alone: no critic is then built.
        advantage_whitening: shift and scale the advantages of an iteration; `auto` does so for `gae` and the two
            `reinforce_plus_plus`.
        kl_coef: of the per-token KL penalty between actor and ref.
        kl_placement: the penalty is part of the rewards, or a term of the actor's loss (k2, k3 or full).
        kl_estimator: `k1`, `k2` and `k3` look at the drawn token alone, `full` at the whole vocabulary (Schulman 2020,
            http://joschu.net/blog/kl-approx.html).
        kl_controller: `fixed` keeps `kl_coef`; `ziegler` (2019, https://arxiv.org/abs/1909.08593) moves it in
            proportion to the error, by at most 20 % per `kl_horizon`; `schulman` (2017,
            https://arxiv.org/abs/1707.06347) doubles or halves it.
        kl_target: of a controller that moves `kl_coef`, in nats per response.
        kl_horizon: of `ziegler`, in responses.
        gamma: discount of later rewards, per token.
        lam: lambda of GAE: 1 trusts the rewards alone, 0 the critic.
        policy_loss: `clip`, or `penalty` on the KL to the policy that sampled.
        loss_mean: every token weighs the same, or every response, or a constant number of tokens divides the sum.
        penalty_coef: where `penalty` begins; it is doubled or halved to keep the KL near `penalty_target`.
        penalty_target: of `penalty`, in nats per token.
        target_kl: an iteration's epochs end early when a step's approximate KL to the policy that sampled exceeds so
            many nats per token.
        entropy_coef: of the mean entropy, which is taken off the loss.
        importance_cap: correct for the difference between the distribution that tokens were drawn from and the
            actor's (filters, precision) by their ratio, cut off here; no correction when not given.
        clip_range: how far the ratio of the policies may be from 1 before a token stops pulling.
        value_coef: of the value loss, beside the policy's. A critic of its own feels it in gradient clipping alone.
        value_clip_range: around the values at rollout time.
        value_label: the critic's regression target.
        ema_decay: of an exponential moving average of the actor's weights, taken after every optimizer step and
            exported as `actor_ema`; no average when not given.
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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    kl_guard: KLGuardConfig = field(default_factory=KLGuardConfig)
    pretraining: PretrainingConfig | None = None
    shared_trunk: bool = False

    output_dir: str
    resume: Literal["auto", "never"] | None = None
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3, "auto"] | None = None
    ds_config: str | None = None
    num_train_epochs: int = 1
    num_iterations: int | None = None

    rollout_batch_size: int = 128
    minibatch_size: int = 32
    micro_batch_size: int = 4
    ppo_epochs: int = 1

    advantage_estimator: AdvantageEstimator = "gae"
    advantage_whitening: Literal["auto", "global", "none"] = "auto"
    kl_coef: float = 0.05
    kl_placement: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["full", "k1", "k2", "k3"] = "k1"
    kl_controller: Literal["fixed", "ziegler", "schulman"] = "fixed"
    kl_target: float = 6.0
    kl_horizon: float = 10_000
    gamma: float = 1.0
    lam: float = 0.95
    policy_loss: Literal["clip", "penalty"] = "clip"
    loss_mean: Literal["tokens", "responses", "constant"] = "tokens"
    penalty_coef: float = 1.0
    penalty_target: float = 0.01
    target_kl: float | None = None
    entropy_coef: float = 0.0
    importance_cap: float | None = None
    clip_range: float = 0.2
    value_coef: float = 1.0
    value_clip_range: float = 0.2
    value_label: Literal["gae", "monte_carlo", "temporal_difference"] = "gae"

    ema_decay: float | None = None
    logits_chunk_tokens: int = 1024
    max_skipped_steps: int = 16
    distributed_timeout_s: int = 1800

    def __post_init__(self):
        if self.actor.model_name_or_path is None:
            raise ValueError("actor.model_name_or_path is not set: name the model to train.")
        self._check_numbers()
        self._check_sizes()
        self._check_algorithm()
        self._check_roles()

    def _check_numbers(self) -> None:
        """Refuse what is out of range, whatever else is set."""
        for name in (
            *("rollout_batch_size", "minibatch_size", "micro_batch_size", "ppo_epochs", "num_train_epochs"),
            *("logits_chunk_tokens", "max_skipped_steps", "distributed_timeout_s"),
        ):
            at_least(name, getattr(self, name), 1)
        for name in ("num_iterations", "importance_cap"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        for name in (
            *("kl_coef", "clip_range", "value_clip_range", "kl_target", "penalty_coef", "entropy_coef", "value_coef"),
        ):
            at_least(name, getattr(self, name), 0)
        for name in ("penalty_target", "target_kl"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 nats per token.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 and below 1.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1].")

    def _check_sizes(self) -> None:
        """Refuse batches that do not divide, and a penalty on more tokens than there are."""
        samples = self.rollout.samples_per_prompt
        for name, divisor in (("minibatch_size", self.minibatch_size), ("rollout.samples_per_prompt", samples)):
            if self.rollout_batch_size % divisor:
                raise ValueError(
                    f"rollout_batch_size={self.rollout_batch_size} is not a multiple of {name}={divisor}. "
                    f"{self._sizes_for(self.micro_batch_size)}"
                )
        if self.reward.overlong_tokens > self.rollout.max_response_tokens:
            raise ValueError(
                f"reward.overlong_tokens={self.reward.overlong_tokens} is more than "
                f"rollout.max_response_tokens={self.rollout.max_response_tokens}."
            )

    def _check_algorithm(self) -> None:
        """Refuse terms that cancel out, or could never move."""
        if self.kl_placement == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_placement=loss with kl_estimator=k1: the gradient of k1 is 0 on average, whatever the KL. Set "
                "--kl_estimator k3, k2 or full."
            )
        if self.compares_responses and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"advantage_estimator={self.advantage_estimator} compares the responses to a prompt: set "
                f"--rollout.samples_per_prompt to 2 or more."
            )
        if self.kl_controller != "fixed" and not (self.kl_target > 0 and self.kl_horizon > 0):
            raise ValueError(
                f"kl_controller={self.kl_controller} needs kl_target={self.kl_target} and kl_horizon={self.kl_horizon} "
                f"above 0."
            )
        if self.kl_controller != "fixed" and self.kl_coef == 0:
            raise ValueError(f"kl_coef=0: kl_controller={self.kl_controller} multiplies it, and it would stay 0.")
        if self.policy_loss == "penalty" and self.penalty_coef == 0:
            raise ValueError("penalty_coef=0: policy_loss=penalty doubles or halves it, and it would stay 0.")
        if self.rollout.logprobs == "drawn" and self.kl_estimator == "full":
            raise ValueError(
                "rollout.logprobs=drawn saves a forward pass of the actor, which kl_estimator=full needs all the same: "
                "leave it out."
            )

    def _check_roles(self) -> None:
        """Refuse roles that cannot be built as they are described."""
        of_reward_model = (self.reward.zero_stage, self.reward.ds_config, self.reward.quantization)
        if self.reward.model_name_or_path is None and of_reward_model != (None, None, None):
            raise ValueError(
                "There is no reward model: reward.zero_stage, reward.ds_config and reward.quantization do nothing."
            )
        for role in ("actor", "critic"):
            check_trainable(role, getattr(self, role), getattr(self, role))
        if self.shared_trunk:
            self._check_trunk()
        if self.ref_is_the_actor:
            check_ref_is_own(self.ref, "actor")
        for role in ("actor", "critic", "ref", "reward"):
            self.ds_config_of(role)

    def _check_trunk(self) -> None:
        """Refuse what one model for all roles cannot be, or would not look at."""
        if not self.actor.has_adapter:
            raise ValueError("shared_trunk trains an adapter of the model that all roles share: set --actor.lora.r 8.")
        if self.ref.model_name_or_path is not None:
            raise ValueError("shared_trunk: the ref is the actor's model; leave ref.model_name_or_path out.")
        if replace(self.critic, learning_rate=CriticConfig.learning_rate) != CriticConfig():
            raise ValueError(
                "shared_trunk: the critic is a head on the actor, with critic.learning_rate and nothing else of its "
                "own; leave the other settings of critic out."
            )
        for name in ("zero_stage", "ds_config", "quantization"):
            if getattr(self.reward, name) is not None:
                raise ValueError(
                    f"shared_trunk: the reward model is an adapter of the actor's model, so reward.{name} "
                    f"does nothing: leave it out."
                )

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that are not at their defaults and that nothing looks at in this run -> why. They may come from a
        recipe or a preset that the run varies, so they are told and not refused.
        """
        estimator = f"advantage_estimator={self.advantage_estimator}"
        idle = {}
        if not self.has_critic:
            idle |= dict.fromkeys(("lam", "value_label", "value_coef", "value_clip_range", "critic"), estimator)
        if self.advantage_estimator in ("grpo", "dr_grpo", "rloo"):
            idle["gamma"] = estimator
        if self.kl_controller == "fixed":
            idle["kl_target"] = "kl_controller=fixed"
        if self.kl_controller != "ziegler":
            idle["kl_horizon"] = f"kl_controller={self.kl_controller}"
        if self.policy_loss == "clip":
            idle |= dict.fromkeys(("penalty_coef", "penalty_target"), "policy_loss=clip")
        else:
            idle["clip_range"] = "policy_loss=penalty"
        if self.rollout.logprobs == "drawn" and not self.rollout.filters:
            idle["importance_cap"] = "rollout.logprobs=drawn, and no filter"
        if self.data.eval is None:
            idle["evaluation"] = "data.eval is not set"
        if self.ppo_epochs == 1:
            idle["target_kl"] = "ppo_epochs=1"
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        return {name: why for name, why in idle.items() if getattr(self, name) != defaults[name]}

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
        minibatch = next_multiple(self.minibatch_size, unit)
        rollout = next_multiple(self.rollout_batch_size, math.lcm(minibatch, self.rollout.samples_per_prompt))
        sizes = {"minibatch_size": minibatch, "rollout_batch_size": rollout}
        return "Try" + "".join(f" --{name} {size}" for name, size in sizes.items() if size != getattr(self, name)) + "."

    @property
    def ref_is_the_actor(self) -> bool:
        """Whether the ref is the actor with its adapter switched off."""
        return self.actor.has_adapter and self.ref.model_name_or_path is None

    @property
    def has_critic(self) -> bool:
        """Whether advantages need values."""
        return self.advantage_estimator == "gae"

    @property
    def compares_responses(self) -> bool:
        """Whether advantages need several responses to each prompt."""
        return self.advantage_estimator not in ("gae", "reinforce_plus_plus")

    @property
    def whitened(self) -> bool:
        """Whether advantages are shifted and scaled over an iteration."""
        by_default = self.advantage_estimator in ("gae", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
        return by_default if self.advantage_whitening == "auto" else self.advantage_whitening == "global"

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
    def pretraining_tokens(self) -> int:
        """Tokens of one forward pass over demonstrations: as many as over responses, or one of full length."""
        return max(self.micro_batch_tokens, self.pretraining.data.max_length)

    @property
    def rollout_micro_batch_size(self) -> int:
        """Responses decoded at the same time on one GPU."""
        return self.rollout.micro_batch_size or self.rollout_batch_size

    @property
    def models(self) -> dict[str, str]:
        """The models that the run starts from, by role."""
        return {role: name for role in ("actor", "critic", "ref", "reward") if (name := self.model_of(role))}

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
        return ds_config_of((getattr(self, role), f"{role}."), (self, ""))
