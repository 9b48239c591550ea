"""Shares sealed for one peer, and the table of pair seeds sealed under its dealer's key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hospitium_common.codec import encode_parts
from hospitium_common.errors import PeerProtocolError
from hospitium_common.secagg.context import SHARE_BYTES
from hospitium_common.secagg.hashing import Label, derive
from hospitium_common.secagg.masks import keystream

if TYPE_CHECKING:
    from collections.abc import Iterable

NONCE_BYTES = 12


def seal(
    root: bytes, context: bytes, pair: tuple[int, int], commitments: Iterable[bytes],
    share: bytes, nonce: bytes,
) -> bytes:  # fmt: skip
    """Seal a share from dealer to holder (``pair``), bound to the dealer's commitments.

    AES-256-GCM under a key that is used once; the fresh nonce helps should a machine be restored.
    """
    key = derive(root, Label.SHARE, context, *pair)
    return nonce + AESGCM(key).encrypt(nonce, share, encode_parts(context, *pair, *commitments))


def open_share(
    root: bytes, context: bytes, pair: tuple[int, int], commitments: Iterable[bytes],
    sealed: bytes,
) -> bytes:  # fmt: skip
    """Open what ``seal`` made.

    Raises:
        PeerProtocolError: it does not open, or is no share; the dealer is to blame.
    """
    key, dealer = derive(root, Label.SHARE, context, *pair), pair[0]
    bound = encode_parts(context, *pair, *commitments)
    try:
        share = AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound)
    except (InvalidTag, ValueError) as error:
        raise PeerProtocolError(f"the share of site {dealer} does not open", dealer) from error
    if len(share) != 2 * SHARE_BYTES:
        raise PeerProtocolError(f"the share of site {dealer} has a wrong length", dealer)
    return share


def cipher_table(table_key: bytes, context: bytes, table: bytes) -> bytes:
    """Seal or open the table of pair seeds; the key is committed to, so no tag is needed."""
    stream = keystream(derive(table_key, Label.SEED_TABLE, context), len(table))
    return bytes(np.frombuffer(stream, np.uint8) ^ np.frombuffer(table, np.uint8))
