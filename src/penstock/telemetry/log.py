"""Log lines: a fixed sentence plus fields, one for each change of state.

People on a terminal read `time level part sentence key=value`; anything else gets one JSON object a line. A line is
one write, so that lines of several processes on one stream do not mix.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Protocol, TextIO

import msgspec

from penstock.clock import Clock, timestamp

Fields = MutableMapping[str, Any]


class Log(Protocol):
    """What the parts are handed. Thread-safe."""

    def bind(self, **fields: Any) -> Log:
        """The same log, with fields that stand in every line."""
        ...

    def debug(self, event: str, **fields: Any) -> Any: ...
    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...
    def exception(self, event: str, **fields: Any) -> Any:
        """`error` with the exception that is being handled."""
        ...


def open_log(part: str, *, clock: Clock, level: str, stream: TextIO) -> Log:
    """The log of one process."""
    import structlog  # slow to import, and most commands log nothing

    render = _human if stream.isatty() else _json

    def stamp(_logger: object, method: str, fields: Fields) -> Fields:
        return {"ts": timestamp(clock.now_ms()), "level": method, "part": part, **fields}

    log: Log = structlog.wrap_logger(
        structlog.WriteLogger(stream),
        processors=[structlog.processors.format_exc_info, stamp, _renderer(render)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        cache_logger_on_first_use=False,
    ).bind()
    return log


def _renderer(render: Callable[[Fields], str]) -> Callable[[object, str, Fields], str]:
    return lambda _logger, _method, fields: render(fields)


def _json(fields: Fields) -> str:
    return msgspec.json.encode(fields, enc_hook=str).decode()


def _human(fields: Fields) -> str:
    head = " ".join(str(fields.pop(name)) for name in ("ts", "level", "part", "event"))
    trace = fields.pop("exception", None)
    tail = "".join(f" {key}={value}" for key, value in fields.items())
    return f"{head}{tail}\n{trace}" if trace else head + tail
