"""Train a reward model on pairs of responses, one chosen and one rejected.

    deepspeed --num_accelerators 2 launch/train_reward.py --config launch/recipes/gsm8k_reward.yaml --output_dir runs/rm

Also under torchrun, and as plain `python` for one rank. Writes config.yaml, metrics.jsonl and the exported reward/ to
the output folder; the mean and standard deviation of its scores are in reward/config.json, and PPO takes them out.
Leaves out: resuming (a run that ends early starts again).
"""

from pathlib import Path

from engine.config import RewardModelConfig, parse, run
from engine.distributed import comm
from engine.distributed.checkpoint import export_huggingface
from engine.tracking import Tracker
from engine.trainers.supervised_stages import reward_model_stage

SHOWN = ("train/loss", "train/accuracy", "eval/accuracy")  # on the progress line


def main() -> None:
    config = parse(RewardModelConfig)
    comm.start(config)
    stage = reward_model_stage(config)
    with comm.same_error_everywhere():
        tracker = Tracker(config, num_iterations=stage.num_iterations, is_main=comm.is_main(), shown=SHOWN)
    with tracker:
        stage.train(tracker)
        scores = stage.trainer.numbers(stage.minibatches.dataset.examples if stage.held_out is None else stage.held_out)
        stage.model.module.keep_normalisation(scores.mean().item(), scores.std(correction=0).item())
        folder = Path(config.output_dir) / "reward"
        export_huggingface(stage.model, folder, stage.tokenizer, form=config.export_form)
    if comm.is_main():
        print(f"Done: {stage.num_iterations} steps. Metrics and the exported reward model: {config.output_dir}")
    comm.shutdown()


if __name__ == "__main__":
    run(main)
