"""What can be wrong with a run's configuration, models, data, scores and folders, planted in a healthy one."""

import json
from collections import namedtuple

import ranks
from planted import ROWS, Run

from engine.run_folder import claim

Usage = namedtuple("Usage", "total used free")


def spoilt_tokenizer(run: Run, role: str, **values) -> None:
    """Its settings changed."""
    run.edit(f"{role}/tokenizer_config.json", **values)


def templates(run: Run, text: str | None) -> None:
    """Of actor and reward model, so that the two agree."""
    for role in ("actor", "reward"):
        path = run.folder / role / "chat_template.jinja"
        path.unlink() if text is None else path.write_text(text)


def other_vocabulary(run: Run, role: str) -> None:
    """A model of its own for a role, whose tokenizer has two tokens the other way round."""
    folder = run.copy_of("actor", f"own_{role}")
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokens))
    run.set(**{f"{role}__model_name_or_path": str(folder)})


def torn_weights(run: Run, role: str) -> None:
    path = run.folder / role / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lost_part(run: Run) -> None:
    """An index of two files, of which one is there."""
    folder = run.copy_of("actor", "parts")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / parts["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    run.set(ref__model_name_or_path=str(folder))


def sharding(run: Run, text: str) -> None:
    (run.folder / "own.json").write_text(text)
    run.set(ds_config=str(run.folder / "own.json"))


def held(run: Run) -> None:
    run.given["kept"] = {"the lock of another run": (claim(run.recipe["output_dir"]), None)}


def code(run: Run, text: str, **settings) -> None:
    """A module of the user's."""
    name = f"planted_{run.folder.name}".replace("-", "_")
    (run.folder / f"{name}.py").write_text(text)
    run.patch.syspath_prepend(str(run.folder))
    run.set(**{key: value.format(name) for key, value in settings.items()})


def left_checkpoint(run: Run, **settings) -> None:
    (run.folder / "out" / "checkpoints" / "iteration_000003").mkdir(parents=True)
    run.set(**settings)


def full_disk(run: Run, free_bytes: int) -> None:
    run.patch.setattr("shutil.disk_usage", lambda path: Usage(2**40, 2**40 - free_bytes, free_bytes))


def no_key(run: Run) -> None:
    run.patch.setenv("NETRC", str(run.folder / "netrc"))
    run.set(tracking__wandb="online")


def adapter(run: Run, **more) -> None:
    run.set(actor__lora=dict(r=4) | more)


# check, status, sentence, what is done to the run
OF_CONFIGS = [
    ("configuration", "failed", "does not accept option 'learning_rat'", lambda run: run.set(actor__learning_rat=1)),
    ("configuration", "failed", "kl_coef=-1", lambda run: run.set(kl_coef=-1)),
    ("settings without effect", "warning", "kl_target", lambda run: run.set(kl_target=3.0)),
    ("sizes per rank", "failed", "Try --minibatch_size", lambda run: run.given.update(num_accelerators=3)),
    ("dtype", "failed", "float16 needs a GPU", lambda run: run.set(dtype="float16")),
    ("dtype", "warning", "bfloat16 on a CPU", lambda run: run.set(dtype="bfloat16")),
    (
        "sharding files",
        "failed",
        "own.json sets train_batch_size",
        lambda run: sharding(run, '{"train_batch_size": 8}'),
    ),
    ("sharding files", "failed", "own.json is not valid JSON", lambda run: sharding(run, "{")),
    ("model folders", "failed", "no such model folder", lambda run: run.set(ref__model_name_or_path="/no/such/model")),
    (
        "model folders",
        "failed",
        r"ref: .*bare lacks its weights",
        lambda run: (
            run.set(ref__model_name_or_path=str(run.copy_of("actor", "bare")))
            or (run.folder / "bare/model.safetensors").unlink()
        ),
    ),
    (
        "model folders",
        "failed",
        r"reward: .*reward/model.safetensors is cut short",
        lambda run: torn_weights(run, "reward"),
    ),
    ("model folders", "failed", "ref: .*parts lacks model-00002-of-00002.safetensors", lost_part),
    (
        "language models",
        "failed",
        r"\(ref\) has a score head",
        lambda run: run.set(ref__model_name_or_path=str(run.folder / "reward")),
    ),
    (
        "score heads",
        "failed",
        "lacks score.weight, so its scores would be random",
        lambda run: run.set(reward__model_name_or_path=str(run.copy_of("actor", "headless"))),
    ),
    (
        "score heads",
        "failed",
        "classifier with 3 labels",
        lambda run: run.edit("reward/config.json", id2label={"0": "a", "1": "b", "2": "c"}),
    ),
    ("tokenizers", "failed", "no end-of-sequence", lambda run: spoilt_tokenizer(run, "actor", eos_token=None)),
    ("tokenizers", "failed", "there is no such file", lambda run: run.set(data__chat_template="/no/such.jinja")),
    (
        "same tokenizer",
        "failed",
        r"critic's tokenizer .* is not the actor's",
        lambda run: other_vocabulary(run, "critic"),
    ),
    ("same tokenizer", "failed", "2 tokens differ, 'a' among them", lambda run: other_vocabulary(run, "ref")),
    (
        "reward tokenizer",
        "warning",
        "another chat template",
        lambda run: (run.folder / "reward/chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}"),
    ),
    (
        "end of sequence",
        "warning",
        r"ends a text with \[7\]",
        lambda run: run.edit("actor/config.json", eos_token_id=7),
    ),
    (
        "embeddings",
        "failed",
        "made for 16 tokens",
        lambda run: run.edit("actor/config.json", max_position_embeddings=16),
    ),
    ("embeddings", "failed", "embeds 100 tokens", lambda run: run.edit("actor/config.json", vocab_size=100)),
    ("lora targets", "failed", "no_proj is no linear layer", lambda run: adapter(run, target_modules=["no_proj"])),
    (
        "quantization",
        "failed",
        "needs bitsandbytes",
        lambda run: (
            run.patch.setattr("engine.models.quantization.find_spec", lambda name: None)
            or adapter(run)
            or run.set(actor__quantization="nf4")
        ),
    ),
    ("data rows", "failed", "there is no such file", lambda run: run.set(data__train="/no/such.jsonl")),
    ("data rows", "failed", "no column ask.*--data.prompt_column", lambda run: run.set(data__prompt_column="ask")),
    ("data rows", "failed", "line 9: not valid JSON", lambda run: run.append("{")),
    ("data rows", "failed", "line 9, column 'prompt'.* empty", lambda run: run.append('{"prompt": "", "answer": "1"}')),
    ("enough rows", "warning", "2 rows are fewer than the 8", lambda run: run.write_rows(ROWS[:2])),
    ("chat template", "failed", "no chat template", lambda run: templates(run, None)),
    (
        "chat template",
        "warning",
        r"without the '<eos>'",
        lambda run: templates(
            run, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
        ),
    ),
    ("prompt lengths", "warning", "2 of 8 rows.* 25.0%", lambda run: run.set(data__max_prompt_tokens=34)),
    ("prompt lengths", "failed", "dropping them leaves nothing", lambda run: run.set(data__max_prompt_tokens=3)),
    (
        "prompt lengths",
        "failed",
        r"line \d, and data.over_length is error",
        lambda run: run.set(data__max_prompt_tokens=34, data__over_length="error"),
    ),
    ("score function", "failed", "importing no_module failed", lambda run: run.set(reward__function="no_module:f")),
    ("evaluation metrics", "failed", "has no function none", lambda run: run.set(evaluation__metrics=["tiny:none"])),
    ("score function", "failed", "has no function none", lambda run: run.set(reward__function="tiny:none")),
    (
        "score function",
        "failed",
        r"raised KeyError: 'gold' \(.*planted_.*, line 2\)",
        lambda run: code(
            run, "def f(prompts, responses, **columns):\n    return columns['gold']\n", reward__function="{}:f"
        ),
    ),
    (
        "score function",
        "warning",
        "nan",
        lambda run: code(
            run,
            "def f(prompts, responses, **columns):\n    return [float('nan')] * len(prompts)\n",
            reward__function="{}:f",
        ),
    ),
    (
        "score service",
        "failed",
        "could not be reached",
        lambda run: run.set(reward__url=f"http://127.0.0.1:{ranks.free_port()}/?token=secret"),
    ),
    ("environment", "failed", "has no class Missing", lambda run: run.set(rollout__environment="tiny:Missing")),
    (
        "environment",
        "failed",
        "the prompts are text",
        lambda run: (
            run.write_rows([{"prompt": "go", "answer": "1"}] * 8)
            or run.set(rollout__environment="engine.environments:SecondChance")
        ),
    ),
    (
        "output dir",
        "failed",
        "does not allow it",
        lambda run: (run.folder / "file").write_text("") or run.set(output_dir=str(run.folder / "file" / "out")),
    ),
    ("output dir", "failed", r"Another run is writing to .* \(process \d+", held),
    ("earlier checkpoints", "failed", "iteration_000003 is of an earlier run.*--resume auto", left_checkpoint),
    ("earlier checkpoints", "warning", "removes 1 checkpoints", lambda run: left_checkpoint(run, resume="never")),
    ("disk space", "failed", r"0\.0 GiB free in .* lower --checkpoint.keep", lambda run: full_disk(run, 1000)),
    ("wandb key", "warning", "no key for api.wandb.ai.* will be offline", no_key),
]
