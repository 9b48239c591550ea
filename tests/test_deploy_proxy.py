"""The optional proxy does what its file says: real nginx at both ends, real TLS inside real TLS."""

from __future__ import annotations

import datetime
import shutil
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hospitium_server.certificates import certificate_pem, key_pem, make_ca, make_server_certificate

if TYPE_CHECKING:
    from collections.abc import Iterator

NGINX = Path(__file__).parent.parent / "deploy" / "nginx"
MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
NOW = datetime.datetime.now(datetime.UTC)
PATIENCE_S = 10

pytestmark = pytest.mark.skipif(
    shutil.which("nginx") is None or not MODULE.exists(),
    reason="nginx and its stream module are not installed here",
)


@dataclass(frozen=True, kw_only=True)
class Places:
    """The ports of the chain: the node dials ``site``, which dials ``proxy``."""

    folder: Path
    site: int
    proxy: int


class Echo(threading.Thread):
    """Stands where the coordinator does: TLS with the coordinator's certificate, and an echo."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.reached = 0

    def run(self) -> None:
        while True:
            try:
                raw, _ = self._listening.accept()
            except OSError:
                return
            try:
                if not raw.recv(1, socket.MSG_PEEK):
                    raw.close()
                    continue
                self.reached += 1
                with self._context.wrap_socket(raw, server_side=True) as inner:
                    inner.sendall(inner.recv(100))
            except OSError:
                raw.close()

    def close(self) -> None:
        self._listening.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def client_certificate(
    ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, name: str
) -> tuple[bytes, bytes, int]:
    """Return a client's certificate, its key, and its serial number."""
    key, serial = ec.generate_private_key(ec.SECP256R1()), x509.random_serial_number()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(NOW - datetime.timedelta(hours=1))
        .not_valid_after(NOW + datetime.timedelta(days=1))
        .sign(ca_key, hashes.SHA256())
    )
    return certificate_pem(certificate), key_pem(key), serial


def revocations(
    ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, serials: list[int]
) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(NOW - datetime.timedelta(hours=1))
        .next_update(NOW + datetime.timedelta(days=1))
    )
    for serial in serials:
        one = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW).build()
        builder = builder.add_revoked_certificate(one)
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def configuration(folder: Path, side: str, changes: dict[str, str]) -> Path:
    """The file under deploy/ with this machine's ports and paths, and what nginx.conf has."""
    text = (NGINX / f"{side}.conf").read_text()
    for old, new in (changes | {"/etc/hospitium/proxy": str(folder)}).items():
        assert old in text, old
        text = text.replace(old, new)
    file = folder / f"{side}.conf"
    file.write_text(
        f"load_module {MODULE};\ndaemon off;\nmaster_process off;\npid {folder}/{side}.pid;\n"
        f"error_log {folder}/{side}.log;\nevents {{}}\n{text}"
    )
    return file


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Places, Echo]]:
    folder = tmp_path_factory.mktemp("proxy")
    ca_key, ca = make_ca("Test", NOW)
    key, server = make_server_certificate(ca_key, ca, ["fl.example.org"], NOW)
    clients_key, clients = make_ca("Test clients", NOW)
    revoked = client_certificate(clients_key, clients, "was-revoked")
    allowed = client_certificate(clients_key, clients, "st-anna")
    for name, data in {
        "ca.pem": certificate_pem(ca), "server.pem": certificate_pem(server),
        "server.key": key_pem(key), "clients-ca.pem": certificate_pem(clients),
        "clients-crl.pem": revocations(clients_key, clients, [revoked[2]]),
        "site.pem": allowed[0], "site.key": allowed[1],
        "revoked.pem": revoked[0], "revoked.key": revoked[1],
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
    echo = Echo(folder)
    echo.start()
    places = Places(folder=folder, site=free_port(), proxy=free_port())
    files = [
        configuration(folder, "coordinator", {
            "listen 443 ssl": f"listen 127.0.0.1:{places.proxy} ssl",
            "        listen [::]:443 ssl;\n": "",
            "127.0.0.1:9092": f"127.0.0.1:{echo.port}",
            "/var/log/nginx/hospitium.log": str(folder / "access.log"),
        }),
        configuration(folder, "site", {
            "127.0.0.1:9092": f"127.0.0.1:{places.site}",
            "192.0.2.10:443": f"127.0.0.1:{places.proxy}",
        }),
    ]  # fmt: skip
    running = [
        subprocess.Popen(["nginx", "-p", folder, "-e", "stderr", "-c", file],
                         stderr=subprocess.DEVNULL)
        for file in files
    ]  # fmt: skip
    try:
        for port in (places.site, places.proxy):
            wait_for(port)
        yield places, echo
    finally:
        for process in running:
            process.terminate()
            process.wait()
        echo.close()


def wait_for(port: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"nothing listens on port {port}")


def speak(raw: socket.socket, authority: Path, name: str = "fl.example.org") -> bytes:
    context = ssl.create_default_context(cafile=authority)
    with context.wrap_socket(raw, server_hostname=name) as inner:
        inner.sendall(b"sealed bytes")
        return inner.recv(100)


def test_a_node_speaks_through_both_proxies_to_the_coordinator_itself(
    chain: tuple[Places, Echo],
) -> None:
    places, echo = chain
    before = echo.reached
    raw = socket.create_connection(("127.0.0.1", places.site), timeout=PATIENCE_S)
    # The certificate that the node checks is the coordinator's own, not a proxy's.
    assert speak(raw, places.folder / "ca.pem") == b"sealed bytes"
    assert echo.reached == before + 1


@pytest.mark.parametrize("certificate", [None, "revoked"])
def test_without_a_valid_client_certificate_not_a_byte_reaches_the_coordinator(
    chain: tuple[Places, Echo], certificate: str | None
) -> None:
    places, echo = chain
    before = echo.reached
    context = ssl.create_default_context(cafile=places.folder / "ca.pem")
    if certificate is not None:
        pair = (places.folder / f"{certificate}.pem", places.folder / f"{certificate}.key")
        context.load_cert_chain(*pair)
    raw = socket.create_connection(("127.0.0.1", places.proxy), timeout=PATIENCE_S)
    answered = b""
    try:
        # TLS 1.3: a client learns only at its first read that it was refused.
        with context.wrap_socket(raw, server_hostname="fl.example.org") as outer:
            outer.sendall(b"\x16\x03\x01 hello")
            answered = outer.recv(100)
    except OSError:
        pass
    assert answered == b""
    assert echo.reached == before
