"""Requests out, answers back: who is missing, and why, whatever comes back."""

from hospitium_common.errors import PeerProtocolError
from hospitium_common.messages import Ack, Paired, Reason, Refusal
from hospitium_server.exchanges import BROKE_THE_PROTOCOL, REFUSALS, SILENT, Exchanges

ACK = Ack(site=1, signature=bytes(64)).encode()
OTHER = Paired(roster=bytes(32)).encode()


class Canned:
    """A transport with answers that were made before."""

    def __init__(self, *answers):
        self._answers = answers

    def exchange(self, requests, deadline_s):
        yield from self._answers


def asked(*answers, sites=(1, 2)):
    exchanges = Exchanges(Canned(*answers))
    found = list(exchanges.ask(dict.fromkeys(sites, b"request"), Ack, 1.0))
    return exchanges, [site for site, _ in found]


def test_an_answer_of_the_right_kind_is_handed_over_and_silence_is_noted():
    exchanges, found = asked((1, ACK))
    assert found == [1]
    assert exchanges.missing == {2: SILENT}
    assert (exchanges.bytes_sent, exchanges.bytes_received) == (14, len(ACK))


def test_what_cannot_be_used_is_noted_with_its_reason():
    refusal = Refusal(reason=Reason.BUDGET, blame=None).encode()
    exchanges, found = asked((1, b"?"), (2, OTHER), (3, refusal), sites=(1, 2, 3))
    assert found == []
    assert exchanges.missing == {
        1: "its answer could not be read",
        2: "expected Ack, got Paired",
        3: REFUSALS[Reason.BUDGET],
    }


def test_a_second_answer_and_one_of_a_site_that_was_not_asked_are_dropped():
    exchanges, found = asked((1, ACK), (1, ACK), (7, ACK), (2, ACK))
    assert found == [1, 2]
    assert exchanges.missing == {}


def test_an_answer_that_breaks_the_protocol_costs_its_own_site_only():
    taken = []

    def take(site, answer):
        if site == 1:
            raise PeerProtocolError("wrong", 1)
        taken.append(site)

    exchanges = Exchanges(Canned((1, ACK), (2, ACK)))
    exchanges.gather({1: b"", 2: b""}, Ack, take, 1.0)
    assert taken == [2]
    assert exchanges.missing == {1: BROKE_THE_PROTOCOL}
