"""The coordinator's own certificate authority, and the server certificate that it signs.

The CA signs this one server and nothing else; hospitals pin it when they are admitted, so that no
public authority and no hospital's proxy can stand in for the coordinator. X.509 v3 (RFC 5280),
EC P-256.
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hospitium_common.errors import ConfigError
from hospitium_common.key_file import read_key_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CA_DAYS = 3650
SERVER_DAYS = 365
CLOCK_SKEW = timedelta(hours=1)
"""A new certificate is valid from a little earlier on: a hospital's clock may be behind."""


def make_ca(name: str, now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Make a CA that may sign server certificates, but no further CA (path length 0)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(f"Hospitium CA of {name}")
    builder = (
        _builder(key.public_key(), subject, now, now + timedelta(days=CA_DAYS))
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return key, builder.sign(key, hashes.SHA256())


def make_server_certificate(
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    hosts: Sequence[str],
    now: datetime,
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Make a key and a certificate for these host names and IP addresses, for a year.

    Raises:
        ConfigError: the CA has expired, or this is not its key.
    """
    if ca_key.public_key() != ca.public_key():
        raise ConfigError(
            "expected the key of this CA, got another; restore ca.key and ca.pem from one back-up, "
            "or make a new CA with `hospitium coordinator renew --ca`"
        )
    until = min(now + timedelta(days=SERVER_DAYS), ca.not_valid_after_utc)
    if until <= now:
        raise ConfigError(
            f"the CA expired on {ca.not_valid_after_utc:%Y-%m-%d}: expected a valid one; "
            "`hospitium coordinator renew --ca` makes one"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(key.public_key(), _subject(hosts[0]), now, until)
        .issuer_name(ca.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .add_extension(
            x509.SubjectAlternativeName([_alternative(h) for h in hosts]), critical=False
        )
    )
    return key, builder.sign(ca_key, hashes.SHA256())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PKCS #8 PEM, not encrypted: the server starts unattended."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def load_certificate(path: Path) -> x509.Certificate:
    """Read a certificate.

    Raises:
        ConfigError: it is missing or none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: expected a certificate, got: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: expected a certificate in PEM, got something else") from error


def load_ec_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key that only its owner can read.

    Raises:
        ConfigError: it is missing, none, or others can read it.
    """
    data = read_key_file(path, "a private key in PEM", "restore it from your back-up")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: expected a private key in PEM, got something else") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: expected an elliptic-curve key, got another kind")
    return key


def days_left(certificate: x509.Certificate, now: datetime) -> int:
    """Return for how many more whole days it is valid; negative when it has expired."""
    return (certificate.not_valid_after_utc - now) // timedelta(days=1)


def is_issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether this CA signed a certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, InvalidSignature):
        return False
    return True


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the host names and IP addresses that a server certificate stands for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(name.value) for name in names)


def _builder(
    public: ec.EllipticCurvePublicKey, subject: x509.Name, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - CLOCK_SKEW)
        .not_valid_after(until.astimezone(UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _subject(name: str) -> x509.Name:
    longest = 64  # characters in a common name (RFC 5280, appendix A)
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:longest])])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
