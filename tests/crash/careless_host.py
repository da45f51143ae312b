"""`penstock host` that trusts an unknown result, for the negative control: `careless_host.py host …`.

Whatever the store answers to a create, and be it nothing at all, is taken for "created" (guarantees.md, L3).
"""

from __future__ import annotations

from penstock.blobs import Created, Exists
from penstock.blobs.cloud import CloudBlobs
from penstock.cli.main import main
from penstock.errors import StoreUnavailable

really = CloudBlobs.create


def trusting(self: CloudBlobs, name: str, body: bytes, *, id: str) -> Created | Exists:
    try:
        return really(self, name, body, id=id)
    except StoreUnavailable:
        return Created("unknown")


if __name__ == "__main__":
    CloudBlobs.create = trusting  # type: ignore[method-assign]
    main()
