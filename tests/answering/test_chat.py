"""The chat, on a real terminal and without one."""

import io
import os
import pty
import select
import subprocess
import sys
import time

import psutil
import pytest
import ranks
from reciting import BYTE, RECITED, reciting

from engine.answering.answerer import Answerer, load_answerers
from engine.answering.chat import Chat
from engine.answering.settings import AnsweringConfig

STEERING = "x\x1bz"  # what a terminal would take for a command


@pytest.fixture(scope="module")
def reciter(tmp_path_factory):
    return reciting(tmp_path_factory.mktemp("models") / "reciter", RECITED)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return reciting(tmp_path_factory.mktemp("models") / "other", STEERING)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return reciting(tmp_path_factory.mktemp("models") / "endless", "over,", endless=True)


@pytest.fixture
def read(monkeypatch):
    """The prompts that models are given."""
    prompts, plain = [], Answerer.answers

    def answers(self, asked, keys, **given):
        prompts.extend(self.tokenizer.decode(ids) for ids in asked)
        return plain(self, asked, keys, **given)

    monkeypatch.setattr(Answerer, "answers", answers)
    return prompts


def chatted(lines: str, **config) -> tuple[str, str]:
    """Answers and notes, without a terminal."""
    config = AnsweringConfig(**dict(temperature=0.0) | config)
    out, aside = io.StringIO(), io.StringIO()
    Chat(load_answerers(config), config, lines=io.StringIO(lines), out=out, aside=aside).run()
    return out.getvalue(), aside.getvalue()


def turn(said: str, answer: str | None = None) -> str:
    return f"user: {said}<eos>\nassistant: " + ("" if answer is None else f"{answer}<eos>\n")


def test_the_conversation_goes_on_until_it_is_reset(reciter, read):
    out, aside = chatted("one\ntwo\n/reset\nthree\n/quit\nnever\n", model=reciter, system="s")
    opening = "system: s<eos>\n"
    assert read == [
        opening + turn("one"),
        opening + turn("one", RECITED) + turn("two"),
        opening + turn("three"),
    ]
    assert (out, aside) == (f"{RECITED}\n" * 3, "(The conversation is forgotten.)\n")


def test_text_is_continued_as_it_is_and_not_remembered(reciter, read):
    out, _ = chatted("one \ntwo \n", model=reciter, prompt_format="text")
    assert (read, out) == (["one ", "two "], f"{RECITED}\n" * 2)


def test_the_oldest_exchanges_make_room(reciter, read):
    """turn(a) has 20 tokens, and 33 with the answer: the third one would come to 33 + 33 + 20."""
    out, aside = chatted("a\nb\nc\n", model=reciter, max_prompt_tokens=60, max_response_tokens=20)
    assert read == [turn("a"), turn("a", RECITED) + turn("b"), turn("b", RECITED) + turn("c")]
    assert aside == "(The oldest 1 exchange(s) no longer fit and are forgotten.)\n"
    assert out.count(RECITED) == 3


def test_what_does_not_fit_alone_is_not_asked_and_costs_nothing(reciter, read):
    out, aside = chatted(f"a\n{'x' * 100}\nb\n", model=reciter, max_prompt_tokens=60, max_response_tokens=20)
    assert read == [turn("a"), turn("a", RECITED) + turn("b")]
    assert aside == "(This has 119 tokens, and 60 are read at most: nothing was asked.)\n"
    assert out.count(RECITED) == 2


def test_an_answer_that_was_cut_off_is_said_to_be(endless):
    out, aside = chatted("a\n", model=endless, max_response_tokens=7)
    assert (out, aside) == ("over,ov\n", "(Cut off after 7 tokens; --max_response_tokens sets how many.)\n")


def test_the_same_lines_and_seed_are_answered_alike(reciter):
    given = dict(model=reciter, temperature=30.0, max_response_tokens=20)
    first = chatted("a\na\n", **given)
    assert chatted("a\na\n", **given) == first != chatted("a\na\n", **given, seed=1)
    one, two = first[0].split("\n")[:2]
    assert one != two


def test_unknown_commands_are_named_and_paths_are_no_commands(reciter, read):
    _, aside = chatted("/rest\n/help\n/etc/hosts is?\n", model=reciter)
    assert aside.startswith("(There is no /rest; /help lists what there is.)\n/reset   forget")
    assert read == [turn("/etc/hosts is?")]


def test_two_models_keep_their_own_conversations(reciter, other, read):
    out, _ = chatted("one\ntwo\n", model=reciter, other=other)
    assert out == f"reciter:\n{RECITED}\nother:\n{STEERING}\n" * 2
    assert read[2:] == [turn("one", RECITED) + turn("two"), turn("one", STEERING) + turn("two")]


