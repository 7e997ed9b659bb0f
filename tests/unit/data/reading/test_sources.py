"""Readers: every format gives the same rows with the right lines; splits are found by usual and by given names."""

from pathlib import Path

import datasets
import pytest
from helpers_data import write_jsonl

from comoe.data.reading.files import RawSplit
from comoe.data.reading.image_posts import LAYOUTS
from comoe.data.reading.sources import READERS, open_source, read_split

ROWS = [
    {"text": "good, really", "label": "yes"},
    {"text": 'she said "no"', "label": "no"},
    {"text": "tab\u2028less", "label": "yes"},
]


def read(
    place: Path, split: str = "train", *, format: str = "auto", splits: dict[str, str] | None = None
) -> RawSplit | None:
    source = open_source(
        "tasks.t", root=None, path=str(place), format=format, subset=None, splits=splits or {}
    )
    return read_split(source, split)


def write_csv(path: Path) -> Path:
    lines = ["text,label", '"good, really",yes', '"she said ""no""",no', "tab\u2028less,yes"]
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return path


def write_tsv(path: Path) -> Path:
    path.write_bytes(
        'text\tlabel\ngood, really\tyes\nshe said "no"\tno\ntab\u2028less\tyes\n'.encode()
    )
    return path


def write_parquet(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    return path


def write_tweeteval(folder: Path, *, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}_text.txt").write_bytes("".join(f"{row['text']}\n" for row in ROWS).encode())
    (folder / f"{split}_labels.txt").write_bytes(
        "".join(f"{int(row['label'] == 'yes')}\n" for row in ROWS).encode()
    )
    (folder / "mapping.txt").write_text("0\tno\n1\tyes")
    return folder


@pytest.mark.parametrize(
    ("name", "write", "lines"),
    [("a.jsonl", lambda path: write_jsonl(path, ROWS), [1, 2, 3]),
     ("a.ndjson", lambda path: write_jsonl(path, ROWS), [1, 2, 3]), ("a.csv", write_csv, [2, 3, 4]),
     ("a.tsv", write_tsv, [2, 3, 4]), ("a.parquet", write_parquet, [1, 2, 3]),
     ("folder", write_tweeteval, [1, 2, 3])],
)  # fmt: skip
def test_every_format_reads_the_same_posts(tmp_path, name, write, lines):
    raw = read(write(tmp_path / name))
    assert raw is not None and raw.rows == ROWS
    assert raw.lines == lines
    assert raw.columns == ("text", "label")
    assert raw.bad == []


def test_tweeteval_labels_keep_the_order_of_their_ids(tmp_path):
    folder = write_tweeteval(tmp_path / "folder")
    (folder / "mapping.txt").write_text("1\ta\n0\tz\n")
    raw = read(folder)
    assert raw.label_names == {"label": ("z", "a")}
    assert [row["label"] for row in raw.rows] == ["a", "z", "a"]


def test_tweeteval_test_labels_are_optional_and_others_are_not(tmp_path):
    folder = write_tweeteval(tmp_path / "folder")
    write_tweeteval(folder, split="test")
    (folder / "test_labels.txt").unlink()
    raw = read(folder, "test")
    assert raw.columns == ("text",)
    assert [row["label"] for row in raw.rows] == [None, None, None]
    (folder / "train_labels.txt").unlink()
    with pytest.raises(
        ValueError, match=r"train_text.txt has no labels; train_labels.txt is missing"
    ):
        read(folder)


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev"])
def test_usual_names_of_a_validation_file_are_found(tmp_path, name):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / f"{name}.jsonl", ROWS[:1])
    assert len(read(tmp_path, "validation").rows) == 1
    assert read(tmp_path, "test") is None


def test_a_file_is_the_training_split_and_others_can_be_named(tmp_path):
    file = write_jsonl(tmp_path / "mine.jsonl", ROWS)
    write_jsonl(tmp_path / "other.jsonl", ROWS[:2])
    assert len(read(file).rows) == 3
    assert read(file, "validation") is None
    assert len(read(file, "validation", splits={"validation": "other.jsonl"}).rows) == 2
    assert len(read(tmp_path, "train", splits={"train": "other.jsonl"}).rows) == 2


@pytest.mark.parametrize(
    ("name", "content", "texts", "lines"),
    [("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}', ["a", "b"], [1, 3]),
     ("a.csv", b'text,label\n"one\ntwo",x\nthree,y\n', ["one\ntwo", "three"], [2, 4])],
)  # fmt: skip
def test_a_byte_order_mark_and_blank_lines_are_no_content_and_a_quoted_text_may_span_lines(
    tmp_path, name, content, texts, lines
):
    (tmp_path / name).write_bytes(content)
    raw = read(tmp_path / name)
    assert [row["text"] for row in raw.rows] == texts and raw.lines == lines


def test_parquet_label_classes_become_names_and_minus_one_is_missing(tmp_path):
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["z", "a"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B"])),
        }
    )
    columns = {"text": ["p", "q"], "label": [1, -1], "tags": [[0, 1], [1]]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    raw = read(tmp_path / "a.parquet")
    assert [row["label"] for row in raw.rows] == ["a", None]
    assert [row["tags"] for row in raw.rows] == [["O", "B"], ["B"]]
    assert raw.label_names == {"label": ("z", "a"), "tags": ("O", "B")}


def test_the_hub_reader_reads_what_load_dataset_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "posts" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "posts" / "test.jsonl", ROWS[:1])
    raw = read(tmp_path / "posts", format="hub")
    assert raw.rows == ROWS
    assert raw.file.endswith("posts (train)")
    assert len(read(tmp_path / "posts", "test", format="hub").rows) == 1
    assert read(tmp_path / "posts", "validation", format="hub") is None
    with pytest.raises(ValueError, match="no split tran; there is train, test"):
        read(tmp_path / "posts", format="hub", splits={"train": "tran"})


def test_what_cannot_be_read_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*_: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    for name in ("train", "val", "dev"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
    several = r"several validation files .*val.jsonl, dev.jsonl.*tasks.t.splits.validation"
    for place, options, message in (
        ("some/set", {"format": "hub"}, "Without a network, save it as JSON lines.*Couldn't reach the Hub"),
        (tmp_path, {"format": "jsnl"}, "'jsnl'.*did you mean jsonl"),
        # A local path is never looked for on the hub, and two files for one split are not guessed between.
        (tmp_path / "owner/name", {}, "there is no file or folder .*set tasks.t.format=hub"),
        (tmp_path, {"split": "validation"}, several),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read(place, **options)
    assert set(READERS) == {
        "tweeteval",
        "jsonl",
        "csv",
        "tsv",
        "parquet",
        "txt",
        "label_studio",
        "hub",
        *LAYOUTS,
    }
