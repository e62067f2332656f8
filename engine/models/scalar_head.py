"""A backbone with a linear head to one number: the critic (a value per token), the reward model (a score per response).

Both are transformers' `AutoModelForSequenceClassification` with one label, so what is exported loads with plain
`from_pretrained`, and a critic can start from a reward model's weights.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from engine.models.language_model import hidden_states
from engine.models.loading import load_pretrained, number_of_labels


class ScalarHeadModel(nn.Module):
    """Critic and reward model.

    Attributes:
        score_mean, score_std: what a reward model's scores came to over the pairs that it was evaluated on. They are
            kept in its config; `forward` gives plain scores, and whoever wants them normalised uses `normalised`.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        kept = model.config.to_dict()
        self.score_mean, self.score_std = kept.get("score_mean", 0.0), kept.get("score_std", 1.0)

    def normalised(self, scores: Tensor) -> Tensor:
        """Plain scores with the reward model's own mean and standard deviation taken out; the shape of `scores`."""
        return (scores - self.score_mean) / self.score_std

    def keep_normalisation(self, mean: float, std: float) -> None:
        """Have these exported with the model; scores that do not vary keep their scale."""
        std = std if std > 0 else 1.0
        self.score_mean = self.model.config.score_mean = mean
        self.score_std = self.model.config.score_std = std

    def forward(self, input_ids: Tensor, positions: Tensor, *, position_ids: Tensor | None = None) -> Tensor:
        """(N,) fp32: the head's number at each asked position.

        Args:
            input_ids: (B, S), right-padded.
            positions: (N,) indices into the B * S states.
            position_ids: (1, S) where rows are packed into one; see `hidden_states`.
        """
        return self.model.score(hidden_states(self.model, input_ids, position_ids)[positions]).squeeze(-1).float()


def load_critic(model_name_or_path: str, *, dtype: torch.dtype, pad_token_id: int, seed: int) -> ScalarHeadModel:
    """A critic from a reward model, or from a language model with a fresh head drawn from `seed`.

    Its values are in units of the rewards: what a reward model's scores came to is not its own.
    """
    scalar = load_scalar_head(model_name_or_path, dtype=dtype, pad_token_id=pad_token_id, seed=seed)
    for name, neutral in (("score_mean", 0.0), ("score_std", 1.0)):
        setattr(scalar, name, neutral)
        vars(scalar.model.config).pop(name, None)
    return scalar


def load_reward_model(model_name_or_path: str, *, dtype: torch.dtype, pad_token_id: int) -> ScalarHeadModel:
    """A trained reward model.

    Raises:
        ValueError: the folder has no trained score head.
    """
    scalar = load_scalar_head(model_name_or_path, dtype=dtype, pad_token_id=pad_token_id, seed=0)
    if scalar.model.missing_from_checkpoint:
        raise ValueError(
            f"{model_name_or_path} is not a reward model: its checkpoint lacks "
            f"{', '.join(scalar.model.missing_from_checkpoint)}, so its scores would be random."
        )
    return scalar


def load_scalar_head(
    model_name_or_path: str, *, dtype: torch.dtype, pad_token_id: int | None, seed: int
) -> ScalarHeadModel:
    """A model to train from a scalar-head model's weights, or from a language model's with a fresh head from `seed`.

    Raises:
        ValueError: there is no such model, or it cannot have a linear head with one output.
    """
    labels = number_of_labels(model_name_or_path)
    if labels not in (None, 1):
        raise ValueError(f"{model_name_or_path} is a classifier with {labels} labels; a scalar head has one.")
    torch.manual_seed(seed)  # for the head, when the checkpoint has none
    model = load_pretrained(AutoModelForSequenceClassification, model_name_or_path, dtype=dtype, num_labels=1)
    if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.out_features != 1:
        raise ValueError(
            f"{model_name_or_path}: {type(model).__name__} has no linear `score` head with one output. "
            f"Decoder models with a sequence-classification class (Llama, Qwen, GPT-2, OPT, ...) have one."
        )
    if extra := [key for key in model.missing_from_checkpoint if not key.startswith("score.")]:
        raise ValueError(f"{model_name_or_path}: the checkpoint lacks {', '.join(extra[:3])}.")
    model.config.pad_token_id = pad_token_id
    return ScalarHeadModel(model)
