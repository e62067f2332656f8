"""The models of a run as the engine would build them, without their weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from engine.config import PPOConfig
from engine.memory_plan.model_shapes import model_config
from engine.memory_plan.passes import PassPeak, pass_peak
from engine.models.language_model import LanguageModel
from engine.models.loading import switch_dropout_off
from engine.models.lora import ADAPTER, LINEAR, REWARD_ADAPTER, add_adapter, is_adapter, with_adapter
from engine.models.quantization import BLOCK
from engine.models.scalar_head import ScalarHeadModel
from engine.models.shared_trunk import SharedTrunk

# Of a weight in NF4: half a byte, an 8-bit scale for each block, a fp32 scale for 256 of those.
NF4_BYTES = 0.5 + 1 / BLOCK + 4 / (256 * BLOCK)


@dataclass(frozen=True)
class Weight:
    """One parameter of a model."""

    elements: int
    bytes_each: float
    group: Literal["adapter", "matrix", "vector"] | None  # of the optimizer; None where it is not trained


@dataclass(frozen=True, kw_only=True)
class Role:
    """One model in memory."""

    name: str
    build: Callable[[], nn.Module] = field(repr=False)  # the wrapper module, on the meta device
    model: PreTrainedConfig = field(repr=False)
    head: Literal["language", "score"]
    trained: bool
    dtype: torch.dtype
    checkpointing: bool = False
    quantised: bool = False
    averaged: bool = False  # there is a moving average of its weights
    _passes: dict[Any, PassPeak] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """In the order in which the optimizer flattens them."""
        module = self.build()
        head = module.model.get_output_embeddings()
        packed = {
            id(part.weight)
            for part in module.model.base_model.modules()
            if self.quantised and isinstance(part, LINEAR) and part is not head
        }
        packed -= {id(p) for name, p in module.named_parameters() if is_adapter(name)}
        return tuple(
            Weight(
                elements=parameter.numel(),
                bytes_each=NF4_BYTES if id(parameter) in packed else self.dtype.itemsize,
                group=_group(name, parameter) if self.trained and parameter.requires_grad else None,
            )
            for name, parameter in module.named_parameters()
        )

    def pass_peak(self, **asked: Any) -> PassPeak:
        """What one pass takes, measured once; `asked` as for `engine.memory_plan.passes.pass_peak`."""
        key = tuple(sorted(asked.items()))
        if key not in self._passes:
            with torch.random.fork_rng(devices=[]):
                self._passes[key] = pass_peak(
                    self.build, checkpointing=self.checkpointing, dtype=self.dtype, head=self.head, **asked
                )
        return self._passes[key]


def roles_of(config: PPOConfig, *, dtype: torch.dtype) -> tuple[Role, ...]:
    """The models of a PPO run that are in memory, in the order in which they are built: actor, ref, critic, reward.

    Raises:
        ValueError: a model's sizes are not known.
    """
    given = dict(dtype=dtype)
    actor_model, actor = model_config(config.models["actor"]), config.actor
    of_actor = dict(
        name="actor",
        model=actor_model,
        head="language",
        trained=True,
        checkpointing=actor.gradient_checkpointing,
        quantised=actor.quantization is not None,
        averaged=config.ema_decay is not None,
        **given,
    )
    if config.shared_trunk:
        return (Role(build=partial(_on_meta, partial(_trunk, config, actor_model)), **of_actor),)
    roles = [Role(build=_builder(_language_model, actor_model, actor.adapter), **of_actor)]
    if not config.ref_is_the_actor:
        model, quantised = model_config(config.models["ref"]), config.ref.quantization is not None
        build = _builder(_language_model, model)
        roles.append(
            Role(name="ref", build=build, model=model, head="language", trained=False, quantised=quantised, **given)
        )
    if config.has_critic:
        model, critic = model_config(config.models["critic"]), config.critic
        roles.append(
            Role(
                name="critic",
                build=_builder(_scalar_model, model, critic.adapter),
                model=model,
                head="score",
                trained=True,
                checkpointing=critic.gradient_checkpointing,
                quantised=critic.quantization is not None,
                **given,
            )
        )
    if config.reward.model_name_or_path is not None:
        model, quantised = model_config(config.models["reward"]), config.reward.quantization is not None
        build = _builder(_scalar_model, model)
        roles.append(
            Role(name="reward", build=build, model=model, head="score", trained=False, quantised=quantised, **given)
        )
    return tuple(roles)


def _builder(build: Callable[[PreTrainedConfig], nn.Module], model: PreTrainedConfig, adapter: dict | None = None):
    build = partial(build, model)
    return partial(_on_meta, build if adapter is None else partial(with_adapter, build, seed=0, **adapter))


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return build()


def _language_model(model: PreTrainedConfig) -> LanguageModel:
    return LanguageModel(AutoModelForCausalLM.from_config(_as_loaded(model)))


def _scalar_model(model: PreTrainedConfig) -> ScalarHeadModel:
    model = _as_loaded(model)
    model.num_labels = 1
    return ScalarHeadModel(AutoModelForSequenceClassification.from_config(model))


def _as_loaded(model: PreTrainedConfig) -> PreTrainedConfig:
    """A copy with dropout off, as `load_pretrained` has it."""
    model = copy.deepcopy(model)
    switch_dropout_off(model)
    return model


def _trunk(config: PPOConfig, model: PreTrainedConfig) -> SharedTrunk:
    """As `load_shared_trunk` builds it; a reward adapter that is not there yet counts as large as the actor's."""
    trunk = _language_model(model).model
    add_adapter(trunk, **config.actor.adapter)
    width = trunk.get_output_embeddings().in_features
    value_head = nn.Linear(width, 1, bias=False) if config.has_critic else None
    if config.reward.model_name_or_path is None:
        return SharedTrunk(trunk, value_head=value_head)
    folder = Path(config.reward.model_name_or_path).expanduser()
    own = LoraConfig.from_pretrained(folder) if (folder / "adapter_config.json").is_file() else None
    form = trunk.__dict__.pop("peft_config")[ADAPTER]  # PEFT warns of a second adapter
    inject_adapter_in_model(form if own is None else own, trunk, REWARD_ADAPTER)
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(is_adapter(name) and f".{ADAPTER}." in name)
    return SharedTrunk(trunk, value_head=value_head, reward_head=nn.Linear(width, 1, bias=False).requires_grad_(False))


def _group(name: str, parameter: nn.Parameter) -> Literal["adapter", "matrix", "vector"]:
    """As `trained_engine` sorts them."""
    return "adapter" if is_adapter(name) else "matrix" if parameter.dim() > 1 else "vector"
