"""Text on a terminal: as it is written token by token, without what would steer the terminal, in two columns."""

import unicodedata

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what bytes are decoded to that are no character, or not yet
GAP = 3  # characters between columns
# ESC, carriage return and the like as the pictures that Unicode has of them; those above 127 have none.
PICTURES = {code: 0x2400 + code for code in range(32)} | dict.fromkeys(range(127, 160), UNFINISHED)
VISIBLE = {code: picture for code, picture in PICTURES.items() if chr(code) not in "\n\t"}


class TextStream:
    """Tokens -> text, a token at a time. A character of several bytes comes when its last token has come.

    Attributes:
        text: all there has been.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.text = tokenizer, ""
        self.tokens: list[int] = []

    def more(self, token: int) -> str:
        """What this token adds."""
        self.tokens.append(token)
        return self._added(self._decoded().rstrip(UNFINISHED))

    def rest(self) -> str:
        """What was held back, once no token follows."""
        return self._added(self._decoded())

    def _decoded(self) -> str:
        # Without cleaning up: it would take back a space that has been shown.
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _added(self, text: str) -> str:
        added = text[len(self.text) :]
        self.text += added
        return added


def visible(text: str) -> str:
    """Text that can do nothing to a terminal but be shown: a model's bytes may be anything."""
    return text.translate(VISIBLE)


def columns(texts: list[str], width: int) -> str:
    """Texts next to each other, a line break at the end of every line."""
    each = (width - GAP * (len(texts) - 1)) // len(texts)
    wrapped = [wrap(text, each) for text in texts]
    lines = []
    for number in range(max(map(len, wrapped))):
        cells = [column[number] if number < len(column) else "" for column in wrapped]
        lines.append((" " * GAP).join(cell + " " * (each - cells_of(cell)) for cell in cells).rstrip())
    return "".join(f"{line}\n" for line in lines)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells of a terminal, broken at spaces where there are any."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        while (end := fitting(line, width)) < len(line):
            space = line.rfind(" ", 1, end + 1)
            cut = space if space > 0 else end
            lines.append(line[:cut])
            line = line[cut:].lstrip(" ")
        lines.append(line)
    return lines


def fitting(text: str, width: int) -> int:
    """How many of its letters go into that many cells; at least one."""
    used = 0
    for number, letter in enumerate(text):
        used += cells_of(letter)
        if used > width:
            return max(1, number)
    return len(text)


def cells_of(text: str) -> int:
    """How many cells of a terminal it takes: two for each wide character, none for what is put onto another."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )
