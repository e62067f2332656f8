"""checkpoint.py and checkpoint_folder.py: complete or absent, and never another's."""

import errno
import json
import os
import re
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import engines
import pytest
import tiny
import torch

from engine.distributed import checkpoint, comm
from engine.distributed.checkpoint import Trained, load_checkpoint, newest_checkpoint, save_checkpoint
from engine.distributed.checkpoint_folder import MANIFEST, checkpoints_in, newest_whole, put_in_place
from engine.distributed.moving_average import MovingAverage

IDENTITY = {"seed": 0, "rollout.top_k": 0, "the prompts": "abc", "the model": "a" * 32}
FIRST, SECOND = "iteration_000001", "iteration_000002"


def saved(root, ds_config, iterations, keep=9):
    """Checkpoints after so many steps; what they hold in the end."""
    engine = engines.actor(tiny.LLAMA, ds_config)
    trained = Trained(engines={"actor": engine}, averages={"actor_ema": MovingAverage(engine, decay=0.5)})
    for iteration in range(1, iterations + 1):
        engines.train_actor(engine, seed=iteration)
        trained.averages["actor_ema"].update()
        given = dict(state={"iteration": iteration}, tensors={"t": torch.arange(iteration)}, identity=IDENTITY)
        assert save_checkpoint(Path(root), iteration, trained, **given, keep=keep)
    return engines.weights(engine)


@pytest.fixture
def two(run_ranks, strict_z3, tmp_path):
    """A folder with two checkpoints of two ranks."""
    run_ranks(saved, str(tmp_path / "checkpoints"), engines.ds_file(2, strict_z3), 2)
    return tmp_path / "checkpoints"


def truncated(folder):
    path = folder / "pieces_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def one_bit(folder):
    path = folder / "pieces_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def without_a_rank(folder):
    (folder / "pieces_00001.safetensors").unlink()


def without_state(folder):
    (folder / "state.json").unlink()


def another_state(folder):
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"iteration": 2', '"iteration": 3'))


def no_manifest(folder):
    (folder / MANIFEST).unlink()


def half_a_manifest(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text()[:100])


def strange_manifest(folder):
    (folder / MANIFEST).write_text("[]")


def of_another_format(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))


DAMAGE = {
    truncated: "pieces_00001.safetensors has [0-9]+ bytes of [0-9]+",
    one_bit: "pieces_00000.safetensors is not what was written",
    without_a_rank: "pieces_00001.safetensors is missing",
    without_state: "state.json is missing",
    another_state: "state.json is not what was written",
    no_manifest: "manifest.json: FileNotFoundError",
    half_a_manifest: "manifest.json: JSONDecodeError",
    strange_manifest: "manifest.json: TypeError",
    of_another_format: "manifest.json: format 99, this is 1",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named_and_passed_over(two, capsys, damage):
    assert newest_whole(two, IDENTITY).name == SECOND and capsys.readouterr().out == ""
    damage(two / SECOND)
    assert newest_whole(two, IDENTITY).name == FIRST
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{two / SECOND} is damaged (") and line.endswith("): passed over.")
    assert re.search(DAMAGE[damage], line)
    damage(two / FIRST) if damage is not another_state else without_state(two / FIRST)
    with pytest.raises(ValueError, match=r"Not one checkpoint in .* is whole\. Begin anew in another --output_dir, or"):
        newest_whole(two, IDENTITY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"rollout.top_k": 5, "seed": 1}, "rollout.top_k was 0, is 5; seed was 0, is 1"),
        ({"the prompts": "other"}, "the prompts was 'abc', is 'other'"),
        ({"new": 3}, "new was None, is 3"),
        ({"the model": "b" * 32}, "the model are others"),
        ({f"n{number}": 1 for number in range(5)}, "and 2 more"),
    ],
)
def test_another_runs_is_refused_by_the_name_of_what_differs(two, change, said):
    """Also where an older one is there: it is another run's as well."""
    with pytest.raises(ValueError, match=rf"{SECOND} is of another run: .*{said}"):
        newest_whole(two, IDENTITY | change)


def test_what_is_half_done_is_not_there(two):
    (two / SECOND).rename(two / f"{SECOND}.partial")
    shutil.copytree(two / FIRST, two / f"{FIRST}.removed")
    assert [folder.name for folder in checkpoints_in(two)] == [FIRST]


def test_a_kill_while_one_takes_anothers_place_loses_neither(two, monkeypatch):
    """At each moment of it."""
    again = two / f"{SECOND}.partial"
    for moment in ("before", "between", "after"):
        shutil.copytree(two / SECOND, again)
        renames, real = [], Path.rename

        def rename(path, target, renames=renames, moment=moment, real=real):
            if (moment, len(renames)) in (("before", 0), ("between", 1)):
                raise KeyboardInterrupt
            renames.append(path)
            return real(path, target)

        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt) if moment != "after" else nullcontext():
            put_in_place(again, two / SECOND)
        monkeypatch.setattr(Path, "rename", real)
        assert newest_whole(two, IDENTITY).name == SECOND
        shutil.rmtree(again, ignore_errors=True)
        assert sorted(path.name for path in two.iterdir()) == [FIRST, SECOND]


def test_a_checkpoint_holds_nothing_pickled(two):
    names = sorted(path.name for path in (two / SECOND).iterdir())
    pieces = ["pieces_00000.safetensors", "pieces_00001.safetensors"]
    assert names == [MANIFEST, *pieces, "state.json", "tensors.safetensors"]
    manifest = json.loads((two / SECOND / MANIFEST).read_text())
    assert manifest["files"].keys() == set(names) - {MANIFEST} and manifest["ranks"] == 2


