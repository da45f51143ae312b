"""The connections of a listener: who is let in, whose deadline has passed, who goes to make room.

A connection has a seat or it does not. Without one are those that were refused at the door, while they take their answer, and those
that were closed for others. A refusal that is not taken costs a descriptor for a while, so only a few linger; more are cut at once.

All connections are looked at once in `sweep_s`, a share in each tick: 10,000 take 8 ms, too long to let everybody else wait for it.
When nearly all seats are taken, a round also notes who is idle, longest first; who comes to a full house gets the seat of one of those.
"""

from __future__ import annotations

import ipaddress
import operator
from typing import Protocol

from penstock.errors import HubBusy
from penstock.server.parser import Limits

TICKS = 16
_LINGERING_MAX = 256
_NEARLY = 0.9
_NO_SEAT = ""


class Guest(Protocol):
    """What a connection is asked (http.py)."""

    def check(self, now: float) -> None: ...
    def idle_since(self) -> float | None: ...
    def close_if_idle(self) -> None: ...
    def abandon(self) -> None: ...


class Crowd:
    """`connections` are all that there are, each with the address that its seat counts for."""

    def __init__(self, limits: Limits) -> None:
        self.connections: dict[Guest, str] = {}
        self._limits = limits
        self._lingering_max = min(_LINGERING_MAX, max(1, limits.connections_max // 8))
        self._seats = 0
        self._seats_of: dict[str, int] = {}
        self._round: list[Guest] = []
        self._share = 1
        self._noted: list[tuple[float, Guest]] = []
        self._idle: list[tuple[float, Guest]] = []

    def enter(self, guest: Guest, host: str) -> HubBusy | None:
        """Take a connection in; or why it is refused. Raises ConnectionAbortedError when not even that is to be told."""
        limits = self._limits
        address = subscriber(host)
        seats_of = self._seats_of.get(address, 0)
        if limits.connections_per_address_max and seats_of >= limits.connections_per_address_max:
            reason = f"Your address holds {seats_of} connections, as many as it may. Close some, or use them for more requests."
        elif self._seats >= limits.connections_max and not self._make_room():
            reason = "The server holds as many connections as it may."
        else:
            self.connections[guest] = address
            self._seats += 1
            self._seats_of[address] = self._seats_of.get(address, 0) + 1
            return None
        if len(self.connections) - self._seats >= self._lingering_max:
            raise ConnectionAbortedError
        self.connections[guest] = _NO_SEAT
        return HubBusy(reason, retry_after_s=1)

    def leave(self, guest: Guest) -> None:
        self._give_back(guest)
        self.connections.pop(guest, None)

    def look(self, now: float) -> None:
        """One tick: check the deadlines of the next share."""
        if not self._round:
            self._idle, self._noted = sorted(self._noted, key=operator.itemgetter(0), reverse=True), []
            self._round = list(self.connections)
            self._share = len(self._round) // TICKS + 1
        part, self._round = self._round[: self._share], self._round[self._share :]
        nearly_full = self._seats >= _NEARLY * self._limits.connections_max
        for guest in part:
            guest.check(now)
            if nearly_full and (since := guest.idle_since()) is not None and since <= now - self._limits.sweep_s:
                self._noted.append((since, guest))

    def _make_room(self) -> bool:
        """Close the connection that has been idle longest, if it still is."""
        while self._idle:
            since, guest = self._idle.pop()
            if self.connections.get(guest, _NO_SEAT) != _NO_SEAT and guest.idle_since() == since:
                self._give_back(guest)
                guest.close_if_idle()
                return True
        return False

    def _give_back(self, guest: Guest) -> None:
        address = self.connections.get(guest, _NO_SEAT)
        if address == _NO_SEAT:
            return
        self.connections[guest] = _NO_SEAT
        self._seats -= 1
        left = self._seats_of[address] - 1
        if left:
            self._seats_of[address] = left
        else:
            del self._seats_of[address]


def subscriber(host: str) -> str:
    """Whose address this is: of IPv6 the first 64 bits, which one customer has to himself (RFC 6177); else all of it."""
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.partition("%")[0])
    return str(address.ipv4_mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
