"""Models whose answers are known beforehand, and what their users do with them in this process."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from engine.config import run
from engine.models.random_init import byte_tokenizer, local_name
from launch import generate

BYTE = byte_tokenizer()
EOS = BYTE.eos_token_id
# No byte of it comes twice: each says which one follows. It begins after the blank of "assistant: ".
RECITED = "né日🙂!"
MANY_EOS = [EOS, *range(20, 50)]  # with 258 tokens, so many ends make responses of mixed lengths


def reciting(folder: Path, text: str, *, endless: bool = False) -> str:
    """A model that says `text` after a blank, and ends, or begins again and again."""
    config = LlamaConfig(
        vocab_size=len(BYTE),
        hidden_size=264,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=8192 if endless else 256,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    chain = BYTE(" " + text)["input_ids"]
    chain.append(chain[1] if endless else EOS)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(BYTE), 264))
        model.lm_head.weight.zero_()
        for before, after in pairwise(chain):
            model.lm_head.weight[after, before] = 1.0
    return saved(model, folder)


def stirred(name: str, folder: Path) -> str:
    """A random model whose predictions depend on what it reads, and whose responses end at mixed lengths."""
    model = AutoModelForCausalLM.from_pretrained(local_name(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.generation_config = GenerationConfig(eos_token_id=MANY_EOS, pad_token_id=0)
    return saved(model, folder)


def saved(model, folder: Path) -> str:
    model.save_pretrained(folder)
    BYTE.save_pretrained(folder)
    return str(folder)


def generated(*flags: str) -> int | str | None:
    """What `python launch/generate.py FLAGS` exits with, in this process: an exit code, or the message of code 1."""
    with mock.patch.object(sys, "argv", ["generate.py", *map(str, flags)]):
        try:
            run(generate.main)
        except SystemExit as end:
            return end.code
    return None


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
