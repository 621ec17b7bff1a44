"""`registry keygen` and `registry sign`; and what somebody can check who has model-signing alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from signing_tools import NAME, KeyPair
from typer.testing import CliRunner, Result

from adapterbay.registry import Registry
from adapterbay.registry.cli import signing as _signing
from adapterbay.registry.cli.common import app
from adapterbay.registry.errors import Untrusted
from adapterbay.registry.portable import LEDGER_PATH, OWN_README_PATH, SIGNATURE_PATH
from adapterbay.registry.signing import verify_signature

assert _signing  # adds its commands to `app`


def run(*arguments: object, code: int = 0, **settings: Any) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **settings)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def one_line(result: Result) -> str:
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert not result.stdout
    return str(line)


def test_keys_are_made_and_a_version_is_signed(registry: Registry, tmp_path: Path) -> None:
    key = tmp_path / "release.pem"
    made = json.loads(run("keygen", key, "--json").stdout)
    assert made == {
        "private_key": str(key),
        "public_key": f"{key}.pub",
        "fingerprint": made["fingerprint"],
    }
    signed = json.loads(run("sign", f"{NAME}@1", "--key", key, "--registry", registry.root, "--json").stdout)
    found = registry.snapshot(f"{NAME}@1")
    digest = found.manifest.digest
    assert signed == {"name": NAME, "version": 1, "digest": digest, "key": made["fingerprint"]}
    assert verify_signature(found, found.signature, [Path(made["public_key"])]) == made["fingerprint"]
    with pytest.raises(Untrusted, match="not signed"):
        verify_signature(registry.snapshot(f"{NAME}@2"), None, [Path(made["public_key"])])


def test_people_see_what_was_done(registry: Registry, tmp_path: Path) -> None:
    shown = run("keygen", tmp_path / "k.pem").stdout
    assert str(tmp_path / "k.pem.pub") in shown
    fingerprint = shown.split()[-1]
    assert fingerprint.startswith("sha256:")
    digest = registry.resolve(NAME).digest
    signed = run("sign", NAME, "--key", tmp_path / "k.pem", "--registry", registry.root).stdout
    assert signed == f"{NAME}@2 {digest} is signed with {fingerprint}\n"


def test_an_encrypted_key_takes_its_password_from_the_environment(registry: Registry, tmp_path: Path) -> None:
    password = {"ADAPTERBAY_KEY_PASSWORD": "correct horse"}
    key = tmp_path / "k.pem"
    run("keygen", key, "--encrypt", env=password)
    assert b"ENCRYPTED" in key.read_bytes()
    place = ("--key", key, "--registry", registry.root)
    run("sign", NAME, *place, env=password)
    assert registry.snapshot(NAME).signature is not None
    wrong = run("sign", f"{NAME}@1", *place, env={"ADAPTERBAY_KEY_PASSWORD": "battery"}, code=2)
    assert "does not open" in one_line(wrong)
    assert "is encrypted" in one_line(run("sign", f"{NAME}@1", *place, code=2))
    assert registry.snapshot(f"{NAME}@1").signature is None


def test_encrypt_without_a_password_makes_no_key(tmp_path: Path) -> None:
    assert "no password" in one_line(run("keygen", tmp_path / "k.pem", "--encrypt", code=2))
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(registry: Registry, keys: KeyPair, tmp_path: Path, monkeypatch: Any) -> None:
    place = ("--registry", registry.root)
    assert "never overwritten" in one_line(run("keygen", keys.private, code=2))
    assert "cannot be read" in one_line(run("sign", NAME, "--key", tmp_path / "none", *place, code=2))
    assert "has no version 9" in one_line(run("sign", f"{NAME}@9", "--key", keys.private, *place, code=1))
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert "adapterbay[signing]" in one_line(run("sign", NAME, "--key", keys.private, *place, code=2))
    assert "adapterbay[signing]" in one_line(run("keygen", tmp_path / "k.pem", code=2))


def model_signing(folder: Path, public_key: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command in the documentation, as somebody types it who has never installed adapterbay."""
    command = [
        "verify",
        "key",
        str(folder),
        "--signature",
        str(folder / SIGNATURE_PATH),
        "--public_key",
        str(public_key),
    ]
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *command, *more],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def pulled(registry: Registry, keys: KeyPair, tmp_path: Path) -> Path:
    """A signed version with a README.md, pulled."""
    run("sign", f"{NAME}@1", "--key", keys.private, "--registry", registry.root)
    return registry.pull(f"{NAME}@1", tmp_path / "pulled")


def test_a_pulled_folder_is_verified_without_adapterbay(pulled: Path, keys: KeyPair, other_keys: KeyPair) -> None:
    done = model_signing(pulled, keys.public)
    assert done.returncode == 0, done.stderr
    assert "Verification succeeded" in done.stdout
    assert model_signing(pulled, other_keys.public).returncode != 0


@pytest.mark.parametrize("path", ["adapter_model.safetensors", "adapter_config.json", "adapterbay/manifest.json"])
def test_an_altered_folder_is_not(pulled: Path, keys: KeyPair, path: str) -> None:
    with (pulled / path).open("ab") as file:
        file.write(b" ")
    done = model_signing(pulled, keys.public)
    assert done.returncode != 0
    assert path in done.stderr


def test_a_folder_with_something_added_is_not(pulled: Path, keys: KeyPair) -> None:
    (pulled / "pytorch_model.bin").write_bytes(b"x")
    done = model_signing(pulled, keys.public)
    assert done.returncode != 0
    assert "pytorch_model.bin" in done.stderr


def test_a_hub_repository_is_verified_as_it_lies_there(pulled: Path, keys: KeyPair, tmp_path: Path) -> None:
    """With the model card in the place of README.md, the ledger, and what git and `hf download` leave."""
    shutil.copyfile(pulled / "README.md", pulled / OWN_README_PATH)
    (pulled / "README.md").write_text("---\nbase_model: x\n---\n# A card\n")
    (pulled / LEDGER_PATH).write_text('{"schema_version": 1, "versions": []}')
    (pulled / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (pulled / ".cache" / "huggingface").mkdir(parents=True)
    (pulled / ".cache" / "huggingface" / ".gitignore").write_text("*")
    done = model_signing(pulled, keys.public)
    assert done.returncode == 0, done.stderr

    links = tmp_path / "snapshots"  # as a Hub cache has it
    for path in pulled.rglob("*"):
        if path.is_file():
            link = links / path.relative_to(pulled)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    done = model_signing(links, keys.public, "--allow_symlinks")
    assert done.returncode == 0, done.stderr
