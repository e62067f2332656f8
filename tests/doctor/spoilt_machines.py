"""What can be wrong with an installation, a machine and its network, planted in a healthy one."""

import socket

import ranks
from planted import Run
from spoilt_configs import code, full_disk

from engine.doctor import installation, machine


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
    (
        "hostfile",
        "failed",
        "line 1: '-oProxyCommand=id slots=8' is not",
        lambda run: run.hostfile("-oProxyCommand=id slots=8\n"),
    ),
    ("hostfile", "failed", "nowhere.invalid does not resolve", lambda run: run.hostfile("nowhere.invalid slots=8\n")),
    ("hosts answer", "failed", "ssh localhost: .*Permission denied", refused_login),
]
