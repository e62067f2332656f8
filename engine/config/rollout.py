"""The settings of what a PPO run's actor reads and writes: its own responses, and demonstrations beside them."""

from dataclasses import dataclass
from typing import Literal

from engine.config.checks import at_least
from engine.config.data import DemonstrationDataConfig


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the actor writes responses.

    Attributes:
        max_response_tokens: a response is cut off there.
        min_response_tokens: the end-of-sequence token cannot be drawn before so many tokens.
        temperature: divides the logits, here and in every log-probability that is compared with the rollout's.
        top_p: draw from the likeliest tokens that have this probability together; 1.0 is all of them.
        top_k: draw from so many of the likeliest tokens; 0 is all of them.
        samples_per_prompt: responses drawn for each prompt.
        micro_batch_size: responses decoded at the same time on one GPU; all of the rank's when not given.
        logprobs: the actor's log-probabilities of its responses, which PPO's ratios and the KL to the ref are taken to:
            `recomputed` in a forward pass over whole responses, as in training; or `drawn`, which the rollout comes
            by, without that pass; so do the values of a shared trunk's head. The two differ by rounding, by some 1e-6
            nats in float32; in 16 bits `drawn` is refused. (`DeepSpeedPPOTrainer.step` is given responses alone, and
            computes.)
        weights: under ZeRO-3, `gathered` holds the whole actor on every rank during the rollout, and then one model
            after the other while responses are measured, where it takes at most half of the memory that is free (fast);
            `sharded` gathers every layer for every token and every pass, all ranks in step (slow, fits anywhere).
        environment: `module:class`, whose `reply(conversation)` answers the actor as the user, or ends the episode with
            None; see `engine.rollout.episodes`. `max_response_tokens` is then of all that follows the prompt, and
            `min_response_tokens` of each turn.
        max_turns: of the actor's in an episode; as many as fit when not given.
    """

    max_response_tokens: int = 128
    min_response_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples_per_prompt: int = 1
    micro_batch_size: int | None = None
    logprobs: Literal["recomputed", "drawn"] = "recomputed"
    weights: Literal["gathered", "sharded"] = "gathered"
    environment: str | None = None
    max_turns: int | None = None

    def __post_init__(self):
        at_least("rollout.max_response_tokens", self.max_response_tokens, 1)
        at_least("rollout.samples_per_prompt", self.samples_per_prompt, 1)
        at_least("rollout.top_k", self.top_k, 0)
        if self.micro_batch_size is not None:
            at_least("rollout.micro_batch_size", self.micro_batch_size, 1)
        if self.environment is not None and self.environment.count(":") != 1:
            raise ValueError(f"rollout.environment={self.environment!r} is not of the form module:class.")
        if self.max_turns is not None:
            at_least("rollout.max_turns", self.max_turns, 1)
            if self.environment is None:
                raise ValueError(
                    f"rollout.max_turns={self.max_turns} does nothing without an environment: set "
                    f"--rollout.environment module:class, or leave it out."
                )
        if not 0 <= self.min_response_tokens <= self.max_response_tokens:
            raise ValueError(
                f"rollout.min_response_tokens={self.min_response_tokens} must lie between 0 and "
                f"rollout.max_response_tokens={self.max_response_tokens}."
            )
        if not self.temperature > 0:
            raise ValueError(f"rollout.temperature={self.temperature} must be above 0: PPO needs sampled responses.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p={self.top_p} must lie in (0, 1].")

    @property
    def filters(self) -> bool:
        """Whether tokens are drawn from another distribution than the actor's at this temperature."""
        return self.top_p < 1 or self.top_k > 0 or self.min_response_tokens > 0


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """A language-model loss beside PPO's, so that the actor forgets less.

    PPO-ptx (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 2).

    Attributes:
        data: demonstrations; every optimizer step takes `minibatch_size` of them.
        coef: of their mean negative log-likelihood per token.
        loss_on: the tokens that are learned: of the `response`, or of the whole `sequence`.
    """

    data: DemonstrationDataConfig
    coef: float
    loss_on: Literal["response", "sequence"] = "sequence"

    def __post_init__(self):
        at_least("pretraining.coef", self.coef, 0)
