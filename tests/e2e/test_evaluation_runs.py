"""Evaluation during PPO, on two ranks: what it finds, that training does not notice it, that a run goes on with it."""

import json
import random
import statistics
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from ranks import RankFailed
from resuming import StopAt
from runs import UNCOMPARABLE, build, digest

from engine.config import SteadyLoRAConfig
from engine.distributed import comm
from engine.tracking import Tracker
from engine.trainers.checkpoints import Checkpoints

HELD_OUT = ["who is it", "sing", "five words are enough now", "b", "say when"]  # two ranks do not share them evenly
METRICS = """
import random
import torch

def letters(prompts, responses, number, **columns):
    random.random(), torch.rand(3)  # code of others draws what it likes
    return [len(response) + 100 * row for response, row in zip(responses, number, strict=True)]

calls = 0

def breaks_later(prompts, responses, number, **columns):
    global calls
    calls += 1
    if calls > 1:
        raise KeyError("no gold answer")
    return [0.0] * len(responses)

def breaks(prompts, responses, number, **columns):
    if 4 in number:
        raise KeyError("no gold answer")
    return [0.0] * len(responses)
"""


def with_evaluation(folder, kind=0, *, held_out=HELD_OUT, **given):
    """A run that is evaluated before training and after iterations 2 and 3; four steps an iteration."""
    rows = [{"prompt": text, "number": number} for number, text in enumerate(held_out)]
    (folder / "my_metrics.py").write_text(METRICS)
    settings = dict(
        data__eval=tiny.write_rows(folder / "held_out.jsonl", rows),
        evaluation__every=2,
        evaluation__samples=9,
        evaluation__metrics=[f"{folder / 'my_metrics.py'}:letters"],
        reward__function="tiny:share_of_small_letters",
        actor__learning_rate=3e-3,
        checkpoint__every=None,
    )
    return tiny.ppo_config(folder, **settings | tiny.sharding(kind, folder) | given)


def rows_of(folder: str, name: str) -> list[dict]:
    path = Path(folder) / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in row.items() if not key.startswith(UNCOMPARABLE)} for row in rows]


def go(config, stop_at=None):
    """A run with the files that it writes, from its beginning or from where `config.resume` says."""
    trainer, prompts = build(config)
    checkpoints = Checkpoints(config, trainer.rlhf_engine.trained, contents={}, stop=StopAt(stop_at))
    given = dict(num_iterations=config.num_iterations, is_main=comm.is_main())
    with checkpoints.go_on(trainer, config.num_iterations, partial(Tracker, config, **given)) as tracker:
        finished = trainer.train(prompts, config.num_iterations, tracker, checkpoints)
    comm.barrier()
    names = ("metrics", "samples", "evaluation", "evaluation_samples", "token_views")
    found = {name: rows_of(config.output_dir, name) for name in names}
    return found | {"finished": finished, "actor": digest(trainer.actor)}


@pytest.fixture(scope="module")
def plain(run_ranks, tmp_path_factory):
    """The run the others are compared with: ZeRO 0, two ranks."""
    return run_ranks(go, with_evaluation(tmp_path_factory.mktemp("plain")))[0]


def test_what_an_evaluation_finds(plain):
    before, middle, after = plain["evaluation"]
    assert [row["iteration"] for row in plain["evaluation"]] == [0, 2, 3]
    assert before["eval/win_rate"] == 0.5 and abs(before["eval/kl_ref_mean"]) < 1e-5, "the initial actor is the ref"
    assert after["eval/kl_ref_mean"] > 0.1 and middle != after
    assert [row["prompt"] for row in plain["evaluation_samples"]] == HELD_OUT * 3
    initial = plain["evaluation_samples"][:5]
    assert len({row["response"] for row in plain["evaluation_samples"]}) > 5, "it has changed"
    for number, found in enumerate(plain["evaluation"]):
        rows = plain["evaluation_samples"][5 * number : 5 * number + 5]
        scores = tiny.share_of_small_letters([], [row["response"] for row in rows])
        assert [row["score"] for row in rows] == pytest.approx(scores)
        assert [(row["initial_response"], row["initial_score"]) for row in rows] == [
            (row["response"], row["score"]) for row in initial
        ]
        better = [(row["score"] > row["initial_score"]) + (row["score"] >= row["initial_score"]) for row in rows]
        lengths, kl = [row["length"] for row in rows], [row["kl"] for row in rows]
        assert {name: value for name, value in found.items() if name != "eval/eos_fraction"} == pytest.approx(
            {
                "iteration": (0, 2, 3)[number],
                "eval/score_mean": statistics.mean(scores),
                "eval/score_std": statistics.pstdev(scores),
                "eval/win_rate": statistics.mean(better) / 2,
                "eval/kl_ref_mean": statistics.mean(kl),
                "eval/length_mean": statistics.mean(lengths),
                "eval/letters": statistics.mean(100 * row + len(rows[row]["response"]) for row in range(5)),
            }
        )
        assert found["eval/eos_fraction"] == pytest.approx(statistics.mean(length < 12 for length in lengths))


