"""When a run saves, and what it goes on from."""

from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from torch import Tensor

from engine.config import PPOConfig, SupervisedConfig, settings_that_stay
from engine.data import PromptDataset
from engine.data.examples import Examples
from engine.distributed import comm
from engine.distributed.checkpoint import Trained, load_checkpoint, newest_checkpoint, save_checkpoint
from engine.distributed.checkpoint_folder import refuse_to_begin_beside, remove_checkpoints
from engine.distributed.stopping import StopRequest
from engine.models.loading import content_digest
from engine.tracking import Tracker


class Trainer(Protocol):
    """One that can be put where an earlier one stood."""

    iterations_done: int

    def go_on_from(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None: ...


Snapshot = Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]  # small things as JSON, and tensors


def contents_of(
    config: PPOConfig, prompts: PromptDataset, held_out: PromptDataset | None, demonstrations: Examples | None
) -> dict[str, str | None]:
    """Digests of the models and the data of a PPO run, by what they are of."""
    weights = {f"the {role}'s weights": content_digest(name) for role, name in config.models.items()}
    return weights | {
        "the prompts": prompts.digest,
        "the prompts' columns": prompts.columns_digest,
        "the held-out prompts": held_out and held_out.digest + held_out.columns_digest,
        "the demonstrations": demonstrations and demonstrations.digest,
    }


class Checkpoints:
    """The checkpoints of one run, in `output_dir`/checkpoints."""

    def __init__(
        self,
        config: PPOConfig | SupervisedConfig,
        trained: Trained,
        *,
        contents: dict[str, Any],
        stop: StopRequest | None = None,
        on_phase: Callable[[str, int], None] | None = None,
    ):
        """
        Args:
            contents: digests of the models and the data; a run that goes on has the same.
            stop: whether somebody has asked the run to stop.
            on_phase: told the phase, save, and the iteration whenever one begins.
        """
        self.on_phase, self.num_iterations = on_phase, None
        self.settings, self.resume, self.trained, self.request = config.checkpoint, config.resume, trained, stop
        self.root = Path(config.output_dir) / "checkpoints"
        self.identity = settings_that_stay(config) | contents
        self.saved_at = monotonic()

    def go_on(self, trainer: Trainer, num_iterations: int, new_tracker: Callable[..., Tracker]) -> Tracker:
        """Put a trainer where `--resume` says, and make the tracker of a run that begins or goes on there.

        A collective.

        Args:
            num_iterations: of the whole run.
            new_tracker: takes `resumed_at`, `wandb_id`, `device` and `world_size`, as `Tracker` does.

        Raises:
            ValueError: as `load` and `Tracker`.
        """
        self.num_iterations, kept = num_iterations, self.load()
        if kept is None:
            given = {}
        else:
            state, tensors = kept
            trainer.go_on_from(state, tensors)
            self._tell_of_its_length(trainer.iterations_done, state["num_iterations"], num_iterations)
            given = dict(resumed_at=trainer.iterations_done, wandb_id=state["wandb_id"])
        with comm.same_error_everywhere():
            return new_tracker(**given, device=comm.device_name(), world_size=comm.world_size())

    def _tell_of_its_length(self, done: int, before: int | None, now: int) -> None:
        """
        Raises:
            ValueError: on every rank, when the run has more iterations behind it than it is to have.
        """
        if done > now:
            raise ValueError(f"The run has {done} iterations behind it, and is to have {now}: raise num_iterations.")
        if comm.is_main() and done == now:
            print(f"All {now} iterations are done: what is left is to write the models.", flush=True)
        elif comm.is_main() and before not in (None, now):
            print(
                f"Note: the run was to have {before} iterations and is to have {now}: learning rates that fall with "
                f"the iterations fall with the new number.",
                flush=True,
            )

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What the run goes on from, by `--resume`; the models have it already. None for a run that begins.

        A collective.

        Raises:
            ValueError: on every rank, when there are checkpoints and nobody has said what to do about them; or see
                `newest_checkpoint`.
        """
        if self.resume == "auto":
            return self.load_newest()
        with comm.same_error_everywhere():
            if comm.is_main() and self.resume == "never":
                remove_checkpoints(self.root)
            elif comm.is_main():
                refuse_to_begin_beside(self.root)
        return None

    def go_back(self, *, before: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Go back to the newest checkpoint of an iteration before this one, and remove the later ones; None where there
        is none. A collective.
        """
        kept = self.load_newest(before=before)
        with comm.same_error_everywhere():
            if kept is not None and comm.is_main():
                remove_checkpoints(self.root, after=before - 1)
        return kept

    def load_newest(self, *, before: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Go back to the newest checkpoint, of an iteration before this one; None where there is none. A collective.

        Raises:
            ValueError: see `newest_checkpoint`.
        """
        folder = newest_checkpoint(self.root, self.identity, before=before)
        if folder is None:
            return None
        kept = load_checkpoint(folder, self.trained)
        if comm.is_main():
            print(f"Going on from {folder}.", flush=True)
        return kept

    def stop_asked(self) -> bool:
        """Whether the run has been asked to stop. A collective."""
        return self.request is not None and self.request.agreed()

    def after(self, iteration: int, snapshot: Snapshot, tracker: Tracker) -> None:
        """Save if it is time to: `checkpoint.every` iterations or `checkpoint.minutes` have passed. A collective."""
        every, minutes = self.settings.every, self.settings.minutes
        late = minutes is not None and monotonic() - self.saved_at >= 60 * minutes
        by_the_clock = minutes is not None and comm.of_main(late)  # the ranks' clocks differ
        if by_the_clock or (every is not None and iteration % every == 0):
            self.save(iteration, snapshot, tracker)

    def save(self, iteration: int, snapshot: Snapshot, tracker: Tracker) -> bool:
        """Now. A collective.

        Returns:
            Whether it was written.
        """
        if self.on_phase is not None:
            self.on_phase("save", iteration)
        state, tensors = snapshot()
        state = {"wandb_id": tracker.wandb_id, "num_iterations": self.num_iterations, **state}
        given = dict(state=state, tensors=tensors, identity=self.identity, keep=self.settings.keep)
        written = save_checkpoint(self.root, iteration, self.trained, **given)
        self.saved_at = monotonic()
        return written

    def stop(self, iteration: int, snapshot: Snapshot, tracker: Tracker) -> None:
        """Save, and say how the run goes on. A collective."""
        written = self.save(iteration, snapshot, tracker)
        if comm.is_main():
            how = "go on with --resume auto" if written else "--resume auto goes on from an earlier checkpoint"
            print(f"Stopped in iteration {iteration} as asked: {how}.", flush=True)
