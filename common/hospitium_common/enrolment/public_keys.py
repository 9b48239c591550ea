"""The public keys in a request: each of the right kind, in the one spelling that is allowed."""

from __future__ import annotations

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from hospitium_common.errors import ConfigError
from hospitium_common.secagg.keys import PublicKeys


def check_site_keys(keys: PublicKeys) -> None:
    """Demand keys that others can verify with and encrypt to.

    Raises:
        ConfigError: one is of another length, no key, or of low order (RFC 7748, section 6.1).
    """
    try:
        Ed25519PublicKey.from_public_bytes(keys.sign)
        MLKEM768PublicKey.from_public_bytes(keys.encapsulate).encapsulate()
        exchange = X25519PublicKey.from_public_bytes(keys.exchange)
        X25519PrivateKey.generate().exchange(exchange)
    except ValueError as error:
        raise ConfigError(
            "expected an Ed25519, an X25519 and an ML-KEM-768 public key, got one that is none; "
            "make the request again with `hospitium site init` or `rotate`"
        ) from error


def node_public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return the node's public key as Flower's server keeps it: SubjectPublicKeyInfo in PEM."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def load_node_public(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Read a node's public key; of all its spellings exactly one is allowed.

    Raises:
        ConfigError: it is no EC P-384 key, or written in another way.
    """
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError("node key: expected an EC P-384 public key in PEM") from error
    if (
        not isinstance(key, ec.EllipticCurvePublicKey)
        or not isinstance(key.curve, ec.SECP384R1)
        or node_public_pem(key) != pem
    ):
        raise ConfigError("node key: expected an EC P-384 public key in PEM, got another form")
    return key
