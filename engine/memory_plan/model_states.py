"""Bytes of weights, gradients and optimizer states that one rank holds of a model.

What DeepSpeed 0.19 keeps, by its source and measured (`tests/e2e/test_planned_memory.py`). Of a trained weight, in the
run's dtype unless said otherwise:

    stage   weights   gradients                          fp32 master copy, Adam's m and v
    0       whole     whole                              none (the weights are fp32), whole
    1       whole     whole while they add up            a part
    2       whole     of the weights in this rank's part a part
    3       a part    a part                             a part

At stages 1 and 2 the weights of an optimizer group are one flat tensor, cut evenly: a part begins and ends within a
weight. At stage 3 each weight is cut by itself, and what is not trained is cut too.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from engine.distributed.zero_config import Sharding
from engine.memory_plan.roles import Role, Weight

FP32 = 4
MOMENTS = 2 * FP32
STAGE_0_BUCKET = 500_000_000  # elements that DeepSpeed 0.19 sums over ranks at a time where nothing is sharded


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes on the device unless said otherwise.

    Attributes:
        parameters: of the whole model, a number.
        moments_bytes: the part of `optimizer_bytes` that the first step makes.
        average_bytes: of a moving average of the weights.
        resident_gradients: whether gradients stay in memory between steps.
        buckets_bytes: in which gradients are summed over ranks, while a backward pass runs.
        resident_buckets: whether these stay in memory.
        live_bytes: of layers that are whole while a pass goes through them (ZeRO-3).
        persistent_bytes: the part of `live_bytes` that always is.
        left_bytes: the part of it that still is when a backward pass has ended, and the step goes on.
        whole_bytes: of all weights, unsharded.
        building_bytes: more, while the engine is built.
        adding_bytes: more, while gradients are added up over ranks after a backward pass.
        adds_in_pass: they are, too, while it runs, whenever a bucket is full.
        stepping_bytes: more, while the optimizer steps.
        host_bytes: of what is offloaded, on the host.
    """

    zero_stage: int
    parameters: int
    trained_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    moments_bytes: int
    average_bytes: int
    resident_gradients: bool
    buckets_bytes: int
    resident_buckets: bool
    live_bytes: int
    left_bytes: int
    persistent_bytes: int
    whole_bytes: int
    building_bytes: int
    adding_bytes: int
    adds_in_pass: bool
    stepping_bytes: int
    host_bytes: int

    @property
    def resident_bytes(self) -> int:
        """Between passes, once the first step has been taken."""
        kept = self.weights_bytes + self.optimizer_bytes + self.average_bytes + self.persistent_bytes
        return kept + self.resident_gradients * self.gradients_bytes + self.resident_buckets * self.buckets_bytes


def model_states(
    role: Role,
    sharding: Sharding,
    *,
    world_size: int,
    rank: int | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> ModelStates:
    """What a rank holds of a model.

    Args:
        rank: the one that holds the most when not given.
    """
    weights, size = role.weights, role.dtype.itemsize
    trained = [weight for weight in weights if weight.group is not None]
    elements = sum(weight.elements for weight in trained)
    whole = sum(weight.elements * weight.bytes_each for weight in weights)
    largest, second, *_ = *sorted((w.elements * w.bytes_each for w in weights), reverse=True), 0
    average = FP32 * sum(-(-w.elements // world_size) for w in trained) if role.averaged else 0
    stage, bucket = sharding.stage, min(sharding.bucket_elements, elements + elements % 2) * size
    live = left = persistent = building = adding = stepping = host = buckets = 0
    gradients = optimizer = moments = 0
    if stage == 3:
        mine = sum(-(-w.elements // world_size) * w.bytes_each for w in weights)
        part = sum(-(-w.elements // world_size) for w in trained)
        small = [w.elements * w.bytes_each for w in weights if w.elements <= sharding.persistent_elements]
        # The head is whole as long as a pass lasts, since the pass asks for it from outside of it, and so beside the
        # embedding.
        persistent, left = sum(small), max(largest + second, sum(small))
        live = max(left, min(whole, sum(small) + sharding.live_elements * size))
        building = 2 * largest
        if trained:
            gradients, optimizer, moments = part * size, part * (FP32 + MOMENTS), part * MOMENTS
            buckets, stepping = bucket, FP32 * min(part, sharding.group_elements)
            left = whole if sum(w.elements for w in weights) <= sharding.kept_elements else left
            adding = bucket * (2 if device == "cpu" else 1)  # in the order of the ranks; gloo sums a copy of that
            building = max(building, stepping)
        kept = mine
    else:
        groups = [[w for w in trained if w.group == group] for group in ("adapter", "matrix", "vector")]
        parts = [_part(group, world_size) for group in groups] if stage > 0 else [elements]
        flat = sum(parts) * world_size if stage > 0 else elements
        kept = whole + (flat - elements) * size
        if trained:
            gradients = elements * size
            optimizer, moments = sum(parts) * (FP32 * (stage > 0) + MOMENTS), sum(parts) * MOMENTS
            buckets = bucket * sharding.buckets if stage > 0 else 0
            building = flat * size if stage > 0 else 0
            stepping = FP32 * max(parts) if stage > 0 else 0
            of_rank = _in_part(groups, parts, world_size, rank) * size if stage > 0 else 0
            adding = min(elements, STAGE_0_BUCKET) * size if stage == 0 else of_rank
            gradients = of_rank if stage == 2 else gradients
    if sharding.optimizer_on_host and trained:
        # Masters and moments, an fp32 gradient, gradients as they add up; below stage 3 the weights on their way back.
        host += optimizer + gradients + (part * FP32 if stage == 3 else sum(parts) * (FP32 + size))
        largest_trained = max(w.elements for w in trained) * size
        optimizer = moments = stepping = 0
        adding = adding if stage == 3 else 0
        gradients = {1: elements * size, 2: largest_trained, 3: 0}[stage]
    if sharding.weights_on_host and stage == 3:
        host, kept, building = host + kept, 0, 2 * largest
    numbers = dict(
        weights_bytes=kept,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        moments_bytes=moments,
        average_bytes=average,
        buckets_bytes=buckets,
        live_bytes=live,
        left_bytes=left,
        persistent_bytes=persistent,
        whole_bytes=whole,
        building_bytes=building,
        adding_bytes=adding,
        stepping_bytes=stepping,
        host_bytes=host,
    )
    return ModelStates(
        zero_stage=stage,
        parameters=sum(weight.elements for weight in weights),
        trained_parameters=elements,
        resident_gradients=stage == 3,
        resident_buckets=stage == 3,
        adds_in_pass=stage == 3 and sharding.bucket_elements < elements,
        **{name: round(number) for name, number in numbers.items()},
    )


def _part(group: list[Weight], world_size: int) -> int:
    """Elements of a group on each rank, padded as DeepSpeed does."""
    unit = 2 * world_size
    return -(-sum(weight.elements for weight in group) // unit) * unit // world_size


def _in_part(groups: list[list[Weight]], parts: list[int], world_size: int, rank: int | None) -> int:
    """Elements of all weights of which some lies in a rank's part."""
    held = [0] * world_size
    for group, part in zip(groups, parts, strict=True):
        ends = accumulate(weight.elements for weight in group)
        for weight, end in zip(group, ends, strict=True):
            for owner in range((end - weight.elements) // part, (end - 1) // part + 1):
                held[owner] += weight.elements
    return max(held) if rank is None else held[rank]
