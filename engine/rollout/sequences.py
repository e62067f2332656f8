"""Prompt + response rows of different lengths, kept flat; padding exists only inside a forward pass.

Rows are dealt out to ranks and cut into micro-batches here, once for scoring and training alike. The plan is made from
the lengths, which every rank knows, so that all ranks run the same number of forward passes without asking each other.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """Some rows as one model input.

    b rows, s tokens in the longest of them, n response tokens in all of them together. An empty micro-batch, which a
    rank runs to keep step with the others, is one row of one token with n = 0.
    """

    input_ids: Tensor  # (b, s) int64, each row at the left, padding at the right
    positions: Tensor  # (n,) int64 in 0..b*s-1: the states before each response token
    targets: Tensor  # (n,) int64: the response tokens
    last_positions: Tensor  # (rows,) int64 in 0..b*s-1: the last token of each row
    rows: Tensor  # (rows,) int64, on the CPU: which rows these are
    response_tokens: Tensor  # (n,) int64, on the CPU: where their tokens stand among all rows' response tokens


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """B prompts with their responses, T tokens in all."""

    tokens: Tensor  # (T,) int64: prompt, response, prompt, response, ...
    prompt_lengths: Tensor  # (B,) int64, at least 1
    response_lengths: Tensor  # (B,) int64

    def __post_init__(self):
        if self.prompt_lengths.shape != self.response_lengths.shape:
            raise ValueError(
                f"Sequences.response_lengths has shape {tuple(self.response_lengths.shape)}; prompt_lengths says "
                f"(B,) = {tuple(self.prompt_lengths.shape)}."
            )
        if len(self) and self.prompt_lengths.min() < 1:
            raise ValueError("Sequences.prompt_lengths holds a prompt without tokens: nothing predicts its response.")
        if len(self.tokens) != int(self.lengths.sum()):
            raise ValueError(f"Sequences.tokens has {len(self.tokens)} tokens; the lengths say {self.lengths.sum()}.")

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> "Sequences":
        """From lists of token ids."""
        flat = [token for pair in zip(prompts, responses, strict=True) for part in pair for token in part]
        return cls(
            tokens=torch.tensor(flat, dtype=torch.int64),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64),
            response_lengths=torch.tensor([len(response) for response in responses], dtype=torch.int64),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, rows: Tensor) -> "Sequences":
        return Sequences(
            tokens=self.tokens[ragged_index(self.lengths, rows)],
            prompt_lengths=self.prompt_lengths[rows],
            response_lengths=self.response_lengths[rows],
        )

    @property
    def lengths(self) -> Tensor:
        """(B,) prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    @property
    def num_response_tokens(self) -> int:
        return int(self.response_lengths.sum())

    def padded(self, rows: Tensor, device: torch.device) -> PaddedRows:
        """These rows as one model input, on `device`."""
        if len(rows) == 0:
            none = torch.empty(0, dtype=torch.int64)
            on_device = dict(positions=none, targets=none, last_positions=none)
            return PaddedRows(
                input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device),
                **{name: tensor.to(device) for name, tensor in on_device.items()},
                rows=none,
                response_tokens=none,
            )
        lengths, prompt_lengths = self.lengths[rows], self.prompt_lengths[rows]
        width = int(lengths.max())
        real = torch.arange(width) < lengths[:, None]
        input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        input_ids[real] = self.tokens[ragged_index(self.lengths, rows)]
        in_response = real & (torch.arange(width) >= prompt_lengths[:, None])
        flat = in_response.flatten().nonzero().squeeze(-1)
        on_device = dict(
            input_ids=input_ids,
            positions=flat - 1,  # the state one token earlier predicts the token
            targets=input_ids.flatten()[flat],
            last_positions=torch.arange(len(rows)) * width + lengths - 1,
        )
        return PaddedRows(
            **{name: tensor.to(device) for name, tensor in on_device.items()},
            rows=rows,
            response_tokens=ragged_index(self.response_lengths, rows),
        )


def ragged_index(lengths: Tensor, rows: Tensor) -> Tensor:
    """Where the elements of some rows stand in a flat tensor of all rows.

    Args:
        lengths: (B,) elements of each row of the flat tensor.
        rows: (b,) the rows wanted, in the order wanted.

    Returns:
        (sum of lengths[rows],) int64.
    """
    starts = (lengths.cumsum(0) - lengths)[rows]
    wanted = lengths[rows]
    offsets = torch.arange(int(wanted.sum())) - (wanted.cumsum(0) - wanted).repeat_interleave(wanted)
    return starts.repeat_interleave(wanted) + offsets


def plan_micro_batches(lengths: Tensor, *, token_budget: int, num_ranks: int) -> list[list[Tensor]]:
    """Which rows each rank runs together, so that ranks are equally busy and little padding is computed.

    Rows go, longest first, to the rank with the fewest tokens so far (Graham 1969, longest processing time first);
    each rank's rows are then cut, still in order of length, where rows x longest row would exceed the budget.

    Args:
        lengths: (B,) tokens of each row.
        token_budget: padded tokens per forward pass. A single row may exceed it.

    Returns:
        For each rank its micro-batches as row numbers: every row exactly once, and as many micro-batches for every
        rank, the missing ones empty.
    """
    rows_of: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [(0, number) for number in range(num_ranks)]
    sizes = lengths.tolist()
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        tokens, number = heapq.heappop(load)
        rows_of[number].append(row)
        heapq.heappush(load, (tokens + sizes[row], number))
    plans = [_cut(rows, sizes, token_budget) for rows in rows_of]
    passes = max(len(plan) for plan in plans)
    empty: list[int] = []
    return [[torch.tensor(rows, dtype=torch.int64) for rows in plan + [empty] * (passes - len(plan))] for plan in plans]


def _cut(rows: list[int], sizes: list[int], token_budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * sizes[batches[-1][0]] <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
