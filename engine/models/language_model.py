"""A causal language model that answers with the log-probabilities of given tokens, never with logits."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from engine.algorithms.logprobs import (
    chunked_token_logprobs,
    chunked_token_logprobs_and_entropy,
)
from engine.models.loading import load_pretrained


class TokenLogprobs(NamedTuple):
    """N is the number of tokens asked for."""

    logprobs: Tensor  # (N,) fp32
    hidden: Tensor  # (N, H) the states that predict the tokens
    entropy: Tensor | None  # (N,) fp32, of the whole distributions; only where asked for
    values: Tensor | None = None  # (N,) fp32, of a shared trunk with a value head: V before the tokens


class LanguageModel(nn.Module):
    """Actor and ref.

    Sequences lie at the left of their row and padding at the right: a causal model's real tokens then never see the
    padding, so no attention mask is needed and the fast attention kernels apply.
    """

    has_value_head = False

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def head(self) -> nn.Module:
        """The projection to the vocabulary."""
        return self.model.get_output_embeddings()

    @property
    def heads_it_reads(self) -> list[nn.Module]:
        """Layers whose weights `forward` reads without calling them."""
        return [self.head]

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        chunk_tokens: int,
        position_ids: Tensor | None = None,
        with_entropy: bool = False,
    ) -> TokenLogprobs:
        """Log-probabilities of `targets`.

        Args:
            input_ids: (B, S), right-padded.
            positions: (N,) indices into the B * S states; state `positions[i]` predicts `targets[i]`.
            targets: (N,) token ids.
            temperature: divides the logits.
            chunk_tokens: so many rows of logits exist at a time.
            position_ids: (1, S) where rows are packed into one; see `hidden_states`.
            with_entropy: entropies as well.
        """
        hidden = hidden_states(self.model, input_ids, position_ids)[positions]
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        given = dict(temperature=temperature, chunk_tokens=chunk_tokens)
        if not with_entropy:
            return TokenLogprobs(chunked_token_logprobs(hidden, weight, bias, targets, **given), hidden, None)
        logprobs, entropy = chunked_token_logprobs_and_entropy(hidden, weight, bias, targets, **given)
        return TokenLogprobs(logprobs, hidden, entropy)


def load_language_model(
    model_name_or_path: str, *, dtype: torch.dtype, quantization: Literal["nf4"] | None = None
) -> LanguageModel:
    """Actor or ref from a folder or hub name.

    Args:
        quantization: as in `load_pretrained`.

    Raises:
        ValueError: there is no such model, it is no causal language model, or its logits are more than a linear map
            of its last hidden state (soft-capped or scaled logits, which the chunked head would get wrong).
    """
    model = load_pretrained(AutoModelForCausalLM, model_name_or_path, dtype=dtype, quantization=quantization)
    saved_as = (model.saved_architectures or ["a language model"])[0]
    if model.missing_from_checkpoint or saved_as.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{model_name_or_path} is not a causal language model: it was saved as {saved_as} and lacks "
            f"{', '.join(model.missing_from_checkpoint[:3]) or 'a trained head'}. Is it a reward model?"
        )
    if not isinstance(model.get_output_embeddings(), nn.Linear) or _reads_both_ways(model.config):
        raise ValueError(
            f"{model_name_or_path} is a {type(model).__name__}, not a causal language model with a linear head: its "
            f"tokens would see what they are asked to predict."
        )
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"{model_name_or_path} has {name}={getattr(model.config, name)}, not supported yet.")
    return LanguageModel(model)


def _reads_both_ways(config: PreTrainedConfig) -> bool:
    """Whether this is an encoder. Of its kind are the configs that can be told to be a decoder (add_cross_attention);
    GPT-NeoX's has an `is_decoder` too, and it says False for a decoder.
    """
    undecided = hasattr(config, "add_cross_attention") and hasattr(config, "is_decoder")
    return config.is_encoder_decoder or (undecided and not config.is_decoder)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """(B * S, H): the backbone's last hidden states of right-padded rows, positions counted from 0.

    Args:
        position_ids: (1, S) for one row that holds several documents, counted from 0 in each; transformers then keeps
            them from seeing each other (see `check_packing`).
    """
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    states = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1])


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Refuse to pack documents for a model in which they would see each other.

    transformers 5.23 tells documents apart by their position ids, but not in every model: OPT and BLOOM do not look at
    them. So two documents are run packed and alone, and compared. A collective under ZeRO-3.

    Raises:
        ValueError: the results differ.
    """
    ids = torch.arange(1, 10, device=model.device)[None]
    first, second = ids[:, :4], ids[:, 4:]
    position_ids = torch.cat([torch.arange(4), torch.arange(5)])[None].to(model.device)
    packed = hidden_states(model, ids, position_ids).float()
    alone = torch.cat([hidden_states(model, first), hidden_states(model, second)]).float()
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    if (packed - alone).norm() > tolerance * alone.norm():
        raise ValueError(f"packing=true: {type(model).__name__} lets packed documents see each other. Set it to false.")
