"""Engines are built straight into shards, frozen ones own no optimizer, and rotary frequencies stay exact."""

import gc
import math
import weakref

import engines
import pytest
import tiny
import torch
from deepspeed.runtime.zero import partition_parameters
from torch import nn

from engine.distributed import initialize
from engine.distributed.gather import is_sharded
from engine.distributed.initialize import free
from engine.distributed.optimization import step_together

KINDS = (0, 1, 2, "strict")


def build_watching(build):
    """The engine, and the most parameter elements (whole or shards) alive at any time while it was built."""
    known: dict[int, weakref.ref] = {}
    most = 0

    def elements(parameter: nn.Parameter) -> int:
        return parameter.ds_tensor.numel() if is_sharded(parameter) else parameter.numel()

    def watched(original):
        def call(module, *args, **kwargs):
            nonlocal most
            result = original(module, *args, **kwargs)
            if isinstance(module, nn.Module):
                known.update({id(p): weakref.ref(p) for p in module.parameters(recurse=False)})
            alive = [p for reference in known.values() if (p := reference()) is not None]
            most = max(most, sum(elements(p) for p in alive))
            return result

        return call

    places = [(nn.Linear, "__init__"), (nn.Embedding, "__init__"), (nn.Module, "register_parameter")]
    places.append((partition_parameters.GatheredParameters, "__enter__"))
    originals = [getattr(owner, name) for owner, name in places]
    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, watched(original))
    try:
        return build(), most
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def built(kind, strict_z3, role, watch):
    path = engines.ds_file(kind, strict_z3)
    build = dict(
        actor=lambda: engines.actor(tiny.LLAMA, path),
        critic=lambda: engines.critic(tiny.score_head(tiny.LLAMA), path),
        ref=lambda: engines.frozen(tiny.LLAMA, path),
    )[role]
    engine, most = build_watching(build) if watch else (build(), 0)
    parameters = list(engine.module.parameters())
    return dict(
        stage=initialize.stage_of(engine),
        total=initialize.parameter_bytes(engine) // 4,  # of fp32
        number=len(parameters),
        largest=max(math.prod(getattr(p, "ds_shape", p.shape)) for p in parameters),
        held=sum(p.numel() for p in parameters),
        shards=sum(p.ds_tensor.numel() for p in parameters if hasattr(p, "ds_tensor")),
        most=most,
        trainable=sum(p.requires_grad for p in parameters),
        training=engine.module.training,
        torch_optimizer=engine.basic_optimizer is not None,
        states=len(engine.optimizer.state) if hasattr(engine.optimizer, "state") else 0,
    )


@pytest.mark.parametrize("role", ["actor", "critic", "ref"])
def test_under_zero_3_no_rank_ever_holds_the_whole_model(run_ranks, strict_z3, role):
    for rank in run_ranks(built, "strict", strict_z3, role, True):
        assert rank["stage"] == 3
        assert rank["held"] == 0
        assert rank["shards"] <= math.ceil(rank["total"] / 2) + rank["number"], "one element of padding each at most"
        # While the model is made and filled: the shards, and no more than two parameters whole (one being made, one
        # being gathered for the checkpoint).
        assert rank["most"] <= rank["shards"] + 2 * rank["largest"]
        assert rank["most"] < rank["total"]


def test_watching_sees_a_whole_model(run_ranks, strict_z3):
    """Negative control of the test above."""
    for rank in run_ranks(built, 2, strict_z3, "actor", True):
        assert rank["shards"] == 0
        assert rank["most"] >= rank["held"] == rank["total"]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_engines_have_no_optimizer(run_ranks, strict_z3, kind):
    for rank in run_ranks(built, kind, strict_z3, "ref", False):
        assert rank["stage"] == (3 if kind == "strict" else 0)
        assert rank["trainable"] == rank["states"] == 0
        assert not rank["torch_optimizer"]
        assert not rank["training"]


def test_trained_engines_have_one(run_ranks, strict_z3):
    """Negative control of the test above."""
    for rank in run_ranks(built, 2, strict_z3, "actor", False):
        assert rank["trainable"] == rank["number"]
        assert rank["torch_optimizer"]


def rounding_builder():
    """A build that rounds everything, as `model.to(bfloat16)` does and DeepSpeed before 0.19.8 did."""
    return engines.language_builder(tiny.LLAMA, "bfloat16")().to(torch.bfloat16)


def frequencies(kind, strict_z3, rounded, restored):
    """Rotary frequencies under bf16: (dtype, largest relative error) of a trained and a frozen engine."""
    build = rounding_builder if rounded else engines.language_builder(tiny.LLAMA, "bfloat16")
    path = engines.ds_file(kind, strict_z3)
    original = initialize.restore_rope
    if not restored:
        initialize.restore_rope = lambda model: None
    try:
        both = [
            engines.trained(build, path, dtype="bfloat16"),
            initialize.frozen_engine(build, ds_config=path, dtype="bfloat16"),
        ]
    finally:
        initialize.restore_rope = original
    exact = 10_000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)  # Su et al. 2021: theta^(-2i/d), d = 8
    said = []
    for engine in both:
        (buffer,) = [buffer for name, buffer in engine.module.named_buffers() if name.endswith(".inv_freq")]
        said.append((buffer.dtype, ((buffer.double() - exact) / exact).abs().max().item()))
    return said


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", [2, "strict"])
def test_rotary_frequencies_are_exact_under_bf16(run_ranks, strict_z3, kind, rounded):
    for dtype, error in run_ranks(frequencies, kind, strict_z3, rounded, True)[1]:
        assert dtype == torch.float32
        assert error < 1e-6


