"""The benchmark's workload, described once: the models, the tokenizer and the prompts that every side is given.

    python tests/benchmarks/workload.py --variant eos --out /tmp/bench/eos

writes OUT/actor (also the ref), OUT/critic (also the reward model), each with the tokenizer, OUT/reward_adapter (the
reward model of a shared trunk, an adapter of the actor), and OUT/workload.json. Nothing here trains or times.

The models are random, so how long a response gets has to be made: see `_fix_eos_probability`. It is in the weights, so
that plain sampling (temperature 1, no top-k, no top-p) gives every side the same distribution of lengths. Measured on
the `eos` actor, transformers' `generate`, 640 responses: 23.9 tokens on average, standard error 0.8.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# In Llama one residual coordinate holds this constant. Large against the rest (an embedding row's norm is 0.4), so that
# the final norm passes it on nearly unchanged whatever the hidden state.
_CONSTANT_COORDINATE = 0
_CONSTANT = 8.0
# The shape of a small model of today, for GPUs, with longer prompts and responses.
HALF_A_BILLION = dict(
    hidden_size=896,
    num_layers=24,
    num_heads=14,
    intermediate_size=4864,
    vocab_size=151_936,
    prompts_per_rank=32,
    min_prompt_tokens=32,
    max_prompt_tokens=256,
    mean_prompt_tokens=108.0,
    max_new_tokens=256,
)
# An offset at which a token is never drawn: p = exp(-30) / 8192.
_NEVER = -30.0


@dataclass(frozen=True)
class Workload:
    """What is generated, scored and trained on in one iteration. Build with `Workload.named`."""

    name: Literal["fixed", "eos"]
    # `llama` has a head of keys and values for each head of queries, `gqa` two for all six.
    architecture: Literal["llama", "gqa", "gpt2"]
    # Responses stop here, `fixed` ones always.
    max_new_tokens: int
    # Up to and including EOS, cut at max_new_tokens. An expectation, which the actor's weights are made for.
    mean_response_tokens: float

    world_size: int = 2
    prompts_per_rank: int = 16
    min_prompt_tokens: int = 10
    max_prompt_tokens: int = 64
    mean_prompt_tokens: float = 27.0
    ppo_epochs: int = 1
    temperature: float = 1.0

    size: Literal["small", "0.5B"] = "small"
    hidden_size: int = 384
    num_layers: int = 8
    num_heads: int = 6
    intermediate_size: int = 1024  # of Llama's gated MLP, three matrices; GPT-2's two are as large together
    vocab_size: int = 8192
    seed: int = 0

    @classmethod
    def named(cls, name: Literal["fixed", "eos"], architecture: str = "llama", size: str = "small") -> Workload:
        """`fixed`: no EOS ever, every response is 64 tokens. `eos`: it comes with the same chance at every position,
        and responses have 24 tokens on average, at most 64.
        """
        mean = {"fixed": 64.0, "eos": 24.0}[name]
        small = cls(name=name, architecture=architecture, max_new_tokens=64, mean_response_tokens=mean)
        return small if size == "small" else replace(small, size=size, **HALF_A_BILLION, mean_response_tokens=4 * mean)

    def on(self, world_size: int) -> Workload:
        """The same prompts and models, shared out to this many ranks."""
        if world_size < 1 or self.num_prompts % world_size:
            raise ValueError(f"{self.num_prompts} prompts cannot be shared out evenly to {world_size} ranks.")
        return replace(self, world_size=world_size, prompts_per_rank=self.num_prompts // world_size)

    @property
    def num_prompts(self) -> int:
        """Prompts, and so responses, per iteration over all ranks."""
        return self.world_size * self.prompts_per_rank

    @property
    def pad_token_id(self) -> int:
        return self.vocab_size - 2

    @property
    def eos_token_id(self) -> int:
        return self.vocab_size - 1

    @property
    def num_kv_heads(self) -> int:
        return 2 if self.architecture == "gqa" else self.num_heads

    @property
    def stops_at_eos(self) -> bool:
        return self.name == "eos"


@dataclass(frozen=True)
class ModelFolders:
    """Where the Hugging Face folders are; the ref uses the first, the reward model the second or the third."""

    actor: Path
    critic: Path
    reward_adapter: Path

    @classmethod
    def under(cls, folder: Path | str) -> ModelFolders:
        """The paths inside `folder`, whether or not they have been written."""
        return cls(*(Path(folder) / name for name in ("actor", "critic", "reward_adapter")))


def prompts(workload: Workload) -> list[list[int]]:
    """Token ids of the iteration's prompts: the same on every call, in an order unrelated to length.

    Lengths follow min + (max - min) * u^k for u evenly spread over [0, 1]: many short, a few long, both ends present.
    The mean of u^k is about 1 / (k + 1), which gives k; the few tokens to the exact mean are then added or taken.
    """
    low, high, count = workload.min_prompt_tokens, workload.max_prompt_tokens, workload.num_prompts
    exponent = (high - low) / (workload.mean_prompt_tokens - low) - 1
    lengths = [round(low + (high - low) * (i / (count - 1)) ** exponent) for i in range(count)]
    missing = round(workload.mean_prompt_tokens * count) - sum(lengths)
    if abs(missing) > count - 2:
        raise ValueError(f"prompt lengths {lengths} are {missing} tokens off a mean of {workload.mean_prompt_tokens}")
    for i in range(abs(missing)):  # from the second longest down: the shortest stays `low`, the longest `high`
        lengths[-2 - i] += 1 if missing > 0 else -1

    rng = torch.Generator().manual_seed(workload.seed)
    order = torch.randperm(count, generator=rng).tolist()
    return [torch.randint(workload.pad_token_id, (lengths[i],), generator=rng).tolist() for i in order]


def as_text(token_ids: list[int]) -> str:
    """The text that the saved tokenizer turns into exactly these ids (none of them special)."""
    return " ".join(f"w{i}" for i in token_ids)


def tokenizer(workload: Workload) -> PreTrainedTokenizerFast:
    """One word, one id: "w17" <-> 17, then <pad> and <eos>. Pads on the left, adds nothing to a text."""
    words = [f"w{i}" for i in range(workload.vocab_size - 2)] + ["<pad>", "<eos>"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def model_config(workload: Workload) -> PreTrainedConfig:
    """Of actor and critic."""
    given = dict(
        vocab_size=workload.vocab_size,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=workload.eos_token_id if workload.stops_at_eos else None,
        pad_token_id=workload.pad_token_id,
        num_labels=1,
        dtype="float32",
    )
    if workload.architecture == "gpt2":
        return GPT2Config(
            n_embd=workload.hidden_size,
            n_layer=workload.num_layers,
            n_head=workload.num_heads,
            n_inner=3 * workload.intermediate_size // 2,
            n_positions=1024,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **given,
        )
    return LlamaConfig(
        hidden_size=workload.hidden_size,
        num_hidden_layers=workload.num_layers,
        num_attention_heads=workload.num_heads,
        num_key_value_heads=workload.num_kv_heads,
        intermediate_size=workload.intermediate_size,
        max_position_embeddings=1024,
        **given,
    )


def write_models(folder: Path | str, workload: Workload) -> ModelFolders:
    """Makes the models of `workload` from its seed and saves them, fp32, with the tokenizer and workload.json."""
    folders, config = ModelFolders.under(folder), model_config(workload)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workload.seed)
        actor = AutoModelForCausalLM.from_config(config)
        critic = AutoModelForSequenceClassification.from_config(config)
        _fix_eos_probability(actor, workload)
        for model, path in ((actor, folders.actor), (critic, folders.critic)):
            model.save_pretrained(path)
            tokenizer(workload).save_pretrained(path)
        base = AutoModelForSequenceClassification.from_pretrained(folders.actor)
        adapter = LoraConfig(target_modules="all-linear", modules_to_save=["score"], task_type="SEQ_CLS")
        get_peft_model(base, adapter).save_pretrained(folders.reward_adapter)
        tokenizer(workload).save_pretrained(folders.reward_adapter)
    Path(folder, "workload.json").write_text(json.dumps(asdict(workload), indent=2) + "\n")
    return folders


def read_workload(folder: Path | str) -> Workload:
    """The workload that `folder` was written for; refuses a folder written by another version of this file."""
    path = Path(folder, "workload.json")
    if not path.exists():
        raise ValueError(f"{path} does not exist. Write it: python {__file__} --variant eos --out {folder}")
    written = json.loads(path.read_text())
    if different := sorted({field.name for field in fields(Workload)} ^ written.keys()):
        raise ValueError(f"{path} differs in {', '.join(different)} from what {__file__} makes now. Write it again.")
    return Workload(**written)


def eos_probability(mean_tokens: float, max_tokens: int) -> float:
    """The chance p of EOS at each position for which a response has `mean_tokens` tokens on average.

    E[min(G, n)] = (1 - (1 - p)^n) / p        with G geometric (counting the EOS), n = max_tokens
    """
    if not 1 < mean_tokens < max_tokens:
        raise ValueError(f"mean_tokens={mean_tokens} must lie between 1 and max_tokens={max_tokens}")
    low, high = 1e-9, 1.0  # the mean falls as p grows
    for _ in range(100):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** max_tokens) / p > mean_tokens else (low, p)
    return p


@torch.no_grad()
def _fix_eos_probability(actor: PreTrainedModel, workload: Workload) -> None:
    """Gives EOS the same chance at every position, or none, by changing weights only.

    One coordinate of the last hidden state is made a constant, so that an lm_head row's entry there is a logit offset.
    The other logits come from small random numbers (standard deviation 0.02), so the offset of EOS alone sets its
    chance. Pad must never be drawn either: TRL takes its first occurrence in a response for the end.
    """
    constant = _constant_in_gpt2(actor) if workload.architecture == "gpt2" else _constant_in_llama(actor)
    eos_offset = _NEVER
    if workload.stops_at_eos:
        p = eos_probability(workload.mean_response_tokens, workload.max_new_tokens)
        eos_offset = math.log(p / (1 - p) * (workload.vocab_size - 2))
    head = actor.lm_head.weight
    head[:, _CONSTANT_COORDINATE] = 0
    for token_id, offset in ((workload.eos_token_id, eos_offset), (workload.pad_token_id, _NEVER)):
        head[token_id] = 0
        head[token_id, _CONSTANT_COORDINATE] = offset / constant


def _constant_in_llama(actor: PreTrainedModel) -> float:
    """What the last hidden state holds in the coordinate from now on.

    Llama has no biases, so one residual coordinate is made into one: every embedding row holds the same number there,
    no layer reads it (its norm weight is zero) or writes it (that row of the output projections is zero). It is nearly
    all of the residual's norm, so after the final norm it is sqrt(hidden).
    """
    coordinate = _CONSTANT_COORDINATE
    actor.model.embed_tokens.weight[:, coordinate] = _CONSTANT
    for layer in actor.model.layers:
        layer.input_layernorm.weight[coordinate] = 0
        layer.post_attention_layernorm.weight[coordinate] = 0
        layer.self_attn.o_proj.weight[coordinate] = 0
        layer.mlp.down_proj.weight[coordinate] = 0
    return math.sqrt(actor.config.hidden_size)


def _constant_in_gpt2(actor: PreTrainedModel) -> float:
    """The same by the bias of GPT-2's final norm."""
    norm = actor.transformer.ln_f
    norm.weight[_CONSTANT_COORDINATE], norm.bias[_CONSTANT_COORDINATE] = 0, 1
    return 1.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("fixed", "eos"), required=True)
    parser.add_argument("--architecture", choices=("llama", "gqa", "gpt2"), default="llama")
    parser.add_argument("--size", choices=("small", "0.5B"), default="small")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    args = parser.parse_args()
    print(write_models(args.out, Workload.named(args.variant, args.architecture, args.size).on(args.ranks)))
