"""A signature says who vouches for exactly these files with exactly this manifest, and nothing else passes."""

from __future__ import annotations

import base64
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from signing_tools import NAME, KeyPair, edited, make_keys, sign_folder, statement_of

from adapterbay.registry import Manifest, Registry
from adapterbay.registry.errors import Corrupted, Untrusted
from adapterbay.registry.portable import MANIFEST_PATH
from adapterbay.registry.signing import TrustedKeys, sign, signature_problems, signer_of, verify_signature
from adapterbay.registry.views import Snapshot

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def snapshot(registry: Registry) -> Snapshot:
    return registry.snapshot(f"{NAME}@1")


@pytest.fixture
def bundle(snapshot: Snapshot, keys: KeyPair) -> bytes:
    return sign(snapshot, keys.private)


def refused(snapshot: Snapshot, bundle: bytes | None, keys: KeyPair) -> Untrusted:
    with pytest.raises(Untrusted) as caught:
        verify_signature(snapshot, bundle, [keys.public])
    return caught.value


def test_a_signature_names_its_key_and_covers_every_file_and_the_manifest(
    snapshot: Snapshot, bundle: bytes, keys: KeyPair, other_keys: KeyPair
) -> None:
    assert verify_signature(snapshot, bundle, [other_keys.public, keys.public]) == keys.fingerprint
    assert signer_of(bundle) == keys.fingerprint
    covered = {item["name"]: f"sha256:{item['digest']}" for item in statement_of(bundle)["predicate"]["resources"]}
    assert covered.pop(MANIFEST_PATH) == snapshot.manifest.digest
    files = {entry.path: entry.digest for entry in snapshot.manifest.files}
    assert files.pop("README.md")  # a Hub repository has another one; the manifest holds its digest
    assert covered == files
    assert WEIGHTS in covered


def test_the_registry_keeps_the_signature_and_who_made_it(registry: Registry, bundle: bytes, keys: KeyPair) -> None:
    assert registry.snapshot(f"{NAME}@1").signature is None
    registry.attach_signature(NAME, 1, bundle, key=keys.fingerprint)
    found = registry.snapshot(f"{NAME}@1")
    assert found.signature == bundle
    assert TrustedKeys.read([keys.public]).check(found, found.signature) == keys.fingerprint
    assert registry.snapshot(f"{NAME}@2").signature is None
    (signed,) = [event for event in registry.history(NAME) if event.kind == "signed"]
    assert (signed.version, signed.digest, signed.detail["key"]) == (1, found.manifest.digest, keys.fingerprint)
    assert signed.by


