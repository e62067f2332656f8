"""Documents packed into one row: each as if it were alone, or the model is refused."""

import pytest
import torch
from test_language_model import OTHER_FAMILIES
from tiny import GPT2, LLAMA, OPT, QWEN2, score_head

from engine.data.sequences import Sequences
from engine.models.language_model import check_packing, load_language_model
from engine.models.scalar_head import load_reward_model

CPU = torch.device("cpu")
CLOSE = dict(atol=1e-5, rtol=0)
SEE_EACH_OTHER = {"opt": OPT, "bloom": OTHER_FAMILIES["bloom"]}
KEPT_APART = {
    **dict(llama=LLAMA, qwen2=QWEN2, gpt2=GPT2),
    **{family: name for family, name in OTHER_FAMILIES.items() if family not in SEE_EACH_OTHER},
}
# (prompt, response) lengths: single tokens, empty responses, and longer than mistral's window of 8
SHAPES = [(1, 9), (5, 1), (12, 0), (3, 3), (7, 11), (1, 0), (20, 4), (1, 1)]


def sequences() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randint(2, 258, (n,), generator=generator).tolist() for n in shape] for shape in SHAPES]
    return Sequences.of(*zip(*drawn, strict=True))


def logprobs(model, batch) -> torch.Tensor:
    given = dict(temperature=0.7, chunk_tokens=64, position_ids=batch.position_ids)
    return model(batch.input_ids, batch.positions, batch.targets, **given).logprobs


@pytest.mark.parametrize("family", KEPT_APART)
def test_a_packed_document_is_the_document_alone(family):
    model = load_language_model(KEPT_APART[family], dtype=torch.float32).eval()
    check_packing(model.model)
    order = torch.tensor([3, 0, 7, 5, 6, 1, 2, 4])
    batch = sequences().packed(order, CPU)
    assert batch.input_ids.shape == (1, sum(map(sum, SHAPES)))
    packed = logprobs(model, batch)
    alone = torch.cat([logprobs(model, sequences().padded(row[None], CPU)) for row in order])
    torch.testing.assert_close(packed, alone, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_packed_response_has_the_score_and_the_gradient_that_it_has_alone(family):
    model = load_reward_model(score_head(KEPT_APART[family]), dtype=torch.float32, pad_token_id=0).train()
    weight = model.model.get_input_embeddings().weight

    def scores_and_gradient(batches):
        model.zero_grad()
        scores = torch.cat([model(b.input_ids, b.last_positions, position_ids=b.position_ids) for b in batches])
        (scores * torch.arange(1.0, 1 + len(scores))).sum().backward()
        return scores.detach(), weight.grad.clone()

    rows = torch.arange(len(SHAPES))
    packed = scores_and_gradient([sequences().packed(rows, CPU)])
    alone = scores_and_gradient([sequences().padded(row[None], CPU) for row in rows])
    assert alone[1].abs().max() > 1e-3
    torch.testing.assert_close(packed, alone, **CLOSE)


@pytest.mark.parametrize("family", SEE_EACH_OTHER)
def test_a_model_whose_documents_would_see_each_other_is_refused(family):
    model = load_language_model(SEE_EACH_OTHER[family], dtype=torch.float32).eval()
    with pytest.raises(ValueError, match=f"packing=true: {type(model.model).__name__} lets packed documents see each"):
        check_packing(model.model)
    # They do: the refusal is not a matter of taste.
    rows = torch.arange(len(SHAPES))
    packed = logprobs(model, sequences().packed(rows, CPU))
    alone = torch.cat([logprobs(model, sequences().padded(row[None], CPU)) for row in rows])
    assert (packed - alone).abs().max() > 1e-3


def test_a_score_head_is_checked_like_a_language_model():
    check_packing(load_reward_model(score_head(LLAMA), dtype=torch.float32, pad_token_id=0).eval().model)
    with pytest.raises(ValueError, match="OPTForSequenceClassification"):
        check_packing(load_reward_model(score_head(OPT), dtype=torch.float32, pad_token_id=0).eval().model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_to_sixteen_bits_is_not_taken_for_leaking(family):
    model = load_language_model(KEPT_APART[family], dtype=torch.bfloat16).eval()
    check_packing(model.model)
