"""Folders of checkpoints: which are whole, whose they are, which go. No process group, no model.

A checkpoint's folder appears in one step, with a manifest of its files, their sizes and their digests.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
REPLACED = ".replaced"


def checkpoints_in(root: Path) -> list[Path]:
    """The newest first."""
    found = {path.name.removeprefix("iteration_"): path for path in root.glob("iteration_*")}
    return [found[number] for number in sorted(filter(str.isdigit, found), key=int, reverse=True)]


def refuse_to_begin_beside(root: Path) -> None:
    """
    Raises:
        ValueError: there are checkpoints, and nobody has said what to do about them.
    """
    if found := checkpoints_in(root):
        raise ValueError(
            f"{found[0]} is of an earlier run: go on from it with --resume auto, begin anew with --resume never (which "
            f"removes it), or name another --output_dir."
        )


def remove_checkpoints(root: Path, *, after: int = -1) -> None:
    """All of them, or those of later iterations than this one."""
    for folder in checkpoints_in(root):
        if iteration_of(folder) > after:
            remove(folder)


def remove_others(root: Path, newest: int, *, keep: int) -> None:
    """All but the `keep` newest up to this iteration, which is the newest: what bears a later number was passed over,
    or belongs to what has been gone back on.
    """
    found = checkpoints_in(root)
    kept = [folder for folder in found if iteration_of(folder) <= newest][:keep]
    for folder in found:
        if folder not in kept:
            remove(folder)
    for left in root.glob("iteration_*.removed"):  # by runs that were killed
        shutil.rmtree(left)


def remove(folder: Path) -> None:
    """In one step as far as readers are concerned."""
    leaving = folder.with_name(folder.name + ".removed")
    shutil.rmtree(leaving, ignore_errors=True)
    if folder.exists():
        folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def put_in_place(half_done: Path, folder: Path) -> None:
    """Give a finished folder its name. One that has the name (saved in the middle of the iteration, or by a run that
    has gone back to before it) stays until then: see `put_back_replaced`.
    """
    replaced = folder.with_name(folder.name + REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    half_done.rename(folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def put_back_replaced(root: Path) -> None:
    """After a run that was killed between the two renames of `put_in_place`."""
    for replaced in root.glob(f"iteration_*{REPLACED}"):
        folder = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)


def flush(path: Path) -> None:
    """To the disk, past the machine's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(file, "blake2b").hexdigest()}


def iteration_of(folder: Path) -> int:
    """Of a checkpoint."""
    return int(folder.name.removeprefix("iteration_"))


def newest_whole(root: Path, identity: Mapping[str, Any], *, before: int | None = None) -> Path | None:
    """The newest checkpoint that nothing is wrong with, of an iteration before this one; None where there are none.

    Raises:
        ValueError: it is another run's, or not one of those that there are is whole.
    """
    put_back_replaced(root)
    found = [folder for folder in checkpoints_in(root) if before is None or iteration_of(folder) < before]
    for folder in found:
        if (damage := _damage(folder)) is None:
            _check_identity(folder, identity)
            return folder
        print(f"{folder} is damaged ({damage}): passed over.", flush=True)
    if found:
        raise ValueError(
            f"Not one checkpoint in {root} is whole. Begin anew in another --output_dir, or here with --resume never, "
            f"which removes them."
        )
    return None


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: (wanted["bytes"], wanted) for name, wanted in manifest["files"].items()}
        identity, version = manifest["identity"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    if version != FORMAT or not isinstance(identity, dict):
        return f"{MANIFEST}: format {version}, this is {FORMAT}"
    for name, (size, wanted) in files.items():
        path = folder / Path(name).name  # a manifest names nothing outside its folder
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if digest(path) != wanted:
            return f"{name} is not what was written"
    return None


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if all(re.fullmatch("[0-9a-f]{32,}", str(digest)) for digest in (theirs, ours)):
        return f"{name} are others"
    return f"{name} was {theirs!r}, is {ours!r}"


def _check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    theirs = json.loads((folder / MANIFEST).read_text())["identity"]
    ours = json.loads(json.dumps(identity))  # as the file has it: tuples as lists
    differing = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    if differing:
        said = "; ".join(_difference(name, theirs.get(name), ours.get(name)) for name in differing[:3])
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{folder} is of another run: {said}{more}. Go on with the settings that it began with, or begin anew with "
            f"--resume never."
        )
