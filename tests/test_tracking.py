"""tracking.py: what is written, what is kept, and that no logger ever stops a run."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import yaml

from engine.config import DemonstrationDataConfig, FrozenRoleConfig, SFTConfig, TrackingConfig, as_dict
from engine.tracking import Tracker
from engine.tracking.files import cut_after
from engine.tracking.summary import written_plan

OFF = TrackingConfig(wandb="disabled")
METRICS = {
    "score/mean": 1.5,
    "kl/ref_mean": 0.25,
    "response/length_mean": 7.0,
    "time/train_s": 0.5,
    "time/score_s": 1.0,
}
SAMPLES = [{"iteration": 1, "prompt": "Grüße", "response": "日本\n", "score": 2.0}]


def run_config(folder, tracking=OFF) -> SFTConfig:
    given = dict(model=FrozenRoleConfig(model_name_or_path="model"), data=DemonstrationDataConfig(train="data.jsonl"))
    return SFTConfig(**given, output_dir=str(folder), tracking=tracking, seed=3)


def tracker(folder, tracking=OFF, *, is_main=True) -> Tracker:
    return Tracker(run_config(folder, tracking), num_iterations=4, is_main=is_main)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def strict(text):
    """JSON as every other language reads it: no NaN, no Infinity."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_iteration_is_a_line_and_every_sample_too(tmp_path):
    out = tmp_path / "a" / "b"
    with tracker(out) as track:
        track.log(1, METRICS, SAMPLES)
        track.log(2, METRICS | {"score/mean": 2.5}, SAMPLES * 2)
        # Written at once, not when the run ends: a killed run keeps what it reported.
        assert len(lines(out / "metrics.jsonl")) == 2 and len(lines(out / "samples.jsonl")) == 3
    assert lines(out / "metrics.jsonl") == [{"iteration": 1, **METRICS}, {"iteration": 2, **METRICS, "score/mean": 2.5}]
    assert lines(out / "samples.jsonl") == SAMPLES * 3
    assert "日本" in (out / "samples.jsonl").read_text(encoding="utf-8")
    assert yaml.safe_load((out / "config.yaml").read_text()) == as_dict(run_config(out))


def test_the_progress_line_says_the_iteration_and_the_score(tmp_path, capsys):
    with tracker(tmp_path) as track:
        track.log(2, METRICS, [])
    said = capsys.readouterr().out
    assert "iteration 2/4" in said and "score/mean 1.5" in said and "kl/ref_mean 0.25" in said and "1.50 s" in said


def test_an_earlier_runs_metrics_are_kept_aside(tmp_path, capsys):
    for number in (1, 2):
        with tracker(tmp_path) as track:
            track.log(number, METRICS, SAMPLES)
    assert [row["iteration"] for row in lines(tmp_path / "metrics.jsonl")] == [2]
    assert [row["iteration"] for row in lines(tmp_path / "metrics.previous.jsonl")] == [1]
    assert lines(tmp_path / "samples.previous.jsonl") == SAMPLES
    assert "metrics.jsonl is from an earlier run: kept as metrics.previous.jsonl" in capsys.readouterr().out


