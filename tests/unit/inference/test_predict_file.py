"""Files of posts in, files of predictions out: one line for each line, whatever the line holds."""

import csv
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_export import MOOD, export_tiny, tiny_predictor

from comoe.commands.predict import main as predict_main
from comoe.inference.options import PredictOptions
from comoe.inference.post_stream import open_posts
from comoe.inference.predict_file import predict_file
from comoe.inference.windows import WINDOW

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return tiny_predictor(tmp_path_factory.mktemp("model"))


def json_lines(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_tweeteval_writes_exactly_one_id_per_input_line(predictor, tmp_path, capsys):
    lines = ["good", "", "bad\u2028bad", "  ", "rain\r", "sun\x85ny", "\x00", "day"]
    source = tmp_path / "in.txt"
    source.write_bytes(("\n".join(lines) + "\n").encode() + b"bro\xffken\n")
    target = tmp_path / "new/folder/mood.txt"
    predict_file(predictor, source, target, PredictOptions(format="tweeteval", tasks=["mood"]))
    content = target.read_bytes()
    assert content.endswith(b"\n") and content.count(b"\n") == 9
    ids = [int(line) for line in content.splitlines()]
    read = [
        "good",
        "@user",
        "bad\u2028bad",
        "@user",
        "rain",
        "sun\x85ny",
        "@user",
        "day",
        "@user",
    ]
    assert ids == [MOOD.labels.index(found["mood"]["label"]) for found in predictor(read)]
    assert "4 lines without a text were predicted as '@user'" in capsys.readouterr().err
    assert [path.name for path in target.parent.iterdir()] == ["mood.txt"]


@pytest.mark.parametrize("last", ["", "\n"])
def test_a_missing_last_line_feed_changes_nothing(predictor, tmp_path, last):
    (tmp_path / "in.txt").write_text("good\nbad" + last)
    predict_file(
        predictor,
        tmp_path / "in.txt",
        tmp_path / "out",
        PredictOptions(format="tweeteval", tasks=["mood"]),
    )
    assert (tmp_path / "out").read_text().count("\n") == 2


@pytest.mark.parametrize(
    "name, content, format, written",
    [
        ("in.txt", "", "tweeteval", ""),
        ("in.csv", "id,text\n", "csv", "text,mood,mood/bad,mood/so-so,mood/good,error,truncated\n"),
    ],
)
def test_an_empty_file_gives_an_empty_file_and_says_so(
    predictor, tmp_path, name, content, format, written
):
    source, target = tmp_path / name, tmp_path / "out"
    source.write_text(content)
    said = predict_file(predictor, source, target, PredictOptions(format=format, tasks=["mood"]))
    assert target.read_text() == written
    assert str(said) == f"{source} has no posts; {target} has no predictions"


def test_an_id_and_columns_on_demand_are_kept(predictor, tmp_path):
    rows = [{"id": 7, "text": "good", "when": 1.5}, {"id": "b", "text": ""}, {"text": "bad"}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")

    def kept(**options):
        predict_file(predictor, source, target, PredictOptions(tasks=["mood"], **options))
        return json_lines(target)

    first = kept()
    assert [row.get("id", "-") for row in first] == [7, "b", None, "-"] and "when" not in first[0]
    assert list(kept(keep=["when", "id"])[0]) == ["when", "id", "text", "mood"]
    assert [row.get("when", "-") for row in kept(keep=["when"])] == ["1.5", None, None, "-"]
    predict_file(predictor, source, target, PredictOptions(tasks=["mood"], format="csv"))
    with target.open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["7", "b", "", ""]
    for keep, format, message in (
        ("mood", "jsonl", "--keep mood: the predictions have this name"),
        ("text", "csv", "--keep text: the predictions have this name"),
        ("idd", "jsonl", "--keep is 'idd', but .* has no such column; did you mean id"),
        ("id", "tweeteval", "--keep wants --format jsonl, csv or parquet"),
    ):
        with pytest.raises(ValueError, match=message):
            kept(keep=[keep], format=format)


def test_posts_are_read_from_the_column_of_training(predictor, tmp_path, capsys):
    columns = {task.name: {"text": "body"} for task in predictor.tasks}
    columns["heat"] = {"text": "text"}
    config = predictor.exported.config | {"columns": columns}
    trained = replace(predictor, exported=replace(predictor.exported, config=config))
    (tmp_path / "in.csv").write_text("text,body\nbad,good\n")
    (tmp_path / "other.csv").write_text("text\nbad\n")
    for name, tasks, options, text in (
        ("in.csv", ["mood", "topic"], {}, "good"),
        ("in.csv", ["mood"], {"text_column": "text"}, "bad"),
        ("in.csv", ["mood", "heat"], {}, "bad"),
        ("other.csv", ["mood"], {}, "bad"),
    ):
        predict_file(
            trained, tmp_path / name, tmp_path / "out", PredictOptions(tasks=tasks, **options)
        )
        assert json_lines(tmp_path / "out")[0]["text"] == text
        assert ("read from column body, as in training" in capsys.readouterr().err) == (
            text == "good"
        )


def test_tweeteval_wants_one_task_with_one_label(predictor, tmp_path):
    (tmp_path / "in.txt").write_text("good\n")
    arguments = (predictor, tmp_path / "in.txt", tmp_path / "out.txt")
    with pytest.raises(ValueError, match=r"writes one task: choose it with --task \(mood, topic,"):
        predict_file(*arguments, PredictOptions(format="tweeteval"))
    for task in ("heat", "words", "signs"):
        with pytest.raises(ValueError, match=f"wants a task with one label per post; {task} is a"):
            predict_file(*arguments, PredictOptions(format="tweeteval", tasks=[task]))
    assert not (tmp_path / "out.txt").exists()


def test_json_lines_keep_every_line_and_say_what_was_wrong(predictor, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        b'{"text": "good"}\n{"text": "bro\n{"text": ""}\n{"other": 1}\n'
        b'{"text": ["ann", "in", "paris"]}\n{"text": "b\xff"}\n'
    )
    said = predict_file(predictor, source, tmp_path / "out.jsonl")
    found = json_lines(tmp_path / "out.jsonl")
    assert ["error" in line for line in found] == [False, True, True, True, False, True]
    assert found[1]["error"].startswith("line 2 is not valid JSON")
    assert found[5]["error"].startswith("line 6 is not valid UTF-8")
    assert found[4]["text"] == "ann in paris"
    assert found[4]["words"]["words"] == ["ann", "in", "paris"]
    done = f"6 posts predicted in {tmp_path / 'out.jsonl'}"
    assert str(said) == f"{done}; 4 of them could not be predicted and have an error instead"


def test_a_line_separator_inside_a_post_does_not_end_a_line_of_the_predictions(predictor, tmp_path):
    (tmp_path / "in.txt").write_text("good\u2028day\u2029x\x85y\n", encoding="utf-8")
    predict_file(predictor, tmp_path / "in.txt", tmp_path / "out.jsonl")
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1 and json.loads(text)["text"] == "good\u2028day\u2029x\x85y"


def test_csv_in_and_out_with_other_columns_and_pairs(predictor, tmp_path):
    (tmp_path / "in.csv").write_text('id,body,target\n1,"good, day",sun\n2,,rain\n3,"ann ""b""",\n')
    options = dict(
        text_column="body", pair_column="target", tasks=["mood", "heat", "words", "signs"]
    )
    predict_file(
        predictor,
        tmp_path / "in.csv",
        tmp_path / "out.csv",
        PredictOptions(format="csv", **options),
    )
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = predictor(["good, day", "", 'ann "b"'], pairs=["sun", "rain", None])
    assert [row["text"] for row in rows] == ["good, day", "", 'ann "b"']
    assert rows[0]["mood"] == expected[0]["mood"]["label"]
    assert float(rows[0]["mood/good"]) == pytest.approx(
        expected[0]["mood"]["scores"]["good"], abs=1e-6
    )
    assert float(rows[2]["heat"]) == pytest.approx(expected[2]["heat"]["value"], abs=1e-6)
    assert rows[2]["words"].split() == expected[2]["words"]["tags"]
    assert rows[1]["error"] == "the text is empty" and rows[1]["mood"] == ""


def test_tsv_is_read_too(tmp_path):
    (tmp_path / "in.tsv").write_text('text\tlabel\nsay "hi\t1\n')
    assert [post.text for post in open_posts(str(tmp_path / "in.tsv"))] == ['say "hi']


def test_attention_is_written_on_demand_and_only_where_it_has_a_place(predictor, tmp_path):
    (tmp_path / "in.txt").write_text("good day\n")
    predict_file(
        predictor, tmp_path / "in.txt", tmp_path / "out.jsonl", PredictOptions(explain=True)
    )
    weights = json_lines(tmp_path / "out.jsonl")[0]["mood"]["attention"]
    assert [word for word, _ in weights] == ["good", "day"]
    with pytest.raises(ValueError, match="--explain wants --format jsonl or html"):
        predict_file(
            predictor,
            tmp_path / "in.txt",
            tmp_path / "out.csv",
            PredictOptions(format="csv", explain=True),
        )


def test_more_posts_than_a_chunk_stay_in_order(predictor, tmp_path):
    words = ["good", "bad", "sunny day", "rain"]
    (tmp_path / "in.txt").write_text(
        "\n".join(words[n % 4] + " a" * (n % 7) for n in range(WINDOW + 5))
    )
    predict_file(
        predictor,
        tmp_path / "in.txt",
        tmp_path / "out.jsonl",
        PredictOptions(tasks=["mood"], batch_size=256),
    )
    found = json_lines(tmp_path / "out.jsonl")
    assert [line["text"] for line in found] == [
        words[n % 4] + " a" * (n % 7) for n in range(WINDOW + 5)
    ]


def test_wrong_input_is_named_with_what_to_do(predictor, tmp_path):
    (tmp_path / "in.csv").write_text("txet,label\ngood,1\n")
    (tmp_path / "in.pdf").write_text("x")
    (tmp_path / "link.txt").symlink_to("in.txt")
    (tmp_path / "in.txt").write_text("good\n")
    (tmp_path / "none.csv").write_text("")
    folder = predictor.exported.folder
    weights = folder / "model.safetensors"
    (folder / "training_posts.npy").write_bytes(b"0")
    for source, target, format, message in (
        ("none.csv", "out", "jsonl", "none.csv is empty; its first line must name the columns"),
        ("in.txt", weights, "jsonl", "model.safetensors is a file of the model"),
        ("in.txt", folder / "README.md", "jsonl", "README.md is a file of the model"),
        ("in.txt", folder / "training_posts.npy", "jsonl", "_posts.npy is a file of the model"),
        ("in.csv", "out", "jsonl", "--text-column is 'text', but .* did you mean txet"),
        ("none.txt", "out", "jsonl", "none.txt: there is no such file"),
        ("in.pdf", "out", "jsonl", r"\.pdf is not an ending that can be read.*\.csv.*\.txt"),
        ("in.txt", ".", "jsonl", "is a folder; name a file"),
        ("in.txt", "in.txt", "jsonl", "is the --input itself"),
        ("in.txt", "link.txt", "jsonl", "is the --input itself"),
        ("in.csv", "out", "jsno", "jsno.*did you mean json"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_file(
                predictor, tmp_path / source, tmp_path / target, PredictOptions(format=format)
            )
    assert (tmp_path / "in.txt").read_text() == "good\n"
    for option in ("text_column", "pair_column"):
        with pytest.raises(ValueError, match=f"--{option[:4]}-column x: a .txt file has no col"):
            asked = PredictOptions(**{option: "x"})
            predict_file(predictor, tmp_path / "in.txt", tmp_path / "out", asked)


def test_a_finished_output_is_not_predicted_again(predictor, tmp_path):
    (tmp_path / "in.txt").write_text("good\n")
    (tmp_path / "none").mkdir()
    for name, format in (("out", "jsonl"), ("none", "parquet")):
        resumed = PredictOptions(tasks=["mood"], format=format, resume=True)
        predict_file(predictor, tmp_path / "in.txt", tmp_path / name, resumed)
        with pytest.raises(ValueError, match=f"--resume: .*{name} is finished, .* predict it anew"):
            predict_file(predictor, tmp_path / "in.txt", tmp_path / name, resumed)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_command_predicts_from_another_folder_and_fails_with_one_sentence(
    tmp_path, monkeypatch
):
    tiny_predictor(tmp_path)
    (tmp_path / "in.txt").write_text("good\nbad\n")
    monkeypatch.chdir(tmp_path)
    command = (
        "predict.py --input in.txt --output out/ids.txt --format tweeteval --task mood".split()
    )
    monkeypatch.setattr(sys, "argv", [*command, "--model", "export"])
    runpy.run_path(str(ROOT / "launch/predict.py"), run_name="__main__")
    assert (tmp_path / "out/ids.txt").read_text().count("\n") == 2
    monkeypatch.setattr(sys, "argv", [*command, "--model", "nowhere"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "launch/predict.py"), run_name="__main__")


def test_no_text_of_strangers_is_a_formula_in_a_csv_file(tmp_path):
    export_tiny(tmp_path)
    cells = ["=1+1", "@user hi", "a\rb", "fine"]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.csv"
    rows = [{"id": f"-{cell}", "=x": cell, "text": cell} for cell in cells]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(tmp_path / "export"), "--input", str(source), "--output", str(target)]
    words += ["--keep", "id", "--keep", "=x"]

    def found():
        with target.open(newline="") as file:
            return [[row[0], row[1], row[2]] for row in csv.reader(file)]

    predict_main([*words, "--format", "csv"])
    defused = ["'=1+1", "'@user hi", "a\rb", "fine"]
    wanted = [[f"'-{cell}", safe, safe] for cell, safe in zip(cells, defused, strict=True)]
    assert found() == [["id", "'=x", "text"], *wanted]
    predict_main([*words, "--format", "csv", "--raw-csv"])
    assert found() == [["id", "=x", "text"], *([f"-{cell}", cell, cell] for cell in cells)]
    with pytest.raises(SystemExit, match="--raw-csv wants --format csv"):
        predict_main([*words, "--raw-csv"])
