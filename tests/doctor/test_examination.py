"""The doctor: a healthy machine and run have no fault; each of the planted ones is found, alone, with its sentence."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from http.server import ThreadingHTTPServer

import pytest
import ranks
import tiny
from planted import ROWS, Run

from engine.doctor import examination, folders, installation, machine, network
from engine.doctor.examination import OF_A_CONFIG, OF_THE_MACHINE, examine
from engine.doctor.findings import Finding, failed, ok
from engine.doctor.subject import Subject, stage_of
from engine.run_folder import claim
from launch import doctor
from launch.serve_scores import handler_of

WITHOUT_RANKS = [check for check in OF_THE_MACHINE if check is not network.ranks_add_up]  # which takes long
Usage = namedtuple("Usage", "total used free")


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
        r"lacks its weights",
        lambda run: (
            run.set(ref__model_name_or_path=str(run.copy_of("actor", "bare")))
            or (run.folder / "bare/model.safetensors").unlink()
        ),
    ),
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
    ("wandb key", "failed", "no key for api.wandb.ai", no_key),
]


def missing(run: Run, name: str) -> None:
    real = installation.version

    def version(wanted: str) -> str:
        if wanted == name:
            raise installation.PackageNotFoundError(wanted)
        return real(wanted)

    run.patch.setattr(installation, "version", version)


def other_version(run: Run, name: str, found: str) -> None:
    real = installation.version
    run.patch.setattr(installation, "version", lambda wanted: found if wanted == name else real(wanted))


def without_constraints(run: Run) -> None:
    (run.folder / "setup.py").write_text((ranks.ROOT / "setup.py").read_text())
    run.patch.setattr(installation, "ROOT", run.folder)


def broken_library(run: Run) -> None:
    code(run, "raise OSError('libcudart.so.12: cannot open shared object file')")
    run.patch.setattr(installation, "LIBRARIES", (f"planted_{run.folder.name}".replace("-", "_"),))


def lock_of(run: Run, operator: str) -> None:
    (run.folder / "ops" / operator).mkdir(parents=True)
    (run.folder / "ops" / operator / "lock").touch()
    run.patch.setenv("TORCH_EXTENSIONS_DIR", str(run.folder / "ops"))


def gpu_without_cuda(run: Run) -> None:
    (run.folder / "driver").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54\n")
    run.patch.setattr(machine, "DRIVER", run.folder / "driver")


def listening(run: Run) -> None:
    server = socket.create_server(("", 0))
    run.given["kept"] = {"a server": (server, None)}
    run.patch.setenv("MASTER_PORT", str(server.getsockname()[1]))


def joins(run: Run, address: str) -> None:
    for name, value in (("MASTER_ADDR", address), ("RANK", "1")):
        run.patch.setenv(name, value)


def refused_login(run: Run) -> None:
    run.hostfile("localhost slots=2\n")
    run.given["ssh"] = True
    run.program("ssh", "echo 'root@localhost: Permission denied (publickey).' >&2; exit 255")


OF_MACHINES = [
    (
        "python version",
        "failed",
        "the engine needs 99.0",
        lambda run: run.patch.setattr(installation, "OLDEST_PYTHON", (99, 0)),
    ),
    ("requirements", "failed", "tqdm is not installed", lambda run: missing(run, "tqdm")),
    (
        "requirements",
        "failed",
        "torch is .* setup.py asks for >=99",
        lambda run: run.patch.setattr(installation, "_asked_for", lambda: ["torch>=99"]),
    ),
    ("tested versions", "warning", r"numpy 2\.5\.0 \(tested: ", lambda run: other_version(run, "numpy", "2.5.0")),
    ("tested versions", "warning", "constraints.txt is not there", without_constraints),
    ("libraries import", "failed", "OSError: libcudart", broken_library),
    (
        "compiler",
        "failed",
        r"no C\+\+ compiler c\+\+ on PATH",
        lambda run: run.only_these_programs("ninja", "deepspeed"),
    ),
    ("compiler", "failed", "does not make a program", lambda run: run.patch.setenv("CXX", "/bin/false")),
    ("ninja", "failed", "ninja does not run", lambda run: run.program("ninja", "exit 3")),
    ("built operators", "failed", "fused_adam/lock .*waits for ever", lambda run: lock_of(run, "fused_adam")),
    ("built operators", "warning", "an interrupted build", lambda run: lock_of(run, installation.OUR_OPERATOR)),
    ("launcher", "failed", "no deepspeed on PATH", lambda run: run.only_these_programs("ninja", also="/usr/bin:/bin")),
    ("accelerators", "failed", "550.54.* built without CUDA", gpu_without_cuda),
    ("shared memory", "failed", "1 MiB free, and 2 ranks want 66", lambda run: full_disk(run, 2**20)),
    (
        "limits",
        "warning",
        "256 open files",
        lambda run: run.patch.setattr(
            machine.resource, "getrlimit", lambda name: (256, 256) if name == 7 else (-1, -1)
        ),
    ),
    (
        "master address",
        "failed",
        "MASTER_ADDR=no-such-host.invalid does not resolve",
        lambda run: run.patch.setenv("MASTER_ADDR", "no-such-host.invalid"),
    ),
    ("master address", "failed", "nothing listens on port .* not rank 0", lambda run: joins(run, "127.0.0.1")),
    (
        "master address",
        "failed",
        "each machine's own, and the hostfile names 2",
        lambda run: (
            run.hostfile("127.0.0.1 slots=2\nlocalhost slots=2\n") or run.patch.setenv("MASTER_ADDR", "127.0.0.1")
        ),
    ),
    ("master port", "failed", "is taken", listening),
    ("master port", "failed", "MASTER_PORT='many' is no port", lambda run: run.patch.setenv("MASTER_PORT", "many")),
    ("hostfile", "failed", "cannot be read", lambda run: run.given.update(hostfile="/no/such/hosts")),
    ("hostfile", "failed", "line 2: 'localhost 8' is not", lambda run: run.hostfile("# ours\nlocalhost 8\n")),
    ("hostfile", "failed", "nowhere.invalid does not resolve", lambda run: run.hostfile("nowhere.invalid slots=8\n")),
    ("hosts answer", "failed", "ssh localhost: .*Permission denied", refused_login),
]


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
    run.set(tracking__wandb="online")
    run.patch.setenv("WANDB_API_KEY", "0" * 40)
    run.patch.setenv("MASTER_ADDR", "127.0.0.1")
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


def test_every_recipe_is_of_the_stage_that_its_name_says():
    words = {"sft": "sft", "dpo": "dpo", "reward": "reward"}
    for recipe in (ranks.ROOT / "launch" / "recipes").glob("*.yaml"):
        stage = words.get(recipe.stem.rsplit("_", 1)[-1], "ppo")
        if stage == "dpo" and "quickstart" not in recipe.stem:
            continue  # a hub's data decides
        assert stage_of(["--config", str(recipe)]) == stage, recipe


def crashes(subject: Subject) -> Finding:
    raise KeyError("nobody thought of this")


def hangs(subject: Subject) -> Finding:
    threading.Event().wait(30)
    return ok("late")


def test_a_check_that_crashes_or_hangs_hides_no_other(monkeypatch):
    monkeypatch.setattr(examination, "LIMIT_S", 0.2)
    first, second, third = examine(Subject(), [crashes, hangs, lambda subject: failed("found")])
    assert first.status == "failed" and "KeyError: 'nobody thought of this'" in first.found
    assert "test_examination.py" in first.found
    assert second == Finding("failed", "no answer within 0.2 s.", "See what it waits for.", "hangs")
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


def test_numbers_of_ranks(run):
    run.hostfile("one slots=8\ntwo slots=4\n")
    assert Subject(hostfile=run.given["hostfile"]).world_size == 12
    assert Subject(hostfile=run.given["hostfile"], num_accelerators=4).world_size == 8
    assert Subject(num_accelerators=3).world_size == 3


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
    monkeypatch.setattr(doctor, "examine", lambda subject: [failed("two\nlines", "Do this."), ok("fine")])
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    assert doctor.main() == 1
    first, second, counts = capsys.readouterr().out.splitlines()
    assert first == "failed : two lines Do this." and second.endswith("fine")
    assert counts == "1 failed, 0 warning, 1 ok"


def test_nothing_heavy_is_imported_before_it_is_needed():
    program = "import sys, launch.doctor; sys.exit(bool({'torch', 'deepspeed', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ranks.ROOT, check=False).returncode == 0
