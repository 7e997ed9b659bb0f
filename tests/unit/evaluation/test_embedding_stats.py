"""Measures of embeddings: hand-computed values, labels of each kind, ranks, pictures."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from comoe.evaluation.embedding_stats import (
    EmbeddingStats,
    TaskEmbeddings,
    measure_embeddings,
    measure_retrieval,
)
from comoe.train.monitor.embedding_plots import (
    LAYOUTS,
    MOST_MAPPED,
    embedding_figure,
    map_figure,
    principal_plane,
)
from comoe.train.monitor.plots import COLORS
from comoe.types import ImageText, ModelOutput
from tests.helpers_model import HEAT, MOOD, SIGNS, TASKS, TOPIC, WORDS, random_batch


def unit(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def same(*labels: int) -> torch.Tensor:
    return (torch.tensor(labels)[:, None] == torch.tensor(labels)).double()


def test_the_measures_of_four_points_by_hand():
    found = measure_embeddings(unit(0, 90, 180, 180), same(0, 0, 1, 1))
    # Pairs: 0-90 and 90-180 (twice) are 2 apart, 0-180 (twice) 4, 180-180 is 0.
    assert found["alignment"] == pytest.approx((2 + 0) / 2)
    mean = (3 * math.exp(-4) + 2 * math.exp(-8) + 1) / 6
    assert found["uniformity"] == pytest.approx(math.log(mean))
    # 0 is nearest to its partner at 90; 90 has three neighbours at one distance, the first of them is its partner.
    assert found["retrieval_at_1"] == pytest.approx(1.0)
    assert found["retrieval_at_1/chance"] == pytest.approx(2 / 6)


def test_neighbours_of_other_labels_are_not_found_and_labels_of_one_post_align_with_nothing():
    found = measure_embeddings(unit(0, 10, 90, 100), same(0, 1, 0, 1))
    assert found["retrieval_at_1"] == 0
    alone = measure_embeddings(unit(0, 10), same(0, 1))
    assert "alignment" not in alone and alone["retrieval_at_1"] == 0


def test_retrieval_counts_both_directions():
    text = np.eye(3)
    # The first two pictures look like the first text, the third like its own.
    image = np.array([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    found = measure_retrieval(text, image, np.array([5, 6, 7]))
    assert found == pytest.approx(
        {"text_to_image_at_1": 1.0, "image_to_text_at_1": 2 / 3, "chance": 1 / 3}
    )
    # The second post says what the first one does, so the first text is as good as its own.
    found = measure_retrieval(text, image, np.array([5, 5, 7]))
    assert found == pytest.approx(
        {"text_to_image_at_1": 1.0, "image_to_text_at_1": 1.0, "chance": 5 / 9}
    )


def answer(batch, *, seed: int = 0, sides: ImageText | None = None) -> ModelOutput:
    generator = torch.Generator().manual_seed(seed)
    rows = len(batch.row_ids_B)
    made = {
        task.name: torch.nn.functional.normalize(torch.randn(rows, 4, generator=generator), dim=1)
        for task in TASKS
        if task.mode == "pooled"
    }
    return ModelOutput({}, made, {}, (), batch.row_ids_B, image_text=sides)


def test_two_ranks_measure_what_one_process_does():
    batch = random_batch(rows=8)
    output = answer(batch)
    everyone = np.ones((8, len(TASKS)), dtype=bool)
    whole = EmbeddingStats(TASKS, labelled_NT=everyone)
    whole.update(output, batch)
    expected = whole.summary(lambda own: [own])
    assert set(expected.tasks) == {MOOD.name, "topic", HEAT.name, SIGNS.name}
    assert WORDS.name not in expected.tasks

    shares = []
    for rows in (torch.tensor([5, 1, 7]), torch.tensor([0, 2, 3, 4, 6])):
        stats = EmbeddingStats(TASKS, labelled_NT=everyone)
        part = replace(
            output, embeddings={name: points[rows] for name, points in output.embeddings.items()}
        )
        stats.update(part, batch.take(rows))
        stats.summary(lambda own: [shares.append(own) or own])
    found = EmbeddingStats(TASKS, labelled_NT=everyone).summary(lambda own: shares)
    for name, view in expected.tasks.items():
        assert found.tasks[name].measures == pytest.approx(view.measures)
        np.testing.assert_array_equal(found.tasks[name].points, view.points)
        assert list(found.tasks[name].labels) == list(view.labels)


def test_filler_rows_posts_without_label_and_blank_pictures_are_left_out():
    batch = random_batch(rows=4)
    batch.labels["mood"][1] = -100
    sides = ImageText(
        torch.tensor([0, 2, -1]),
        torch.eye(3),
        torch.eye(3),
        None,
        (),
        lambda others, numbers: numbers,
    )
    stats = EmbeddingStats((MOOD,), labelled_NT=np.ones((4, 1), dtype=bool))
    stats.update(answer(batch, sides=sides), batch)
    filler = replace(random_batch(rows=1), row_ids_B=torch.tensor([-1]))
    stats.update(answer(filler), filler)
    found = stats.summary(lambda own: [own])
    assert len(found.tasks["mood"].labels) == 3
    assert found.retrieval == {"text_to_image_at_1": 1.0, "image_to_text_at_1": 1.0, "chance": 0.5}


def test_of_many_labelled_posts_every_nth_is_kept_and_of_few_all():
    labelled = np.zeros((9000, 2), dtype=bool)
    labelled[:4500, 0] = labelled[::1000, 1] = True
    stats = EmbeddingStats((MOOD, TOPIC), labelled_NT=labelled)
    batch = replace(random_batch(rows=6), row_ids_B=torch.tensor([0, 1, 2, 3, 6, 1000]))
    stats.update(answer(batch), batch)
    found = stats.summary(lambda own: [own]).tasks
    assert len(found["mood"].labels) == 3 and len(found["topic"].labels) == 2


def test_a_model_that_has_lost_its_numbers_is_still_measured_on_the_rest():
    batch = random_batch(rows=5)
    output = answer(batch)
    output.embeddings["mood"][2] = torch.nan
    stats = EmbeddingStats((MOOD,), labelled_NT=np.ones((5, 1), dtype=bool))
    stats.update(output, batch)
    view = stats.summary(lambda own: [own]).tasks["mood"]
    assert len(view.labels) == 4 and all(math.isfinite(value) for value in view.measures.values())
    embedding_figure(view.points, view.labels, title="x")


def test_the_plane_is_that_of_the_largest_variance():
    points = np.array([[3.0, 0, 0, 1], [-3, 0, 0, 1], [0, 2, 0, 1], [0, -2, 0, 1]])
    plane, kept = principal_plane(points)
    np.testing.assert_allclose(plane, [[3, 0], [-3, 0], [0, 2], [0, -2]], atol=1e-12)
    np.testing.assert_allclose(kept, [18 / 26, 8 / 26])


@pytest.mark.parametrize(
    "labels",
    [["a", "b"] * 6, [row / 2 for row in range(12)], [["a"], [], ["a", "b"]] * 4,
     [f"name {row}" for row in range(12)]],
)  # fmt: skip
def test_every_kind_of_label_is_drawn(labels):
    figure = embedding_figure(np.random.default_rng(0).normal(size=(12, 5)), labels, title="x")
    panel = figure.axes[0]
    drawn = sum(len(dots.get_offsets()) for dots in panel.collections)
    assert drawn == 12
    named = panel.get_legend()
    if isinstance(labels[0], float):
        assert named is None and len(figure.axes) == 2
    else:
        kinds = len({str(label) for label in labels})
        assert len(named.get_texts()) == min(kinds, len(COLORS))


def clusters(count=40, kinds=4, *, seed=0):
    """Points around the corners of a simplex in 6 dimensions, and the corner of each."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, kinds, count)
    points = np.eye(6)[labels] + 0.05 * generator.normal(size=(count, 6))
    return points / np.linalg.norm(points, axis=1, keepdims=True), [f"c{label}" for label in labels]


