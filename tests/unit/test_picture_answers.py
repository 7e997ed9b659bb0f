"""Answers and scores of a model that reads pictures, and what becomes of bad ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from comoe.answers import predict_file
from comoe.data.batching import load_tokenizer
from comoe.data.pixels import PixelReader, load_image_processor
from comoe.export import export_model
from comoe.models.multitask import build_model
from comoe.predict import Predictor
from comoe.schema import DataConfig, ModelConfig, MoeConfig, Recipe, TaskConfig, VisionConfig
from comoe.scoring import DataChoice, format_scores, score_data
from comoe.starter import build_smoke_encoder, build_smoke_vision
from comoe.tasks.catalog import Task
from comoe.train.progress import SHOWN_PICTURES, log_lost_pictures
from tests.helpers_images import LIMITS, encoded, noise

MOOD = Task("mood", "single_label", ("bad", "good"), "macro_f1", 1.0, None, 0.0, True)


def export(folder: Path, **data) -> Predictor:
    for name, build in (("encoder", build_smoke_encoder), ("vision", build_smoke_vision)):
        (folder / name).mkdir(parents=True)
        build(folder / name)
    vision = VisionConfig(tower=str(folder / "vision"))
    moe = MoeConfig(num_experts=2, top_k=1, expert_width=16)
    recipe = Recipe(
        model=ModelConfig(encoder=str(folder / "encoder"), projection_width=8, vision=vision, moe=moe),
        data=DataConfig(max_length=16, max_image_bytes=LIMITS.max_bytes, max_image_pixels=LIMITS.max_pixels, **data),
        tasks={"mood": TaskConfig(path="mood.jsonl", image="photo")},
    )
    model = build_model(recipe.model, [MOOD])
    export_model(
        folder / "export",
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=[MOOD],
        encoder_config=model.encoder.config.to_dict(),
        tower_config=model.tower.inner.config.to_dict(),
        tokenizer=load_tokenizer(str(folder / "encoder")),
        image_processor=load_image_processor(str(folder / "vision")),
    )
    return Predictor.from_pretrained(folder / "export", device="cpu")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return export(tmp_path_factory.mktemp("model"))


def score_of(answer: dict) -> float:
    return answer["mood"]["scores"]["good"]


def test_a_picture_counts_and_a_bad_one_leaves_the_text_alone(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(0), "PNG"))
    images = [None, "a.png", encoded(noise(0), "PNG"), noise(0), b"text", "../a.png", noise(1, size=(900, 300)), ["a"]]
    answers = predictor(["nice day"] * len(images), images=images, image_root=tmp_path)
    alone, seen = score_of(answers[0]), score_of(answers[1])
    assert abs(alone - seen) > 1e-5
    for answer in answers[2:4]:
        assert score_of(answer) == pytest.approx(seen, abs=1e-6) and "image_error" not in answer
    for answer, words in zip(answers[4:], ("is text", "leads out", "bytes|pixels", "holds a list"), strict=True):
        assert score_of(answer) == pytest.approx(alone, abs=1e-6)
        assert any(word in answer["image_error"] for word in words.split("|"))
    outside = predictor(["nice day"], images=[tmp_path / "a.png"])
    assert score_of(outside[0]) == pytest.approx(seen, abs=1e-6), "without image_root any path is taken"


def test_what_training_hid_stays_hidden(tmp_path: Path) -> None:
    mute, blind = export(tmp_path / "mute", hide="text"), export(tmp_path / "blind", hide="image")
    first, second = mute(["nice day", "awful"], images=[noise(0)] * 2)
    assert score_of(first) == pytest.approx(score_of(second), abs=1e-7)
    first, second = blind(["nice day"] * 2, images=[noise(0), None])
    assert score_of(first) == pytest.approx(score_of(second), abs=1e-7)


def test_a_file_of_posts_names_pictures_beside_it(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(0), "PNG"))
    (tmp_path / "posts.csv").write_text("text,image\nnice day,a.png\nnice day,b.png\n,a.png\nnice day,\n")
    said = predict_file(predictor, tmp_path / "posts.csv", tmp_path / "out.csv", format="csv", progress=False)
    assert "1 of them were answered without their bad picture" in said
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert ["is not there" in row["image_error"] for row in rows] == [False, True, False, False]
    assert rows[2]["error"] and rows[1]["mood/good"][:6] == rows[3]["mood/good"][:6] != rows[0]["mood/good"][:6]
    with pytest.raises(ValueError, match="--image-column photo: .* has no such column; it has text, image"):
        predict_file(predictor, tmp_path / "posts.csv", tmp_path / "out.csv", image_column="photo", progress=False)


def test_scores_say_how_many_pictures_were_bad(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(0), "PNG"))
    photos = ["a.png", "b.png", None]
    rows = [{"text": f"nice {n}", "label": "good", "photo": photos[n % 3]} for n in range(6)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = DataChoice(str(tmp_path / "test.jsonl"), image="photo")
    scores = score_data(predictor, choice, progress=False)
    assert scores.posts == 6 and [row.line for row in scores.without_picture] == [2, 5]
    assert "2 posts scored without their bad picture; the first:" in format_scores(scores)
    found = predictor([row["text"] for row in rows], images=photos * 2, image_root=tmp_path)
    right = sum(answer["mood"]["label"] == "good" for answer in found) / 6
    assert scores.evaluation.metrics["mood"]["accuracy"] == pytest.approx(right)


def test_pictures_for_a_model_of_texts_are_refused(predictor: Predictor) -> None:
    texts_only = Predictor(predictor.exported, type(predictor.collator)(predictor.exported.tokenizer, [MOOD]), "cpu")
    with pytest.raises(ValueError, match="this model reads no pictures"):
        texts_only(["nice"], images=[Image.new("RGB", (2, 2))])


def test_lost_pictures_become_one_event(predictor: Predictor) -> None:
    events = []

    class Noting:
        def log_event(self, event: dict) -> None:
            events.append(event)

    reader = PixelReader(predictor.exported.image_processor, LIMITS)
    log_lost_pictures(None, Noting(), 3)
    log_lost_pictures(reader, Noting(), 3)
    assert events == []
    missing = [f"nowhere/{number}.png" for number in range(SHOWN_PICTURES + 5)]
    assert reader.read([*missing, b"text"]) == [None] * (len(missing) + 1)
    log_lost_pictures(reader, Noting(), 4)
    log_lost_pictures(reader, Noting(), 5)
    (event,) = events
    assert event["event"] == "pictures_lost" and event["step"] == 4 and event["count"] == SHOWN_PICTURES + 6
    assert len(event["pictures"]) == SHOWN_PICTURES and "is not there" in event["pictures"]["nowhere/0.png"]
