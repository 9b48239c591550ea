"""The coordinator's signature on a study, in a file beside it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hospitium_common.durable import write_durably
from hospitium_common.errors import ConfigError
from hospitium_common.secagg.hashing import Label, is_signed_by, sign

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from hospitium_common.study.document import Study


def signature_path(study_path: Path) -> Path:
    """Return where the signature of a study file is kept."""
    return study_path.with_name(study_path.name + ".sig")


def sign_study(study: Study, study_path: Path, key: Ed25519PrivateKey) -> Path:
    """Sign the study's digest (not its file: comments may change) and write the signature."""
    document = {
        "study": study.digest.hex(),
        "coordinator": key.public_key().public_bytes_raw().hex(),
        "signature": sign(key, Label.STUDY, study.digest).hex(),
    }
    path = signature_path(study_path)
    write_durably(path, json.dumps(document, indent=2).encode())
    return path


def check_signature(study: Study, study_path: Path) -> bytes:
    """Return the public key of the coordinator that signed exactly this study.

    Raises:
        ConfigError: there is no signature, or it is one of another study.
    """
    path = signature_path(study_path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: expected the coordinator's signature, got: {error.strerror}"
        ) from error
    return signer(study, data, name=str(path))


def signer(study: Study, data: bytes, *, name: str) -> bytes:
    """Return whose signature ``data``, the content of a signature file, is; ``name`` is its file.

    Raises:
        ConfigError: it is no signature, or one of another study.
    """
    try:
        document = json.loads(data)
        public = bytes.fromhex(document["coordinator"])
        signature = bytes.fromhex(document["signature"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{name}: expected a signature, got something else") from error
    if not is_signed_by(public, signature, Label.STUDY, study.digest):
        raise ConfigError(
            f"{name}: expected a signature of this very study, got one of another; the study was "
            "changed after it was signed. Ask the coordinator for a new one"
        )
    return public


def fingerprint(public: bytes) -> str:
    """Return a public key as groups of digits to compare by telephone."""
    text = public.hex()
    return " ".join(text[at : at + 4] for at in range(0, 32, 4))
