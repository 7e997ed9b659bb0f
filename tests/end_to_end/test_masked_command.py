"""Hidden words before the tasks and beside them: a run of its own, where another starts; resumed exactly; exported."""

import pytest

from comoe.inference.predictor import Predictor
from tests.end_to_end.commands import LEAN, end_behind, read_lines, train_in_ranks, train_lines

pytestmark = pytest.mark.end_to_end


def words_of(folder, name):
    return (
        f"run.output_dir={folder}", f"run.name={name}",
        "tasks.domain.kind=masked_words", f"tasks.domain.path={folder / 'posts.txt'}",
    )  # fmt: skip


@pytest.fixture
def posts(tmp_path):
    lines = [f"plain post about thing {number}\n" for number in range(300)]
    (tmp_path / "posts.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def checks_of(run):
    return [line for line in read_lines(run / "metrics.jsonl") if line["split"] == "validation"]


def test_a_run_of_hidden_words_is_where_a_run_of_tasks_starts(posts, home):
    tasks = ("mood", "topic", "strength", "aspects", "mentions", "stance")
    alone = [f"tasks.{name}=null" for name in tasks]
    steps = ("train.max_steps=4", "train.batch_size=48", "train.eval_every=2")
    said = train_in_ranks(1, home, (*words_of(posts, "before"), *LEAN, *steps, *alone))
    assert "model.start_from=" in said and "comoe predict" not in said
    before = posts / "before"
    for check in checks_of(before):
        (values,) = check["tasks"].values()
        assert set(values) >= {"loss", "masked_accuracy", "perplexity"}
        assert check["chosen"] == values["masked_accuracy"]
    with pytest.raises(ValueError, match="predicts nothing"):
        Predictor.from_pretrained(before / "export", device="cpu")
    said = train_in_ranks(
        1,
        home,
        (
            f"run.output_dir={posts}", "run.name=after", *LEAN, *steps, *alone[1:],
            f"model.start_from={before / 'export'}",
        ),
    )  # fmt: skip
    assert f"starting from {before / 'export'}" in said
    predictor = Predictor.from_pretrained(posts / "after" / "export", device="cpu")
    assert set(predictor(["a fine day"])[0]) == {"text", "mood"}


def test_hidden_words_beside_tasks_resume_exactly_over_two_ranks(posts, home):
    words = (
        *LEAN, "train.max_steps=4", "train.save_every=2", "train.eval_every=4", "train.log_every=1",
        "train.batch_size=48", "train.micro_batch_size=12", "model.dropout=0.2", "data.limit_eval=40",
        "tasks.topic=null", "tasks.strength=null", "tasks.aspects=null", "tasks.domain.weight=0.3",
        "model.moe.route_by=both", "loss.weighting=pcgrad",
    )  # fmt: skip
    train_in_ranks(2, home, (*words_of(posts, "beside"), *words), settings="zero3")
    run = posts / "beside"
    whole = train_lines(run)
    assert len(whole) == 4
    assert all(line["tasks"]["domain"]["loss"] > 0 for line in whole.values())
    (check,) = checks_of(run)
    others = ("mood", "mentions", "stance")
    assert set(check["tasks"]) == {*others, "domain"}
    end_behind(run, step=2)
    train_in_ranks(2, home, resume=run)
    for step, line in train_lines(run).items():
        assert line["loss"] == pytest.approx(whole[step]["loss"], rel=1e-6)
    (again,) = checks_of(run)
    assert again["tasks"]["domain"]["loss"] == pytest.approx(
        check["tasks"]["domain"]["loss"], rel=1e-5
    )
    row = read_lines(run / "predictions" / "validation" / "domain.jsonl")[0]
    assert 0 <= row["correct"] <= row["gold"] and row["log_probability"] < 0
    predictor = Predictor.from_pretrained(run / "export", device="cpu")
    assert set(predictor(["a fine day"])[0]) == {"text", *others}
