"""`penstock host` that archives whatever the topic has, for the negative control: `unfiltered_host.py host …`."""

from __future__ import annotations

from penstock.archive.filter import Filter
from penstock.cli.main import main
from penstock.events import Frame


def everything(self: Filter, frame: Frame) -> Frame:
    return frame


if __name__ == "__main__":
    Filter.passed = everything  # type: ignore[method-assign]
    main()
