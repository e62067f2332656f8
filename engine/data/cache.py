"""Tokenised rows kept between runs, and made once per node however many ranks start together."""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

VERSION = 1  # of what is kept: to be raised when the same rows come to be tokenised in another way


def kept_tensors(key: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `make` returns, from the cache where they have been made before.

    The first process of a node makes them while the others wait for it. They lie in `$XDG_CACHE_HOME/rlhf_engine/data`
    (`~/.cache` when not set), which can be deleted at any time.

    Args:
        key: plain data; everything that the tensors depend on.
        make: must not wait for other ranks, who wait here.
    """
    file = _file(key)
    with open(file.with_suffix(".flock"), "w") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        if not file.exists():
            keep_tensors(key, make())
    return load_file(file)


def found_tensors(key: Any) -> dict[str, Tensor] | None:
    """What was kept under this key; None when nothing was."""
    return load_file(_file(key)) if _file(key).exists() else None


def keep_tensors(key: Any, tensors: dict[str, Tensor]) -> None:
    """Keep them: the file appears complete or not at all."""
    file = _file(key)
    half_done = file.with_suffix(f".partial{secrets.token_hex(8)}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, half_done)
    half_done.rename(file)


def _file(key: Any) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf_engine" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest_of([VERSION, key])[:32]}.safetensors"


def digest_of(value: Any) -> str:
    """SHA-256 of plain data (lists, dictionaries, text, numbers), or of tensors by their bytes."""
    if isinstance(value, Tensor):
        return hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which ids a text becomes."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    settings = [
        tokenizer.padding_side,
        getattr(tokenizer, "add_bos_token", None),
        getattr(tokenizer, "add_eos_token", None),
    ]
    return digest_of([type(tokenizer).__name__, backend, special, tokenizer.chat_template, settings])