def test_a_token_view_is_the_first_sample(plain):
    assert [view["iteration"] for view in plain["token_views"]] == [1, 2, 3]
    for view, sample in zip(plain["token_views"], plain["samples"][::2], strict=True):
        assert "".join(view["tokens"]) == sample["response"] and view["prompt"] == sample["prompt"]
        assert view["score"] == sample["score"] and len(view["tokens"]) == sample["length"]
        assert sum(view["kl"]) == pytest.approx(sample["kl"], abs=1e-3)
        for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages"):
            assert len(view[name]) == sample["length"]
        difference = [ours - theirs for ours, theirs in zip(view["logprobs"], view["ref_logprobs"], strict=True)]
        assert view["kl"] == pytest.approx(difference, abs=1e-4)


TRUNK = dict(shared_trunk=True, actor__lora=SteadyLoRAConfig(r=4))


@pytest.mark.parametrize(("kind", "given"), [(0, {}), ("strict", {}), (2, TRUNK)], ids=["zero0", "strict", "trunk"])
def test_training_does_not_notice(run_ranks, tmp_path, kind, given):
    (tmp_path / "on").mkdir()
    (tmp_path / "off").mkdir()
    on = run_ranks(go, with_evaluation(tmp_path / "on", kind, **given))[0]
    off = run_ranks(go, with_evaluation(tmp_path / "off", kind, data__eval=None, **given))[0]
    assert len(on["evaluation"]) == 3 and off["evaluation"] == off["evaluation_samples"] == []
    for name in ("metrics", "samples", "token_views", "actor"):
        assert on[name] == off[name], name


