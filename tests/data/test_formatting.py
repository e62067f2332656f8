"""formatting.py: what is a prompt and what its answer; one BOS and one EOS, whoever writes them."""

import pytest
from words import BOS, EOS, A, B, assistant, merging_tokenizer, system, user, word_tokenizer

from engine.data.formatting import as_prompt, encode, encode_exchange, exchange, render, render_response, unanswered
from engine.models.random_init import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONVERSATION = [system("be brief"), user("hi")]
NOT_PROMPTS = [None, 7, 1.5, [], ["hi"], user("hi"), [{"role": "user"}], [{"role": "user", "content": 3}]]


def test_a_string_is_left_as_it_is():
    assert render("  as it is\n", byte_tokenizer()) == "  as it is\n"


def test_a_conversation_goes_through_the_template_and_is_ready_to_be_answered():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert render(CONVERSATION, tokenizer) == "<system>be brief<user>hi<assistant>"


def test_a_conversation_needs_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        render(CONVERSATION, word_tokenizer())


@pytest.mark.parametrize("prompt", NOT_PROMPTS)
def test_what_is_neither_text_nor_a_conversation_is_refused(prompt):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=r"a prompt is a string or a list of|content of a message is a string"):
        render(prompt, tokenizer)


def test_content_that_is_no_string_is_named():
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    with pytest.raises(ValueError, match=r"the content of a message is a string, this is \"\[\{'type': 'text'"):
        render(parts, byte_tokenizer())


def test_no_bos_for_a_tokenizer_that_adds_none():
    assert encode("a b", word_tokenizer()) == [2, 3]
    ids = encode("ab", byte_tokenizer())
    assert byte_tokenizer().decode(ids) == "ab" and len(ids) == 2


def test_one_bos_from_a_tokenizer_that_adds_it():
    assert encode("a b", word_tokenizer(adds_bos=True)) == [BOS, 2, 3]


def test_one_bos_from_a_template_that_writes_it():
    tokenizer = word_tokenizer(template="<s> {{ messages[0]['content'] }}")
    assert encode(render([user("b")], tokenizer), tokenizer) == [BOS, 3]


def test_one_bos_from_a_template_and_a_tokenizer_that_both_write_it():
    tokenizer = word_tokenizer(adds_bos=True, template="<s> {{ messages[0]['content'] }}")
    assert encode(render([user("b")], tokenizer), tokenizer) == [BOS, 3]


def test_a_prompt_has_not_ended():
    assert encode("a b", word_tokenizer(adds_bos=True, adds_eos=True)) == [BOS, 2, 3]
    assert encode("a </s> b", word_tokenizer(adds_eos=True)) == [2, EOS, 3]  # what the text itself holds stays


def test_a_prompt_of_one_bos_that_is_also_eos_stays_a_prompt():
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "</s>"  # GPT-2: one token for both
    assert encode("</s>", tokenizer) == [EOS]
    assert encode("</s> a", tokenizer) == [EOS, 2]


# Cells of a dataset


@pytest.mark.parametrize(("prompt_format", "prompt"), [("text", "hi"), ("chat", [user("hi")])])
def test_a_string_is_a_prompt_or_what_the_user_says(prompt_format, prompt):
    assert as_prompt("hi", prompt_format) == prompt
    assert as_prompt(CONVERSATION, prompt_format) == CONVERSATION


@pytest.mark.parametrize("prompt_format", ["text", "chat"])
def test_an_empty_cell_is_no_prompt(prompt_format):
    with pytest.raises(ValueError, match="the prompt is empty"):
        as_prompt("", prompt_format)


@pytest.mark.parametrize("prompt_format", ["text", "chat"])
@pytest.mark.parametrize("cell", NOT_PROMPTS)
def test_a_cell_that_is_neither_text_nor_a_conversation_is_refused(cell, prompt_format):
    with pytest.raises(ValueError, match=r"a prompt is a string or a list of|content of a message is a string"):
        as_prompt(cell, prompt_format)


@pytest.mark.parametrize("prompt_format", ["text", "chat"])
def test_a_conversation_that_has_been_answered_is_no_prompt(prompt_format):
    with pytest.raises(ValueError, match="ends with the assistant's turn"):
        as_prompt([*CONVERSATION, assistant("yes")], prompt_format)


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_answers_at_the_end_of_a_conversation_are_cut(answers):
    asked = [user("a"), assistant("b"), user("c")]
    assert unanswered(asked + [assistant("d")] * answers) == asked


@pytest.mark.parametrize("cell", [*NOT_PROMPTS, "", "hi"])
def test_what_is_no_conversation_has_no_answer_to_be_cut(cell):
    assert unanswered(cell) is cell


