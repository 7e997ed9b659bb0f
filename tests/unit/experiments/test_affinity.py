"""Gradients of the tasks' losses by the shared weights, and their cosines, by hand and on an export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import write_jsonl
from helpers_export import export_tiny, tiny_recipe
from helpers_model import MOOD, TOPIC, random_batch, tiny_model
from safetensors.torch import load_file, save_file

from comoe.config.load import save_recipe
from comoe.config.recipe import TaskConfig
from comoe.experiments.ablate import measure_removal
from comoe.experiments.affinity import (
    Affinity,
    Products,
    measure_affinity,
    read_affinity,
    shared_weights,
    summed_gradient,
)
from comoe.inference.checkpoint_folder import write_manifest


def test_the_gradient_over_its_units_is_that_of_the_mean_over_all_batches_in_float64():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    unused = torch.ones(4, dtype=torch.float64, requires_grad=True)
    batches = [torch.randn(rows, 4, dtype=torch.float64, generator=generator) for rows in (5, 2, 1)]

    def share(batch):
        x_B3, y_B = batch[:, :3], (batch[:, 3] > 0).long()
        return torch.nn.functional.cross_entropy(x_B3 @ weight, y_B, reduction="sum"), torch.tensor(
            len(batch)
        )

    (found, nothing), units = summed_gradient(share, batches, [weight, unused])
    x_N3, y_N = torch.cat(batches)[:, :3], (torch.cat(batches)[:, 3] > 0).long()
    # By hand: x (softmax - one-hot), the mean over all 8 rows, whatever batch they came in.
    slope_N2 = (x_N3 @ weight).detach().softmax(1) - torch.eye(2, dtype=torch.float64)[y_N]
    torch.testing.assert_close(found / units, x_N3.T @ slope_N2 / 8, rtol=1e-13, atol=1e-14)
    assert nothing.abs().max() == 0 and weight.grad is None


def test_the_gradient_of_a_model_is_autograds_and_heads_are_left_out():
    model = tiny_model(train_layers=1).eval()
    weights = shared_weights(model)
    names = {
        name for name, weight in model.named_parameters() if any(weight is mine for mine in weights)
    }
    assert any(".block.mixture.experts" in name for name in names)
    assert any("layer.2.attention" in name for name in names)
    assert not any(
        name.startswith(("heads", "projection")) or "layer.0.attention" in name for name in names
    )
    batches = [random_batch(rows, seed=seed) for seed, rows in enumerate((6, 3))]

    def share(batch):
        targets = batch.labels["mood"]
        return MOOD.rules.loss(model(batch).logits["mood"], targets, MOOD), MOOD.rules.normalizer(
            targets, MOOD
        )

    found, units = summed_gradient(share, batches, weights)
    shares = [share(batch) for batch in batches]
    assert units == float(sum(part for _, part in shares))
    sum(loss for loss, _ in shares).backward()
    for mine, weight in zip(found, weights, strict=True):
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)


def test_only_products_of_different_parts_count():
    rng = np.random.default_rng(0)
    parts_A, tasks_T, width = 5, 3, 7
    sums_ATX = rng.standard_normal((parts_A, tasks_T, width))
    units_AT = rng.integers(1, 6, (parts_A, tasks_T)).astype(float)
    # Task 2 has posts in one part alone.
    sums_ATX[1:, 2], units_AT[1:, 2] = 0, 0
    products = Products(tasks_T)
    for sums_TX, units_T in zip(sums_ATX, units_AT, strict=True):
        split = [list(torch.tensor(row).split([3, 4])) for row in sums_TX]
        products.add(list(zip(split, units_T, strict=True)))
    cosine_TT, norm_T = products.cosines()
    mean_TX = sums_ATX.sum(0) / units_AT.sum(0)[:, None]
    np.testing.assert_allclose(norm_T, np.linalg.norm(mean_TX, axis=1))
    pairs = [(a, b) for a in range(parts_A) for b in range(parts_A) if a != b]
    for t in range(2):
        for u in range(2):
            by_hand = sum(sums_ATX[a, t] @ sums_ATX[b, u] for a, b in pairs)
            by_hand /= (
                sum(units_AT[a, t] * units_AT[b, u] for a, b in pairs) * norm_T[t] * norm_T[u]
            )
            assert cosine_TT[t, u] == pytest.approx(
                by_hand if t != u else max(by_hand, 0), rel=1e-12
            )
    assert np.isnan(cosine_TT[2]).all() and np.isnan(cosine_TT[:, 2]).all()


def test_noise_that_two_tasks_share_by_their_posts_makes_them_no_friends():
    rng = np.random.default_rng(1)
    found, naive = [], []
    # The true gradients are opposite; the posts' noise is the same in both and much larger.
    own_X = np.eye(40)[0]
    for _ in range(400):
        products = Products(2)
        noise_AX = 3 * rng.standard_normal((16, 40))
        for noise_X in noise_AX:
            products.add([([torch.tensor(sign * own_X + noise_X)], 1.0) for sign in (1, -1)])
        found.append(products.cosines()[0][0, 1])
        one, other = own_X + noise_AX.mean(0), noise_AX.mean(0) - own_X
        naive.append(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
    # A mean over 16 parts has squared length 1 + 40 * 9 / 16, of which 1 is meant: a cosine of
    # about -1 / 23.5.
    assert -0.12 < np.mean(found) < -0.02 and np.mean(naive) > 0.85


@pytest.fixture(scope="module", params=["token", "task"])
def run(tmp_path_factory, request) -> Path:
    """A finished run of two tasks that are one and the same, and of one with other answers, on the same posts."""
    folder = tmp_path_factory.mktemp("affinity")
    twin = replace(MOOD, name="twin")
    export_tiny(folder, route_by=request.param, tasks=(MOOD, twin, TOPIC))
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(["good", "bad", "day", "home", "world"], 5)), "mood": MOOD.labels[row % 3],
             "topic": TOPIC.labels[row % 2] if row < 30 else None} for row in range(50)]  # fmt: skip
    for row in rows[:40]:
        # Mostly one answer, which the random model does not know: a gradient that all halves share.
        row["mood"] = MOOD.labels[0]
    write_jsonl(folder / "posts/train.jsonl", rows[20:])
    write_jsonl(folder / "posts/validation.jsonl", rows)
    weights = load_file(folder / "export/model.safetensors")
    for name in [name for name in weights if name.startswith("heads.0.")]:
        weights[name.replace("heads.0.", "heads.1.")] = weights[name].clone()
    if "task_embedding.weight" in weights:
        weights["task_embedding.weight"][1] = weights["task_embedding.weight"][0]
    save_file(weights, folder / "export/model.safetensors")
    (folder / "export/manifest.json").unlink()
    recipe = tiny_recipe(request.param, tasks=(MOOD, twin, TOPIC))
    columns = {"mood": (MOOD, "mood"), "twin": (twin, "mood"), "topic": (TOPIC, "topic")}
    recipe.tasks = {name: TaskConfig(path="posts", label=column, labels=list(task.labels))
                    for name, (task, column) in columns.items()}  # fmt: skip
    recipe.data.root, recipe.data.cache = str(folder), False
    save_recipe(recipe, folder / "config.yaml")
    return folder


def test_an_export_is_measured_on_its_own_held_out_posts_always_alike(run):
    found = measure_affinity(run, limit=40, batch_size=7, progress=False)
    assert found.tasks == ("mood", "twin", "topic")
    assert found.posts_T[0] == 40
    assert found.posts_T[2] == 30
    np.testing.assert_allclose(found.cosine_TT, found.cosine_TT.T)
    assert (np.abs(found.cosine_TT) <= 1).all() and (found.norm_T > 0).all()
    # On the same posts: a twin is as near as the task is to itself, no nearer.
    assert found.cosine_TT[0, 1] == pytest.approx(found.cosine_TT[0, 0], abs=1e-6)
    assert found.cosine_TT[0, 2] == pytest.approx(found.cosine_TT[1, 2], abs=1e-6)
    assert abs(found.cosine_TT[0, 2]) < found.cosine_TT[0, 0] < 0.9999
    again = measure_affinity(run, limit=40, batch_size=40, progress=False)
    np.testing.assert_allclose(again.cosine_TT, found.cosine_TT, atol=2e-4)
    (run / "affinity.json").write_text(json.dumps(found.to_dict()))
    read = read_affinity(run / "affinity.json")
    np.testing.assert_allclose(read.cosine_TT, found.cosine_TT, atol=1e-6)
    assert (read.tasks, read.posts_T, read.limit, read.weights) == (
        found.tasks,
        found.posts_T,
        40,
        found.weights,
    )


def test_an_export_that_was_changed_is_measured_only_where_nobody_compares_digests(run, tmp_path):
    changed = shutil.copytree(run, tmp_path / "run")
    write_manifest(changed / "export")
    config = changed / "export/config.json"
    config.write_text(config.read_text() + "\n")
    for measure in (measure_affinity, measure_removal):
        with pytest.raises(ValueError, match="config.json .*--no-verify"):
            measure(changed, limit=4, progress=False)
    assert measure_affinity(changed, limit=4, progress=False, verify=False).tasks
    assert measure_removal(changed, split="validation", limit=4, progress=False, verify=False)


def test_a_task_without_posts_has_no_cosine_and_its_file_can_be_read(tmp_path):
    cosine_TT, norm_T = np.array([[0.5, np.nan], [np.nan, np.nan]]), np.array([1.0, np.nan])
    found = Affinity(("a", "b"), cosine_TT, norm_T, (4, 1), 4, 9)
    (tmp_path / "affinity.json").write_text(json.dumps(found.to_dict()))
    read = read_affinity(tmp_path / "affinity.json")
    np.testing.assert_array_equal(read.cosine_TT, cosine_TT)
    np.testing.assert_array_equal(read.norm_T, norm_T)


def test_what_cannot_be_measured_is_said(tmp_path):
    with pytest.raises(ValueError, match="limit of posts per task is 1; it must be at least 2"):
        measure_affinity(tmp_path, limit=1)
    with pytest.raises(ValueError, match="no config.yaml"):
        measure_affinity(tmp_path)
