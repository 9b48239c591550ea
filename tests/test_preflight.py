"""Preflight: each thing that can be wrong at a hospital is found, and says what to do."""

import http.server
import socket
import ssl
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from typer.testing import CliRunner

from hospitium_client import preflight, preflight_line
from hospitium_client.approvals import approve_study
from hospitium_client.data.loading import load_records
from hospitium_client.enrolment import PinnedRosters
from hospitium_client.policy import SitePolicy
from hospitium_client.preflight import Verdict, check_site, memory_limit
from hospitium_client.preflight_line import check_line
from hospitium_client.protection.ledger import Ledger, Spend
from hospitium_client.rehearsal import rehearse
from hospitium_client.running_cli import app
from hospitium_client.studies import receive
from hospitium_client.work import SiteWork
from hospitium_common.errors import HospitiumError
from hospitium_common.study.signature import signature_path
from hospitium_common.toml_file import with_text_value
from hospitium_server.certificates import certificate_pem, key_pem, make_ca, make_server_certificate
from tests.site_kit import STUDY, Hospitals


def ignore(what):
    pass


def by_name(findings):
    return {finding.what: finding for finding in findings}


@pytest.fixture
def hospitals(tmp_path):
    return Hospitals(tmp_path)


@pytest.fixture
def home(hospitals):
    return hospitals.homes[1]


def arrive(hospitals, home):
    return receive(
        home.studies, hospitals.study_path.read_bytes(),
        signature_path(hospitals.study_path).read_bytes(),
        hospitals.coordinator.public_key().public_bytes_raw(),
    )  # fmt: skip


def site_findings(home):
    return by_name(check_site(home, lambda: b"", ignore))


def test_a_hospital_in_order_is_ready(hospitals, home):
    approve_study(home.policy, arrive(hospitals, home).study)
    before = {path: path.read_bytes() for path in home.path.rglob("*") if path.is_file()}
    found = site_findings(home)
    assert {one.verdict for name, one in found.items() if name != "disk"} == {Verdict.GOOD}
    assert set(found) == {
        "keys and roster", "disk", "ledger", "data of small-study", "dry run of small-study",
        "memory",
    }  # fmt: skip
    after = {path: path.read_bytes() for path in home.path.rglob("*") if path.is_file()}
    assert after == before


def test_a_study_that_waits_is_pointed_at_and_its_data_not_read(hospitals, home, monkeypatch):
    arrive(hospitals, home)
    monkeypatch.setattr("hospitium_client.data.loading.load_records", pytest.fail)
    assert "small-study" in site_findings(home)["waiting studies"].found


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({"revoked": True}, Verdict.BAD, "revoked"),
        ({"expires": int(time.time()) - 5}, Verdict.BAD, "expired"),
        ({"expires": int(time.time()) + 5 * 86400}, Verdict.WARNING, "expires in 5 days"),
    ],
)
def test_an_enrolment_that_ends_is_seen(hospitals, home, change, verdict, words):
    members = [replace(m, **change) if m.index == 1 else m for m in hospitals.roster.members]
    PinnedRosters(home).pin(hospitals.sign(2, members))
    found = site_findings(home)["keys and roster"]
    assert found.verdict is verdict
    assert words in found.found


def test_keys_of_another_hospital_are_seen(hospitals, home):
    home.site_keys.unlink()
    home.site_keys.write_bytes(hospitals.homes[2].site_keys.read_bytes())
    home.site_keys.chmod(0o600)
    PinnedRosters(home).pin(hospitals.sign(2, [hospitals.roster.members[0]]))
    assert site_findings(home)["keys and roster"].verdict is Verdict.BAD


def test_data_that_a_study_cannot_use_is_seen_without_showing_it(hospitals, home):
    approve_study(home.policy, arrive(hospitals, home).study)
    file = home.path / "records" / "rows.csv"
    file.write_text(file.read_text().replace(",ill,", ",perhaps,", 1))
    found = site_findings(home)
    assert found["data of small-study"].verdict is Verdict.BAD
    assert "column 'label'" in found["data of small-study"].found
    assert "perhaps" not in found["data of small-study"].found
    assert "dry run of small-study" not in found


