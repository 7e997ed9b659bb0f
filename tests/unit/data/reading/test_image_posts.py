"""Public sets of posts with images: small made-up folders in the layouts of their authors, read by their recipe."""

import json
from pathlib import Path

import pytest
from PIL import Image

from comoe.config.load import load_recipe
from comoe.data.corpus import load_corpus
from comoe.data.reading.image_posts import LAYOUTS
from comoe.data.reading.sources import open_source, read_split

RECIPE = Path(__file__).parents[4] / "launch" / "configs" / "image_posts.yaml"


def draw(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), "teal").save(file)


def build_mvsa(folder: Path) -> None:
    rows = {
        "1": ("positive,positive", b"Sunny #day :)"),
        "2": ("neutral,negative", b"rainy\r\nagain"),
        "5": ("positive,neutral", "café".encode("latin-1")),
        "6": ("positive,negative", b"who knows"),
        "9": ("neutral,neutral", "déjà vu".encode()),
    }
    for name, (_, text) in rows.items():
        draw(folder / "data" / f"{name}.jpg")
        (folder / "data" / f"{name}.txt").write_bytes(text)
    lines = [
        "ID\ttext,image",
        *(f"{name}\t{pair}" for name, (pair, _) in rows.items()),
        "7\tpositive,positive\tneutral,neutral",
        "8\tpositive,positive",
    ]
    (folder / "labelResultAll.txt").write_text("\n".join(lines) + "\n")


def build_msd(folder: Path) -> None:
    draw(folder / "dataset_image" / "71.jpg")
    (folder / "text").mkdir()
    (folder / "text" / "train.txt").write_text(
        "['71', \"what a ' lovely queue <user>\", 1]\n['71', 'so much irony here', 1]\n"
        "['71', 'a plain one', 0]\n['71', 'no label']\n__import__('os').abort()\n",
        encoding="utf-8",
    )
    # The hashtag's label, then the annotator's.
    (folder / "text" / "valid2.txt").write_text("['71', 'great', 1, 0]\n")
    (folder / "text" / "test2.txt").write_text("['71', 'great', 0, 1]\n")


def build_mmhs150k(folder: Path) -> None:
    posts = {
        "101": {"tweet_text": "one", "labels": [0, 1, 1], "labels_str": ["NotHate"]},
        "102": {"tweet_text": "two", "labels": [0, 0, 5]},
        "103": {"tweet_text": "three", "labels": [2, 3, 4]},
        "104": {"tweet_text": "four", "labels": [0, 9, 0]},
    }
    for name in posts:
        draw(folder / "img_resized" / f"{name}.jpg")
    (folder / "MMHS150K_GT.json").write_text(json.dumps(posts))
    (folder / "splits").mkdir()
    (folder / "splits" / "train_ids.txt").write_text("101\n102\n104\n999\n")
    (folder / "splits" / "val_ids.txt").write_text("103\n")
    (folder / "splits" / "test_ids.txt").write_text("101\n")


def build_text_image(folder: Path, *, text: str = ",text") -> None:
    for number in range(4):
        draw(folder / "images" / f"69819715569818419{number}.jpg")
    rows = [
        f"69819715569818419{number}"
        + (f',"so, good {number}"' if text else "")
        + f",{number // 2},{number % 2},0,0,0,1,,,"
        for number in range(4)
    ]
    rows.append(f"6.92094E+17{text},1,0,0,0,1,0,,,")
    head = f"tweet_id{text},text_is_represented,image_adds,image_adds_text_repr,a,b,c,d,e,f"
    (folder / "textimage.csv").write_text("\n".join([head, *rows]) + "\n")


BUILD = {
    "mvsa": build_mvsa, "msd": build_msd, "mmhs150k": build_mmhs150k, "text_image": build_text_image,
}  # fmt: skip


def read(folder: Path, format: str, split: str = "train", **splits: str):
    source = open_source(
        "tasks.t", root=None, path=str(folder), format=format, subset=None, splits=splits
    )
    return read_split(source, split)


@pytest.fixture
def folders(tmp_path):
    for name, build in BUILD.items():
        (tmp_path / name).mkdir()
        build(tmp_path / name)
    return tmp_path


def cells(raw, *columns):
    return [tuple(row[column] for column in columns) for row in raw.rows]


