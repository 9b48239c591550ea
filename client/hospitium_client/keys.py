"""A hospital's private keys on its own disk: made there, kept there, locked with a passphrase.

Two files, because two processes need them: ``site.keys`` is the trainer's (it signs, and receives
secrets); ``node.key`` only logs the node in to the coordinator's server.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, Self

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pydantic import Field

from hospitium_common.codec import encode_parts
from hospitium_common.errors import ConfigError, PeerProtocolError
from hospitium_common.json_file import Hex, JsonPart, from_json, to_json
from hospitium_common.key_file import read_key_file, write_new_key_file
from hospitium_common.secagg.hashing import Label
from hospitium_common.secagg.keys import PublicKeys, SiteKeys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PASSPHRASE_VARIABLE = "HOSPITIUM_SITE_PASSPHRASE"  # noqa: S105 - the name of a variable
SHORTEST_PASSPHRASE = 12
SCRYPT_N = 2**17  # with r = 8: 128 MiB and about half a second for each guess (RFC 7914)
SALT_BYTES = 16
NONCE_BYTES = 12
REMEDY = "restore it from your back-up, or make new keys with `hospitium site rotate --lost`"


class _Public(JsonPart):
    sign: Hex
    exchange: Hex
    encapsulate: Hex

    @classmethod
    def of(cls, keys: PublicKeys) -> Self:
        return cls(sign=keys.sign, exchange=keys.exchange, encapsulate=keys.encapsulate)

    def keys(self) -> PublicKeys:
        return PublicKeys(sign=self.sign, exchange=self.exchange, encapsulate=self.encapsulate)


class _Lock(JsonPart):
    """How the private part is encrypted: scrypt (RFC 7914), then AES-256-GCM."""

    salt: Hex = Field(min_length=SALT_BYTES, max_length=SALT_BYTES)
    n: int = Field(ge=2**14, le=2**20)
    r: int = Field(ge=1, le=16)
    p: int = Field(ge=1, le=4)
    nonce: Hex = Field(min_length=NONCE_BYTES, max_length=NONCE_BYTES)

    def cipher(self, passphrase: bytes) -> AESGCM:
        return AESGCM(
            Scrypt(salt=self.salt, length=32, n=self.n, r=self.r, p=self.p).derive(passphrase)
        )

    def bound(self, public: PublicKeys) -> bytes:
        """What is authenticated beside the private part: whose it is, and how it is locked."""
        return encode_parts(
            Label.KEY_FILE, *public.parts(), self.salt, self.n, self.r, self.p, self.nonce
        )


class _KeyFile(JsonPart):
    format: Literal["hospitium site keys 1"] = "hospitium site keys 1"
    public: _Public
    lock: _Lock | None
    private: Hex


def store_site_keys(path: Path, keys: SiteKeys, passphrase: bytes | None) -> None:
    """Write keys into a new file of mode 0600, encrypted if there is a passphrase.

    **Guarantees:** with a passphrase, the file reveals the public keys only, and a changed file
    does not open (scrypt, RFC 7914; AES-256-GCM, NIST SP 800-38D, fresh salt and nonce).

    Raises:
        ConfigError: there is a file already, or the passphrase is short.
    """
    public, private, lock = keys.public(), keys.encode(), None
    if passphrase is not None:
        check_passphrase(passphrase)
        lock = _Lock(
            salt=os.urandom(SALT_BYTES), n=SCRYPT_N, r=8, p=1, nonce=os.urandom(NONCE_BYTES)
        )
        private = lock.cipher(passphrase).encrypt(lock.nonce, private, lock.bound(public))
    document = _KeyFile(public=_Public.of(public), lock=lock, private=private)
    write_new_key_file(path, to_json(document))


def load_site_keys(path: Path, passphrase: Callable[[], bytes]) -> SiteKeys:
    """Read the keys; ``passphrase`` is called only if the file is locked.

    Raises:
        ConfigError: missing, readable by others, no key file, a wrong passphrase, or private
            keys that do not belong to the public ones beside them.
    """
    document = _read(path)
    public, private = document.public.keys(), document.private
    if document.lock is not None:
        lock = document.lock
        try:
            private = lock.cipher(passphrase()).decrypt(lock.nonce, private, lock.bound(public))
        except InvalidTag as error:
            raise ConfigError(
                f"{path}: expected the passphrase of this file, got another (or the file was "
                "changed); nothing was changed, try again"
            ) from error
    try:
        keys = SiteKeys.decode(private)
    except (PeerProtocolError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected this hospital's keys, got a damaged file; {REMEDY}"
        ) from error
    if keys.public() != public:
        raise ConfigError(
            f"{path}: expected private keys that belong to the public ones beside them, got "
            f"others; {REMEDY}"
        )
    return keys


def load_public_keys(path: Path) -> PublicKeys:
    """Read the public keys, for which no passphrase is needed.

    Raises:
        ConfigError: missing, readable by others, or no key file.
    """
    return _read(path).public.keys()


def is_locked(path: Path) -> bool:
    """Whether a passphrase is needed to load these keys."""
    return _read(path).lock is not None


def make_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make the node's key, EC P-384, in the OpenSSH form that Flower's node reads too.

    Raises:
        ConfigError: there is a file already.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    write_new_key_file(path, pem)
    return key


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the node's key; its group may read it, because the node has its own user.

    Raises:
        ConfigError: missing, readable by everybody, or not an EC P-384 key.
    """
    data = read_key_file(path, "the node's key", REMEDY, group_may_read=True)
    try:
        key = serialization.load_ssh_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path}: expected the node's key, got a damaged file; {REMEDY}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{path}: expected an EC P-384 key, got another kind; {REMEDY}")
    return key


