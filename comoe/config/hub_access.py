"""Whether the Hugging Face hub has an address here: without one its libraries ask again and again, for minutes."""

from __future__ import annotations

import contextlib
import importlib
import socket
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, urlopen

SWITCHES = ("huggingface_hub.constants", "datasets.config")
"""Modules with a switch ``HF_HUB_OFFLINE``; the second may not be installed."""


@contextlib.contextmanager
def cached_where_unreachable(name: str) -> Iterator[None]:
    """Inside, what is asked of the hub comes from the cache or fails at once where its host has no address.

    Behind a proxy nothing is known, and the libraries ask as always.

    Args:
        name: of what is loaded; a folder needs no hub.
    """
    from huggingface_hub import constants

    known = constants.HF_HUB_OFFLINE or Path(name).expanduser().exists() or getproxies()
    if known or _has_address(constants.ENDPOINT):
        yield
        return
    changed = []
    for name in SWITCHES:
        with contextlib.suppress(ImportError):
            changed.append(importlib.import_module(name))
    for module in changed:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module in changed:
            module.HF_HUB_OFFLINE = False


def why_unreachable(*, seconds: float = 5.0) -> str:
    """Why the hub does not answer here; empty where it does. It is asked once, through a proxy where one is set.

    Args:
        seconds: to wait for its answer.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=seconds):
            return ""
    except HTTPError:
        return ""  # an answer
    except (OSError, HTTPException, ValueError) as error:
        return str(getattr(error, "reason", None) or error or type(error).__name__)


def _has_address(url: str) -> bool:
    place = urlsplit(url)
    try:
        return bool(socket.getaddrinfo(place.hostname, place.port or 443))
    except (OSError, UnicodeError):
        return False
