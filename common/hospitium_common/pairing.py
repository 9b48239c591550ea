"""Pairwise roots: hybrid X25519 + ML-KEM-768 (RFC 9180, FIPS 203), once per key epoch.

A root is safe if either half holds, so traffic recorded today stays safe against a later quantum
computer. Roots are ratcheted once per round number and the old ones forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hospitium_common.codec import encode_parts
from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import PairOffer
from hospitium_common.secagg.hashing import SUITE, Label, derive, is_signed_by, sign, tagged_hash

if TYPE_CHECKING:
    from hospitium_common.roster import Roster
    from hospitium_common.secagg.keys import SiteKeys

_HPKE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)


def offer(
    keys: SiteKeys, roster: Roster, sender: int, receiver: int, secret: bytes
) -> tuple[bytes, PairOffer]:
    """Send 32 fresh bytes to a site with a higher index; return the root and the offer."""
    public = roster.sites[receiver]
    sealed_to = hpke.MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(public.encapsulate),
        X25519PublicKey.from_public_bytes(public.exchange),
    )
    sealed = _HPKE.encrypt(secret, sealed_to, info=_info(roster, sender, receiver))
    signature = sign(keys.sign, Label.PAIR_SIGNATURE, roster.digest, sender, receiver, sealed)
    root = _root(keys, roster, (sender, receiver), receiver, secret, sealed)
    return root, PairOffer(sender=sender, receiver=receiver, sealed=sealed, signature=signature)


def accept(keys: SiteKeys, roster: Roster, site: int, given: PairOffer) -> bytes:
    """Open an offer from a site with a lower index; return the root.

    Raises:
        PeerProtocolError: not for this site, not signed by its sender, or it does not open.
    """
    sender = given.sender
    if given.receiver != site or not sender < site or sender not in roster.sites:
        raise PeerProtocolError("expected a pair offer for this site, got another", blame=0)
    if not is_signed_by(
        roster.sites[sender].sign, given.signature, Label.PAIR_SIGNATURE,
        roster.digest, sender, site, given.sealed,
    ):  # fmt: skip
        raise PeerProtocolError(
            f"site {sender}: its pair offer is not signed by it: forged on the way, or made "
            "under another roster",
            blame=sender,
        )
    opened_by = hpke.MLKEM768X25519PrivateKey(keys.encapsulate, keys.exchange)
    try:
        secret = _HPKE.decrypt(given.sealed, opened_by, info=_info(roster, sender, site))
    except (InvalidTag, ValueError) as error:
        raise PeerProtocolError(
            f"site {sender}: its pair offer does not open", blame=sender
        ) from error
    return _root(keys, roster, (sender, site), sender, secret, given.sealed)


def ratchet(root: bytes) -> bytes:
    """One step forward; there is none back."""
    return derive(root, Label.RATCHET)


def _info(roster: Roster, sender: int, receiver: int) -> bytes:
    return encode_parts(Label.PAIR, roster.study, roster.digest, roster.epoch, sender, receiver)


def _root(
    keys: SiteKeys, roster: Roster, pair: tuple[int, int], peer: int, secret: bytes, sealed: bytes
) -> bytes:
    try:
        shared = keys.exchange.exchange(
            X25519PublicKey.from_public_bytes(roster.sites[peer].exchange)
        )
    except ValueError as error:  # a point of low order: RFC 7748, section 6.1
        raise PeerProtocolError(f"site {peer}: its X25519 key is not a key", blame=peer) from error
    info = encode_parts(
        Label.PAIR_ROOT, SUITE, roster.study, roster.epoch, *pair,
        tagged_hash(Label.PAIR_CIPHERTEXT, sealed),
    )  # fmt: skip
    return HKDF(hashes.SHA256(), 32, roster.digest, info).derive(encode_parts(shared, secret))
