"""Plain posts, tags as views, a queue and a learned temperature in one run on two ranks, from recipe to predictions."""

import json

import pytest

from comoe.inference.predictor import Predictor
from tests.end_to_end.commands import LEAN, TASKS, read_lines, train_in_ranks, train_lines

pytestmark = pytest.mark.end_to_end


def test_a_recipe_with_plain_posts_trains_evaluates_predicts_and_exports(tmp_path, home):
    rows = [json.dumps({"text": f"plain post about thing {number}"}) for number in range(300)]
    (tmp_path / "plain.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    words = (
        f"run.output_dir={tmp_path}", *LEAN, "train.max_steps=3", "train.batch_size=64",
        "tasks.plain.kind=unlabelled", f"tasks.plain.path={tmp_path / 'plain.jsonl'}",
        "tasks.mentions.contrastive=true", "loss.contrastive.queue_size=40",
        "loss.contrastive.learn_temperature=true",
    )  # fmt: skip
    assert "data set plain: 300 train\n" in train_in_ranks(2, home, words)
    for line in train_lines(tmp_path / "smoke").values():
        assert set(line["tasks"]) == {*TASKS, "plain"}
        assert all(
            values["contrastive"] > 0 and values["temperature"] > 0
            for values in line["tasks"].values()
        )
        assert set(line["tasks"]["plain"]) == {"contrastive", "positives_per_anchor", "temperature"}
        for name in ("plain", "mentions"):
            assert line["tasks"][name]["positives_per_anchor"] == pytest.approx(1.0)
    checks = [
        line
        for line in read_lines(tmp_path / "smoke" / "metrics.jsonl")
        if line["split"] == "validation"
    ]
    assert checks and all(tuple(line["tasks"]) == TASKS for line in checks)
    written = {path.stem for path in (tmp_path / "smoke" / "predictions" / "test").iterdir()}
    assert written == set(TASKS)
    predictor = Predictor.from_pretrained(tmp_path / "smoke" / "export", device="cpu")
    assert set(predictor(["a fine day"])[0]) == {"text", *TASKS}
