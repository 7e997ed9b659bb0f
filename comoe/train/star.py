"""Short messages between the processes of one run, apart from its collectives: rank 0 in the middle, one TCP connection
to every other rank.

A collective says nothing about a rank that does not take part in it. A connection does: the system closes it in the
moment in which a process ends, in whatever way. A message is one line of JSON.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

LONGEST = 1 << 16
"""Bytes of the longest line; who sends more is none of ours."""
RETRY = 0.5
"""Seconds between two attempts to reach the middle."""
PROBES = 4
"""Unanswered probes after which a connection to a machine that fell silent counts as lost."""


def listen(port: int = 0) -> socket.socket:
    """A server on all addresses of this machine; port 0 takes a free one."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


class Star:
    """One end of the star.

    Args:
        rank: of this process.
        word: strangers do not know it; the same on all ranks.
        patience: seconds after which the system gives up a machine that answers no probe.
    """

    def __init__(self, rank: int, *, word: str = "", patience: float = 300.0) -> None:
        self.rank = rank
        self._word = word
        self._patience = patience
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        self._ranks: dict[socket.socket, int | None] = {}
        self._unread: dict[socket.socket, bytes] = {}
        self._sending = threading.Lock()

    def serve(self, server: socket.socket) -> Star:
        """Be the middle; the others connect when they come."""
        server.setblocking(False)
        self._server = server
        self._selector.register(server, selectors.EVENT_READ)
        return self

    def connect(
        self, address: str, port: int, *, seconds: float, give_up: Callable[[], object] = lambda: False
    ) -> Star:
        """Reach the middle, which may come later than this rank.

        Raises:
            OSError: it did not answer in time, or ``give_up`` said so.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                line = socket.create_connection((address, port), timeout=min(10.0, seconds))
                break
            except OSError as error:
                if time.monotonic() > end or give_up():
                    raise OSError(
                        f"rank {self.rank} cannot reach rank 0 at {address}, port {port} ({error}); the machines of a "
                        f"run must reach one another on all ports."
                    ) from error
                time.sleep(RETRY)
        self._take(line, rank=0)
        self.send({"rank": self.rank, "word": self._word})
        return self

    def connected(self) -> set[int]:
        """Ranks at the other ends."""
        return {rank for rank in self._ranks.values() if rank is not None}

    def send(self, message: dict[str, Any]) -> None:
        """To the middle; from the middle to all. A connection that is lost is noticed by ``receive``, not here."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for peer, rank in list(self._ranks.items()):
                try:
                    # A frozen process reads nothing, and once its buffer is full nothing more is sent to it.
                    if rank is not None and peer.send(line) < len(line):
                        peer.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def receive(self, seconds: float) -> list[tuple[int, dict[str, Any] | None]]:
        """What came in, after at most ``seconds``: (rank, message), and (rank, None) for a lost connection."""
        if not self._selector.get_map():
            time.sleep(seconds)
            return []
        came: list[tuple[int, dict[str, Any] | None]] = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._take(self._server.accept()[0], rank=None)
            else:
                came += self._read(key.fileobj)
        return came

    def close(self) -> None:
        """Hang up."""
        for line in [*self._ranks, *([self._server] if self._server else [])]:
            line.close()
        self._ranks.clear()
        self._selector.close()

    def _take(self, line: socket.socket, *, rank: int | None) -> None:
        line.setblocking(False)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        pause = max(1, round(self._patience / (PROBES + 1)))
        for option, value in (("TCP_KEEPIDLE", pause), ("TCP_KEEPINTVL", pause), ("TCP_KEEPCNT", PROBES)):
            if hasattr(socket, option):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._selector.register(line, selectors.EVENT_READ)
        self._unread[line] = b""
        self._ranks[line] = rank

    def _read(self, line: socket.socket) -> list[tuple[int, dict[str, Any] | None]]:
        try:
            data = line.recv(LONGEST)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *whole, rest = (self._unread[line] + data).split(b"\n")
        self._unread[line] = rest
        came: list[tuple[int, dict[str, Any] | None]] = []
        try:
            for text in whole:
                message = json.loads(text)
                if self._ranks[line] is not None:
                    came.append((self._ranks[line], dict(message)))
                else:
                    if message["word"] != self._word:
                        raise ValueError("not one of ours")
                    self._ranks[line] = int(message["rank"])
        except (ValueError, KeyError, TypeError):
            data = b""
        if not data or len(rest) > LONGEST:
            self._selector.unregister(line)
            rank = self._ranks.pop(line)
            del self._unread[line]
            line.close()
            if rank is not None:
                came.append((rank, None))
        return came
