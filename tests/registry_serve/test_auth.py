"""Tokens and what they are good for."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError
from registry_serve.tools import Hub, registry_command, run_registry
from registry_tools import Tiny

from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument, Unavailable
from adapterbay.registry.serve.tokens import TokenFile

NOTE = [CommitOperationAdd("NOTES.md", b"x")]


@pytest.fixture(scope="module")
def filled(start_hub: Callable[..., Hub], llama: Tiny) -> Hub:
    hub = start_hub()
    Registry.open(hub.store).push(llama.adapter, "team/x")
    return hub


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_without_a_token(filled: Hub) -> None:
    nobody = HfApi(endpoint=filled.url, token=False)
    with pytest.raises(HfHubHTTPError, match=r"This registry asks for a token.*registry token create") as refused:
        nobody.model_info("team/x")
    assert status(refused) == 401
    assert refused.value.response.headers["www-authenticate"] == 'Bearer realm="adapterbay"'
    with pytest.raises(HfHubHTTPError) as refused:
        nobody.create_commit("team/x", NOTE, commit_message="x")
    assert status(refused) == 401
    client = get_session()
    for path in (
        "/api/models",
        "/team/x/resolve/main/README.md",
        "/api/models/team/x/xet-read-token/main",
        "/api/datasets/a/b",
    ):
        assert client.get(filled.url + path).status_code == 401, path
    assert client.get(filled.url + "/healthz").json() == {"status": "ok"}
    assert "HF_ENDPOINT=" + filled.url in client.get(filled.url).text


@pytest.mark.parametrize("header", ["Bearer abt_wrong", "Bearer", "Basic YTpi", "abt_wrong", "Bearer \u00e9"])
def test_a_wrong_token_is_refused_everywhere(filled: Hub, header: str) -> None:
    answer = get_session().get(f"{filled.url}/api/whoami-v2", headers={"authorization": header.encode("latin-1")})
    assert answer.status_code == 401
    assert "is not known to this registry, or was revoked" in answer.json()["error"]


def test_scopes(filled: Hub) -> None:
    reader = filled.api("reader", "read")
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    assert reader.model_info("team/x").id == "team/x"
    reader.auth_check("team/x")
    for act in (
        lambda: reader.create_repo("team/y"),
        lambda: reader.create_commit("team/x", NOTE, commit_message="x"),
        lambda: reader.create_tag("team/x", tag="champion", revision="v1"),
        lambda: reader.delete_tag("team/x", tag="champion"),
        lambda: reader.create_branch("team/x", branch="b"),
        lambda: reader.delete_repo("team/x"),
        lambda: reader.auth_check("team/x", write=True),
    ):
        with pytest.raises(HfHubHTTPError, match="The token reader may only read here") as refused:
            act()
        assert status(refused) == 403
    writer = filled.api("writer", "write")
    writer.auth_check("team/x", write=True)


def test_tokens_for_some_names_only(filled: Hub) -> None:
    api = filled.api("limited", "write", only="own/")
    assert api.create_repo("own/a").repo_id == "own/a"
    assert api.create_repo("own/a", exist_ok=True).repo_id == "own/a"
    for act in (
        lambda: api.model_info("team/x"),
        lambda: api.create_repo("team/y"),
        lambda: api.create_repo("owner/y"),
        lambda: api.create_commit("team/x", NOTE, commit_message="x"),
        lambda: api.list_repo_refs("team/x"),
    ):
        with pytest.raises(HfHubHTTPError, match="The token limited is good for own/ only") as refused:
            act()
        assert status(refused) == 403
    assert [info.id for info in api.list_models()] == ["own/a"]
    one = filled.api("one", "read", only="team/x")
    assert [info.id for info in one.list_models()] == ["team/x"]


def test_a_revoked_token_is_refused_at_once(filled: Hub) -> None:
    api = filled.api("short", "write")
    assert api.whoami()["name"] == "short"
    assert run_registry("token", "revoke", "short", "--registry", filled.store) == "short was revoked"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami()
    with pytest.raises(HfHubHTTPError, match="was revoked"):
        api.model_info("team/x")


def test_anonymous(start_hub: Callable[..., Hub], llama: Tiny) -> None:
    hub = start_hub("--anonymous", "read")
    Registry.open(hub.store).push(llama.adapter, "team/x")
    nobody = HfApi(endpoint=hub.url, token=False)
    info = nobody.model_info("team/x")
    assert info.private is False
    with pytest.raises(HfHubHTTPError, match="Anonymous callers may only read here") as refused:
        nobody.create_commit("team/x", NOTE, commit_message="x")
    assert status(refused) == 403
    with pytest.raises(HfHubHTTPError):
        HfApi(endpoint=hub.url, token="abt_wrong").model_info("team/x")  # never silently anonymous
    open_hub = start_hub("--anonymous", "write")
    nobody = HfApi(endpoint=open_hub.url, token=False)
    nobody.create_repo("team/x")
    with pytest.raises(HfHubHTTPError, match="Say whose 'x' it is"):
        nobody.create_repo("x")
    nobody.upload_folder(repo_id="team/x", folder_path=llama.adapter)
    assert nobody.list_repo_commits("team/x")[0].authors == ["anonymous"]


def test_the_file_holds_no_token(tmp_path: Path) -> None:
    text = run_registry("token", "create", "ci", "--scope", "write", "--only", "team/", "--registry", tmp_path / "r")
    assert text.startswith("abt_")
    assert len(text) == 47
    path = tmp_path / "r" / "tokens.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_text()
    assert text not in content
    assert text[4:] not in content
    (entry,) = json.loads(content)["tokens"]
    assert entry["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    shown = json.loads(run_registry("token", "list", "--registry", tmp_path / "r", "--json"))
    assert [(each["name"], each["scope"], each["only"]) for each in shown["tokens"]] == [("ci", "write", "team/")]
    assert "sha256" not in shown["tokens"][0]
    assert "ci" in run_registry("token", "list", "--registry", tmp_path / "r")
    made = json.loads(run_registry("token", "create", "b", "--scope", "read", "--registry", tmp_path / "r", "--json"))
    assert made["token"].startswith("abt_")
    assert Registry.open(tmp_path / "r", create=False).adapters() == []  # the folder is a registry


def test_mistakes_with_tokens(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    _, text = tokens.create("ci", "read")
    with pytest.raises(InvalidArgument, match="There is a token named ci"):
        tokens.create("ci", "write")
    with pytest.raises(InvalidArgument, match="The scope 'admin' is not one of read, write"):
        tokens.create("b", "admin")
    for name in ("", "a/b", "Über", "a b", "../x"):
        with pytest.raises(InvalidArgument, match="does not name a token"):
            tokens.create(name, "read")
    with pytest.raises(InvalidArgument, match="is not an adapter name"):
        tokens.create("b", "read", only="../")
    found = TokenFile(tmp_path / "tokens.json").find(text)
    assert found is not None
    assert found.name == "ci"
    assert tokens.find(text + "x") is None
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(Unavailable, match=r"The tokens in .* are not readable"):
        tokens.tokens()
    done = subprocess.run(
        registry_command("token", "revoke", "nobody", "--registry", tmp_path / "r"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "error: There is no token named nobody.\n")