def test_the_newest_ones_are_kept(run_ranks, strict_z3, tmp_path):
    run_ranks(saved, str(tmp_path), engines.ds_file(0, strict_z3), 4, 2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "strict_z3.json") == [
        "iteration_000003",
        "iteration_000004",
    ]


def test_a_damaged_one_is_not_kept_in_the_place_of_a_whole_one(run_ranks, strict_z3, two):
    """The run passes over the second, goes on from the first, and saves after it; later ones are of no use to it."""
    one_bit(two / SECOND)
    (two / SECOND).rename(two / "iteration_000007")
    (two / "iteration_000005.partial").mkdir()
    (two / "iteration_000004.removed").mkdir()
    run_ranks(saved, str(two), engines.ds_file(2, strict_z3), 2, 1)
    assert [path.name for path in two.iterdir()] == [SECOND]
    assert newest_whole(two, IDENTITY).name == SECOND


def loaded(root, ds_config):
    folder = newest_checkpoint(Path(root), IDENTITY)
    engine = engines.actor(tiny.LLAMA, ds_config)
    average = MovingAverage(engine, decay=0.5)
    state, tensors = load_checkpoint(folder, Trained(engines={"actor": engine}, averages={"actor_ema": average}))
    means = {f"model.{name}": average.whole(name) for name in average.parameters}
    return state, tensors["t"].tolist(), engines.weights(engine), means


@pytest.mark.parametrize("kind", [0, "strict"])
def test_what_is_loaded_is_what_was_saved(run_ranks, strict_z3, tmp_path, kind):
    file, root = engines.ds_file(kind, strict_z3), str(tmp_path / "checkpoints")
    weights = run_ranks(saved, root, file, 3)[0]
    for state, tensor, found, means in run_ranks(loaded, root, file):
        assert (state, tensor) == ({"iteration": 3}, [0, 1, 2])
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
        assert not any(torch.equal(found[name], tensor) for name, tensor in means.items()), "an average lags behind"
    one = run_ranks(loaded, root, engines.ds_file(2, strict_z3), world_size=1)[0]  # on one rank
    assert all(torch.equal(one[2][name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(one[3][name], tensor) for name, tensor in means.items())


def another_model(root, ds_config, narrower):
    wide = "intermediate_size=64"
    assert wide in tiny.LLAMA
    name = tiny.LLAMA.replace(wide, "intermediate_size=48")
    engine = engines.actor(name, ds_config) if narrower else engines.critic(tiny.LLAMA, ds_config)
    try:
        load_checkpoint(newest_checkpoint(Path(root), IDENTITY), Trained(engines={"actor": engine}, averages={}))
    except ValueError as error:
        return str(error)


def test_another_models_weights_are_refused(run_ranks, strict_z3, two):
    for said in run_ranks(another_model, str(two), engines.ds_file(2, strict_z3), True):
        assert re.search(
            r"another model: the actor's \S*(gate|up|down)_proj\.weight has 2048 numbers there, 1536 here", said
        )
    for said in run_ranks(another_model, str(two), engines.ds_file(2, strict_z3), False):
        assert "is of another model: of the actor it has" in said and "lm_head.weight in one of them only" in said


def full_disk(root, ds_config, failing, where):
    """A third checkpoint, for which the disk is full on one rank."""
    engine = engines.actor(tiny.LLAMA, ds_config)
    real, started = getattr(checkpoint, where), time.monotonic()

    def full(*args, **kwargs):
        if comm.rank() == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    setattr(checkpoint, where, full)
    try:
        given = dict(state={}, tensors={}, identity=IDENTITY, keep=1)
        written = save_checkpoint(Path(root), 3, Trained(engines={"actor": engine}, averages={}), **given)
    finally:
        setattr(checkpoint, where, real)
    return written, time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("failing", "where"),
    [
        (1, "save_file"),
        (0, "save_file"),
        (0, "flush"),
        (1, "flush"),
        (0, "_begin"),
        (0, "_write_manifest"),
        (1, "digest"),
        (0, "put_in_place"),
    ],
)
def test_a_full_disk_leaves_what_there_was(run_ranks, strict_z3, two, failing, where):
    given = (str(two), engines.ds_file(2, strict_z3), failing, where)
    assert run_ranks(full_disk, *given) == [(False, True)] * 2
    assert sorted(path.name for path in two.iterdir()) == [FIRST, SECOND]
    assert newest_whole(two, IDENTITY).name == SECOND


def spoiled(root, ds_config):
    """A disk that does not keep what it is given."""
    engine, real = engines.actor(tiny.LLAMA, ds_config), checkpoint.save_file

    def save_file(tensors, path, **given):
        real(tensors, path, **given)
        if path.name == "pieces_00000.safetensors":
            one_bit(path.parent)

    checkpoint.save_file = save_file
    try:
        given = dict(state={}, tensors={}, identity=IDENTITY, keep=1)
        return save_checkpoint(Path(root), 3, Trained(engines={"actor": engine}, averages={}), **given)
    finally:
        checkpoint.save_file = real


def test_the_last_good_one_stays_until_the_new_one_has_been_read_back(run_ranks, strict_z3, two, capsys):
    assert run_ranks(spoiled, str(two), engines.ds_file(2, strict_z3)) == [False] * 2
    assert sorted(path.name for path in two.iterdir()) == [FIRST, SECOND]
    assert newest_whole(two, IDENTITY).name == SECOND
