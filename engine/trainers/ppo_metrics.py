"""What an iteration is judged by: means over the responses or tokens of all ranks, or their extremes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.algorithms.losses import policy_statistics, value_clipped
from engine.data.formatting import Messages
from engine.data.sequences import Sequences
from engine.distributed import comm
from engine.rollout.experience import Experience


class StepStatistics:
    """One optimizer step, added up over this rank's micro-batches and then over ranks.

    Args:
        count: response tokens of the whole step, all ranks; what is summed here is divided by it.
    """

    def __init__(self, count: int, *, clip_range: float, value_clip_range: float):
        self.count, self.clip_range, self.value_clip_range = count, clip_range, value_clip_range
        # Each micro-batch's losses are divided by count already.
        self.policy_loss = self.value_loss = self.pretraining_loss = 0.0
        self.clipped = self.approx_kl = self.value_clipped = 0.0
        self.log_ratio_max = 0.0  # of |log ratio|
        self.ratio_max = 1.0

    @property
    def losses_are_finite(self) -> bool:
        """Whether this rank's are."""
        return bool(torch.tensor([self.policy_loss, self.value_loss, self.pretraining_loss]).isfinite().all())

    @torch.no_grad()
    def add_policy(self, loss: Tensor, new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor):
        """A micro-batch of the actor; shapes as for `clipped_policy_loss`."""
        seen = policy_statistics(new_logprobs, logprobs, advantages, mask, clip_range=self.clip_range)
        self.policy_loss += loss.item()
        self.clipped += seen["clipped"].item()
        self.approx_kl += seen["approx_kl"].item()
        self.ratio_max = max(self.ratio_max, seen["ratio_max"].item())
        log_ratios = (new_logprobs - logprobs)[mask]
        if len(log_ratios):
            self.log_ratio_max = max(self.log_ratio_max, log_ratios.abs().max().item())

    @torch.no_grad()
    def add_value(self, loss: Tensor, new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor):
        """A micro-batch of the critic; shapes as for `clipped_value_loss`."""
        self.value_loss += loss.item()
        clip = dict(value_clip_range=self.value_clip_range)
        self.value_clipped += value_clipped(new_values, values, returns, mask, **clip).item()

    def over_ranks(self) -> dict[str, float]:
        """The step's metrics. A collective."""
        losses = [self.policy_loss, self.value_loss, self.pretraining_loss]
        sums = [*losses, self.clipped, self.approx_kl, self.value_clipped]
        totals = comm.sum_over_ranks(torch.tensor(sums, dtype=torch.float64, device=comm.device())).tolist()
        policy_loss, value_loss, pretraining_loss, clipped, approx_kl, values_clipped = totals
        return {
            "tokens": self.count,
            "loss/policy": policy_loss,
            "loss/value": value_loss,
            "loss/pretraining": pretraining_loss,
            "policy/clip_fraction": clipped / self.count,
            "policy/approx_kl": approx_kl / self.count,
            "policy/log_ratio_max": comm.max_over_ranks(self.log_ratio_max),
            "policy/ratio_max": comm.max_over_ranks(self.ratio_max),
            "value/clip_fraction": values_clipped / self.count,
        }


MEANS_OF_STEPS = (
    *("loss/policy", "loss/value", "loss/pretraining", "policy/clip_fraction", "policy/approx_kl"),
    *("value/clip_fraction", "grad_norm/actor", "grad_norm/critic"),
)
# What a run without a critic, or without demonstrations, does not report.
OF_CRITIC = ("loss/value", "value/clip_fraction", "grad_norm/critic", "lr/critic")
OF_PRETRAINING = ("loss/pretraining",)


def step_metrics(steps: list[dict[str, float]], *, left_out: Sequence[str]) -> dict[str, float]:
    """An iteration's optimizer steps: means over tokens; `policy/ratio_max` is the largest ratio of all steps and
    `policy/first_log_ratio_max` the largest |log ratio| of the first, which is 0 but for rounding; learning rates are
    those of the last. NaN when every step was skipped.
    """
    tokens = sum(step["tokens"] for step in steps)
    means = {
        name: sum(step[name] * step["tokens"] for step in steps) / tokens if steps else math.nan
        for name in MEANS_OF_STEPS
        if name not in left_out
    }
    return means | {
        "policy/ratio_max": max(step["policy/ratio_max"] for step in steps) if steps else math.nan,
        "policy/first_log_ratio_max": steps[0]["policy/log_ratio_max"] if steps else math.nan,
        **{name: steps[-1][name] if steps else math.nan for name in ("lr/actor", "lr/critic") if name not in left_out},
    }


