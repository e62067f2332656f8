"""evaluation.py where it needs no model: the win rate, the settings, the users' functions."""

import math
import random
from types import SimpleNamespace

import pytest
import tiny
import torch

from engine.config import EvaluationConfig
from engine.data import create_datasets, create_eval_dataset
from engine.distributed.random_states import random_states_kept
from engine.models.loading import load_tokenizer
from engine.trainers.checkpoints import contents_of
from engine.trainers.evaluation import Evaluation, load_metrics, win_rate
from engine.trainers.progress import Progress


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


def test_other_held_out_prompts_are_another_run(tmp_path):
    tokenizer, config = load_tokenizer(tiny.LLAMA), tiny.ppo_config(tmp_path)

    def contents(rows):
        with_eval = tiny.changed(config, data__eval=rows and tiny.write_rows(tmp_path / "held_out.jsonl", rows))
        prompts, _ = create_datasets(with_eval, tokenizer, train_phase=3)
        held_out = create_eval_dataset(with_eval, tokenizer, train_phase=3)
        return contents_of(with_eval, prompts.dataset, held_out, None)

    row = {"prompt": "sing", "answer": "la"}
    first, *others = (contents(rows) for rows in ([row], [row] * 2, [row | {"answer": "do"}], None))
    assert first == contents([row])
    for other in others:
        assert {name for name in first if first[name] != other[name]} == {"the held-out prompts"}


def test_prompts_without_the_setting_and_the_setting_without_prompts_are_refused(tmp_path):
    for config, held_out in (
        (tiny.ppo_config(tmp_path), ["prompts"]),
        (tiny.ppo_config(tmp_path, data__eval="held_out.jsonl"), None),
    ):
        with pytest.raises(ValueError, match=r"create_eval_dataset\(args, tokenizer, train_phase=3\)"):
            Evaluation(SimpleNamespace(config=config), held_out)


def test_a_run_that_began_without_an_evaluation_has_nothing_to_compare_with():
    late = SimpleNamespace(held_out=["a prompt"], initial=None, trainer=SimpleNamespace(progress=Progress(iteration=3)))
    with pytest.raises(ValueError, match=r"leave data\.eval out, or begin anew"):
        Evaluation.begin(late, None)


def test_settings_of_an_evaluation_that_there_is_none_of_are_told(tmp_path):
    asked = dict(evaluation__every=5)
    assert tiny.ppo_config(tmp_path, **asked).without_effect["evaluation"] == "data.eval is not set"
    assert "evaluation" not in tiny.ppo_config(tmp_path, data__eval="held_out.jsonl", **asked).without_effect
