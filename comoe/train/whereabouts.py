"""Where the ranks of a run are: machine and process, and the line of code that a rank stands at."""

from __future__ import annotations

import os
import socket
import sys
import threading
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank runs."""

    machine: str
    """Name of the machine."""
    node: str
    """Its number in the run; two of the same name differ in it."""
    pid: int
    """Number of the process there."""
    born: float
    """When the process began: the number may be somebody else's later."""


def own_place() -> Place:
    """This process."""
    node = os.environ.get("CROSS_RANK", "0")
    return Place(socket.gethostname(), node, os.getpid(), psutil.Process().create_time())


def kill(place: Place) -> None:
    """End a process of this machine that is frozen: it cannot end by itself, and a launcher waits half a minute."""
    try:
        process = psutil.Process(place.pid)
        if process.create_time() == place.born:
            process.kill()
    except psutil.Error:
        return


def where_main_thread_is() -> str:
    """File, line and function of ours that the main thread is in, and the innermost; empty in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost, ours = "", ""
    while frame is not None and not ours:
        name = frame.f_code.co_filename
        if "/torch/distributed/" in name:
            return ""
        said = f"{name.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        innermost = innermost or said
        ours = said if "/comoe/" in name else ""
        frame = frame.f_back
    return innermost if ours in ("", innermost) else f"{ours} > {innermost}"
