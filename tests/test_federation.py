"""Whole federations in one process: the real sessions, rounds, masks, ledger and files."""

import os
import sqlite3

import numpy as np
import pytest
import safetensors.numpy

from hospitium_client.protection.ledger import Ledger
from hospitium_client.session import Session
from hospitium_client.work import SiteWork
from hospitium_common.errors import ConfigError, HospitiumError
from hospitium_common.messages import Masked, decode
from hospitium_simulations import in_memory
from hospitium_simulations.faults import Fault
from hospitium_simulations.federation import SimulationOptions, simulate
from tests.federation_kit import Notes, hospital, hospitals, private_study_of, study_of

MASKED, PLAIN = SimulationOptions(), SimulationOptions(masked=False)


def run(study, directory, options=MASKED, sites=4, notes=None, **more):
    return simulate(study, hospitals(sites), directory, options, notes or Notes(), **more)


def test_hospitals_learn_together_what_each_alone_learns_less_well(tmp_path):
    outcome = run(study_of(rounds=12), tmp_path, with_baselines=True)
    assert outcome.result.test.auroc > 0.85
    alone = [one.auroc for name, one in outcome.others.items() if name.startswith("only")]
    assert outcome.result.test.auroc > np.mean(alone) - 0.02
    assert outcome.others["pooled"].auroc > 0.85
    assert len(alone) == 4


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
def test_masked_and_plain_sums_give_the_same_model_up_to_the_stated_error(tmp_path, ring_bits):
    study = study_of(rounds=1, cohort={"ring_bits": ring_bits})
    masked = run(study, tmp_path / "masked").result.last
    plain = run(study, tmp_path / "plain", PLAIN).result.last
    moved = np.linalg.norm(masked.parameters - plain.parameters)
    # the bound is for one standard deviation of the norm; float32 adds its own rounding
    stated = masked.record.quantisation_error * masked.record.update_norm
    assert 0 < moved < 4 * stated + 1e-5
    assert masked.record.clipped_fraction == 0.0


@pytest.mark.parametrize("study", [study_of(rounds=4), private_study_of(rounds=4)])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_run_killed_after_a_round_and_resumed_equals_the_uninterrupted_one(
    tmp_path, study, stop_after
):
    whole = run(study, tmp_path / "whole").result
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "cut", notes=Notes(stop_after=stop_after))
    rest = Notes()
    resumed = run(study, tmp_path / "cut", notes=rest).result
    assert rest.rounds == list(range(stop_after + 1, 5))
    assert (resumed.last.parameters == whole.last.parameters).all()
    assert resumed.test == whole.test


def test_a_run_cut_in_the_middle_of_a_round_trains_and_spends_nothing_twice(tmp_path, monkeypatch):
    study = private_study_of(rounds=2)
    whole = run(study, tmp_path / "whole").result
    trained, exchanges = [], []
    train = SiteWork.train
    monkeypatch.setattr(
        SiteWork, "train", lambda self, *a, **k: trained.append(1) or train(self, *a, **k)
    )
    handle = Session.handle

    def cut_before_the_masked_vectors_of_round_two(self, request):
        if type(decode(request)).__name__ == "MaskRequest":
            exchanges.append(1)
            if len(exchanges) == 6:  # 4 of the statistics round, then the second site of round 1
                raise KeyboardInterrupt
        return handle(self, request)

    monkeypatch.setattr(Session, "handle", cut_before_the_masked_vectors_of_round_two)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / "cut")
    resumed = run(study, tmp_path / "cut").result
    assert (resumed.last.parameters == whole.last.parameters).all()
    assert len(trained) == 2 * 4
    for home in (tmp_path / "cut" / "sites").iterdir():
        ledger = Ledger(home / "ledger.sqlite")
        assert sum(spend.kind == "training" for spend in ledger.spends()) == 2


def cut_at_the_second(kind: str, count: int, monkeypatch):
    handle, seen = Session.handle, []

    def cut(self, request):
        if type(decode(request)).__name__ == kind:
            seen.append(1)
            if len(seen) == count:
                raise KeyboardInterrupt
        return handle(self, request)

    monkeypatch.setattr(Session, "handle", cut)


def test_a_training_round_cut_off_while_it_was_unmasked_is_lost_and_never_summed_again(
    tmp_path, monkeypatch
):
    cut_at_the_second("UnmaskRequest", 4 + 2, monkeypatch)  # the second site of round 1
    with pytest.raises(KeyboardInterrupt):
        run(study_of(rounds=3), tmp_path)
    outcome = run(study_of(rounds=3), tmp_path, notes=(notes := Notes()))
    assert [made.lost for made, _ in outcome.history] == [False, True, False, False]
    assert notes.rounds == [2, 3]
    assert np.isfinite(outcome.result.last.parameters).all()


