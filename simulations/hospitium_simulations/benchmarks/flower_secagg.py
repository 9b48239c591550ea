"""Flower's SecAgg+ at a given size, in its own functions: a site's upload, and the unmasking.

Flower's default quantisation (22 bits, modulus 2^32) and a complete graph, as for ours. Sealed
shares and reconstructed seeds have their real lengths, and one set of them stands for all sites:
dealing shares to hundreds of sites takes Flower minutes and is not what is measured.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
)
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

CLIPPING, TARGET, MODULUS, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0

logging.getLogger("flwr").setLevel(logging.ERROR)


def upload(sites: int, update: NDArray[np.float32]) -> Callable[[], int]:
    """Return site 1's step from its update to its masked message; the step returns its bytes."""
    me, peer = generate_key_pairs(), generate_key_pairs()
    public = public_key_to_bytes(peer[1])
    state = SecAggPlusState()
    state.nid, state.threshold = 1, sites * 2 // 3 + 1
    state.clipping_range, state.target_range = CLIPPING, TARGET
    state.mod_range, state.max_weight = MODULUS, MAX_WEIGHT
    state.sk1 = private_key_to_bytes(me[0])
    state.rd_seed = os.urandom(32)
    state.rd_seed_share_dict, state.sk1_share_dict = {}, {}
    shared = generate_shared_key(me[0], peer[1])
    others = range(2, sites + 1)
    state.ss2_dict = dict.fromkeys(others, shared)
    state.public_keys_dict = dict.fromkeys(others, (public, public))
    seed_share, key_share = bytes(4 + 48), bytes(4 + len(state.sk1) // 16 * 16 + 16)
    configs: Any = {
        Key.SOURCE_LIST: list(others),
        Key.CIPHERTEXT_LIST: [
            encrypt(shared, share_keys_plaintext_concat(i, 1, seed_share, key_share))
            for i in others
        ],
    }
    parameters = ndarrays_to_parameters([update])

    def step() -> int:
        sent: Any = _collect_masked_vectors(state, configs, 500, parameters)
        return sum(len(one) for one in sent[Key.MASKED_PARAMETERS])

    return step


def unmasking(sites: int, dropped: int, size: int) -> Callable[[], object]:
    """Return the server's work after the shares came in, as its ``unmask_stage`` does it."""
    threshold, survivors = sites * 2 // 3 + 1, sites - dropped
    private, public = generate_key_pairs()
    key, public_bytes = private_key_to_bytes(private), public_key_to_bytes(public)
    seed_shares = create_shares(os.urandom(32), threshold, sites)[:survivors]
    key_shares = create_shares(key, threshold, sites)[:survivors]
    vector = [np.zeros(1, np.int64), np.zeros(size, np.int64)]
    shapes: list[tuple[int, ...]] = [one.shape for one in vector]

    def step() -> object:
        total = vector
        for one in range(sites):
            if one < survivors:
                mask = pseudo_rand_gen(combine_shares(seed_shares), MODULUS, shapes)
                total = parameters_subtraction(total, mask)
                continue
            secret = combine_shares(key_shares)
            for other in range(sites):
                if other != one:
                    shared = generate_shared_key(
                        bytes_to_private_key(secret), bytes_to_public_key(public_bytes)
                    )
                    mask = pseudo_rand_gen(shared, MODULUS, shapes)
                    add = parameters_addition if one > other else parameters_subtraction
                    total = add(total, mask)
        _, real = factor_extract(parameters_mod(total, MODULUS))
        return dequantize(real, CLIPPING, TARGET)

    return step
