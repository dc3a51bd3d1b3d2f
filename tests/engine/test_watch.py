"""The watch over the ranks, its connections alone: tests/distributed/test_survival.py kills real ones."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from shapediff.engine import watch as watch_module
from shapediff.engine.watch import FAILS, LEAVES, _Watch

TOKEN = 12345


class Ranks:
    """Rank 0's watch and those of two others, with how each process would have ended."""

    def __init__(self) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        self.port = server.getsockname()[1]
        self.ends: list[int] = []
        self.watches = [_Watch(TOKEN, server=server, end=self.end)]
        self.connections = []
        for rank in (1, 2):
            connection = socket.create_connection(("127.0.0.1", self.port))
            connection.sendall(f"{TOKEN} rank {rank} (somewhere, process 1)\n".encode())
            self.watches.append(_Watch(TOKEN, end=self.end))
            self.watches[rank].add(connection, "rank 0 (127.0.0.1)")
            self.connections.append(connection)
        deadline = time.monotonic() + 10
        while len(self.watches[0]._peers) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self, status: int) -> None:
        self.ends.append(status)
        threading.Event().wait()  # no process comes back from this

    def kill(self, rank: int) -> None:
        """What the system does to the connection of a process that is killed."""
        self.connections[rank - 1].shutdown(socket.SHUT_RDWR)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Threads in place of processes: the end of one is noted."""
    monkeypatch.setattr(watch_module, "GRACE_SECONDS", 0.3)
    made = Ranks()
    yield made
    for watch in made.watches:
        watch.leave(LEAVES)


def test_a_killed_rank_is_named_to_all(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    expected = "rank 2 (somewhere, process 1) is gone: killed, or out of memory. The same command goes on from the last"
    with caplog.at_level(logging.ERROR):
        ranks.kill(2)
        assert (ranks.watches[0].message(within=5) or "").startswith(expected)
        # Rank 1 says nothing, as if it stood in a collective: its watch says it, and all three processes are ended.
        deadline = time.monotonic() + 20
        while len(ranks.ends) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert any(message.startswith(f"error: {expected}") for message in caplog.messages)
    assert ranks.ends == [1, 1, 1]


def test_a_rank_that_leaves_is_not_missed(ranks: Ranks) -> None:
    ranks.watches[1].leave(LEAVES)
    ranks.kill(1)
    assert ranks.watches[0].message(within=0.5) is None
    ranks.watches[2].leave(FAILS)
    assert "rank 2 (somewhere, process 1) ended with an error" in (ranks.watches[0].message(within=5) or "")


def test_strangers_are_not_ranks(ranks: Ranks) -> None:
    for hello in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", b"99 rank 1 (nowhere)\n", b""):
        with socket.create_connection(("127.0.0.1", ranks.port)) as stranger:
            stranger.sendall(hello)
    assert ranks.watches[0].message(within=0.5) is None
    ranks.kill(1)
    assert "rank 1" in (ranks.watches[0].message(within=5) or "")
