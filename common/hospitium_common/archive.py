"""What a coordinator keeps of every round, so that others can check it afterwards.

```
rounds/
  study.json                     the study, as it is signed
  roster-<digest>.bin            the roster of every key epoch
  00048/2.transcript             round 48, attempt 2: the signed transcript
  00048/2/site-003.masked        what site 3 handed in, masked and signed; kept on demand
```

Nothing here says more than the coordinator saw: a masked vector stays uniformly random to all who
do not hold its pair seeds, and those were erased at the sites.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError, HospitiumError, PeerProtocolError
from hospitium_common.messages import Masked, decode
from hospitium_common.roster import Roster
from hospitium_common.schedule import secagg_policy
from hospitium_common.study import Study
from hospitium_common.study.document import canonical_json
from hospitium_common.transcript import Transcript, announced

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hospitium_common.secagg.policy import SecAggPolicy

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ArchivedStudy:
    """A study of an archive, and how many words the tails of its rounds have.

    ``digest`` is that of the document as it was signed. A later version of this program may know
    more options than the document has; the digest of ``study`` would count their defaults too.
    """

    study: Study
    digest: bytes
    tail_words: int

    def policy(self, number: int) -> SecAggPolicy:
        """Return the policy under which a round ran."""
        return replace(secagg_policy(self.study, self.tail_words, number), study=self.digest)


class RoundArchive:
    """The rounds of one study in ``directory``.

    ``keep_masked`` also keeps the masked vectors, without which nobody can recompute a sum: sites
    × parameters × 2 to 4 bytes for every training round.
    """

    def __init__(self, directory: Path, *, keep_masked: bool = False) -> None:
        self.directory = directory
        self._keep_masked = keep_masked

    def begin(self, study: Study, roster: Roster, tail_words: int) -> None:
        """Note under which study and roster the next rounds run.

        Raises:
            HospitiumError: the disk is full or the place is not writable.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise HospitiumError(f"{self.directory}: cannot be made: {error.strerror}") from error
        document = {
            "format": FORMAT,
            "study": json.loads(study.canonical()),
            "tail_words": tail_words,
        }
        text = json.dumps(document, indent=2, ensure_ascii=False).encode()
        for path, data in (
            (self.directory / "study.json", text),
            (self._roster_file(roster.digest), roster.encode()),
        ):
            if not path.exists() or path.read_bytes() != data:
                write_durably(path, data)

    def keep_vector(self, number: int, attempt: int, message: Masked) -> None:
        """Keep a masked vector, if this archive keeps any."""
        if self._keep_masked:
            home = self._vectors(number, attempt)
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_durably(home / f"site-{message.site:03}.masked", message.encode())

    def drop_vectors(self, number: int, attempt: int) -> None:
        """Forget the vectors of an attempt that came to nothing."""
        shutil.rmtree(self._vectors(number, attempt), ignore_errors=True)

    def keep(self, transcript: Transcript) -> None:
        """Keep the transcript of a finished round, on disk before this returns."""
        path = self._transcript_file(transcript.task.round, transcript.task.attempt)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(path, transcript.encode())

    def rounds(self) -> tuple[int, ...]:
        """Return the numbers of the rounds that are finished, rising."""
        found = {int(path.parent.name) for path in self.directory.glob("[0-9]*/*.transcript")}
        return tuple(sorted(found))

    def transcripts(self, number: int) -> tuple[Transcript, ...]:
        """Return a round's transcripts, one for each group, in the order of their sites.

        Raises:
            ConfigError: there is none, or a file is none.
        """
        paths = list((self.directory / f"{number:05}").glob("*.transcript"))
        if not paths:
            known = ", ".join(str(one) for one in self.rounds()) or "none"
            raise ConfigError(f"{self.directory}: expected round {number}, got rounds {known}")
        found = [_read_transcript(path) for path in paths]
        return tuple(sorted(found, key=lambda one: (one.task.invited, one.task.attempt)))

    def vectors(self, number: int, attempt: int) -> Iterator[Masked]:
        """Yield the masked vectors of an attempt, one at a time; none if they were not kept.

        Raises:
            PeerProtocolError: a file is something else.
        """
        for path in sorted(self._vectors(number, attempt).glob("site-*.masked")):
            message = decode(path.read_bytes())
            if not isinstance(message, Masked):
                raise PeerProtocolError(f"{path}: expected a masked vector, got another message")
            yield message

    def study(self) -> ArchivedStudy:
        """Return the study as it was when its rounds ran.

        Raises:
            ConfigError: there is no archive here.
        """
        path = self.directory / "study.json"
        try:
            document = json.loads(path.read_bytes())
            if document["format"] != FORMAT:
                raise ValueError("another format")
            return ArchivedStudy(
                study=Study.model_validate(document["study"]),
                digest=hashlib.sha256(canonical_json(document["study"])).digest(),
                tail_words=int(document["tail_words"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: expected the study of an archive of rounds, got none that can be read"
            ) from error

    def roster(self, digest: bytes) -> Roster:
        """Return the roster of a key epoch.

        Raises:
            ConfigError: it is missing.
            PeerProtocolError: the file is another roster, or none.
        """
        path = self._roster_file(digest)
        if not path.exists():
            raise ConfigError(f"{path}: expected the roster of these rounds, got nothing there")
        roster = Roster.decode(path.read_bytes())
        if roster.digest != digest:
            raise PeerProtocolError(f"{path}: expected the roster of these rounds, got another")
        return roster

    def has_roster(self, digest: bytes) -> bool:
        """Whether any round ran under this roster."""
        return self._roster_file(digest).exists()

    def last_result(self) -> bytes:
        """Return the announced result of the last finished round, which the next task names."""
        numbers = self.rounds()
        if not numbers:
            return bytes(64)
        return announced([one.result for one in self.transcripts(numbers[-1])])

    def _roster_file(self, digest: bytes) -> Path:
        return self.directory / f"roster-{digest.hex()[:16]}.bin"

    def _transcript_file(self, number: int, attempt: int) -> Path:
        return self.directory / f"{number:05}" / f"{attempt}.transcript"

    def _vectors(self, number: int, attempt: int) -> Path:
        return self.directory / f"{number:05}" / str(attempt)


def _read_transcript(path: Path) -> Transcript:
    try:
        return Transcript.decode(path.read_bytes())
    except PeerProtocolError as error:
        raise ConfigError(f"{path}: expected a transcript, got something else: {error}") from error
