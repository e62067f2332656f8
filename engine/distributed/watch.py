"""A rank that dies is noticed at once, and named.

Without this the others would wait in a collective for a rank that is gone, until the process group's timeout. Every
rank holds a connection to rank 0, over which it says what it is doing; the kernel closes it with the process, whatever
ends that.
"""

import hmac
import json
import os
import secrets
import socket
import sys
import threading
from typing import Any

from engine.distributed import comm

MOURNING_S = 5  # for a rank that fails as another one did to end by itself, and to say so in its own words


class Watch:
    """This rank's end of it. Ends the process where another rank is gone."""

    def __init__(self):
        """A collective."""
        self.rank, self.world_size = comm.rank(), comm.world_size()
        self.doing = dict.fromkeys(range(self.world_size), "starting")
        self.closed, self.lock, self.connections = False, threading.Lock(), {}
        if self.world_size == 1:
            return
        server = socket.create_server((os.environ["MASTER_ADDR"], 0)) if self.rank == 0 else None
        port, token = comm.of_main((server.getsockname()[1], secrets.token_hex(16)) if server else None)
        if server is not None:
            self._accept(server, token)
        else:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=60)
            connection.settimeout(None)
            self.connections[0] = connection
            self._send(connection, {"token": token, "rank": self.rank})
        for rank, connection in self.connections.items():
            threading.Thread(target=self._listen, args=(rank, connection), daemon=True).start()
        comm.barrier()

    def tell(self, phase: str, iteration: int) -> None:
        """What this rank begins to do."""
        self._to_all({"doing": f"phase {phase} of iteration {iteration}"})

    def close(self, failure: str | None = None) -> None:
        """Stop watching, and being watched.

        Args:
            failure: why this rank ends, where the others do not know; they end too.
        """
        self.closed = True
        self._to_all({"bye": True} if failure is None else {"failed": failure})

    def _accept(self, server: socket.socket, token: str) -> None:
        with server:
            server.settimeout(60)
            while len(self.connections) < self.world_size - 1:
                connection, _ = server.accept()
                connection.settimeout(60)
                # Byte by byte up to the line's end: what follows is the listening thread's.
                line = b""
                while not line.endswith(b"\n") and len(line) < 200 and (byte := connection.recv(1)):
                    line += byte
                said = _parsed(line)
                if hmac.compare_digest(str(said.get("token")), token):
                    connection.settimeout(None)
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
            for line in connection.makefile("rb"):
                said = _parsed(line)
                if "bye" in said:
                    return
                if "doing" in said:
                    self.doing[rank] = said["doing"]
                elif "gone" in said:  # rank 0 knows of another one
                    self._end(said["gone"], first=False)
                elif "failed" in said:
                    failure = f"Rank {rank} of {self.world_size} failed in {self.doing[rank]}: {said['failed']}"
                    self._end(failure, wait_s=MOURNING_S)
        except OSError:
            pass
        self._end(f"Rank {rank} of {self.world_size} died in {self.doing[rank]}")

    def _end(self, what: str, *, first: bool = True, wait_s: float = 0.0) -> None:
        if self.closed:
            return
        if first:
            self._to_all({"gone": what})
            said = f"\n{what}. The run ends; --resume auto goes on from its newest checkpoint.\n"
            os.write(sys.stderr.fileno(), said.encode())
        threading.Event().wait(wait_s)
        os._exit(1)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
