"""Signed envelopes around everything that travels between coordinator and sites.

Who answered is what the signature says, never what the network claims: a site that pushes an
answer in another's name, or an old answer to a new request, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hospitium_common.codec import Reader, encode_parts
from hospitium_common.errors import PeerProtocolError
from hospitium_common.secagg.hashing import (
    Label,
    is_signed_by,
    payload_digest,
    sign,
    tagged_hash,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from hospitium_common.federation import FederationRoster

NONCE_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the coordinator sends: a message about one study, and a nonce that it draws afresh."""

    study: bytes
    nonce: bytes
    payload: bytes | memoryview

    @cached_property
    def digest(self) -> bytes:
        """What the coordinator signs, and what the answer has to name."""
        body = payload_digest(Label.REQUEST, self.payload)
        return tagged_hash(Label.REQUEST, self.study, self.nonce, body)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a site sends back; ``site`` is the roster index whose key signed it."""

    site: int
    payload: bytes | memoryview


def seal_request(request: Request, key: Ed25519PrivateKey) -> bytes:
    """Sign a request with the coordinator's key."""
    signature = sign(key, Label.REQUEST, request.digest)
    return encode_parts(request.study, request.nonce, signature, bytes(request.payload))


def open_request(data: bytes, coordinator: bytes) -> Request:
    """Read a request and check that the coordinator signed it.

    Raises:
        PeerProtocolError: it did not, or the bytes are no request.
    """
    reader = Reader(data)
    study, nonce, signature = reader.bytes(32), reader.bytes(NONCE_BYTES), reader.bytes(64)
    request = Request(study=study, nonce=nonce, payload=reader.part())
    reader.finish()
    if not is_signed_by(coordinator, signature, Label.REQUEST, request.digest):
        raise PeerProtocolError(
            "expected a request that the pinned coordinator signed, got another", blame=0
        )
    return request


def seal_answer(answer: Answer, request_digest: bytes, key: Ed25519PrivateKey) -> bytes:
    """Sign an answer to one request with the site's key."""
    signature = sign(key, Label.ANSWER, *_signed(answer, request_digest))
    return encode_parts(answer.site, signature, bytes(answer.payload))


def open_answer(data: bytes, roster: FederationRoster, request_digest: bytes) -> Answer:
    """Read an answer and check that the site it names signed it, for this request.

    Raises:
        PeerProtocolError: it did not, it is not enrolled, or the bytes are no answer.
    """
    reader = Reader(data)
    site, signature = reader.integer(), reader.bytes(64)
    answer = Answer(site=site, payload=reader.part())
    reader.finish()
    member = roster.member(site)
    if member.revoked or not is_signed_by(
        member.keys.sign, signature, Label.ANSWER, *_signed(answer, request_digest)
    ):
        raise PeerProtocolError(
            f"expected an answer that site {site} signed for this request, got another"
        )
    return answer


def _signed(answer: Answer, request_digest: bytes) -> tuple[int | bytes, ...]:
    return answer.site, request_digest, payload_digest(Label.ANSWER, answer.payload)
