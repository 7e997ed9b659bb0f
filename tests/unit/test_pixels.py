from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    SiglipImageProcessorPil,
    ViltImageProcessorPil,
    ViTConfig,
    ViTImageProcessorPil,
)

from comoe.data.batching import Collator, tokenize_split
from comoe.data.pixels import ImageProcessor, PixelReader, load_image_processor
from comoe.data.posts import HIDINGS, hidden, join_splits, unlabelled_posts
from comoe.rules import RULES
from comoe.schema import DataConfig
from comoe.tasks.catalog import Task
from tests.helpers_data import wordpiece_tokenizer
from tests.helpers_images import LIMITS, encoded, noise

TASKS = tuple(Task(name, "single_label", ("x", "y"), "macro_f1", 1.0, None, 0.0, True) for name in ("first", "second"))


@pytest.fixture
def reader() -> PixelReader:
    inner = ViTImageProcessorPil(size={"height": 24, "width": 32})
    return PixelReader(ImageProcessor(inner, side=24), LIMITS)


def collator(reader: PixelReader | None, **options) -> Collator:
    return Collator(wordpiece_tokenizer(["one", "two"]), TASKS, pixels=reader, **options)


def split_of(made: Collator, images: list, **options):
    split = made.encode_texts(["one two"] * len(images), images=images, **options)
    split.labelled[:] = True
    return split


@pytest.mark.parametrize(
    "kind", [ViTImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil, ConvNextImageProcessorPil]
)
def test_pixels_are_those_of_the_towers_own_processor(kind: type, tmp_path: Path) -> None:
    kind().save_pretrained(tmp_path)
    processor = load_image_processor(str(tmp_path))
    assert type(processor.inner) is kind
    image = noise(1, size=(300, 260))
    expected = kind()(images=image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(processor(image), expected) and processor(image).dtype == np.float32


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, ViltImageProcessorPil, ViTImageProcessorPil])
def test_every_picture_has_the_same_height_and_width(kind: type) -> None:
    processor = ImageProcessor(kind(), side=224)
    for size in ((1, 1), (640, 480), (480, 640), (50_000, 1), (3, 9000)):
        assert processor(Image.new("RGB", size)).shape == processor.shape


def test_a_processor_goes_through_its_file(tmp_path: Path) -> None:
    first = ImageProcessor(ViTImageProcessorPil(size={"height": 24, "width": 32}, image_mean=[0.1, 0.2, 0.3]), side=24)
    first.save(tmp_path)
    again = load_image_processor(str(tmp_path))
    assert np.array_equal(first(noise(2)), again(noise(2))) and again.shape == (3, 24, 32)


def test_a_tower_without_a_processor_gets_pictures_of_its_own_size(tmp_path: Path) -> None:
    ViTConfig(image_size=40).save_pretrained(tmp_path)
    processor = load_image_processor(str(tmp_path))
    assert processor.shape == (3, 40, 40)
    assert processor(Image.new("RGB", (9, 9), "white")).max() == 1.0
    config = {"image_processor_type": "NoSuchProcessor", "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert load_image_processor(str(tmp_path))(Image.new("RGB", (9, 9), "black")).max() == 0.0


def test_a_folder_with_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.vision.tower .*no image processor could be loaded. Give a folder"):
        load_image_processor(str(tmp_path))


def test_a_batch_lists_the_pictures_of_its_rows(reader: PixelReader, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(0), "PNG"))
    made = collator(reader)
    split = split_of(made, [None, str(tmp_path / "a.png"), encoded(noise(1), "PNG"), None])
    batch = made(split, np.array([2, 0, 1]))
    assert batch.image_rows_I.tolist() == [0, 2] and batch.pixels_I3HW.shape == (2, 3, 24, 32)
    assert batch.pixels_I3HW.dtype == torch.float32
    assert np.array_equal(batch.pixels_I3HW[0].numpy(), reader.processor(noise(1)))
    assert np.array_equal(batch.pixels_I3HW[1].numpy(), reader.processor(noise(0)))
    moved = batch.to("cpu")
    assert torch.equal(moved.pixels_I3HW, batch.pixels_I3HW)