@pytest.mark.parametrize("kind", [2, "strict"])
def test_rounded_frequencies_would_show(run_ranks, strict_z3, kind):
    """Negative control of the test above."""
    for _, error in run_ranks(frequencies, kind, strict_z3, True, False)[1]:
        assert error > 1e-4


# The optimizer and its schedule


def learning_rates(scheduler, warmup_steps, steps):
    engine = engines.trained(
        engines.language_builder(tiny.LLAMA),
        engines.ds_file(2, ""),
        lr_scheduler=scheduler,
        warmup_steps=warmup_steps,
        total_steps=4,
    )
    rates = []
    for _ in range(steps):
        rates.append(engine.get_lr()[0])
        engines.train_actor(engine)
    return rates


@pytest.mark.parametrize(
    ("scheduler", "warmup_steps", "wanted"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0, 1 / 2, 1, 1, 1]),
        ("linear", 0, [1, 3 / 4, 1 / 2, 1 / 4, 0]),
        ("linear", 2, [0, 1 / 2, 1, 1 / 2, 0]),
        ("cosine", 0, [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]),
    ],
)
def test_the_learning_rate_of_every_step(run_ranks, scheduler, warmup_steps, wanted):
    for rates in run_ranks(learning_rates, scheduler, warmup_steps, 5):
        assert rates == pytest.approx([1e-3 * share for share in wanted], abs=1e-9)


def optimizer_groups(kind, strict_z3):
    engine = engines.trained(
        engines.language_builder(tiny.GPT2), engines.ds_file(kind, strict_z3), betas=(0.8, 0.7), weight_decay=0.3
    )
    seen = []
    for group in engine.optimizer.param_groups:
        seen.append((group["weight_decay"], tuple(group["betas"]), group["lr"]))
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_has_the_runs_numbers(run_ranks, strict_z3, kind):
    """Matrices decay, vectors do not."""
    for seen in run_ranks(optimizer_groups, kind, strict_z3):
        assert seen == [(0.3, (0.8, 0.7), 1e-3), (0.0, (0.8, 0.7), 1e-3)]


def decayed_by_one_step(kind, strict_z3):
    """How much of each parameter a step without a gradient leaves: what weight decay takes."""
    engine = engines.trained(
        engines.language_builder(tiny.LLAMA), engines.ds_file(kind, strict_z3), weight_decay=0.5, learning_rate=0.1
    )
    before = engines.weights(engine)
    engines.backward(engine, engines.policy_loss, engines.rows(), factor=0.0)
    assert step_together([engine], healthy=True) is not None
    after = engines.weights(engine)
    return {name: (tensor.dim(), (after[name].norm() / tensor.norm()).item()) for name, tensor in before.items()}


@pytest.mark.parametrize("kind", [0, "strict"])
def test_weight_decay_is_for_matrices(run_ranks, strict_z3, kind):
    for left in run_ranks(decayed_by_one_step, kind, strict_z3):
        for name, (dimensions, share) in left.items():
            assert share == pytest.approx(1 - 0.1 * 0.5 if dimensions > 1 else 1.0, abs=1e-5), name


def one_step_without_vectors():
    """OLMo's norms have no weights: all parameters are matrices."""
    engine = engines.actor(
        "random://olmo?hidden_size=32&num_hidden_layers=1&num_attention_heads=4", engines.ds_file(2, "")
    )
    return engines.train_actor(engine)


def test_a_model_without_vectors_trains(run_ranks):
    first, second = run_ranks(one_step_without_vectors)
    assert first == second and math.isfinite(first)


def living_elements():
    """Of all tensors, and of the shards behind ZeRO-3's parameters."""
    gc.collect()
    seen = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    shards = [thing.ds_tensor for thing in seen if hasattr(thing, "ds_tensor")]
    return sum({tensor.data_ptr(): tensor.numel() for tensor in (*seen, *shards)}.values())


def built_and_freed(name, ds_config):
    """Elements alive before, with a frozen engine, and after it was freed."""
    free(engines.frozen(name, ds_config))  # what DeepSpeed makes once and keeps
    before = living_elements()
    engine = engines.frozen(name, ds_config)
    engine(
        torch.zeros(1, 4, dtype=torch.int64), torch.arange(3), torch.zeros(3, dtype=torch.int64), **engines.TEMPERATURE
    )
    during = living_elements()
    free(engine)
    return before, during, living_elements()


@pytest.mark.parametrize("kind", [0, "strict"])
def test_a_freed_engine_leaves_nothing_behind(run_ranks, strict_z3, kind):
    for before, during, after in run_ranks(built_and_freed, tiny.LLAMA, engines.ds_file(kind, strict_z3)):
        assert during - before > 10_000, "half of the model's weights at least, whole or sharded"
        assert after - before < 1000


def bucket(kind, strict_z3):
    engine = engines.actor(tiny.LLAMA, engines.ds_file(kind, strict_z3))
    return engine.optimizer.reduce_bucket_size, sum(math.prod(initialize.whole_shape(p)) for p in engine.parameters())


@pytest.mark.parametrize("kind", [2, "strict"])
def test_no_more_is_allocated_for_sums_between_ranks_than_there_are_gradients(run_ranks, strict_z3, kind):
    for size, elements in run_ranks(bucket, kind, strict_z3):
        assert size == elements
