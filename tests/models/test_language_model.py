"""language_model.py against the logits of plain transformers models, and the laws that padding and mode must obey."""

import pytest
import torch
from tiny import GPT2, LLAMA, MODELS, OPT, score_head
from transformers import AutoModelForCausalLM

from engine.models.language_model import load_language_model
from engine.models.random_init import local_name

CLOSE = dict(atol=1e-5, rtol=0)
PAD, EOS = 0, 1  # of the byte tokenizer
# (prompt, response) lengths: mixed, with an empty response and one of a single token
SHAPES = [(1, 9), (5, 1), (12, 0), (3, 3), (7, 11), (2, 2), (20, 4), (1, 1)]


def rows(seed=0) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        tuple(torch.randint(2, 258, (length,), generator=generator).tolist() for length in shape) for shape in SHAPES
    ]
    return [(prompt, [*response[:-1], EOS] if response else []) for prompt, response in drawn]  # each ends in EOS


def padded_input(batch, fill):
    """(input_ids, positions, targets) of right-padded rows, by loops."""
    width = max(len(prompt) + len(response) for prompt, response in batch)
    ids, positions, targets = [], [], []
    for line, (prompt, response) in enumerate(batch):
        row = prompt + response
        ids.append(row + [fill] * (width - len(row)))
        for offset, token in enumerate(response):
            positions.append(line * width + len(prompt) + offset - 1)
            targets.append(token)
    return torch.tensor(ids), torch.tensor(positions, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)


def oracle(name, prompt, response, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of one row from transformers' own logits: nothing padded, nothing batched."""
    plain = AutoModelForCausalLM.from_pretrained(local_name(name), dtype=torch.float32).eval()
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([prompt + response])).logits[0]
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    at = [len(prompt) + offset - 1 for offset in range(len(response))]
    entropy = torch.tensor([-sum(p * p.log() for p in log_p[row].exp()).item() for row in at])
    return torch.tensor([log_p[row, token].item() for row, token in zip(at, response, strict=True)]), entropy


