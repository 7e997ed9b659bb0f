"""The larger encoder of the starter kit: pieces fetched, checked and joined; no test needs a network."""

import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from comoe.starter.download import Archive
from comoe.starter.kit import ENCODER_FILES
from comoe.starter.mpnet import CARD, MPNET, PIECES, build_mpnet
from comoe.starter.registry import FOLDERS, prepare_folder
from tests.unit.starter import test_starter

make_wheel, shelf = test_starter.make_wheel, test_starter.shelf


@pytest.fixture
def pieces(shelf) -> tuple[dict[Archive, str], Archive]:  # noqa: F811
    """A small encoder in three wheels, and their whole."""
    joined = io.BytesIO()
    with zipfile.ZipFile(joined, "w") as archive:
        for name in (*ENCODER_FILES, "README.md"):
            archive.writestr(f"all-mpnet-base-v2/{name}", f"{name} of mpnet")
    content = joined.getvalue()
    cut = len(content) // 3
    parts = [content[:cut], content[cut : 2 * cut], content[2 * cut :]]
    found = {
        make_wheel(shelf, f"part-{n}", {f"part/z.zip.{n}": part}): f"part/z.zip.{n}"
        for n, part in enumerate(parts)
    }
    digest = hashlib.sha256(content).hexdigest()
    return found, Archive("part-0 to -2", "1.0", "z.zip", digest, len(content))


def prepared(folder: Path, pieces: dict[Archive, str], whole: Archive) -> list[str]:
    said: list[str] = []

    def build(content: Path, **arguments: object) -> None:
        build_mpnet(content, pieces=pieces, whole=whole, **arguments | {"say": said.append})

    prepare_folder(folder, build, progress=False)
    return said


def test_the_pieces_become_an_encoder_and_the_license_is_told(tmp_path, pieces):
    said = prepared(tmp_path / "mpnet", *pieces)
    for name in ENCODER_FILES:
        assert (tmp_path / "mpnet" / name).read_text() == f"{name} of mpnet"
    assert any("Apache-2.0" in line for line in said) and any("3 of 3" in line for line in said)
    licenses = (tmp_path / "mpnet" / "LICENSES.md").read_text()
    assert "README.md of mpnet" in licenses and pieces[1].sha256 in licenses
    assert not (tmp_path / ".mpnet-downloads").exists()


def test_an_interrupted_download_goes_on_and_a_torn_file_is_fetched_again(
    tmp_path, shelf, pieces  # noqa: F811
):  # fmt: skip
    first, second, third = (shelf / archive.filename for archive in pieces[0])
    aside = third.rename(tmp_path / "aside.whl")
    with pytest.raises(ValueError, match="(?s)part-2 1.0 .*could not be downloaded.*part-0==1.0"):
        prepared(tmp_path / "mpnet", *pieces)
    downloads = tmp_path / ".mpnet-downloads"
    assert {path.name for path in downloads.iterdir()} == {first.name, second.name}
    aside.rename(third)
    first.unlink()  # has arrived, so it is not asked for again
    (downloads / second.name).write_bytes(b"half")
    prepared(tmp_path / "mpnet", *pieces)
    assert (tmp_path / "mpnet" / "config.json").read_text() == "config.json of mpnet"


def test_pieces_that_are_not_the_pinned_whole_are_refused(tmp_path, pieces):
    swapped = dict(reversed(pieces[0].items()))
    with pytest.raises(ValueError, match="z.zip: sha256 is"):
        prepared(tmp_path / "mpnet", swapped, pieces[1])
    assert not (tmp_path / "mpnet").exists()


def test_it_is_pinned_and_fetched_only_when_named():
    assert FOLDERS["kit:mpnet"][1] is build_mpnet and CARD.endswith("README.md")
    assert len(PIECES) == 5 and len({archive.sha256 for archive in [*PIECES, MPNET]}) == 6
    assert sum(archive.size for archive in PIECES) > MPNET.size > 400e6
