"""initialize.py: heads that are read and not called, where ZeRO-3 keeps small weights whole now and then."""

from functools import partial

import engines
import pytest
import tiny
import torch
from engines import policy_loss, value_loss

from engine.distributed.gather import gathered_for_scoring, is_sharded
from engine.models.shared_trunk import load_shared_trunk


def trunk_loss(module, batch, count):
    said = module(batch.input_ids, batch.positions, batch.targets, **engines.TEMPERATURE)
    return ((said.values - 1).square() - said.logprobs).sum() / count


def trunk():
    form = dict(r=4, alpha=16.0, dropout=0.0, target_modules=None)
    given = dict(dtype=torch.float32, adapter=form, reward_adapter=None, with_value_head=True, seed=0)
    return partial(load_shared_trunk, tiny.LLAMA, **given)


ROLES = {
    "actor": (lambda path: engines.actor(tiny.LLAMA, path), policy_loss),
    "critic": (lambda path: engines.critic(tiny.LLAMA, path), value_loss),
    "trunk": (lambda path: engines.trained(trunk(), path), trunk_loss),
}


def trained_as_after_a_checkpoint(role, kind, strict_z3):
    """Losses of steps with small weights whole at the first, and shards from the second on, as where a run goes on
    in the middle of an iteration, and then scores.
    """
    build, loss_of = ROLES[role]
    engine = build(engines.ds_file(kind, strict_z3))
    lasting = engine.optimizer.persistent_parameters if kind == 3 else []
    if lasting:
        lasting[0].all_gather(lasting)
        assert not any(is_sharded(p) for head in engine.module.heads_it_reads for p in head.parameters())
    losses = []
    for seed in range(3):
        losses.append(engines.backward(engine, loss_of, engines.rows(seed=seed)))
        assert engines.step_together([engine], healthy=True) is not None
        with gathered_for_scoring(engine):
            pass
        assert kind == 0 or all(is_sharded(parameter) for parameter in engine.module.parameters())
    return losses


@pytest.mark.parametrize("role", ROLES)
def test_a_head_that_was_whole_at_first_is_gathered_later(run_ranks, strict_z3, role):
    wanted = run_ranks(trained_as_after_a_checkpoint, role, 0, strict_z3)
    for kind in (3, "strict"):
        for found, exact in zip(run_ranks(trained_as_after_a_checkpoint, role, kind, strict_z3), wanted, strict=True):
            assert found == pytest.approx(exact, abs=1e-5)
