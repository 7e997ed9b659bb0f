"""Authors and replies with neighbors in one run: trained, resumed to the same losses, exported, predicted alike."""

import json

import pytest

from comoe.inference.options import PredictOptions
from comoe.inference.predict_file import predict_file
from comoe.inference.predictor import Predictor
from comoe.inference.score import score
from tests.end_to_end.commands import LEAN, end_behind, losses, read_lines, train_in_ranks

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_core]

WORDS = (
    "tasks.stance.path=threads", "tasks.stance.context=thread", "tasks.stance.context_as=neighbors",
    "tasks.stance.label=stance", "data.limit_per_task=64", "data.limit_eval=20", "data.max_posts=4",
    "train.epochs=1", "train.save_every=2", "train.eval_every=4", "train.log_every=1", "model.dropout=0.1",
    "loss.contrastive.weight=0.1", "loss.contrastive.views=2", "run.verbose=false",
)  # fmt: skip


def test_authors_and_neighbors_train_evaluate_resume_export_and_predict_together(home, tmp_path):
    words = [f"run.output_dir={tmp_path}", *LEAN, *WORDS]
    train_in_ranks(1, home, words, config="launch/configs/authors_smoke.yaml", settings="zero1")
    run = tmp_path / "authors_smoke"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["metrics"]
    assert {name: found["n"] for name, found in results["test"].items()} == {
        "trait": 20,
        "stance": 20,
    }
    whole = losses(run)
    assert len(whole) == 4

    end_behind(run, step=2)
    assert f"resuming {run} at step 2" in train_in_ranks(1, home, resume=run)
    assert losses(run) == whole

    predictor = Predictor.from_pretrained(run / "export", device="cpu")
    told = read_lines(run / "predictions" / "test" / "trait.jsonl")[:5]
    found = predictor([row["text"].split("\n") for row in told], tasks=["trait"])
    assert [row["trait"]["label"] for row in found] == [row["label"] for row in told]
    for row, one in zip(told, found, strict=True):
        assert one["trait"]["scores"] == pytest.approx(row["scores"], abs=1e-5)
    posts = home / "smoke-2" / "linked_posts"
    scored = score(predictor, posts / "threads" / "test.jsonl", tasks=["stance"])
    assert scored.evaluation.metrics["stance"]["n"] == 400

    target = tmp_path / "traits.jsonl"
    predict_file(
        predictor, posts / "authors" / "test.jsonl", target, PredictOptions(tasks=["trait"])
    )
    rows = read_lines(target)
    users = [row["user"] for row in read_lines(posts / "authors" / "test.jsonl")]
    assert [row["user"] for row in rows] == list(dict.fromkeys(users))
    assert {row["num_posts"] for row in rows} == {6}
    scored = score(predictor, posts / "authors" / "test.jsonl", tasks=["trait"])
    right = [row["trait"]["label"] for row in rows]
    wanted = {row["user"]: row["trait"] for row in read_lines(posts / "authors" / "test.jsonl")}
    share = sum(a == b for a, b in zip(right, wanted.values(), strict=True)) / len(right)
    assert scored.evaluation.metrics["trait"]["accuracy"] == pytest.approx(share)
