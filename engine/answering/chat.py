"""A chat with a model, or with two side by side, on a terminal; lines in and answers out where there is none."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from engine.answering.answerer import Answerer
from engine.answering.display import TextStream, columns, visible
from engine.answering.settings import AnsweringConfig, own_names
from engine.data.formatting import Messages, encode, render

HELP = """\
/reset   forget the conversation
/quit    end, as Ctrl-D does
/help    this
Ctrl-C stops the answer that is being written; what has been said of it stays in the conversation."""
SIDE_BY_SIDE = 100  # characters that a terminal has to have for two columns


@dataclass
class Side:
    """One model's side of the conversation: what the user said, and what it answered itself."""

    answerer: Answerer
    opening: Messages
    is_chat: bool  # or else every line is continued as it is, and nothing is remembered
    exchanges: list[Messages] = field(default_factory=list)  # a user's turn and its answer each

    def prompt(self, said: str) -> tuple[list[int], int]:
        """Token ids of the conversation with this at its end, and how many of the oldest exchanges have to be forgotten
        to make them fit.

        Raises:
            ValueError: it does not fit even alone, or the chat template refuses it.
        """
        kept, tokenizer, room = list(self.exchanges), self.answerer.tokenizer, self.answerer.max_prompt_tokens
        while True:
            asked = {"role": "user", "content": said}
            turns = [*self.opening, *(turn for exchange in kept for turn in exchange), asked]
            ids = encode(render(turns if self.is_chat else said, tokenizer), tokenizer)
            if room is None or len(ids) <= room:
                break
            if not kept:
                raise ValueError(f"This has {len(ids)} tokens, and {room} are read at most: nothing was asked.")
            del kept[0]
        return ids, len(self.exchanges) - len(kept)

    def answer(
        self, said: str, prompt: tuple[list[int], int], key: tuple[int, ...], show: Callable[[str], None]
    ) -> tuple[str, list[str]]:
        """The answer, shown as it is written, and notes on it. Ctrl-C ends it.

        Args:
            prompt: what `prompt` says of `said`.
        """
        ids, forgotten = prompt
        del self.exchanges[:forgotten]
        notes = [f"The oldest {forgotten} exchange(s) no longer fit and are forgotten."] if forgotten else []
        stream = TextStream(self.answerer.tokenizer)
        try:
            (answer,) = self.answerer.answers([ids], [key], on_token=lambda _, token: show(stream.more(token)))
            if not answer.finished:
                notes.append(f"Cut off after {answer.tokens} tokens; --max_response_tokens sets how many.")
        except KeyboardInterrupt:
            notes.append("Stopped.")
        if rest := stream.rest():
            show(rest)
        if self.is_chat and stream.tokens:
            turns = [{"role": "user", "content": said}, {"role": "assistant", "content": stream.text}]
            self.exchanges.append(turns)
        return stream.text, notes


class Chat:
    """The conversation of the user with all sides."""

    def __init__(
        self,
        answerers: list[Answerer],
        config: AnsweringConfig,
        *,
        lines: TextIO,
        out: TextIO,
        aside: TextIO,
    ):
        """
        Args:
            lines, out: of the user. On a terminal they are stdin and stdout; otherwise `out` gets answers alone, and
                `aside` the notes. Whichever is a terminal is sent nothing that steers it.

        Raises:
            ValueError: the tokenizer has no chat template, or it refuses the system message.
        """
        is_chat = config.prompt_format != "text"
        opening = [] if config.system is None else [{"role": "system", "content": config.system}]
        self.sides = [Side(answerer, opening, is_chat) for answerer in answerers]
        self.seed, self.asked = config.seed, 0
        self.on_terminal = lines.isatty() and out.isatty()
        self.lines, self.out, self.aside = lines, out, out if self.on_terminal else aside
        for answerer in answerers if is_chat else []:
            if answerer.tokenizer.chat_template is None:
                raise ValueError(
                    f"The tokenizer of {answerer.label} has no chat template: name a file that holds one with "
                    f"--chat_template, or have what you type continued as it is with --prompt_format text."
                )
            with own_names():
                render([*opening, {"role": "user", "content": "Hello"}], answerer.tokenizer)

    def run(self) -> None:
        """Until the user ends it."""
        if self.on_terminal:
            names = " and ".join(side.answerer.label for side in self.sides)
            self.out.write(f"{names}. /help lists what else can be typed, Ctrl-D ends.\n")
        while (line := self._line()) is not None:
            if re.fullmatch(r"/[a-z]+ *", line):
                if line.strip() == "/quit":
                    return
                self._command(line.strip())
            elif line.strip():
                try:
                    self._answer(line)
                except ValueError as error:
                    self._note(str(error))
                except KeyboardInterrupt:  # before the first answer has begun, or between two
                    self._note("Stopped.")

    def _line(self) -> str | None:
        """What the user types next; None at the end."""
        if not self.on_terminal:
            line = self.lines.readline()
            return line.rstrip("\n") if line else None
        while True:
            try:
                return input("> ")
            except KeyboardInterrupt:
                self.out.write("\n")
            except EOFError:
                self.out.write("\n")
                return None

    def _command(self, command: str) -> None:
        if command == "/reset":
            for side in self.sides:
                side.exchanges.clear()
            self._note("The conversation is forgotten.")
        elif command == "/help":
            self._note(HELP)
        else:
            self._note(f"There is no {command}; /help lists what there is.")

    def _answer(self, said: str) -> None:
        prompts = [side.prompt(said) for side in self.sides]  # that one refuses is not asked of the other either
        key = (self.seed, self.asked)
        self.asked += 1
        width = shutil.get_terminal_size().columns
        notes = []
        if self.on_terminal and len(self.sides) > 1 and width >= SIDE_BY_SIDE:
            texts = []
            for side, prompt in zip(self.sides, prompts, strict=True):
                with self._counted(side.answerer.label) as count:
                    text, more = side.answer(said, prompt, key, count)
                texts.append(f"{side.answerer.label}:\n{visible(text)}")
                notes.append(more)
            self.out.write(columns(texts, width))
        else:
            for side, prompt in zip(self.sides, prompts, strict=True):
                if len(self.sides) > 1:
                    self.out.write(f"{side.answerer.label}:\n")
                notes.append(side.answer(said, prompt, key, self._show)[1])
                self.out.write("\n")
        for side, lines in zip(self.sides, notes, strict=True):
            for line in lines:
                self._note(line if len(self.sides) == 1 else f"{side.answerer.label}: {line}")
        self.out.flush()

    def _show(self, text: str) -> None:
        if text:
            self.out.write(visible(text) if self.out.isatty() else text)
            self.out.flush()

    @contextmanager
    def _counted(self, label: str) -> Iterator[Callable[[str], None]]:
        """A line that counts the tokens of an answer that is shown when it is whole, and then goes."""
        count = 0

        def show(_: str) -> None:
            nonlocal count
            count += 1
            self.out.write(f"\r{label}: {count} tokens\x1b[K")
            self.out.flush()

        try:
            yield show
        finally:
            self.out.write("\r\x1b[K")

    def _note(self, text: str) -> None:
        said = f"({text})" if "\n" not in text else text
        print(visible(said) if self.aside.isatty() else said, file=self.aside, flush=True)
