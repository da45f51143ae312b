"""`penstock dump`: any file that Penstock writes, in readable form (docs/formats.md)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from penstock.cli.options import settings
from penstock.errors import BlobNotFound, PenstockError, SettingsError

if TYPE_CHECKING:
    from penstock.blobs import BlobStore
    from penstock.cli.wiring import Layout
    from penstock.events import Frame
    from penstock.settings import Values

_LINES_SHOWN = 3


@click.command()
@click.argument("path")
@click.option(
    "--lines", default=_LINES_SHOWN, show_default=True, help="Events shown of a frame, an hour file or a spool file."
)
@settings("dump")
def dump(values: Values, path: str, lines: int) -> None:
    """Show a frame, lease, ledger record, manifest, hour file, data folder or spool file as JSON, one object for each thing in it.

    PATH is on this machine; with --store it is the name of a blob, and with --hub kafka://… and --store PARTITION/OFFSET of a record.
    """
    for thing in _found(values, path, lines):
        click.echo(msgspec.json.format(msgspec.json.encode(thing)))


def _found(values: Values, path: str, lines: int) -> Iterator[object]:
    from penstock.cli import wiring

    where = wiring.layout(values)
    if values.source("hub") == "flag":
        yield from _record(values, where, path, lines)
    elif values.source("store") == "flag":
        yield from _blob(wiring.open_store(where), path, where.store_name, lines)
    else:
        if not Path(path).exists():
            raise SettingsError(f"There is nothing at {path}.")
        yield from _things(Path(path), lines)


def _record(values: Values, where: Layout, place: str, lines: int) -> Iterator[dict[str, Any]]:
    from penstock.cli import topic, wiring
    from penstock.clock import SystemClock

    partition, _, offset = place.partition("/")
    if not (partition.isdecimal() and offset.isdecimal()):
        raise SettingsError(f"{place} is not PARTITION/OFFSET of a record, such as 0/4711.")
    where = topic.asked(where, values)
    with topic.opened(where, wiring.open_store(where), SystemClock()) as hub:
        found = hub.read(int(partition), offset, bytes_max=1).frames
    if not found or found[0].first >> hub.place_bits != int(offset):
        raise SettingsError(f"There is no record at {place} in {where.topic}.")
    yield {"kind": "record", "offset": int(offset), **_frame(found[0], lines)}


def _blob(store: BlobStore, name: str, store_name: str, lines: int) -> Iterator[object]:
    """A blob as the file that it would be in a folder."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise SettingsError(f"{name} cannot name a blob.")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, *name.split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                file.writelines(store.stream(name))
        except BlobNotFound as error:
            raise SettingsError(f"There is no blob {name} in {store_name}.") from error
        yield from _things(path, lines)


def _things(path: Path, lines: int) -> Iterator[object]:
    if path.is_dir():
        yield from _hub(path)
        return
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PF":
        yield from _frames(path, lines)
    elif head == b"\x1f\x8b":
        yield _hour_file(path, lines)
    elif path.suffix in (".batch", ".open", ".ndjson"):
        yield from _spool_file(path, lines)
    elif re.search(r"/_producers/\d+/\d{20}$", path.resolve().as_posix()):
        yield _producers(path)
    else:
        yield {"kind": _kind(path), "content": _json(path)}


def _producers(path: Path) -> dict[str, Any]:
    from penstock.archive.filter import State
    from penstock.clock import timestamp

    try:
        state = msgspec.msgpack.decode(path.read_bytes(), type=State)
    except (msgspec.MsgspecError, ValueError) as error:
        raise PenstockError(f"{path} is not what is known of producers: {error}.") from error
    return {
        "kind": "producers",
        "hub": state.hub,
        "partition": state.partition,
        "next": state.next,
        "producers": {
            name: {
                "seen_at": timestamp(known.seen_at_ms),
                "batches": [{**msgspec.structs.asdict(one), "sha256": one.sha256.hex()} for one in known.batches],
            }
            for name, known in state.producers.items()
        },
    }


def _json(path: Path) -> object:
    try:
        return msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PenstockError(f"{path} is neither frame, hour file nor JSON: {error}.") from error


def _kind(path: Path) -> str:
    name = path.resolve().as_posix()
    for pattern, kind in (
        (r"/_ledger/\d+/\d{20}\.json", "ledger record"),
        (r"/_leases/[^/]+/\d+\.json", "lease"),
        (r"/_moves/[^/]+/\d+\.json", "note of a lease's move"),
        (r"/_hours/[^/]+\.json", "hour manifest"),
        (r"/_dead/\d+/\d{20}\.json", "dead letter"),
        (r"/_dead/\d+/\d{20}\.number\.json", "number of a dead letter's replay"),
        (r"/_dead/\d+/\d{20}\.replayed\.json", "answer to a dead letter's replay"),
        (r"/_hub\.json", "owner of the store"),
        (r"/\d+/\d+/state\.json", "lane of a spool"),
        (r"/run/parts-\d+\.json", "running parts"),
        (r"/keys\.json", "keys"),
    ):
        if re.search(f"{pattern}$", name):
            return kind
    return "json"