def test_a_batch_without_pictures_has_a_blank_one(reader: PixelReader) -> None:
    made = collator(reader)
    split = split_of(made, [None, None])
    for indices in (np.array([0, 1]), np.array([], dtype=int)):
        batch = made(split, indices)
        assert batch.image_rows_I.tolist() == [-1] and not batch.pixels_I3HW.any()


def test_a_run_without_pictures_has_no_pixels_at_all() -> None:
    made = collator(None)
    batch = made(split_of(made, [encoded(noise(0), "PNG")]), np.array([0]))
    assert batch.pixels_I3HW is None and batch.image_rows_I is None


def test_a_row_per_task_lists_a_picture_that_is_prepared_once(reader: PixelReader) -> None:
    prepared = []
    processor = reader.processor
    reader.processor = lambda image: prepared.append(image) or processor(image)
    made = collator(reader, route_by="task")
    batch = made(split_of(made, [None, encoded(noise(0), "PNG")]), np.array([0, 1]), all_tasks=True)
    assert batch.row_ids_B.tolist() == [0, 0, 1, 1] and batch.image_rows_I.tolist() == [2, 3]
    assert torch.equal(batch.pixels_I3HW[0], batch.pixels_I3HW[1]) and len(prepared) == 1


def test_a_picture_that_went_bad_is_left_out_and_told_once(reader: PixelReader, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(noise(number), "PNG"))
    made = collator(reader)
    split = split_of(made, [str(path) for path in paths])
    paths[0].unlink()
    paths[1].write_bytes(b"changed")
    batch = made(split, np.array([0, 1, 2]))
    assert batch.image_rows_I.tolist() == [2] and len(batch.row_ids_B) == 3
    lost = reader.take_lost()
    assert set(lost) == {str(paths[0]), str(paths[1])} and "is not there" in lost[str(paths[0])]
    assert reader.take_lost() == {}


def test_hidden_texts_are_empty_posts_and_hidden_pictures_none(reader: PixelReader) -> None:
    made, image = collator(reader), encoded(noise(0), "PNG")
    seen, blind, mute = (split_of(made, [image], hide=what) for what in ("none", "image", "text"))
    assert seen.lengths.tolist() == blind.lengths.tolist() == [4] and mute.lengths.tolist() == [2]
    assert [made(split, np.array([0])).image_rows_I.tolist() for split in (seen, blind, mute)] == [[0], [-1], [0]]
    assert mute.texts == ["one two"], "predictions still show the text"
    posts = unlabelled_posts(["one two", "two"], tasks=["first", "second"], images=[image, None])
    tokens = tokenize_split(posts, made.tokenizer, tasks=TASKS, config=DataConfig(hide="text", max_length=16))
    assert tokens.lengths.tolist() == [2, 2] and tokens.posts.images == [image, None]


def test_what_can_be_hidden_is_what_the_rules_allow() -> None:
    holds, words = RULES["data.hide"]
    assert all(holds(name) and name in words for name in HIDINGS)
    posts = unlabelled_posts(["a"], tasks=[], words=[["a"]])
    with pytest.raises(ValueError, match="data.hide is text, but there are posts given as words"):
        hidden(posts, "text")
    with pytest.raises(ValueError, match="data.hide is 'txt', which does not exist; did you mean text"):
        hidden(posts, "txt")


def test_pictures_stay_with_their_posts() -> None:
    posts = unlabelled_posts(["a", "b", "c"], tasks=[], images=["1.png", None, "3.png"])
    assert posts.take(np.array([2, 0])).images == ["3.png", "1.png"]
    assert join_splits([posts, posts.take(np.array([1]))]).images == ["1.png", None, "3.png", None]
    with pytest.raises(ValueError, match="3 texts and 1 images"):
        unlabelled_posts(["a", "b", "c"], tasks=[], images=["1.png"])
