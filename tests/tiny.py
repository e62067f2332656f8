"""Tiny models, sharding files, prompts and configs. Importable by tests and by the ranks they start."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from engine.config import (
    CheckpointConfig,
    CriticConfig,
    DataConfig,
    DemonstrationDataConfig,
    DPOConfig,
    EvaluationConfig,
    FrozenRoleConfig,
    KLGuardConfig,
    LoRAConfig,
    PPOConfig,
    PreferenceDataConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    SFTConfig,
    SupervisedConfig,
    TrackingConfig,
    TrainedRoleConfig,
)

_SIZES = "hidden_size=32&num_hidden_layers=2&num_attention_heads=4"
LLAMA = f"random://llama?{_SIZES}&num_key_value_heads=2&intermediate_size=64&max_position_embeddings=512"
QWEN2 = f"random://qwen2?{_SIZES}&num_key_value_heads=2&intermediate_size=64&max_position_embeddings=512"
GPT2 = "random://gpt2?n_embd=32&n_layer=2&n_head=4&n_positions=512"  # dropout 0.1 is GPT-2's own default; tied
OPT = f"random://opt?{_SIZES}&ffn_dim=64&word_embed_proj_dim=32&max_position_embeddings=512"
# Rows of 64 inputs or a multiple: bitsandbytes shares a scale among 64 weights, and on a CPU it needs whole blocks.
_WIDE = "hidden_size=64&num_hidden_layers=2&num_attention_heads=4&num_key_value_heads=2&intermediate_size=128"
WIDE_LLAMA = f"random://llama?{_WIDE}&max_position_embeddings=512"
WIDE_GPT2 = "random://gpt2?n_embd=64&n_layer=2&n_head=4&n_positions=512"
# Six weights that ZeRO-3's own defaults shard (above 100 000 entries) and that large products are taken of (2^17).
LARGE_LLAMA = (
    "random://llama?hidden_size=256&num_hidden_layers=2&num_attention_heads=4&num_key_value_heads=2"
    "&intermediate_size=768&max_position_embeddings=512"
)
LARGE_GPT2 = "random://gpt2?n_embd=256&n_layer=2&n_head=4&n_positions=512"
MODELS = dict(llama=LLAMA, qwen2=QWEN2, gpt2=GPT2, opt=OPT)

STRICT_Z3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
# Of mixed lengths, so that batches hold padding.
PROMPTS = [
    "a",
    "name three",
    "what is the sum of 2 and 3?",
    "go",
    "tell a story of the sea",
    "xyz",
    "why so",
    "count up",
]
# Of mixed lengths and seven, so that neither two ranks nor minibatches of four share them evenly.
DEMONSTRATIONS = [
    {"prompt": prompt, "response": response}
    for prompt, response in zip(
        PROMPTS, ["b", "one two three", "it is 5", "on", "once upon a time there was a wave", "!", "so"], strict=False
    )
]
PREFERENCES = [
    {"prompt": row["prompt"], "chosen": row["response"], "rejected": rejected}
    for row, rejected in zip(
        DEMONSTRATIONS, ["no, no and no", "four", "6", "off we go now", "", "what", "because it is so"], strict=True
    )
]


def score_head(name: str, seed: int = 1) -> str:
    """The same model type with a score head instead of a language-model head, and other weights."""
    return f"{name}&head=score&seed={seed}"


def stir_adapters(module, scale: float) -> None:
    """Weights that do something, in the place of those that adapters begin with."""
    import torch

    from engine.models.lora import is_adapter

    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter(name):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))


def reward_adapter(model: str, folder: Path) -> str:
    """A reward model's adapter of a random model in a folder of PEFT's, scores of mean 3 and deviation 2."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification
    from transformers.pytorch_utils import Conv1D

    from engine.models.loading import load_tokenizer
    from engine.models.random_init import local_name

    torch.manual_seed(7)
    plain = AutoModelForSequenceClassification.from_pretrained(local_name(model), num_labels=1)
    linear = {
        name.split(".")[-1]
        for name, module in plain.base_model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    form = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=sorted(linear),
        task_type="SEQ_CLS",
        init_lora_weights=False,
        fan_in_fan_out="gpt2" in model,
    )
    path = Path(folder) / "reward_adapter"
    get_peft_model(plain, form).save_pretrained(path)
    (path / "score_normalisation.json").write_text('{"score_mean": 3.0, "score_std": 2.0}')
    load_tokenizer(model).save_pretrained(path)
    return str(path)


def strict_z3_file(folder: Path) -> str:
    """ZeRO-3 with every default that would hide it on a tiny model switched off."""
    path = Path(folder) / "strict_z3.json"
    path.write_text(json.dumps(STRICT_Z3))
    return str(path)


def sharding(kind: int | str, folder: Path) -> dict[str, Any]:
    """The config fields of a sharding: a ZeRO stage, or "strict" for STRICT_Z3."""
    return {"ds_config": strict_z3_file(folder)} if kind == "strict" else {"zero_stage": kind}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSONL file."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_prompts(folder: Path, prompts: list[str] | None = None) -> str:
    """A JSONL file of prompts with a column `number`."""
    path = Path(folder) / "prompts.jsonl"
    rows = [{"prompt": text, "number": number} for number, text in enumerate(PROMPTS if prompts is None else prompts)]
    return write_rows(path, rows)


