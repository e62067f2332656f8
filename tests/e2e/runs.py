"""Whole PPO runs on real ranks, for the tests of this folder: each function here runs on every rank."""

import hashlib
from typing import Any

import torch

from engine.config import PPOConfig
from engine.data import create_datasets, create_eval_dataset, create_pretraining_dataset
from engine.distributed.gather import gathered
from engine.models.loading import load_tokenizer
from engine.rlhf_engine import DeepSpeedRLHFEngine
from engine.trainers.ppo_trainer import DeepSpeedPPOTrainer

UNCOMPARABLE = ("time/", "speed/", "memory/")


class Log:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.metrics: list[dict[str, float]] = []
        self.samples: list[dict[str, Any]] = []
        self.warnings: list[tuple[int, str, str]] = []
        self.quarantined: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, float]] = []
        self.evaluation_samples: list[dict[str, Any]] = []
        self.token_views: list[dict[str, Any]] = []

    def log(self, iteration: int, metrics: dict[str, float], samples: list[dict[str, Any]], histograms=None) -> None:
        self.metrics.append({name: v for name, v in metrics.items() if not name.startswith(UNCOMPARABLE)})
        self.samples.extend(samples)

    def warn(self, iteration: int, name: str, sentence: str) -> None:
        self.warnings.append((iteration, name, sentence))

    def quarantine(self, rows: list[dict[str, Any]]) -> None:
        self.quarantined.extend(rows)

    def evaluation(self, iteration: int, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        self.evaluations.append({"iteration": iteration, **metrics})
        self.evaluation_samples.extend({"iteration": iteration, **row} for row in samples)

    def token_view(self, iteration: int, view: dict[str, Any]) -> None:
        self.token_views.append({"iteration": iteration, **view})

    def go_back_to(self, iteration: int) -> None:
        del self.metrics[iteration:]


def build(config: PPOConfig) -> tuple[DeepSpeedPPOTrainer, Any]:
    """A trainer and its prompts."""
    tokenizer = load_tokenizer(config.model_of("actor"))
    prompts, num_iterations = create_datasets(config, tokenizer, train_phase=3)
    engine = DeepSpeedRLHFEngine(config.model_of("actor"), config.model_of("critic"), tokenizer, num_iterations, config)
    held_out = create_eval_dataset(config, tokenizer, train_phase=3)
    pretraining = create_pretraining_dataset(config, tokenizer)
    return DeepSpeedPPOTrainer(engine, config, pretraining, held_out=held_out), prompts


def weights(engine) -> dict[str, torch.Tensor]:
    """Every parameter, whole, on every rank."""
    whole = {}
    for name, parameter in engine.module.named_parameters():
        with gathered([parameter]):
            whole[name] = parameter.detach().float().cpu().clone()
    return whole


def digest(engine) -> str:
    """A hash of every bit of the weights."""
    state = hashlib.sha256()
    for tensor in weights(engine).values():
        state.update(tensor.numpy().tobytes())
    return state.hexdigest()


def train(config: PPOConfig, keep_weights: bool = False) -> dict[str, Any]:
    """A run's metrics, whether the frozen models stayed so, and with `keep_weights` the trained ones' final weights."""
    trainer, prompts = build(config)
    frozen = [engine for engine in (trainer.ref, trainer.reward) if engine]
    log, before = Log(), [digest(engine) for engine in frozen]
    trainer.train(prompts, config.num_iterations, log)
    trained = {role: engine for role in ("actor", "critic") if (engine := getattr(trainer, role)) is not None}
    result = {
        "metrics": log.metrics,
        "samples": log.samples,
        "evaluations": log.evaluations,
        "evaluation_samples": log.evaluation_samples,
        "token_views": log.token_views,
        "frozen": [digest(engine) for engine in frozen] == before and len(before),
        "steps": len(trainer.steps),
        **{role: digest(engine) for role, engine in trained.items()},
    }
    if keep_weights:
        result["weights"] = {role: weights(engine) for role, engine in trained.items()}
    return result
