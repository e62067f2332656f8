"""The actor as it writes responses in a run: with the run's settings, gathered or from its shards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from transformers import PreTrainedTokenizerBase

from engine.config import PPOConfig
from engine.distributed import comm
from engine.distributed.gather import gathered, gathered_for_generation, sharded_for_generation
from engine.distributed.initialize import Engine
from engine.models.linear_layers import packed_weights
from engine.models.loading import vocabulary_size
from engine.rollout.generation import Responses, Sampling, noise_of_rows, sampled_responses


class Sampler:
    """Draws responses."""

    def __init__(
        self,
        actor: Engine,
        tokenizer: PreTrainedTokenizerBase,
        config: PPOConfig,
        *,
        eos_token_ids: list[int],
        temperature: float | None = None,
        micro_batch_size: int | None = None,
    ):
        """
        Args:
            temperature: `rollout.temperature` when not given.
            micro_batch_size: rows decoded at the same time; `rollout.micro_batch_size` when not given.
        """
        self.actor, self.config, self.eos_token_ids = actor, config, eos_token_ids
        self.micro_batch_size = micro_batch_size or config.rollout_micro_batch_size
        self.sampling = Sampling(
            max_response_tokens=config.rollout.max_response_tokens,
            min_response_tokens=config.rollout.min_response_tokens,
            temperature=config.rollout.temperature if temperature is None else temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            vocabulary_size=vocabulary_size(tokenizer),
        )

    def responses(self, prompts: list[list[int]], keys: list[tuple[int, ...]]) -> Responses:
        """One response to each of this rank's prompts. A collective under ZeRO-3.

        Args:
            prompts: token ids.
            keys: of the noise of each row; see `noise_of_rows`.
        """
        with self.drawing() as draw:
            return draw(prompts, keys)

    @contextmanager
    def drawing(self) -> Iterator[Callable[..., Responses]]:
        """`draw(prompts, keys, limits=None)`: `responses`, with the weights gathered once for the length of the block.

        A collective under ZeRO-3, as each draw is: all ranks draw equally often, those without prompts too. `limits`
        are the tokens that each response may have at most.
        """
        config = self.config.rollout
        sharded = config.weights == "sharded"
        entered = sharded_for_generation(self.actor) if sharded else gathered_for_generation(self.actor)
        says_values = config.logprobs == "drawn" and self.actor.module.has_value_head
        value_head = self.actor.module.value_head if says_values else None
        with (
            entered as whole,
            gathered([] if value_head is None else value_head.parameters()),
            nullcontext() if sharded else packed_weights(whole),
        ):

            def draw(prompts, keys, limits: Sequence[int] | None = None) -> Responses:
                return sampled_responses(
                    whole.model,
                    prompts,
                    noise_of_rows(keys, config.max_response_tokens),
                    sampling=self.sampling,
                    eos_token_ids=self.eos_token_ids,
                    micro_batch_size=self.micro_batch_size,
                    prefill_tokens=self.config.micro_batch_tokens,
                    limits=limits,
                    value_head=value_head,
                    any_rank_active=comm.any_true if sharded else None,
                )

            yield draw
