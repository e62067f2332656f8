"""Fine-tune a language model on demonstrations: prompts with the response to learn.

    deepspeed --num_accelerators 2 launch/train_sft.py --config launch/recipes/gsm8k_sft.yaml --output_dir runs/sft

Also under torchrun, and as plain `python` for one rank. Writes config.yaml, metrics.jsonl and the exported model/ to
the output folder. Leaves out: resuming (a run that ends early starts again).
"""

from functools import partial
from pathlib import Path

import torch

from engine.config import SFTConfig, parse, resolved_dtype, run
from engine.data import create_datasets, create_eval_dataset
from engine.distributed import comm
from engine.distributed.checkpoint import export_huggingface
from engine.models.language_model import load_language_model
from engine.models.loading import load_tokenizer
from engine.rollout.self_check import check_language_model
from engine.supervised_engine import supervised_engine
from engine.tracking import Tracker
from engine.trainers.objectives import NextToken
from engine.trainers.supervised_trainer import SupervisedTrainer

SHOWN = ("train/loss", "eval/loss", "eval/perplexity")  # on the progress line


def main() -> None:
    config = parse(SFTConfig)
    comm.start(config)
    name = config.model.model_name_or_path
    tokenizer = load_tokenizer(name, chat_template=config.data.chat_template)
    minibatches, num_iterations = create_datasets(args=config, tokenizer=tokenizer, train_phase=1)
    held_out = create_eval_dataset(args=config, tokenizer=tokenizer, train_phase=1)
    for what, examples in (("the examples", minibatches.dataset.examples), ("the held-out examples", held_out)):
        comm.check_same_everywhere({what: examples and examples.digest})
    dtype = resolved_dtype(config.dtype, on_gpu=comm.device().type == "cuda")
    sizes = dict(total_steps=num_iterations, tokenizer=tokenizer)
    build = partial(load_language_model, name, dtype=getattr(torch, dtype))
    model = supervised_engine(build, config, role="model", dtype=dtype, **sizes)
    check_language_model(model, role="model", decoding=False)

    trainer = SupervisedTrainer(model, NextToken(chunk_tokens=config.logits_chunk_tokens), config)
    with comm.same_error_everywhere():
        tracker = Tracker(config, num_iterations=num_iterations, is_main=comm.is_main(), shown=SHOWN)
    with tracker:
        trainer.train(minibatches, num_iterations, tracker, held_out)
        export_huggingface(model, Path(config.output_dir) / "model", tokenizer)
    if comm.is_main():
        print(f"Done: {num_iterations} steps. Metrics and the exported model: {config.output_dir}")
    comm.shutdown()


if __name__ == "__main__":
    run(main)
