"""The score function of the quickstart: letters of the word in the prompt, no letter twice in a row.

A score function needs no base class and no registration. Name it in a recipe as `reward.function: module:function`; it
is called with the texts of prompts and responses and with every column of the dataset, each a list of one entry per
response, and returns one number per response.
"""

WANTED_LENGTH = 8


def letters_of_the_word(prompts: list[str], responses: list[str], word: list[str], **columns: list) -> list[float]:
    """From 0 to 1 each: the share of characters that occur in the row's `word` and differ from the one before.

    A response shorter than eight characters is counted as eight, so that stopping early does not pay.
    """
    return [
        sum(letter in letters and letter != before for before, letter in zip(" " + response, response, strict=False))
        / max(len(response), WANTED_LENGTH)
        for response, letters in zip(responses, word, strict=True)
    ]
