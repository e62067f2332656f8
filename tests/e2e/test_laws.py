"""The laws of a PPO run: what may not change its numbers, and what must hold at its start."""

from dataclasses import replace

import pytest
import tiny
import torch
from ranks import RankFailed
from runs import Log, build, digest, train, weights

from engine.models.scalar_head import load_reward_model


def furthest(ours: list[dict], theirs: list[dict]) -> float:
    """The largest difference between two runs' metrics."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True) for name in a | b)


@pytest.fixture(scope="module")
def plain(run_ranks, tmp_path_factory):
    """The run the others are compared with: ZeRO 0, two ranks."""
    return run_ranks(train, tiny.ppo_config(tmp_path_factory.mktemp("plain"), zero_stage=0))


@pytest.mark.parametrize("kind", [1, 2, "strict"])
def test_the_zero_stage_leaves_the_numbers_alone(run_ranks, ppo_config, tmp_path, plain, kind):
    ranks = run_ranks(train, ppo_config(**tiny.sharding(kind, tmp_path)))
    assert furthest(ranks[0]["metrics"], plain[0]["metrics"]) < 1e-5
    assert ranks[0]["metrics"] == ranks[1]["metrics"]


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 2), (1, 4), (2, 1)])
def test_ranks_and_micro_batches_leave_the_numbers_alone(run_ranks, ppo_config, plain, world_size, micro_batch_size):
    config = ppo_config(zero_stage=0, micro_batch_size=micro_batch_size)
    run = run_ranks(train, config, world_size=world_size)[0]
    assert furthest(run["metrics"], plain[0]["metrics"]) < 1e-5


@pytest.fixture(scope="module")
def four_steps(run_ranks, tmp_path_factory):
    """Weights after one iteration. Later AdamW makes much of rounding: where a gradient is as small as its epsilon,
    1e-8, a weight moves by any part of the learning rate.
    """
    config = tiny.ppo_config(tmp_path_factory.mktemp("four_steps"), zero_stage=0, num_iterations=1)
    return run_ranks(train, config, True)[0]["weights"]


@pytest.mark.parametrize("kind", [0, "strict"])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_weights_do_not_depend_on_ranks_and_micro_batches(
    run_ranks, ppo_config, tmp_path, four_steps, world_size, micro_batch_size, kind
):
    sharding = tiny.sharding(kind, tmp_path)
    config = ppo_config(micro_batch_size=micro_batch_size, num_iterations=1, **sharding)
    weights = run_ranks(train, config, True, world_size=world_size)[0]["weights"]
    for role, expected in four_steps.items():
        for name, tensor in weights[role].items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_another_sharded_role_leaves_the_numbers_alone(run_ranks, ppo_config, tmp_path, plain):
    """Each role has its own strategy: the actor under strict ZeRO-3 generating from its shards, the others not."""
    strict = tiny.strict_z3_file(tmp_path)
    config = ppo_config(zero_stage=1, actor__ds_config=strict, reward__ds_config=strict, rollout__weights="sharded")
    assert furthest(run_ranks(train, config)[0]["metrics"], plain[0]["metrics"]) < 1e-5


@pytest.mark.parametrize("kl_estimator", ["k1", "full"])
def test_whole_weights_and_shards_measure_the_same_to_the_last_bit(run_ranks, ppo_config, strict_z3, kl_estimator):
    given = dict(ds_config=strict_z3, kl_estimator=kl_estimator, num_iterations=2)
    whole, shards = (run_ranks(train, ppo_config(rollout__weights=w, **given)) for w in ("gathered", "sharded"))
    assert whole[0]["metrics"] == shards[0]["metrics"]
    assert whole[0]["actor"] == shards[0]["actor"]


def test_one_seed_is_one_run(run_ranks, ppo_config, plain):
    again = run_ranks(train, ppo_config(zero_stage=0))
    assert again[0]["metrics"] == plain[0]["metrics"]
    assert [rank["actor"] for rank in again] == [rank["actor"] for rank in plain]
    other = run_ranks(train, ppo_config(zero_stage=0, seed=1))
    assert other[0]["metrics"] != plain[0]["metrics"]


def test_training_moves_actor_and_critic_and_never_ref_and_reward(plain):
    assert [rank["frozen"] for rank in plain] == [2, 2]
    first, last = plain[0]["metrics"][0], plain[0]["metrics"][-1]
    assert first["kl/ref_mean"] == pytest.approx(0, abs=1e-5)
    assert abs(last["kl/ref_mean"]) > 1e-3
    assert plain[0]["actor"] == plain[1]["actor"]


@pytest.mark.parametrize("model", [tiny.LLAMA, tiny.GPT2, tiny.OPT])
def test_ratio_is_one_while_nothing_is_learnt(run_ranks, ppo_config, model):
    """Log-probs at rollout = log-probs at update: lr 0, temperature 0.7, mixed lengths, every minibatch and epoch."""
    still = dict(actor__learning_rate=0.0, critic__learning_rate=0.0, rollout__temperature=0.7)
    for metrics in run_ranks(train, ppo_config(model=model, zero_stage=2, **still))[0]["metrics"]:
        assert metrics["policy/first_log_ratio_max"] < 1e-4
        assert metrics["policy/ratio_max"] < 1 + 1e-4
        assert abs(metrics["kl/ref_mean"]) < 1e-5
        assert metrics["policy/clip_fraction"] == metrics["value/clip_fraction"] == 0


@pytest.mark.parametrize("kind", [0, "strict"])
@pytest.mark.parametrize("filters", [{}, dict(rollout__top_p=0.8, rollout__min_response_tokens=3)], ids=["", "filters"])
def test_logprobs_from_the_rollout_are_those_of_a_pass_of_their_own(run_ranks, ppo_config, tmp_path, kind, filters):
    """But for rounding: a run takes one number or the other, as `rollout.logprobs` says."""
    given = dict(rollout__temperature=0.7, **filters, **tiny.sharding(kind, tmp_path))
    drawn, recomputed = (
        run_ranks(train, ppo_config(rollout__logprobs=source, **given))[0]["metrics"]
        for source in ("drawn", "recomputed")
    )
    assert 0 < furthest(drawn, recomputed) < 1e-3
    assert all(0 < metrics["policy/first_log_ratio_max"] < 1e-5 for metrics in drawn)


def test_logprobs_from_the_rollout_are_refused_in_16_bits(run_ranks, ppo_config):
    with pytest.raises(RankFailed, match=r"rollout\.logprobs=drawn is for float32: in bfloat16 .* --dtype float32"):
        run_ranks(start, ppo_config(dtype="bfloat16", rollout__logprobs="drawn"))


def start(config):
    trainer, _ = build(config)
    return weights(trainer.critic), [engine.optimizer.__class__.__name__ for engine in (trainer.ref, trainer.reward)]


def test_critic_starts_from_the_reward_model(run_ranks, ppo_config, strict_z3):
    config = ppo_config(ds_config=strict_z3)
    critic, _ = run_ranks(start, config)[0]
    reward = load_reward_model(config.reward.model_name_or_path, dtype=torch.float32, pad_token_id=0)
    for name, tensor in reward.named_parameters():
        assert torch.equal(critic[name], tensor), name


@pytest.mark.parametrize("kind", [0, "strict"])
def test_gradient_checkpointing_leaves_the_numbers_alone(run_ranks, ppo_config, tmp_path, plain, kind):
    on = dict(actor__gradient_checkpointing=True, critic__gradient_checkpointing=True)
    config = ppo_config(**tiny.sharding(kind, tmp_path), **on)
    run = run_ranks(train, config)[0]
    assert furthest(run["metrics"], plain[0]["metrics"]) < 1e-5
    assert [s["response"] for s in run["samples"]] == [s["response"] for s in plain[0]["samples"]]


def test_every_kl_estimator_and_value_label_runs(run_ranks, ppo_config, plain):
    full = run_ranks(train, ppo_config(kl_estimator="full", value_label="monte_carlo", kl_controller="ziegler"))[0]
    cheap = run_ranks(train, ppo_config(kl_estimator="k3", value_label="temporal_difference"))[0]
    for run in (full, cheap):
        assert all(m["kl/ref_mean"] >= -1e-6 for m in run["metrics"]), "full and k3 are never negative"
        assert run["metrics"][-1]["kl/ref_mean"] > 0
    assert full["metrics"][-1]["kl/coef"] != full["metrics"][0]["kl/coef"]


def learning(ppo_config, kl_coef: float, **sharding):
    """A run that learns a toy score from 0.05 to 0.8 in 12 iterations, without a penalty."""
    return ppo_config(
        reward__function="tiny:share_of_small_letters",
        actor__learning_rate=1e-2,
        critic__learning_rate=1e-2,
        rollout__samples_per_prompt=8,
        rollout__max_response_tokens=8,
        num_iterations=12,
        rollout_batch_size=64,
        minibatch_size=32,
        micro_batch_size=16,
        kl_estimator="k3",
        kl_coef=kl_coef,
        **sharding,
    )


@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_the_score_rises(run_ranks, ppo_config, tmp_path, kind):
    metrics = run_ranks(train, learning(ppo_config, 0.001, **tiny.sharding(kind, tmp_path)))[0]["metrics"]
    scores = [m["score/mean"] for m in metrics]
    assert scores[0] < 0.15 < 0.4 < scores[-1], scores
    assert all(torch.tensor(list(m.values())).isfinite().all() for m in metrics)
    assert metrics[-1]["kl/ref_mean"] < 8 * 10, "8 tokens, at most 10 nats each"


def test_the_kl_penalty_holds_the_actor_back(run_ranks, ppo_config):
    kl = {
        coef: run_ranks(train, learning(ppo_config, coef, zero_stage=0))[0]["metrics"][-1]["kl/ref_mean"]
        for coef in (0.0, 0.3)
    }
    assert kl[0.0] > 1.5 * kl[0.3] > 0, kl


def own_loop(config):
    """Three epochs of a loop of the caller's own, without a step: each one's tokens, in order of size since epochs are
    shuffled, and the coefficient its rewards were shaped with.
    """
    trainer, prompts = build(config)
    rollouts = [trainer.generate_experience(batch) for _ in range(3) for batch in prompts]
    return [sorted(rollout.sequences.tokens.tolist()) for rollout in rollouts], [
        rollout.kl_coef for rollout in rollouts
    ]


def test_a_loop_of_ones_own_draws_anew_in_every_epoch_and_moves_the_kl_coefficient(run_ranks, ppo_config):
    (tokens, coefs), _ = run_ranks(own_loop, ppo_config(kl_controller="schulman"))
    assert len({tuple(rollout) for rollout in tokens}) == 3
    assert coefs == pytest.approx([0.05, 0.025, 0.0125]), "a KL of 0 is below any target"


def two_of_a_kind(config):
    trainer, prompts = build(config)
    batch = next(iter(prompts))
    return batch.texts, trainer.sample(batch).tokens, digest(trainer.actor)


def test_ranks_with_the_same_prompt_draw_different_responses(run_ranks, ppo_config):
    config = ppo_config(prompts=["the same"] * 8, reward__function="tiny:longest_wins")
    (texts, ours, _), (other_texts, theirs, _) = run_ranks(two_of_a_kind, config)
    assert texts == other_texts
    assert len({tuple(response) for response in ours + theirs}) == 8


def test_the_schedule_ends_with_the_run(run_ranks, ppo_config):
    """Two iterations of four steps, two to the peak and six down to zero, which would be the ninth step's: shown are
    the fourth's and the eighth's."""
    config = ppo_config(num_iterations=2, actor__lr_scheduler="linear", actor__warmup_steps=2)
    assert config.steps_per_iteration == 4
    for result in run_ranks(train, config):
        assert [line["lr/actor"] for line in result["metrics"]] == pytest.approx([1e-3 * 5 / 6, 1e-3 * 1 / 6])


def rolled_out(config):
    trainer, prompts = build(config)
    return trainer.generate_experience(next(iter(prompts))).sequences.tokens.max().item()


def test_no_token_is_drawn_that_the_tokenizer_does_not_have(run_ranks, ppo_config):
    """Embeddings are padded to round sizes, each model's to its own: the others have no row for such an id."""
    config = ppo_config(
        actor__model_name_or_path=f"{tiny.LLAMA}&vocab_size=700", reward__model_name_or_path=tiny.score_head(tiny.LLAMA)
    )
    assert all(2 <= largest < 258 for largest in run_ranks(rolled_out, config))


def warned(config, nats):
    """Whether a rollout whose log-probabilities are off by so many nats is told from the actor's own."""
    trainer, prompts = build(config)
    experience = trainer.generate_experience(next(iter(prompts)))
    trainer.in_flight, log = replace(experience, logprobs=experience.logprobs + nats), Log()
    trainer.train(prompts, 1, log)
    return [name for _, name, _ in log.warnings if name == "another policy"]


def test_a_rollout_of_another_policy_is_warned_of(run_ranks, ppo_config):
    assert run_ranks(warned, ppo_config(), 0.0) == [[], []]
    assert run_ranks(warned, ppo_config(), 0.01) == [["another policy"]] * 2