@pytest.fixture(scope="module")
def loaded():
    return {name: load_language_model(name, dtype=torch.float32).eval() for name in MODELS.values()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", MODELS)
def test_logprobs_are_those_of_the_models_own_logits(loaded, family, temperature):
    batch = rows()
    with torch.no_grad():
        given = dict(temperature=temperature, chunk_tokens=5, with_entropy=True)
        got = loaded[MODELS[family]](*padded_input(batch, PAD), **given)
    wanted = [oracle(MODELS[family], prompt, response, temperature) for prompt, response in batch]
    torch.testing.assert_close(got.logprobs, torch.cat([logprobs for logprobs, _ in wanted]), **CLOSE)
    torch.testing.assert_close(got.entropy, torch.cat([entropy for _, entropy in wanted]), atol=2e-5, rtol=0)
    assert got.hidden.shape == (sum(response for _, response in SHAPES), 32)


@pytest.mark.parametrize("fill", [PAD, EOS, 77], ids=["own_pad", "pad_is_eos", "junk"])
@pytest.mark.parametrize("family", MODELS)
def test_padding_never_leaks(loaded, family, fill):
    """Alone and in a batch of eight rows of other lengths: the same log-probs, whatever the padding is."""
    batch, model = rows(), loaded[MODELS[family]]
    given = dict(temperature=0.7, chunk_tokens=1024)
    with torch.no_grad():
        together = model(*padded_input(batch, fill), **given).logprobs
        alone = [model(*padded_input([row], fill), **given).logprobs for row in batch]
    assert [len(one) for one in alone] == [response for _, response in SHAPES]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("family", MODELS)
def test_nothing_of_the_row_that_follows_a_token_is_seen(loaded, family):
    prompt, response = rows()[4]
    changed = response[:6] + [token % 255 + 2 for token in response[6:]]
    given = dict(temperature=1.0, chunk_tokens=64)
    with torch.no_grad():
        one = loaded[MODELS[family]](*padded_input([(prompt, response)], PAD), **given).logprobs
        other = loaded[MODELS[family]](*padded_input([(prompt, changed)], PAD), **given).logprobs
    assert torch.equal(one[:6], other[:6])
    assert not torch.allclose(one[6:], other[6:], atol=1e-3)


def test_with_gradients_the_logprobs_are_the_same_and_no_entropy_is_made_unasked(loaded):
    model, given = loaded[GPT2], dict(temperature=0.7, chunk_tokens=5)
    with_gradients = model(*padded_input(rows(), PAD), **given)
    with torch.no_grad():
        without = model(*padded_input(rows(), PAD), **given)
    assert torch.equal(with_gradients.logprobs, without.logprobs)
    assert with_gradients.entropy is without.entropy is None and with_gradients.logprobs.requires_grad


def test_no_response_tokens_at_all_still_reach_every_parameter(loaded):
    """An empty micro-batch must take part in backward, or ZeRO's collectives are out of step."""
    model = loaded[LLAMA]
    nothing = torch.empty(0, dtype=torch.int64)
    got = model(torch.zeros(1, 1, dtype=torch.int64), nothing, nothing, temperature=1.0, chunk_tokens=4)
    assert got.logprobs.shape == (0,)
    got.logprobs.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    model.zero_grad(set_to_none=True)


# Dropout


@pytest.mark.parametrize("name", [GPT2, OPT])
def test_dropout_is_off_in_train_mode_too(name):
    model, given = load_language_model(name, dtype=torch.float32).train(), dict(temperature=1.0, chunk_tokens=64)
    first, second = (model(*padded_input(rows(), PAD), **given).logprobs for _ in range(2))
    evaluated = model.eval()(*padded_input(rows(), PAD), **given).logprobs
    assert torch.equal(first, second) and torch.equal(first, evaluated)
    # The control: the same folder loaded plainly does drop.
    plain = AutoModelForCausalLM.from_pretrained(local_name(name)).train()
    ids = padded_input(rows(), PAD)[0]
    assert not torch.equal(plain(input_ids=ids).logits, plain(input_ids=ids).logits)


# What is refused


def test_a_reward_model_is_no_actor():
    with pytest.raises(ValueError, match=r"not a causal language model.*ForSequenceClassification.*reward model\?"):
        load_language_model(score_head(LLAMA), dtype=torch.float32)


def test_a_reward_model_with_tied_embeddings_is_no_actor():
    """GPT-2's head is its embedding: no weight is missing, only the class it was saved as tells."""
    with pytest.raises(ValueError, match="not a causal language model"):
        load_language_model(score_head(GPT2), dtype=torch.float32)


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "~/no/such/folder", "no/such/folder"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(ValueError, match=r"no/such/folder: no such model folder.*config\.json"):
        load_language_model(name, dtype=torch.float32)


def test_an_unknown_hub_name_is_named():
    with pytest.raises(ValueError, match="nobody/nothing-of-the-kind is neither a model folder nor a known hub name"):
        load_language_model("nobody/nothing-of-the-kind", dtype=torch.float32)


SMALL = "hidden_size=32&intermediate_size=64&num_hidden_layers=1&num_attention_heads=4"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (f"random://gemma2?{SMALL}&head_dim=8&num_key_value_heads=2", "final_logit_softcapping"),
        (f"random://cohere?{SMALL}&num_key_value_heads=2", "logit_scale"),
        (f"random://granite?{SMALL}&num_key_value_heads=2&logits_scaling=4.0", "logits_scaling"),
    ],
)
def test_logits_that_are_more_than_a_linear_map_are_refused(name, field):
    with pytest.raises(ValueError, match=f"{field}=.*not supported"):
        load_language_model(name, dtype=torch.float32)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_is_no_language_model(family):
    """It sees the tokens it is asked about, and its head is more than a linear map: silently wrong log-probs."""
    with pytest.raises(ValueError, match=r"random://(ro)?bert"):
        load_language_model(f"random://{family}?{SMALL}", dtype=torch.float32)


OTHER_FAMILIES = {
    "gpt_neox": f"random://gpt_neox?{SMALL}",  # Pythia; its config has an is_decoder that says False
    "phi": f"random://phi?{SMALL}",  # a head with a bias
    "bloom": "random://bloom?hidden_size=32&n_layer=1&n_head=4",  # ALiBi: no positions to embed
    "gemma": f"random://gemma?{SMALL}&head_dim=8&num_key_value_heads=2",  # embeddings are scaled, tied to the head
    "mistral_window": f"random://mistral?{SMALL}&num_key_value_heads=2&sliding_window=8",
    "qwen3": f"random://qwen3?{SMALL}&head_dim=8&num_key_value_heads=2",
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_of_decoders_load_and_agree_with_their_own_logits(family):
    model = load_language_model(OTHER_FAMILIES[family], dtype=torch.float32).eval()
    with torch.no_grad():
        got = model(*padded_input(rows(), PAD), temperature=0.7, chunk_tokens=5).logprobs
    wanted = [oracle(OTHER_FAMILIES[family], prompt, response, 0.7)[0] for prompt, response in rows()]
    torch.testing.assert_close(got, torch.cat(wanted), **CLOSE)
