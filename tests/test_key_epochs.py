"""Who is there is paired: late sites, returning sites, revoked sites."""

from dataclasses import replace

import numpy as np
import pytest

from hospitium_client.protection.ledger import Ledger
from hospitium_client.work import SiteWork
from hospitium_common.archive import RoundArchive
from hospitium_common.entropy import seeded_entropy
from hospitium_common.errors import HospitiumError
from hospitium_common.messages import PairOffers, PairRequest, Purpose, Reason, Refusal, decode
from hospitium_common.metrics import TailLayout
from hospitium_common.models import build, shared_layout
from hospitium_common.schedule import protocol_round
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_server.registry import Registry
from hospitium_server.secure_sum import Presence, RoundPlan, SecureSum
from hospitium_simulations.federation import _enrol
from hospitium_simulations.in_memory import InMemoryTransport
from tests.federation_kit import hospitals, study_of

STUDY = study_of()


class Ward:
    """Four hospitals with open sessions; ``present`` is set by the test."""

    def __init__(self, directory):
        works, entropies, ledgers = {}, {}, {}
        for index, (name, records) in enumerate(hospitals(4).items(), start=1):
            home = directory / name
            home.mkdir(parents=True)
            works[index] = SiteWork(STUDY, records, home)
            entropies[index] = seeded_entropy(name.encode())
            ledgers[index] = Ledger(home / "ledger.sqlite")
        self.enrolled = _enrol(STUDY, works, entropies, ledgers)
        layout = shared_layout(STUDY, build(STUDY))
        self.registry = Registry(directory / "coordinator", STUDY.digest, layout.digest)
        self.federation, self.present = self.enrolled.roster, (1, 2, 3)
        self.summing = SecureSum(
            study=STUDY, key=self.enrolled.coordinator,
            present=lambda: Presence(federation=self.federation, sites=self.present),
            transport=InMemoryTransport(self.enrolled.sessions),
            tail_layout=TailLayout.of(STUDY, layout),
            next_epoch=self.registry.next_epoch, next_attempt=self.registry.next_attempt,
            begin_unmasking=self.registry.begin_unmasking,
            archive=RoundArchive(directory / "rounds"),
        )  # fmt: skip

    def statistics(self, retry: int):
        return self.summing(
            RoundPlan(
                number=protocol_round(1, retry), purpose=Purpose.STATISTICS, public=b"",
                parameters=np.zeros(0, np.float32), quantiser=Quantiser(lengths=(), bounds=()),
            )
        )  # fmt: skip

    def epochs(self) -> int:
        return self.registry.next_epoch() - 1

    def ask(self, site: int, **fields):
        fields = {"version": 1, "epoch": 9, "sites": (1, 2, 3), **fields}
        if "roster" not in fields:
            derived = self.enrolled.roster.for_study(STUDY.digest, fields["epoch"], (1, 2, 3))
            fields["roster"] = derived.digest
        return decode(self.enrolled.sessions[site].handle(PairRequest(**fields).encode()))


@pytest.fixture
def ward(tmp_path):
    return Ward(tmp_path)


def test_a_site_that_comes_late_is_paired_and_counted_from_then_on(ward):
    assert ward.statistics(0).survivors == (1, 2, 3)
    ward.present = (1, 2, 3, 4)
    assert ward.statistics(1).survivors == (1, 2, 3, 4)
    assert ward.epochs() == 2


def test_a_site_that_is_away_for_a_round_comes_back_without_a_new_epoch(ward):
    ward.present = (1, 2, 3, 4)
    ward.statistics(0)
    ward.present = (1, 2, 4)
    assert ward.statistics(1).survivors == (1, 2, 4)
    ward.present = (1, 2, 3, 4)
    assert ward.statistics(2).survivors == (1, 2, 3, 4)
    assert ward.epochs() == 1


def test_too_few_sites_stop_the_round_before_anything_is_sent(ward):
    ward.present = (1, 2)
    with pytest.raises(HospitiumError, match="expected at least 3 sites to stand ready, got 2"):
        ward.statistics(0)
    assert ward.epochs() == 0


def test_a_site_that_cannot_pair_is_left_out_and_the_others_go_on(ward):
    ward.present = (1, 2, 3, 4)
    ward.enrolled.sessions[2]._federation = replace(ward.federation, version=2)
    totals = ward.statistics(0)
    assert totals.survivors == (1, 3, 4)
    assert "broke the protocol" in totals.missing[2]


def test_a_revoked_site_is_out_at_once_even_in_the_epoch_under_way(ward):
    ward.present = (1, 2, 3, 4)
    ward.statistics(0)
    members = tuple(replace(m, revoked=m.index == 4) for m in ward.federation.members)
    revoking = replace(ward.federation, version=2, members=members)
    for session in ward.enrolled.sessions.values():
        session._federation = revoking
    with pytest.raises(HospitiumError):  # the coordinator has not noticed yet
        ward.statistics(1)
    ward.federation, ward.present = revoking, (1, 2, 3)
    assert ward.statistics(2).survivors == (1, 2, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 2},
        {"epoch": 0},
        {"sites": (1, 2)},
        {"sites": (2, 3, 4)},
        {"roster": bytes(32)},
    ],
    ids=["another version", "an old epoch", "too few", "without this site", "other keys"],
)
def test_a_pair_request_is_refused(ward, fields):
    assert isinstance(ward.ask(1), PairOffers)
    fields = {"epoch": 10, **fields}
    answer = ward.ask(1, **fields)
    assert answer == Refusal(reason=Reason.PROTOCOL, blame=0)
