"""A preset, a YAML recipe and dotted flags -> a config."""

import argparse
import difflib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml

from engine.config.ppo import PPOConfig
from engine.config.presets import PRESETS

Config = TypeVar("Config")


def parse(config_class: type[Config], args: Sequence[str] | None = None) -> Config:
    """A config from the command line: `--config FILE` and dotted overrides, later ones winning; of PPO also
    `--preset NAME`, which all of these win over wherever it stands.

    Prints and ends the program on `--print_config` or `--help`.

    Raises:
        ValueError: an unknown name, or a value that does not fit.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    parser = ArgumentParser(
        description=config_class.__doc__.splitlines()[0],
        usage="%(prog)s [--config RECIPE] [--SETTING VALUE ...]",  # all of them would fill two screens
        exit_on_error=False,
        allow_abbrev=False,  # a typo that happens to be a prefix of a name is still a typo
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML recipe")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_class_arguments(config_class)
    if config_class is PPOConfig:
        parser.add_argument("--preset", help=f"what recipe and flags win over: {', '.join(PRESETS)}")
        parser.set_defaults(_preset(sys.argv[1:] if args is None else args))
    try:
        values = parser.instantiate(parser.parse_args(args))
    except ArgumentError as error:
        raise ValueError(f"{_plainly(str(error))}{_meant(str(error), parser)}\nSee --help for every name.") from None
    except ValueError as error:  # of a group that may be left out, jsonargparse 4.53 says what it is not as well
        causes = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
        causes = [cause for cause in causes if "NoneType" not in cause]
        raise ValueError("\n".join(causes) or str(error)) from None
    return config_class(**{name: values[name] for name in config_class.__dataclass_fields__})


def _preset(args: Sequence[str]) -> dict[str, Any]:
    """The settings of the preset that a flag names, or else the last recipe that names one; looked up beforehand,
    since recipes and flags are read on top of it.

    Raises:
        ValueError: there is no such preset.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset")
    early.add_argument("--config", action="append", default=[])
    try:
        given, _ = early.parse_known_args(args)
        recipes = [yaml.safe_load(Path(recipe).read_text()) for recipe in given.config]
    except (argparse.ArgumentError, OSError, yaml.YAMLError):  # the parser proper says what is wrong
        return {}
    in_recipes = [str(recipe["preset"]) for recipe in recipes if isinstance(recipe, dict) and recipe.get("preset")]
    name = given.preset or (in_recipes[-1] if in_recipes else None)
    if name is None:
        return {}
    if name not in PRESETS:
        raise ValueError(f"preset={name} is not one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def run(main: Callable[[], None]) -> None:
    """A launch script's main, once all is imported: a mistake of the user's ends it with the message that names it and
    exit code 1.

    A message is all there is to know of a ValueError that the engine itself raises. From anywhere else it is a bug,
    and keeps its traceback.
    """
    # Not above: who imports a config for a program of his own keeps his collector as it is.
    from engine.startup import imported

    imported()
    try:
        main()
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals["__name__"].split(".")[0] not in ("engine", "__main__"):
            raise
        sys.exit(f"ValueError: {error}")


# What jsonargparse 4.53 calls what was expected -> what a user calls it.
EXPECTED = {
    r"<class 'int'>": "a whole number",
    r"<class 'float'>": "a number",
    r"<class 'bool'>": "true or false",
    r"<class 'str'>": "a text",
    r"<class 'list'>": "a list, as in [one, two]",
    r"dot import path string.*": "a group of settings, which are set one by one",
    r"typing\.Literal\[(.*)\]": r"one of \1",
}


def _plainly(message: str) -> str:
    """What jsonargparse says of a value that does not fit, in a sentence; as it is where it is about something else."""
    name = ".".join(re.findall(r'Parser key "([^"]+)":', message))
    if unknown := re.search(r"Option '([^']+)' is not accepted", message):
        return f"{name}.{unknown[1]} is not a setting."
    if missing := re.search(r"arguments are required: (.+)", message):
        return f"{name + '.' if name else ''}{missing[1]} is not set."
    given = re.search(r"(?:Got|Given) value: (.*)", message)  # the innermost comes first
    words = re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", message, flags=re.MULTILINE)
    expected = [
        re.sub(pattern, said, word)
        for word in words
        for pattern, said in EXPECTED.items()
        if re.fullmatch(pattern, word)
    ]
    return f"{name}={given[1]} is not {expected[0]}." if name and given and expected else message


def _meant(message: str, parser) -> str:
    """The names nearest to a misspelt one, if any."""
    names = [action.dest for action in parser._actions]  # jsonargparse 4.53 lists them nowhere public
    unknown = [word.lstrip("-").split("=")[0] for word in message.split() if word.startswith("--")]
    near = difflib.get_close_matches(unknown[0], names, n=3) if unknown else []
    return f". Did you mean {' or '.join(f'--{name}' for name in near)}?" if near else ""


def as_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries: what `config.yaml` holds, and enough to start the run again."""
    return asdict(config)
