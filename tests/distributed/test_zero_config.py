"""A file of ds_configs/ is checked key by key: DeepSpeed itself would ignore what it does not know."""

import json
from pathlib import Path

import pytest

from engine.config import DS_CONFIGS
from engine.distributed.zero_config import frozen_config, training_config


@pytest.fixture(params=[training_config, frozen_config])
def config_of(request, tmp_path):
    """Both functions, called on a file with this content."""

    def build(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        given = dict(max_grad_norm=1.0) if request.param is training_config else {}
        return request.param(path, dtype="float32", **given)

    return build


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimisation": {"stage": 3}}, r"ds\.json sets zero_optimisation, unknown here.*zero_optimization"),
        ({"train_batch_size": 8}, r"ds\.json sets train_batch_size.*remove these keys"),
        ({"bf16": {"enabled": True}, "optimizer": {}}, r"ds\.json sets bf16, optimizer"),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, r"zero_optimization\.overlap_com,.*misspelt"),
        ('{"zero_optimization": {"stage": 3,}}', r"ds\.json is not valid JSON.*line 1"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(config_of, content, said):
    with pytest.raises(ValueError, match=said):
        config_of(content)


def test_aliases_that_deepspeed_knows_are_keys(config_of):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    assert config_of({"zero_optimization": zero})["zero_optimization"] == zero


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_checked_in_file_is_accepted(path):
    stage = int(path.stem[4])
    trained = training_config(path, dtype="float32", max_grad_norm=0.5)
    assert trained["zero_optimization"]["stage"] == stage
    assert trained["gradient_clipping"] == 0.5
    frozen = frozen_config(path, dtype="float32")
    # A frozen model has nothing for stages 1 and 2 to shard, and no optimizer to offload.
    assert frozen["zero_optimization"]["stage"] == (3 if stage == 3 else 0)
    assert "offload_optimizer" not in frozen["zero_optimization"]
    assert "gradient_clipping" not in frozen


def test_precision_is_the_runs(tmp_path):
    path = Path(DS_CONFIGS / "zero0.json")
    assert not {"bf16", "fp16"} & training_config(path, dtype="float32", max_grad_norm=1.0).keys()
    half = training_config(path, dtype="bfloat16", max_grad_norm=1.0)
    assert half["bf16"]["enabled"]
    assert half["bf16"]["check_grad_overflow"]
    assert half["zero_optimization"]["stage"] == 1, "the fp32 master weights need an owner"
    assert training_config(path, dtype="float16", max_grad_norm=1.0)["fp16"]["enabled"]
    assert frozen_config(path, dtype="bfloat16")["zero_optimization"]["stage"] == 0