def experience_metrics(experience: Experience, *, eos_token_ids: list[int]) -> dict[str, float]:
    """What was rolled out and scored, the same on every rank.

    `kl/ref_mean` and `reward/kl_penalty` are sums over a response's tokens, averaged over responses.
    """
    scored = experience[(~experience.left_out).nonzero().flatten()]
    sequences, scores = scored.sequences, scored.scores
    lengths = sequences.response_lengths
    kl_per_response = experience.kl.sum().item() / len(scored)
    return {
        "score/mean": scores.mean().item(),
        "score/std": scores.std(correction=0).item(),
        "reward/kl_penalty": -experience.kl_coef * kl_per_response,
        "kl/ref_mean": kl_per_response,
        "kl/coef": experience.kl_coef,
        "policy/entropy": experience.entropy.mean().item() if len(experience.entropy) else 0.0,
        **_of_values(experience),
        "response/length_mean": lengths.float().mean().item(),
        "response/eos_fraction": ended(sequences, eos_token_ids).float().mean().item(),
        **_of_turns(sequences),
    }


def histograms_of(experience: Experience) -> dict[str, list[float]]:
    """What all ranks' responses are shown by as histograms: those that somebody could score."""
    scored = ~experience.left_out
    lengths = experience.sequences.response_lengths[scored]
    return {"score/histogram": experience.scores[scored].tolist(), "response/length_histogram": lengths.tolist()}


def sample_rows(
    experience: Experience,
    prompts: Sequence[str],
    responses: Sequence[Sequence[int]],
    texts: Sequence[str],
    conversations: Sequence[Messages] | None,
) -> list[dict[str, Any]]:
    """The first responses of an experience, one to look at for each text.

    Args:
        responses: token ids.
        texts: of the first responses.
    """
    kl = experience.padded("kl").sum(1)
    return [
        {
            "prompt": prompts[row],
            "response": text,
            "score": None if experience.left_out[row] else experience.scores[row].item(),
            "kl": kl[row].item(),
            "length": len(responses[row]),
            **({} if conversations is None else {"conversation": conversations[row]}),
        }
        for row, text in enumerate(texts)
    ]


def token_view(experience: Experience, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The first response with tokens, token by token: texts, and what was measured at each; None where none has any."""
    rows = experience.sequences.response_lengths.nonzero().flatten()[:1]
    if len(rows) == 0:
        return None
    one = experience[rows]
    tokens = one.sequences.padded(torch.tensor([0]), torch.device("cpu")).targets.tolist()
    names = ("logprobs", "ref_logprobs", "kl", "values", "rewards", "advantages")
    return {
        "prompt": tokenizer.decode(one.sequences.tokens[: one.sequences.prompt_lengths[0]].tolist()),
        "score": one.scores.item(),
        "tokens": token_texts(tokens, tokenizer),
        **{name: None if (numbers := getattr(one, name)) is None else _as_json(numbers) for name in names},
    }


def token_texts(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text of those before; joined, the text of all, without special tokens. A character
    of several tokens is the last one's.
    """
    texts, start, read = [], 0, 0  # text is settled up to `read`, and decoded from a little before: from `start`
    for end in range(1, len(tokens) + 1):
        before, with_this = (tokenizer.decode(tokens[start:to], skip_special_tokens=True) for to in (read, end))
        if with_this.endswith("\ufffd") and end < len(tokens):
            texts.append("")
            continue
        texts.append(with_this[len(before) :])
        start, read = read, end
    return texts


def _as_json(numbers: Tensor) -> list[float | None]:
    """JSON has no NaN or inf. Rounded: for the eye."""
    return [round(number, 5) if math.isfinite(number) else None for number in numbers.tolist()]


def ended(sequences: Sequences, eos_token_ids: list[int]) -> Tensor:
    """(B,) bool: whether a response ends with an end-of-sequence token."""
    last_tokens = sequences.tokens[sequences.lengths.cumsum(0) - 1]
    return torch.isin(last_tokens, torch.tensor(eos_token_ids, dtype=torch.int64)) & (sequences.response_lengths > 0)


def _of_turns(sequences: Sequences) -> dict[str, float]:
    """The actor's turns per episode, where there is an environment: others speak before each but the first."""
    if sequences.gaps is None:
        return {}
    turns = (sequences.gaps > 0).sum() + (sequences.response_lengths > 0).sum()
    return {"response/turns_mean": turns.item() / len(sequences)}


def _of_values(experience: Experience) -> dict[str, float]:
    if experience.values is None:
        return {}
    return {"value/explained_variance": explained_variance(experience.values, experience.returns)}


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one or constant returns."""
    variance = returns.var(correction=0) if len(returns) else torch.tensor(0.0)
    return 1 - ((returns - values).var(correction=0) / variance).item() if variance > 0 else 0.0
