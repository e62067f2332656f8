"""Generating under ZeRO-3: whole weights for the length of a block, sharded again afterwards, ranks never waiting."""

import contextlib
import json
import math
import tempfile
from functools import partial
from pathlib import Path

import engines
import psutil
import pytest
import ranks
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from engine.distributed import comm, gather, optimization
from engine.distributed.gather import (
    gathered_for_generation,
    gathered_for_scoring,
    is_sharded,
    sharded_for_generation,
)
from engine.distributed.optimization import step_together
from engine.models.lora import with_adapter
from engine.models.random_init import local_name
from engine.rollout.generation import Sampling, generate_responses, noise_of_rows

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


def generate(whole, tokens: int, *, temperature=0.7, micro_batch_size=4, in_step=False, iteration=0) -> list[list[int]]:
    """Responses of exactly so many tokens to PROMPTS."""
    return generate_responses(
        whole.model,
        PROMPTS,
        noise_of_rows([(iteration, row) for row in range(len(PROMPTS))], tokens),
        sampling=Sampling(max_response_tokens=tokens, temperature=temperature),
        eos_token_ids=[],
        micro_batch_size=micro_batch_size,
        any_rank_active=comm.any_true if in_step else None,
    )


def all_sharded(engine) -> bool:
    return all(is_sharded(parameter) for parameter in engine.module.parameters())


def all_gathers(seen: profile) -> int:
    """From the trace: `seen.events()` takes a second to make an object of each of ten thousand events."""
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        seen.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    names = [event["name"].lower() for event in events]
    return sum(name.startswith("c10d::") and "allgather" in name.replace("_", "") for name in names)


# Unequal lengths


def generate_unequally_then_train(strict_z3, weights):
    engine = engines.actor(tiny.LLAMA, strict_z3)
    tokens = 4 if comm.rank() == 0 else 40
    with gathered_for_generation(engine) if weights == "gathered" else sharded_for_generation(engine) as whole:
        responses = generate(whole, tokens, in_step=weights == "sharded")
    assert [len(response) for response in responses] == [tokens] * len(PROMPTS)
    return engines.train_actor(engine)


@pytest.mark.parametrize("weights", ["gathered", "sharded"])
def test_4_tokens_beside_40_then_a_step(run_ranks, strict_z3, weights):
    first, second = run_ranks(
        generate_unequally_then_train, engines.ds_file("strict", strict_z3), weights, timeout_s=60
    )
    assert first == second


def test_neither_gathered_nor_in_step_does_not_finish(strict_z3):
    """Negative control of the test above."""
    pool = ranks.Pool(2, group_timeout_s=5)
    try:
        with pytest.raises(ranks.RankFailed):
            pool.run(generate_unequally_then_train, (engines.ds_file("strict", strict_z3), "neither"), 12)
    finally:
        pool.kill()


# The same text, at the price of one all-gather per parameter


def compare_and_count(strict_z3):
    engine = engines.actor(tiny.LLAMA, strict_z3)
    said = dict(parameters=len(list(engine.module.parameters())))
    for tokens in (4, 12):
        for weights, enter in (("gathered", gathered_for_generation), ("sharded", sharded_for_generation)):
            with profile(activities=[ProfilerActivity.CPU]) as seen, enter(engine) as whole:
                said[weights, tokens] = generate(whole, tokens, temperature=0)
            said["all-gathers", weights, tokens] = all_gathers(seen)
    return said


def test_gathered_writes_what_sharded_writes_with_one_all_gather_per_parameter(run_ranks, strict_z3):
    for rank in run_ranks(compare_and_count, engines.ds_file("strict", strict_z3)):
        for tokens in (4, 12):
            assert rank["gathered", tokens] == rank["sharded", tokens]
            assert 0 < rank["all-gathers", "gathered", tokens] <= rank["parameters"]
            # The counter counts: sharded, every token gathers anew.
            assert rank["all-gathers", "sharded", tokens] >= tokens
        assert rank["all-gathers", "gathered", 4] == rank["all-gathers", "gathered", 12], "none per token"


