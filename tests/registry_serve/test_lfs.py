"""Files over the size that travels in a commit: Git LFS with HF_HUB_DISABLE_XET=1; what Xet clients are told."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import get_session, hf_hub_download
from registry_serve.tools import Hub, files_of, new_weights
from registry_tools import Tiny

from adapterbay.registry import Registry

UPLOAD = """
    import json
    from huggingface_hub import HfApi
    api = HfApi()
    api.create_repo({name!r}, exist_ok=True)
    print(json.dumps(api.upload_folder(repo_id={name!r}, folder_path={folder!r}).oid))
    """


@pytest.fixture(scope="module")
def small(start_hub: Callable[..., Hub]) -> Hub:
    """Everything over 2000 bytes goes by LFS: the weights, and PEFT's card."""
    return start_hub("--regular-bytes", "2000")


def test_large_files_by_lfs(small: Hub, llama: Tiny, tmp_path: Path) -> None:
    folder = new_weights(llama.adapter, tmp_path / "w1", 1)
    oid = small.python(
        UPLOAD.format(name="team/large", folder=str(folder)), tmp_path / "hf", {"HF_HUB_DISABLE_XET": "1"}
    )
    store = Registry.open(small.store)
    snapshot = store.snapshot("team/large@1")
    assert {name: path.read_bytes() for name, path in snapshot.files.items()} == files_of(folder)
    assert small.api().model_info("team/large").sha == oid
    log = (small.root / "server.log").read_text()
    assert "method=POST path=/team/large.git/info/lfs/objects/batch status=200" in log
    weights = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert f"method=PUT path=/team/large.git/info/lfs/objects/{weights} status=200" in log
    assert "ticket" not in log
    down = hf_hub_download(
        "team/large", "adapter_model.safetensors", endpoint=small.url, token=small.token("alice"), cache_dir=tmp_path
    )
    assert Path(down).read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    # Bytes that are here are not sent again, whatever the name.
    small.python(UPLOAD.format(name="team/copy", folder=str(folder)), tmp_path / "hf", {"HF_HUB_DISABLE_XET": "1"})
    log = (small.root / "server.log").read_text()
    assert "path=/team/copy.git/info/lfs/objects/batch status=200" in log
    assert "method=PUT path=/team/copy.git" not in log
    assert store.resolve("team/copy").digest == store.resolve("team/large").digest


def test_hf_upload_by_lfs(small: Hub, llama: Tiny, tmp_path: Path) -> None:
    done = small.hf(tmp_path / "hf", "upload", "team/large-cli", llama.adapter, HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert Registry.open(small.store).resolve("team/large-cli").version == 1


def test_xet_clients_are_told_what_to_do(small: Hub, llama: Tiny, tmp_path: Path) -> None:
    done = small.hf(tmp_path / "hf", "upload", "team/xet", llama.adapter)
    assert done.returncode != 0
    assert "HF_HUB_DISABLE_XET=1" in done.stderr
    assert small.api().list_repo_files("team/xet") == []
    answer = get_session().get(
        f"{small.url}/api/models/team/xet/xet-write-token/main",
        headers={"authorization": f"Bearer {small.token('alice')}"},
    )
    assert answer.status_code == 501
    assert "Set HF_HUB_DISABLE_XET=1" in answer.json()["error"]


def test_uploads_that_lie(small: Hub, tmp_path: Path) -> None:
    api = small.api()
    api.create_repo("team/liar")
    bearer = {"authorization": f"Bearer {small.token('alice')}"}
    client = get_session()

    def action(data: bytes, size: int | None = None) -> dict[str, str]:
        body = {
            "operation": "upload",
            "objects": [{"oid": hashlib.sha256(data).hexdigest(), "size": size or len(data)}],
        }
        answer = client.post(f"{small.url}/team/liar.git/info/lfs/objects/batch", headers=bearer, json=body)
        assert answer.status_code == 200
        actions: dict[str, dict[str, str]] = answer.json()["objects"][0]["actions"]
        return actions["upload"]

    def put(address: str, data: bytes) -> tuple[int, str]:
        answer = client.put(address, content=data)
        return answer.status_code, answer.json().get("error", "")

    data = os.urandom(5000)
    address = action(data)["href"]
    assert put(address, b"x" * 5000)[0] == 422
    assert "sha256" in put(address, b"x" * 5000)[1]
    assert put(address, data + b"x")[0] == 413
    assert put(address, data[:-1])[0] == 422
    assert put(address.replace("size=5000", "size=5001"), data + b"x")[0] == 403
    assert put(address.replace("team/liar.git", "team/other.git"), data)[0] == 403
    assert put(address.replace("ticket=alice", "ticket=bob"), data)[0] == 403
    assert put(address.partition("ticket=")[0], data)[0] == 403
    pickle = b"\x80\x04" + os.urandom(3000)
    assert put(action(pickle)["href"], pickle)[0] == 422
    assert list((small.store / "tmp").iterdir()) == []
    verify = f"{small.url}/team/liar.git/info/lfs/objects/verify"
    wanted = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert client.post(verify, headers=bearer, json=wanted).status_code == 404
    assert put(address, data) == (200, "")
    assert client.post(verify, headers=bearer, json=wanted).status_code == 200

    def commit(oid: str, size: int | None, path: str = "data.dat") -> tuple[int, str]:
        value = {"path": path, "algo": "sha256", "oid": oid, **({} if size is None else {"size": size})}
        lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": value}]
        body = "".join(json.dumps(line) + "\n" for line in lines)
        answer = client.post(f"{small.url}/api/models/team/liar/commit/main", headers=bearer, content=body.encode())
        return answer.status_code, answer.json().get("error", "")

    assert commit("0" * 64, 5000) == (
        422,
        "data.dat was not uploaded: nothing with its sha256 and size came before the commit.",
    )
    assert commit(wanted["oid"], 4999)[0] == 422
    assert commit(wanted["oid"], None)[0] == 200
    assert api.list_repo_files("team/liar") == ["data.dat"]


def test_a_limited_token_cannot_take_what_it_may_not_read(small: Hub, tmp_path: Path) -> None:
    """Knowing a digest is not enough to have the bytes."""
    secret = os.urandom(4000)
    oid = hashlib.sha256(secret).hexdigest()
    small.api().create_repo("team/secret")
    (tmp_path / "secret.dat").write_bytes(secret)
    done = small.hf(tmp_path / "hf", "upload", "team/secret", tmp_path / "secret.dat", HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    guest = small.api("guest", "write", only="guest/")
    guest.create_repo("guest/box")
    bearer = {"authorization": f"Bearer {small.token('guest')}"}
    client = get_session()
    objects = {"operation": "upload", "objects": [{"oid": oid, "size": 4000}]}
    answer = client.post(f"{small.url}/guest/box.git/info/lfs/objects/batch", headers=bearer, json=objects)
    (found,) = answer.json()["objects"]
    assert "upload" in found["actions"]  # as if nobody had it
    line = {"key": "lfsFile", "value": {"path": "mine.dat", "algo": "sha256", "oid": oid, "size": 4000}}
    body = b'{"key": "header", "value": {"summary": "x"}}\n' + json.dumps(line).encode()
    refused = client.post(f"{small.url}/api/models/guest/box/commit/main", headers=bearer, content=body)
    assert refused.status_code == 422
    assert client.put(found["actions"]["upload"]["href"], content=secret).status_code == 200
    taken = client.post(f"{small.url}/api/models/guest/box/commit/main", headers=bearer, content=body)
    assert taken.status_code == 200
