"""What tests of signatures share: key pairs, and bundles that are not what they should be."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_signing import hashing, signing

from adapterbay.registry.keys import KeyFingerprint, generate_key_pair

NAME = "team/tales"


@dataclass(frozen=True)
class KeyPair:
    private: Path
    public: Path
    fingerprint: KeyFingerprint


def make_keys(folder: Path, name: str, password: str | None = None) -> KeyPair:
    private, public = folder / f"{name}.pem", folder / f"{name}.pem.pub"
    return KeyPair(private, public, generate_key_pair(private, public, password))


def sign_folder(folder: Path, keys: KeyPair, ignored: Iterable[str] = ()) -> bytes:
    """A folder signed by model-signing alone, as somebody without adapterbay does it."""
    target = folder.parent / f"{folder.name}.sig"
    config = hashing.Config().set_ignored_paths(paths=list(ignored))
    signing.Config().use_elliptic_key_signer(private_key=keys.private).set_hashing_config(config).sign(folder, target)
    return target.read_bytes()


def edited(bundle: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A bundle with something in its JSON changed."""
    document = json.loads(bundle)
    change(document)
    return json.dumps(document).encode()


def statement_of(bundle: bytes) -> Any:
    """What a bundle signs."""
    return json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))
