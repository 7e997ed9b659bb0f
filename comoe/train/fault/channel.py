"""Short messages between the processes of one run, outside its collectives: one TCP connection from
rank 0 to every other rank.

A collective does not show which rank is missing. A connection does: the operating system closes it
when a process ends, for any reason. A message is one line of JSON.
"""

from __future__ import annotations

import hmac
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from comoe.train.launchers import LOOPBACK

MAX_LINE = 1 << 16
"""Bytes of the longest line; longer input closes the connection."""

MAX_GREETING = 1 << 10
"""Bytes of the longest line of a connection that has not sent the secret yet."""

STRANGERS = 64
"""Connections that may wait to tell the secret; one more takes the place of the oldest."""

GREET_WITHIN = 10.0
"""Seconds in which a new connection must tell it."""

RETRY = 0.5
"""Seconds between two attempts to reach rank 0."""

PROBES = 4
"""Keepalive probes of an idle connection within ``patience``."""

MARGIN = 60.0
"""Seconds added to ``patience`` for TCP timeouts: the watchdog reports a silent rank first."""

LONGEST_PAUSE, LONGEST_WAIT = 32767, 2**31 - 1
"""Limits of Linux: pause between probes in seconds, wait for an acknowledgment in milliseconds."""


def listen(port: int = 0, *, one_machine: bool = False) -> socket.socket:
    """A server on all addresses of this machine, or on its loopback alone; port 0 selects a free one."""
    if one_machine:
        return socket.create_server((LOOPBACK, port), backlog=4096)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
        )
    return socket.create_server(("", port), backlog=4096)


class SideChannel:
    """One end of the side channel.

    Args:
        rank: of this process.
        word: shared secret, the same on all ranks; a connection that does not tell it is closed.
        patience: seconds after which, plus a margin, the system closes the connection to a machine
            that does not respond.
    """

    def __init__(self, rank: int, *, word: str = "", patience: float = 300.0) -> None:
        self.rank = rank
        self.broken: dict[int, str] = {}
        """Rank -> reason, if its connection was lost although its process may be alive."""
        self._word = word.encode()
        self._patience = patience
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        self._ranks: dict[socket.socket, int | None] = {}
        self._unread: dict[socket.socket, bytes] = {}
        self._sending = threading.Lock()
        self._others: int | None = None
        self._since: dict[socket.socket, float] = {}

    def serve(self, server: socket.socket, *, others: int | None = None) -> SideChannel:
        """Act as rank 0, which accepts the connections of the others.

        Args:
            server: of ``listen``.
            others: number of other ranks; the port is closed when all are connected. None leaves it
                open.
        """
        self._others = others
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
    ) -> SideChannel:
        """Connect to rank 0, which may start later than this rank.

        Raises:
            OSError: no connection in time, or ``give_up`` returned true.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                line = socket.create_connection((address, port), timeout=min(10.0, seconds))
                break
            except OSError as error:
                if time.monotonic() > end or give_up():
                    raise OSError(
                        f"rank {self.rank} cannot reach rank 0 at {address}, port {port} "
                        f"({error}); the machines of a run must reach one another on all ports."
                    ) from error
                time.sleep(RETRY)
        self._take(line, rank=0)
        self.send({"rank": self.rank, "word": self._word.decode()})
        return self

    def connected(self) -> set[int]:
        """Connected ranks."""
        return {rank for rank in self._ranks.values() if rank is not None}

    def send(self, message: dict[str, Any]) -> None:
        """Send to rank 0, or from rank 0 to all. ``receive`` reports a lost connection, not this method."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for peer, rank in list(self._ranks.items()):
                try:
                    # A frozen process reads nothing, and its buffer fills up.
                    if rank is not None and peer.send(line) < len(line):
                        self.broken[rank] = "it reads nothing any more"
                        peer.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def receive(self, seconds: float) -> list[tuple[int, dict[str, Any] | None]]:
        """Messages of at most ``seconds``: (rank, message), and (rank, None) for a lost connection;
        ``broken`` has the reason if the network lost it."""
        if not self._selector.get_map():
            time.sleep(seconds)
            return []
        came: list[tuple[int, dict[str, Any] | None]] = []
        for key, _ in self._selector.select(seconds):
            # What an earlier one of this round brought may have closed it.
            if key.fileobj is self._server and self._server is not None:
                self._accept()
            elif key.fileobj in self._ranks:
                came += self._read(key.fileobj)
        # What does not send the secret in time goes, and the oldest where there are too many.
        late = time.monotonic() - GREET_WITHIN
        for line, since in list(self._since.items()):
            if since < late or len(self._since) > STRANGERS:
                self._drop(line)
        return came

    def close(self) -> None:
        """Close all connections."""
        for line in [*self._ranks, *([self._server] if self._server else [])]:
            line.close()
        self._ranks.clear()
        self._since.clear()
        self._selector.close()

    def _accept(self) -> None:
        line = None
        try:
            line, _ = self._server.accept()
            self._take(line, rank=None)
            self._since[line] = time.monotonic()
        except OSError:
            # It has closed already; or there are no descriptors left, and a retry must wait.
            if line is not None:
                line.close()
            time.sleep(0.01)

    def _take(self, line: socket.socket, *, rank: int | None) -> None:
        line.setblocking(False)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        pause = min(max(1, round(self._patience / (PROBES + 1))), LONGEST_PAUSE)
        # There are no probes while data is unacknowledged, as beats are: Linux then retries for
        # about 15 min unless TCP_USER_TIMEOUT is set, which also limits the probes.
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
            data = line.recv(MAX_LINE)
        except BlockingIOError:
            return []
        except OSError as error:
            data = b""
            # A process that ends while data to it is in flight resets its connection.
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
                    self._greet(line, message)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            data = b""
        if not data or len(rest) > (MAX_GREETING if line in self._since else MAX_LINE):
            rank = self._drop(line)
            if rank is not None:
                came.append((rank, None))
        return came

    def _greet(self, line: socket.socket, message: dict[str, Any]) -> None:
        """Take a connection for that of a rank, if it has the secret; ValueError otherwise."""
        rank = int(message["rank"])
        # In constant time: how long it takes does not tell how much of a guess is right.
        if not hmac.compare_digest(message["word"].encode(), self._word):
            raise ValueError("wrong secret")
        if rank in self.connected():
            raise ValueError("this rank is connected")
        self._ranks[line] = rank
        self._since.pop(line, None)
        if self._server is not None and len(self.connected()) == self._others:
            self._selector.unregister(self._server)
            self._server.close()
            self._server = None

    def _drop(self, line: socket.socket) -> int | None:
        """Close a connection; the rank it was that of."""
        self._selector.unregister(line)
        del self._unread[line]
        self._since.pop(line, None)
        line.close()
        return self._ranks.pop(line)
