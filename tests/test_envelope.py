"""Signed envelopes: who sent this, and does this answer belong to that request?"""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from hospitium_common.envelope import (
    Answer,
    Request,
    open_answer,
    open_request,
    seal_answer,
    seal_request,
)
from hospitium_common.errors import PeerProtocolError
from hospitium_common.federation import FederationRoster, Member
from hospitium_common.secagg.keys import SiteKeys

COORDINATOR = Ed25519PrivateKey.generate()
PUBLIC = COORDINATOR.public_key().public_bytes_raw()
SITES = {index: SiteKeys.generate() for index in (1, 2, 3)}
ROSTER = FederationRoster(
    name="north", version=1, coordinator=PUBLIC, governance=bytes(32),
    members=tuple(
        Member(index=i, name=f"site-{i}", title="A hospital", keys=keys.public(),
               node_key=bytes([i]), expires=2**40, revoked=i == 3)
        for i, keys in SITES.items()
    ),
)  # fmt: skip
REQUEST = Request(study=bytes(32), nonce=bytes(16), payload=b"please train")


@given(payload=st.binary(max_size=200), study=st.binary(min_size=32, max_size=32))
def test_what_the_coordinator_signed_arrives(payload, study):
    sent = Request(study=study, nonce=bytes(range(16)), payload=payload)
    received = open_request(seal_request(sent, COORDINATOR), PUBLIC)
    assert (received.study, bytes(received.payload)) == (study, payload)
    assert received.digest == sent.digest


@given(at=st.integers(0), bit=st.integers(0, 7))
def test_a_request_with_one_flipped_bit_is_refused(at, bit):
    data = bytearray(seal_request(REQUEST, COORDINATOR))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(PeerProtocolError):
        open_request(bytes(data), PUBLIC)


def test_a_request_signed_by_a_site_is_refused():
    with pytest.raises(PeerProtocolError, match="pinned coordinator signed"):
        open_request(seal_request(REQUEST, SITES[1].sign), PUBLIC)


def test_an_answer_is_the_one_of_the_site_that_signed_it():
    sealed = seal_answer(Answer(site=2, payload=b"done"), REQUEST.digest, SITES[2].sign)
    answer = open_answer(sealed, ROSTER, REQUEST.digest)
    assert (answer.site, bytes(answer.payload)) == (2, b"done")


@pytest.mark.parametrize(
    ("named", "signer"),
    [(1, 2), (3, 3), (9, 1)],
    ids=["in another site's name", "by a revoked site", "by a site that is not enrolled"],
)
def test_an_answer_is_refused(named, signer):
    sealed = seal_answer(Answer(site=named, payload=b"x"), REQUEST.digest, SITES[signer].sign)
    with pytest.raises(PeerProtocolError):
        open_answer(sealed, ROSTER, REQUEST.digest)


def test_an_old_answer_does_not_fit_a_new_request():
    sealed = seal_answer(Answer(site=2, payload=b"done"), REQUEST.digest, SITES[2].sign)
    again = Request(study=REQUEST.study, nonce=bytes(range(16)), payload=REQUEST.payload)
    with pytest.raises(PeerProtocolError, match="for this request"):
        open_answer(sealed, ROSTER, again.digest)
