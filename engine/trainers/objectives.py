"""What the supervised stages learn: SFT, reward model, DPO.

An objective is three functions. `number` turns every sequence of a micro-batch into one number (a log-probability, a
score); `loss` turns the numbers of some of a minibatch's examples into their part of its loss; `metrics` says what the
numbers of all examples, of all ranks, come to. Everything else is the same for all three and is the trainer's.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.algorithms.preference_losses import bradley_terry_loss, chosen_nll_loss, dpo_loss, ipo_loss
from engine.data import Examples
from engine.data.sequences import MicroBatch
from engine.distributed.initialize import Engine, WithoutAdapter
from engine.distributed.micro_batches import one_number_per_row


class Objective(Protocol):
    """What a `SupervisedTrainer` is given."""

    def prepared(self, examples: Examples) -> Examples:
        """The examples with all that the loss needs. A collective."""

    def number(self, model: Engine, batch: MicroBatch) -> Tensor:
        """(rows,) fp32 of each of the micro-batch's sequences, with gradient where gradients are on."""

    def loss(self, numbers: Tensor, rows: Tensor, examples: Examples) -> Tensor:
        """These rows' part of the mean over the minibatch.

        Args:
            numbers: (rows,) from `number`.
            rows: (rows,) which of the minibatch's sequences they belong to; an example's sequences are neighbours.
            examples: the whole minibatch, of all ranks.
        """

    def metrics(self, numbers: Tensor, examples: Examples) -> dict[str, float]:
        """Of all examples.

        Args:
            numbers: (B,) of all their sequences, on the CPU.
        """


