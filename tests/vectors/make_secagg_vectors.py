"""Writes secagg_good.json and secagg_bad.json: `python -m tests.vectors.make_secagg_vectors`.

Keys and entropy come from seeds, so everything but the HPKE encapsulation of a pair offer is
repeatable. The pair offers are therefore kept in the good file as they were made once, next to the
roots that they lead to; the bad file keeps the roots only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.vectors.bad_vectors import bad
from tests.vectors.recording import POLICY, enrolled_of, recorded
from tests.vectors.replay import Enrolled, Replay

HERE = Path(__file__).parent
INDICES = (1, 2, 3, 4, 7, 200, 255)


def finished(run: dict, replay: Replay) -> dict:
    total = replay.coordinator.finish()
    run["sum"] = {
        "survivors": list(total.survivors),
        "vector": total.vector.tobytes().hex(),
        "tail": total.tail.tobytes().hex(),
        "result": total.transcript.result.hex(),
        "transcript_sha256": hashlib.sha256(total.transcript.encode()).hexdigest(),
    }
    return run


def good(enrolled: Enrolled) -> list[dict]:
    """Vectors that end in a sum."""

    def one(name, invited, **changes):
        run, replay = recorded(enrolled, dict(enrolled.states), invited, **changes)
        return {"name": name, "runs": [finished(run, replay)]}

    def ring(bits):
        return POLICY | {"ring_bits": bits}

    made = [
        one("three sites, ring of 16 bits", (1, 2, 3)),
        one("three sites, ring of 24 bits", (1, 2, 3), policy=ring(24)),
        one("three sites, ring of 32 bits", (1, 2, 255), policy=ring(32)),
        one("all seven sites, two lost after the mask", INDICES, policy=ring(24),
            lost={"mask": (3, 200)}),
        one("four sites, one lost before READY", (1, 2, 4, 7), lost={"ready": (4,)}),
        one("four sites, one lost before its masked vector", (1, 2, 4, 7), lost={"mask": (1,)}),
        one("four sites, one lost before its confirmation", (1, 2, 4, 7), lost={"confirm": (7,)}),
        one("four sites, one lost before its shares", (1, 2, 4, 7), lost={"unmask": (2,)}),
        one("five sites of 32 bits, a first READY lost", (2, 3, 4, 7, 255), policy=ring(32),
            lost={"ready": (2,)}),
    ]  # fmt: skip
    states = dict(enrolled.states)
    failed, _ = recorded(enrolled, states, (1, 2, 3, 4), lost={"mask": (1, 2)})
    second, replay = recorded(enrolled, states, (1, 2, 3, 4), attempt=2)
    made.append({
        "name": "a failed attempt, and the same round again",
        "runs": [failed, finished(second, replay)],
    })  # fmt: skip
    states = dict(enrolled.states)
    first = finished(*recorded(enrolled, states, (1, 2, 3), number=2))
    previous = bytes.fromhex(first["sum"]["result"])
    later = finished(*recorded(enrolled, states, (1, 2, 3), number=5, previous=previous))
    made.append({"name": "two rounds, the ratchet three steps apart", "runs": [first, later]})
    return made


def write(path: Path, content: dict) -> None:
    """One line for every vector, so that differences can be read."""
    lines = []
    for key, value in content.items():
        if isinstance(value, list):
            rows = ",\n".join(json.dumps(one) for one in value)
            lines.append(f"{json.dumps(key)}: [\n{rows}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    given, offers = enrolled_of(INDICES)
    enrolled = Enrolled(given)
    write(HERE / "secagg_good.json", {
        "enrolled": given, "pair_offers": offers, "vectors": good(enrolled),
    })  # fmt: skip
    given, _ = enrolled_of((1, 2, 3, 4, 7))
    write(HERE / "secagg_bad.json", {"enrolled": given, **bad(Enrolled(given))})


if __name__ == "__main__":
    main()
