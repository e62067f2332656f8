"""The actor's loss, as the config puts it together: ratios clipped or penalised, the KL to the ref, the entropy."""

import torch
from torch import Tensor

from engine.algorithms.logprobs import chunked_full_kl_sum
from engine.algorithms.losses import (
    clipped_policy_loss,
    importance_weights,
    kl_loss,
    penalised_policy_loss,
    token_weights,
)
from engine.config import PPOConfig
from engine.data.sequences import MicroBatch
from engine.distributed.gather import gathered
from engine.distributed.initialize import Engine, Switched
from engine.models.language_model import TokenLogprobs
from engine.rollout.experience import Experience


class PolicyObjective:
    """A micro-batch's part of the loss of one minibatch."""

    def __init__(
        self,
        config: PPOConfig,
        experience: Experience,
        *,
        kl_coef: float,
        penalty_coef: float,
        ref: Engine | Switched,
    ):
        """
        Args:
            experience: the whole minibatch, of all ranks.
            kl_coef: of the KL to the ref, where it is in the loss.
            penalty_coef: of the KL to the policy that sampled, where it takes the place of the clip.
        """
        self.config, self.experience, self.ref = config, experience, ref
        self.kl_coef, self.penalty_coef = kl_coef, penalty_coef
        self.count = experience.sequences.num_response_tokens
        lengths = experience.sequences.response_lengths[~experience.left_out]
        self.token_weights = token_weights(
            lengths, mean=config.loss_mean, max_response_tokens=config.rollout.max_response_tokens
        )
        if config.importance_cap is None:
            self.weights = self.token_weights
        else:
            both = (experience.logprobs, experience.behaviour_logprobs)
            self.weights = self.token_weights * importance_weights(*both, cap=config.importance_cap)

    def loss(self, actor: Engine, new: TokenLogprobs, batch: MicroBatch) -> Tensor:
        """A scalar; adding micro-batches and ranks up gives the loss of the whole minibatch. A collective.

        Args:
            new: the actor's answer to this micro-batch, with entropies where `entropy_coef` asks for them.
        """
        config, experience = self.config, self.experience
        old, advantages = experience.of(batch, "logprobs"), experience.of(batch, "advantages")
        mask = torch.ones_like(old, dtype=torch.bool)
        given = dict(count=self.count, weights=self.weights[batch.response_tokens].to(old.device))
        if config.policy_loss == "clip":
            loss = clipped_policy_loss(new.logprobs, old, advantages, mask, clip_range=config.clip_range, **given)
        else:
            given_too = dict(penalty_coef=self.penalty_coef, **given)
            loss = penalised_policy_loss(new.logprobs, old, advantages, mask, **given_too)
        weights = self.token_weights[batch.response_tokens].to(old.device)
        if config.kl_placement == "loss":
            loss = loss + self.kl_coef * self._kl(actor, new, batch, mask, weights)
        if config.entropy_coef > 0:
            loss = loss - config.entropy_coef * (weights * new.entropy).sum() / self.count
        return loss

    def _kl(self, actor: Engine, new: TokenLogprobs, batch: MicroBatch, mask: Tensor, weights: Tensor) -> Tensor:
        if self.config.kl_estimator != "full":
            ref_logprobs = self.experience.of(batch, "ref_logprobs")
            given = dict(estimator=self.config.kl_estimator, count=self.count, weights=weights)
            return kl_loss(new.logprobs, ref_logprobs, mask, **given)
        given = dict(temperature=self.config.rollout.temperature, chunk_tokens=self.config.logits_chunk_tokens)
        self.ref.eval()
        with torch.no_grad():
            ref_hidden = self.ref(batch.input_ids, batch.positions, batch.targets, **given).hidden
        head, ref_head = actor.module.head, self.ref.module.head
        with gathered([*head.parameters(), *ref_head.parameters()]):
            both = (new.hidden, head.weight, head.bias, ref_hidden, ref_head.weight, ref_head.bias)
            return chunked_full_kl_sum(*both, weights, **given) / self.count
