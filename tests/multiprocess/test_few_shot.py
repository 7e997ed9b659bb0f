"""Few-shot training: heads that start at texts, under every ZeRO stage; a contrastive stage, cut short and resumed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers_ranks import run_ranks
from tests.multiprocess.sittings import lines_of, sit, sit_twice

pytestmark = pytest.mark.multiprocess

HERE = "tests.multiprocess.test_few_shot"
SMOKE = "launch/configs/smoke.yaml"
MOODS = {"negative": "bad and slow", "neutral": "some place", "positive": "good fast service"}
ASPECTS = {"place": "the room", "price": "cheap or not", "service": "the staff"}
FEW = (
    "data.cache=false", "tasks.mentions=null", "tasks.stance=null", "tasks.mood.limit_per_label=8",
    "tasks.topic.limit_per_label=8", "tasks.strength.limit=20", "tasks.aspects.limit_per_label=8",
    "train.batch_size=16", "run.histograms=false",
)  # fmt: skip
STAGED = (
    *FEW, "tasks.strength=null", "tasks.aspects=null", "data.posts_per_label=2", "train.max_steps=12",
    "loss.contrastive.weight=0", "loss.contrastive.first_steps=6", "model.dropout=0.1", "train.eval_every=4",
    "train.schedule=linear", "train.warmup_fraction=0.2", "train.measure_experts=false",
)  # fmt: skip
STOPPED_AT = 4
DESCRIBED = (f"tasks.mood.descriptions={MOODS}", f"tasks.aspects.descriptions={ASPECTS}")


def starts(folder: str, stages: list[int]) -> dict[str, Any]:
    """The weights that a run starts with, under some stages; and of one process the reference."""
    os.environ["COMOE_HOME"] = folder
    from comoe.config.load import load_recipe
    from comoe.distributed import world_size
    from comoe.train.build import build_run
    from comoe.train.label_texts import start_heads
    from comoe.train.parallel.setup import gather_full_state, start_ranks
    from comoe.train.read_data import read_posts, tokenize_posts
    from comoe.train.start_model import build_model

    recipe = load_recipe(SMOKE, [*FEW, *DESCRIBED, "train.max_steps=2"])
    device, found = start_ranks(timeout_seconds=120), {}
    for stage in stages:
        settings = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        run = build_run(recipe, settings, Path(folder) / str(stage), device=device)
        state = gather_full_state(run.engine.deepspeed)
        found[str(stage)] = {key: value.numpy() for key, value in state.items() if "heads." in key}
    if world_size() == 1:
        resolved, corpus = read_posts(recipe)
        splits, collator = tokenize_posts(resolved, corpus)
        plain = build_model(resolved, splits, collator).model
        found["plain"] = {
            key: value.numpy() for key, value in plain.state_dict().items() if "heads." in key
        }
        found["reference"] = reference(resolved, plain, splits["train"], collator)
        resolved.model.pooling = "layers"
        mixing = build_model(resolved, splits, collator).model
        start_heads(mixing, resolved, collator, splits["train"], device=device)
        state = mixing.state_dict()
        found["layers"] = {key: state[key].numpy() for key in state if "heads." in key}
        found["reference of layers"] = reference(resolved, mixing, splits["train"], collator)
    return found


def reference(recipe: Any, model: Any, train: Any, collator: Any) -> dict[int, Any]:
    """Weight and bias of each described head in float64, one text at a time, by the library's own encoder."""
    from transformers import AutoModel

    encoder = (
        AutoModel.from_pretrained(recipe.model.encoder, add_pooling_layer=False).eval().double()
    )

    def pooled(ids: np.ndarray, types: np.ndarray, query: np.ndarray) -> np.ndarray:
        arguments = {"input_ids": ids, "token_type_ids": types}
        rows = {key: torch.tensor(value[None].astype(np.int64)) for key, value in arguments.items()}
        with torch.no_grad():
            output = encoder(**rows, output_hidden_states=True)
        states_LM = output.last_hidden_state[0].numpy()
        if recipe.model.pooling == "layers":  # new, the plain mean of all of them
            states_LM = torch.stack(output.hidden_states).mean(dim=0)[0].numpy()
        weights_L = np.exp(states_LM @ query)
        return weights_L @ states_LM / weights_L.sum()

    found = {}
    for number, texts in ((0, MOODS), (3, ASPECTS)):
        task, query = (
            model.tasks[number],
            model.heads[number].pooling.query.detach().double().numpy(),
        )
        assert tuple(texts) == task.labels
        some = collator.encode_texts(list(texts.values()), config=recipe.data).rows(np.arange(3))
        posts = train.rows(
            np.flatnonzero([value is not None for value in train.posts.labels[task.name]])
        )
        texts_YM, posts_BM = (
            np.stack([pooled(row.input_ids, row.token_types, query) for row in rows])
            for rows in (some, posts)
        )
        lines_YM = texts_YM - texts_YM.mean(axis=0)
        lines_YM /= np.linalg.norm(lines_YM, axis=1, keepdims=True)
        logits_BY = posts_BM @ lines_YM.T
        logits_BY -= logits_BY.mean(axis=0)
        weight_YM = lines_YM * 0.5 / np.sqrt((logits_BY**2).mean())
        found[number] = weight_YM, -weight_YM @ posts_BM.mean(axis=0)
    return found


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> list[dict[str, Any]]:
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("one", "two")]
    one = run_ranks(f"{HERE}:starts", 1, folder=folders[0], stages=[2])[0]
    return [one, run_ranks(f"{HERE}:starts", 2, folder=folders[1], stages=[1, 2, 3])[0]]


