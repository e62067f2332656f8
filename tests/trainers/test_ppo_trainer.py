"""ppo_trainer.py, what it does between the models: scores shaped, orders and noise drawn.

Its methods are called on a stand-in that has what they look at.
"""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch

from engine.algorithms.rewards import Moments
from engine.data.sequences import Sequences
from engine.distributed import comm
from engine.rollout.generation import Responses
from engine.rollout.scoring import Scored
from engine.trainers.ppo_trainer import DeepSpeedPPOTrainer
from engine.trainers.progress import Progress

EOS = 1


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
            actor=SimpleNamespace(module=torch.nn.Linear(1, 1)),
            steps=[],
            _timed=lambda phase: nullcontext(),
            _far_enough=lambda: False,
        )
        for trainer.progress.iteration in (1, 2, 3):
            DeepSpeedPPOTrainer.train_on(trainer, rollout)
        return seen

    assert len(set(orders(0) + orders(1))) == 12 and orders(0) == orders(0)


# For those who hold the loop


def test_a_loop_of_ones_own_draws_with_another_seeds_and_another_iterations_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "gathered_objects", lambda value: [value])  # one rank, without a process group
    drawn = []

    def responses(prompts, keys):
        drawn.extend(keys)
        return Responses([[EOS]] * len(prompts), *([[0.0]] * len(prompts) for _ in Responses._fields[1:]))

    for seed in (0, 1):
        trainer = SimpleNamespace(
            config=tiny.ppo_config(tmp_path, seed=seed),
            progress=Progress(),
            sampler=SimpleNamespace(responses=responses),
            rlhf_engine=SimpleNamespace(given=lambda rows, _, caller: Sequences.of(rows, [[]] * len(rows))),
            drawn=0,
            _timed=lambda phase: nullcontext(),
        )
        for trainer.progress.iteration in range(3):
            trainer.drawn = 0
            for _ in range(2):  # asked twice it draws twice
                assert DeepSpeedPPOTrainer.generate(trainer, [[5], [5]]) == [[EOS]] * 2
    assert len(set(drawn)) == len(drawn) == 24
