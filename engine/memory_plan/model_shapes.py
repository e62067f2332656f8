"""The sizes of a model by its name: from its folder, or for well-known models from files that lie beside this one.

The files hold the published configs' sizes, and are for planning alone.
"""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from engine.models.loading import NOBODYS_CODE, fingerprint
from engine.models.random_init import local_name

SHAPES = Path(__file__).parent / "shapes"


def model_config(model_name_or_path: str) -> PreTrainedConfig:
    """A model's config: of a folder, a `random://` name, a hub name whose config has been downloaded, or one that is
    known here. Nothing is downloaded.

    Raises:
        ValueError: its sizes are not known here.
    """
    folder = Path(local_name(model_name_or_path)).expanduser()
    bundled = SHAPES / f"{_plain_name(model_name_or_path)}.json"
    try:
        where = str(folder) if folder.is_dir() else model_name_or_path
        return AutoConfig.from_pretrained(where, local_files_only=True, **NOBODYS_CODE)
    except (OSError, ValueError) as error:
        if not folder.is_dir() and bundled.is_file():
            return AutoConfig.from_pretrained(bundled)
        raise ValueError(
            f"The sizes of {model_name_or_path} are not known here: it is no model folder, and not one of "
            f"{', '.join(known_models())}. Name one of these, or a folder with its config.json."
        ) from error


def fetch_config(model_name_or_path: str) -> None:
    """Download a hub model's config where it is not on this machine yet, so that `model_config` finds it.

    Raises:
        ValueError: there is no such model.
    """
    if not Path(local_name(model_name_or_path)).expanduser().is_dir():
        fingerprint(model_name_or_path)


def known_models() -> list[str]:
    """The models whose sizes are known without their folders."""
    return sorted(path.stem for path in SHAPES.glob("*.json"))


def _plain_name(name: str) -> str:
    """`meta-llama/Llama-3.1-8B-Instruct` -> `llama-3.1-8b`."""
    return name.split("/")[-1].lower().removeprefix("meta-").removesuffix("-instruct").removesuffix("-base")