def test_nothing_goes_over_a_network(snapshot: Snapshot, keys: KeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> NoReturn:
        raise AssertionError("somebody is called")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    assert verify_signature(snapshot, sign(snapshot, keys.private), [keys.public]) == keys.fingerprint


def test_an_unsigned_version_is_refused(snapshot: Snapshot, keys: KeyPair) -> None:
    error = refused(snapshot, None, keys)
    assert error.reason == "NOT_SIGNED"
    assert error.metadata["digest"] == snapshot.manifest.digest


def test_another_key_is_refused(snapshot: Snapshot, bundle: bytes, keys: KeyPair, other_keys: KeyPair) -> None:
    error = refused(snapshot, bundle, other_keys)
    assert error.reason == "UNKNOWN_KEY"
    assert keys.fingerprint in error.message
    assert error.metadata["key"] == keys.fingerprint


def test_a_signature_that_only_claims_a_trusted_key_is_refused(
    snapshot: Snapshot, bundle: bytes, other_keys: KeyPair
) -> None:
    hint = other_keys.fingerprint.removeprefix("sha256:")
    claimed = edited(bundle, lambda it: it["verificationMaterial"]["publicKey"].update(hint=hint))
    assert refused(snapshot, claimed, other_keys).reason == "BAD_SIGNATURE"


@pytest.mark.parametrize("path", [WEIGHTS, "adapter_config.json"])
def test_an_altered_file_is_refused(
    snapshot: Snapshot, bundle: bytes, keys: KeyPair, tmp_path: Path, path: str
) -> None:
    data = bytearray(snapshot.files[path].read_bytes())
    data[-1] ^= 1
    (tmp_path / "altered").write_bytes(data)
    altered = Snapshot(snapshot.manifest, {**snapshot.files, path: tmp_path / "altered"})
    error = refused(altered, bundle, keys)
    assert error.reason == "BAD_SIGNATURE"
    assert path in error.message


@pytest.mark.parametrize(
    "change",
    [
        {"base_fingerprint": f"sha256:{'0' * 64}"},
        {"task": "feature-extraction"},
        {"labels": ("no", "yes")},
        {"parents": (f"sha256:{'1' * 64}",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_altered_manifest_is_refused(
    snapshot: Snapshot, bundle: bytes, keys: KeyPair, change: dict[str, Any]
) -> None:
    altered = replace(snapshot, manifest=Manifest.model_validate({**snapshot.manifest.model_dump(), **change}))
    assert altered.manifest.files == snapshot.manifest.files
    error = refused(altered, bundle, keys)
    assert error.reason == "BAD_SIGNATURE"
    assert MANIFEST_PATH in error.message


def test_the_signature_of_another_version_is_refused(registry: Registry, bundle: bytes, keys: KeyPair) -> None:
    assert refused(registry.snapshot(f"{NAME}@2"), bundle, keys).reason == "BAD_SIGNATURE"


@pytest.mark.parametrize("left_out", [WEIGHTS, MANIFEST_PATH])
def test_a_trusted_signature_that_leaves_something_out_is_refused(
    registry: Registry, keys: KeyPair, tmp_path: Path, left_out: str
) -> None:
    """model-signing alone accepts what its signer chose to ignore, whatever the bytes are now."""
    folder = registry.pull(f"{NAME}@2", tmp_path / "pulled")
    bundle = sign_folder(folder, keys, [left_out])
    error = refused(registry.snapshot(f"{NAME}@2"), bundle, keys)
    assert error.reason == "BAD_SIGNATURE"
    assert left_out in error.message


def test_a_signature_made_without_adapterbay_is_as_good(registry: Registry, keys: KeyPair, tmp_path: Path) -> None:
    for version in (1, 2):  # with a README.md, which this one covers, and without
        folder = registry.pull(f"{NAME}@{version}", tmp_path / f"pulled-{version}")
        bundle = sign_folder(folder, keys)
        found = registry.snapshot(f"{NAME}@{version}")
        assert verify_signature(found, bundle, [keys.public]) == keys.fingerprint


def test_a_signature_that_covers_more_than_the_version_is_refused(
    registry: Registry, keys: KeyPair, tmp_path: Path
) -> None:
    folder = registry.pull(f"{NAME}@2", tmp_path / "pulled")
    (folder / "more.json").write_text("{}")
    assert refused(registry.snapshot(f"{NAME}@2"), sign_folder(folder, keys), keys).reason == "BAD_SIGNATURE"


def add_second_envelope(document: dict[str, Any]) -> None:
    document["dsse_envelope"] = document["dsseEnvelope"]


def alter_statement(document: dict[str, Any]) -> None:
    statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
    statement["subject"][0]["name"] = "another"
    document["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()


@pytest.mark.parametrize(
    "change",
    [
        add_second_envelope,
        alter_statement,
        lambda it: it["dsseEnvelope"].update(payload="%%%"),
        lambda it: it["dsseEnvelope"].update(payload=base64.b64encode(b"[]").decode()),
        lambda it: it["dsseEnvelope"].update(payloadType="text/plain"),
        lambda it: it["dsseEnvelope"].update(signatures=[]),
        lambda it: it["dsseEnvelope"]["signatures"][0].update(sig=""),
        lambda it: it.update(mediaType="application/json"),
        lambda it: it["verificationMaterial"]["publicKey"].update(hint=None),
        lambda it: it["verificationMaterial"].update(publicKey=None),
        lambda it: it.update(verificationMaterial={"certificate": {"rawBytes": "AA=="}}),
        lambda it: it.update(dsseEnvelope=[]),
        lambda it: it.pop("dsseEnvelope"),
    ],
)
def test_a_spoilt_bundle_is_refused(
    snapshot: Snapshot, bundle: bytes, keys: KeyPair, change: Callable[[dict[str, Any]], object]
) -> None:
    assert refused(snapshot, edited(bundle, change), keys).reason == "BAD_SIGNATURE"


@pytest.mark.parametrize("data", [b"", b"\x00", b"[]", b"{}", b"{" * 10_000, b" " * (2 << 20)])
def test_what_is_no_bundle_is_refused(snapshot: Snapshot, keys: KeyPair, data: bytes) -> None:
    assert refused(snapshot, data, keys).reason == "BAD_SIGNATURE"
    with pytest.raises(Untrusted):
        signer_of(data)


def said(bundle: bytes) -> tuple[bytes, bytes]:
    """The statement of a bundle and the signature on it."""
    envelope = json.loads(bundle)["dsseEnvelope"]
    return base64.b64decode(envelope["payload"]), base64.b64decode(envelope["signatures"][0]["sig"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_altered_byte_of_statement_or_signature_passes(
    snapshot: Snapshot, bundle: bytes, keys: KeyPair, data: st.DataObject
) -> None:
    """Bytes are replaced, removed or put in anywhere in the bundle: it is refused, or says the same as before."""
    at = data.draw(st.integers(0, len(bundle) - 1))
    cut = data.draw(st.integers(0, 3))
    spoilt = bundle[:at] + data.draw(st.binary(max_size=3)) + bundle[at + cut :]
    try:
        verify_signature(snapshot, spoilt, [keys.public])
    except Untrusted:
        return
    assert said(spoilt) == said(bundle)
    assert signer_of(spoilt) == keys.fingerprint


def test_an_encrypted_key_signs_with_its_password(snapshot: Snapshot, tmp_path: Path) -> None:
    keys = make_keys(tmp_path, "encrypted", "correct horse")
    bundle = sign(snapshot, keys.private, "correct horse")
    assert verify_signature(snapshot, bundle, [keys.public]) == keys.fingerprint


def test_files_that_change_while_they_are_signed_are_noticed(snapshot: Snapshot, keys: KeyPair, tmp_path: Path) -> None:
    shutil.copyfile(snapshot.files["adapter_config.json"], tmp_path / "altered")
    altered = Snapshot(snapshot.manifest, {**snapshot.files, WEIGHTS: tmp_path / "altered"})
    with pytest.raises(Corrupted, match=WEIGHTS):
        sign(altered, keys.private)


def test_every_version_is_reported_that_no_trusted_key_signed(
    registry: Registry, keys: KeyPair, other_keys: KeyPair
) -> None:
    trusted = TrustedKeys.read([keys.public])
    for version, pair in ((1, keys), (2, other_keys)):
        bundle = sign(registry.snapshot(f"{NAME}@{version}"), pair.private)
        registry.attach_signature(NAME, version, bundle, key=pair.fingerprint)
    (problem,) = signature_problems(registry, registry.versions(NAME), trusted)
    assert (problem.kind, problem.subject) == ("signature", f"{NAME}@2")
    assert other_keys.fingerprint in problem.detail
