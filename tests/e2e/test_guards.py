"""What is kept of a step that could not be taken, and what becomes of an actor that runs away."""

import math

import pytest
import ranks
import resuming
import tiny
from runs import Log, build, digest
from test_faults import AT, nan_on_rank_one

from engine.distributed import comm


def poisoned(config, method):
    """One iteration in which something of one row is NaN on rank 1 alone: what is quarantined on each rank."""
    nan_on_rank_one.calls = 0
    trainer, prompts = build(config)
    if method == "critic":
        real = trainer.critic.module.forward

        def forward(*args, **kwargs):
            values = real(*args, **kwargs)
            return values * math.nan if comm.rank() == 1 else values

        trainer.critic.module.forward = forward
    log, start = Log(), (digest(trainer.actor), digest(trainer.critic))
    trainer.train(prompts, 1, log)
    return log.quarantined, start == (digest(trainer.actor), digest(trainer.critic)), log.metrics


@pytest.mark.parametrize("kind", [0, "strict"])
def test_the_responses_with_a_nan_score_are_kept(run_ranks, ppo_config, tmp_path, kind):
    config = ppo_config(reward__function=AT + "nan_on_rank_one", **tiny.sharding(kind, tmp_path))
    first, second = run_ranks(poisoned, config, "score")
    assert str(first[0]) == str(second[0]) and first[1] and second[1]
    rows = first[0]
    assert rows and all(row["not_finite"] == ["scores"] and math.isnan(row["score"]) for row in rows)
    assert {row["iteration"] for row in rows} == {1} and len(rows) < 8, "the others are not to blame"
    assert all(row["prompt"] in tiny.PROMPTS and row["prompt_tokens"] and row["response_tokens"] for row in rows)


def test_the_responses_with_nan_values_are_kept(run_ranks, ppo_config):
    first, second = run_ranks(poisoned, ppo_config(zero_stage=2), "critic")
    assert first[0] == second[0] and first[1] and second[1]
    assert {tuple(row["not_finite"]) for row in first[0]} == {("values",)} and 0 < len(first[0]) < 8


def test_a_loss_that_is_not_finite_leaves_its_minibatch_behind(run_ranks, ppo_config):
    """Nothing measured is wrong: the whole minibatch is suspect."""
    config = ppo_config(entropy_coef=math.inf, ppo_epochs=1)
    rows, unchanged, metrics = run_ranks(poisoned, config, "loss")[0]
    assert unchanged and metrics[0]["skipped/steps"] == 2
    assert len(rows) == 8 and {row["cause"] for row in rows} == {"a loss or a gradient that is not finite"}


# With AdamW's usual epsilon the actor leaves between one checkpoint and the next, and not by and by.
RUNAWAY = dict(actor__learning_rate=0.005, actor__adam_epsilon=1e-8, kl_coef=0.0, num_iterations=8)
RUNAWAY |= dict(checkpoint__every=1, checkpoint__keep=20)


def test_an_actor_that_runs_away_stops_the_run(run_ranks, ppo_config):
    config = ppo_config(**RUNAWAY, kl_guard__max_kl=0.5)
    said = (
        r"(?s)iteration \d: the KL to the ref is .* nats per response, more than kl_guard\.max_kl=0\.5: the run stops"
    )
    with pytest.raises(ranks.RankFailed, match=said):
        run_ranks(resuming.go, config)


@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_or_goes_back_and_on_with_smaller_steps(run_ranks, ppo_config, tmp_path, kind):
    given = RUNAWAY | tiny.sharding(kind, tmp_path)
    config = ppo_config(**given, kl_guard__max_kl=0.5, kl_guard__roll_backs=30, kl_guard__factor=0.1)
    first, second = run_ranks(resuming.go, config)
    assert first["finished"] and first["metrics"] == second["metrics"] and len(first["metrics"]) == 8
    assert first["weights"] == second["weights"]
    assert all(line["kl/ref_mean"] <= 0.5 for line in first["metrics"])
    rates = [line["lr/actor"] for line in first["metrics"]]
    assert rates == sorted(rates, reverse=True) and rates[0] == 0.005 and rates[-1] < 0.003
    warnings = [name for _, name, _ in first["warnings"]]
    assert "rolled back" in warnings
    # What a killed run goes on with are the smaller rates.
    run_ranks(resuming.forget_after, config, 7)
    rest = run_ranks(resuming.go, tiny.changed(config, resume="auto"))[0]
    assert rest["metrics"] == first["metrics"][7:] and rest["weights"] == first["weights"]
