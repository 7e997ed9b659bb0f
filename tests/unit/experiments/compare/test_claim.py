"""The comparison named beforehand: read, recorded before the runs, measured and shown; the measure ``loss``."""

import json

import pytest
from scipy import stats

from comoe.config.load import load_recipe
from comoe.experiments.compare.claim import (
    Claim,
    claimed_cell,
    need_soft_labels,
    parse_claim,
    record_claim,
)
from comoe.experiments.compare.command import SETTINGS
from comoe.experiments.compare.plan import Plan, plan_arms
from comoe.experiments.compare.plots import time_figure, write_plots
from comoe.experiments.compare.report import compare, write_comparison
from comoe.experiments.compare.tables import markdown_lines
from comoe.experiments.runner import Experiment, record_settings
from tests.helpers_compare import TASKS, write_run

LOSSES = {
    "dense": [0.60, 0.62, 0.64],
    "sigmoid": [0.55, 0.58, 0.56],
    "no_experts": [0.70, 0.66, 0.71],
}


def planned(experiment: Experiment) -> Plan:
    return plan_arms(experiment, arms=list(LOSSES), custom={}, seeds=[0, 1, 2])


def write_runs(experiment: Experiment) -> None:
    for arm, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            right = dict.fromkeys((*TASKS, "hint"), 30 + seed)
            # The mean leaves the auxiliary task out.
            by_task = {"mood": loss - 0.1, "topic": loss, "stance": loss + 0.1, "hint": 9.0}
            # The teachers know two of the tasks.
            kl = {"mood": loss / 10, "topic": loss / 20}
            write_run(experiment.runs / f"{arm}-s{seed}", right, losses=by_task, kl=kl)


@pytest.mark.parametrize(
    ("text", "claim", "cell"),
    [
        ("sigmoid > dense", ("sigmoid", ">", "dense", "mean"), ("metric", "sigmoid", "mean")),
        (" dense<sigmoid on mood/accuracy", ("dense", "<", "sigmoid", "mood/accuracy"), ("metric", "sigmoid", "mood")),
        ("sigmoid > dense on mood/macro_f1", ("sigmoid", ">", "dense", "mood/macro_f1"), None),
        ("sigmoid < dense on loss", ("sigmoid", "<", "dense", "loss"), ("loss", "sigmoid", "mean")),
        ("sigmoid < dense on mood/loss", ("sigmoid", "<", "dense", "mood/loss"), ("loss", "sigmoid", "mood")),
        ("sigmoid > no_experts on loss", ("sigmoid", ">", "no_experts", "loss"), None),
        ("dense < sigmoid on teacher_kl", ("dense", "<", "sigmoid", "teacher_kl"), ("teacher_kl", "sigmoid", "mean")),
        ("sigmoid > dense on mood/f1/good", None, "f1/good is not a metric of mood"),
        ("sigmoid < dense on mood/teacher_kl", None, "distill.teachers"),
        ("sigmoid < dense on mood/", None, "names no metric after mood/"),
    ],
)  # fmt: skip
def test_a_claim_is_read_and_found_in_the_tables(experiment, text, claim, cell):
    taught = ["distill.teachers=[teacher]"] if text.endswith("on teacher_kl") else []
    read = (text, planned(experiment), load_recipe(experiment.config, taught))
    if claim is None:
        with pytest.raises(ValueError, match=cell):
            parse_claim(*read)
        return
    assert parse_claim(*read) == Claim(*claim)
    mains = {"mood": "accuracy"}
    assert claimed_cell(Claim(*claim), "dense", mains) == cell
    assert claimed_cell(Claim(*claim, runs_before=1), "dense", mains) is None


def test_the_divergence_from_soft_labels_wants_soft_labels(experiment):
    votes = load_recipe(experiment.config, ["tasks.mood.soft_label=votes"])
    text = "sigmoid < dense on teacher_kl"
    assert parse_claim(text, planned(experiment), votes).measure == "teacher_kl"
    need_soft_labels("--measure teacher_kl", votes)
    with pytest.raises(ValueError, match="--measure teacher_kl"):
        need_soft_labels("--measure teacher_kl", load_recipe(experiment.config))


