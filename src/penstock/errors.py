"""Every error that Penstock raises on purpose, as one tree.

    PenstockError
    ├── SettingsError               a setting or the place it points to is wrong; nothing was touched (exit 2)
    │   └── FileChanged
    ├── BatchRefused                the API does not take this batch; nothing of it was stored
    │   ├── MalformedBody · MalformedGzip · EmptyBatch · NoValidEvent · BadHeader · BodyMismatch · BadParameter 400
    │   ├── Unauthenticated 401 · Forbidden · ForbiddenDevice 403
    │   ├── NotFound 404 · MethodNotAllowed 405 · RequestTimeout 408 · LengthRequired 411
    │   ├── ProducerFenced          409
    │   ├── BodyTooLarge · BatchTooLarge        413
    │   ├── UriTooLong 414 · UnsupportedEncoding · UnsupportedType 415 · ExpectationFailed 417 · HeaderTooLarge 431
    │   ├── NumberReused · NumberTooOld         422
    │   ├── ThroughputExceeded      429: nothing was stored; send the same again after `retry_after_s`
    │   └── NotConfirmed            503: send the same number again
    │       └── HubBusy · StorageFull · Draining · HubUnavailable
    ├── HubError                    the log cannot give what was asked for
    │   └── OffsetTrimmed · OffsetBeyondEnd · FrameDamaged · ReaderFenced · WrongHub · HubBroken
    ├── StoreError                  the blob store did not do what was asked
    │   └── BlobNotFound · LostRace · StoreUnavailable
    ├── ArchiveError                ledger, files and log do not agree; the partition stops
    ├── SpoolError                  the client's spool
    │   └── SpoolFull · SpoolClosed · SpoolDamaged · FlushTimeout · GaveUp
    └── InternalError               500: the server failed in a way that it does not know

A class carries its `code` (where it says no other, its own name in snake case), its HTTP `status` where it has one, whether
sending the same again can help (`retryable`), and its data in `fields`. Those who read over HTTP get the same class again from
`application/problem+json` (wire/problem.py).
"""

from __future__ import annotations

import re
from typing import ClassVar

_WORD = re.compile(r"(?<!^)(?=[A-Z])")


class PenstockError(Exception):
    """The root. `str(error)` is one sentence for people; `fields` are for programs.

    What a class's own docstring says stands in docs/errors.md and in the API's /docs/errors: when it happens, and what to do.
    """

    code: ClassVar[str] = "penstock_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    title: ClassVar[str] = "Penstock error"

    def __init_subclass__(cls) -> None:
        if "code" not in vars(cls):
            cls.code = _WORD.sub("_", cls.__name__).lower()

    def __init__(self, detail: str, /, **fields: object) -> None:  # `fields` may have any name: they come from the wire
        super().__init__(detail)
        self.detail = detail
        self.fields = fields


class SettingsError(PenstockError):
    """A setting, or the place it points to, is wrong. Nothing was touched. Put right what the detail names."""

    code = "settings"
    title = "Wrong settings"


class BatchRefused(PenstockError):
    """The API did not take the request. Nothing of it was stored."""

    code = "refused"
    status = 400
    title = "Refused"


class MalformedBody(BatchRefused):
    """The body is not what its Content-Type says. The same bytes are never taken: look at what made them."""

    title = "The body cannot be read"


class MalformedGzip(BatchRefused):
    """The compressed body is cut short, damaged, has several members or bytes behind its end. Zip the events anew, as one member."""

    title = "The compressed body cannot be read"


class EmptyBatch(BatchRefused):
    """The body holds no event at all. There is nothing to send again."""

    title = "No event in the body"


class NoValidEvent(BatchRefused):
    """Every event of the batch was rejected; `rejected` lists why. Put them right, and send them as a new batch."""

    title = "No valid event in the body"


class BadHeader(BatchRefused):
    """A header is malformed or contradicts another. Put right what the detail names."""

    title = "A header cannot be understood"


