"""Several models and revisions, and a new one that takes over while requests run."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
from pathlib import Path

import pytest
from helpers_export import export_tiny
from helpers_serving import Client, Server

from comoe.serving import run
from comoe.serving.limits import Limits
from comoe.serving.models import Models, Source, read_source, revision_of
from comoe.serving.run import Address, read_token


def exported(folder: Path, *, seed: int) -> Path:
    export_tiny(folder, seed=seed)
    return folder / "export"


def test_a_model_has_a_name_and_a_folder(tmp_path: Path) -> None:
    assert read_source("news=runs/a/export") == Source("news", Path("runs/a/export"))
    assert read_source(f"{tmp_path}/run/export").name == "run"
    assert read_source(f"{tmp_path}/exported/").name == "exported"
    assert read_source("news=runs/lr=1/export") == Source("news", Path("runs/lr=1/export"))
    there = tmp_path / "lr=1" / "export"
    there.mkdir(parents=True)
    assert read_source(str(there)) == Source("lr=1", there)
    for word in ("", "news=", "=folder"):
        with pytest.raises(ValueError, match="give FOLDER or NAME=FOLDER"):
            read_source(word)


def test_the_revision_is_that_of_the_content(export: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(export, tmp_path / "copy")
    assert revision_of(copy) == revision_of(export)
    assert revision_of(exported(tmp_path, seed=1)) != revision_of(export)
    (copy / "manifest.json").unlink()  # as older versions left it
    before = revision_of(copy)
    (copy / "model.safetensors").write_bytes(b"")
    assert revision_of(copy) != before
    with pytest.raises(ValueError, match="is not an export"):
        revision_of(tmp_path)


def test_models_and_revisions_are_chosen_by_name(export: Path, tmp_path: Path) -> None:
    other = exported(tmp_path, seed=1)
    server = Server(Source("news", export), Source("news", other), Source("blogs", export))
    first, last = revision_of(export), revision_of(other)

    def chosen(**asked: str) -> tuple[str, str]:
        answer = server.ask("/v1/predict", {"posts": ["good"], **asked}).json()
        return answer["model"], answer["revision"]

    assert chosen() == chosen(model="news") == ("news", last)
    assert chosen(revision=first) == ("news", first)
    assert chosen(model="blogs") == ("blogs", first)
    assert len(server.ask("/v1/tasks").json()["models"]) == 3
    server.models.close()


def test_a_new_revision_takes_over_and_no_request_is_lost(tmp_path: Path) -> None:
    export = exported(tmp_path / "served", seed=0)
    old, changed = revision_of(export), exported(tmp_path / "next", seed=1)
    new = revision_of(changed)
    server = Server(Source("tiny", export))
    (before,) = server.models

    async def ask_on(client: Client, revisions: list[str]) -> None:
        while revisions.count(new) < 3:
            answer = await client.post("/v1/predict", json={"posts": ["good", "bad day"]})
            assert answer.status_code == 200, answer.text
            revisions.append(answer.json()["revision"])

    async def exchange(client: Client) -> list[list[str]]:
        seen: list[list[str]] = [[] for _ in range(4)]
        asking = [asyncio.create_task(ask_on(client, revisions)) for revisions in seen]
        while not all(seen):
            await asyncio.sleep(0.01)
        shutil.rmtree(export)
        changed.rename(export)
        await asyncio.to_thread(server.models.reload)
        await asyncio.wait_for(asyncio.gather(*asking), 60)
        return seen

    for revisions in server.run(exchange):
        assert revisions == sorted(revisions, key=[old, new].index)
        assert set(revisions) == {old, new}
    assert not before.batcher.alive(), "the old revision is gone when its queue is empty"
    page = server.ask("/metrics").text
    assert 'comoe_reloads_total{model="tiny",outcome="loaded"} 1.0' in page
    assert new in page and old not in page
    refused = server.ask("/v1/predict", {"posts": ["good"], "revision": old})
    assert refused.status_code == 404
    server.models.close()


def test_a_broken_revision_changes_nothing(
    export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(export, tmp_path / "copy")
    server = Server(Source("tiny", copy))
    for break_it in (
        lambda: (copy / "manifest.json").write_text('{"files": {}}'),
        lambda: shutil.rmtree(copy),
    ):
        break_it()
        server.models.reload()
        assert "tiny stays at " in caplog.messages[-1]
        assert server.ask("/v1/predict", {"posts": ["good"]}).status_code == 200
    assert 'outcome="failed"} 2.0' in server.ask("/metrics").text
    server.models.close()


def test_a_revision_that_failed_is_loaded_again_when_asked_or_changed(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(export, tmp_path / "copy")
    server = Server(Source("tiny", copy))
    loads: list[str] = []

    def load(models: Models, source: Source, revision: str) -> None:
        loads.append(revision)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Models, "_load", load)
    shutil.rmtree(copy)
    exported(tmp_path / "next", seed=1).rename(copy)
    for retry, times in ((False, 1), (False, 1), (True, 2), (False, 2)):
        server.models.reload(retry=retry)
        assert loads == [revision_of(copy)] * times
    (copy / "model.safetensors").touch()  # the rest of a copy arrives
    server.models.reload(retry=False)
    assert len(loads) == 3
    assert "tiny stays at " in caplog.text and "RuntimeError: out of memory" in caplog.text
    assert 'outcome="failed"} 3.0' in server.ask("/metrics").text
    server.models.close()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of Unix")
def test_a_look_for_revisions_while_models_load_is_ignored(
    export: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="comoe.serving")  # which the server sets too
    handlers: list[object] = []

    def load(*values: object, **named: object) -> None:
        handlers.append(signal.getsignal(signal.SIGHUP))
        raise ValueError("enough")

    monkeypatch.setattr(run, "Models", load)
    before = signal.getsignal(signal.SIGHUP)
    try:
        with pytest.raises(ValueError, match="enough"):
            run.serve([str(export)], Address("127.0.0.1", 0, None), limits=Limits())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert handlers == [signal.SIG_IGN]


@pytest.mark.parametrize(
    "host, token, message",
    [
        ("0.0.0.0", None, "--host 0.0.0.0 can be reached from other machines; give a token"),
        ("example.org", None, "can be reached from other machines"),
        ("127.0.0.1", "short", "the token must have at least 16 printable ASCII characters"),
        ("127.0.0.1", "a token with an \u00e9", "printable ASCII"),
    ],
)
def test_other_machines_need_a_token(host: str, token: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Address(host, 8000, token)


def test_who_may_ask(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert Address(host, 0, None).token is None
    (tmp_path / "token").write_text("of-a-file-000000\n")
    assert read_token(tmp_path / "token", "environment") == "of-a-file-000000"
    assert read_token(None, " environment ") == "environment" and read_token(None, None) is None
    with pytest.raises(ValueError, match="--token-file .* cannot be read"):
        read_token(tmp_path / "none", None)
