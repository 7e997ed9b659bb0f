"""The process of a server: socket, signals, log, and uvicorn."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import disable_created_metrics

from comoe.serving.app import make_app
from comoe.serving.guard import Receive, Scope, Send
from comoe.serving.limits import Limits
from comoe.serving.metrics import Metrics
from comoe.serving.models import Models, read_source

LOG = logging.getLogger("comoe.serving")

SHORTEST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen, and who may ask."""

    host: str
    port: int
    token: str | None

    def __post_init__(self) -> None:
        if self.token is not None and not (
            len(self.token) >= SHORTEST_TOKEN and self.token.isascii() and self.token.isprintable()
        ):
            raise ValueError(
                f"the token must have at least {SHORTEST_TOKEN} printable ASCII characters: "
                "python -c 'import secrets; print(secrets.token_urlsafe())' makes one."
            )
        if self.token is None and not _is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached from other machines; give a token (--token-file, or COMOE_TOKEN)."
            )


def read_token(file: Path | None, environment: str | None) -> str | None:
    """The token of a file, else of the environment; blanks around it do not count.

    Raises:
        ValueError: a file that cannot be read.
    """
    try:
        token = environment if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token-file {file} cannot be read ({error}).") from error
    return None if token is None else token.strip()


def serve(
    exports: Sequence[str],
    address: Address,
    *,
    limits: Limits,
    watch: float = 0.0,
    log_posts: bool = False,
    **options: Any,
) -> None:
    """Serve until SIGTERM or SIGINT; what runs then is finished first.

    Args:
        exports: ``[NAME=]FOLDER`` each.
        address: host, port, token.
        limits: of requests.
        watch: seconds between looks for new revisions; 0 looks at SIGHUP only.
        log_posts: write posts and predictions into the log.
        options: device, verify, backend and threads of ``Predictor.from_pretrained``.

    Raises:
        ValueError: an export that cannot be read, or an address that cannot be used.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    LOG.setLevel(logging.INFO)
    disable_created_metrics()
    sources = [read_source(word) for word in exports]
    if hasattr(signal, "SIGHUP"):  # its default would end the process while models load
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with _bound(address) as bound:
        models = Models(sources, limits=limits, metrics=Metrics(), **options)
        app = make_app(
            models, limits=limits, host=address.host, token=address.token, log_posts=log_posts
        )
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, proxy_headers=False, ws="none",
            lifespan="off", timeout_graceful_shutdown=int(limits.timeout) + 1,
        )  # fmt: skip
        # uvicorn raises the signal once more when it has ended: the default would kill the process.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        _Server(config, models, watch).run([bound])
        models.close()
        LOG.info("stopped")


class _Server(uvicorn.Server):
    """Looks for new revisions, and says where it listens."""

    def __init__(self, config: uvicorn.Config, models: Models, watch: float) -> None:
        config.app = self._parting(config.app)
        super().__init__(config)
        self._models, self._watch = models, watch
        self._background: set[asyncio.Task[None]] = set()

    def _parting(self, app: Callable) -> Callable:
        """The application; once the server is told to end, its answers say that the connection closes."""

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            async def last(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start" and self.should_exit:
                    # Else a client would send its next request into a connection that is gone.
                    closing = (b"connection", b"close")
                    message = {**message, "headers": [*message.get("headers", ()), closing]}
                await send(message)

            await app(scope, receive, last)

        return call

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to look."""
        await super().startup(sockets)
        if sys.platform != "win32":  # which has no such signal
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, lambda: self._begin(self._reload(retry=True)))
        if self._watch:
            self._begin(self._look())
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        names = ", ".join(f"{one.source.name} {one.revision}" for one in self._models)
        LOG.info("serving %s at http://%s:%s", names, host, port)

    def _begin(self, coroutine) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _reload(self, *, retry: bool) -> None:
        await asyncio.to_thread(self._models.reload, retry=retry)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._watch)
            await self._reload(retry=False)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(address: Address) -> socket.socket:
    """A socket, bound before the models are read, which takes long; it listens when they are."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen at {address.host} port {address.port} ({error}); choose others with --host and --port."
        ) from error
    return bound
