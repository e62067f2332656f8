"""Does a language model do what PPO takes for granted? Asked once, at the start of a run, on two short rows.

Nearly every decoder of transformers does. Some do not, in silence: state-space models whose decoding step takes another
cache than the key-value one, decoders that count positions without looking at `position_ids`, mixtures of experts whose
router draws noise in training mode, heads with a scale of their own.
"""

import torch
from torch import Tensor

from engine.distributed import comm
from engine.distributed.initialize import Engine
from engine.models.language_model import LanguageModel
from engine.rollout.kv_cache import preallocated_cache

TOLERANCE = {torch.float32: 1e-3}  # nats; what a wrong computation is off by is far above rounding
TOLERANCE_16_BIT = 0.5


@torch.no_grad()
def check_language_model(engine: Engine, *, role: str, decoding: bool = True) -> None:
    """Compare what the engine computes with the model's own logits. A collective under ZeRO-3.

    Args:
        decoding: whether the model will write responses, so that its key-value cache matters.

    Raises:
        ValueError: a forward pass in the engine's way, in training mode, or a cached and left-padded one gives other
            log-probabilities than the plain model.
    """
    module: LanguageModel = engine.module
    was_training = module.training
    tolerance = TOLERANCE.get(module.model.dtype, TOLERANCE_16_BIT)
    vocabulary = module.model.config.get_text_config().vocab_size
    drawn = torch.randint(vocabulary, (14,), generator=torch.Generator().manual_seed(0))
    rows = [row.to(comm.device()) for row in drawn.split([5, 9])]
    try:
        module.eval()
        wanted = torch.cat([_plain(module, row) for row in rows])
        found = {"other log-probabilities here than from its own logits": _in_engine(engine, rows)}
        if decoding:
            what = "other log-probabilities from its key-value cache, with left padding, than without"
            found[what] = _cached(module, rows)
        module.train()
        found["other log-probabilities in training mode, with dropout off"] = _in_engine(engine, rows)
    finally:
        module.train(was_training)
    for what, logprobs in found.items():
        difference = (logprobs - wanted).abs().max().item()
        if not difference < tolerance:
            raise ValueError(
                f"The {role} is a {type(module.model).__name__}, which gives {what} (up to {difference:.2g} nats). "
                f"Training would go by wrong numbers; take a model of another kind."
            )


def _plain(module: LanguageModel, row: Tensor) -> Tensor:
    """(s - 1,) log-probabilities of a row's tokens after the first, as transformers computes them."""
    return _picked(module.model(input_ids=row[None], use_cache=False).logits[0, :-1], row[1:])


def _in_engine(engine: Engine, rows: list[Tensor]) -> Tensor:
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64, device=rows[0].device)
    for line, row in enumerate(rows):
        input_ids[line, : len(row)] = row
    positions = [line * width + torch.arange(len(row) - 1) for line, row in enumerate(rows)]
    targets = torch.cat([row[1:] for row in rows])
    given = dict(temperature=1.0, chunk_tokens=len(targets))
    return engine(input_ids, torch.cat(positions).to(input_ids.device), targets, **given).logprobs


def _cached(module: LanguageModel, rows: list[Tensor]) -> Tensor:
    """Prefilled but for the last two tokens, which are then fed one at a time, as in generation."""
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64, device=rows[0].device)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for line, row in enumerate(rows):
        input_ids[line, width - len(row) :], mask[line, width - len(row) :] = row, True
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = preallocated_cache(module.model.config, width)
    logits = []
    for start, end in ((0, width - 2), (width - 2, width - 1)):
        logits.append(
            module.model(
                input_ids=input_ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=position_ids[:, start:end],
                past_key_values=cache,
                use_cache=True,
            ).logits
        )
    whole = torch.cat(logits, dim=1)
    return torch.cat(
        [_picked(whole[line, width - len(row) :], row[1:]) for line, row in enumerate(rows)],
    )


def _picked(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
