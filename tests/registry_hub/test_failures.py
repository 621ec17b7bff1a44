"""No network, no rights, a Hub that fails: what is said, and what still works from the cache."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils._http as http
import pytest
from hub_tools import ServerProcess, environment, free_port, serving
from huggingface_hub import HfApi
from plain_hub import Failure, PlainHub

from adapterbay.registry.base import locate
from adapterbay.registry.errors import BaseNotFound, NotFound, Rejected, Unavailable
from adapterbay.registry.hub import aliases as alias_moves
from adapterbay.registry.hub.backend import HubRegistry
from adapterbay.registry.serve.tokens import TokenFile

Content = Callable[[int], Path]
NAME = "team/tales"

ASK = """
import sys
from adapterbay.registry.errors import AdapterbayError
from adapterbay.registry.hub.backend import HubRegistry
registry = HubRegistry("hub:team")
for reference in sys.argv[2:]:
    try:
        if sys.argv[1] == "pull":
            found = registry.resolve(reference)
            assert registry.snapshot(reference).manifest.digest == found.digest
            print(reference, found.version, found.digest)
        else:
            print(reference, getattr(registry, sys.argv[1])(reference))
    except AdapterbayError as error:
        print(reference, type(error).__name__, error.message)
"""


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits 1, 2, 4, … seconds between its own retries."""
    monkeypatch.setattr(http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda _: None}))


@pytest.fixture
def registry(plain: PlainHub, tmp_path: Path) -> HubRegistry:
    return HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "hub-cache")


def ask(endpoint: str, home: Path, what: str, *references: str, offline: bool = False) -> dict[str, str]:
    env = environment(home, endpoint) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    command = [sys.executable, "-c", ASK, what, *references]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_offline_what_was_pulled_is_found(
    plain: PlainHub, registry: HubRegistry, content: Content, tmp_path: Path
) -> None:
    first = registry.push(content(1), "tales", aliases=["champion"])
    second = registry.push(content(2), "tales")
    registry.push(content(3), "tales")
    commit = registry.find("tales@1").commit
    HfApi(endpoint=plain.endpoint, token=False).create_repo("team/theirs")
    files = {path.name: path.read_bytes() for path in content(4).iterdir()}
    theirs = plain.repos["team/theirs"].add({**plain.repos["team/theirs"].head.tree, **files}, "by hand")
    home = tmp_path / "home"
    online = ask(plain.endpoint, home, "pull", "tales", f"tales@{first.digest}", "tales@2", "team/theirs")
    assert online[f"tales@{first.digest}"] == f"1 {first.digest}"
    plain.requests.clear()
    asked = ["tales", *(f"tales@{revision}" for revision in ("champion", "1", "2", "3", commit, first.digest))]
    asked += ["team/theirs", f"theirs@{theirs}"]
    offline = ask(plain.endpoint, home, "pull", *asked, offline=True)
    assert plain.requests == []
    assert {reference: offline[reference] for reference in online} == online
    assert offline["tales@1"] == offline["tales@champion"] == offline[f"tales@{commit}"] == f"1 {first.digest}"
    assert offline["tales@2"] == f"2 {second.digest}"
    assert offline["tales@3"] == offline["tales"], "the newest then"
    assert offline[f"theirs@{theirs}"] == online["team/theirs"]


def test_offline_what_was_not_pulled_is_not(
    plain: PlainHub, registry: HubRegistry, content: Content, tmp_path: Path
) -> None:
    first = registry.push(content(1), "tales", aliases=["champion"])
    registry.push(content(2), "tales")
    home = tmp_path / "home"
    ask(plain.endpoint, home, "pull", "tales@2")
    asked = ["tales@1", "tales@champion", "other", f"tales@{first.digest}"]
    offline = ask(plain.endpoint, home, "pull", *asked, offline=True)
    for reference in asked:
        assert offline[reference].startswith("Unavailable "), offline
        assert "HF_HUB_OFFLINE" in offline[reference]
    for what in ("versions", "aliases", "history", "verify"):
        assert "HF_HUB_OFFLINE" in ask(plain.endpoint, home, what, "tales", offline=True)["tales"]


def test_no_network(content: Content, tmp_path: Path) -> None:
    registry = HubRegistry("hub:team", endpoint=f"http://127.0.0.1:{free_port()}", cache=tmp_path / "hub-cache")
    for ask_for in (registry.resolve, registry.versions, registry.snapshot):
        with pytest.raises(Unavailable) as caught:
            ask_for("tales")
        assert "cannot be reached" in caught.value.message
    with pytest.raises(Unavailable):
        registry.push(content(1), "tales")


def test_a_stale_answer_is_never_taken_for_a_new_one(plain: PlainHub, registry: HubRegistry, content: Content) -> None:
    registry.push(content(1), "tales")
    registry.snapshot("tales")
    plain.stop()
    for reference in ("tales", "tales@1"):
        with pytest.raises(Unavailable):
            registry.snapshot(reference)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails(
    plain: PlainHub, registry: HubRegistry, content: Content, status: int, tmp_path: Path
) -> None:
    registry.push(content(1), "tales")
    for what in ("/refs", "/resolve/"):
        plain.failures = [Failure(what, status, times=100)]
        fresh = HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / what.strip("/"))
        with pytest.raises(Unavailable) as caught:
            fresh.snapshot("tales")
        assert "try again later" in caught.value.message or "could not be fetched" in caught.value.message
        assert "\n" not in caught.value.message
    plain.failures = [Failure("/resolve/", 503, times=2)]
    passing = HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "passing")
    assert passing.snapshot("tales").manifest.peft_type == "LORA", "the client's own retries"


