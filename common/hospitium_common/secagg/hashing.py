"""Hashes, key derivation and signatures under labels; every input is length-prefixed."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from hospitium_common.codec import encode_parts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SUITE = b"HSA1-XWING768-Ed25519-HKDFSHA256-AES256CTR-AES256GCM-GF256"
"""Every context names the algorithms, so that two sides with other ones never agree by accident."""


class Label:
    """What a hash, a key or a signature is for. No two uses share a label."""

    STUDY = b"hospitium/study"
    KEY_FILE = b"hospitium/key-file"
    FINGERPRINT = b"hospitium/fingerprint"
    ENROLMENT = b"hospitium/enrolment"
    ENROLMENT_NODE = b"hospitium/enrolment-node"
    ENROLMENT_OLD_KEY = b"hospitium/enrolment-old-key"
    ADMISSION = b"hospitium/admission"
    FEDERATION = b"hospitium/federation"
    REQUEST = b"hospitium/request"
    ANSWER = b"hospitium/answer"
    POLICY = b"hsa1/policy"
    QUANTISER = b"hsa1/quant"
    ROTATION = b"hsa1/rotation"
    CONTEXT = b"hsa1/ctx"
    MODEL = b"hsa1/model"
    ROSTER = b"hsa1/roster"
    ROSTER_SIGNATURE = b"hsa1/roster-sig"
    PAIR = b"hsa1/pair"
    PAIR_SIGNATURE = b"hsa1/pair-sig"
    PAIR_ROOT = b"hsa1/pair-root"
    PAIR_CIPHERTEXT = b"ct"
    RATCHET = b"hsa1/ratchet"
    PAIR_SEED = b"hsa1/pair-seed"
    SEED_COMMITMENT = b"hsa1/seed-com"
    SEED_TABLE = b"hsa1/table"
    SELF_MASK_COMMITMENT = b"hsa1/com-b"
    TABLE_KEY_COMMITMENT = b"hsa1/com-R"
    SHARE = b"hsa1/share"
    SHARE_OF_SELF_MASK = b"hsa1/share-b"
    SHARE_OF_TABLE_KEY = b"hsa1/share-R"
    TASK = b"hsa1/task"
    READY = b"hsa1/ready"
    READY_BODY = b"hsa1/ready-body"
    COHORT = b"hsa1/cohort"
    MASK_SELF = b"hsa1/mask-self"
    MASK_PAIR = b"hsa1/mask-pair"
    MASKED = b"hsa1/masked"
    PAYLOAD = b"hsa1/payload"
    ACK = b"hsa1/ack"
    ACK_ROOT = b"hsa1/ack-root"
    RESULT = b"hsa1/result"


def tagged_hash(label: bytes, *parts: int | bytes) -> bytes:
    """SHA-256 over the label and the parts: 32 bytes."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(encode_parts(label, *parts))
    return digest.finalize()


class PayloadHash:
    """BLAKE2b-512 (RFC 7693) over large buffers, piece by piece: each while it is in the cache."""

    def __init__(self, label: bytes, buffers: int) -> None:
        """``buffers`` is how many there will be."""
        self._hash = hashes.Hash(hashes.BLAKE2b(64))
        self._hash.update(encode_parts(label, buffers))

    def begin(self, length: int) -> None:
        """Announce a buffer of so many bytes; its pieces follow."""
        self._hash.update(length.to_bytes(8, "big"))

    def update(self, piece: bytes | memoryview) -> None:
        """Take the next piece of the buffer that was announced; it is not copied."""
        self._hash.update(piece)

    def digest(self) -> bytes:
        """Return the 64 bytes; nothing can be added after that."""
        return self._hash.finalize()


def payload_digest(label: bytes, *buffers: bytes | memoryview) -> bytes:
    """Digest whole buffers with `PayloadHash`: 64 bytes."""
    found = PayloadHash(label, len(buffers))
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        found.begin(len(view))
        found.update(view)
    return found.digest()


def derive(key: bytes, label: bytes, *parts: int | bytes) -> bytes:
    """HKDF-Expand with SHA-256 (RFC 5869): 32 bytes from a uniform key."""
    return HKDFExpand(hashes.SHA256(), 32, encode_parts(label, *parts)).derive(key)


def sign(key: Ed25519PrivateKey, label: bytes, *parts: int | bytes) -> bytes:
    """Ed25519 (RFC 8032) over the label and the parts: 64 bytes."""
    return key.sign(encode_parts(label, *parts))


def is_signed_by(public: bytes, signature: bytes, label: bytes, *parts: int | bytes) -> bool:
    """Whether this public key signed exactly this label and these parts."""
    try:
        _public_key(public).verify(signature, encode_parts(label, *parts))
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=1024)
def _public_key(public: bytes) -> Ed25519PublicKey:
    """Read a public key once: a round checks several signatures of every site."""
    return Ed25519PublicKey.from_public_bytes(public)


def bitmap(members: Iterable[int]) -> bytes:
    """32 bytes with bit i set for every member i."""
    bits = bytearray(32)
    for member in members:
        bits[member >> 3] |= 1 << (member & 7)
    return bytes(bits)


def members(bits: bytes) -> tuple[int, ...]:
    """The members of a bitmap, in order."""
    return tuple(i for i in range(len(bits) * 8) if bits[i >> 3] >> (i & 7) & 1)
