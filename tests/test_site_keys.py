"""A hospital's keys on its own disk: locked, readable by one user, never silently another's."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from hospitium_client import keys as site_keys
from hospitium_client.keys import (
    find_passphrase,
    is_locked,
    load_node_key,
    load_public_keys,
    load_site_keys,
    make_node_key,
    read_passphrase,
    store_site_keys,
)
from hospitium_common.enrolment.public_keys import load_node_public, node_public_pem
from hospitium_common.errors import ConfigError
from hospitium_common.secagg.keys import SiteKeys
from tests.enrolment_kit import Federation, refuse, succeed

KEYS = SiteKeys.generate()
WORDS = b"correct horse battery staple"


@pytest.fixture(autouse=True)
def quick_scrypt(monkeypatch):
    """The same lock with fewer turns; the shipped number is checked below."""
    monkeypatch.setattr(site_keys, "SCRYPT_N", 2**14)


def nobody() -> bytes:
    raise AssertionError("nobody should be asked")


def test_keys_come_back_as_they_were_stored(tmp_path):
    for name, passphrase in (("plain", None), ("locked", WORDS)):
        path = tmp_path / "keys" / name
        store_site_keys(path, KEYS, passphrase)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert load_public_keys(path) == KEYS.public()
        assert is_locked(path) == (passphrase is not None)
        loaded = load_site_keys(path, nobody if passphrase is None else lambda: WORDS)
        assert loaded.encode() == KEYS.encode()


def test_a_locked_file_reveals_public_keys_only(tmp_path):
    store_site_keys(tmp_path / "k", KEYS, WORDS)
    text = (tmp_path / "k").read_text()
    for secret in (KEYS.sign, KEYS.exchange, KEYS.encapsulate):
        assert secret.private_bytes_raw().hex() not in text
    store_site_keys(tmp_path / "again", KEYS, WORDS)
    first, again = json.loads(text), json.loads((tmp_path / "again").read_text())
    assert first["private"] != again["private"]
    assert first["lock"]["salt"] != again["lock"]["salt"]


def test_the_shipped_lock_costs_128_mebibytes_a_guess(monkeypatch, tmp_path):
    monkeypatch.undo()
    store_site_keys(tmp_path / "k", KEYS, WORDS)
    lock = json.loads((tmp_path / "k").read_text())["lock"]
    assert 128 * lock["n"] * lock["r"] == 128 * 2**20
    assert load_site_keys(tmp_path / "k", lambda: WORDS).public() == KEYS.public()


def test_a_wrong_passphrase_opens_nothing_and_changes_nothing(tmp_path):
    path = tmp_path / "k"
    store_site_keys(path, KEYS, WORDS)
    before = path.read_bytes()
    for wrong in (b"", b"correct horse battery stapler", WORDS + b"\n"):
        with pytest.raises(ConfigError, match="expected the passphrase of this file"):
            load_site_keys(path, lambda wrong=wrong: wrong)
    assert path.read_bytes() == before


def test_a_short_passphrase_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="at least 12 characters"):
        store_site_keys(tmp_path / "k", KEYS, b"hospital")
    assert not (tmp_path / "k").exists()


def test_a_passphrase_of_bytes_that_scrypt_does_not_tell_apart_is_refused(tmp_path):
    """HMAC fills keys up with zeros, so that these would open with an empty passphrase."""
    with pytest.raises(ConfigError, match="zero bytes"):
        store_site_keys(tmp_path / "k", KEYS, bytes(20))


def test_keys_are_never_overwritten(tmp_path):
    store_site_keys(tmp_path / "k", KEYS, None)
    with pytest.raises(ConfigError, match="nothing was overwritten"):
        store_site_keys(tmp_path / "k", SiteKeys.generate(), None)
    with pytest.raises(ConfigError, match="nothing was overwritten"):
        make_node_key(tmp_path / "k")
    assert load_public_keys(tmp_path / "k") == KEYS.public()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o606, 0o604])
def test_keys_that_others_can_get_at_are_refused(tmp_path, mode):
    path = tmp_path / "k"
    store_site_keys(path, KEYS, None)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"expected mode 0600, got {mode:04o}.*chmod 600"):
        load_site_keys(path, nobody)


def test_the_nodes_group_may_read_its_key_but_nobody_else(tmp_path):
    path = tmp_path / "node.key"
    key = make_node_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    assert load_node_key(path).public_key() == key.public_key()
    for mode in (0o644, 0o660):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="expected mode 0640"):
            load_node_key(path)


def damages():
    yield "empty", lambda fields: ""
    yield "truncated", lambda fields: json.dumps(fields)[:900]
    yield "no JSON", lambda fields: "keys"
    yield "no hexadecimal", lambda fields: json.dumps({**fields, "private": "xyz"})
    yield "short", lambda fields: json.dumps({**fields, "private": fields["private"][:-2]})
    yield "long", lambda fields: json.dumps({**fields, "private": fields["private"] + "00"})
    yield "an unknown key", lambda fields: json.dumps({**fields, "extra": 1})
    yield "another format", lambda fields: json.dumps({**fields, "format": "other"})


@pytest.mark.parametrize(("name", "damage"), list(damages()))
@pytest.mark.parametrize("passphrase", [None, WORDS])
def test_a_damaged_file_is_named_and_says_what_to_do(tmp_path, name, damage, passphrase):
    path = tmp_path / "k"
    store_site_keys(path, KEYS, passphrase)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ConfigError) as caught:
        load_site_keys(path, lambda: WORDS)
    assert str(path) in str(caught.value)
    assert KEYS.encode().hex()[8:40] not in str(caught.value)


@pytest.mark.parametrize("passphrase", [None, WORDS])
def test_replaced_keys_are_noticed(tmp_path, passphrase):
    other = SiteKeys.generate()
    store_site_keys(tmp_path / "k", KEYS, passphrase)
    store_site_keys(tmp_path / "other", other, passphrase)
    mine = json.loads((tmp_path / "k").read_text())
    theirs = json.loads((tmp_path / "other").read_text())
    (tmp_path / "k").write_text(json.dumps({**mine, "public": theirs["public"]}))
    with pytest.raises(ConfigError, match=r"passphrase of this file|belong to the public ones"):
        load_site_keys(tmp_path / "k", lambda: WORDS)


def test_a_weakened_lock_is_noticed(tmp_path):
    store_site_keys(tmp_path / "k", KEYS, WORDS)
    fields = json.loads((tmp_path / "k").read_text())
    for change in ({"n": 2**15}, {"n": 2**30}, {"n": 2}, {"nonce": "00" * 12}, {"salt": ""}):
        (tmp_path / "k").write_text(json.dumps({**fields, "lock": {**fields["lock"], **change}}))
        with pytest.raises(ConfigError):
            load_site_keys(tmp_path / "k", lambda: WORDS)


SECRETS = st.text("abc ä", min_size=12, max_size=16).map(str.encode)


@settings(max_examples=8, deadline=None)
@given(SECRETS, SECRETS)
def test_only_the_very_passphrase_opens(tmp_path_factory, passphrase, other):
    path = tmp_path_factory.mktemp("keys") / "k"
    site_keys.SCRYPT_N = 2**14
    store_site_keys(path, KEYS, passphrase)
    assert load_site_keys(path, lambda: passphrase).encode() == KEYS.encode()
    if other != passphrase:
        with pytest.raises(ConfigError):
            load_site_keys(path, lambda: other)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_keys_are_refused_in_our_words(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("keys") / "k"
    path.write_bytes(data)
    path.chmod(0o600)
    for load in (load_public_keys, load_node_key, read_passphrase):
        try:
            load(path)
        except ConfigError as error:
            assert str(path) in str(error)
        else:
            assert load is read_passphrase


def test_flowers_own_node_reads_the_node_key(tmp_path):
    """The form is the one that `flower-supernode --auth-supernode-private-key` takes."""
    key = make_node_key(tmp_path / "node.key")
    data = (tmp_path / "node.key").read_bytes()
    read = serialization.load_ssh_private_key(data, password=None)
    assert isinstance(read, ec.EllipticCurvePrivateKey)
    assert read.private_numbers() == key.private_numbers()
    if shutil.which("ssh-keygen"):
        shown = subprocess.run(
            ["ssh-keygen", "-l", "-f", str(tmp_path / "node.key")], capture_output=True, check=True
        )
        assert b"384" in shown.stdout


def test_the_roster_names_the_node_key_as_flowers_server_compares_it(tmp_path):
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

    public = make_node_key(tmp_path / "node.key").public_key()
    assert node_public_pem(public) == public_key_to_bytes(public)
    assert uses_nist_ec_curve(public)
    assert load_node_public(node_public_pem(public)) == public


def test_node_keys_of_another_kind_are_refused(tmp_path):
    for number, key in enumerate(
        (ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048))
    ):
        path = tmp_path / f"{number}"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
        )
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="expected an EC P-384 key"):
            load_node_key(path)


def test_the_passphrase_comes_from_a_file_else_the_environment_else_a_person(tmp_path, monkeypatch):
    file = tmp_path / "passphrase"
    file.write_bytes(b"from the file\r\nand a second line\n")
    file.chmod(0o600)
    monkeypatch.setenv("HOSPITIUM_SITE_PASSPHRASE", "from the environment")
    assert find_passphrase(file, lambda: "asked") == b"from the file"
    assert find_passphrase(None, lambda: "asked") == b"from the environment"
    monkeypatch.delenv("HOSPITIUM_SITE_PASSPHRASE")
    assert find_passphrase(None, lambda: "asked") == b"asked"
    with pytest.raises(ConfigError, match=r"keys\.passphrase_file"):
        find_passphrase(None, None)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="expected mode 0600, got 0644"):
        find_passphrase(file, None)
    file.write_bytes(b"\nsecond line")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="got an empty one"):
        find_passphrase(file, None)


def test_a_hospital_with_a_passphrase_joins_and_rotates_and_stays_locked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, words = Federation(tmp_path), WORDS.decode()
    net.found()
    succeed(net.run_site("ukm", "init", "UKM", "--passphrase", typed=f"{words}\n{words}\n"))
    net.enroll("ukm")
    succeed(net.run_site("ukm", "admit", "ukm.admission.json", "--yes"))
    assert is_locked(net.site("ukm").site_keys)
    wrong = net.run_site("ukm", "rotate", typed="not the right words\n")
    assert "expected the passphrase of this file" in refuse(wrong)
    succeed(net.run_site("ukm", "rotate", typed=f"{words}\n"))
    net.enroll("ukm")
    succeed(net.run_site("ukm", "admit", "ukm.admission.json", "--yes"))
    assert load_site_keys(net.site("ukm").site_keys, lambda: WORDS)
    unlocked = refuse(net.run_site("ukm", "rotate", "--lost"))
    assert "expected a passphrase for the new keys, as the old ones had" in unlocked
    assert not net.site("ukm").next_site_keys.exists()


def test_a_passphrase_file_is_named_in_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, file = Federation(tmp_path), tmp_path / "passphrase"
    file.write_bytes(WORDS + b"\n")
    file.chmod(0o600)
    succeed(net.run_site("ukm", "init", "UKM", "--passphrase-file", str(file)))
    assert net.site("ukm").settings().keys.passphrase_file == str(file)
    assert load_site_keys(net.site("ukm").site_keys, lambda: WORDS)
