"""Which nodes the SuperLink lets in: exactly those of the roster that may take part now."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError
from hospitium_server.enrolment import load_roster

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hospitium_server.control import SuperLinkControl
    from hospitium_server.settings import CoordinatorHome

log = logging.getLogger(__name__)

PATIENCE = 2
"""Flower takes a node for gone after two heartbeats' time without a word."""


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """A site's node, for people to see; ``last_heartbeat`` in seconds since 1970, 0 for never."""

    online: bool
    last_heartbeat: float


class NodeKeeper:
    """Follows the roster's file, and keeps ``nodes.json`` in ``directory`` up to date."""

    def __init__(
        self, home: CoordinatorHome, directory: Path, clock: Callable[[], float] = time.time
    ) -> None:
        self._home, self._file, self._clock = home, directory / "nodes.json", clock
        self._written = b""
        self._complaint = ""

    def look(self, control: SuperLinkControl) -> None:
        """Let in who is new, and out who was revoked or has expired.

        With a roster that cannot be read everything stays as it is, and the log says so.

        Raises:
            SuperLinkUnavailable: it does not answer.
        """
        try:
            members = load_roster(self._home).members
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("%s", error)
            return
        wanted = {m.node_key: m.name for m in members if m.is_active(self._clock())}
        there = control.nodes()
        for node in there:
            if node.public_key not in wanted:
                control.unregister(node.node_id)
                log.info("%s: its node is let in no longer", node.name)
        for key in wanted.keys() - {node.public_key for node in there}:
            control.register(key, wanted[key])
            log.info("%s: its node is let in", wanted[key])
        self._write(
            {
                node.name: NodeStatus(
                    online=node.online,
                    last_heartbeat=max(node.online_until - PATIENCE * node.heartbeat_interval, 0.0),
                )
                for node in there
                if node.public_key in wanted
            }
        )

    def _write(self, nodes: dict[str, NodeStatus]) -> None:
        text = json.dumps({name: asdict(node) for name, node in nodes.items()}, indent=1).encode()
        if text != self._written:
            write_durably(self._file, text)
            self._written = text


def read_nodes(directory: Path) -> dict[str, NodeStatus]:
    """Return what a server wrote last; nothing if none did."""
    try:
        rows = json.loads((directory / "nodes.json").read_bytes())
        return {name: NodeStatus(**row) for name, row in rows.items()}
    except (OSError, ValueError, TypeError):
        return {}