class BadParameter(BatchRefused):
    """A parameter of the query, named in `parameter`, is not what it may be. Put it right as the detail says."""

    title = "A parameter cannot be understood"


class BodyMismatch(BatchRefused):
    """The sha256 of the body that arrived is not the one that was announced. Send the same bytes with the same number again."""

    retryable = True
    title = "The body is not the one that was sent"


class Unauthenticated(BatchRefused):
    """No key, or none that is valid here. Which of the two, and why, is not told. Keep the batch until there is a valid key."""

    status = 401
    title = "No valid key"


class Forbidden(BatchRefused):
    """The key is valid, and lacks the right that this path needs, named in `right`. Keep the batch, and use a key that has it."""

    status = 403
    title = "The key lacks the right"


class ForbiddenDevice(BatchRefused):
    """The key is valid, and not for this device. Keep the batch, and use a key that is for it."""

    status = 403
    title = "The key is for other devices"


class NotFound(BatchRefused):
    """No such path, partition, producer or group. Keep the batch: the address is wrong, not what was sent."""

    status = 404
    title = "Not found"


class MethodNotAllowed(BatchRefused):
    """The path exists and does not take this method; `allow` and the header Allow name those that it takes."""

    status = 405
    title = "Method not allowed"


class RequestTimeout(BatchRefused):
    """The request did not arrive whole within its deadline. Send the same again; smaller batches arrive sooner."""

    status = 408
    retryable = True
    title = "The request took too long to arrive"


class LengthRequired(BatchRefused):
    """A request that may have a body has neither Content-Length nor a chunked body. Send it with one of them."""

    status = 411
    title = "Length required"


class ProducerFenced(BatchRefused):
    """A newer epoch of this producer has been seen, `last_epoch`. Take a new producer id, and send the same bytes again."""

    status = 409
    title = "An older epoch of this producer"


class BodyTooLarge(BatchRefused):
    """The body as sent is larger than `limit_bytes`. Split the batch and send the parts."""

    status = 413
    title = "The body is too large"


class BatchTooLarge(BatchRefused):
    """The unzipped body is larger than `limit_bytes`, or holds more than `limit_events`. Split the batch and send the parts."""

    status = 413
    title = "The batch is too large"


class UriTooLong(BatchRefused):
    """The request target is longer than `limit_bytes`. No address of this API is."""

    status = 414
    title = "URI too long"


class UnsupportedEncoding(BatchRefused):
    """The Content-Encoding is not one of `supported`. Send the batch in one of these."""

    status = 415
    title = "Unsupported Content-Encoding"


class UnsupportedType(BatchRefused):
    """The Content-Type is not one of `supported`. Send the batch as one of these."""

    status = 415
    title = "Unsupported Content-Type"


class ExpectationFailed(BatchRefused):
    """The header Expect asks for something other than 100-continue. Leave it out."""

    status = 417
    title = "The expectation cannot be met"


class HeaderTooLarge(BatchRefused):
    """The header block is larger than `limit_bytes`. Send fewer or shorter headers."""

    status = 431
    title = "Request header fields too large"


class NumberReused(BatchRefused):
    """This producer has sent other bytes under the same number. Take a new producer id, and send the same bytes again."""

    status = 422
    title = "The number was used for other bytes"


class NumberTooOld(BatchRefused):
    """The number is lower than the producer's last and too old to be known. Take a new producer id, and send the same bytes again."""

    status = 422
    title = "The number is too old to be known"


class ThroughputExceeded(BatchRefused):
    """More than the throughput units, the partition or a quota allow. Send the same again after `retry_after_s`, and not before."""

    status = 429
    retryable = True
    title = "Too much at once"


class NotConfirmed(BatchRefused):
    """The batch may or may not be stored: send the same bytes with the same number after `retry_after_s`."""

    status = 503
    retryable = True
    title = "Not confirmed"


