"""Cuts one data set into hospitals, patient by patient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hospitium_client.data.records import refuse_divided_patients
from hospitium_common.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hospitium_client.data.records import Records

    Index = NDArray[np.int64]

Kind = Literal["site", "iid", "dirichlet", "quantity", "pooled"]


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How to cut: along the data's own sites, evenly, by skewed labels, by skewed sizes, or not.

    ``alpha`` is the concentration of the Dirichlet distribution: the smaller, the more uneven
    (Hsu, Qi and Brown 2019).
    """

    kind: Kind
    alpha: float = 0.5

    @classmethod
    def parse(cls, text: str) -> Partition:
        """Read ``site``, ``iid``, ``pooled``, ``dirichlet:ALPHA`` or ``quantity:ALPHA``.

        Raises:
            ConfigError: it is something else.
        """
        kind, _, alpha = text.partition(":")
        try:
            if kind in ("site", "iid", "pooled") and not alpha:
                return cls(kind=kind)  # type: ignore[arg-type]  # checked in the line above
            if kind in ("dirichlet", "quantity") and 0 < float(alpha or 0.5) < math.inf:
                return cls(kind=kind, alpha=float(alpha or 0.5))  # type: ignore[arg-type]  # checked in the line above
        except ValueError:
            pass
        raise ConfigError(
            "expected a partition of site, iid, pooled, dirichlet:ALPHA or quantity:ALPHA, got "
            f"{text!r}"
        )

    def __str__(self) -> str:
        return (
            f"{self.kind}:{self.alpha:g}" if self.kind in ("dirichlet", "quantity") else self.kind
        )


def cut(records: Records, partition: Partition, sites: int, seed: int) -> dict[str, Index]:
    """Return name -> record numbers of every hospital; all records of a patient stay together.

    Raises:
        ConfigError: the data names no sites, or a hospital would get nobody.
        DataRejected: the data has a patient at two sites.
    """
    if partition.kind == "pooled":
        return {"pooled": np.arange(len(records))}
    if partition.kind == "site":
        if records.sites is None:
            raise ConfigError(
                "expected data that names its sites, got none; use --partition iid, or add "
                "site_column to dataset.toml"
            )
        names = sorted(set(records.sites.tolist()))
        if len(names) < 3:
            raise ConfigError(
                f"expected at least 3 sites in the data, got {len(names)}; with fewer a sum would "
                "show a site's own part. Split each with --split-sites"
            )
        refuse_divided_patients(records.patients, records.sites, "site")
        return {name: np.flatnonzero(records.sites == name) for name in names}
    generator = np.random.default_rng(seed)
    patients, owner = np.unique(records.patients, return_inverse=True)
    shares = _shares(records, owner, len(patients), partition, sites, generator)
    return {
        f"site-{number + 1}": _filled(np.flatnonzero(shares[owner] == number), number, partition)
        for number in range(sites)
    }


def _shares(
    records: Records, owner: Index, patients: int, partition: Partition, sites: int,
    generator: np.random.Generator,
) -> Index:  # fmt: skip
    """Return the site of every patient."""
    site = np.zeros(patients, np.int64)
    if partition.kind == "iid":
        site[generator.permutation(patients)] = np.arange(patients) % sites
        return site
    if partition.kind == "quantity":
        sizes = generator.dirichlet(np.full(sites, partition.alpha))
        site[generator.permutation(patients)] = _spread(patients, sizes)
        return site
    label = np.zeros(patients, np.int64)
    label[owner] = records.targets if records.targets.ndim == 1 else records.targets.argmax(1)
    for one in np.unique(label):
        members = generator.permutation(np.flatnonzero(label == one))
        site[members] = _spread(len(members), generator.dirichlet(np.full(sites, partition.alpha)))
    return site


def _spread(count: int, shares: NDArray[np.float64]) -> Index:
    """Return ``count`` site numbers in these proportions."""
    ends = np.rint(np.cumsum(shares) * count).astype(np.int64)
    return np.searchsorted(ends, np.arange(count), side="right").clip(max=len(shares) - 1)


def _filled(index: Index, number: int, partition: Partition) -> Index:
    if len(index) == 0:
        raise ConfigError(
            f"site {number + 1} would get no patient under {partition}; use fewer sites, a larger "
            "alpha or another seed"
        )
    return index