def test_a_conversation_of_answers_alone_is_no_prompt():
    with pytest.raises(ValueError, match="an answer and no prompt"):
        unanswered([assistant("yes"), assistant("no")])


FIRST_TURN = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("2 + 2 =", " 4", ("2 + 2 =", " 4")),
        (CONVERSATION, "yes", (CONVERSATION, "yes")),
        (CONVERSATION, [assistant("yes")], (CONVERSATION, "yes")),
        ("hi", [assistant("yes")], ([user("hi")], "yes")),
        (None, [*CONVERSATION, assistant("yes")], (CONVERSATION, "yes")),
        (
            None,
            [user("a"), assistant("b"), user("c"), assistant("d")],
            ([user("a"), assistant("b"), user("c")], "d"),
        ),
        # as UltraFeedback has it: the prompt column repeats the last question of the conversation
        (
            "c",
            [user("a"), assistant("b"), user("c"), assistant("d")],
            ([user("a"), assistant("b"), user("c")], "d"),
        ),
        # as UltraChat has it: it repeats the first question
        (
            "a",
            [user("a"), assistant("b"), user("c"), assistant("d")],
            ([user("a"), assistant("b"), user("c")], "d"),
        ),
        # the conversation goes on from the prompt
        (
            [user("hi")],
            [assistant("a"), user("b"), assistant("c")],
            ([user("hi"), assistant("a"), user("b")], "c"),
        ),
        ("hi", [assistant("a"), user("b"), assistant("c")], ([user("hi"), assistant("a"), user("b")], "c")),
        # a system turn on either side, and an assistant who begins
        (CONVERSATION, [user("hi"), assistant("yes")], (CONVERSATION, "yes")),
        ([user("hi")], [*CONVERSATION, assistant("yes")], (CONVERSATION, "yes")),
        (CONVERSATION, [*CONVERSATION, assistant("yes")], (CONVERSATION, "yes")),
        (
            [assistant("hello"), user("a")],
            [assistant("hello"), user("a"), assistant("b"), user("c"), assistant("d")],
            ([assistant("hello"), user("a"), assistant("b"), user("c")], "d"),
        ),
        ([user("hi") | {"id": 7}], [*CONVERSATION, assistant("yes")], (CONVERSATION, "yes")),
        (None, "\n\nHuman: hi\n\nAssistant: yes", ("\n\nHuman: hi\n\nAssistant:", " yes")),
        (None, FIRST_TURN + " no", (FIRST_TURN, " no")),
        (None, FIRST_TURN + "", (FIRST_TURN, "")),
        ("hi", FIRST_TURN + " no", ("hi", FIRST_TURN + " no")),  # with a prompt, a transcript is text like any other
    ],
)
def test_a_prompt_and_a_response_out_of_an_answer(prompt, answer, expected):
    assert exchange(prompt, answer) == expected


@pytest.mark.parametrize(
    ("prompt", "answer", "said"),
    [
        (None, "no transcript", "no prompt column, and 'no transcript' is not a transcript"),
        (None, "Assistant: at the very beginning", "is not a transcript"),
        (None, [assistant("yes")], "an answer and no prompt"),
        (None, CONVERSATION, "ends with the assistant's"),
        ("hi", [user("hi")], "ends with the assistant's"),
        ("hi", [], "a response is a string or a list of messages"),
        ("hi", None, "a response is a string or a list of messages.*None"),
        ("hi", 7, r"a response is a string or a list of messages.*is 7\."),
        ("hi", assistant("yes"), "a response is a string or a list of messages"),
        ("hi", [user("ho"), assistant("yes")], r"does not hold the prompt.*'ho'.*'hi'.*--data\.prompt_column"),
        (CONVERSATION, [user("hi"), assistant("a"), user("b"), assistant("c")], "does not hold the prompt"),
        ([user("a"), assistant("b"), user("c")], [user("a"), assistant("yes")], "does not hold the prompt"),
    ],
)
def test_what_is_no_answer_is_refused(prompt, answer, said):
    with pytest.raises(ValueError, match=said):
        exchange(prompt, answer)


# Responses as text

ENDS_TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_response_to_a_string_is_itself():
    assert render_response("2 + 2 =", " 4\n", word_tokenizer()) == " 4\n"


def test_the_response_in_a_conversation_is_what_the_template_adds_to_the_prompt():
    tokenizer = word_tokenizer(template=ENDS_TURNS)
    assert render(CONVERSATION, tokenizer) == "<system>be brief<end><user>hi<end><assistant>"
    assert render_response(CONVERSATION, "yes", tokenizer) == "yes<end>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}",
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{{ messages[-1]['content'] }}",
    ],
)
def test_a_template_that_does_not_begin_with_the_prompt_is_refused(template):
    with pytest.raises(ValueError, match=r"when it asks for an answer.*--data\.chat_template"):
        render_response(CONVERSATION, "yes", word_tokenizer(template=template))