def test_private_gated_and_read_only(plain: PlainHub, registry: HubRegistry, content: Content, tmp_path: Path) -> None:
    registry.push(content(1), "tales")
    repo = plain.repos[NAME]

    repo.private = True
    with pytest.raises(NotFound) as caught:
        registry.resolve("tales")
    assert "hf auth login" in caught.value.message
    known = HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "another", token="hf_somebody")
    assert known.resolve("tales").version == 1

    repo.gated = True
    fresh = HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "fresh", token="hf_somebody")
    with pytest.raises(NotFound) as gated:
        fresh.snapshot("tales")
    assert gated.value.reason == "GATED"
    assert "accept its licence" in gated.value.message
    registry.push(content(1), "open")
    assert [found.name for found in fresh.adapters()] == ["team/open"], "one gated repository does not hide the others"
    repo.private = repo.gated = False

    plain.writers = {"hf_writer"}
    for write in (
        lambda: known.push(content(2), "tales"),
        lambda: known.push(content(2), "new"),
        lambda: known.set_alias("tales", "champion", 1),
    ):
        with pytest.raises(Unavailable) as forbidden:
            write()
        assert forbidden.value.reason == "FORBIDDEN"
        assert "may write" in forbidden.value.message
    writer = HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "another", token="hf_writer")
    assert writer.push(content(2), "tales").version == 2


def test_a_base_on_a_server_of_adapters(plain: PlainHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """With HF_ENDPOINT set to our server, bases are looked for there, too: who reads the message learns why."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", plain.endpoint)
    with pytest.raises(BaseNotFound) as caught:
        locate("hub:acme/no-such-base")
    assert caught.value.message.startswith(f"{plain.endpoint} has no base hub:acme/no-such-base")
    assert "HF_ENDPOINT says where to look" in caught.value.message


def test_repositories_are_made_private_if_asked(plain: PlainHub, content: Content, tmp_path: Path) -> None:
    for name, private in (("open", None), ("closed", True)):
        registry = HubRegistry(
            "hub:team", endpoint=plain.endpoint, cache=tmp_path / "hub-cache", private=private, token="hf_x"
        )
        registry.push(content(1), name)
        assert plain.repos[f"team/{name}"].private is bool(private)


def test_tokens_of_our_own_server(base_folder: Path, content: Content, tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    texts = {scope: tokens.create(scope, scope)[1] for scope in ("read", "write")}
    arguments = ("--anonymous", "none", "--tokens-file", str(tokens.path))
    with serving(tmp_path / "store", base_folder, *arguments) as server:

        def registry(token: str | None) -> HubRegistry:
            return HubRegistry("hub:team", endpoint=server.endpoint, cache=tmp_path / "hub-cache", token=token)

        receipt = registry(texts["write"]).push(content(1), "tales")
        assert registry(texts["read"]).resolve("tales").digest == receipt.digest
        with pytest.raises(Unavailable) as forbidden:
            registry(texts["read"]).push(content(2), "tales")
        assert forbidden.value.reason == "FORBIDDEN"
        with pytest.raises(NotFound):
            registry("abt_wrong").resolve("tales")
        assert registry(texts["write"]).history("tales")[0].by == "write"


def test_what_our_server_refuses_has_its_reason(
    server: ServerProcess, hub: Callable[[], HubRegistry], content: Content, tmp_path: Path
) -> None:
    from adapterbay.registry import Registry
    from adapterbay.registry.errors import PromotionRefused
    from adapterbay.registry.gate import Guard

    registry = hub()
    registry.push(content(1), "tales", aliases=["champion"])
    registry.push(content(2), "tales")
    store = Registry.open(server.store)
    store.guard(NAME, "champion", Guard(minimum={"accuracy": 0.9}))
    with pytest.raises(PromotionRefused) as caught:
        registry.set_alias("tales", "champion", 2)
    assert "accuracy" in caught.value.message
    assert registry.aliases("tales") == {"champion": 1}, "where it was"
    with pytest.raises(PromotionRefused):
        registry.push(content(3), "tales", aliases=["champion", "challenger"])
    assert registry.aliases("tales") == {"champion": 1}
    began = time.monotonic()
    assert registry.set_alias("tales", "challenger", 3).version == 3
    assert time.monotonic() - began < alias_moves.SETTLE_SECONDS, "nobody waits for a move that was refused"
    with pytest.raises(NotFound, match="is at 1, where it was first set"):
        registry.rollback("tales", "champion")
    store.close()


def test_large_files_without_xet_on_the_server(base_folder: Path, content: Content, tmp_path: Path) -> None:
    """With hf_xet installed, huggingface_hub sends files over the regular size by Xet, which our server lacks."""
    with serving(tmp_path / "store", base_folder, "--anonymous", "write", "--regular-bytes", "2000") as server:
        registry = HubRegistry("hub:team", endpoint=server.endpoint, cache=tmp_path / "hub-cache")
        with pytest.raises(Unavailable, match="set HF_HUB_DISABLE_XET=1 and push again") as caught:
            registry.push(content(1), "tales")
        assert caught.value.reason == "NOT_IMPLEMENTED"


def test_a_gitignore_could_lose_files(plain: PlainHub, registry: HubRegistry, content: Content) -> None:
    registry.push(content(1), "tales")
    repo = plain.repos[NAME]
    repo.add({**repo.head.tree, ".gitignore": b"*.safetensors\n"}, "by hand")
    with pytest.raises(Rejected) as caught:
        registry.push(content(2), "tales")
    assert ".gitignore" in caught.value.message
