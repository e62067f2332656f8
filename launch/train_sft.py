"""Fine-tune a language model on demonstrations: prompts with the response to learn.

    deepspeed --num_accelerators 2 launch/train_sft.py --config launch/recipes/gsm8k_sft.yaml --output_dir runs/sft

Also under torchrun, and as plain `python` for one rank. Writes config.yaml, metrics.jsonl and the exported model/ to
the output folder. Leaves out: resuming (a run that ends early starts again).
"""

from pathlib import Path

from engine.config import SFTConfig, parse, run
from engine.distributed import comm
from engine.distributed.checkpoint import export_huggingface
from engine.tracking import Tracker
from engine.trainers.supervised_stages import sft_stage

SHOWN = ("train/loss", "eval/loss", "eval/perplexity")  # on the progress line


def main() -> None:
    config = parse(SFTConfig)
    comm.start(config)
    stage = sft_stage(config)
    with comm.same_error_everywhere():
        tracker = Tracker(config, num_iterations=stage.num_iterations, is_main=comm.is_main(), shown=SHOWN)
    with tracker:
        stage.train(tracker)
        folder = Path(config.output_dir) / "model"
        export_huggingface(stage.model, folder, stage.tokenizer, form=config.export_form)
    if comm.is_main():
        print(f"Done: {stage.num_iterations} steps. Metrics and the exported model: {config.output_dir}")
    comm.shutdown()


if __name__ == "__main__":
    run(main)
