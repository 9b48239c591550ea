"""Hospitals and coordinator exchange files: the good way, and every bad one."""

from __future__ import annotations

import json
import ssl
import time
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from hospitium_client.enrolment import PinnedRosters, Verdict
from hospitium_client.joining import join, open_site, plan_joining
from hospitium_client.keys import load_node_key, load_public_keys
from hospitium_common.enrolment.admission import Admission
from hospitium_common.enrolment.fingerprint import fingerprint_of_member, same_fingerprint
from hospitium_common.enrolment.names import SITE_NAME, name_from_title
from hospitium_common.enrolment.request import EnrolmentRequest, make_request
from hospitium_common.errors import ConfigError
from hospitium_common.secagg.keys import PublicKeys, SiteKeys
from hospitium_common.study.signature import fingerprint
from hospitium_server.enrolment import (
    keys_ever_used,
    load_roster,
    next_version,
    plan_enrolment,
    store_roster,
)
from hospitium_server.keys import load_governance_key, load_key
from tests.enrolment_kit import YEAR_S, Federation, Governance, member, refuse, succeed


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    federation = Federation(tmp_path)
    federation.found()
    return federation


def no_passphrase() -> bytes:
    raise AssertionError("nobody should be asked")


def test_three_hospitals_join_by_one_file_in_each_direction(net):
    for name in ("st-anna", "ukm", "charite"):
        net.join(name)
    roster = load_roster(net.coordinator)
    assert [(m.index, m.name) for m in roster.members] == [
        (1, "st-anna"),
        (2, "ukm"),
        (3, "charite"),
    ]
    assert roster.version == 4
    assert all(abs(m.expires - time.time() - 2 * YEAR_S) < 60 for m in roster.members)
    for index, name in enumerate(("st-anna", "ukm", "charite"), start=1):
        site = open_site(net.site(name), no_passphrase)
        assert site.member.index == index
        assert site.keys.public() == roster.members[index - 1].keys
        assert site.roster.governance == roster.governance
        assert net.site(name).settings().coordinator.address == "localhost:9092"
        ssl.create_default_context(cafile=str(net.site(name).ca))
    shown = succeed(net.run_coordinator("roster"))
    assert shown.count("active") == 3


def test_no_file_that_travels_holds_a_secret(net):
    net.join("ukm")
    secret = open_site(net.site("ukm"), no_passphrase).keys
    scalar = load_node_key(net.site("ukm").node_key).private_numbers().private_value
    governance = load_governance_key(net.coordinator.governance_key)
    secrets = [
        secret.sign.private_bytes_raw(),
        secret.exchange.private_bytes_raw(),
        secret.encapsulate.private_bytes_raw(),
        scalar.to_bytes(48, "big"),
        governance.private_bytes_raw(),
    ]
    for name in ("ukm.request.json", "ukm.admission.json"):
        text = (net.folder / name).read_text()
        assert "PRIVATE" not in text
        assert not [one for one in secrets if one.hex() in text]


def test_both_administrators_see_the_same_fingerprint_and_are_asked(net):
    at_the_hospital = succeed(net.run_site("ukm", "init", "UKM"))
    request = EnrolmentRequest.decode((net.folder / "ukm.request.json").read_bytes())
    assert request.fingerprint in at_the_hospital
    said_no = net.run_coordinator("enroll", "ukm.request.json", typed="n\n")
    assert said_no.exit_code == 1
    assert request.fingerprint in said_no.output
    assert load_roster(net.coordinator).members == ()
    succeed(net.run_coordinator("enroll", "ukm.request.json", typed="y\n"))
    asked = net.run_site("ukm", "admit", "ukm.admission.json", typed="n\n")
    assert asked.exit_code == 1
    assert not PinnedRosters(net.site("ukm")).is_admitted
    succeed(net.run_site("ukm", "admit", "ukm.admission.json", typed="y\n"))


