"""What a hospital gets back when it was enrolled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from cryptography import x509
from pydantic import Field

from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.federation import FederationRoster
from hospitium_common.json_file import Hex, JsonPart, from_json, to_json
from hospitium_common.roster import LARGEST_INDEX
from hospitium_common.secagg.hashing import Label, is_signed_by, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What a hospital gets back: where to dial in, whom to trust, and who else is there.

    ``addresses`` are ``host:port``; ``ca`` is a certificate in PEM. The governance key signs all of
    it, so that one fingerprint compared by telephone vouches for everything.
    """

    index: int
    addresses: tuple[str, ...]
    ca: bytes
    roster: FederationRoster
    signature: bytes = b""

    def signed_by(self, governance: Ed25519PrivateKey) -> Admission:
        """Return the admission with the governance key's signature."""
        return replace(self, signature=sign(governance, Label.ADMISSION, *self._signed()))

    def check(self, now: float) -> None:
        """Demand that the governance key it names signed both the admission and its roster.

        Whether that is the right governance key, the fingerprint shows.

        Raises:
            ConfigError: it did not, or the CA is none or has expired (``now``: seconds since 1970).
        """
        try:
            self.roster.check(self.roster.governance)
            self.roster.member(self.index)
        except PeerProtocolError as error:
            raise ConfigError(f"the admission's {error}; ask the coordinator again") from error
        if not is_signed_by(
            self.roster.governance, self.signature, Label.ADMISSION, *self._signed()
        ):
            raise ConfigError(
                "expected an admission that the governance key signed, got one that was changed "
                "or is not whole; ask the coordinator to send it again"
            )
        _check_ca(self.ca, now)

    def _signed(self) -> tuple[int | bytes, ...]:
        return self.index, self.ca, self.roster.digest, *(a.encode() for a in self.addresses)

    def encode(self) -> bytes:
        """Return the admission as the JSON text of its file."""
        document = _AdmissionFile(
            index=self.index,
            addresses=self.addresses,
            ca=self.ca.decode("ascii"),
            roster=self.roster.encode().decode(),
            signature=self.signature,
        )
        return to_json(document)

    @classmethod
    def decode(cls, data: bytes) -> Admission:
        """Read what ``encode`` wrote; ``check`` looks at what it says.

        Raises:
            ConfigError: the bytes are no admission.
        """
        file = from_json(_AdmissionFile, data, "an admission")
        try:
            roster = FederationRoster.decode(file.roster.encode())
        except PeerProtocolError as error:
            raise ConfigError(f"the admission's roster: {error}") from error
        return cls(
            index=file.index,
            addresses=file.addresses,
            ca=file.ca.encode(),
            roster=roster,
            signature=file.signature,
        )


class _AdmissionFile(JsonPart):
    format: Literal["hospitium admission 1"] = "hospitium admission 1"
    index: int = Field(ge=1, le=LARGEST_INDEX)
    addresses: tuple[str, ...] = Field(min_length=1)
    ca: str
    roster: str  # as text, as it is signed and kept
    signature: Hex


def _check_ca(pem: bytes, now: float) -> None:
    """Demand exactly one CA certificate that is valid now."""
    today = datetime.fromtimestamp(now, UTC)
    try:
        (ca,) = x509.load_pem_x509_certificates(pem)
        is_ca = ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.ExtensionNotFound) as error:
        raise ConfigError("ca: expected one CA certificate in PEM, got something else") from error
    if not is_ca or not ca.not_valid_before_utc <= today < ca.not_valid_after_utc:
        raise ConfigError(
            f"ca: expected a CA certificate that is valid on {today:%Y-%m-%d}, got one from "
            f"{ca.not_valid_before_utc:%Y-%m-%d} to {ca.not_valid_after_utc:%Y-%m-%d}; is this "
            "machine's clock right?"
        )
