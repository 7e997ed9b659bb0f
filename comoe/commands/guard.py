"""What every command makes of errors: one sentence, an exit code, the traceback in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from comoe.config.failure import behind, is_foreign, keep_traceback, sentence
from comoe.config.terminal import safe_streams

GOES_ON = "stopped; the same command goes on"
"""What a command that keeps what is done says after Ctrl-C."""

OURS, MISTAKE, INTERRUPTED = 1, 2, 130
"""Exit codes: an error of ours, one that the user can mend, Ctrl-C."""


@contextlib.contextmanager
def guarded(word: str, *, interrupted: str = "interrupted") -> Iterator[None]:
    """Around the ``main`` of ``comoe word``, also as decorator: no error leaves it as a traceback.

    ``ValueError`` and errors of the system are the user's to mend: one sentence, exit code 2.
    Anything else is ours: one sentence that names the log with the traceback, exit code 1.

    Args:
        word: of the command.
        interrupted: what to say after Ctrl-C.
    """
    with safe_streams(), _quiet_threads():
        try:
            yield
        except (ValueError, OSError) as error:
            where = keep_traceback(word, _logs) if is_foreign(error) else ""
            _end(word, f"{sentence(error)} {where}".rstrip(), MISTAKE)
        except KeyboardInterrupt:
            _end(word, f"{interrupted}.", INTERRUPTED)
        except MemoryError:
            _end(word, "out of memory; use a smaller --batch-size, or a machine with more.", OURS)
        except Exception as error:
            where = keep_traceback(word, _logs)
            if isinstance(known := behind(error), OSError):
                _end(word, f"{sentence(known)} {where}".rstrip(), MISTAKE)
            found = f"unexpected {type(error).__name__}: {sentence(error)}"
            _end(word, f"{found}. {where} Please report it with what you did.", OURS)


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """A thread of a library that fails, as TensorBoard's on a full disk, is a warning."""

    def warn(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None:
            print(f"warning: a thread has ended: {sentence(ended.exc_value)}", file=sys.stderr)

    before, threading.excepthook = threading.excepthook, warn
    try:
        yield
    finally:
        threading.excepthook = before


def _end(word: str, message: str, code: int) -> NoReturn:
    ended = SystemExit(f"comoe {word}: {message}")
    print(ended, file=sys.stderr)
    ended.code = code
    raise ended


def _logs() -> Path:
    from comoe.starter.registry import home

    return home() / "logs"
