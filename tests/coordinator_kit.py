"""A real SuperLink process over real TLS, and nodes whose sites answer as a test wants."""

import datetime
import os
import threading
import time
from contextlib import suppress
from dataclasses import replace

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from hospitium_client.fleet import HEARTBEAT_S, Fleet, RunOver, Unreachable
from hospitium_common.enrolment.public_keys import node_public_pem
from hospitium_common.envelope import Answer, open_request, seal_answer
from hospitium_common.federation import FederationRoster, Member
from hospitium_common.flower_record import as_record, payload_of
from hospitium_common.secagg.keys import SiteKeys
from hospitium_server.certificates import certificate_pem, key_pem, make_ca, make_server_certificate
from hospitium_server.grid_transport import GridTransport
from hospitium_server.mailbox import Mailbox
from hospitium_server.paths import POSTED
from hospitium_server.processes import SuperLinkPlace, SuperLinkProcess

STUDY = bytes(range(32))


class RealSuperLink:
    """A SuperLink in its own process, as the coordinator's service starts it."""

    def __init__(self, folder):
        now = datetime.datetime.now(datetime.UTC)
        ca_key, ca = make_ca("a test's coordinator", now)
        key, certificate = make_server_certificate(ca_key, ca, ["127.0.0.1", "localhost"], now)
        self.authority = certificate_pem(ca)
        (folder / "server.pem").write_bytes(certificate_pem(certificate))
        (folder / "server.key").write_bytes(key_pem(key))
        self.place = SuperLinkPlace(
            directory=folder / "superlink", host="127.0.0.1", port=0, local_port=0,
            certificate=folder / "server.pem", private_key=folder / "server.key",
        )  # fmt: skip
        self.process = SuperLinkProcess(self.place)
        self.process.start()
        self.process.wait_until_up()

    @property
    def control(self):
        return self.process.control

    @property
    def address(self):
        return f"127.0.0.1:{self.process.public_port}"

    def mailbox(self):
        """Start a run and open its mailbox, as the service and a study's process do."""
        run = self.control.start_run("a-study")
        task = self.control.claim_task()
        assert task is not None and task.run_id == run
        mailbox = Mailbox(self.process.loopback_address, task.token)
        assert mailbox.open() == "a-study"
        return mailbox

    def fleet(self, key, node_id=None):
        return Fleet(self.address, self.authority, key, node_id)


class TestSite:
    """An enrolled site: real keys, a real node's line, and ``reply(payload)`` for a trainer."""

    __test__ = False

    def __init__(self, index, coordinator, reply=None):
        self.index, self.coordinator = index, coordinator
        self.keys = SiteKeys.generate()
        self.node_key = ec.generate_private_key(ec.SECP384R1())
        self.reply = reply or (lambda payload: payload)
        self.signs_as = index
        self.stopped = threading.Event()
        self._thread = None

    @property
    def pem(self):
        return node_public_pem(self.node_key.public_key())

    def member(self, **changes):
        made = Member(
            index=self.index, name=f"site-{self.index}", title=f"Hospital {self.index}",
            keys=self.keys.public(), node_key=self.pem, expires=2**40,
        )  # fmt: skip
        return replace(made, **changes)

    def answer(self, sealed):
        """What this site's trainer sends back for a sealed request."""
        request = open_request(sealed, self.coordinator)
        reply = self.reply(bytes(request.payload))
        return seal_answer(
            Answer(site=self.signs_as, payload=reply), request.digest, self.keys.sign
        )

    def start(self, superlink):
        self._thread = threading.Thread(target=self._run, args=(superlink.fleet(self.node_key),))
        self._thread.start()

    def join(self):
        if self._thread is not None:
            self._thread.join()

    def _run(self, fleet):
        self._patiently(fleet.go_online)
        heard = time.monotonic()
        while not self.stopped.is_set():
            if time.monotonic() - heard > HEARTBEAT_S / 2:
                self._patiently(fleet.heartbeat)
                heard = time.monotonic()
            delivery = self._patiently(lambda: fleet.receive(int(time.time() * 1000)))
            if delivery is not None:
                self._handle(fleet, delivery)
        fleet.close()

    def _handle(self, fleet, delivery):
        with suppress(RunOver):
            message = self._patiently(lambda: fleet.fetch(delivery))
            if message is None:
                return
            sealed = self.answer(payload_of(message.content))
            reply = Message(as_record(sealed), reply_to=message)
            self._patiently(lambda: fleet.answer(delivery, reply, 0.0))

    def _patiently(self, call):
        """Try until the coordinator answers or the test is over, as the real node does."""
        while not self.stopped.is_set():
            try:
                return call()
            except Unreachable:
                self.stopped.wait(0.2)
        return None


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.sent, self.answers, self.silence = [], [], {}

    def on_sent(self, sites, request):
        self.sent.append(tuple(sites))

    def on_answer(self, site, answer):
        self.answers.append(site)

    def on_silence(self, site, reason):
        self.silence[site] = reason


class Coordinator:
    """Enrolled sites under one SuperLink, and a transport to them; use as a context."""

    def __init__(self, superlink, count):
        self.superlink = superlink
        self.key = Ed25519PrivateKey.generate()
        public = self.key.public_key().public_bytes_raw()
        self.sites = {index: TestSite(index, public) for index in range(1, count + 1)}
        governance = Ed25519PrivateKey.generate()
        self.roster = FederationRoster(
            name="test", version=1, coordinator=public,
            governance=governance.public_key().public_bytes_raw(),
            members=tuple(site.member() for site in self.sites.values()),
        ).signed_by(governance)  # fmt: skip
        self.heard = Heard()

    def __enter__(self):
        for site in self.sites.values():
            self.superlink.control.register(site.pem, f"site-{site.index}")
        self.mailbox = self.superlink.mailbox()
        self.transport = GridTransport(
            mailbox=self.mailbox, study=STUDY, key=self.key, roster=lambda: self.roster,
            listener=self.heard,
        )  # fmt: skip
        return self

    def __exit__(self, *_):
        for site in self.sites.values():
            site.stopped.set()
        httpx.get(f"http://{self.superlink.process.loopback_address}{POSTED}")  # wakes up nodes
        for site in self.sites.values():
            site.join()
        self.mailbox.close("completed", "")
        for node in self.superlink.control.nodes():
            self.superlink.control.unregister(node.node_id)

    def start(self, *indices):
        for index in indices or self.sites:
            self.sites[index].start(self.superlink)
        wanted = set(indices or self.sites)
        until = time.monotonic() + 30
        while not wanted <= self.transport.online().keys():
            assert time.monotonic() < until, "expected every node online"
            time.sleep(0.05)

    def ask(self, payloads, deadline_s=30.0):
        return dict(self.transport.exchange(payloads, deadline_s))


def random_bytes(length):
    return os.urandom(length)
