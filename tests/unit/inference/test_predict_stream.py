"""Corpora of any size: every input and output, a run that is killed and resumed, equal texts, several processes."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import os
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers_data import files_up_to
from helpers_export import tiny_predictor
from helpers_ranks import forking

from comoe.config.failure import REMEDIES, sentence
from comoe.data.reading import files, stream
from comoe.data.reading.stream import open_stream
from comoe.inference import engines, parquet, predict_file, windows, writers
from comoe.inference.journal import Journal
from comoe.inference.options import PredictOptions
from comoe.inference.predictor import Predictor

WORDS = ["good day", "bad rain", "the sunny paris", "@ann http://x.yz", "sun, sun!"]
ROWS = [{"id": n, "text": WORDS[n % 5] + " a" * (n % 4), "more": f"m{n}"} for n in range(2000)]
NAMES = ["mood", "heat", "words"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return tiny_predictor(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW", 100)
    monkeypatch.setattr(stream, "PEEKED", 10)
    monkeypatch.setattr(parquet, "SHARD", 100)
    monkeypatch.setattr(parquet, "BATCH", 40)


def predict(predictor: Predictor, source: object, target: Path, **options: object):
    options = {"tasks": ["mood"]} | options
    return predict_file.predict_file(predictor, str(source), target, PredictOptions(**options))


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_of(rows: list[dict], sign: str = ",") -> bytes:
    lines = [sign.join(rows[0]), *(sign.join(map(str, row.values())) for row in rows)]
    return "\n".join(lines).encode()


def parquet_of(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_input(folder: Path, name: str, rows: list[dict]) -> str:
    """The rows in the form that a name asks for; what ``--input`` says."""
    path = folder / name
    if name == "hub":
        (folder / "posts").mkdir()
        (folder / "posts/test.jsonl").write_bytes(jsonl(rows))
        return f"hf://{folder / 'posts'}"
    if name.endswith("/"):
        parquet_of(path / "a=1/part-0.parquet", rows[:7])
        parquet_of(path / "a=2/part-0.parquet", rows[7:])
        (path / "_tmp.parquet").write_bytes(b"of a writer")
    elif name.endswith(".parquet"):
        parquet_of(path, rows)
    else:
        kinds = {".jsonl": jsonl, ".csv": csv_of, ".tsv": lambda rows: csv_of(rows, "\t")}
        kinds[".txt"] = lambda rows: "".join(row["text"] + "\n" for row in rows).encode()
        content = kinds[f".{name.split('.')[1]}"](rows)
        if name.endswith(".gz"):
            content = gzip.compress(content)
        if name.endswith(".zst"):
            half, packed = len(content) // 2, pyarrow.Codec("zstd").compress
            content = packed(content[:half], asbytes=True) + packed(content[half:], asbytes=True)
        path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.txt.gz", "a.csv", "a.csv.zst", "a.tsv.gz", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a/", "hub", "-"],
)  # fmt: skip
def test_every_input_gives_the_same_predictions(name, predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [row for row in ROWS[:30] if "," not in row["text"]]
    source, options = "-", {"input_format": "jsonl"}
    if name == "-":
        stdin = SimpleNamespace(buffer=io.BytesIO(jsonl(rows)))
        monkeypatch.setattr(stream.sys, "stdin", stdin)
    else:
        source, options = write_input(tmp_path, name, rows), {}
    target, plain = tmp_path / "out.jsonl", ".txt" in name
    summary = predict(predictor, source, target, **options)
    assert str(summary) == f"{len(rows)} posts predicted in {target}"
    moods = predictor([row["text"] for row in rows], tasks=["mood"])
    for row, mood, found in zip(rows, moods, json_lines(target), strict=True):
        assert found == ({} if plain else {"id": found["id"]}) | mood
        assert plain or str(found["id"]) == str(row["id"])
    if name == "a/":
        predict(predictor, source, target, keep=["a", "more"])
        assert [row["a"] for row in json_lines(target)] == ["1"] * 7 + ["2"] * (len(rows) - 7)
        with pytest.raises(ValueError, match="lies in the folder of --input"):
            predict(predictor, source, tmp_path / "a/out.parquet", format="parquet")


def test_every_output_holds_the_same_predictions_and_replaces_an_older_one(predictor, tmp_path):
    rows = [{"id": 1 << 40, "text": "good"}, *ROWS[1:250], {"text": ""}]
    source = write_input(tmp_path, "a.jsonl", rows)
    target = tmp_path / "out.jsonl"
    predict(predictor, source, target, tasks=NAMES)
    wanted = json_lines(target)
    for name in ("out.jsonl.gz", "out.jsonl.zst", "out.parquet", "shards", "shards"):
        form = "parquet" if name in ("out.parquet", "shards") else "jsonl"
        predict(predictor, source, tmp_path / name, tasks=NAMES, format=form)
        if form == "jsonl":
            with files.open_bytes(tmp_path / name) as lines:
                assert [json.loads(line) for line in lines] == wanted
        else:
            found = pyarrow.parquet.read_table(tmp_path / name).to_pylist()
            assert [{k: v for k, v in row.items() if v is not None} for row in found] == [
                {k: v for k, v in row.items() if v is not None} for row in wanted
            ]
    shards = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert shards == [f"part-{number:05d}.parquet" for number in range(3)]
    (tmp_path / "shards/thesis.txt").touch()
    for target, message in (
        ("shards", r"the folder has other files \(thesis.txt\)"),
        ("out.jsonl", "is a file; Parquet goes into"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(predictor, source, tmp_path / target, format="parquet")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-20], "cannot be unpacked .*cut short"),
        ("a.csv.zst", b"no zstd at all", "cannot be unpacked"),
        ("a.pdf.gz", b"x", r"\.pdf.gz is not an ending"),
        ("a.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("a/none.txt", b"x", "the folder has no .parquet file"),
    ],
)
def test_an_input_that_is_damaged_is_refused_and_nothing_is_left(
    name, content, message, predictor, tmp_path
):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path if path.parent == tmp_path else path.parent
    with pytest.raises(ValueError, match=message):
        predict(predictor, source, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == [name.split("/")[0]]


def test_a_stray_quote_joins_no_more_lines_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_ROW", 1000)
    lines = ["id,text", '1,"stray', *(f"{n},good" for n in range(2, 400)), '400,"two', 'lines"']
    (tmp_path / "a.csv").write_text("\n".join(lines))
    rows = open_stream(str(tmp_path / "a.csv"))
    assert (rows.rows, rows.total) == (399, 400)
    found = dict(rows.read())
    assert "field larger" in found[2].rule and found[401] == {"id": "400", "text": "two\nlines"}


def killed(predictor: Predictor, source: object, target: Path, *, after: int, **options: object):
    """Predict in a process that kills itself in the middle of writing the window with this number."""
    child = os.fork()
    if child == 0:
        commits, commit = iter(range(after + 1)), Journal.commit

        def torn(journal: Journal, chunk: bytes, *more: object, **named: object) -> None:
            if next(commits, None) == after:
                journal._file.write(chunk[: len(chunk) // 2])
                journal._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            commit(journal, chunk, *more, **named)

        Journal.commit = torn
        if after < 0:
            finish = Journal.finish
            Journal.finish = lambda journal: (finish(journal), os.kill(os.getpid(), signal.SIGKILL))
        predict(predictor, source, target, **options)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL and not target.exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out.jsonl", {"tasks": NAMES, "dedupe": True}),
        ("out.csv.gz", {"format": "csv", "keep": ["more"]}),
        ("shards", {"format": "parquet"}),
    ],
)
def test_a_run_that_is_killed_and_resumed_writes_the_bytes_of_an_undisturbed_one(
    name, options, predictor, tmp_path, capfd
):
    rows = [*ROWS[:700], {"text": ""}, *ROWS[:1299]]
    source = write_input(tmp_path, "a.jsonl", rows)
    (tmp_path / "whole").mkdir()
    whole = predict(predictor, source, tmp_path / "whole" / name, **options)
    target = tmp_path / name
    killed(predictor, source, target, after=3, **options)
    killed(predictor, source, target, after=9, resume=True, **options)
    killed(predictor, source, target, after=-1, resume=True, **options)
    resumed = predict(predictor, source, target, resume=True, **options)
    assert "1,200 of 2,000 posts are predicted already" in capfd.readouterr().err
    assert resumed.counts == whole.counts and resumed.resumed_at == 2000
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            same = tmp_path / path.relative_to(tmp_path / "whole")
            assert path.read_bytes() == same.read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("size", [8192, 60_000, 120_000])
def test_a_journal_without_room_is_named_and_the_run_goes_on_once_there_is_some(
    size, predictor, tmp_path, capsys
):
    source = write_input(tmp_path, "a.jsonl", [{"text": f"good {n}"} for n in range(2000)])
    # A label id per post: it is the table of known texts that grows.
    options = {"format": "tweeteval", "dedupe": True}
    predict(predictor, source, tmp_path / "whole.txt", **options)
    with files_up_to(size), pytest.raises(OSError) as raised:
        predict(predictor, source, tmp_path / "out.txt", **options)
    assert sentence(raised.value) == (
        f"writing {tmp_path}/.out.txt.journal: File too large; {REMEDIES[errno.EFBIG]}."
    )
    done = predict(predictor, source, tmp_path / "out.txt", resume=True, **options)
    said = f"{done.resumed_at:,} posts are predicted; --resume goes on behind them\n"
    assert (done.resumed_at > 0) == (said in capsys.readouterr().err) == (size > 8192)
    assert (tmp_path / "out.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_only_the_same_run_is_resumed_and_a_fresh_one_says_what_it_gives_up(
    predictor, tmp_path, capfd
):
    source, target = write_input(tmp_path, "a.jsonl", ROWS[:400]), tmp_path / "out.jsonl"
    predict(predictor, source, target, resume=True)
    assert "nothing to resume beside" in capfd.readouterr().err
    undisturbed = target.read_bytes()
    target.unlink()
    killed(predictor, source, target, after=2)
    part = tmp_path / ".out.jsonl.part"
    other = write_input(tmp_path, "b.jsonl", [*ROWS[:150], {"text": "other"}, *ROWS[151:400]])
    model = tiny_predictor(tmp_path / "model", seed=1)
    for asked, options, message in (
        ((predictor, source), {"batch_size": 3}, "--batch-size was 64, is now 3"),
        ((predictor, source), {"tasks": ["heat"]}, r"--tasks was \['mood'\], is now \['heat'\]"),
        ((model, source), {}, "the model was"),
        ((predictor, other), {}, "was made of another input, whose first 200 posts differ"),
        ((predictor, write_input(tmp_path, "c.jsonl", ROWS[:150])), {}, "another input"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(*asked, target, resume=True, **options)
    content = part.read_bytes()
    part.write_bytes(b"")
    with pytest.raises(ValueError, match="is shorter than .*journal says; start anew"):
        predict(predictor, source, target, resume=True)
    part.write_bytes(content)
    predict(predictor, source, target)
    assert "an unfinished run had predicted 200 posts; begun anew" in capfd.readouterr().err
    assert target.read_bytes() == undisturbed
    (tmp_path / ".out.jsonl.journal").write_bytes(b"no data base" * 100)
    with pytest.raises(ValueError, match="journal is damaged"):
        predict(predictor, source, target, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_in_its_first_window_is_begun_anew(resume, predictor, tmp_path):
    source, target = write_input(tmp_path, "a.jsonl", ROWS[:150]), tmp_path / "out.jsonl"
    killed(predictor, source, target, after=0, dedupe=True)
    with contextlib.closing(sqlite3.connect(tmp_path / ".out.jsonl.journal")) as db:
        assert db.execute("SELECT count(*) FROM done").fetchone() == (0,)
    done = predict(predictor, source, target, resume=resume, dedupe=True)
    assert (done.resumed_at, len(json_lines(target))) == (0, 150)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("value", [None, "many"])
def test_a_journal_with_wrong_numbers_keeps_no_fresh_run_from_its_work(value, tmp_path):
    Journal(tmp_path / "out", {}, resume=False).close()
    with contextlib.closing(sqlite3.connect(tmp_path / ".out.journal")) as db, db:
        db.execute("INSERT INTO done VALUES (0, ?, 0, x'', '{}', 0)", (value,))
    journal = Journal(tmp_path / "out", {}, resume=False)
    assert (journal.discarded, journal.posts) == (0, 0)
    with pytest.raises(ValueError, match="journal is damaged .a prediction is gone.; start anew"):
        journal.recall(b"nobody's")
    journal.close(remove=True)


def test_a_table_goes_on_with_its_own_columns_alone(predictor, tmp_path, monkeypatch):
    source, target = write_input(tmp_path, "a.jsonl", ROWS[:300]), tmp_path / "out.csv"
    killed(predictor, source, target, after=1, format="csv")
    monkeypatch.setitem(writers.REMARKS, "cut", ["cut"])  # as another version may call it
    with pytest.raises(ValueError, match="the columns was .*,truncated, is now .*,cut. Give the"):
        predict(predictor, source, target, format="csv", resume=True)


def test_a_folder_of_parquet_files_of_others_stays(predictor, tmp_path):
    source = write_input(tmp_path, "a.jsonl", ROWS[:3])
    (tmp_path / "years").mkdir()
    parquet_of(tmp_path / "years/part-00000.parquet", ROWS[:2])
    with pytest.raises(ValueError, match="part-00000.parquet holds no predictions"):
        predict(predictor, source, tmp_path / "years", format="parquet")


def test_equal_texts_are_predicted_once_whatever_else_is_in_their_rows(
    predictor, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "KNOWN", 400)
    rows = [{"id": n, "text": f"{'good' if n % 3 else 'bad'} {n % 150}"} for n in range(900)]
    rows[5] = rows[205] = {"id": "x", "text": ""}
    rows[6] = {"id": "y", "text": "good 150", "pair": "sun"}
    source = write_input(tmp_path, "a.jsonl", rows)
    plain, once = tmp_path / "plain.jsonl", tmp_path / "once.jsonl"
    asked = []

    def counting(model, posts, *more):
        asked.extend(posts)
        return windows.predict_posts(model, posts, *more)

    monkeypatch.setattr(engines, "predict_posts", counting)
    options = {"tasks": ["mood", "words"], "pair_column": "pair"}
    predict(predictor, source, plain, **options)
    asked.clear()
    summary = predict(predictor, source, once, dedupe=True, **options)
    # 150 texts and two others; those of the first 200 posts once more, 400 posts later.
    assert len(asked) == 302 and summary.counts.deduplicated == 900 - 302 - 1
    for row, found in zip(json_lines(plain), json_lines(once), strict=True):
        assert list(found) == list(row) and found["id"] == row["id"]
        assert found.get("error") == row.get("error") and found["text"] == row["text"]
        if "mood" in row:
            assert found["words"]["tags"] == row["words"]["tags"]
            scores = pytest.approx(row["mood"]["scores"], abs=1e-5)
            assert found["mood"]["scores"] == scores


def test_several_processes_write_the_bytes_of_one(predictor, tmp_path, monkeypatch):
    source = write_input(tmp_path, "a.csv", ROWS[:450])
    context = forking()
    for dedupe in (False, True):
        if dedupe:  # the first ones were fresh processes
            monkeypatch.setattr(engines.multiprocessing, "get_context", lambda _: context)
        targets = [tmp_path / f"{workers}.jsonl" for workers in (1, 2)]
        for workers, target in enumerate(targets, start=1):
            predict(predictor, source, target, workers=workers, dedupe=dedupe)
        assert targets[0].read_bytes() == targets[1].read_bytes()
    gone = replace(predictor, exported=replace(predictor.exported, folder=tmp_path / "gone"))
    with pytest.raises(ValueError, match="a process of --workers has ended"):
        predict(gone, source, tmp_path / "out", workers=2)


def test_the_function_for_spark_on_the_page_predicts_data_frames(predictor, monkeypatch):
    page = (Path(__file__).parents[3] / "docs/prediction.md").read_text(encoding="utf-8")
    (code,) = [part for part in page.split("```") if "mapInPandas" not in part and "pandas" in part]
    scope: dict = {}
    exec(code.removeprefix("python\n").replace("sentiment", "mood"), scope)
    monkeypatch.setattr(Predictor, "from_pretrained", lambda *_: predictor)
    frames = [scope["pandas"].DataFrame(rows)[["id", "text"]] for rows in (ROWS[:9], ROWS[9:20])]
    frames[0].loc[3, "text"] = ""
    found = scope["pandas"].concat(scope["predict"](frames))
    assert found["id"].tolist() == list(range(20)) and found["mood"].isna().sum() == 1
    assert found["error"].tolist()[3] == "the text is empty"


def test_ray_writes_the_bytes_of_one_process_and_refuses_what_it_cannot_do(
    predictor, tmp_path, monkeypatch
):
    monkeypatch.setattr(stream.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"good\n")))
    pytest.importorskip("ray")
    source = write_input(tmp_path, "a.jsonl", [*ROWS[:250], {"text": ""}, *ROWS[:99]])
    one, many, none = (tmp_path / f"{name}.jsonl" for name in ("one", "many", "none"))
    predict(predictor, source, one)
    killed(predictor, source, many, after=1)  # before ray has threads, which a fork would lose
    predict(predictor, source, many, engine="ray", workers=2, resume=True)
    assert many.read_bytes() == one.read_bytes()
    for given, options, message in (
        (source, {"dedupe": True}, "--engine ray has no table of posts"),
        (source, {"workers": 4096}, "--workers 4096: ray has .* CPUs"),
        ("-", {"input_format": "txt"}, "wants a file or a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(predictor, given, none, engine="ray", **options)


def test_the_summary_counts_what_became_of_the_posts(predictor, tmp_path):
    lines = [
        *map(json.dumps, ROWS[:20]),
        "{",
        "[1]",
        '{"text": ""}',
        '{"text": "' + "a " * 99 + '"}',
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(lines))
    found = predict(predictor, source, tmp_path / "out", tasks=["mood", "words"]).record()
    assert found["posts"] == 24 and found["predicted"] == 21 and found["truncated"] == 1
    assert found["set_aside"] == {
        "is not valid JSON": 1,
        "is not a JSON object": 1,
        "the text is empty": 1,
    }
    assert sum(found["labels"]["mood"].values()) == 21
    rows = json_lines(tmp_path / "out")
    spans = sum(len(row["words"]["spans"]) for row in rows if "words" in row)
    assert sum(found["labels"]["words"].values()) == spans
    assert json.loads(json.dumps(found))["posts_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "spark is no"),
        ({"workers": 0}, "--workers is 0; it must be at least 1"),
        ({"batch_tokens": 0}, "--batch-tokens is 0"),
        ({"input_format": "xml"}, "xml is not"),
    ],
)
def test_wrong_options_are_named(options, message, predictor, tmp_path):
    (tmp_path / "a.txt").write_text("good\n")
    with pytest.raises(ValueError, match=message):
        predict(predictor, tmp_path / "a.txt", tmp_path / "out", **options)


def test_standard_input_wants_its_format(predictor, tmp_path):
    for options in ({}, {"input_format": "parquet"}):
        with pytest.raises(ValueError, match="--input - wants --input-format"):
            predict(predictor, "-", tmp_path / "out", **options)
