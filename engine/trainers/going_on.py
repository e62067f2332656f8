"""A PPO trainer put where an earlier one stood: after an interruption, or because its actor ran away."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.data.batches import Endless
from engine.distributed.initialize import set_learning_rates
from engine.rollout.experience import Experience
from engine.tracking import Tracker
from engine.trainers.checkpoints import Checkpoints
from engine.trainers.progress import Progress

if TYPE_CHECKING:
    from engine.trainers.ppo_trainer import DeepSpeedPPOTrainer

# What a trainer knows of the iteration under way, beside its progress; numbers and texts.
OF_ITERATION = ("steps", "samples", "seconds", "unscored", "told")


def snapshot_of(trainer: DeepSpeedPPOTrainer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All that a trainer would need to go on from here, besides the models: small things, and tensors."""
    experience, pretraining = trainer.in_flight, trainer.update.pretraining
    state = {
        "progress": asdict(trainer.progress),
        "kl_coef_in_flight": None if experience is None else experience.kl_coef,
        "initial_answers": trainer.evaluation.snapshot(),
        "pretraining_drawn": 0 if pretraining is None else pretraining.drawn,
        **{name: getattr(trainer, name) for name in OF_ITERATION},
    }
    return state, {} if experience is None else experience.tensors()


def put_back(trainer: DeepSpeedPPOTrainer, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Let a trainer take up what `snapshot_of` said; the models have been put back."""
    trainer.progress = Progress.of(state["progress"])
    trainer.resumed_at = trainer.progress.iteration
    for name in OF_ITERATION:
        setattr(trainer, name, state[name])
    trainer.evaluation.put_back(state["initial_answers"])
    trainer.in_flight = None
    if state["kl_coef_in_flight"] is not None:
        trainer.in_flight = Experience.of_tensors(tensors, kl_coef=state["kl_coef_in_flight"])
    if trainer.update.pretraining is not None:
        trainer.update.pretraining = Endless(trainer.update.pretraining.batches, drawn=state["pretraining_drawn"])
    _slow_down(trainer)


def go_back(trainer: DeepSpeedPPOTrainer, checkpoints: Checkpoints | None, tracker: Tracker) -> None:
    """To the newest checkpoint whose actor was not too far away, and on with smaller learning rates. A collective.

    An iteration's experience shows how far the steps of the one before went: what was saved after those is of no use.

    Raises:
        RuntimeError: there is none, or it has been done often enough.
    """
    guard, times = trainer.config.kl_guard, trainer.progress.roll_backs + 1
    iteration, kl = trainer.progress.iteration, trainer.in_flight.kl.sum().item() / trainer.in_flight.num_scored
    said = f"iteration {iteration}: the KL to the ref is {kl:.3g} nats per response, more than kl_guard.max_kl="
    said += str(guard.max_kl)
    may = checkpoints is not None and times <= guard.roll_backs
    kept = checkpoints.go_back(before=iteration - 1) if may else None
    if kept is None:
        raise RuntimeError(f"{said}: the run stops. Raise kl_coef, or lower the learning rates.")
    put_back(trainer, *kept)
    trainer.progress.roll_backs = times
    _slow_down(trainer)
    tracker.go_back_to(trainer.iterations_done)
    rates = f"learning rates times {guard.factor**times:.3g}"
    tracker.warn(trainer.progress.iteration, "rolled back", f"{said}: back to here, with {rates}.")


def _slow_down(trainer: DeepSpeedPPOTrainer) -> None:
    """Learning rates as often made smaller as the run was sent back."""
    times = trainer.progress.roll_backs
    for engine in trainer.rlhf_engine.trained.engines.values() if times else ():
        factor = trainer.config.kl_guard.factor**times
        set_learning_rates(engine, schedule_step=engine.lr_scheduler.last_epoch, factor=factor)
