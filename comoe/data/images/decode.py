"""Images of posts, as strangers send them: found, read and decoded within limits, or refused with one sentence.

Only the readers of ``FORMATS`` ever see a byte of a file. Size in bytes and, from the header, in
pixels are looked at before anything is decoded.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import stat
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
"""Pillow's readers that may be used; every other one (TIFF, PSD, EPS, ICNS, ...) never runs."""


VERSION = 2
"""Changes when the same file may be judged otherwise than before."""


ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|(?:about|blob|data|file|javascript):", re.IGNORECASE)
"""How the address of an image begins; any other colon may stand in the name of a file."""


Source = bytes | str
"""An image: the bytes of its file, or the file's path."""


# Our own limit, from the header, is lower or raised on purpose, and has a sentence of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(ValueError):
    """An image that cannot be used."""

    def __init__(self, reason: str, rule: str) -> None:
        super().__init__(rule)
        self.reason = reason
        """A word or two, to count by."""
        self.rule = rule
        """What is wrong and what to do, one sentence."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may take."""

    max_bytes: int
    """Of its file."""
    max_pixels: int
    """Width times height, as its header says."""


def locate_image(cell: Any, *, root: Path | None) -> Source | None:
    """The image that a cell of a data set means.

    Args:
        cell: a path, the bytes of a file, a dict of both (``datasets`` stores images so), a
            Pillow image, or nothing.
        root: resolved folder that paths start from and must not leave, not even by a link; None
            takes any path.

    Returns:
        Bytes, an absolute path, or None for an empty cell. Whether there is such a file is not
            looked at.

    Raises:
        BadImage: the cell means something else, a file outside of ``root``, or a Pillow image that
            cannot be decoded.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, (bytes, bytearray, memoryview)):
        # No bytes at all are an empty file rather than no image.
        return bytes(cell)
    if isinstance(cell, Image.Image):
        return _as_png(cell)
    if not isinstance(cell, (str, os.PathLike)):
        name = type(cell).__name__
        article = "an" if name[0] in "aeiou" else "a"
        raise BadImage(
            "wrong cell", f"holds {article} {name}; an image is a path, or the bytes of its file."
        )
    text = os.fspath(cell)
    if not text.strip():
        return None
    if ADDRESS.match(text):
        raise BadImage(
            "address",
            "is an address, and nothing is fetched; download the image and give its path.",
        )
    if "\x00" in text:
        raise BadImage("wrong cell", "has a NUL character in the path; correct it.")
    try:
        path = os.path.realpath(text if root is None else root / text)
        os.fsencode(path)
    except (OSError, ValueError) as error:
        raise BadImage(
            "wrong cell", f"has a path that no file can have ({_in_words(error)}); correct it."
        ) from error
    if root is not None and not Path(path).is_relative_to(root):
        raise BadImage("outside", f"leads out of the folder of the images, {root}; move it there.")
    return path


def read_image(source: Source, limits: ImageLimits, *, at_least: int | None = None) -> Image.Image:
    """Decode an image: its first frame, upright as its camera says, RGB of 8 bits.

    Transparent parts become white; 16-bit grays are scaled to 8 bits.

    Args:
        source: what ``locate_image`` gave.
        limits: of file and image.
        at_least: pixels of the short side that are wanted in the end. A JPEG may then come out 2, 4
            or 8 times smaller than it is, which takes a fraction of the time, as long as its short
            side keeps twice as many. Scaled to its last size it differs slightly from the whole
            image scaled to it. None decodes the whole.

    Raises:
        BadImage: it cannot be used, and why.
    """
    data = _read_bytes(source, limits.max_bytes)
    try:
        _check_pixels(_webp_size(data), limits.max_pixels)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image.size, limits.max_pixels)
            if at_least is not None and image.format == "JPEG":
                image.draft("RGB", (2 * at_least, 2 * at_least))
            image.load()
            upright = image
            # Whatever the notes of a camera hold, the image itself was decoded.
            with contextlib.suppress(Exception):
                upright = ImageOps.exif_transpose(image)
            return _as_rgb(upright)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        rule = f"is no image that can be recognized ({', '.join(FORMATS)}); save it anew."
        raise BadImage("no image", rule) from error
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        count = f"{int(found[0]):,}" if found else "too many"
        raise BadImage(
            "too many pixels", f"has {count} pixels; {_too_many(limits.max_pixels)}"
        ) from error
    except MemoryError as error:
        raise BadImage("too many pixels", "does not fit into memory; make it smaller.") from error
    except Exception as error:  # a hostile file can make a reader raise anything
        raise BadImage("broken", f"is broken ({_in_words(error)}); save it anew.") from error


def is_animated(source: Source) -> bool:
    """Whether an image that ``read_image`` takes has more frames than the one that is read."""
    try:
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
        ) as image:
            # A JPEG of several images is a photograph with its previews.
            return image.format in ("GIF", "WEBP", "PNG") and bool(
                getattr(image, "is_animated", False)
            )
    except Exception:  # the first frame was read, whatever is wrong with the next one
        return False


def _as_png(image: Image.Image) -> bytes:
    """A Pillow image as the bytes of a file; it may only now be decoded."""
    try:
        buffer = io.BytesIO()
        # Pillow's way from deep grays to RGBA would cut them off.
        (_from_deep_gray(image) if _is_deep_gray(image) else image.convert("RGBA")).save(
            buffer, "PNG"
        )
        return buffer.getvalue()
    except Exception as error:  # as in read_image
        raise BadImage("broken", f"is broken ({_in_words(error)}); save it anew.") from error


def _read_bytes(source: Source, limit: int) -> bytes:
    """The file, no more of it than allowed."""
    if isinstance(source, str):
        try:
            found = os.stat(source)
            if not stat.S_ISREG(found.st_mode):
                what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device or pipe"
                raise BadImage("no file", f"is {what}, not a file; correct the path.")
            if found.st_size > limit:
                raise BadImage("too many bytes", _too_large(found.st_size, limit))
            with open(source, "rb") as file:
                data = file.read(limit + 1)
        except BadImage:
            raise
        except FileNotFoundError as error:
            todo = (
                "the path has backslashes; write it with / instead."
                if "\\" in source
                else "correct the path."
            )
            raise BadImage("missing", f"is not there ({source}); {todo}") from error
        except (OSError, ValueError) as error:
            raise BadImage("unreadable", f"cannot be read ({_in_words(error)}).") from error
    else:
        data = source
    if not data:
        raise BadImage("empty", "is an empty file; give the image, or leave the cell empty.")
    if len(data) > limit:
        raise BadImage("too many bytes", _too_large(len(data), limit))
    return data


def _check_pixels(size: tuple[int, int] | None, limit: int) -> None:
    if size is not None and size[0] * size[1] > limit:
        raise BadImage(
            "too many pixels", f"has {size[0]:,} x {size[1]:,} pixels; {_too_many(limit)}"
        )


def _too_many(limit: int) -> str:
    return f"more than data.max_image_pixels ({limit:,}) are refused; make it smaller, or raise the limit."


def _too_large(size: int, limit: int) -> str:
    return f"has {size:,} bytes, more than data.max_image_bytes ({limit:,}); make it smaller, or raise the limit."


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a WebP file: its reader asks for the memory of the whole image while it is opened."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _as_rgb(image: Image.Image) -> Image.Image:
    if _is_deep_gray(image):
        return _from_deep_gray(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _is_deep_gray(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _from_deep_gray(image: Image.Image) -> Image.Image:
    """Greys of 16 bits (or more, or fractions) as RGB; Pillow itself would cut them off at 255.

    Whole numbers go up to 65,535. Fractions do not say where white is: the first of 1, 255 and
    65,535 that none exceeds, or the largest of them.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    most = float(values.max(initial=0))
    top = (
        65535.0
        if image.mode.startswith("I")
        else next(t for t in (1.0, 255.0, 65535.0, most) if most <= t)
    )
    return Image.fromarray(np.clip(values * (255 / top), 0, 255).astype(np.uint8)).convert("RGB")


def _in_words(error: BaseException) -> str:
    words = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [""])[0]
    return words[:120] or type(error).__name__
