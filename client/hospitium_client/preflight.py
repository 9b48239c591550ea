"""Before a study: is everything in order at this hospital, and if not, what is to be done?

Checks of the line need the network and no data; checks of the data need no network. Where trainer
and node are apart, each side can be asked for alone.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from hospitium_client.approvals import load_policy, standing
from hospitium_client.enrolment import PinnedRosters
from hospitium_client.joining import open_site
from hospitium_client.protection.ledger import Ledger
from hospitium_client.studies import all_studies
from hospitium_common.errors import ConfigError, HospitiumError
from hospitium_common.messages import StudyState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hospitium_client.policy import SitePolicy
    from hospitium_client.settings import SiteHome
    from hospitium_client.studies import StoredStudy

LEAST_DISK, COMFORTABLE_DISK = 500 << 20, 5 << 30
DAY_S = 24 * 3600.0
SOON_DAYS = 30
FULL = 0.9
"""A trainer that needs more than this part of the memory will be killed some day."""


class Verdict(StrEnum):
    """How a check came out."""

    GOOD = "good"
    WARNING = "look at it"
    BAD = "bad"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was checked, how it came out, what was found, and what to do if it is not good."""

    what: str
    verdict: Verdict
    found: str
    remedy: str = ""


def good(what: str, found: str) -> Finding:
    """Return a finding that needs nothing done."""
    return Finding(what=what, verdict=Verdict.GOOD, found=found)


def bad(what: str, found: str, remedy: str = "") -> Finding:
    """Return a finding that stops the site from taking part."""
    return Finding(what=what, verdict=Verdict.BAD, found=found, remedy=remedy)


def doubtful(what: str, found: str, remedy: str) -> Finding:
    """Return a finding that works today."""
    return Finding(what=what, verdict=Verdict.WARNING, found=found, remedy=remedy)


def check_site(
    home: SiteHome, passphrase: Callable[[], bytes], note: Callable[[str], None]
) -> Iterator[Finding]:
    """Check what needs no network: keys, roster, disk, ledger, and each approved study.

    ``note`` is told what is being done, because reading data may take a while.
    """
    note("keys and roster")
    yield from _check_enrolment(home, passphrase)
    yield _check_disk(home)
    yield _check_ledger(home)
    yield from _check_studies(home, note)


def _check_enrolment(home: SiteHome, passphrase: Callable[[], bytes]) -> Iterator[Finding]:
    what = "keys and roster"
    try:
        site = open_site(home, passphrase)
        waiting = PinnedRosters(home).pending()
    except HospitiumError as error:
        yield bad(what, str(error))
        return
    member, now = site.member, time.time()
    days = (member.expires - now) / DAY_S
    name = f"enrolled as {member.name}, site {member.index} of roster version {site.roster.version}"
    if member.revoked:
        yield bad(what, f"{name}, but revoked", "ask the coordinator")
    elif days <= 0:
        yield bad(what, f"{name}, but expired", "`hospitium site rotate`, and send the new request")
    elif days < SOON_DAYS:
        yield doubtful(
            what, f"{name}; expires in {days:.0f} days", "`hospitium site rotate` in time"
        )
    else:
        yield good(what, f"{name}; valid for {days:.0f} days")
    if waiting is not None:
        yield doubtful(
            "waiting roster", f"version {waiting.version} changes a key",
            "`hospitium site accept-roster` shows it",
        )  # fmt: skip


def _check_disk(home: SiteHome) -> Finding:
    free = shutil.disk_usage(home.path).free
    found = f"{free / 2**30:.1f} GiB free under {home.path}"
    if free < LEAST_DISK:
        return bad("disk", found, f"make room: at least {LEAST_DISK >> 20} MiB")
    if free < COMFORTABLE_DISK:
        return doubtful("disk", found, "large models and years of ledger want more")
    return good("disk", found)


