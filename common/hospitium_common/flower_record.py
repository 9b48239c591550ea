"""Bytes in a Flower record, the same on both sides: Flower carries them and never looks inside.

Small ones are one value of a `ConfigRecord`: three objects to fetch. Large ones are an `Array`,
which Flower stores and sends in chunks of 5 MB, each only once: a model for twenty sites is on
the coordinator's disk once, because all but the first chunk are the same.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from hospitium_common.errors import PeerProtocolError

MESSAGE_TYPE = "query.exchange"
LARGEST_VALUE = 1 << 20
_RECORD, _FIELD, _KIND = "exchange", "bytes", "hospitium.bytes"


def as_record(payload: bytes) -> RecordDict:
    """Wrap bytes for a Flower message; large ones are not copied here."""
    if len(payload) <= LARGEST_VALUE:
        return RecordDict({_RECORD: ConfigRecord({_FIELD: payload})})
    array = Array(dtype="uint8", shape=(len(payload),), stype=_KIND, data=payload)
    return RecordDict({_RECORD: ArrayRecord({_FIELD: array})})


def payload_of(content: RecordDict) -> bytes:
    """Take the bytes out again.

    Raises:
        PeerProtocolError: the record holds something else.
    """
    record = content.get(_RECORD)
    value: object = None
    if isinstance(record, ConfigRecord):
        value = record.get(_FIELD)
    elif isinstance(record, ArrayRecord) and _FIELD in record:
        value = record[_FIELD].data
    if len(content) != 1 or not isinstance(value, bytes):
        raise PeerProtocolError("expected bytes in a Flower record, got something else", blame=0)
    return value
