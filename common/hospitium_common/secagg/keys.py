"""Long-term keys of a site: one to sign with, two to receive secrets with."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from hospitium_common.codec import Reader, encode_parts


@dataclass(frozen=True, kw_only=True)
class PublicKeys:
    """Ed25519 (RFC 8032), X25519 (RFC 7748) and ML-KEM-768 (FIPS 203), raw."""

    sign: bytes
    exchange: bytes
    encapsulate: bytes

    def parts(self) -> tuple[bytes, bytes, bytes]:
        """The three keys in their fixed order."""
        return self.sign, self.exchange, self.encapsulate


@dataclass(frozen=True, kw_only=True, repr=False)
class SiteKeys:
    """The private halves. They never leave the site, and never appear in a log."""

    sign: Ed25519PrivateKey
    exchange: X25519PrivateKey
    encapsulate: MLKEM768PrivateKey

    @classmethod
    def generate(cls) -> SiteKeys:
        """Draw fresh keys from the operating system."""
        return cls(
            sign=Ed25519PrivateKey.generate(),
            exchange=X25519PrivateKey.generate(),
            encapsulate=MLKEM768PrivateKey.generate(),
        )

    def public(self) -> PublicKeys:
        """Return the halves that go into the roster."""
        return PublicKeys(
            sign=self.sign.public_key().public_bytes_raw(),
            exchange=self.exchange.public_key().public_bytes_raw(),
            encapsulate=self.encapsulate.public_key().public_bytes_raw(),
        )

    def encode(self) -> bytes:
        """Return the private keys as bytes, for a file that only the site can read."""
        return encode_parts(
            self.sign.private_bytes_raw(),
            self.exchange.private_bytes_raw(),
            self.encapsulate.private_bytes_raw(),
        )

    @classmethod
    def decode(cls, data: bytes) -> SiteKeys:
        """Read what ``encode`` wrote."""
        reader = Reader(data)
        keys = cls(
            sign=Ed25519PrivateKey.from_private_bytes(reader.bytes(32)),
            exchange=X25519PrivateKey.from_private_bytes(reader.bytes(32)),
            encapsulate=MLKEM768PrivateKey.from_seed_bytes(reader.bytes(64)),
        )
        reader.finish()
        return keys
