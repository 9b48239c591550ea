"""A hospital's request to be enrolled, or to be enrolled under new keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from hospitium_common.codec import encode_parts
from hospitium_common.enrolment.fingerprint import fingerprint_of_site
from hospitium_common.enrolment.names import check_name, check_title
from hospitium_common.enrolment.public_keys import (
    check_site_keys,
    load_node_public,
    node_public_pem,
)
from hospitium_common.errors import ConfigError
from hospitium_common.json_file import Hex, JsonPart, from_json, to_json
from hospitium_common.secagg.hashing import Label, is_signed_by, sign, tagged_hash
from hospitium_common.secagg.keys import PublicKeys

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from hospitium_common.secagg.keys import SiteKeys


@dataclass(frozen=True, kw_only=True)
class EnrolmentRequest:
    """What a hospital asks to be enrolled under.

    ``node_key`` is EC P-384 as SubjectPublicKeyInfo in PEM, the bytes that Flower's server
    compares.
    ``replaces`` is the signing key that this hospital is enrolled under already, if it rotates its
    keys, and ``old_signature`` is made with it.
    """

    name: str
    title: str
    keys: PublicKeys
    node_key: bytes
    replaces: bytes = b""
    signature: bytes = b""
    node_signature: bytes = b""
    old_signature: bytes = b""

    @property
    def digest(self) -> bytes:
        """What all of its keys sign."""
        return tagged_hash(
            Label.ENROLMENT, self.name.encode(), self.title.encode(), *self.keys.parts(),
            self.node_key, self.replaces,
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """What both administrators read to each other."""
        return fingerprint_of_site(self.name, self.keys, self.node_key)

    @property
    def is_rotation(self) -> bool:
        """Whether it replaces keys that it proves to have."""
        return bool(self.replaces)

    def check(self) -> None:
        """Demand well-formed names and keys, and a signature by each key that can sign.

        Raises:
            ConfigError: something is not right; a request is never enrolled in part.
        """
        check_name(self.name)
        check_title(self.title)
        check_site_keys(self.keys)
        node_key = load_node_public(self.node_key)
        signed = is_signed_by(self.keys.sign, self.signature, Label.ENROLMENT, self.digest)
        try:
            node_key.verify(
                self.node_signature, _signed_by_node(self.digest), ec.ECDSA(hashes.SHA384())
            )
        except InvalidSignature:
            signed = False
        if self.is_rotation:
            signed &= is_signed_by(
                self.replaces, self.old_signature, Label.ENROLMENT_OLD_KEY, self.digest
            )
        if not signed:
            raise ConfigError(
                "expected a request signed by every key in it, got one that was changed or is not "
                "whole; ask the hospital to send it again"
            )

    def encode(self) -> bytes:
        """Return the request as the JSON text of its file."""
        document = _RequestFile(
            name=self.name,
            title=self.title,
            sign=self.keys.sign,
            exchange=self.keys.exchange,
            encapsulate=self.keys.encapsulate,
            node_key=self.node_key.decode("ascii"),
            replaces=self.replaces,
            signature=self.signature,
            node_signature=self.node_signature,
            old_signature=self.old_signature,
        )
        return to_json(document)

    @classmethod
    def decode(cls, data: bytes) -> EnrolmentRequest:
        """Read what ``encode`` wrote; ``check`` looks at what it says.

        Raises:
            ConfigError: the bytes are no request.
        """
        file = from_json(_RequestFile, data, "an enrolment request")
        return cls(
            name=file.name,
            title=file.title,
            keys=PublicKeys(sign=file.sign, exchange=file.exchange, encapsulate=file.encapsulate),
            node_key=file.node_key.encode(),
            replaces=file.replaces,
            signature=file.signature,
            node_signature=file.node_signature,
            old_signature=file.old_signature,
        )


class _RequestFile(JsonPart):
    format: Literal["hospitium enrolment request 1"] = "hospitium enrolment request 1"
    name: str
    title: str
    sign: Hex
    exchange: Hex
    encapsulate: Hex
    node_key: str
    replaces: Hex
    signature: Hex
    node_signature: Hex
    old_signature: Hex


def make_request(
    name: str,
    title: str,
    keys: SiteKeys,
    node_key: ec.EllipticCurvePrivateKey,
    old: Ed25519PrivateKey | None = None,
) -> EnrolmentRequest:
    """Make a request, signed by every key that can sign; ``old`` is the key that it replaces."""
    check_name(name)
    check_title(title)
    request = EnrolmentRequest(
        name=name,
        title=title,
        keys=keys.public(),
        node_key=node_public_pem(node_key.public_key()),
        replaces=b"" if old is None else old.public_key().public_bytes_raw(),
    )
    digest = request.digest
    by_old = b"" if old is None else sign(old, Label.ENROLMENT_OLD_KEY, digest)
    return replace(
        request,
        signature=sign(keys.sign, Label.ENROLMENT, digest),
        node_signature=node_key.sign(_signed_by_node(digest), ec.ECDSA(hashes.SHA384())),
        old_signature=by_old,
    )


def _signed_by_node(digest: bytes) -> bytes:
    return encode_parts(Label.ENROLMENT_NODE, digest)
