"""One rank of a run under way: it has joined the others, holds the run's folder, listens for signals and watches."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from engine.config import as_dict
from engine.config.secrets import shown
from engine.distributed import comm
from engine.distributed.checkpoint_folder import refuse_to_begin_beside
from engine.distributed.stopping import StopRequest
from engine.distributed.watch import Watch
from engine.run_folder import claim, release


class Run:
    """For the length of a `with` block.

    Attributes:
        stop: whether somebody has asked the run to stop.
        watch: over the other ranks.
        listeners: told the phase and the iteration whenever one begins.
    """

    def __init__(self, config: Any):
        """Join the process group.

        Raises:
            ValueError: on every rank, when the ranks were started with different settings or versions, cannot share
                out the run's sizes, or cannot have `output_dir`: another run has it, or an earlier one left checkpoints
                and `resume` is not set.
        """
        comm.init_distributed(timeout_s=config.distributed_timeout_s)
        self.stop = StopRequest.listening()
        try:
            config.check_world_size(comm.world_size())
            comm.check_same_everywhere(
                {"the configuration": shown(as_dict(config)), "the installed versions": comm.versions()}
            )
            with comm.same_error_everywhere():
                self.lock = _claimed(config) if comm.is_main() else None
        except ValueError:
            self.stop.close()
            comm.leave()
            raise
        self.watch = Watch()
        self.listeners: list[Callable[[str, int], None]] = [self.watch.tell]

    def tell(self, phase: str, iteration: int) -> None:
        """What this rank begins to do; for whoever takes `on_phase`."""
        for listener in self.listeners:
            listener(phase, iteration)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            comm.barrier()
        self.watch.close(error)
        if error is None:
            comm.shutdown()
        if self.lock is not None:
            release(self.lock)
        self.stop.close()  # last: a signal that comes now asks for what is being done


def _claimed(config: Any) -> TextIO:
    """The lock of the run's folder.

    Raises:
        ValueError: see `claim`; or there are checkpoints of an earlier run, and `resume` is not set.
    """
    lock = claim(config.output_dir)
    try:
        if config.resume is None:
            refuse_to_begin_beside(Path(config.output_dir) / "checkpoints")
    except ValueError:
        release(lock)
        raise
    return lock
