"""The files of a model's weights: all there, whole, and which tensors they hold. Reads their headers alone."""

import json
from pathlib import Path

from engine.doctor.subject import Subject

INDEX = ".index.json"
WEIGHTS = [f"{name}{ends}" for name in ("model.safetensors", "pytorch_model.bin") for ends in ("", INDEX)]


def folder_of(model_name_or_path: str) -> Path:
    """There is none of a hub name: transformers fetches what is missing."""
    from engine.models.random_init import local_name

    return Path(local_name(model_name_or_path)).expanduser()


def tensors(subject: Subject, role: str) -> set[str] | None:
    """Names of a role's tensors; None where no safetensors are here.

    Raises:
        ValueError: the folder holds no weights, or not all of them.
        Skipped: that has been told.
    """
    return subject.once(f"the {role}'s weights", lambda: _tensors(folder_of(subject.models[role])))


def tensors_in(path: Path) -> set[str]:
    """Names in a safetensors file.

    Raises:
        ValueError: it is not as long as its header says, or has none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is cut short, or holds no safetensors ({error}).") from error


def _tensors(folder: Path) -> set[str] | None:
    files = _files_of_weights(folder) if folder.is_dir() else []
    if missing := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"{folder} lacks {missing[0]}.")
    return set().union(*(tensors_in(path) for path in files if path.suffix == ".safetensors")) or None


def _files_of_weights(folder: Path) -> list[Path]:
    """Those that transformers reads: of the first of WEIGHTS that is there, whatever lies beside it."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} lacks its weights ({WEIGHTS[0]}).")
    if not path.name.endswith(INDEX):
        return [path]
    try:
        return [folder / name for name in sorted(set(json.loads(path.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
