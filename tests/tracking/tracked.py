"""A tracked run without models, as a process: `python tracked.py OUT [--wait] [--wandb MODE]`."""

import argparse
import sys
from pathlib import Path

from engine.config import DemonstrationDataConfig, FrozenRoleConfig, SFTConfig, TrackingConfig
from engine.tracking import Tracker

METRICS = {"score/mean": 1.5, "kl/ref_mean": 0.25, "time/train_s": 0.5, "speed/response_tokens_per_s": 1234.5}
NUM_ITERATIONS = 4


def config(folder: Path | str, wandb: str) -> SFTConfig:
    return SFTConfig(
        model=FrozenRoleConfig(model_name_or_path="model"),
        data=DemonstrationDataConfig(train="data.jsonl"),
        output_dir=str(folder),
        tracking=TrackingConfig(wandb=wandb, project="some-project", run_name="some-name"),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--wandb", default="disabled")
    parser.add_argument("--wait", action="store_true", help="for a line on stdin, before the last iteration")
    given = parser.parse_args()
    with Tracker(config(given.folder, given.wandb), num_iterations=NUM_ITERATIONS, is_main=True) as tracker:
        for iteration in range(1, NUM_ITERATIONS + 1):
            if given.wait and iteration == NUM_ITERATIONS:
                print("waiting", flush=True)
                sys.stdin.readline()
            for phase in ("generate", "score", "train", "save"):
                tracker.phase(phase, iteration)
            tracker.log(iteration, METRICS | {"score/mean": iteration / 2}, [])
            if iteration == 2:
                tracker.warn(iteration, "no end", "hardly any response ends.")


if __name__ == "__main__":
    main()
