"""Tokenizers and the transformers models behind every role, from a folder, a hub name or `random://`.

Dropout is off in every model of the engine: PPO compares log-probabilities of the same weights taken at different
moments, and noise between them would be read as a change of policy. The exported config gets its dropout back.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from engine.models.linear_layers import use_fast_products
from engine.models.quantization import quantization_config, settle_quantised
from engine.models.random_init import local_name

NOBODYS_CODE = {"trust_remote_code": False}  # what a model's folder holds of Python is not run, and nobody is asked


def load_tokenizer(
    model_name_or_path: str, *, chat_template: str | None = None, is_adapter: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding with its end-of-sequence token when it has no pad token of its own.

    Masks are made from lengths, so which token pads never matters.

    Args:
        is_adapter: it is a folder with an adapter, and not a model.
        chat_template: a file with a Jinja template that takes the place of the tokenizer's own, also when exported.

    Raises:
        ValueError: there is no such model or template, or the tokenizer has no end-of-sequence token.
    """
    folder = str(Path(model_name_or_path).expanduser()) if is_adapter else _found(model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **NOBODYS_CODE)
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer of {model_name_or_path} did not load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {model_name_or_path} has no end-of-sequence token: nothing could end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise ValueError(f"data.chat_template={chat_template}: there is no such file.")
        tokenizer.chat_template = Path(chat_template).read_text()
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id it knows. A model's embedding may have more rows, which stand for nothing."""
    return max(tokenizer.get_vocab().values()) + 1


