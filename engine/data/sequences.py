"""Prompt + response rows of different lengths, kept flat; padding exists only inside a forward pass.

In an episode of several turns the response tokens of a row, those that the actor wrote, do not lie side by side: what
others said stands between them, as `gaps`. Numbers per response token know nothing of it: one follows the other.

Rows are dealt out to ranks and cut into micro-batches here, once for scoring and training alike. The plan is made from
the lengths, which every rank knows, so that all ranks run the same number of forward passes without asking each other.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# What one more forward pass costs, in tokens of a full one: starting it, reading the weights, adding up gradients.
PASS_COST = 1 / 8


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Some rows as one model input: each in its own row and padded at the right, or packed into one.

    b rows, s tokens in the longest of them (packed: 1 row, s tokens in all), n response tokens in all of them together.
    An empty micro-batch, which a rank runs to keep step with the others, is one row of one token with n = 0.
    """

    input_ids: Tensor  # (b, s) int64
    position_ids: Tensor | None  # (1, s) int64, counted from 0 in each packed row; None where rows are padded
    positions: Tensor  # (n,) int64 in 0..b*s-1: the states before each response token
    targets: Tensor  # (n,) int64: the response tokens
    target_rows: Tensor  # (n,) int64 in 0..rows-1: which of these rows each response token is of
    last_positions: Tensor  # (rows,) int64 in 0..b*s-1: the last token of each row
    rows: Tensor  # (rows,) int64, on the CPU: which rows these are
    response_tokens: Tensor  # (n,) int64, on the CPU: where their tokens stand among all rows' response tokens

    def sums_by_row(self, per_token: Tensor) -> Tensor:
        """(n,) numbers of response tokens -> (rows,) their sums, differentiable."""
        return per_token.new_zeros(len(self.rows)).index_add(0, self.target_rows, per_token)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """B prompts with their responses, T tokens in all, N of them of responses."""

    tokens: Tensor  # (T,) int64: prompt, response, prompt, response, ...
    prompt_lengths: Tensor  # (B,) int64, at least 1
    response_lengths: Tensor  # (B,) int64, of the actor's own tokens
    gaps: Tensor | None = None  # (N,) int64: tokens of others just before each response token; None: nowhere any

    def __post_init__(self):
        if self.prompt_lengths.shape != self.response_lengths.shape:
            raise ValueError(
                f"Sequences.response_lengths has shape {tuple(self.response_lengths.shape)}; prompt_lengths says "
                f"(B,) = {tuple(self.prompt_lengths.shape)}."
            )
        if len(self) and self.prompt_lengths.min() < 1:
            raise ValueError("Sequences.prompt_lengths holds a prompt without tokens: nothing predicts its response.")
        if self.gaps is not None and self.gaps.shape != (self.num_response_tokens,):
            raise ValueError(
                f"Sequences.gaps has shape {tuple(self.gaps.shape)}; there are {self.num_response_tokens} response "
                f"tokens."
            )
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

    @classmethod
    def of_turns(cls, prompts: Sequence[Sequence[int]], parts: Sequence[Sequence[Sequence[int]]]) -> "Sequences":
        """From lists of token ids.

        Args:
            parts: of each row what follows the prompt: a turn of the actor's, what others said, a turn of the actor's
                and so on; the last is the actor's and is not empty.
        """
        gaps: list[int] = []
        for row in parts:
            gap = 0
            for number, part in enumerate(row):
                if number % 2:
                    gap += len(part)
                elif part:
                    gaps += [gap, *[0] * (len(part) - 1)]
                    gap = 0
        flat = [token for prompt, row in zip(prompts, parts, strict=True) for part in (prompt, *row) for token in part]
        lengths = [sum(len(part) for part in row[::2]) for row in parts]
        return cls(
            tokens=torch.tensor(flat, dtype=torch.int64),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64),
            response_lengths=torch.tensor(lengths, dtype=torch.int64),
            gaps=torch.tensor(gaps, dtype=torch.int64),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, rows: Tensor) -> "Sequences":
        return Sequences(
            tokens=self.tokens[ragged_index(self.lengths, rows)],
            prompt_lengths=self.prompt_lengths[rows],
            response_lengths=self.response_lengths[rows],
            gaps=None if self.gaps is None else self.gaps[ragged_index(self.response_lengths, rows)],
        )

    def without_responses(self, rows: Tensor) -> "Sequences":
        """The same with nothing after the prompts of the rows that are True in `rows` (B,)."""
        within = torch.arange(len(self.tokens)) - (self.lengths.cumsum(0) - self.lengths).repeat_interleave(
            self.lengths
        )
        stays = within < torch.where(rows, self.prompt_lengths, self.lengths).repeat_interleave(self.lengths)
        return Sequences(
            tokens=self.tokens[stays],
            prompt_lengths=self.prompt_lengths,
            response_lengths=self.response_lengths.masked_fill(rows, 0),
            gaps=None if self.gaps is None else self.gaps[~rows.repeat_interleave(self.response_lengths)],
        )

    @property
    def lengths(self) -> Tensor:
        """(B,) all tokens of a row: prompt, response, and what others said between."""
        own = self.prompt_lengths + self.response_lengths
        return own if self.gaps is None else own + self._lengths_between

    @cached_property
    def _lengths_between(self) -> Tensor:
        """(B,) tokens that others said after the prompt."""
        rows = torch.arange(len(self)).repeat_interleave(self.response_lengths)
        return torch.zeros_like(self.response_lengths).index_add(0, rows, self.gaps)

    @property
    def num_response_tokens(self) -> int:
        return int(self.response_lengths.sum())

    def padded(self, rows: Tensor, device: torch.device) -> MicroBatch:
        """These rows as one model input on `device`, each padded at the right to the longest."""
        if len(rows) == 0:
            return self._nothing(device)
        lengths = self.lengths[rows]
        width = int(lengths.max())
        real = torch.arange(width) < lengths[:, None]
        input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
        input_ids[real] = self.tokens[ragged_index(self.lengths, rows)]
        return self._micro_batch(rows, input_ids, None, torch.arange(len(rows)) * width, device)

    def packed(self, rows: Tensor, device: torch.device) -> MicroBatch:
        """These rows as one model input on `device`, one after another in a single row without padding."""
        if len(rows) == 0:
            return self._nothing(device)
        lengths = self.lengths[rows]
        starts = lengths.cumsum(0) - lengths
        position_ids = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
        input_ids = self.tokens[ragged_index(self.lengths, rows)]
        return self._micro_batch(rows, input_ids[None], position_ids[None], starts, device)

    def _micro_batch(
        self, rows: Tensor, input_ids: Tensor, position_ids: Tensor | None, starts: Tensor, device: torch.device
    ) -> MicroBatch:
        """`starts`: (rows,) where each row begins in the flattened input_ids."""
        responses = self.response_lengths[rows]
        target_rows = torch.arange(len(rows)).repeat_interleave(responses)
        within = torch.arange(int(responses.sum())) - (responses.cumsum(0) - responses)[target_rows]
        response_tokens = ragged_index(self.response_lengths, rows)
        at = (starts + self.prompt_lengths[rows])[target_rows] + within
        if self.gaps is not None:
            gaps, between = self.gaps[response_tokens], self._lengths_between[rows]
            at = at + gaps.cumsum(0) - (between.cumsum(0) - between)[target_rows]
        on_device = dict(
            input_ids=input_ids,
            positions=at - 1,  # the state one token earlier predicts the token
            targets=input_ids.flatten()[at],
            target_rows=target_rows,
            last_positions=starts + self.lengths[rows] - 1,
        )
        return MicroBatch(
            **{name: tensor.to(device) for name, tensor in on_device.items()},
            position_ids=None if position_ids is None else position_ids.to(device),
            rows=rows,
            response_tokens=response_tokens,
        )

    def _nothing(self, device: torch.device) -> MicroBatch:
        none = torch.empty(0, dtype=torch.int64)
        return MicroBatch(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device),
            position_ids=None,
            **{name: none.to(device) for name in ("positions", "targets", "target_rows", "last_positions")},
            rows=none,
            response_tokens=none,
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


