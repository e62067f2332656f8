"""A run's checkpoints, from which it goes on: OUT/checkpoints/iteration_000010/, complete or absent.

    pieces_00000.safetensors ...   one of each rank: weights, moments, averages (see `engine.distributed.pieces`)
    tensors.safetensors            whatever tensors the trainer keeps
    state.json                     all that is small, and every rank's random numbers
    manifest.json                  written last: the files with their sizes and digests, the settings that stay

Nothing here is pickled. A checkpoint is read by any number of ranks, under any ZeRO stage.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.distributed import comm
from engine.distributed.checkpoint_folder import (
    FORMAT,
    MANIFEST,
    digest,
    flush,
    newest_whole,
    put_in_place,
    remove_others,
)
from engine.distributed.initialize import set_learning_rates, whole_shape
from engine.distributed.moving_average import MovingAverage
from engine.distributed.pieces import WEIGHT, Piece, Read, give_back, my_pieces, steps_taken, tell_the_model
from engine.distributed.random_states import random_states, set_random_states

STATE, TENSORS = "state.json", "tensors.safetensors"
NAME = "iteration_{:06d}"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is trained, by role."""

    engines: dict[str, DeepSpeedEngine]
    averages: dict[str, MovingAverage]


def save_checkpoint(
    root: Path,
    iteration: int,
    trained: Trained,
    *,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    identity: Mapping[str, Any],
    keep: int,
) -> bool:
    """Write `root`/iteration_..., read it back, put it in place; then remove all but the `keep` newest.

    A collective: every rank writes its pieces. Where that fails on any rank (a full disk), what has been written is
    removed, earlier checkpoints stay, and the run may go on.

    Args:
        state: small and JSON; of rank 0.
        tensors: of rank 0.
        identity: what a run that goes on must agree with.

    Returns:
        Whether it was written.
    """
    folder = root / NAME.format(iteration)
    half_done = folder.with_name(folder.name + ".partial")
    trouble, _ = _agreed(lambda: _begin(half_done) if comm.is_main() else None)
    if trouble is None:
        everyones = comm.gathered_objects(random_states())
        engines = {role: _of_engine(engine) for role, engine in trained.engines.items()}
        small = {"iteration": iteration, "state": state, "engines": engines, "random": everyones}
        trouble, _ = _agreed(lambda: _write(half_done, trained, small, tensors))
    if trouble is None:
        trouble, digests = _agreed(lambda: _my_digests(half_done))
        manifest = {
            "format": FORMAT,
            "iteration": iteration,
            "ranks": comm.world_size(),
            "versions": comm.versions(),
            "identity": dict(identity),
            "files": {name: found for files in digests if files is not None for name, found in files.items()},
        }
    if trouble is None:
        trouble, _ = _agreed(lambda: _write_manifest(half_done, manifest) if comm.is_main() else None)
    if trouble is None:
        trouble, _ = _agreed(lambda: put_in_place(half_done, folder) if comm.is_main() else None)
    if trouble is not None:
        if comm.is_main():
            shutil.rmtree(half_done, ignore_errors=True)
            print(
                f"WARNING: NO CHECKPOINT WAS WRITTEN at iteration {iteration}: {trouble}. Earlier ones are as they "
                f"were, and the run goes on.",
                flush=True,
            )
        return False
    trouble, _ = _agreed(lambda: remove_others(root, iteration, keep=keep) if comm.is_main() else None)
    if trouble is not None and comm.is_main():
        print(f"Warning: checkpoints that are not wanted any more cannot be removed: {trouble}.", flush=True)
    return True


def newest_checkpoint(root: Path, identity: Mapping[str, Any], *, before: int | None = None) -> Path | None:
    """The newest one that is whole, of an iteration before this one; None where there are none. A collective.

    Raises:
        ValueError: on every rank, when it is another run's, or when not one of them is whole.
    """
    with comm.same_error_everywhere():
        found = newest_whole(root, identity, before=before) if comm.is_main() else None
    return comm.of_main(found)