def read_alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn a text into the same ids, and end it with the same one."""
    probe = "Hello, 1 wörld!\n"
    return (
        one.get_vocab() == other.get_vocab()
        and one.eos_token_id == other.eos_token_id
        and one(probe)["input_ids"] == other(probe)["input_ids"]  # with whatever each puts before and after
    )


def load_pretrained(
    auto_class: type,
    model_name_or_path: str,
    *,
    dtype: torch.dtype,
    quantization: Literal["nf4"] | None = None,
    **overrides,
) -> PreTrainedModel:
    """A transformers model with dropout off.

    It carries three attributes more: `missing_from_checkpoint` lists the weights that had to be made up,
    `saved_architectures` the class names it was saved under, `dropout_before_training` the switched-off dropouts.

    Args:
        auto_class: `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.
        quantization: of the backbone's linear layers, which then cannot be trained; None leaves them in `dtype`.
        overrides: fields of the model's config to set.

    Raises:
        ValueError: there is no such model, it is not of this class, or it cannot be quantised here.
    """
    folder, config = _found(model_name_or_path), model_config(model_name_or_path, **overrides)
    saved_architectures, dropout = config.architectures, switch_dropout_off(config)
    given = {"quantization_config": quantization_config(quantization, dtype=dtype)} if quantization else {}
    try:
        with quiet_transformers():
            model, report = auto_class.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, **NOBODYS_CODE, **given
            )
    except (OSError, SafetensorError) as error:  # no weights, or half of a file
        raise ValueError(f"The weights of {model_name_or_path} did not load: {error}") from error
    settle_quantised(model)
    use_fast_products(model)
    model.missing_from_checkpoint = sorted(report["missing_keys"] - set(model.all_tied_weights_keys))
    model.saved_architectures, model.dropout_before_training = saved_architectures, dropout
    return model


def model_config(model_name_or_path: str, **overrides) -> PreTrainedConfig:
    """The config of a model, without its weights.

    Args:
        overrides: fields to set.

    Raises:
        ValueError: there is no such model.
    """
    try:
        return AutoConfig.from_pretrained(_found(model_name_or_path), **NOBODYS_CODE, **overrides)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model_name_or_path} is neither a model folder nor a known hub name: {error}") from error


def number_of_labels(model_name_or_path: str) -> int | None:
    """Outputs of a saved sequence classifier; None for a model of another kind.

    Raises:
        ValueError: there is no such model.
    """
    config = model_config(model_name_or_path)
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    return config.num_labels if is_classifier else None


def fingerprint(model_name_or_path: str) -> list[tuple[str, ...]]:
    """Another one where the weights are others: (file, bytes, time of the last change) of every file of a folder;
    (name, commit) of a model from the hub, whose files need not be here yet.

    Raises:
        ValueError: there is no such model.
    """
    folder = _found(model_name_or_path)
    if Path(folder).is_dir():
        files = sorted(path for path in Path(folder).iterdir() if path.is_file())
        return [(str(path), str(path.stat().st_size), str(path.stat().st_mtime_ns)) for path in files]
    try:
        return [(folder, Path(cached_file(folder, "config.json")).parent.name)]  # .../snapshots/COMMIT/config.json
    except OSError as error:
        raise ValueError(f"{model_name_or_path} is neither a model folder nor a known hub name: {error}") from error


def content_digest(model_name_or_path: str) -> str:
    """Another one where the weights are others, wherever they lie: of the beginnings of all tensors of a folder, and of
    its settings; of the name and commit of a model from the hub.

    Raises:
        ValueError: there is no such model.
    """
    folder, digest = Path(local_name(model_name_or_path)).expanduser(), hashlib.blake2b(digest_size=16)
    if not folder.is_dir():
        digest.update(repr(fingerprint(model_name_or_path)).encode())
        return digest.hexdigest()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json")):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            for start, length in _to_be_read(path):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def _to_be_read(path: Path) -> list[tuple[int, int]]:
    """(start, length) of what tells a file of weights from another: all of it where it is small or no safetensors."""
    size = path.stat().st_size
    if path.suffix != ".safetensors" or size < 2**20:
        return [(0, size)]
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(header))
    starts = sorted(of["data_offsets"][0] for name, of in tensors.items() if name != "__metadata__")
    return [(0, 8 + header), *((8 + header + start, 2**14) for start in starts)]


def restore_rope(model: nn.Module) -> None:
    """Put every rotary embedding's frequencies back to fp32.

    `.to(bfloat16)` rounds `inv_freq` to bf16 (4e-3 relative), which shifts every position. DeepSpeed 0.19.8
    casts parameters only and leaves such buffers alone; this does not rely on it.
    """
    for module in model.modules():
        frequencies = {name: buffer for name, buffer in module.named_buffers(recurse=False) if "inv_freq" in name}
        if not frequencies:
            continue
        fresh = dict(type(module)(config=module.config).named_buffers(recurse=False))
        for name, rounded in frequencies.items():
            setattr(module, name, fresh[name].to(rounded.device, torch.float32))


def exported_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config to save: dropout as it was before training, the KV cache on, weights that are not quantised."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    for name, value in model.dropout_before_training.items():
        setattr(config, name, value)
    config.use_cache = True
    return config


def _found(model_name_or_path: str) -> str:
    folder = local_name(model_name_or_path)
    looks_local = folder.startswith((".", "/", "~")) or folder.count("/") > 1
    if looks_local and (Path(folder).expanduser() / "adapter_config.json").is_file():
        raise ValueError(
            f"{model_name_or_path} is an adapter, not a model: start from one that lora.export=merged has written."
        )
    if looks_local and not (Path(folder).expanduser() / "config.json").is_file():
        raise ValueError(f"{model_name_or_path}: no such model folder (there is no config.json in it).")
    return str(Path(folder).expanduser()) if looks_local else folder


def switch_dropout_off(config: PreTrainedConfig) -> dict[str, float]:
    """Set every dropout of a config to 0.

    Returns:
        What they were, by name.
    """
    names = [name for name in config.to_dict() if "dropout" in name or "pdrop" in name or name == "layerdrop"]
    before = {name: getattr(config, name) for name in names if isinstance(getattr(config, name, None), float)}
    for name in before:
        setattr(config, name, 0.0)
    return before


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, which are lines in a log, and no report on keys: the caller judges what is missing."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
