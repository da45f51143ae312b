"""Log lines: a fixed sentence plus fields, one for each change of state.

People on a terminal read `time level part sentence key=value`; anything else gets one JSON object a line. A line is
one write, so that lines of several processes on one stream do not mix.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TextIO

import msgspec

from penstock.clock import Clock, timestamp

Fields = Mapping[str, Any]
_LEVELS: Final = ("debug", "info", "warning", "error")


class Log(Protocol):
    """What the parts are handed. Thread-safe."""

    def bind(self, **fields: Any) -> Log:
        """The same log, with fields that stand in every line."""
        ...

    # `exc_info` is an exception whose traceback is told.
    def debug(self, event: str, **fields: Any) -> Any: ...
    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...
    def exception(self, event: str, **fields: Any) -> Any:
        """`error` with the exception that is being handled."""
        ...


def open_log(part: str, *, clock: Clock, level: str, stream: TextIO) -> Log:
    """The log of one process: lines of `level`, one of debug, info, warning and error, and above."""
    render = _human if stream.isatty() else _json
    lock = threading.Lock()

    def write(method: str, fields: Fields) -> None:
        line = render({"ts": timestamp(clock.now_ms()), "level": method, "part": part, **fields}) + "\n"
        with lock:
            stream.write(line)
            stream.flush()

    return _Lines(write, _LEVELS.index(level), {})


class _Lines:
    def __init__(self, write: Callable[[str, Fields], None], least: int, bound: Fields) -> None:
        self._write = write
        self._least = least
        self._bound = bound

    def bind(self, **fields: Any) -> Log:
        return _Lines(self._write, self._least, {**self._bound, **fields})

    def debug(self, event: str, **fields: Any) -> None:
        self._say("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._say("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._say("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._say("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        self._say("error", event, {"exc_info": sys.exception(), **fields})

    def _say(self, method: str, event: str, fields: dict[str, Any]) -> None:
        if _LEVELS.index(method) < self._least:
            return
        error: BaseException | None = fields.pop("exc_info", None)
        said = {**self._bound, **fields, "event": event}
        if error is not None:
            said["exception"] = "".join(traceback.format_exception(error)).rstrip("\n")
        self._write(method, said)


def _json(fields: Fields) -> str:
    return msgspec.json.encode(fields, enc_hook=str).decode()


def _human(fields: Fields) -> str:
    rest = dict(fields)
    head = " ".join(str(rest.pop(name)) for name in ("ts", "level", "part", "event"))
    trace = rest.pop("exception", None)
    tail = "".join(f" {key}={value}" for key, value in rest.items())
    return f"{head}{tail}\n{trace}" if trace else head + tail