def test_a_claim_is_recorded_before_the_runs_and_cannot_be_changed(experiment):
    plan = planned(experiment)
    record_settings(experiment, file_name=SETTINGS)

    def record(text: str | None, planned: Plan = plan):
        return record_claim(experiment, planned, text, file_name=SETTINGS)

    assert record(None) is None
    first = record("sigmoid < dense on loss")
    assert first == Claim("sigmoid", "<", "dense", "loss", (0, 1, 2), 0)
    record_settings(experiment, file_name=SETTINGS)
    write_runs(experiment)
    assert record(None) == record("sigmoid<dense on loss") == first
    with pytest.raises(ValueError, match='"sigmoid < dense on loss" before'):
        record("dense < sigmoid on loss")
    (experiment.output / SETTINGS).unlink()
    record_settings(experiment, file_name=SETTINGS)
    assert record("sigmoid < dense on loss").runs_before == 9


def test_the_report_by_loss_orders_the_arms_and_begins_with_the_claim(experiment, tmp_path):
    write_runs(experiment)
    claim = Claim("sigmoid", "<", "dense", "loss", (0, 1), 0)
    known = {"baseline": "dense", "resamples": 40, "measure": "loss"}
    comparison = compare(planned(experiment), experiment.runs, claim=claim, **known)
    expected = stats.ttest_rel(LOSSES["sigmoid"], LOSSES["dense"])
    found = comparison.claim.difference
    assert found.mean == pytest.approx(-0.17 / 3) and found.p == pytest.approx(expected.pvalue)
    assert comparison.claim.verdict == "holds"
    assert comparison.arms == ["sigmoid", "dense", "no_experts"]
    losses = comparison.against
    assert losses["sigmoid"]["mean"].verdict == "gained"
    # Two arms; the mean and four tasks by metric and loss, the mean and two tasks by divergence.
    others = [
        item
        for group in comparison.differences.values()
        for arm in group.values()
        for item in arm.values()
    ]
    assert len(others) == 26 and losses["sigmoid"]["mood"].adjusted > losses["sigmoid"]["mood"].p
    text = "\n".join(markdown_lines(comparison))
    for part in ("difference -0.0567 [", f"p = {expected.pvalue:.3f} (not adjusted), 3 seeds: **holds**",
                 "Seeds were added after the claim", "| sigmoid | 3 | 0.5633 [", "| mood/loss |",
                 "Losses: validation posts of mood 60", "| loss | 0.0", "## Gains in loss over"):  # fmt: skip
        assert part in text
    assert text.index("## Claim") < text.index("| sigmoid |")
    write_comparison(comparison, tmp_path)
    rest = json.loads((tmp_path / "comparison.json").read_text())
    assert rest["claim"]["verdict"] == "holds" and rest["claim"]["measure"] == "loss"
    assert rest["smallest_difference"]["loss"]["mean"]["smallest"] > 0.01
    assert rest["arms"]["sigmoid"]["loss_against_baseline"]["mean"]["mean"] == pytest.approx(
        0.17 / 3
    )
    assert not (tmp_path / "affinity.csv").exists()
    write_plots(comparison, tmp_path)
    assert (tmp_path / "plots/loss.png").stat().st_size > 4000
    panels = time_figure(comparison, "test").axes
    assert [panel.get_xlabel() for panel in panels] == [f"milliseconds per post, {what}" for what in
                                                        ("training", "prediction") * 3]  # fmt: skip
    # 20 posts in 2 seconds of training, 100 predicted posts per second.
    assert [panel.lines[0].get_xdata()[0] for panel in panels] == [100.0, 10.0] * 3
    assert "| sigmoid | +0.200 [+0.200, +0.200] | -0.100 [-0.100, -0.100] |  |  |" in text
    # Without resampled posts, as in the reports between the runs: over paired seeds.
    plain = compare(planned(experiment), experiment.runs, baseline="dense", resamples=0,
                    claim=Claim("dense", ">", "sigmoid", "mean", (0, 1, 2), 0))  # fmt: skip
    assert plain.claim.difference.mean == 0 and plain.claim.difference.seeds == 3
    taught = compare(planned(experiment), experiment.runs, baseline="dense", resamples=0,
                     measure="teacher_kl")  # fmt: skip
    assert taught.against["sigmoid"]["mean"].mean == pytest.approx(0.75 * 0.17 / 3 / 10)
    assert "| arm | seeds | KL to the teachers | lower than dense |" in "\n".join(
        markdown_lines(taught)
    )
    late = Claim("sigmoid", "<", "dense", "loss", (0, 1, 2), 9)
    late = compare(planned(experiment), experiment.runs, claim=late, **known)
    assert "(**not** named beforehand: 9 runs were finished)" in "\n".join(markdown_lines(late))
    assert late.against["sigmoid"]["mean"].verdict == ""
