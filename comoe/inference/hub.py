"""Exports on the Hugging Face hub: found and fetched by name and revision, and pushed. Nothing fetched is executed."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comoe import __version__
from comoe.config.files import same_file
from comoe.inference.checkpoint_folder import CARD, MANIFEST, manifest_problem, read_manifest
from comoe.inference.export_config import CONFIG, WEIGHTS, read_export_config

if TYPE_CHECKING:
    from comoe.inference.exported import Exported

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""``organization/name``."""
SAFE = ("*.json", "*.safetensors", "*.onnx", "*.txt", "*.model", CARD)
"""What an export can hold: weights, JSON, vocabularies, the card. No Python file or pickle is fetched."""


def find_export(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder of an export: the one that is named, or the hub's, fetched into the library's cache.

    Args:
        name: a folder, or ``organization/name`` on the hub where no such folder exists.
        revision: branch, tag or commit on the hub; None is its main branch.
        token: for a private model; None takes ``HF_TOKEN`` or that of ``hf auth login``.
        cache_dir: instead of the library's own cache.
        force_download: fetch again what the cache has.
        local_files_only: take what the cache has.

    Raises:
        ValueError: neither a folder nor a model of the hub that can be reached.
    """
    if Path(name).exists() or not REPOSITORY.fullmatch(str(name)):
        if revision is not None:
            raise ValueError(
                f"{name} is a folder here, which has no revisions; leave revision out."
            )
        return Path(name)
    from huggingface_hub import snapshot_download  # takes 0.1 s, which a folder does not need

    with _readable(f"{name} is no folder, and the hub does not give it", token):
        found = snapshot_download(
            str(name),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=list(SAFE),
            library_name="comoe",
            library_version=__version__,
        )
    return Path(found)


def push_export(
    folder: str | Path,
    repository: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Export of comoe",
) -> str:
    """Upload an export in one commit: its own files and its card, and nothing else that lies in the folder.

    Args:
        folder: of an export.
        repository: ``organization/name``; made if it is not there.
        revision: branch; made if it is not there. None is the main branch.
        private: whether a new repository is; None is the organization's default.
        token: as for ``find_export``; it needs the right to write.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: no whole export, no such name, or what the hub answers.
    """
    folder = Path(folder)
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository!r} is no name on the hub; write organization/name.")
    files = export_files(folder)
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="comoe", library_version=__version__)
    with _readable(f"{folder} could not be pushed to {repository}", token):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=files,
                revision=revision,
                commit_message=message,
            )
        )


class OnHub:
    """What a ``huggingface_hub.ModelHubMixin`` does, for an export that was loaded."""

    exported: Exported

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> str | None:
        """Copy the export to a folder.

        Args:
            save_directory: the folder; it is made.
            push_to_hub: upload it as well.
            repo_id: as what, ``organization/name``; None is the name of the folder.
            options: of ``push_to_hub``.

        Returns:
            The address of the commit, None where nothing is uploaded.

        Raises:
            ValueError: the folder is the one that it was read from, or its files were changed.
        """
        target = Path(save_directory)
        if same_file(target, self.exported.folder):
            raise ValueError(f"{save_directory} is the folder that the model was read from.")
        target.mkdir(parents=True, exist_ok=True)
        copy_export(self.exported.folder, target)
        return self.push_to_hub(repo_id or target.name, **options) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the export to the hub in one commit, and return its address.

        Args:
            repo_id: ``organization/name``.
            options: of ``huggingface_hub.ModelHubMixin.push_to_hub``, such as private, branch, token
                and commit_message.

        Raises:
            ValueError: files of the export were changed.
        """
        from huggingface_hub import ModelHubMixin  # takes 0.2 s, which no prediction waits for

        return ModelHubMixin.push_to_hub(self, repo_id, **options)


def export_files(folder: Path) -> list[str]:
    """The files that an export wrote, its card included, relative to it.

    Raises:
        ValueError: no export, or a file is damaged.
    """
    read_export_config(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}, as exports of old versions; export the run again."
        )
    if problem := manifest_problem(folder, needed=(CONFIG, WEIGHTS), verify=True):
        raise ValueError(f"{folder}: {problem}; copy or export the folder again.")
    named = [*read_manifest(folder)["files"], MANIFEST, CARD]
    return sorted({name for name in named if (folder / name).is_file()})


def copy_export(source: Path, target: Path) -> None:
    """Copy the files that an export wrote.

    Raises:
        ValueError: no whole export.
    """
    for name in export_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def _readable(what: str, token: str | bool | None) -> Iterator[None]:
    """Inside, an error of the hub becomes a ValueError of one line, without the token."""
    try:
        yield
    except Exception as error:
        # Those of httpx or httpx2, which the library lets through, are no OSErrors.
        of_network = type(error).__module__.startswith("httpx")
        if not (of_network or isinstance(error, (OSError, ValueError, RuntimeError))):
            raise
        reason = " ".join(str(error).split())[:300]
        if isinstance(token, str) and token:
            reason = reason.replace(token, "***")
        raise ValueError(f"{what} ({type(error).__name__}: {reason})") from None