def _check_ledger(home: SiteHome) -> Finding:
    if not home.ledger.exists():
        return good("ledger", "nothing was spent yet")
    ledger = Ledger(home.ledger)
    try:
        return good("ledger", f"{len(ledger.spends())} entries, chain intact")
    except HospitiumError as error:
        return bad("ledger", str(error))
    finally:
        ledger.close()


def _check_studies(home: SiteHome, note: Callable[[str], None]) -> Iterator[Finding]:
    try:
        policy = load_policy(home.policy)
        stored = all_studies(home.studies)
    except HospitiumError as error:
        yield bad("rules and studies", str(error))
        return
    approved = [one for one in stored if standing(policy, one.study) is StudyState.APPROVED]
    waiting = [one for one in stored if standing(policy, one.study) is StudyState.WAITING]
    if waiting:
        names = ", ".join(one.study.study.id for one in waiting)
        yield doubtful("waiting studies", names, "`hospitium site review STUDY`")
    if not approved:
        yield good("studies", "none is approved; nothing will be trained")
    for one in approved:
        yield from _check_study(home, one, policy, note)
    if approved:
        yield _check_memory()


def _check_study(
    home: SiteHome, stored: StoredStudy, policy: SitePolicy, note: Callable[[str], None]
) -> Iterator[Finding]:
    # torch takes seconds to load, and checks of the line do without it
    from hospitium_client.data.loading import load_records
    from hospitium_client.rehearsal import rehearse
    from hospitium_client.training.device import device_named

    name = stored.study.study.id
    note(f"data of {name}")
    try:
        folder = home.data_of(name)
        records = load_records(folder, stored.study)
    except HospitiumError as error:
        yield bad(f"data of {name}", str(error), "mend the data or the mapping, then look again")
        return
    except Exception as error:  # its text may hold data
        yield bad(f"data of {name}", f"{type(error).__name__} while reading it")
        return
    synthetic = ", SYNTHETIC" if records.synthetic else ""
    yield good(f"data of {name}", f"{len(records)} records in {folder}{synthetic}")
    note(f"dry run of {name}")
    began = time.monotonic()
    try:
        device = device_named(home.settings().compute.device)
        with tempfile.TemporaryDirectory(prefix="hospitium-") as place:
            rehearse(stored.study, records, policy, Path(place), device)
    except HospitiumError as error:
        yield bad(f"dry run of {name}", str(error))
    except MemoryError:
        yield bad(f"dry run of {name}", "ran out of memory", "a machine with more, or a smaller "
                  "batch in the study")  # fmt: skip
    except Exception as error:  # its text may hold data
        yield bad(
            f"dry run of {name}", f"{type(error).__name__} in this site's own code",
            "`hospitium --debug site preflight` shows details to this site's administrator",
        )  # fmt: skip
    else:
        took_s = time.monotonic() - began
        yield good(
            f"dry run of {name}", f"a masked round and a training step on {device}, {took_s:.1f} s"
        )


def _check_memory() -> Finding:
    """Compare what the dry runs needed with what this machine, or this container, has."""
    needed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    there = memory_limit()
    found = f"{needed / 2**30:.1f} GiB needed at most, {there / 2**30:.1f} GiB there"
    if needed > FULL * there:
        return bad("memory", found, "give the trainer more memory, or ask for a smaller batch")
    if needed > FULL / 2 * there:
        return doubtful("memory", found, "leave the rest of the memory to the trainer")
    return good("memory", found)


def memory_limit(root: Path = Path("/")) -> int:
    """Return the memory, in bytes, that this process may use: the machine's or its container's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [machine]
    for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int((root / name).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return min(limits)


def demand_address(home: SiteHome) -> tuple[str, int]:
    """Return host and port of the coordinator.

    Raises:
        ConfigError: this hospital was not admitted yet.
    """
    address = home.settings().coordinator.address
    if not address:
        raise ConfigError("no address: `hospitium site admit NAME.admission.json` comes first")
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
