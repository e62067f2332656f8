"""The settings of `launch/generate.py`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from engine.config.checks import at_least

ROOM = "Raise --max_prompt_tokens, lower --max_response_tokens, or choose another --over_length."


@dataclass(frozen=True, kw_only=True)
class AnsweringConfig:
    """Write the responses of a trained model to a file of prompts, or chat with it on the terminal.

    Attributes:
        model: an exported folder, an adapter's (its base is found by its adapter_config.json), a run's (its actor/ or
            model/), or a hub name.
        other: a second model, side by side.
        prompts: a JSONL, JSON, CSV or Parquet file, a folder of these or a hub name. Without it, a chat.
        output: the JSONL file to write.
        prompt_column: found among the usual names when not given, as in training.
        prompt_format: `text` continues a prompt that is a string as it is, `chat` takes it as what the user says. When
            not given `text` for a file, as in training, and `chat` on the terminal.
        chat_template: a file with a Jinja template in place of the tokenizer's own.
        system: what a conversation begins with, unless it has a system message of its own.
        max_prompt_tokens: as many as the model's context leaves when not given. In a chat, of the conversation so far.
        over_length: what is done with a longer prompt: `error`, `drop`, `truncate_left`, `truncate_right`.
        max_response_tokens: 256 when not given, or half of the model's context where that is less.
        temperature: 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that have this probability together; 1.0 is all of them.
        top_k: draw from so many of the likeliest tokens; 0 is all of them.
        seed: of what is drawn.
        batch_size: responses decoded at the same time; the same are written whatever it is.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU.
        device: as in `cuda:1`; a GPU when there is one.
    """

    model: str
    other: str | None = None
    prompts: str | None = None
    output: str | None = None
    prompt_column: str | None = None
    prompt_format: Literal["text", "chat"] | None = None
    chat_template: str | None = None
    system: str | None = None
    max_prompt_tokens: int | None = None
    over_length: Literal["error", "drop", "truncate_left", "truncate_right"] = "error"
    max_response_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    batch_size: int = 16
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None

    def __post_init__(self):
        for name in ("max_prompt_tokens", "max_response_tokens", "batch_size"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        at_least("top_k", self.top_k, 0)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be at least 0, which takes the likeliest token.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1].")
        if self.prompts is not None and self.output is None:
            raise ValueError(f"prompts={self.prompts} are answered into a file: name it with --output.")
        if self.prompts is None and self.output is not None:
            raise ValueError(f"output={self.output} needs prompts to answer: name their file with --prompts.")
        if self.system is not None and self.prompt_format == "text":
            raise ValueError("system begins a conversation, and prompt_format=text has none: leave one of them out.")


@contextmanager
def own_names() -> Iterator[None]:
    """Errors of the data layer with the names that its settings have here."""
    try:
        yield
    except ValueError as error:
        said = str(error).replace("--data.", "--").replace("data.chat_template", "chat_template")
        raise ValueError(said.replace("Raise --max_prompt_tokens.", ROOM)) from error
