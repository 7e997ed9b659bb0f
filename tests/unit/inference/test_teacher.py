"""Teachers: what they say is what they predict, by the names of labels, and is computed once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_export import MOOD, SIGNS, TASKS, TOPIC, export_tiny
from helpers_model import HEAT

from comoe.config.recipe import DistillConfig
from comoe.data.posts import unlabelled_posts
from comoe.inference import teacher
from comoe.inference.predictor import Predictor
from comoe.inference.teacher import find_teachers, soft_labels_of

TEXTS = ["good day", "the sun is bad, bad", "sunny", "ann in paris!", "good day", "a b c d e"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for name, options in {
        "token": {}, "task": {"route_by": "task", "seed": 1}, "single": {"tasks": (TOPIC,), "seed": 2},
    }.items():  # fmt: skip
        export_tiny(folder / name, **options)
    return {name: str(folder / name / "export") for name in ("token", "task", "single")}


def posts():
    words = [text.split() for text in TEXTS]
    return unlabelled_posts(TEXTS, tasks=[task.name for task in TASKS], words=words)


def say(folders, *, tasks=TASKS, cache=None, some=None, **options):
    config = DistillConfig(teachers=list(folders), **options)
    return soft_labels_of(
        config,
        find_teachers(config, tasks),
        some or posts(),
        device=CPU,
        cache_dir=cache,
        progress=False,
    )


@pytest.mark.parametrize("name", ["token", "task"])
def test_a_teacher_says_what_it_predicts(exports, name):
    said = say([exports[name]])
    assert set(said) == {task.name for task in TASKS}
    found = Predictor.from_pretrained(exports[name], device="cpu")(
        TEXTS, tasks=["mood", "heat", "signs"]
    )
    for number, post in enumerate(found):
        for task in (MOOD, SIGNS):
            expected = list(post[task.name]["scores"].values())
            np.testing.assert_allclose(said[task.name].rows(number)[0], expected, atol=1e-5)
        assert said["heat"].rows(number)[0, 0] == pytest.approx(post["heat"]["value"], abs=1e-5)
        cut = Predictor.from_pretrained(exports[name], device="cpu")
        tags = cut([TEXTS[number]], words=[TEXTS[number].split()], tasks=["words"])[0]["words"]
        np.testing.assert_allclose(
            said["words"].rows(number).max(axis=1), tags["scores"], atol=1e-5
        )
        assert len(said["words"].rows(number)) == len(TEXTS[number].split())


def test_labels_are_matched_by_name_and_several_teachers_averaged(exports):
    turned = replace(MOOD, labels=MOOD.labels[::-1])
    both = say([exports["token"], exports["task"], exports["single"]], tasks=[turned, TOPIC])
    one, two = (say([exports[name]], tasks=[MOOD, TOPIC]) for name in ("token", "task"))
    three = say([exports["single"]], tasks=[TOPIC])
    mean = (one["mood"].values_RY + two["mood"].values_RY) / 2
    np.testing.assert_allclose(both["mood"].values_RY, mean[:, ::-1], atol=1e-6)
    parts = [one["topic"].values_RY, two["topic"].values_RY, three["topic"].values_RY]
    np.testing.assert_allclose(both["topic"].values_RY, np.mean(parts, axis=0), atol=1e-6)
    assert set(say([exports["single"]])) == {"topic"}


BAD = {
    "other labels": ([replace(MOOD, labels=("bad", "good", "meh"))], {}, "tasks.mood.labels"),
    "another kind": ([replace(HEAT, name="mood")], {}, "tasks.mood.kind"),
    "no task of the run": ([replace(MOOD, name="moods")], {}, "Is mood the task"),
    "a task that no teacher knows": (
        [MOOD, replace(TOPIC, name="x")], {"tasks": ["mood", "x"]}, "distill.tasks names x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_teacher_that_does_not_fit_is_refused(exports, what):
    tasks, options, told = BAD[what]
    with pytest.raises(ValueError, match=told):
        find_teachers(DistillConfig(teachers=[exports["token"]], **options), tasks)


def test_no_export_is_refused_under_its_option(tmp_path):
    with pytest.raises(ValueError, match="distill.teachers.*is not an export"):
        find_teachers(DistillConfig(teachers=[str(tmp_path)]), TASKS)


@pytest.fixture
def asked(monkeypatch):
    """Posts that a teacher was asked about, one list per call."""
    calls, ask = [], teacher.ask

    def counted(predictor, posts, *rest, **options):
        calls.append(list(posts.texts))
        return ask(predictor, posts, *rest, **options)

    monkeypatch.setattr(teacher, "ask", counted)
    return calls


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name].values_RY, other[name].values_RY)
        np.testing.assert_array_equal(one[name].offsets, other[name].offsets)


def test_a_second_run_computes_nothing_and_a_third_only_what_is_new(exports, asked, tmp_path):
    first = say([exports["token"]], cache=tmp_path)
    assert sorted(sum(asked, [])) == sorted(set(TEXTS))
    asked.clear()
    same(say([exports["token"]], cache=tmp_path), first)
    # The same posts in another order, for other tasks of the student.
    turned = say(
        [exports["token"]], cache=tmp_path, some=posts().take(np.arange(6)[::-1]), tasks=[MOOD]
    )
    np.testing.assert_array_equal(turned["mood"].values_RY, first["mood"].values_RY[::-1])
    assert asked == []
    more = unlabelled_posts(
        [*TEXTS, "rain"], tasks=[], words=[[*t.split()] for t in (*TEXTS, "rain")]
    )
    assert len(say([exports["token"]], cache=tmp_path, some=more)["mood"]) == 7
    assert asked == [["rain"]]
    asked.clear()
    say([exports["task"]], cache=tmp_path)
    assert asked, "another teacher has a cache of its own"


def test_an_interrupted_computation_goes_on_and_damaged_files_are_made_again(
    exports, asked, tmp_path, monkeypatch
):
    whole = say([exports["token"]])
    monkeypatch.setattr(teacher, "CHUNK", 2)
    counted, asked[:] = teacher.ask, []

    def interrupted(*rest, **options):
        if len(asked) == 1:
            raise KeyboardInterrupt
        return counted(*rest, **options)

    monkeypatch.setattr(teacher, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say([exports["token"]], cache=tmp_path)
    monkeypatch.setattr(teacher, "ask", counted)
    done, asked[:] = asked[0], []
    found = say([exports["token"]], cache=tmp_path)
    assert not set(sum(asked, [])) & set(done) and len(sum(asked, [])) == 3
    for name in whole:
        np.testing.assert_allclose(found[name].values_RY, whole[name].values_RY, atol=1e-6)
    files = sorted(tmp_path.rglob("*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:-40])
    with np.load(files[1]) as stored:
        values = stored["mood.values"].tobytes()
    with np.load(files[2]) as stored:
        left = len(stored["posts"])
    changed = bytearray(files[1].read_bytes())
    changed[changed.index(values) + 2] ^= 0xFF
    files[1].write_bytes(bytes(changed))
    asked.clear()
    again = say([exports["token"]], cache=tmp_path)
    assert len(asked) >= 1 and len(sum(asked, [])) == 5 - left
    for name in whole:
        np.testing.assert_allclose(again[name].values_RY, whole[name].values_RY, atol=1e-6)
    asked.clear()
    say([exports["token"]], cache=tmp_path)
    assert asked == []
