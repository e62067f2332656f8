"""Refusals that say which number would work, and the sharding files that a run may name."""

from pathlib import Path
from typing import Protocol

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


class Sharded(Protocol):
    """A config that says how something is sharded: by a stage, by a file, or not at all."""

    zero_stage: int | str | None
    ds_config: str | None


def at_least(name: str, value: float, minimum: float) -> None:
    """
    Raises:
        ValueError: the value is below the minimum, or NaN.
    """
    if not value >= minimum:
        raise ValueError(f"{name}={value} must be at least {minimum}.")


def next_multiple(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit


def ds_config_of(*candidates: tuple[Sharded, str]) -> Path:
    """The file in which sharding is described: of the first candidate that names one, else stage 2. There is none yet
    of a stage that is left to the memory plan (`auto`).

    Args:
        candidates: a config and the prefix of its flags, as in (config.actor, "actor.").

    Raises:
        ValueError: a candidate names both a stage and a file, or a file that is not there.
    """
    for where, prefix in candidates:
        if where.zero_stage is not None and where.ds_config is not None:
            raise ValueError(f"Set {prefix}zero_stage or {prefix}ds_config, not both: the file names the stage.")
        if where.ds_config is not None:
            if not Path(where.ds_config).is_file():
                raise ValueError(f"{prefix}ds_config={where.ds_config}: there is no such file.")
            return Path(where.ds_config)
        if where.zero_stage is not None:
            return DS_CONFIGS / f"zero{where.zero_stage}.json"
    return DS_CONFIGS / "zero2.json"
