"""Tokenised rows kept between runs, and made once per node however many ranks start together."""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

TOKENISING_CODE = ("formatting.py", "exchanges.py")
SAID_OF: set[Path] = set()  # folders that could not be used


def kept_tensors(key: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `make` returns, from the cache where they have been made before.

    The first process of a node makes them while the others wait for it. They lie in `$RLHF_ENGINE_DATA_CACHE`, or else
    in `$XDG_CACHE_HOME/rlhf_engine/data` (`~/.cache` when not set), which can be deleted at any time. Where nothing can
    be kept, every process makes them for itself, and nothing else is different.

    Args:
        key: plain data; everything that the tensors depend on.
        make: must not wait for other ranks, who wait here; gives the same on all of them.
    """
    with _in_turn(key):
        tensors = found_tensors(key)
        if tensors is None:
            tensors = make()
            keep_tensors(key, tensors)
    return tensors


def found_tensors(key: Any) -> dict[str, Tensor] | None:
    """What was kept under this key; None when nothing was, or nothing that can be read."""
    file = _file(key)
    with _saying_what_fails():
        return load_file(file) if file.exists() else None


def keep_tensors(key: Any, tensors: dict[str, Tensor]) -> None:
    """Keep them, if they can be kept: the file appears complete or not at all."""
    file = _file(key)
    half_done = file.with_suffix(f".partial{secrets.token_hex(8)}")
    with _saying_what_fails():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, half_done)
            half_done.rename(file)
        finally:
            half_done.unlink(missing_ok=True)


@contextlib.contextmanager
def _in_turn(key: Any) -> Iterator[None]:
    """One process of a node at a time, where there are files to be locked."""
    with contextlib.ExitStack() as held:
        with _saying_what_fails():
            _file(key).parent.mkdir(parents=True, exist_ok=True)
            queue = held.enter_context(open(_file(key).with_suffix(".flock"), "w"))
            fcntl.flock(queue, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _saying_what_fails() -> Iterator[None]:
    """Go on without the cache: no run needs it. Each node says so once."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and _folder() not in SAID_OF:
            SAID_OF.add(_folder())
            print(
                f"The data cache in {_folder()} cannot be used ({error}): what it does not hold is tokenised anew in "
                f"every run. RLHF_ENGINE_DATA_CACHE names another folder.",
                flush=True,
            )


def _folder() -> Path:
    if named := os.environ.get("RLHF_ENGINE_DATA_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_engine" / "data"
    except RuntimeError as error:
        raise ValueError(f"{error} Set RLHF_ENGINE_DATA_CACHE to a folder for the data cache.") from error


def _file(key: Any) -> Path:
    return _folder() / f"{digest_of([CODE, key])[:32]}.safetensors"


def digest_of(value: Any) -> str:
    """SHA-256 of plain data (lists, dictionaries, text, numbers), or of tensors by their bytes."""
    if isinstance(value, Tensor):
        return hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which ids a text becomes."""
    added = tokenizer("a")["input_ids"]  # what goes round a text; and it undoes the padding of an earlier call
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_of([type(tokenizer).__name__, backend, special, tokenizer.chat_template, added])


def _digest_of_code() -> str:
    """Of what makes token ids out of text: another release of it finds nothing old."""
    ours = [(Path(__file__).parent / name).read_text() for name in TOKENISING_CODE]
    return digest_of([*ours, transformers.__version__, tokenizers.__version__])


CODE = _digest_of_code()  # at import: of the code that runs, whatever the files say later
