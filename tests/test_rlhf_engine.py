"""What the four models must have in common: refused on every rank before the first token, with what to do."""

import shutil

import pytest
import tiny
from transformers import AutoTokenizer

from engine.models.loading import load_tokenizer
from engine.models.random_init import local_name
from engine.rlhf_engine import DeepSpeedRLHFEngine


def refusal(config):
    """What is said instead of building."""
    actor = config.model_of("actor")
    with pytest.raises(ValueError, match=r"^(The |kl_estimator)") as refused:
        DeepSpeedRLHFEngine(actor, config.model_of("critic"), load_tokenizer(actor), 3, config)
    return str(refused.value)


@pytest.mark.parametrize("role", ["critic", "ref"])
def test_a_vocabulary_that_is_not_the_actors(run_ranks, ppo_config, tmp_path, role):
    """One more token is enough: its id would be read as another text, or as none."""
    folder = tmp_path / "other"
    shutil.copytree(local_name(tiny.score_head(tiny.LLAMA)), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    config = ppo_config(**{f"{role}__model_name_or_path": str(folder)})
    if role == "ref":
        shutil.copy(f"{local_name(tiny.LLAMA)}/config.json", folder)
    for said in run_ranks(refusal, config):
        assert said.startswith(f"The {role}'s vocabulary ({folder}, ")
        assert "1 tokens differ, '<extra>' among them" in said
        assert said.endswith(f"trained with the actor's tokenizer: --{role}.model_name_or_path.")


@pytest.mark.parametrize("role", ["actor", "ref", "critic", "reward"])
def test_sequences_longer_than_a_model_has_positions_for(run_ranks, ppo_config, role):
    short = {"actor": tiny.LLAMA, "ref": tiny.LLAMA}.get(role, tiny.score_head(tiny.LLAMA)).replace("=512", "=43")
    given = {f"{other}__model_name_or_path": tiny.LLAMA for other in ("actor", "ref")}
    given |= {f"{other}__model_name_or_path": tiny.score_head(tiny.LLAMA) for other in ("critic", "reward")}
    config = ppo_config(**given | {f"{role}__model_name_or_path": short})
    for said in run_ranks(refusal, config):
        assert said.startswith(f"The {role} was made for sequences of 43 tokens, and data.max_prompt_tokens + ")
        assert said.endswith("= 44. Lower one of them.")


def test_a_tokenizer_with_more_tokens_than_the_model_embeds(run_ranks, ppo_config, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(local_name(tiny.LLAMA), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(500)])
    tokenizer.save_pretrained(folder)
    config = ppo_config(model=str(folder), reward__function="tiny:longest_wins")
    assert all("some ids would be out of range" in said for said in run_ranks(refusal, config))


def test_a_full_kl_between_heads_of_different_sizes(run_ranks, ppo_config):
    given = dict(ref__model_name_or_path=tiny.LLAMA, kl_estimator="full", reward__function="tiny:longest_wins")
    config = ppo_config(actor__model_name_or_path=f"{tiny.LLAMA}&vocab_size=300", **given)
    for said in run_ranks(refusal, config):
        assert "the actor's head has 300 rows, the ref's 258. Take k1, k2 or k3." in said


def test_sizes_that_the_ranks_cannot_share_out(run_ranks, ppo_config):
    for said in run_ranks(refusal_of_sizes, ppo_config(minibatch_size=1, micro_batch_size=1)):
        assert said.endswith("micro_batch_size x world_size = 1 x 2 = 2. Try --minibatch_size 2.")


def refusal_of_sizes(config):
    with pytest.raises(ValueError, match="minibatch_size") as refused:
        DeepSpeedRLHFEngine(config.model_of("actor"), config.model_of("critic"), load_tokenizer(tiny.LLAMA), 3, config)
    return str(refused.value)
