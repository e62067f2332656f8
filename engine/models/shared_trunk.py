"""One base model in memory for all four roles: actor and critic share one adapter and have a head each, the reward
model is another adapter with a head of its own, and the ref is the base with its adapters switched off.

Two heads on one network with one loss are Schulman et al.'s 2017, https://arxiv.org/abs/1707.06347, eq. 9; adapters in
the place of four models are Santacroce et al.'s 2023, https://arxiv.org/abs/2309.00754.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from engine.models.adapter_folder import put_in_reward_adapter, score_normalisation
from engine.models.language_model import LanguageModel, TokenLogprobs, hidden_states, load_language_model
from engine.models.loading import exported_config
from engine.models.lora import REWARD_ADAPTER, add_adapter
from engine.models.scalar_head import scalar_product


class SharedTrunk(LanguageModel):
    """A language model with an adapter that also answers as critic and as reward model.

    Attributes:
        value_head: (1, H) weights; None where advantages need no values.
        reward_head: (1, H), frozen; None without a reward model.
        score_mean, score_std: as in `ScalarHeadModel`.
    """

    def __init__(self, model: PreTrainedModel, *, value_head: nn.Linear | None, reward_head: nn.Linear | None = None):
        super().__init__(model)
        self.value_head, self.reward_head = value_head, reward_head
        self.score_mean, self.score_std = 0.0, 1.0

    @property
    def has_value_head(self) -> bool:
        return self.value_head is not None

    @property
    def heads_it_reads(self) -> list[nn.Module]:
        return [head for head in (self.head, self.value_head, self.reward_head) if head is not None]

    def forward(
        self, input_ids: Tensor, positions: Tensor, targets: Tensor | None = None, **given
    ) -> TokenLogprobs | Tensor:
        """What `LanguageModel` says, with values V(x, y_<t) from the same pass.

        Without `targets` the reward head's numbers, (N,) fp32 at the asked positions: the reward model's scores while
        its adapter is switched on (`WithRewardAdapter`).
        """
        if targets is not None:
            said = super().forward(input_ids, positions, targets, **given)
            return said._replace(values=scalar_product(said.hidden, self.value_head)) if self.has_value_head else said
        hidden = hidden_states(self.model, input_ids)[positions]
        return (scalar_product(hidden, self.reward_head) - self.score_mean) / self.score_std


def load_shared_trunk(
    model_name_or_path: str,
    *,
    dtype: torch.dtype,
    adapter: dict[str, Any],
    reward_adapter: str | None,
    with_value_head: bool,
    seed: int,
    quantization: Literal["nf4"] | None = None,
) -> SharedTrunk:
    """A trunk that computes what its base does: a new adapter, and values of 0 until they are learned.

    Args:
        adapter: what `add_adapter` takes.
        reward_adapter: a folder that reward-model training has written with `lora.export: adapter`.
        seed: of the adapter's first weights, the same on every rank.
        quantization: as in `load_pretrained`; adapters and heads keep `dtype`.

    Raises:
        ValueError: there is no such model, or the reward adapter was not trained on it.
    """
    model = load_language_model(model_name_or_path, dtype=dtype, quantization=quantization).model
    torch.manual_seed(seed)
    add_adapter(model, **adapter)
    width = model.get_output_embeddings().in_features
    value_head = nn.Linear(width, 1, bias=False, dtype=dtype) if with_value_head else None
    if value_head is not None:
        nn.init.zeros_(value_head.weight)
    if reward_adapter is None:
        return SharedTrunk(model, value_head=value_head)
    reward_head = nn.Linear(width, 1, bias=False, dtype=dtype).requires_grad_(False)
    folder = Path(reward_adapter).expanduser()
    put_in_reward_adapter(model, reward_head, folder, name=REWARD_ADAPTER)
    trunk = SharedTrunk(model, value_head=value_head, reward_head=reward_head)
    trunk.score_mean, trunk.score_std = score_normalisation(folder)
    return trunk


def critic_of(model: PreTrainedModel, *, pad_token_id: int | None) -> PreTrainedModel:
    """The sequence classifier with one label that a trunk's critic is exported as: its class and config, no weights."""
    config = exported_config(model)
    config.num_labels, config.pad_token_id = 1, pad_token_id
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
