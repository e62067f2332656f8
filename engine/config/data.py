"""Where rows come from, which columns they have, and how long they may be."""

from dataclasses import dataclass
from typing import Literal

from engine.config.checks import at_least


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts (PPO), and what every kind of data has.

    Attributes:
        train: a JSONL, JSON, CSV or Parquet file, a folder of such files, or a hub name; or a list of these.
        weights: one number per entry of `train`: their shares of the rows that are used, which are then as many as
            the scarcest source allows. Without weights every row is used.
        train_subset: of a hub dataset, where it has several; `eval` is of the same.
        train_split: of a hub dataset.
        prompt_column: the column that holds the prompt; found among the usual names when not given. An `instruction`
            that is found is Alpaca's: a row's `input` follows it after a blank line.
        prompt_format: what to do with a prompt that is a string: `text` takes it as it is, `chat` as what the user
            says, put through the chat template. A list of messages always goes through the chat template; of one that
            ends with the assistant's turn, PPO cuts that turn off and prints the count.
        chat_template: a file with a Jinja template in place of the tokenizer's own; exported with the model.
        max_prompt_tokens: a longer prompt is treated as `over_length` says.
        over_length: `drop` (the count is printed), `error`, `truncate_left` (keep the end, and a BOS token before it),
            `truncate_right` (not of conversations: the turn that asks for an answer is at their end).
        max_samples: only the first so many rows of each source.
        eval: what is held out, with the columns of `train`: a file, a folder or a hub name. In PPO these are prompts,
            which are asked as `evaluation` says.
        eval_split: of a hub dataset that is held out.
    """

    train: str | list[str]
    weights: list[float] | None = None
    train_subset: str | None = None
    train_split: str = "train"
    prompt_column: str | None = None
    prompt_format: Literal["text", "chat"] = "text"
    chat_template: str | None = None
    max_prompt_tokens: int = 512
    over_length: Literal["drop", "error", "truncate_left", "truncate_right"] = "drop"
    max_samples: int | None = None
    eval: str | None = None
    eval_split: str = "test"

    def __post_init__(self):
        at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        if self.max_samples is not None:
            at_least("data.max_samples", self.max_samples, 1)
        if not self.train:
            raise ValueError("data.train names no source.")
        if self.weights is not None:
            if len(self.weights) != len(self.sources):
                raise ValueError(f"data.weights has {len(self.weights)} entries and data.train {len(self.sources)}.")
            if not all(0 < weight < float("inf") for weight in self.weights):
                raise ValueError(f"data.weights={self.weights}: each must be above 0.")

    @property
    def sources(self) -> list[str]:
        """`train` as a list."""
        return [self.train] if isinstance(self.train, str) else self.train


@dataclass(frozen=True, kw_only=True)
class SupervisedDataConfig(DataConfig):
    """Data with responses: what is trained on, and what is held out.

    Attributes:
        eval: what is held out, with the columns of `train`: a file, a folder or a hub name. Prompts that are trained on
            too are counted; if all rows are, it is an error.
        eval_fraction: without `eval`, this share of the prompts of `train` is held out, with all that answers them.
        max_length: tokens of prompt and response together; a longer row is treated as `over_length` says:
            `truncate_left` cuts the prompt's beginning, `truncate_right` the response's end.
    """

    eval_fraction: float = 0.0
    max_length: int = 1024

    def __post_init__(self):
        super().__post_init__()
        at_least("data.max_length", self.max_length, 2)
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction={self.eval_fraction} must be at least 0 and below 1.")
        if self.eval is not None and self.eval_fraction > 0:
            raise ValueError("Set data.eval or data.eval_fraction, not both.")


@dataclass(frozen=True, kw_only=True)
class DemonstrationDataConfig(SupervisedDataConfig):
    """Prompts with the response to learn (SFT).

    Attributes:
        response_column: found among the usual names when not given. A row whose prompt is a conversation that ends
            with the assistant's turn needs none; where there is one all the same, name the prompt's column here too.
    """

    response_column: str | None = None


@dataclass(frozen=True, kw_only=True)
class PreferenceDataConfig(SupervisedDataConfig):
    """Pairs of responses (reward model, DPO).

    Attributes:
        chosen_column: `chosen` when not given. Without a prompt column, or with this or the rejected one for it, both
            hold a whole conversation: a list of messages, or a transcript with `\\n\\nAssistant:` turns. With one,
            a conversation holds the prompt or goes on from it.
        rejected_column: `rejected` when not given; as `chosen_column`.
        margin_column: by how much the chosen response should win before the loss is content, in units of the score
            (Touvron et al. 2023, https://arxiv.org/abs/2307.09288, section 3.2.2); 0 for every row when not given.
    """

    chosen_column: str | None = None
    rejected_column: str | None = None
    margin_column: str | None = None
