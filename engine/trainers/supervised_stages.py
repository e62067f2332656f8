"""SFT, reward model and DPO put together from their parts: data, model, objective and trainer of one run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from engine.config import DPOConfig, RewardModelConfig, SFTConfig, SupervisedConfig, resolved_dtype
from engine.data import Examples, create_datasets, create_eval_dataset
from engine.data.examples import create_example_dataloader
from engine.distributed import comm
from engine.distributed.checkpoint import Trained
from engine.distributed.initialize import Engine, WithoutAdapter
from engine.distributed.run import Run
from engine.models.language_model import load_language_model
from engine.models.loading import content_digest, load_tokenizer
from engine.models.scalar_head import load_scalar_head, scoring_pad_token_id
from engine.rollout.self_check import check_language_model
from engine.supervised_engine import supervised_engine
from engine.tracking import Tracker
from engine.tracking.summary import remove_plan
from engine.trainers.banner import print_banner, supervised_banner
from engine.trainers.checkpoints import Checkpoints
from engine.trainers.objectives import BradleyTerry, DirectPreference, NextToken, Objective
from engine.trainers.ref_logprobs import online, ref_engine, with_ref_logprobs
from engine.trainers.supervised_trainer import SupervisedTrainer


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run that is ready to begin.

    Attributes:
        minibatches: of all ranks, the same on every rank.
        num_iterations: optimizer steps.
        held_out: what is evaluated on, if anything.
        contents: digests of the models and the data.
    """

    model: Engine
    trainer: SupervisedTrainer
    tokenizer: PreTrainedTokenizerBase
    minibatches: DataLoader
    num_iterations: int
    held_out: Examples | None
    contents: dict[str, str | None]

    def begin(self, this_run: Run, *, shown: Sequence[str]) -> tuple[Checkpoints, Tracker]:
        """Go on from where `--resume` says. A collective.

        Args:
            shown: the metrics of the progress line.
        """
        config, trained = self.trainer.config, Trained(engines={"model": self.model}, averages={})
        heard = dict(stop=this_run.stop, on_phase=this_run.tell)
        checkpoints = Checkpoints(config, trained, contents=self.contents, **heard)
        given = dict(num_iterations=self.num_iterations, is_main=comm.is_main(), shown=shown)
        self.trainer.on_phase = this_run.tell
        if comm.is_main():
            remove_plan(Path(config.output_dir))
        print_banner(supervised_banner(config, self.model, self.num_iterations))
        tracker = checkpoints.go_on(self.trainer, self.num_iterations, partial(Tracker, config, **given))
        this_run.listeners.append(tracker.phase)
        return checkpoints, tracker

    def train(self, tracker: Tracker, checkpoints: Checkpoints | None = None) -> bool:
        """The whole run; whether it came to its end. See `SupervisedTrainer.train`."""
        return self.trainer.train(self.minibatches, self.num_iterations, tracker, self.held_out, checkpoints)


def sft_stage(config: SFTConfig) -> Stage:
    """A language model and demonstrations. A collective.

    Raises:
        ValueError: on every rank, for data or a model that does not fit.
    """
    tokenizer, train, held_out = _data(config, config.model.model_name_or_path, train_phase=1)
    model = _language_model(config, tokenizer, train)
    return _stage(config, model, NextToken(chunk_tokens=config.logits_chunk_tokens), tokenizer, train, held_out)


def reward_model_stage(config: RewardModelConfig) -> Stage:
    """A model with a score head, and pairs of responses; as `sft_stage`."""
    name = config.reward.model_name_or_path
    tokenizer, train, held_out = _data(config, name, train_phase=2)
    given = dict(seed=config.seed, quantization=config.reward.quantization)
    build = partial(load_scalar_head, name, pad_token_id=scoring_pad_token_id(tokenizer), **given)
    model = _engine(config, build, tokenizer, train, role="reward")
    return _stage(config, model, BradleyTerry(), tokenizer, train, held_out)


def dpo_stage(config: DPOConfig) -> Stage:
    """A language model, its ref and pairs of responses; as `sft_stage`. A precomputed ref has been freed again."""
    tokenizer, train, held_out = _data(config, config.model.model_name_or_path, train_phase=2)
    dtype, ask = _dtype(config), None
    if config.ref_logprobs == "precomputed":
        parts = [train] if held_out is None else [train, held_out]
        train, *rest = with_ref_logprobs(parts, config, dtype=dtype)
        held_out = rest[0] if rest else None
    elif not config.ref_is_the_model:
        ask = online(ref_engine(config, dtype=dtype), config)
    model = _language_model(config, tokenizer, train)
    if config.ref_is_the_model:
        ask = online(WithoutAdapter(model), config)
    given = dict(loss=config.loss, beta=config.beta, label_smoothing=config.label_smoothing, sft_coef=config.sft_coef)
    objective = DirectPreference(ask, **given, chunk_tokens=config.logits_chunk_tokens)
    return _stage(config, model, objective, tokenizer, train, held_out)


def _data(
    config: SupervisedConfig, model_name_or_path: str, *, train_phase: int
) -> tuple[PreTrainedTokenizerBase, Examples, Examples | None]:
    with comm.same_error_everywhere():
        tokenizer = load_tokenizer(model_name_or_path, chat_template=config.data.chat_template)
        minibatches, _ = create_datasets(config, tokenizer, train_phase=train_phase)
        train, held_out = minibatches.dataset.examples, create_eval_dataset(config, tokenizer, train_phase=train_phase)
    for what, examples in (("the examples", train), ("the held-out examples", held_out)):
        comm.check_same_everywhere({what: examples and examples.digest})
    return tokenizer, train, held_out


def _language_model(config: SFTConfig | DPOConfig, tokenizer: PreTrainedTokenizerBase, train: Examples) -> Engine:
    given = dict(quantization=config.model.quantization)
    build = partial(load_language_model, config.model.model_name_or_path, **given)
    model = _engine(config, build, tokenizer, train, role="model")
    check_language_model(model, role="model", decoding=False)
    return model


def _engine(config: SupervisedConfig, build: Callable, tokenizer, train: Examples, *, role: str) -> Engine:
    _, total_steps = create_example_dataloader(config, train)
    dtype = _dtype(config)
    build = partial(build, dtype=getattr(torch, dtype))
    return supervised_engine(build, config, role=role, dtype=dtype, total_steps=total_steps, tokenizer=tokenizer)


def _stage(
    config: SupervisedConfig,
    model: Engine,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples,
    held_out: Examples | None,
) -> Stage:
    minibatches, num_iterations = create_example_dataloader(config, train)
    contents = {"the examples": train.digest, "the held-out examples": held_out and held_out.digest}
    with comm.same_error_everywhere():
        contents |= {f"the {role}'s weights": content_digest(name) for role, name in config.models.items()}
    return Stage(
        model=model,
        trainer=SupervisedTrainer(model, objective, config),
        tokenizer=tokenizer,
        minibatches=minibatches,
        num_iterations=num_iterations,
        held_out=held_out,
        contents=contents,
    )


def _dtype(config: SupervisedConfig) -> str:
    return resolved_dtype(config.dtype, on_gpu=comm.device().type == "cuda")
