"""A run that is gone on with is the run that was never interrupted."""

import pytest
import resuming
import tiny
import torch

from engine.config import PretrainingConfig, SteadyLoRAConfig

WHOLE = ("moments", "weights", "averages", "schedule")
# All that changes from iteration to iteration: an adaptive coefficient, running moments of scores, an average, a
# second data set, several epochs that end early.
RICH = dict(
    ema_decay=0.9,
    kl_controller="ziegler",
    kl_horizon=50.0,
    reward__running_normalisation=True,
    policy_loss="penalty",
    target_kl=0.5,
    tracking__samples_per_iteration=8,
    checkpoint__every=1,
    checkpoint__keep=10,
    num_iterations=5,
)


def of_ppo(folder, kind, **given):
    demonstrations = tiny.stage_config(folder, "sft").data
    pretraining = PretrainingConfig(data=demonstrations, coef=0.5)
    prompts = [f"{word} " * (1 + number % 3) for number, word in enumerate("abcdefghijk")]  # 11: no whole iterations
    given = RICH | tiny.sharding(kind, folder) | given
    return tiny.ppo_config(folder, prompts=prompts, pretraining=pretraining, **given)


def check_same_end(whole, rest, done, first=None):
    """`rest`, and what `first` had logged before, is `whole`, bit for bit."""
    for ours, theirs in zip(rest, whole, strict=True):
        assert ours["finished"] and ours["began"] == done
        before = theirs["metrics"][: len(theirs["metrics"]) - len(ours["metrics"])]
        if first is not None:
            assert first[0]["metrics"] == before
        assert ours["metrics"] == theirs["metrics"][len(before) :]
        for what in WHOLE:
            assert ours[what] == theirs[what], what
    assert rest[0]["samples"] == [row for row in whole[0]["samples"] if row["iteration"] > done]  # rank 0 writes them


@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_ppo_goes_on_as_if_it_had_never_stopped(run_ranks, tmp_path, kind):
    config = of_ppo(tmp_path, kind)
    whole = run_ranks(resuming.go, config)
    assert whole[0]["checkpoints"] == [f"iteration_{n:06d}" for n in (5, 4, 3, 2, 1)]  # every one is kept
    assert len({line["kl/coef"] for line in whole[0]["metrics"]}) == 5, "nothing moves that could be lost"
    run_ranks(resuming.forget_after, config, 3)
    check_same_end(whole, run_ranks(resuming.go, tiny.changed(config, resume="auto")), 3)


@pytest.mark.parametrize(("kind", "moments"), [(2, (1, 4, 5)), (3, (3,)), ("strict", (3,))])
def test_ppo_goes_on_from_the_middle_of_an_iteration(run_ranks, tmp_path, kind, moments):
    """Asked before each of an iteration's four steps: experience is in flight. And before an iteration: it is not."""
    whole = run_ranks(resuming.go, of_ppo(tmp_path, kind, checkpoint__every=None, num_iterations=3))
    for moment in moments:
        config = of_ppo(
            tmp_path, kind, checkpoint__every=None, num_iterations=3, output_dir=str(tmp_path / f"{moment}")
        )
        first = run_ranks(resuming.go, config, moment)
        assert not first[0]["finished"] and len(first[0]["checkpoints"]) == 1
        rest = run_ranks(resuming.go, tiny.changed(config, resume="auto"))
        check_same_end(whole, rest, len(first[0]["metrics"]), first)


MODES = {
    "lora": dict(actor__lora=SteadyLoRAConfig(r=4), critic__lora=SteadyLoRAConfig(r=2)),
    "trunk": dict(shared_trunk=True, actor__lora=SteadyLoRAConfig(r=4), reward__function="tiny:share_of_small_letters"),
    "drawn": dict(rollout__logprobs="drawn"),
    "grpo": dict(advantage_estimator="grpo", rollout__samples_per_prompt=2),
}