def test_a_fingerprint_that_was_read_by_telephone_is_compared(net):
    request = EnrolmentRequest.decode(net.request("ukm").read_bytes())
    other = "0" + request.fingerprint[1:] if request.fingerprint[0] != "0" else "1" * 39
    refused = net.run_coordinator("enroll", "ukm.request.json", "--fingerprint", other)
    assert "other keys than the hospital's" in refuse(refused)
    typed = request.fingerprint.upper().replace(" ", "-")
    succeed(net.run_coordinator("enroll", "ukm.request.json", "--fingerprint", typed))
    refused = net.run_site("ukm", "admit", "ukm.admission.json", "--fingerprint", other)
    assert "signed by somebody else" in refuse(refused)
    assert not PinnedRosters(net.site("ukm")).is_admitted


def test_a_request_needs_every_key_that_it_names(net):
    """Whoever changes one thing, or puts another key in, cannot sign for it."""
    net.request("ukm")
    honest = EnrolmentRequest.decode((net.folder / "ukm.request.json").read_bytes())
    honest.check()
    mallory, node = SiteKeys.generate(), ec.generate_private_key(ec.SECP384R1())
    hers = make_request("ukm", "UKM", mallory, node)
    mixed = PublicKeys(
        sign=honest.keys.sign,
        exchange=mallory.public().exchange,
        encapsulate=honest.keys.encapsulate,
    )
    for changed in (
        replace(honest, title="Another"),
        replace(honest, name="another"),
        replace(honest, keys=mallory.public()),
        replace(honest, keys=mixed),
        replace(honest, node_key=hers.node_key),
        replace(honest, node_key=hers.node_key, node_signature=hers.node_signature),
        replace(honest, node_signature=b""),
        replace(honest, signature=hers.signature),
        replace(honest, replaces=hers.keys.sign, old_signature=hers.signature),
    ):
        with pytest.raises(ConfigError, match="signed by every key"):
            changed.check()


