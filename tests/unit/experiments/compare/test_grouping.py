"""Groups of tasks: every partition once, the planted one found, and its test as a command that runs."""

import json
import math
import shlex

import numpy as np
import pytest

from comoe.commands.compare import parser
from comoe.config.files import read_json
from comoe.config.load import load_recipe
from comoe.experiments.affinity import Affinity
from comoe.experiments.compare.command import run_comparison
from comoe.experiments.compare.grouping import groupings, propose, typed, worth
from comoe.experiments.compare.own_arms import group_arms
from comoe.experiments.compare.plan import plan_arms
from comoe.experiments.compare.report import AFFINITY_FILE
from comoe.experiments.compare.statistics import Difference
from comoe.experiments.compare.transfer import Cosines
from tests.helpers_compare import TASKS, arguments, write_run


def test_groupings_are_all_partitions_each_once():
    bell = {1: 1, 2: 2, 3: 5, 4: 15, 5: 52, 8: 4140}
    for tasks, count in bell.items():
        found = list(groupings(tasks))
        as_sets = {frozenset(frozenset(np.flatnonzero(np.array(ids) == group).tolist())
                             for group in set(ids)) for ids in found}  # fmt: skip
        assert len(found) == len(as_sets) == count


def change(mean: float) -> Difference:
    return Difference(mean, -1, 1, 0.5, 2, 0.1, 0.1)


def cosines_of(tasks: str, pairs: dict[str, float]) -> Cosines:
    found_TT = np.eye(len(tasks))
    for one, other in np.ndindex(found_TT.shape):
        if one != other:
            pair = "".join(sorted(tasks[one] + tasks[other]))
            found_TT[one, other] = pairs.get(pair, math.nan)
    return Cosines(tuple(tasks), found_TT, found_TT, 2, 64)


def test_the_planted_groups_are_proposed_and_random_ones_have_their_sizes():
    pairs = {one + other: 0.2 if (one in "ac") == (other in "ac") else -0.1
             for number, one in enumerate("abcde") for other in "abcde"[number + 1 :]}  # fmt: skip
    found = propose("abcde", cosines_of("abcde", pairs), {})
    assert found.groups == (("a", "c"), ("b", "d", "e")) and found.sources == ("gradient cosines",)
    size = math.sqrt((4 * 0.04 + 6 * 0.01) / 10)
    assert found.worth == pytest.approx(4 * 0.2 / size)
    assert found.together == pytest.approx((4 * 0.2 - 6 * 0.1) / size)
    assert found.second[1] < found.worth and found.second[0] != found.groups
    assert len(set(found.random)) == 3
    for groups in found.random:
        assert groups != found.groups and sorted(map(len, groups)) == [2, 3]
        assert sorted(task for group in groups for task in group) == list("abcde")


def test_what_tasks_lose_without_one_another_counts_beside_the_cosines():
    # By cosines all go together; b is better without c and c without b, twice as strongly as others are worse.
    cosines = cosines_of("abc", {"ab": 0.1, "ac": 0.1, "bc": 0.1})
    changes = {"a": {"b": change(-0.01), "c": change(-0.01)}, "b": {"c": change(0.04)},
               "c": {"b": change(0.02), "a": change(-0.01)}}  # fmt: skip
    found = propose("abc", cosines, changes)
    size = math.sqrt((0.01**2 + 0.01**2 + 0.03**2) / 3)
    expected = {
        (0, 1): (1 + 0.01 / size) / 2,
        (0, 2): (1 + 0.01 / size) / 2,
        (1, 2): (1 - 0.03 / size) / 2,
    }
    for place, value in expected.items():
        assert found.evidence_TT[place] == pytest.approx(value)
    assert found.sources == ("gradient cosines", "tasks left out")
    best = max(groupings(3), key=lambda ids: worth(ids, found.evidence_TT))
    assert found.worth == worth(best, found.evidence_TT)
    assert propose("ab", cosines, changes) is None and propose("abc", None, {}) is None
    alone = propose("abc", cosines_of("abc", {"ab": -0.1, "ac": -0.1, "bc": -0.1}), {})
    assert alone.groups == (("a",), ("b",), ("c",)) and alone.random == ()


