"""`make brokers`: Kafka brokers on 127.0.0.1 to try a topic with, until Ctrl-C; their data end with them."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.kafka_broker import brokers


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.brokers", description="Kafka brokers to try a topic with.")
    parser.add_argument("--count", type=int, default=3, help="how many (3)")
    count = parser.parse_args(words).count
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as folder, brokers(Path(folder), count) as running:
            for node in running.nodes:
                print(f"broker {node.number} at {node.address}, process {node.pid}")
            print(f"--hub kafka://{running.servers}/telemetry   (Ctrl-C ends them)", flush=True)
            threading.Event().wait()
    except pytest.skip.Exception as missing:
        print(missing, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    raise AssertionError("nothing else ends it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