def test_what_one_model_has_no_room_for_is_asked_of_neither(tmp_path, reciter, read):
    roomy = reciting(tmp_path / "roomy", STEERING, endless=True)
    given = dict(model=roomy, other=reciter, max_response_tokens=200)
    out, aside = chatted(f"a\n{'x' * 100}\nb\n", **given)
    assert aside.count("nothing was asked") == 1 and "forgotten" not in aside
    assert len(read) == 4 and not any("xx" in prompt for prompt in read)
    assert out.count("reciter:") == out.count("roomy:") == 2


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("shown", ["out", "aside"])
def test_what_is_sent_to_a_terminal_never_steers_it(other, shown):
    """Also where the lines come from a file, or the answers go to one."""
    config = AnsweringConfig(model=other, temperature=0.0)
    (answerer,) = load_answerers(config)
    ends = dict(out=io.StringIO(), aside=io.StringIO()) | {shown: Screen()}
    chat = Chat([answerer], config, lines=io.StringIO("hi\n"), **ends)
    chat.run()
    chat._note("\x1b]0;owned\x07")
    assert ends["out"].getvalue() == ("x␛z\n" if shown == "out" else f"{STEERING}\n")
    assert ("\x1b" in ends["aside"].getvalue()) == (shown == "out")


# What a process without a terminal opens first is its own: Ctrl-C then comes from there.
AT_A_TERMINAL = """
import os, runpy, signal, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Terminal:
    """`launch/generate.py` in a process of its own, on a terminal of its own."""

    def __init__(self, *flags: str, width: int = 80):
        self.said = b""
        self.screen, keyboard = pty.openpty()
        environment = {**os.environ, **ranks.OFFLINE, "COLUMNS": str(width), "LINES": "24", "TERM": "dumb"}
        command = [sys.executable, "-c", AT_A_TERMINAL, "launch/generate.py", "--temperature", "0", *flags]
        ends = dict(stdin=keyboard, stdout=keyboard, stderr=keyboard)
        self.process = subprocess.Popen(command, cwd=ranks.ROOT, env=environment, start_new_session=True, **ends)
        os.close(keyboard)

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def shows(self, wanted: str, *, timeout_s: float = 120) -> str:
        """What has been shown up to and with this, from where the last call ended."""
        deadline = time.monotonic() + timeout_s
        while wanted.encode() not in self.said:
            ready, _, _ = select.select([self.screen], [], [], max(0.0, deadline - time.monotonic()))
            try:
                more = os.read(self.screen, 4096) if ready else b""
            except OSError:  # the other end is closed
                more = b""
            assert more, f"{wanted!r} never came, but {self.said!r}"
            self.said += more
        before, found, self.said = self.said.partition(wanted.encode())
        return (before + found).decode().replace("\r\n", "\n")

    def wait_for_keys(self) -> None:
        """Until the process sleeps: of a Ctrl-C just before, Python's readline learns with the next key only."""
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)

    def code(self, *, timeout_s: float = 120) -> int:
        """What it ends with."""
        return self.process.wait(timeout_s)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


def test_on_a_terminal(reciter):
    with Terminal("--model", reciter) as terminal:
        assert "reciter. /help lists what else can be typed, Ctrl-D ends.\n> " in terminal.shows("> ")
        terminal.type("hi\n")
        assert terminal.shows("> ") == f"hi\n{RECITED}\n> "
        terminal.type("/reset\n")
        assert terminal.shows("> ") == "/reset\n(The conversation is forgotten.)\n> "
        terminal.type("half a li")
        terminal.shows("half a li")
        terminal.wait_for_keys()
        terminal.type("\x03")
        terminal.shows("> ")
        terminal.type("\x04")
        assert terminal.code() == 0


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(endless):
    """What was said of it before is on the screen at once, and stays in the conversation."""
    with Terminal("--model", endless, "--max_response_tokens", "4000") as terminal:
        terminal.shows("> ")
        terminal.type("hi\n")
        terminal.shows("over,over,")
        terminal.type("\x03")
        terminal.shows("\r\n(Stopped.)\r\n> ")
        terminal.type("/quit\n")
        terminal.shows("/quit")
        assert terminal.code() == 0


def test_an_answer_that_was_stopped_is_remembered(endless, read, monkeypatch):
    plain = Answerer.answers

    def stopped(self, prompts, keys, *, on_token):
        def told(row, token):
            on_token(row, token)
            if BYTE.decode([token]) == "e":
                raise KeyboardInterrupt

        return plain(self, prompts, keys, on_token=told)

    monkeypatch.setattr(Answerer, "answers", stopped)
    out, aside = chatted("a\nb\n", model=endless)
    assert (read[-1], out, aside) == (turn("a", "ove") + turn("b"), "ove\nove\n", "(Stopped.)\n" * 2)


@pytest.mark.parametrize(
    ("width", "wanted"),
    [
        (80, f"reciter:\n{RECITED}\nother:\nx␛z\n> "),
        (103, f"reciter:{' ' * 45}other:\n{RECITED}{' ' * (53 - 7)}x␛z\n> "),
    ],
)
def test_two_models_stand_side_by_side_where_there_is_room(reciter, other, width, wanted):
    with Terminal("--model", reciter, "--other", other, width=width) as terminal:
        terminal.shows("> ")
        terminal.type("hi\n")
        shown = terminal.shows("\r\n> ")
        assert shown.rpartition("\x1b[K")[2].removeprefix("hi\n") == wanted
        terminal.type("\x04")
        assert terminal.code() == 0
