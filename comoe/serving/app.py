"""The routes of the server."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException

from comoe import __version__
from comoe.inference.explain import ATTENTION, GRADIENTS, METHODS, check_explained, method_of
from comoe.serving.batcher import Closed, QueueFull
from comoe.serving.guard import Guard, Problem
from comoe.serving.limits import Limits
from comoe.serving.messages import (
    Answer,
    Ask,
    EmbedQuestion,
    ExplainQuestion,
    Listing,
    Question,
    Refusal,
)
from comoe.serving.models import EMBED, PREDICT, Models, Served
from comoe.tasks.task import Task

LOG = logging.getLogger("comoe.serving")

PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/api": ("api.html", "text/html; charset=utf-8"),
    "/api.js": ("api.js", "text/javascript; charset=utf-8"),
}
"""Path -> file in ``comoe/serving/page`` and its type."""

ROUTES = (
    "/v1/predict", "/v1/explain", "/v1/embed", "/v1/tasks", "/metrics", "/healthz", "/readyz", "/openapi.json", *PAGES
)  # fmt: skip
"""Counted by name; all other paths together."""

MOST_FAULTS = 5
"""Faults of a request that its answer names."""

MEANINGS = {
    400: "The request is not JSON.",
    401: "The bearer token is missing or wrong.",
    404: "No such model, revision or page.",
    408: "The body came too slowly.",
    413: "Too many bytes, posts or characters.",
    415: "The content type is not JSON.",
    422: "JSON with something wrong in it.",
    429: "Too much is waiting; Retry-After has the seconds.",
    504: "The time was up.",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": meaning} for status, meaning in MEANINGS.items()
}


WORDS = {
    400: ("not_json", "The body is not JSON"),
    404: ("not_found", "There is no such page"),
    405: ("method", "The page wants another method"),
}
"""Status -> what the framework's own refusals say."""


def make_app(
    models: Models,
    *,
    limits: Limits,
    host: str = "localhost",
    token: str | None = None,
    log_posts: bool = False,
) -> Guard:
    """The ASGI application.

    Args:
        models: to serve.
        limits: of requests.
        host: that the server listens at.
        token: that requests must bear; None wants none.
        log_posts: write posts and predictions into the log.
    """
    # The guard compares the token; this one tells the page of the API.
    bearer = [Depends(HTTPBearer(auto_error=False))] * (token is not None)
    app = FastAPI(
        title="comoe",
        version=__version__,
        summary="Predictions, explanations and embeddings of posts.",
        docs_url=None,
        redoc_url=None,
    )
    _add_questions(app, _Handler(models, limits, log_posts=log_posts), bearer)
    _add_state(app, models, bearer)
    _add_pages(app)
    _add_refusals(app)
    return Guard(app, limits=limits, metrics=models.metrics, host=host, token=token, routes=ROUTES)


class _Handler:
    """Posts of a request to predictions: sizes, model, tasks, queue, time."""

    def __init__(self, models: Models, limits: Limits, *, log_posts: bool) -> None:
        self._models, self._limits, self._log_posts = models, limits, log_posts

    async def __call__(
        self, request: Request, what: str, ask: Ask, names: Sequence[str] | None
    ) -> JSONResponse:
        posts = self._posts(ask, what)
        served, tasks, job = self._submit(what, ask, posts, names)
        left = self._limits.timeout - (time.monotonic() - request.state.arrived)
        try:
            async with asyncio.timeout(left):
                results = await asyncio.wrap_future(job)
        except TimeoutError:
            limit = f"{self._limits.timeout:g} seconds"
            raise Problem(504, "time", f"There was no answer within {limit}.") from None
        self._models.metrics.predictions(served.source.name, tasks, results)
        if self._log_posts:
            for post, result in zip(posts, results, strict=True):
                shown = {key: value for key, value in post.items() if key != "image" and value}
                LOG.info("%s", json.dumps({**shown, **result}))
        return JSONResponse(
            {"model": served.source.name, "revision": served.revision, "predictions": results}
        )

    def _posts(self, ask: Ask, what: str) -> list[dict[str, Any]]:
        limits = self._limits
        if what == GRADIENTS and len(ask.posts) > limits.max_gradients:
            few = f"{limits.max_gradients} posts to explain by gradients"
            message = f"A request may have {few}; this one has {len(ask.posts)}."
            raise Problem(413, "too_large", message)
        if len(ask.posts) > limits.max_posts:
            message = f"A request may have {limits.max_posts} posts; this one has {len(ask.posts)}."
            raise Problem(413, "too_large", message)
        posts = ask.as_objects()
        for number, post in enumerate(posts):
            if (size := post.characters()) > limits.max_characters:
                message = f"posts.{number} has {size} characters; at most {limits.max_characters} are read."
                raise Problem(413, "too_large", message)
        return [post.columns() for post in posts]

    def _submit(
        self, what: str, ask: Ask, posts: list[dict[str, Any]], names: Sequence[str] | None
    ) -> tuple[Served, list[Task], Future]:
        key = (what, None if names is None else tuple(names))
        for _ in range(10):
            served, tasks = self._find(what, ask, posts, names)
            # One task is enough to read posts that are embedded.
            reading = tasks[:1] if what == EMBED else tasks
            rows = served.predictor.collator.rows_per_post(reading)
            tokens = [served.tokens(post, rows, what, tasks) for post in posts]
            try:
                return served, tasks, served.batcher.submit(key, posts, tokens)
            except QueueFull as full:
                message = "Too many posts are waiting; try later."
                raise Problem(429, "busy", message, retry_after=str(full.seconds)) from None
            except Closed:
                continue  # a newer revision has just taken over
        message = "The model takes no requests: the server is shutting down, or its log says why."
        raise Problem(503, "closing", message)

    def _find(
        self, what: str, ask: Ask, posts: list[dict[str, Any]], names: Sequence[str] | None
    ) -> tuple[Served, list[Task]]:
        try:
            served = self._models.find(ask.model, ask.revision)
            tasks = served.predictor.choose_tasks(names)
            # What attention cannot explain is predicted without it, as ever.
            if what in METHODS and what != ATTENTION:
                check_explained(method_of(what), tasks, served.predictor.exported.model)
        except LookupError as error:
            raise Problem(404, "unknown_model", f"{error}.") from None
        except ValueError as error:
            raise Problem(422, "invalid", f"{str(error).removesuffix('.')}.") from None
        if not served.reads_images and any(post["image"] is not None for post in posts):
            raise Problem(422, "invalid", "This model reads no images; leave them out.")
        return served, tasks


