"""What the end of a run writes, and tells to type next."""

import json
from dataclasses import replace

import numpy as np
import pytest

from comoe.data.posts import unlabelled_posts
from comoe.evaluation.evaluate import Evaluation
from comoe.tasks.task import Task
from comoe.train.results import print_results, write_predictions


@pytest.mark.parametrize(
    ("config", "posts"),
    [({"image_column": "photo"}, "posts.jsonl"), ({"image_column": None}, "posts.txt"), ({}, "posts.txt")],
)  # fmt: skip
def test_the_last_line_names_an_input_that_fits_the_model(config, posts, tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"metrics": {}}')
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    print_results(tmp_path, [Task("mood", "single_label", ("bad", "good"), "macro_f1")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("predict ") and f"--input {posts} --output predictions.jsonl" in last


def test_the_last_line_names_the_second_text_where_a_prompt_wants_it(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"metrics": {}}')
    print_results(tmp_path, [Task("aspect", "text", (), "token_f1", prompt="{pair} in {text}")])
    assert (
        "--input posts.jsonl --pair-column pair --output predictions.jsonl"
        in capsys.readouterr().out.splitlines()[-1]
    )
    (tmp_path / "export").mkdir()
    kept = {"columns": {"aspect": {"pair": "about", "label": "aspect"}}}
    (tmp_path / "export" / "config.json").write_text(json.dumps(kept))
    print_results(tmp_path, [Task("aspect", "text", (), "token_f1", prompt="{pair} in {text}")])
    assert (
        "--input posts.jsonl --pair-column about --output predictions.jsonl"
        in capsys.readouterr().out
    )


def test_predictions_name_the_data_set_of_each_post(tmp_path):
    posts = replace(
        unlabelled_posts(["a", "b"], tasks=[]),
        groups=np.array([1, 0]),
        group_names=("irony", "hate"),
    )
    rows = [
        {"row": 0, "text": "a", "gold": None, "label": "x"},
        {"row": 1, "text": "b", "gold": "x", "label": "x"},
    ]
    (tmp_path / "p/test").mkdir(parents=True)
    for name in ("test/sarcasm.jsonl", "test/of a user.csv", "new.jsonl"):
        (tmp_path / "p" / name).write_text("{}")
    write_predictions(
        tmp_path / "p", {"test": Evaluation({}, {}, {"irony": rows})}, {"test": posts}
    )
    found = {path.name for path in (tmp_path / "p").rglob("*.*")}
    assert found == {"irony.jsonl", "of a user.csv", "new.jsonl"}
    lines = (tmp_path / "p/test/irony.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in lines]
    assert written == [rows[0] | {"data_set": "hate"}, rows[1] | {"data_set": "irony"}]
