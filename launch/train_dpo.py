"""Train a language model on pairs of responses directly, without a reward model: DPO, conservative DPO, IPO.

    deepspeed --num_accelerators 2 launch/train_dpo.py --config launch/recipes/gsm8k_dpo.yaml --output_dir runs/dpo

Also under torchrun, and as plain `python` for one rank. Writes config.yaml, metrics.jsonl and the exported model/ to
the output folder; `--resume auto` goes on with a run that ended early.
"""

from pathlib import Path

import engine.startup  # noqa: F401 - first
from engine.config import DPOConfig, parse, run
from engine.distributed.export import export_huggingface
from engine.distributed.run import Run
from engine.trainers.supervised_stages import Stage, dpo_stage

SHOWN = ("train/loss", "train/accuracy", "eval/accuracy")  # on the progress line


def main() -> None:
    config = parse(DPOConfig)
    with Run(config) as this_run:
        stage = dpo_stage(config)
        checkpoints, tracker = stage.begin(this_run, shown=SHOWN)
        with tracker:
            if stage.train(tracker, checkpoints):
                export(stage, config)


def export(stage: Stage, config: DPOConfig) -> None:
    folder = Path(config.output_dir) / "model"
    export_huggingface(stage.model, folder, stage.tokenizer, form=config.export_form)


if __name__ == "__main__":
    run(main)
