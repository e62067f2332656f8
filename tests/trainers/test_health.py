"""health.py: each sign of trouble alone, and none where all is well."""

import pytest
import torch

from engine.trainers.health import signs_of_trouble

WELL = {
    "kl/ref_mean": 0.3,
    "response/eos_fraction": 0.9,
    "response/length_mean": 40.0,
    "score/mean": 2.0,
    "score/std": 0.5,
}


def names(steps=({"policy/log_ratio_max": 1e-6}, {"policy/log_ratio_max": 3.0}), dtype=torch.float32, **changed):
    given = WELL | {name.replace("__", "/"): value for name, value in changed.items()}
    return list(signs_of_trouble(given, steps, dtype=dtype, max_response_tokens=100))


def test_none_where_all_is_well():
    assert names() == [] and names(steps=()) == []
    assert names(kl__ref_mean=-0.09) == []  # an estimate may be a little below
    assert names(response__length_mean=97.0) == []


@pytest.mark.parametrize(
    ("changed", "sign"),
    [
        ({"kl__ref_mean": -0.11}, "kl below zero"),
        ({"response__eos_fraction": 0.01}, "no end"),
        ({"response__length_mean": 98.5}, "length pinned"),
        ({"score__std": 1e-4}, "equal scores"),
        ({"score__std": 0.0, "score__mean": 0.0}, "equal scores"),
        ({"score__mean": 1000.0, "score__std": 0.09}, "equal scores"),
        ({"steps": [{"policy/log_ratio_max": 2e-3}]}, "another policy"),
        ({"steps": [{"policy/log_ratio_max": 0.6}], "dtype": torch.bfloat16}, "another policy"),
    ],
)
def test_each_sign_alone(changed, sign):
    assert names(**changed) == [sign]


def test_responses_that_do_not_end_are_not_called_long_as_well():
    assert names(response__eos_fraction=0.01, response__length_mean=100.0) == ["no end"]


def test_what_bfloat16_rounds_is_no_sign():
    assert names(steps=[{"policy/log_ratio_max": 0.4}], dtype=torch.bfloat16) == []
