"""ppo_trainer.py, what it does between the models: scores shaped, coefficients moved on, noise, what `step` is given.

Its methods are called on a stand-in that has what they look at.
"""

import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch

from engine.algorithms.rewards import Moments
from engine.data.sequences import Sequences
from engine.models.random_init import byte_tokenizer
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.rollout.generation import Responses
from engine.rollout.scoring import Scored
from engine.trainers.ppo_metrics import MEANS_OF_STEPS
from engine.trainers.ppo_trainer import DeepSpeedPPOTrainer, Progress

EOS = 1


def step(tokens, approx_kl):
    """An optimizer step's metrics."""
    rest = dict.fromkeys((*MEANS_OF_STEPS, "policy/ratio_max", "policy/log_ratio_max", "lr/actor", "lr/critic"), 0.0)
    return rest | {"tokens": tokens, "policy/approx_kl": approx_kl}


@pytest.mark.parametrize(
    ("kls", "wanted"),
    [
        ([0.016], 2.0),  # more than 1.5 times the target of 0.01
        ([0.014], 1.0),
        ([0.007], 1.0),
        ([0.006], 0.5),  # less than the target / 1.5
        ([0.016, 0.0], 1.0),  # 3 tokens and 1: 0.012 on average
        ([math.nan], 1.0),
        ([], 1.0),  # every step was skipped
    ],
)
def test_the_penalty_is_doubled_or_halved_to_keep_the_kl_near_its_target(tmp_path, kls, wanted):
    steps = [step(tokens, kl) for tokens, kl in zip((3, 1), kls, strict=False)]
    for policy_loss, expected in (("penalty", wanted), ("clip", 1.0)):
        trainer = SimpleNamespace(
            config=tiny.ppo_config(tmp_path, policy_loss=policy_loss, penalty_target=0.01),
            progress=Progress(penalty_coef=1.0),
            steps=steps,
            update=SimpleNamespace(left_out=()),
        )
        assert DeepSpeedPPOTrainer.next_penalty_coef(trainer) == expected


class Rollout(SimpleNamespace):
    """What the KL controller looks at: four responses that were scored, and one that was not."""

    num_scored = 4

    def __len__(self):
        return 5


@pytest.mark.parametrize(
    ("controller", "kl_per_response", "wanted"),
    [
        ("fixed", 99.0, 0.5),
        ("schulman", 10.0, 1.0),  # more than 1.5 times the target of 6
        ("schulman", 8.0, 0.5),
        ("schulman", 3.0, 0.25),  # less than the target / 1.5
        ("ziegler", 12.0, 0.5 * (1 + 0.2 * 4 / 10)),  # 4 responses of a horizon of 10
        ("ziegler", 6.6, 0.5 * (1 + 0.1 * 4 / 10)),
        ("ziegler", 0.0, 0.5 * (1 - 0.2 * 4 / 10)),
    ],
)
def test_the_kl_coefficient_follows_the_kl_per_response(tmp_path, controller, kl_per_response, wanted):
    trainer = SimpleNamespace(config=tiny.ppo_config(tmp_path, kl_controller=controller, kl_horizon=10.0))
    kl = torch.tensor([3.0, 1.0, 0.0]) * kl_per_response  # of three tokens of four responses
    rollout = Rollout(kl=kl, kl_coef=0.5, is_finite=True)
    assert DeepSpeedPPOTrainer.next_kl_coef(trainer, rollout) == pytest.approx(wanted)
    rollout.is_finite = False
    assert DeepSpeedPPOTrainer.next_kl_coef(trainer, rollout) == 0.5


def shaped(trainer, scores, failed=(False, False)):
    """Of two responses, the second of which was cut off."""
    sequences = Sequences.of([[5], [5]], [[7, EOS], [7, 7]])
    return DeepSpeedPPOTrainer.shaped(trainer, Scored(torch.tensor(scores), torch.tensor(failed)), sequences).tolist()


def test_scores_are_normalised_by_all_so_far_then_clipped_then_penalised(tmp_path):
    settings = dict(reward__running_normalisation=True, reward__clip=1.5, reward__missing_eos_penalty=0.25)
    config = tiny.ppo_config(tmp_path, **settings)
    trainer = SimpleNamespace(config=config, progress=Progress(), eos_token_ids=[EOS])
    assert shaped(trainer, [1.0, 3.0]) == pytest.approx([-1.0, 1.0 - 0.25])  # mean 2, deviation 1
    # 1, 3 and 5: mean 3, deviation sqrt(8 / 3). The last score is nobody's: it is shaped and not counted.
    std = math.sqrt(8 / 3)
    assert shaped(trainer, [5.0, 7.0], (False, True)) == pytest.approx([2 / std, 1.5 - 0.25])
    # One NaN skips its own iteration, and no later one.
    broken, healthy = shaped(trainer, [math.nan, 3.0])
    assert math.isnan(broken) and healthy == pytest.approx(-0.25)  # their mean is 3
    trainer.progress = Progress(scores=Moments().with_more(torch.tensor([1.0, 3.0, 5.0])))
    # 1, 3, 5, -9, 0: mean 0, deviation sqrt(116 / 5)
    assert shaped(trainer, [-9.0, 0.0]) == pytest.approx([-1.5, -0.25])


def test_every_epoch_of_every_iteration_goes_through_the_responses_in_an_order_of_its_own(tmp_path):
    """And in the same one when the run is started again."""

    def orders(seed):
        seen = []
        rollout = SimpleNamespace(minibatches=lambda size, rng: [tuple(torch.randperm(64, generator=rng).tolist())])
        trainer = SimpleNamespace(
            config=tiny.ppo_config(tmp_path, seed=seed, ppo_epochs=2),
            progress=Progress(),
            train_rlhf=seen.append,
            next_penalty_coef=lambda: 0.0,
            _timed=lambda phase: nullcontext(),
            _far_enough=lambda: False,
            _warn_of_another_policy=lambda: None,
        )
        for trainer.progress.iteration in (1, 2, 3):
            DeepSpeedPPOTrainer.train_on(trainer, rollout)
        return seen

    assert len(set(orders(0) + orders(1))) == 12 and orders(0) == orders(0)


# For those who hold the loop


def test_a_loop_of_ones_own_draws_with_another_seeds_and_another_iterations_noise(tmp_path):
    drawn = []

    def responses(prompts, keys):
        drawn.extend(keys)
        return Responses([[EOS]] * len(prompts), [[0.0]] * len(prompts))

    for seed in (0, 1):
        trainer = SimpleNamespace(
            config=tiny.ppo_config(tmp_path, seed=seed),
            progress=Progress(),
            sampler=SimpleNamespace(responses=responses),
            rlhf_engine=SimpleNamespace(given=lambda *rows, caller: Sequences.of(*rows)),
            drawn=0,
            _timed=lambda phase: nullcontext(),
        )
        for trainer.progress.iteration in range(3):
            trainer.drawn = 0
            for _ in range(2):  # asked twice it draws twice
                assert DeepSpeedPPOTrainer.generate(trainer, [[5], [5]]) == [[EOS]] * 2
    assert len(set(drawn)) == len(drawn) == 24


def given(folder, query, response):
    """Sequences and scores of one row, as `step` takes them: at most 32 + 12 tokens, ids of the byte tokenizer."""
    rlhf_engine = SimpleNamespace(args=tiny.ppo_config(folder), tokenizer=byte_tokenizer())
    rlhf_engine.given = partial(DeepSpeedRLHFEngine.given, rlhf_engine)
    return DeepSpeedPPOTrainer._given(SimpleNamespace(rlhf_engine=rlhf_engine), [query], [response], [1.0])


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
