"""Images to the numbers that a vision tower reads, all of one height and width."""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from comoe.config.recipe import DataConfig
from comoe.data.images.decode import BadImage, ImageLimits, Source, read_image
from comoe.deferred import Deferred

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Deferred("torch")

THREADS = min(4, os.cpu_count() or 1)
"""Images prepared at the same time."""


NARROWEST = 16
"""Of an image that is longer than this many times its width, only the middle is read: processors
that scale the short side would blow it up to any size."""


DEFAULT_SIZE = 224
"""Height and width where neither the processor nor the model says one."""


class ImageProcessor:
    """A Hugging Face image processor without torchvision, whose outputs all have one shape.

    One that keeps the proportions of images (ViLT) gets them as squares.

    Args:
        inner: the processor.
        side: height and width of those squares.

    Raises:
        ValueError: its output for an image is not (3, H, W).
    """

    def __init__(self, inner: Any, *, side: int) -> None:
        self.inner = inner
        self._side = side
        self._squared = (
            self._run(_blank(2 * side, side)).shape != self._run(_blank(side, side)).shape
        )
        shape = self(_blank(side, side)).shape
        if len(shape) != 3 or shape[0] != 3:
            raise ValueError(
                f"model.vision.tower: its image processor, {type(inner).__name__}, turns an image into numbers of "
                f"shape {shape}, not (3, height, width). Take a tower that reads whole images of one fixed "
                "resolution; those that want patches or crops (NaFlex and the like) cannot be used."
            )
        self.shape: tuple[int, int, int] = shape
        """(3, H, W) of every output."""
        self.short_side = side if self._squared else _short_side(inner, shape)
        """Most pixels of an image's short side that count: larger ones are scaled down to it. None
        if not known."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Scale, crop and normalize an RGB image: float32, shape (3, H, W)."""
        if self._squared:
            image = image.resize((self._side, self._side), Image.Resampling.BICUBIC)
        width, height = image.size
        wide, high = min(width, NARROWEST * height), min(height, NARROWEST * width)
        if (wide, high) != image.size:
            left, top = (width - wide) // 2, (height - high) // 2
            image = image.crop((left, top, left + wide, top + high))
        return self._run(image)

    def save(self, folder: Path) -> None:
        """Write ``preprocessor_config.json``, which ``load_image_processor`` reads."""
        self.inner.save_pretrained(str(folder))

    def _run(self, image: Image.Image) -> np.ndarray:
        made = self.inner(images=[image], return_tensors="np", input_data_format="channels_last")
        return np.ascontiguousarray(made["pixel_values"][0], dtype=np.float32)


class PixelReader:
    """Reads images of a batch; an image that cannot be read any more is left out and remembered.

    Args:
        processor: from ``load_image_processor``.
        limits: of file and image.
    """

    def __init__(self, processor: ImageProcessor, limits: ImageLimits) -> None:
        self.processor = processor
        self.limits = limits
        self.blank = np.zeros(processor.shape, dtype=np.float32)
        """What stands for an image where a batch has none."""
        self._pool: ThreadPoolExecutor | None = None
        self._at_least = processor.short_side
        self._lost: dict[Source, str] = {}
        self._lock = threading.Lock()

    def read(self, sources: Sequence[Source]) -> list[np.ndarray | None]:
        """The numbers of each image, float32, shape (3, H, W); None for one that went bad since it was checked.

        Large JPEGs are decoded smaller, see ``read_image``: the numbers may differ slightly from
        what the processor makes of the whole image.
        """
        if len(sources) < 2:
            return [self._read(source) for source in sources]
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS)
                weakref.finalize(self, self._pool.shutdown, wait=False)
        return list(self._pool.map(self._read, sources))

    def collate(self, images_B: Sequence[Source | None]) -> tuple[Tensor, Tensor, Tensor | None]:
        """``pixels_I3HW``, ``image_rows_I`` and ``image_numbers_I`` of a ``Batch``.

        An image that several rows have (a row per task) is there once. Where there is none a blank
        one of row -1 is.

        Args:
            images_B: image of each row.
        """
        different = list(dict.fromkeys(source for source in images_B if source is not None))
        made = {
            source: pixels
            for source, pixels in zip(different, self.read(different), strict=True)
            if pixels is not None
        }
        place = {source: number for number, source in enumerate(made)}
        rows = [row for row, source in enumerate(images_B) if source in place]
        numbers = (
            None if len(rows) <= len(made) else torch.tensor([place[images_B[row]] for row in rows])
        )
        pixels = torch.from_numpy(np.stack(list(made.values()) or [self.blank]))
        return pixels, torch.tensor(rows or [-1], dtype=torch.int64), numbers

    def take_lost(self) -> dict[Source, str]:
        """Images that went bad since the last call, and why; called from any thread."""
        with self._lock:
            lost, self._lost = self._lost, {}
        # Threads found them in any order.
        return dict(sorted(lost.items(), key=lambda item: str(item[0])))

    def _read(self, source: Source) -> np.ndarray | None:
        try:
            return self.processor(read_image(source, self.limits, at_least=self._at_least))
        except BadImage as error:
            with self._lock:
                self._lost[source] = error.rule
            return None


