"""Text of prompts and responses as the models see it. The one `render` that every stage uses."""

from collections.abc import Collection
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
Prompt = str | Messages
ASSISTANT_TURN = "\n\nAssistant:"
MARK = "\ue000response\ue001"  # stands for a response in what a template writes; of private use: no template has it


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as text: a string as it is; a conversation through the tokenizer's chat template, ready to be answered.

    Raises:
        ValueError: neither a string nor a list of {"role", "content"} messages, or a conversation for a tokenizer
            without a chat template.
    """
    if isinstance(prompt, str):
        ended = tokenizer.eos_token or ""
        return prompt.removesuffix(ended) or prompt  # a prompt has not ended, see `encode`; EOS alone is a prompt
    if not is_conversation(prompt):
        raise _no_prompt(prompt)
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompt is a list of messages, and the tokenizer has no chat template to render it with. "
            "Name a file that holds one with --data.chat_template."
        )
    return _templated(prompt, tokenizer, add_generation_prompt=True)


def render_response(prompt: Prompt, response: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What follows `render(prompt)` when this is the answer: itself after a string, and what the chat template makes of
    it after a conversation (its end-of-turn marks are part of it).

    Raises:
        ValueError: the template writes an answered conversation in a way that does not begin with the prompt.
    """
    response = response.removesuffix(tokenizer.eos_token or "")  # it ends with EOS anyway, see `encode_exchange`
    if isinstance(prompt, str):
        return response
    before = render(prompt, tokenizer)
    answered = [*prompt, {"role": "assistant", "content": response}]
    whole = _templated(answered, tokenizer, add_generation_prompt=False)
    if not whole.startswith(before):
        raise ValueError(
            f"the chat template writes this conversation as ...{before[-40:]!r} when it asks for an answer, but not "
            f"when it holds one: ...{whole[max(0, len(before) - 40) :][:80]!r}. Name another with --data.chat_template."
        )
    return whole[len(before) :]


def encode_reply(
    conversation: Messages, reply: str, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int]
) -> list[int]:
    """Token ids that lead from a response to the next one: what the chat template writes after the response, the user's
    reply, and what asks for an answer.

    The conversation is written with a mark in the response's place, and only what follows the mark is encoded: the
    tokens before, which the model wrote itself, stay as they are. The end-of-sequence token that ended the response
    stands for the one that the template writes there.

    Args:
        conversation: ends with the response, which ended by itself.
        eos_token_ids: those that end a response.

    Raises:
        ValueError: the template refuses the conversation, does not write the response, or writes nothing after it; or
            the reply is not Unicode.
    """
    *before, _ = conversation
    turns = [*before, {"role": "assistant", "content": MARK}, {"role": "user", "content": reply}]
    _, mark, after = _templated(turns, tokenizer, add_generation_prompt=True).partition(MARK)
    ids = _ids(after, tokenizer, add_special_tokens=False)
    end = next((at for at, token in enumerate(ids) if token in eos_token_ids), None)
    if end is not None and not tokenizer.decode(ids[:end]).strip():
        ids = ids[end + 1 :]
    if not mark or not ids:
        raise ValueError(
            "the chat template does not write the assistant's turns, or nothing after them: a conversation cannot go "
            "on. Name another with --data.chat_template."
        )
    return ids


def as_prompt(cell: Any, prompt_format: Literal["text", "chat"]) -> Prompt:
    """A cell of a prompt column as a prompt: under `chat` a string is what the user says.

    Raises:
        ValueError: it is neither text nor a conversation, it is an empty string, or it has been answered.
    """
    if isinstance(cell, str):
        if not cell:
            raise ValueError("the prompt is empty.")
        return cell if prompt_format == "text" else [{"role": "user", "content": cell}]
    if not is_conversation(cell):
        raise _no_prompt(cell)
    if is_answered(cell):
        raise ValueError("the prompt ends with the assistant's turn: there is nothing to answer.")
    return cell


def unanswered(cell: Any) -> Any:
    """A conversation without the assistant's turns at its end; anything else as it is.

    Raises:
        ValueError: nothing but the assistant's turns is there.
    """
    asked = cell
    while is_answered(asked):
        asked = asked[:-1]
    if cell and not asked:
        raise ValueError("the conversation has an answer and no prompt.")
    return asked