@pytest.mark.parametrize(("kind", "world_size"), [(0, 1), ("strict", 2)])
def test_ranks_and_sharding_leave_an_evaluation_alone(run_ranks, tmp_path, plain, kind, world_size):
    found = run_ranks(go, with_evaluation(tmp_path, kind, evaluation__samples=2), world_size=world_size)[0]
    for mine, other in zip(found["evaluation"], plain["evaluation"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)
    two_of_each = [row for first in (0, 5, 10) for row in plain["evaluation_samples"][first : first + 2]]
    for mine, other in zip(found["evaluation_samples"], two_of_each, strict=True):
        assert mine.pop("kl") == pytest.approx(other["kl"], rel=1e-5, abs=1e-5)
        assert mine == {name: value for name, value in other.items() if name != "kl"}


@pytest.mark.parametrize("stop_at", [3, 13])
def test_a_run_that_goes_on_has_the_rows_of_one_that_never_stopped(run_ranks, tmp_path, plain, stop_at):
    """Stopped in the middle of iteration 1, whose end no file has seen, and of iteration 3."""
    config = with_evaluation(tmp_path)
    assert not run_ranks(go, config, stop_at)[0]["finished"]
    whole = run_ranks(go, tiny.changed(config, resume="auto"))[0]
    assert whole == plain


def test_a_run_that_goes_back_has_every_evaluation_once(run_ranks, tmp_path):
    guard = dict(kl_guard__max_kl=0.5, kl_guard__roll_backs=30, kl_guard__factor=0.1, checkpoint__every=1)
    given = dict(actor__learning_rate=5e-3, actor__adam_epsilon=1e-8, kl_coef=0.0, num_iterations=5)
    given |= dict(evaluation__every=1)
    found = run_ranks(go, with_evaluation(tmp_path, **guard, **given))[0]
    assert "rolled back" in (Path(tmp_path) / "out" / "warnings.jsonl").read_text()
    assert [row["iteration"] for row in found["evaluation"]] == [0, 1, 2, 3, 4, 5]
    assert [row["iteration"] for row in found["token_views"]] == [1, 2, 3, 4, 5]


class Asks:
    """Replies once."""

    def __init__(self, number):
        self.number = number

    def reply(self, conversation):
        return f"and {self.number}?" if len(conversation) < 3 else None


def turns(prompts, responses, conversations, **columns):
    return [float(sum(said["role"] == "assistant" for said in conversation)) for conversation in conversations]


def test_with_an_environment_an_answer_is_a_conversation(run_ranks, tmp_path):
    here = "test_evaluation_runs:"
    chat = dict(data__prompt_format="chat", data__max_prompt_tokens=64, rollout__environment=here + "Asks")
    given = chat | dict(reward__function=here + "turns", evaluation__metrics=[here + "turns"])
    config = with_evaluation(tmp_path, rollout__max_response_tokens=40, num_iterations=1, **given)
    found = run_ranks(go, config)[0]
    assert found["evaluation"][-1]["eval/turns"] == found["evaluation"][-1]["eval/score_mean"] >= 1
    view = found["token_views"][0]
    assert len(view["tokens"]) == len(view["kl"]) == found["samples"][0]["length"]


def alone(config):
    """Two evaluations of the same weights, in different iterations and with other states of the generators."""
    trainer, _ = build(config)
    trainer.actor.train()
    found = []
    for trainer.progress.iteration in (1, 2):
        random.seed(trainer.progress.iteration), torch.manual_seed(trainer.progress.iteration)
        found.append(trainer.evaluation.answers())
    return found, trainer.actor.module.training, trainer.seconds


@pytest.mark.parametrize("weights", ["gathered", "sharded"])
def test_one_prompt_on_two_ranks_is_answered_the_same_again_and_again(run_ranks, tmp_path, weights):
    given = dict(held_out=HELD_OUT[:1], evaluation__temperature=1.0, rollout__weights=weights)
    ranks = run_ranks(alone, with_evaluation(tmp_path, "strict", **given))
    for (first, again), training, seconds in ranks:
        assert len(first.responses) == 1 and first == again == ranks[0][0][0]
        assert training and seconds == {}


def test_only_the_first_prompts_are_asked(run_ranks, tmp_path):
    (first, _), *_ = run_ranks(alone, with_evaluation(tmp_path, evaluation__num_prompts=3))[0]
    assert len(first.responses) == len(first.scores) == len(first.kl) == 3


def test_a_metric_that_fails_on_one_rank_is_one_error_on_all(run_ranks, tmp_path):
    config = with_evaluation(tmp_path)
    config = tiny.changed(config, evaluation__metrics=[f"{tmp_path / 'my_metrics.py'}:breaks"])
    with pytest.raises(RankFailed) as told:
        run_ranks(go, config)
    said = "ValueError: on rank 1 of 2: the evaluation metric breaks raised KeyError: 'no gold answer' ("
    assert str(told.value).count(said) >= 2 and "my_metrics.py, line" in str(told.value)


def test_a_metric_that_fails_after_an_iteration_costs_none(run_ranks, tmp_path, plain):
    """What has been trained is saved, and goes on with another metric to where it would have come."""
    config = with_evaluation(tmp_path)
    breaking = tiny.changed(config, evaluation__metrics=[f"{tmp_path / 'my_metrics.py'}:breaks_later"])
    with pytest.raises(RankFailed, match="the evaluation metric breaks_later raised KeyError"):
        run_ranks(go, breaking)
    assert [folder.name for folder in (tmp_path / "out/checkpoints").iterdir()] == ["iteration_000002"]
    found = run_ranks(go, tiny.changed(config, resume="auto"))[0]
    assert found["actor"] == plain["actor"] and found["metrics"] == plain["metrics"]
