"""Bad numbers and uneven shares on one rank: all ranks take the same path, and the run goes on or stops as one."""

import math
import operator
import re

import pytest
import ranks
import tiny
import torch
from runs import Log, build, digest, train

from engine.distributed import comm
from engine.rollout.experience import Experience
from engine.rollout.generation import Responses

AT = "test_faults:"


def nan_on_rank_one(prompts, responses, **columns):
    """NaN once: the first call on rank 1."""
    nan_on_rank_one.calls += 1
    poisoned = comm.rank() == 1 and nan_on_rank_one.calls == 1
    return [math.nan if poisoned and row == 0 else float(len(text)) for row, text in enumerate(responses)]


nan_on_rank_one.calls = 0


def always_nan(prompts, responses, **columns):
    return [math.nan] * len(responses)


def said_by_failing_run(config):
    """The message of a run that fails."""
    with pytest.raises(ValueError, match=r"^on rank 1 of 2: ") as failure:
        train(config)
    return str(failure.value)


def raises_on_rank_one(prompts, responses, **columns):
    if comm.rank() == 1:
        raise KeyError("no such gold answer")
    return [0.0] * len(responses)


def one_too_few_on_rank_one(prompts, responses, **columns):
    return [0.0] * (len(responses) - comm.rank())


def poisoned_then_healthy(config):
    nan_on_rank_one.calls = 0
    trainer, prompts = build(config)
    log, start = Log(), (digest(trainer.actor), digest(trainer.critic))
    trainer.train(prompts, 1, log)
    after_one = digest(trainer.actor), digest(trainer.critic)
    trainer.train(prompts, 2, log)
    return start, after_one, digest(trainer.actor), [m["skipped/steps"] for m in log.metrics]


@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_a_nan_score_on_one_rank_skips_the_steps_on_all(run_ranks, ppo_config, tmp_path, kind):
    config = ppo_config(reward__function=AT + "nan_on_rank_one", **tiny.sharding(kind, tmp_path))
    results = run_ranks(poisoned_then_healthy, config)
    assert results[0] == results[1]
    start, after_one, after_two, skipped = results[0]
    assert after_one == start, "a skipped iteration changes neither actor nor critic"
    assert skipped == [config.steps_per_iteration] * 2, "the second iteration is healthy"
    assert after_two != after_one[0]


def test_a_nan_score_is_not_in_the_moments_of_later_iterations(run_ranks, ppo_config):
    config = ppo_config(reward__function=AT + "nan_on_rank_one", reward__running_normalisation=True)
    _, _, _, skipped = run_ranks(poisoned_then_healthy, config)[0]
    assert skipped == [config.steps_per_iteration] * 2, "the second iteration is healthy"


def poisoned_minibatch(config):
    """A healthy experience with one advantage set to inf on every rank, then the healthy one."""
    trainer, prompts = build(config)
    experience = trainer.generate_experience(next(iter(prompts)))
    bad = experience.advantages.clone()
    bad[3] = math.inf
    broken = Experience(**{**vars(experience), "advantages": bad})
    before = digest(trainer.actor)
    losses = trainer.train_rlhf(broken)
    return losses, before == digest(trainer.actor), trainer.train_rlhf(experience)


def test_train_rlhf_says_what_it_skipped(run_ranks, ppo_config):
    (losses, unchanged, healthy), other = run_ranks(poisoned_minibatch, ppo_config(zero_stage=2))
    assert all(math.isnan(loss) for loss in losses)
    assert unchanged
    assert all(math.isfinite(loss) for loss in healthy)
    assert healthy == other[2]


def test_many_skips_in_a_row_stop_the_run(run_ranks, ppo_config):
    config = ppo_config(reward__function=AT + "always_nan", max_skipped_steps=5)
    with pytest.raises(ranks.RankFailed, match=r"(?s)rank 0.*not finite.*5 in a row, the run stops.*rank 1"):
        run_ranks(train, config)


@pytest.mark.parametrize(
    ("function", "said"),
    [("raises_on_rank_one", "no such gold answer"), ("one_too_few_on_rank_one", "scores for 4 responses")],
)
def test_a_score_function_that_fails_on_one_rank_is_one_error_on_all(run_ranks, ppo_config, function, said):
    config = ppo_config(reward__function=AT + function)
    for message in run_ranks(said_by_failing_run, config, timeout_s=60):
        assert said in message


@pytest.mark.parametrize("kind", [0, "strict"])
@pytest.mark.parametrize("prompts", [7, 1])
def test_uneven_shares(run_ranks, ppo_config, tmp_path, kind, prompts):
    """7 prompts on 2 ranks; and fewer prompts than ranks. The same numbers as on one rank."""
    config = ppo_config(prompts=tiny.PROMPTS[:prompts], num_iterations=2, **tiny.sharding(kind, tmp_path))
    two, one = run_ranks(train, config), run_ranks(train, config, world_size=1)
    assert two[0]["metrics"] == two[1]["metrics"]
    for ours, theirs in zip(two[0]["metrics"], one[0]["metrics"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def short_on_rank_one(config, length, everywhere):
    """Two iterations in which the responses of rank 1, or of all ranks, are cut to `length` tokens."""
    trainer, prompts = build(config)
    speak = trainer.sample

    def sample(batch):
        responses = speak(batch)
        short = Responses(*([row[:length] for row in rows] for rows in responses))
        return short if everywhere or comm.rank() == 1 else responses

    trainer.sample = sample
    log, start = Log(), digest(trainer.actor)
    trainer.train(prompts, 2, log)
    return start != digest(trainer.actor), log.metrics


@pytest.mark.parametrize("kind", [2, "strict"])
@pytest.mark.parametrize("length", [0, 1])
def test_empty_and_short_responses_of_one_rank_join_every_collective(run_ranks, ppo_config, tmp_path, kind, length):
    config = ppo_config(**tiny.sharding(kind, tmp_path), rollout__min_response_tokens=2)
    (trained, metrics), (_, others) = run_ranks(short_on_rank_one, config, length, False, timeout_s=60)
    assert trained
    assert all(m["response/length_mean"] >= (2 + length) / 2 for m in metrics)
    assert metrics == others
    assert all(torch.tensor(list(m.values())).isfinite().all() for m in metrics)


def test_no_response_at_all_skips_the_iteration(run_ranks, ppo_config):
    (trained, metrics), _ = run_ranks(short_on_rank_one, ppo_config(zero_stage=2), 0, True, timeout_s=60)
    assert not trained
    assert metrics[-1]["skipped/steps"] == 8


def out_of_memory_in(config, method):
    """What is said where `method` of the trainer finds no memory."""
    trainer, prompts = build(config)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    setattr(trainer, method, full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train(prompts, 1, Log())
    return str(error.value)


@pytest.mark.parametrize(("method", "phase"), [("sample", "generate"), ("shaped", "score"), ("train_rlhf", "train")])
def test_out_of_memory_names_the_phase_and_settings_that_exist(run_ranks, ppo_config, method, phase):
    config = ppo_config()
    for said in run_ranks(out_of_memory_in, config, method):
        assert re.fullmatch(rf"Out of memory in phase {phase}: lower .*\. Tried to allocate 2\.00 GiB\.", said)
        settings = re.findall(r"--(\w+(?:\.\w+)?)", said)
        assert settings
        for setting in settings:
            operator.attrgetter(setting)(config)  # raises where there is none
