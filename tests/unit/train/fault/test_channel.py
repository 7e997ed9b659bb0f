"""Real sockets between the ends of a channel, all in one process."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator

import pytest

import comoe.train.fault.channel as module
from comoe.train.fault.channel import MAX_GREETING, MAX_LINE, STRANGERS, SideChannel, listen


@pytest.fixture
def middle() -> Iterator[tuple[SideChannel, int]]:
    server = listen()
    channel = SideChannel(0, word="ours").serve(server)
    yield channel, server.getsockname()[1]
    channel.close()


def spoke(rank: int, port: int, *, word: str = "ours") -> SideChannel:
    return SideChannel(rank, word=word).connect("127.0.0.1", port, seconds=5)


def until(channel: SideChannel, enough: Callable[[list], bool], seconds: float = 5.0) -> list:
    """Everything that comes in until it is enough."""
    came, end = [], time.monotonic() + seconds
    while not enough(came):
        assert time.monotonic() < end, came
        came += channel.receive(0.05)
    return came


def test_messages_go_to_the_middle_and_from_it_to_all(middle: tuple[SideChannel, int]) -> None:
    channel, port = middle
    ends = [spoke(rank, port) for rank in (1, 2)]
    for end in ends:
        end.send({"from": end.rank})
        end.send({"again": end.rank})
    came = until(channel, lambda came: len(came) == 4)
    assert [message for rank, message in came if rank == 2] == [{"from": 2}, {"again": 2}]
    assert channel.connected() == {1, 2}
    channel.send({"to": "all"})
    assert [until(end, len) for end in ends] == [[(0, {"to": "all"})]] * 2


def test_a_connection_that_closes_is_told_after_the_last_words(
    middle: tuple[SideChannel, int],
) -> None:
    channel, port = middle
    end = spoke(1, port)
    end.send({"last": "words"})
    end.close()
    assert until(channel, lambda came: len(came) == 2) == [(1, {"last": "words"}), (1, None)]
    assert channel.connected() == set()


def test_the_loss_of_the_middle_is_told_too(middle: tuple[SideChannel, int]) -> None:
    channel, port = middle
    end = spoke(3, port)
    until(channel, lambda _: channel.connected() == {3})
    channel.close()
    assert until(end, len) == [(0, None)]


@pytest.mark.parametrize(
    "said", [b'{"rank": 1, "word": "theirs"}\n{"gone": 1}\n', b"GET / HTTP/1.1\r\n\r\n", b"5\n", b"x" * (3 * MAX_LINE),
             b"[" * (MAX_LINE - 1) + b"\n", b'{"rank": Infinity, "word": "ours"}\n',
             b'{"rank": 2, "word": "our"}\n', b'{"rank": 2, "word": "oursoursours"}\n', b'{"rank": 2, "word": 5}\n',
             b'{"rank": 2, "word": null}\n', '{"rank": 2, "word": "o\u00fcrs"}\n'.encode(), b'{"rank": 2}\n',
             b'{"rank": 1, "word": "ours"}\n', b"x" * (MAX_GREETING + 1)]
)  # fmt: skip
def test_a_stranger_is_hung_up_on_and_changes_nothing(
    middle: tuple[SideChannel, int], said: bytes
) -> None:
    channel, port = middle
    friend = spoke(1, port)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(5)
        stranger.sendall(said)
        friend.send({"still": "here"})
        assert until(channel, len) == [(1, {"still": "here"})]
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert channel.receive(0.02) == []
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
    assert channel.connected() == {1}


def test_a_middle_that_never_comes_is_an_error_with_its_address() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(
        OSError,
        match=f"rank 1 cannot reach rank 0 at 127.0.0.1, port {port} .*must reach one another",
    ):
        SideChannel(1).connect("127.0.0.1", port, seconds=0.1)


def test_a_middle_that_comes_later_is_waited_for_until_told_to_stop() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = []

    def give_up() -> bool:
        asked.append(True)
        return len(asked) > 1

    with pytest.raises(OSError):
        SideChannel(1).connect("127.0.0.1", port, seconds=60, give_up=give_up)
    assert len(asked) == 2


def test_nothing_blocks_the_middle_when_an_end_reads_nothing(
    middle: tuple[SideChannel, int],
) -> None:
    channel, port = middle
    frozen = spoke(1, port)
    until(channel, lambda _: channel.connected() == {1})
    began = time.monotonic()
    for _ in range(2000):
        channel.send({"beat": "x" * 5000})
    assert time.monotonic() - began < 20
    assert until(channel, len) == [(1, None)] and channel.broken == {1: "it reads nothing any more"}
    frozen.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such option")
@pytest.mark.parametrize("patience", [5.0, 1800.0, 7200.0, 1e8])
def test_the_system_waits_for_an_answer_longer_than_the_patience_on_both_ends(
    patience: float,
) -> None:
    server = listen()
    channel = SideChannel(0, patience=patience).serve(server)
    end = SideChannel(1, patience=patience).connect("127.0.0.1", server.getsockname()[1], seconds=5)
    until(channel, lambda _: channel.connected() == {1})
    for line in [*channel._ranks, *end._ranks]:
        waits = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
        assert patience < waits <= patience + 60 or waits > 24 * 86400, (
            "more than that the system does not take"
        )
    channel.close()
    end.close()


class Unreachable(socket.socket):
    """The end of a connection to a machine that answers nothing any more."""

    number = errno.ETIMEDOUT

    def recv(self, size: int) -> bytes:
        raise OSError(self.number, "said by the system")


@pytest.mark.parametrize(
    "number, broken", [(errno.ETIMEDOUT, {1: "said by the system"}), (errno.EHOSTUNREACH, {1: "said by the system"}),
                       (errno.ECONNRESET, {})]
)  # fmt: skip
def test_a_connection_that_the_network_broke_is_told_apart_from_the_end_of_a_process(
    number: int, broken: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Unreachable, "number", number)
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    channel = SideChannel(0)
    with theirs:
        line = Unreachable(fileno=ours.detach())
        channel._selector.register(line, module.selectors.EVENT_READ)
        channel._unread[line], channel._ranks[line] = b"", 1
        theirs.send(b"anything")
        assert channel.receive(1.0) == [(1, None)] and channel.broken == broken
    channel.close()


class NoDescriptors(socket.socket):
    """A server that cannot take anybody."""

    def accept(self) -> tuple[socket.socket, object]:
        raise OSError(errno.EMFILE, "Too many open files")


def test_a_connection_that_cannot_be_taken_disturbs_nobody_who_is_there(
    middle: tuple[SideChannel, int],
) -> None:
    channel, port = middle
    friend = spoke(1, port)
    until(channel, lambda _: channel.connected() == {1})
    channel._selector.unregister(channel._server)
    channel.serve(NoDescriptors(fileno=channel._server.detach()))
    with socket.create_connection(("127.0.0.1", port)):
        friend.send({"still": "here"})
        assert until(channel, len) == [(1, {"still": "here"})]


def test_idle_connections_are_capped_and_keep_no_rank_out(
    middle: tuple[SideChannel, int],
) -> None:
    channel, port = middle
    strangers = []
    for number in range(3 * STRANGERS):
        strangers.append(socket.create_connection(("127.0.0.1", port)))
        channel.receive(0.01)
        if number == 2 * STRANGERS:
            friend = spoke(1, port)
    friend.send({"still": "here"})
    assert until(channel, len) == [(1, {"still": "here"})]
    assert len(channel._ranks) <= STRANGERS + 1 and channel.connected() == {1}
    for stranger in strangers:
        stranger.close()


def test_who_says_nothing_is_hung_up_on_in_time(
    middle: tuple[SideChannel, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, port = middle
    monkeypatch.setattr(module, "GREET_WITHIN", 0.2)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(0)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert channel.receive(0.05) == []
            try:
                assert stranger.recv(1) == b""
                return
            except BlockingIOError:
                stranger.send(b"{")
    pytest.fail("the stranger was not hung up on")


@pytest.mark.parametrize("others", [1, 2])
def test_the_port_is_closed_when_all_ranks_are_there(others: int) -> None:
    server = listen(one_machine=True)
    port = server.getsockname()[1]
    channel = SideChannel(0, word="ours").serve(server, others=others)
    ends = []
    for rank in range(1, others + 1):
        ends.append(spoke(rank, port))
        until(channel, lambda _, wanted=rank: len(channel.connected()) == wanted)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    channel.send({"to": "all"})
    assert [until(end, len) for end in ends] == [[(0, {"to": "all"})]] * others
    for each in (channel, *ends):
        each.close()


def test_on_one_machine_only_its_loopback_is_listened_at() -> None:
    with listen(one_machine=True) as server:
        assert server.getsockname()[0] == "127.0.0.1"
