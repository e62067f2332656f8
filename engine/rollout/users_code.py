"""Code of the user's: found by its name, and where it was when it raised."""

import asyncio
import os
import sys
import traceback
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


def named(spec: str, *, setting: str) -> Any:
    """What `module:name` or `file.py:name` names, None where there is no such name in it; for a module the folder that
    the run was started in is searched last.

    Args:
        setting: the one that holds `spec`, for the message.

    Raises:
        ValueError: there is no such module or file.
    """
    module_name, name = spec.split(":")
    if os.getcwd() not in sys.path:  # launchers put the script's folder there, not the one a user stands in
        sys.path.append(os.getcwd())
    try:
        module = _of_file(Path(module_name)) if module_name.endswith(".py") else import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{setting}={spec}: importing {module_name} failed ({error}). It is looked for in {os.getcwd()}, on "
            f"PYTHONPATH and among the installed packages."
        ) from error
    return getattr(module, name, None)


def _of_file(path: Path) -> ModuleType:
    """The module that a file is, whatever else has its name."""
    name = str(path.resolve())
    if name not in sys.modules:
        if not path.is_file():
            raise ImportError("there is no such file")
        found = spec_from_file_location(name, name)
        sys.modules[name] = module_from_spec(found)
        try:
            found.loader.exec_module(sys.modules[name])
        except BaseException:  # as import does: half a module is none
            del sys.modules[name]
            raise
    return sys.modules[name]


def place_of(error: Exception, *, caller: str) -> str:
    """` (file, line n)` of the first frame outside the file `caller` and asyncio: the user's function itself; empty if
    none is.
    """
    ours = (caller, os.path.dirname(asyncio.__file__) + os.sep)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return "".join(f" ({frame.filename}, line {frame.lineno})" for frame in frames[:1])
