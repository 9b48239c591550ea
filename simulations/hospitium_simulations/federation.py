"""A whole federation in one process: real sessions, real rounds, files as in a hospital."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hospitium_client.policy import SitePolicy
from hospitium_client.protection.ledger import Ledger
from hospitium_client.session import Session
from hospitium_client.work import SiteWork
from hospitium_common.archive import RoundArchive
from hospitium_common.durable import write_durably
from hospitium_common.entropy import Entropy, seeded_entropy
from hospitium_common.errors import ConfigError
from hospitium_common.federation import FederationRoster, Member
from hospitium_common.metrics import TailLayout
from hospitium_common.models import build, shared_layout, tensors_of
from hospitium_common.secagg.keys import SiteKeys
from hospitium_server.evaluation import Figures, figures
from hospitium_server.registry import Registry, RoundRecord, Version
from hospitium_server.rounds import StudyResult, StudyRun, Summing, Watcher
from hospitium_server.secure_sum import Presence, SecureSum
from hospitium_simulations.baselines import baselines
from hospitium_simulations.faults import Fault, FaultyTransport
from hospitium_simulations.in_memory import InMemoryTransport
from hospitium_simulations.plain_sum import PlainSum
from hospitium_simulations.poison import Poison, PoisonedWork

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from hospitium_client.data.records import Records
    from hospitium_common.study import Study


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished simulation: the result, how it came about, and what it is compared with."""

    result: StudyResult
    history: tuple[tuple[RoundRecord, Figures | None], ...]
    lineage: tuple[tuple[int, str, str], ...]
    others: dict[str, Figures]
    by_site: dict[str, Figures]


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """``masked = False`` leaves out secure aggregation, to see what it costs and changes.

    ``keep_masked`` keeps the masked vectors beside the transcripts, for `hospitium audit-round`.
    ``poisons`` lets sites do harm.
    """

    masked: bool = True
    keep_masked: bool = False
    faults: tuple[Fault, ...] = ()
    poisons: tuple[Poison, ...] = ()


def simulate(
    study: Study,
    hospitals: Mapping[str, Records],
    directory: Path,
    options: SimulationOptions,
    watcher: Watcher,
    on_step: Callable[[], None] | None = None,
    *,
    with_baselines: bool = False,
) -> Outcome:
    """Run a study over these hospitals, or take it up where it stopped in ``directory``.

    All randomness follows from the study's seed, so a run can be repeated and resumed bit for
    bit; a simulation's noise therefore protects nobody, and its report says so. The best model
    is written to ``model.safetensors``.

    Raises:
        ConfigError: fewer hospitals than the study asks for, or more than it allows. One place
            that has all data is compared with, and may be one where nothing is masked.
        HospitiumError: a round failed; run it again to resume.
    """
    cohort = study.cohort
    alone = len(hospitals) == 1 and not options.masked
    if not alone and not cohort.minimum_sites <= len(hospitals) <= cohort.maximum_sites:
        raise ConfigError(
            f"expected {cohort.minimum_sites} to {cohort.maximum_sites} sites as the study's "
            f"cohort says, got {len(hospitals)}"
        )
    model = build(study)
    layout, tensors = shared_layout(study, model), tensors_of(model)
    tail_layout = TailLayout.of(study, layout)
    first = layout.flatten({name: tensors[name] for name in layout.names})
    works: dict[int, SiteWork] = {}
    entropies: dict[int, Entropy] = {}
    for index, (name, records) in enumerate(hospitals.items(), start=1):
        home = directory / "sites" / name
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        works[index] = _work(study, records, home, index, options, on_step)
        entropies[index] = seeded_entropy(f"simulation/{study.study.seed}/{index}".encode())
    registry = Registry(directory / "coordinator", study.digest, layout.digest)
    ledgers: dict[int, Ledger] = {}
    try:
        if options.masked:
            for index, work in works.items():
                ledgers[index] = Ledger(work.home / "ledger.sqlite")
            enrolled = _enrol(study, works, entropies, ledgers)
            summing: Summing = _secure_sum(study, tail_layout, enrolled, registry, options)
        else:
            summing = PlainSum(study, works, entropies)
        result = StudyRun(
            study=study, layout=layout, tail_layout=tail_layout,
            registry=registry, summing=summing, watcher=watcher,
        ).run(first)  # fmt: skip
        named = layout.unflatten(result.best.parameters)
        metadata = {"study": study.digest.hex(), "round": str(result.best.number)}
        write_durably(directory / "model.safetensors", safetensors.numpy.save(named, metadata))
        others = {}
        if with_baselines:
            public = result.best.normalisation
            others = baselines(study, hospitals, first, public, directory, on_step)
        by_site = {
            name: _at_one_site(study, work, result.best)
            for name, work in zip(hospitals, works.values(), strict=True)
        }
        return Outcome(
            by_site=by_site,
            result=result,
            history=registry.history(),
            lineage=registry.lineage(),
            others=others,
        )
    finally:
        for ledger in ledgers.values():
            ledger.close()
        registry.close()


