"""scalar_head.py against plain AutoModelForSequenceClassification."""

import pytest
import torch
from tiny import GPT2, LLAMA, MODELS, score_head
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from engine.models.loading import exported_config
from engine.models.random_init import local_name
from engine.models.scalar_head import load_critic, load_reward_model, load_scalar_head, scoring_pad_token_id

PAD, EOS = 0, 1
LENGTHS = [3, 14, 1, 8]


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [[*torch.randint(2, 258, (length - 1,), generator=generator).tolist(), EOS] for length in LENGTHS]


def right_padded(batch, fill=PAD):
    width = max(map(len, batch))
    return torch.tensor([row + [fill] * (width - len(row)) for row in batch])


def plain(name, pad_token_id=PAD):
    """The reward model as any user of transformers would load it."""
    model = AutoModelForSequenceClassification.from_pretrained(local_name(name), dtype=torch.float32).eval()
    model.config.pad_token_id = pad_token_id
    return model


@pytest.mark.parametrize("fill", [PAD, EOS, 99], ids=["own_pad", "pad_is_eos", "junk"])
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_the_score_at_the_last_token_is_transformers_own(family, fill):
    name, batch = score_head(MODELS[family]), rows()
    scalar = load_reward_model(name, dtype=torch.float32, pad_token_id=PAD).eval()
    width = max(LENGTHS)
    last = torch.tensor([line * width + length - 1 for line, length in enumerate(LENGTHS)])
    got = scalar(right_padded(batch, fill), last)
    alone = plain(name)
    wanted = torch.stack([alone(input_ids=torch.tensor([row])).logits[0, 0] for row in batch])
    assert got.dtype == torch.float32 and wanted.std() > 1e-3
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    # ... and as a padded batch, the way transformers itself looks for the last token.
    torch.testing.assert_close(alone(input_ids=right_padded(batch)).logits[:, 0], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_value_is_the_score_of_the_row_cut_off_at_its_position(family):
    name, batch = score_head(MODELS[family]), rows()
    critic = load_critic(name, dtype=torch.float32, pad_token_id=PAD, seed=0).eval()
    asked = [(1, 0), (1, 6), (0, 2), (3, 4), (1, 13)]  # (row, column), in no order
    got = critic(right_padded(batch), torch.tensor([row * max(LENGTHS) + column for row, column in asked]))
    alone = plain(name)
    wanted = [alone(input_ids=torch.tensor([batch[row][: column + 1]])).logits[0, 0] for row, column in asked]
    assert got.shape == (5,)
    torch.testing.assert_close(got, torch.stack(wanted), atol=1e-5, rtol=0)


def test_no_positions_are_no_values_and_still_reach_every_parameter():
    critic = load_critic(score_head(LLAMA), dtype=torch.float32, pad_token_id=PAD, seed=0)
    values = critic(torch.zeros(1, 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert values.shape == (0,)
    values.sum().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_a_critic_starts_from_the_reward_models_weights():
    critic = load_critic(score_head(LLAMA), dtype=torch.float32, pad_token_id=PAD, seed=5).model.state_dict()
    reward = plain(score_head(LLAMA)).state_dict()
    assert critic.keys() == reward.keys()
    assert all(torch.equal(critic[name], reward[name]) for name in reward)


@pytest.mark.parametrize("name", [LLAMA, GPT2])
def test_a_fresh_head_depends_on_the_seed_alone(name):
    def load(seed, noise):
        torch.manual_seed(noise)
        return load_critic(name, dtype=torch.float32, pad_token_id=PAD, seed=seed).model

    first, again, other = load(1, 100), load(1, 200), load(2, 100)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.abs().max() > 0
    backbones = [model.base_model.state_dict() for model in (first, other)]
    assert all(torch.equal(backbones[0][key], backbones[1][key]) for key in backbones[0])


def test_what_is_exported_knows_its_pad_token():
    assert load_critic(LLAMA, dtype=torch.float32, pad_token_id=7, seed=0).model.config.pad_token_id == 7


# What the scores came to


@pytest.fixture
def with_normalisation(tmp_path) -> str:
    """A reward model's folder whose scores came to a mean of 2.5 and a standard deviation of 4, as a run leaves it."""
    scalar = load_reward_model(score_head(LLAMA), dtype=torch.float32, pad_token_id=PAD)
    assert (scalar.score_mean, scalar.score_std) == (0.0, 1.0), "one that was never evaluated"
    scalar.keep_normalisation(2.5, 4.0)
    scalar.model.config = exported_config(scalar.model)
    scalar.model.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(local_name(LLAMA)).save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


@torch.no_grad()
def test_mean_and_deviation_are_kept_with_the_reward_model(with_normalisation):
    again = load_reward_model(with_normalisation, dtype=torch.float32, pad_token_id=PAD).eval()
    assert (again.score_mean, again.score_std) == (2.5, 4.0)
    config = AutoConfig.from_pretrained(with_normalisation)
    assert (config.score_mean, config.score_std) == (2.5, 4.0), "for those who load it plainly"
    # Ours takes them out; the plain scores, transformers' own, are as before.
    ids = torch.tensor([rows()[1]])
    last = torch.tensor([ids.shape[1] - 1])
    before = load_reward_model(score_head(LLAMA), dtype=torch.float32, pad_token_id=PAD).eval()(ids, last)
    torch.testing.assert_close(again(ids, last), (before - 2.5) / 4.0, atol=1e-6, rtol=0)
    torch.testing.assert_close(plain(with_normalisation)(input_ids=ids).logits[0], before, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_critic_starts_in_the_units_of_the_rewards_and_keeps_them(with_normalisation):
    critic = load_critic(with_normalisation, dtype=torch.float32, pad_token_id=PAD, seed=0).eval()
    reward = load_reward_model(with_normalisation, dtype=torch.float32, pad_token_id=PAD).eval()
    ids = torch.tensor([rows()[1]])
    everywhere = torch.arange(ids.shape[1])
    assert torch.equal(critic(ids, everywhere), reward(ids, everywhere))
    exported = exported_config(critic.model)
    assert (exported.score_mean, exported.score_std) == (2.5, 4.0), "a run that goes on from it reads the same values"


def test_a_reward_model_that_is_trained_on_gives_plain_scores(with_normalisation):
    scalar = load_scalar_head(with_normalisation, dtype=torch.float32, pad_token_id=PAD, seed=0)
    assert (scalar.score_mean, scalar.score_std) == (0.0, 1.0)


@torch.no_grad()
def test_the_heads_product_is_taken_in_fp32():
    """In bf16 all scores would be bf16 numbers, 1/16 apart at 8."""
    scalar = load_reward_model(score_head(LLAMA), dtype=torch.bfloat16, pad_token_id=PAD).eval()
    scores = scalar(torch.arange(1, 33)[None], torch.arange(32))
    assert scores.dtype == torch.float32 and (scores != scores.bfloat16()).any()


def test_an_end_of_sequence_token_that_pads_is_not_exported_as_the_pad_token():
    """transformers takes the last token that is not the pad for the last real one: it would score the token before."""
    tokenizer = AutoTokenizer.from_pretrained(local_name(LLAMA))
    assert scoring_pad_token_id(tokenizer) == tokenizer.pad_token_id is not None
    tokenizer.pad_token = tokenizer.eos_token
    assert scoring_pad_token_id(tokenizer) is None


@pytest.mark.parametrize("pad", [None, 7])
def test_a_model_to_train_keeps_the_pad_token_it_is_given(pad):
    scalar = load_scalar_head(LLAMA, dtype=torch.float32, pad_token_id=pad, seed=0)
    assert scalar.model.config.pad_token_id == pad
    assert scalar.model.missing_from_checkpoint == ["score.weight"]


# What is refused


@pytest.mark.parametrize("family", MODELS)
def test_a_language_model_is_no_reward_model(family):
    with pytest.raises(ValueError, match=r"not a reward model: its checkpoint lacks score\.weight"):
        load_reward_model(MODELS[family], dtype=torch.float32, pad_token_id=PAD)


def test_a_model_without_a_score_head_is_refused():
    name = "random://bert?hidden_size=32&intermediate_size=64&num_hidden_layers=1&num_attention_heads=4&head=score"
    with pytest.raises(ValueError, match="no linear `score` head"):
        load_reward_model(name, dtype=torch.float32, pad_token_id=PAD)


def test_a_classifier_with_several_labels_is_refused_by_name(tmp_path):
    config = AutoConfig.from_pretrained(local_name(LLAMA), num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(local_name(LLAMA)).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="three"):
        load_reward_model(str(tmp_path / "three"), dtype=torch.float32, pad_token_id=PAD)


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match=r"/no/such/reward: no such model folder"):
        load_reward_model("/no/such/reward", dtype=torch.float32, pad_token_id=PAD)
