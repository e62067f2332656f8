"""What leaves the shards for the disk: a plain Hugging Face folder that one process can load."""

import shutil
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.distributed import comm
from engine.distributed.gather import gathered
from engine.distributed.moving_average import MovingAverage
from engine.models.loading import exported_config


def export_huggingface(
    engine: DeepSpeedEngine,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    average: MovingAverage | None = None,
) -> None:
    """Write an engine's transformers model to `folder`: safetensors in the training dtype, config, tokenizer.

    A collective: all ranks gather, one parameter at a time, and rank 0 writes. The folder appears complete or not at
    all; one that was there before is replaced.

    Args:
        average: written in place of the weights that it has.

    Raises:
        ValueError: on every rank, when a weight is not finite.
    """
    model = engine.module.model
    with comm.same_error_everywhere():
        weights = _whole_weights(model, average)
    with comm.same_error_everywhere():
        if comm.is_main():
            half_done = folder.with_name(folder.name + ".partial")
            shutil.rmtree(half_done, ignore_errors=True)
            live_config, model.config = model.config, exported_config(model)
            try:
                model.save_pretrained(half_done, state_dict=weights)
            finally:
                model.config = live_config
            tokenizer.save_pretrained(half_done)
            replaced = folder.with_name(folder.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
            half_done.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)


def _whole_weights(model: torch.nn.Module, average: MovingAverage | None) -> dict[str, Tensor]:
    """Every saved tensor of the model, whole and on the CPU, on rank 0; an empty dictionary elsewhere. A collective."""
    whole: dict[str, Tensor] = {}
    # A tied weight is written once, under the name that transformers ties the others to: every class finds it there.
    saved = model.state_dict().keys() - set(model.all_tied_weights_keys)
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in saved}
    broken: list[str] = []
    averaged = {} if average is None else {id(p): name for name, p in average.parameters.items()}
    for name, parameter in parameters.items():
        mean = average.whole(averaged[id(parameter)]).to(parameter.dtype) if id(parameter) in averaged else None
        with gathered([parameter]):
            if comm.is_main():
                whole[name] = (parameter.detach() if mean is None else mean).cpu().clone()
                if not whole[name].isfinite().all():
                    broken.append(name)
    if comm.is_main():
        whole |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in saved}
        if broken:
            raise ValueError(f"{len(broken)} weights are not finite, {broken[0]} the first. Nothing was written.")
    return whole
