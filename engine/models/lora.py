"""A low-rank adapter (LoRA) in a transformers model: put in, switched off, merged.

Hu et al. 2021, https://arxiv.org/abs/2106.09685; on weights of 4 bits Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314. The layers are PEFT's, put into the model in place: it stays the class it was,
with the same `base_model`, head and config, so that nothing else in the engine has to know.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.models.linear_layers import use_fast_products
from engine.models.quantization import keeps_transposed, unpacked
from engine.models.scalar_head import ScalarHeadModel

ADAPTER = "default"  # PEFT's name for a model's only adapter, and here for the one that is trained
REWARD_ADAPTER = "reward"  # a shared trunk's second one, frozen
LINEAR = (nn.Linear, Conv1D)


def with_adapter(build_model: Callable[[], nn.Module], *, seed: int, **form) -> nn.Module:
    """The wrapper module that `build_model` makes, with its model frozen but for a new adapter and a scalar head.

    Args:
        seed: of the adapter's first weights, the same on every rank.
        form: what `add_adapter` takes besides.
    """
    module = build_model()
    torch.manual_seed(seed)
    add_adapter(module.model, **form)
    if isinstance(module, ScalarHeadModel):
        module.model.score.requires_grad_(True)
    return module


def add_adapter(
    model: PreTrainedModel, *, r: int, alpha: float, dropout: float, target_modules: Sequence[str] | None
) -> None:
    """Put W x + alpha / r * B A x in the place of W x, in place. B begins at 0, so the model computes what it did.

    Args:
        target_modules: names of linear layers of the backbone, or ends of their dotted names; all when None.

    Raises:
        ValueError: a name matches no linear layer of the backbone.
    """
    backbone = {id(module) for module in model.base_model.modules()}
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and id(module) in backbone and module is not model.get_output_embeddings()
    }
    candidates = sorted({name.split(".")[-1] for name in linear})
    for target in target_modules or ():
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise ValueError(
                f"lora.target_modules: {target} is no linear layer of the backbone of {type(model).__name__}. "
                f"There are {', '.join(candidates)}; without lora.target_modules all of them are adapted."
            )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules or candidates),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    inject_adapter_in_model(config, model, ADAPTER)
    use_fast_products(model)


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in parameter_name or ".lora_B." in parameter_name


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapter for the length of the block: what it computed before `add_adapter`."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def adapter_on(model: nn.Module, name: str) -> Iterator[None]:
    """The model with another adapter in the place of the trained one, frozen, for the length of the block."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_adapter(ADAPTER)


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by the names of the parameters that they adapt, as in `model.named_parameters()`."""
    return {
        f"{name}.base_layer.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A  # and not a shared trunk's reward adapter alone
    }


def name_without_adapter(parameter_name: str) -> str:
    """What a parameter is called in the model as it was before `add_adapter`."""
    return parameter_name.replace(".base_layer.", ".")


def adapter_weights_of(layer: LoraLayer) -> list[nn.Parameter]:
    """(r, inputs) and (outputs, r): A and B."""
    return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]


@torch.no_grad()
def merged_weight(layer: LoraLayer, *, dtype: torch.dtype) -> Tensor:
    """W + alpha / r * B A, added up in fp32, as a new tensor; W, A and B have to be whole."""
    base = layer.get_base_layer()
    whole = unpacked(base.weight, layer=base)
    a, b = (weight.float() for weight in adapter_weights_of(layer))
    change = layer.scaling[ADAPTER] * (b @ a)
    return (whole.float() + (change.T if keeps_transposed(base) else change)).to(dtype)
