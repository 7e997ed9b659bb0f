import gc
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViltImageProcessorPil,
    ViTConfig,
    ViTImageProcessorPil,
)

from comoe.config.recipe import DataConfig
from comoe.data.collator import Collator
from comoe.data.images import pixels as module
from comoe.data.images.pixels import ImageProcessor, PixelReader, load_image_processor
from comoe.data.posts import PostSplit, hidden, unlabelled_posts
from comoe.data.tokens.split import tokenize_split
from comoe.tasks.task import Task
from tests.helpers_data import wordpiece_tokenizer
from tests.helpers_images import LIMITS, encoded, noise

TASKS = tuple(
    Task(name, "single_label", ("x", "y"), "macro_f1", 1.0, None, 0.0, True)
    for name in ("first", "second")
)


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
    "kind",
    [ViTImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil, ConvNextImageProcessorPil],
)  # fmt: skip
def test_pixels_are_those_of_the_towers_own_processor(kind, tmp_path):
    kind().save_pretrained(tmp_path)
    processor = load_image_processor(str(tmp_path))
    assert type(processor.inner) is kind
    image = noise(1, size=(300, 260))
    expected = kind()(images=image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(processor(image), expected) and processor(image).dtype == np.float32


@pytest.mark.parametrize(
    "kind", [CLIPImageProcessorPil, ViltImageProcessorPil, ViTImageProcessorPil]
)
def test_every_image_has_the_same_height_and_width(kind):
    processor = ImageProcessor(kind(), side=224)
    for size in ((1, 1), (640, 480), (480, 640), (50_000, 1), (3, 9000)):
        assert processor(Image.new("RGB", size)).shape == processor.shape


def test_a_processor_goes_through_its_file(tmp_path):
    first = ImageProcessor(
        ViTImageProcessorPil(size={"height": 24, "width": 32}, image_mean=[0.1, 0.2, 0.3]), side=24
    )
    first.save(tmp_path)
    again = load_image_processor(str(tmp_path))
    assert np.array_equal(first(noise(2)), again(noise(2))) and again.shape == (3, 24, 32)


def test_a_tower_without_a_processor_gets_images_of_its_own_size(tmp_path):
    ViTConfig(image_size=40).save_pretrained(tmp_path)
    processor = load_image_processor(str(tmp_path))
    assert processor.shape == (3, 40, 40)
    assert processor(Image.new("RGB", (9, 9), "white")).max() == 1.0
    config = {
        "image_processor_type": "NoSuchProcessor",
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert load_image_processor(str(tmp_path))(Image.new("RGB", (9, 9), "black")).max() == 0.0


def test_a_batch_lists_the_images_of_its_rows(reader, tmp_path):
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


def test_a_batch_without_images_has_a_blank_one_and_a_run_without_images_none(reader):
    made = collator(reader)
    split = split_of(made, [None, None])
    for indices in (np.array([0, 1]), np.array([], dtype=int)):
        batch = made(split, indices)
        assert batch.image_rows_I.tolist() == [-1] and not batch.pixels_I3HW.any()
    batch = collator(None)(split_of(made, [encoded(noise(0), "PNG")]), np.array([0]))
    assert batch.pixels_I3HW is None and batch.image_rows_I is None


def test_a_row_per_task_lists_an_image_that_is_prepared_once(reader):
    prepared = []
    processor = reader.processor
    reader.processor = lambda image: prepared.append(image) or processor(image)
    made = collator(reader, row_per_task=True)
    batch = made(split_of(made, [None, encoded(noise(0), "PNG")]), np.array([0, 1]), all_tasks=True)
    assert batch.row_ids_B.tolist() == [0, 0, 1, 1] and batch.image_rows_I.tolist() == [2, 3]
    assert batch.image_numbers_I.tolist() == [0, 0] and len(batch.pixels_I3HW) == len(prepared) == 1


def test_rows_know_their_images_where_some_are_shared_and_some_went_bad(reader):
    a, b, bad = encoded(noise(0), "PNG"), encoded(noise(1), "PNG"), b"text"
    pixels, rows, numbers = reader.collate([bad, b, None, a, b, bad, a])
    assert (rows.tolist(), numbers.tolist(), len(pixels)) == ([1, 3, 4, 6], [0, 1, 0, 1], 2)
    assert np.array_equal(pixels[1].numpy(), reader.processor(noise(0)))
    pixels, rows, numbers = reader.collate([None, b, a])
    assert (rows.tolist(), numbers, len(pixels)) == ([1, 2], None, 2)
    pixels, rows, numbers = reader.collate([bad, None])
    assert (rows.tolist(), numbers, len(pixels)) == ([-1], None, 1)


def test_some_rows_of_a_batch_keep_their_own_images_each_once(reader):
    made = collator(reader, row_per_task=True)
    images = [encoded(noise(0), "PNG"), None, encoded(noise(1), "PNG")]
    batch = made(split_of(made, images), np.array([0, 1, 2]))
    assert batch.image_rows_I.tolist() == [0, 1, 4, 5]
    assert batch.image_numbers_I.tolist() == [0, 0, 1, 1]
    expected = {0: 0, 1: 0, 4: 1, 5: 1}
    for rows in ([1, 4, 5], [5, 2], [5, 0, 1, 4], [4], [2, 3], [3, 1, 5]):
        part = batch.take(torch.tensor(rows))
        again = part.take(torch.arange(len(rows)))
        for found in (part, again):
            seen = dict(
                zip(found.image_rows_I.tolist(), found.image_numbers_I.tolist(), strict=True)
            )
            posts = {place: expected[row] for place, row in enumerate(rows) if row in expected}
            assert len(found.pixels_I3HW) == max(1, len(set(posts.values())))
            assert set(seen) == (set(posts) or {-1})
            for place, post in posts.items():
                assert torch.equal(found.pixels_I3HW[seen[place]], batch.pixels_I3HW[post])


def test_a_tower_that_reads_patches_and_a_folder_without_processor_are_refused(tmp_path):
    patches = r"model.vision.tower: .*Siglip2.* shape \(256, 768\), not .* fixed reso"
    with pytest.raises(ValueError, match=patches):
        ImageProcessor(Siglip2ImageProcessorPil(), side=224)
    nothing = "model.vision.tower .*no image processor could be loaded. Give a folder"
    with pytest.raises(ValueError, match=nothing):
        load_image_processor(str(tmp_path))


@pytest.mark.parametrize(
    ("inner", "wanted"),
    [(ViTImageProcessorPil(size={"height": 24, "width": 32}), 32),
     (CLIPImageProcessorPil(do_resize=False, crop_size={"height": 32, "width": 32}), None),
     (CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}), 40),
     (ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875), 256), (ViltImageProcessorPil(), 384)],
)  # fmt: skip
def test_a_processor_knows_how_much_of_an_image_it_wants(inner, wanted):
    assert ImageProcessor(inner, side=384).short_side == wanted


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(reader, monkeypatch):
    photo = noise(0, size=(8, 6)).resize((300, 225), Image.Resampling.BICUBIC)
    sizes = []
    whole = reader.processor
    reader.limits = type(LIMITS)(max_bytes=10**6, max_pixels=10**6)
    monkeypatch.setattr(ImageProcessor, "__call__", spied(sizes, ImageProcessor.__call__))
    (found,) = reader.read([encoded(photo, "JPEG", quality=95)])
    assert sizes == [(100 + 50, 113)]
    assert np.abs(found - whole(photo)).max() < 0.1 < np.abs(found).max()