def _frames(path: Path, lines: int) -> Iterator[dict[str, Any]]:
    from penstock.wire import frame

    at = 0
    for part in frame.split(path.read_bytes()):
        yield {"kind": "frame", "at": at, **_frame(frame.decode(part, where=f"{path}:{at}"), lines)}
        at += len(part)


def _frame(read: Frame, lines: int) -> dict[str, Any]:
    from penstock.clock import timestamp
    from penstock.wire import frame

    content = frame.content(read).splitlines()[:lines] if not read.is_marker else []
    return {
        "frame": read.kind.name.lower(),
        "partition": read.partition,
        "first": read.first,
        "next": read.next,
        "enqueued_at": timestamp(read.enqueued_at_ms),
        "raw_bytes": read.raw_bytes,
        "body_bytes": len(read.body),
        "content_crc": read.content_crc,
        "sources": [
            {
                "producer": source.producer,
                "epoch": source.epoch,
                "sequence": source.sequence,
                "count": source.count,
                "sha256": source.sha256.hex(),
                "properties": source.properties.decode("utf-8", "replace"),
            }
            for source in frame.sources_of(read)
        ],
        "lines": [_shown(line) for line in content],
    }


def _hour_file(path: Path, lines: int) -> dict[str, Any]:
    import gzip
    import zlib

    count = raw_bytes = crc = 0
    shown: list[str] = []
    try:
        with gzip.open(path) as file:
            for line in file:
                count += 1
                raw_bytes += len(line)
                crc = zlib.crc32(line, crc)
                if len(shown) < lines:
                    shown.append(line.decode("utf-8", "replace").rstrip("\n"))
    except (OSError, EOFError, zlib.error) as error:
        raise PenstockError(f"{path} is damaged behind event {count}: {error}.") from error
    return {
        "kind": "hour file",
        "bytes": path.stat().st_size,
        "events": count,
        "raw_bytes": raw_bytes,
        "crc32": crc,
        "lines": shown,
    }


def _spool_file(path: Path, lines: int) -> Iterator[dict[str, Any]]:
    """What of it can be read; then PenstockError if that is not all."""
    from penstock.client import records

    text = path.read_bytes()
    if path.suffix == ".open":
        events, damaged = records.read_open(text)
        yield {
            "kind": "open spool file",
            "events": len(events),
            "damaged": len(damaged),
            "unfinished_bytes": len(text) - text.rfind(b"\n") - 1,
            "lines": [_shown(event) for event in events[:lines]],
            "damaged_lines": [_shown(line) for line in damaged[:lines]],
        }
        if damaged:
            raise PenstockError(f"{path} has {len(damaged)} damaged lines; the client will put them in quarantine.")
    elif path.suffix == ".batch":
        header = msgspec.to_builtins(records.read_header(text))
        try:
            batch = records.read_batch(path.stem, path, text)
        except PenstockError:
            yield {"kind": "damaged spool batch", **header}
            raise
        yield {"kind": "spool batch", **header, "lines": [_shown(line) for line in batch.lines()[:lines]]}
    else:
        from penstock.client.dead import read_lines

        dead = list(read_lines(path, text))
        codes = Counter(record.code for record in dead)
        yield {"kind": "dead letters", "events": len(dead), "codes": codes, "lines": dead[:lines]}


def _shown(line: bytes) -> str:
    return line.decode("utf-8", "replace")


def _hub(path: Path) -> Iterator[dict[str, Any]]:
    from penstock.clock import SystemClock, timestamp
    from penstock.hub.embedded import EmbeddedHub

    folder = path if (path / "data.mdb").exists() else path / "hub"
    if not (folder / "data.mdb").exists():
        raise SettingsError(f"{path} is neither a data folder nor a hub.")
    with EmbeddedHub(folder, bytes_max=1 << 20, clock=SystemClock(), read_only=True) as hub:
        usage = hub.usage()
        yield {
            "kind": "hub",
            "hub": hub.id,
            "partitions": hub.partitions(),
            "period_s": hub.period_s,
            "bytes_used": usage.used,
            "counters": hub.counters(),
        }
        for partition in range(hub.partitions()):
            bounds = hub.bounds(partition)
            yield {
                "kind": "partition",
                "partition": partition,
                "first": bounds.first,
                "next": bounds.next,
                "bytes": bounds.bytes,
                "enqueued_first": timestamp(bounds.enqueued_first_ms),
                "enqueued_last": timestamp(bounds.enqueued_last_ms),
            }
