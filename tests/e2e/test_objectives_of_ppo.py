"""Estimators without a critic, the KL in the loss, the penalty, the other terms: the laws of PPO hold for each."""

import math

import pytest
import tiny
import torch
import yaml
from runs import Log, build, train, weights
from test_laws import furthest

from engine.config import DemonstrationDataConfig, PPOConfig, PretrainingConfig, as_dict, parse

GROUPS = dict(rollout__samples_per_prompt=4, seed=2)
MODES = {
    "grpo": GROUPS | dict(advantage_estimator="grpo", kl_placement="loss", kl_estimator="k3", loss_mean="responses"),
    "dr_grpo": GROUPS | dict(advantage_estimator="dr_grpo", kl_coef=0.0, loss_mean="constant"),
    "rloo": GROUPS | dict(advantage_estimator="rloo"),
    "reinforce++": dict(advantage_estimator="reinforce_plus_plus"),
    "reinforce++ baseline": GROUPS
    | dict(advantage_estimator="reinforce_plus_plus_baseline", kl_placement="loss", kl_estimator="k2"),
    "full KL in the loss": dict(kl_placement="loss", kl_estimator="full", kl_coef=0.5),
    "penalty": dict(policy_loss="penalty", penalty_target=1e-4),
    "entropy, importance": dict(entropy_coef=0.02, importance_cap=2.0, rollout__top_p=0.7),
}


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return MODES[request.param]


@pytest.fixture(scope="module")
def plain(run_ranks, tmp_path_factory, mode):
    """The run the others are compared with: ZeRO 0, two ranks."""
    return run_ranks(train, tiny.ppo_config(tmp_path_factory.mktemp("plain"), zero_stage=0, **mode))


def test_neither_sharding_nor_ranks_change_the_numbers(run_ranks, ppo_config, tmp_path, plain, mode):
    for world_size, kind, micro_batch_size in ((2, 2, 1), (2, "strict", 2), (1, 0, 4)):
        config = ppo_config(micro_batch_size=micro_batch_size, **mode, **tiny.sharding(kind, tmp_path))
        run = run_ranks(train, config, world_size=world_size)[0]
        assert furthest(run["metrics"], plain[0]["metrics"]) < 1e-5, (world_size, kind)


def test_it_starts_at_the_ref_and_leaves_it(plain, mode):
    first, last = plain[0]["metrics"][0], plain[0]["metrics"][-1]
    assert abs(first["kl/ref_mean"]) < 1e-5 and first["policy/first_log_ratio_max"] < 1e-4
    assert abs(last["kl/ref_mean"]) > 1e-5 and plain[0]["frozen"] == 2
    assert plain[0]["actor"] == plain[1]["actor"]


def test_a_critic_is_built_where_advantages_need_one(plain, mode):
    needs_one = "advantage_estimator" not in mode
    for rank in plain:
        assert ("critic" in rank) == needs_one
        assert ("loss/value" in rank["metrics"][0]) == ("lr/critic" in rank["metrics"][0]) == needs_one


@pytest.mark.parametrize(
    "change",
    [dict(entropy_coef=0.5), dict(importance_cap=1.0), dict(loss_mean="responses"), dict(policy_loss="penalty")],
)
def test_every_term_changes_the_step(run_ranks, ppo_config, change):
    """From the same responses: an entropy bonus, an importance correction, another mean."""
    given = dict(rollout__top_p=0.7, num_iterations=1, zero_stage=0, penalty_coef=50.0)
    with_it, without = (run_ranks(train, ppo_config(**given, **more))[0] for more in (change, {}))
    assert with_it["metrics"][0]["score/mean"] == without["metrics"][0]["score/mean"]
    assert with_it["actor"] != without["actor"]


