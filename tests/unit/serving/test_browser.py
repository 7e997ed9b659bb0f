"""The page in a real browser without a window, driven over its debugging pipe (Chrome DevTools Protocol)."""

from __future__ import annotations

import base64
import fcntl
import io
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from helpers_serving import Server
from PIL import Image

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")

FLAGS = (
    "--headless --remote-debugging-pipe --no-sandbox --disable-gpu --disable-dev-shm-usage "
    "--disable-background-networking --no-first-run --window-size=900,900"
).split()

WAIT = """new Promise((done, fail) => {
  const end = Date.now() + 30000;
  const look = () => (%s) ? done(true) : Date.now() > end ? fail(new Error("never")) : setTimeout(look, 20);
  look();
})"""


class Tab:
    """A page of a browser of its own."""

    def __init__(self, profile: Path) -> None:
        ours, theirs = zip(*(os.pipe() for _ in range(2)), strict=True)
        inner = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0], theirs[1])]
        for end in (ours[0], theirs[1]):
            os.close(end)
        # It reads from number 3 and writes to number 4.
        words = [PROGRAM, *FLAGS, f"--user-data-dir={profile}"]
        shell = f'exec "$@" 3<&{inner[0]} 4>&{inner[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *words], pass_fds=inner, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in inner:
            os.close(end)
        self.writer, self.reader = os.fdopen(theirs[0], "wb"), os.fdopen(ours[1], "rb")
        self.numbers, self.session = itertools.count(1), {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to one command."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": params, **self.session}
        self.writer.write(json.dumps(command).encode() + b"\0")
        self.writer.flush()
        while True:
            text = bytearray()
            while (byte := self.reader.read(1)) != b"\0":
                assert byte, "the browser ended"
                text += byte
            found = json.loads(text)
            if found.get("id") == number:
                assert "error" not in found, found
                return found["result"]

    def value(self, expression: str) -> Any:
        """Of JavaScript in the page, awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until it is true in the page, at most half a minute."""
        self.value(WAIT % expression)

    def picture(self) -> Image.Image:
        """What is to be seen."""
        data = self.call("Page.captureScreenshot")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def close(self) -> None:
        """End the browser."""
        self.process.kill()
        self.process.wait()
        self.writer.close()
        self.reader.close()


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    made = Tab(tmp_path / "profile")
    yield made
    made.close()


@pytest.fixture
def address(server: Server) -> Iterator[str]:
    """Of the server, on a port of the loopback."""
    web = uvicorn.Server(uvicorn.Config(server.app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=web.run)
    thread.start()
    while not web.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    web.should_exit = True
    thread.join()


def shares(picture: Image.Image) -> int:
    """Colors of a picture."""
    return len(picture.getcolors(picture.width * picture.height))


def test_a_post_is_typed_and_every_task_is_seen(tab: Tab, address: str, server: Server) -> None:
    post = "what a <b>lovely</b> day & a warm sun"
    tab.call("Page.navigate", url=address)
    tab.wait_for("document.getElementById('model')?.options.length")
    empty = tab.picture()
    tab.value("document.getElementById('text').focus()")
    tab.call("Input.insertText", text=post)
    tab.value("document.querySelector('button').click()")
    tab.wait_for("document.querySelector('#tasks article')")
    cards = tab.value("""[...document.querySelectorAll('#tasks article')].map((card) => ({
      head: card.querySelector('h2').textContent,
      numbers: [...card.querySelectorAll('.number')].map((one) => Number(one.textContent)),
      widths: [...card.querySelectorAll('.fill')].map((one) => one.getBoundingClientRect().width),
      words: [...card.querySelectorAll('.words mark')].map((one) => one.textContent),
      colors: [...card.querySelectorAll('.words mark')].map((one) => getComputedStyle(one).backgroundColor),
    }))""")
    body = {"posts": [{"text": post}], "method": "attention"}
    (wanted,) = server.ask("/v1/explain", body).json()["predictions"]
    tasks = {name: found for name, found in wanted.items() if isinstance(found, dict)}
    assert len(cards) == len(tasks) and {"label", "labels"} <= {
        key for one in tasks.values() for key in one
    }
    for card, (name, found) in zip(cards, tasks.items(), strict=True):
        assert card["head"].startswith(name)
        if "label" in found:
            assert card["head"] == name + found["label"]
        if isinstance(found.get("scores"), dict):
            # A bar is as long as its score.
            scores = sorted(found["scores"].values(), reverse=True)
            assert card["numbers"] == pytest.approx(scores, abs=0.0051)
            lengths = [width / max(card["widths"]) for width in card["widths"]]
            assert lengths == pytest.approx([score / max(scores) for score in scores], abs=0.01)
        if "attention" in found:
            # A word is as strong as its weight.
            assert card["words"] == [word for word, _ in found["attention"]]
            assert len(set(card["colors"])) > 1
    assert any("attention" in found for found in tasks.values())
    # Nothing of a post is read as HTML, and nothing comes from elsewhere.
    assert tab.value("document.querySelectorAll('#tasks b, #tasks script').length") == 0
    loaded = tab.value("performance.getEntriesByType('resource').map((one) => one.name)")
    assert loaded and all(name.startswith(address) for name in loaded)
    assert shares(tab.picture()) > shares(empty) > 10


def test_a_mistake_is_told_on_the_page(tab: Tab, address: str) -> None:
    tab.call("Page.navigate", url=address)
    tab.wait_for("document.getElementById('model')?.options.length")
    tab.value("document.getElementById('text').focus()")
    tab.call("Input.insertText", text="much too long " * 20)
    tab.value("document.querySelector('button').click()")
    tab.wait_for("document.getElementById('message').className === 'bad'")
    assert "100" in tab.value("document.getElementById('message').textContent")
    assert not tab.value("document.querySelectorAll('#tasks article').length")