def test_heads_start_at_the_texts_of_their_labels(started):
    one = started[0]
    for found, expected in (("2", "reference"), ("layers", "reference of layers")):
        for number, (weight_YM, bias_Y) in one[expected].items():
            key = f"heads.{number}.output"
            np.testing.assert_allclose(one[found][f"{key}.weight"], weight_YM, atol=1e-5)
            np.testing.assert_allclose(one[found][f"{key}.bias"], bias_Y, atol=1e-5)


def test_heads_start_alike_under_every_stage_and_nothing_else_changes(started):
    one, two = started
    described = {
        f"heads.{number}.output.{name}" for number in (0, 3) for name in ("weight", "bias")
    }
    for key, value in one["2"].items():
        for stage in ("1", "2", "3"):
            np.testing.assert_array_equal(two[stage][key], value, err_msg=f"{key}, ZeRO {stage}")
        assert np.array_equal(value, one["plain"][key]) is (key not in described), key


@pytest.fixture(scope="module")
def whole_and_resumed(tmp_path_factory) -> list[list[dict[str, Any]]]:
    """Lines of metrics.jsonl, of a run in one sitting and in two."""
    whole, cut = (tmp_path_factory.mktemp(name) for name in ("whole", "cut"))
    sit(whole, overrides=STAGED)
    sit_twice(cut, overrides=STAGED, stop_at=STOPPED_AT)
    return [lines_of(folder) for folder in (whole, cut)]


def test_a_resume_inside_the_contrastive_stage_equals_the_run_in_one_sitting(whole_and_resumed):
    whole, resumed = whole_and_resumed
    assert resumed == whole


def test_the_stage_has_the_contrastive_loss_alone_and_the_rest_the_tasks(whole_and_resumed):
    lines = whole_and_resumed[0]
    steps = {line["step"]: line for line in lines if line["split"] == "train"}
    assert sorted(steps) == list(range(1, 13))
    for step, line in steps.items():
        assert ("contrastive" in line) == (step <= 6)
        assert set(line["weights"].values()) == {0.0 if step <= 6 else 1.0}
        tasks = sum(values["loss"] for values in line["tasks"].values())
        assert line["loss"] == pytest.approx(line["contrastive"] if step <= 6 else tasks, rel=1e-5)
    rates = [line["rates"]["heads"] for line in steps.values()]
    assert rates[:6] == rates[6:] and rates[1] == max(rates) > rates[5] > 0
    (event,) = (line for line in lines if line["split"] == "event")
    assert (event["event"], event["step"]) == ("tasks_begin", 6)
    evaluated = [line["step"] for line in lines if line["split"] == "validation"]
    assert evaluated == [8, 12]
