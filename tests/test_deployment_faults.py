"""Whatever breaks, a round completes with enough hospitals, is repeated, or says why it stops.

One federation of real processes runs one long study with differential privacy, and things break in
it one after the other. After each fault the hospital (or the coordinator) that it hit has to take
part in a finished round again; how long that took is written to ``bench-results/recovery.md``.
At the end every training is in every ledger at most once.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from hospitium_client.protection.site_state import Phase, SiteState
from hospitium_common.codec import Reader
from hospitium_common.schedule import NUMBERS_PER_STAGE
from hospitium_common.study import Study, load_study
from hospitium_server.settings import CoordinatorHome
from hospitium_server.studies import NOT_CONNECTED, State, Status, StudyFolder
from hospitium_simulations.local_federation import LocalFederation
from tests.deployment_kit import log_of, spends, wait_until
from tests.harm_kit import (
    Line,
    child_of,
    dial_through,
    found,
    kill,
    private_study,
    trainings_booked,
)

pytestmark = pytest.mark.deploy

TITLES = ("St. Anna", "Mercy", "Lakeside", "Northgate")
FIRST, LATE = ("st-anna", "mercy", "lakeside"), "northgate"
DEADLINE_S, PATIENCE_S = 40, 400
TABLE = Path(__file__).parent.parent / "bench-results" / "recovery.md"
CUT_S = 60
ROOM_BYTES = 16 << 20


@dataclass(kw_only=True)
class Scene:
    """A study under way. ``line`` is the network of Mercy."""

    federation: LocalFederation
    study: Study
    folder: StudyFolder
    line: Line
    recovered: dict[str, str] = field(default_factory=dict)

    def status(self) -> Status:
        return self.folder.status()

    def finished(self) -> int:
        rounds = self.status().rounds
        return rounds[-1].round if rounds else 0

    def index(self, name: str) -> int:
        return next(i for i, one in self.status().sites.items() if one.name == name)

    def home(self, name: str) -> Path:
        return self.federation.hospitals[name].home

    def process(self, name: str) -> int:
        running = self.federation.hospitals[name].process
        assert running is not None
        return running.pid

    def state(self, name: str) -> SiteState:
        """Where a hospital stands in the round, as it is on its disk."""
        file = self.home(name) / "studies" / self.study.digest.hex() / "session" / "exchange.bin"
        return SiteState.decode(Reader(file.read_bytes()).bytes())

    def catch(self, name: str, phase: Phase) -> None:
        """Wait until a hospital has just come into a phase of a round."""
        wait_until(lambda: self.state(name).phase is not phase, f"{name} not in {phase}")
        until = time.monotonic() + PATIENCE_S
        while self.state(name).phase is not phase:
            assert time.monotonic() < until, f"expected {name} in {phase}"
            time.sleep(0.002)

    def wait_for_training(self, name: str) -> None:
        """Wait until a training was booked: it begins at this moment."""
        hospital = self.federation.hospitals[name]
        before, until = trainings_booked(hospital), time.monotonic() + PATIENCE_S
        while trainings_booked(hospital) == before:
            assert time.monotonic() < until, f"expected {name} to train"
            time.sleep(0.005)

    def expect_recovery(self, fault: str, *names: str) -> None:
        """Wait for a round after this moment with these hospitals in its sum; note how long."""
        began, before = time.monotonic(), self.finished()
        wanted = {self.index(name) for name in names}

        def is_back() -> bool:
            status = self.status()
            assert status.state in (State.RUNNING, State.WAITING), status.reason
            return any(wanted <= set(one.sites) for one in status.rounds if one.round > before)

        wait_until(is_back, f"{', '.join(names)} in a round after: {fault}", PATIENCE_S)
        took = time.monotonic() - began
        rounds = self.status().rounds
        meanwhile = sum(1 for one in rounds if one.round > before and not wanted <= set(one.sites))
        self.recovered[fault] = f"{took:.1f} s | {meanwhile}"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("faults")
    with found(directory / "federation", TITLES) as federation:
        line = Line(CoordinatorHome(federation.home).settings().network.port)
        dial_through(federation.hospitals["mercy"], line.port)
        federation.serve()
        for name in FIRST:
            federation.open(name)
        file = private_study(
            federation.directory, "endless", rounds=200, steps=150, deadline_s=DEADLINE_S
        )
        file.write_text(file.read_text().replace("exchange_s = 60", "exchange_s = 20"))
        federation.begin(file, dict.fromkeys(FIRST, "data"))
        folder = StudyFolder(federation.home / "studies" / "endless")
        made = Scene(federation=federation, study=load_study(file), folder=folder, line=line)
        wait_until(lambda: made.finished() >= 1, "a first round", PATIENCE_S)
        try:
            yield made
        finally:
            write_table(made)
            line.close()


def write_table(scene: Scene) -> None:
    """Write down how long every recovery took."""
    lines = ["| fault | back in a finished round after | rounds without it meanwhile |"]
    lines += ["| --- | --- | --- |"]
    lines += [f"| {fault} | {took} |" for fault, took in scene.recovered.items()]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")


# --- a hospital ----------------------------------------------------------------------------------


def test_nothing_broken_is_the_measure_for_the_rest(scene: Scene) -> None:
    scene.expect_recovery("none: the next round", *FIRST)


def test_a_trainer_killed_in_mid_training_trains_again_and_spends_once(scene: Scene) -> None:
    scene.wait_for_training("st-anna")
    kill(child_of(scene.process("st-anna"), "site trainer"))
    scene.expect_recovery("trainer killed in mid-training", *FIRST)
    demand_every_training_is_booked_once(scene)


@pytest.mark.parametrize("phase", [Phase.READY, Phase.MASKED, Phase.CONFIRMED])
def test_a_site_killed_between_two_exchanges_comes_back(scene: Scene, phase: Phase) -> None:
    scene.catch("lakeside", phase)
    lakeside = scene.federation.hospitals["lakeside"].process
    assert lakeside is not None
    scene.federation.kill(lakeside)
    scene.federation.open("lakeside")
    scene.expect_recovery(f"site killed after {phase.name}, started again", *FIRST)
    demand_every_training_is_booked_once(scene)


def test_a_site_that_comes_late_is_paired_and_takes_part(scene: Scene) -> None:
    epoch = scene.state("st-anna").epoch
    scene.federation.open(LATE)
    home = scene.home(LATE)
    arrived = home / "studies" / scene.study.digest.hex() / "study.toml.sig"
    wait_until(arrived.exists, "the study at the late hospital", PATIENCE_S)
    words = ("site", "approve", "endless", "--data", home / "data", "--home", home)
    scene.federation.run(*words)
    scene.expect_recovery("a site joins late (from its approval)", *FIRST, LATE)
    assert scene.state("st-anna").epoch > epoch


def test_a_node_restarted_within_the_heartbeat_window_is_let_in_again(scene: Scene) -> None:
    # Without its number the coordinator takes it for a second node (HTTP 412).
    node = child_of(scene.process("st-anna"), "site node")
    (scene.home("st-anna") / "run" / "node.id").unlink()
    kill(node)
    scene.expect_recovery("node killed, its number lost (HTTP 412)", "st-anna")
    assert "takes this node for online already" in log_of(scene.federation, "st-anna")


def test_a_trainer_without_memory_refuses_and_recovers(scene: Scene) -> None:
    federation = scene.federation
    trainer = psutil.Process(child_of(scene.process("st-anna"), "site trainer"))
    before = len(log_of(federation, "st-anna"))
    room = trainer.memory_info().vms + ROOM_BYTES
    trainer.rlimit(psutil.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    # Two million parameters: more than there is room for.
    file = private_study(federation.directory, "large", hidden="[1500, 1500]", rounds=60)
    federation.begin(file, dict.fromkeys((*FIRST, LATE), "data"))

    def failed() -> bool:
        said = log_of(federation, "st-anna")[before:]
        return "own code" in said or "started again" in said

    wait_until(failed, "the trainer out of memory", PATIENCE_S)
    if trainer.is_running():
        trainer.rlimit(psutil.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    index, large = scene.index("st-anna"), StudyFolder(federation.home / "studies" / "large")

    def takes_part() -> bool:
        return any(index in one.sites for one in large.status().rounds)

    began = time.monotonic()
    wait_until(takes_part, "the hospital in a round of the large study", PATIENCE_S)
    took = f"{time.monotonic() - began:.1f} s"
    scene.recovered["trainer out of memory (from the relief)"] = f"{took} | -"
    federation.run("study", "stop", "large", "--home", federation.home)
    wait_until(lambda: large.status().state is State.STOPPED, "the large study stopped")
    demand_every_training_is_booked_once(scene)


def test_the_slowest_site_misses_the_deadline_and_the_others_go_on(scene: Scene) -> None:
    before, late = scene.finished(), scene.index("lakeside")
    trainer = child_of(scene.process("lakeside"), "site trainer")
    os.kill(trainer, signal.SIGSTOP)
    try:
        others = {scene.index(name) for name in ("st-anna", "mercy", LATE)}

        def without() -> bool:
            later = [one for one in scene.status().rounds if one.round > before]
            return any(set(one.sites) == others for one in later)

        wait_until(without, "a round without the slow site", PATIENCE_S)
        (told,) = [
            one for one in scene.status().rounds if one.round > before and set(one.sites) == others
        ][:1]
        assert told.missing.get(late) == "no answer before the deadline"
    finally:
        os.kill(trainer, signal.SIGCONT)
    scene.expect_recovery("slowest site over the deadline (from its waking)", "lakeside")


# --- the network and the clock -------------------------------------------------------------------


def test_a_network_cut_for_a_minute_costs_that_site_its_rounds_and_no_more(scene: Scene) -> None:
    before, mercy = scene.finished(), scene.index("mercy")
    scene.line.cut()
    cut = time.monotonic()
    wait_until(lambda: scene.finished() > before + 1, "rounds without the site", PATIENCE_S)
    time.sleep(max(0.0, CUT_S - (time.monotonic() - cut)))
    without = [one for one in scene.status().rounds if mercy not in one.sites]
    assert any(one.round > before for one in without)
    scene.line.mend()
    scene.expect_recovery("network cut for a minute (from its mending)", "mercy")
    demand_every_training_is_booked_once(scene)


def test_a_clock_that_is_a_minute_behind_does_not_matter(scene: Scene) -> None:
    restart(scene, "st-anna", clock("-60s"))
    scene.expect_recovery("restart, with a clock a minute behind", "st-anna")


@pytest.mark.parametrize("skew", ["+60s", "-1h"])
def test_a_clock_that_is_ahead_or_far_behind_is_named_and_set_right(
    scene: Scene, skew: str
) -> None:
    index, told = scene.index("st-anna"), "one of the two clocks is wrong"
    before = log_of(scene.federation, "st-anna").count(told)
    restart(scene, "st-anna", clock(skew))
    wait_until(lambda: log_of(scene.federation, "st-anna").count(told) > before, "the clock named")
    wait_until(
        lambda: scene.status().sites[index].what == NOT_CONNECTED,
        "the coordinator to say that it is not connected", PATIENCE_S,
    )  # fmt: skip
    restart(scene, "st-anna", {})
    scene.expect_recovery(f"clock off by {skew}, set right (from the restart)", "st-anna")


# --- the coordinator -----------------------------------------------------------------------------


def test_a_killed_server_application_goes_on_from_its_checkpoint(scene: Scene) -> None:
    kill(coordinator_child(scene, "hospitium_server.app"))
    scene.expect_recovery("ServerApp killed", *FIRST)
    demand_every_training_is_booked_once(scene)


def test_a_killed_superlink_is_started_again_under_the_round(scene: Scene) -> None:
    kill(coordinator_child(scene, "hospitium_server.superlink"))
    scene.expect_recovery("SuperLink killed", *FIRST)
    demand_every_training_is_booked_once(scene)


def test_a_coordinator_killed_in_mid_round_goes_on_when_it_is_started(scene: Scene) -> None:
    scene.wait_for_training("mercy")
    running = scene.federation.coordinator_process
    assert running is not None
    family = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    for process in family:  # all at once: a power cut
        process.kill()
    running.wait()
    scene.federation.serve()
    scene.expect_recovery("coordinator killed in mid-round, started again", *FIRST)
    demand_every_training_is_booked_once(scene)


# --- too few -------------------------------------------------------------------------------------


def test_with_too_few_sites_the_study_waits_says_why_and_is_resumed(scene: Scene) -> None:
    federation = scene.federation
    for name in ("mercy", LATE):
        stop(scene, name)
    wait_until(
        lambda: scene.status().state is State.WAITING
        and "expected at least 3 sites to stand ready, got 2" in scene.status().reason,
        "the reason why nothing happens", PATIENCE_S,
    )  # fmt: skip
    before = scene.finished()
    federation.run("study", "stop", "endless", "--home", federation.home)
    wait_until(lambda: scene.status().state is State.STOPPED, "the study stopped", PATIENCE_S)
    spent = {name: spends(federation, name) for name in FIRST}
    for name in ("mercy", LATE):
        federation.open(name)
    federation.run("study", "resume", "endless", "--home", federation.home)
    wait_until(lambda: scene.finished() > before, "a round after the resume", PATIENCE_S)
    for name in FIRST:
        now = spends(federation, name)
        assert now[: len(spent[name])] == spent[name]
    demand_every_training_is_booked_once(scene)


def test_a_site_restored_from_a_backup_pairs_again_and_keeps_its_books(scene: Scene) -> None:
    federation, home = scene.federation, scene.home("lakeside")
    stop(scene, "lakeside")
    backup = federation.directory / "backup"
    shutil.copytree(home, backup, ignore=shutil.ignore_patterns("*.sock"))
    federation.open("lakeside")
    scene.expect_recovery("site stopped for a back-up, started again", "lakeside")
    # The disk dies; the newest ledger survived elsewhere.
    stop(scene, "lakeside")
    epoch, books = scene.state("lakeside").epoch, spends(federation, "lakeside")
    newest = {file.name: file.read_bytes() for file in home.glob("ledger.sqlite*")}
    shutil.rmtree(home)
    shutil.copytree(backup, home)
    for file in home.glob("ledger.sqlite*"):
        file.unlink()
    for name, content in newest.items():
        (home / name).write_bytes(content)
    federation.open("lakeside")
    federation.run("study", "stop", "endless", "--home", federation.home)
    wait_until(lambda: scene.status().state is State.STOPPED, "the study stopped", PATIENCE_S)
    federation.run("study", "resume", "endless", "--home", federation.home)
    wait_until(lambda: scene.status().state is not State.STOPPED, "the study resumed", PATIENCE_S)
    scene.expect_recovery("site restored from a back-up, study resumed", "lakeside")
    assert scene.state("lakeside").epoch > epoch
    assert spends(federation, "lakeside")[: len(books)] == books
    demand_every_training_is_booked_once(scene)


def test_no_round_was_reported_over_a_subset_in_silence(scene: Scene) -> None:
    rounds = scene.status().rounds
    told = {one.round for one in rounds}
    # A round that was cut off after its shares were asked for is lost: spent, and never summed.
    log = log_of(scene.federation, "coordinator")
    lost = re.findall(r"training round (\d+) was cut off while it was unmasked: it is lost", log)
    assert told | {int(number) for number in lost} == set(range(1, max(told) + 1))
    for one in rounds:
        assert len(one.sites) >= 3
        for site, reason in one.missing.items():
            assert site not in one.sites
            assert reason


def demand_every_training_is_booked_once(scene: Scene) -> None:
    """No round is booked twice, no training is asked for again, and every sum was paid for."""
    rounds = scene.status().rounds
    for name in scene.federation.hospitals:
        if not (scene.home(name) / "ledger.sqlite").exists():
            continue
        trained = [
            one.round
            for one in spends(scene.federation, name)
            if one.kind == "training" and one.study == scene.study.digest
        ]
        assert len(trained) == len(set(trained))
        assert all(number % NUMBERS_PER_STAGE == 0 for number in trained)
        index = scene.index(name)
        summed = {one.round for one in rounds if index in one.sites}
        assert summed <= {number // NUMBERS_PER_STAGE - 1 for number in trained}


def coordinator_child(scene: Scene, word: str) -> int:
    running = scene.federation.coordinator_process
    assert running is not None
    return child_of(running.pid, word)


def stop(scene: Scene, name: str) -> None:
    """End a hospital's processes in good order."""
    running = scene.federation.hospitals[name].process
    assert running is not None
    running.send_signal(signal.SIGTERM)
    running.wait(60)


def restart(scene: Scene, name: str, environment: dict[str, str]) -> None:
    """Stop a hospital and start it with other variables in its environment."""
    stop(scene, name)
    before = scene.federation.environment
    scene.federation.environment = {**before, **environment}
    try:
        scene.federation.open(name)
    finally:
        scene.federation.environment = before


def clock(skew: str) -> dict[str, str]:
    """Variables under which a process takes it to be earlier or later than it is."""
    installed = find_spec("libfaketime")
    if installed is None or installed.origin is None:
        pytest.skip("libfaketime is not installed here")
    (library,) = Path(installed.origin).parent.rglob("libfaketime.so.1")
    return {"LD_PRELOAD": str(library), "FAKETIME": skew, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
