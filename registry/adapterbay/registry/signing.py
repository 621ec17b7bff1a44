"""Signatures of versions, by OpenSSF model-signing with elliptic curve keys. Nothing here uses the network.

    bundle = sign(registry.open_snapshot(digest), Path("release.pem"))
    registry.attach_signature("team/sentiment", 3, bundle)
    TrustedKeys.read([Path("release.pem.pub")]).check(registry.open_snapshot(digest))

What is signed is the portable folder of a version: the files of its manifest, and the manifest beside them as
adapterbay/manifest.json. So a signature vouches for base, task, labels and parents, too. The bundle names what may
differ where the version is published (`UNSIGNED_PATHS`); README.md is among it, since a Hub repository has its model
card there, but the manifest holds its digest. Whoever has the folder and the public key needs no adapterbay:

    model_signing verify key FOLDER --signature FOLDER/adapterbay/model.sig --public_key KEY

Formats: a Sigstore bundle v0.3 with a DSSE envelope (https://github.com/secure-systems-lab/dsse) around an in-toto
statement of the predicate https://model_signing/signature/v1.0.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.errors import Corrupted, InvalidArgument, Rejected, Untrusted
from adapterbay.registry.keys import KeyFingerprint, PublicKey, check_private_key, needs_password, require_signing
from adapterbay.registry.manifest import README_FILE, Manifest
from adapterbay.registry.portable import LEDGER_PATH, MANIFEST_PATH, OWN_README_PATH, SIGNATURE_PATH
from adapterbay.registry.views import Problem, Snapshot, VersionRecord

UNSIGNED_PATHS: Final = (SIGNATURE_PATH, LEDGER_PATH, OWN_README_PATH, README_FILE, ".cache")
"""What a published folder may hold besides, or in another form; .cache is what `hf download --local-dir` leaves."""

MAX_BUNDLE_BYTES: Final = 1 << 20

_PREDICATE: Final = "https://model_signing/signature/v1.0"
_HINT = re.compile(r"[0-9a-f]{64}")
_BUNDLE_KEYS: Final = frozenset({"mediaType", "verificationMaterial", "dsseEnvelope"})
_ENVELOPE_KEYS: Final = frozenset({"payload", "payloadType", "signatures"})


def sign(snapshot: Snapshot, private_key: Path, password: str | None = None) -> bytes:
    """Signs a version and returns the bundle. `password` is not used for a key that is not encrypted.

    Raises InvalidArgument for a key that cannot be used, Corrupted if the files changed meanwhile, MissingExtra.
    """
    require_signing()
    from model_signing import hashing, signing

    check_private_key(private_key, password)
    secret = password.encode() if password and needs_password(private_key) else None
    with _portable_folder(snapshot) as folder:
        target = folder.parent / "model.sig"
        config = hashing.Config()  # type: ignore[no-untyped-call]
        config.set_ignored_paths(paths=UNSIGNED_PATHS).set_allow_symlinks(True)
        # The library says str, but hands the password on to cryptography, which takes bytes (model-signing 1.1.1).
        signer = signing.Config().use_elliptic_key_signer(  # type: ignore[no-untyped-call]
            private_key=private_key, password=cast(Any, secret)
        )
        signer.set_hashing_config(config).sign(folder, target)
        bundle = target.read_bytes()
    problem = _difference(snapshot.manifest, _signed_files(_read_bundle(bundle)))
    if problem:
        raise Corrupted(f"The files changed while they were signed ({problem}): run `registry verify`.")
    return bundle


def signer_of(bundle: bytes) -> KeyFingerprint:
    """The fingerprint of the key that a bundle says it was signed with; nothing is proven by that.

    Needs no extra. Raises Untrusted (BAD_SIGNATURE) for bytes that are no bundle of an elliptic curve key.
    """
    return _read_bundle(bundle).key


def verify_signature(snapshot: Snapshot, bundle: bytes | None, public_keys: Sequence[Path]) -> KeyFingerprint:
    """Whether `bundle` signs this very version with one of the keys; see `TrustedKeys.check`."""
    return TrustedKeys.read(public_keys).check(snapshot, bundle)


@dataclass(frozen=True)
class TrustedKeys:
    """Public keys by fingerprint, as they were when they were read."""

    pems: Mapping[KeyFingerprint, bytes]

    @classmethod
    def read(cls, paths: Iterable[Path]) -> TrustedKeys:
        """Reads PEM files. Raises InvalidArgument for a file that is no public key that can be used, MissingExtra."""
        keys = [PublicKey.read(path) for path in paths]
        if not keys:
            raise InvalidArgument("No public key was given: pass one that you trust.", field="key")
        return cls({key.fingerprint: key.pem for key in keys})

    def check(self, snapshot: Snapshot, bundle: bytes | None) -> KeyFingerprint:
        """The key that signed this version, if it is one of these and every file is covered.

        Raises Untrusted with reason NOT_SIGNED (`bundle` is None), UNKNOWN_KEY (by none of these keys) or BAD_SIGNATURE
        (altered, of other files, or no bundle at all).
        """
        digest = snapshot.manifest.digest
        if bundle is None:
            raise Untrusted(
                f"The version {digest} is not signed: `registry sign` signs it.",
                reason="NOT_SIGNED",
                metadata={"digest": digest},
            )
        try:
            read = _read_bundle(bundle)
            if read.key in self.pems:
                self._check_bytes(snapshot, bundle, read.key)
                problem = _difference(snapshot.manifest, _signed_files(read))
                if problem:
                    raise _bad(problem)
                return read.key
        except Untrusted as error:
            raise Untrusted(
                f"{error.message} So the version {digest} cannot be trusted.",
                reason=error.reason,
                metadata={"digest": digest},
            ) from error
        raise Untrusted(
            f"The version {digest} is signed with the key {read.key}, which is not trusted: trusted are "
            f"{', '.join(self.pems)}.",
            reason="UNKNOWN_KEY",
            metadata={"digest": digest, "key": read.key},
        )

    def _check_bytes(self, snapshot: Snapshot, bundle: bytes, key: KeyFingerprint) -> None:
        from cryptography.exceptions import InvalidSignature
        from model_signing import hashing, verifying

        with _portable_folder(snapshot) as folder:
            signature, public = folder.parent / "model.sig", folder.parent / "key.pub"
            signature.write_bytes(bundle)
            public.write_bytes(self.pems[key])
            config = hashing.Config().set_allow_symlinks(True)  # type: ignore[no-untyped-call]
            verifier = verifying.Config().use_elliptic_key_verifier(public_key=public)  # type: ignore[no-untyped-call]
            try:
                verifier.set_hashing_config(config).verify(folder, signature)
            except InvalidSignature as error:
                raise _bad(f"the key {key} did not make it, or it was altered") from error
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise _bad(" ".join(str(error).split())[:300].rstrip(".") or type(error).__name__) from error


class _Snapshots(Protocol):
    def open_snapshot(self, digest: str) -> Snapshot: ...


def signature_problems(registry: _Snapshots, versions: Iterable[VersionRecord], keys: TrustedKeys) -> list[Problem]:
    """The versions that are not signed with one of `keys`, each with the reason. Reads every file."""
    problems = []
    for version in versions:
        try:
            snapshot = registry.open_snapshot(version.digest)
            keys.check(snapshot, snapshot.signature)
        except (Untrusted, Corrupted) as error:
            problems.append(Problem("signature", f"{version.name}@{version.version}", error.message))
    return problems


@dataclass(frozen=True, slots=True)
class _Bundle:
    """A bundle as far as its form is right: the key that it names, and the statement that it signs."""

    key: KeyFingerprint
    statement: Mapping[str, Any]


def _read_bundle(bundle: bytes) -> _Bundle:
    if len(bundle) > MAX_BUNDLE_BYTES:
        raise _bad(f"it has {len(bundle)} bytes, over {MAX_BUNDLE_BYTES}")
    try:
        document = parse_json_object(bundle, "it")
        envelope = document["dsseEnvelope"]
        # Nothing may stand under a second spelling that another reader of the bundle would prefer to ours.
        if set(document) != _BUNDLE_KEYS or set(envelope) != _ENVELOPE_KEYS:
            raise _bad("it has parts that a Sigstore bundle of this kind has not")
        hint = document["verificationMaterial"]["publicKey"]["hint"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        statement = parse_json_object(payload, "its statement")
    except Rejected as error:
        raise _bad(error.message.rstrip(".")) from error
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise _bad("it is no Sigstore bundle of an elliptic curve key") from error
    if not isinstance(hint, str) or _HINT.fullmatch(hint) is None:
        raise _bad("it does not name its key; sign again")
    return _Bundle(KeyFingerprint(f"sha256:{hint}"), statement)


def _signed_files(bundle: _Bundle) -> dict[str, str]:
    """The paths that a statement covers, with their digests."""
    statement = bundle.statement
    try:
        if statement["predicateType"] != _PREDICATE:
            raise _bad(f"it is a statement of another kind: {str(statement['predicateType'])[:100]}")
        found = {}
        for resource in statement["predicate"]["resources"]:
            found[str(resource["name"])] = f"{resource['algorithm']}:{resource['digest']}"
    except (KeyError, TypeError, AttributeError) as error:
        raise _bad("its statement does not list files") from error
    return found


def _difference(manifest: Manifest, signed: Mapping[str, str]) -> str | None:
    """What keeps `signed` from being the portable folder of `manifest`. README.md may be signed or not."""
    expected = {entry.path: entry.digest for entry in manifest.files} | {MANIFEST_PATH: manifest.digest}
    for path, digest in expected.items():
        if path not in signed:
            if path != README_FILE:
                return f"{path} is not signed"
        elif signed[path] != digest:
            return f"{path} is signed with another content"
    more = sorted(signed.keys() - expected.keys())
    return f"it covers {more[0][:100]}, which the version does not have" if more else None


@contextlib.contextmanager
def _portable_folder(snapshot: Snapshot) -> Iterator[Path]:
    """The portable folder of a version as links in a temporary folder; its name is the digest's hex."""
    manifest = snapshot.manifest
    with tempfile.TemporaryDirectory(prefix="adapterbay-signing-") as temporary:
        folder = Path(temporary) / manifest.digest.removeprefix("sha256:")
        record = folder / MANIFEST_PATH
        record.parent.mkdir(parents=True)
        record.write_bytes(manifest.to_bytes())
        for entry in manifest.files:
            link = folder / entry.path
            if link.is_relative_to(record.parent):
                raise Rejected(f"The manifest names {entry.path}, a place that is not its own.", reason="BAD_MANIFEST")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(snapshot.files[entry.path].absolute())
        yield folder


def _bad(why: str) -> Untrusted:
    return Untrusted(f"The signature is not good: {why}.", reason="BAD_SIGNATURE")
