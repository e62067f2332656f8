"""Text token by token, and in columns."""

import pytest
from reciting import BYTE, RECITED

from engine.answering import display
from engine.answering.display import TextStream, cells_of, columns, visible, wrap


@pytest.mark.parametrize("text", [RECITED, "plain", "日本", "👩‍👩‍👧", "a\ufffdb", ""])
def test_a_stream_gives_whole_characters_and_in_the_end_all_of_them(text):
    stream = TextStream(BYTE)
    pieces = [stream.more(token) for token in BYTE(text)["input_ids"]]
    assert "".join([*pieces, stream.rest()]) == stream.text == text
    if "\ufffd" not in text:
        assert all(piece == "" or len(piece) == 1 for piece in pieces)
        assert sum(map(bool, pieces)) == len(text), "a character comes with its last byte, not later"


def test_bytes_that_are_no_character_are_shown_as_such():
    stream = TextStream(BYTE)
    broken = [*BYTE("a日")["input_ids"][:-1], *BYTE("b")["input_ids"]]
    assert [stream.more(token) for token in broken] == ["a", "", "", "\ufffdb"]
    last = TextStream(BYTE)
    assert [last.more(token) for token in broken[:3]] == ["a", "", ""]
    assert last.rest() == "\ufffd"


def test_special_tokens_are_not_shown():
    stream = TextStream(BYTE)
    assert [stream.more(token) for token in (*BYTE("a")["input_ids"], BYTE.eos_token_id)] == ["a", ""]


def test_what_would_steer_a_terminal_is_shown_instead():
    assert visible("a\x1b[2J\r\x07b\n\tc\x9b\x7f é日") == "a␛[2J␍␇b\n\tc\ufffd\ufffd é日"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three", ["one two", "three"]),
        ("abcdefghij", ["abcdefg", "hij"]),
        ("日本語中文", ["日本語", "中文"]),
        ("a\n\nb", ["a", "", "b"]),
        ("", [""]),
        ("1234567", ["1234567"]),
    ],
)
def test_lines_are_broken_at_spaces_or_where_they_are_full(text, lines):
    assert wrap(text, 7) == lines


def test_a_long_line_is_measured_once(monkeypatch):
    measured = []
    monkeypatch.setattr(display, "cells_of", lambda text: measured.append(len(text)) or cells_of(text))
    text = "日本語 and more " * 500
    assert "".join(wrap(text, 48)).replace(" ", "") == text.replace(" ", "")
    assert sum(measured) < 2 * len(text)


def test_a_letter_wider_than_the_column_has_a_line_of_its_own():
    assert wrap("日本", 1) == ["日", "本"]


def test_columns_stand_upright_under_wide_letters():
    shown = columns(["日本\nx", "one two three"], 17)
    assert shown == "日本      one two\nx         three\n"
    assert cells_of("日本e\u0301") == 5
