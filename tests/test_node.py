"""The site's node against a real SuperLink over TLS, with a real trainer socket behind it."""

import datetime
import logging
import os
import threading
import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, RecordDict
from flwr.common.constant import ErrorCode
from hypothesis import given
from hypothesis import strategies as st

from hospitium_client.fleet import Fleet, NotEnrolled, Unreachable
from hospitium_client.node import Node, Pace, backoff_s, known_node_id
from hospitium_client.trainer_service import TrainerServer
from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.flower_record import LARGEST_VALUE, as_record, payload_of
from hospitium_server import holding
from hospitium_server.certificates import certificate_pem, make_ca
from tests.fleet_kit import Coordinator, wait_for

QUICK = Pace(busy_s=0.02, idle_s=0.1)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    logging.getLogger("flwr").setLevel("ERROR")
    held_s, holding.HOLD_S = holding.HOLD_S, 1.0
    running = Coordinator(tmp_path_factory.mktemp("coordinator"))
    yield running
    running.stop()
    holding.HOLD_S = held_s
    logging.getLogger("flwr").setLevel("NOTSET")


class Site:
    """A node in a thread and a trainer on a socket, both of which can be stopped and started."""

    def __init__(self, folder, coordinator):
        self.home, self.coordinator = folder / "run", coordinator
        self.key = ec.generate_private_key(ec.SECP384R1())
        self.node_id = coordinator.enrol(self.key.public_key())
        self.requests, self.trainer, self.node, self.thread = [], None, None, None

    def serve(self, answer=lambda data: b"seen " + data[:20]):
        def count(data):
            self.requests.append(data)
            return answer(data)

        self.trainer = TrainerServer(self.home / "trainer.sock", count)
        self.trainer.start()

    def connect(self, *, wait=True):
        fleet = Fleet(
            self.coordinator.address, self.coordinator.authority, self.key,
            known_node_id(self.home),
        )  # fmt: skip
        self.stop = threading.Event()
        self.node = Node(fleet, self.home / "trainer.sock", self.home, QUICK, self.stop)
        self.thread = threading.Thread(target=self.node.run)
        self.thread.start()
        if wait:
            wait_for((self.home / "node.id").exists)

    def disconnect(self, goodbye=True):
        """Stop the node; without a goodbye it is as if it had been killed."""
        if not goodbye:
            self.node._fleet.close = lambda: None
        self.stop.set()
        self.thread.join()

    def close(self):
        if self.thread is not None and self.thread.is_alive():
            self.disconnect()
        if self.trainer is not None:
            self.trainer.stop(0.1)


@pytest.fixture
def site(tmp_path, coordinator):
    made = Site(tmp_path, coordinator)
    yield made
    made.close()


def test_bytes_go_to_the_trainer_and_its_answer_comes_back(coordinator, site):
    site.serve()
    site.connect()
    run = coordinator.begin_run()
    assert coordinator.ask(run, site.node_id, b"hello") == b"seen hello"
    assert site.requests == [b"hello"]


def test_large_messages_travel_in_chunks_both_ways(coordinator, site):
    site.serve(lambda data: data[::-1])
    site.connect()
    run = coordinator.begin_run()
    large = os.urandom(11 << 20)
    assert coordinator.ask(run, site.node_id, large) == large[::-1]


def test_a_second_message_is_answered_while_the_first_one_is_being_worked_on(coordinator, site):
    gate = threading.Event()

    def answer(data):
        if data == b"train":
            assert gate.wait(20)
        return data

    site.serve(answer)
    site.connect()
    run = coordinator.begin_run()
    training = coordinator.send(run, site.node_id, b"train")
    assert coordinator.ask(run, site.node_id, b"offer") == b"offer"
    gate.set()
    assert payload_of(coordinator.reply(run, training).content) == b"train"


def test_nothing_of_a_fault_inside_leaves_the_site(coordinator, site, caplog):
    def answer(data):
        raise ValueError("patient 4711")

    site.serve(answer)
    site.connect()
    run = coordinator.begin_run()
    reply = coordinator.reply(run, coordinator.send(run, site.node_id, b"x"))
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert reply.error.reason == "trainer unavailable"
    assert "4711" not in caplog.text


def test_a_record_that_holds_no_bytes_is_refused_in_one_word(coordinator, site):
    site.serve()
    site.connect()
    run = coordinator.begin_run()
    odd = RecordDict({"exchange": ConfigRecord({"run": "this code"})})
    reply = coordinator.reply(run, coordinator.send(run, site.node_id, odd))
    assert reply.error.reason == "fault"
    assert not site.requests


def test_a_killed_node_is_back_at_once_and_finishes_what_was_under_way(coordinator, site):
    gate = threading.Event()

    def answer(data):
        assert gate.wait(20)
        return b"late " + data

    site.serve(answer)
    site.connect()
    run = coordinator.begin_run()
    asked = coordinator.send(run, site.node_id, b"x")
    wait_for(lambda: site.requests)
    site.disconnect(goodbye=False)
    site.connect()
    gate.set()
    assert payload_of(coordinator.reply(run, asked).content) == b"late x"
    wait_for(lambda: not list((site.home / "under-way").iterdir()))


