"""What leaves the shards for the disk: a plain Hugging Face folder that one process can load, or a PEFT one."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from deepspeed import DeepSpeedEngine
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from engine.distributed import comm
from engine.distributed.gather import gathered
from engine.distributed.moving_average import MovingAverage
from engine.models.adapter_folder import NORMALISATION, WEIGHTS, adapter_config, name_in_file
from engine.models.loading import exported_config, quiet_transformers
from engine.models.lora import adapted_layers, adapter_weights_of, is_adapter, merged_weight, name_without_adapter
from engine.models.quantization import unpacked
from engine.models.scalar_head import ScalarHeadModel, scoring_pad_token_id
from engine.models.shared_trunk import critic_of


def export_huggingface(
    engine: DeepSpeedEngine,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    form: Literal["merged", "adapter"] = "merged",
    average: MovingAverage | None = None,
) -> None:
    """Write an engine's transformers model to `folder`: safetensors in the training dtype, config, tokenizer.

    A collective: all ranks gather, one layer at a time, and rank 0 writes. The folder appears complete or not at all;
    one that was there before is replaced. The live model stays as it is.

    Args:
        form: of a model with an adapter. `merged` writes a plain model, the adapter added to weights that are
            unpacked if they have 4 bits; `adapter` a PEFT folder, which belongs to the model that training began with.
        average: takes the place of the weights that it has.

    Raises:
        ValueError: on every rank, when a weight is not finite.
    """
    model = engine.module.model
    with comm.same_error_everywhere():
        weights = _adapter_weights(model, average) if form == "adapter" else _whole_weights(model, average)
    with comm.same_error_everywhere():
        if comm.is_main():
            with _complete_or_absent(folder) as half_done:
                if form == "adapter":
                    _write_adapter(engine.module, weights, half_done)
                else:
                    _write_model(model, exported_config(model), weights, half_done)
                tokenizer.save_pretrained(half_done)


def export_critic_of_trunk(engine: DeepSpeedEngine, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a shared trunk's critic to `folder` as `export_huggingface` writes a critic of its own: a sequence
    classifier with one label, the adapter merged in. A collective.

    Raises:
        ValueError: on every rank, when a weight is not finite.
    """
    trunk = engine.module
    with comm.same_error_everywhere():
        weights = _whole_weights(trunk.model, None)
        with gathered([trunk.value_head.weight]):
            head = trunk.value_head.weight.detach().cpu().clone()
        _check_finite({"value_head.weight": head})
    with comm.same_error_everywhere():
        if comm.is_main():
            critic = critic_of(trunk.model, pad_token_id=scoring_pad_token_id(tokenizer))
            weights["score.weight"] = head
            weights = {name: weights[name] for name in critic.state_dict().keys() - set(critic.all_tied_weights_keys)}
            with _complete_or_absent(folder) as half_done:
                _write_model(critic, critic.config, weights, half_done)
                tokenizer.save_pretrained(half_done)


def _write_model(model: PreTrainedModel, config: PreTrainedConfig, weights: dict[str, Tensor], folder: Path) -> None:
    live_config, quantizer = model.config, getattr(model, "hf_quantizer", None)
    model.config, model.hf_quantizer = config, None  # the weights are unpacked
    try:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=weights)
    finally:
        model.config, model.hf_quantizer = live_config, quantizer


def _write_adapter(module: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    adapter_config(module.model).save_pretrained(folder)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    if isinstance(module, ScalarHeadModel):
        kept = {"score_mean": module.score_mean, "score_std": module.score_std}
        (folder / NORMALISATION).write_text(json.dumps(kept) + "\n")


@contextmanager
def _complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the other's place at the end of the block."""
    half_done, replaced = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".replaced"))
    shutil.rmtree(half_done, ignore_errors=True)
    half_done.mkdir(parents=True)
    yield half_done
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    half_done.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _whole_weights(model: PreTrainedModel, average: MovingAverage | None) -> dict[str, Tensor]:
    """Every saved tensor of the model, whole and on the CPU, on rank 0; an empty dictionary elsewhere. What an adapter
    or 4 bits have changed goes by the names and the shapes it had before. A collective.
    """
    # A tied weight is written once, under the name that transformers ties the others to: every class finds it there.
    saved = model.state_dict().keys() - set(model.all_tied_weights_keys)
    parameters = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if name in saved]
    adapted, whole = adapted_layers(model), {}
    for name, parameter in parameters:
        if is_adapter(name):
            continue
        layer = adapted.get(name)
        with _whole([parameter, *(adapter_weights_of(layer) if layer else ())], average):
            if comm.is_main():
                owner = model.get_submodule(name.rpartition(".")[0])
                weight = merged_weight(layer, dtype=model.dtype) if layer else unpacked(parameter, layer=owner)
                whole[name_without_adapter(name)] = weight.cpu().clone()
    if comm.is_main():
        _check_finite(whole)
        whole |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in saved}
    return whole


def _adapter_weights(model: PreTrainedModel, average: MovingAverage | None) -> dict[str, Tensor]:
    """What has been trained, by PEFT's names, whole and on the CPU, on rank 0. A collective."""
    whole = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        with _whole([parameter], average):
            if comm.is_main():
                whole[name_in_file(name)] = parameter.detach().cpu().clone()
    _check_finite(whole)
    return whole


@contextmanager
def _whole(parameters: list[nn.Parameter], average: MovingAverage | None) -> Iterator[None]:
    """Parameters whole, and holding their average where there is one, for reading, for the length of the block. A
    collective.
    """
    names = {} if average is None else {parameter: name for name, parameter in average.parameters.items()}
    means = {parameter: average.whole(names[parameter]) for parameter in parameters if parameter in names}
    with gathered(parameters):
        live = {parameter: parameter.data for parameter in means}
        for parameter, mean in means.items():
            parameter.data = mean.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, data in live.items():
                parameter.data = data


def _check_finite(weights: dict[str, Tensor]) -> None:
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ValueError(f"{len(broken)} weights are not finite, {broken[0]} the first. Nothing was written.")
