"""The doctor: a healthy machine and run have no fault; each of the planted ones is found, alone, with its sentence."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer

import pytest
import ranks
import tiny
from planted import HELD_OUT, Run
from spoilt_configs import OF_CONFIGS, adapter, full_disk
from spoilt_machines import OF_MACHINES

from engine.doctor import data, examination, folders, models, network
from engine.doctor.examination import OF_A_CONFIG, OF_THE_MACHINE, examine
from engine.doctor.findings import Finding, failed, ok
from engine.doctor.subject import Subject, stage_of
from launch import doctor
from launch.serve_scores import handler_of

WITHOUT_RANKS = [check for check in OF_THE_MACHINE if check is not network.ranks_add_up]  # which takes long


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    return Run(tmp_path, monkeypatch)


def faults(found: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in found if finding.status in ("warning", "failed")}


def examined(run: Run, checks) -> list[Finding]:
    given = {"num_accelerators": 2} | run.given
    return list(examine(Subject(settings=run.settings(), **given), checks))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> list[Finding]:
    """What is said of a run without a fault."""
    with pytest.MonkeyPatch.context() as patch:
        return examined(Run(tmp_path_factory.mktemp("healthy"), patch), [*WITHOUT_RANKS, *OF_A_CONFIG])


def test_a_healthy_run_has_no_fault(healthy):
    assert faults(healthy) == {}
    looked_at = {finding.check for finding in healthy if finding.status == "ok"}
    not_here = {"master address", "hostfile", "hosts answer"}  # named by nobody
    unused = {"lora targets", "quantization", "score service", "environment", "wandb key"}
    every = {check.__name__.replace("_", " ") for check in (*WITHOUT_RANKS, *OF_A_CONFIG)}
    assert looked_at == every - not_here - unused


@pytest.mark.parametrize(
    ("check", "status", "sentence", "plant", "checks"),
    [(*fault, OF_A_CONFIG) for fault in OF_CONFIGS] + [(*fault, WITHOUT_RANKS) for fault in OF_MACHINES],
    ids=[f"{fault[0]}: {fault[2]}" for fault in OF_CONFIGS + OF_MACHINES],
)
def test_a_fault_is_found_alone(run, healthy, check, status, sentence, plant, checks):
    assert check not in faults(healthy)
    plant(run)
    found = faults(examined(run, checks))
    assert found.keys() == {check}, [(f.check, f.found) for f in found.values()]
    told = f"{found[check].found} {found[check].remedy}"
    assert found[check].status == status and re.search(sentence, told, flags=re.DOTALL), told
    assert found[check].remedy or "--" in told, told
    assert "secret" not in told


def test_what_a_healthy_run_does_not_have_is_fine_where_it_has_it(run):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(tiny.share_of_small_letters))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    adapter(run, target_modules=["q_proj"])
    run.set(reward__url=f"http://127.0.0.1:{port}", rollout__environment="engine.environments:SecondChance")
    run.set(tracking__wandb="online", zero_stage="auto")
    run.patch.setenv("WANDB_API_KEY", "0" * 40)
    run.patch.setenv("MASTER_ADDR", "127.0.0.1")
    run.patch.setenv("CXX", "env c++")  # a compiler behind another program, as with ccache
    run.hostfile("localhost slots=2\n")
    run.given["ssh"] = True
    run.program("ssh", "exit 0")
    wanted = {"lora targets", "score service", "environment", "wandb key", "master address", "hostfile", "hosts answer"}
    found = examined(run, [*WITHOUT_RANKS, *OF_A_CONFIG])
    server.shutdown()
    assert faults(found) == {} and wanted <= {finding.check for finding in found if finding.status == "ok"}


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_the_other_stages_are_told_apart_and_looked_at(tmp_path, stage):
    config = tiny.stage_config(tmp_path, stage)
    role = "reward" if stage == "reward" else "model"
    settings = [f"--{role}.model_name_or_path", tiny.LLAMA, f"--data.train={config.data.train}", "--dtype", "float32"]
    settings += ["--data.max_prompt_tokens", "32", "--data.max_length", "64", "--output_dir", config.output_dir]
    settings += ["--minibatch_size", "4", "--micro_batch_size", "2"]
    assert stage_of(settings) == stage
    found = list(examine(Subject(settings=settings), OF_A_CONFIG))
    assert faults(found) == {} and {"data rows", "prompt lengths", "disk space"} <= {f.check for f in found}
    found = faults(examine(Subject(settings=[*settings, "--data.max_length", "9"]), OF_A_CONFIG))
    assert re.search(r"rows of .*max_length=9", found["prompt lengths"].found)
    told = found["prompt lengths"].remedy  # 23 characters, answered with 33 and an end; no prompt has more than 32
    assert told == "Raise --data.max_length (the longest row has 57)."
    found = faults(examine(Subject(settings=[*settings, "--data.max_prompt_tokens", "26"]), OF_A_CONFIG))
    assert found["prompt lengths"].remedy == "Raise --data.max_prompt_tokens (the longest prompt has 27)."


def crashes(subject: Subject) -> Finding:
    raise KeyError("nobody thought of this")


def hangs(subject: Subject) -> Finding:
    threading.Event().wait(30)
    return ok("late")


def test_a_check_that_crashes_or_hangs_hides_no_other(monkeypatch):
    monkeypatch.setattr(examination, "LIMIT_S", 5)
    first, second, third = examine(Subject(), [crashes, hangs, lambda subject: failed("found")])
    assert first.status == "failed" and "KeyError: 'nobody thought of this'" in first.found
    assert "test_examination.py" in first.found
    assert second == Finding("failed", "no answer within 5 s.", "See what it waits for.", "hangs")
    assert third.found == "found"


def test_what_several_checks_need_is_told_once(run):
    run.set(kl_coef=-1)
    found = examined(run, OF_A_CONFIG)
    assert {finding.status for finding in found[1:]} == {"skipped"}
    assert found[1].found == "needs the configuration, of which an earlier line tells"


def test_ranks_that_do_not_find_each_other_are_told(run):
    (good,) = examine(Subject(num_accelerators=2), [network.ranks_add_up])
    assert good.status == "ok" and good.found.startswith("2 ranks of this machine added up a number with gloo")
    run.patch.setenv("GLOO_SOCKET_IFNAME", "nosuchdevice")
    (bad,) = examine(Subject(num_accelerators=1), [network.ranks_add_up])
    assert bad.status == "failed" and "1 failed; rank 0: " in bad.found and "nosuchdevice" in bad.found


def test_a_large_file_is_looked_at_in_part(run):
    run.write_rows([{"prompt": "a" * (1 + 63 * (row % 4 == 0)), "answer": "1"} for row in range(4001)])
    run.set(data__max_prompt_tokens=40)
    found = faults(examined(run, OF_A_CONFIG))
    share = re.search(r"(\d+) of 1334 rows \(of 4001, evenly spread\).* (\d+\.\d)%", found["prompt lengths"].found)
    assert share and abs(float(share[2]) - 25) < 1


def test_prompts_that_are_not_asked_are_not_looked_at(run):
    tiny.write_rows(run.folder / "held_out.jsonl", [*HELD_OUT, {"prompt": ""}])
    run.set(evaluation__num_prompts=2)
    assert faults(examined(run, [data.data_rows])) == {}
    run.set(evaluation__num_prompts=3)
    assert re.search("data.eval: .*line 3", faults(examined(run, [data.data_rows]))["data rows"].found)


def test_only_the_weights_that_transformers_reads_are_looked_at(run):
    for role in ("actor", "reward"):
        (run.folder / role / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
        (run.folder / role / "model-00001-of-00002.safetensors").write_bytes(b"half of an earlier export")
    assert faults(examined(run, [models.model_folders, models.score_heads])) == {}


def test_hosts_are_asked_at_the_same_time(run):
    """Each waits until all have been asked."""
    run.hostfile("one slots=1\ntwo slots=1\nthree slots=1\n")
    asked = run.folder / "asked"
    asked.mkdir()
    said = f'case "$*" in *" -- "*" true") ;; *) exit 1 ;; esac; mktemp -p {asked} >&2'
    run.program("ssh", f"{said}\nuntil [ $(ls {asked} | wc -l) = 3 ]; do sleep 0.1; done")
    (found,) = examine(Subject(hostfile=run.given["hostfile"], ssh=True), [network.hosts_answer])
    assert (found.status, found.found) == ("ok", "one lets us in; two lets us in; three lets us in")


def test_room_for_checkpoints_is_counted_by_hand(run):
    subject = Subject(settings=run.settings())
    (found,) = examine(subject, [folders.disk_space])
    whole = sum(parameter.numel() for parameter in subject.without_weights("actor").parameters())
    critic = whole - 258 * 32 + 32  # a score head in place of the one for the vocabulary
    needed = (whole + critic) * (3 * 12 + 4)  # keep + 1 = 3 checkpoints of 12 bytes, an export in fp32
    full_disk(run, needed)
    assert next(iter(examine(subject, [folders.disk_space]))).status == "ok" == found.status
    full_disk(run, needed - 1)
    assert next(iter(examine(subject, [folders.disk_space]))).status == "failed"


@pytest.mark.parametrize(("resume", "given_back"), [("auto", 2), ("never", 3)])
def test_new_checkpoints_come_in_the_place_of_those_there_are(run, resume, given_back):
    run.set(resume=resume)
    full_disk(run, 10**6)
    (empty,) = examined(run, [folders.disk_space])
    for number in range(3):  # of a GiB each, which takes no room; two are kept
        folder = run.folder / "out" / "checkpoints" / f"iteration_{number:06d}" / "part"
        folder.mkdir(parents=True)
        with open(folder / "state.safetensors", "wb") as file:
            file.truncate(2**30)
    (found,) = examined(run, [folders.disk_space])
    assert empty.found.startswith("0.0 GiB free in ")
    assert found.found.startswith(f"{given_back}.0 GiB free in ") and "with earlier checkpoints" in found.found


def on_the_command_line(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ranks.ROOT / "launch" / "doctor.py"), *flags]
    given = {**os.environ, **ranks.OFFLINE, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=given, cwd=ranks.ROOT, timeout=600, check=False)


def test_exit_code_of_a_healthy_run_and_of_a_spoilt_one(run):
    flags = [*run.settings(), "--num_accelerators", "2", "--json"]
    good = on_the_command_line(*flags)
    said = json.loads(good.stdout)
    assert (good.returncode, said["failed"]) == (0, 0), good.stdout + good.stderr
    assert {"check", "status", "found", "remedy"} == said["findings"][0].keys()
    assert any(finding["check"] == "ranks add up" for finding in said["findings"])


def test_it_works_without_torch_and_deepspeed_and_says_so(run):
    for name in ("torch", "deepspeed"):
        (run.folder / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    path = os.pathsep.join([str(run.folder), str(ranks.ROOT)])
    ended = on_the_command_line(*run.settings(), "--num_accelerators", "1", PYTHONPATH=path)
    lines = {line.split(":")[0][9:]: line for line in ended.stdout.splitlines()}
    assert ended.returncode == 1, ended.stderr
    assert lines["libraries import"].startswith("failed") and "no torch here" in lines["libraries import"]
    assert "no deepspeed here" in lines["libraries import"]
    assert lines["compiler"].startswith("ok") and lines["configuration"].startswith("ok")
    assert lines["sharding files"].startswith("failed") and lines["output dir"].startswith("ok")


@pytest.mark.parametrize("flags", [("--num_accelerators", "0"), ("--ssh",), ("recipe.yaml",), ("--stage", "rlhf")])
def test_wrong_usage_is_exit_code_2(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor.py", *flags])
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


def test_a_finding_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "examine", lambda subject: [failed("two\r\nlines\x1b[2J\u2028end", "Do this."), ok("fine")]
    )
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    assert doctor.main() == 1
    first, second, counts = capsys.readouterr().out.splitlines()
    assert first == "failed   : two lines [2J end Do this." and second.endswith("fine")
    assert counts == "1 failed, 0 warning, 1 ok"


def test_nothing_heavy_is_imported_before_it_is_needed():
    program = "import sys, launch.doctor; sys.exit(bool({'torch', 'deepspeed', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ranks.ROOT, check=False).returncode == 0