def _work(
    study: Study, records: Records, home: Path, index: int, options: SimulationOptions,
    on_step: Callable[[], None] | None,
) -> SiteWork:  # fmt: skip
    poisons = [poison for poison in options.poisons if poison.site == index]
    if not poisons:
        return SiteWork(study, records, home, on_step=on_step)
    work = PoisonedWork(study, records, home, on_step=on_step)
    work.poisons = poisons
    return work


def _at_one_site(study: Study, work: SiteWork, version: Version) -> Figures:
    """How a model does at one hospital; a simulation may know, a coordinator never does."""
    tail = work.evaluate(version.parameters, version.normalisation).tail
    return figures(work.tail_layout.evaluation(tail).test, study)


@dataclass(frozen=True, kw_only=True)
class _Enrolled:
    """Everybody under one roster, and the open session of every site."""

    coordinator: Ed25519PrivateKey
    roster: FederationRoster
    sessions: Mapping[int, Session]


def _enrol(
    study: Study,
    works: Mapping[int, SiteWork],
    entropies: Mapping[int, Entropy],
    ledgers: Mapping[int, Ledger],
) -> _Enrolled:
    """Enrol every site under a roster that a governance key signed, and open its session."""
    governance, coordinator = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    keys = {index: _keys(work.home) for index, work in works.items()}
    roster = FederationRoster(
        name="simulation",
        version=1,
        coordinator=coordinator.public_key().public_bytes_raw(),
        governance=governance.public_key().public_bytes_raw(),
        members=tuple(
            Member(
                index=index, name=f"site-{index}", title=works[index].home.name, expires=2**62,
                keys=key.public(), node_key=f"none: simulated site {index}".encode(),
            )
            for index, key in keys.items()
        ),
    ).signed_by(governance)  # fmt: skip
    roster.check(governance.public_key().public_bytes_raw())
    sessions = {
        index: Session(
            index=index,
            keys=keys[index],
            federation=roster,
            study=study,
            policy=_agreeing_policy(study),
            home=work.home,
            ledger=ledgers[index],
            open_work=lambda work=work: work,  # type: ignore[misc]  # mypy cannot type a default
            entropy=entropies[index],
        )
        for index, work in works.items()
    }
    return _Enrolled(coordinator=coordinator, roster=roster, sessions=sessions)


def _secure_sum(
    study: Study,
    tail_layout: TailLayout,
    enrolled: _Enrolled,
    registry: Registry,
    options: SimulationOptions,
) -> SecureSum:
    presence = Presence(federation=enrolled.roster, sites=tuple(enrolled.sessions))
    return SecureSum(
        study=study,
        key=enrolled.coordinator,
        present=lambda: presence,
        transport=FaultyTransport(InMemoryTransport(enrolled.sessions), options.faults),
        tail_layout=tail_layout,
        next_epoch=registry.next_epoch,
        next_attempt=registry.next_attempt,
        begin_unmasking=registry.begin_unmasking,
        archive=RoundArchive(registry.directory / "rounds", keep_masked=options.keep_masked),
    )


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
        allow_distributed_noise=True,
        largest_weight=study.cohort.weight_cap,
        most_rounds=study.rounds,
        smallest_count=0,
    )
