"""What this hospital allows, checked by the trainer before any data is read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from hospitium_common.errors import NotApproved
from hospitium_common.study import Study

NEW_POLICY = """\
# What this hospital allows. Whatever is not approved here is refused.
approved = []                       # digests; `hospitium site approve STUDY` adds one
minimum_sites = 5                   # never in a sum over fewer hospitals
largest_epsilon = 8.0
allow_training_without_privacy = false
allow_record_level_privacy = false
allow_distributed_noise = false     # true: other hospitals add part of the noise that is promised
largest_weight = 10000
most_rounds = 200
smallest_count = 10                 # figures about fewer patients never leave
most_evaluations = 8                # of one study on held-out patients; each tells a little
"""


class SitePolicy(BaseModel):
    """The rules of one site; the defaults are the strict ones.

    ``approved`` holds the digests (hex) of the studies that this site agreed to. Everything else
    is refused, whoever signed it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    approved: frozenset[str] = frozenset()
    minimum_sites: int = Field(default=5, ge=3, le=200)
    largest_epsilon: float = Field(default=8.0, gt=0)
    allow_training_without_privacy: bool = False
    allow_record_level_privacy: bool = False
    allow_distributed_noise: bool = False
    largest_weight: int = Field(default=10_000, gt=0)
    most_rounds: int = Field(default=200, gt=0)
    smallest_count: int = Field(default=10, ge=0)
    most_evaluations: int = Field(default=8, gt=0)

    def check(self, study: Study) -> None:
        """Compare a study with the rules.

        Raises:
            NotApproved: the first rule that the study breaks, and what the site would accept.
        """
        for broken, reason in (
            (
                study.digest.hex() not in self.approved,
                "expected a study that this site approved, got one that it did not",
            ),
            (
                study.cohort.minimum_sites < self.minimum_sites,
                f"expected a cohort of at least {self.minimum_sites} sites, the study asks for "
                f"{study.cohort.minimum_sites}",
            ),
            (
                not study.is_private and not self.allow_training_without_privacy,
                "expected differential privacy, the study trains without it",
            ),
            (
                study.is_private and (study.privacy.epsilon or 0.0) > self.largest_epsilon,
                f"expected epsilon ≤ {self.largest_epsilon}, the study asks for "
                f"{study.privacy.epsilon}",
            ),
            (
                study.is_private
                and study.privacy.unit == "record"
                and not self.allow_record_level_privacy,
                "expected privacy per patient, the study protects single records only",
            ),
            (
                study.noise_is_distributed and not self.allow_distributed_noise,
                "expected all of the noise to be added here, the study counts on "
                f"{study.privacy.honest_sites} honest sites for it",
            ),
            (
                study.cohort.weight_cap > self.largest_weight,
                f"expected a weight cap of at most {self.largest_weight}, the study has "
                f"{study.cohort.weight_cap}",
            ),
            (
                study.rounds > self.most_rounds,
                f"expected at most {self.most_rounds} rounds, the study has {study.rounds}",
            ),
        ):
            if broken:
                raise NotApproved(f"study {study.study.id}: {reason}")