def test_epochs_end_early_when_the_actor_is_far_enough(run_ranks, ppo_config):
    """Four epochs of two steps, the first of which goes beyond any target: one epoch."""
    given = dict(ppo_epochs=4, num_iterations=1, zero_stage=0)
    far, near = (run_ranks(train, ppo_config(**given, target_kl=target))[0]["steps"] for target in (1e-9, 1e9))
    assert (far, near) == (2, 8)


# The actor's average


def never_a_number(prompts, responses, **columns):
    return [math.nan] * len(responses)


def averaged(config):
    """The actor before and after a run, and its average."""
    trainer, prompts = build(config)
    before = weights(trainer.actor)
    trainer.train(prompts, config.num_iterations, Log())
    average = {name: trainer.rlhf_engine.actor_ema.whole(name.removeprefix("model.")) for name in before}
    return before, weights(trainer.actor), average


@pytest.mark.parametrize("kind", [2, "strict"])
def test_every_step_moves_the_average(run_ranks, ppo_config, tmp_path, kind):
    """One step: half-way. Without a memory: the actor itself, whatever the number of steps."""
    one_step = dict(num_iterations=1, minibatch_size=8, ppo_epochs=1, ema_decay=0.5)
    before, after, average = run_ranks(averaged, ppo_config(**one_step, **tiny.sharding(kind, tmp_path)))[1]
    assert any(not torch.equal(before[name], after[name]) for name in after)
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, (before[name] + after[name]) / 2, rtol=0, atol=1e-6)
    _, after, average = run_ranks(averaged, ppo_config(ema_decay=0.0, **tiny.sharding(kind, tmp_path)))[1]
    assert all(torch.equal(tensor, after[name]) for name, tensor in average.items())


def test_a_skipped_step_leaves_the_average_alone(run_ranks, ppo_config):
    given = dict(num_iterations=1, reward__function="test_objectives_of_ppo:never_a_number", ema_decay=0.5)
    before, after, average = run_ranks(averaged, ppo_config(**given))[0]
    assert all(torch.equal(before[name], after[name]) and torch.equal(before[name], average[name]) for name in after)


# Demonstrations beside the responses


def mixed(folder, coef, **given):
    """A PPO config with a language-model loss on seven demonstrations."""
    rows = tiny.write_rows(folder / "demonstrations.jsonl", tiny.DEMONSTRATIONS)
    data = DemonstrationDataConfig(train=rows, max_prompt_tokens=32, max_length=64)
    return tiny.ppo_config(folder, pretraining=PretrainingConfig(data=data, coef=coef), **given)


def test_demonstrations_are_learned_beside_ppo_whatever_the_ranks(run_ranks, tmp_path):
    plain = run_ranks(train, mixed(tmp_path, 0.5, zero_stage=0))[0]["metrics"]
    assert plain[-1]["loss/pretraining"] < plain[0]["loss/pretraining"] - 0.1
    for world_size, kind, micro_batch_size in ((2, "strict", 1), (1, 2, 4)):
        config = mixed(tmp_path, 0.5, micro_batch_size=micro_batch_size, **tiny.sharding(kind, tmp_path))
        assert furthest(run_ranks(train, config, world_size=world_size)[0]["metrics"], plain) < 1e-5


def test_with_coefficient_0_demonstrations_change_nothing(run_ranks, ppo_config, tmp_path):
    """But for rounding: their gradients are zeros."""
    with_them, without = (
        run_ranks(train, c)[0] for c in (mixed(tmp_path, 0.0, zero_stage=0), ppo_config(zero_stage=0))
    )
    shared = [{name: line[name] for name in line if name != "loss/pretraining"} for line in with_them["metrics"]]
    assert furthest(shared, without["metrics"]) < 1e-6


def test_the_mixture_is_set_from_the_command_line(tmp_path):
    config = mixed(tmp_path, 0.25)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(as_dict(config)))
    assert parse(PPOConfig, ["--config", str(recipe)]) == config
    assert parse(PPOConfig, ["--config", str(recipe), "--pretraining.coef", "0.75"]).pretraining.coef == 0.75
