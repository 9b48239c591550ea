"""When a site gives figures, how often, and whom it is summed with: whatever a coordinator asks."""

import numpy as np
import pytest

from hospitium_client.protection.ledger import Ledger
from hospitium_client.protection.receipts import read_receipts
from hospitium_client.session import MOST_STATISTICS
from hospitium_common.errors import HospitiumError, PeerProtocolError
from hospitium_common.messages import Purpose, Task
from hospitium_common.normalisation import Normalisation
from hospitium_common.schedule import check_task, protocol_round, training_stage
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_server.secure_sum import RoundPlan
from tests.federation_kit import study_of
from tests.test_key_epochs import STUDY, Ward

NOTHING = Quantiser(lengths=(), bounds=())


def task(purpose, number, invited=(1, 2, 3)) -> Task:
    return Task(
        study=STUDY.digest, purpose=purpose, round=number, attempt=1, invited=invited,
        model_digest=bytes(32), previous_result=bytes(64), quantiser=NOTHING,
        signature=bytes(64), model=b"", public=b"",
    )  # fmt: skip


BELONGS = {  # three training rounds: stage 1 statistics, 2 to 4 training, 3 to 6 evaluation
    "statistics in stage 1": (Purpose.STATISTICS, protocol_round(1, 15), True),
    "statistics in a later stage": (Purpose.STATISTICS, protocol_round(2), False),
    "statistics before everything": (Purpose.STATISTICS, 3, False),
    "the first training": (Purpose.TRAIN, protocol_round(2), True),
    "the last training": (Purpose.TRAIN, protocol_round(4), True),
    "a training too many": (Purpose.TRAIN, protocol_round(5), False),
    "a training again": (Purpose.TRAIN, protocol_round(3, 1), False),
    "a training in the stage of statistics": (Purpose.TRAIN, protocol_round(1), False),
    "an evaluation before training": (Purpose.EVALUATE, protocol_round(2), False),
    "an evaluation after the first training": (Purpose.EVALUATE, protocol_round(3), True),
    "the last evaluation": (Purpose.EVALUATE, protocol_round(6, 15), True),
    "an evaluation too late": (Purpose.EVALUATE, protocol_round(7), False),
}


@pytest.mark.parametrize("case", BELONGS)
def test_a_purpose_belongs_to_its_stage(case):
    purpose, number, allowed = BELONGS[case]
    if allowed:
        check_task(task(purpose, number), 1, STUDY)
        return
    with pytest.raises(PeerProtocolError):
        check_task(task(purpose, number), 1, STUDY)


def test_updates_are_summed_with_the_own_group_only_and_figures_with_everybody():
    study = study_of(robustness={"groups": 3}, cohort={"maximum_sites": 12})
    number = protocol_round(training_stage(1))
    check_task(task(Purpose.TRAIN, number, (1, 4, 7)), 4, study)
    check_task(task(Purpose.STATISTICS, protocol_round(1), (1, 2, 3)), 1, study)
    for invited, site in (((1, 4, 5, 7), 4), ((2, 5, 8), 4), (tuple(range(1, 10)), 4)):
        with pytest.raises(PeerProtocolError, match="own group"):
            check_task(task(Purpose.TRAIN, number, invited), site, study)


@pytest.fixture
def ward(tmp_path):
    return Ward(tmp_path)


def ask(ward, purpose, number):
    """Let the coordinator ask for a round of this purpose under this number."""
    session = next(iter(ward.enrolled.sessions.values()))
    layout = session._opened_work().layout
    figures = session._opened_work().statistics().tail
    features = session._opened_work().tail_layout.statistics(figures).features
    normalisation = Normalisation.from_totals(features, STUDY).encode()
    training = purpose is Purpose.TRAIN
    return ward.summing(
        RoundPlan(
            number=number, purpose=purpose, public=normalisation,
            parameters=np.zeros(layout.size, np.float32),
            quantiser=Quantiser(lengths=layout.lengths, bounds=(1.0,) * len(layout.lengths))
            if training
            else NOTHING,
        )
    )  # fmt: skip


def test_statistics_are_given_a_few_times_only(ward):
    for retry in range(MOST_STATISTICS):
        ward.statistics(retry)
    with pytest.raises(HospitiumError, match="privacy budget does not cover it"):
        ward.statistics(MOST_STATISTICS)


def test_nothing_is_evaluated_at_a_site_that_has_not_trained(ward):
    with pytest.raises(HospitiumError, match="the site's policy does not allow it"):
        ask(ward, Purpose.EVALUATE, protocol_round(3))


def test_evaluations_are_given_as_often_as_the_site_allows(ward):
    for session in ward.enrolled.sessions.values():
        session._policy = session._policy.model_copy(update={"most_evaluations": 2})
    ask(ward, Purpose.TRAIN, protocol_round(2))
    ask(ward, Purpose.EVALUATE, protocol_round(3))
    ask(ward, Purpose.EVALUATE, protocol_round(4))
    with pytest.raises(HospitiumError, match="privacy budget does not cover it"):
        ask(ward, Purpose.EVALUATE, protocol_round(5))


def test_a_refused_evaluation_is_not_booked_and_no_receipt_is_kept(ward, tmp_path):
    with pytest.raises(HospitiumError):
        ask(ward, Purpose.EVALUATE, protocol_round(3))
    for site in (1, 2, 3):
        home = tmp_path / f"hospital-{site}"
        ledger = Ledger(home / "ledger.sqlite")
        assert ledger.spends() == ()
        ledger.close()
        assert read_receipts(home / "receipts") == ()


def test_a_receipt_is_on_disk_before_the_masked_vector_leaves(ward, tmp_path):
    ward.statistics(0)
    (receipt,) = read_receipts(tmp_path / "hospital-2" / "receipts")
    assert (receipt.site, receipt.round, receipt.attempt) == (2, protocol_round(1), 1)
    assert receipt.previous_result == bytes(64)
    ask(ward, Purpose.TRAIN, protocol_round(2))
    _, second = read_receipts(tmp_path / "hospital-2" / "receipts")
    assert second.previous_result != bytes(64)
