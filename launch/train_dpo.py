"""Train a language model on pairs of responses directly, without a reward model: DPO, conservative DPO, IPO.

    deepspeed --num_accelerators 2 launch/train_dpo.py --config launch/recipes/gsm8k_dpo.yaml --output_dir runs/dpo

Also under torchrun, and as plain `python` for one rank. Writes config.yaml, metrics.jsonl and the exported model/ to
the output folder. Leaves out: resuming (a run that ends early starts again).
"""

from functools import partial
from pathlib import Path

import torch

from engine.config import DPOConfig, parse, resolved_dtype, run
from engine.data import create_datasets, create_eval_dataset
from engine.distributed import comm
from engine.distributed.checkpoint import export_huggingface
from engine.models.language_model import load_language_model
from engine.models.loading import load_tokenizer
from engine.rollout.self_check import check_language_model
from engine.supervised_engine import supervised_engine
from engine.tracking import Tracker
from engine.trainers.objectives import DirectPreference
from engine.trainers.ref_logprobs import online, ref_engine, with_ref_logprobs
from engine.trainers.supervised_trainer import SupervisedTrainer

SHOWN = ("train/loss", "train/accuracy", "eval/accuracy")  # on the progress line


def main() -> None:
    config = parse(DPOConfig)
    comm.start(config)
    name = config.model.model_name_or_path
    tokenizer = load_tokenizer(name, chat_template=config.data.chat_template)
    minibatches, num_iterations = create_datasets(args=config, tokenizer=tokenizer, train_phase=2)
    held_out = create_eval_dataset(args=config, tokenizer=tokenizer, train_phase=2)
    for what, examples in (("the examples", minibatches.dataset.examples), ("the held-out examples", held_out)):
        comm.check_same_everywhere({what: examples and examples.digest})
    dtype = resolved_dtype(config.dtype, on_gpu=comm.device().type == "cuda")
    if config.ref_logprobs == "precomputed":
        numbers, ask = minibatches.dataset, None
        parts = [numbers.examples] if held_out is None else [numbers.examples, held_out]
        numbers.examples, *rest = with_ref_logprobs(parts, config, dtype=dtype)
        held_out = rest[0] if rest else None
    else:
        ask = online(ref_engine(config, dtype=dtype), config)
    sizes = dict(total_steps=num_iterations, tokenizer=tokenizer)
    build = partial(load_language_model, name, dtype=getattr(torch, dtype))
    model = supervised_engine(build, config, role="model", dtype=dtype, **sizes)
    check_language_model(model, role="model", decoding=False)

    given = dict(loss=config.loss, beta=config.beta, label_smoothing=config.label_smoothing)
    trainer = SupervisedTrainer(model, DirectPreference(ask, **given, chunk_tokens=config.logits_chunk_tokens), config)
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