def load_image_processor(name: str, *, trust_remote_code: bool = False) -> ImageProcessor:
    """The image processor of a vision tower, or of a model of both sides; Pillow does the work, never torchvision.

    A folder without ``preprocessor_config.json`` gets images of its model's size, normalized to
    -1 to 1.

    Args:
        name: folder, or hub name.
        trust_remote_code: let the model's repository run its own Python code.

    Raises:
        ValueError: neither a processor nor a model's configuration is there.
    """
    # The library's image side takes seconds to import, and most models read none.
    from transformers import AutoImageProcessor

    try:
        inner = AutoImageProcessor.from_pretrained(
            name, backend="pil", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        inner = _plain_processor(name, trust_remote_code=trust_remote_code, reason=error)
    return ImageProcessor(inner, side=_side(inner))


def _plain_processor(name: str, *, trust_remote_code: bool, reason: Exception) -> Any:
    """Scale and normalize, by what the model's configuration says of its images."""
    from transformers import AutoConfig, ViTImageProcessorPil

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        message = (str(reason).strip().splitlines() or ["no message"])[0]
        raise ValueError(
            f"model.vision.tower ({name}): no image processor could be loaded. Give a folder that "
            f"holds preprocessor_config.json or config.json, or a hub name with a network at hand. "
            f"({type(reason).__name__}: {message})"
        ) from error
    own = Path(name) / "preprocessor_config.json"
    stored = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    size = getattr(getattr(config, "vision_config", config), "image_size", None) or DEFAULT_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    kept = {
        key: stored[key]
        for key in ("image_mean", "image_std", "resample", "rescale_factor")
        if key in stored
    }
    return ViTImageProcessorPil(size={"height": height, "width": width}, **kept)


def _sizes(inner: Any, name: str) -> dict[str, Any]:
    """``size`` or ``crop_size`` of a processor."""
    size = getattr(inner, name, None)
    return (
        dict(size) if isinstance(size, Mapping) else vars(size) if hasattr(size, "__dict__") else {}
    )


def _side(inner: Any) -> int:
    """Height of the squares that fit a processor best."""
    for values in (_sizes(inner, "crop_size"), _sizes(inner, "size")):
        for key in ("height", "shortest_edge", "max_height", "longest_edge"):
            if values.get(key):
                return int(values[key])
    return DEFAULT_SIZE


def _short_side(inner: Any, shape: tuple[int, ...]) -> int | None:
    """Pixels that a processor's own scaling leaves of a short side, at most; None where it does not scale."""
    found = [value for value in _sizes(inner, "size").values() if isinstance(value, int)]
    if not getattr(inner, "do_resize", False) or not found:
        return None
    # ConvNext scales to more than it keeps.
    return math.ceil(max(*found, *shape[1:]) / min(1.0, getattr(inner, "crop_pct", None) or 1.0))


def _blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def limits_of(config: DataConfig) -> ImageLimits:
    """The limits that a recipe sets."""
    return ImageLimits(max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels)
