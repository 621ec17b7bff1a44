"""A signed version behind the Hub's protocol: what a real client downloads is verified, and pushed again as itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_tools import ServerProcess, environment, serving
from signing_tools import NAME, KeyPair

from adapterbay.registry import Registry
from adapterbay.registry.portable import MANIFEST_PATH, SIGNATURE_PATH
from adapterbay.registry.signing import sign, verify_signature

FETCH = (
    "import sys; from adapterbay.registry.sources import fetch_adapter_folder; print(fetch_adapter_folder(sys.argv[1]))"
)
DOWNLOAD = (
    "import sys; from huggingface_hub import snapshot_download; "
    "print(snapshot_download(sys.argv[1], local_dir=sys.argv[2]))"
)


@pytest.fixture
def server(made: Path, registry: Registry, keys: KeyPair) -> Iterator[ServerProcess]:
    """`registry serve` over a store whose newest version is signed."""
    found = registry.resolve(f"{NAME}@2")
    registry.attach_signature(NAME, 2, sign(registry.open_snapshot(found.digest), keys.private), key=keys.fingerprint)
    registry.close()
    with serving(registry.root, made / "base") as running:
        yield running


def client(server: ServerProcess, home: Path, code: str, *arguments: object) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(home, server.endpoint),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def test_a_download_by_the_hubs_client_is_verified_without_adapterbay(
    server: ServerProcess, keys: KeyPair, tmp_path: Path
) -> None:
    folder = client(server, tmp_path, DOWNLOAD, NAME, tmp_path / "download")
    assert (folder / "README.md").is_file()  # a card, that the version has not
    command = [
        "verify",
        "key",
        str(folder),
        "--signature",
        str(folder / SIGNATURE_PATH),
        "--public_key",
        str(keys.public),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_is_fetched_from_the_hub_is_the_same_version_again(
    server: ServerProcess, registry: Registry, keys: KeyPair, tmp_path: Path
) -> None:
    origin = registry.resolve(f"{NAME}@2")
    for reference in (f"hub:{NAME}", f"hub:{NAME}@v2", f"hub:{NAME}@2"):
        folder = client(server, tmp_path, FETCH, reference)
        assert {path.name for path in folder.iterdir()} <= {
            "adapter_config.json",
            "adapter_model.safetensors",
            "adapterbay",
            "README.md",
        }
        assert json.loads((folder / MANIFEST_PATH).read_bytes())["labels"] == []
    other = Registry.open(tmp_path / "other")
    receipt = other.push(folder, "mine")
    assert receipt.digest == origin.digest
    found = other.snapshot("mine")
    assert verify_signature(found, found.signature, [keys.public]) == keys.fingerprint


def test_a_commit_of_the_hub_is_found_without_the_server(server: ServerProcess, tmp_path: Path) -> None:
    folder = client(server, tmp_path, FETCH, f"hub:{NAME}")
    server.stop()
    assert client(server, tmp_path, FETCH, f"hub:{NAME}@{folder.name}") == folder
