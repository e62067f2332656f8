"""Responses in the words of a reward model that does not share the actor's tokens or chat template."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from engine.data.formatting import MARK, Prompt, encode_exchange, render, render_response
from engine.data.sequences import Sequences


def sequences_for_another_tokenizer(
    exchanges: Iterable[tuple[Prompt, str, str, bool]], tokenizer: PreTrainedTokenizerBase
) -> Sequences:
    """Responses as a reward model reads them that does not share the actor's tokens or template.

    Args:
        exchanges: for each response the prompt as the dataset has it, the prompt's text as the actor saw it, the
            response's text, and whether it ended by itself. A prompt that is text is taken as the actor saw it.
        tokenizer: the reward model's. One of a response that ended is ended by its own end-of-sequence token.
    """
    prompts, responses = [], []
    for prompt, text, response, ended in exchanges:
        asked = text if isinstance(prompt, str) else prompt
        answer = render_response(asked, response, tokenizer)
        if not ended:  # nor does it end its turn
            answer = answer.removesuffix(_end_of_turn(asked, tokenizer))
        ids = encode_exchange(render(asked, tokenizer), answer, tokenizer)
        prompts.append(ids[0])
        responses.append(ids[1] if ended else ids[1][:-1])
    return Sequences.of(prompts, responses)


def _end_of_turn(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after a response, whatever the response; nothing after text."""
    return render_response(prompt, MARK, tokenizer).partition(MARK)[2]
