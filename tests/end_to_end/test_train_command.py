"""``deepspeed --num_accelerators 2 launch/train.py --deepspeed ds_configs/zero2.json``: what a run leaves behind."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from comoe.config.load import load_recipe
from comoe.train.checkpoint.folder import find_checkpoint
from tests.end_to_end.commands import (
    LEAN,
    SMOKE,
    TASKS,
    is_launchers,
    losses,
    read_lines,
    train_lines,
)

pytestmark = pytest.mark.end_to_end

MAIN_METRICS = {"mood": "macro_f1", "topic": "macro_f1", "strength": "pearson", "aspects": "macro_f1",
                "mentions": "span_f1", "stance": "macro_f1"}  # fmt: skip
LAYERS = (1, 3)
"""Encoder layers with experts: every second of four."""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_loss_falls_visibly_within_six_steps(smoke_run):
    first, *_, last = losses(smoke_run.folder)
    assert len(losses(smoke_run.folder)) == 6
    assert last < 0.9 * first


def test_a_training_line_has_step_loss_tasks_rates_and_weights(smoke_run):
    for step, line in train_lines(smoke_run.folder).items():
        assert list(line)[:3] == ["step", "split", "loss"] and 1 <= step <= 6
        assert tuple(line["tasks"]) == TASKS == tuple(line["weights"])
        for task, values in line["tasks"].items():
            # Tags take no part in the contrastive loss unless they are asked to.
            contrasted = {"contrastive", "positives_per_anchor"} if task != "mentions" else set()
            assert set(values) == {"loss", MAIN_METRICS[task], *contrasted}
        assert set(line["rates"]) == {"encoder", "experts", "heads", "router"}
        assert line["grad_norm"] > 0
        assert line["posts_per_second"] > 0
        assert line["tokens_per_second"] > 0
        parts = sum(values["loss"] for values in line["tasks"].values()) + 0.1 * line["contrastive"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_the_evaluations_are_logged_with_every_metric_and_the_gates(smoke_run):
    lines = read_lines(smoke_run.folder / "metrics.jsonl")
    checks = {line["split"]: line for line in lines if line["split"] != "train"}
    assert set(checks) == {"validation", "test"}
    for line in checks.values():
        assert line["step"] == 6 and tuple(line["tasks"]) == TASKS
        for task, metric in MAIN_METRICS.items():
            assert {metric, f"majority/{metric}", "loss", "n"} <= set(line["tasks"][task])
        assert {"accuracy", "macro_precision", "macro_recall", "f1/positive"} <= set(
            line["tasks"]["mood"]
        )
        assert {"mae", "pearson", "spearman"} <= set(line["tasks"]["strength"])
        assert {"span_f1"} <= set(line["tasks"]["mentions"])
        assert "routing" in line


def test_config_settings_and_environment_are_written_down(smoke_run):
    recipe = load_recipe(smoke_run.folder / "config.yaml")
    assert (recipe.train.max_steps, recipe.run.name, tuple(recipe.tasks)) == (6, "smoke", TASKS)
    settings = read_json(smoke_run.folder / "ds_config.json")
    assert '"auto"' not in json.dumps(settings)
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["expert_parallel"]["autoep_size"] == 2
    environment = read_json(smoke_run.folder / "environment.json")
    assert environment["packages"]["deepspeed"] == "0.19.8" and environment["world_size"] == 2
    command = environment["command"]
    assert command[0] == "launch/train.py" and "train.max_steps=6" in command


def test_results_hold_both_splits_and_how_the_run_went(smoke_run):
    results = read_json(smoke_run.folder / "results.json")
    assert (results["finished"], results["step"]) == ("all steps done", 6)
    # An epoch's 1200 posts are 13 batches of nearly the same size, at most 96.
    assert 6 * 92 <= results["posts"] <= 6 * 93
    layout = [results[key] for key in ("world_size", "ep_size", "zero_stage", "bf16")]
    assert layout == [2, 2, 2, False]
    assert results["posts_per_second"] > 0 and results["peak_memory_bytes_per_rank"] > 10e6
    for split in ("validation", "test"):
        assert tuple(results["metrics"][split]) == TASKS
    sizes = {"train": 400, "validation": 80, "test": 80}
    assert results["data"]["posts"] == {name: sizes for name in ("reviews", "mentions", "stance")}


def test_results_tell_what_experts_and_gate_are_worth(smoke_run):
    results = read_json(smoke_run.folder / "results.json")
    card = (smoke_run.folder / "export" / "README.md").read_text(encoding="utf-8")
    for key in ("experts_off", "experts_in_turn"):
        found = results[key]
        assert found["posts"] == 240 and tuple(found["tasks"]) == TASKS
        for task, metric in MAIN_METRICS.items():
            assert {metric, "loss", "metric_error", "loss_error"} == set(found["tasks"][task])
    # Six steps from outputs of zero: nothing yet.
    assert results["experts_off"]["adds_nothing"] and "the experts add nothing" in card
    assert "the experts add nothing" in smoke_run.done.out


def test_every_labelled_post_of_both_splits_is_predicted(smoke_run):
    counted = read_json(smoke_run.folder / "results.json")["metrics"]
    for split in ("validation", "test"):
        for task in TASKS:
            rows = read_lines(smoke_run.folder / "predictions" / split / f"{task}.jsonl")
            assert len(rows) == len({row["row"] for row in rows})
            assert all({"text", "gold"} <= set(row) for row in rows)
            # A tenth of the posts has no topic.
            assert len(rows) == counted[split][task]["n"] and (len(rows) == 80 or task == "topic")


def test_pictures_are_drawn_and_not_blank(smoke_run):
    names = {path.stem for path in (smoke_run.folder / "plots").glob("*.png")}
    splits, classes = ("validation", "test"), ("mood", "topic", "stance")
    confusions = {f"confusion_{split}_{task}" for split in splits for task in classes}
    assert (
        names
        >= {"loss", "metrics", "experts", "routing_layer_expert", "routing_task_expert"}
        | confusions
    )
    for path in (smoke_run.folder / "plots").iterdir():
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 100 and pixels.std() > 0.01, path.name


def test_tensorboard_shows_losses_metrics_rates_weights_gates_and_images(smoke_run):
    events = EventAccumulator(
        str(smoke_run.folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0}
    )
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    for task, metric in MAIN_METRICS.items():
        assert {f"{split}/{task}/{metric}" for split in ("train", "validation", "test")} <= scalars
        assert {f"train/{task}/loss", f"weight/{task}"} <= scalars
    expected = "train/loss rate/encoder rate/experts rate/heads validation/mean measured/grad_norm"
    assert {
        *expected.split(),
        *(f"measured/{unit}_per_second" for unit in ("posts", "tokens")),
    } <= scalars
    measures = (
        "max_violation effective_experts entropy task_information cooperation share/expert_3 "
    )
    measures += "update_ratio gate_entropy weight_spread update_ratio/mood"
    measures = measures.split()
    assert {f"routing/layer_{layer}/{name}" for layer in LAYERS for name in measures} <= scalars
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx(losses(smoke_run.folder), rel=1e-6)
    off = {f"experts_off/{task}/{name}" for task in TASKS for name in ("loss", MAIN_METRICS[task])}
    assert off | {"experts_in_turn/mean/loss"} <= scalars
    images = set(events.Tags()["images"])
    shown = {f"confusion/{split}/mood" for split in ("validation", "test")}
    assert shown | {"routing/layer_expert", "routing/task_expert"} <= images
    assert all(events.Images(tag)[-1].encoded_image_string.startswith(b"\x89PNG") for tag in images)
    (text,) = events.Tensors("recipe/text_summary")
    assert b"max_steps: 6" in text.tensor_proto.string_val[0]


def test_checkpoints_and_export_are_whole(smoke_run):
    found = find_checkpoint(smoke_run.folder / "checkpoints")
    assert found is not None and (found.step, found.broken) == (6, ())
    assert read_json(smoke_run.folder / "checkpoints" / "best.json") == {"step": 6}
    assert not list((smoke_run.folder / "checkpoints").glob(".writing-*"))
    export = smoke_run.folder / "export"
    config = read_json(export / "config.json")
    assert [task["name"] for task in config["tasks"]] == list(TASKS)
    assert config["num_local_experts"] == 4 and config["num_experts_per_tok"] == 2
    assert (export / "model.safetensors").stat().st_size > 100_000
    assert (export / "tokenizer.json").is_file()
    posts = "training_posts.npy"
    assert (export / posts).read_bytes() == (smoke_run.folder / posts).read_bytes()
    results = read_json(smoke_run.folder / "results.json")
    assert f"{results['metrics']['test']['mood']['macro_f1']:.3f}" in (
        export / "README.md"
    ).read_text(encoding="utf-8")


def test_the_command_ends_with_the_table_and_what_to_type_next(smoke_run):
    lines = [line for line in smoke_run.done.out.splitlines() if not is_launchers(line)]
    head = re.compile(r"task +metric +validation +test")
    (begin,) = [number for number, line in enumerate(lines, start=2) if head.match(line)]
    end = begin + len(TASKS)
    assert [row.split()[:2] for row in lines[begin:end]] == [
        list(pair) for pair in MAIN_METRICS.items()
    ]
    after = [line.split()[0] for line in lines[end:] if line.strip()]
    experts = after.index("experts")
    assert after[:2] == ["calibration", "task"]
    assert set(after[3:experts]) - {"Thresholds"} == set(TASKS) - {"strength"}
    assert after[experts + 3 : -3] == [*TASKS, "mean", "warning:"]
    assert after[-3:] == ["run", "watch", "predict"]


def test_the_libraries_are_quiet(smoke_run):
    # DeepSpeed logs with a date and its level; its runner and launcher are not ours, our ranks are.
    said = smoke_run.done.said
    assert not re.search(
        r"^\[20\d\d-|deepspeed_shm|\b(INFO|WARNING|Warning|DEBUG)\b", said, re.MULTILINE
    ), said
    assert "Traceback" not in said


PROGRAM = """
import sys
import comoe

recipe = comoe.load_recipe(sys.argv[1], [f"run.output_dir={sys.argv[2]}", "train.max_steps=1", *sys.argv[3:]])
folder = comoe.train(recipe)
assert comoe.train(resume=folder, overrides=["train.max_steps=2"]) == folder
print("folder", folder)
"""


def test_a_program_trains_a_recipe_and_resumes_it(terminal, tmp_path):
    done = terminal.run(sys.executable, "-c", PROGRAM, SMOKE, tmp_path, *LEAN)
    assert done.code == 0, done.said
    folder = Path(done.out.splitlines()[-1].removeprefix("folder "))
    assert read_json(folder / "results.json")["step"] == 2
    assert (folder / "export" / "model.safetensors").is_file()
    assert read_json(folder / "deepspeed.json")["zero_optimization"]["stage"] == 2
