"""policy_objective.py by hand: what each setting adds to a micro-batch's part of the loss."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from engine.data.sequences import Sequences
from engine.models.language_model import TokenLogprobs
from engine.rollout.experience import PER_TOKEN, Experience
from engine.trainers.policy_objective import PolicyObjective

# Two responses, of one token and of three; the micro-batch is the second, the first is another rank's.
LENGTHS, MINE = [1, 3], torch.tensor([1])
SURROGATE = 1.0 + 2.0 + 4.0  # its advantages; the ratios are 1
OLD = [-1.0, -1.0, -1.0, -1.0]
REF = [-9.0, -1.5, -1.0, -0.5]  # log-ratios to the ref: 0.5, 0, -0.5
DRAWN_WITH = [-9.0, -1.0 + math.log(2), -1.0, -1.0 - math.log(3)]  # ratios to what was drawn with: 1/2, 1, 3
K2 = (0.25 + 0.0 + 0.25) / 2
K3 = (math.exp(-0.5) - 1 + 0.5) + 0.0 + (math.exp(0.5) - 1 - 0.5)
ENTROPIES = 1.0 + 2.0 + 3.0


def loss(folder, *, new=(-1.0, -1.0, -1.0), hidden=None, actor=None, ref=None, **settings) -> torch.Tensor:
    """With kl_coef 0.5 and penalty_coef 2 of this iteration, whatever the config began with."""
    sequences = Sequences.of([[5]] * 2, [[7] * length for length in LENGTHS])
    flat = {name: torch.full((4,), math.nan) for name in PER_TOKEN}  # nothing else is looked at
    named = dict(logprobs=OLD, ref_logprobs=REF, behaviour_logprobs=DRAWN_WITH, advantages=[9.0, 1.0, 2.0, 4.0])
    flat |= {name: torch.tensor(numbers) for name, numbers in named.items()}
    experience = Experience(
        sequences=sequences, scores=torch.zeros(2), **flat, kl_coef=0.5, left_out=torch.zeros(2, dtype=torch.bool)
    )
    config = tiny.ppo_config(folder, kl_coef=7.0, penalty_coef=7.0, rollout__max_response_tokens=4, **settings)
    objective = PolicyObjective(config, experience, kl_coef=0.5, penalty_coef=2.0, ref=ref)
    said = TokenLogprobs(torch.tensor(new), hidden=hidden, entropy=torch.tensor([1.0, 2.0, 3.0]))
    return objective.loss(actor, said, sequences.padded(MINE, torch.device("cpu")))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, -SURROGATE / 4),  # four tokens in all, on whatever rank they are
        (dict(kl_placement="loss", kl_estimator="k2"), -SURROGATE / 4 + 0.5 * K2 / 4),
        (dict(kl_placement="loss", kl_estimator="k3"), -SURROGATE / 4 + 0.5 * K3 / 4),
        (dict(kl_estimator="k3"), -SURROGATE / 4),  # the penalty is in the rewards
        (dict(entropy_coef=0.25), -SURROGATE / 4 - 0.25 * ENTROPIES / 4),
        (dict(policy_loss="penalty"), -SURROGATE / 4),  # no KL yet
    ],
)
def test_each_term(tmp_path, settings, wanted):
    assert loss(tmp_path, **settings).item() == pytest.approx(wanted)


@pytest.mark.parametrize(("mean", "weight"), [("responses", 1 / (2 * 3)), ("constant", 1 / (2 * 4))])
def test_every_term_has_the_mean_that_is_asked_for(tmp_path, mean, weight):
    """The response's share of two; or a token's of two responses of four tokens."""
    terms = dict(kl_placement="loss", kl_estimator="k2", entropy_coef=0.25)
    wanted = weight * (-SURROGATE + 0.5 * K2 - 0.25 * ENTROPIES)
    assert loss(tmp_path, loss_mean=mean, **terms).item() == pytest.approx(wanted)


def test_the_correction_for_the_policy_that_drew_is_of_the_surrogate_alone(tmp_path):
    corrected = 0.5 * 1.0 + 1.0 * 2.0 + 2.0 * 4.0  # 3 is cut off at 2
    terms = dict(kl_placement="loss", kl_estimator="k2", entropy_coef=0.25)
    wanted = (-corrected + 0.5 * K2 - 0.25 * ENTROPIES) / 4
    assert loss(tmp_path, importance_cap=2.0, **terms).item() == pytest.approx(wanted)
    given = dict(importance_cap=2.0, loss_mean="responses")
    assert loss(tmp_path, **given).item() == pytest.approx(-corrected / (2 * 3))


def test_the_clip_and_the_penalty_hold_a_ratio_back(tmp_path):
    """The second token's ratio is e^0.3, its advantage 2."""
    new, ratio = (-1.0, -0.7, -1.0), math.exp(0.3)
    assert loss(tmp_path, new=new).item() == pytest.approx(-(1 + 2 * 1.2 + 4) / 4)
    penalised = -(1 + 2 * ratio + 4) + 2.0 * (ratio - 1 - 0.3)
    assert loss(tmp_path, new=new, policy_loss="penalty").item() == pytest.approx(penalised / 4)


class Model(torch.nn.Module):
    """An actor or a ref that says the same hidden states of any micro-batch."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden, self.head = hidden, torch.nn.Linear(4, 6)
        self.module = SimpleNamespace(head=self.head)

    def forward(self, *batch, **given):
        return TokenLogprobs(None, self.hidden, None)


@pytest.mark.parametrize(("mean", "weight"), [("tokens", 1 / 4), ("responses", 1 / (2 * 3))])
def test_the_full_kl_is_at_the_temperature_of_the_rollout(tmp_path, mean, weight):
    torch.manual_seed(0)
    actor, ref = Model(3 * torch.randn(3, 4)), Model(3 * torch.randn(3, 4))
    terms = dict(kl_placement="loss", kl_estimator="full", rollout__temperature=0.5, loss_mean=mean)
    found = loss(tmp_path, actor=actor, ref=ref, hidden=actor.hidden, **terms)
    p, q = ((model.head(model.hidden).double() / 0.5).softmax(-1) for model in (actor, ref))
    kl = (p * (p / q).log()).sum().item()
    assert kl > 1 and found.item() == pytest.approx(weight * (-SURROGATE + 0.5 * kl), abs=1e-5)
    found.backward()
    assert actor.head.weight.grad.abs().sum() > 0 and ref.head.weight.grad is None
