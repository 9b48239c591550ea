"""Exchanges with sites through a real SuperLink: who answered, who did not, and nothing lost."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from hospitium_common.flower_record import payload_of
from hospitium_server.studies import NOT_CONNECTED
from tests.coordinator_kit import Coordinator, RealSuperLink, random_bytes

SILENT = "no answer before the deadline"


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    made = RealSuperLink(tmp_path_factory.mktemp("superlink"))
    yield made
    made.process.stop()


@pytest.fixture
def three(superlink):
    with Coordinator(superlink, 3) as made:
        yield made


def test_every_site_gets_its_request_and_its_answer_is_its_own(three):
    for index, site in three.sites.items():
        site.reply = lambda payload, index=index: payload + bytes([index])
    three.start()
    answers = three.ask({1: b"one", 2: b"two", 3: b"three"})
    assert answers == {1: b"one\x01", 2: b"two\x02", 3: b"three\x03"}
    assert three.heard.silence == {}


def test_a_large_request_for_all_is_sent_once_and_large_answers_come_whole(three):
    for site in three.sites.values():
        site.reply = lambda payload: payload[::-1]
    three.start()
    large = random_bytes(12 << 20)
    answers = three.ask(dict.fromkeys(three.sites, large))
    assert three.heard.sent == [(1, 2, 3)]
    assert set(answers) == {1, 2, 3}
    assert all(answer == large[::-1] for answer in answers.values())


def test_a_site_whose_node_is_not_connected_is_named_and_the_others_answer(three):
    three.start(1, 3)
    assert set(three.ask(dict.fromkeys(three.sites, b"hello"))) == {1, 3}
    assert three.heard.silence == {2: NOT_CONNECTED}


def test_an_answer_that_another_site_signed_is_dropped_and_logged(three, caplog):
    rogue = three.sites[2]
    rogue.signs_as = 1  # its own key under another's index
    three.start()
    assert set(three.ask(dict.fromkeys(three.sites, b"hello"))) == {1, 3}
    assert "expected an answer that site 1 signed" in three.heard.silence[2]
    assert "site 2: its answer is refused" in caplog.text


def test_an_old_answer_is_no_answer_to_a_new_request(three):
    kept = []
    replaying = three.sites[2]
    honest = replaying.answer

    def replay(sealed):
        kept.append(honest(sealed))
        return kept[0]

    replaying.answer = replay
    three.start()
    assert set(three.ask(dict.fromkeys(three.sites, b"first"))) == {1, 2, 3}
    assert set(three.ask(dict.fromkeys(three.sites, b"second"))) == {1, 3}


def test_garbage_and_no_answer_at_all_cost_only_their_own_site(three):
    three.sites[1].answer = lambda sealed: b"\xff" * 90
    three.sites[2].answer = lambda sealed: b""
    three.start()
    assert set(three.ask(dict.fromkeys(three.sites, b"hello"))) == {3}
    assert "see its own log" in three.heard.silence[2]


def test_a_late_answer_of_an_exchange_is_not_seen_in_the_next(three):
    slow = three.sites[3]
    released = threading.Event()

    def late(payload):
        if payload == b"first":
            released.wait(20)
        return payload + b" from 3"

    slow.reply = late
    three.start()
    assert set(three.ask(dict.fromkeys(three.sites, b"first"), deadline_s=6.0)) == {1, 2}
    assert three.heard.silence == {3: SILENT}
    released.set()
    answers = three.ask(dict.fromkeys(three.sites, b"second"))
    assert answers[3] == b"second from 3"


def test_an_exchange_survives_the_death_of_the_superlink(superlink, three):
    began, go_on = threading.Event(), threading.Event()

    def hold(payload):
        began.set()
        go_on.wait(60)
        return payload

    three.sites[2].reply = hold
    three.start()
    answers = {}
    asking = threading.Thread(
        target=lambda: answers.update(three.ask(dict.fromkeys(three.sites, b"hi"), 120))
    )
    asking.start()
    assert began.wait(30)
    os.kill(superlink.process.pid, signal.SIGKILL)
    until = time.monotonic() + 30
    while superlink.process.exit_code() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    go_on.set()
    superlink.process.start()
    asking.join(90)
    assert answers == dict.fromkeys(three.sites, b"hi")


def test_what_a_node_was_handed_and_never_fetched_is_handed_out_again(three, superlink):
    """The line breaks after Flower has handed the message out, before the node fetches it."""
    site = three.sites[1]
    fleet = superlink.fleet(site.node_key)
    fleet.go_online()
    out = three.transport.send({1: b"precious"}, 60)
    lost = fleet.receive(0)
    assert lost is not None
    again = fleet.receive(0)  # held until the server is sure that it was not fetched
    assert again is not None
    assert again.id == lost.id
    sealed = payload_of(fleet.fetch(again).content)
    assert b"precious" in sealed
    out.give_up(SILENT)
    fleet.close()
