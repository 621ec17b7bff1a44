"""Elliptic curve keys in PEM files: made, read, and named by their fingerprints. They stay on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NewType

from adapterbay.registry.digest import digest_bytes
from adapterbay.registry.errors import InvalidArgument, MissingExtra

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

KeyFingerprint = NewType("KeyFingerprint", str)
"""`sha256:` over the public key's PEM text (SubjectPublicKeyInfo): what a signature bundle names its key by."""

CURVES: Final = ("secp256r1", "secp384r1", "secp521r1")

_ENCRYPTED: Final = b"ENCRYPTED"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key. `pem` is its SubjectPublicKeyInfo."""

    fingerprint: KeyFingerprint
    pem: bytes

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """Reads a PEM file. Raises InvalidArgument for anything but a public key on one of `CURVES`, MissingExtra."""
        require_signing()
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        data = _read(path, "public key")
        if b"PRIVATE KEY" in data:
            raise InvalidArgument(f"{path} is a private key: keep it to yourself, give the public one.", field="key")
        try:
            key = load_pem_public_key(data)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise InvalidArgument(f"{path} is not a public key in PEM.", field="key") from error
        return cls.of(_usable(path, key))

    @classmethod
    def of(cls, key: EllipticCurvePublicKey) -> PublicKey:
        """A key that is in memory."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return cls(KeyFingerprint(digest_bytes(pem)), pem)


def generate_key_pair(private: Path, public: Path, password: str | None = None) -> KeyFingerprint:
    """Writes a new P-256 key pair as PEM: the private key readable by its owner alone. Returns its fingerprint.

    Raises InvalidArgument if one of the files is there already, MissingExtra.
    """
    require_signing()
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        KeySerializationEncryption,
        NoEncryption,
        PrivateFormat,
    )

    for path in (private, public):
        if path.exists() or path.is_symlink():
            raise _there_already(path)
    key = generate_private_key(SECP256R1())
    encryption: KeySerializationEncryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    made = PublicKey.of(key.public_key())
    _write_new(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), 0o600)
    _write_new(public, made.pem, 0o644)
    return made.fingerprint


def needs_password(private_key: Path) -> bool:
    """Whether a private key is encrypted. Raises InvalidArgument if the file cannot be read."""
    return _ENCRYPTED in _read(private_key, "private key")


def check_private_key(path: Path, password: str | None) -> PublicKey:
    """The public half of a private key, which shows that it can be used. `password` is for an encrypted one.

    Raises InvalidArgument (no such file, no key in PEM, another kind of key, no or a wrong password) or MissingExtra.
    """
    require_signing()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    encrypted = needs_password(path)
    if encrypted and not password:
        raise InvalidArgument(f"The private key {path} is encrypted: give its password.", field="password")
    try:
        key = load_pem_private_key(path.read_bytes(), password.encode() if password and encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if encrypted:
            raise InvalidArgument(f"The password does not open the private key {path}.", field="password") from error
        raise InvalidArgument(
            f"{path} is not a private key in PEM: `registry keygen` makes one.", field="key"
        ) from error
    return PublicKey.of(_usable(path, key.public_key()))


def require_signing() -> None:
    """Raises MissingExtra if the extra `signing` is not installed."""
    try:
        import model_signing  # noqa: F401 - whether it can be imported
    except ImportError as error:
        raise MissingExtra(f"Signatures need more: pip install 'adapterbay[signing]' ({error}).") from error


def _usable(path: Path, key: object) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise InvalidArgument(
            f"{path} is no elliptic curve key on {', '.join(CURVES)}: `registry keygen` makes one.", field="key"
        )
    return key


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"The {what} {path} cannot be read: {error.strerror}.", field="key") from error


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise _there_already(path) from error
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _there_already(path: Path) -> InvalidArgument:
    return InvalidArgument(f"{path} is there already: keys are never overwritten, choose another name.", field="key")