class NextToken:
    """SFT: the negative log-likelihood of the response's tokens (with `loss_on: sequence` of all but the first).

    Every token of the minibatch weighs the same. Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5.
    """

    def __init__(self, *, chunk_tokens: int):
        self.chunk_tokens = chunk_tokens

    def prepared(self, examples: Examples) -> Examples:
        return examples

    def number(self, model: Engine, batch: MicroBatch) -> Tensor:
        """(rows,) log-probability of the response, nats."""
        return response_logprobs(model, batch, chunk_tokens=self.chunk_tokens)

    def loss(self, numbers: Tensor, rows: Tensor, examples: Examples) -> Tensor:
        return -numbers.sum() / examples.sequences.num_response_tokens

    def metrics(self, numbers: Tensor, examples: Examples) -> dict[str, float]:
        loss = -numbers.double().sum().item() / examples.sequences.num_response_tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class BradleyTerry:
    """Reward model: the chosen response's score above the rejected one's; see `bradley_terry_loss`."""

    def prepared(self, examples: Examples) -> Examples:
        return examples

    def number(self, model: Engine, batch: MicroBatch) -> Tensor:
        """(rows,) score at the last real token."""
        return model(batch.input_ids, batch.last_positions, position_ids=batch.position_ids)

    def loss(self, numbers: Tensor, rows: Tensor, examples: Examples) -> Tensor:
        chosen, rejected = numbers.view(-1, 2).unbind(1)
        margins = examples.margins[rows[::2] // 2].to(numbers.device)
        return bradley_terry_loss(chosen, rejected, margins, count=len(examples))

    def metrics(self, numbers: Tensor, examples: Examples) -> dict[str, float]:
        chosen, rejected = numbers.view(-1, 2).unbind(1)
        lengths = examples.sequences.response_lengths.float()
        return {
            "loss": bradley_terry_loss(chosen, rejected, examples.margins, count=len(examples)).item(),
            "accuracy": share_won(chosen, rejected),
            "margin": (chosen - rejected).mean().item(),
            "score_mean": numbers.mean().item(),
            "score_std": numbers.std(correction=0).item(),
            "length_correlation": correlation(numbers, lengths),
        }


class DirectPreference:
    """DPO, its conservative form, and IPO; see `dpo_loss`, `ipo_loss` and `chosen_nll_loss`.

    The ref's log-probabilities come with the examples, or are asked of the ref for every minibatch.
    """

    def __init__(
        self,
        ref_logprobs: Callable[[Examples], Tensor],
        *,
        loss: Literal["dpo", "ipo"],
        beta: float,
        label_smoothing: float,
        sft_coef: float,
        chunk_tokens: int,
    ):
        """
        Args:
            sft_coef: of `chosen_nll_loss`, which is added.
            ref_logprobs: (B,) of whole responses under the ref; a collective, called for examples without them.
        """
        self.ref_logprobs, self.kind, self.chunk_tokens = ref_logprobs, loss, chunk_tokens
        self.beta, self.label_smoothing, self.sft_coef = beta, label_smoothing, sft_coef

    def prepared(self, examples: Examples) -> Examples:
        if examples.ref_logprobs is not None:
            return examples
        return replace(examples, ref_logprobs=self.ref_logprobs(examples))

    def number(self, model: Engine, batch: MicroBatch) -> Tensor:
        """(rows,) log-probability of the response, nats."""
        return response_logprobs(model, batch, chunk_tokens=self.chunk_tokens)

    def loss(self, numbers: Tensor, rows: Tensor, examples: Examples) -> Tensor:
        chosen, rejected = numbers.view(-1, 2).unbind(1)
        ref_chosen, ref_rejected = examples.ref_logprobs[rows].to(numbers.device).view(-1, 2).unbind(1)
        given = (chosen, rejected, ref_chosen, ref_rejected)
        count = len(examples)
        if self.kind == "ipo":
            loss = ipo_loss(*given, beta=self.beta, count=count)
        else:
            margins = examples.margins[rows[::2] // 2].to(numbers.device)
            loss = dpo_loss(*given, margins, beta=self.beta, label_smoothing=self.label_smoothing, count=count)
        if self.sft_coef == 0:
            return loss
        lengths = examples.sequences.response_lengths[rows[::2]].to(numbers.device)
        return loss + self.sft_coef * chosen_nll_loss(chosen, lengths, count=count)

    def metrics(self, numbers: Tensor, examples: Examples) -> dict[str, float]:
        chosen, rejected = (self.beta * (numbers - examples.ref_logprobs)).view(-1, 2).unbind(1)
        return {
            "loss": self.loss(numbers, torch.arange(len(numbers)), examples).item(),
            "accuracy": share_won(chosen, rejected),
            "margin": (chosen - rejected).mean().item(),
            "reward_chosen": chosen.mean().item(),
            "reward_rejected": rejected.mean().item(),
            "logprobs_chosen": numbers[::2].mean().item(),
            "logprobs_rejected": numbers[1::2].mean().item(),
        }


def response_logprobs(model: Engine | WithoutAdapter, batch: MicroBatch, *, chunk_tokens: int) -> Tensor:
    """(rows,) log-probability of each row's whole response, nats."""
    given = dict(temperature=1.0, chunk_tokens=chunk_tokens, position_ids=batch.position_ids)
    return batch.sums_by_row(model(batch.input_ids, batch.positions, batch.targets, **given).logprobs)


def logprobs_of_all(
    model: Engine | WithoutAdapter, examples: Examples, *, token_budget: int, chunk_tokens: int, packed: bool
) -> Tensor:
    """(B,) log-probability of every response, nats, on the CPU and the same on every rank. A collective."""
    model.eval()
    return one_number_per_row(
        lambda batch: response_logprobs(model, batch, chunk_tokens=chunk_tokens),
        examples.sequences,
        token_budget=token_budget,
        rows_together=examples.rows_per_example,  # in the micro-batches of training: the same kernels, the same numbers
        packed=packed,
    )


def share_won(chosen: Tensor, rejected: Tensor) -> float:
    """Pairs in which the chosen response comes out ahead; a tie, as at DPO's start, is half a win."""
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected)).mean().item()


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = x.norm() * y.norm()
    return (x @ y / scale).item() if scale > 0 else 0.0