def test_t_sne_keeps_neighbors_together_and_is_the_same_again():
    points, labels = clusters(120, 6)
    places, axes = LAYOUTS["tsne"](points, 0)
    np.testing.assert_array_equal(places, LAYOUTS["tsne"](points, 0)[0])
    assert places.shape == (120, 2) and axes == ("", "")

    def purity(places):
        distances = ((places[:, None] - places) ** 2).sum(-1) + np.diag(
            np.full(len(places), np.inf)
        )
        return np.mean(np.array(labels)[distances.argmin(axis=1)] == np.array(labels))

    # Six corners lie in five dimensions: two axes lay some of them over one another.
    assert purity(places) > 0.95 > purity(LAYOUTS["pca"](points, 0)[0])


@pytest.mark.parametrize("how", list(LAYOUTS))
def test_the_map_has_all_tasks_in_one_space_and_each_by_its_labels(how):
    points, labels = clusters()
    tasks = {
        "mood": TaskEmbeddings({}, points[:25], labels[:25]),
        "heat": TaskEmbeddings({}, points[25:], list(np.arange(15.0))),
    }
    figure = map_figure(tasks, how=how, title="x")
    titled = [panel for panel in figure.axes if panel.get_title()]
    assert [panel.get_title() for panel in titled] == ["all tasks", "mood", "heat"]
    for panel in titled:
        assert sum(len(dots.get_offsets()) for dots in panel.collections) == 40
    whole, mood, _ = (
        [text.get_text() for text in panel.get_legend().get_texts()] if panel.get_legend() else []
        for panel in titled
    )
    assert sorted(whole) == ["heat", "mood"] and sorted(mood) == sorted(set(labels[:25]))
    alone = map_figure({"mood": tasks["mood"]}, how=how, title="x")
    assert [panel.get_title() for panel in alone.axes if panel.get_title()] == ["mood"]


def test_a_map_of_too_few_or_equal_or_many_posts():
    few = TaskEmbeddings({}, np.eye(2), ["a", "b"])
    assert map_figure({"mood": few}, how="tsne", title="x") is None
    alike = TaskEmbeddings({}, np.ones((8, 3)) / 3**0.5, ["a", "b"] * 4)
    assert map_figure({"mood": alike}, how="tsne", title="x") is not None
    many = TaskEmbeddings(
        {}, np.random.default_rng(0).normal(size=(2 * MOST_MAPPED, 3)), ["a"] * 2 * MOST_MAPPED
    )
    (panel,) = map_figure({"mood": many}, how="pca", title="x").axes
    assert sum(len(dots.get_offsets()) for dots in panel.collections) == MOST_MAPPED
