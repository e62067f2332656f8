"""Engines of tiny models and something to train them on, for tests; runs on every rank."""

import hashlib
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from engine.data.sequences import Sequences
from engine.distributed import comm
from engine.distributed.gather import gathered
from engine.distributed.initialize import frozen_engine, trained_engine
from engine.distributed.optimization import accumulate, step_together
from engine.models.language_model import load_language_model
from engine.models.scalar_head import load_critic

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE = dict(temperature=0.7, chunk_tokens=16)
IDS = torch.tensor([[5, 6, 7, 200, 1, 0, 31, 8], [9, 100, 3, 44, 257, 12, 2, 2]])


def ds_file(kind: int | str, strict_z3: str) -> Path:
    """`kind`: "strict", or the name of a file of ds_configs/ after "zero"."""
    return Path(strict_z3) if kind == "strict" else ROOT / "ds_configs" / f"zero{kind}.json"


def language_builder(name: str, dtype: str = "float32"):
    return partial(load_language_model, name, dtype=getattr(torch, dtype))


def trained(build, ds_config: Path, *, dtype: str = "float32", **given):
    """A trained engine; `given` takes the place of these settings."""
    settings = dict(
        learning_rate=1e-3,
        lr_scheduler="linear",
        warmup_steps=0,
        total_steps=100,
        weight_decay=0.01,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
    )
    return trained_engine(build, ds_config=ds_config, dtype=dtype, **settings | given)


def actor(name: str, ds_config: Path, *, dtype: str = "float32"):
    return trained(language_builder(name, dtype), ds_config, dtype=dtype)


def critic(name: str, ds_config: Path):
    return trained(partial(load_critic, name, dtype=torch.float32, pad_token_id=0, seed=0), ds_config)


def frozen(name: str, ds_config: Path, *, dtype: str = "float32"):
    return frozen_engine(language_builder(name, dtype), ds_config=ds_config, dtype=dtype)


def rows(count: int = 8, seed: int = 0) -> Sequences:
    """Random sequences of mixed lengths, the same on every rank."""
    rng = torch.Generator().manual_seed(seed)

    def texts(low: int, high: int) -> list[list[int]]:
        lengths = torch.randint(low, high, (count,), generator=rng).tolist()
        return [torch.randint(2, 258, (length,), generator=rng).tolist() for length in lengths]

    return Sequences.of(texts(2, 8), texts(3, 9))


def policy_loss(module, batch, count: int) -> Tensor:
    """Minus the mean log-probability of the response tokens; this batch's part of it."""
    return -module(batch.input_ids, batch.positions, batch.targets, **TEMPERATURE).logprobs.sum() / count


def value_loss(module, batch, count: int) -> Tensor:
    """Distance of the values to 1; this batch's part of it."""
    return (module(batch.input_ids, batch.positions) - 1).square().sum() / count


def my_rows(sequences: Sequences) -> Tensor:
    return torch.arange(len(sequences)).tensor_split(comm.world_size())[comm.rank()]


def backward(engine, loss_of, sequences: Sequences, *, micro_batch_size: int = 2, factor: float = 1.0) -> float:
    """Backward passes of this rank's share; the sum over its micro-batches."""
    engine.train()
    batches = my_rows(sequences).split(micro_batch_size)
    total = 0.0
    for number, batch_rows in enumerate(batches, start=1):
        batch = sequences.padded(batch_rows, comm.device())
        loss = loss_of(engine, batch, sequences.num_response_tokens) * factor
        total += loss.item()
        accumulate(engine, loss, last=number == len(batches))
    return total


def train_actor(engine, seed: int = 0) -> float:
    """One optimizer step; the loss over all ranks."""
    loss = backward(engine, policy_loss, rows(seed=seed))
    assert step_together([engine], healthy=True) is not None
    return comm.sum_over_ranks(torch.tensor(loss)).item()


def weights(engine) -> dict[str, Tensor]:
    """Every parameter, whole, on every rank."""
    whole = {}
    for name, parameter in engine.module.named_parameters():
        with gathered([parameter]):
            whole[name] = parameter.detach().clone()
    return whole


def digest(engine) -> str:
    """A hash of every bit of the weights."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights(engine).values())).hexdigest()


@torch.no_grad()
def said_live(engine, role):
    """Log-probs of every token but the first, or the value at every token."""
    engine.eval()
    everywhere = torch.arange(IDS.numel()).view_as(IDS)
    if role == "critic":
        return engine(IDS, everywhere.flatten()).view_as(IDS)
    given = dict(temperature=1.0, chunk_tokens=4)
    return engine(IDS, everywhere[:, :-1].flatten(), IDS[:, 1:].flatten(), **given).logprobs.view(len(IDS), -1)


@torch.no_grad()
def said_by_folder(folder, role):
    """The same from the exported folder, by the formulas."""
    if role == "actor":
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
        return F.log_softmax(logits[:, :-1], dim=-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model.score(model.base_model(IDS).last_hidden_state).squeeze(-1)
