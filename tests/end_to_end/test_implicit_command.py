"""The recipe implicit_smoke with heads beside the decoder: labels by words, free text and heads in one run, resumed."""

import json
import sys

import pytest

from comoe.inference.predictor import Predictor
from tests.end_to_end.commands import (
    LEAN,
    end_behind,
    losses,
    read_lines,
    train_in_ranks,
    train_lines,
)

pytestmark = [pytest.mark.end_to_end, pytest.mark.one_core]

TASKS = ("polarity", "aspect", "opinion", "target")
WORDS = (
    "tasks.target.path=implied", "tasks.target.label=target", "data.limit_per_task=64", "data.limit_eval=20",
    "train.epochs=2", "train.save_every=2", "train.eval_every=4", "train.log_every=1",
    "tasks.aspect.confidence_strategy=input_output", "loss.weighting=uncertainty_positive",
    "tasks.aspect.num_beams=2", "run.verbose=false",
)  # fmt: skip


@pytest.mark.parametrize("encoder", ["smoke:t5", "smoke:llama"])
def test_heads_label_words_and_text_train_evaluate_resume_export_and_predict_together(
    home, tmp_path, encoder
):
    words = [f"run.output_dir={tmp_path}", f"model.encoder={encoder}", *LEAN, *WORDS]
    train_in_ranks(1, home, words, config="launch/configs/implicit_smoke.yaml", settings="zero1")
    run = tmp_path / "implicit_smoke"
    metrics = {
        "polarity": "accuracy",
        "aspect": "exact_match",
        "opinion": "exact_match",
        "target": "macro_f1",
    }
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["metrics"]
    for split in ("validation", "test"):
        assert {
            name: metrics[name] in found for name, found in results[split].items()
        } == dict.fromkeys(TASKS, True)
        assert "accuracy@implicit=true" in results[split]["polarity"]
        assert {"token_f1", "rouge_l", "loss"} <= set(results[split]["opinion"])
    assert all(set(line["tasks"]) == set(TASKS) for line in train_lines(run).values())
    whole = losses(run)
    assert len(whole) == 4

    end_behind(run, step=2)
    assert f"resuming {run} at step 2" in train_in_ranks(1, home, resume=run)
    assert losses(run) == whole

    predictor = Predictor.from_pretrained(run / "export", device="cpu")
    for name, column in (("polarity", "label"), ("opinion", "answer"), ("target", "label")):
        told = read_lines(run / "predictions" / "test" / f"{name}.jsonl")[:5]
        answers = predictor([row["text"] for row in told])
        assert [set(answer) >= {"text", *TASKS} for answer in answers] == [True] * 5
        assert [answer[name][column] for answer in answers] == [row[column] for row in told]


def test_a_dry_run_plans_for_gpus_that_are_not_here(terminal):
    typed = [sys.executable, "launch/train.py", "--config", "launch/configs/implicit_smoke.yaml"]
    planned = terminal.run(
        *typed, "--deepspeed", "ds_configs/zero3.json", "--dry-run", "--gpus", "4"
    )
    assert planned.code == 0, planned.said
    assert "memory per rank, estimated (4 ranks, EP 4, ZeRO 3, bf16)" in planned.out
    refused = terminal.run(*typed, "--gpus", "4")
    assert refused.code == 2 and "goes with --dry-run" in refused.said
