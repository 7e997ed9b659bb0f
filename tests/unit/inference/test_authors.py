"""Predictions of authors and of posts with a context: alone or in a batch, by list or by file, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_export import MOOD, SIGNS, TOPIC, tiny_predictor

from comoe.data.posts import Post, unlabelled_posts
from comoe.inference.onnx_export import check_exportable
from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.inference.predictor import Predictor

TASKS = (replace(MOOD, reads="author"), TOPIC, replace(SIGNS, reads="neighbors"))
AUTHORS = [["good day", "bad rain", "the sunny paris"], ["sun"], ["bad", "good sun"]]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    found = tiny_predictor(tmp_path_factory.mktemp("model"), tasks=TASKS)
    for head in found.exported.model.heads:
        for weight in [] if head.over_posts is None else head.over_posts.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    return found


def scores(rows, task="mood"):
    return [list(row[task]["scores"].values()) for row in rows]


def test_an_author_is_predicted_as_the_model_pools_the_posts_one_by_one(predictor):
    found = predictor(AUTHORS, tasks=["mood"], batch_size=2)
    assert [row["text"] for row in found] == ["\n".join(texts) for texts in AUTHORS]
    model, head = predictor.exported.model, predictor.exported.model.heads[0]
    for row, texts in zip(found, AUTHORS, strict=True):
        states = []
        for text in texts:
            split = predictor.collator.encode_texts([text], config=predictor.exported.data_config)
            batch = predictor.collator(split, [0])
            with torch.no_grad():
                hidden = model.encode(model._texts(batch), None).fused_BLM
                states.append(head.pooling(hidden, batch.attention_mask_BL)[0][0].double())
        states = torch.stack(states)
        own = {name: value.double() for name, value in head.named_parameters()}
        hidden = torch.tanh(
            states @ own["over_posts.hidden.weight"].T + own["over_posts.hidden.bias"]
        )
        shares = torch.softmax((hidden @ own["over_posts.score.weight"].T)[:, 0], dim=0)
        logits = own["output.weight"] @ (shares @ states) + own["output.bias"]
        torch.testing.assert_close(
            torch.tensor(list(row["mood"]["scores"].values())).double(),
            torch.softmax(logits, dim=0), atol=1e-5, rtol=1e-4,
        )  # fmt: skip
    one_by_one = [predictor([texts], tasks=["mood"])[0] for texts in AUTHORS]
    for a, b in zip(scores(found), scores(one_by_one), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_explanations_say_how_much_each_post_weighs(predictor):
    (row,) = predictor.explain([AUTHORS[0]], tasks=["mood"])
    posts = row["mood"]["posts"]
    assert [text for text, _ in posts] == AUTHORS[0] and "attention" not in row["mood"]
    assert sum(weight for _, weight in posts) == pytest.approx(1)
    (row,) = predictor.explain(["good day"], pairs=[["sun", "rain"]], tasks=["signs"])
    assert [text for text, _ in row["signs"]["posts"]] == ["good day", "rain", "sun"]
    assert row["signs"]["posts"][0][1] == 0 and [word for word, _ in row["signs"]["attention"]] == [
        "good",
        "day",
    ]
    with pytest.raises(ValueError, match="take attention"):
        predictor.explain([AUTHORS[0]], tasks=["mood"], method="gradients")


def test_neighbors_change_their_own_task_alone(predictor):
    plain = predictor(["good day", "bad"])
    near = predictor(["good day", "bad"], pairs=[["sun", "rain"], None])
    assert scores(near, "topic")[0] == pytest.approx(scores(plain, "topic")[0], abs=1e-5)
    assert scores(near, "signs")[0] != pytest.approx(scores(plain, "signs")[0], abs=1e-3)
    assert scores(near, "signs")[1] == pytest.approx(scores(plain, "signs")[1], abs=1e-5)
    # Order does not count to attention, the text of a parent alone may be no list.
    turned = predictor(["good day"], pairs=[["rain", "sun"]], tasks=["signs"])
    assert scores(turned, "signs")[0] == pytest.approx(scores(near, "signs")[0], abs=1e-5)
    one, other = (predictor(["bad"], pairs=[pair], tasks=["signs"]) for pair in ("sun", ["sun"]))
    assert scores(one, "signs") == scores(other, "signs")


def test_what_no_pass_can_read_is_refused_and_bad_authors_have_an_error(predictor):
    assert {task.name for task in predictor.choose_tasks(None)} == {"topic", "signs"}
    with pytest.raises(
        ValueError, match="mood reads all posts of an author, and task topic single"
    ):
        predictor(["good"], tasks=["mood", "topic"])
    found = predictor([[], ["good", " "], ["good", 3], "good"], tasks=["mood"])
    errors = ["the author has no post", "the text is empty", "the text must be text, not int", None]
    assert [row.get("error") for row in found] == errors
    assert predictor([["good"]])[0]["error"] == "the text must be text, not list"
    with pytest.raises(ValueError, match="an embedding is of one post"):
        predictor.embed(AUTHORS, task="mood")
    with pytest.raises(ValueError, match="--long windows divides posts"):
        predictor.with_long("windows")(["good"], tasks=["signs"])
    with pytest.raises(ValueError, match="mood, signs read several posts together"):
        check_exportable(predictor.exported)


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_is_answered_per_author_in_its_order_and_a_run_resumes(predictor, tmp_path, capsys):
    rows = [
        {"id": f"{user}{n}", "who": f"u{user}", "text": text}
        for user, texts in enumerate(AUTHORS)
        for n, text in enumerate(texts)
    ]
    source, target = write(tmp_path / "posts.jsonl", rows), tmp_path / "found.jsonl"
    options = PredictOptions(tasks=["mood"], author_column="who")
    summary = predict_file(predictor, source, target, options)
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["who"], row["num_posts"], row["id"]) for row in found] == [
        ("u0", 3, "00"), ("u1", 1, "10"), ("u2", 2, "20"),
    ]  # fmt: skip
    assert summary.counts.posts == 3
    for a, b in zip(scores(found), scores(predictor(AUTHORS, tasks=["mood"])), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    predict_file(predictor, source, tmp_path / "found.csv", replace(options, format="csv"))
    header = (tmp_path / "found.csv").read_text().splitlines()[0]
    assert header.startswith("who,id,num_posts,text,mood,")
    rows.append({"who": "u0", "text": "sun"})
    rows.append({"who": None, "text": "sun"})
    predict_file(predictor, write(source, rows), target, options)
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row.get("who") for row in found] == ["u0", "u1", "u2", None, "u0"]
    assert "column who is empty" in found[3]["error"]
    assert "1 times an author of column who came back" in capsys.readouterr().err
    for asked, message in (("nobody", "no column nobody"), (None, "--author-column")):
        with pytest.raises(ValueError, match=message):
            predict_file(predictor, source, target, replace(options, author_column=asked))
    with pytest.raises(ValueError, match="answered for each post; leave the option out"):
        predict_file(predictor, source, target, replace(options, tasks=["topic"]))


def test_more_posts_than_are_read_change_nothing(predictor):
    few = replace(predictor, collator=predictor.exported.collator())
    few.collator.max_posts = 2
    posts = [*AUTHORS[0], "rain rain"]
    assert scores(few([posts], tasks=["mood"])) == scores(few([posts[:2]], tasks=["mood"]))


def test_a_tuple_of_posts_is_one_entry():
    posts = unlabelled_posts([(Post("a"), Post("b")), "c"], tasks=["mood"])
    assert posts.texts == ["a\nb", "c"] and [len(some) for some in posts.members] == [2, 0]
