"""Whole weights out of ZeRO-3 shards, for the length of a block.

DeepSpeed 0.19's private names are used here: `engine.optimizer.parameter_offload`, or of a frozen engine
`engine.optimizer` itself (the owner of ZeRO-3's module hooks), its `fwd_pre_hook`, `forward_hooks`, `backward_hooks`
and `partition_all_parameters`; and a parameter's `ds_active_sub_modules`, which keep it whole.
`tests/distributed/test_gather.py` holds them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.distributed import comm
from engine.distributed.initialize import Switched, parameter_bytes, stage_of
from engine.models.modes import eval_mode

NO_MODULE = -1  # among the numbers of modules


@contextmanager
def gathered_for_generation(engine: DeepSpeedEngine) -> Iterator[nn.Module]:
    """The engine's module, whole and in eval mode, for the length of the block; sharded and as before afterwards.

    Under ZeRO-3 a gather alone lasts one forward pass: the hooks shard every layer again as it finishes. So the hooks
    come off inside the block and go back on the way out. One all-gather per parameter per block, none per token.

    A collective: every rank must enter, and every rank must leave.

    Raises:
        ValueError: on every rank, when the whole model does not fit into the memory that is free.
    """
    if stage_of(engine) == 3:
        _check_it_fits(engine)
    with eval_mode(engine.module), _unsharded(engine) if stage_of(engine) == 3 else nullcontext():
        yield engine.module


@contextmanager
def sharded_for_generation(engine: DeepSpeedEngine) -> Iterator[nn.Module]:
    """The engine's module in eval mode, left in its shards: each layer is gathered anew in every forward pass.

    Needs no memory beyond a layer's, but all ranks have to call forward equally often.
    """
    with eval_mode(engine.module), left_in_shards(engine):
        yield engine.module


@contextmanager
def gathered_for_scoring(*engines: DeepSpeedEngine | Switched, gather: bool = True) -> Iterator[None]:
    """The engines' weights, whole for the length of a block of forward passes without gradients: one all-gather per
    parameter per block, and none per pass. Where a model would take more than half of the memory that is free on some
    rank it is left in its shards: activations need room too.

    A collective: every rank must enter, and every rank must leave.

    Args:
        gather: False leaves all of them in their shards.
    """
    own = {id(engine): engine for engine in (e.engine if isinstance(e, Switched) else e for e in engines)}
    with ExitStack() as entered:
        for engine in own.values():
            if stage_of(engine) == 3:
                fits = gather and 2 * parameter_bytes(engine) <= _least_free()
                entered.enter_context(_unsharded(engine) if fits else left_in_shards(engine))
        yield


@contextmanager
def left_in_shards(engine: DeepSpeedEngine) -> Iterator[None]:
    """A block of forward passes alone, after which every weight is a shard again. By themselves they leave some whole
    or on their way: DeepSpeed gathers ahead, for the backward pass that came next when the engine was trained.
    """
    yield
    shard_again(engine)


def stay_whole(engine: DeepSpeedEngine, stay: bool) -> None:
    """Whether weights that a trained engine has whole under ZeRO-3 in its next backward pass stay whole afterwards, for
    one more forward pass. They do not where DeepSpeed's `stage3_max_live_parameters` has no room for all of them, nor
    where they live in host memory.
    """
    if stage_of(engine) != 3 or engine.zero_offload_param() is not None:
        return
    parameters = list(engine.module.parameters())
    if sum(parameter.ds_numel for parameter in parameters) > engine.zero_max_live_parameters():
        return
    for parameter in parameters:
        (parameter.ds_active_sub_modules.add if stay else parameter.ds_active_sub_modules.discard)(NO_MODULE)


def shard_again(engine: DeepSpeedEngine) -> None:
    """Under ZeRO-3, let go of all weights that are whole or on their way. Not a collective."""
    if stage_of(engine) == 3:
        _owner_of_hooks(engine).partition_all_parameters()


def gathered(parameters: Iterable[nn.Parameter]):
    """These parameters whole, for reading, for the length of the block; no-op for parameters that are whole already.

    A collective under ZeRO-3.
    """
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext()


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this rank holds only its ZeRO-3 shard of the parameter right now."""
    return hasattr(parameter, "ds_id") and parameter.numel() == 0


@contextmanager
def _unsharded(engine: DeepSpeedEngine) -> Iterator[None]:
    zero3 = _owner_of_hooks(engine)
    shard_again(engine)  # what is on its way would be left out
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        with _lifted([zero3.fwd_pre_hook, *zero3.forward_hooks, *zero3.backward_hooks]):
            yield


def _owner_of_hooks(engine: DeepSpeedEngine) -> DeepSpeedZeRoOffload:
    owner = engine.optimizer  # of a frozen engine, the owner itself
    return owner if isinstance(owner, DeepSpeedZeRoOffload) else owner.parameter_offload


@contextmanager
def _lifted(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """These hooks off for the length of the block, and back in their places afterwards. To DeepSpeed nothing has
    happened: with hooks that are registered anew it would forget the order that it gathers layers in ahead of time,
    and gather the weights of the next pass one by one.
    """
    tables = {id(table): table for table in (hook.hooks_dict_ref() for hook in hooks)}
    before = [(table, dict(table)) for table in tables.values()]
    lifted = {hook.id for hook in hooks}
    for hook in hooks:
        del hook.hooks_dict_ref()[hook.id]
    try:
        yield
    finally:
        for table, all_of_them in before:
            now = dict(table)
            kept = {number: hook for number, hook in all_of_them.items() if number in lifted or number in now}
            table.clear()
            table.update(kept | now)


def _check_it_fits(engine: DeepSpeedEngine) -> None:
    needed, least = parameter_bytes(engine), _least_free()
    if needed >= least:
        raise ValueError(
            f"The whole actor takes {needed / 2**30:.1f} GiB on every rank during generation, and one rank has only "
            f"{least / 2**30:.1f} GiB free. Set --rollout.weights sharded to generate from the shards, slower; or use "
            f"more GPUs, or a smaller rollout.micro_batch_size."
        )


def _least_free() -> float:
    """Bytes free on the rank that has the least. A collective."""
    return -comm.max_over_ranks(-comm.free_memory())
