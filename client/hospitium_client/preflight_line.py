"""The line to the coordinator, checked step by step: name, port, certificate, answer, clock."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
import urllib.request
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hospitium_client.preflight import DAY_S, SOON_DAYS, bad, demand_address, doubtful, good
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hospitium_client.preflight import Finding
    from hospitium_client.settings import SiteHome

PATIENCE_S = 10.0
GOOD_BEHIND_S, MOST_BEHIND_S = 30.0, 240.0
GOOD_AHEAD_S, MOST_AHEAD_S = 2.0, 4.0
"""Flower refuses a node whose clock is five minutes behind the coordinator's, or five seconds ahead
of it."""


def check_line(
    home: SiteHome, note: Callable[[str], None], clock: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Dial the coordinator as the node will, and look at what comes back. No key is used."""
    try:
        host, port = demand_address(home)
        authority = home.ca.read_text(encoding="ascii")
        context = ssl.create_default_context(cadata=authority)
    except (ConfigError, OSError, ValueError) as error:
        yield bad("address", str(error), "`hospitium site admit` pins address and CA")
        return
    note(f"line to {host}:{port}")
    connection, way = _connection(host, port, context)
    try:
        connection.connect()
        yield good("address", f"{host}:{port} answers{way}")
        yield _check_certificate(connection.sock, clock())
        connection.request("GET", "/health")
        answer = connection.getresponse()
        yield _check_answer(answer.status)
        yield _check_clock(answer.headers.get("Date", ""), clock())
    except (OSError, http.client.HTTPException) as error:
        yield _explained(error, host, port, way)
    finally:
        connection.close()


def _connection(
    host: str, port: int, context: ssl.SSLContext
) -> tuple[http.client.HTTPSConnection, str]:
    """Return a connection as the node makes it: through HTTPS_PROXY where that is set."""
    proxy = urlsplit(urllib.request.getproxies().get("https", ""))
    if not proxy.hostname or urllib.request.proxy_bypass(host):
        return http.client.HTTPSConnection(host, port, timeout=PATIENCE_S, context=context), ""
    connection = http.client.HTTPSConnection(
        proxy.hostname, proxy.port or 3128, timeout=PATIENCE_S, context=context
    )
    connection.set_tunnel(host, port)
    return connection, f" through the proxy {proxy.hostname}"


def _explained(error: Exception, host: str, port: int, way: str) -> Finding:
    place = f"{host}:{port}{way}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return bad(
            "certificate", f"not accepted: {error.verify_message}",
            "something between here and the coordinator opens TLS, or the server's certificate "
            "was not made by the CA that this hospital pinned: call the coordinator",
        )  # fmt: skip
    if isinstance(error, socket.gaierror):
        return bad(
            "address", f"{place}: no such name",
            "ask your network department, or add it to the hosts file",
        )  # fmt: skip
    if isinstance(error, ConnectionRefusedError):
        return bad(
            "address", f"{place}: refused", "the coordinator is not running, or the port is wrong"
        )
    if isinstance(error, ssl.SSLError | http.client.HTTPException):
        return bad(
            "coordinator", f"{place}: no useful answer ({type(error).__name__})",
            "is it the coordinator that listens there? is it running?",
        )  # fmt: skip
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return bad(
        "address", f"{place}: {reason}",
        f"the firewall must let this machine dial out to {host}, TCP {port}",
    )  # fmt: skip


def _check_answer(status: int) -> Finding:
    if status != http.client.OK:
        return bad("coordinator", f"answers HTTP {status}", "its log says why")
    return good("coordinator", "runs")


def _check_certificate(line: ssl.SSLSocket, now: float) -> Finding:
    certificate = line.getpeercert() or {}
    until = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    days = (until - now) / DAY_S
    found = f"made by the pinned CA, {line.version()}, valid for {days:.0f} days"
    if days < SOON_DAYS:
        return doubtful("certificate", found, "ask the coordinator to renew it")
    return good("certificate", found)


def _check_clock(date: str, now: float) -> Finding:
    try:
        theirs = parsedate_to_datetime(date)
    except ValueError:
        return doubtful("clock", "the coordinator told no time", "compare the clocks by hand")
    skew_s = now - theirs.timestamp()
    ours = datetime.fromtimestamp(now, UTC)
    found = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the coordinator's"
    if not -MOST_BEHIND_S <= skew_s <= MOST_AHEAD_S:
        return bad(
            "clock", f"{found} ({ours:%H:%M:%S} here, {theirs:%H:%M:%S} there, UTC)",
            "set the clock with NTP (`timedatectl set-ntp true`); a node 5 s ahead or 5 min behind "
            "is refused",
        )  # fmt: skip
    if not -GOOD_BEHIND_S <= skew_s <= GOOD_AHEAD_S:
        return doubtful("clock", found, "set the clock with NTP (`timedatectl set-ntp true`)")
    return good("clock", found)
