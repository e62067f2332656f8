"""What a pass is said to take, against what torch's allocator reports of the same pass over real tensors."""

import functools

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from engine.algorithms.logprobs import chunked_full_kl, chunked_full_kl_sum
from engine.data.sequences import Sequences
from engine.memory_plan.passes import PassPeak, pass_peak
from engine.memory_plan.roles import roles_of
from engine.models.language_model import load_language_model
from engine.models.lora import with_adapter
from engine.models.modes import checkpoint_activations
from engine.models.scalar_head import load_scalar_head

WIDTH, VOCABULARY, TOKENS, RESPONSE, ROWS, CHUNK = 128, 1024, 256, 128, 2, 64
KINDS = {
    "llama": f"hidden_size={WIDTH}&num_attention_heads=4&num_key_value_heads=2&intermediate_size=384",
    "qwen2": f"hidden_size={WIDTH}&num_attention_heads=4&num_key_value_heads=2&intermediate_size=256",
    "gpt2": f"n_embd={WIDTH}&n_head=4&n_positions=512",
    "opt": f"hidden_size={WIDTH}&num_attention_heads=4&ffn_dim=512&word_embed_proj_dim={WIDTH}",
}


def name_of(kind: str, *, layers: int = 3, vocabulary: int = VOCABULARY) -> str:
    depth = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    return f"random://{kind}?{KINDS[kind]}&{depth}={layers}&vocab_size={vocabulary}"


def language(name: str, dtype: torch.dtype = torch.float32):
    return functools.partial(load_language_model, name, dtype=dtype)


def planned(build, **changes) -> PassPeak:
    given = dict(tokens=TOKENS, rows=ROWS, response_tokens=RESPONSE, logits_chunk_tokens=CHUNK, head="language")
    switches = dict(trained=True, checkpointing=False, dtype=torch.float32)
    return pass_peak(build, **(given | switches | changes))


def really(build, *, trained=True, checkpointing=False, head="language", kl_full=False, chunk=CHUNK) -> PassPeak:
    """The same pass over real tensors, and what the allocator counted meanwhile."""
    module = build().train(trained)
    if checkpointing:
        checkpoint_activations(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if trained and parameter.requires_grad else None
    texts = [[3] * (TOKENS - RESPONSE)] * ROWS, [[4] * RESPONSE] * ROWS
    given = dict(temperature=1.0, chunk_tokens=chunk)

    def answers(**more):
        if head == "score":
            return module(batch.input_ids, batch.positions)
        return module(batch.input_ids, batch.positions, batch.targets, **given, **more)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, torch.set_grad_enabled(trained):
        batch = Sequences.of(*texts).padded(torch.arange(ROWS), torch.device("cpu"))
        said = answers(with_entropy=True) if not trained and head == "language" else answers()
        if kl_full:
            with torch.no_grad():
                theirs = answers()
            weights = (module.head.weight, module.head.bias)
            both = (said.hidden, *weights, theirs.hidden, *weights)
            kl = chunked_full_kl_sum(*both, torch.ones(len(said.hidden)), **given) if trained else None
            kl = chunked_full_kl(*both, **given) if kl is None else kl
        if trained:
            loss = (said if head == "score" else said.logprobs).square().mean() + (kl if kl_full else 0)
            with torch.profiler.record_function("the forward pass is over"):
                torch.empty(0)
            loss.backward()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = peak = saved = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
        elif event.name() == "the forward pass is over":
            saved = live
    return PassPeak(saved_bytes=saved, peak_bytes=peak)


def assert_close(plan: PassPeak, real: PassPeak, *, within: float = 0.1) -> None:
    assert real.peak_bytes > 2**20, "so little that a test of it says nothing"
    assert plan.peak_bytes == pytest.approx(real.peak_bytes, rel=within)
    assert plan.saved_bytes == pytest.approx(real.saved_bytes, rel=within)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["answering", "trained", "checkpointing"])
def test_a_pass_takes_what_was_planned(kind, how):
    given = dict(trained=how != "answering", checkpointing=how == "checkpointing")
    build = language(name_of(kind))
    assert_close(planned(build, **given), really(build, **given))


@pytest.mark.parametrize("how", ["answering", "trained", "checkpointing"])
def test_a_scalar_head_takes_what_was_planned(how):
    given = dict(trained=how != "answering", checkpointing=how == "checkpointing", head="score")
    build = functools.partial(load_scalar_head, name_of("llama"), dtype=torch.float32, pad_token_id=0, seed=0)
    assert_close(planned(build, **given), really(build, **given))


