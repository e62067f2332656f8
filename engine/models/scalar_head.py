"""A backbone with a linear head to one number: the critic (a value per token), the reward model (a score per response).

Both are transformers' `AutoModelForSequenceClassification` with one label, so what is exported loads with plain
`from_pretrained`, and a critic can start from a reward model's weights.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from engine.models.language_model import hidden_states
from engine.models.loading import load_pretrained, number_of_labels


class ScalarHeadModel(nn.Module):
    """Critic and reward model: `(head - score_mean) / score_std`.

    Attributes:
        score_mean, score_std: what a reward model's scores came to over the pairs that it was evaluated on, kept in its
            config. Reward model and critic take them out, so that values start in the units of the rewards; while a
            reward model is trained they are 0 and 1.
    """

    def __init__(self, model: PreTrainedModel, *, score_mean: float = 0.0, score_std: float = 1.0):
        super().__init__()
        self.model, self.score_mean, self.score_std = model, score_mean, score_std

    @property
    def heads_it_reads(self) -> list[nn.Module]:
        """Layers whose weights `forward` reads without calling them."""
        return [self.model.score]

    def keep_normalisation(self, mean: float, std: float) -> None:
        """Take these out from now on, and export them with the model; scores that do not vary keep their scale."""
        std = std if std > 0 else 1.0
        self.score_mean = self.model.config.score_mean = mean
        self.score_std = self.model.config.score_std = std

    def forward(self, input_ids: Tensor, positions: Tensor, *, position_ids: Tensor | None = None) -> Tensor:
        """(N,) fp32: the model's number at each asked position.

        Args:
            input_ids: (B, S), right-padded.
            positions: (N,) indices into the B * S states.
            position_ids: (1, S) where rows are packed into one; see `hidden_states`.
        """
        hidden = hidden_states(self.model, input_ids, position_ids)[positions]
        return (scalar_product(hidden, self.model.score) - self.score_mean) / self.score_std


def scalar_product(hidden: Tensor, head: nn.Linear) -> Tensor:
    """(N, H) states -> (N,) fp32. Taken in fp32: in bf16 scores round to steps of 1/16 at 8."""
    return F.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float()).squeeze(-1)


def load_critic(model_name_or_path: str, *, seed: int, **given) -> ScalarHeadModel:
    """A critic from a reward model, or from a language model with a fresh head drawn from `seed`.

    Its values start as the reward model's scores, and in their units. The arguments are those of `load_scalar_head`.
    """
    return _normalising(load_scalar_head(model_name_or_path, seed=seed, **given))


def load_reward_model(model_name_or_path: str, **given) -> ScalarHeadModel:
    """A trained reward model. The arguments are those of `load_scalar_head`.

    Raises:
        ValueError: the folder has no trained score head.
    """
    scalar = _normalising(load_scalar_head(model_name_or_path, seed=0, **given))
    if scalar.model.missing_from_checkpoint:
        raise ValueError(
            f"{model_name_or_path} is not a reward model: its checkpoint lacks "
            f"{', '.join(scalar.model.missing_from_checkpoint)}, so its scores would be random."
        )
    return scalar


def load_scalar_head(
    model_name_or_path: str,
    *,
    dtype: torch.dtype,
    pad_token_id: int | None,
    seed: int,
    quantization: Literal["nf4"] | None = None,
) -> ScalarHeadModel:
    """A model to train from a scalar-head model's weights, or from a language model's with a fresh head from `seed`.
    It gives the head's plain numbers.

    Args:
        pad_token_id: for the exported config; see `scoring_pad_token_id`.
        quantization: as in `load_pretrained`; the head keeps `dtype`.

    Raises:
        ValueError: there is no such model, or it cannot have a linear head with one output.
    """
    labels = number_of_labels(model_name_or_path)
    if labels not in (None, 1):
        raise ValueError(f"{model_name_or_path} is a classifier with {labels} labels; a scalar head has one.")
    torch.manual_seed(seed)  # for the head, when the checkpoint has none
    given = dict(dtype=dtype, quantization=quantization)
    model = load_pretrained(AutoModelForSequenceClassification, model_name_or_path, num_labels=1, **given)
    if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.out_features != 1:
        raise ValueError(
            f"{model_name_or_path}: {type(model).__name__} has no linear `score` head with one output. "
            f"Decoder models with a sequence-classification class (Llama, Qwen, GPT-2, OPT, ...) have one."
        )
    if extra := [key for key in model.missing_from_checkpoint if not key.startswith("score.")]:
        raise ValueError(f"{model_name_or_path}: the checkpoint lacks {', '.join(extra[:3])}.")
    model.config.pad_token_id = pad_token_id
    return ScalarHeadModel(model)


def scoring_pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What goes into an exported scalar-head model's config: transformers finds a row's last real token by it. None
    where the tokenizer pads with its end-of-sequence token: transformers would score the token before.
    """
    return tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None


def _normalising(scalar: ScalarHeadModel) -> ScalarHeadModel:
    kept = scalar.model.config.to_dict()
    scalar.score_mean, scalar.score_std = kept.get("score_mean", 0.0), kept.get("score_std", 1.0)
    return scalar
