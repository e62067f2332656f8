"""The scores of an iteration's responses: of a reward model, a Python function, an HTTP service, or their sum."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.config import PPOConfig
from engine.data import PromptBatch
from engine.data.formatting import Messages, Prompt, said_since
from engine.data.sequences import Sequences
from engine.distributed import comm
from engine.distributed.initialize import Engine, Switched
from engine.rollout.measuring import reward_model_scores, sequences_of_all_ranks
from engine.rollout.reward_text import sequences_for_another_tokenizer
from engine.rollout.score_functions import load_score_function, scores_of_function, scores_one_by_one
from engine.rollout.score_service import scores_of_service


class Scored(NamedTuple):
    """Of all ranks' responses, the same on every rank."""

    scores: Tensor  # (B,) fp32 on the CPU
    failed: Tensor  # (B,) bool: nobody could say; the score is then 0


class Scoring:
    """Asks the sources of scores that a run has."""

    def __init__(
        self,
        config: PPOConfig,
        *,
        reward: Engine | Switched | None,
        tokenizer: PreTrainedTokenizerBase,
        reward_tokenizer: PreTrainedTokenizerBase | None,
        eos_token_ids: list[int],
    ):
        """
        Args:
            reward: the reward model, if there is one.
            tokenizer: the actor's.
            reward_tokenizer: the reward model's, where it has one of its own.

        Raises:
            ValueError: on every rank, when there is no such function.
        """
        self.config, self.reward, self.eos_token_ids = config, reward, eos_token_ids
        self.tokenizer, self.reward_tokenizer = tokenizer, reward_tokenizer
        with comm.same_error_everywhere():
            self.function = load_score_function(config.reward.function) if config.reward.function else None
        if reward_tokenizer is not None and comm.is_main():
            print(
                "The reward model's tokenizer or chat template is not the actor's: responses are written out as text "
                "and encoded anew for it.",
                flush=True,
            )

    def scores(
        self,
        prompts: PromptBatch,
        responses: list[list[int]],
        sequences: Sequences,
        conversations: list[Messages] | None = None,
    ) -> Scored:
        """The weighted sum of what every source says. A collective.

        Args:
            prompts, responses: this rank's; of an episode all tokens of the actor's.
            sequences: of all ranks.
            conversations: this rank's episodes, where there is an environment. Functions and services are given them
                as one more column, in place of one that is called so.

        Raises:
            ValueError: on every rank, when a source fails on any and `reward.on_error` is `stop`, or when it fails for
                every response.
        """
        settings = self.config.reward
        texts = self.texts_of_episodes(prompts.prompts, responses, conversations)
        if conversations is not None:
            prompts = replace(prompts, columns=prompts.columns | {"conversations": conversations})
        total, failed = torch.zeros(len(sequences)), torch.zeros(len(sequences), dtype=torch.bool)
        if self.reward is not None:
            theirs = sequences
            if self.reward_tokenizer is not None:
                theirs = self._in_the_reward_models_words(prompts, responses, texts, conversations)
            scores = reward_model_scores(
                theirs,
                self.reward,
                token_budget=self.config.micro_batch_tokens,
                gather_weights=self.config.rollout.weights == "gathered",
            )
            total += settings.model_weight * scores
        if self.function is not None:
            total += settings.function_weight * self._asked(self._of_function, prompts, texts, failed)
        if settings.url is not None:
            total += settings.url_weight * self._asked(self._of_service, prompts, texts, failed)
        return Scored(total.masked_fill(failed, 0), failed)

    def texts(self, responses: list[list[int]]) -> list[str]:
        """Without special tokens."""
        # One by one: transformers 5 turns batch_decode([]), a rank without prompts, into one empty text.
        return [self.tokenizer.decode(response, skip_special_tokens=True) for response in responses]

    def texts_of_episodes(
        self, prompts: list[Prompt], responses: list[list[int]], conversations: list[Messages] | None
    ) -> list[str]:
        """What the actor says in each, without special tokens: its response, or its turns in a conversation."""
        if conversations is None:
            return self.texts(responses)
        return [said_since(*both) for both in zip(prompts, conversations, strict=True)]

    def _asked(self, source, prompts: PromptBatch, texts: list[str], failed: Tensor) -> Tensor:
        """(B,) scores of all ranks; rows that failed are 0 and marked in `failed`. A collective."""
        stop = self.config.reward.on_error == "stop"
        with comm.same_error_everywhere():
            scores, errors = source(prompts, texts)
            if stop and any(errors):
                raise ValueError(next(filter(None, errors)))
        wrong = torch.tensor([error is not None for error in errors], dtype=torch.bool)
        everyones = comm.concatenated(wrong.to(comm.device())).cpu()
        said = next((error for each in comm.gathered_objects(errors) for error in each if error), None)
        if said is not None and everyones.all():
            raise ValueError(f"not one of {len(everyones)} responses was scored: {said}")
        if said is not None and comm.is_main():
            print(f"{int(everyones.sum())} of {len(everyones)} responses are left out, unscored: {said}", flush=True)
        failed |= everyones
        return comm.concatenated(scores.to(comm.device())).cpu().masked_fill(everyones, 0)

    def _of_function(self, prompts: PromptBatch, texts: list[str]) -> tuple[Tensor, list[str | None]]:
        given = (self.function, prompts.texts, texts, prompts.columns)
        if self.config.reward.on_error == "stop":
            return scores_of_function(*given, timeout_s=self.config.reward.timeout_s), [None] * len(texts)
        return scores_one_by_one(*given, timeout_s=self.config.reward.timeout_s)

    def _of_service(self, prompts: PromptBatch, texts: list[str]) -> tuple[Tensor, list[str | None]]:
        if not texts:
            return torch.empty(0), []
        settings = self.config.reward
        given = dict(timeout_s=settings.timeout_s, retries=settings.retries)
        try:
            scores = scores_of_service(settings.url, prompts.texts, texts, prompts.columns, **given)
        except ValueError as error:
            return torch.full((len(texts),), torch.nan), [str(error)] * len(texts)
        return scores, [None] * len(texts)

    def _in_the_reward_models_words(
        self,
        prompts: PromptBatch,
        responses: list[list[int]],
        texts: list[str],
        conversations: list[Messages] | None,
    ) -> Sequences:
        """The responses of all ranks in the reward model's template and tokens. A collective.

        Raises:
            ValueError: on every rank, when a sequence is longer than the reward model has positions for.
        """
        with comm.same_error_everywhere():
            ended = [bool(response) and response[-1] in self.eos_token_ids for response in responses]
            asked = prompts.prompts
            if conversations is not None:  # a response is then the last turn, and all before it a prompt
                asked = [before for *before, _ in conversations]
                texts = [last["content"] for *_, last in conversations]
            given = zip(asked, prompts.texts, texts, ended, strict=True)
            mine = sequences_for_another_tokenizer(given, self.reward_tokenizer)
            config = self.reward.module.model.config.get_text_config()
            longest = max(mine.lengths.tolist(), default=0)
            if longest > getattr(config, "max_position_embeddings", longest):  # ALiBi models have no limit
                raise ValueError(
                    f"In the reward model's tokens a response has {longest} tokens with its prompt, and the model was "
                    f"made for {config.max_position_embeddings}. Lower data.max_prompt_tokens or "
                    f"rollout.max_response_tokens."
                )
        return sequences_of_all_ranks(mine)
