"""The routes, in process: answers are those of the predictor, and what is wrong is said without a word of the post."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import re
import threading
from pathlib import Path

import pytest
from helpers_export import TASKS, assert_same, export_tiny
from helpers_serving import Client, Server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comoe.inference.predictor import Predictor
from comoe.serving.models import Source

TEXTS = ["good day", "the sun is bad", "ann in paris"]
SECRET = "my private words"
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def predictor(export: Path) -> Predictor:
    return Predictor.from_pretrained(export, device="cpu")


def without_text(predictions: list[dict]) -> list[dict]:
    return [
        {key: prediction[key] for key in prediction if key != "text"} for prediction in predictions
    ]


def test_predictions_are_those_of_the_predictor(server: Server, predictor: Predictor) -> None:
    posts = ["good day", {"text": "bad", "pair": "rain"}, {"words": ["Ann", "saw", "Paris."]}, " "]
    answer = server.ask("/v1/predict", {"posts": posts}).json()
    expected = predictor(
        ["good day", "bad", None, " "],
        pairs=[None, "rain", None, None],
        words=[None, None, ["Ann", "saw", "Paris."], None],
    )
    assert (answer["model"], len(answer["revision"])) == ("tiny", 12)
    assert_same(answer["predictions"], without_text(expected))
    assert answer["predictions"][3] == {"error": "the text is empty"}


def test_explanations_and_embeddings(server: Server, predictor: Predictor) -> None:
    asked = {"posts": TEXTS, "tasks": ["mood", "words"], "model": "tiny"}
    found = server.ask("/v1/explain", asked).json()["predictions"]
    assert_same(found, without_text(predictor(TEXTS, tasks=["mood", "words"], explain=True)))
    for method in ("gradients", "experts"):
        some = asked | {"posts": TEXTS[:2], "method": method}
        found = server.ask("/v1/explain", some).json()["predictions"]
        expected = predictor.explain(TEXTS[:2], method=method, tasks=asked["tasks"])
        assert_same(found, without_text(expected))
    found = server.ask("/v1/embed", {"posts": TEXTS, "task": "topic"}).json()["predictions"]
    expected = [{"embedding": one["embedding"].tolist()} for one in predictor.embed(TEXTS)]
    assert [one.keys() for one in found] == [{"embedding"}] * 3
    for one, other in zip(found, expected, strict=True):
        assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-5)


@pytest.mark.parametrize(
    "asked, status, message",
    [
        ({"method": "gradient"}, 422, "method: Input should be 'attention', 'gradients' or 'experts'"),
        ({"method": "gradients", "tasks": ["words"]}, 422, "gradients explains tasks with a head on the whole post"),
        ({"method": "gradients", "posts": ["a"] * 3}, 413, "A request may have 2 posts to explain by gradients"),
    ],
)  # fmt: skip
def test_what_cannot_be_explained_is_refused(
    server: Server, asked: dict, status: int, message: str
) -> None:
    answer = server.ask("/v1/explain", {"posts": ["a"], **asked})
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_half_a_character_is_read_as_in_a_file(server: Server) -> None:
    posts = ["a \ud800", {"words": ["\udfff", "b"], "pair": "\ud800"}, {"text": "\ud800" * 3}]
    answer = server.ask("/v1/explain", {"posts": posts})
    assert answer.status_code == 200
    assert all("mood" in prediction for prediction in answer.json()["predictions"])
    assert answer.json()["predictions"][1]["words"]["words"] == ["\ufffd", "b"]


def test_requests_at_once_get_their_own_answers(server: Server, predictor: Predictor) -> None:
    texts = [f"{word} {other}" for word in ("good", "bad", "sun") for other in ("day", "rain")]

    async def all_at_once(client: Client) -> list:
        asked = (client.post("/v1/predict", json={"posts": [text]}) for text in texts)
        return [answer.json()["predictions"][0] for answer in await asyncio.gather(*asked)]

    assert_same(server.run(all_at_once), without_text(predictor(texts)))


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"{", 400, "The body is not JSON."),
        (b"\xff\xfe", 400, "The body is not JSON."),
        (b"[" * 3000, 400, "The body is not JSON."),
        (b"", 422, "body: Field required"),
        ([], 422, "body: must be an object, or a string where it is a post"),
        ({"posts": []}, 422, "posts: List should have at least 1 item after validation, not 0"),
        ({"posts": SECRET}, 422, "posts: Input should be a valid list"),
        ({"posts": [1]}, 422, "posts.0: must be an object, or a string where it is a post"),
        ({"posts": [{}]}, 422, "posts.0: a post needs text or words"),
        ({"posts": [{"text": 7}]}, 422, "posts.0.text: Input should be a valid string"),
        ({"posts": [{"text": ["a", 7]}]}, 422, "posts.0.text.1: Input should be a valid string"),
        ({"posts": [{"words": SECRET}]}, 422, "posts.0.words: Input should be a valid list"),
        ({"posts": ["a"], "\ud800": 1}, 422, "body: Input should be a valid string, unable to parse"),
        ({"posts": ["a"], "task": "mood"}, 422, "task: Extra inputs are not permitted"),
        ({"posts": ["a"], "tasks": ["mod"]}, 422, "mod is not a task of this model.*mood"),
        ({"posts": ["a"], "tasks": []}, 422, "tasks: List should have at least 1 item"),
        ({"posts": [{"text": "a", "image": "YQ=="}]}, 422, "This model reads no images"),
        ({"posts": [{"text": "a", "image": ""}]}, 422, "This model reads no images"),
        ({"posts": ["a"], "model": "other"}, 404, "There is no such model; there are: tiny.$"),
        ({"posts": ["a"], "revision": "0"}, 404, "tiny has no such revision; it has: [0-9a-f]{12}.$"),
        ({"posts": ["a"] * 5}, 413, "A request may have 4 posts; this one has 5."),
        ({"posts": [SECRET * 7]}, 413, "posts.0 has 112 characters; at most 100 are read."),
        ({"posts": [{"words": [""] * 101}]}, 413, "posts.0 has 101 characters"),
        ({"posts": [SECRET * 999]}, 413, "The body must have at most 4000 bytes."),
    ],
)  # fmt: skip
def test_a_bad_request_is_said_in_one_sentence(
    server: Server, body: object, status: int, message: str
) -> None:
    answer = server.ask("/v1/predict", body)
    assert answer.status_code == status
    assert re.search(message, answer.json()["error"]["message"])
    assert SECRET not in answer.text


def test_other_requests_that_are_refused(server: Server) -> None:
    ask = {"posts": ["a"]}
    assert server.ask("/v1/predict", ask, headers={"content-type": "text/plain"}).status_code == 415
    assert server.ask("/v1/predict").status_code == 405
    assert server.ask("/nowhere").json()["error"]["code"] == "not_found"
    far = server.ask("/v1/predict", ask, headers={"host": "evil.example:80"})
    assert far.status_code == 421
    wrong = server.ask("/v1/predict", b"", headers={"content-length": "x"})
    assert wrong.status_code == 413

    async def in_pieces(client: Client):
        async def pieces():
            for _ in range(100):
                yield b" " * 100

        return await client.post("/v1/predict", content=pieces())

    assert server.run(in_pieces).status_code == 413


def test_a_token_is_wanted_where_there_is_one(export: Path) -> None:
    server = Server(Source("tiny", export), token=TOKEN)
    bearing = {"authorization": f"Bearer {TOKEN}", "host": "far.example"}
    for path in ("/v1/tasks", "/metrics"):
        refused = server.ask(path)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        for value in (TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer "):
            wrong = server.ask(path, headers=bearing | {"authorization": value})
            assert wrong.status_code == 401, value
        for value in (f"Bearer {TOKEN}", f"bearer  {TOKEN}"):
            right = server.ask(path, headers=bearing | {"authorization": value})
            assert right.status_code == 200, value
    for path in ("/", "/healthz", "/readyz", "/openapi.json"):
        assert server.ask(path, headers={"host": "far.example"}).status_code == 200
    schema = server.ask("/openapi.json").json()
    assert schema["paths"]["/v1/predict"]["post"]["security"]
    server.models.close()


def test_requests_without_the_token_take_no_room_of_others(export: Path) -> None:
    server = Server(Source("tiny", export), token=TOKEN, requests=1, batch_wait=0)
    bearing = {"authorization": f"Bearer {TOKEN}"}

    async def crowd(client: Client) -> list[int]:
        async def endless():
            yield b" "
            await asyncio.Event().wait()

        paths = ("/healthz", "/nowhere", "/v1/predict")
        slow = [asyncio.create_task(client.post(path, content=endless())) for path in paths]
        await asyncio.sleep(0.05)
        asked = await client.post("/v1/predict", json={"posts": ["good"]}, headers=bearing)
        refused = await asyncio.wait_for(asyncio.gather(*slow), 10)  # nobody waits for the bodies
        return [asked.status_code, *(answer.status_code for answer in refused)]

    assert server.run(crowd) == [200, 405, 404, 401]
    server.models.close()


def test_without_a_token_the_address_that_is_listened_at_is_a_name_too(export: Path) -> None:
    for host, name in (("127.0.0.2", "127.0.0.2:8000"), ("::1", "[::1]:8000")):
        server = Server(Source("tiny", export), host=host)
        assert server.ask("/v1/tasks", headers={"host": name}).status_code == 200
        assert server.ask("/v1/tasks", headers={"host": "127.0.0.3"}).status_code == 421
        server.models.close()


def test_rows_of_a_task_of_its_own_count_for_the_tokens(tmp_path: Path) -> None:
    export_tiny(tmp_path, route_by="task")
    server = Server(Source("tiny", tmp_path / "export"), batch_wait=0)
    server.ask("/v1/predict", {"posts": ["good day"], "tasks": ["mood", "topic"]})
    server.ask("/v1/embed", {"posts": ["good day"]})
    served = server.models.find(None, None)
    post = {"text": "good day", "pair": None, "words": None}
    # By gradients each task of a whole post costs as much as 100 rows; tags are not explained by them.
    assert [served.tokens(post, 2, "gradients", TASKS[:n]) for n in (1, 2, 4)] == [408, 808, 1208]
    server.models.close()
    page = server.ask("/metrics").text
    assert 'comoe_batch_tokens_sum{model="tiny"} 12.0' in page  # 2 + 8 bytes / 3: two rows and one


def test_what_is_served_is_listed(server: Server) -> None:
    (model,) = server.ask("/v1/tasks").json()["models"]
    assert (model["model"], model["reads_images"], model["max_tokens"]) == ("tiny", False, 16)
    assert model["tasks"][0] == {
        "name": "mood", "kind": "single_label", "labels": ["bad", "so-so", "good"], "explained": True
    }  # fmt: skip
    assert server.ask("/healthz").json() == {"status": "ok"}
    assert server.ask("/readyz").json() == {"status": "ready"}


def test_numbers_for_prometheus(export: Path) -> None:
    server = Server(Source("tiny", export), batch_wait=0)
    posts = ["good day", " ", "the sun " * 20]
    found = server.ask("/v1/predict", {"posts": posts, "tasks": ["mood", "mood"]}).json()
    server.ask("/v1/predict", b"{")
    server.ask("/nowhere/" + "x" * 50)
    server.models.close()  # a pass is counted behind its answers
    page = server.ask("/metrics").text
    label = found["predictions"][0]["mood"]["label"]
    for line in (
        'comoe_requests_total{route="/v1/predict",status="200"} 1.0',
        'comoe_requests_total{route="/v1/predict",status="400"} 1.0',
        'comoe_requests_total{route="other",status="404"} 1.0',
        'comoe_request_seconds_count{route="/v1/predict"} 2.0',
        'comoe_posts_total{model="tiny",outcome="predicted"} 2.0',
        'comoe_posts_total{model="tiny",outcome="error"} 1.0',
        'comoe_truncated_posts_total{model="tiny"} 1.0',
        'comoe_queue_posts{model="tiny"} 0.0',
        'comoe_batch_posts_sum{model="tiny"} 3.0',
        'comoe_score_count{model="tiny",task="mood"} 2.0',
        f'comoe_model_info{{model="tiny",revision="{found["revision"]}"}} 1.0',
    ):
        assert line in page, line
    assert f'comoe_labels_total{{label="{label}",model="tiny",task="mood"}}' in page


def test_a_full_queue_is_429_a_slow_answer_504_and_neither_is_lost(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(Source("tiny", export), queue=2, max_posts=2, timeout=0.5, batch_wait=0)
    (served,) = server.models
    gate, begun = threading.Event(), threading.Event()
    predict = served.batcher._predict

    def held(key, posts):
        begun.set()
        gate.wait(30)
        return predict(key, posts)

    monkeypatch.setattr(served.batcher, "_predict", held)
    ask = {"posts": ["good", "bad"]}

    async def crowd(client: Client) -> list:
        running = asyncio.create_task(client.post("/v1/predict", json=ask))
        await asyncio.to_thread(begun.wait, 30)
        waiting = asyncio.create_task(client.post("/v1/predict", json=ask))
        while not served.batcher.waiting():
            await asyncio.sleep(0.01)
        refused = await client.post("/v1/predict", json=ask)
        late = [await running, await waiting]
        emptied = served.batcher.waiting()
        gate.set()
        return [refused, *late, emptied, await client.post("/v1/predict", json=ask)]

    refused, first, second, emptied, after = server.run(crowd)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert [first.status_code, second.status_code] == [504, 504]
    assert "within 0.5 seconds" in first.json()["error"]["message"]
    assert emptied == 0 and after.status_code == 200
    server.models.close()


def test_too_many_requests_at_once_are_429(export: Path) -> None:
    server = Server(Source("tiny", export), requests=1, batch_wait=50)

    async def two(client: Client) -> list[int]:
        asked = [client.post("/v1/predict", json={"posts": ["good"]}) for _ in range(2)]
        return sorted(answer.status_code for answer in await asyncio.gather(*asked))

    assert server.run(two) == [200, 429]
    server.models.close()


def test_a_failure_is_500_without_a_word_of_it_and_logs_no_post(
    export: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(Source("tiny", export))
    (served,) = server.models

    def fail(key, posts):
        raise RuntimeError(f"cannot read {posts[0]['text']}")

    monkeypatch.setattr(served.batcher, "_predict", fail)
    caplog.set_level(logging.INFO)
    transport = {"posts": [SECRET]}
    answer = server.ask("/v1/predict", transport)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
    assert "RuntimeError in /v1/predict" in caplog.text and "in fail" in caplog.text
    assert SECRET not in caplog.text + answer.text
    server.models.close()


def test_posts_are_logged_only_when_asked(
    export: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    server = Server(Source("tiny", export))
    server.ask("/v1/predict", {"posts": [SECRET]})
    assert SECRET not in caplog.text and "POST /v1/predict 200" in caplog.text
    asked = Server(Source("tiny", export), log_posts=True)
    asked.ask("/v1/predict", {"posts": [SECRET]})
    assert SECRET in caplog.text
    server.models.close()
    asked.models.close()


def test_every_answer_forbids_what_a_page_does_not_need(server: Server) -> None:
    for path in ("/", "/api", "/page.js", "/page.css", "/v1/tasks", "/nowhere"):
        headers = server.ask(path).headers
        assert headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_pages_have_no_script_in_html_and_no_address_of_others(server: Server) -> None:
    for path in ("/", "/api"):
        page = server.ask(path).text
        assert re.findall(r"<script(?! src=\"/\w+\.js\" defer></script>)", page) == []
        assert not re.search(r"style=|\son\w+=", page)
        sources = [path, *re.findall(r"(?:src|href)=\"([^\"]+)\"", page)]
        for source in sources:
            answer = server.ask(source)
            assert answer.status_code == 200 and "://" not in answer.text, source
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", answer.text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["text", "pair", "words", "image"]) | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
POSTS = st.lists(
    st.text(max_size=40) | st.fixed_dictionaries({"text": st.text(max_size=40)}) | JSON, max_size=5
)
ASKED = st.fixed_dictionaries(
    {"posts": POSTS},
    optional={
        "tasks": st.lists(st.sampled_from(["mood", "words", "heat", "signs", "x"]), max_size=3) | JSON,
        "task": st.sampled_from(["mood", "x"]) | JSON,
        "model": st.sampled_from(["tiny", "x"]) | JSON,
        "revision": JSON,
        "method": st.sampled_from(["attention", "gradients", "experts", "x"]) | JSON,
    },
)  # fmt: skip


@settings(
    deadline=None,
    max_examples=int(os.environ.get("COMOE_FUZZ", "0")) or 30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    path=st.sampled_from(["/v1/predict", "/v1/explain", "/v1/embed"]),
    body=(ASKED | JSON).map(lambda asked: json.dumps(asked).encode()) | st.binary(max_size=200),
)
def test_no_request_makes_the_server_fail(server: Server, path: str, body: bytes) -> None:
    answer = server.ask(path, body)
    assert answer.status_code in (200, 400, 404, 413, 422), answer.text
    expected = {"model", "revision", "predictions"} if answer.is_success else {"error"}
    assert set(answer.json()) == expected


def test_an_image_is_bytes_and_never_a_path(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (served,) = server.models
    seen: list[dict] = []
    predict = served.batcher._predict
    monkeypatch.setattr(type(served), "reads_images", True)

    def watch(key, posts):
        seen.extend(dict(post) for post in posts)
        return predict(key, [post | {"image": None} for post in posts])

    monkeypatch.setattr(served.batcher, "_predict", watch)
    image = base64.b64encode(b"/etc/passwd").decode()
    posts = [{"text": "good", "image": image}, {"text": "good"}]
    assert server.ask("/v1/predict", {"posts": posts}).status_code == 200
    assert [post["image"] for post in seen] == [b"/etc/passwd", None]
    for wrong in ("\u00e9", "YQ", "/etc/passwd", 7):
        assert (
            server.ask("/v1/predict", {"posts": [{"text": "a", "image": wrong}]}).status_code == 422
        )
