"""An export, read: safetensors and JSON only, and nothing in the folder is executed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comoe.config.errors import unknown_name
from comoe.config.failure import parsing
from comoe.config.plugins import load_plugins
from comoe.config.recipe import DataConfig, ModelConfig, Recipe
from comoe.data.collator import Collator
from comoe.data.tokens.json_tokenizer import description_of, read_json_tokenizer
from comoe.data.tokens.vocabulary import embedding_problem, prepare_causal, tokenizer_problem
from comoe.inference.checkpoint_folder import MANIFEST, manifest_problem
from comoe.inference.export_config import (
    AGAIN,
    CONFIG,
    IMAGES,
    WEIGHTS,
    read_export_config,
    recipe_of_export,
)
from comoe.inference.onnx_model import ONNX, OnnxModel
from comoe.tasks.lexicon import FILE, Lexicon
from comoe.tasks.task import Task, tasks_from

if TYPE_CHECKING:
    from comoe.data.images.pixels import ImageProcessor
    from comoe.models.model import MultiTaskModel


@dataclass(frozen=True, slots=True)
class Exported:
    """An export in memory."""

    model: MultiTaskModel | OnnxModel
    """With its weights, on the CPU, in evaluation mode."""
    tasks: tuple[Task, ...]
    """In the order of the model's heads."""
    tokenizer: Any
    """The encoder's: of transformers, or a ``JsonTokenizer`` that does the same."""
    image_processor: ImageProcessor | None
    """The vision tower's; None where the model reads no images."""
    model_config: ModelConfig
    """How the model is built; ``encoder`` names what it was trained from."""
    data_config: DataConfig
    """How posts were read: ``max_length``, ``normalize``, ``hide`` and the limits of images count
    here."""
    config: Mapping[str, Any]
    """``config.json`` as it is."""
    folder: Path
    """Where it was read from."""
    lexicon: Lexicon | None = None
    """That the model reads; None where it reads none."""

    @property
    def backend(self) -> str:
        """What runs the model, key of ``BACKENDS``."""
        return "onnx" if isinstance(self.model, OnnxModel) else "torch"

    def collator(self) -> Collator:
        """Makes batches as training did."""
        pixels = None
        if self.image_processor is not None:
            from comoe.data.images.pixels import PixelReader, limits_of

            pixels = PixelReader(self.image_processor, limits_of(self.data_config))
        config, most = self.model_config, self.data_config.max_posts
        return Collator(
            self.tokenizer, self.tasks, row_per_task=config.row_per_task, pixels=pixels, max_posts=most,
            lexicon=self.lexicon,
        )  # fmt: skip


def load_exported(
    folder: str | Path,
    *,
    verify: bool = True,
    backend: str = "torch",
    threads: int | None = None,
    plain: bool = False,
) -> Exported:
    """Read an export: safetensors, ONNX and JSON only, nothing in the folder is executed.

    Args:
        folder: the export.
        verify: compare the digests of its files with those that were written.
        backend: key of ``BACKENDS``; only its file of weights is read.
        threads: of each operation, a setting of the process; None is what PyTorch takes.
        plain: for predictions alone: model and tokenizer are no classes of transformers where there
            are others that do the same, as transformers takes seconds to import.

    Raises:
        ValueError: no such folder, a file is missing or damaged, made by a newer comoe, weights
            that do not fit or are not finite, or no such backend.
    """
    folder = Path(folder)
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    load, file = BACKENDS[backend]
    config = read_export_config(folder)
    if file != WEIGHTS and not (folder / file).is_file():
        raise ValueError(
            f"{folder} has no {file}; `comoe export --checkpoint {folder} --output {folder} "
            f"--format {backend}` adds it."
        )
    # Older versions wrote no manifest.
    if verify and (folder / MANIFEST).is_file():
        unread = {other for _, other in BACKENDS.values()} - {file}
        if problem := manifest_problem(folder, needed=(CONFIG, file), verify=True, unread=unread):
            raise ValueError(
                f"{folder}: {problem}; copy or export the folder again, or give --no-verify where the change is yours."
            )
    load_plugins(config.get("plugins"), place=str(folder / CONFIG))
    with parsing(folder / CONFIG, AGAIN):
        tasks = tuple(tasks_from(config["tasks"], place=folder / CONFIG))
        recipe = recipe_of_export(config)
    # A vision tower and a decoder are models of transformers, and plugins may know no others.
    decodes = any(task.mode == "decoder" for task in tasks)
    plain = plain and not (config.get("plugins") or config.get("tower") or decodes)
    lexicon = None
    if recipe.model.lexicon.path is not None and (lexicon := Lexicon.load(folder)) is None:
        raise ValueError(f"{folder}: the model reads a lexicon, but {FILE} is missing; {AGAIN}.")
    model, longest = load(folder, config, recipe, tasks, threads=threads, plain=plain)
    tokenizer = read_tokenizer(folder, config, plain=plain)
    with parsing(folder / IMAGES, AGAIN):
        processor = read_image_processor(folder)
    if processor is None and config.get("tower") is not None:
        raise ValueError(
            f"{folder}: the model reads images, but {IMAGES} is missing; copy or export it again."
        )
    data = replace(recipe.data, max_length=min(recipe.data.max_length, longest))
    about = (recipe.model, data, config, folder, lexicon)
    return Exported(model, tasks, tokenizer, processor, *about)


