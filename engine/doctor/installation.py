"""Checks of what is installed: Python, libraries, compiler, launcher."""

import ast
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine.distributed.builds import BUILD_QUEUE, FINISHED, LOCK, folder_of_builds
from engine.doctor.findings import Finding, failed, of_each, ok, warning
from engine.doctor.subject import Subject

ROOT = Path(__file__).resolve().parents[2]  # where setup.py lies, and constraints.txt beside it
INSTALL = "pip install torch -c constraints.txt && pip install -e . -c constraints.txt"
OLDEST_PYTHON = (3, 11)
LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "datasets", "safetensors", "jsonargparse", "httpx")
PROGRAM = (
    '#include <cstdio>\n#include <vector>\nint main() { std::vector<int> two(2); std::printf("%zu", two.size()); }\n'
)
OUR_OPERATOR = "deepspeed_shm_comm"  # what the engine itself builds; see `engine.distributed.comm`
COMMAND_S = 60


def python_version(subject: Subject) -> Finding:
    """New enough for the engine's own files."""
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return failed(f"this is Python {found}, the engine needs {oldest}.", f"Make the environment with {oldest}+.")
    return ok(f"{found} ({sys.executable})")


def requirements(subject: Subject) -> Finding:
    """What setup.py asks for is there, in versions that it allows."""
    from packaging.requirements import Requirement

    def look(line: str) -> Finding:
        wanted = Requirement(line)
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            return failed(f"{wanted.name} is not installed.", INSTALL)
        if not wanted.specifier.contains(found, prereleases=True):
            return failed(f"{wanted.name} is {found}, and setup.py asks for {wanted.specifier}.", INSTALL)
        return ok(f"{wanted.name} {found}")

    return of_each(_asked_for(), look)


def tested_versions(subject: Subject) -> Finding:
    """What is installed is what the tests are run on."""
    path = ROOT / "constraints.txt"
    if not path.is_file():
        return warning(f"{path} is not there: nothing says which versions are tested.", "Take it from the repository.")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), flags=re.MULTILINE))
    others = []
    for name, pinned in pins.items():
        try:
            found = version(name)
        except PackageNotFoundError:  # of an extra that is not installed; `requirements` knows what has to be
            continue
        if found.split("+")[0] != pinned.split("+")[0]:  # 2.13.0+cpu is 2.13.0
            others.append(f"{name} {found} (tested: {pinned})")
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        return warning(f"other versions than the tested ones: {', '.join(others[:5])}{more}.", INSTALL)
    return ok(f"all as in {path.name}")


def libraries_import(subject: Subject) -> Finding:
    """Being installed is not yet being usable: a library of C may be missing, or be built for another one."""

    def look(name: str) -> Finding:
        try:
            import_module(name)
        except Exception as error:  # broken installations raise all kinds
            return failed(f"import {name} fails ({type(error).__name__}: {error}).", f"Install it anew: {INSTALL}")
        return ok(name)

    return of_each(LIBRARIES, look)


def compiler(subject: Subject) -> Finding:
    """DeepSpeed compiles its operators when they are first used."""
    command = shlex.split(os.environ.get("CXX", "c++")) or [""]  # `ccache g++` is one too
    path = shutil.which(command[0])
    if path is None:
        said = f"there is no C++ compiler {command[0]} on PATH."
        return failed(said, "Install one (apt install g++), or name it in CXX.")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "two.cpp", Path(folder) / "two"
        source.write_text(PROGRAM)
        works, said = _answer([*command, "-O1", "-o", str(program), str(source)])
        if works:
            works, said = _answer([str(program)])
    if not (works and said == "2"):
        return failed(f"{path} does not make a program of three lines: {said}.", "Install another: apt install g++.")
    return ok(path)


def ninja(subject: Subject) -> Finding:
    """Directs the compiler; torch looks for it on PATH."""
    works, said = _answer(["ninja", "--version"])
    if not works:
        return failed(f"ninja does not run: {said}.", "Activate the environment that it is in: . .venv/bin/activate")
    return ok(f"{said} ({shutil.which('ninja')})")


def built_operators(subject: Subject) -> Finding:
    """A build that was ended half-way leaves a lock, for which torch waits without a word."""
    folder = folder_of_builds(version("torch"), version("deepspeed"))
    queue = folder / BUILD_QUEUE
    with open(queue if queue.is_file() else os.devnull) as held:
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return ok(f"another process is building in {folder}; the next start waits for it")
    for lock in folder.glob(f"*/{LOCK}"):
        if lock.parent.name == OUR_OPERATOR:
            return warning(f"an interrupted build left {lock} behind.", "The next start removes it and builds again.")
        return failed(f"{lock} is left of a build: every start that needs it waits for ever.", f"rm {lock}")
    finished = sorted(path.parent.name for path in folder.glob(f"*/{FINISHED}"))
    return ok(f"{', '.join(finished) or 'none built yet; the first start does, within three minutes,'} in {folder}")


def launcher(subject: Subject) -> Finding:
    """What starts the ranks."""
    path = shutil.which("deepspeed")
    if path is None:
        remedy = "Activate the environment (. .venv/bin/activate), or start with python -m torch.distributed.run."
        return failed("there is no deepspeed on PATH.", remedy)
    return ok(path)


def _asked_for() -> list[str]:
    """`install_requires` of setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return ast.literal_eval(node.value)
    raise ValueError(f"{ROOT / 'setup.py'} has no install_requires.")


def _answer(command: list[str]) -> tuple[bool, str]:
    """Whether a command ends well, and what it says, or what is wrong with it."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"{type(error).__name__}: {error}"
    return ended.returncode == 0, (ended.stderr.strip()[-300:] if ended.returncode else ended.stdout.strip())


CHECKS = [
    *(python_version, requirements, tested_versions, libraries_import),
    *(compiler, ninja, built_operators, launcher),
]
