"""Byte for byte the same as the protocol's one-file reference, where that is at hand."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from hospitium_client.protection.masking import ready
from hospitium_common.codec import encode_parts
from hospitium_common.messages import Purpose
from hospitium_common.secagg import shamir
from hospitium_common.secagg.context import round_context, seed_commitment, share_commitment
from hospitium_common.secagg.hashing import bitmap, derive, payload_digest, tagged_hash
from hospitium_common.secagg.masks import Mask, add_masks
from hospitium_common.secagg.packing import pack_words, unpack_words
from hospitium_common.secagg.policy import SecAggPolicy
from hospitium_server.unmasking import signed_task
from hospitium_simulations.whole_round import enrol
from tests.secagg_kit import QUANTISER, STUDY, policy_of

DATA = Path(os.environ.get("HOSPITIUM_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    path = DATA.parent / "design" / "protocol_reference.py"
    if not path.exists():
        pytest.skip(f"the reference is not at {path}")
    spec = importlib.util.spec_from_file_location("protocol_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_encodings_hashes_and_keys_agree(reference: ModuleType) -> None:
    parts = (b"", 7, b"abc", 2**64 - 1)
    assert encode_parts(*parts) == reference.enc(*parts)
    assert tagged_hash(b"x", *parts) == reference.H(b"x", *parts)
    assert payload_digest(b"x", b"body", b"tail") == reference.Hbig(b"x", b"body", b"tail")
    assert derive(bytes(32), b"x", *parts) == reference.kdf(bytes(32), b"x", *parts)
    assert bitmap((1, 9, 255)) == reference.bitmap((1, 9, 255))


def test_policy_and_commitments_agree(reference: ModuleType) -> None:
    numbers = SimpleNamespace(n_max=10, m_min=5, weight_cap=100, tail_len=2)
    ours = SecAggPolicy(study=bytes(32), ring_bits=24, **vars(numbers))
    theirs = reference.Policy(study=bytes(32), ring_bits=24, **vars(numbers))
    assert ours.digest == theirs.digest()
    assert [ours.floor(n) for n in range(3, 201)] == [theirs.floor(n) for n in range(3, 201)]
    context, share = bytes(range(32)), bytes(range(64))
    assert seed_commitment(context, 5, 2, share[:32]) == reference.seed_com(
        context, 5, 2, share[:32]
    )
    assert share_commitment(context, 5, 2, share) == reference.share_com(context, 5, 2, share)


@pytest.mark.parametrize("threads", [1, 2])
def test_masks_agree_whatever_the_number_of_threads(reference: ModuleType, threads: int) -> None:
    ours, theirs = np.zeros(400_003, np.uint16), np.zeros(400_003, np.uint16)
    add_masks(ours, [Mask(bytes(32), 1), Mask(bytes([1] * 32), -1)], threads)
    reference.add_masks(theirs, [(bytes(32), 1), (bytes([1] * 32), -1)])
    assert np.array_equal(ours, theirs)


def test_the_reference_restores_our_shares(reference: ModuleType) -> None:
    secret = bytes(range(64))
    shares = shamir.split(secret, 3, (1, 7, 100, 255), bytes(range(128)))
    some = {holder: shares[holder] for holder in (7, 100, 255)}
    assert reference.shamir_combine(some) == shamir.combine(some) == secret


def test_words_of_24_bits_are_packed_alike(reference: ModuleType) -> None:
    words = np.arange(0, 1 << 24, 99_991, dtype=np.uint32)
    packed = pack_words(words, 24)
    assert packed == reference.pack(words, 24)
    assert np.array_equal(unpack_words(packed, 24, len(words)), words)


def test_contexts_and_ready_heads_agree(reference: ModuleType) -> None:
    federation, policy = enrol(STUDY, range(1, 5)), policy_of()
    ours = federation.roster
    theirs = reference.Roster(
        STUDY, 1, ours.coordinator, {i: ours.sites[i].parts() for i in ours.sites}
    )
    assert ours.digest == theirs.hash
    pinned = reference.Policy(
        study=STUDY, ring_bits=16, n_max=12, m_min=3, weight_cap=100, tail_len=3
    )
    assert policy.digest == pinned.digest()
    quant = reference.Quant(tuple(zip(QUANTISER.lengths, QUANTISER.bounds, strict=True)))
    assert QUANTISER.digest == quant.digest()
    task = signed_task(
        federation.coordinator, ours, policy, purpose=Purpose.TRAIN, round_number=3, attempt=2,
        invited=[1, 2, 4], previous_result=bytes(64), quantiser=QUANTISER, model=b"", public=b"",
    )  # fmt: skip
    their_task = reference.Task(3, 2, (1, 2, 4), task.model_digest, bytes(64), quant)
    context = round_context(task, ours, policy)
    assert context == their_task.ctx(theirs, pinned)
    answer = ready(federation.parties[1], federation.states[1], policy, task, federation.entropy)[1]
    head = answer.head
    assert reference.verify(ours.sites[1].sign, answer.signature, b"hsa1/ready", *head.parts())
    assert policy.threshold(10) == pinned.threshold(10) == 7