def spied(sizes: list, call):
    return lambda self, image: sizes.append(image.size) or call(self, image)


def test_threads_start_with_the_first_batch_and_end_with_the_reader(monkeypatch):
    log = []

    class Noted(ThreadPoolExecutor):
        def __init__(self, *args) -> None:
            log.append("started")
            super().__init__(*args)

        def shutdown(self, wait: bool = True) -> None:
            log.append("ended")
            super().shutdown(wait)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Noted)
    reader = PixelReader(
        ImageProcessor(ViTImageProcessorPil(size={"height": 24, "width": 32}), side=24), LIMITS
    )
    reader.read([encoded(noise(0), "PNG")])
    assert log == []
    for _ in range(2):
        reader.read([encoded(noise(0), "PNG"), encoded(noise(1), "PNG")])
    assert log == ["started"]
    del reader
    gc.collect()
    assert log == ["started", "ended"]


def test_an_image_that_went_bad_is_left_out_and_told_once(reader, tmp_path):
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


def test_hidden_texts_are_empty_posts_and_hidden_images_none(reader):
    made, image = collator(reader), encoded(noise(0), "PNG")
    splits = [split_of(made, [image], config=DataConfig(hide=w)) for w in ("none", "image", "text")]
    assert [split.lengths.tolist() for split in splits] == [[4], [4], [2]]
    rows = [made(split, np.array([0])).image_rows_I.tolist() for split in splits]
    assert rows == [[0], [-1], [0]]
    assert splits[2].texts == ["one two"], "predictions still show the text"
    posts = unlabelled_posts(["one two", "two"], tasks=["first", "second"], images=[image, None])
    config = DataConfig(hide="text", max_length=16)
    tokens = tokenize_split(posts, made.tokenizer, tasks=TASKS, config=config)
    assert tokens.lengths.tolist() == [2, 2] and tokens.posts.images == [image, None]
    tagged = unlabelled_posts(["a"], tasks=[], words=[["a"]])
    with pytest.raises(ValueError, match="data.hide is text, but there are posts given as words"):
        hidden(tagged, "text")


def test_images_stay_with_their_posts():
    posts = unlabelled_posts(["a", "b", "c"], tasks=[], images=["1.png", None, "3.png"])
    assert posts.take(np.array([2, 0])).images == ["3.png", "1.png"]
    assert PostSplit.join([posts, posts.take(np.array([1]))]).images == [
        "1.png",
        None,
        "3.png",
        None,
    ]
    with pytest.raises(ValueError, match="3 texts and 1 images"):
        unlabelled_posts(["a", "b", "c"], tasks=[], images=["1.png"])