def passes_and_gathers(engine, gather: bool, passes: int = 3):
    """What an engine says in so many passes, and the all-gathers that it takes."""
    batch = engines.rows().padded(torch.arange(2), comm.device())
    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad(), contextlib.ExitStack() as whole:
        if gather:
            whole.enter_context(gathered_for_scoring(engine))
        asked = (batch.input_ids, batch.positions, batch.targets)
        said = [engine(*asked, temperature=1.0, chunk_tokens=8).logprobs for _ in range(passes)]
    return said, all_gathers(seen)


def score_gathered_and_sharded(strict_z3):
    found = []
    for engine in (
        engines.actor(tiny.LLAMA, strict_z3),
        engines.frozen(tiny.GPT2, strict_z3),
    ):
        engine.eval()
        whole, gathers = passes_and_gathers(engine, True)
        kept = all_sharded(engine)
        pieces, gathers_of_pieces = passes_and_gathers(engine, False)
        same = all(torch.equal(*both) for both in zip(whole, pieces, strict=True))
        # One rank without memory: none gathers.
        original = psutil.virtual_memory
        if comm.rank() == 1:
            psutil.virtual_memory = lambda: original()._replace(available=1000)  # noqa: B023 - undone below
        try:
            _, gathers_without_room = passes_and_gathers(engine, True)
        finally:
            psutil.virtual_memory = original
        parameters = len(list(engine.module.parameters()))
        found.append((parameters, kept, same, gathers, gathers_of_pieces, gathers_without_room, all_sharded(engine)))
    return found


def test_scoring_gathers_a_model_once_where_it_fits(run_ranks, strict_z3):
    for rank in run_ranks(score_gathered_and_sharded, engines.ds_file("strict", strict_z3), timeout_s=60):
        for parameters, kept, same, gathers, of_pieces, without_room, sharded in rank:
            assert 0 < gathers <= parameters
            assert min(of_pieces, without_room) > gathers, "every pass gathers anew"
            assert same and kept and sharded


# The switch itself


def inside_and_outside(kind, strict_z3):
    engine = engines.actor(tiny.GPT2, engines.ds_file(kind, strict_z3))
    expected = engines.weights(engine)
    engine.train()
    with gathered_for_generation(engine) as whole:
        same = all(torch.equal(p, expected[name]) for name, p in whole.named_parameters())
        inside = not any(is_sharded(p) for p in whole.parameters()), whole.training, same
    kept_training = engine.module.training
    engine.eval()
    with gathered_for_generation(engine):
        pass
    # A forward pass with hooks shards every layer again as it finishes. Without them it would work too, since DeepSpeed
    # gathers what it finds missing, and the whole model would stay.
    with torch.no_grad():
        engines.policy_loss(engine, engines.rows().padded(torch.arange(2), comm.device()), 1)
    return inside, kept_training, engine.module.training, all_sharded(engine)


@pytest.mark.parametrize("kind", [0, 2, "strict"])
def test_whole_and_in_eval_mode_inside_as_before_outside(run_ranks, strict_z3, kind):
    for inside, kept_training, kept_eval, sharded in run_ranks(inside_and_outside, kind, strict_z3):
        assert inside == (True, False, True)
        assert (kept_training, kept_eval) == (True, False)
        assert sharded == (kind == "strict")


def alternate(strict_z3, micro_batch_size, epochs, interrupted_at):
    """5 iterations of generating and training: losses, texts, and whether all was sharded after every phase."""
    engine = engines.actor(tiny.LLAMA, strict_z3)
    losses, texts, sharded = [], [], []
    for iteration in range(5):
        if iteration == interrupted_at:
            with contextlib.suppress(InterruptedError), gathered_for_generation(engine) as whole:
                generate(whole, 2)
                raise InterruptedError
            sharded.append(all_sharded(engine))
        with gathered_for_generation(engine) as whole:
            texts.append(generate(whole, 6, micro_batch_size=micro_batch_size, iteration=iteration))
        sharded.append(all_sharded(engine))
        losses += [engines.train_actor(engine) for _ in range(epochs)]
        sharded.append(all_sharded(engine))
    return losses, texts, all(sharded)


def alternate_each(strict_z3):
    plain = {}
    for epochs in (1, 2):
        for micro_batch_size in (1, 3):
            plain[micro_batch_size, epochs] = alternate(strict_z3, micro_batch_size, epochs, None)
    return plain, alternate(strict_z3, 3, 2, interrupted_at=2)


