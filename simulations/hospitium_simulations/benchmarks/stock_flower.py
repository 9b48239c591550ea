"""Stock Flower as its documentation starts it: SuperLink, SuperNodes and `flwr run`, over TLS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from hospitium_server.certificates import certificate_pem, key_pem, make_ca, make_server_certificate
from hospitium_simulations.local_federation import free_ports

if TYPE_CHECKING:
    from collections.abc import Sequence

PATIENCE_S = 300


def stock_exchanges(directory: Path, *, sites: int, exchanges: int, numbers: int) -> list[float]:
    """Send ``numbers`` float32 to every node and back, ``exchanges`` times; return the seconds."""
    directory.mkdir(parents=True)
    port, *node_ports = free_ports(1 + sites)
    result = directory / "result.json"
    ca = _certificates(directory)
    _settings(directory, port, ca)
    with ExitStack() as running:
        running.callback(_stop, processes := list[subprocess.Popen[bytes]]())
        processes.append(
            _start(directory, "superlink", [
                "flower-superlink", "--host", "127.0.0.1", "--port", str(port),
                "--ssl-ca-certfile", str(ca), "--ssl-certfile", str(directory / "server.pem"),
                "--ssl-keyfile", str(directory / "server.key"),
                "--disable-runtime-dependency-installation",
            ])
        )  # fmt: skip
        for number, node_port in enumerate(node_ports, start=1):
            processes.append(
                _start(directory, f"node-{number}", [
                    "flower-supernode", "--root-certificates", str(ca),
                    "--superlink", f"127.0.0.1:{port}", "--port", str(node_port),
                ])
            )  # fmt: skip
        app = running.enter_context(as_file(files(__package__) / "stock_app"))
        run = [
            "flwr", "run", str(app), "--run-config",
            f"exchanges={exchanges} numbers={numbers} sites={sites} result='{result}'",
        ]  # fmt: skip
        until = time.monotonic() + PATIENCE_S
        while _start(directory, "run", run).wait() != 0:  # the SuperLink takes a while to come up
            _demand(time.monotonic() < until, directory)
            time.sleep(1)
        while not result.exists():
            _demand(time.monotonic() < until, directory)
            time.sleep(0.2)
    return [float(one) for one in json.loads(result.read_text(encoding="utf-8"))]


def _certificates(directory: Path) -> Path:
    now = datetime.now(UTC)
    ca_key, ca = make_ca("stock Flower", now)
    key, certificate = make_server_certificate(ca_key, ca, ["127.0.0.1"], now)
    (directory / "ca.pem").write_bytes(certificate_pem(ca))
    (directory / "server.pem").write_bytes(certificate_pem(certificate))
    (directory / "server.key").write_bytes(key_pem(key))
    return directory / "ca.pem"


def _settings(directory: Path, port: int, ca: Path) -> None:
    (directory / "config.toml").write_text(
        f'[superlink]\ndefault = "stock"\n[superlink.stock]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{ca}"\n',
        encoding="utf-8",
    )


def _start(directory: Path, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
    programs = str(Path(sys.executable).parent)
    environment = {
        **os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(directory), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }  # fmt: skip
    with (directory / f"{name}.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - Flower's own programs
            [f"{programs}/{command[0]}", *command[1:]], env=environment, stdout=log, stderr=log
        )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _demand(fine: bool, directory: Path) -> None:
    if not fine:
        raise TimeoutError(f"stock Flower did not finish; its logs are in {directory}")
