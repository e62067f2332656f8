"""Fine-tune a language model on demonstrations: prompts with the response to learn.

    deepspeed --num_accelerators 2 launch/train_sft.py --config launch/recipes/gsm8k_sft.yaml --output_dir runs/sft

Also under torchrun, and as plain `python` for one rank. Writes config.yaml, metrics.jsonl and the exported model/ to
the output folder; `--resume auto` goes on with a run that ended early.
"""

from pathlib import Path

import engine.startup  # noqa: F401 - first
from engine.config import SFTConfig, parse, run
from engine.distributed.export import export_huggingface
from engine.distributed.run import Run
from engine.trainers.supervised_stages import Stage, sft_stage

SHOWN = ("train/loss", "eval/loss", "eval/perplexity")  # on the progress line


def main() -> None:
    config = parse(SFTConfig)
    with Run(config) as this_run:
        stage = sft_stage(config)
        checkpoints, tracker = stage.begin(this_run, shown=SHOWN)
        with tracker:
            if stage.train(tracker, checkpoints):
                export(stage, config)


def export(stage: Stage, config: SFTConfig) -> None:
    folder = Path(config.output_dir) / "model"
    export_huggingface(stage.model, folder, stage.tokenizer, form=config.export_form)


if __name__ == "__main__":
    run(main)
