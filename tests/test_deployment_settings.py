"""coordinator.toml, site.toml and the certificates: made whole, read strictly, mended by name."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import tomllib
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given
from hypothesis import strategies as st

from hospitium_client.settings import SiteHome
from hospitium_client.settings import settings_text as site_text
from hospitium_common.errors import ConfigError
from hospitium_common.toml_file import quoted, with_text_value
from hospitium_server.certificates import days_left, load_certificate
from hospitium_server.founding import certificate_warnings, found, renew, replace_ca
from hospitium_server.settings import CoordinatorHome
from hospitium_server.settings import settings_text as coordinator_text

TODAY = datetime.now(UTC).replace(microsecond=0)
HOSTS = ("fl.example.org", "10.0.0.5", "::1", "localhost", "127.0.0.1")


@pytest.fixture
def home(tmp_path):
    folder = CoordinatorHome(tmp_path / "coordinator")
    found(folder, "thorax-net", HOSTS, TODAY)
    return folder


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site.toml").write_text(site_text("st-anna", "St. Anna"))
    return SiteHome(tmp_path)


def test_every_file_of_a_coordinator_is_its_owners_only(home):
    for path in home.path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.is_dir(), path
    for folder in (home.coordinator_key.parent, home.ca_key.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_addresses_are_written_as_they_are_dialled(home):
    assert home.settings().network.addresses == (
        "fl.example.org:9092", "10.0.0.5:9092", "[::1]:9092", "localhost:9092", "127.0.0.1:9092",
    )  # fmt: skip


def test_the_server_certificate_stands_for_every_host_for_a_year(home):
    """Checked by the X.509 path validation of `cryptography`, as a browser would (RFC 5280)."""
    ca = load_certificate(home.path / "tls/ca.pem")
    server = load_certificate(home.path / "tls/server.pem")
    for host in HOSTS:
        try:
            name = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        for when, valid in ((0, True), (364, True), (366, False), (-1, False)):
            builder = PolicyBuilder().store(Store([ca])).time(TODAY + timedelta(days=when))
            verifier = builder.build_server_verifier(name)
            if valid:
                verifier.verify(server, [])
            else:
                with pytest.raises(x509.verification.VerificationError):
                    verifier.verify(server, [])
    stranger = PolicyBuilder().store(Store([ca])).time(TODAY)
    with pytest.raises(x509.verification.VerificationError):
        stranger.build_server_verifier(x509.DNSName("evil.example.org")).verify(server, [])


def shake_hands(home: CoordinatorHome, ca, host: str) -> str:
    """Return the TLS version that a hospital and this server agree on."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(home.path / "tls/server.pem", home.path / "tls/server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        try:
            server.wrap_socket(connection, server_side=True).close()
        except OSError:
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        context = ssl.create_default_context(cafile=str(ca))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        with (
            socket.create_connection(listener.getsockname()) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            return secure.version()
    finally:
        thread.join()
        listener.close()


def test_a_hospital_that_pinned_the_ca_talks_to_this_server_only(home, tmp_path):
    ca = home.path / "tls/ca.pem"
    assert shake_hands(home, ca, "fl.example.org") == "TLSv1.3"
    assert shake_hands(home, ca, "127.0.0.1") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(home, ca, "evil.example.org")
    other = CoordinatorHome(tmp_path / "other")
    found(other, "thorax-net", HOSTS, TODAY)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(other, ca, "fl.example.org")


def test_a_renewed_certificate_is_a_new_one_that_hospitals_still_trust(home):
    old = load_certificate(home.path / "tls/server.pem")
    later = TODAY + timedelta(days=200)
    renew(home, later)
    new = load_certificate(home.path / "tls/server.pem")
    assert new.public_key() != old.public_key()
    assert days_left(new, later) == 365
    renew(home, TODAY)
    assert shake_hands(home, home.path / "tls/ca.pem", "localhost") == "TLSv1.3"
    assert (home.path / "tls/server.key").stat().st_mode & 0o777 == 0o600


def test_warnings_come_before_a_certificate_expires(home):
    def warned(days: int) -> str:
        return "; ".join(certificate_warnings(home, TODAY + timedelta(days=days)))

    assert warned(0) == ""
    assert warned(334) == ""
    assert "server certificate expires in 29 days: run `hospitium coordinator renew`" in warned(336)
    assert "server certificate has expired" in warned(366)
    renew(home, TODAY + timedelta(days=3640))
    assert "CA expires in 10 days" in warned(3640)
    with pytest.raises(ConfigError, match="the CA expired"):
        renew(home, TODAY + timedelta(days=3651))


def test_a_certificate_that_does_not_fit_is_named_and_mended_by_renewing(home):
    settings = home.settings_file
    settings.write_text(settings.read_text().replace('"10.0.0.5"', '"10.0.0.6"'))
    assert "does not name 10.0.0.6" in certificate_warnings(home, TODAY)[0]
    before = (home.path / "tls/server.pem").read_bytes()
    renew(home, TODAY)
    assert certificate_warnings(home, TODAY) == []
    (home.path / "tls/server.pem").write_bytes(before)  # the power failed between the two files
    assert any(
        "is not of its key and CA" in warning for warning in certificate_warnings(home, TODAY)
    )
    renew(home, TODAY)
    assert certificate_warnings(home, TODAY) == []


def test_a_new_ca_is_half_done_until_the_certificate_is_renewed(home):
    replace_ca(home, TODAY)
    assert any("is not of its key and CA" in one for one in certificate_warnings(home, TODAY))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(home, home.path / "tls/ca.pem", "localhost")
    renew(home, TODAY)
    assert certificate_warnings(home, TODAY) == []
    assert shake_hands(home, home.path / "tls/ca.pem", "localhost") == "TLSv1.3"


def test_a_ca_key_of_another_ca_signs_nothing(home, tmp_path):
    other = CoordinatorHome(tmp_path / "other")
    found(other, "other", HOSTS, TODAY)
    home.ca_key.write_bytes(other.ca_key.read_bytes())
    with pytest.raises(ConfigError, match="expected the key of this CA"):
        renew(home, TODAY)


MISTAKES = {
    "a typo in a key": ("port = 9092", "prot = 9092", "network.prot: unknown key; did you mean"),
    "a port too high": ("port = 9092", "port = 90920", "network.port = 90920"),
    "a host with https": ("fl.example.org", "https://fl.example.org", "no https://, no port"),
    "no hosts": ('hosts = ["fl.example.org", "10.0.0.5"]', "hosts = []", "network.hosts"),
    "a name that is missing": ('name = "net"', "", "name: expected this key, it is missing"),
    "no TOML": ("[network]", "[network", "not valid TOML"),
    "never valid": ("valid_days = 730", "valid_days = 0", "enrolment.valid_days = 0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_coordinator_toml_is_named(tmp_path, mistake):
    old, new, complaint = MISTAKES[mistake]
    text = coordinator_text("net", ("fl.example.org", "10.0.0.5"), 9092, 9093)
    assert old in text
    (tmp_path / "coordinator.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        CoordinatorHome(tmp_path).settings()
    assert str(tmp_path / "coordinator.toml") in str(caught.value)
    assert complaint in str(caught.value)


SITE_MISTAKES = {
    "a typo in a key": ("idle_s", "idel_s", "polling.idel_s: unknown key; did you mean 'idle_s'"),
    "an address without a port": ('address = ""', 'address = "fl.example.org"', "host:port"),
    "an address with https": ('address = ""', 'address = "https://a:1"', "without https://"),
    "an idle pause below the busy one": ("idle_s = 5.0", "idle_s = 0.1", "idle_s ≥ busy_s"),
    "polling without a pause": ("busy_s = 0.15", "busy_s = 0", "polling.busy_s"),
    "a name of no kind": ('name = "st-anna"', 'name = "St. Anna"', "name = 'St. Anna'"),
}


@pytest.mark.parametrize("mistake", SITE_MISTAKES)
def test_a_mistake_in_site_toml_is_named(site, mistake):
    old, new, complaint = SITE_MISTAKES[mistake]
    text = site.settings_file.read_text()
    assert old in text
    site.settings_file.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        site.settings()
    assert str(site.settings_file) in str(caught.value)
    assert complaint in str(caught.value)


def test_missing_settings_say_how_to_make_them(tmp_path):
    with pytest.raises(ConfigError, match="hospitium site init"):
        SiteHome(tmp_path / "none").settings()
    with pytest.raises(ConfigError, match="hospitium coordinator init"):
        CoordinatorHome(tmp_path / "none").settings()


def test_every_study_finds_its_data_or_says_where_to_name_them(site):
    with pytest.raises(ConfigError, match=r"data\.default"):
        site.data_of("pneumonia")
    text = site.settings_file.read_text().replace('default = ""', 'default = "records"')
    text = with_text_value(text, "data.studies", "pneumonia", "/srv/films", name="site.toml")
    site.settings_file.write_text(text)
    assert str(site.data_of("pneumonia")) == "/srv/films"
    assert site.data_of("sepsis") == site.path / "records"


NAMES = st.text(min_size=1, max_size=30).filter(lambda text: "\x00" not in text)


@given(NAMES)
def test_any_text_survives_quoting(text):
    text = text.encode("utf-8", "ignore").decode()
    assert tomllib.loads(f"a = {quoted(text)}") == {"a": text}


@given(st.text(max_size=40).map(lambda text: text.encode("utf-8", "ignore").decode()))
def test_setting_a_value_keeps_every_comment_and_every_other_value(value):
    before = site_text("st-anna", "St. Anna")
    after = with_text_value(before, "coordinator", "address", value, name="site.toml")
    expected = tomllib.loads(before)
    expected["coordinator"]["address"] = value
    assert tomllib.loads(after) == expected
    others = [line for line in after.split("\n") if not line.startswith("address")]
    assert others == [line for line in before.split("\n") if not line.startswith("address")]
    assert after.count("`hospitium site admit` writes it here") == 1


def test_a_new_table_is_added_and_one_that_is_written_in_another_way_is_left_to_a_person():
    assert with_text_value("a = 1\n", "b", "c d", "x", name="f") == 'a = 1\n\n[b]\n"c d" = "x"\n'
    with pytest.raises(ConfigError, match=r"write c = .* there yourself|not valid TOML"):
        with_text_value('b = {c = "y"}\n', "b", "c", "x", name="f")
