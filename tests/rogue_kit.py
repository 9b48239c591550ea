"""Parties that mean harm, over real connections: a coordinator and a hospital that lie."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_public_key

from hospitium_client.enrolment import PinnedRosters
from hospitium_client.fleet import Fleet
from hospitium_client.keys import load_node_key, load_site_keys
from hospitium_client.node import Node, Pace
from hospitium_client.settings import SiteHome
from hospitium_client.trainer import Trainer
from hospitium_client.trainer_service import TrainerServer
from hospitium_common.envelope import Request, open_answer, seal_request
from hospitium_common.federation import FederationRoster
from hospitium_common.messages import (
    Message,
    Paired,
    PairOffers,
    PairRequest,
    Purpose,
    StudyOffer,
    decode,
)
from hospitium_common.metrics import TailLayout
from hospitium_common.models import build, shared_layout
from hospitium_common.roster import Roster
from hospitium_common.schedule import STATISTICS_STAGE, protocol_round, secagg_policy
from hospitium_common.secagg.quantiser import Quantiser
from hospitium_common.study import Study
from hospitium_common.study.signature import sign_study, signature_path
from hospitium_server.keys import load_key
from hospitium_server.settings import CoordinatorHome
from hospitium_server.unmasking import signed_task
from tests.deployment_kit import wait_until
from tests.fleet_kit import Coordinator

RUN_S = 20
"""A run whose server application gives no sign of life ends by itself; a new one is begun."""


class EvilCoordinator(Coordinator):
    """Holds everything that a coordinator holds, and sends whatever a test wants.

    A real SuperLink behind real TLS, on the port that the hospitals dial; only the program that
    decides what is sent is not ours.
    """

    def __init__(self, home: Path, folder: Path) -> None:
        self.home = CoordinatorHome(home)
        settings = self.home.settings()
        self._certificate = self.home.resolve(settings.tls.certificate)
        self._key = self.home.resolve(settings.tls.key)
        self._database = str(folder / "superlink.db")
        self.port, self._server, self._thread = settings.network.port, None, None
        self.start()
        self.key = load_key(self.home.coordinator_key)
        self.roster = FederationRoster.decode(self.home.roster.read_bytes())
        self.nodes = {
            member.index: self.enrol(load_pem_public_key(member.node_key))
            for member in self.roster.members
        }
        self.run, self._begun = self.begin_run(), time.monotonic()

    def wait_for_sites(self) -> None:
        """Wait until every node is there."""
        wanted = set(self.nodes.values())
        wait_until(lambda: self.state.get_nodes(self.run) >= wanted, "every node online")

    def sealed(self, study: bytes, message: Message, key=None) -> bytes:
        request = Request(study=study, nonce=os.urandom(16), payload=message.encode())
        return seal_request(request, key or self.key)

    def say(self, site: int, study: bytes, message: Message, within_s: float = 60.0) -> Message:
        """Send a sealed message to a site and return what it answers, its signature checked."""
        if time.monotonic() - self._begun > RUN_S:
            self.run, self._begun = self.begin_run(), time.monotonic()
        request = Request(study=study, nonce=os.urandom(16), payload=message.encode())
        data = self.ask(self.run, self.nodes[site], seal_request(request, self.key), within_s)
        answer = open_answer(data, self.roster, request.digest)
        assert answer.site == site
        return decode(answer.payload)

    def offer(self, study_file: Path, study: Study, roster: FederationRoster | None = None):
        """Return an offer of a study that this coordinator signs."""
        sign_study(study, study_file, self.key)
        return StudyOffer(
            document=study_file.read_bytes(),
            signature=signature_path(study_file).read_bytes(),
            roster=(roster or self.roster).encode(),
        )


class RogueHospital:
    """An enrolled hospital whose node and trainer run here, and lie where ``tamper`` says so.

    ``tamper(request, answer)`` gets the sealed bytes of both and returns what is sent instead.
    """

    def __init__(self, home: Path, tamper: Callable[[bytes, bytes], bytes]) -> None:
        self.home = SiteHome(home)
        self.key = load_node_key(self.home.node_key)
        self.keys = load_site_keys(self.home.site_keys, lambda: b"")
        self.coordinator = PinnedRosters(self.home).pinned().coordinator
        self.trainer = Trainer(self.home, passphrase=lambda: b"")
        self.tamper = tamper
        self._server = TrainerServer(self.home.socket, self._answer)
        self.fleet = Fleet(
            self.home.settings().coordinator.address, self.home.ca.read_bytes(), self.key, None
        )
        self._stop = threading.Event()
        pace = Pace(busy_s=0.1, idle_s=0.5)
        self._node = Node(self.fleet, self.home.socket, home / "node", pace, self._stop)
        self._thread = threading.Thread(target=self._node.run, daemon=True)

    def __enter__(self) -> RogueHospital:
        self._server.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self._server.stop(0.1)
        self.trainer.close()

    def _answer(self, request: bytes) -> bytes:
        return self.tamper(request, self.trainer.answer(request))


def pair(evil: EvilCoordinator, study: Study, epoch: int, sites: tuple[int, ...]) -> Roster:
    """Pair sites under a key epoch as an honest coordinator does; return the epoch's roster."""
    roster = evil.roster.for_study(study.digest, epoch, sites)
    request = PairRequest(
        version=evil.roster.version, epoch=epoch, sites=sites, roster=roster.digest
    )
    offers = []
    for site in sites:
        answer = evil.say(site, study.digest, request)
        assert isinstance(answer, PairOffers), answer
        offers += answer.offers
    for site in sites:
        given = PairOffers(offers=tuple(one for one in offers if one.receiver == site))
        assert isinstance(evil.say(site, study.digest, given), Paired)
    return roster


def statistics_task(evil: EvilCoordinator, study: Study, roster: Roster, attempt: int = 1):
    """Return the policy and the signed task of a study's first round, which has no model."""
    number = protocol_round(STATISTICS_STAGE)
    tail = TailLayout.of(study, shared_layout(study, build(study))).length
    policy = secagg_policy(study, tail, number)
    task = signed_task(
        evil.key, roster, policy, purpose=Purpose.STATISTICS, round_number=number,
        attempt=attempt, invited=tuple(roster.sites), previous_result=bytes(64),
        quantiser=Quantiser(lengths=(), bounds=()), model=b"", public=b"",
    )  # fmt: skip
    return policy, task
