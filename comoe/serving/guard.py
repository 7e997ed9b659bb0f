"""What stands before the routes: sizes, the token, hosts, headers, and the log. Plain ASGI.

A body of ``/v1`` is read here, whole and bounded, before the application sees the request; other
paths get none. An exception ends here: as 500 without a word of it in the answer, and without its
message in the log, which may repeat a post.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from comoe.serving.limits import Limits
from comoe.serving.metrics import Metrics

LOG = logging.getLogger("comoe.serving")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HEADERS = (
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
     b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)  # fmt: skip
"""Of every answer."""

LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Names by which a browser may call a server of this machine that wants no token, besides the
address that it listens at: a foreign page cannot borrow them."""


class Problem(Exception):
    """Why a request is not fulfilled: status, a word for programs, a sentence for people."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = [
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        ]

    def body(self) -> bytes:
        """As JSON."""
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode()


class Guard:
    """Wraps the application.

    Args:
        app: the routes.
        limits: of requests.
        metrics: counts.
        host: that the server listens at.
        token: that ``/v1`` and ``/metrics`` want; None wants none, and refuses to be called by any
            name but ``LOCAL`` and ``host``.
        routes: paths that are counted by name.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        limits: Limits,
        metrics: Metrics,
        host: str,
        token: str | None,
        routes: Iterable[str],
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._names = LOCAL | {f"[{host}]" if ":" in host else host}
        self._token = None if token is None else token.encode()
        self._routes = frozenset(routes)
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived, status = time.monotonic(), 0
        route = scope["path"] if scope["path"] in self._routes else "other"

        async def respond(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        try:
            await self._serve(scope, receive, respond, arrived)
        except Problem as problem:
            await _refuse(respond, problem)
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__))
            LOG.error("%s in %s\n%s", type(error).__name__, route, where)
            if not status:
                await _refuse(
                    respond, Problem(500, "internal", "The server failed; its log says where.")
                )
        finally:
            seconds = time.monotonic() - arrived
            self._metrics.requests.labels(route, status).inc()
            self._metrics.latency.labels(route).observe(seconds)
            LOG.info("%s %s %s %.1f ms", scope["method"], route, status, 1000 * seconds)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, arrived: float) -> None:
        headers = dict(scope["headers"])
        self._check(scope["path"], headers)
        # Other paths want no token: they must not take the room of those that do.
        counted = scope["path"].startswith("/v1/")
        if counted and self._running >= self._limits.requests:
            raise Problem(429, "busy", "Too many requests at once; try later.", retry_after="1")
        self._running += counted
        try:
            body = await self._read(headers, receive, arrived) if counted else b""
            unread = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> MutableMapping[str, Any]:
                return unread.pop() if unread else await receive()

            scope.setdefault("state", {})["arrived"] = arrived
            await self._app(scope, replay, send)
        finally:
            self._running -= counted

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._token is None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in self._names:
                raise Problem(
                    421, "wrong_host", "Without a token this server answers to localhost only."
                )
        elif path.startswith("/v1/") or path == "/metrics":
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            bears = scheme.lower() == b"bearer"
            if not (hmac.compare_digest(given.strip(), self._token) and bears):
                raise Problem(
                    401, "token", "Send the header 'Authorization: Bearer TOKEN'.", www_authenticate="Bearer"
                )  # fmt: skip

    async def _read(self, headers: dict[bytes, bytes], receive: Receive, arrived: float) -> bytes:
        limit = self._limits.max_bytes
        length = headers.get(b"content-length", b"0")
        large = Problem(413, "too_large", f"The body must have at most {limit} bytes.")
        if not length.isdigit() or int(length[:20]) > limit:
            raise large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.timeout - (time.monotonic() - arrived)):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Problem(408, "slow", "The body came too slowly.") from None


async def _refuse(send: Send, problem: Problem) -> None:
    body = problem.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send(
        {"type": "http.response.start", "status": problem.status, "headers": headers + problem.headers}
    )  # fmt: skip
    await send({"type": "http.response.body", "body": body})