@pytest.mark.parametrize("trained", [False, True])
def test_16_bits_take_what_was_planned(trained):
    build = language(name_of("llama"), torch.bfloat16)
    given = dict(trained=trained)
    assert_close(planned(language(name_of("llama")), dtype=torch.bfloat16, **given), really(build, **given))


@pytest.mark.parametrize("trained", [False, True])
def test_the_full_kl_takes_what_was_planned(trained):
    build = language(name_of("llama", vocabulary=8192))
    given = dict(trained=trained, kl_full=True)
    assert_close(planned(build, **given), really(build, **given))


def test_an_adapter_takes_what_was_planned():
    form = dict(seed=0, r=4, alpha=8, dropout=0.0, target_modules=None)
    build = functools.partial(with_adapter, language(name_of("llama")), **form)
    assert_close(planned(build), really(build))


def test_a_role_takes_what_its_model_takes_as_the_engine_loads_it(tmp_path):
    """GPT-2's own dropout is not off, and would keep a mask of every activation."""
    actor = roles_of(tiny.ppo_config(tmp_path, model=name_of("gpt2")), dtype=torch.float32)[0]
    sizes = dict(tokens=TOKENS, rows=ROWS, response_tokens=RESPONSE, logits_chunk_tokens=CHUNK)
    assert_close(actor.pass_peak(**sizes, trained=True), really(language(name_of("gpt2"))))


@pytest.mark.parametrize("layers", [6, 9])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_depths_say_it_of_all(layers, checkpointing, monkeypatch):
    build = language(name_of("llama", layers=layers))
    by_line = planned(build, checkpointing=checkpointing)
    monkeypatch.setattr("engine.memory_plan.passes.DEPTHS", (layers,))
    measured = planned(build, checkpointing=checkpointing)
    assert by_line.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    assert by_line.saved_bytes == pytest.approx(measured.saved_bytes, rel=0.01)
    assert_close(by_line, really(build, checkpointing=checkpointing))


def test_checkpointing_keeps_a_state_per_layer():
    """And not what a layer computes between: of a layer more, one state per token is kept."""
    kept = [planned(language(name_of("llama", layers=n)), checkpointing=True).saved_bytes for n in (3, 5)]
    state = ROWS * TOKENS * WIDTH * 4
    assert kept[1] - kept[0] == pytest.approx(2 * state, rel=0.01)
    without = planned(language(name_of("llama", layers=5)))
    assert planned(language(name_of("llama", layers=5)), checkpointing=True).peak_bytes < without.peak_bytes / 2


def test_what_is_kept_grows_with_the_tokens():
    build = language(name_of("llama"))
    kept = {n: planned(build, rows=n, response_tokens=1).saved_bytes for n in (1, 2, 4)}
    assert kept[4] - kept[2] == pytest.approx(2 * (kept[2] - kept[1]), rel=0.01)
    assert planned(build, tokens=2 * TOKENS, rows=2).saved_bytes == pytest.approx(
        planned(build, rows=4, response_tokens=RESPONSE // 2).saved_bytes, rel=0.01
    )  # a fused kernel keeps no square of the length


def test_the_chunk_bounds_the_logits():
    """Without gradients a chunk is held twice: logits, and what the entropy is made of."""
    vocabulary = 32768
    build = language(name_of("llama", vocabulary=vocabulary))
    peaks = {chunk: planned(build, trained=False, logits_chunk_tokens=chunk).peak_bytes for chunk in (32, 64, 10**6)}
    row = vocabulary * 4
    assert peaks[64] - peaks[32] == pytest.approx(2 * 32 * row, rel=0.01)
    assert peaks[10**6] - peaks[64] == pytest.approx(2 * (ROWS * RESPONSE - 64) * row, rel=0.01)


def test_a_vocabulary_costs_a_gradient_of_its_head():
    """Trained, each word more takes a row of the head's gradient, and of two chunks of logits, which is made before it
    is added to the rest.
    """
    peaks = [planned(language(name_of("llama", vocabulary=n))).peak_bytes for n in (65536, 131072)]
    assert peaks[1] - peaks[0] == pytest.approx(65536 * 4 * (WIDTH + CHUNK), rel=0.1)


def test_a_pass_of_no_response_is_refused():
    with pytest.raises(ValueError, match="response_tokens=0 must be 1 to tokens=256"):
        planned(language(tiny.LLAMA), response_tokens=0)


def test_a_model_that_looks_at_its_data_is_refused():
    """Mixtures of experts in fp32 have no kernel that knows its shapes beforehand."""
    sizes = "hidden_size=32&num_hidden_layers=2&num_attention_heads=4&num_key_value_heads=2&intermediate_size=64"
    with pytest.raises(ValueError, match="MixtralForCausalLM does not run on tensors without data"):
        planned(language(f"random://mixtral?{sizes}"))