def _load_torch(
    folder: Path,
    config: Mapping[str, Any],
    recipe: Recipe,
    tasks: Sequence[Task],
    *,
    threads: int | None,
    plain: bool,
) -> tuple[MultiTaskModel, int]:
    import torch  # an ONNX file does without it

    from comoe.inference.exported_model import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(folder, config, recipe, tasks, plain=plain)
    return model, model.longest_text


def _load_onnx(
    folder: Path,
    config: Mapping[str, Any],
    recipe: Recipe,
    tasks: Sequence[Task],
    *,
    threads: int | None,
    plain: bool,
) -> tuple[OnnxModel, int]:
    with parsing(folder / CONFIG, AGAIN):
        longest = int(config["onnx"]["max_length"])
    return OnnxModel(folder / ONNX, threads=threads), longest


BACKENDS = {"torch": (_load_torch, WEIGHTS), "onnx": (_load_onnx, ONNX)}
"""Name -> (reader of the model and of the most tokens that it takes, the file that it reads)."""


def read_image_processor(folder: Path) -> ImageProcessor | None:
    """How images become numbers, as an export or a run folder says; None where the model reads none."""
    if not (folder / IMAGES).is_file():
        return None
    from comoe.data.images.pixels import load_image_processor

    return load_image_processor(str(folder))


def read_tokenizer(folder: Path, config: Mapping[str, Any], *, plain: bool = False) -> Any:
    """The tokenizer of an export; arguments and errors as of ``load_exported``, with its ``config.json``."""
    what, tokenizer, problem = f"{folder}: its tokenizer", None, ""
    with parsing(what, AGAIN):
        if plain:
            whole = functools.partial(read_tokenizer, folder, config)
            tokenizer = read_json_tokenizer(folder, config.get("tokenizer"), whole)
        if tokenizer is None:
            tokenizer, problem = _of_transformers(folder, config["encoder"])
    if not problem and tokenizer.pad_token_id is None:
        problem = "its tokenizer has no padding token"
    if problem:
        raise ValueError(f"{folder}: {problem}; copy or export it again.")
    return tokenizer


def describe_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Note in the ``config.json`` of an export, here a dict, whether ``tokenizer.json`` alone is its tokenizer."""
    config.pop("tokenizer", None)
    description = description_of(read_tokenizer(folder, config), folder)
    if description is not None:
        config["tokenizer"] = description


def _of_transformers(folder: Path, encoder_config: Mapping[str, Any]) -> tuple[Any, str]:
    """The tokenizer that transformers reads, and what is wrong with it."""
    from transformers import AutoConfig, AutoTokenizer

    # Left to itself, AutoTokenizer would read our config.json and warn of a model type that it does
    # not know.
    fields = dict(encoder_config)
    hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    tokenizer = AutoTokenizer.from_pretrained(folder, config=hf_config, trust_remote_code=False)
    prepare_causal(tokenizer)
    # It is tried, as some settings fail only then.
    problem = tokenizer_problem(tokenizer, folder) or embedding_problem(tokenizer, hf_config)
    return tokenizer, problem
