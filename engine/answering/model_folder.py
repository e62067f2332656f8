"""What a user calls a model: an exported folder, an adapter's, a run's, or a hub name."""

import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.models.language_model import load_language_model
from engine.models.loading import load_tokenizer, number_of_labels

ADAPTER_CONFIG = "adapter_config.json"


def model_folder(name: str) -> str:
    """The folder with the model that a name stands for: of a run, its actor's or its model's; of a hub name, itself.

    Raises:
        ValueError: there is no such folder, or no language model in it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        looks_local = folder.is_absolute() or name.startswith(".") or folder.is_file()
        if looks_local or (folder.parent != Path() and folder.parent.is_dir()):
            raise ValueError(f"{name}: there is no such folder. Name an exported model's, or a run's.")
        return name
    for candidate in (folder, folder / "actor", folder / "model"):
        if any((candidate / config).is_file() for config in ("config.json", ADAPTER_CONFIG)):
            return str(candidate)
    if (folder / "reward").is_dir():
        raise _writes_no_text(name)
    if (folder / "config.yaml").is_file():
        raise ValueError(f"{name} is the folder of a run that has exported no model: it does so at its end.")
    raise ValueError(f"{name} holds no model: there is no config.json in it, and no actor/ or model/ of a run.")


def load_for_answering(
    folder: str, *, dtype: torch.dtype, chat_template: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model on the CPU in eval mode, an adapter merged into its base, and its tokenizer.

    Args:
        folder: as `model_folder` returns it.

    Raises:
        ValueError: it is a reward model or a critic, or it does not load.
    """
    path = Path(folder)
    if not (path / ADAPTER_CONFIG).is_file():
        if number_of_labels(folder) is not None:
            raise _writes_no_text(folder)
        model = load_language_model(folder, dtype=dtype).model.eval()
        return model, load_tokenizer(folder, chat_template=chat_template)
    try:
        settings = json.loads((path / ADAPTER_CONFIG).read_text())
        base = str(settings["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / ADAPTER_CONFIG} names no base model: {error!r}.") from error
    if settings.get("task_type") == "SEQ_CLS":
        raise _writes_no_text(folder)
    try:
        model = load_language_model(base, dtype=dtype).model.eval()
    except ValueError as error:
        raise ValueError(f"{folder} is an adapter of {base}, which does not load: {error}") from error
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder if has_tokenizer else base, chat_template=chat_template, is_adapter=has_tokenizer)
    return _with_adapter(model, folder, base), tokenizer


def _with_adapter(model: PreTrainedModel, folder: str, base: str) -> PreTrainedModel:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT would leave them at zero
            return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
    except (ValueError, RuntimeError, OSError, SafetensorError, UserWarning) as error:  # PEFT raises many kinds
        said = str(error).splitlines()[0][:200]
        raise ValueError(f"{folder} is an adapter that does not fit {base} or does not load: {said}") from error


def _writes_no_text(name: str) -> ValueError:
    return ValueError(
        f"{name} is a reward model, a critic or another classifier: it gives numbers and writes no text. Name an actor."
    )
