"""evaluation.py where it needs no model: the win rate, the settings, the users' functions."""

import math
import random

import pytest
import torch

from engine.config import EvaluationConfig
from engine.distributed.random_states import random_states_kept
from engine.trainers.evaluation import load_metrics, win_rate


def test_the_same_responses_win_half_and_better_ones_all():
    scores = [0.5, -1.0, 2.0]
    assert win_rate(scores, scores) == 0.5
    assert win_rate([score + 0.1 for score in scores], scores) == 1.0
    assert win_rate([score - 0.1 for score in scores], scores) == 0.0


def test_who_wins_against_whom_and_the_other_way_round_are_all():
    ours, theirs = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 1.0]
    assert win_rate(ours, theirs) == (0.5 + 0 + 1 + 1) / 4
    assert win_rate(ours, theirs) + win_rate(theirs, ours) == 1


def test_a_prompt_that_one_side_has_no_score_for_is_left_out():
    assert win_rate([None, 2.0, 3.0], [0.0, 1.0, None]) == 1.0
    assert math.isnan(win_rate([None], [1.0]))


def test_a_metric_is_a_function_of_a_module_or_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "math.py").write_text("def sqrt(prompts, responses, **columns):\n    return [7.0 for _ in responses]\n")
    monkeypatch.chdir(tmp_path)
    assert load_metrics(EvaluationConfig(metrics=["math:sqrt"])) == {"sqrt": math.sqrt}
    assert load_metrics(EvaluationConfig(metrics=["math.py:sqrt"]))["sqrt"](["a"], ["b"]) == [7.0]
    with pytest.raises(ValueError, match=r"evaluation\.metrics=no\.py:f: .*there is no such file"):
        load_metrics(EvaluationConfig(metrics=["no.py:f"]))
    with pytest.raises(ValueError, match=r"evaluation\.metrics=math\.py:f: math\.py has no function f\."):
        load_metrics(EvaluationConfig(metrics=["math.py:f"]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(every=0), r"evaluation\.every=0"),
        (dict(temperature=-0.1), r"evaluation\.temperature=-0\.1"),
        (dict(metrics=["length"]), "'length' is not of the form module:function or file.py:function"),
        (dict(metrics=["a:f", "b.py:f"]), "two metrics would be called eval/f"),
        (dict(metrics=["a:win_rate"]), "two metrics would be called eval/win_rate"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        EvaluationConfig(**given)


def test_what_is_drawn_in_between_is_not_noticed():
    drawn = []
    for something in (lambda: None, lambda: (random.random(), torch.rand(3))):
        random.seed(1), torch.manual_seed(1)
        with random_states_kept():
            something()
        drawn.append((random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