class HubBusy(NotConfirmed):
    """The batch would wait too long, or there is no room for the connection or the body. Send the same again after `retry_after_s`."""

    title = "The hub is busy"


class StorageFull(NotConfirmed):
    """The hub has reached its disk limit or the disk is full. Keep the batch: there is room when archived events are deleted."""

    title = "The hub's storage is full"


class Draining(NotConfirmed):
    """The server is shutting down. Send the same batch with the same number again, in a moment."""

    title = "The server is shutting down"


class HubUnavailable(NotConfirmed):
    """The commit failed or the hub cannot be reached. Send the same batch with the same number again after `retry_after_s`."""

    title = "The hub is not available"


class HubError(PenstockError):
    """The log cannot give what was asked for."""

    title = "Hub error"


class OffsetTrimmed(HubError):
    """The offset lies before the first event that is kept; `first` names that. What lies between is no longer in the hub: go on there."""

    status = 410
    title = "The offset was trimmed"


class OffsetBeyondEnd(HubError):
    """The offset lies beyond the end of the log, `end`: it comes from another hub or another partition. Do not go on from it."""

    status = 400
    title = "The offset lies beyond the end"


class FrameDamaged(HubError):
    """A frame's checksum or shape is wrong. Its partition cannot be read past it: restore the hub from a backup."""

    title = "A frame is damaged"


class ReaderFenced(HubError):
    """A newer epoch of this group reads the partition, `last_epoch`: the lease that the request was made under is lost. Stop reading."""

    status = 409
    title = "An older epoch of this group"


class WrongHub(HubError):
    """Another hub than before answers at the address, `found` and not `expected`: its offsets mean other events. The host ends."""

    title = "Another hub"


class HubBroken(HubError):
    """A write or sync failed, or the hub grew beyond what this process knows: its processes must be started again."""

    title = "The hub's storage failed"


class StoreError(PenstockError):
    """The blob store did not do what was asked, or what it holds cannot be read. Nothing was overwritten."""

    title = "Blob store error"


class BlobNotFound(StoreError):
    """There is no blob of this name. Look whether somebody deleted it."""

    title = "Blob not found"


class LostRace(StoreError):
    """The blob was changed by another since its etag was read. Give up what stood on it, and read anew."""

    title = "Another was faster"


class StoreUnavailable(StoreError):
    """The store did not answer, or its answer leaves the outcome unknown. Read back before anything is decided, and try again."""

    retryable = True
    title = "The blob store is not available"


class ArchiveError(PenstockError):
    """Ledger, hour files and log do not agree. The partition stops; nothing is overwritten. `penstock verify` says more."""

    title = "The archive does not agree with the log"


class SpoolError(PenstockError):
    """The client's spool did not do what was asked."""

    title = "Spool error"


class SpoolFull(SpoolError):
    """The spool holds as much as it may, or as its disk can. The event was not taken: keep it, and offer it again later."""

    title = "The spool is full"


class SpoolClosed(SpoolError):
    """The client was closed before. The event was not taken: open a client on the same spool, and send it there."""

    title = "The client is closed"


class SpoolDamaged(SpoolError):
    """A file of the spool is not what was written. It is kept as it is; `penstock dump` shows what can be read of it."""

    title = "The spool is damaged"


class FlushTimeout(SpoolError):
    """The hub has not answered for everything in time. Nothing is lost: the rest stays in the spool. Flush again."""

    title = "Not everything was answered in time"


class GaveUp(SpoolError):
    """No batch was answered for the whole timeout. Nothing is lost: what was taken stays in the spool. The same command goes on."""

    title = "Gave up"


class FileChanged(SettingsError):
    """A file that was begun is another now: which of its lines were taken cannot be said. Nothing was touched."""

    title = "The file has changed"


class InternalError(PenstockError):
    """The server failed in a way that it does not know. Whether anything was stored is not known: send the same again."""

    retryable = True
    title = "The server failed"
