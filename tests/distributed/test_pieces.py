"""pieces.py: what is kept of a trained engine covers it, once, and is the engine again under another stage."""

import engines
import pytest
import tiny
import torch

from engine.distributed import comm
from engine.distributed.initialize import set_learning_rates
from engine.distributed.pieces import MOMENTS, WEIGHT, give_back, my_pieces, steps_taken, tell_the_model

ODD = "random://gpt2?n_embd=33&n_layer=1&n_head=3&n_positions=512"  # norms of 33 numbers: two ranks cannot share them


def whole_of(engine):
    """((name, what) -> the flattened tensor put together from all ranks' pieces, how many numbers that were)."""
    mine = [(p.name, p.what, p.start, p.size, p.tensor.detach().float().cpu().clone()) for p in my_pieces(engine)]
    whole, numbers = {}, 0
    for name, what, start, size, tensor in (piece for each in comm.gathered_objects(mine) for piece in each):
        whole.setdefault((name, what), torch.full((size,), torch.nan))[start : start + len(tensor)] = tensor
        numbers += len(tensor)
    return whole, numbers


def trained(name, ds_config, dtype, steps):
    engine = engines.actor(name, ds_config, dtype=dtype)
    for seed in range(steps):
        engines.train_actor(engine, seed=seed)
    return engine


def moved(name, source, target, dtype, steps=3):
    """An engine's state put into a new one under another stage: are the weights the same, and how far apart are they
    after one more step, with the moments and without?
    """
    first = trained(name, source, dtype, steps)
    kept, numbers = whole_of(first)
    covered = numbers == sum(len(tensor) for tensor in kept.values())
    complete = not any(tensor.isnan().any() for tensor in kept.values())
    taken, apart = steps_taken(first), []

    def read(name, what, start, length):
        return kept[name, what][start : start + length]

    before, same = engines.weights(first), []
    made = []
    for with_moments in (True, False):
        other = engines.actor(name, target, dtype=dtype)
        give_back(other, read, steps=taken if with_moments else 0)
        tell_the_model(other)
        set_learning_rates(other, schedule_step=first.lr_scheduler.last_epoch, factor=1.0)
        now = engines.weights(other)
        same.append(all(torch.equal(before[name], now[name]) for name in before))
        made.append(other)
    engines.train_actor(first, seed=9)
    after = engines.weights(first)
    for other in made:
        engines.train_actor(other, seed=9)
        now = engines.weights(other)
        apart.append(max((after[name].float() - now[name].float()).abs().max().item() for name in after))
    kinds = {what for _, what in kept}
    return covered and complete, same, apart, (taken, steps_taken(made[0])), kinds


@pytest.mark.parametrize(
    ("source", "target"),
    [(0, 2), (2, "strict"), ("strict", 0), (3, 1), (0, 3), (2, "3_offload"), ("strict", "2_offload")],
)
def test_the_state_of_one_stage_is_that_of_another(run_ranks, strict_z3, source, target):
    files = (engines.ds_file(source, strict_z3), engines.ds_file(target, strict_z3))
    for whole, same, (apart, without), (taken, then), kinds in run_ranks(moved, tiny.LLAMA, *files, "float32"):
        assert whole and all(same) and (taken, then) == (3, 4)
        assert kinds == {WEIGHT, *MOMENTS}
        assert apart < 1e-7 < without, "or it cannot be seen that the moments came along"


@pytest.mark.parametrize("kind", [0, 1, 2, 3, "strict", "2_offload", "3_offload"])
def test_the_same_stage_goes_on_bit_for_bit(run_ranks, strict_z3, kind):
    file = engines.ds_file(kind, strict_z3)
    for _, _, (apart, _), _, _ in run_ranks(moved, tiny.GPT2, file, file, "float32"):
        assert apart == 0.0


@pytest.mark.parametrize("kind", [2, "strict"])
def test_master_weights_are_kept_where_the_model_has_16_bits(run_ranks, strict_z3, kind):
    file = engines.ds_file(kind, strict_z3)
    for whole, same, (apart, without), _, _ in run_ranks(moved, tiny.LLAMA, file, file, "bfloat16"):
        assert whole and all(same) and apart == 0.0 < without


@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_a_weight_that_two_ranks_cannot_share_evenly(run_ranks, strict_z3, kind):
    file = engines.ds_file(kind, strict_z3)
    for whole, same, (apart, _), _, _ in run_ranks(moved, ODD, file, file, "float32"):
        assert whole and all(same) and apart == 0.0


@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_before_the_first_step_there_are_weights_alone(run_ranks, strict_z3, kind):
    file = engines.ds_file(kind, strict_z3)
    for whole, same, (apart, without), (taken, then), kinds in run_ranks(moved, tiny.LLAMA, file, file, "float32", 0):
        assert whole and all(same) and apart == without == 0.0 and (taken, then) == (0, 1)
        assert kinds == {WEIGHT}


def run_away_and_back(ds_config):
    """An engine that has taken steps is put back to where it had taken none."""
    fresh = engines.actor(tiny.LLAMA, ds_config)
    kept, _ = whole_of(fresh)
    other = trained(tiny.LLAMA, ds_config, "float32", 2)
    give_back(other, lambda name, what, start, length: kept[name, what][start : start + length], steps=0)
    tell_the_model(other)
    set_learning_rates(other, schedule_step=0, factor=1.0)
    taken = steps_taken(other)
    for engine in (fresh, other):
        engines.train_actor(engine, seed=5)
    ours, theirs = engines.weights(other), engines.weights(fresh)
    return taken, all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_no_moments_of_later_steps_are_left(run_ranks, strict_z3, kind):
    assert run_ranks(run_away_and_back, engines.ds_file(kind, strict_z3)) == [(0, True)] * 2
