"""What actor, ref, critic and reward model say about given responses: one forward pass each, no gradients.

Every rank measures the rows that the plan deals it; adding the ranks' zero-filled results puts them together. NaN on
one rank is thereby NaN on all.
"""

from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from engine.algorithms.kl import sampled_kl
from engine.algorithms.logprobs import chunked_full_kl
from engine.data.sequences import Sequences
from engine.distributed import comm
from engine.distributed.gather import gathered
from engine.distributed.initialize import Engine, Switched
from engine.distributed.micro_batches import my_micro_batches, one_number_per_row


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


@torch.no_grad()
def measure(
    sequences: Sequences,
    behaviour_logprobs: Tensor | None,
    *,
    actor: Engine,
    ref: Engine | Switched,
    critic: Engine | None,
    kl_estimator: str,
    temperature: float,
    chunk_tokens: int,
    token_budget: int,
) -> Measurements:
    """Log-probs, KL and values of all responses. A collective.

    Args:
        critic: None where advantages need no values, or where the actor has a value head.
        behaviour_logprobs: (N,) what the tokens were drawn with; from the rollout, handed through. The actor's own
            where nobody knows.
    """
    for engine in filter(None, (actor, ref, critic)):
        engine.eval()
    has_values = critic is not None or actor.module.has_value_head
    names = ("logprobs", "ref_logprobs", "kl", "entropy", *(("values",) if has_values else ()))
    mine = {name: torch.zeros(sequences.num_response_tokens, device=comm.device()) for name in names}
    given = dict(temperature=temperature, chunk_tokens=chunk_tokens)
    for batch in my_micro_batches(sequences, token_budget=token_budget):
        at = batch.response_tokens
        ours = actor(batch.input_ids, batch.positions, batch.targets, **given)
        theirs = ref(batch.input_ids, batch.positions, batch.targets, **given)
        mine["logprobs"][at], mine["ref_logprobs"][at], mine["entropy"][at] = (
            ours.logprobs,
            theirs.logprobs,
            ours.entropy,
        )
        if kl_estimator == "full":
            mine["kl"][at] = _full_kl(actor, ref, ours.hidden, theirs.hidden, given)
        else:
            mine["kl"][at] = sampled_kl(ours.logprobs, theirs.logprobs, estimator=kl_estimator)
        if has_values:
            mine["values"][at] = ours.values if critic is None else critic(batch.input_ids, batch.positions)
    together = comm.sum_over_ranks(torch.stack([mine[name] for name in names])).cpu()
    found = dict(zip(names, together, strict=True))
    drawn_with = found["logprobs"] if behaviour_logprobs is None else behaviour_logprobs
    return Measurements(**{"behaviour_logprobs": drawn_with, "values": None} | found)


def reward_model_scores(sequences: Sequences, reward: Engine | Switched, *, token_budget: int) -> Tensor:
    """(B,) fp32 on the CPU: the reward model's number at the last real token of each row. A collective."""
    reward.eval()
    with reward.held() if isinstance(reward, Switched) else nullcontext():
        return one_number_per_row(
            lambda batch: reward(batch.input_ids, batch.last_positions), sequences, token_budget=token_budget
        )


def per_token_of_all_ranks(mine: list[list[float]]) -> Tensor:
    """(N,) fp32 on the CPU: the ranks' numbers of their response tokens, rank 0's first. A collective."""
    flat = torch.tensor([number for row in mine for number in row], dtype=torch.float32, device=comm.device())
    return comm.concatenated(flat).cpu()


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