def downloaded(name: str, cache: Path) -> Path:
    """A hub model's folder in the hub's cache, with the tiny Llama's config."""
    from engine.models.random_init import local_name

    of_model = cache / f"models--{name.replace('/', '--')}"
    folder = of_model / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    shutil.copy(Path(local_name(LLAMA)) / "config.json", folder)
    (of_model / "refs").mkdir()
    (of_model / "refs" / "main").write_text(folder.name)
    return folder


def ppo_config(folder: Path, *, model: str = LLAMA, prompts: list[str] | None = None, **overrides: Any) -> PPOConfig:
    """A small valid PPO run on 1 or 2 ranks: 8 responses of up to 12 tokens, 2 minibatches, 2 epochs, a reward model.

    AdamW's epsilon is 1e-5, above the rounding of gradients. With 1e-8 a single weight whose gradient happens to be as
    small (in the tiny Llama, after eight steps, element 192, 10 of the embedding) is moved 4e-5 apart by the order in
    which micro-batches and ranks are added up, where all others agree to 3e-7; and a larger one also notices gradients
    of the wrong size, from which AdamW otherwise divides the size out.

    Args:
        overrides: fields of PPOConfig; a field of a nested config as `rollout__temperature=0.7`.
            `reward__function="tiny:..."` takes the place of the reward model.
    """
    nested: dict[str, dict[str, Any]] = dict(
        actor=dict(model_name_or_path=model, learning_rate=1e-3, adam_epsilon=1e-5),
        critic=dict(learning_rate=1e-3),
        ref={},
        reward={} if "reward__function" in overrides else dict(model_name_or_path=score_head(model)),
        data=dict(train=write_prompts(folder, prompts), max_prompt_tokens=32),
        rollout=dict(max_response_tokens=12),
        tracking=dict(wandb="disabled", samples_per_iteration=2),
    )
    run = dict(
        output_dir=str(Path(folder) / "out"),
        dtype="float32",
        num_iterations=3,
        rollout_batch_size=8,
        minibatch_size=4,
        micro_batch_size=2,
        ppo_epochs=2,
        distributed_timeout_s=40,
    )
    for name, value in overrides.items():
        if "__" in name:
            group, inner = name.split("__")
            nested.setdefault(group, {})[inner] = value
        else:
            run[name] = value
    classes = dict(
        actor=TrainedRoleConfig,
        critic=CriticConfig,
        ref=FrozenRoleConfig,
        reward=RewardConfig,
        data=DataConfig,
        rollout=RolloutConfig,
        tracking=TrackingConfig,
        checkpoint=CheckpointConfig,
        evaluation=EvaluationConfig,
        kl_guard=KLGuardConfig,
    )
    return PPOConfig(**run, **{group: classes[group](**fields) for group, fields in nested.items()})


STAGES = ("sft", "reward", "dpo")


def stage_config(
    folder: Path, stage: str, *, model: str = LLAMA, rows: list[dict[str, Any]] | None = None, **overrides: Any
) -> SupervisedConfig:
    """A small valid run of SFT, reward model or DPO on 1 or 2 ranks: 7 examples, 3 steps on minibatches of up to 4.

    Args:
        rows: of the data set; DEMONSTRATIONS or PREFERENCES when not given.
        overrides: fields of the config; a field of a nested config as `data__max_length=64`.
    """
    rows = rows if rows is not None else DEMONSTRATIONS if stage == "sft" else PREFERENCES
    data = DemonstrationDataConfig if stage == "sft" else PreferenceDataConfig
    config_class, role = {
        "sft": (SFTConfig, "model"),
        "reward": (RewardModelConfig, "reward"),
        "dpo": (DPOConfig, "model"),
    }[stage]
    classes = {role: FrozenRoleConfig, "data": data, "tracking": TrackingConfig, "checkpoint": CheckpointConfig}
    classes["lora"] = LoRAConfig
    nested: dict[str, dict[str, Any]] = {
        role: dict(model_name_or_path=model),
        "data": dict(train=write_rows(Path(folder) / f"{stage}.jsonl", rows), max_prompt_tokens=32, max_length=64),
        "tracking": dict(wandb="disabled"),
    }
    if stage == "dpo":
        classes["ref"], nested["ref"] = FrozenRoleConfig, {}
    run = dict(
        output_dir=str(Path(folder) / f"{stage}_out"),
        dtype="float32",
        learning_rate=1e-3,
        num_iterations=3,
        minibatch_size=4,
        micro_batch_size=2,
        distributed_timeout_s=40,
    )
    for name, value in overrides.items():
        if "__" in name:
            group, inner = name.split("__")
            nested.setdefault(group, {})[inner] = value
        else:
            run[name] = value
    return config_class(**run, **{group: classes[group](**fields) for group, fields in nested.items()})


def changed(config: PPOConfig, **overrides: Any) -> PPOConfig:
    """The config with fields replaced, those of a group as `checkpoint__every=None`, checked again."""
    for name in [name for name in overrides if "__" in name]:
        group, inner = name.split("__")
        given = overrides.get(group, getattr(config, group))
        overrides[group] = dataclasses.replace(given, **{inner: overrides.pop(name)})
    return dataclasses.replace(config, **overrides)


def share_of_small_letters(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """A toy score that a tiny model learns fast: the share of characters in a..m."""
    return [sum("a" <= letter <= "m" for letter in response) / max(1, len(response)) for response in responses]


def longest_wins(prompts: list[str], responses: list[str], number: list[int]) -> list[float]:
    """A score that reads a column of the dataset."""
    return [len(response) + 0.01 * row for response, row in zip(responses, number, strict=True)]
