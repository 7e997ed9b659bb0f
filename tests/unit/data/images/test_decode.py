import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from comoe.config.recipe import DataConfig, Recipe, TaskConfig
from comoe.data.corpus import load_corpus
from comoe.data.images import check as image_checks
from comoe.data.images.check import HowToCheck, check_images
from comoe.data.images.decode import BadImage, ImageLimits, is_animated, locate_image, read_image
from tests.helpers_images import FILES, LIMITS, encoded, noise, place_damaged, png_header, unusual


def refusal(source: bytes | str, limits: ImageLimits = LIMITS) -> BadImage:
    with pytest.raises(BadImage) as caught:
        read_image(source, limits)
    return caught.value


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_with_a_sentence_that_says_why(name):
    reason, words, make = FILES[name]
    error = refusal(make(3))
    assert error.reason == reason
    assert words in error.rule and error.rule.endswith(".") and "\n" not in error.rule


def test_every_way_of_naming_no_usable_file_is_refused(tmp_path):
    for cell, reason, words in place_damaged(tmp_path / "images", 0):
        with pytest.raises(BadImage) as caught:
            source = locate_image(cell, root=(tmp_path / "images").resolve())
            assert source is not None
            read_image(source, LIMITS)
        assert caught.value.reason == reason and words in caught.value.rule, cell


def test_the_pixels_of_a_bomb_are_never_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for header in (png_header(50_000, 60_000), png_header(400, 300)):
        assert refusal(header).reason == "too many pixels"


def test_a_huge_file_is_not_even_read(tmp_path):
    sparse = tmp_path / "huge.png"
    with sparse.open("wb") as file:
        file.truncate(10**12)
    assert "1,000,000,000,000 bytes" in refusal(str(sparse)).rule


def test_readers_of_other_formats_never_run(monkeypatch):
    Image.init()
    from PIL import EpsImagePlugin, TiffImagePlugin

    for plugin in (EpsImagePlugin.EpsImageFile, TiffImagePlugin.TiffImageFile):
        monkeypatch.setattr(plugin, "_open", lambda self: pytest.fail("a hostile reader ran"))
    assert refusal(FILES["scan.png"][2](0)).reason == "no image"
    assert refusal(FILES["print.png"][2](0)).reason == "no image"


@pytest.mark.parametrize("name", unusual())
def test_an_unusual_image_becomes_rgb(name):
    image = read_image(unusual()[name], LIMITS)
    assert image.mode == "RGB" and np.asarray(image).dtype == np.uint8


def test_the_pixels_of_unusual_images_are_what_they_look_like():
    files = unusual()
    deep = np.asarray(read_image(files["deep.png"], LIMITS))[:, :, 0].ravel()
    assert abs(int(deep[600]) - 600 * 50 / 257) <= 1 and deep[-1] > 200
    turned = read_image(files["turned.jpg"], LIMITS)
    assert turned.size == (30, 40), "a camera that was held upright"
    glass = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert read_image(encoded(glass, "PNG"), LIMITS).getpixel((0, 0)) == (255, 255, 255)
    seen = Image.new("P", (2, 2), 0)
    seen.putpalette([10, 20, 30])
    assert read_image(encoded(seen, "PNG"), LIMITS).getpixel((1, 1)) == (10, 20, 30)
    first = read_image(files["film.gif"], LIMITS)
    single = read_image(encoded(noise(0), "GIF"), LIMITS)
    assert np.array_equal(np.asarray(first), np.asarray(single))
    assert is_animated(files["film.gif"])
    assert is_animated(files["film.webp"])
    assert not is_animated(files["one.png"])


