"""The rounds of a study as rows for a report: who was missing, what was not used, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hospitium_server.evaluation import Figures
    from hospitium_server.registry import RoundRecord

    History = Sequence[tuple[RoundRecord, Figures | None]]

HEAD = (
    "who was missing", "round", "sites", "attempts", "AUROC", "norm", "allowed", "rounding",
    "received", "time",
)  # fmt: skip


def round_rows(history: History, names: Mapping[int, str]) -> list[dict[str, object]]:
    """Return every round's figures in full precision, by name, for CSV and JSON."""
    return [
        {
            "round": made.round,
            "sites": len(made.survivors),
            "missing": missing(made, names),
            "attempts": made.attempts,
            "auroc": None if score is None else score.auroc,
            "loss": None if score is None else score.loss,
            "outcome": outcome(made),
            "reason": reason(made),
            "model_of": made.round if made.model_of is None else made.model_of,
            "update_norm": made.update_norm,
            "norm_bound": made.norm_bound,
            "groups": len(made.groups),
            "groups_rejected": sum(bool(group.rejected) for group in made.groups),
            "scaled_down": made.scaled_down,
            "quantisation_error": made.quantisation_error,
            "rounding_to_noise": made.rounding_to_noise or None,
            "clipped_fraction": made.clipped_fraction,
            "dropped_contributions": made.dropped_contributions,
            "bytes_sent": made.bytes_sent,
            "bytes_received": made.bytes_received,
            "seconds": made.seconds,
        }
        for made, score in history
    ]


def shown_rows(history: History, names: Mapping[int, str]) -> list[list[str]]:
    """Return every round as cells under ``HEAD``."""
    return [
        [
            missing(made, names) or "nobody",
            str(made.round),
            str(len(made.survivors)),
            str(made.attempts),
            "" if score is None else f"{score.auroc:.3f}",
            f"{made.update_norm:.3g}" if made.norm_bound else "",
            f"{made.norm_bound:.3g}" if made.norm_bound else "",
            rounding(made),
            f"{made.bytes_received / 1e6:.2f} MB",
            f"{made.seconds:.1f} s",
        ]
        for made, score in history
    ]


def rounding(made: RoundRecord) -> str:
    """Return the bound on the rounding error: of the update, and of its noise where it has any."""
    of_update = f"{made.quantisation_error:.2%}"
    if not made.rounding_to_noise:
        return of_update
    return f"{of_update}, {made.rounding_to_noise:.2%} of the noise"


def missing(made: RoundRecord, names: Mapping[int, str]) -> str:
    """Return who was not in a round, and why."""
    return "; ".join(f"{names.get(site, site)}: {why}" for site, why in made.missing.items())


def outcome(made: RoundRecord) -> str:
    """Return in one word what became of a round's update."""
    if made.withdrawn:
        return "withdrawn"
    if made.rejected:
        return "rejected"
    return "lost" if made.lost else "used"


def reason(made: RoundRecord) -> str:
    """Return why a round's update does not count; nothing if it does."""
    if made.lost and not made.withdrawn:
        return "the coordinator was cut off while it unmasked the sum"
    return made.withdrawn or made.rejected


def not_used(history: History, names: Mapping[int, str]) -> list[str]:
    """Return a sentence for every round, or group of one, that moved nothing in the end."""
    said = []
    for made, _ in history:
        became = outcome(made)
        if became != "used":
            went_on = "" if made.model_of is None else f" It kept the model of {made.model_of}."
            said.append(f"Round {made.round} was {became}: {reason(made)}.{went_on}")
        elif any(group.rejected for group in made.groups):
            said += [
                f"Round {made.round}, group of {_named(group.survivors, names)}: {group.rejected}."
                for group in made.groups
                if group.rejected
            ]
    return said


def _named(sites: Sequence[int], names: Mapping[int, str]) -> str:
    return ", ".join(str(names.get(site, site)) for site in sites)