def test_mvsa_joins_the_labels_of_text_and_image(folders):
    raw = read(folders / "mvsa", "mvsa")
    assert cells(raw, "id", "text", "label") == [
        ("1", "Sunny #day :)", "positive"), ("2", "rainy again", "negative"),
        ("5", "café", "positive"), ("6", "who knows", None), ("9", "déjà vu", "neutral"),
    ]  # fmt: skip
    assert raw.rows[3]["text_label"] == "positive" and raw.rows[3]["image_label"] == "negative"
    assert raw.lines == [2, 3, 4, 5, 6] and "1 texts are not UTF-8" in raw.notes[0]
    assert [(row.line, "MVSA-Multiple" in row.rule) for row in raw.bad] == [(7, True), (8, False)]
    assert read(folders / "mvsa", "mvsa", "test") is None


def test_msd_takes_the_annotators_label_and_leaves_posts_out_that_give_it_away(folders):
    raw = read(folders / "msd", "msd")
    assert cells(raw, "text", "label", "image") == [
        ("what a ' lovely queue <user>", "sarcastic", "dataset_image/71.jpg"),
        ("a plain one", "not_sarcastic", "dataset_image/71.jpg"),
    ]
    assert [row.line for row in raw.bad] == [4, 5] and "1 posts with sarcasm" in raw.notes[0]
    for split, label in (("validation", "not_sarcastic"), ("test", "sarcastic")):
        assert cells(read(folders / "msd", "msd", split), "label") == [(label,)]
    (folders / "msd" / "text" / "test2.txt").unlink()
    assert read(folders / "msd", "msd", "test") is None
    assert cells(read(folders / "msd", "msd", "test", test="valid2.txt"), "text") == [("great",)]


def test_mmhs150k_counts_its_annotators(folders):
    raw = read(folders / "mmhs150k", "mmhs150k")
    assert cells(raw, "id", "label", "kind") == [
        ("101", "hate", "Racist"), ("102", "not_hate", "NotHate"),
    ]  # fmt: skip
    assert raw.rows[1]["votes"] == {"hate": 1, "not_hate": 2}
    assert [(row.line, row.value) for row in raw.bad] == [(3, "104"), (4, "999")]
    (other,) = read(folders / "mmhs150k", "mmhs150k", "validation").rows
    assert (other["label"], other["kind"]) == ("hate", None)


def test_the_relation_of_text_and_image_has_two_halves(folders):
    raw = read(folders / "text_image", "text_image")
    assert cells(raw, "label", "text_shown", "image_adds") == [
        ("absent_only", "no", "no"), ("absent_adds", "no", "yes"), ("shown_only", "yes", "no"),
        ("shown_adds", "yes", "yes"),
    ]  # fmt: skip
    assert [row.value for row in raw.bad] == ["6.92094E+17"]
    build_text_image(folders / "text_image", text="")
    with pytest.raises(ValueError, match="no column text .*ask its authors"):
        read(folders / "text_image", "text_image")


def test_the_recipe_reads_all_four_with_their_images(folders):
    recipe = load_recipe(
        RECIPE, [f"data.root={folders}", "data.validation_fraction=0.25", "data.test_fraction=0"]
    )
    corpus = load_corpus(recipe, with_images=True)
    assert {task.name: len(task.labels) for task in corpus.tasks} == {
        "sentiment": 3, "sarcasm": 2, "hate": 2, "relation": 4,
    }  # fmt: skip
    assert all(image is not None for posts in corpus.splits.values() for image in posts.images)
    assert len(corpus.report.set_aside) == 7 and not corpus.report.without_image


@pytest.mark.parametrize("format", LAYOUTS)
def test_a_folder_in_another_layout_is_refused_with_the_file_that_is_missing(tmp_path, format):
    with pytest.raises(ValueError, match=r"tasks.t.path .*there is no file .*docs/images.md"):
        read(tmp_path, format)
    (tmp_path / "posts.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=f"is not a folder; format {format}"):
        read(tmp_path / "posts.csv", format)


@pytest.mark.parametrize("damaged", ["[1", "[1]"])
def test_a_damaged_index_is_refused(folders, damaged):
    (folders / "mmhs150k" / "MMHS150K_GT.json").write_text(damaged)
    with pytest.raises(ValueError, match="MMHS150K_GT.json"):
        read(folders / "mmhs150k", "mmhs150k")
