"""Write a trained model's responses to a file of prompts, or chat with it on the terminal.

    python launch/generate.py --model runs/ppo --prompts questions.jsonl --output answers.jsonl
    python launch/generate.py --model runs/ppo                                     # a chat
    python launch/generate.py --model runs/ppo/actor --other runs/sft/model        # side by side

A model is an exported folder, an adapter's, a run's, or a hub name. Responses are drawn by the training's own sampler:
the same seed writes the same ones, whatever the batch size. Leaves out: several GPUs, and models that one cannot hold.
"""

import sys

import engine.startup  # noqa: F401 - first
from engine.answering.answerer import load_answerers
from engine.answering.batch import write_responses
from engine.answering.chat import Chat
from engine.answering.settings import AnsweringConfig
from engine.config import parse, run


def main() -> None:
    config = parse(AnsweringConfig)
    try:
        answerers = load_answerers(config)
        if config.prompts is not None:
            write_responses(config, answerers)
        else:
            chat = Chat(answerers, config, lines=sys.stdin, out=sys.stdout, aside=sys.stderr)
            sys.stdin.reconfigure(errors="replace")  # bytes that are no text, and letters that a terminal lacks
            sys.stdout.reconfigure(errors="replace")
            if sys.stdin.isatty():
                import readline  # noqa: F401 - input() then edits its line and knows the earlier ones
            chat.run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run(main)