def exchange(prompt: Prompt | None, answer: Any) -> tuple[Prompt, str]:
    """A prompt and a response out of what data sets call an answer.

        exchange("2 + 2 =", " 4")                                    a prompt, and text
        exchange([user], [assistant])                                a prompt, and the turn that answers it
        exchange([user], [assistant, user, assistant])               a prompt, and how the conversation goes on
        exchange([user], [system, user, assistant])                  a conversation that holds the prompt
        exchange(None, [user, assistant])                            a whole conversation, split at its last turn
        exchange(None, "\\n\\nHuman: ...\\n\\nAssistant: ...")           a transcript, split at its last "Assistant:"

    Raises:
        ValueError: the answer is none of these, or a conversation that does not go with the prompt.
    """
    if isinstance(answer, str):
        if prompt is not None:
            return prompt, answer
        before, marker, response = answer.rpartition(ASSISTANT_TURN)
        if not marker:
            raise ValueError(
                f"there is no prompt column, and {answer[:80]!r} is not a transcript with {ASSISTANT_TURN!r} in it."
            )
        return before + marker, response
    if not is_answered(answer):
        raise ValueError(
            f"a response is a string or a list of messages that ends with the assistant's, this is {repr(answer)[:80]}."
        )
    *before, last = answer
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    turns = _one_conversation(asked, before)
    if not turns:
        raise ValueError("the conversation has an answer and no prompt.")
    return turns, last["content"]


def _one_conversation(asked: Messages, before: Messages) -> Messages:
    """A prompt's turns and those before a response, where the ones hold the others or are followed by them."""
    ours, theirs = ([(turn["role"], turn["content"]) for turn in turns] for turns in (asked, before))
    if not theirs or ours[-len(theirs) :] == theirs:
        return asked
    if not ours or theirs[: len(ours)] == ours or theirs[-len(ours) :] == ours:
        return before
    if before[0]["role"] == "assistant":
        return asked + before
    raise ValueError(
        f"the conversation does not hold the prompt, and neither goes on from it: it has {str(before)[:80]!r}, the "
        f"prompt is {str(asked)[:80]!r}. If the conversation is whole, name its own column with --data.prompt_column."
    )


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a rendered prompt, with exactly one beginning-of-sequence token if the tokenizer adds one.

    Raises:
        ValueError: the text is not Unicode (half a surrogate pair).
    """
    ids = _ids(text, tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # a template that writes BOS, and a tokenizer that adds it again
        ids = ids[1:]
    # Some tokenizers append EOS to whatever they encode: a prompt has not ended, unless its own text says so.
    appended = [eos, eos] if text.endswith(tokenizer.eos_token) else [eos]
    return ids[:-1] if len(ids) > 1 and ids[-len(appended) :] == appended else ids


def encode_exchange(
    prompt_text: str, response_text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of a rendered prompt, and of the response to it with one end-of-sequence token at its end.

    The prompt's ids are those that it has alone, since alone is how it is given to a model that answers. The
    response's are those that it has after the prompt, unless the two grow together where they meet: it is then
    encoded by itself.
    """
    prompt, whole = encode(prompt_text, tokenizer), encode(prompt_text + response_text, tokenizer)
    if whole[: len(prompt)] == prompt:
        response = whole[len(prompt) :]
    else:
        response = _ids(response_text, tokenizer, add_special_tokens=False)
    eos = tokenizer.eos_token_id
    if eos in response:  # the template's own; what it writes after it ("\n", say) no model is asked to write
        last = len(response) - 1 - response[::-1].index(eos)
        if not tokenizer.decode(response[last + 1 :]).strip():
            return prompt, response[: last + 1]
    return prompt, [*response, eos]


def said_since(prompt: Messages, conversation: Messages) -> str:
    """What the assistant says in a conversation after the prompt that it begins with: a line or more each turn."""
    return "\n".join(turn["content"] for turn in conversation[len(prompt) :] if turn["role"] == "assistant")


def is_conversation(value: Any) -> bool:
    """Whether this is a list of {"role", "content"} messages, at least one."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        )
    )


def _no_prompt(value: Any) -> ValueError:
    """What is wrong with this as a prompt."""
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    for content in (turn["content"] for turn in turns if "content" in turn):
        if not isinstance(content, str):
            return ValueError(f"the content of a message is a string, this is {str(content)[:80]!r}.")
    return ValueError(f'a prompt is a string or a list of {{"role", "content"}} messages, this is {str(value)[:80]!r}.')


def is_answered(value: Any) -> bool:
    """Whether this is a conversation that ends with the assistant's turn."""
    return is_conversation(value) and value[-1]["role"] == "assistant"


def _templated(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:  # a template's own refusal: roles that do not alternate, say
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, **options: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not Unicode: {error}") from error
    return tokenizer(text, **options)["input_ids"]
