"""exchanges.py: over-length policies by hand, and errors that name the row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from words import BOS, EOS, A, B, system, user, word_tokenizer

from engine.data.exchanges import LengthLimit, concatenated, rows_of, shortened_prompt, tokenised
from engine.data.sequences import Sequences

ROW = ([1, 2, 3, 4, 5], [11, 12, 13, 14])  # 5 + 4 = 9 tokens


def limit(over_length="drop", *, prompt=100, length=100) -> LengthLimit:
    return LengthLimit(max_prompt_tokens=prompt, max_length=length, over_length=over_length)


def one_row(prompt, response) -> Sequences:
    return Sequences.of([prompt], [response])


@pytest.mark.parametrize(
    ("limits", "too_long"),
    [
        (dict(prompt=5, length=9), False),
        (dict(prompt=4, length=9), True),
        (dict(prompt=5, length=8), True),
        (dict(prompt=4, length=8), True),
    ],
)
@pytest.mark.parametrize("over_length", ["drop", "error", "truncate_left", "truncate_right"])
def test_a_row_is_too_long_by_its_prompt_or_as_a_whole(limits, too_long, over_length):
    short = ([1], [11])
    rows = Sequences.of([short[0], ROW[0]], [short[1], ROW[1]])
    assert limit(over_length, **limits).too_long(rows).tolist() == [False, too_long]


@pytest.mark.parametrize(
    ("over_length", "limits", "prompt", "response"),
    [
        # the prompt alone is too long
        ("truncate_left", dict(prompt=3), [3, 4, 5], [11, 12, 13, 14]),
        ("truncate_right", dict(prompt=3), [1, 2, 3], [11, 12, 13, 14]),
        # the whole is too long: the prompt's beginning goes, or the response's end
        ("truncate_left", dict(length=7), [3, 4, 5], [11, 12, 13, 14]),
        ("truncate_right", dict(length=7), [1, 2, 3, 4, 5], [11, 12]),
        # both at once; the prompt's limit is enough
        ("truncate_left", dict(prompt=3, length=7), [3, 4, 5], [11, 12, 13, 14]),
        ("truncate_right", dict(prompt=3, length=7), [1, 2, 3], [11, 12, 13, 14]),
        # both at once; it is not
        ("truncate_left", dict(prompt=4, length=6), [4, 5], [11, 12, 13, 14]),
        ("truncate_right", dict(prompt=4, length=6), [1, 2, 3, 4], [11, 12]),
        # one token is left of either part
        ("truncate_left", dict(length=5), [5], [11, 12, 13, 14]),
        ("truncate_left", dict(length=3), [5], [11, 12]),
        ("truncate_left", dict(length=2), [5], [11]),
        ("truncate_right", dict(length=6), [1, 2, 3, 4, 5], [11]),
        ("truncate_right", dict(length=4), [1, 2, 3], [11]),
        ("truncate_right", dict(length=2), [1], [11]),
        ("truncate_left", dict(prompt=1, length=2), [5], [11]),
        # nothing to do
        ("truncate_left", dict(prompt=5, length=9), *ROW),
        ("truncate_right", dict(prompt=5, length=9), *ROW),
    ],
)
def test_what_is_left_of_a_row_that_is_too_long(over_length, limits, prompt, response):
    shortened = limit(over_length, **limits).shortened(one_row(*ROW), rows_per_example=1, bos_token_id=None)
    assert list(rows_of(shortened)) == [(prompt, response)]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 10),
    st.integers(2, 14),
    st.sampled_from(["truncate_left", "truncate_right"]),
)
def test_shortened_rows_fit_and_are_as_long_as_they_may_be(lengths, max_prompt, max_length, over_length):
    prompts = [list(range(1, prompt + 1)) for prompt, _ in lengths]
    responses = [list(range(101, response + 101)) for _, response in lengths]
    policy = limit(over_length, prompt=max_prompt, length=max_length)
    before = Sequences.of(prompts, responses)
    after = policy.shortened(before, rows_per_example=1, bos_token_id=None)
    assert not policy.too_long(after).any()
    for prompt, response, too_long, (cut, answer) in zip(
        prompts, responses, policy.too_long(before), rows_of(after), strict=True
    ):
        assert cut and answer
        assert cut == (prompt[-len(cut) :] if over_length == "truncate_left" else prompt[: len(cut)])
        assert answer == response[: len(answer)]
        if not too_long:
            assert (cut, answer) == (prompt, response)
        if (len(cut), len(answer)) != (min(len(prompt), max_prompt), len(response)):
            assert len(cut) + len(answer) == max_length  # not a token more was taken than had to be


@pytest.mark.parametrize(
    ("over_length", "room", "kept"),
    [
        ("truncate_left", 5, [0, 2, 3, 2, 3]),
        ("truncate_left", 4, [0, 3, 2, 3]),
        ("truncate_left", 2, [0, 3]),
        ("truncate_left", 1, [0]),
        ("truncate_right", 4, [0, 2, 3, 2]),
        ("truncate_right", 1, [0]),
    ],
)
def test_a_prompt_keeps_its_bos(over_length, room, kept):
    prompt = [BOS, A, B, A, B]
    assert shortened_prompt(prompt, room, over_length, bos_token_id=BOS) == kept
    both = Sequences.of([prompt, prompt], [[A], [B]])
    shortened = limit(over_length, prompt=room).shortened(both, rows_per_example=2, bos_token_id=BOS)
    assert list(rows_of(shortened)) == [(kept, [A]), (kept, [B])]


def test_without_a_bos_at_its_beginning_a_prompt_is_cut_as_it_is():
    assert shortened_prompt([A, BOS, B], 2, "truncate_left", bos_token_id=BOS) == [BOS, B]
    assert shortened_prompt([A, A, B], 2, "truncate_left", bos_token_id=None) == [A, B]


def test_rows_are_read_back_as_they_were_put_in():
    prompts, responses = [[1], [2, 3], [4]], [[5, 6], [], [7]]
    assert list(rows_of(Sequences.of(prompts, responses))) == list(zip(prompts, responses, strict=True))


def test_parts_are_laid_end_to_end():
    parts = [one_row([1, 2], [3]), Sequences.of([], []), Sequences.of([[4], [5]], [[6], [7, 8]])]
    assert list(rows_of(concatenated(parts))) == [([1, 2], [3]), ([4], [6]), ([5], [7, 8])]
    assert concatenated(parts).tokens.dtype == torch.int64


# Tokenised

FROM_THE_USER = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    "{{ messages | map(attribute='content') | join(' ') }}"
)
PLACES = ["mine.jsonl, line 1", "mine.jsonl, line 4", "mine.jsonl, line 6"]


@pytest.mark.parametrize("times", [1, 2])  # the second time they come from the cache
def test_exchanges_become_rows_in_their_order(times):
    exchanges = [("a b", "b"), ([user("b")], "a a"), ("a", "")]
    for _ in range(times):
        rows = tokenised(exchanges, PLACES, word_tokenizer(template=FROM_THE_USER))
    assert list(rows_of(rows)) == [([A, B], [B, EOS]), ([B], [A, A, EOS]), ([A], [EOS])]
    assert rows.tokens.dtype == rows.prompt_lengths.dtype == rows.response_lengths.dtype == torch.int64


@pytest.mark.parametrize(
    ("bad", "template", "said"),
    [
        (("  ", "b"), None, "the prompt has no tokens"),
        (([user("a")], "b"), None, "has no chat template"),
        ((["a"], "b"), FROM_THE_USER, "a prompt is a string"),
        (([user("a")], "b"), "{{ messages | length }}", "writes this conversation"),
    ],
)
def test_an_exchange_that_is_none_is_named_with_its_place(bad, template, said):
    with pytest.raises(ValueError, match=rf"^mine\.jsonl, line 4: .*{said}"):
        tokenised([("a", "b"), bad, ("b", "b")], PLACES, word_tokenizer(template=template))


def test_what_was_refused_is_not_remembered():
    for _ in range(2):
        with pytest.raises(ValueError, match="line 4"):
            tokenised([("a", "b"), ([user("a")], "b"), ("b", "a")], PLACES, word_tokenizer())


def test_a_conversation_that_the_template_refuses_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"^mine\.jsonl, line 4: .*begin with the user"):
        tokenised([("a", "b"), ([system("a")], "b")], PLACES[:2], word_tokenizer(template=FROM_THE_USER))


def test_text_that_is_no_unicode_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"^mine\.jsonl, line 1"):
        tokenised([("a \ud800", "b")], PLACES[:1], word_tokenizer())


def test_the_two_responses_of_a_pair_keep_one_prompt():
    """Cut one by one, `abcdef` with `xy` and `wxyz` would be answered as `bcdef` and as `cdef`."""
    pair = Sequences.of([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]], [[7, 8], [7, 8, 9, 10]])
    kept = limit("truncate_left", prompt=9, length=8).shortened(pair, rows_per_example=2, bos_token_id=None)
    assert list(rows_of(kept)) == [([3, 4, 5, 6], [7, 8]), ([3, 4, 5, 6], [7, 8, 9, 10])]