def _add_questions(app: FastAPI, handler: _Handler, bearer: list[Any]) -> None:
    options: dict[str, Any] = {
        "dependencies": bearer,
        "response_model": Answer,
        "responses": REFUSALS,
    }

    @app.post("/v1/predict", **options)
    async def predict(request: Request, ask: Question) -> Response:
        """Predict every task of every post."""
        return await handler(request, PREDICT, ask, ask.tasks)

    @app.post("/v1/explain", **options)
    async def explain(request: Request, ask: ExplainQuestion) -> Response:
        """Predictions with what explains them: attention of the head, gradients of the words, or their experts."""
        return await handler(request, ask.method, ask, ask.tasks)

    @app.post("/v1/embed", **options)
    async def embed(request: Request, ask: EmbedQuestion) -> Response:
        """A vector of length 1 for every post: the mean of the encoder's last states."""
        return await handler(request, EMBED, ask, None if ask.task is None else [ask.task])


def _add_state(app: FastAPI, models: Models, bearer: list[Any]) -> None:
    refusals = {401: REFUSALS[401]}

    @app.get("/v1/tasks", response_model=Listing, dependencies=bearer, responses=refusals)
    async def tasks() -> Response:
        """All served models and revisions, with their tasks."""
        return JSONResponse({"models": [served.describe() for served in models]})

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=bearer, responses=refusals)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(models.metrics.page(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/healthz", response_model=dict[str, str])
    async def healthz() -> Response:
        """Whether the process answers."""
        return JSONResponse({"status": "ok"})

    @app.get(
        "/readyz", response_model=dict[str, str], responses={503: {"description": "Not ready."}}
    )
    async def readyz() -> Response:
        """Whether all models work."""
        ready = models.ready()
        return JSONResponse({"status": "ready" if ready else "failed"}, 200 if ready else 503)


def _add_pages(app: FastAPI) -> None:
    folder = files("comoe.serving") / "page"
    for path, (name, media_type) in PAGES.items():
        content = (folder / name).read_bytes()

        async def page(
            request: Request, content: bytes = content, media_type: str = media_type
        ) -> Response:
            return Response(content, media_type=media_type)

        app.add_route(path, page, include_in_schema=False)


def _add_refusals(app: FastAPI) -> None:
    def response(problem: Problem) -> Response:
        headers = {name.decode(): value.decode() for name, value in problem.headers}
        return Response(problem.body(), problem.status, headers, "application/json")

    @app.exception_handler(Problem)
    async def refused(request: Request, problem: Problem) -> Response:
        return response(problem)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return response(_problem_of(error, request.headers.get("content-type", "")))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        status = error.status_code
        code, message = WORDS.get(status, ("refused", error.detail))
        return response(Problem(status, code, f"{message}.", **(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # The guard, which the exception goes on to, logs it.
        return response(Problem(500, "internal", "The server failed; its log says where."))


def _problem_of(error: RequestValidationError, content_type: str) -> Problem:
    """The faults with their places; never what stands there."""
    faults = error.errors()
    if any(fault["type"] == "json_invalid" for fault in faults):
        return Problem(400, "not_json", "The body is not JSON.")
    if "json" not in content_type:
        return Problem(
            415, "not_json", "Send JSON, with the header 'Content-Type: application/json'."
        )
    messages = []
    for fault in faults[:MOST_FAULTS]:
        place = [
            str(part)[:40] for part in fault["loc"][1:] if part not in ("string", "object", "list")
        ]
        # pydantic speaks of Python's dictionaries.
        wrong = fault["type"] == "model_attributes_type"
        rule = "must be an object, or a string where it is a post" if wrong else fault["msg"]
        messages.append(f"{'.'.join(place) or 'body'}: {rule.removeprefix('Value error, ')}")
    more = len(faults) - MOST_FAULTS
    return Problem(422, "invalid", "; ".join(messages) + (f"; and {more} more" if more > 0 else ""))
