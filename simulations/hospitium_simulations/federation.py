"""A whole federation in one process: real sessions, real rounds, files as in a hospital."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_client.policy import SitePolicy
from hospitium_client.protection.masking import Party
from hospitium_client.session import Session
from hospitium_client.work import SiteWork, shared_layout, tail_layout
from hospitium_common.durable import write_durably
from hospitium_common.entropy import Entropy, seeded_entropy
from hospitium_common.errors import ConfigError
from hospitium_common.models import build, tensors_of
from hospitium_common.roster import Roster
from hospitium_common.secagg.keys import SiteKeys
from hospitium_server.registry import Registry
from hospitium_server.rounds import StudyResult, StudyRun, Watcher
from hospitium_server.secure_sum import SecureSum
from hospitium_simulations.faults import Fault, FaultyTransport
from hospitium_simulations.in_memory import InMemoryTransport
from hospitium_simulations.plain_sum import PlainSum

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from hospitium_client.data.records import Records
    from hospitium_common.study import Study


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """``masked = False`` leaves out secure aggregation, to see what it costs and changes."""

    masked: bool = True
    faults: tuple[Fault, ...] = ()


def simulate(
    study: Study,
    hospitals: Mapping[str, Records],
    directory: Path,
    options: SimulationOptions,
    watcher: Watcher,
    on_step: Callable[[], None] | None = None,
) -> StudyResult:
    """Run a study over these hospitals, or take it up where it stopped in ``directory``.

    All randomness follows from the study's seed, so a run can be repeated and resumed bit for
    bit; a simulation's noise therefore protects nobody, and its report says so.

    Raises:
        ConfigError: fewer hospitals than the study asks for, or more than it allows.
        HospitiumError: a round failed; run it again to resume.
    """
    cohort = study.cohort
    if not cohort.minimum_sites <= len(hospitals) <= cohort.maximum_sites:
        raise ConfigError(
            f"expected {cohort.minimum_sites} to {cohort.maximum_sites} sites as the study's "
            f"cohort says, got {len(hospitals)}"
        )
    model = build(study)
    layout = shared_layout(study, model)
    tail = tail_layout(study, layout)
    tensors = tensors_of(model)
    first = layout.flatten({name: tensors[name] for name in layout.names})
    registry = Registry(directory / "coordinator", study.digest, layout.digest)
    homes = {index: directory / "sites" / name for index, name in enumerate(hospitals, start=1)}
    works: dict[int, SiteWork] = {}
    entropies: dict[int, Entropy] = {}
    for (index, home), records in zip(homes.items(), hospitals.values(), strict=True):
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        works[index] = SiteWork(study, records, home, on_step=on_step)
        entropies[index] = seeded_entropy(f"simulation/{study.study.seed}/{index}".encode())
    if not options.masked:
        run = StudyRun(
            study=study, layout=layout, tail_layout=tail, registry=registry,
            summing=PlainSum(study, works, entropies), watcher=watcher,
        )  # fmt: skip
        return run.run(first)
    governance, coordinator = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    keys = {index: _keys(home) for index, home in homes.items()}
    roster = Roster(
        study=study.digest,
        epoch=1,
        coordinator=coordinator.public_key().public_bytes_raw(),
        sites={index: key.public() for index, key in keys.items()},
    ).signed_by(governance)
    sessions = {
        index: Session(
            party=Party(index=index, keys=keys[index], roster=roster),
            study=study,
            policy=_agreeing_policy(study),
            home=homes[index],
            open_work=lambda index=index: works[index],  # type: ignore[misc]  # mypy cannot type a default
            entropy=entropies[index],
        )
        for index in homes
    }
    latest = registry.latest()
    summing = SecureSum(
        study=study, roster=roster, key=coordinator, tail_layout=tail,
        transport=FaultyTransport(InMemoryTransport(sessions), options.faults),
        next_attempt=registry.next_attempt,
        previous_result=bytes(64) if latest is None else bytes.fromhex(latest.record.result),
    )  # fmt: skip
    try:
        summing.pair()
        run = StudyRun(
            study=study, layout=layout, tail_layout=tail, registry=registry, summing=summing,
            watcher=watcher,
        )  # fmt: skip
        return run.run(first)
    finally:
        for session in sessions.values():
            session.close()
        registry.close()


def _keys(home: Path) -> SiteKeys:
    """Return the site's keys; made once, and kept so that an interrupted run can go on."""
    path = home / "keys.bin"
    if not path.exists():
        write_durably(path, SiteKeys.generate().encode())
    return SiteKeys.decode(path.read_bytes())


def _agreeing_policy(study: Study) -> SitePolicy:
    """A simulated hospital agrees to whatever the researcher simulates."""
    return SitePolicy(
        approved=frozenset({study.digest.hex()}),
        minimum_sites=study.cohort.minimum_sites,
        largest_epsilon=study.privacy.epsilon or 1.0,
        allow_training_without_privacy=True,
        allow_record_level_privacy=True,
        largest_weight=study.cohort.weight_cap,
        most_rounds=study.rounds,
        smallest_count=0,
    )
