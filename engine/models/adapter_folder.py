"""An adapter in a folder of PEFT's: what the export writes, and a reward model's adapter read back into its base."""

import copy
import json
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from engine.models.linear_layers import use_fast_products
from engine.models.lora import ADAPTER, is_adapter

WEIGHTS = "adapter_model.safetensors"
NORMALISATION = "score_normalisation.json"  # a reward model's, which has no config to keep it in


def adapter_config(model: PreTrainedModel) -> LoraConfig:
    """What goes into an exported adapter_config.json; it says so where a scalar head lies beside the adapter."""
    config = copy.deepcopy(model.peft_config[ADAPTER])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and not is_adapter(name)]
    config.modules_to_save = sorted({name.rsplit(".", 1)[0] for name in trained}) or None
    config.task_type = "SEQ_CLS" if config.modules_to_save else "CAUSAL_LM"
    config.base_model_name_or_path, config.inference_mode = model.name_or_path, True
    return config


def name_in_file(parameter_name: str, *, adapter: str = ADAPTER) -> str:
    """What PEFT calls a parameter in its file: there its wrapper is part of the name, and the adapter's name is not."""
    return f"base_model.model.{parameter_name.replace(f'.{adapter}.', '.')}"


def score_normalisation(folder: Path) -> tuple[float, float]:
    """(mean, std) of a reward model's scores, to be taken out of them; 0 and 1 where none were kept."""
    path = folder / NORMALISATION
    kept = json.loads(path.read_text()) if path.is_file() else {"score_mean": 0.0, "score_std": 1.0}
    return kept["score_mean"], kept["score_std"]


def put_in_reward_adapter(model: PreTrainedModel, head: nn.Linear, folder: Path, *, name: str) -> None:
    """Add a reward model's adapter to its base, frozen and switched off, and its score head's weights to `head`.

    Args:
        model: the base, with an adapter to train.
        folder: written by reward-model training with `lora.export: adapter`.
        name: the adapter's, in the model.

    Raises:
        ValueError: there is no such folder, it holds no reward model's adapter, or one of another base.
    """
    if not ((folder / WEIGHTS).is_file() and (folder / "adapter_config.json").is_file()):
        raise ValueError(
            f"{folder} is no adapter. shared_trunk takes a reward model that was trained on the actor's model with "
            f"--lora.r 8 --lora.export adapter."
        )
    config, weights = LoraConfig.from_pretrained(folder), load_file(folder / WEIGHTS)
    base = model.name_or_path
    if not _same_model(config.base_model_name_or_path, base):
        raise ValueError(
            f"{folder} is an adapter of {config.base_model_name_or_path}, and the actor's model is {base}: on another "
            f"model its scores mean nothing. Train both on the same one."
        )
    score = weights.pop("base_model.model.score.weight", None)
    if score is None or score.shape != head.weight.shape:
        raise ValueError(f"{folder} holds no score head of {head.weight.shape[1]} weights: it is no reward model's.")
    config.modules_to_save, config.inference_mode = None, True
    trained = model.__dict__.pop("peft_config")  # PEFT warns of a second adapter
    inject_adapter_in_model(config, model, name)
    use_fast_products(model)
    model.peft_config = trained
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        layer.set_adapter(ADAPTER)
    ours = {name_in_file(key, adapter=name): p for key, p in model.named_parameters() if f".{name}." in key}
    if ours.keys() != weights.keys() or any(ours[key].shape != weights[key].shape for key in ours):
        raise ValueError(f"{folder} does not fit {base}: its weights have other names or shapes.")
    with torch.no_grad():
        head.weight.copy_(score)
        for key, parameter in ours.items():
            parameter.requires_grad_(False).copy_(weights[key])


def _same_model(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())
