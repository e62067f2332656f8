"""encode_reply: how a conversation goes on after a response that the model wrote itself."""

import pytest
from words import EOS, A, B, assistant, user, word_tokenizer

from engine.data.formatting import MARK, encode_reply, render, said_since
from engine.models.random_init import byte_tokenizer

CONVERSATION = [user("a"), assistant("b")]
# "<s>" stands for a beginning of turn, which has an id of its own.
TURNS = (
    "{% for m in messages %}{{ '<s> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def test_the_templates_text_between_two_answers_by_hand():
    tokenizer = byte_tokenizer()
    ids = encode_reply([user("hi"), assistant("ho")], "and?", tokenizer, [1])
    assert tokenizer.decode(ids) == "\nuser: and?<eos>\nassistant: "


def test_a_conversation_that_the_template_would_write_alike_is_that_of_the_parts():
    tokenizer = byte_tokenizer()
    prompt, turn = tokenizer(render([user("hi")], tokenizer))["input_ids"], [*tokenizer("ho")["input_ids"], 1]
    whole = [*prompt, *turn, *encode_reply([user("hi"), assistant("ho")], "and?", tokenizer, [1])]
    assert whole == tokenizer(render([user("hi"), assistant("ho"), user("and?")], tokenizer))["input_ids"]


def test_the_response_is_not_encoded_again_whatever_it_looks_like():
    tokenizer = byte_tokenizer()
    wanted = encode_reply(CONVERSATION, "x", tokenizer, [1])
    for odd in ("", " b ", "<eos>", MARK, "\ufffd"):
        assert encode_reply([user("a"), assistant(odd)], "x", tokenizer, [1]) == wanted


@pytest.mark.parametrize(
    ("eos_token_ids", "wanted"),
    [([EOS], [0, A, EOS, 0]), ([B, EOS], [0, A, EOS, 0]), ([B], [EOS, 0, A, EOS, 0])],
)
def test_the_end_that_was_drawn_stands_for_the_templates(eos_token_ids, wanted):
    """A template's mark that ends no response (the last case) stays: the actor has not written it."""
    assert encode_reply(CONVERSATION, "a", word_tokenizer(template=TURNS), eos_token_ids) == wanted


def test_an_end_later_than_the_responses_own_is_no_end_of_it():
    template = "{% for m in messages %}{{ m['content'] + ' b ' }}{% endfor %}{{ eos_token }}"
    assert encode_reply(CONVERSATION, "a", word_tokenizer(template=template), [EOS]) == [B, A, B, EOS]


def test_no_bos_in_the_middle():
    tokenizer = word_tokenizer(adds_bos=True, adds_eos=True, template=TURNS.replace("<s>", "b"))
    assert encode_reply(CONVERSATION, "a", tokenizer, [EOS]) == [B, A, EOS, B]


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "{{ messages[1]['content'] }}"])
def test_a_template_that_cannot_go_on_is_refused(template):
    with pytest.raises(ValueError, match=r"a conversation cannot go on.*--data\.chat_template"):
        encode_reply(CONVERSATION, "a", word_tokenizer(template=template), [EOS])


def test_a_templates_own_refusal_is_shown():
    with pytest.raises(ValueError, match="refuses this conversation: one turn only"):
        encode_reply(CONVERSATION, "a", word_tokenizer(template="{{ raise_exception('one turn only') }}"), [EOS])


def test_a_reply_that_is_not_unicode_is_refused():
    with pytest.raises(ValueError, match="not Unicode"):
        encode_reply(CONVERSATION, "\ud800", byte_tokenizer(), [1])


def test_what_the_assistant_says_after_the_prompt():
    prompt = [user("a"), assistant("not this"), user("b")]
    assert said_since(prompt, [*prompt, assistant("one"), user("more"), assistant("two")]) == "one\ntwo"
