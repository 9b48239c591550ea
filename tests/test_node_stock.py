"""The same ClientApp under Flower's own ``flower-supernode``, with a FAB that holds no code.

A contract with the pinned Flower: it fails loudly when an upgrade changes what we rely on.
"""

import hashlib
import os
import socket
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.fab import Fab

from hospitium_client.keys import load_node_key, make_node_key
from hospitium_client.trainer_service import TrainerServer
from hospitium_common.flower_record import payload_of
from tests.fleet_kit import Coordinator

pytestmark = pytest.mark.deploy

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "hospitium-run"
version = "1.0.0"
description = "Configuration only: the code is the one that is installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "hospitium"
fab-include = ["/README.md"]

[tool.flwr.app.components]
serverapp = "hospitium_server.app:app"
clientapp = "hospitium_client.app:app"
"""


def test_a_stock_supernode_runs_the_installed_app_with_a_fab_of_configuration(tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT)
    (app / "README.md").write_text("Nothing but configuration.\n")
    (app / "stowaway.py").write_text("raise SystemExit\n")
    content = build_fab_from_disk(app)
    assert not [name for name in zipfile.ZipFile(BytesIO(content)).namelist()
                if name.endswith(".py")]  # fmt: skip
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})

    key_file = tmp_path / "node.key"
    make_node_key(key_file)
    key = load_node_key(key_file)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    (tmp_path / "coordinator").mkdir()
    coordinator = Coordinator(tmp_path / "coordinator")
    (tmp_path / "ca.pem").write_bytes(coordinator.authority)
    trainer = TrainerServer(tmp_path / "trainer.sock", lambda data: b"seen " + data)
    trainer.start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    node_id = coordinator.enrol(key.public_key())
    programs = Path(sys.executable).parent
    node = subprocess.Popen(
        [
            programs / "flower-supernode", "--root-certificates", tmp_path / "ca.pem",
            "--superlink", coordinator.address, "--port", str(port),
            "--auth-supernode-private-key", key_file,
            "--node-config", f'trainer-socket="{tmp_path}/trainer.sock"',
        ],
        env={
            **os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        },
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not coordinator.is_online(node_id):
            assert time.monotonic() < until
            assert node.poll() is None
            time.sleep(0.2)
        run = coordinator.begin_run(fab)
        reply = coordinator.reply(run, coordinator.send(run, node_id, b"hello"), within_s=120)
        assert payload_of(reply.content) == b"seen hello"
    finally:
        node.terminate()
        node.wait(30)
        trainer.stop(0.1)
        coordinator.stop()
