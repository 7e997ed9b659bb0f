"""Which tests one process takes under ``-n 2 --dist loadgroup``: a file's, and those of files that share a long run."""

from __future__ import annotations

import pytest

SHARED = ("smoke_run", "uninterrupted")
"""Fixtures of the whole session; each process that needs one makes its own."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the group of every test."""
    groups: dict[str, str] = {}
    for item in items:
        for name in set(SHARED) & set(getattr(item, "fixturenames", ())):
            groups[str(item.path)] = name
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups.get(str(item.path), str(item.path))))
