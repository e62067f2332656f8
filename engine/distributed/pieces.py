"""What a rank holds of a trained engine: pieces of the fp32 weights and of AdamW's two moments.

A piece is a stretch of a weight laid flat. Where the stretches begin and end is a matter of the ZeRO stage and of the
number of ranks; the numbers in them are not. So what is kept by name and stretch can be given back to other ranks
under another stage.

DeepSpeed 0.19's private names are used here. ZeRO 1, 2: `_hp_mapping` of a parameter (where its stretch lies in the
optimizer's flat partition), `single_partition_of_fp32_groups` and `update_lp_params` of the optimizer. ZeRO 3:
`ds_tensor` and `partition_numel` of a parameter, `fp32_partitioned_groups_flat` and `persistent_parameters` of the
optimizer. `tests/distributed/test_pieces.py` holds them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from engine.distributed import comm
from engine.distributed.initialize import stage_of, whole_shape

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
Read = Callable[[str, str, int, int], Tensor]  # (weight's name, what of it, start, length) -> (length,) fp32


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of one weight, or of one of its moments."""

    name: str  # of the weight, as in `engine.module.named_parameters()`
    what: str  # WEIGHT, or one of MOMENTS
    start: int  # in the flattened weight
    size: int  # of the whole weight
    tensor: Tensor  # (n,) fp32


def steps_taken(engine: DeepSpeedEngine) -> int:
    """How many optimizer steps AdamW counts; skipped ones are none."""
    counts = {int(state["step"]) for state in _adamw(engine).state.values() if "step" in state}
    return max(counts, default=0)


def my_pieces(engine: DeepSpeedEngine) -> Iterator[Piece]:
    """This rank's share of all trained weights and, once a step was taken, of their moments. The ranks' shares are all
    there is, and hold nothing twice.
    """
    kept = (WEIGHT, *MOMENTS) if steps_taken(engine) else (WEIGHT,)
    for name, parameter in _trained(engine):
        size = math.prod(whole_shape(parameter))
        start, length = _share(engine, parameter)
        if length == 0:
            continue
        for what in kept:
            tensor = _held(engine, parameter, what)
            # Stage 0 holds the whole weight everywhere, stage 3 pads the last rank's stretch.
            tensor = tensor[start : start + length] if stage_of(engine) == 0 else tensor[:length]
            yield Piece(name=name, what=what, start=start, size=size, tensor=tensor)


@torch.no_grad()
def give_back(engine: DeepSpeedEngine, read: Read, *, steps: int) -> None:
    """Set weights, moments and AdamW's count of steps to what was kept; `tell_the_model` has to follow.

    Args:
        steps: as `steps_taken` said; without any there are no moments to read.
    """
    _adamw(engine).state.clear()
    if steps:
        _make_moments(engine, steps)
    for name, parameter in _trained(engine):
        start, length = _share(engine, parameter)
        if stage_of(engine) == 0:
            start, length = 0, parameter.numel()
        for what in (WEIGHT, *MOMENTS) if steps else (WEIGHT,):
            if length:
                _set(engine, parameter, what, read(name, what, start, length))


def tell_the_model(engine: DeepSpeedEngine) -> None:
    """The weights that the model computes with follow the master weights. A collective."""
    if stage_of(engine) in (1, 2):
        engine.optimizer.update_lp_params()
    if stage_of(engine) == 3 and (whole := engine.optimizer.persistent_parameters):  # small ones that stay gathered
        whole[0].partition(whole)
        whole[0].all_gather(whole)


def _trained(engine: DeepSpeedEngine) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _adamw(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    return engine.optimizer if stage_of(engine) == 0 else engine.optimizer.optimizer


def _share(engine: DeepSpeedEngine, parameter: nn.Parameter) -> tuple[int, int]:
    """(start, length) of this rank's stretch; of length 0 where it has none."""
    if stage_of(engine) in (1, 2):
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0
        return mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    size = math.prod(whole_shape(parameter))
    each = parameter.partition_numel() if stage_of(engine) == 3 else -(-size // comm.world_size())
    start = min(comm.rank() * each, size)
    return start, min(each, size - start)


def _held(engine: DeepSpeedEngine, parameter: nn.Parameter, what: str) -> Tensor:
    """(n,) fp32: this rank's numbers, live where they are kept in one place."""
    if stage_of(engine) == 3:
        if what == WEIGHT:
            return safe_get_local_fp32_param(parameter)
        return safe_get_local_optimizer_state(parameter, what)
    if stage_of(engine) == 0:
        tensor = parameter.detach() if what == WEIGHT else engine.optimizer.state[parameter][what]
        return tensor.view(-1)
    mapping = parameter._hp_mapping
    if what == WEIGHT:
        return mapping.hp_fragment.detach()
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    where = mapping.get_hp_fragment_address()
    return engine.optimizer.optimizer.state[flat][what].narrow(0, where.start, where.numel)


def _set(engine: DeepSpeedEngine, parameter: nn.Parameter, what: str, value: Tensor) -> None:
    if stage_of(engine) < 3:
        _held(engine, parameter, what).copy_(value)
        return
    padded = value.new_zeros(parameter.partition_numel())
    padded[: len(value)] = value
    if what == WEIGHT:
        safe_set_local_fp32_param(parameter, padded)
        parameter.ds_tensor.copy_(padded)
    else:
        safe_set_local_optimizer_state(parameter, padded, what)


def _make_moments(engine: DeepSpeedEngine, steps: int) -> None:
    """AdamW makes its state in its first step; a loaded one needs the room before."""
    adamw = _adamw(engine)
    for parameter in (p for group in _master_weights(engine) for p in group):
        state = adamw.state[parameter]
        for what in MOMENTS:
            state[what] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        # torch's fused AdamW counts in a float on the weights' device.
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)


def _master_weights(engine: DeepSpeedEngine) -> list[list[Tensor]]:
    """What AdamW steps: the weights themselves, or DeepSpeed's flat fp32 copies of this rank's part of them."""
    if stage_of(engine) == 0:
        return [group["params"] for group in engine.optimizer.param_groups]
    if stage_of(engine) == 3:
        return [engine.optimizer.fp32_partitioned_groups_flat]
    return [engine.optimizer.single_partition_of_fp32_groups]
