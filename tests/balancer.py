"""A TCP balancer that knows nothing of what passes: each connection goes to the next port. It can lose answers, and cut everybody off."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import threading
from typing import Self

_PATIENCE_S = 20.0
_BYTES = 1 << 16


class Balancer:
    """`with Balancer(port, …) as balancer`: listens on `balancer.port`. Where nobody listens, connections end.

    `drops`: which part of what the other side answers ends the connection instead of passing; `dropped` counts them. Between `cut` and
    `mend` nothing passes, connections stay, and what is sent meanwhile arrives late: as when a cable is pulled.
    """

    def __init__(self, *ports: int, drops: float = 0.0, seed: int = 0) -> None:
        self.drops = drops
        self.dropped = 0
        self._ports = itertools.cycle(ports)
        self._random = random.Random(seed)
        self._passes = threading.Event()
        self._passes.set()
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._listening)
        self._listening.close()
        self._threads[0].join(_PATIENCE_S)
        for each in list(self._open):
            _end(each)
        self.mend()
        for thread in self._threads:
            thread.join(_PATIENCE_S)

    def cut(self) -> None:
        self._passes.clear()

    def mend(self) -> None:
        self._passes.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                thread = threading.Thread(target=self._serve, args=(client, next(self._ports)), daemon=True)
                self._open.add(client)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket, port: int) -> None:
        with client:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), _PATIENCE_S) as server:
                server.settimeout(None)
                self._open.add(server)
                back = threading.Thread(target=self._pass, args=(server, client, True), daemon=True)
                back.start()
                self._pass(client, server, False)
                back.join()
                self._open.discard(server)
            self._open.discard(client)

    def _pass(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_BYTES):
                self._passes.wait()
                if answers and self._random.random() < self.drops:
                    self.dropped += 1
                    break
                sink.sendall(data)
        _end(source)
        _end(sink)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
