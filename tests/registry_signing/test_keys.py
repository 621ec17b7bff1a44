"""Key pairs: made once, kept private, and refused in one sentence when they are something else."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from signing_tools import KeyPair, make_keys

from adapterbay.registry.errors import InvalidArgument, MissingExtra
from adapterbay.registry.keys import PublicKey, check_private_key, generate_key_pair, needs_password
from adapterbay.registry.signing import TrustedKeys


def test_a_pair_belongs_together(keys: KeyPair) -> None:
    assert PublicKey.read(keys.public) == check_private_key(keys.private, None)
    assert keys.fingerprint == f"sha256:{hashlib.sha256(keys.public.read_bytes()).hexdigest()}"


def test_the_private_key_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = make_keys(tmp_path, "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.private.stat().st_mode) == 0o600
    assert b"PRIVATE" not in made.public.read_bytes()


@pytest.mark.parametrize("there", ["new.pem", "new.pem.pub"])
def test_no_key_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("something dear")
    with pytest.raises(InvalidArgument, match="never overwritten"):
        make_keys(tmp_path, "new")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "something dear"


def test_no_key_is_written_through_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "new.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgument, match="never overwritten"):
        make_keys(tmp_path, "new")
    assert not (tmp_path / "elsewhere").exists()


def test_a_password_opens_its_key_and_no_other_does(tmp_path: Path) -> None:
    made = make_keys(tmp_path, "encrypted", "correct horse")
    assert needs_password(made.private)
    assert check_private_key(made.private, "correct horse").fingerprint == made.fingerprint
    for password, message in (("battery staple", "does not open"), (None, "is encrypted"), ("", "is encrypted")):
        with pytest.raises(InvalidArgument, match=message) as caught:
            check_private_key(made.private, password)
        assert caught.value.field == "password"


def test_a_password_does_not_hurt_a_key_that_has_none(keys: KeyPair) -> None:
    assert not needs_password(keys.private)
    assert check_private_key(keys.private, "not needed").fingerprint == keys.fingerprint


def write_private(path: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def write_public(path: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> Path:
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256K1())):
        with pytest.raises(InvalidArgument, match="no elliptic curve key on secp256r1"):
            check_private_key(write_private(tmp_path / "key", key), None)
        with pytest.raises(InvalidArgument, match="no elliptic curve key on secp256r1"):
            PublicKey.read(write_public(tmp_path / "key.pub", key))


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_larger_curves_are_taken(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    found = check_private_key(write_private(tmp_path / "key", key), None)
    assert found == PublicKey.read(write_public(tmp_path / "key.pub", key))


def test_what_is_no_key_is_refused(tmp_path: Path, keys: KeyPair) -> None:
    (tmp_path / "key").write_text("-----BEGIN NONSENSE-----\n")
    with pytest.raises(InvalidArgument, match="not a private key in PEM"):
        check_private_key(tmp_path / "key", None)
    with pytest.raises(InvalidArgument, match="not a public key in PEM"):
        PublicKey.read(tmp_path / "key")
    with pytest.raises(InvalidArgument, match="not a private key in PEM"):
        check_private_key(keys.public, None)
    with pytest.raises(InvalidArgument, match="keep it to yourself"):
        PublicKey.read(keys.private)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InvalidArgument, match="cannot be read"):
            check_private_key(path, None)
        with pytest.raises(InvalidArgument, match="cannot be read"):
            PublicKey.read(path)
    with pytest.raises(InvalidArgument, match="No public key was given"):
        TrustedKeys.read([])


def test_without_the_extra_one_line_says_what_to_install(
    tmp_path: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "model_signing"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "model_signing", None)  # type: ignore[arg-type]
    for use in (
        lambda: generate_key_pair(tmp_path / "key", tmp_path / "key.pub"),
        lambda: check_private_key(keys.private, None),
        lambda: TrustedKeys.read([keys.public]),
    ):
        with pytest.raises(MissingExtra, match=r"pip install 'adapterbay\[signing\]'"):
            use()
    assert not list(tmp_path.iterdir())
