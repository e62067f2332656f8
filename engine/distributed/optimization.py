"""Optimizer steps that all ranks and all engines take together, or not at all.

DeepSpeed 0.19's private names are used here: `optimizer.has_overflow`, and the gradient stores `averaged_gradients`
(ZeRO 1, 2), `grad_partitions_flat_buffer` (ZeRO 3) and `norm_for_param_grads` (either with offload).
`tests/distributed/test_optimization.py` holds them.
"""

import math
from collections.abc import Sequence

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from engine.distributed import comm
from engine.distributed.gather import shard_again, stay_whole
from engine.distributed.initialize import stage_of


def accumulate(engine: DeepSpeedEngine, loss: Tensor, *, last: bool) -> None:
    """Backward pass of one micro-batch; gradients add up until the one marked `last`, which reduces them over ranks.

    DeepSpeed averages gradients over ranks. A loss that is this rank's part of a sum over all ranks is therefore
    multiplied by the number of ranks here, so that the parts add up. A collective.
    """
    engine.set_gradient_accumulation_boundary(last)
    stay_whole(engine, not last)
    engine.backward(loss * comm.world_size(), scale_wrt_gas=False)
    if last:
        shard_again(engine)  # those too that the backward pass had no business with


def step_together(engines: Sequence[DeepSpeedEngine], *, healthy: bool) -> list[float] | None:
    """Step every engine, or, if any number is not finite on any rank, none of them.

    A collective.

    Args:
        engines: each with the gradients of its last micro-batch reduced.
        healthy: whether this rank's own losses were finite.

    Returns:
        The engines' global gradient norms before clipping; None when the step was skipped: gradients are then
        discarded, weights, optimizer states and schedules as they were.
    """
    # Both sides of each `and` hold collectives or agreed values: no rank may leave the others behind in one.
    finite = [_gradients_are_finite(engine) for engine in engines]
    if comm.all_true(healthy) and all(finite):
        return [_step(engine) for engine in engines]
    for engine in engines:
        _discard_gradients(engine)
    return None


def _step(engine: DeepSpeedEngine) -> float:
    if stage_of(engine) > 0:
        engine.step()
        return float(engine.get_global_grad_norm())
    norm = _whole_norm(engine)
    engine.step()
    return norm


def _gradients_are_finite(engine: DeepSpeedEngine) -> bool:
    if stage_of(engine) > 0:
        return not engine.optimizer.has_overflow()
    # One NaN or inf makes the norm one; asking every gradient takes ten times as long on a CPU. It is done where fp32
    # cannot hold the norm.
    finite = math.isfinite(_whole_norm(engine)) or all(
        parameter.grad.isfinite().all().item() for parameter in engine.module.parameters() if parameter.grad is not None
    )
    return comm.all_true(finite)


def _whole_norm(engine: DeepSpeedEngine) -> float:
    """Of the gradients of an engine at stage 0."""
    gradients = (p.grad for p in engine.module.parameters() if p.grad is not None)
    return torch.nn.utils.get_total_norm(gradients).item()


def _discard_gradients(engine: DeepSpeedEngine) -> None:
    """Leave it to DeepSpeed's own path for overflowed gradients, which every ZeRO optimizer takes on a NaN."""
    if stage_of(engine) == 0:
        engine.zero_grad()
        return
    optimizer = engine.optimizer
    if engine.zero_cpu_offload():  # the norm is taken while the gradients move to the CPU
        optimizer.norm_for_param_grads = dict.fromkeys(optimizer.norm_for_param_grads, torch.tensor(torch.nan))
    elif stage_of(engine) == 3:
        optimizer.grad_partitions_flat_buffer.fill_(torch.nan)
    else:
        for gradients in optimizer.averaged_gradients.values():
            for gradient in gradients:
                gradient.fill_(torch.nan)
    engine.step()
    if engine.was_step_applied():
        raise RuntimeError("DeepSpeed took a step with gradients that are not finite; this is a bug in the engine.")
