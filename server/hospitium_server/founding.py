"""Founding a federation: keys, certificates, settings and an empty roster, in one folder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hospitium_common.durable import write_durably
from hospitium_common.federation import FederationRoster
from hospitium_common.key_file import demand_absent, write_new_key_file
from hospitium_common.toml_file import parse_toml
from hospitium_server.certificates import (
    certificate_pem,
    days_left,
    hosts_of,
    is_issued_by,
    key_pem,
    load_certificate,
    load_ec_key,
    make_ca,
    make_server_certificate,
)
from hospitium_server.enrolment import next_version, store_roster
from hospitium_server.keys import load_key, make_key
from hospitium_server.settings import CoordinatorHome, CoordinatorSettings, settings_text

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def found(
    home: CoordinatorHome,
    name: str,
    hosts: tuple[str, ...],
    now: datetime,
    *,
    port: int = 9092,
    local_port: int = 9093,
) -> FederationRoster:
    """Make everything that a coordinator needs; `coordinator.toml` is written last.

    Whatever fails in between leaves nothing behind.

    Raises:
        ConfigError: a name or host is wrong, or there is a coordinator already.
    """
    text = settings_text(name, hosts, port, local_port)
    settings = parse_toml(CoordinatorSettings, text, name="coordinator.toml")
    files = _files_of(home, settings)
    demand_absent(*files)
    try:
        roster = _make_keys(home, settings, now)
        write_durably(home.settings_file, text.encode())
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise
    return roster


def renew(home: CoordinatorHome, now: datetime) -> x509.Certificate:
    """Make a new server key and certificate under the same CA, for the hosts of the settings.

    Hospitals notice nothing: they trust the CA. Running it again mends an interrupted renewal.

    Raises:
        ConfigError: the CA or its key is missing or damaged, or it has expired.
    """
    settings = home.settings()
    ca = load_certificate(home.resolve(settings.tls.ca))
    key, certificate = make_server_certificate(
        load_ec_key(home.ca_key), ca, settings.network.hosts, now
    )
    write_durably(home.resolve(settings.tls.key), key_pem(key))
    write_durably(home.resolve(settings.tls.certificate), certificate_pem(certificate))
    return certificate


def replace_ca(home: CoordinatorHome, now: datetime) -> None:
    """Make a new CA in place of the old one; `renew` signs with it.

    Hospitals trust the old one until they are admitted again. Raises what ``write_durably`` does.
    """
    settings = home.settings()
    key, ca = make_ca(settings.name, now)
    write_durably(home.ca_key, key_pem(key))
    write_durably(home.resolve(settings.tls.ca), certificate_pem(ca))


def rotate_coordinator_key(
    home: CoordinatorHome, roster: FederationRoster, governance: Ed25519PrivateKey
) -> FederationRoster:
    """Give the coordinator a new signing key, and return the roster that names it.

    Hospitals go over to it when their administrators accepted that roster. Running it again mends
    an interrupted rotation: the roster is stored first, and says which key is the right one.

    Raises:
        ConfigError: this is not the federation's governance key, or a key is damaged.
    """
    waiting = home.coordinator_key.with_name("coordinator.key.next")
    key = load_key(waiting) if waiting.exists() else make_key(waiting)
    public = key.public_key().public_bytes_raw()
    if roster.coordinator != public:
        roster = next_version(replace(roster, coordinator=public), roster.members, governance)
        store_roster(home, roster)
    waiting.replace(home.coordinator_key)
    return roster


def certificate_warnings(home: CoordinatorHome, now: datetime) -> list[str]:
    """Say in words what is wrong, or soon will be, with the server's certificate.

    Raises:
        ConfigError: a certificate or its key is missing or damaged.
    """
    settings = home.settings()
    certificate = load_certificate(home.resolve(settings.tls.certificate))
    key = load_ec_key(home.resolve(settings.tls.key))
    ca = load_certificate(home.resolve(settings.tls.ca))
    warnings = []
    for what, one, remedy in (
        ("server certificate", certificate, "run `hospitium coordinator renew`"),
        ("CA", ca, "plan `hospitium coordinator renew --ca` and new admissions"),
    ):
        left = days_left(one, now)
        if left < 0:
            warnings.append(
                f"the {what} has expired on {one.not_valid_after_utc:%Y-%m-%d}: {remedy}"
            )
        elif left < settings.tls.warn_days:
            warnings.append(f"the {what} expires in {left} days: {remedy}")
    if certificate.public_key() != key.public_key() or not is_issued_by(certificate, ca):
        warnings.append(
            "the server certificate is not of its key and CA: run `hospitium coordinator renew`"
        )
    missing = sorted(set(settings.network.hosts) - set(hosts_of(certificate)))
    if missing:
        warnings.append(
            f"the server certificate does not name {', '.join(missing)}: run `hospitium "
            "coordinator renew`"
        )
    return warnings


def _files_of(home: CoordinatorHome, settings: CoordinatorSettings) -> list[Path]:
    tls = settings.tls
    return [
        home.settings_file, home.roster, home.rosters / "00001.json", home.coordinator_key,
        home.governance_key, home.governance_public, home.ca_key, home.resolve(tls.ca),
        home.resolve(tls.key), home.resolve(tls.certificate),
    ]  # fmt: skip


def _make_keys(
    home: CoordinatorHome, settings: CoordinatorSettings, now: datetime
) -> FederationRoster:
    coordinator, governance = make_key(home.coordinator_key), make_key(home.governance_key)
    ca_key, ca = make_ca(settings.name, now)
    server_key, certificate = make_server_certificate(ca_key, ca, settings.network.hosts, now)
    write_new_key_file(home.ca_key, key_pem(ca_key))
    write_new_key_file(home.resolve(settings.tls.key), key_pem(server_key))
    write_durably(home.resolve(settings.tls.ca), certificate_pem(ca))
    write_durably(home.resolve(settings.tls.certificate), certificate_pem(certificate))
    public = governance.public_key().public_bytes_raw()
    write_durably(home.governance_public, (public.hex() + "\n").encode())
    roster = FederationRoster(
        name=settings.name,
        version=1,
        coordinator=coordinator.public_key().public_bytes_raw(),
        governance=public,
        members=(),
    ).signed_by(governance)
    store_roster(home, roster)
    return roster
