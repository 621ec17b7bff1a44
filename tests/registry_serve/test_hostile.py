"""Hostile commits: what the real client would not send, through its own session. Each is refused with its reason."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from huggingface_hub import CommitOperationAdd, get_session
from huggingface_hub.errors import HfHubHTTPError
from registry_serve.tools import Hub, new_weights
from registry_tools import Draft, Tiny, tree

from adapterbay.registry import Registry
from adapterbay.registry.digest import canonical_json

HEADER = {"key": "header", "value": {"summary": "x", "description": ""}}


@pytest.fixture(scope="module")
def target(start_hub: Callable[..., Hub]) -> Iterator[Hub]:
    """Small limits; at the end nothing of it all was kept."""
    hub = start_hub("--regular-bytes", "200000")
    hub.api().create_repo("team/target")
    before = tree(hub.store)
    yield hub
    after = tree(hub.store)
    assert {path for path in after if path not in before} == set()
    assert "Traceback" not in (hub.root / "server.log").read_text()


def file(path: str, data: bytes = b"x", **changes: Any) -> dict[str, Any]:
    value = {"content": base64.b64encode(data).decode(), "path": path, "encoding": "base64"}
    return {"key": "file", "value": value | changes}


def send(hub: Hub, body: bytes, **headers: str) -> tuple[int, str, str]:
    """Status, reason and message."""
    answer = get_session().post(
        f"{hub.url}/api/models/team/target/commit/main",
        headers={"authorization": f"Bearer {hub.token('alice')}", "content-type": "application/x-ndjson", **headers},
        content=body,
    )
    document = answer.json()
    assert answer.headers["x-error-message"]
    return answer.status_code, document["reason"], document["error"]


def lines(*documents: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        ".git/config",
        "a/.git/x",
        "C:\\x",
        "a\\b",
        "",
        ".",
        "a//b",
        "a/./b",
        "a\u0000b",
        "ａ.txt",
        "a" * 300,
        "a b",
    ],
)
def test_paths(target: Hub, path: str) -> None:
    for document in (file(path), {"key": "deletedFile", "value": {"path": path}}):
        status, reason, message = send(target, lines(HEADER, document))
        assert (status, reason) == (422, "PATH_OUTSIDE"), message
        assert "relative, plain, and stay inside" in message


@pytest.mark.parametrize(
    ("path", "data", "reason"),
    [
        ("pytorch_model.bin", b"x", "PICKLE"),
        ("notes.txt", b"\x80\x04\x95abc", "PICKLE"),
        ("adapter_model.safetensors", b"PK\x03\x04abcdefgh", "PICKLE"),
        ("data.json", b"\x80\x02c__builtin__\neval\n", "PICKLE"),
        ("modeling.py", b"import os", "CODE_IN_FOLDER"),
        ("lib/evil.so", b"\x7fELF", "CODE_IN_FOLDER"),
    ],
)
def test_pickles_and_code(target: Hub, path: str, data: bytes, reason: str) -> None:
    status, found, message = send(target, lines(HEADER, file(path, data)))
    assert (status, found) == (422, reason), message


def large(**value: Any) -> bytes:
    return lines(HEADER, {"key": "lfsFile", "value": {"path": "a", "algo": "sha256", "oid": "0" * 64} | value})


ONE = b'"path":"a","encoding":"base64"}}'
BODIES: list[tuple[bytes, str, str]] = [
    (b"", "BAD_COMMIT", "no header line"),
    (b"\n\n", "BAD_COMMIT", "no header line"),
    (lines(file("a.txt")), "BAD_COMMIT", "the header comes first"),
    (lines(HEADER, HEADER), "BAD_COMMIT", "the header comes first, and once"),
    (lines({"key": "header", "value": {}}), "BAD_COMMIT", "its summary is missing"),
    (lines(HEADER, {"key": "symlink", "value": {"path": "a", "target": "/x"}}), "BAD_COMMIT", "no operation"),
    (lines(HEADER, file("a.txt"), file("a.txt")), "BAD_COMMIT", "adds a.txt twice"),
    (lines(HEADER, file("a"), file("a/b")), "BAD_COMMIT", "a is a file, so a/b"),
    (lines(HEADER, file("a.txt", encoding="utf-8")), "BAD_COMMIT", "no base64 content"),
    (lines(HEADER, file("a.txt", content="!!!!")), "BAD_COMMIT", "not base64"),
    (lines(HEADER, file("a.txt", content="eA==eA==")), "BAD_COMMIT", "not base64"),
    (lines(HEADER, file("a.txt", content="eA")), "BAD_COMMIT", "not base64"),
    (lines(HEADER, file("a.txt", content=7)), "BAD_COMMIT", "no base64 content"),
    (lines(HEADER)[:-1] + b" trailing\n", "BAD_JSON", "not usable JSON"),
    (lines(HEADER) + b'{"key":"file","value":{"path":"a","content":"eA==', "BAD_COMMIT", "the body ends inside it"),
    (lines(HEADER) + b'{"key": "file", "key": "file", "value": {}}\n', "BAD_JSON", "is there twice"),
    (lines(HEADER) + b'{"key":"file","value":{"content":"eA==","content":"eA==",' + ONE, "BAD_COMMIT", "two contents"),
    (lines(HEADER) + b'{"key":"file","value":{"conte\\u006et":"eA==",' + ONE, "BAD_COMMIT", "no base64 content"),
    (lines(HEADER) + b"[" * 100_000, "BAD_COMMIT", "the body ends inside it"),
    (lines(HEADER) + b"[" * 100_000 + b"]" * 100_000, "BAD_JSON", ""),
    (lines(HEADER) + b'{"key": NaN, "value": {}}', "BAD_JSON", "NaN"),
    (lines(HEADER) + b"\xff\xfe", "BAD_JSON", ""),
    (large(algo="md5"), "BAD_COMMIT", "named by its sha256"),
    (large(oid="../../x"), "BAD_COMMIT", "named by its sha256"),
    (large(size=-1), "BAD_COMMIT", "not a number of bytes"),
]


@pytest.mark.parametrize(("body", "reason", "words"), BODIES)
def test_bodies(target: Hub, body: bytes, reason: str, words: str) -> None:
    status, found, message = send(target, body)
    assert (status, found) == (422, reason), message
    assert words in message


def test_sizes(target: Hub) -> None:
    status, reason, message = send(target, lines(HEADER, file("a.txt", b"x" * 200_001)))
    assert (status, reason) == (422, "TOO_LARGE")
    assert "has over 200000 bytes" in message
    status, reason, message = send(target, lines({"key": "header", "value": {"summary": "x" * 300_000}}))
    assert (status, reason) == (422, "TOO_LARGE")
    assert "without its content it has over" in message
    status, reason, _ = send(target, lines(HEADER, *(file(f"{number}.txt") for number in range(2001))))
    assert (status, reason) == (422, "TOO_LARGE")
    many = {"files": [{"path": f"{number}.txt", "size": 1, "sample": "eA=="} for number in range(100_000)]}
    answer = get_session().post(
        f"{target.url}/api/models/team/target/preupload/main",
        headers={"authorization": f"Bearer {target.token('alice')}"},
        json=many,
    )
    assert answer.status_code == 413
    assert answer.json()["reason"] == "TOO_LARGE"


def test_a_body_that_is_larger_than_all_limits_is_not_taken_in(target: Hub) -> None:
    """Its length is refused before a byte is read."""
    with socket.create_connection(("127.0.0.1", target.port)) as connection:
        connection.sendall(
            b"POST /api/models/team/target/commit/main HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n"
            b"Authorization: Bearer " + target.token("alice").encode() + b"\r\n\r\n"
        )
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_length_that_lies(target: Hub, llama: Tiny) -> None:
    """More was announced than came: nothing is kept, and the server goes on."""
    body = lines(HEADER, file("a.txt"))
    with socket.create_connection(("127.0.0.1", target.port)) as connection:
        connection.sendall(
            b"POST /api/models/team/target/commit/main HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
            % (len(body) + 100)
            + b"Authorization: Bearer "
            + target.token("alice").encode()
            + b"\r\n\r\n"
            + body
        )
    assert target.api().list_repo_files("team/target") == []


def test_huge_headers(target: Hub) -> None:
    with socket.create_connection(("127.0.0.1", target.port)) as connection:
        connection.sendall(b"GET /api/whoami-v2 HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * 300_000)
        assert connection.recv(65536).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    assert target.api().whoami()["name"] == "alice"


@pytest.mark.parametrize("name", ["tеam/target", "team/tаrget", "Team/target", "team/target\u200b", "team/%2e%2e"])
def test_names_that_look_alike(target: Hub, name: str) -> None:
    """Cyrillic letters, capitals, nothing at all: no such name can be."""
    bearer = {"authorization": f"Bearer {target.token('alice')}"}
    answer = get_session().get(f"{target.url}/api/models/{quote(name)}", headers=bearer)
    assert answer.status_code == 404
    assert answer.headers["x-error-code"] == "RepoNotFound"
    organization, _, repo = name.partition("/")
    made = get_session().post(
        f"{target.url}/api/repos/create", headers=bearer, json={"organization": organization, "name": repo}
    )
    assert made.status_code == 400
    assert "is not an adapter name" in made.json()["error"]


def test_a_manifest_that_lies(target: Hub, llama: Tiny, tmp_path: Path) -> None:
    folder = Registry.open(tmp_path / "source")
    receipt = folder.push(llama.adapter, "x", base=str(llama.base))
    honest = receipt.manifest.model_dump(mode="json")
    honest["files"] = files = [each for each in honest["files"] if each["path"] != "README.md"]
    for change, words in (
        ({"rank": 7}, "its rank contradicts the files"),
        ({"task": "sequence-classification"}, "its task is sequence-classification"),
        ({"files": [files[0] | {"digest": "sha256:" + "0" * 64}, *files[1:]]}, "which is not in the commit"),
        ({"files": files[1:]}, f"does not name {files[0]['path']}"),
        ({"base_fingerprint": "sha256:" + "0" * 64}, "fingerprint"),
        ({"files": files * 2}, "twice"),
        ({"extra": 1}, "manifest is not valid"),
    ):
        documents = [file(path.name, path.read_bytes()) for path in llama.adapter.iterdir() if path.suffix != ".md"]
        documents.append(file("adapterbay/manifest.json", canonical_json(honest | change)))
        status, reason, message = send(target, lines(HEADER, *documents))
        assert status == 422, message
        assert reason in ("MANIFEST_MISMATCH", "BASE_MISMATCH", "BAD_MANIFEST"), message
        assert words in message


def test_weights_that_lie(target: Hub, llama: Tiny, tmp_path: Path) -> None:
    folder = new_weights(llama.adapter, tmp_path / "w", 1)
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first = next(key for key in header if key != "__metadata__")
    header[first]["data_offsets"][1] += 10**9
    lying = json.dumps(header).encode()
    for content, reason in (
        (len(lying).to_bytes(8, "little") + lying + data[8 + length :], "BAD_HEADER"),
        ((2**60).to_bytes(8, "little") + data[8:], "TOO_LARGE"),
        (data[:-10], "TRUNCATED"),
        (b"", "TRUNCATED"),
    ):
        documents = [file(path.name, path.read_bytes()) for path in folder.iterdir() if path != weights]
        status, found, message = send(target, lines(HEADER, *documents, file(weights.name, content)))
        assert status == 422, message
        assert found in (reason, "BAD_HEADER", "TRUNCATED"), message


def test_the_client_shows_the_reason(target: Hub, tmp_path: Path, llama: Tiny) -> None:
    api = target.api()
    with pytest.raises(HfHubHTTPError, match="pickles can run code"):
        api.upload_file(repo_id="team/target", path_in_repo="model.bin", path_or_fileobj=b"x")
    with pytest.raises(HfHubHTTPError, match="code is never taken"):
        api.create_commit("team/target", [CommitOperationAdd("x.py", b"x")], commit_message="x")
    draft = Draft(new_weights(llama.adapter, tmp_path / "replicated", 1))
    draft.edit_config(layer_replication=[[0, 2]])
    shown = target.hf(tmp_path / "hf", "upload", "team/target", draft.path)
    assert shown.returncode != 0
    assert "layer_replication" in shown.stderr


def test_what_trainers_leave_is_left_out(start_hub: Callable[..., Hub], llama: Tiny, tmp_path: Path) -> None:
    """As `registry push` does; the client says so."""
    hub = start_hub()
    folder = new_weights(llama.adapter, tmp_path / "out", 1)
    (folder / "training_args.bin").write_bytes(b"\x80\x04x")
    (folder / "optimizer.pt").write_bytes(b"PK\x03\x04")
    (folder / ".gitattributes").write_text("*.bin lfs")
    done = hub.hf(tmp_path / "hf", "upload", "team/trained", folder)
    assert done.returncode == 0, done.stderr
    assert "left out, no part of an adapter: .gitattributes, optimizer.pt, training_args.bin" in done.stderr
    files = hub.api().list_repo_files("team/trained")
    assert [path for path in files if "/" not in path] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
