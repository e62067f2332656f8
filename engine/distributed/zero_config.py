"""The only place where a DeepSpeed config dictionary is made.

A file in `ds_configs/` says how memory is sharded and nothing else; every other number has its one home in the run's
config. DeepSpeed itself ignores a key it does not know, so the keys are checked here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

# Owned by the run's config: a file that names one of these would be a second home for the same number.
OWNED_BY_THE_RUN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "torch_autocast",
    "optimizer",
    "scheduler",
    "steps_per_print",
}
# What a sharding strategy consists of, in DeepSpeed 0.19.
STRATEGY = {"zero_optimization", "aio", "communication_data_type", "comms_logger", "wall_clock_breakdown"}


def training_config(path: Path, *, dtype: str, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed config of a trained model: the ZeRO strategy of `path` plus the run's own numbers.

    Gradient accumulation is not DeepSpeed's here: micro-batches are cut by tokens, so their number changes from step
    to step, and the trainer marks the last one itself.

    Raises:
        ValueError: the file is not JSON, names a key that DeepSpeed does not know or that the run's config owns.
    """
    strategy = _strategy(path)
    zero = strategy["zero_optimization"]
    if zero.get("stage", 0) == 0 and dtype != "float32":
        # In 16 bits the fp32 master weights need an owner; at stage 0 DeepSpeed has three different wrappers for
        # that, none of which can be asked for its gradients before the step. Stage 1 shards the master weights only.
        zero["stage"] = 1
    if "offload_optimizer" in zero:
        # The optimizer is torch's fused AdamW, vectorised on CPU too: no compiler needed at run time.
        strategy["zero_force_ds_cpu_optimizer"] = False
    return strategy | _common(dtype) | {"gradient_clipping": max_grad_norm, "zero_allow_untested_optimizer": True}


def frozen_config(path: Path, *, dtype: str) -> dict[str, Any]:
    """DeepSpeed config of a model without an optimizer: sharded at stage 3, whole on every rank otherwise.

    Raises:
        ValueError: as `training_config`.
    """
    strategy = _strategy(path)
    zero = strategy["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero.get("stage", 0) < 3:
        strategy["zero_optimization"] = {"stage": 0}
    return strategy | _common(dtype)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How DeepSpeed keeps a model in memory, its own defaults filled in.

    Attributes:
        bucket_elements: of gradients that are summed over ranks at a time, at most.
        buckets: so many of them there are at a time.
        live_elements: of weights that stay whole under ZeRO-3 while a pass goes through the layers, at most, but for
            one layer.
        kept_elements: a trained model of no more weights than these keeps them whole from one micro-batch of a step to
            the next (`stay_whole`).
        persistent_elements: a weight of no more than these is always whole under ZeRO-3.
        group_elements: under ZeRO-3, so many are stepped at a time.
    """

    stage: int
    optimizer_on_host: bool
    weights_on_host: bool
    bucket_elements: int
    buckets: int
    live_elements: int
    kept_elements: int
    persistent_elements: int
    group_elements: int


def sharding_of(config: dict[str, Any]) -> Sharding:
    """What a DeepSpeed config of `training_config` or `frozen_config` amounts to."""
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    on_host = {
        name: given is not None and given.device != "none"
        for name, given in {"optimizer": zero.offload_optimizer, "weights": zero.offload_param}.items()
    }
    return Sharding(
        stage=int(zero.stage),
        optimizer_on_host=on_host["optimizer"],
        weights_on_host=on_host["weights"],
        bucket_elements=zero.reduce_bucket_size,
        buckets=2 if zero.overlap_comm and zero.stage < 3 else 1,
        live_elements=zero.max_live_parameters + zero.prefetch_bucket_size,
        kept_elements=zero.max_live_parameters if zero.offload_param is None else 0,
        persistent_elements=zero.param_persistence_threshold,
        group_elements=zero.sub_group_size,
    )


def _common(dtype: Literal["float32", "bfloat16", "float16"]) -> dict[str, Any]:
    precision = {
        "float32": {},
        # DeepSpeed checks gradients for inf and NaN in fp16 only, unless told to.
        "bfloat16": {"bf16": {"enabled": True, "check_grad_overflow": True}},
        "float16": {"fp16": {"enabled": True}},
    }[dtype]
    return {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": None} | precision


def _strategy(path: Path) -> dict[str, Any]:
    try:
        strategy = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if clash := sorted(OWNED_BY_THE_RUN & strategy.keys()):
        raise ValueError(
            f"{path} sets {', '.join(clash)}. Files in ds_configs/ describe only how memory is sharded; "
            f"remove these keys and set the run's own flags of the same meaning."
        )
    if unknown := sorted(strategy.keys() - STRATEGY):
        raise ValueError(f"{path} sets {', '.join(unknown)}, unknown here. Known: {', '.join(sorted(STRATEGY))}.")
    zero = strategy.setdefault("zero_optimization", {"stage": 0})
    known = set(DeepSpeedZeroConfig.model_fields)
    known |= {field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias is not None}
    if unknown := sorted(zero.keys() - known):
        raise ValueError(f"{path} sets zero_optimization.{unknown[0]}, which DeepSpeed does not know. Is it misspelt?")
    return strategy
