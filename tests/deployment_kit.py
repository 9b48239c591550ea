"""A coordinator and hospitals as real processes over real TLS, for tests of the deployment."""

import json
import time

import pytest

from hospitium_client.protection.ledger import Ledger
from hospitium_client.settings import SiteHome
from hospitium_simulations.local_federation import LocalFederation
from hospitium_simulations.quick_study import prepare_for_quick_studies

TITLES = ("North", "East", "South")
PATIENCE_S = 120


@pytest.fixture
def federation(tmp_path):
    """Three enrolled hospitals that have data; nothing runs yet."""
    with LocalFederation(directory=tmp_path, titles=TITLES) as made:
        made.found()
        for hospital in made.hospitals.values():
            prepare_for_quick_studies(hospital)
        yield made


def start(federation):
    """Start the coordinator and every hospital."""
    federation.serve()
    for name in federation.hospitals:
        federation.open(name)


def begin(federation, study, names=None):
    """Submit a study, and let these hospitals (default: all) approve it."""
    federation.begin(study, dict.fromkeys(names or federation.hospitals, "data"))


def wait_until(condition, what, patience_s=PATIENCE_S):
    """Wait for something to become true; say what did not."""
    until = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < until, f"expected {what} within {patience_s} s"
        time.sleep(0.1)
    return found


def spends(federation, name):
    """What a hospital's ledger holds; its chain is checked on the way."""
    ledger = Ledger(SiteHome(federation.hospitals[name].home).ledger)
    try:
        return ledger.spends()
    finally:
        ledger.close()


def log_of(federation, name):
    """What a hospital's processes wrote, or the coordinator's."""
    return (federation.directory / f"{name}.log").read_text(errors="replace")


def read_json(path):
    return json.loads(path.read_text())