def test_a_report_proposes_groups_and_its_command_trains_them(experiment, capsys):
    hits = {"mood": 40, "topic": 50, "stance": 30, "hint": 20}
    write_run(experiment.runs / "recipe-s0", hits)
    cosine_TT = np.array([[1, 0.3, -0.2], [0.3, 1, -0.2], [-0.2, -0.2, 1]])
    measured = Affinity(TASKS, cosine_TT, np.ones(3), (60,) * 3, 8, 100)
    (experiment.runs / "recipe-s0" / AFFINITY_FILE).write_text(json.dumps(measured.to_dict()))
    given = arguments(experiment, arms="multi", propose_groups=True, config=str(experiment.config))
    assert run_comparison(given) == []
    groups = read_json(experiment.output / "comparison.json")["groups"]
    assert groups["groups"] == [["mood", "topic"], ["stance"]] and len(groups["random"]) == 2
    table = (experiment.output / "table.md").read_text()
    assert "| proposed | mood+topic/stance |" in table
    (command,) = [line for line in table.splitlines() if line.startswith("comoe compare")]
    read = parser().parse_intermixed_args(shlex.split(command)[2:])
    assert set(read.seeds.split(",")).isdisjoint(given.seeds.split(","))
    assert read.output != given.output
    arms = group_arms(read.groups, load_recipe(experiment.config))
    with pytest.raises(ValueError, match="given twice"):
        group_arms([*read.groups, read.groups[0]], load_recipe(experiment.config))
    assert list(arms) == ["proposed", "random1", "random2"]
    plan = plan_arms(experiment, arms=["multi", *arms], custom={}, seeds=[0], own=arms)
    assert [trial.name for trial in plan.arm("proposed", flag="").trials] == [
        "group.mood+topic-s0", "single.stance-s0",
    ]  # fmt: skip
    joint = plan.arm("proposed", flag="").trials[0]
    recipe = load_recipe(experiment.config, joint.overrides)
    assert list(recipe.tasks) == ["mood", "topic"]
    # Their runs are read as one arm.
    write_run(experiment.runs / "group.mood+topic-s0", {"mood": 42, "topic": 50})
    write_run(experiment.runs / "single.stance-s0", {"stance": 33})
    words = [f"--groups={typed(groups['groups'])}"]
    given = arguments(experiment, arms="multi", groups=[f"mine:{words[0][9:]}"], affinity_posts=0)
    assert run_comparison(given) == []
    gains = read_json(experiment.output / "comparison.json")["arms"]["multi"]["against_baseline"]
    assert gains == {}
    of_mine = read_json(experiment.output / "comparison.json")["arms"]["mine"]["against_baseline"]
    assert of_mine["stance"]["mean"] == pytest.approx(3 / 60)
    assert of_mine["mean"]["mean"] == pytest.approx((2 + 0 + 3) / 180)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"groups": ["a"]}, "must read name:task"),
        ({"groups": ["a:mood+topic"]}, "stance is in 0 groups"),
        ({"groups": ["a:mood+topic/stance+mood"]}, "mood is in 2 groups"),
        ({"groups": ["a:mood+topic/stance/hint"]}, "no task of hint is measured"),
        ({"groups": ["a:mood+topik/stance"]}, "topic"),
        ({"groups": ["multi:mood/topic/stance"]}, "choose an unused name"),
        ({"groups": ["a:mood/topic/stance"], "arm": ["a:train.seed=1"]}, "have one name"),
        ({"propose_groups": True, "arms": "single"}, "add multi to --arms"),
        ({"propose_groups": True, "arms": "multi", "affinity_posts": 0}, "leave_one_out"),
    ],
)
def test_groups_that_cannot_be_are_refused(experiment, changed, named):
    with pytest.raises(ValueError, match="--groups|--propose-groups|task|name") as raised:
        run_comparison(arguments(experiment, **changed))
    assert named in str(raised.value) and not experiment.output.exists()
