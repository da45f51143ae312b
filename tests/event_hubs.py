"""An endpoint that speaks of Kafka what Azure Event Hubs speaks, and nothing else; behind it is a real broker.

What it speaks was read from what clients wrote down of Azure's answers (github.com/Azure/azure-event-hubs-for-kafka, issues 69 and 209;
github.com/oliveigah/klife, issue 13); where they differ, the least of it that has idempotent producers. Whoever asks for anything
else is cut off, and it is noted down. Settings of topics are not told here, and whether one may be made is for the broker to say.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PRODUCE: Final = 0
_API_VERSIONS: Final = 18
_UNSUPPORTED_VERSION: Final = 35
SPOKEN: Final = {
    PRODUCE: (3, 7),
    1: (4, 6),  # Fetch
    2: (0, 2),  # ListOffsets
    3: (0, 5),  # Metadata
    8: (0, 3),  # OffsetCommit
    9: (0, 3),  # OffsetFetch
    10: (0, 1),  # FindCoordinator
    11: (0, 2),  # JoinGroup
    12: (0, 1),  # Heartbeat
    13: (0, 1),  # LeaveGroup
    14: (0, 1),  # SyncGroup
    15: (0, 1),  # DescribeGroups
    16: (0, 1),  # ListGroups
    17: (0, 1),  # SaslHandshake
    _API_VERSIONS: (0, 1),
    19: (0, 2),  # CreateTopics
    20: (0, 2),  # DeleteTopics
    22: (0, 1),  # InitProducerId
    23: (0, 0),  # OffsetForLeaderEpoch
    36: (0, 1),  # SaslAuthenticate
    37: (0, 1),  # CreatePartitions
    42: (0, 0),  # DeleteGroups
}
"""API key: the least and the greatest version."""


class EventHubs:
    """`with EventHubs(port, certificate, broker_port) as hubs`. `asked`: what was asked for (key, version), `refused`: what it does not
    speak. What is put into `errors` is each answered to one Produce request, which does not get to the broker."""

    def __init__(self, port: int, certificate: Path, broker_port: int) -> None:
        self.asked: set[tuple[int, int]] = set()
        self.refused: list[tuple[int, int]] = []
        self.errors: deque[int] = deque()
        self._broker = ("127.0.0.1", broker_port)
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(certificate)
        self._listening = socket.create_server(("127.0.0.1", port))
        self._accepts = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> EventHubs:
        self._accepts.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._accepts.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._listening.accept()[:1], daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            self._tls.wrap_socket(plain, server_side=True) as client,
            socket.create_connection(self._broker) as broker,
        ):
            threading.Thread(target=_copy, args=(broker, client), daemon=True).start()
            for request in _requests(client):
                if (answer := self._answer(request)) is not None:
                    client.sendall(struct.pack(">i", len(answer)) + answer)
                elif self.refused:
                    return
                else:
                    broker.sendall(struct.pack(">i", len(request)) + request)

    def _answer(self, request: bytes) -> bytes | None:
        """Its own; None: the broker's."""
        key, version = struct.unpack_from(">hh", request)
        self.asked.add((key, version))
        least, most = SPOKEN.get(key, (0, -1))
        if key == _API_VERSIONS:
            table = b"".join([struct.pack(">hhh", key, *versions) for key, versions in SPOKEN.items()])
            error = 0 if version <= most else _UNSUPPORTED_VERSION
            throttled = struct.pack(">i", 0) if version == 1 else b""
            return request[4:8] + struct.pack(">hi", error, len(SPOKEN)) + table + throttled
        if not least <= version <= most:
            self.refused.append((key, version))
        elif key == PRODUCE and self.errors:
            return request[4:8] + _produced(request, self.errors.popleft())
        return None


def _requests(client: socket.socket) -> Iterator[bytes]:
    with client.makefile("rb") as stream:
        while len(size := stream.read(4)) == 4:
            yield stream.read(int.from_bytes(size))


def _copy(broker: socket.socket, client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := broker.recv(1 << 16):
            client.sendall(data)
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


def _produced(request: bytes, error: int) -> bytes:
    """The answer to Produce 5 to 7: this error for each partition of its one topic."""
    at = 8
    for _ in ("client", "transaction"):
        at += 2 + max(0, *struct.unpack_from(">h", request, at))
    (topics,) = struct.unpack_from(">i", request, at := at + 6)
    assert topics == 1
    name_end = at + 6 + struct.unpack_from(">h", request, at + 4)[0]
    (count,) = struct.unpack_from(">i", request, name_end)
    found, place = b"", name_end + 4
    for _ in range(count):
        partition, size = struct.unpack_from(">ii", request, place)
        place += 8 + size
        found += struct.pack(">ihqqq", partition, error, -1, -1, -1)
    return request[at : name_end + 4] + found + struct.pack(">i", 0)
