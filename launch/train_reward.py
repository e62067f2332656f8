"""Train a reward model on pairs of responses, one chosen and one rejected.

    deepspeed --num_accelerators 2 launch/train_reward.py --config launch/recipes/gsm8k_reward.yaml --output_dir runs/rm

Also under torchrun, and as plain `python` for one rank. Writes config.yaml, metrics.jsonl and the exported reward/ to
the output folder; the mean and standard deviation of its scores are in reward/config.json, and PPO takes them out.
Leaves out: resuming (a run that ends early starts again).
"""

from functools import partial
from pathlib import Path

import torch

from engine.config import RewardModelConfig, parse, resolved_dtype, run
from engine.data import create_datasets, create_eval_dataset
from engine.distributed import comm
from engine.distributed.checkpoint import export_huggingface
from engine.models.loading import load_tokenizer
from engine.models.scalar_head import load_scalar_head
from engine.supervised_engine import supervised_engine
from engine.tracking import Tracker
from engine.trainers.objectives import BradleyTerry
from engine.trainers.supervised_trainer import SupervisedTrainer

SHOWN = ("train/loss", "train/accuracy", "eval/accuracy")  # on the progress line


def main() -> None:
    config = parse(RewardModelConfig)
    comm.start(config)
    name = config.reward.model_name_or_path
    tokenizer = load_tokenizer(name, chat_template=config.data.chat_template)
    minibatches, num_iterations = create_datasets(args=config, tokenizer=tokenizer, train_phase=2)
    held_out = create_eval_dataset(args=config, tokenizer=tokenizer, train_phase=2)
    for what, examples in (("the examples", minibatches.dataset.examples), ("the held-out examples", held_out)):
        comm.check_same_everywhere({what: examples and examples.digest})
    dtype = resolved_dtype(config.dtype, on_gpu=comm.device().type == "cuda")
    # transformers finds a row's last real token by the pad id: were it EOS, it would score the token before.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
    sizes = dict(total_steps=num_iterations, tokenizer=tokenizer)
    build = partial(load_scalar_head, name, dtype=getattr(torch, dtype), pad_token_id=pad, seed=config.seed)
    reward = supervised_engine(build, config, role="reward", dtype=dtype, **sizes)

    trainer = SupervisedTrainer(reward, BradleyTerry(), config)
    with comm.same_error_everywhere():
        tracker = Tracker(config, num_iterations=num_iterations, is_main=comm.is_main(), shown=SHOWN)
    with tracker:
        trainer.train(minibatches, num_iterations, tracker, held_out)
        scores = trainer.numbers(minibatches.dataset.examples if held_out is None else held_out)
        reward.module.keep_normalisation(scores.mean().item(), scores.std(correction=0).item())
        export_huggingface(reward, Path(config.output_dir) / "reward", tokenizer)
    if comm.is_main():
        print(f"Done: {num_iterations} steps. Metrics and the exported reward model: {config.output_dir}")
    comm.shutdown()


if __name__ == "__main__":
    run(main)