@pytest.mark.parametrize(("mode", "kind"), [("lora", 2), ("drawn", 2), ("trunk", "strict"), ("grpo", "strict")])
def test_every_mode_goes_on_from_the_middle_of_an_iteration(run_ranks, tmp_path, mode, kind):
    given = MODES[mode] | dict(checkpoint__every=None, num_iterations=3)
    whole = run_ranks(resuming.go, of_ppo(tmp_path, kind, **given))
    config = of_ppo(tmp_path, kind, **given, output_dir=str(tmp_path / "stopped"))
    first = run_ranks(resuming.go, config, 3)
    assert not first[0]["finished"]
    rest = run_ranks(resuming.go, tiny.changed(config, resume="auto"))
    check_same_end(whole, rest, len(first[0]["metrics"]), first)


@pytest.mark.parametrize(
    ("stage", "kind"), [("sft", 0), ("sft", 2), ("sft", "strict"), ("reward", 2), ("dpo", 2), ("dpo", "strict")]
)
def test_a_supervised_stage_goes_on_as_if_it_had_never_stopped(run_ranks, tmp_path, stage, kind):
    given = dict(num_iterations=5, data__eval_fraction=0.3, eval_every=2, checkpoint__every=1, checkpoint__keep=9)
    # Dropout in an adapter: the one random number that no key is known for.
    lora = dict(lora__r=4, lora__dropout=0.3) if kind == 2 else {}
    config = tiny.stage_config(tmp_path, stage, **given, **lora, **tiny.sharding(kind, tmp_path))
    whole = run_ranks(resuming.go, config)
    run_ranks(resuming.forget_after, config, 2)
    rest = run_ranks(resuming.go, tiny.changed(config, resume="auto"))
    check_same_end(whole, rest, 2)
    stopped = tiny.changed(config, output_dir=str(tmp_path / "stopped"), checkpoint__every=None)
    first = run_ranks(resuming.go, stopped, 4)
    assert first[0]["checkpoints"] == ["iteration_000003"]
    check_same_end(whole, run_ranks(resuming.go, tiny.changed(stopped, resume="auto")), 3, first)


@pytest.mark.parametrize(
    ("kind", "other", "ranks", "then"),
    [(2, 2, 2, 1), ("strict", "strict", 1, 2), (2, "strict", 1, 2), ("strict", 0, 2, 1)],
)
def test_another_number_of_ranks_and_another_stage_go_on_with_the_same_numbers(
    run_ranks, tmp_path, kind, other, ranks, then
):
    config = of_ppo(tmp_path, kind)
    whole = run_ranks(resuming.go, config, world_size=ranks)
    run_ranks(resuming.forget_after, config, 2, world_size=ranks)
    unsharded = dict(zero_stage=None, ds_config=None)
    changed = tiny.changed(config, resume="auto", **unsharded | tiny.sharding(other, tmp_path))
    rest = run_ranks(resuming.go, changed, world_size=then)
    assert rest[0]["began"] == 2
    for ours, theirs in zip(rest[0]["metrics"], whole[0]["metrics"][2:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    for role, weights in whole[0]["whole"].items():
        for name, tensor in weights.items():
            torch.testing.assert_close(rest[0]["whole"][role][name], tensor, rtol=0, atol=1e-5)


def test_one_two_and_four_ranks_draw_the_same_responses(run_ranks, tmp_path):
    """And decoding a few at a time changes nothing either."""
    given = dict(micro_batch_size=1, checkpoint__every=None, rollout__samples_per_prompt=2)
    config = of_ppo(tmp_path, 2, **given)
    one = run_ranks(resuming.responses, config, world_size=1)[0]
    few = run_ranks(resuming.responses, tiny.changed(config, rollout__micro_batch_size=3), world_size=2)[0]
    four = run_ranks(resuming.responses, config, world_size=4)[0]
    assert len(one["tokens"]) == 5 and one["tokens"] == few["tokens"] == four["tokens"]
    assert len({str(tokens) for tokens in one["tokens"]}) == 5
    for ours in (few, four):
        for mine, theirs in zip(ours["metrics"], one["metrics"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