def test_statistics_cut_off_while_they_were_unmasked_are_asked_for_again(tmp_path, monkeypatch):
    whole = run(study_of(rounds=1), tmp_path / "whole").result.last
    cut_at_the_second("UnmaskRequest", 2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(study_of(rounds=1), tmp_path / "cut")
    resumed = run(study_of(rounds=1), tmp_path / "cut").result.last
    assert (resumed.parameters == whole.parameters).all()


SILENCES = {
    "a site never says READY": ("drop:2:ready:2", 2, 5),
    "a site goes silent before its masked vector": ("drop:2:masked:2", 2, 5),
    "a site's READY is damaged on the way": ("corrupt:2:ready:2", 2, 5),
    "a site's masked vector is damaged on the way": ("corrupt:2:masked:2", 2, 5),
    "a site sends an old masked vector again": ("replay:2:masked:2", 2, 5),
    "a site claims to be another": ("lie:2:masked:2", 2, 5),
    "a site goes silent after its masked vector": ("drop:2:ack:2", None, 6),
    "a site keeps its shares to itself": ("drop:2:shares:2", None, 6),
    "a site's shares are damaged on the way": ("corrupt:2:shares:2", None, 6),
}


@pytest.mark.parametrize("case", SILENCES)
def test_a_round_goes_on_without_the_site_that(tmp_path, case):
    fault, left_out, counted = SILENCES[case]
    notes = Notes()
    study = study_of(rounds=3)
    options = SimulationOptions(faults=(Fault.parse(fault),))
    outcome = run(study, tmp_path, options, sites=6, notes=notes)
    second = notes.records[1]
    assert len(second.survivors) == counted
    assert (2 in second.survivors) == (left_out is None)
    assert [len(record.survivors) for record in notes.records] == [6, counted, 6]
    assert np.isfinite(outcome.result.last.parameters).all()


def test_the_sum_without_a_dropped_site_is_the_sum_of_the_others(tmp_path):
    study, gone = study_of(rounds=1), "hospital-2"
    options = SimulationOptions(faults=tuple(Fault.parse(f"drop:2:masked:{n}") for n in (0, 1)))
    with_dropout = simulate(study, hospitals(5), tmp_path / "five", options, Notes()).result.last
    others = {name: records for name, records in hospitals(5).items() if name != gone}
    plain = simulate(study, others, tmp_path / "four", PLAIN, Notes()).result.last
    # the seeds of sites 3 to 5 follow their index, so only the update's size can be compared
    assert with_dropout.record.update_norm == pytest.approx(plain.record.update_norm, rel=0.35)
    assert with_dropout.record.survivors == (1, 3, 4, 5)


def test_too_few_sites_end_the_run_with_reasons_and_keep_what_was_finished(tmp_path):
    faults = tuple(Fault.parse(f"drop:{site}:masked:2") for site in (1, 2))
    study = study_of(rounds=3)
    with pytest.raises(HospitiumError, match=r"at least 3 sites.*Nothing was revealed"):
        run(study, tmp_path, SimulationOptions(faults=faults), sites=4)
    resumed = run(study, tmp_path, sites=4, notes=(notes := Notes()))
    assert notes.rounds == [2, 3]
    whole = run(study, tmp_path / "whole", sites=4)
    assert (resumed.result.last.parameters == whole.result.last.parameters).all()


def test_fewer_sites_than_the_study_wants_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(
        ConfigError, match="expected 5 to 8 sites as the study's cohort says, got 4"
    ):
        run(study_of(cohort={"minimum_sites": 5}), tmp_path)


def test_no_bytes_that_leave_a_session_contain_an_unmasked_update(tmp_path, monkeypatch):
    left, contributions = [], []
    exchange = in_memory.InMemoryTransport.exchange

    def listen(self, requests, deadline_s):
        for site, answer in exchange(self, requests, deadline_s):
            left.append(answer)
            yield site, answer

    train = SiteWork.train
    monkeypatch.setattr(in_memory.InMemoryTransport, "exchange", listen)
    monkeypatch.setattr(
        SiteWork,
        "train",
        lambda self, *a, **k: contributions.append(train(self, *a, **k)) or contributions[-1],
    )
    study = study_of(rounds=2, model={"hidden": [64]}, cohort={"ring_bits": 32})
    run(study, tmp_path)
    assert len(contributions) == 8
    carriers = [m for m in map(decode, left) if isinstance(m, Masked) and len(m.body)]
    assert len(carriers) == 8
    for contribution in contributions:
        raw = contribution.vector.tobytes()
        pieces = [raw[at : at + 16] for at in range(0, len(raw) - 16, 64)]
        told = [piece for piece in pieces if any(piece)]  # zeros: a unit that never fires
        assert len(told) > 0.8 * len(pieces)
        for piece in told:  # any 16 bytes of it would be a leak
            assert not any(piece in answer for answer in left)
    # what is left in the masked words is uniform: no byte value stands out (chi-square with 255
    # degrees of freedom, false alarm about once in 10^6)
    words = np.frombuffer(b"".join(bytes(m.body) for m in carriers), np.uint8)
    expected = len(words) / 256
    statistic = ((np.bincount(words, minlength=256) - expected) ** 2 / expected).sum()
    assert statistic < 377
    # and each masked vector is uncorrelated with the update under it
    for message, contribution in zip(carriers, contributions, strict=True):
        masked = np.frombuffer(message.body, np.int32).astype(float)
        assert abs(np.corrcoef(masked, contribution.vector)[0, 1]) < 5 / np.sqrt(len(masked))


def test_the_ledger_of_every_site_holds_every_round_and_stays_within_epsilon(tmp_path):
    from hospitium_client.training.accounting import default_delta, epsilon

    study = private_study_of(rounds=3)
    run(study, tmp_path)
    for home in (tmp_path / "sites").iterdir():
        ledger = Ledger(home / "ledger.sqlite")
        spends = ledger.spends()
        kinds = [spend.kind for spend in spends]
        assert kinds[:4] == ["statistics", "training", "training", "training"]
        assert set(kinds[4:]) == {"evaluation"}
        spent = epsilon(ledger.events(), default_delta(30))
        assert 0 < spent <= 8.0


@pytest.mark.parametrize(
    "name", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]
)
def test_every_strategy_learns(tmp_path, name):
    rate = {"fedadam": 0.05, "fedyogi": 0.05, "fedadagrad": 0.1}.get(name, 1.0)
    strategy = {"name": name, "server_learning_rate": rate}
    if name == "fedprox":
        strategy["proximal_mu"] = 0.1
    outcome = run(study_of(rounds=8, strategy=strategy), tmp_path, PLAIN)
    assert outcome.result.test.auroc > 0.8


