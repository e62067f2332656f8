"""Checks of how ranks find each other: the address of rank 0, the hostfile, a trial of real ranks."""

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.doctor.findings import Finding, failed, of_each, ok, warning, with_remedy
from engine.doctor.subject import Subject

ROOT = Path(__file__).resolve().parents[2]
CONNECT_S, JOIN_S, TRIAL_S, LOGIN_S = 3, 60, 180, 5
MOST_RANKS, MOST_LOGINS = 8, 32  # at once
LAUNCHERS_PORT = 29500  # of deepspeed and torchrun, unless told otherwise


def ranks_add_up(subject: Subject) -> Finding:
    """Processes of this machine join a group on the loopback device and add up a number, as a run's ranks do."""
    number = min(subject.ranks_here, subject.gpus or MOST_RANKS, MOST_RANKS)
    backend = "nccl" if subject.gpus else "gloo"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "engine.distributed.ping", backend, str(JOIN_S)],
            env={**os.environ, **shared, "PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    deadline, told = time.monotonic() + TRIAL_S, {}
    try:
        for rank, process in enumerate(ranks):
            try:
                _, said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                if process.returncode:
                    told[rank] = (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            except subprocess.TimeoutExpired:
                told[rank] = f"no answer within {TRIAL_S} s"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if told:
        rank, said = next(iter(told.items()))
        remedy = "See that the loopback device is up and no firewall is in between."
        return failed(f"of {number} ranks with {backend} {len(told)} failed; rank {rank}: {said}.", remedy)
    return ok(f"{number} ranks of this machine added up a number with {backend}")


@with_remedy("Set MASTER_ADDR and MASTER_PORT to where rank 0 listens.")
def master_address(subject: Subject) -> Finding | None:
    """Where rank 0 listens, if the environment says so, and whether it can be got at."""
    name = os.environ.get("MASTER_ADDR")
    if name is None:
        return None
    try:
        address = _address(name)
    except OSError as error:
        return failed(f"MASTER_ADDR={name} does not resolve ({error}).", "Set it to rank 0's host name or address.")
    if address.startswith(("127.", "::1")) and subject.hostfile is not None and len(subject.hosts) > 1:
        said = f"MASTER_ADDR={name} is each machine's own, and the hostfile names {len(subject.hosts)}."
        return failed(said, "Set it to an address of the first machine that the others can reach.")
    port = _port()
    if _is_here(address) and not _joins():
        return ok(f"{name} is this machine")
    try:
        socket.create_connection((address, port), timeout=CONNECT_S).close()
    except ConnectionRefusedError:
        said = f"nothing listens on port {port} of MASTER_ADDR={name}"
        if _joins():
            return failed(f"{said}, and this is not rank 0.", "Start rank 0 first, or set MASTER_PORT to its port.")
        return warning(f"{said} yet; the machine answers.", "Start rank 0 there.")
    except OSError as error:
        said = f"MASTER_ADDR={name}, port {port}, cannot be reached ({error})"
        return failed(
            f"{said}.", "Open the port in the firewall between the machines, or take another network's address."
        )
    return ok(f"{name}, port {port}, answers")


@with_remedy("Set MASTER_PORT to a free port.")
def master_port(subject: Subject) -> Finding | None:
    """The port that rank 0 is to listen on is free, where this machine is rank 0's."""
    port, name = _port(), os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        if _joins() or not _is_here(_address(name)):
            return None
    except OSError:  # told by master_address
        return None
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("", port))
    except OSError as error:
        remedy = "Name another: deepspeed --master_port 29501, or MASTER_PORT."
        return failed(f"port {port}, where rank 0 is to listen, is taken ({error}).", remedy)
    return ok(f"{port} is free")


@with_remedy("Name a readable file with a line `name slots=8` for each machine.")
def hostfile(subject: Subject) -> Finding | None:
    """Its lines, and whether its names resolve."""
    if subject.hostfile is None:
        return None

    def look(host: str) -> Finding:
        try:
            return ok(f"{host} is {_address(host)}")
        except OSError as error:
            return failed(f"{host} does not resolve ({error}).", "Correct the name, or add it to /etc/hosts.")

    return of_each(subject.hosts, look)


def hosts_answer(subject: Subject) -> Finding | None:
    """The launcher logs in to every host without a password; asked for with --ssh."""
    if subject.hostfile is None or not subject.ssh:
        return None
    if shutil.which("ssh") is None:
        return failed("there is no ssh on PATH.", "Install it: apt install openssh-client.")

    def look(host: str) -> Finding:
        command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={LOGIN_S}", "--", host, "true"]
        options = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=4 * LOGIN_S, check=False)
        try:
            ended = subprocess.run(command, **options)
            said = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
            trouble = said[0] if ended.returncode else None
        except subprocess.TimeoutExpired:
            trouble = f"no answer within {4 * LOGIN_S} s"
        if trouble:
            return failed(f"ssh {host}: {trouble}.", f"Put your public key there: ssh-copy-id {host}.")
        return ok(f"{host} lets us in")

    with ThreadPoolExecutor(MOST_LOGINS) as logins:
        found = dict(zip(subject.hosts, logins.map(look, subject.hosts), strict=True))
    return of_each(subject.hosts, found.__getitem__)


def _port() -> int:
    """
    Raises:
        ValueError: MASTER_PORT is no port.
    """
    given = os.environ.get("MASTER_PORT", str(LAUNCHERS_PORT))
    if not (given.isdecimal() and 0 < int(given) < 2**16):
        raise ValueError(f"MASTER_PORT={given!r} is no port: it is a number from 1 to 65535.")
    return int(given)


def _joins() -> bool:
    """Whether the environment says that this process is another rank than 0."""
    ranks = [os.environ[name] for name in ("RANK", "SLURM_PROCID", "NODE_RANK") if os.environ.get(name)]
    return bool(ranks) and ranks[0].isdecimal() and int(ranks[0]) > 0


def _address(name: str) -> str:
    """The first that a name resolves to.

    Raises:
        OSError: it does not.
    """
    return socket.getaddrinfo(name, None)[0][4][0]


def _is_here(address: str) -> bool:
    """Whether this machine has the address: then it can be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as trial:
        try:
            trial.bind((address, 0))
        except OSError:
            return False
    return True


CHECKS = [ranks_add_up, master_address, master_port, hostfile, hosts_answer]
