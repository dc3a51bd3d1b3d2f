"""Noticing a lost rank: the others wait for it in a collective, and by themselves would wait for many minutes.

Every rank keeps a connection to rank 0. The system closes it when a process ends, however it ends, and probes find a machine
that is gone. Rank 0 tells the others, and each of them ends.
"""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from shapediff.engine import distributed
from shapediff.errors import TrainingError

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
"""How long a rank has to end by itself when another one is gone; launchers give 30 s before they kill."""

CONNECT_SECONDS, HELLO_SECONDS, MAX_HELLO = 60.0, 5.0, 1000
PROBE_AFTER, PROBE_EVERY, NUM_PROBES = 10, 5, 4  # a machine that lost its power is gone after half a minute
LEAVES, FAILS, LOST = "leaves", "fails", "lost "


@contextmanager
def watched_ranks(device: torch.device) -> Iterator[None]:
    """Within, this process ends when a rank is lost; every rank must enter it, after `distributed.start`.

    Raises TrainingError, which names the lost rank, in place of the RuntimeError of a collective that misses it. A process
    that stands in a collective and sees no error is ended after GRACE_SECONDS, with the same message.
    """
    if distributed.world_size() == 1:
        yield
        return
    watch = _start(device)
    word = FAILS
    try:
        yield
        word = LEAVES
    except RuntimeError as error:
        message = watch.message(within=GRACE_SECONDS / 2)
        if message is None:
            raise
        raise TrainingError(message) from error
    finally:
        watch.leave(word)


def _start(device: torch.device) -> _Watch:
    """Open a port of rank 0, tell it to every rank, connect. Raises TrainingError on all where one cannot reach rank 0."""
    server = _server() if distributed.is_main() else None
    # The token keeps out whoever else may connect to an open port.
    facts = (server.getsockname()[1], secrets.randbits(62)) if server else (0, 0)
    port, token = distributed.sum_over_ranks(torch.tensor(facts, device=device)).tolist()
    watch, failure = _Watch(token, server=server), "another rank cannot reach rank 0, see its own output"
    is_reached = True
    if not server:
        host = os.environ["MASTER_ADDR"]
        try:
            connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            me = f"rank {distributed.rank()} ({socket.gethostname()}, process {os.getpid()})"
            connection.sendall(f"{token} {me}\n".encode())
            watch.add(connection, f"rank 0 ({host})")
        except OSError as error:
            is_reached = False
            failure = (
                f"rank 0 cannot be reached at {host}:{port} ({error}), where the ranks tell each other when one is lost; "
                "let the machines of a run connect to any port of each other"
            )
    if distributed.sum_over_ranks(torch.tensor(float(not is_reached), device=device)) > 0:
        watch.leave(FAILS)
        raise TrainingError(failure)
    return watch


def _server() -> socket.socket:
    backlog = distributed.world_size()
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


@dataclass
class _Peer:
    name: str
    heard: str = ""


class _Watch:
    """This rank's part: rank 0 has every other as a peer, the others have rank 0."""

    def __init__(
        self, token: int, *, server: socket.socket | None = None, end: Callable[[int], object] = os._exit
    ) -> None:
        self._token = token
        self._end_process = end
        self._server = server
        self._peers: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._message: str | None = None
        self._is_said = False
        self._knows, self._has_left = threading.Event(), threading.Event()
        if server:
            self._listen_to(server)

    def add(self, connection: socket.socket, name: str) -> None:
        """Take up a peer."""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            probes = (
                (socket.TCP_KEEPIDLE, PROBE_AFTER),
                (socket.TCP_KEEPINTVL, PROBE_EVERY),
                (socket.TCP_KEEPCNT, NUM_PROBES),
            )
            for option, value in probes:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._peers[connection] = _Peer(name)
        self._listen_to(connection)

    def message(self, *, within: float) -> str | None:
        """What there is to say of a lost rank, which the caller then says; None where none is found `within` seconds."""
        self._knows.wait(within)
        self._is_said = self._message is not None
        return self._message

    def leave(self, word: str) -> None:
        """Tell the peers that this rank ends, and how."""
        self._has_left.set()
        self._tell(word)

    def _listen_to(self, connection: socket.socket) -> None:
        first = not self._selector.get_map()
        self._selector.register(connection, selectors.EVENT_READ)
        if first:
            threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def _listen(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._hear(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        assert self._server is not None
        connection, _ = self._server.accept()
        connection.settimeout(HELLO_SECONDS)
        hello = b""
        # A byte at a time: what follows the line is for `_hear`.
        with suppress(OSError):
            while not hello.endswith(b"\n") and len(hello) < MAX_HELLO and (byte := connection.recv(1)):
                hello += byte
        token, _, name = hello.decode(errors="replace").strip().partition(" ")
        if token == str(self._token):
            self.add(connection, name)
        else:
            connection.close()

    def _hear(self, connection: socket.socket) -> None:
        peer = self._peers[connection]
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        peer.heard += data.decode(errors="replace")
        if data and not peer.heard.endswith("\n"):
            return
        self._selector.unregister(connection)
        del self._peers[connection]
        word = peer.heard.strip()
        if word == LEAVES or self._has_left.is_set():
            return
        if word.startswith(LOST):
            message = word.removeprefix(LOST)
        else:
            how = "ended with an error, see its own output" if word == FAILS else "is gone: killed, or out of memory"
            message = f"{peer.name} {how}. The same command goes on from the last saved state"
        self._end(message)

    def _end(self, message: str) -> None:
        """Let this process end by itself, or end it."""
        self._message = message
        self._knows.set()
        self._tell(LOST + message)
        self._has_left.wait(GRACE_SECONDS)
        if not self._is_said and not self._has_left.is_set():
            log.error("error: %s", message)
        else:  # leaving the process group can hang as well
            time.sleep(GRACE_SECONDS)
        self._end_process(1)

    def _tell(self, word: str) -> None:
        for connection in list(self._peers):
            with suppress(OSError):
                connection.sendall(f"{word}\n".encode())
