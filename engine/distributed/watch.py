"""A rank that dies is noticed at once, and named.

Without this the others would wait in a collective for a rank that is gone, until the process group's timeout. Every
rank holds a connection to rank 0, over which it says what it is doing; the kernel closes it with the process. A machine
that loses its power or its network closes nothing: that is noticed by the process group's timeout.
"""

import hmac
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

from engine.distributed import comm

CONNECT_S = 60
NOTICE_S = 3  # for a rank that fails to hear that another one is gone, which may be why
MOURNING_S = 15  # for a rank that fails as another one did to end by itself, and to say so in its own words


class Watch:
    """This rank's end of it. Ends the process where another rank is gone."""

    def __init__(self):
        """A collective. Where the ranks cannot be connected there is no watch, and a warning."""
        self.rank, self.world_size = comm.rank(), comm.world_size()
        self.doing = dict.fromkeys(range(self.world_size), "starting")
        self.closed, self.lock, self.connections = False, threading.Lock(), {}
        if self.world_size == 1:
            return
        trouble = self._connect()
        if found := next(filter(None, comm.gathered_objects(trouble)), None):
            self.closed = True
            for connection in self.connections.values():
                connection.close()
            if comm.is_main():
                print(f"Warning: a rank that dies will be noticed late, the ranks cannot watch: {found}.", flush=True)
            return
        for rank, connection in self.connections.items():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            threading.Thread(target=self._listen, args=(rank, connection), daemon=True).start()

    def _connect(self) -> str | None:
        """Rank 0 to all others. A collective; says what went wrong on this rank."""
        server, trouble = None, None
        try:
            if self.rank == 0:
                # All other addresses than the ranks' own are for nobody: who has no token is not heard.
                server = socket.create_server(("127.0.0.1" if _is_here(os.environ["MASTER_ADDR"]) else "", 0))
        except OSError as error:
            trouble = f"{type(error).__name__}: {error}"
        port, token = comm.of_main((server.getsockname()[1], secrets.token_hex(16)) if server else (None, None))
        if port is None:
            return trouble
        try:
            if server is not None:
                self._accept(server, token)
            else:
                self.connections[0] = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_S)
                self._send(self.connections[0], {"token": token, "rank": self.rank})
        except OSError as error:
            trouble = f"{type(error).__name__}: {error}"
        return trouble

    def tell(self, phase: str, iteration: int) -> None:
        """What this rank begins to do."""
        self._to_all({"doing": f"phase {phase} of iteration {iteration}"})

    def close(self, failure: BaseException | None = None) -> None:
        """Stop watching, and being watched.

        Args:
            failure: why this rank ends; the others end too. A ValueError is mostly raised on all ranks: they are given
                time to say so themselves. Anything else may be another rank's death, heard of within NOTICE_S.
        """
        if self.connections and not self.closed and failure is not None and not isinstance(failure, ValueError):
            # Who hears of a rank that is gone meanwhile names it, and ends the process.
            threading.Event().wait(NOTICE_S)
        self.closed = True
        if failure is None:
            self._to_all({"bye": True})
        else:
            said = f"{type(failure).__name__}: {failure}"
            self._to_all({"failed": said[:2000], "others_too": isinstance(failure, ValueError)})

    def _accept(self, server: socket.socket, token: str) -> None:
        deadline = monotonic() + CONNECT_S
        with server:
            while len(self.connections) < self.world_size - 1:
                server.settimeout(max(0.1, deadline - monotonic()))
                connection, _ = server.accept()
                connection.settimeout(2)
                said = _parsed(_line_from(connection))
                if hmac.compare_digest(str(said.get("token")).encode(), token.encode()):
                    self.connections[int(said["rank"])] = connection
                else:  # nobody of ours
                    connection.close()

    def _to_all(self, message: dict[str, Any]) -> None:
        if "doing" in message:
            self.doing[self.rank] = message["doing"]
        for connection in self.connections.values():
            self._send(connection, message)

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        try:
            with self.lock:
                connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # the listening thread notices
            pass

    def _listen(self, rank: int, connection: socket.socket) -> None:
        """Hear one rank out."""
        try:
            for line in _lines(connection):
                said = _parsed(line)
                if "bye" in said:
                    return
                if "doing" in said:
                    self.doing[rank] = said["doing"]
                elif "gone" in said:  # rank 0 knows of another one
                    self._end(said["gone"], first=False)
                elif "failed" in said:
                    failure = f"Rank {rank} of {self.world_size} failed in {self.doing[rank]}: {said['failed']}"
                    if said["others_too"]:
                        threading.Event().wait(MOURNING_S)
                    self._end(failure, wait_s=0 if said["others_too"] else MOURNING_S)
        except OSError:
            pass
        self._end(f"Rank {rank} of {self.world_size} died in {self.doing[rank]}")

    def _end(self, what: str, *, first: bool = True, wait_s: float = 0.0) -> None:
        if self.closed:
            return
        if first:
            self._to_all({"gone": what})
            said = f"\n{what}. The run ends; --resume auto goes on from its newest checkpoint.\n"
            with suppress(OSError):  # nobody may be left to read it
                os.write(2, said.encode())
        threading.Event().wait(wait_s)
        os._exit(1)


def _is_here(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


def _lines(connection: socket.socket) -> Iterator[bytes]:
    """Until it is closed. Not by `makefile`: its lock aborts an interpreter that ends while a thread waits in it."""
    held = b""
    while received := connection.recv(4096):
        *lines, held = (held + received).split(b"\n")
        yield from lines


def _line_from(connection: socket.socket) -> bytes:
    """Byte by byte: what follows the line is the listening thread's. Empty where nothing sensible comes."""
    line = b""
    with suppress(OSError):
        while not line.endswith(b"\n") and len(line) < 200 and (byte := connection.recv(1)):
            line += byte
    return line


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
