"""Images as strangers send them: damaged ones with the reason that must be given, and good but unusual ones."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from comoe.data.images.decode import ImageLimits

LIMITS = ImageLimits(max_bytes=60_000, max_pixels=100_000)
"""Of the images made here."""


def noise(seed: int, *, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """An image that no format makes small."""
    values = np.random.default_rng(seed).integers(
        0, 256, size=(size[1], size[0], 3), dtype=np.uint8
    )
    return Image.fromarray(values)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A small PNG file that claims to be of any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def webp_header(width: int, height: int) -> bytes:
    """The same of an extended WebP file."""
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body += encoded(noise(0), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def cut(format: str, share: float) -> Callable[[int], bytes]:
    """The first part of a good file."""

    def make(seed: int) -> bytes:
        data = encoded(noise(seed), format)
        return data[: int(len(data) * share)]

    return make


def scrambled_png(seed: int) -> bytes:
    """A PNG file whose packed pixels were overwritten."""
    data = bytearray(encoded(noise(seed), "PNG"))
    data[60:160] = np.random.default_rng(seed).integers(0, 256, 100, dtype=np.uint8).tobytes()
    return bytes(data)


FILES: dict[str, tuple[str, str, Callable[[int], bytes]]] = {
    "cut.png": ("broken", "truncated", cut("PNG", 0.6)),
    "cut.jpg": ("broken", "truncated", cut("JPEG", 0.6)),
    "cut.gif": ("broken", "", cut("GIF", 0.4)),
    "cut.webp": ("broken", "", cut("WEBP", 0.5)),
    "cut.bmp": ("broken", "truncated", cut("BMP", 0.5)),
    "head.jpg": ("broken", "Truncated", lambda seed: encoded(noise(seed), "JPEG")[:12]),
    "head.png": ("no image", "no image that can", lambda seed: encoded(noise(seed), "PNG")[:10]),
    "scrambled.png": ("broken", "broken", scrambled_png),
    "empty.png": ("empty", "an empty file", lambda seed: b""),
    "zeros.jpg": ("no image", "no image that can", lambda seed: bytes(500 + seed)),
    "page.jpg": ("no image", "no image that can", lambda seed: b"<!DOCTYPE html><html></html>"),
    "drawing.svg": ("no image", "no image that can", lambda seed: b'<svg onload="alert(1)"></svg>'),
    "print.png": (
        "no image",
        "no image that can",
        lambda seed: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ),
    "scan.png": ("no image", "no image that can", lambda seed: encoded(noise(seed), "TIFF")),
    "dust.png": (
        "no image",
        "no image that can",
        lambda seed: bytes([0x8B, 0xFE, 0x99]) + noise(seed).tobytes(),
    ),
    "bomb.png": (
        "too many pixels",
        "has 3,000,000,000 pixels",
        lambda seed: png_header(50_000, 60_000),
    ),
    "bomb.webp": ("too many pixels", "16,000,000 x 200", lambda seed: webp_header(16_000_000, 200)),
    "wide.png": (
        "too many pixels",
        "400 x 300",
        lambda seed: encoded(Image.new("1", (400, 300)), "PNG"),
    ),
    "tall.gif": (
        "too many pixels",
        "10 x 20,000",
        lambda seed: encoded(Image.new("L", (10, 20_000)), "GIF"),
    ),
    "heavy.bmp": (
        "too many bytes",
        "bytes, more than",
        lambda seed: encoded(noise(seed, size=(200, 120)), "BMP"),
    ),
}
"""Name of a file -> reason, words of the rule, (seed) -> its bytes. ``LIMITS`` hold."""


def place_damaged(folder: Path, turn: int) -> list[tuple[str, str, str]]:
    """Write every kind of damaged image once into ``folder``; (path in the cell, reason, words of the rule) of each.

    Cells that name no file below the folder are among them.
    """
    below = folder / f"turn{turn}"
    below.mkdir(parents=True)
    found = []
    for name, (reason, words, make) in FILES.items():
        (below / name).write_bytes(make(turn))
        found.append((f"turn{turn}/{name}", reason, words))
    outside = folder.parent / f"outside{turn}.png"
    outside.write_bytes(encoded(noise(turn), "PNG"))
    (below / "link.png").symlink_to(outside)
    (below / "gone.png").symlink_to(below / "nothing.png")
    (below / "folder.png").mkdir()
    os.mkfifo(below / "pipe.png")
    return found + [
        (f"turn{turn}/link.png", "outside", "leads out of"),
        (f"turn{turn}/gone.png", "missing", "is not there"),
        (f"turn{turn}/missing.png", "missing", "is not there"),
        (f"turn{turn}/folder.png", "no file", "is a folder"),
        (f"turn{turn}/pipe.png", "no file", "a device or pipe"),
        (f"../outside{turn}.png", "outside", "leads out of"),
        (str(outside), "outside", "leads out of"),
        ("/etc/passwd", "outside", "leads out of"),
        (f"http://example.com/{turn}.png", "address", "nothing is fetched"),
        (f"data:image/png;base64,iVBOR{turn}", "address", "nothing is fetched"),
        (f"turn{turn}/a\x00b.png", "wrong cell", "NUL"),
        (f"turn{turn}/\ud800.png", "wrong cell", "no file can have"),
        (f"turn{turn}/" + "n" * 5000 + ".png", "unreadable", "cannot be read"),
    ]


def unusual() -> dict[str, bytes]:
    """Name -> bytes of good images that a careless reader stumbles over."""
    image = noise(1)
    deep = Image.fromarray(np.arange(0, 60_000, 50, dtype=np.uint16).reshape(30, 40))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [noise(seed) for seed in range(3)]
    return {
        "one.png": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "line.png": encoded(noise(2, size=(3000, 2)), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "print.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "palette.png": encoded(image.quantize(16), "PNG"),
        "bits.bmp": encoded(image.convert("1"), "BMP"),
        "glass.png": encoded(image.convert("RGBA"), "PNG"),
        "film.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "film.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "turned.jpg": encoded(image, "JPEG", exif=turned),
        "jpeg_inside.png": encoded(image, "JPEG"),
        "no_ending": encoded(image, "WEBP"),
    }
