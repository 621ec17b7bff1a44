"""Bytes of files: ETags, ranges, resuming, altered blobs."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfFileSystem,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from registry_serve.tools import Hub
from registry_tools import Tiny

from adapterbay.registry import Registry

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def pushed(hub: Hub, llama: Tiny) -> str:
    Registry.open(hub.store).push(llama.adapter, "team/files")
    return "team/files"


def test_metadata_of_a_file(hub: Hub, llama: Tiny, pushed: str) -> None:
    data = (llama.adapter / WEIGHTS).read_bytes()
    url = hf_hub_url(pushed, WEIGHTS, endpoint=hub.url)
    found = get_hf_file_metadata(url, token=hub.token("alice"), endpoint=hub.url)
    assert found.etag == hashlib.sha256(data).hexdigest()
    assert found.size == len(data)
    assert found.commit_hash == hub.api().model_info(pushed).sha
    assert found.xet_file_data is None
    assert found.location == url


def test_ranges(hub: Hub, llama: Tiny, pushed: str) -> None:
    data = (llama.adapter / WEIGHTS).read_bytes()
    url = hf_hub_url(pushed, WEIGHTS, endpoint=hub.url)
    bearer = {"authorization": f"Bearer {hub.token('alice')}", "accept-encoding": "identity"}

    def get(**headers: str) -> tuple[int, bytes, str | None]:
        answer = get_session().get(
            url, headers=bearer | {key.replace("_", "-"): value for key, value in headers.items()}
        )
        return answer.status_code, answer.content, answer.headers.get("content-range")

    size = len(data)
    assert get(range="bytes=10-19") == (206, data[10:20], f"bytes 10-19/{size}")
    assert get(range=f"bytes={size - 5}-") == (206, data[-5:], f"bytes {size - 5}-{size - 1}/{size}")
    assert get(range="bytes=-7") == (206, data[-7:], f"bytes {size - 7}-{size - 1}/{size}")
    assert get(range=f"bytes={size}-")[0] == 416
    etag = f'"{hashlib.sha256(data).hexdigest()}"'
    assert get(if_none_match=etag)[:2] == (304, b"")
    assert get(if_none_match='"other"')[0] == 200
    assert get(range="bytes=0-3", if_range=etag)[0] == 206
    assert get(range="bytes=0-3", if_range='"other"')[:2] == (200, data)
    system = HfFileSystem(endpoint=hub.url, token=hub.token("alice"))
    with system.open(f"{pushed}/{WEIGHTS}", block_size=64) as file:
        file.seek(100)
        assert file.read(50) == data[100:150]


def test_a_download_goes_on_after_the_server_was_killed(start_hub: Callable[..., Hub], tmp_path: Path) -> None:
    hub = start_hub()
    data = os.urandom(48 * 2**20)
    hub.api().create_repo("team/big")
    hub.api().create_commit("team/big", [CommitOperationAdd("big.dat", data)], commit_message="Big")
    url = hf_hub_url("team/big", "big.dat", endpoint=hub.url)
    half = threading.Event()

    class Slow(io.BytesIO):
        """Reads no faster than the test kills."""

        def write(self, piece: bytes) -> int:  # type: ignore[override]
            if self.tell() > len(data) // 3:
                half.set()
                time.sleep(0.02)
            return super().write(piece)

    place = Slow()
    headers = {"authorization": f"Bearer {hub.token('alice')}"}
    failures: list[BaseException] = []

    def download() -> None:
        try:
            http_get(url, place, headers=headers, expected_size=len(data))
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    thread = threading.Thread(target=download)
    thread.start()
    assert half.wait(60)
    hub.kill()
    hub.start()
    thread.join(120)
    assert not thread.is_alive()
    assert failures == []
    assert hashlib.sha256(place.getvalue()).digest() == hashlib.sha256(data).digest()
    assert "path=/team/big/resolve/main/big.dat status=206" in (hub.root / "server.log").read_text()


def test_an_altered_blob_is_never_sent(start_hub: Callable[..., Hub], llama: Tiny, tmp_path: Path) -> None:
    hub = start_hub()
    Registry.open(hub.store).push(llama.adapter, "team/altered")
    digest = hashlib.sha256((llama.adapter / WEIGHTS).read_bytes()).hexdigest()
    blob = hub.store / "blobs" / "sha256" / digest[:2] / digest
    api = hub.api()
    hf_hub_download("team/altered", WEIGHTS, endpoint=hub.url, token=hub.token("alice"), cache_dir=tmp_path / "a")
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    time.sleep(0.01)
    blob.write_bytes(data)
    with pytest.raises(HfHubHTTPError, match="was altered in the registry"):
        hf_hub_download("team/altered", WEIGHTS, endpoint=hub.url, token=hub.token("alice"), cache_dir=tmp_path / "b")
    assert api.file_exists("team/altered", "adapter_config.json")
    blob.unlink()
    with pytest.raises(HfHubHTTPError, match="is lost in the registry"):
        get_hf_file_metadata(hf_hub_url("team/altered", WEIGHTS, endpoint=hub.url), token=hub.token("alice"))
