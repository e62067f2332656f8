"""Whole runs of SFT, reward model and DPO on real ranks: each function here runs on every rank."""

import io
import sys
import traceback
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from runs import Log, digest, weights

from engine.config import DPOConfig, RewardModelConfig, SFTConfig, SupervisedConfig, as_dict, run
from engine.data import Examples, create_datasets
from engine.distributed import comm
from engine.trainers.objectives import BradleyTerry, NextToken
from engine.trainers.supervised_stages import dpo_stage, reward_model_stage, sft_stage
from engine.trainers.supervised_trainer import SupervisedTrainer


def build(config: SupervisedConfig) -> tuple[SupervisedTrainer, Any, Examples | None, Any]:
    """A trainer, its minibatches, what is held out, and DPO's ref if there is one in memory."""
    stage = {SFTConfig: sft_stage, RewardModelConfig: reward_model_stage, DPOConfig: dpo_stage}[type(config)](config)
    ask = getattr(stage.trainer.objective, "ref_logprobs", None)
    return stage.trainer, stage.minibatches, stage.held_out, ask and ask.args[0]


def train(config: SupervisedConfig) -> dict[str, Any]:
    """A run's metrics, the final weights, the model's hash, whether DPO's ref stayed as it was, and how many weights
    lie whole on this rank when nobody gathers them.
    """
    trainer, minibatches, held_out, ref = build(config)
    log, before = Log(), digest(ref) if ref else None
    trainer.train(minibatches, config.num_iterations, log, held_out)
    whole = sum(parameter.numel() for parameter in trainer.model.module.parameters())
    return {
        "whole": whole,
        "metrics": log.metrics,
        "weights": weights(trainer.model),
        "model": digest(trainer.model),
        "frozen": ref and digest(ref) == before,
    }


def script(stage: str, config: SupervisedConfig) -> dict[str, Any]:
    """What `launch/train_<stage>.py` prints and, just before the export, the live model says of its training set."""
    module, kept = import_module(f"launch.train_{stage}"), {}
    export, shutdown = module.export_huggingface, comm.shutdown

    def listening(engine, folder, tokenizer, **given):
        module.export_huggingface = export
        phase = 1 if stage == "sft" else 2
        objective = BradleyTerry() if stage == "reward" else NextToken(chunk_tokens=16)
        minibatches, _ = create_datasets(config, tokenizer, train_phase=phase)
        kept["numbers"] = SupervisedTrainer(engine, objective, config).numbers(minibatches.dataset.examples)
        export(engine, folder, tokenizer, **given)

    module.export_huggingface, comm.shutdown = listening, comm.barrier
    try:
        with redirect_stdout(io.StringIO()) as printed:
            _call(module.main, config)
    finally:
        module.export_huggingface, comm.shutdown = export, shutdown
    return kept | {"printed": printed.getvalue()}


def refusal(stage: str, config: SupervisedConfig) -> str:
    """The message with which `launch/train_<stage>.py` ends; the traceback where it is more than a message."""
    module, shutdown = import_module(f"launch.train_{stage}"), comm.shutdown
    comm.shutdown = comm.barrier
    try:
        _call(partial(run, module.main), config)
    except SystemExit as end:
        return str(end.code)
    except Exception:
        return traceback.format_exc()
    finally:
        comm.shutdown = shutdown
    return "the run was not refused"


def _call(main, config: SupervisedConfig) -> None:
    """`main()` with the command line that gives this config."""
    path = Path(config.output_dir).with_name(f"recipe_{comm.rank()}.yaml")
    path.write_text(yaml.safe_dump(as_dict(config)))
    before, sys.argv = sys.argv, ["train", "--config", str(path)]
    try:
        main()
    finally:
        sys.argv = before
