"""``comoe serve`` as a process: it answers, takes a new revision at SIGHUP, and finishes what runs at SIGTERM."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from comoe.serving.models import revision_of
from tests.end_to_end.commands import TIMEOUT, Terminal, Typed
from tests.helpers_export import export_tiny

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_core]

SECRET = "good private day"
TOKEN = "a-token-of-the-tests"


def wait_until(found: Callable[[], Any], typed: Typed) -> Any:
    end = time.monotonic() + TIMEOUT
    while not (value := found()):
        assert time.monotonic() < end and typed.process.poll() is None, typed.output("err")
        time.sleep(0.05)
    return value


def start(terminal: Terminal, *words: str | Path) -> tuple[Typed, str]:
    """The command, and its address when it listens."""
    command = [sys.executable, "-m", "comoe", "serve", "--port", "0", "--device", "cpu", *words]
    typed = terminal.start(*command)
    log = wait_until(lambda: re.search(r"serving .* at (http://\S+)", typed.output("err")), typed)
    return typed, log[1]


def ask(address: str, *posts: str, path: str = "/v1/predict", **headers: str) -> dict[str, Any]:
    body = json.dumps({"posts": posts}).encode() if posts else None
    headers["Content-Type"] = "application/json"
    request = urllib.request.Request(address + path, body, headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return json.load(answer)


def ask_on(address: str, post: str) -> tuple[str | None, dict[str, Any]]:
    """One request of a connection that may have more: what the answer says of it, and the answer."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=TIMEOUT)
    body = json.dumps({"posts": [post]})
    connection.request("POST", "/v1/predict", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.getheader("connection"), json.load(answer)


def test_it_answers_takes_a_new_revision_and_finishes_what_runs(
    terminal: Terminal, tmp_path: Path
) -> None:
    for name, seed in (("old", 0), ("new", 1)):
        export_tiny(tmp_path / name, seed=seed)
    export, new = tmp_path / "old/export", revision_of(tmp_path / "new/export")
    typed, address = start(terminal, f"news={export}", "--batch-wait", "1500")
    assert address.startswith("http://127.0.0.1:")
    assert ask(address, path="/readyz") == {"status": "ready"}
    first = ask(address, SECRET, "bad rain")
    assert first["revision"] == revision_of(export) and len(first["predictions"]) == 2

    shutil.rmtree(export)
    (tmp_path / "new/export").rename(export)
    with ThreadPoolExecutor() as pool:
        # Both wait for company while the model changes, and while the server ends.
        running = pool.submit(ask, address, SECRET)
        typed.process.send_signal(signal.SIGHUP)
        wait_until(lambda: f"{new} takes over" in typed.output("err"), typed)
        assert running.result()["revision"] in (first["revision"], new)
        running = pool.submit(ask_on, address, SECRET)
        time.sleep(0.5)
        typed.process.send_signal(signal.SIGTERM)
        parting, answer = running.result()
        assert parting == "close" and answer["revision"] == new
    done = typed.wait()
    assert done.code == 0 and done.err.rstrip().endswith("stopped")
    assert SECRET not in done.out + done.err and done.err.count("POST /v1/predict 200") == 3


def test_a_token_of_the_environment_is_wanted(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_tiny(tmp_path)
    (tmp_path / "token").write_text(TOKEN)
    words = ("--token-file", tmp_path / "token", "--watch", "0.2")
    typed, address = start(terminal, tmp_path / "export", *words)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, "good day")
    assert refused.value.code == 401
    assert ask(address, "good day", Authorization=f"Bearer {TOKEN}")["predictions"]
    export_tiny(tmp_path, seed=1)
    new = revision_of(tmp_path / "export")
    wait_until(lambda: f"{new} takes over" in typed.output("err"), typed)
    typed.process.send_signal(signal.SIGINT)
    assert typed.wait().code == 0


def test_what_cannot_be_served_is_said_in_one_sentence(terminal: Terminal, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, message in (
            (
                ("--port", port),
                f"cannot listen at 127.0.0.1 port {port} .*choose others with --host",
            ),
            (("--port", "0"), "is not an export: config.json and model.safetensors missing"),
        ):
            done = terminal.run(sys.executable, "-m", "comoe", "serve", tmp_path, *words)
            assert done.code == 2 and re.match(f"comoe serve: .*{message}", done.err), done.err
            assert len(done.err.splitlines()) == 1
