"""engine.environments by hand."""

import pytest

from engine.environments import SecondChance
from engine.rollout.environments import load_environment, new_environment


@pytest.mark.parametrize(("said", "is_over"), [("so it is 72", True), ("72? no, 73", False), ("I give up", False)])
def test_a_second_chance_is_for_those_who_are_wrong(said, is_over):
    environment = new_environment(
        load_environment("engine.environments:SecondChance"), {"answer": "48 + 24\n#### 72", "question": "?"}
    )
    assert isinstance(environment, SecondChance)
    before = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "72"},
        {"role": "user", "content": "a"},
    ]
    assert (environment.reply([*before, {"role": "assistant", "content": said}]) is None) == is_over