def test_keys_that_are_none_are_refused():
    keys, node = SiteKeys.generate(), ec.generate_private_key(ec.SECP384R1())
    good = make_request("ukm", "UKM", keys, node)
    public = keys.public()
    weak = ec.generate_private_key(ec.SECP256R1())
    for changed, complaint in (
        (replace(good, keys=replace(public, exchange=bytes(32))), "X25519"),
        (replace(good, keys=replace(public, encapsulate=b"\xff" * 1184)), "ML-KEM-768"),
        (replace(good, keys=replace(public, encapsulate=b"short")), "ML-KEM-768"),
        (replace(good, node_key=make_request("x1", "X", keys, weak).node_key), "P-384"),
        (replace(good, node_key=good.node_key + b"\n"), "another form"),
        (replace(good, node_key=b"no key"), "P-384"),
        (replace(good, name="../../etc"), "name: expected"),
        (replace(good, title="\x1b[2Jgone"), "title: expected"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            changed.check()


DAMAGE = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "another format": lambda text: text.replace(" 1", " 2", 1),
    "an unknown key": lambda text: text.replace("{", '{"extra": 1,', 1),
    "no JSON": lambda text: "-----BEGIN CERTIFICATE-----",
    "a list": lambda text: "[]",
    "another type": lambda text: text.replace('"signature": "', '"signature": 7, "was": "', 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_changes_nothing(net, damage):
    request = net.request("ukm")
    whole = request.read_text()
    request.write_text(DAMAGE[damage](whole))
    message = refuse(net.run_coordinator("enroll", "ukm.request.json", "--yes"))
    assert message.startswith("ukm.request.json: expected an enrolment request")
    assert load_roster(net.coordinator).version == 1
    request.write_text(whole)
    admission = net.enroll("ukm")
    admission.write_text(DAMAGE[damage](admission.read_text()))
    message = refuse(net.run_site("ukm", "admit", "ukm.admission.json", "--yes"))
    assert message.startswith("ukm.admission.json: expected an admission")
    assert not net.site("ukm").ca.exists()


def test_nobody_is_enrolled_twice_and_no_name_or_key_is_given_twice(net):
    net.join("ukm")
    again = refuse(net.run_coordinator("enroll", "ukm.request.json", "--yes"))
    assert "it is enrolled already as site 1" in again
    assert "hospitium coordinator admission ukm" in again
    succeed(net.run_site("other", "init", "Other", "--name", "ukm"))
    taken = refuse(net.run_coordinator("enroll", "ukm.request.json", "--yes"))
    assert "site 1 has it under other keys" in taken
    copied = make_request(
        "copy", "Copy", open_site(net.site("ukm"), no_passphrase).keys,
        ec.generate_private_key(ec.SECP384R1()),
    )  # fmt: skip
    (net.folder / "copy.request.json").write_bytes(copied.encode())
    refused = refuse(net.run_coordinator("enroll", "copy.request.json", "--yes"))
    assert "got keys of ukm" in refused
    assert load_roster(net.coordinator).version == 2


def test_an_index_is_never_given_again(net):
    for name in ("st-anna", "ukm"):
        net.join(name)
    succeed(net.run_coordinator("revoke", "ukm", "--yes"))
    net.join("charite")
    assert [m.index for m in load_roster(net.coordinator).members] == [1, 2, 3]
    assert "was revoked already" in refuse(net.run_coordinator("revoke", "ukm", "--yes"))
    unknown = refuse(net.run_coordinator("revoke", "nobody", "--yes"))
    assert "enrolled: st-anna, ukm, charite" in unknown


def test_an_admission_is_for_one_hospital_only(net):
    net.join("st-anna")
    net.request("ukm")
    message = refuse(net.run_site("ukm", "admit", "st-anna.admission.json", "--yes"))
    assert "this is the admission of another hospital" in message


def test_an_admission_holds_only_as_governance_signed_it(net):
    net.join("st-anna")
    net.request("ukm")
    admission = Admission.decode(net.enroll("ukm").read_bytes())
    forger = Governance()
    forged = replace(
        admission,
        roster=replace(
            admission.roster, governance=forger.key.public_key().public_bytes_raw()
        ).signed_by(forger.key),
    )
    now = time.time()
    for changed in (
        replace(admission, addresses=("evil.example.org:9092",)),
        replace(admission, index=1),
        replace(admission, ca=admission.ca + admission.ca),
        replace(admission, roster=replace(admission.roster, coordinator=forger.coordinator)),
        replace(admission, signature=bytes(64)),
        forged,
    ):
        with pytest.raises(ConfigError, match="governance key"):
            plan_joining(net.site("ukm"), changed, now)
    governance = load_governance_key(net.coordinator.governance_key)
    for ca in (b"", admission.ca + admission.ca, b"-----BEGIN", _server_certificate(net)):
        with pytest.raises(ConfigError, match="CA certificate"):
            plan_joining(net.site("ukm"), replace(admission, ca=ca).signed_by(governance), now)
    with pytest.raises(ConfigError, match="clock"):
        plan_joining(net.site("ukm"), admission, now + 11 * YEAR_S)


def _server_certificate(net: Federation) -> bytes:
    return (net.coordinator.path / "tls/server.pem").read_bytes()


def test_a_whole_forged_admission_shows_another_fingerprint(net, tmp_path):
    """Mallory founds a federation of her own; everything holds but the fingerprint."""
    net.request("ukm")
    net.enroll("ukm")
    real = load_roster(net.coordinator)
    mallory = Federation(tmp_path / "mallory")
    mallory.folder.mkdir()
    mallory.found()
    succeed(mallory.run_coordinator("enroll", "ukm.request.json", "--yes", "--out", "forged.json"))
    heard = fingerprint(real.governance)
    refused = net.run_site("ukm", "admit", "forged.json", "--fingerprint", heard)
    assert "signed by somebody else" in refuse(refused)
    succeed(net.run_site("ukm", "admit", "ukm.admission.json", "--fingerprint", heard))


def test_a_hospital_rotates_its_keys_and_the_others_wait_for_a_person(net):
    for name in ("st-anna", "ukm"):
        net.join(name)
    assert net.relay("st-anna").verdict is Verdict.ACCEPTED
    old = open_site(net.site("ukm"), no_passphrase)
    old_node = net.site("ukm").node_key.read_bytes()
    succeed(net.run_site("ukm", "rotate"))
    first = (net.folder / "ukm.request.json").read_bytes()
    succeed(net.run_site("ukm", "rotate"))
    again = EnrolmentRequest.decode((net.folder / "ukm.request.json").read_bytes())
    assert again.keys == EnrolmentRequest.decode(first).keys
    assert open_site(net.site("ukm"), no_passphrase).keys.public() == old.keys.public()

    shown = succeed(net.run_coordinator("enroll", "ukm.request.json", "--yes"))
    assert "new keys, vouched for by the old ones" in shown
    assert fingerprint_of_member(old.member) in shown
    shown = succeed(net.run_site("ukm", "admit", "ukm.admission.json", "--yes"))
    assert "The new keys are in place" in shown
    new = open_site(net.site("ukm"), no_passphrase)
    assert new.member.index == old.member.index == 2
    assert new.keys.public() == again.keys != old.keys.public()
    assert net.site("ukm").node_key.read_bytes() != old_node
    assert not net.site("ukm").next_site_keys.exists()

    roster, others = load_roster(net.coordinator), PinnedRosters(net.site("st-anna"))
    assert net.relay("st-anna").verdict is Verdict.WAITING
    assert "waits" in succeed(net.run_site("st-anna", "roster"))
    said_no = net.run_site("st-anna", "accept-roster", typed="n\n")
    assert said_no.exit_code == 1
    assert fingerprint_of_member(old.member) in said_no.output
    assert fingerprint_of_member(new.member) in said_no.output
    assert others.pinned().version < roster.version
    succeed(net.run_site("st-anna", "accept-roster", typed="y\n"))
    assert others.pinned().digest == roster.digest
    assert "Nothing waits" in succeed(net.run_site("st-anna", "accept-roster"))


def test_an_interrupted_change_of_keys_is_finished_at_the_next_start(net, monkeypatch):
    net.join("ukm")
    site = net.site("ukm")
    succeed(net.run_site("ukm", "rotate"))
    net.enroll("ukm")
    asked = EnrolmentRequest.decode(site.request.read_bytes())
    joining = plan_joining(
        site, Admission.decode((net.folder / "ukm.admission.json").read_bytes()), time.time()
    )
    with monkeypatch.context() as power:
        power.setattr("hospitium_client.joining.put_new_keys_in_place", lambda home: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            join(site, joining)
    assert load_public_keys(site.site_keys) != asked.keys
    site.next_node_key.replace(site.node_key)  # and this far it came
    assert open_site(site, no_passphrase).keys.public() == asked.keys
    assert not site.next_site_keys.exists()


def test_old_keys_vouch_for_nothing_once_they_are_replaced_or_revoked(net):
    net.join("ukm")
    stolen = open_site(net.site("ukm"), no_passphrase).keys
    thief = SiteKeys.generate(), ec.generate_private_key(ec.SECP384R1())
    theirs = make_request("ukm", "UKM", *thief, stolen.sign)
    succeed(net.run_site("ukm", "rotate"))
    net.enroll("ukm")
    (net.folder / "theirs.json").write_bytes(theirs.encode())
    refused = refuse(net.run_coordinator("enroll", "theirs.json", "--yes"))
    assert "signed with this hospital's enrolled key" in refused
    back = make_request("ukm2", "UKM", stolen, ec.generate_private_key(ec.SECP384R1()))
    (net.folder / "back.json").write_bytes(back.encode())
    assert "got keys of ukm" in refuse(net.run_coordinator("enroll", "back.json", "--yes"))
    succeed(net.run_site("ukm", "admit", "ukm.admission.json", "--yes"))
    current = open_site(net.site("ukm"), no_passphrase).keys
    succeed(net.run_coordinator("revoke", "ukm", "--yes"))
    theirs = make_request("ukm", "UKM", *thief, current.sign)
    (net.folder / "theirs.json").write_bytes(theirs.encode())
    refused = refuse(net.run_coordinator("enroll", "theirs.json", "--yes"))
    assert "it was revoked: its old key vouches for nothing" in refused


def test_another_hospitals_key_does_not_vouch_for_a_rotation(net):
    for name in ("st-anna", "ukm"):
        net.join(name)
    rogue = open_site(net.site("st-anna"), no_passphrase).keys
    fresh = SiteKeys.generate(), ec.generate_private_key(ec.SECP384R1())
    request = make_request("ukm", "UKM", *fresh, rogue.sign)
    (net.folder / "rogue.json").write_bytes(request.encode())
    refused = refuse(net.run_coordinator("enroll", "rogue.json", "--yes"))
    assert "got one signed with another" in refused


def test_a_revoked_hospital_comes_back_under_new_keys_at_its_old_place(net):
    for name in ("st-anna", "ukm"):
        net.join(name)
    net.relay("st-anna")
    net.site("ukm").ledger.write_bytes(b"what was spent")
    succeed(net.run_coordinator("revoke", "ukm", "--yes"))
    assert net.relay("st-anna").changes.revoked == ("ukm",)
    revoked = refuse(net.run_coordinator("admission", "ukm"))
    assert "it is revoked" in revoked
    net.site("ukm").site_keys.unlink()
    succeed(net.run_site("ukm", "rotate", "--lost"))
    shown = succeed(net.run_coordinator("enroll", "ukm.request.json", "--yes"))
    assert "comes back under new keys" in shown
    succeed(net.run_site("ukm", "admit", "ukm.admission.json", "--yes"))
    assert open_site(net.site("ukm"), no_passphrase).member.index == 2
    assert net.site("ukm").ledger.read_bytes() == b"what was spent"
    assert net.relay("st-anna").verdict is Verdict.WAITING


def test_the_coordinator_changes_its_key_and_every_hospital_decides(net, monkeypatch):
    net.join("ukm")
    old = load_key(net.coordinator.coordinator_key).public_key().public_bytes_raw()
    with monkeypatch.context() as power:
        power.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
        assert net.run_coordinator("rotate", "--yes").exit_code == 1
    assert load_key(net.coordinator.coordinator_key).public_key().public_bytes_raw() == old
    shown = succeed(net.run_coordinator("rotate", "--yes"))
    roster = load_roster(net.coordinator)
    new = load_key(net.coordinator.coordinator_key).public_key().public_bytes_raw()
    assert roster.coordinator == new != old
    assert fingerprint(new) in shown
    succeed(net.run_coordinator("admission", "ukm"))
    shown = succeed(net.run_site("ukm", "admit", "ukm.admission.json", typed="y\n"))
    assert "the coordinator has another key" in shown
    assert fingerprint(old) in shown
    assert fingerprint(new) in shown
    assert PinnedRosters(net.site("ukm")).pinned().coordinator == new


def test_a_new_ca_reaches_hospitals_with_their_admission_again(net):
    net.join("ukm")
    old = net.site("ukm").ca.read_bytes()
    succeed(net.run_coordinator("renew", "--ca"))
    succeed(net.run_coordinator("admission", "ukm"))
    succeed(net.run_site("ukm", "admit", "ukm.admission.json", "--yes"))
    new = net.site("ukm").ca.read_bytes()
    assert new == (net.coordinator.path / "tls/ca.pem").read_bytes() != old


def test_a_hospital_may_take_its_own_rotation_from_the_network_too(net):
    net.join("ukm")
    succeed(net.run_site("ukm", "rotate"))
    net.enroll("ukm")
    assert net.relay("ukm").verdict is Verdict.WAITING
    succeed(net.run_site("ukm", "accept-roster", "--yes"))
    asked = EnrolmentRequest.decode(net.site("ukm").request.read_bytes())
    assert open_site(net.site("ukm"), no_passphrase).keys.public() == asked.keys


def test_a_roster_with_strange_keys_for_this_very_hospital_is_never_accepted(net):
    net.join("ukm")
    roster = load_roster(net.coordinator)
    stranger = replace(roster.members[0], keys=SiteKeys.generate().public())
    governance = load_governance_key(net.coordinator.governance_key)
    store_roster(net.coordinator, next_version(roster, (stranger,), governance))
    assert net.relay("ukm").verdict is Verdict.WAITING
    refused = refuse(net.run_site("ukm", "accept-roster", "--yes"))
    assert "Do not accept it; call the coordinator" in refused
    assert PinnedRosters(net.site("ukm")).pinned().digest == roster.digest


def test_an_interrupted_change_of_the_coordinators_key_is_mended(net, monkeypatch):
    with monkeypatch.context() as power:
        power.setattr("hospitium_server.founding.store_roster", _store_then_lose_power)
        assert net.run_coordinator("rotate", "--yes").exit_code == 1
    assert load_roster(net.coordinator).version == 2
    succeed(net.run_coordinator("rotate", "--yes"))
    roster, key = load_roster(net.coordinator), load_key(net.coordinator.coordinator_key)
    assert roster.version == 2
    assert roster.coordinator == key.public_key().public_bytes_raw()


def _store_then_lose_power(home, roster):
    store_roster(home, roster)
    raise ZeroDivisionError


def test_an_enrolment_expires_on_both_sides(net):
    net.join("ukm")
    net.request("st-anna")
    admission = Admission.decode(net.enroll("st-anna").read_bytes())
    later = time.time() + 2 * YEAR_S + 60
    with pytest.raises(ConfigError, match="it has expired"):
        plan_joining(net.site("st-anna"), admission, later)
    site = open_site(net.site("ukm"), no_passphrase)
    assert site.member.is_active(time.time())
    assert not site.member.is_active(later)
    roster = load_roster(net.coordinator)
    fresh = SiteKeys.generate(), ec.generate_private_key(ec.SECP384R1())
    used = keys_ever_used(net.coordinator)
    vouched = make_request("ukm", "UKM", *fresh, site.keys.sign)
    plan = plan_enrolment(roster, vouched, used, expires=int(later) + YEAR_S, now=later)
    assert (plan.kind.name, plan.after.index) == ("RETURN", 1)
    unknown = make_request("ukm", "UKM", *fresh)
    plan = plan_enrolment(roster, unknown, used, expires=int(later) + YEAR_S, now=later)
    assert (plan.kind.name, plan.after.index) == ("RETURN", 1)


def test_an_admission_cannot_bring_back_an_older_roster(net):
    net.join("ukm")
    old = (net.folder / "ukm.admission.json").read_bytes()
    net.join("st-anna")
    succeed(net.run_coordinator("admission", "ukm"))
    succeed(net.run_site("ukm", "admit", "ukm.admission.json", "--yes"))
    (net.folder / "old.json").write_bytes(old)
    refused = refuse(net.run_site("ukm", "admit", "old.json", "--yes"))
    assert "expected roster version 3 or newer, got 2" in refused


def test_the_governance_key_may_live_elsewhere_and_must_be_the_right_one(net, tmp_path):
    net.request("ukm")
    elsewhere = tmp_path / "usb" / "governance.key"
    elsewhere.parent.mkdir()
    net.coordinator.governance_key.rename(elsewhere)
    missing = refuse(net.run_coordinator("enroll", "ukm.request.json", "--yes"))
    assert "name it: --governance-key" in missing
    wrong = tmp_path / "wrong.key"
    wrong.write_bytes(Ed25519PrivateKey.generate().private_bytes_raw())
    wrong.chmod(0o600)
    options = ("--yes", "--governance-key", str(wrong))
    assert "got another" in refuse(net.run_coordinator("enroll", "ukm.request.json", *options))
    options = ("--yes", "--governance-key", str(elsewhere))
    succeed(net.run_coordinator("enroll", "ukm.request.json", *options))
    assert load_roster(net.coordinator).version == 2


def test_a_roster_file_that_somebody_changed_is_refused(net):
    net.join("ukm")
    text = json.loads(net.coordinator.roster.read_text())
    text["members"][0]["revoked"] = True
    net.coordinator.roster.write_text(json.dumps(text))
    assert "expected the signature" in refuse(net.run_coordinator("roster"))
    forger = Governance()
    net.coordinator.roster.write_bytes(forger.roster(member(1)).encode())
    assert "expected the signature" in refuse(net.run_coordinator("roster"))
    net.coordinator.roster.unlink()
    assert "restore it from" in refuse(net.run_coordinator("roster"))


def test_the_roster_is_on_disk_before_an_admission_is_signed(net, monkeypatch):
    """One version number never names two rosters, whenever the power fails."""
    net.request("ukm")
    with monkeypatch.context() as power:
        power.setattr("hospitium_server.enrolment_cli.write_admission", lambda *_: 1 / 0)
        assert net.run_coordinator("enroll", "ukm.request.json", "--yes").exit_code == 1
    assert load_roster(net.coordinator).version == 2
    succeed(net.run_coordinator("admission", "ukm"))
    succeed(net.run_site("ukm", "admit", "ukm.admission.json", "--yes"))


def test_init_overwrites_nothing_and_leaves_nothing_behind_when_it_fails(net, monkeypatch):
    keys = net.coordinator.coordinator_key.read_bytes()
    assert "nothing was overwritten" in refuse(net.run_coordinator("init", "x", "--host", "y1"))
    assert net.coordinator.coordinator_key.read_bytes() == keys
    net.request("ukm")
    assert "nothing was overwritten" in refuse(net.run_site("ukm", "init", "UKM"))
    for module, run in (
        (
            "hospitium_server.founding",
            lambda: Federation(net.folder / "b").run_coordinator("init", "n", "--host", "h1"),
        ),
        ("hospitium_client.joining", lambda: net.run_site("st-anna", "init", "St. Anna")),
    ):
        with monkeypatch.context() as disk:
            disk.setattr(f"{module}.write_durably", lambda *_: 1 / 0)
            assert isinstance(run().exception, ZeroDivisionError)
        succeed(run())


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("St. Anna", "st-anna"),
        ("Universitätsklinikum Münster", "universitatsklinikum-munster"),
        ("Groß-Gerau", "gross-gerau"),
        ("Hôpital  Édouard-Herriot (Lyon)", "hopital-edouard-herriot-lyon"),
    ],
)
def test_a_short_name_is_made_of_a_title(title, name):
    assert name_from_title(title) == name


@given(st.text(max_size=100))
def test_every_title_makes_a_valid_name_or_asks_for_one(title):
    try:
        name = name_from_title(title)
    except ConfigError as error:
        assert "--name" in str(error)
    else:
        assert SITE_NAME.fullmatch(name)


@given(st.binary(max_size=400))
def test_bytes_that_are_no_request_or_admission_are_refused_in_our_words(data):
    for kind in (EnrolmentRequest, Admission):
        with pytest.raises(ConfigError):
            kind.decode(data)


KEYS, NODE = SiteKeys.generate(), ec.generate_private_key(ec.SECP384R1())
REQUEST = make_request("ukm", "UKM", KEYS, NODE).encode()
PRINTABLE = st.text(min_size=1, max_size=60).filter(lambda t: t.isprintable() and t == t.strip())


@settings(max_examples=25, deadline=None)
@given(st.from_regex(SITE_NAME, fullmatch=True), PRINTABLE)
def test_a_request_is_read_as_it_was_written(name, title):
    request = make_request(name, title, KEYS, NODE)
    read = EnrolmentRequest.decode(request.encode())
    assert read == request
    read.check()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_single_changed_character_of_a_request_goes_unnoticed(data):
    at = data.draw(st.integers(0, len(REQUEST) - 1))
    changed = data.draw(st.integers(32, 126).filter(lambda c: c != REQUEST[at]))
    damaged = REQUEST[:at] + bytes([changed]) + REQUEST[at + 1 :]
    try:
        read = EnrolmentRequest.decode(damaged)
        read.check()
    except ConfigError:
        return
    assert read == EnrolmentRequest.decode(REQUEST)  # a space, or the case of a hexadecimal digit


def test_fingerprints_are_compared_as_people_type_them():
    shown = "0123 4567 89ab cdef 0123 4567 89ab cdef"
    assert same_fingerprint(shown, "0123-4567-89AB-CDEF-0123-4567-89ab-cdef\n")
    assert not same_fingerprint(shown, shown[:-1])
    assert not same_fingerprint("", "")
    assert fingerprint_of_member(member(1)) != fingerprint_of_member(member(1))
