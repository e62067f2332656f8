"""Runs that are stopped and gone on with, on real ranks: each function here runs on every rank."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import runs
import stages
from runs import Log, digest

from engine.config import PPOConfig, SupervisedConfig
from engine.distributed import comm
from engine.distributed.checkpoint import Trained
from engine.distributed.checkpoint_folder import checkpoints_in
from engine.distributed.pieces import my_pieces
from engine.trainers.checkpoints import Checkpoints


class Logged(Log):
    """What a checkpoint asks a tracker for, too."""

    wandb_id = "abc"


class StopAt:
    """A stop request that is heard the n-th time that the run asks: on rank 1 alone."""

    def __init__(self, time: int | None):
        self.left = time

    def agreed(self) -> bool:
        if self.left is None:
            return False
        self.left -= 1
        return comm.any_true(comm.rank() == comm.world_size() - 1 and self.left <= 0)


def moments(engine) -> str:
    """A hash of every bit of this rank's weights and moments."""
    state = hashlib.sha256()
    for piece in my_pieces(engine):
        state.update(f"{piece.name} {piece.what} {piece.start}".encode())
        state.update(piece.tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def go(config: PPOConfig | SupervisedConfig, stop_at: int | None = None) -> dict[str, Any]:
    """A run from its beginning, or from where `config.resume` says: all that can be compared."""
    log = Logged()
    if isinstance(config, PPOConfig):
        trainer, data = runs.build(config)
        trained, args = trainer.rlhf_engine.trained, (data, config.num_iterations, log)
    else:
        trainer, data, held_out, _ = stages.build(config)
        trained, args = Trained(engines={"model": trainer.model}, averages={}), (data, config.num_iterations, log)
        args = (*args, held_out)
    checkpoints = Checkpoints(config, trained, contents={}, stop=StopAt(stop_at))
    if (kept := checkpoints.load()) is not None:
        trainer.go_on_from(*kept)
    began = trainer.iterations_done
    finished = trainer.train(*args, checkpoints=checkpoints)
    return {
        "began": began,
        "finished": finished,
        "metrics": log.metrics,
        "samples": log.samples,
        "evaluations": log.evaluations,
        "evaluation_samples": log.evaluation_samples,
        "warnings": log.warnings,
        "moments": {role: moments(engine) for role, engine in trained.engines.items()},
        "weights": {role: digest(engine) for role, engine in trained.engines.items()},
        "whole": {role: runs.weights(engine) for role, engine in trained.engines.items()},
        "averages": {
            role: [shard.tolist() for shard in average.shards.values()] for role, average in trained.averages.items()
        },
        "schedule": {role: engine.get_lr() for role, engine in trained.engines.items()},
        "checkpoints": [path.name for path in checkpoints_in(Path(config.output_dir) / "checkpoints")],
    }


def responses(config: PPOConfig) -> dict[str, Any]:
    """The token ids of every iteration's prompts and responses, of all ranks, and the metrics."""
    trainer, prompts = runs.build(config)
    tokens, generate, log = [], trainer.generate_experience, Logged()

    def listening(batch):
        experience = generate(batch)
        tokens.append(experience.sequences.tokens.tolist())
        return experience

    trainer.generate_experience = listening
    trainer.train(prompts, config.num_iterations, log)
    return {"tokens": tokens, "metrics": log.metrics}


def forget_after(config: PPOConfig | SupervisedConfig, iteration: int) -> None:
    """Remove the later checkpoints, as if the run had been killed after this one."""
    if comm.is_main():
        for path in checkpoints_in(Path(config.output_dir) / "checkpoints"):
            if int(path.name.rpartition("_")[2]) > iteration:
                shutil.rmtree(path)
    comm.barrier()
