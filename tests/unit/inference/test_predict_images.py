"""Predictions and scores of a model that reads images, and what becomes of bad ones."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from comoe.config.recipe import (
    DataConfig,
    ModelConfig,
    MoeConfig,
    Recipe,
    TaskConfig,
    VisionConfig,
)
from comoe.data.images.pixels import PixelReader, load_image_processor
from comoe.data.reading.inputs import column_in_training
from comoe.data.tokens.vocabulary import load_tokenizer
from comoe.inference.export import Backbone, export_model
from comoe.inference.model_card import model_card
from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.inference.predictor import Predictor
from comoe.inference.score import DataChoice, format_scores, score
from comoe.models.build import build_model
from comoe.starter.tiny_models import build_smoke_encoder, build_smoke_vision
from comoe.tasks.task import Task
from comoe.train.monitor.log_window import SHOWN_IMAGES, log_lost_images
from tests.helpers_images import LIMITS, encoded, noise

MOOD = Task("mood", "single_label", ("bad", "good"), "macro_f1", 1.0, None, 0.0, True)


def export(folder: Path, **data) -> Predictor:
    for name, build in (("encoder", build_smoke_encoder), ("vision", build_smoke_vision)):
        (folder / name).mkdir(parents=True)
        build(folder / name)
    vision = VisionConfig(tower=str(folder / "vision"))
    moe = MoeConfig(num_experts=2, top_k=1, expert_width=16)
    recipe = Recipe(
        model=ModelConfig(
            encoder=str(folder / "encoder"), projection_width=8, vision=vision, moe=moe
        ),
        data=DataConfig(
            max_length=16,
            max_image_bytes=LIMITS.max_bytes,
            max_image_pixels=LIMITS.max_pixels,
            **data,
        ),
        tasks={"mood": TaskConfig(path="mood.jsonl", image="photo")},
    )
    model = build_model(recipe.model, [MOOD])
    export_model(
        folder / "export",
        state_dict=model.state_dict(),
        recipe=recipe,
        tasks=[MOOD],
        backbone=Backbone(
            model.encoder.config.to_dict(),
            load_tokenizer(str(folder / "encoder")),
            model.tower.inner.config.to_dict(),
            load_image_processor(str(folder / "vision")),
        ),
    )
    return Predictor.from_pretrained(folder / "export", device="cpu")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return export(tmp_path_factory.mktemp("model"))


def score_of(prediction: dict) -> float:
    return prediction["mood"]["scores"]["good"]


def test_a_picture_counts_and_a_bad_one_leaves_the_text_alone(
    predictor: Predictor, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(0), "PNG"))
    good = [None, "a.png", encoded(noise(0), "PNG"), noise(0)]
    images = [*good, b"text", "../a.png", noise(1, size=(900, 300)), ["a"]]
    predictions = predictor(["nice day"] * len(images), images=images, image_root=tmp_path)
    alone, seen = score_of(predictions[0]), score_of(predictions[1])
    assert abs(alone - seen) > 1e-5
    for prediction in predictions[2:4]:
        assert score_of(prediction) == pytest.approx(seen, abs=1e-6)
        assert "image_error" not in prediction
    for prediction, words in zip(
        predictions[4:],
        ("no image that can", "leads out", "bytes|pixels", "holds a list"),
        strict=True,
    ):
        assert score_of(prediction) == pytest.approx(alone, abs=1e-6)
        assert any(word in prediction["image_error"] for word in words.split("|"))
    outside = predictor(["nice day"], images=[tmp_path / "a.png"])
    assert score_of(outside[0]) == pytest.approx(seen, abs=1e-6), (
        "without image_root any path is taken"
    )


def test_what_training_hid_stays_hidden(tmp_path: Path) -> None:
    mute, blind = export(tmp_path / "mute", hide="text"), export(tmp_path / "blind", hide="image")
    first, second = mute(["nice day", "awful"], images=[noise(0)] * 2)
    assert score_of(first) == pytest.approx(score_of(second), abs=1e-7)
    first, second = blind(["nice day"] * 2, images=[noise(0), None])
    assert score_of(first) == pytest.approx(score_of(second), abs=1e-7)


def test_a_file_of_posts_names_pictures_beside_it(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(0), "PNG"))
    (tmp_path / "posts.csv").write_text(
        "text,image\nnice day,a.png\nnice day,b.png\n,a.png\nnice day,\n"
    )
    said = predict_file(
        predictor, tmp_path / "posts.csv", tmp_path / "out.csv", PredictOptions(format="csv")
    )
    assert "1 of them without their bad image" in str(said)
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert ["is not there" in row["image_error"] for row in rows] == [False, True, False, False]
    assert rows[2]["error"]
    assert rows[1]["mood/good"][:6] == rows[3]["mood/good"][:6] != rows[0]["mood/good"][:6]
    with pytest.raises(ValueError, match="--image-column is 'photo', but .* has no such column"):
        predict_file(
            predictor,
            tmp_path / "posts.csv",
            tmp_path / "out.csv",
            PredictOptions(image_column="photo"),
        )


def test_the_column_of_training_is_read_and_its_absence_is_said(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(0), "PNG"))
    alone, seen = predictor(["nice day"] * 2, images=[None, tmp_path / "a.png"])

    def predicted(name: str, text: str) -> tuple[float, str]:
        (tmp_path / name).write_text(text)
        predict_file(predictor, tmp_path / name, tmp_path / "out.jsonl")
        return score_of(json.loads((tmp_path / "out.jsonl").read_text())), capsys.readouterr().err

    assert predictor.image_column == "photo"
    for column in ("photo", "image"):
        found, said = predicted("posts.csv", f"text,{column}\nnice day,a.png\n")
        assert found == pytest.approx(score_of(seen), abs=1e-6) and said == ""
    for name, text, there in (
        ("posts.jsonl", '{"text": "nice day", "picture": "a.png"}\n', "it has text, picture"),
        ("posts.txt", "nice day\n", "it is a .txt"),
    ):
        found, said = predicted(name, text)
        assert found == pytest.approx(score_of(alone), abs=1e-6)
        line = f"this model reads images; the input has no column photo; {there}: answering by the text alone"
        assert said.startswith(line) and said.count("\n") == 1
    (tmp_path / "test.jsonl").write_text(
        '{"text": "nice", "label": "good"}\n{"text": "ill", "label": "bad"}\n'
    )
    score(predictor, DataChoice(str(tmp_path / "test.jsonl")), progress=False)
    assert (
        "the input has no column photo; it has text, label: answering by the text"
        in capsys.readouterr().err
    )
    (tmp_path / "posts.txt").write_text("nice day\n")
    with pytest.raises(ValueError, match="--image-column photo: a .txt file has no columns"):
        predict_file(
            predictor,
            tmp_path / "posts.txt",
            tmp_path / "out",
            PredictOptions(image_column="photo"),
        )


def test_an_export_of_before_reads_the_usual_column(predictor: Predictor) -> None:
    config = {
        key: value for key, value in predictor.exported.config.items() if key != "image_column"
    }
    older = Predictor(
        replace(predictor.exported, config=config), predictor.collator, predictor.device
    )
    assert older.image_column == "image"


def test_the_commonest_picture_column_of_the_tasks_is_remembered() -> None:
    tasks = [TaskConfig(image=column) for column in ("a", "photo", None, "photo")]
    assert column_in_training(tasks) == "photo" and column_in_training(tasks[2:3]) == "image"


def test_the_card_tells_what_reads_the_pictures_and_how_to_give_them(predictor: Predictor) -> None:
    exported = predictor.exported
    tower = exported.config["model"]["vision"]["tower"]
    recipe = Recipe(
        model=exported.model_config, tasks={"mood": TaskConfig(path="mood.jsonl", image="photo")}
    )
    card = model_card("export", recipe=recipe, tasks=[MOOD], config=exported.config, results=None)
    kind = exported.config["tower"]["model_type"]
    for words in (
        f"A vision tower (`{tower}`, {kind}) reads the image",
        "by fusion `attention`",
        "the column `photo` named the images",
        'images=["img/01.png"]',
        '"photo": "img/01.png"}\' > posts.jsonl',
        "--input posts.jsonl",
        "its text and its image, it predicts 1 task: mood",
        "- multimodal",
    ):
        assert words in card
    both = {key: value for key, value in exported.config.items() if key != "tower"}
    single = model_card("export", recipe=recipe, tasks=[MOOD], config=both, results=None)
    assert "The encoder reads text and image together." in single


def test_scores_say_how_many_pictures_were_bad(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(0), "PNG"))
    photos = ["a.png", "b.png", None]
    rows = [{"text": f"nice {n}", "label": "good", "photo": photos[n % 3]} for n in range(6)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = DataChoice(str(tmp_path / "test.jsonl"), image="photo")
    scores = score(predictor, choice, progress=False)
    assert scores.posts == 6 and [row.line for row in scores.without_image] == [2, 5]
    assert "2 posts scored without their bad image; the first:" in format_scores(scores)
    found = predictor([row["text"] for row in rows], images=photos * 2, image_root=tmp_path)
    right = sum(prediction["mood"]["label"] == "good" for prediction in found) / 6
    assert scores.evaluation.metrics["mood"]["accuracy"] == pytest.approx(right)


def test_pictures_for_a_model_of_texts_are_refused(predictor: Predictor, tmp_path: Path) -> None:
    texts_only = Predictor(
        predictor.exported, type(predictor.collator)(predictor.exported.tokenizer, [MOOD]), "cpu"
    )
    with pytest.raises(ValueError, match="this model reads no images"):
        texts_only(["nice"], images=[Image.new("RGB", (2, 2))])
    (tmp_path / "posts.csv").write_text("text,photo,label\nnice day,a.png,good\n")
    source = tmp_path / "posts.csv"
    for call in (
        lambda: predict_file(
            texts_only, source, tmp_path / "out", PredictOptions(image_column="photo")
        ),
        lambda: score(texts_only, DataChoice(str(source), image="photo"), progress=False),
    ):
        with pytest.raises(ValueError, match="^--image-column photo: this model reads no images"):
            call()


def test_one_picture_for_many_texts_is_refused_as_no_list(predictor: Predictor) -> None:
    for images in ("/x.png", b"bytes", Path("x.png"), noise(0)):
        with pytest.raises(
            ValueError,
            match=r"images must be a list with one for each text, not a .*images=\[...\]",
        ):
            predictor(["a", "b"], images=images)
    with pytest.raises(ValueError, match="texts must be a list with one for each text, not a str"):
        predictor("nice day")


def test_what_is_wrong_with_a_picture_names_no_option_of_a_recipe(
    predictor: Predictor, tmp_path: Path
) -> None:
    predictions = predictor(
        ["a"] * 4, images=["no.png", "../a.png", "img\\a.png", 3], image_root=tmp_path
    )
    missing, outside, windows, number = [prediction["image_error"] for prediction in predictions]
    assert missing.endswith("correct the path.") and outside.endswith("move it there.")
    assert windows.endswith("the path has backslashes; write it with / instead.")
    assert "holds an int;" in number
    assert not any("data.image_root" in prediction["image_error"] for prediction in predictions)


def test_lost_pictures_become_one_event(predictor: Predictor) -> None:
    events = []

    class Noting:
        def log_event(self, event: dict) -> None:
            events.append(event)

    reader = PixelReader(predictor.exported.image_processor, LIMITS)
    log_lost_images(None, Noting(), 3)
    log_lost_images(reader, Noting(), 3)
    assert events == []
    missing = [f"nowhere/{number}.png" for number in range(SHOWN_IMAGES + 5)]
    assert reader.read([*missing, b"text"]) == [None] * (len(missing) + 1)
    log_lost_images(reader, Noting(), 4)
    log_lost_images(reader, Noting(), 5)
    (event,) = events
    assert event["event"] == "pictures_lost"
    assert event["step"] == 4
    assert event["count"] == SHOWN_IMAGES + 6
    assert len(event["pictures"]) == SHOWN_IMAGES
    assert "is not there" in event["pictures"]["nowhere/0.png"]
