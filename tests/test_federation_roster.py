"""The federation's roster: who signs it, what a newer one may change, and its file."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.federation import FederationRoster, Member, changes
from hospitium_common.secagg.keys import SiteKeys

GOVERNANCE = Ed25519PrivateKey.generate()
COORDINATOR = Ed25519PrivateKey.generate()
KEYS = [SiteKeys.generate().public() for _ in range(6)]


def member(index: int, **changed: object) -> Member:
    fields = {
        "index": index, "name": f"site-{index}", "title": f"Hospital {index}",
        "keys": KEYS[index - 1], "node_key": f"node key {index}".encode(), "expires": 1000,
    }  # fmt: skip
    return Member(**{**fields, **changed})


def roster(*members: Member, version: int = 1) -> FederationRoster:
    return FederationRoster(
        name="north", version=version, members=members,
        coordinator=COORDINATOR.public_key().public_bytes_raw(),
        governance=GOVERNANCE.public_key().public_bytes_raw(),
    ).signed_by(GOVERNANCE)  # fmt: skip


def test_a_roster_survives_its_file_and_its_signature_still_holds():
    written = roster(member(1), member(2, revoked=True), member(5, title="Müller-Klinik"))
    read = FederationRoster.decode(written.encode())
    assert read == written
    read.check(GOVERNANCE.public_key().public_bytes_raw())


@given(at=st.integers(0, 3000), bit=st.integers(0, 7))
def test_a_roster_with_one_flipped_bit_is_refused_or_means_the_same(at, bit):
    written = roster(member(1), member(2))
    data = bytearray(written.encode())
    data[at % len(data)] ^= 1 << bit
    try:
        read = FederationRoster.decode(bytes(data))
        read.check(GOVERNANCE.public_key().public_bytes_raw())
    except PeerProtocolError:
        return
    assert read == written  # an upper-case hexadecimal digit, or white space


def test_a_roster_signed_by_somebody_else_is_refused():
    other = Ed25519PrivateKey.generate()
    forged = replace(roster(member(1)), governance=other.public_key().public_bytes_raw())
    with pytest.raises(PeerProtocolError, match="governance key that this site pinned"):
        forged.signed_by(other).check(GOVERNANCE.public_key().public_bytes_raw())


@pytest.mark.parametrize(
    "members",
    [
        (member(2), member(1)),
        (member(1), member(1)),
        (member(1), member(2, name="site-1")),
        (member(1), member(2, keys=KEYS[0])),
        (member(1), member(2, node_key=b"node key 1")),
        (replace(member(1), index=0),),
        (replace(member(1), index=256),),
    ],
)
def test_indices_names_and_keys_stand_in_a_roster_once(members):
    with pytest.raises(ConfigError, match="expected"):
        roster(*members)


BEFORE = (member(1), member(2), member(3, revoked=True))


@pytest.mark.parametrize(
    ("after", "field", "names", "needs_a_person"),
    [
        ((*BEFORE, member(4)), "added", ("site-4",), False),
        ((member(1), member(2, revoked=True), BEFORE[2]), "revoked", ("site-2",), False),
        ((member(1), member(2, expires=2000), BEFORE[2]), "extended", ("site-2",), False),
        ((member(1), member(2, keys=KEYS[5]), BEFORE[2]), "other_keys", ("site-2",), True),
        ((member(1), member(2, node_key=b"new"), BEFORE[2]), "other_keys", ("site-2",), True),
        ((member(1), BEFORE[2]), "other_keys", ("site-2",), True),
        ((member(1), member(2), member(3)), "other_keys", ("site-3",), True),
    ],
)
def test_only_another_key_needs_a_person(after, field, names, needs_a_person):
    found = changes(roster(*BEFORE), roster(*after, version=2))
    assert getattr(found, field) == names
    assert found.need_a_person is needs_a_person


def test_another_coordinator_needs_a_person():
    offered = replace(roster(*BEFORE, version=2), coordinator=bytes(32)).signed_by(GOVERNANCE)
    assert changes(roster(*BEFORE), offered).need_a_person


def test_a_study_takes_its_keys_from_the_roster_and_never_a_revoked_site():
    everybody = roster(*BEFORE)
    pairing = everybody.for_study(bytes(32), 4, (2, 1))
    assert dict(pairing.sites) == {1: KEYS[0], 2: KEYS[1]}
    assert pairing.epoch == 4
    with pytest.raises(PeerProtocolError, match=r"revoked ones: \['site-3'\]"):
        everybody.for_study(bytes(32), 4, (1, 2, 3))
    with pytest.raises(PeerProtocolError, match="expected site 9, got none"):
        everybody.for_study(bytes(32), 4, (1, 9))


def test_a_member_is_active_until_it_expires_or_is_revoked():
    assert member(1).is_active(999)
    assert not member(1).is_active(1000)
    assert not member(1, revoked=True).is_active(0)
