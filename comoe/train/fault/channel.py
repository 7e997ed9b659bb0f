"""Short messages between the processes of one run, apart from its collectives: rank 0 in the
middle, one TCP connection to every other rank.

A collective says nothing about a rank that does not take part in it. A connection does: the system
closes it in the moment in which a process ends, in whatever way. A message is one line of JSON.
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
"""Probes of a connection on which nothing is under way, within the patience with it."""


MARGIN = 60.0
"""Seconds that the system waits for an answer beyond the patience, so that whoever counts messages
speaks first."""


LONGEST_PAUSE, LONGEST_WAIT = 32767, 2**31 - 1
"""Linux takes no longer pause between probes (seconds), nor wait for an answer (milliseconds)."""


def listen(port: int = 0) -> socket.socket:
    """A server on all addresses of this machine; port 0 takes a free one."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
        )
    return socket.create_server(("", port), backlog=4096)


class Star:
    """One end of the star.

    Args:
        rank: of this process.
        word: strangers do not know it; the same on all ranks.
        patience: seconds after which, and a margin, the system gives up a machine that answers
            nothing.
    """

    def __init__(self, rank: int, *, word: str = "", patience: float = 300.0) -> None:
        self.rank = rank
        self.broken: dict[int, str] = {}
        """Ranks whose connection was lost in another way than by the end of their process, and
        how."""
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
        self,
        address: str,
        port: int,
        *,
        seconds: float,
        give_up: Callable[[], object] = lambda: False,
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
                    # A frozen process reads nothing, and once its buffer is full nothing more is
                    # sent to it.
                    if rank is not None and peer.send(line) < len(line):
                        self.broken[rank] = "it reads nothing any more"
                        peer.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def receive(self, seconds: float) -> list[tuple[int, dict[str, Any] | None]]:
        """What came in, after at most ``seconds``: (rank, message), and (rank, None) for a lost
        connection; ``broken`` tells whether it was lost by the network."""
        if not self._selector.get_map():
            time.sleep(seconds)
            return []
        came: list[tuple[int, dict[str, Any] | None]] = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._server:
                self._accept()
            else:
                came += self._read(key.fileobj)
        return came

    def close(self) -> None:
        """Hang up."""
        for line in [*self._ranks, *([self._server] if self._server else [])]:
            line.close()
        self._ranks.clear()
        self._selector.close()

    def _accept(self) -> None:
        line = None
        try:
            line, _ = self._server.accept()
            self._take(line, rank=None)
        except OSError:
            # It hung up already; or there are no descriptors left, and then the next look should
            # not come at once.
            if line is not None:
                line.close()
            time.sleep(0.01)

    def _take(self, line: socket.socket, *, rank: int | None) -> None:
        line.setblocking(False)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        pause = min(max(1, round(self._patience / (PROBES + 1))), LONGEST_PAUSE)
        # No probe goes out while anything waits for an answer, as beats do: Linux then gives up by
        # the number of its attempts (about 15 min), unless told a time. That time also ends the
        # probes.
        wait = min(round(1000 * (self._patience + MARGIN)), LONGEST_WAIT)
        for option, value in (("TCP_KEEPIDLE", pause), ("TCP_KEEPINTVL", pause), ("TCP_KEEPCNT", PROBES),
                              ("TCP_USER_TIMEOUT", wait)):  # fmt: skip
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
        except OSError as error:
            data = b""
            # A process that ends while something to it is under way resets its connection.
            if self._ranks[line] is not None and not isinstance(error, ConnectionError):
                self.broken[self._ranks[line]] = error.strerror or str(error)
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
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            data = b""
        if not data or len(rest) > LONGEST:
            self._selector.unregister(line)
            rank = self._ranks.pop(line)
            del self._unread[line]
            line.close()
            if rank is not None:
                came.append((rank, None))
        return came
