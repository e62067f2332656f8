"""Prompts + actor + environments -> episodes of several turns.

The actor answers, the environment replies as the user, the actor answers that, and so on. All episodes of a rank go on
turn by turn together. An episode ends, always after a turn of the actor's, when

- the environment replies None;
- the actor has had `max_turns` turns;
- a turn of the actor's was cut off, having filled what was left of `max_response_tokens`, which the turns of both and
  the template's text between them share;
- the reply, and one token of an answer to it, would not fit into what is left. Such a reply is dropped.

In the last three cases the environment is not asked again, or not heard. What is left out: keys and values are not kept
between turns, the conversation so far is read anew; environments are asked one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from engine.data import PromptBatch
from engine.data.formatting import Messages, encode_reply
from engine.data.sequences import Sequences
from engine.data.sources import at
from engine.distributed import comm
from engine.rollout.environments import new_environment, reply_of
from engine.rollout.generation import Responses
from engine.rollout.sampler import Sampler

Key = tuple[int, ...]


class Episodes(NamedTuple):
    """One entry per prompt, in the prompts' order. Without an environment an episode is one response."""

    sequences: Sequences
    drawn: Responses  # the actor's own tokens, of all its turns
    conversations: list[Messages] | None  # with the prompt's messages; None without an environment

    @classmethod
    def of_one_turn(cls, prompts: PromptBatch, responses: Responses) -> "Episodes":
        return cls(Sequences.of(prompts.tokens, responses.tokens), responses, conversations=None)


@dataclass(kw_only=True)
class Episode:
    """One that may still be going on."""

    prompt: list[int]
    key: Key
    conversation: Messages
    environment: Any
    parts: list[list[int]] = field(default_factory=list)  # token ids: the actor's turn, what followed it, its turn, ...
    drawn: Responses = field(default_factory=lambda: Responses(*([] for _ in Responses._fields)))  # an entry per turn

    @property
    def turns(self) -> list[list[int]]:
        """The actor's."""
        return self.drawn.tokens

    @property
    def num_tokens(self) -> int:
        """After the prompt."""
        return sum(map(len, self.parts))

    @property
    def next_key(self) -> Key:
        """Of the noise of the next turn; the first turn's is that of a run without an environment."""
        return (*self.key, len(self.turns)) if self.parts else self.key


def played_episodes(
    prompts: PromptBatch,
    keys: Sequence[Key],
    environment: type,
    *,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    max_turns: int | None,
) -> Episodes:
    """One episode for each of this rank's prompts. A collective; ranks may hold different numbers, or none.

    Args:
        prompts: conversations.
        keys: of the noise of each prompt; the turn's number goes with it.
        environment: a class; see `engine.rollout.environments`.
        max_turns: of the actor's; no limit but `max_response_tokens` when not given.

    Raises:
        ValueError: on every rank, when an environment fails on any, or the chat template cannot go on.
    """
    limit = sampler.sampling.max_response_tokens
    with comm.same_error_everywhere():
        episodes = [_opened(prompts, row, key, environment) for row, key in enumerate(keys)]
    going_on = episodes
    with sampler.drawing() as draw:
        while comm.any_true(bool(going_on)):
            drawn = draw(
                [[*episode.prompt, *(token for part in episode.parts for token in part)] for episode in going_on],
                [episode.next_key for episode in going_on],
                [limit - episode.num_tokens for episode in going_on],
            )
            with comm.same_error_everywhere():
                for episode, *turn in zip(going_on, *drawn, strict=True):
                    _say(episode, turn, tokenizer)
                given = dict(tokenizer=tokenizer, eos_token_ids=sampler.eos_token_ids)
                going_on = [
                    episode
                    for episode in going_on
                    if (max_turns is None or len(episode.turns) < max_turns) and _replied(episode, limit, **given)
                ]
    return Episodes(
        sequences=Sequences.of_turns(prompts.tokens, [episode.parts for episode in episodes]),
        drawn=Responses(
            **{
                name: [list(chain.from_iterable(getattr(episode.drawn, name))) for episode in episodes]
                for name in Responses._fields
            }
        ),
        conversations=[episode.conversation for episode in episodes],
    )


def _opened(prompts: PromptBatch, row: int, key: Key, environment: type) -> Episode:
    return Episode(
        prompt=prompts.tokens[row],
        key=key,
        conversation=[dict(message) for message in prompts.prompts[row]],
        environment=new_environment(environment, {name: cells[row] for name, cells in prompts.columns.items()}),
    )


def _say(episode: Episode, turn: Sequence[list], tokenizer: PreTrainedTokenizerBase) -> None:
    """The actor's turn: an entry of each of `Responses`' lists."""
    tokens, *_ = turn
    episode.parts.append(tokens)
    for kept, new in zip(episode.drawn, turn, strict=True):
        kept.append(new)
    content = tokenizer.decode(tokens, skip_special_tokens=True)
    episode.conversation.append({"role": "assistant", "content": content})


def _replied(episode: Episode, limit: int, *, tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int]) -> bool:
    """Let the environment reply, if it may; whether it did, so that the actor has something to answer.

    Args:
        limit: tokens after the prompt.
    """
    if episode.num_tokens == limit:  # the turn was cut off, or ended just there
        return False
    reply = reply_of(episode.environment, episode.conversation)
    if reply is None:
        return False
    said_by = f"the reply of the environment {type(episode.environment).__qualname__}"
    ids = at(said_by, encode_reply, episode.conversation, reply, tokenizer, eos_token_ids)
    if episode.num_tokens + len(ids) >= limit:
        return False
    episode.parts.append(ids)
    episode.conversation.append({"role": "user", "content": reply})
    return True
