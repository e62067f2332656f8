"""How to shard each role, so that a run fits: the cheapest way that does, with its reasons.

Cheap is what moves few bytes between ranks. Of what fits within the memory less a margin, the way of the lowest cost is
taken; smaller micro-batches are preferred to generating from sharded weights, and both to offloading.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from engine.config import DS_CONFIGS, PPOConfig, SteadyLoRAConfig
from engine.config.checks import at_least
from engine.memory_plan.phases import Sizes
from engine.memory_plan.plan import Plan, Planner
from engine.memory_plan.table import readable

MARGIN = 0.1  # of the device, for what the plan does not see: CUDA's context, NCCL's buffers, gaps between tensors
GIB = 2**30
# Files of ds_configs/ -> what they cost relative to each other, in bytes sent and time waited. To a model without
# gradients stages 1 and 2 are stage 0.
TRAINED = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 5, "zero2_offload": 20, "zero3_offload": 30}
FROZEN = {"zero0": 0, "zero3": 1, "zero3_offload": 25}
MORE_GPUS = 4096


@dataclass(frozen=True)
class Recommendation:
    """
    Attributes:
        plan: None where nothing fits.
        sizes: of its passes.
        rollout_weights: how the actor generates, `rollout.weights`.
        reasons: sentences: what was chosen and why, or what would have to change.
    """

    plan: Plan | None
    sizes: Sizes | None
    rollout_weights: Literal["gathered", "sharded"] | None
    reasons: tuple[str, ...]

    @property
    def sharding(self) -> dict[str, Path]:
        """Each role's file of `ds_configs/`."""
        return self.plan.sharding if self.plan else {}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run may take.

    Attributes:
        device_memory: bytes of each rank's device.
        host_memory: bytes of a machine's own memory, for all its ranks.
    """

    world_size: int
    device_memory: int
    host_memory: int | None = None
    ranks_per_node: int = 8

    def __post_init__(self):
        at_least("world_size", self.world_size, 1)
        at_least("ranks_per_node", self.ranks_per_node, 1)

    def holds(self, plan: Plan) -> bool:
        """With the margin left over."""
        return not self.too_small_for(plan)

    def too_small_for(self, plan: Plan) -> list[str]:
        """What the plan does not fit into with the margin left over: nothing where it fits."""
        wanted = {"a rank's device": (plan.peak_bytes, self.device_memory)}
        if self.host_memory is not None:
            wanted["a machine's own memory"] = (plan.host_bytes, self.host_memory)
        return [
            f"{name} ({readable(size)} of {readable(there)}, {MARGIN:.0%} of which are left free)"
            for name, (size, there) in wanted.items()
            if size > (1 - MARGIN) * there
        ]


def recommendation(
    planner: Planner, machine: Machine, *, fixed: Mapping[str, Path] | None = None, sizes_stay: bool = False
) -> Recommendation:
    """The cheapest sharding of each role that fits.

    Args:
        fixed: files of roles that are not to be chosen.
        sizes_stay: rather shard and offload than change the config's sizes; others come where there is no way with
            those.
    """
    fixed = fixed or {}
    chosen = _chosen(planner, machine, fixed, sizes="as set") if sizes_stay else None
    chosen = chosen or _chosen(planner, machine, fixed, sizes="halved")
    if chosen is not None:
        reasons = _reasons(*chosen, planner.config, machine, fixed)
        return Recommendation(chosen.plan, chosen.sizes, chosen.planner.config.rollout.weights, tuple(reasons))
    sizes = _smallest(Sizes.of(planner.config, world_size=machine.world_size))
    least = min(_plans(_generating_sharded(planner), machine, fixed, sizes), key=lambda plan: plan.peak_bytes)
    phase = max(least.phases, key=lambda name: least.phases[name].peak_bytes)
    part, size = max(least.phases[phase].parts.items(), key=lambda item: item[1])
    ranks = "1 rank" if machine.world_size == 1 else f"each of {machine.world_size} ranks"
    reasons = [
        f"Nothing fits into {machine.device_memory / GIB:.1f} GiB on {ranks}.",
        f"The least that a rank can take is {least.peak_bytes / GIB:.1f} GiB, in phase {phase}, most of it {part} "
        f"({size / GIB:.1f} GiB); a margin of {MARGIN:.0%} is left for what the plan does not see.",
    ]
    if machine.host_memory is not None and least.host_bytes > (1 - MARGIN) * machine.host_memory:
        reasons.append(
            f"It offloads, which takes {least.host_bytes / GIB:.0f} GiB of a machine's own memory, and there are "
            f"{machine.host_memory / GIB:.0f} GiB."
        )
    return Recommendation(None, None, None, (*reasons, *_ways_out(planner, machine, fixed)))


class _Chosen(NamedTuple):
    planner: Planner
    plan: Plan
    sizes: Sizes


def _chosen(
    planner: Planner, machine: Machine, fixed: Mapping[str, Path], *, sizes: Literal["as set", "smallest", "halved"]
) -> _Chosen | None:
    """The cheapest that fits: rather with smaller micro-batches, then from sharded weights, then offloaded.

    Args:
        sizes: what is tried besides micro-batches as they are set: nothing, those of one row, or all halves.
    """
    as_set = Sizes.of(planner.config, world_size=machine.world_size)
    others = {"as set": [], "smallest": [_smallest(as_set)], "halved": _smaller(as_set)}[sizes]
    several = dict.fromkeys([as_set, *others])
    for offloaded, generating in product((False, True), (planner, _generating_sharded(planner))):
        for sizes in several:
            limit = (1 - MARGIN) * machine.device_memory
            for plan in _plans(generating, machine, fixed, sizes, offloaded=offloaded, limit=limit):
                if machine.holds(plan):
                    return _Chosen(generating, plan, sizes)
    return None


def _generating_sharded(planner: Planner) -> Planner:
    rollout = replace(planner.config.rollout, weights="sharded")
    return replace(planner, config=replace(planner.config, rollout=rollout))


def _plans(
    planner: Planner,
    machine: Machine,
    fixed: Mapping[str, Path],
    sizes: Sizes,
    *,
    offloaded: bool | None = None,
    limit: float = math.inf,
) -> Iterator[Plan]:
    """Under every sharding, the cheapest first.

    Args:
        offloaded: only those that offload some role, or none; all when not given.
        limit: bytes that the models alone may take; what takes more is left out, unmeasured.
    """
    options, states = {}, {}
    for role in planner.roles:
        costs = dict(TRAINED if role.trained else FROZEN)
        if role.trained and role.dtype.itemsize < 4:
            del costs["zero0"]  # it runs as stage 1
        if planner.device == "cpu":  # where offloading frees nothing: the host's memory is the device's
            costs = {name: cost for name, cost in costs.items() if not _offloads(Path(name))}
        files = {DS_CONFIGS / f"{name}.json": cost for name, cost in costs.items()}
        options[role.name] = {fixed[role.name]: 0} if role.name in fixed else files
        for file in options[role.name]:
            states[role.name, file] = planner.states(role, file, world_size=machine.world_size)
    ways = [dict(zip(options, files, strict=True)) for files in product(*options.values())]
    ways.sort(key=lambda way: sum(options[role][file] for role, file in way.items()))
    given = dict(world_size=machine.world_size, ranks_per_node=machine.ranks_per_node, sizes=sizes)
    for way in ways:
        of = {role: states[role, file] for role, file in way.items()}
        gathered = of["actor"].zero_stage == 3 and planner.config.rollout.weights == "gathered"
        whole = gathered * (of["actor"].whole_bytes - of["actor"].persistent_bytes)
        at_least = whole + sum(each.resident_bytes for each in of.values())
        wanted = offloaded is None or offloaded == any(_offloads(way[role]) for role in way.keys() - fixed.keys())
        if wanted and at_least <= limit:
            yield planner.plan_of(of, way, **given)


def _smaller(sizes: Sizes) -> Iterator[Sizes]:
    """Fewer rows at a time, halved until one is left."""
    while sizes.micro_batch_size > 1 or sizes.rollout_rows > 1:
        micro, rows = max(1, sizes.micro_batch_size // 2), max(1, sizes.rollout_rows // 2)
        sizes = replace(sizes, micro_batch_size=micro, rollout_rows=rows)
        yield sizes


def _smallest(sizes: Sizes) -> Sizes:
    return replace(sizes, micro_batch_size=1, rollout_rows=1)


def _offloads(file: Path) -> bool:
    return file.stem.endswith("offload")


def _reasons(
    planner: Planner, plan: Plan, sizes: Sizes, config: PPOConfig, machine: Machine, fixed: Mapping[str, Path]
) -> Iterator[str]:
    given = dict(world_size=machine.world_size, ranks_per_node=machine.ranks_per_node, sizes=sizes)
    limit = (1 - MARGIN) * machine.device_memory
    for role in planner.roles:
        file = plan.sharding[role.name]
        if role.name in fixed:
            yield f"{role.name}: {file.stem}, as the config says."
            continue
        costs = list(TRAINED if role.trained else FROZEN)
        cheaper = [name for name in costs[: costs.index(file.stem)] if name != "zero0" or role.dtype.itemsize == 4]
        cheaper = cheaper if role.trained else costs[: costs.index(file.stem)]
        if not cheaper:
            yield f"{role.name}: {_in_words(file)}, since all fits without sharding it further."
            continue
        other = planner.plan(dict(plan.sharding) | {role.name: DS_CONFIGS / f"{cheaper[-1]}.json"}, **given)
        phase = max(other.phases, key=lambda name: other.phases[name].peak_bytes)
        why = (
            f"{other.peak_bytes / GIB:.1f} GiB in phase {phase}, above {limit / GIB:.1f} GiB"
            if other.peak_bytes > limit
            else f"{other.host_bytes / GIB:.0f} GiB of the machine's own memory"
            if not machine.holds(other)
            else "no less, and other roles would have to be sharded at a higher cost"
        )
        yield f"{role.name}: {_in_words(file)}, since {_in_words(Path(cheaper[-1]))} would take {why}."
    if planner.config.rollout.weights != config.rollout.weights:
        yield (
            "Set --rollout.weights sharded, which generates slowly: the whole actor takes "
            f"{plan.roles['actor'].whole_bytes / GIB:.1f} GiB."
        )
    as_set = Sizes.of(config, world_size=machine.world_size)
    if sizes != as_set:
        yield (
            f"Set --micro_batch_size {sizes.micro_batch_size} --rollout.micro_batch_size {sizes.rollout_rows}: with "
            f"the config's {as_set.micro_batch_size} and {as_set.rollout_rows} rows at a time it does not fit."
        )
    if (unit := sizes.micro_batch_size * machine.world_size) and config.minibatch_size % unit:
        yield f"minibatch_size={config.minibatch_size} has to be a multiple of {unit} on {machine.world_size} ranks."
    yield (
        f"The peak is {readable(plan.peak_bytes)} of {readable(machine.device_memory)}; {MARGIN:.0%} are left for what "
        f"the plan does not see."
    )


def _in_words(file: Path) -> str:
    stage, _, offload = file.stem.removeprefix("zero").partition("_")
    return f"ZeRO {stage}" + (" with offload to the host" if offload else "")


def _ways_out(planner: Planner, machine: Machine, fixed: Mapping[str, Path]) -> Iterator[str]:
    """Changes after each of which the run would fit, or does not even then."""
    config: PPOConfig = planner.config
    trained = {role.name for role in planner.roles if role.trained}
    changes = {}
    if not all(getattr(config, role).gradient_checkpointing for role in trained):
        names = " and ".join(f"--{role}.gradient_checkpointing true" for role in sorted(trained))
        changes[names] = {role: replace(getattr(config, role), gradient_checkpointing=True) for role in trained}
    least = max(config.rollout.min_response_tokens, config.reward.overlong_tokens)
    halved = replace(config.rollout, max_response_tokens=max(least, -(-config.rollout.max_response_tokens // 2)))
    prompts = replace(config.data, max_prompt_tokens=-(-config.data.max_prompt_tokens // 2))
    fewer = f"--data.max_prompt_tokens {prompts.max_prompt_tokens} --rollout.max_response_tokens"
    changes[f"{fewer} {halved.max_response_tokens} (half the tokens)"] = {"rollout": halved, "data": prompts}
    if not config.actor.has_adapter:
        lora = SteadyLoRAConfig(r=16)
        names = " ".join(f"--{role}.lora.r 16" for role in sorted(trained))
        change = {role: replace(getattr(config, role), lora=lora) for role in trained}
        set_of_ref = [name for name in ("zero_stage", "ds_config", "quantization") if getattr(config.ref, name)]
        if config.ref.model_name_or_path is None and set_of_ref:  # the ref is then the actor, with nothing of its own
            change["ref"] = replace(config.ref, **dict.fromkeys(set_of_ref))
            names += f" without {' and '.join(f'ref.{name}' for name in set_of_ref)}"
        changes[f"{names} (LoRA)"] = change
    for names, change in changes.items():
        changed = Planner.of(replace(config, **change), device=planner.device)
        fits = _chosen(changed, machine, fixed, sizes="smallest") is not None
        yield f"It would fit with {names}." if fits else f"It would not fit with {names} alone."
    size = 2 * machine.world_size
    while size <= MORE_GPUS:
        if _chosen(planner, replace(machine, world_size=size), fixed, sizes="smallest") is not None:
            yield f"It would fit on {size} such GPUs."
            return
        size *= 2
    yield f"It would not fit on {MORE_GPUS} such GPUs either: take larger ones, a smaller model, or one of the above."