def test_a_run_that_goes_on_drops_what_comes_again(tmp_path, capsys):
    sample = SAMPLES[0]
    with tracker(tmp_path) as track:
        for number in (1, 2, 3):
            lines_in_it = sample | {"iteration": number, "response": "a\u2028b\u0085c\u2029d"}  # which no JSON escapes
            track.log(number, METRICS | {"score/mean": float(number)}, [lines_in_it])
            track.warn(number, "no end", "hardly any.")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "score/me')  # the run was killed in the middle of a line
    with Tracker(run_config(tmp_path), num_iterations=4, is_main=True, resumed_at=2) as track:
        assert [row["iteration"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]
        track.log(3, METRICS | {"score/mean": 30.0}, [sample | {"iteration": 3}])
        track.log(4, METRICS, [])
        assert [row["score/mean"] for row in lines(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 30.0, 1.5]
        assert [row["iteration"] for row in lines(tmp_path / "samples.jsonl")] == [1, 2, 3]
        assert [row["iteration"] for row in lines(tmp_path / "warnings.jsonl")] == [1, 2]
        track.go_back_to(1)
        assert [row["iteration"] for row in lines(tmp_path / "metrics.jsonl")] == [1]
        track.log(2, METRICS, [])
    assert [row["iteration"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "kept as" not in capsys.readouterr().out


def test_a_file_that_ends_within_a_character_is_gone_on_with(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes('{"iteration": 1, "response": "日"}\n{"iteration": 2, "response": "日'.encode()[:-1])
    cut_after(path, 2)
    assert lines(path) == [{"iteration": 1, "response": "日"}]


def test_warnings_and_quarantined_responses_are_lines_of_their_own(tmp_path, capsys):
    with tracker(tmp_path) as track:
        track.warn(3, "no end", "hardly any response ends.")
        track.quarantine([{"iteration": 3, "score": math.nan, "response": "日本"}])
        track.quarantine([])
    assert lines(tmp_path / "warnings.jsonl") == [
        {"iteration": 3, "warning": "no end", "sentence": "hardly any response ends."}
    ]
    assert lines(tmp_path / "quarantine.jsonl") == [{"iteration": 3, "score": None, "response": "日本"}]
    assert "Warning: iteration 3: hardly any response ends." in capsys.readouterr().out
    with tracker(tmp_path / "other", is_main=False) as track:
        track.warn(1, "name", "sentence")
        track.quarantine([{"iteration": 1}])
    assert not (tmp_path / "other").exists() and capsys.readouterr().out == ""


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    with tracker(tmp_path) as track:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").mkdir()
        track.log(1, METRICS, SAMPLES)
    said = capsys.readouterr().out
    assert "WARNING: metrics.jsonl CANNOT BE WRITTEN ([Errno 21] Is a directory" in said
    assert len(lines(tmp_path / "samples.jsonl")) == 1


def test_a_folder_that_cannot_be_written_to_is_a_readable_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*file/out cannot be written to"):
        tracker(tmp_path / "file" / "out")
    (tmp_path / "out" / "config.yaml").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot be written to"):
        tracker(tmp_path / "out")


@pytest.mark.parametrize("text", ["", '{"peak_bytes"', "[]", '{"phases": {}}', "\x00"])
def test_a_memory_plan_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "memory_plan.json").write_text(text)
    assert written_plan(tmp_path) is None


def test_other_ranks_write_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    with tracker(out, TrackingConfig(wandb="online"), is_main=False) as track:
        track.log(1, METRICS, SAMPLES)
    assert not out.exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_still_a_line_of_json(tmp_path, value):
    with tracker(tmp_path) as track:
        track.log(1, METRICS | {"loss/policy": value}, [SAMPLES[0] | {"score": value}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        strict((tmp_path / name).read_text(encoding="utf-8"))


# W&B


class FakeWandb:
    """Stands in for the wandb package; `broken` names the call that raises."""

    def __init__(self, broken=None):
        self.broken, self.logged, self.finished, self.started = broken, [], [], {}
        self.Settings = lambda **given: given
        self.Table, self.Histogram, self.alerts = self._table, list, []
        self.id, self.url, self.dir = "fake", None, "out/wandb/offline-run-fake/files"

    def _maybe(self, name):
        if name == self.broken:
            raise OSError(f"no network in {name}")

    def login(self, prompt, verify):
        return True

    def alert(self, title, text, level):
        self._maybe("alert")
        self.alerts.append((title, text, level))

    def teardown(self):
        self._maybe("teardown")

    def _table(self, columns, data, allow_mixed_types):
        self._maybe("Table")
        return SimpleNamespace(columns=columns, data=data)

    def init(self, **given):
        self._maybe("init")
        self.started = given
        return self

    def define_metric(self, name, **given):
        self._maybe("define_metric")

    def log(self, row):
        self._maybe("log")
        self.logged.append(row)

    def finish(self, exit_code):
        self._maybe("finish")
        self.finished.append(exit_code)


@pytest.fixture
def fake(monkeypatch):
    def install(broken=None):
        wandb = FakeWandb(broken)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monkeypatch.setenv("WANDB_SERVICE", "somebody else's")
        return wandb

    return install


def test_wandb_gets_the_metrics_and_a_table(tmp_path, fake):
    wandb = fake()
    with tracker(tmp_path, TrackingConfig(wandb="offline", project="p", run_name="r")) as track:
        track.log(
            3, METRICS, SAMPLES, {"score/histogram": [1.0, math.nan, 2.0], "response/length_histogram": [math.nan]}
        )
        track.log(4, METRICS, [])
        track.warn(4, "no end", "hardly any.")
        track.evaluation(4, {"eval/score_mean": 2.0}, [{"prompt": "p"}, {"prompt": "q", "score": 1.0}])
    assert {name: wandb.started[name] for name in ("project", "name", "mode", "config")} == {
        "project": "p",
        "name": "r",
        "mode": "offline",
        "config": as_dict(run_config(tmp_path, TrackingConfig(wandb="offline", project="p", run_name="r")))
        | {"git_commit": json.loads((tmp_path / "versions.json").read_text())["git_commit"], "memory_plan": None},
    }
    table, evaluated = wandb.logged[0].pop("samples/train"), wandb.logged[2].pop("samples/evaluation")
    assert wandb.logged[0].pop("score/histogram") == [1.0, 2.0]  # of numbers that are none there is no histogram
    assert wandb.logged[:2] == [{"iteration": 3, **METRICS}, {"iteration": 4, **METRICS}]
    assert wandb.logged[2:] == [{"iteration": 4, "eval/score_mean": 2.0}]
    assert (table.columns, table.data) == (list(SAMPLES[0]), [list(SAMPLES[0].values())])
    assert (evaluated.columns, evaluated.data) == (["prompt", "score"], [["p", None], ["q", 1.0]])
    assert wandb.alerts == [("no end", "iteration 4: hardly any.", "WARN")]
    assert wandb.finished == [0]


def test_wandb_hears_of_a_run_that_failed(tmp_path, fake):
    wandb = fake()
    with pytest.raises(KeyError, match="mine"), tracker(tmp_path, TrackingConfig(wandb="offline")):
        raise KeyError("mine")
    assert wandb.finished == [1]


@pytest.mark.parametrize("broken", ["init", "define_metric", "Table", "log", "alert", "finish", "teardown"])
def test_a_wandb_that_raises_never_stops_the_run(tmp_path, fake, capsys, broken):
    wandb = fake(broken)
    with tracker(tmp_path, TrackingConfig(wandb="online")) as track:
        for number in (1, 2, 3):
            track.log(number, METRICS, SAMPLES)
            track.warn(number, "name", "sentence")
    assert [row["iteration"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    said = capsys.readouterr().out
    complaints = [line for line in said.split("\n") if line.startswith("W&B")]
    assert len(complaints) == 1 and f"OSError: no network in {broken}" in complaints[0]  # once, not every iteration
    assert len(wandb.logged) == {"finish": 3, "teardown": 3, "alert": 1}.get(broken, 0)


def test_a_wandb_that_cannot_be_imported_never_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb raises ImportError, as a broken installation does
    with tracker(tmp_path, TrackingConfig(wandb="offline")) as track:
        track.log(1, METRICS, SAMPLES)
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_disabled_wandb_is_not_even_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with tracker(tmp_path) as track:
        track.log(1, METRICS, SAMPLES)
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_two_starts_that_fail_do_not_cost_an_earlier_run_its_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    for _ in range(2):
        with tracker(tmp_path):
            pass
    assert (tmp_path / "metrics.previous.jsonl").read_text() == '{"iteration": 1}\n'
