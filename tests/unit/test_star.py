"""Real sockets between the ends of a star, all in one process."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from comoe.train.star import LONGEST, Star, listen


@pytest.fixture
def middle() -> Iterator[tuple[Star, int]]:
    server = listen()
    star = Star(0, word="ours").serve(server)
    yield star, server.getsockname()[1]
    star.close()


def spoke(rank: int, port: int, *, word: str = "ours") -> Star:
    return Star(rank, word=word).connect("127.0.0.1", port, seconds=5)


def until(star: Star, enough: Callable[[list], bool], seconds: float = 5.0) -> list:
    """Everything that comes in until it is enough."""
    came, end = [], time.monotonic() + seconds
    while not enough(came):
        assert time.monotonic() < end, came
        came += star.receive(0.05)
    return came


def test_messages_go_to_the_middle_and_from_it_to_all(middle: tuple[Star, int]) -> None:
    star, port = middle
    ends = [spoke(rank, port) for rank in (1, 2)]
    for end in ends:
        end.send({"from": end.rank})
        end.send({"again": end.rank})
    came = until(star, lambda came: len(came) == 4)
    assert [message for rank, message in came if rank == 2] == [{"from": 2}, {"again": 2}]
    assert star.connected() == {1, 2}
    star.send({"to": "all"})
    assert [until(end, len) for end in ends] == [[(0, {"to": "all"})]] * 2


def test_a_connection_that_closes_is_told_after_the_last_words(middle: tuple[Star, int]) -> None:
    star, port = middle
    end = spoke(1, port)
    end.send({"last": "words"})
    end.close()
    assert until(star, lambda came: len(came) == 2) == [(1, {"last": "words"}), (1, None)]
    assert star.connected() == set()


def test_the_loss_of_the_middle_is_told_too(middle: tuple[Star, int]) -> None:
    star, port = middle
    end = spoke(3, port)
    until(star, lambda _: star.connected() == {3})
    star.close()
    assert until(end, len) == [(0, None)]


@pytest.mark.parametrize(
    "said", [b'{"rank": 1, "word": "theirs"}\n{"gone": 1}\n', b"GET / HTTP/1.1\r\n\r\n", b"5\n", b"x" * (3 * LONGEST)]
)
def test_a_stranger_is_hung_up_on_and_changes_nothing(middle: tuple[Star, int], said: bytes) -> None:
    star, port = middle
    friend = spoke(1, port)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(5)
        stranger.sendall(said)
        friend.send({"still": "here"})
        assert until(star, len) == [(1, {"still": "here"})]
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert star.receive(0.02) == []
            stranger.setblocking(False)
            try:
                if stranger.recv(1) == b"":
                    break
            except BlockingIOError:
                continue
            except ConnectionResetError:
                break
        else:
            pytest.fail("the stranger was not hung up on")
    assert star.connected() == {1}


def test_a_middle_that_never_comes_is_an_error_with_its_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(OSError, match=f"rank 1 cannot reach rank 0 at 127.0.0.1, port {port} .*must reach one another"):
        Star(1).connect("127.0.0.1", port, seconds=0.1)


def test_a_middle_that_comes_later_is_waited_for_until_told_to_stop() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = []

    def give_up() -> bool:
        asked.append(True)
        return len(asked) > 1

    with pytest.raises(OSError):
        Star(1).connect("127.0.0.1", port, seconds=60, give_up=give_up)
    assert len(asked) == 2


def test_nothing_blocks_the_middle_when_an_end_reads_nothing(middle: tuple[Star, int]) -> None:
    star, port = middle
    frozen = spoke(1, port)
    until(star, lambda _: star.connected() == {1})
    began = time.monotonic()
    for _ in range(2000):
        star.send({"beat": "x" * 5000})
    assert time.monotonic() - began < 20
    frozen.close()
