"""One optimizer step of actor and critic on a minibatch of experience."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from engine.algorithms.losses import clipped_value_loss
from engine.config import PPOConfig
from engine.data import Examples
from engine.data.batches import Endless
from engine.data.sequences import MicroBatch
from engine.distributed.initialize import set_training
from engine.distributed.micro_batches import marking_last, my_micro_batches
from engine.distributed.optimization import accumulate, step_together
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.rollout.experience import Experience
from engine.trainers.policy_objective import PolicyObjective
from engine.trainers.ppo_metrics import OF_CRITIC, OF_PRETRAINING, StepStatistics


class PPOUpdate:
    """Losses, gradients and steps: of actor and critic together, on all ranks or on none."""

    def __init__(
        self, rlhf_engine: DeepSpeedRLHFEngine, config: PPOConfig, pretraining: Iterable[Examples] | None = None
    ):
        """
        Args:
            pretraining: minibatches of demonstrations, of all ranks, for `config.pretraining`.
        """
        self.config, self.ref = config, rlhf_engine.ref
        self.actor, self.actor_ema, self.critic = rlhf_engine.actor, rlhf_engine.actor_ema, rlhf_engine.critic
        self.pretraining = None if pretraining is None else Endless(pretraining)

    def step(self, experience: Experience, *, penalty_coef: float) -> dict[str, float] | None:
        """A step on a minibatch, of all ranks. A collective.

        Args:
            penalty_coef: for `policy_loss: penalty`.

        Returns:
            Its metrics, the losses those before the step; None when a loss or a gradient is not finite on any rank:
            weights and optimizers are then as they were.
        """
        count = experience.sequences.num_response_tokens
        step = StepStatistics(count, clip_range=self.config.clip_range, value_clip_range=self.config.value_clip_range)
        self._backward_actor(experience, step, penalty_coef)
        if self.critic is not None:
            self._backward_critic(experience, step)
        trained = {role: engine for role in ("actor", "critic") if (engine := getattr(self, role)) is not None}
        rates = {f"lr/{role}": engine.get_lr()[0] for role, engine in trained.items()}  # the step moves them on
        if self.actor.module.has_value_head:
            rates["lr/critic"] = self.actor.get_lr()[1]  # of the head; the adapter's comes first
        norms = step_together(list(trained.values()), healthy=step.losses_are_finite)
        if norms is None:
            return None
        if self.actor_ema is not None:
            self.actor_ema.update()
        return step.over_ranks() | rates | {f"grad_norm/{role}": n for role, n in zip(trained, norms, strict=True)}

    @property
    def left_out(self) -> tuple[str, ...]:
        """Metrics that this run does not have."""
        if self.critic is not None:
            of_critic = ()
        else:  # a value head's gradient is part of its trunk's
            of_critic = ("grad_norm/critic",) if self.actor.module.has_value_head else OF_CRITIC
        return (*of_critic, *(OF_PRETRAINING if self.pretraining is None else ()))

    def _micro_batches(self, experience: Experience) -> Iterator[MicroBatch]:
        return my_micro_batches(experience.sequences, token_budget=self.config.micro_batch_tokens)

    def _backward_actor(self, experience: Experience, step: StepStatistics, penalty_coef: float) -> None:
        coefs = dict(kl_coef=experience.kl_coef, penalty_coef=penalty_coef)
        objective = PolicyObjective(self.config, experience, ref=self.ref, **coefs)
        set_training(self.actor)
        for batch, last in marking_last(self._micro_batches(experience)):
            new = self.actor(
                batch.input_ids,
                batch.positions,
                batch.targets,
                temperature=self.config.rollout.temperature,
                chunk_tokens=self.config.logits_chunk_tokens,
                with_entropy=self.config.entropy_coef > 0,
            )
            loss = objective.loss(self.actor, new, batch)
            logprobs, advantages = experience.of(batch, "logprobs"), experience.of(batch, "advantages")
            step.add_policy(loss, new.logprobs, logprobs, advantages, torch.ones_like(logprobs, dtype=torch.bool))
            if new.values is not None:  # two heads, one backward pass
                loss = loss + self.config.value_coef * self._value_loss(new.values, experience, batch, step)
            accumulate(self.actor, loss, last=last and self.pretraining is None)
        self._backward_pretraining(step)

    def _backward_pretraining(self, step: StepStatistics) -> None:
        """Gradients that add up to the policy's. They come after those: DeepSpeed 0.19's ZeRO-3 adds to the gradient of
        the step before where a weight (a value head) has none in a step's first backward pass.
        """
        if self.pretraining is None:
            return
        sequences = next(self.pretraining).sequences
        micro_batches = my_micro_batches(sequences, token_budget=self.config.pretraining_tokens)
        for batch, last in marking_last(micro_batches):
            given = dict(temperature=1.0, chunk_tokens=self.config.logits_chunk_tokens)
            logprobs = self.actor(batch.input_ids, batch.positions, batch.targets, **given).logprobs
            loss = -logprobs.sum() / sequences.num_response_tokens
            step.pretraining_loss += loss.item()
            accumulate(self.actor, self.config.pretraining.coef * loss, last=last)

    def _backward_critic(self, experience: Experience, step: StepStatistics) -> None:
        set_training(self.critic)
        for batch, last in marking_last(self._micro_batches(experience)):
            loss = self._value_loss(self.critic(batch.input_ids, batch.positions), experience, batch, step)
            accumulate(self.critic, self.config.value_coef * loss, last=last)

    def _value_loss(
        self, new_values: Tensor, experience: Experience, batch: MicroBatch, step: StepStatistics
    ) -> Tensor:
        values, returns = experience.of(batch, "values"), experience.of(batch, "returns")
        given = (new_values, values, returns, torch.ones_like(values, dtype=torch.bool))
        loss = clipped_value_loss(*given, value_clip_range=self.config.value_clip_range, count=step.count)
        step.add_value(loss, *given)
        return loss
