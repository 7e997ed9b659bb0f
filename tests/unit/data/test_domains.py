"""What the adversary is to tell of posts: the values of the training split, and the rows of a batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_data import wordpiece_tokenizer

from comoe.config.recipe import AdversarialConfig, DataConfig
from comoe.data.collator import Collator
from comoe.data.columns import find_domains
from comoe.data.posts import Post, PostSplit
from comoe.data.tokens.split import tokenize_split
from comoe.tasks.task import Task
from comoe.types import IGNORED

MOOD = Task("mood", "single_label", ("bad", "good"), "macro_f1", confidence_strategy="output")
STARS = Task("stars", "regression", (), "pearson")
TASKS = (MOOD, STARS)


def posts(platforms, **changes):
    made = [
        Post(
            "one",
            labels={"mood": 0, "stars": 1.5 if number % 2 else None},
            confidences={"mood": 0.5 if number % 2 else None},
            columns={"platform": platform},
        )
        for number, platform in enumerate(platforms)
    ]
    split = PostSplit.from_posts(
        made, tasks=["mood", "stars"], confidences=["mood"], columns=["platform"]
    )
    groups = np.arange(len(made)) % 2
    return replace(split, groups=groups, group_names=("tweets", "reviews"), **changes)


def found(platforms, *, train=None, **options):
    config = AdversarialConfig(weight=1.0, **({"predict": "platform"} | options))
    return find_domains(train or posts(platforms), config)


def collate(split, domains, indices, **options):
    tokenizer = wordpiece_tokenizer(["one"])
    tokenized = tokenize_split(split, tokenizer, tasks=TASKS, config=DataConfig())
    return Collator(tokenizer, TASKS, domains=domains, **options)(
        tokenized, np.array(indices, dtype=np.int64)
    )


def test_the_values_of_a_column_are_numbered_from_the_commonest():
    domains = found(["b", "a ", "b", None, " ", "c", "b"])
    assert domains.names == ("b", "a", "c") and domains.missing == 2
    assert domains.shares == (0.6, 0.2, 0.2) and domains.weights == (1.0, 1.0, 1.0)
    assert domains.line() == (
        "loss.adversarial predicts platform: b 60%, a 20%, c 20%; 2 training posts have none and are left out"
    )


def test_balanced_values_weigh_alike_in_all():
    domains = found(["b", "a", "b", "b"], balanced=True)
    assert domains.weights == pytest.approx((4 / 6, 2.0))
    batch = collate(posts(["b", "a", "b", "b"]), domains, [0, 1, 2, 3])
    torch.testing.assert_close(batch.domain_weights_B, torch.tensor([4 / 6, 2.0, 4 / 6, 4 / 6]))


def test_task_means_the_data_set_of_a_post_however_many_tasks_share_it():
    domains = found(["x"] * 3, predict="task")
    assert domains.names == ("tweets", "reviews")
    assert collate(posts(["x"] * 3), domains, [2, 1]).domains_B.tolist() == [0, 1]


def test_missing_and_unseen_values_are_left_out_and_a_filler_row_is_too():
    domains = found(["b", "a", "b"])
    batch = collate(posts(["z", "a", None]), domains, [0, 1, 2])
    assert batch.domains_B.tolist() == [IGNORED, 1, IGNORED]
    assert batch.domain_weights_B.tolist() == [0, 1, 0]
    filler = collate(posts(["a"]), domains, [])
    assert filler.domains_B.tolist() == [IGNORED] and filler.domain_weights_B.tolist() == [0]
    assert filler.confidences["mood"].tolist() == [1.0]


def test_a_post_with_a_row_per_task_counts_once():
    domains = found(["b", "a"])
    batch = collate(posts(["b", "a"]), domains, [0, 1, 1], row_per_task=True)
    assert batch.row_ids_B.tolist() == [0, 1, 1, 1, 1]
    assert batch.domains_B.tolist() == [1, 0, 0, 0, 0]
    # Drawn twice it counts twice, as it does with one row per post.
    assert batch.domain_weights_B.tolist() == [1.0, 0.5, 0.5, 0.5, 0.5]


def test_a_batch_brings_the_confidences_of_the_tasks_that_read_them():
    batch = collate(posts(["b", "a", "b"]), None, [1, 0])
    assert batch.domains_B is None and list(batch.confidences) == ["mood"]
    assert batch.confidences["mood"].tolist() == [0.5, 1.0]
    assert batch.confidences["mood"].dtype == torch.float32
    assert collate(posts(["b"], confidences={}), None, [0]).confidences == {}


@pytest.mark.parametrize(
    ("platforms", "options", "message"),
    [(["a", "a"], {}, "'platform', but .*two values.* have only a. Name another column"),
     ([None, " "], {}, "have none. Name another"),
     (["a"], {"predict": "task"}, "only tweets; all tasks share one data set"),
     (["a"], {"predict": "elsewhere"}, "'elsewhere'.* have none"),
     ([*map(str, range(101))], {}, "have 101 different values; a column of up to 100 is meant")],
)  # fmt: skip
def test_fewer_than_two_values_and_too_many_are_refused(platforms, options, message):
    with pytest.raises(ValueError, match=f"loss.adversarial.predict is .*{message}"):
        found(platforms, **options)
    assert find_domains(posts(platforms), AdversarialConfig()) is None
