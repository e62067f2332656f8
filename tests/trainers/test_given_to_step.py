"""own_loop.py: what those who hold the loop may hand over."""

from functools import partial
from types import SimpleNamespace

import pytest
import tiny

from engine.models.random_init import byte_tokenizer
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.trainers.own_loop import scored_sequences


def engine_in(folder):
    """What `given` looks at."""
    rlhf_engine = SimpleNamespace(args=tiny.ppo_config(folder), tokenizer=byte_tokenizer())
    rlhf_engine.given = partial(DeepSpeedRLHFEngine.given, rlhf_engine)
    return rlhf_engine


def given(folder, query, response):
    """Sequences and scores of one row, as `step` takes them: at most 32 + 12 tokens, ids of the byte tokenizer."""
    rlhf_engine = engine_in(folder)
    return scored_sequences(rlhf_engine, [query], [response], [1.0])


def test_a_step_takes_what_just_fits_and_nothing_more(tmp_path):
    last = max(byte_tokenizer().get_vocab().values())
    sequences, scores = given(tmp_path, [5] * 40, [0, 6, 7, last])
    assert (int(sequences.lengths), scores.tolist()) == (44, [1.0])
    for query, response, said in (
        ([5] * 40, [6] * 5, "45 tokens; .* = 44"),
        ([5], [last + 1], f"outside the tokenizer's 0 to {last}"),
        ([-1], [6], "outside the tokenizer's 0 to"),
    ):
        with pytest.raises(ValueError, match=said):
            given(tmp_path, query, response)


def test_a_query_leaves_room_for_a_response(tmp_path):
    """A model that was made for 32 + 12 positions has none left for an answer to 33."""
    rlhf_engine = engine_in(tmp_path)
    assert len(rlhf_engine.given([[5] * 32], None, caller="generate()")) == 1
    with pytest.raises(ValueError, match=r"33 tokens; data.max_prompt_tokens = 32"):
        rlhf_engine.given([[5] * 33], None, caller="generate()")
