"""Checks of where a run writes: its folder, what is left there, room on the disk, W&B."""

import netrc
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from engine.distributed.checkpoint_folder import checkpoints_in
from engine.doctor.findings import Finding, failed, ok, warning
from engine.doctor.subject import Subject
from engine.run_folder import LOCK, claim, release

KEPT_BYTES = 12  # of a trained weight in a checkpoint: itself and AdamW's two moments, in fp32
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of an exported weight
GIB = 2**30


def output_dir(subject: Subject) -> Finding:
    """It can be written to, and no other run does."""
    folder = Path(subject.config.output_dir)
    if (folder / LOCK).exists():
        release(claim(str(folder)))  # refuses where another run holds it
    above = _existing(folder)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        return failed(
            f"output_dir={folder} cannot be written to: {above} does not allow it.", "Name another --output_dir."
        )
    return ok(str(folder))


def earlier_checkpoints(subject: Subject) -> Finding:
    """What an earlier run left, and whether it has been said what to do about it."""
    found, resume = checkpoints_in(Path(subject.config.output_dir) / "checkpoints"), subject.config.resume
    if not found:
        return ok("none: the run begins")
    if resume is None:
        return failed(
            f"{found[0]} is of an earlier run, and resume is not set.",
            "Go on from it with --resume auto, begin anew with --resume never (which removes it), or name another "
            "--output_dir.",
        )
    if resume == "never":
        return warning(
            f"--resume never removes {len(found)} checkpoints, the newest {found[0]}.", "Move them, if wanted."
        )
    return ok(f"the run goes on from {found[0]}")


def disk_space(subject: Subject) -> Finding:
    """Room for the checkpoints that are kept, the one being written, and the exported models; estimated."""
    config, needed = subject.config, 0
    average = subject.is_ppo and config.ema_decay is not None
    for role in subject.trained:
        trained, whole = _weights(subject, role)
        of_average = average and role == "actor"
        needed += (config.checkpoint.keep + 1) * trained * (KEPT_BYTES + 4 * of_average)
        needed += whole * BYTES[subject.dtype] * (1 + of_average)
    above = _existing(Path(config.output_dir))
    given_back = _given_back(config)
    free, counted = shutil.disk_usage(above).free + given_back, " (with earlier checkpoints)" if given_back else ""
    said = f"{free / GIB:.1f} GiB free in {above}{counted}, and the run needs about {needed / GIB:.2f}"
    if free < needed:
        share = f"{config.checkpoint.keep} + 1 checkpoints and the exported models"
        return failed(f"{said} ({share}).", "Name an --output_dir with more room, or lower --checkpoint.keep.")
    return ok(said)


def wandb_key(subject: Subject) -> Finding | None:
    """Without one an online run of W&B is an offline one."""
    if subject.config.tracking.wandb != "online":
        return None
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    if os.environ.get("WANDB_API_KEY"):
        return ok("WANDB_API_KEY is set")
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        if path.is_file() and netrc.netrc(path).authenticators(host) is not None:
            return ok(f"{path} has a key for {host}")
    except netrc.NetrcParseError as error:
        return warning(f"{path} cannot be read: {error}.", "Correct it, or set WANDB_API_KEY.")
    said = f"tracking.wandb=online, and there is no key for {host}, neither in WANDB_API_KEY nor in {path}."
    return warning(f"{said} The run will be offline.", "Run wandb login, or set --tracking.wandb offline.")


def _given_back(config) -> int:
    """Bytes of earlier checkpoints in whose place new ones come: of the newest `keep`, or all with --resume never."""
    found = checkpoints_in(Path(config.output_dir) / "checkpoints")
    for_new_ones = found if config.resume == "never" else found[: config.checkpoint.keep]
    return sum(path.stat().st_size for folder in for_new_ones for path in folder.rglob("*") if path.is_file())


def _existing(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _weights(subject: Subject, role: str) -> tuple[int, int]:
    """Those that are trained, and all that the exported model has."""
    parameters = list(subject.without_weights(role).parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in parameters)
    return trained, whole - trained if subject.trained[role].has_adapter else whole


CHECKS = [output_dir, earlier_checkpoints, disk_space, wandb_key]
