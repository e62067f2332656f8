"""Steps are taken by all ranks and engines or by none, and do not depend on how a batch is cut."""

import math

import engines
import pytest
import tiny
import torch
from deepspeed.utils import safe_get_full_grad

from engine.distributed import comm
from engine.distributed.optimization import step_together

KINDS = (0, 1, 2, "strict", "2_offload", "3_offload")
SICK = ("nan gradient", "inf gradient", "nan loss")


def pair(kind, strict_z3):
    path = engines.ds_file(kind, strict_z3)
    return engines.actor(tiny.LLAMA, path), engines.critic(tiny.score_head(tiny.LLAMA), path)


def step(actor, critic, seed, sickness=None):
    """One step of both; a sick one is so in the critic, on rank 1 only."""
    here = comm.rank() == 1
    factor = {"nan gradient": math.nan, "inf gradient": math.inf}.get(sickness, 1.0) if here else 1.0
    sequences = engines.rows(seed=seed)
    engines.backward(actor, engines.policy_loss, sequences)
    engines.backward(critic, engines.value_loss, sequences, factor=factor)
    return step_together([actor, critic], healthy=not (here and sickness == "nan loss"))


def digests(*both):
    return [engines.digest(engine) for engine in both]


def with_and_without_bad_steps(kind, strict_z3):
    actor, critic = pair(kind, strict_z3)
    norms = [step(actor, critic, seed=0)]
    for sickness in SICK:
        before = digests(actor, critic)
        assert step(actor, critic, seed=1, sickness=sickness) is None, f"{sickness} was stepped on"
        assert digests(actor, critic) == before, f"{sickness} changed weights"
    norms.append(step(actor, critic, seed=2))
    rates = actor.get_lr(), critic.get_lr()
    afterwards = digests(actor, critic)

    actor, critic = pair(kind, strict_z3)
    healthy_norms = [step(actor, critic, seed=0), step(actor, critic, seed=2)]
    return (norms, rates, afterwards), (healthy_norms, (actor.get_lr(), critic.get_lr()), digests(actor, critic))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_gradient_on_one_rank_leaves_no_trace(run_ranks, strict_z3, kind):
    results = run_ranks(with_and_without_bad_steps, kind, strict_z3)
    assert results[0] == results[1], "ranks hold the same"
    with_bad_steps, without = results[0]
    assert with_bad_steps == without
    norms = without[0]
    assert all(math.isfinite(norm) and norm > 0 for pair_of_norms in norms for norm in pair_of_norms)


def gradients(kind, strict_z3, micro_batch_size):
    """Whole gradients after the backward passes of one batch, and the norm that the step reports."""
    engine = engines.actor(tiny.GPT2, engines.ds_file(kind, strict_z3))
    engines.backward(engine, engines.policy_loss, engines.rows(), micro_batch_size=micro_batch_size)
    whole = {
        name: safe_get_full_grad(parameter).float().cpu().clone()
        for name, parameter in engine.module.named_parameters()
    }
    return whole, step_together([engine], healthy=True)


def gradients_each(kind, strict_z3):
    return {size: gradients(kind, strict_z3, size) for size in (1, 4)}


@pytest.fixture(scope="module")
def expected():
    """The same gradients in one process: no ranks, no micro-batches, no DeepSpeed."""
    model = engines.language_builder(tiny.GPT2)()
    model.eval()
    sequences = engines.rows()
    batch = sequences.padded(torch.arange(len(sequences)), torch.device("cpu"))
    engines.policy_loss(model, batch, sequences.num_response_tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", [0, 1, 2, "strict"])
def test_gradients_do_not_depend_on_ranks_and_micro_batches(run_ranks, strict_z3, kind, expected):
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in expected.values()))
    for rank in run_ranks(gradients_each, kind, strict_z3):
        for whole, norms in rank.values():
            assert whole.keys() == expected.keys()
            for name, gradient in whole.items():
                torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)
            assert norms == pytest.approx([norm], rel=1e-5)


def clipped_step(kind, strict_z3):
    """How far one step of plain size and one with a tiny norm limit move; both report the norm before clipping."""
    said = []
    for limit in (0.0, 1e-9):
        engine = engines.trained(
            engines.language_builder(tiny.LLAMA), engines.ds_file(kind, strict_z3), max_grad_norm=limit
        )
        before = engines.weights(engine)
        engines.backward(engine, engines.policy_loss, engines.rows())
        (norm,) = step_together([engine], healthy=True)
        after = engines.weights(engine)
        # In multiples of the learning rate. AdamW's first step is lr * g / (|g| + 1e-8): 1 where g is not tiny.
        said.append((norm, max((after[n] - before[n]).abs().max().item() for n in before) / 1e-3))
    return said


@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_gradients_are_clipped_and_norms_are_those_before(run_ranks, strict_z3, kind):
    (norm, moved), (same_norm, moved_clipped) = run_ranks(clipped_step, kind, strict_z3)[0]
    assert norm == pytest.approx(same_norm, rel=1e-6)
    assert moved > 0.9
    assert moved_clipped < 0.2