def test_early_stopping_ends_the_study_when_nothing_gets_better(tmp_path):
    study = study_of(rounds=30, training={"learning_rate": 1e-6}, early_stopping={"patience": 2})
    notes = Notes()
    outcome = run(study, tmp_path, PLAIN, notes=notes)
    assert outcome.result.stopped_early
    assert len(notes.rounds) < 8


def test_a_hospital_with_one_class_and_one_with_three_patients_take_part(tmp_path):
    everyone = hospitals(4)
    ill = everyone["hospital-2"]
    everyone["hospital-2"] = ill.take(np.flatnonzero(ill.targets == 1))
    everyone["hospital-3"] = everyone["hospital-3"].take(np.arange(3))
    outcome = simulate(private_study_of(rounds=2), everyone, tmp_path, MASKED, Notes())
    assert outcome.result.last.record.survivors == (1, 2, 3, 4)
    assert np.isfinite(outcome.result.last.parameters).all()


def test_a_full_disk_while_checkpointing_keeps_the_rounds_before(tmp_path, monkeypatch):
    study = study_of(rounds=3)
    whole = run(study, tmp_path / "whole", PLAIN).result.last
    real, written = os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 5:  # each version costs two: its file and its directory
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HospitiumError, match=r"No space left on device.*Make room"):
        run(study, tmp_path / "cut", PLAIN)
    monkeypatch.setattr(os, "fsync", real)
    assert not list((tmp_path / "cut").rglob("*.part"))
    resumed = run(study, tmp_path / "cut", PLAIN, notes=(notes := Notes())).result.last
    assert notes.rounds == [2, 3]
    assert (resumed.parameters == whole.parameters).all()


def test_the_exported_model_is_the_best_version_with_named_tensors(tmp_path):
    outcome = run(study_of(rounds=2), tmp_path, PLAIN)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(tensors) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    flat = np.concatenate([tensors[n].ravel() for n in ("0.weight", "0.bias")])
    assert (flat == outcome.result.best.parameters[: len(flat)]).all()


def test_versions_name_their_parents_and_a_changed_file_is_noticed(tmp_path):
    outcome = run(study_of(rounds=2), tmp_path, PLAIN)
    lineage = outcome.lineage
    assert [parent for _, _, parent in lineage] == ["", lineage[0][1], lineage[1][1]]
    path = tmp_path / "coordinator" / "version-0002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="expected the version that was registered"):
        run(study_of(rounds=2), tmp_path, PLAIN)


def test_a_changed_study_does_not_continue_another_ones_models(tmp_path):
    run(study_of(rounds=2), tmp_path, PLAIN)
    with pytest.raises(ConfigError, match="changed after it began"):
        run(study_of(rounds=3), tmp_path, PLAIN)


def test_a_registry_can_be_read_while_a_run_is_going_on(tmp_path):
    run(study_of(rounds=1), tmp_path, PLAIN)
    with sqlite3.connect(tmp_path / "coordinator" / "registry.sqlite") as database:
        assert database.execute("SELECT count(*) FROM versions").fetchone() == (2,)


def test_all_data_in_one_place_is_never_called_a_masked_federation(tmp_path):
    study, everybody = study_of(), {"pooled": hospital(1)}
    with pytest.raises(ConfigError, match="3 to 8 sites"):
        simulate(study, everybody, tmp_path / "masked", MASKED, Notes())
    outcome = simulate(study, everybody, tmp_path / "plain", PLAIN, Notes())
    assert outcome.result.last.number == study.rounds