def test_a_message_that_is_handed_out_twice_is_answered_once(coordinator, site, monkeypatch):
    gate, handed_out, again = threading.Event(), [], threading.Event()
    receive = Fleet.receive

    def receive_again(fleet, now_ms):
        if handed_out and not again.is_set():
            again.set()
            return handed_out[0]
        found = receive(fleet, now_ms)
        handed_out.extend([found] if found else [])
        return found

    def answer(data):
        assert gate.wait(20)
        return data

    monkeypatch.setattr(Fleet, "receive", receive_again)
    site.serve(answer)
    site.connect()
    run = coordinator.begin_run()
    asked = coordinator.send(run, site.node_id, b"x")
    assert again.wait(20)
    gate.set()
    assert payload_of(coordinator.reply(run, asked).content) == b"x"
    assert site.requests == [b"x"]


def test_a_killed_node_that_forgot_its_number_waits_until_it_is_let_in(coordinator, site):
    site.serve()
    site.connect()
    run = coordinator.begin_run()
    coordinator.ask(run, site.node_id, b"before")
    site.disconnect(goodbye=False)
    (site.home / "node.id").unlink()
    fleet = Fleet(coordinator.address, coordinator.authority, site.key, None)
    with pytest.raises(NotEnrolled, match="online already"):
        fleet.go_online()
    site.connect(wait=False)
    coordinator.state.deactivate_node(site.node_id)  # as when the old heartbeat has run out
    wait_for((site.home / "node.id").exists)
    assert coordinator.ask(run, site.node_id, b"after") == b"seen after"


def test_a_node_outlives_its_coordinator(coordinator, site):
    site.serve()
    site.connect()
    run = coordinator.begin_run()
    coordinator.ask(run, site.node_id, b"before")
    coordinator.stop()
    time.sleep(0.5)
    coordinator.start()
    assert coordinator.ask(run, site.node_id, b"after") == b"seen after"


def test_an_answer_that_could_not_be_sent_is_sent_when_the_coordinator_is_back(coordinator, site):
    gate = threading.Event()

    def answer(data):
        assert gate.wait(20)
        return b"kept"

    site.serve(answer)
    site.connect()
    run = coordinator.begin_run()
    asked = coordinator.send(run, site.node_id, b"x")
    wait_for(lambda: site.requests)
    coordinator.stop()
    gate.set()
    time.sleep(0.5)
    coordinator.start()
    assert payload_of(coordinator.reply(run, asked).content) == b"kept"


def test_a_message_of_a_run_that_ended_is_dropped(coordinator, site):
    gate = threading.Event()

    def answer(data):
        assert gate.wait(20)
        return data

    site.serve(answer)
    site.connect()
    run = coordinator.begin_run()
    coordinator.send(run, site.node_id, b"x")
    wait_for(lambda: site.requests)
    coordinator.end_run()
    gate.set()
    wait_for(lambda: not list((site.home / "under-way").iterdir()))
    again = coordinator.begin_run()
    assert coordinator.ask(again, site.node_id, b"y") == b"y"


def test_a_revoked_node_is_told_so_and_keeps_quiet(coordinator, site, caplog):
    site.serve()
    site.connect()
    run = coordinator.begin_run()
    coordinator.ask(run, site.node_id, b"before")
    coordinator.revoke(site.node_id)
    wait_for(lambda: "revoked" in caplog.text)
    assert site.thread.is_alive()


def test_a_server_with_another_certificate_is_not_spoken_to(coordinator, site):
    _, other = make_ca("somebody else", datetime.datetime.now(datetime.UTC))
    fleet = Fleet(coordinator.address, certificate_pem(other), site.key, None)
    with pytest.raises(Unreachable, match="pinned CA"):
        fleet.go_online()


def test_a_key_that_was_never_enrolled_is_refused(coordinator):
    fleet = Fleet(
        coordinator.address, coordinator.authority, ec.generate_private_key(ec.SECP384R1()), None
    )
    with pytest.raises(NotEnrolled):
        fleet.go_online()


def test_a_second_node_of_the_same_site_is_refused(coordinator, site):
    site.serve()
    site.connect()
    with pytest.raises(ConfigError, match="only node"):
        Node(site.node._fleet, site.home / "trainer.sock", site.home).run()


@given(st.floats(0, 1e6))
def test_waiting_costs_little_and_an_idle_site_asks_seldom(silence_s):
    pause_s = Pace().pause_s(silence_s)
    assert 0.1 <= pause_s <= 3.0
    assert pause_s <= 0.1 + 0.02 * silence_s
    assert Pace().pause_s(3600) == 3.0


def test_retries_double_up_to_a_limit():
    assert [backoff_s(n) for n in (1, 2, 3, 1000)] == [0.2, 0.4, 0.8, 15.0]


@given(st.binary(max_size=200))
def test_bytes_in_a_record_come_out_again(payload):
    assert payload_of(as_record(payload)) == payload


def test_large_bytes_in_a_record_come_out_again():
    payload = bytes(LARGEST_VALUE + 1)
    assert payload_of(as_record(payload)) == payload


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"exchange": ConfigRecord({"bytes": 3})}),
        RecordDict({"other": ConfigRecord({"bytes": b""})}),
        RecordDict({"exchange": ConfigRecord({"bytes": b""}), "more": ConfigRecord()}),
    ],
)
def test_a_record_of_another_form_is_refused(content):
    with pytest.raises(PeerProtocolError, match="expected bytes"):
        payload_of(content)
