"""What actor, ref, critic and reward model say about given responses: one forward pass each, no gradients; none of the
actor where the rollout's own numbers do.

Every rank measures the rows that the plan deals it; adding the ranks' zero-filled results puts them together. NaN on
one rank is thereby NaN on all. What a rollout says of its own rows is put together row after row.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.algorithms.kl import sampled_kl
from engine.algorithms.logprobs import chunked_full_kl
from engine.data.sequences import MicroBatch, Sequences
from engine.distributed import comm
from engine.distributed.gather import gathered, gathered_for_scoring
from engine.distributed.initialize import Engine, Switched
from engine.distributed.micro_batches import my_micro_batches, one_number_per_row
from engine.rollout.generation import Responses


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """(N,) fp32 on the CPU each: one number per response token, the same on every rank. As in `Experience`."""

    logprobs: Tensor
    behaviour_logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    entropy: Tensor
    values: Tensor | None  # None without a critic

    def of(self, tokens: Tensor) -> "Measurements":
        """Of the response tokens that are True in `tokens` (N,)."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Measurements(**{name: tensor if tensor is None else tensor[tokens] for name, tensor in named})


class Drawn(NamedTuple):
    """(N,) fp32 on the CPU each: what the rollout says of its tokens, of all ranks. As in `Responses`."""

    behaviour_logprobs: Tensor
    logprobs: Tensor
    entropy: Tensor
    values: Tensor


@torch.no_grad()
def measure(
    sequences: Sequences,
    drawn: Drawn | None,
    *,
    recomputed: bool,
    actor: Engine,
    ref: Engine | Switched,
    critic: Engine | None,
    kl_estimator: str,
    temperature: float,
    chunk_tokens: int,
    token_budget: int,
    gather_weights: bool = True,
) -> Measurements:
    """Log-probs, KL and values of all responses. A collective.

    Args:
        drawn: from the rollout; None where nobody knows: the tokens then count as drawn by the actor's own
            distribution.
        recomputed: the actor's log-probabilities and entropies, and values from a head of its own, come from a forward
            pass and not from `drawn`. The full KL needs one.
        critic: None where advantages need no values, or where the actor has a value head.
        gather_weights: under ZeRO-3, hold one model after the other whole; see `gathered_for_scoring`.
    """
    for engine in filter(None, (actor, ref, critic)):
        engine.eval()
    recomputed = recomputed or drawn is None
    of_actor = ("logprobs", "entropy") if recomputed else ()
    of_critic = ("values",) if critic is not None or (recomputed and actor.module.has_value_head) else ()
    names = ("ref_logprobs", *of_actor, *of_critic, *(("kl",) if kl_estimator == "full" else ()))
    mine = {name: torch.zeros(sequences.num_response_tokens, device=comm.device()) for name in names}
    given = dict(temperature=temperature, chunk_tokens=chunk_tokens)

    def ask_ref(batch: MicroBatch) -> Any:
        theirs = ref(batch.input_ids, batch.positions, batch.targets, **given)
        mine["ref_logprobs"][batch.response_tokens] = theirs.logprobs
        return theirs

    def ask_actor(batch: MicroBatch) -> Any:
        ours = actor(batch.input_ids, batch.positions, batch.targets, with_entropy=True, **given)
        at = batch.response_tokens
        mine["logprobs"][at], mine["entropy"][at] = ours.logprobs, ours.entropy
        if of_critic and critic is None:
            mine["values"][at] = ours.values
        return ours

    def ask_both(batch: MicroBatch) -> None:
        ours, theirs = ask_actor(batch), ask_ref(batch)
        mine["kl"][batch.response_tokens] = _full_kl(actor, ref, ours.hidden, theirs.hidden, given)

    def ask_critic(batch: MicroBatch) -> None:
        mine["values"][batch.response_tokens] = critic(batch.input_ids, batch.positions)

    of_policies = [(ask_ref, [ref]), *([(ask_actor, [actor])] if recomputed else [])]
    passes = [(ask_both, [actor, ref])] if kl_estimator == "full" else of_policies
    passes += [(ask_critic, [critic])] if critic is not None else []
    batches = list(my_micro_batches(sequences, token_budget=token_budget))
    for ask, asked in passes:
        with gathered_for_scoring(*asked, gather=gather_weights), _held(*asked):
            for batch in batches:
                ask(batch)
    together = comm.sum_over_ranks(torch.stack([mine[name] for name in names])).cpu()
    found = {} if drawn is None else drawn._asdict()
    if critic is None and not actor.module.has_value_head:
        found["values"] = None
    found |= dict(zip(names, together, strict=True))
    found.setdefault("behaviour_logprobs", found["logprobs"])
    if kl_estimator != "full":
        found["kl"] = sampled_kl(found["logprobs"], found["ref_logprobs"], estimator=kl_estimator)
    return Measurements(**found)


def reward_model_scores(
    sequences: Sequences, reward: Engine | Switched, *, token_budget: int, gather_weights: bool = True
) -> Tensor:
    """(B,) fp32 on the CPU: the reward model's number at the last real token of each row. A collective.

    Args:
        gather_weights: as for `measure`.
    """
    reward.eval()
    with gathered_for_scoring(reward, gather=gather_weights), _held(reward):
        return one_number_per_row(
            lambda batch: reward(batch.input_ids, batch.last_positions), sequences, token_budget=token_budget
        )


def _held(*asked: Engine | Switched) -> AbstractContextManager:
    """An engine that is asked alone, changed over once and not for every pass."""
    return asked[0].held() if len(asked) == 1 and isinstance(asked[0], Switched) else nullcontext()


def drawn_on_all_ranks(mine: Responses) -> Drawn:
    """What the ranks' rollouts say of their tokens, rank 0's first. A collective."""
    flat = [[number for row in getattr(mine, name) for number in row] for name in Drawn._fields]
    numbers = torch.tensor(flat, dtype=torch.float32, device=comm.device()).view(len(Drawn._fields), -1)
    # Each as a tensor of its own: a checkpoint keeps them so, and a sum over every fifth number rounds otherwise.
    return Drawn(*comm.concatenated(numbers.t().contiguous()).cpu().t().contiguous())


def sequences_of_all_ranks(mine: Sequences) -> Sequences:
    """The ranks' rows, rank 0's first; all with gaps or all without. A collective."""
    device = comm.device()
    lengths = torch.stack([mine.prompt_lengths, mine.response_lengths], dim=1).to(device)
    prompt_lengths, response_lengths = comm.concatenated(lengths).cpu().unbind(1)
    tokens = comm.concatenated(mine.tokens.to(device)).cpu()
    gaps = None if mine.gaps is None else comm.concatenated(mine.gaps.to(device)).cpu()
    return Sequences(tokens=tokens, prompt_lengths=prompt_lengths, response_lengths=response_lengths, gaps=gaps)


def _full_kl(actor: Engine, ref: Engine | Switched, hidden: Tensor, ref_hidden: Tensor, given: dict) -> Tensor:
    head, ref_head = actor.module.head, ref.module.head
    with gathered([*head.parameters(), *ref_head.parameters()]):
        return chunked_full_kl(hidden, head.weight, head.bias, ref_hidden, ref_head.weight, ref_head.bias, **given)
