"""moving_average.py: the average is that of float64 arithmetic at every sharding, and what is exported."""

from pathlib import Path

import engines
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from engine.distributed.export import export_huggingface
from engine.distributed.moving_average import MovingAverage
from engine.models.loading import load_tokenizer

DECAY = 0.9


def averaged(name, ds_config, folder, dtype="float32"):
    """After five steps: the largest distance to a float64 reference, how far the average has moved, and how far it is
    from the weights; the average is exported.
    """
    engine = engines.actor(name, ds_config, dtype=dtype)
    average = MovingAverage(engine, decay=DECAY)
    held = sum(shard.numel() for shard in average.shards.values())
    before = reference = {name: tensor.double() for name, tensor in engines.weights(engine).items()}
    for step in range(5):
        engines.train_actor(engine, seed=step)
        average.update()
        now = engines.weights(engine)
        reference = {name: DECAY * mean + (1 - DECAY) * now[name].double() for name, mean in reference.items()}
    found = {name: average.whole(name.removeprefix("model.")).double() for name in reference}
    export_huggingface(engine, Path(folder), load_tokenizer(name), average=average)

    def distance(ours, theirs):
        return max((ours[name] - theirs[name].double()).abs().max().item() for name in reference)

    return distance(found, reference), distance(found, before), distance(found, now), held, found


@pytest.mark.parametrize("kind", [0, 1, 2, 3, "strict"])
def test_the_average_is_that_of_float64(run_ranks, strict_z3, tmp_path, kind):
    ranks = run_ranks(averaged, tiny.LLAMA, engines.ds_file(kind, strict_z3), str(tmp_path / "ema"))
    total = sum(tensor.numel() for tensor in ranks[0][-1].values())
    for error, moved, behind, held, _ in ranks:
        assert error < 1e-6 and moved > 1e-4 and behind > 1e-4
        assert held < 0.55 * total, "each rank keeps its part only"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ema").state_dict()
    for name, tensor in ranks[0][-1].items():
        torch.testing.assert_close(plain[name.removeprefix("model.")].double(), tensor, rtol=0, atol=1e-6)


def test_in_bfloat16_it_moves_by_less_than_bfloat16_can_say(run_ranks, strict_z3, tmp_path):
    given = (tiny.LLAMA, engines.ds_file("strict", strict_z3), str(tmp_path / "ema"), "bfloat16")
    for error, moved, _, _, average in run_ranks(averaged, *given):
        assert error < 1e-5 and moved > 1e-4
        assert any((tensor != tensor.bfloat16().double()).any() for tensor in average.values())


@pytest.mark.parametrize("kind", [0, "strict"])
def test_a_weight_that_two_ranks_cannot_share_evenly_is_whole_again(run_ranks, strict_z3, tmp_path, kind):
    """Norms of 33 numbers: the second rank's part is shorter, or padded."""
    odd = "random://gpt2?n_embd=33&n_layer=1&n_head=3&n_positions=512"
    for error, moved, *_ in run_ranks(averaged, odd, engines.ds_file(kind, strict_z3), str(tmp_path / "ema")):
        assert error < 1e-6 and moved > 1e-4


def test_one_rank_keeps_everything(run_ranks, tmp_path):
    ((error, moved, *_),) = run_ranks(averaged, tiny.GPT2, engines.ds_file(0, ""), str(tmp_path / "ema"), world_size=1)
    assert error < 1e-6 and moved > 1e-4