def test_generating_and_training_alternate(run_ranks, strict_z3):
    for plain, interrupted in run_ranks(alternate_each, engines.ds_file("strict", strict_z3)):
        assert all(sharded for _, _, sharded in plain.values())
        assert interrupted[2]
        assert interrupted[:2] == plain[3, 2][:2], "an exception in the block leaves no trace"
        for epochs in (1, 2):
            losses, texts, _ = plain[1, epochs]
            assert losses[-1] < losses[0]
            assert losses == pytest.approx(plain[3, epochs][0], abs=1e-6)
            assert texts == plain[3, epochs][1]


def refused(strict_z3):
    """One rank has no memory left: what every rank says, and a step afterwards."""
    engine = engines.actor(tiny.LLAMA, strict_z3)
    original = psutil.virtual_memory
    if comm.rank() == 1:
        psutil.virtual_memory = lambda: original()._replace(available=1000)
    try:
        with gathered_for_generation(engine):
            said = None
    except ValueError as error:
        said = str(error)
    finally:
        psutil.virtual_memory = original
    return said, all_sharded(engine), engine.module.training, engines.train_actor(engine)


def test_too_little_memory_on_one_rank_is_refused_on_all(run_ranks, strict_z3):
    for said, sharded, training, _ in run_ranks(refused, engines.ds_file("strict", strict_z3), timeout_s=60):
        assert said is not None
        assert "--rollout.weights sharded" in said
        assert "GiB" in said
        assert sharded
        assert training


# What a training step gathers

STEPS = 4


@pytest.fixture(params=["llama", "gpt2"])
def large(request) -> str:
    """A model of which ZeRO-3 shards the six large weights, and GPT-2's positions, under ds_configs/ as well."""
    name = dict(llama=tiny.LARGE_LLAMA, gpt2=tiny.LARGE_GPT2)[request.param]
    local_name(name)  # made here: under ZeRO-3 the ranks would wait for each other
    return name


def shards(engine) -> int:
    return sum(is_sharded(parameter) for parameter in engine.module.parameters())


def step_and_count(engine, micro_batch_size: int, seed: int = 0) -> dict[str, int]:
    """One optimizer step: all-gathers of its passes, shards before the step and after it."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        engines.backward(engine, engines.policy_loss, engines.rows(seed=seed), micro_batch_size=micro_batch_size)
    before = shards(engine)
    assert step_together([engine], healthy=True) is not None
    return {"gathers": all_gathers(seen), "before": before, "after": shards(engine)}


def large_ones(weights) -> int:
    return sum(weight.numel() > 100_000 for weight in weights.values())


def train_and_count(name, ds_config, sizes, switched_off=False):
    """A step for each of these sizes of micro-batches: what it gathers; then what is said and the weights."""
    with pytest.MonkeyPatch.context() as patch:
        if switched_off:
            patch.setattr(optimization, "stay_whole", lambda engine, stay: None)
        engine = engines.actor(name, ds_config)
        steps = [step_and_count(engine, size, seed) for seed, size in enumerate(sizes)]
        said = engines.said_live(engine, "actor")
        return steps, said, engines.weights(engine)


def test_a_step_gathers_once_and_not_per_micro_batch(run_ranks, strict_z3, large):
    """Of four micro-batches; the first step learns the order."""
    zero3, stage0 = engines.ds_file(3, strict_z3), engines.ds_file(0, strict_z3)
    sizes = [1] * STEPS
    kept = run_ranks(train_and_count, large, zero3, sizes)
    again = run_ranks(train_and_count, large, zero3, sizes, True)
    whole = run_ranks(train_and_count, large, stage0, sizes)
    for (steps, said, weights), (plain, same_said, same_weights), (_, said0, _) in zip(kept, again, whole, strict=True):
        number = large_ones(weights)
        assert number == (7 if "gpt2" in large else 6)
        assert [step["gathers"] for step in steps[1:]] == [1] * (STEPS - 1)
        assert all(step["gathers"] >= 4 for step in plain), "switched off, every micro-batch gathers"
        assert all(step["after"] == number for step in (*steps, *plain)), "sharded again"
        assert torch.equal(said, same_said)
        assert all(torch.equal(weight, same_weights[name]) for name, weight in weights.items())
        # What was gathered before a step is not what the next forward pass computes with.
        torch.testing.assert_close(said, said0, rtol=0, atol=2e-5)


def test_strict_zero3_gathers_in_every_pass(run_ranks, strict_z3, large):
    """Control: no room for live parameters, so nothing stays."""
    of_four, of_one = (
        run_ranks(train_and_count, large, engines.ds_file("strict", strict_z3), [size] * 3)[0] for size in (1, 4)
    )
    steps, _, weights = of_four
    for four, one in zip(steps[1:], of_one[0][1:], strict=True):
        assert one["gathers"] > 1
        assert four["gathers"] == 4 * one["gathers"]
    assert all(step["before"] == step["after"] == len(weights) for step in steps)


@pytest.mark.parametrize("sizes", [[2] * 4, [4, 4, 4, 1, 1]], ids=["two micro-batches", "four after one"])
def test_a_step_gathers_once_whatever_was_before_it(run_ranks, strict_z3, sizes):
    local_name(tiny.LARGE_LLAMA)
    ds_config = engines.ds_file(3, strict_z3)
    steps, _, _ = run_ranks(train_and_count, tiny.LARGE_LLAMA, ds_config, sizes)[0]
    assert [step["gathers"] for step in steps[1:]] == [1] * (len(sizes) - 1)


def test_the_last_backward_pass_leaves_shards(run_ranks, strict_z3, large):
    """And not only the optimizer step after it: between the two there are gradients of the whole model."""
    steps, _, weights = run_ranks(train_and_count, large, engines.ds_file(3, strict_z3), [1] * STEPS)[0]
    assert [step["before"] for step in steps] == [len(weights)] * STEPS


def train_adapter(ds_config):
    """Shards before and after the step of an adapter's two micro-batches, and the number of weights."""
    form = dict(seed=0, r=4, alpha=8.0, dropout=0.0, target_modules=None)
    engine = engines.trained(partial(with_adapter, engines.language_builder(tiny.LLAMA), **form), ds_config)
    steps = [step_and_count(engine, 2, seed) for seed in range(3)]
    return steps, len(list(engine.module.parameters()))