def check_passphrase(passphrase: bytes) -> None:
    """Refuse a passphrase that is quickly guessed.

    Raises:
        ConfigError: it is shorter than ``SHORTEST_PASSPHRASE`` bytes, or has zero bytes, which
            HMAC, and so scrypt, does not tell from none at the end.
    """
    if b"\0" in passphrase:
        raise ConfigError("expected a passphrase without zero bytes, got some; is it text?")
    if len(passphrase) < SHORTEST_PASSPHRASE:
        raise ConfigError(
            f"expected a passphrase of at least {SHORTEST_PASSPHRASE} characters, got a shorter "
            "one; four or more random words are good"
        )


def read_passphrase(path: Path) -> bytes:
    """Read a passphrase from the first line of a file that only its owner can read.

    Raises:
        ConfigError: missing, empty, or others can read it.
    """
    data = read_key_file(path, "the passphrase of this hospital's keys", "write it there")
    line = data.split(b"\n", 1)[0].rstrip(b"\r")
    if not line:
        raise ConfigError(f"{path}: expected a passphrase on the first line, got an empty one")
    return line


def find_passphrase(file: Path | None, prompt: Callable[[], str] | None) -> bytes:
    """Return the passphrase from a file, else from the environment, else by asking.

    ``prompt`` is ``None`` where nobody can be asked: in a service.

    Raises:
        ConfigError: there is none anywhere.
    """
    if file is not None:
        return read_passphrase(file)
    from_environment = os.environ.get(PASSPHRASE_VARIABLE)
    if from_environment:
        return from_environment.encode()
    if prompt is not None:
        return prompt().encode()
    raise ConfigError(
        "expected the passphrase of this hospital's keys, got none: name a file of mode 0600 with "
        f"keys.passphrase_file in site.toml, or set {PASSPHRASE_VARIABLE}"
    )


def _read(path: Path) -> _KeyFile:
    data = read_key_file(path, "this hospital's keys", REMEDY)
    try:
        return from_json(_KeyFile, data, "this hospital's keys")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; {REMEDY}") from error
