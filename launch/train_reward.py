"""Train a reward model on pairs of responses, one chosen and one rejected.

    deepspeed --num_accelerators 2 launch/train_reward.py --config launch/recipes/gsm8k_reward.yaml --output_dir runs/rm

Also under torchrun, and as plain `python` for one rank. Writes config.yaml, metrics.jsonl and the exported reward/ to
the output folder; the mean and standard deviation of its scores are in reward/config.json, and PPO takes them out.
`--resume auto` goes on with a run that ended early.
"""

from pathlib import Path

import engine.startup  # noqa: F401 - first
from engine.config import RewardModelConfig, parse, run
from engine.distributed.export import export_huggingface
from engine.distributed.run import Run
from engine.trainers.supervised_stages import Stage, reward_model_stage

SHOWN = ("train/loss", "train/accuracy", "eval/accuracy")  # on the progress line


def main() -> None:
    config = parse(RewardModelConfig)
    with Run(config) as this_run:
        stage = reward_model_stage(config)
        checkpoints, tracker = stage.begin(this_run, shown=SHOWN)
        with tracker:
            if stage.train(tracker, checkpoints):
                export(stage, config)


def export(stage: Stage, config: RewardModelConfig) -> None:
    scores = stage.trainer.numbers(stage.minibatches.dataset.examples if stage.held_out is None else stage.held_out)
    stage.model.module.keep_normalisation(scores.mean().item(), scores.std(correction=0).item())
    folder = Path(config.output_dir) / "reward"
    export_huggingface(stage.model, folder, stage.tokenizer, form=config.export_form)


if __name__ == "__main__":
    run(main)