def plan_micro_batches(
    lengths: Tensor, *, token_budget: int, num_ranks: int, packed: bool = False
) -> list[list[Tensor]]:
    """Which rows each rank runs together, so that ranks are equally busy and little padding is computed.

    Rows go, longest first, to the rank with the fewest tokens so far (Graham 1969, longest processing time first);
    each rank's rows are then cut, still in order of length, into micro-batches within the budget with little padding.

    Args:
        lengths: (B,) tokens of each row.
        token_budget: tokens per forward pass, padding included. A single row may exceed it.
        packed: rows lie one after another, without padding to the longest.

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
    plans = [cut_by_length(rows, sizes, token_budget=token_budget, packed=packed) for rows in rows_of]
    passes = max(len(plan) for plan in plans)
    empty: list[int] = []
    return [[torch.tensor(rows, dtype=torch.int64) for rows in plan + [empty] * (passes - len(plan))] for plan in plans]


def cut_by_length(
    rows: Sequence[int], sizes: Sequence[int], *, token_budget: int, packed: bool = False
) -> list[Sequence[int]]:
    """Rows in order of length, longest first, cut where it costs least: the tokens of all passes, padding included, and
    for every pass as much as PASS_COST of the budget.

    Args:
        rows: row numbers, in order of `sizes`.
        sizes: tokens, by row number.
        token_budget, packed: as for `plan_micro_batches`.
    """
    cheapest, begins = [0.0], [0]  # of the first 0, 1, 2, ... rows; where their last micro-batch begins
    for end in range(1, len(rows) + 1):
        best, own = math.inf, 0
        for begin in range(end - 1, -1, -1):
            own += sizes[rows[begin]]
            tokens = own if packed else (end - begin) * sizes[rows[begin]]
            if tokens > token_budget and end - begin > 1:
                break
            if cheapest[begin] + tokens < best:
                best, at = cheapest[begin] + tokens, begin
        cheapest.append(best + PASS_COST * token_budget)
        begins.append(at)
    batches: list[Sequence[int]] = []
    end = len(rows)
    while end > 0:
        batches.append(rows[begins[end] : end])
        end = begins[end]
    return batches[::-1]