def test_a_dry_run_that_runs_out_of_memory_is_seen(hospitals, home, monkeypatch):
    def short(*arguments, **options):
        raise MemoryError

    approve_study(home.policy, arrive(hospitals, home).study)
    monkeypatch.setattr(SiteWork, "train", short)
    found = site_findings(home)["dry run of small-study"]
    assert (found.verdict, found.found) == (Verdict.BAD, "ran out of memory")


def test_a_device_that_is_not_there_is_seen(hospitals, home):
    approve_study(home.policy, arrive(hospitals, home).study)
    settings = home.settings_file.read_text()
    home.settings_file.write_text(settings.replace('device = "cpu"', 'device = "cuda:999"'))
    found = site_findings(home)["dry run of small-study"]
    assert found.verdict is Verdict.BAD
    assert "cuda:999" in found.found


def test_a_fault_in_the_round_is_seen(hospitals, home, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("patient 4711")

    approve_study(home.policy, arrive(hospitals, home).study)
    monkeypatch.setattr(SiteWork, "statistics", broken)
    found = site_findings(home)["dry run of small-study"]
    assert found.verdict is Verdict.BAD
    assert "4711" not in found.found


def test_a_ledger_that_was_tampered_with_is_seen(home):
    import sqlite3

    ledger = Ledger(home.ledger)
    ledger.book(Spend(study=bytes(32), round=1, kind="statistics", event=None), lambda _: True)
    ledger.close()
    database = sqlite3.connect(home.ledger)
    database.execute("DROP TRIGGER spends_stay")
    database.execute("UPDATE spends SET round = 2")
    database.commit()
    database.close()
    assert site_findings(home)["ledger"].verdict is Verdict.BAD


def test_a_full_disk_is_seen(home, monkeypatch):
    from shutil import disk_usage

    used = disk_usage(home.path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: used._replace(free=100 << 20))
    assert site_findings(home)["disk"].verdict is Verdict.BAD


def test_a_containers_limit_counts_as_the_memory_that_is_there(tmp_path, monkeypatch):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    machine = memory_limit(tmp_path)
    (group / "memory.max").write_text("123456789\n")
    assert memory_limit(tmp_path) == 123456789 < machine
    monkeypatch.setattr(preflight, "memory_limit", lambda: 1 << 20)
    assert preflight._check_memory().verdict is Verdict.BAD


class Server:
    """An HTTPS server whose certificate, clock and answer can be wrong."""

    def __init__(self, folder, *, days=365, ahead_s=0.0, status=200, host="127.0.0.1"):
        now = datetime.now(UTC)
        ca_key, ca = make_ca("test", now)
        made = now - timedelta(days=365 - days)
        key, certificate = make_server_certificate(ca_key, ca, [host], made)
        self.authority = certificate_pem(ca)
        (folder / "server.pem").write_bytes(certificate_pem(certificate))
        (folder / "server.key").write_bytes(key_pem(key))

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                date = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead_s), usegmt=True)
                self.send_response_only(status if self.path == "/health" else 404)
                self.send_header("Date", date)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.handle_error = lambda *_: None
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def line(home, tmp_path, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(preflight_line, "PATIENCE_S", 3.0)
    opened = []

    def look(address=None, authority=None, **options):
        server = Server(tmp_path, **options)
        opened.append(server)
        settings = home.settings_file.read_text()
        address = address or f"127.0.0.1:{server.port}"
        home.settings_file.write_text(
            with_text_value(settings, "coordinator", "address", address, name="site.toml")
        )
        home.ca.write_bytes(authority or server.authority)
        return by_name(check_line(home, ignore))

    yield look
    for server in opened:
        server.close()


def test_a_line_in_order(line):
    found = line()
    assert {one.verdict for one in found.values()} == {Verdict.GOOD}
    assert set(found) == {"address", "certificate", "coordinator", "clock"}


@pytest.mark.parametrize(
    ("ahead_s", "verdict"),
    [
        (-600, Verdict.BAD),
        (-10, Verdict.BAD),
        (600, Verdict.BAD),
        (100, Verdict.WARNING),
        (5, Verdict.GOOD),
    ],
)
def test_a_wrong_clock_is_seen(line, ahead_s, verdict):
    found = line(ahead_s=ahead_s)["clock"]
    assert found.verdict is verdict
    assert verdict is Verdict.GOOD or "NTP" in found.remedy


def test_a_certificate_that_ends_soon_is_seen(line):
    assert line(days=10)["certificate"].verdict is Verdict.WARNING


def test_a_certificate_that_has_ended_is_seen(line):
    found = line(days=-1)["certificate"]
    assert found.verdict is Verdict.BAD
    assert "expired" in found.found


def test_a_certificate_for_another_name_is_seen(line):
    assert line(host="elsewhere.example.org")["certificate"].verdict is Verdict.BAD


def test_a_certificate_of_another_ca_is_seen(line):
    _, other = make_ca("somebody in between", datetime.now(UTC))
    found = line(authority=certificate_pem(other))["certificate"]
    assert found.verdict is Verdict.BAD
    assert "opens TLS" in found.remedy


def test_a_coordinator_that_is_ill_is_seen(line):
    assert line(status=503)["coordinator"].verdict is Verdict.BAD


def test_a_name_that_nobody_knows_is_seen(line):
    found = line(address="nowhere.invalid:9092")["address"]
    assert found.verdict is Verdict.BAD
    assert "no such name" in found.found


def test_a_port_where_nobody_listens_is_seen(line):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "refused" in line(address=f"127.0.0.1:{port}")["address"].found


def test_a_firewall_that_says_nothing_is_seen(line, monkeypatch):
    monkeypatch.setattr(preflight_line, "PATIENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=1) as deaf:
        address = deaf.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        found = line(address=f"127.0.0.1:{address[1]}")
        for filler in fillers:
            filler.close()
    assert found["address"].verdict is Verdict.BAD
    assert "dial out" in found["address"].remedy


def test_a_hospital_that_was_not_admitted_is_told_so(home):
    home.ca.unlink(missing_ok=True)
    assert "admit" in by_name(check_line(home, ignore))["address"].remedy


def test_the_command_shows_the_findings_and_fails_if_one_is_bad(hospitals, home, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    approve_study(home.policy, arrive(hospitals, home).study)
    done = CliRunner().invoke(app, ["preflight", "--home", str(home.path), "--trainer"])
    assert done.exit_code == 0, done.output
    assert "dry run of small-study" in done.output
    assert "Ready." in done.output
    done = CliRunner().invoke(app, ["preflight", "--home", str(home.path), "--node"])
    assert isinstance(done.exception, HospitiumError)
    assert "not ready: address" in str(done.exception)


@pytest.mark.parametrize(
    "privacy",
    [
        'mode = "dp"\nepsilon = 8.0',
        'mode = "dp"\nepsilon = 8.0\nnoise = "distributed"\nhonest_sites = 2\ndelta = 1e-3',
    ],
)
def test_a_dry_run_works_for_private_studies_too(tmp_path, privacy):
    study = STUDY.replace('mode = "none"', privacy)
    if "distributed" in privacy:
        study = study.replace("local_epochs = 1", "local_steps = 1\nsampling_rate = 0.25")
    hospitals = Hospitals(tmp_path, count=1, study=study)
    records = load_records(hospitals.homes[1].path / "records", hospitals.study)
    policy = SitePolicy(minimum_sites=3, allow_distributed_noise=True)
    place = tmp_path / "dry-run"
    place.mkdir()
    rehearse(hospitals.study, records, policy, place)
