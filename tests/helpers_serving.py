"""A server of exports without a process or a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2

from comoe.serving.app import make_app
from comoe.serving.limits import Limits
from comoe.serving.metrics import Metrics
from comoe.serving.models import Models, Source

Client = httpx2.AsyncClient


class Server:
    """The application of some exports."""

    def __init__(
        self,
        *sources: Source,
        host: str = "localhost",
        token: str | None = None,
        log_posts: bool = False,
        **limits: Any,
    ) -> None:
        self.limits = Limits(**limits)
        self.models = Models(sources, limits=self.limits, metrics=Metrics(), device="cpu")
        self.app = make_app(
            self.models, limits=self.limits, host=host, token=token, log_posts=log_posts
        )

    def run(self, work: Callable[[Client], Coroutine]) -> Any:
        """The result of ``work`` with a client of this server."""

        async def within() -> Any:
            transport = httpx2.ASGITransport(app=self.app)
            async with Client(transport=transport, base_url="http://localhost") as client:
                return await work(client)

        return asyncio.run(within())

    def ask(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        """One request: of an object, of bytes as they are, or without a body."""
        if not isinstance(body, bytes | None):
            body = json.dumps(body).encode()
        options.setdefault("headers", {"content-type": "application/json"})
        method = "GET" if body is None else "POST"
        return self.run(lambda client: client.request(method, path, content=body, **options))
