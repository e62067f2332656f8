"""secrets.py: what of an address is written down."""

import json

import pytest
import tiny
import yaml

from engine.config import as_dict
from engine.config.secrets import shown, with_environment, without_secrets
from engine.rollout.score_service import scores_of_service
from engine.tracking import Tracker


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("http://host:8765/score", "http://host:8765/score"),
        ("http://host/score?model=big&n=2", "http://host/score?model=big&n=2"),
        ("http://me:hunter2@host/score", "http://***:***@host/score"),
        ("http://hunter2@host/score", "http://***@host/score"),
        ("http://me:hun@ter/hunter2@host/score", "http://***:***@host/score"),
        ("https://host/score?api_key=hunter2&model=big", "https://host/score?api_key=***&model=big"),
        ("https://host/score?sig=hunter2&pwd=hunter2;code=hunter2", "https://host/score?sig=***&pwd=***&code=***"),
        ("https://host/score;token=hunter2", "https://host/score;***"),
        ("https://host/score#token=hunter2", "https://host/score"),
        ("https://me:$PASSWORD@host/score?key=${KEY}", "https://***:$PASSWORD@host/score?key=${KEY}"),
        ("https://$NAME:hunter2@host", "https://$NAME:***@host"),
        ("https://host/score?key=${KEY}hunter2", "https://host/score?key=***"),
    ],
)
def test_secrets_in_an_address_are_hidden(url, seen):
    assert without_secrets(url) == seen and "hunter2" not in without_secrets(url)


def test_the_environment_fills_in(monkeypatch):
    monkeypatch.setenv("KEY", "a$b")  # which is not filled in again
    assert with_environment("http://host/${KEY}?k=$KEY") == "http://host/a$b?k=a$b"
    with pytest.raises(ValueError, match=r"http://\*\*\*@host/\S*: the environment has no NO_SUCH_NAME\.$"):
        with_environment("http://hunter2@host/${NO_SUCH_NAME}")


def test_no_secret_reaches_a_config_dump_or_an_error(tmp_path):
    config = tiny.ppo_config(tmp_path, reward__url="http://me:hunter2@127.0.0.1:9/score?token=hunter3")
    with Tracker(config, num_iterations=1, is_main=True):
        pass
    written = (tmp_path / "out" / "config.yaml").read_text()
    assert yaml.safe_load(written)["reward"]["url"] == "http://***:***@127.0.0.1:9/score?token=***"
    assert "hunter" not in json.dumps(shown(as_dict(config)))
    with pytest.raises(ValueError, match=r"the score service http://\*\*\*:\*\*\*@127") as error:
        scores_of_service(config.reward.url, ["p"], ["r"], {}, timeout_s=1.0, retries=0)
    assert "hunter" not in str(error.value)