def test_frozen_weights_that_no_backward_pass_reaches_are_shards_again(run_ranks, tmp_path):
    """The embedding's, beside an adapter: those are let go of in a forward pass, or never."""
    for steps, number in run_ranks(train_adapter, looking_ahead(tmp_path, stage3_max_live_parameters=10**9)):
        assert [(step["before"], step["after"]) for step in steps] == [(number, number)] * 3


# Forward passes alone, after training


def looking_ahead(folder, **given) -> Path:
    """ZeRO-3 with room for a few layers, of which some are gathered before they are asked for."""
    sizes = dict(stage3_param_persistence_threshold=0, stage3_max_reuse_distance=5000, stage3_prefetch_bucket_size=1500)
    sizes = dict(stage3_max_live_parameters=35_000) | sizes | given
    path = folder / "looking_ahead.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **sizes}}))
    return path


def passes_alone(name, ds_config, cleaned):
    """What the engine says in its shards after training, whether it is in shards then, and what it writes whole."""
    with pytest.MonkeyPatch.context() as patch:
        if not cleaned:
            patch.setattr(gather, "shard_again", lambda engine: None)
        engine, found = engines.actor(name, ds_config), []
        for _ in range(3):
            engines.train_actor(engine)
        for enter in (partial(gathered_for_scoring, gather=False), sharded_for_generation):
            engine.eval()
            batch = engines.rows().padded(torch.arange(2), comm.device())
            asked = (batch.input_ids, batch.positions, batch.targets)
            with enter(engine), torch.no_grad():
                said = [engine(*asked, temperature=1.0, chunk_tokens=8).logprobs for _ in range(2)]
            in_shards = all_sharded(engine)
            with gathered_for_generation(engine) as whole:
                whole_too = whole(*asked, temperature=1.0, chunk_tokens=8).logprobs
                written = generate(whole, 4)
            found.append((said, whole_too, in_shards, written))
        return found, engines.train_actor(engine)


DEEP_LLAMA = tiny.LLAMA.replace("num_hidden_layers=2", "num_hidden_layers=8")


