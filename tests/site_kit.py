"""Enrolled hospitals on disk, with data, and a coordinator's end to talk to their trainers."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_client.approvals import approve_study
from hospitium_client.enrolment import PinnedRosters
from hospitium_client.joining import prepare_site
from hospitium_client.keys import load_node_key, load_public_keys
from hospitium_client.settings import SiteHome
from hospitium_common.archive import RoundArchive
from hospitium_common.enrolment.public_keys import node_public_pem
from hospitium_common.envelope import Request, open_answer, seal_request
from hospitium_common.errors import PeerProtocolError
from hospitium_common.federation import FederationRoster, Member
from hospitium_common.messages import Standing, StudyOffer, decode
from hospitium_common.metrics import TailLayout
from hospitium_common.models import build, shared_layout, tensors_of
from hospitium_common.study import parse_study
from hospitium_common.study.signature import sign_study, signature_path
from hospitium_common.toml_file import with_text_value
from hospitium_server.registry import Registry
from hospitium_server.rounds import StudyRun
from hospitium_server.secure_sum import Presence, SecureSum
from tests.federation_kit import Notes, hospital

STUDY = """\
format = 1
rounds = 2

[study]
id = "small-study"
title = "A small study"
seed = 4

[task]
kind = "tabular_classification"
classes = ["well", "ill"]

[data]
missing = "mask"
columns = [
  { name = "age", low = 0, high = 100 },
  { name = "pressure", low = 0, high = 200 },
  { name = "lactate", low = 0.1, high = 30, scale = "log" },
]

[model]
name = "mlp"
hidden = [6]

[training]
local_epochs = 1
batch_size = 16
learning_rate = 0.1

[privacy]
mode = "none"

[cohort]
minimum_sites = 3
maximum_sites = 8
weight_cap = 1000
"""
POLICY = """\
approved = []
minimum_sites = 3
allow_training_without_privacy = true
smallest_count = 0
"""


def write_data(folder: Path, seed: int, patients: int = 60) -> None:
    """Write one hospital's table, as it might come out of a data warehouse."""
    records = hospital(seed, patients)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.toml").write_text('kind = "table"\nfile = "rows.csv"\nsynthetic = true\n')
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "label", "age", "pressure", "lactate"])
        for patient, target, values in zip(
            records.patients, records.targets, records.values, strict=True
        ):
            cells = ["" if np.isnan(value) else f"{value:.6g}" for value in values]
            writer.writerow([patient, ["well", "ill"][target], *cells])


class Hospitals:
    """Three enrolled hospitals with data, a study on the coordinator's disk, and its keys."""

    def __init__(self, folder: Path, count: int = 3, study: str = STUDY) -> None:
        self.folder = folder
        self.governance, self.coordinator = (Ed25519PrivateKey.generate() for _ in range(2))
        self.study_path = folder / "study.toml"
        self.study_path.write_text(study)
        self.study = parse_study(study)
        sign_study(self.study, self.study_path, self.coordinator)
        self.homes = {}
        for index in range(1, count + 1):
            home = self.homes[index] = SiteHome(folder / f"site-{index}")
            prepare_site(home, f"hospital-{index}", f"Hospital {index}")
            home.policy.write_text(POLICY)
            write_data(home.path / "records", index)
            text = home.settings_file.read_text()
            home.settings_file.write_text(
                with_text_value(text, "data", "default", "records", name="site.toml")
            )
        self.roster = self.sign(version=1)
        for home in self.homes.values():
            PinnedRosters(home).pin(self.roster)

    def member(self, index: int, expires: int | None = None) -> Member:
        home = self.homes[index]
        return Member(
            index=index, name=f"hospital-{index}", title=f"Hospital {index}",
            keys=load_public_keys(home.site_keys),
            node_key=node_public_pem(load_node_key(home.node_key).public_key()),
            expires=expires if expires is not None else 2**40,
        )  # fmt: skip

    def sign(self, version: int, members=None, key=None) -> FederationRoster:
        """Return a version of the roster with the governance key's signature."""
        key = key or self.governance
        return FederationRoster(
            name="test", version=version,
            coordinator=self.coordinator.public_key().public_bytes_raw(),
            governance=key.public_key().public_bytes_raw(),
            members=tuple(members or (self.member(index) for index in self.homes)),
        ).signed_by(key)  # fmt: skip

    def revoking(self, index: int, version: int = 2) -> FederationRoster:
        members = [replace(m, revoked=m.index == index) for m in self.roster.members]
        return self.sign(version, members)

    def approve(self) -> None:
        for home in self.homes.values():
            approve_study(home.policy, self.study)

    def offer(self, **changes) -> StudyOffer:
        fields = {
            "document": self.study_path.read_bytes(),
            "signature": signature_path(self.study_path).read_bytes(),
            "roster": self.roster.encode(),
        }
        return StudyOffer(**{**fields, **changes})

    def ask(self, answer, message, *, key=None, study=None):
        """Seal a message, let a trainer answer, open what comes back."""
        payload = message if isinstance(message, bytes) else message.encode()
        request = Request(study=study or self.study.digest, nonce=os.urandom(16), payload=payload)
        data = answer(seal_request(request, key or self.coordinator))
        opened = open_answer(data, self.roster, request.digest)
        return opened.site, decode(opened.payload)

    def standing(self, answer, **changes) -> Standing:
        _, standing = self.ask(answer, self.offer(**changes))
        assert isinstance(standing, Standing), standing
        return standing

    def run(self, answers, folder: Path, notes: Notes | None = None):
        """Run the whole study over ``answers`` (site -> what answers), as the coordinator does."""
        study, model = self.study, build(self.study)
        layout = shared_layout(study, model)
        tail_layout = TailLayout.of(study, layout)
        tensors = tensors_of(model)
        registry = Registry(folder / "coordinator", study.digest, layout.digest)
        presence = Presence(federation=self.roster, sites=tuple(answers))
        summing = SecureSum(
            study=study, key=self.coordinator, present=lambda: presence,
            transport=SealingTransport(self, answers), tail_layout=tail_layout,
            next_epoch=registry.next_epoch, next_attempt=registry.next_attempt,
            begin_unmasking=registry.begin_unmasking,
            archive=RoundArchive(registry.directory / "rounds", keep_masked=False),
        )  # fmt: skip
        try:
            return StudyRun(
                study=study, layout=layout, tail_layout=tail_layout, registry=registry,
                summing=summing, watcher=notes or Notes(),
            ).run(layout.flatten({name: tensors[name] for name in layout.names}))  # fmt: skip
        finally:
            registry.close()


class SealingTransport:
    """Every message in a signed envelope, every answer checked: what Flower carries."""

    def __init__(self, hospitals: Hospitals, answers) -> None:
        self._hospitals, self._answers = hospitals, answers

    def exchange(self, requests, deadline_s):
        hospitals = self._hospitals
        for site, payload in requests.items():
            request = Request(study=hospitals.study.digest, nonce=os.urandom(16), payload=payload)
            data = self._answers[site](seal_request(request, hospitals.coordinator))
            try:
                answer = open_answer(data, hospitals.roster, request.digest)
            except PeerProtocolError:
                continue
            yield answer.site, bytes(answer.payload)
