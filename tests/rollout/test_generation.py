"""generation.py against transformers' own generate, slow decoding without a cache, and the laws of sampling."""

import math
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from tiny import MODELS
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from engine.data.sequences import Sequences
from engine.models.language_model import load_language_model
from engine.models.random_init import byte_tokenizer
from engine.models.shared_trunk import SharedTrunk
from engine.rollout import generation
from engine.rollout.generation import (
    Responses,
    Sampling,
    _draw,
    _filters,
    eos_token_ids_of,
    generate_responses,
    noise_of_rows,
    sampled_responses,
)
from engine.rollout.kv_cache import PreallocatedLayer, preallocated_cache

_WINDOWED = "num_key_value_heads=2&hidden_size=32&intermediate_size=64&num_hidden_layers=2&num_attention_heads=4"
FAMILIES = MODELS | {
    "mistral_window": f"random://mistral?{_WINDOWED}&sliding_window=8",
    "qwen2_window": f"random://qwen2?{_WINDOWED}&use_sliding_window=true&sliding_window=8&max_window_layers=1",
}
EOS = 1
# With the 258 tokens of a random model, so many ends make responses of mixed lengths.
MANY_EOS = [1, *range(20, 50)]


def prompts(count=8, seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 13, 4, 7, 2, 20, 5, 9][:count]
    return [torch.randint(50, 258, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def loaded():
    """Weights ten times as large as a fresh model's: its predictions then depend on what it reads."""
    models = {}
    for family, name in FAMILIES.items():
        model = load_language_model(name, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(10)
        models[family] = model
    return models


def generate(model, asked, **given):
    return sample(model, asked, **given).tokens


ONE_PASS = 10**6  # prefill_tokens with which all prompts are read in one


def sample(
    model,
    asked,
    *,
    seed=0,
    eos=(EOS,),
    micro_batch_size=100,
    prefill_tokens=None,
    noise=None,
    limits=None,
    on_token=None,
    value_head=None,
    **sampling,
):
    sampling = Sampling(**dict(max_response_tokens=16) | sampling)
    if noise is None:
        noise = noise_of_rows([(seed, row) for row in range(len(asked))], sampling.max_response_tokens)
    given = dict(sampling=sampling, eos_token_ids=eos, micro_batch_size=micro_batch_size, limits=limits)
    given |= dict(prefill_tokens=prefill_tokens, on_token=on_token, value_head=value_head)
    return sampled_responses(model.model, asked, noise, **given)


def plain_generate(model, prompt, eos, max_new_tokens) -> list[int]:
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(eos), pad_token_id=0, use_cache=True
    )
    with torch.no_grad():
        tokens = model.model.generate(torch.tensor([prompt]), generation_config=settings)
    return tokens[0, len(prompt) :].tolist()


# Greedy


@pytest.mark.parametrize("eos", [(), MANY_EOS], ids=["no_eos", "many_eos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_transformers_generates_from_each_prompt_alone(loaded, family, eos):
    got = generate(loaded[family], prompts(), eos=eos, temperature=0.0)
    assert got == [plain_generate(loaded[family], prompt, eos, 16) for prompt in prompts()]
    assert len({tuple(response) for response in got}) > 4  # the model does read its prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_without_any_cache(loaded, family):
    """The slowest oracle: the whole row again for every token."""
    wanted = []
    for prompt in prompts(4):
        row = list(prompt)
        for _ in range(9):
            with torch.no_grad():
                row.append(loaded[family].model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax().item())
        wanted.append(row[len(prompt) :])
    assert generate(loaded[family], prompts(4), eos=(), temperature=0.0, max_response_tokens=9) == wanted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_preallocated_cache_and_transformers_own_give_the_same_tokens(loaded, family, temperature, monkeypatch):
    ours = generate(loaded[family], prompts(), eos=MANY_EOS, temperature=temperature)
    monkeypatch.setattr(generation, "preallocated_cache", lambda config, capacity: DynamicCache(config=config))
    assert generate(loaded[family], prompts(), eos=MANY_EOS, temperature=temperature) == ours


def test_windowed_layers_keep_their_own_cache(loaded):
    """A preallocated one would give the same tokens and hold more than the window."""
    kinds = {family: preallocated_cache(loaded[family].model.config, 40).layers for family in FAMILIES}
    assert [type(layer) for layer in kinds["llama"]] == [PreallocatedLayer, PreallocatedLayer]
    assert [type(layer) for layer in kinds["qwen2_window"]] == [PreallocatedLayer, DynamicSlidingWindowLayer]
    assert [type(layer) for layer in kinds["mistral_window"]] == [DynamicSlidingWindowLayer, DynamicSlidingWindowLayer]


def test_the_cache_is_allocated_once_and_holds_what_was_stored():
    layer, columns = PreallocatedLayer(5), torch.arange(24.0).reshape(2, 1, 4, 3)
    layer.update(columns[:, :, :2], -columns[:, :, :2])
    where = layer.keys.data_ptr()
    for column in (2, 3):
        keys, values = layer.update(columns[:, :, column : column + 1], -columns[:, :, column : column + 1])
    assert layer.keys.data_ptr() == where == keys.data_ptr() and layer.keys.shape == (2, 1, 5, 3)
    assert torch.equal(keys, columns) and torch.equal(values, -columns) and layer.get_seq_length() == 4
    layer.batch_select_indices(torch.tensor([1]))
    keys, values = layer.update(columns[:1, :, :1], columns[:1, :, :1])
    assert torch.equal(keys[:, :, :4], columns[1:]) and torch.equal(keys[:, :, 4:], columns[:1, :, :1])


def test_a_sliding_window_is_seen(loaded):
    """The control for the windowed models above: a token further back than the window changes nothing."""
    model = loaded["mistral_window"]
    with torch.no_grad():
        far = [model.model(torch.tensor([[first] + [60, 70, 80, 90, 100] * 5])).logits[0, -1] for first in (51, 52)]
    torch.testing.assert_close(*far)


# Neighbours


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_does_not_depend_on_what_is_decoded_next_to_it(loaded, family):
    noise = noise_of_rows([(5, row) for row in range(8)], 16)
    together = generate(loaded[family], prompts(), noise=noise, eos=MANY_EOS, temperature=0.7)
    alone = [
        generate(loaded[family], [prompt], noise=noise[row : row + 1], eos=MANY_EOS, temperature=0.7)[0]
        for row, prompt in enumerate(prompts())
    ]
    assert together == alone
    for micro_batch_size in (1, 3):
        given = dict(noise=noise, eos=MANY_EOS, temperature=0.7, micro_batch_size=micro_batch_size)
        assert generate(loaded[family], prompts(), **given) == alone
    assert len({len(response) for response in alone}) > 2


@pytest.mark.parametrize("micro_batch_size", [3, 100])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_window"])
def test_a_limit_of_its_own_cuts_a_row_and_leaves_the_others_alone(loaded, family, micro_batch_size):
    limits = [1, 16, 5, 3, 16, 2, 9, 1]
    given = dict(eos=MANY_EOS, temperature=0.7, micro_batch_size=micro_batch_size)
    whole = generate(loaded[family], prompts(), **given)
    cut = generate(loaded[family], prompts(), limits=limits, **given)
    assert cut == [response[:limit] for response, limit in zip(whole, limits, strict=True)] != whole


def test_no_prompts_no_responses(loaded):
    assert generate(loaded["llama"], [], noise=torch.empty(0, 16, dtype=torch.float64)) == []


# What a forward pass costs


class Passes:
    """The shape of every forward pass's input, and its logits."""

    def __init__(self, model):
        self.inputs, self.logits = [], []
        self.hook = model.register_forward_hook(self._saw, with_kwargs=True)

    def _saw(self, module, args, kwargs, output):
        self.inputs.append(tuple(kwargs["input_ids"].shape))
        self.logits.append(output.logits[:, -1].detach().clone())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


def test_finished_rows_leave_the_batch(loaded):
    model = loaded["llama"]
    with Passes(model.model) as passes:
        responses = generate(model, prompts(), eos=MANY_EOS, prefill_tokens=ONE_PASS)
    lengths = [len(response) for response in responses]
    alive = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert [rows for rows, _ in passes.inputs] == alive
    assert alive[0] == 8 and alive[-1] < 8
    assert [columns for _, columns in passes.inputs] == [20] + [1] * (max(lengths) - 1)


def test_micro_batches_hold_prompts_of_similar_lengths(loaded):
    with Passes(loaded["llama"].model) as passes:
        generate(loaded["llama"], prompts(), micro_batch_size=3, max_response_tokens=1, prefill_tokens=ONE_PASS)
    assert passes.inputs == [(3, 4), (3, 9), (2, 20)]  # lengths 1 2 4 | 5 7 9 | 13 20


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_read_with_little_padding_and_written_on_as_one(loaded, family):
    """Lengths 20 | 13 | 9 7 | 5 4 | 2 1 where a pass more costs 3 tokens: 20 + 13 + 18 + 10 + 4 + 5 x 3. Layers with a
    window have no columns to be put together in.
    """
    given = dict(eos=MANY_EOS, temperature=0.7)
    with Passes(loaded[family].model) as passes:
        found = sample(loaded[family], prompts(), prefill_tokens=24, **given)
    if "window" in family:
        assert passes.inputs[0] == (8, 20)
    else:
        assert passes.inputs[:5] == [(1, 20), (1, 13), (2, 9), (2, 5), (2, 2)]
    wanted = sample(loaded[family], prompts(), prefill_tokens=ONE_PASS, **given)
    assert found.tokens == wanted.tokens
    for name in Responses._fields[1:]:
        for one, other in zip(getattr(found, name), getattr(wanted, name), strict=True):
            assert one == pytest.approx(other, abs=1e-4)


# Where a response ends


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_end_is_kept_and_nothing_follows_it(loaded, temperature):
    responses = generate(loaded["gpt2"], prompts(), eos=MANY_EOS, temperature=temperature)
    ended = [response for response in responses if response[-1] in MANY_EOS]
    assert ended and all(len(response) == 16 for response in responses if response not in ended)
    assert all(token not in MANY_EOS for response in responses for token in response[:-1])


def test_without_an_end_every_response_has_the_maximum_length(loaded):
    assert {len(one) for one in generate(loaded["opt"], prompts(), eos=(), max_response_tokens=11)} == {11}
    assert {len(one) for one in generate(loaded["opt"], prompts(), eos=(), max_response_tokens=1)} == {1}


def test_when_everything_ends_every_response_has_the_minimum_length(loaded):
    everything = list(range(258))
    assert {len(one) for one in generate(loaded["llama"], prompts(), eos=everything)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("minimum", [1, 5, 16])
def test_no_end_is_drawn_before_the_minimum(loaded, minimum, temperature):
    given = dict(eos=range(200), temperature=temperature)
    responses = generate(loaded["llama"], prompts(), min_response_tokens=minimum, **given)
    assert all(len(response) >= min(minimum + 1, 16) for response in responses)
    assert all(token >= 200 for response in responses for token in response[:minimum])
    if minimum < 16:
        assert any(len(response) == minimum + 1 for response in responses)
    shorter = generate(loaded["llama"], prompts(), min_response_tokens=0, **given)
    assert any(len(response) < minimum + 1 for response in shorter)


def test_the_ends_are_the_tokenizers_and_the_models():
    def ends(configured):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
        return eos_token_ids_of(model, byte_tokenizer())

    assert ends(None) == [1]
    assert ends(1) == [1]
    assert ends(7) == [1, 7]
    assert ends([9, 1, 7]) == [1, 7, 9]


# Drawing


def probabilities(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """By the definitions: the k likeliest tokens; of these the fewest, likeliest first, that reach top_p."""
    weights = [math.exp(logit / temperature) for logit in logits]
    ranked = sorted(range(len(logits)), key=lambda token: -weights[token])
    if top_k:
        ranked = ranked[:top_k]
    total, kept, reached = sum(weights[token] for token in ranked), [], 0.0
    for token in ranked:
        kept.append(token)
        reached += weights[token] / total
        if reached >= top_p:
            break
    mass = sum(weights[token] for token in kept)
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(logits))]


LOGITS = [0.3, -1.2, 2.0, 0.9, -3.0, 1.1, 0.0, -0.4, 1.7, -8.0]
GRID = 200_000


def drawn(logits, uniform, **sampling) -> torch.Tensor:
    sampling = Sampling(max_response_tokens=1, **sampling)
    rows = torch.tensor(logits, dtype=torch.float32).expand(len(uniform), -1)
    return _draw(rows, uniform, sampling, _filters(sampling))[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8), (6, 0.8), (1, 1.0), (50, 0.999), (0, 0.01)])
def test_draws_follow_the_filtered_softmax(temperature, top_k, top_p):
    """On a fine grid of noise every token gets a share of the grid equal to its probability."""
    grid = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens = drawn(LOGITS, grid, temperature=temperature, top_k=top_k, top_p=top_p)
    shares = torch.bincount(tokens, minlength=len(LOGITS)) / GRID
    wanted = probabilities(LOGITS, temperature, top_k, top_p)
    for token, probability in enumerate(wanted):
        assert abs(shares[token].item() - probability) < 2e-5
        assert (shares[token] == 0) == (probability < 2e-6)


def test_top_p_by_hand():
    logits = [math.log(p) for p in (0.125, 0.5, 0.125, 0.25)]
    tokens = drawn(logits, (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000, top_p=0.7)
    assert Counter(tokens.tolist()) == {1: 2000, 3: 1000}  # 0.5 + 0.25 reach 0.7; renormalised 2 : 1


def test_draws_of_the_real_noise_follow_the_softmax():
    """Chi-square with 9 degrees of freedom: 27.9 is exceeded once in a thousand seeds, and this seed is fixed."""
    uniform = noise_of_rows([(1, row) for row in range(4000)], 5).flatten()
    counts = torch.bincount(drawn(LOGITS, uniform, temperature=1.5), minlength=10)
    expected = torch.tensor(probabilities(LOGITS, 1.5, 0, 1.0)) * len(uniform)
    assert ((counts - expected).square() / expected).sum() < 27.9


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(u):
    impossible = -math.inf
    for logits in (
        [impossible, 1.0, impossible],
        [impossible, impossible, 0.0, 1.0, impossible],
        [0.0, impossible, 0.0, impossible],
        [-200.0, 0.0, -200.0],  # too small for fp32
        [0.0] + [impossible] * 1000,
        [impossible] * 1000 + [0.0],
    ):
        (token,) = drawn(logits, torch.tensor([u], dtype=torch.float64)).tolist()
        assert token < len(logits) and logits[token] > -100


@pytest.mark.parametrize("vocabulary", [10, 258, 50_257, 151_936])
def test_the_largest_noise_draws_a_token_of_the_vocabulary(vocabulary):
    """A sum of many fp32 probabilities is not 1: the noise is measured against the sum there is."""
    logits = torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 4
    logits[4:, -vocabulary // 3 :] = -math.inf
    for u in (0.0, 1 - 2.0**-53):
        uniform = torch.full((8,), u, dtype=torch.float64)
        tokens = _draw(logits, uniform, Sampling(max_response_tokens=1), _filters(Sampling(max_response_tokens=1)))[0]
        assert (tokens >= 0).all() and (tokens < vocabulary).all()
        assert logits[torch.arange(8), tokens].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("filters", [{}, dict(top_k=2), dict(top_p=0.5)], ids=["none", "top_k", "top_p"])
def test_logits_that_are_not_finite_draw_no_token_outside_the_vocabulary(bad, filters):
    """Such a token would end in the embedding: IndexError on one rank, a dead CUDA context, and ranks that wait."""
    uniform = torch.tensor([0.3], dtype=torch.float64)
    for logits in ([bad] * 5, [0.0, bad, 1.0, 2.0, 3.0]):
        try:
            tokens = drawn(logits, uniform, **filters)
        except ValueError:
            continue  # a readable refusal would do as well
        assert 0 <= tokens.item() < 5


def test_equal_probabilities_have_equal_shares_of_the_noise():
    """Inversion: token k for noise in [k/4, (k+1)/4), the lower end included."""
    edges = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 0.75, 0.9999], dtype=torch.float64)
    assert drawn([0.0] * 4, edges).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_rare_tokens_are_told_apart():
    """2,000 tokens of probability 1e-8 each, after one that has the rest: an fp32 sum there moves in steps of 6e-8."""
    tail, head = 2_000, 1 - 2_000e-8
    logits = torch.tensor([math.log(head / 1e-8)] + [0.0] * tail)
    uniform = head + 1e-8 * (torch.arange(tail, dtype=torch.float64) + 0.5)
    sampling = Sampling(max_response_tokens=1)
    tokens = [_draw(logits.expand(len(u), -1), u, sampling, _filters(sampling))[0] for u in uniform.split(500)]
    assert len(set(torch.cat(tokens).tolist())) > 0.95 * tail


def test_temperature_zero_takes_the_likeliest_whatever_the_noise():
    assert drawn(LOGITS, torch.tensor([0.0, 0.3, 0.99], dtype=torch.float64), temperature=0.0).tolist() == [2, 2, 2]


# Noise


def test_noise_is_keyed():
    keys = [(0, 1, 7, 0), (0, 1, 7, 1), (0, 2, 7, 0), (1, 1, 7, 0), (0, 1, 8, 0), (0, 17, 0), (0, 1, 70)]
    noise = noise_of_rows(keys, 6)
    assert noise.shape == (7, 6) and noise.dtype == torch.float64
    assert len({tuple(row) for row in noise.tolist()}) == 7
    shuffled = noise_of_rows(keys[::-1], 6)
    assert torch.equal(shuffled, noise.flip(0))
    assert torch.equal(noise_of_rows([keys[2], keys[2]], 6), noise[[2, 2]])


def test_a_shorter_response_draws_the_beginning_of_a_longer_ones_noise():
    assert torch.equal(noise_of_rows([(1, 2)], 20)[:, :5], noise_of_rows([(1, 2)], 5))


def test_noise_is_uniform_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    noise = noise_of_rows([(row,) for row in range(500)], 40).flatten()
    assert torch.equal(state, torch.get_rng_state())
    assert noise.min() >= 0 and noise.max() < 1
    assert abs(noise.mean() - 0.5) < 4 * (1 / 12 / len(noise)) ** 0.5
    counts = torch.histc(noise.float(), bins=20, min=0, max=1)
    assert ((counts - 1000).square() / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, once in a thousand
    columns = noise_of_rows([(row,) for row in range(2000)], 2).T  # neighbouring tokens do not follow each other
    assert torch.corrcoef(columns)[0, 1].abs() < 0.1


def test_no_rows_no_noise():
    assert noise_of_rows([], 4).shape == (0, 4)


def test_the_same_noise_gives_the_same_responses_and_other_noise_others(loaded):
    one, again, other = (generate(loaded["llama"], prompts(), seed=seed) for seed in (0, 0, 1))
    assert one == again and all(a != b for a, b in zip(one, other, strict=True))


def test_the_same_prompt_twice_gets_two_responses(loaded):
    first, second = generate(loaded["llama"], [prompts()[1]] * 2, eos=())
    assert first != second


# Rollout = update


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_while_sampling_are_those_of_the_update(loaded, family):
    """What a token was drawn with, left-padded and from the cache, is what the right-padded forward pass says."""
    model, temperature = loaded[family], 0.7
    with Passes(model.model) as passes:
        found = sample(model, prompts(), eos=MANY_EOS, temperature=temperature, prefill_tokens=ONE_PASS)
    responses = found.tokens
    order = sorted(range(8), key=lambda row: len(prompts()[row]))
    sampled = [[] for _ in range(8)]
    for step, logits in enumerate(passes.logits):
        alive = [row for row in order if len(responses[row]) > step]
        log_p = (logits.double() / temperature).log_softmax(-1)
        for line, row in enumerate(alive):
            sampled[row].append(log_p[line, responses[row][step]].item())
    batch = Sequences.of(prompts(), responses).padded(torch.arange(8), torch.device("cpu"))
    given = dict(temperature=temperature, chunk_tokens=7, with_entropy=True)
    with torch.no_grad():
        updated = model(batch.input_ids, batch.positions, batch.targets, **given)
    wanted = torch.tensor([logprob for row in sampled for logprob in row])
    assert wanted.std() > 0.5
    torch.testing.assert_close(updated.logprobs, wanted, atol=1e-4, rtol=0)
    handed_out = {name: torch.tensor(list(chain(*getattr(found, name)))) for name in Responses._fields[1:]}
    torch.testing.assert_close(handed_out["logprobs"], wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(handed_out["behaviour_logprobs"], wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(handed_out["entropy"], updated.entropy, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_while_sampling_are_those_of_the_update(loaded, family):
    """Of the state before each token, as `SharedTrunk` says them; and nothing else is said than without a head."""
    model, value_head = loaded[family], torch.nn.Linear(32, 1, bias=False)
    trunk = SharedTrunk(model.model, value_head=value_head)
    given = dict(eos=MANY_EOS, temperature=0.7, prefill_tokens=24, micro_batch_size=5)
    found, plain = sample(model, prompts(), value_head=value_head, **given), sample(model, prompts(), **given)
    batch = Sequences.of(prompts(), found.tokens).padded(torch.arange(8), torch.device("cpu"))
    with torch.no_grad():
        updated = trunk(batch.input_ids, batch.positions, batch.targets, temperature=0.7, chunk_tokens=7)
    assert updated.values.std() > 0.1
    torch.testing.assert_close(torch.tensor(list(chain(*found.values))), updated.values, atol=1e-4, rtol=0)
    assert found[:-1] == plain[:-1] and not any(chain(*plain.values))


def test_filters_change_what_a_token_was_drawn_with_and_not_what_the_model_says_of_it():
    """0.5 + 0.25 reach top_p; the end of the sequence, the second likeliest, may not come yet."""
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log().expand(2, -1)
    uniform = torch.tensor([0.1, 0.9], dtype=torch.float64)
    nucleus = Sampling(max_response_tokens=1, top_p=0.7)
    found = _draw(logits, uniform, nucleus, _filters(nucleus))
    assert found.tokens.tolist() == [1, 3]
    assert found.behaviour_logprobs.exp().tolist() == pytest.approx([2 / 3, 1 / 3])
    assert found.logprobs.exp().tolist() == pytest.approx([0.5, 0.25])
    assert found.entropy.tolist() == pytest.approx([1.75 * math.log(2)] * 2)
    plain = Sampling(max_response_tokens=1)
    found = _draw(logits, uniform, plain, _filters(plain), never=torch.tensor([3]))
    assert found.tokens.tolist() == [0, 2]
    assert found.behaviour_logprobs.exp().tolist() == pytest.approx([1 / 6, 1 / 6])
    assert found.logprobs.exp().tolist() == pytest.approx([0.125, 0.125])
    assert logits.exp().tolist() == [[0.125, 0.5, 0.125, 0.25]] * 2


# Under ZeRO-3, where ranks decode in step


def test_a_rank_keeps_step_until_no_rank_is_active(loaded):
    """`any_rank_active` is asked once before each forward pass, and says how long to idle after the last."""
    model, asked, idle = loaded["llama"], [], 5

    def any_rank_active(mine):
        asked.append(mine)
        return mine or len([answer for answer in asked if not answer]) <= idle

    noise = noise_of_rows([(0, row) for row in range(8)], 16)
    alone = generate(model, prompts(), noise=noise, eos=MANY_EOS, micro_batch_size=3)
    with Passes(model.model) as passes:
        responses = generate_responses(
            model.model,
            prompts(),
            noise,
            sampling=Sampling(max_response_tokens=16),
            eos_token_ids=MANY_EOS,
            micro_batch_size=3,
            any_rank_active=any_rank_active,
        )
    assert responses == alone
    busy = asked.count(True)
    assert asked == [True] * busy + [False] * (idle + 1)
    assert len(passes.inputs) == busy + idle
    assert passes.inputs[-idle:] == [(1, 1)] * idle


def test_each_token_is_told_as_it_is_drawn(loaded):
    """By its row's number, whatever rows are decoded together: a token of every row, then the next of those left."""
    told, asked = [], prompts()
    responses = sample(
        loaded["llama"], asked, eos=MANY_EOS, micro_batch_size=3, on_token=lambda *token: told.append(token)
    )
    for row, tokens in enumerate(responses.tokens):
        assert [token for number, token in told if number == row] == tokens
    assert len({number for number, _ in told[:3]}) == 3 and len({len(tokens) for tokens in responses.tokens}) > 2
