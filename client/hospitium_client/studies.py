"""The studies that reached this hospital: one folder each, named by the study's digest.

A study lies here whether or not somebody approved it; what is approved is in `policy.toml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.study import Study, load_study, parse_study
from hospitium_common.study.signature import check_signature, signature_path, signer

LARGEST_DOCUMENT = 1 << 20
MOST_STUDIES = 200
"""More than any hospital reads; a coordinator must not be able to fill the disk."""
SHORTEST_DIGEST = 8
FILE = "study.toml"


@dataclass(frozen=True, kw_only=True)
class StoredStudy:
    """A study on this hospital's disk; ``coordinator`` is the key that signed it."""

    study: Study
    path: Path
    coordinator: bytes

    @property
    def digest(self) -> str:
        """The study's digest in hexadecimal, as `policy.toml` names it."""
        return self.study.digest.hex()

    @property
    def folder(self) -> Path:
        """Where this site keeps what belongs to the study."""
        return self.path.parent


def receive(folder: Path, document: bytes, signature: bytes, coordinator: bytes) -> StoredStudy:
    """Check a study that the coordinator offers, and keep it.

    Raises:
        PeerProtocolError: it is no valid study, or the pinned coordinator did not sign it.
        HospitiumError: the disk is full.
    """
    if len(document) + len(signature) > LARGEST_DOCUMENT:
        raise PeerProtocolError("expected a study of at most 1 MiB, got a larger one", blame=0)
    try:
        study = parse_study(document.decode("utf-8"))
        signed_by = signer(study, signature, name="study.toml.sig")
    except (ConfigError, UnicodeDecodeError) as error:
        raise PeerProtocolError(f"offered study: {error}", blame=0) from error
    if signed_by != coordinator:
        raise PeerProtocolError(
            f"offered study {study.study.id}: expected the pinned coordinator's signature, got "
            "another's",
            blame=0,
        )
    path = folder / study.digest.hex() / FILE
    if not signature_path(path).exists():
        if folder.exists() and len(list(folder.iterdir())) >= MOST_STUDIES:
            raise PeerProtocolError(
                f"expected at most {MOST_STUDIES} studies, got another one: remove folders of old "
                f"ones under {folder}",
                blame=0,
            )
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(path, document)
    kept = signature_path(path)
    # Another signature is one by the coordinator's new key: the old one counts no more.
    if not kept.exists() or kept.read_bytes() != signature:
        write_durably(kept, signature)
    return StoredStudy(study=study, path=path, coordinator=signed_by)


def open_study(folder: Path, digest: bytes) -> StoredStudy:
    """Return the study with this digest.

    Raises:
        PeerProtocolError: it was never offered here.
        ConfigError: its file was changed.
    """
    path = folder / digest.hex() / FILE
    if not signature_path(path).exists():
        raise PeerProtocolError(
            f"study {digest.hex()[:8]}: expected one that was offered before, got another", blame=0
        )
    return _load(path, digest.hex())


def all_studies(folder: Path) -> list[StoredStudy]:
    """Return every study that reached this hospital, oldest first.

    Raises:
        ConfigError: a file was changed.
    """
    signatures = folder.glob(f"*/{signature_path(Path(FILE)).name}")
    paths = sorted(signatures, key=lambda path: path.stat().st_mtime)
    return [_load(path.with_name(FILE), path.parent.name) for path in paths]


def find_study(folder: Path, name: str) -> StoredStudy:
    """Return the study that a person means: a file, an id, or the beginning of a digest.

    Raises:
        ConfigError: there is none, or more than one.
    """
    path = Path(name)
    if path.is_file():
        return _load(path, None)
    stored = all_studies(folder)
    found = [
        one for one in stored
        if one.study.study.id == name
        or (len(name) >= SHORTEST_DIGEST and one.digest.startswith(name))
    ]  # fmt: skip
    if len(found) == 1:
        return found[0]
    if found:
        digests = ", ".join(one.digest[:16] for one in found)
        raise ConfigError(
            f"{name}: expected one study, got {len(found)} of that id; say which by its digest: "
            f"{digests}"
        )
    known = ", ".join(sorted({one.study.study.id for one in stored})) or "none"
    raise ConfigError(
        f"{name}: expected a study file, or the id or digest of a study that reached this "
        f"hospital (`hospitium site studies` lists them: {known}), got neither"
    )


def _load(path: Path, digest: str | None) -> StoredStudy:
    study = load_study(path)
    if digest is not None and study.digest.hex() != digest:
        raise ConfigError(
            f"{path}: expected the study that was offered, got a changed one; remove its folder, "
            "it will be offered again"
        )
    return StoredStudy(study=study, path=path, coordinator=check_signature(study, path))