def test_a_cell_may_hold_a_path_bytes_a_dict_of_both_or_a_pillow_image(tmp_path):
    data = encoded(noise(0), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for cell in ("a.png", tmp_path / "a.png", {"bytes": None, "path": "a.png"}):
        assert locate_image(cell, root=tmp_path) == str(tmp_path / "a.png")
    for cell in (data, bytearray(data), {"bytes": data, "path": "elsewhere/b.png"}):
        assert locate_image(cell, root=tmp_path) == data
    pillow = locate_image(noise(0), root=tmp_path)
    assert isinstance(pillow, bytes)
    assert np.array_equal(np.asarray(read_image(pillow, LIMITS)), np.asarray(noise(0)))
    for cell in (None, "", "  ", float("nan"), {"bytes": None, "path": None}):
        assert locate_image(cell, root=tmp_path) is None
    with pytest.raises(BadImage, match="holds a list; an image is a path"):
        locate_image(["a.png"], root=tmp_path)


def test_a_pillow_image_that_cannot_be_decoded_is_a_bad_image():
    data = encoded(noise(0, size=(200, 100)), "JPEG")
    cut, nothing = Image.open(io.BytesIO(data[: len(data) // 2])), Image.new("RGB", (0, 0))
    for cell in (cut, nothing, Image.new("I;16", (0, 0))):
        with pytest.raises(BadImage, match=r"is broken \(.+\); save it anew.") as caught:
            locate_image(cell, root=None)
        assert caught.value.reason == "broken"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_deep_gray_pillow_image_is_what_its_file_would_be(mode):
    values = np.array([[0, 600, 40_000, 65_535]], dtype=np.uint16)
    file = np.asarray(read_image(encoded(Image.fromarray(values), "PNG"), LIMITS))
    cell = Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    assert cell.mode == mode
    assert np.array_equal(np.asarray(read_image(locate_image(cell, root=None), LIMITS)), file)
    assert file[0, :, 0].tolist() == [0, 2, 155, 255]


@pytest.mark.parametrize(
    ("values", "grays"),
    [([0.2, 0.6], [51, 153]), ([51.0, 153.0], [51, 153]), ([0.0, 1e9], [0, 255])],
)
def test_where_fractions_are_white_follows_from_the_largest(values, grays):
    cell = Image.fromarray(np.array([values], dtype=np.float32))
    read = np.asarray(read_image(locate_image(cell, root=None), LIMITS))
    assert read[0, :, 0].tolist() == grays


def test_a_colon_alone_makes_no_address(tmp_path):
    for name in ("cat:1.png", "2024-01-01T10:20.png", "C:cat.png", "database:1.png"):
        assert locate_image(name, root=tmp_path) == str(tmp_path / name)
    for cell in ("https://a.b/c.png", "S3://bucket/c.png", "data:image/png;base64,AA", "FILE:/c.png",
                 "javascript:0"):  # fmt: skip
        with pytest.raises(BadImage, match="is an address, and nothing is fetched"):
            locate_image(cell, root=tmp_path)


def test_a_jpeg_is_decoded_no_smaller_than_twice_what_is_wanted():
    limits = replace(LIMITS, max_bytes=10**7)
    photo = Image.effect_noise((400, 240), 60).convert("RGB")
    file, exif = encoded(photo, "JPEG"), Image.Exif()
    sizes = {None: (400, 240), 61: (400, 240), 60: (200, 120), 30: (100, 60), 1: (50, 30)}
    for wanted, size in sizes.items():
        assert read_image(file, limits, at_least=wanted).size == size
    assert read_image(encoded(photo, "PNG"), limits, at_least=30).size == (400, 240)
    exif[0x0112] = 6
    turned = encoded(photo, "JPEG", exif=exif)
    # The short side, however it is turned.
    assert read_image(turned, limits, at_least=60).size == (120, 200)


def test_a_folder_reached_through_a_link_is_inside_of_itself(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(encoded(noise(0), "PNG"))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    found = check(["a.png"], root=tmp_path / "link")
    assert found.bad == {} and found.sources == [str(tmp_path / "real" / "a.png")]


def check(cells: list, *, root: Path, column: str = "photo", **options):
    how, lines = HowToCheck(LIMITS, **options), list(range(1, len(cells) + 1))
    return check_images(cells, file="posts.jsonl", lines=lines, column=column, root=root, how=how)


@pytest.fixture
def looked(monkeypatch) -> list:
    """The images that are decoded."""
    found: list = []
    whole = image_checks.read_image
    monkeypatch.setattr(
        image_checks, "read_image", lambda source, limits: found.append(source) or whole(source, limits)
    )  # fmt: skip
    return found


def test_an_image_is_looked_at_once_and_again_only_when_it_changes(tmp_path, looked):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(noise(number), "PNG"))
    (tmp_path / "bad.png").write_bytes(b"text")
    cells = ["0.png", "1.png", "2.png", "bad.png", "0.png", encoded(noise(9), "PNG")]
    options = {"root": tmp_path, "cache_dir": tmp_path / "cache"}
    first = check(cells, **options)
    assert len(looked) == 5, "the image of two posts is one"
    assert {post: row.line for post, row in first.bad.items()} == {3: 4}
    assert "posts.jsonl:4: column photo: the image is no image that can" in str(first.bad[3])
    looked.clear()
    assert check(cells, **options) == first and looked == []
    (tmp_path / "1.png").write_bytes(b"changed")
    os.utime(tmp_path / "1.png", (time.time() + 5,) * 2)
    second = check(cells, **options)
    assert looked == [str(tmp_path / "1.png")] and sorted(second.bad) == [1, 3]
    for file in (tmp_path / "cache").iterdir():
        file.write_text("{")
    assert check(cells, **options) == second, "a damaged cache is no cache"


def test_two_image_columns_of_one_file_are_both_remembered(tmp_path, looked):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("front.png", "back.png"):
            (tmp_path / folder / name).write_bytes(encoded(noise(0), "PNG"))
    for _ in range(2):
        for column in ("front", "back"):
            for folder in ("a", "b"):
                options = {"column": column, "cache_dir": tmp_path / "cache"}
                check([f"{column}.png"], root=tmp_path / folder, **options)
    assert len(looked) == 4


def test_all_ranks_share_the_work_and_agree(tmp_path, monkeypatch):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(
            encoded(noise(number), "PNG") if number != 3 else b"?"
        )
    cells = [f"{number}.png" for number in range(5)]
    shares = []
    monkeypatch.setattr(image_checks, "world_size", lambda: 2)
    for number in range(2):
        monkeypatch.setattr(image_checks, "rank", lambda number=number: number)
        monkeypatch.setattr(
            image_checks, "all_gather_objects", lambda share: shares.append(share) or [share]
        )
        with pytest.raises(KeyError):
            check(cells, root=tmp_path)  # one share alone does not know all images
    assert sorted(entry[0] for share in shares for entry in share) == [0, 1, 2, 3, 4]
    monkeypatch.setattr(image_checks, "all_gather_objects", lambda share: shares)
    assert list(check(cells, root=tmp_path).bad) == [3]


def corpus_of(folder: Path, rows: list[dict], **options):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskConfig(path=".", image="photo")
    with_images = options.pop("with_images", True)
    data = DataConfig(
        root=str(folder),
        max_image_bytes=LIMITS.max_bytes,
        max_image_pixels=LIMITS.max_pixels,
        **options,
    )
    return load_corpus(Recipe(tasks={"mood": task}, data=data), with_images=with_images)


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    (tmp_path / "good.png").write_bytes(encoded(noise(0), "PNG"))
    (tmp_path / "film.gif").write_bytes(unusual()["film.gif"])
    (tmp_path / "broken.png").write_bytes(b"<html>")
    photos = ["good.png", None, "broken.png", "film.gif", "missing.png", ""] * 5
    return [
        {"text": f"post {n}", "label": "ab"[n % 2], "photo": photo}
        for n, photo in enumerate(photos)
    ]


def test_a_post_with_a_bad_image_is_set_aside_and_named(tmp_path, rows):
    corpus = corpus_of(tmp_path, rows)
    images = [image for split in corpus.splits.values() for image in split.images]
    assert len(images) == 20 and images.count(None) == 10
    assert {Path(image).name for image in images if image} == {"good.png", "film.gif"}
    report = corpus.report
    first = [(row.line, row.reason) for row in report.set_aside[:2]]
    assert first == [(3, "image: no image"), (5, "image: missing")]
    text = "\n".join(report.lines())
    for part in (
        "set aside: 10 rows", "  image: missing: 5", "of 5 animated images the first frame is read",
        "train.jsonl:3: column photo: the image is no image that can be recognized (PNG, JPEG",
    ):  # fmt: skip
        assert part in text
    listed = report.rows()
    assert len(listed) == 10 and not any(row["kept"] for row in listed)
    assert listed[0]["value"] == "'broken.png'" and listed[0]["file"].endswith("train.jsonl")
    # A long list says where all of them are.
    report = corpus_of(tmp_path, rows + rows[:6]).report
    assert "  and 2 more" in report.lines()
    assert "  and 2 more, all in set_aside.jsonl" in report.lines(all_in="set_aside.jsonl")


def test_a_post_with_a_bad_image_may_be_kept_without_it(tmp_path, rows):
    corpus = corpus_of(tmp_path, rows, on_bad_image="text")
    assert sum(len(split) for split in corpus.splits.values()) == 30
    assert corpus.report.set_aside == [] and len(corpus.report.without_image) == 10
    assert "kept without their image: 10 rows" in "\n".join(corpus.report.lines())
    assert all(row["kept"] for row in corpus.report.rows())


def test_without_a_model_that_sees_no_image_is_looked_at(tmp_path, rows):
    corpus = corpus_of(tmp_path, rows, with_images=False)
    assert set(corpus.splits["train"].images) == {None} and corpus.report.rows() == []
    for row in rows:
        del row["photo"]
    assert len(corpus_of(tmp_path, rows, with_images=False).splits["train"]) == 27
    with pytest.raises(ValueError, match="tasks.mood.image is 'photo', but .* has no such column"):
        corpus_of(tmp_path, rows)


def test_paths_start_from_image_root(tmp_path, rows):
    (tmp_path / "elsewhere").mkdir()
    for name in ("good.png", "film.gif", "broken.png"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert corpus_of(tmp_path, rows, on_bad_image="text").report.images["."]["train"] == 0
    corpus = corpus_of(tmp_path, rows, on_bad_image="text", image_root=str(tmp_path / "elsewhere"))
    assert sum(corpus.report.images["."].values()) == 10


def test_more_bad_images_than_good_ones_are_a_warning(tmp_path, rows):
    assert corpus_of(tmp_path, rows, on_bad_image="text").report.warnings == []
    for row in rows:
        row["photo"] = "img\\\\a.png" if row["photo"] == "good.png" else row["photo"]
    report = corpus_of(tmp_path, rows, on_bad_image="text").report
    (warning,) = [line for line in report.lines() if line.startswith("warning: ")]
    for part in ("train.jsonl: 15 of 20 images are bad, most often (10) because of: missing. The first: ",
                 "the path has backslashes", "set data.image_root"):  # fmt: skip
        assert part in warning


def test_all_images_bad_or_no_folder_of_them_is_an_error_that_shows_the_first(tmp_path, rows):
    no_folder = r"^data.image_root \(.*/nowhere\): there is no such folder; .* Correct"
    with pytest.raises(ValueError, match=no_folder):
        corpus_of(tmp_path, rows, image_root=str(tmp_path / "nowhere"))
    all_bad = "no usable post: all 30 rows are bad. The first: .*jsonl:1.*is not there"
    with pytest.raises(ValueError, match=all_bad):
        corpus_of(tmp_path, [row | {"photo": "nowhere.png"} for row in rows])


def test_images_stored_in_parquet_are_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    photos = [{"bytes": encoded(noise(n), "PNG"), "path": f"{n}.png"} for n in range(10)]
    photos[4] = {"bytes": b"broken", "path": "4.png"}
    columns = {"text": [f"post {n}" for n in range(10)], "label": ["a", "b"] * 5, "photo": photos}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    recipe = Recipe(
        tasks={"mood": TaskConfig(path=".", image="photo")}, data=DataConfig(root=str(tmp_path))
    )
    corpus = load_corpus(recipe, with_images=True)
    images = [image for split in corpus.splits.values() for image in split.images]
    assert len(images) == 9
    assert all(Image.open(io.BytesIO(image)).size == (40, 30) for image in images)
    assert [(row.line, row.value) for row in corpus.report.set_aside] == [(5, "4.png")]


def test_tasks_with_another_image_column_do_not_share_posts(tmp_path, rows):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = TaskConfig(path=".", image="photo")
    recipe = Recipe(tasks={"a": shared, "b": shared, "c": replace(shared, image=None)})
    recipe.data.root = str(tmp_path)
    corpus = load_corpus(recipe, with_images=True)
    sizes = [sum(splits.values()) for splits in corpus.report.posts.values()]
    assert sizes == [20, 30]
    assert list(corpus.report.images.values())[1] == {"train": 0, "validation": 0}
