"""formatting.py: text of a prompt, and exactly one beginning-of-sequence token whoever writes it."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.data.formatting import encode, render
from engine.models.random_init import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONVERSATION = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
BOS, EOS = 0, 1


def word_tokenizer(*, adds_bos: bool = False, adds_eos: bool = False, template: str | None = None):
    """<s> is 0, </s> is 1, `a` is 2, `b` is 3; words are split at blanks."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": BOS, "</s>": EOS, "a": 2, "b": 3, "<unk>": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    parts = ["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(parts), special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = template
    return fast


def test_a_string_is_left_as_it_is():
    assert render("  as it is\n", byte_tokenizer()) == "  as it is\n"


def test_a_conversation_goes_through_the_template_and_is_ready_to_be_answered():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert render(CONVERSATION, tokenizer) == "<system>be brief<user>hi<assistant>"


def test_a_conversation_needs_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        render(CONVERSATION, byte_tokenizer())


@pytest.mark.parametrize(
    "prompt",
    [None, 7, 1.5, [], ["hi"], {"role": "user", "content": "hi"}, [{"role": "user"}], [{"role": "user", "content": 3}]],
)
def test_what_is_neither_text_nor_a_conversation_is_refused(prompt):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="a prompt is a string or a list of"):
        render(prompt, tokenizer)


def test_no_bos_for_a_tokenizer_that_adds_none():
    assert encode("a b", word_tokenizer()) == [2, 3]
    ids = encode("ab", byte_tokenizer())
    assert byte_tokenizer().decode(ids) == "ab" and len(ids) == 2


def test_one_bos_from_a_tokenizer_that_adds_it():
    assert encode("a b", word_tokenizer(adds_bos=True)) == [BOS, 2, 3]


def test_one_bos_from_a_template_that_writes_it():
    tokenizer = word_tokenizer(template="<s> {{ messages[0]['content'] }}")
    assert encode(render([{"role": "user", "content": "b"}], tokenizer), tokenizer) == [BOS, 3]


def test_one_bos_from_a_template_and_a_tokenizer_that_both_write_it():
    tokenizer = word_tokenizer(adds_bos=True, template="<s> {{ messages[0]['content'] }}")
    assert encode(render([{"role": "user", "content": "b"}], tokenizer), tokenizer) == [BOS, 3]


def test_a_prompt_has_not_ended():
    assert encode("a b", word_tokenizer(adds_bos=True, adds_eos=True)) == [BOS, 2, 3]
    assert encode("a </s> b", word_tokenizer(adds_eos=True)) == [2, EOS, 3]  # what the text itself holds stays


def test_a_prompt_of_one_bos_that_is_also_eos_stays_a_prompt():
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "</s>"  # GPT-2: one token for both
    assert encode("</s>", tokenizer) == [EOS]
    assert encode("</s> a", tokenizer) == [EOS, 2]
