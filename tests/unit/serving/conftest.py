"""A tiny export, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_export import export_tiny
from helpers_serving import Server

from comoe.serving.models import Source


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    export_tiny(folder)
    return folder / "export"


@pytest.fixture(scope="session")
def server(export: Path) -> Iterator[Server]:
    made = Server(
        Source("tiny", export), max_bytes=4000, max_posts=4, max_characters=100, batch_wait=0,
        max_gradients=2,
    )  # fmt: skip
    yield made
    made.models.close()