# Exchanges as tokens


def encoded(prompt, response, tokenizer):
    return encode_exchange(render(prompt, tokenizer), render_response(prompt, response, tokenizer), tokenizer)


def template_that_ends_with(end: str) -> str:
    """The words of all turns, and `end` after the assistant's."""
    return (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}" + end + "{% endif %} {% endfor %}"
    )


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
@pytest.mark.parametrize("end", ["", "</s>", " </s>\n", "{{ eos_token }}"])
def test_one_eos_ends_the_response_whoever_writes_it(adds_bos, adds_eos, end):
    tokenizer = word_tokenizer(adds_bos=adds_bos, adds_eos=adds_eos, template=template_that_ends_with(end))
    assert encoded([user("a")], "b a", tokenizer) == ([BOS, A] if adds_bos else [A], [B, A, EOS])


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
@pytest.mark.parametrize("response", ["b a", "b a </s>", "b a</s>\n"])
def test_one_eos_ends_the_response_to_a_string(adds_bos, adds_eos, response):
    tokenizer = word_tokenizer(adds_bos=adds_bos, adds_eos=adds_eos)
    assert encoded("a ", response, tokenizer) == ([BOS, A] if adds_bos else [A], [B, A, EOS])


def test_a_response_of_no_words_is_the_end_alone():
    assert encoded("a", "", word_tokenizer(adds_bos=True)) == ([BOS, A], [EOS])


@pytest.mark.parametrize("adds_bos", [True, False])
def test_one_bos_where_the_template_writes_it(adds_bos):
    tokenizer = word_tokenizer(adds_bos=adds_bos, template="<s> " + template_that_ends_with("</s>"))
    assert encoded([user("a")], "b", tokenizer) == ([BOS, A], [B, EOS])


def test_what_the_template_writes_after_its_end_is_cut_if_it_is_blank():
    tokenizer = byte_tokenizer()  # its template ends every turn with <eos> and a newline
    prompt, response = encoded([user("hi")], "yo", tokenizer)
    assert tokenizer.decode(prompt) == "user: hi<eos>\nassistant: "
    assert tokenizer.decode(response) == "yo<eos>"
    assert tokenizer.decode(encoded("hi", "yo<eos> \n", tokenizer)[1]) == "yo<eos>"


def test_blanks_that_end_a_response_without_eos_are_the_responses_own():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encoded("hi", "yo \n", tokenizer)[1]) == "yo \n<eos>"


def test_words_after_an_eos_are_kept():
    assert encoded("a", " b </s> a", word_tokenizer()) == ([A], [B, EOS, A, EOS])


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("ba", "ab", ([B, A], [5, EOS])),
        ("aa", "bab", ([A, A], [B, 5, EOS])),  # a + b would merge: the prompt keeps its ids, the response its own
        ("a", "b", ([A], [B, EOS])),
        ("ab", "ab", ([5], [5, EOS])),
    ],
)
def test_the_prompt_keeps_its_ids_where_tokens_would_merge_across_the_boundary(prompt, response, expected):
    tokenizer = merging_tokenizer()
    assert encode_exchange(prompt, response, tokenizer) == expected
    assert expected[0] == encode(prompt, tokenizer)


def test_a_response_has_the_ids_that_it_has_after_the_prompt():
    tokenizer = merging_tokenizer(prefix="_")  # alone, "b" would be _b
    assert encode("b", tokenizer) == [7]
    assert encode_exchange("b", "b", tokenizer) == ([7], [B, EOS])


@pytest.mark.parametrize("text", ["a", "a b", "a </s>", "b </s> a"])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
def test_the_prompt_of_an_exchange_is_the_prompt_of_a_rollout(text, adds_bos, adds_eos):
    tokenizer = word_tokenizer(adds_bos=adds_bos, adds_eos=adds_eos)
    prompt, response = encoded(text, " b a", tokenizer)
    assert prompt == encode(render(text, tokenizer), tokenizer)
    assert response == [B, A, EOS]


@pytest.mark.parametrize(
    ("prompt", "tokenizer"),
    [
        ([user("a")], dict(template="{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")),
        ("</s>", dict(adds_bos=True)),
    ],
)
def test_a_response_does_not_begin_with_the_eos_that_was_cut_from_its_prompt(prompt, tokenizer):
    assert encoded(prompt, "b", word_tokenizer(**tokenizer))[1] == [B, EOS]


def test_one_eos_ends_a_response_that_brings_its_own_into_a_template():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encoded([user("hi")], "yo<eos>", tokenizer)[1]) == "yo<eos>"
