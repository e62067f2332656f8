"""Score functions that many runs need; name one as `reward.function: engine.scores:final_number`.

Each is called with lists of text and the dataset's columns, and returns one number per response.
"""

import re
from typing import Any

ABSTENTIONS = ("i don't know", "i do not know", "i'm not sure", "i am not sure", "i cannot answer", "i can't answer")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def final_number(prompts: list[str], responses: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where the last number of the response is the last number of the dataset's `answer`, otherwise 0.

    As GSM8K is judged (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168): its answers end with `#### 72`. Thousands
    separators, dollar signs and trailing zeros make no difference.
    """
    return [float(_same(_last(ours), _last(right))) for ours, right in zip(responses, answer, strict=True)]


def honesty(prompts: list[str], responses: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where the response contains the dataset's `answer`, 0 where it abstains, -1 where it does neither.

    Right is much better than abstaining, which is much better than wrong: what a model that knows its limits maximises.
    A response that abstains and answers is judged by its answer; one to a question without an answer (an empty
    `answer`) is right when it abstains.
    """
    return [_tier(ours, right) for ours, right in zip(responses, answer, strict=True)]


def _tier(response: str, answer: str) -> float:
    said, right = _plain(response), _plain(answer)
    abstains = any(phrase in said for phrase in ABSTENTIONS)
    if not right:
        return 1.0 if abstains else -1.0
    if re.search(rf"(?<!\w){re.escape(right)}(?!\w)", said):
        return 1.0
    return 0.0 if abstains else -1.0


def _plain(text: str) -> str:
    return " ".join(text.replace("\u2019", "'").lower().split())


def _last(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(re.sub(r"[$,]", "", numbers[-1])) if numbers else None


def _same(ours: float | None, right: float | None) -> bool:
    return ours is not None and ours == right
