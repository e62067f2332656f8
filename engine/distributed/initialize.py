"""Models built straight into shards and wrapped as DeepSpeed engines: every role is either trained or frozen.

`models/` never hears of DeepSpeed: a role hands over a function that builds its model, and the context that shards
parameters while they are made is put round it here.
"""

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger as deepspeed_logger
from torch import nn
from transformers import get_scheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from engine.distributed.comm import device
from engine.distributed.zero_config import frozen_config, training_config
from engine.models.loading import restore_rope
from engine.models.lora import REWARD_ADAPTER, adapter_off, adapter_on, is_adapter
from engine.models.modes import checkpoint_activations, eval_mode
from engine.models.quantization import is_quantised

Engine = DeepSpeedEngine  # what the upper layers hold; they do not import deepspeed

# DeepSpeed narrates every engine it makes; what matters of it is in the run's own banner.
deepspeed_logger.setLevel(logging.WARNING)


def trained_engine(
    build_model: Callable[[], nn.Module],
    *,
    ds_config: Path,
    dtype: Literal["float32", "bfloat16", "float16"],
    learning_rate: float,
    lr_scheduler: str,
    warmup_steps: int,
    total_steps: int,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
    max_grad_norm: float,
    gradient_checkpointing: bool,
    adapter_learning_rate: float | None = None,
) -> DeepSpeedEngine:
    """A model with AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) and a learning-rate schedule.

    A collective.

    Args:
        build_model: makes the wrapper module; its `.model` is the transformers model. What requires no gradient stays
            as it is.
        weight_decay: of matrices; vectors (norms, biases) have none.
        total_steps: optimizer steps until the schedule ends.
        adapter_learning_rate: of an adapter's weights, where there are any; `learning_rate` when not given.
    """
    config = training_config(ds_config, dtype=dtype, max_grad_norm=max_grad_norm)
    module = _built(build_model, config)
    _fit_buckets(config, elements=sum(math.prod(whole_shape(p)) for p in module.parameters() if p.requires_grad))
    if gradient_checkpointing:
        checkpoint_activations(module)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    adapter = [p for name, p in trained if is_adapter(name)]
    decayed = [p for name, p in trained if not is_adapter(name) and _rank(p) > 1]
    others = [p for name, p in trained if not is_adapter(name) and _rank(p) <= 1]
    adapter_learning_rate = learning_rate if adapter_learning_rate is None else adapter_learning_rate
    groups = [
        {"params": adapter, "weight_decay": weight_decay, "lr": adapter_learning_rate},
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # DeepSpeed drops an empty one, and the schedule misses it
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)
    # transformers' "constant" has no warm-up.
    lr_scheduler = "constant_with_warmup" if lr_scheduler == "constant" else lr_scheduler
    scheduler = get_scheduler(lr_scheduler, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    restore_rope(engine.module)
    return engine


class Switched:
    """A trained engine with its adapter changed over, in the place of a frozen one, at no cost in memory.

    It is asked in eval mode and without gradients, and leaves the engine as it was.
    """

    def __init__(self, engine: DeepSpeedEngine, switch: Callable[[nn.Module], AbstractContextManager]):
        """
        Args:
            switch: another adapter, or none, for the length of a block.
        """
        self.engine, self.switch = engine, switch
        self.switched = False

    @property
    def module(self) -> nn.Module:
        """The wrapper module, with the adapter that is trained."""
        return self.engine.module

    def eval(self) -> None:
        """Nothing: the mode is the trained engine's."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Changed over for the length of the block, and not anew for each of its forward passes. Within it the engine
        itself answers so too.
        """
        with eval_mode(self.module), self.switch(self.module):
            self.switched = True
            try:
                yield
            finally:
                self.switched = False

    @torch.no_grad()
    def __call__(self, *args, **kwargs) -> Any:
        """A forward pass; a collective under ZeRO-3."""
        with nullcontext() if self.switched else self.held():
            return self.engine(*args, **kwargs)


class WithoutAdapter(Switched):
    """The model that training began with."""

    def __init__(self, engine: DeepSpeedEngine):
        super().__init__(engine, adapter_off)


class WithRewardAdapter(Switched):
    """The reward model of a shared trunk, which answers with scores where it is asked for no targets."""

    def __init__(self, engine: DeepSpeedEngine):
        super().__init__(engine, partial(adapter_on, name=REWARD_ADAPTER))


def frozen_engine(build_model: Callable[[], nn.Module], *, ds_config: Path, dtype: str) -> DeepSpeedEngine:
    """A model without gradients, optimizer or a second copy of its weights. A collective."""
    config = frozen_config(ds_config, dtype=dtype)
    module = _built(build_model, config)
    module.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    restore_rope(engine.module)
    engine.eval()
    return engine


def free(engine: DeepSpeedEngine) -> None:
    """Give back a frozen engine's weights. It cannot be used any more.

    DeepSpeed 0.19 keeps the shards of a ZeRO-3 module alive after `destroy`: its hooks and a cached method of its
    parameter coordinator hold them. So they are emptied here.
    """
    parameters = list(engine.module.parameters())
    engine.destroy()
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def set_training(engine: DeepSpeedEngine) -> None:
    """Training mode. An engine that is in it already is not walked through, as in `eval_mode`."""
    if not (engine.training and engine.module.training):
        engine.train()


def set_learning_rates(engine: DeepSpeedEngine, *, schedule_step: int, factor: float) -> None:
    """Those of a schedule's step, times a factor from now on.

    Args:
        factor: on the rates that the engine was made with.
    """
    schedule = engine.lr_scheduler
    schedule.last_epoch = schedule_step
    groups = schedule.optimizer.param_groups
    schedule.base_lrs = [factor * group["initial_lr"] for group in groups]
    for group, base, shape in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * shape(schedule_step)


def stage_of(engine: DeepSpeedEngine) -> int:
    """The ZeRO stage an engine runs at."""
    return engine.zero_optimization_stage()


def parameter_counts(engine: DeepSpeedEngine) -> tuple[int, int]:
    """Of the whole model, and of what of it is trained."""
    counts = [
        (math.prod(whole_shape(p)) * (2 if is_quantised(p) else 1), p.requires_grad) for p in engine.module.parameters()
    ]
    return sum(count for count, _ in counts), sum(count for count, trained in counts if trained)


def parameter_bytes_here(engine: DeepSpeedEngine) -> int:
    """What of the weights this rank holds."""
    held = (getattr(p, "ds_tensor", p) for p in engine.module.parameters())  # ds_tensor: DeepSpeed's ZeRO-3 shard
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def parameter_bytes(engine: DeepSpeedEngine) -> int:
    """What the whole model takes; a byte holds two weights of 4 bits."""
    return sum(math.prod(whole_shape(p)) * p.element_size() for p in engine.module.parameters())


def _built(build_model: Callable[[], nn.Module], config: dict[str, Any]) -> nn.Module:
    with _parameters_sharded_as_made(config):
        module = build_model()
    if config["zero_optimization"].get("stage", 0) == 3:
        # DeepSpeed finds out by itself in a pass in which such a weight is a shard. If it is whole in the first one, as
        # small weights are after a checkpoint is loaded, the order of gathers that it notes down is without it.
        for parameter in (p for head in module.heads_it_reads for p in head.parameters()):
            deepspeed.zero.register_external_parameter(module, parameter)
    return module.to(device())


@contextmanager
def _parameters_sharded_as_made(config: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, parameters become shards the moment a module is made, and rank 0 streams the checkpoint in.

    transformers looks for a living HfDeepSpeedConfig in `from_pretrained`, and enters `deepspeed.zero.Init` itself.
    """
    if config["zero_optimization"].get("stage", 0) < 3:
        yield
        return
    switch = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del switch


def _fit_buckets(config: dict[str, Any], *, elements: int) -> None:
    """Let DeepSpeed allocate no more for sums between ranks than there are gradients: its buckets hold half a billion
    elements, whatever the model's size. Nothing is added up in another order.

    Args:
        elements: that are trained.
    """
    zero = config["zero_optimization"]
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        given = zero.get(name, DeepSpeedZeroConfig.model_fields[name].default)
        zero[name] = max(2, min(int(given), elements + elements % 2))  # DeepSpeed takes even ones only


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A weight's own, also where a rank holds a shard of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: DeepSpeed's, on a ZeRO-3 shard


def _rank(parameter: nn.Parameter) -> int:
    return len(whole_shape(parameter))
