"""Fingerprints of hospitals: what two people read to each other on the telephone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hospitium_common.secagg.hashing import Label, tagged_hash
from hospitium_common.study.signature import fingerprint

if TYPE_CHECKING:
    from hospitium_common.federation import Member
    from hospitium_common.secagg.keys import PublicKeys

DIGITS = 32


def fingerprint_of_site(name: str, keys: PublicKeys, node_key: bytes) -> str:
    """Return 128 bits in groups of four digits that stand for a hospital's name and all its keys.

    **Guarantees:** to put other keys under the same fingerprint takes 2^128 hashes (a second
    preimage of truncated SHA-256).
    """
    return fingerprint(tagged_hash(Label.FINGERPRINT, name.encode(), *keys.parts(), node_key))


def fingerprint_of_member(member: Member) -> str:
    """Return the fingerprint of an enrolled hospital."""
    return fingerprint_of_site(member.name, member.keys, member.node_key)


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints are the same, however they were typed."""
    plain = [re.sub(r"[\s:.-]", "", text).lower() for text in (one, other)]
    return plain[0] == plain[1] and len(plain[0]) == DIGITS