def test_passes_alone_leave_shards_behind(run_ranks, tmp_path):
    local_name(DEEP_LLAMA)  # made here: under ZeRO-3 the ranks would wait for each other
    for found, loss in run_ranks(passes_alone, DEEP_LLAMA, looking_ahead(tmp_path), True):
        for said, whole_too, in_shards, _ in found:
            assert in_shards and all(torch.equal(one, whole_too) for one in said)
        assert math.isfinite(loss) and found[0][-1] == found[1][-1]


def test_weights_that_are_on_their_way_when_all_are_gathered_do_not_arrive(tmp_path):
    """Negative control of the test above: DeepSpeed leaves them out."""
    local_name(DEEP_LLAMA)
    pool = ranks.Pool(2, group_timeout_s=10)
    try:
        with pytest.raises(ranks.RankFailed, match="Cannot partition a param in flight"):
            pool.run(passes_alone, (DEEP_LLAMA, looking_ahead(tmp_path), False), 60)
    finally:
        pool.kill()


# DeepSpeed's hooks and the order it has learnt, across a block


def hooks_of(engine) -> list[tuple[int, object]]:
    """Every hook of every module, in the order that they are called in."""
    tables = ("_forward_pre_hooks", "_forward_hooks")
    return [item for of in engine.module.modules() for table in tables for item in getattr(of, table).items()]


def passes_around_blocks(name, ds_config):
    """All-gathers of a step of one micro-batch, warmed up, after blocks of both kinds, and with hooks made anew."""
    engine = engines.actor(name, ds_config)
    warm = [step_and_count(engine, 4, seed)["gathers"] for seed in range(3)]
    zero3, hooks = engine.optimizer.parameter_offload, hooks_of(engine)
    others = len(hooks) - len([zero3.fwd_pre_hook, *zero3.forward_hooks, *zero3.backward_hooks])
    after, lifted, put_back = [], [], []
    for enter in (gathered_for_generation, gathered_for_scoring, gathered_for_generation):
        with enter(engine):
            lifted.append(len(hooks_of(engine)) == others < len(hooks))
        put_back.append(hooks_of(engine) == hooks)
        after.append(step_and_count(engine, 4)["gathers"])
    for hook in (*zero3.forward_hooks, *zero3.backward_hooks):
        hook.remove()
    zero3.forward_hooks, zero3.backward_hooks = [], []
    zero3._register_deepspeed_module(zero3.module)
    return warm, after, lifted + put_back, step_and_count(engine, 4)["gathers"]


@pytest.mark.parametrize("kind", [3, "strict"])
def test_the_order_of_gathers_survives_a_block(run_ranks, strict_z3, kind, large):
    for warm, after, lifted_and_put_back, anew in run_ranks(
        passes_around_blocks, large, engines.ds_file(kind, strict_z3)
    ):
        assert warm[1] == warm[2] <= warm[0]
        assert all(count <= warm[2] + 1 for count in after), "one for the small ones, which a block shards as well"
        assert all(lifted_and_put_back)
        if kind == 3:
            assert warm[2] == 1 and anew >= 6, "made anew, weights come one by one"


def hook_removed_inside(strict_z3):
    engine, called = engines.actor(tiny.LLAMA, strict_z3), []
    foreign = engine.module.register_forward_hook(lambda *_: called.append(1))
    with gathered_for_generation(engine):
        foreign.remove()
    engines.said_live(engine, "actor")
    return called


def test_a_hook_that_is_removed_inside_a_block_stays_away(run_ranks, strict_z3):
    assert run_ranks(hook_removed_inside, engines.ds_file("strict", strict_z3)) == [[], []]


def hook_added_inside(strict_z3):
    """How often it is called in the pass after the block, whether that sharded, whether it is the last, and the others'
    places once it is gone.
    """
    engine, called = engines.actor(tiny.LLAMA, strict_z3), []
    before = hooks_of(engine)
    with gathered_for_generation(engine):
        added = engine.module.register_forward_hook(lambda *_: called.append(1))
    engines.said_live(engine, "actor")
    calls, sharded = len(called), all_sharded(engine)
    last = list(engine.module._forward_hooks)[-1] == added.id
    added.remove()
    return calls, sharded, last, hooks_of(engine) == before


def test_a_hook_that_is_added_inside_a_block_stays(run_ranks, strict_z3):
    for calls, sharded, last, as_before in run_ranks(hook_added_inside, engines.ds_file("strict", strict_z3)):
        assert calls == 1
        assert sharded and last and as_before
