"""From stage to stage through exported folders, and reward models that do not read the actor's tokens."""

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import stages
import tiny
import torch
from runs import Log, build, weights
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from engine.data.sequences import Sequences
from engine.distributed import comm
from engine.models.random_init import CHAT_TEMPLATE, byte_tokenizer, local_name
from engine.rollout.measuring import sequences_of_all_ranks

SAID = "The reward model's tokenizer or chat template is not the actor's"


def ppo(config):
    """A PPO run's metrics, its critic's weights before the first step, and what was printed."""
    with redirect_stdout(io.StringIO()) as printed:
        trainer, prompts = build(config)
        critic, reward = weights(trainer.critic), trainer.reward.module
        log = Log()
        trainer.train(prompts, 1, log)
    return log.metrics, critic, (reward.score_mean, reward.score_std), printed.getvalue()


def test_sft_then_reward_model_then_ppo(run_ranks, ppo_config, tmp_path, strict_z3):
    sharded = dict(ds_config=strict_z3)
    sft = tiny.stage_config(tmp_path, "sft", **sharded)
    run_ranks(stages.script, "sft", sft)
    model = Path(sft.output_dir) / "model"
    reward_config = tiny.stage_config(tmp_path, "reward", model=str(model), data__eval_fraction=0.3, **sharded)
    run_ranks(stages.script, "reward", reward_config)
    reward = Path(reward_config.output_dir) / "reward"

    started, kept = load_file(model / "model.safetensors"), load_file(reward / "model.safetensors")
    moved = [(kept[name] - tensor).abs().max().item() for name, tensor in started.items() if name in kept]
    assert len(moved) > 10 and 0 < max(moved) < 3 * 2e-3, "three steps from the SFT model, whose head alone is left out"

    config = ppo_config(model=str(model), reward__model_name_or_path=str(reward), **sharded)
    (metrics, critic, normalisation, printed), (others, *_) = run_ranks(ppo, config)
    assert critic.keys() == {f"model.{name}" for name in kept}
    for name, tensor in kept.items():
        assert torch.equal(critic[f"model.{name}"], tensor), name
    written = json.loads((reward / "config.json").read_text())
    assert normalisation == (written["score_mean"], written["score_std"]) != (0.0, 1.0)
    assert metrics == others
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in metrics)
    assert metrics[0]["kl/ref_mean"] == pytest.approx(0, abs=1e-5)
    assert SAID not in printed, "one tokenizer and one template all the way"

    dpo = tiny.stage_config(tmp_path, "dpo", model=str(model), **sharded)
    run_ranks(stages.script, "dpo", dpo)
    assert AutoModelForCausalLM.from_pretrained(Path(dpo.output_dir) / "model").config.use_cache


# A reward model with a tokenizer of its own

OTHER_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RESPONSES = ["yes", "", "no, no", "é!", "a", "the sea", "so", "b c"]
ENDED = [True, True, False, True, False, True, True, False]


def permuted_tokenizer(chat_template: str = OTHER_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level one too, every byte under another id than the actor's has, with other special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    tokenizer = Tokenizer(
        models.BPE(vocab={token: n for n, token in enumerate([*alphabet, "[pad]", "[end]"])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(pad_token="[pad]", eos_token="[end]", chat_template=chat_template)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def reward_folder(folder: Path, tokenizer) -> str:
    """The tiny reward model with another tokenizer, its scores having come to a mean of 0.5 and a deviation of 2."""
    shutil.copytree(local_name(tiny.score_head(tiny.LLAMA)), folder)
    for path in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        path.unlink()
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    changes = dict(score_mean=0.5, score_std=2.0, pad_token_id=tokenizer.pad_token_id)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def scored(config):
    """All ranks' prompts, the scores of RESPONSES to them, what was printed, and the metrics of one iteration."""
    with redirect_stdout(io.StringIO()) as printed:
        trainer, prompts = build(config)
        batch = next(iter(prompts))
        share = torch.arange(8).tensor_split(comm.world_size())[comm.rank()].tolist()
        eos = trainer.tokenizer.eos_token_id
        responses = [trainer.tokenizer(RESPONSES[n])["input_ids"] + [eos] * ENDED[n] for n in share]
        sequences = sequences_of_all_ranks(Sequences.of(batch.tokens, responses))
        scores = trainer.scoring.scores(batch, responses, sequences).scores
        said, log = printed.getvalue(), Log()
        trainer.train(prompts, 1, log)
    asked = [prompt for rank in comm.gathered_objects(batch.prompts) for prompt in rank]
    return asked, scores, said, log.metrics


def by_hand(folder: str, texts: list[str]) -> torch.Tensor:
    """Plain transformers on text; rows alone."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), permuted_tokenizer()
    with torch.no_grad():
        logits = [model(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, 0] for text in texts]
    return (torch.stack(logits) - 0.5) / 2.0


@pytest.mark.parametrize("prompt_format", ["text", "chat"])
def test_a_reward_model_of_another_tokenizer_reads_the_text(run_ranks, ppo_config, tmp_path, strict_z3, prompt_format):
    template = CHAT_TEMPLATE if prompt_format == "text" else OTHER_TEMPLATE  # once the tokens alone are others
    folder = reward_folder(tmp_path / "reward", permuted_tokenizer(template))
    config = ppo_config(
        reward__model_name_or_path=folder,
        critic__model_name_or_path=tiny.LLAMA,
        data__prompt_format=prompt_format,
        data__max_prompt_tokens=64,
        ds_config=strict_z3,
    )
    (asked, scores, said, metrics), (_, others, silent, _) = run_ranks(scored, config)
    if prompt_format == "chat":
        asked = [f"[user]{prompt[0]['content']}[end][assistant]" for prompt in asked]
    answers = [response + "[end]" * ended for response, ended in zip(RESPONSES, ENDED, strict=True)]
    wanted = by_hand(folder, [prompt + answer for prompt, answer in zip(asked, answers, strict=True)])
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    assert torch.equal(scores, others) and scores.std() > 1e-3
    assert said.count(SAID) == 1 and SAID not in silent
    assert torch.tensor(list(metrics[0].values())).isfinite().all()


@pytest.mark.parametrize("template", ["the actor's", "another"])
def test_another_template_alone_is_noticed(run_ranks, ppo_config, tmp_path, template):
    tokenizer = byte_tokenizer()
    if template == "another":
        tokenizer.chat_template = OTHER_TEMPLATE
    folder = reward_folder(tmp_path / "reward", tokenizer)
    (_, _, said, _), _ = run_ranks(scored, ppo_config(reward__model_name_or_path=folder, zero_stage=0))
    assert said.count(SAID) == (template == "another")


def refused(config):
    with pytest.raises(ValueError, match="vocabulary") as error:
        build(config)
    return str(error.value)


def test_a_critic_cannot_start_from_a_reward_model_of_another_tokenizer(run_ranks, ppo_config, tmp_path):
    folder = reward_folder(tmp_path / "reward", permuted_tokenizer())
    first, second = run_ranks(refused, ppo_config(reward__model_name_or_path=folder))
    assert first == second and "--critic.model_name_or_path" in first