def load_checkpoint(folder: Path, trained: Trained) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put weights, moments, averages, schedules and random numbers back. A collective.

    Returns:
        (state, tensors) as they were saved, on every rank.

    Raises:
        ValueError: on every rank, when something is missing or of another size on any.
    """
    with ExitStack() as open_files:
        with comm.same_error_everywhere():
            small = json.loads((folder / STATE).read_text())
            pieces = _PiecesOnDisk(folder, open_files)
            for role, engine in trained.engines.items():
                pieces.check(role, engine)
        for role, engine in trained.engines.items():
            of_role = small["engines"][role]
            with comm.same_error_everywhere():
                give_back(engine, pieces.reader(role), steps=of_role["steps"])
            tell_the_model(engine)
            _to_engine(engine, of_role)
        with comm.same_error_everywhere():
            for role, average in trained.averages.items():
                average.give_back(pieces.reader(role))
    with comm.same_error_everywhere():
        set_random_states(small["random"])
        tensors = load_file(folder / TENSORS)
    return small["state"], tensors


# Files


def _begin(half_done: Path) -> None:
    for left in half_done.parent.glob("iteration_*.partial"):  # by runs that were killed
        shutil.rmtree(left)
    half_done.mkdir(parents=True)


def _write(folder: Path, trained: Trained, small: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    entries, held = [], {}
    for role, piece in _everything(trained):
        entries.append({"role": role, "name": piece.name, "what": piece.what, "start": piece.start, "size": piece.size})
        held[str(len(held))] = piece.tensor.detach().cpu().contiguous()
    _write_tensors(folder / _file_of(comm.rank()), held, metadata={"pieces": json.dumps(entries)})
    if comm.is_main():
        _write_tensors(folder / TENSORS, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        (folder / STATE).write_text(json.dumps(small))
        flush(folder / STATE)


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """
    Raises:
        ValueError: what is read back is not what was written, to the last bit.
    """
    save_file(tensors, path, metadata=metadata)
    flush(path)
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                raise ValueError(f"{path} does not read as it was written")


def _bits(tensor: Tensor) -> Tensor:
    """NaN is not equal to itself; its bits are."""
    return tensor.flatten().view(torch.uint8)


def _everything(trained: Trained) -> Iterator[tuple[str, Piece]]:
    for role, engine in trained.engines.items():
        yield from ((role, piece) for piece in my_pieces(engine))
    for role, average in trained.averages.items():
        yield from ((role, piece) for piece in average.my_pieces())


def _write_manifest(half_done: Path, manifest: dict[str, Any]) -> None:
    (half_done / MANIFEST).write_text(json.dumps(manifest, indent=1))
    flush(half_done / MANIFEST)
    flush(half_done)


def _file_of(rank: int) -> str:
    return f"pieces_{rank:05d}.safetensors"


def _mine() -> list[str]:
    """The files that this rank writes."""
    return [_file_of(comm.rank()), *((TENSORS, STATE) if comm.is_main() else ())]


def _my_digests(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: digest(folder / name) for name in _mine()}


def _agreed(act: Callable[[], Any]) -> tuple[str | None, list[Any]]:
    """Do something with the disk: what went wrong on the first rank where it failed, None if it did nowhere; and what
    came of it on every rank.
    """
    said, found = None, None
    try:
        found = act()
    except (OSError, SafetensorError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    everyones = comm.gathered_objects((said, found))
    return next((each for each, _ in everyones if each is not None), None), [each for _, each in everyones]


class _PiecesOnDisk:
    """All ranks' pieces, found by weight and stretch."""

    def __init__(self, folder: Path, open_files: ExitStack):
        self.folder = folder
        self.found: dict[tuple[str, str, str], list[tuple[int, int, Any, str]]] = {}
        self.sizes: dict[tuple[str, str, str], int] = {}
        for path in sorted(folder.glob("pieces_*.safetensors")):
            file = open_files.enter_context(safe_open(path, framework="pt"))
            for key, entry in enumerate(json.loads(file.metadata()["pieces"])):
                of = (entry["role"], entry["name"], entry["what"])
                (length,) = file.get_slice(str(key)).get_shape()
                self.found.setdefault(of, []).append((entry["start"], length, file, str(key)))
                self.sizes[of] = entry["size"]

    def check(self, role: str, engine: DeepSpeedEngine) -> None:
        """
        Raises:
            ValueError: the checkpoint trains other weights than this engine.
        """
        theirs = {name for of, name, _ in self.found if of == role}
        ours = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        if theirs != ours:
            raise ValueError(
                f"{self.folder} is of another model: of the {role} it has {len(theirs)} trained weights, this run has "
                f"{len(ours)}, {sorted(theirs ^ ours)[0]} in one of them only."
            )
        for name, parameter in engine.module.named_parameters():
            if name in ours and (size := math.prod(whole_shape(parameter))) != self.sizes[role, name, WEIGHT]:
                raise ValueError(
                    f"{self.folder} is of another model: the {role}'s {name} has {self.sizes[role, name, WEIGHT]} "
                    f"numbers there, {size} here."
                )

    def reader(self, role: str) -> Read:
        def read(name: str, what: str, start: int, length: int) -> Tensor:
            whole, covered = torch.empty(length), 0
            for at, count, file, key in self.found.get((role, name, what), ()):
                first, last = max(start, at), min(start + length, at + count)
                if first < last:
                    whole[first - start : last - start] = file.get_slice(key)[first - at : last - at]
                    covered += last - first
            if covered != length:
                raise ValueError(f"{self.folder} has {covered} of {length} numbers of {what} of the {role}'s {name}.")
            return whole

        return read


# What is small


def _of_engine(engine: DeepSpeedEngine) -> dict[str, Any]:
    scaler = getattr(engine.optimizer, "loss_scaler", None)  # of fp16; elsewhere a constant
    scale = {name: value for name, value in vars(scaler).items() if isinstance(value, (int, float))} if scaler else {}
    return {"steps": steps_taken(engine), "schedule": engine.lr_scheduler.last_epoch, "loss_scale": scale}


def _to_engine(engine: DeepSpeedEngine, kept: dict[str, Any]) -> None:
    engine.global_steps = kept["steps"]
    set_learning_rates(engine, schedule_step=kept["schedule"], factor=1.0)
    if (scaler := getattr(engine.optimizer, "loss_scaler", None)) is not None:
        vars(scaler).update(kept["loss_scale"])
