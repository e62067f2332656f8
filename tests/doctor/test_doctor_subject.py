"""What the doctor looks at: the stage that settings are of, the machines of a hostfile, the number of ranks."""

import pytest
import ranks
from deepspeed.launcher.runner import fetch_hostfile

from engine.doctor.hostfile import hosts_in
from engine.doctor.subject import Subject, stage_of


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        (["--actor.model_name_or_path", "x"], "ppo"),
        (["--preset", "trl"], "ppo"),
        (["--reward.model_name_or_path=x"], "reward"),
        (["--model.model_name_or_path", "x", "--beta", "0.1"], "dpo"),
        (["--model.model_name_or_path", "x", "--data.chosen_column", "a"], "dpo"),
        (["--model.model_name_or_path", "x", "--loss_on", "sequence"], "sft"),
    ],
)
def test_a_stage_is_known_by_its_settings(settings, stage):
    assert stage_of(settings) == stage
    with pytest.raises(ValueError, match="name no model"):
        stage_of(["--seed", "1"])


def test_a_stage_is_known_by_the_part_of_the_data_that_is_trained_on(monkeypatch):
    class Pairs:
        def to_list(self):
            return [{"chosen": "a", "rejected": "b"}]

    def loaded(loader, *, name, split):
        if (name, split) != ("pairs", "train_prefs"):
            raise ValueError(f"there is no {name}, {split}")
        return Pairs()

    monkeypatch.setattr("engine.data.sources.load_dataset", loaded)
    settings = ["--model.model_name_or_path", "x", "--data.train", "some/hub"]
    part = ["--data.train_subset", "pairs", "--data.train_split", "train_prefs"]
    assert (stage_of([*settings, *part]), stage_of(settings)) == ("dpo", "sft")


def test_every_recipe_is_of_the_stage_that_its_name_says():
    words = {"sft": "sft", "dpo": "dpo", "reward": "reward"}
    for recipe in (ranks.ROOT / "launch" / "recipes").glob("*.yaml"):
        stage = words.get(recipe.stem.rsplit("_", 1)[-1], "ppo")
        if stage == "dpo" and "quickstart" not in recipe.stem:
            continue  # a hub's data decides
        assert stage_of(["--config", str(recipe)]) == stage, recipe


def test_a_hostfile_is_read_as_the_launcher_does(tmp_path):
    (tmp_path / "hosts").write_text("# ours\none slots=8 # the large one\n\ntwo\tslots=4 max_slots=8\n")
    path = str(tmp_path / "hosts")
    assert hosts_in(path) == dict(fetch_hostfile(path)) == {"one": 8, "two": 4}


def test_numbers_of_ranks(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("one slots=8\ntwo slots=4\n")
    assert Subject(hostfile=str(path)).world_size == 12
    assert Subject(hostfile=str(path), num_accelerators=4).world_size == 8
    assert Subject(num_accelerators=3).world_size == 3
