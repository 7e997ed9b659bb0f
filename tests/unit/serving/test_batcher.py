"""The queue: what shares a pass, in which order, how much waits, and what a failure reaches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait

import pytest

from comoe.serving.batcher import Batcher, Closed, QueueFull, Work
from comoe.serving.limits import Limits

SECRET = "my private words"


class Model:
    """Answers with the posts themselves; stands still while the gate is shut."""

    def __init__(self) -> None:
        self.gate, self.begun = threading.Event(), threading.Event()
        self.passes: list[tuple[str, list[str]]] = []

    def __call__(self, key: str, posts: list[str]) -> list[str]:
        self.begun.set()
        assert self.gate.wait(30)
        self.passes.append((key, posts))
        if "bad" in posts:
            raise ZeroDivisionError
        return [post.upper() for post in posts]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def batcher(model: Model) -> Iterator[Batcher]:
    limits = Limits(queue=8, max_posts=8, batch_tokens=10, batch_wait=0)
    made = Batcher(model, limits=limits)
    yield made
    model.gate.set()
    made.close()


def ask(batcher: Batcher, *posts: str, key: str = "k", tokens: int = 8) -> Future:
    return batcher.submit(key, posts, [tokens] * len(posts))


def occupy(batcher: Batcher, model: Model) -> Future:
    """A pass that runs until the gate opens."""
    first = ask(batcher, "first")
    assert model.begun.wait(30)
    return first


def test_requests_are_done_together_up_to_four_passes_of_tokens(
    batcher: Batcher, model: Model
) -> None:
    occupy(batcher, model)
    jobs = [ask(batcher, "a", "b"), ask(batcher, "c"), ask(batcher, "d", "e", "f", "g")]
    model.gate.set()
    assert [job.result(30) for job in jobs] == [["A", "B"], ["C"], ["D", "E", "F", "G"]]
    assert model.passes[1:] == [("k", ["a", "b", "c", "d", "e"]), ("k", ["f", "g"])]


def test_a_pass_has_one_key_and_begins_with_the_oldest(batcher: Batcher, model: Model) -> None:
    occupy(batcher, model)
    jobs = [ask(batcher, "a"), ask(batcher, "x", key="other"), ask(batcher, "b")]
    model.gate.set()
    wait(jobs, 30)
    assert model.passes[1:] == [("k", ["a", "b"]), ("other", ["x"])]


def test_a_post_longer_than_a_pass_goes_alone(batcher: Batcher, model: Model) -> None:
    occupy(batcher, model)
    jobs = [ask(batcher, "long", tokens=99), ask(batcher, "a")]
    model.gate.set()
    wait(jobs, 30)
    assert [posts for _, posts in model.passes[1:]] == [["long"], ["a"]]


def test_a_full_queue_refuses_and_says_for_how_long(batcher: Batcher, model: Model) -> None:
    occupy(batcher, model)
    job = ask(batcher, *"abcdef")
    with pytest.raises(QueueFull) as refused:
        ask(batcher, *"xyz")
    assert 1 <= refused.value.seconds <= 60 and batcher.waiting() == 6
    fitting = ask(batcher, *"xy")
    model.gate.set()
    assert job.result(30) == list("ABCDEF") and fitting.result(30) == ["X", "Y"]


def test_what_is_given_up_leaves_the_queue(batcher: Batcher, model: Model) -> None:
    first = occupy(batcher, model)
    given_up, kept = ask(batcher, *"abc"), ask(batcher, "d")
    assert given_up.cancel() and batcher.waiting() == 1
    assert first.cancel()  # too late for its pass, whose result nobody gets
    model.gate.set()
    assert kept.result(30) == ["D"]
    assert [posts for _, posts in model.passes] == [["first"], ["d"]]


def test_a_failure_reaches_the_request_that_made_it_alone(batcher: Batcher, model: Model) -> None:
    occupy(batcher, model)
    good, bad, also = (
        ask(batcher, "a"),
        ask(batcher, "bad", *"uvwxy", tokens=12),
        ask(batcher, "b"),
    )
    model.gate.set()
    assert good.result(30) == ["A"] and also.result(30) == ["B"]
    assert isinstance(bad.exception(30), ZeroDivisionError)
    assert batcher.waiting() == 0 and batcher.alive()
    assert ask(batcher, "c").result(30) == ["C"]


def test_a_fault_beside_the_model_is_logged_and_the_queue_goes_on(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(work: Work) -> None:
        raise ZeroDivisionError(SECRET)

    model.gate.set()
    batcher = Batcher(model, limits=Limits(batch_wait=0), done=fail)
    with caplog.at_level(logging.ERROR):
        assert [ask(batcher, post).result(30) for post in "ab"] == [["A"], ["B"]]
        batcher.close()
    assert caplog.text.count("ZeroDivisionError in the queue") == 2 and "in fail" in caplog.text
    assert SECRET not in caplog.text


def test_results_of_another_number_fail_their_request_alone(model: Model) -> None:
    model.gate.set()
    batcher = Batcher(lambda key, posts: model(key, posts)[:2], limits=Limits(batch_wait=0))
    assert isinstance(ask(batcher, *"abc").exception(30), ValueError)
    assert ask(batcher, "d").result(30) == ["D"]
    batcher.close()


def test_what_was_given_up_may_fail(batcher: Batcher, model: Model) -> None:
    occupy(batcher, model)
    job = ask(batcher, "bad", "bad")
    batch = list(batcher._waiting)
    assert job.cancel()
    model.gate.set()
    for item in batch:  # each in a pass of its own
        batcher._run([item])
    assert job.cancelled() and batcher.alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_queue_whose_thread_has_ended_takes_no_more() -> None:
    def end(key: str, posts: list[str]) -> list[str]:
        raise SystemExit

    batcher = Batcher(end, limits=Limits(batch_wait=0))
    ask(batcher, "a")
    batcher._thread.join(30)
    assert not batcher.alive()
    with pytest.raises(Closed):
        ask(batcher, "b")


def test_closing_finishes_what_waits_and_takes_no_more(model: Model) -> None:
    done: list[Work] = []
    batcher = Batcher(model, limits=Limits(batch_wait=10_000), done=done.append)
    jobs = [ask(batcher, "a"), ask(batcher, "b")]
    model.gate.set()
    batcher.close()
    assert [job.result(0) for job in jobs] == [["A"], ["B"]]
    assert not batcher.alive() and [(one.posts, one.tokens) for one in done] == [(2, 16)]
    with pytest.raises(Closed):
        ask(batcher, "c")


def test_a_post_waits_for_company_but_no_longer_than_the_pass_is_full(model: Model) -> None:
    model.gate.set()
    batcher = Batcher(model, limits=Limits(batch_wait=60_000, batch_tokens=6, timeout=90))
    jobs = [ask(batcher, post, tokens=2) for post in "abc"]
    assert [job.result(30) for job in jobs] == [["A"], ["B"], ["C"]]
    assert [posts for _, posts in model.passes] == [["a", "b", "c"]]
    batcher.close()


@pytest.mark.parametrize(
    "bounds, message",
    [
        ({"queue": 10}, r"--queue \(10\) must be at least --max-posts \(256\)"),
        ({"timeout": 0.0}, "--timeout is 0.0; it must be a positive number"),
        ({"batch_tokens": -1}, "--batch-tokens is -1"),
        ({"batch_wait": float("nan")}, "--batch-wait is nan"),
        ({"timeout": 1e300}, r"--timeout is 1e\+300; it must be at most 86400 seconds"),
        ({"batch_wait": 2000.0, "timeout": 2.0}, r"\(2000 ms\) must be below --timeout \(2 s\)"),
    ],
)
def test_bounds_that_bound_nothing_are_refused(bounds: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**bounds)
