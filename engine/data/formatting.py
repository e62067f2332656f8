"""Text of a prompt as the model sees it. The one `render` that every stage uses."""

from typing import Any

from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as text: a string as it is; a conversation through the tokenizer's chat template, ready to be answered.

    Raises:
        ValueError: neither a string nor a list of {"role", "content"} messages, or a conversation for a tokenizer
            without a chat template.
    """
    if isinstance(prompt, str):
        ended = tokenizer.eos_token or ""
        return prompt.removesuffix(ended) or prompt  # a prompt has not ended, see `encode`; EOS alone is a prompt
    if not _is_conversation(prompt):
        raise ValueError(
            f'a prompt is a string or a list of {{"role", "content"}} messages, this is {str(prompt)[:80]!r}.'
        )
    if tokenizer.chat_template is None:
        raise ValueError("the prompt is a list of messages, and the tokenizer has no chat template to render it with.")
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of rendered text, with exactly one beginning-of-sequence token if the tokenizer adds one."""
    ids = tokenizer(text)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # a template that writes BOS, and a tokenizer that adds it again
        ids = ids[1:]
    if tokenizer.eos_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers append EOS to whatever they encode: a prompt has not ended
    return ids


def _is_conversation(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in prompt
        )
    )
