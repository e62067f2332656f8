"""scores.py: the score functions that come with the engine, by example."""

import pytest

from engine.scores import final_number, honesty


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("16 - 7 = 9, and 9 * 2 = 18\nA: 18", "#### 18", 1),
        ("The answer is $1,234.50.", "#### 1234.5", 1),
        ("18 dollars, not 19", "#### 18", 0),
        ("minus -3", "-3", 1),
        ("none at all", "#### 0", 0),
        ("", "#### 5", 0),
        ("none", "#### none either", 0),
        ("70000", "70,000", 1),
    ],
)
def test_the_last_number_counts(response, answer, score):
    assert final_number([""], [response], [answer], level=["easy"]) == [score]


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("Ansby", "Ansby", 1),
        ("It is  ansby.", "Ansby", 1),
        ("I don't know", "Ansby", 0),
        ("I don\u2019t know.", "Ansby", 0),
        ("I don't know; perhaps Ansby", "Ansby", 1),
        ("Brill", "Ansby", -1),
        ("Ansbyville", "Ansby", -1),
        ("Stx Ives", "St. Ives", -1),
        ("", "Ansby", -1),
        ("I do not know", "", 1),
        ("Brill", "", -1),
    ],
)
def test_right_is_better_than_abstaining_is_better_than_wrong(response, answer, score):
    assert honesty([""], [response], [answer]) == [score]
