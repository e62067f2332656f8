"""Whatever a file or a command line holds, what comes of it is a run's input or one clear error: a ValueError that
names the file or the setting.

By default some hundred inputs each; RLHF_ENGINE_FUZZ=4000 tries so many (`bash tests/faults/run.sh`).
"""

import json
import os
from pathlib import Path

import pytest
import tiny
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import DPOConfig, PPOConfig, RewardModelConfig, SFTConfig, as_dict, parse
from engine.data import create_datasets
from engine.models.random_init import byte_tokenizer

INPUTS = int(os.environ.get("RLHF_ENGINE_FUZZ", "150"))
MANY = settings(
    max_examples=INPUTS,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
TOKENIZER = byte_tokenizer()
CONFIGS = {
    1: lambda folder: tiny.stage_config(folder, "sft"),
    2: lambda folder: tiny.stage_config(folder, "dpo"),
    3: tiny.ppo_config,
}

TEXT = st.text(max_size=30) | st.sampled_from(
    ["", " ", "\n\nAssistant:", "<eos>", "\ud800", "\x00", "a\n\nAssistant: b"]
)
CELL = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", ""]), "content": TEXT | CELL})
LIKELY = TEXT | st.lists(MESSAGE, max_size=4) | CELL
COLUMN = st.sampled_from(["prompt", "question", "messages", "response", "chosen", "rejected", "answer", "input", "x"])
ROW = st.dictionaries(COLUMN, LIKELY, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def read(path: Path, phase: int, folder: Path) -> None:
    """A run's data, or an error that says where it is wrong."""
    config = CONFIGS[phase](folder)
    config = tiny.changed(config, data__train=str(path))
    try:
        batches, _ = create_datasets(config, TOKENIZER, train_phase=phase)
    except ValueError as error:
        said = str(error)
        assert str(path) in said or "--data." in said or "data." in said, said
        assert "Traceback" not in said and len(said) < 1500, said
        return
    for batch in batches:
        assert batch is not None


def as_jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("phase", CONFIGS)
@MANY
@given(rows=st.lists(ROW, max_size=6))
def test_rows_of_any_kind(folder, phase, rows):
    path = folder / f"rows{phase}.jsonl"
    path.write_bytes(as_jsonl(rows))
    read(path, phase, folder)


@pytest.mark.parametrize("phase", CONFIGS)
@MANY
@given(rows=st.lists(ROW, min_size=1, max_size=4), data=st.data())
def test_broken_files(folder, phase, rows, data):
    """Rows with bytes changed, dropped and put in."""
    kind = data.draw(st.sampled_from(["jsonl", "json", "csv"]))
    content = json.dumps(rows).encode() if kind == "json" else as_jsonl(rows)
    if kind == "csv":
        content = b"prompt,response,chosen,rejected\n" + b"".join(
            ",".join(str(row.get(name, "")) for name in ("prompt", "response", "chosen", "rejected")).encode(
                "utf-8", "surrogatepass"
            )
            + b"\n"
            for row in rows
        )
    broken = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, max(0, len(broken) - 1)))
        broken[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = folder / f"broken{phase}.{kind}"
    path.write_bytes(bytes(broken))
    read(path, phase, folder)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt", ""])
@MANY
@given(content=st.binary(max_size=200))
def test_any_bytes(folder, kind, content):
    path = folder / f"any.{kind}"
    path.write_bytes(content)
    read(path, 3, folder)


CLASSES = {"sft": SFTConfig, "reward": RewardModelConfig, "dpo": DPOConfig, "ppo": PPOConfig}


def _names(config_class, folder) -> list[str]:
    config = tiny.ppo_config(folder) if config_class is PPOConfig else None
    stage = {SFTConfig: "sft", RewardModelConfig: "reward", DPOConfig: "dpo"}
    config = config or tiny.stage_config(folder, stage[config_class])

    def flat(settings, prefix=""):
        for name, value in settings.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")

    return list(flat(as_dict(config))), config


VALUE = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "",
            "null",
            "true",
            "auto",
            "[]",
            "{}",
            "[1, a]",
            "{a: 1}",
            "0",
            "-1",
            "1e400",
            ".nan",
            "r: 8",
            "*x",
            "!!python/x",
        ]
    ),
    st.text(max_size=12),
)


@pytest.mark.parametrize("stage", CLASSES)
@MANY
@given(data=st.data())
def test_any_settings(folder, stage, data):
    names, config = _names(CLASSES[stage], folder)
    recipe = folder / f"{stage}.yaml"
    recipe.write_text(yaml.safe_dump(as_dict(config)))
    flags = []
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names) | st.text(st.characters(categories=("L", "N")), min_size=1, max_size=9))
        flags += [f"--{name}={data.draw(VALUE)}"]
    if any(flag.startswith(("--help", "--print_config", "--h=")) for flag in flags):
        return
    _parsed(CLASSES[stage], ["--config", str(recipe), *flags])


@pytest.mark.parametrize("stage", CLASSES)
@MANY
@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["actor", "data", "reward", "model", "train", "seed", "lora", "rollout", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
def test_any_recipe(folder, stage, content):
    recipe = folder / f"any_{stage}.yaml"
    recipe.write_text(yaml.safe_dump(content))
    _parsed(CLASSES[stage], ["--config", str(recipe), "--output_dir", "out"])


def _parsed(config_class, args) -> None:
    try:
        parse(config_class, args)
    except ValueError as error:
        said = str(error)
        assert said.strip() and "Traceback" not in said, said
