"""Public sets of posts with images, each in the layout in which its authors give it: a folder, unchanged.

Every reader gives the columns ``id``, ``text``, ``image`` (a path from the folder on) and ``label``,
and what else the set tells. docs/images.md says where each comes from.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comoe.data.reading.files import Met, RawSplit, csv_rows, open_bytes, text_lines
from comoe.data.report import BadRow

SARCASM_HINTS = frozenset(
    "sarcasm sarcastic reposting <url> joke humour humor jokes irony ironic exgag".split()
)
"""Words that give a label of MSD away, or the place of a link: its authors leave such posts out."""


HATE = ("NotHate", "Racist", "Sexist", "Homophobe", "Religion", "OtherHate")
"""Labels of the annotators of MMHS150K in the order of their numbers."""


def read_mvsa(option: str, folder: Path, split: str, file: str | None) -> RawSplit | None:
    """MVSA-Single (Niu et al. 2016): ``labelResultAll.txt`` and ``data/<id>.txt``, ``data/<id>.jpg``; one split.

    The file's lines are an id, a tab, the sentiment of the text, a comma, and that of the image. The
    label is that of both where they agree, that of the other where one is neutral, and none where
    they are opposed, as Xu and Mao (2017) have it; both are columns (``text_label``,
    ``image_label``).

    Raises:
        ValueError: no such file.
    """
    if split != "train":
        return None
    path = _file(option, folder, file or "labelResultAll.txt")
    lines, bad = text_lines(path)
    found = _Found(path, folder, bad)
    latin = 0
    for number, line in found.good(lines, skip=1):
        name, _, pair = line.strip().partition("\t")
        labels = [label.strip() for label in pair.split(",")]
        if len(labels) != 2 or not set(labels) <= {"positive", "neutral", "negative"}:
            rule = (
                "must be an id, a tab, and two of positive, neutral, negative with a comma between."
            )
            found.set_aside(
                number, line, f"{rule} MVSA-Multiple has more; only MVSA-Single is read."
            )
            continue
        try:
            data = (folder / "data" / f"{name}.txt").read_bytes()
        except OSError as error:
            found.set_aside(number, line, f"data/{name}.txt cannot be read ({error.strerror}).")
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            # Some posts are in the encoding of the machine that collected them.
            text, latin = data.decode("latin-1"), latin + 1
        of_text, of_image = labels
        said = {*labels} - {"neutral"} or {"neutral"}
        found.add(
            number, name, " ".join(text.split()), f"data/{name}.jpg",
            label=said.pop() if len(said) == 1 else None, text_label=of_text, image_label=of_image,
        )  # fmt: skip
    notes = (f"{path}: {latin:,} texts are not UTF-8 and were read as Latin-1",) if latin else ()
    return found.split(notes)


def read_msd(option: str, folder: Path, split: str, file: str | None) -> RawSplit | None:
    """The multi-modal sarcasm detection set (Cai et al. 2019): ``text/train.txt`` and ``dataset_image/<id>.jpg``.

    A line is a list as Python writes it: id, text, label; in ``text/valid2.txt`` and
    ``text/test2.txt`` the label that an annotator gave stands last, behind that of the hashtag.
    Posts with words that give the label away are left out, as in the authors' own reader.

    Raises:
        ValueError: no such file.
    """
    usual = {"train": "train.txt", "validation": "valid2.txt", "test": "test2.txt"}[split]
    path = folder / "text" / (file or usual)
    if file is None and split != "train" and not path.is_file():
        return None
    path = _file(option, folder, f"text/{path.name}")
    lines, bad = text_lines(path)
    found = _Found(path, folder, bad)
    hinted = 0
    for number, line in found.good(lines):
        try:
            cells: Any = ast.literal_eval(line.strip())
            name, text, label = str(cells[0]), cells[1], int(cells[-1])
        except (ValueError, SyntaxError, TypeError, IndexError, RecursionError, MemoryError):
            cells, label = None, -1
        if not isinstance(cells, list) or not isinstance(text, str) or label not in (0, 1):
            found.set_aside(number, line, "must be a list of Python: id, text, 0 or 1.")
            continue
        if SARCASM_HINTS & {*text.split()}:
            hinted += 1
            continue
        named = ("not_sarcastic", "sarcastic")[label]
        found.add(number, name, text, f"dataset_image/{name}.jpg", label=named)
    words = "sarcasm, irony, <url> and the like"
    notes = (f"{path}: {hinted:,} posts with {words} left out",) if hinted else ()
    return found.split(notes)


def read_mmhs150k(option: str, folder: Path, split: str, file: str | None) -> RawSplit | None:
    """MMHS150K (Gomez et al. 2020): ``MMHS150K_GT.json``, ``splits/<split>_ids.txt`` and ``img_resized/<id>.jpg``.

    The label is hate where at least two of three annotators saw some; ``votes`` counts them (a soft
    label), ``kind`` is the label of most annotators, none where all differ.

    Raises:
        ValueError: no such file, or one that is no JSON object.
    """
    usual = {"train": "train_ids.txt", "validation": "val_ids.txt", "test": "test_ids.txt"}[split]
    path = _file(option, folder, f"splits/{file or usual}")
    whole = _file(option, folder, "MMHS150K_GT.json")
    with open_bytes(whole) as pieces:
        try:
            posts = json.load(pieces)
        except ValueError as error:
            raise ValueError(f"{whole} is not JSON ({error}); fetch it again.") from error
    if not isinstance(posts, Mapping):
        raise ValueError(f"{whole} must hold an object: id -> tweet_text and labels.")
    lines, bad = text_lines(path)
    found = _Found(path, folder, bad)
    for number, line in found.good(lines):
        name = line.strip()
        post = posts.get(name)
        labels = post.get("labels") if isinstance(post, Mapping) else None
        text = post.get("tweet_text") if isinstance(post, Mapping) else None
        if not isinstance(text, str) or not isinstance(labels, list) or len(labels) != 3:
            found.set_aside(number, line, f"{whole.name} has no tweet_text and three labels of it.")
            continue
        if not all(label in range(len(HATE)) for label in labels):
            found.set_aside(number, line, f"{whole.name}: labels are numbers from 0 to 5.")
            continue
        hateful = sum(label > 0 for label in labels)
        (first, count), *_ = Counter(labels).most_common()
        found.add(
            number, name, text, f"img_resized/{name}.jpg", label="hate" if hateful > 1 else "not_hate",
            kind=HATE[first] if count > 1 else None, votes={"hate": hateful, "not_hate": 3 - hateful},
        )  # fmt: skip
    return found.split()


def read_text_image(option: str, folder: Path, split: str, file: str | None) -> RawSplit | None:
    """The text-image relation of tweets (Vempala and Preotiuc-Pietro 2019): ``textimage.csv``; one split.

    The published file has ids and labels; its authors send texts and images on request. The texts
    belong into a column ``text``, the images into ``images/<tweet_id>.jpg``. The label is one of
    four: ``shown_adds`` (the image shows what the text names, and adds meaning), ``shown_only``,
    ``absent_adds``, ``absent_only``; its halves are ``text_shown`` and ``image_adds``.

    Raises:
        ValueError: no such file, or it lacks a column.
    """
    if split != "train":
        return None
    path = _file(option, folder, file or "textimage.csv")
    met, bad, rows = Met(), [], []
    with open_bytes(path) as pieces:
        for number, row in csv_rows(pieces, str(path), met):
            (bad if isinstance(row, BadRow) else rows).append((number, row))
    wanted = ("tweet_id", "text", "text_is_represented", "image_adds")
    if missing := [name for name in wanted if name not in met.columns]:
        more = " The published file has no texts; ask its authors for them." * ("text" in missing)
        raise ValueError(
            f"{path} has no column {', '.join(missing)} (columns: {', '.join(met.columns)}).{more}"
        )
    found = _Found(path, folder, [row for _, row in bad])
    for number, row in rows:
        shown, adds = row["text_is_represented"].strip(), row["image_adds"].strip()
        name = row["tweet_id"].strip()
        if not name.isdigit() or not {shown, adds} <= {"0", "1"}:
            rule = "must have a whole tweet_id (a spreadsheet shortens long ones), and 0 or 1 in both labels."
            found.set_aside(number, name, rule)
            continue
        halves = ("absent", "shown")[int(shown)], ("only", "adds")[int(adds)]
        found.add(
            number, name, row["text"], f"images/{name}.jpg", label="_".join(halves),
            text_shown=("no", "yes")[int(shown)], image_adds=("no", "yes")[int(adds)],
        )  # fmt: skip
    return found.split()


class _Found:
    """Rows of a file and what could not be read, as they are met."""

    def __init__(self, path: Path, folder: Path, bad: list[BadRow]) -> None:
        self.path, self.folder, self.bad = path, folder, bad
        self.rows: list[dict[str, Any]] = []
        self.lines: list[int] = []

    def good(self, lines: list[str], *, skip: int = 0) -> list[tuple[int, str]]:
        """(number, line) of those behind the first ``skip`` that are neither blank nor damaged."""
        damaged = {row.line for row in self.bad}
        numbered = list(enumerate(lines, start=1))[skip:]
        return [(n, line) for n, line in numbered if line.strip() and n not in damaged]

    def add(self, line: int, name: str, text: str, image: str, **labels: Any) -> None:
        """A post."""
        self.rows.append({"id": name, "text": text, "image": image, **labels})
        self.lines.append(line)

    def set_aside(self, line: int, value: str, rule: str) -> None:
        """A row that cannot be used."""
        self.bad.append(BadRow(str(self.path), line, value, rule))

    def split(self, notes: tuple[str, ...] = ()) -> RawSplit:
        """What was found."""
        columns = tuple(self.rows[0]) if self.rows else ("id", "text", "image", "label")
        bad = sorted(self.bad, key=lambda row: row.line)
        more = {"notes": notes, "image_folder": str(self.folder)}
        return RawSplit(str(self.path), self.rows, self.lines, columns, bad, **more)


def _file(option: str, folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(
            f"{option} ({folder}): there is no file {name}. Give the folder as its authors' "
            "archive leaves it (docs/images.md, public data sets)."
        )
    return folder / name


LAYOUTS = {
    "mvsa": read_mvsa,
    "msd": read_msd,
    "mmhs150k": read_mmhs150k,
    "text_image": read_text_image,
}
"""Format -> (option, folder, split, file of the recipe or None) -> its rows, None without that split."""
