"""What `--registry` means: folders, the Hub, and names of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapterbay.registry import Registry
from adapterbay.registry.cli import app
from adapterbay.registry.errors import InvalidArgument, InvalidReference, RegistryNotFound
from adapterbay.registry.hub.backend import HubRegistry
from adapterbay.registry.location import config_path, folder_of, named_registries, open_for, open_registry


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERBAY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACME_TOKEN", "hf_secret")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def write(text: str) -> None:
    config_path().write_text(text, encoding="utf-8")


NAMED = """
[prod]
place = "hub:acme"
endpoint = "https://hub.internal/"
token_env = "ACME_TOKEN"
private = true

[one]
place = "hub:acme/sentiment"

[store]
place = "~/store"
"""


def test_a_folder(tmp_path: Path) -> None:
    made = open_registry("here/store", create=True)
    assert isinstance(made, Registry)
    assert made.root == tmp_path / "here" / "store"
    assert open_registry(tmp_path / "here" / "store", create=False).adapters() == []
    with pytest.raises(RegistryNotFound):
        open_registry("./nothing", create=False)
    with pytest.raises(RegistryNotFound):
        open_registry(Path("prod"), create=False)


def test_the_default(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_registry(None, create=True)
    assert isinstance(made, Registry)
    assert made.root == home / "registry"
    monkeypatch.setenv("ADAPTERBAY_REGISTRY", "hub:acme")
    assert isinstance(open_registry(None, create=False), HubRegistry)
    write(NAMED)
    monkeypatch.setenv("ADAPTERBAY_REGISTRY", "prod")
    named = open_registry(None, create=False)
    assert isinstance(named, HubRegistry)
    assert named.client.endpoint == "https://hub.internal"
    monkeypatch.setenv("ADAPTERBAY_REGISTRY", str(tmp_path / "other"))
    made = open_registry(None, create=True)
    assert isinstance(made, Registry)
    assert made.root == tmp_path / "other"


def test_the_hub() -> None:
    found = open_registry("hub:acme", create=False)
    assert isinstance(found, HubRegistry)
    assert (str(found.namespace), found.client.endpoint) == ("hub:acme", "https://huggingface.co")
    assert found.namespace.name("sentiment") == found.namespace.name("acme/sentiment") == "acme/sentiment"
    one = open_registry("hub:acme/sentiment", create=False)
    assert isinstance(one, HubRegistry)
    assert one.namespace.name("sentiment") == "acme/sentiment"
    for outside in ("other/sentiment", "other", "a/b/c"):
        with pytest.raises(InvalidReference):
            one.namespace.name(outside)
    for place in ("hub:", "hub:a b", "hub:acme/x@v1", "hub:../x", "hub:a/b/c"):
        with pytest.raises(InvalidReference):
            open_registry(place, create=False)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_registries() == {}
    write(NAMED)
    assert list(named_registries()) == ["one", "prod", "store"]
    prod = open_registry("prod", create=False)
    assert isinstance(prod, HubRegistry)
    assert (str(prod.namespace), prod.client.endpoint) == ("hub:acme", "https://hub.internal")
    assert prod.client.token == "hf_secret"
    assert "hf_secret" not in repr(prod)
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_registry("store", create=True)
    assert isinstance(store, Registry)
    assert store.root == tmp_path / "store"
    with pytest.raises(RegistryNotFound) as caught:
        open_registry("prd", create=False)
    assert caught.value.near == ("prod",)
    with pytest.raises(RegistryNotFound, match=r"\./prd"):
        open_registry("prd", create=True)
    assert not (tmp_path / "prd").exists()
    monkeypatch.delenv("ACME_TOKEN")
    with pytest.raises(InvalidArgument, match="ACME_TOKEN"):
        open_registry("prod", create=False)


def test_what_works_on_folders_alone_knows_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`registry serve`, `token` and `doctor`: a name is never taken for a folder to make."""
    write(NAMED)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert folder_of("store", create=True) == tmp_path / "user" / "store"
    assert folder_of("./store", create=True) == tmp_path / "store"
    assert folder_of("elsewhere", create=True) == tmp_path / "elsewhere"
    assert folder_of(None, create=False) == tmp_path / "home" / "registry"
    for place in ("prod", "one", "hub:acme"):
        with pytest.raises(InvalidArgument, match=f"{place} is on a Hub: this works on a local registry only"):
            folder_of(place, create=True)
    with pytest.raises(RegistryNotFound, match=r"\./stor\b"):
        folder_of("stor", create=True)
    monkeypatch.setenv("ADAPTERBAY_REGISTRY", "store")
    assert folder_of(None, create=False) == tmp_path / "user" / "store"

    runner = CliRunner()
    made = runner.invoke(app, ["token", "create", "ann", "--scope", "write", "--registry", "store"])
    assert made.exit_code == 0, made.output
    assert list(tmp_path.glob("**/tokens.json")) == [tmp_path / "user" / "store" / "tokens.json"]
    assert runner.invoke(app, ["doctor", "--registry", "store"]).exit_code == 0
    assert runner.invoke(app, ["serve", "--registry", "prod"]).exit_code == 2


def test_a_name_that_is_a_folder_too(tmp_path: Path) -> None:
    write(NAMED)
    (tmp_path / "prod").mkdir()
    with pytest.raises(InvalidArgument) as caught:
        open_registry("prod", create=True)
    assert "./prod" in caught.value.message
    assert isinstance(open_registry("./prod", create=True), Registry)


def test_all_mistakes_at_once() -> None:
    write(
        """
loose = 1
[A]
place = "hub:acme"
[b]
plce = "hub:acme"
[c]
place = "relative/folder"
[d]
place = "/folder"
endpoint = "https://x"
[e]
place = "hub:acme"
endpoint = "hub.internal"
[f]
place = "hub:acme"
token_env = "hf_abc def"
[g]
place = "hub:a b"
[h]
place = 3
"""
    )
    with pytest.raises(InvalidArgument) as caught:
        open_registry("b", create=False)
    for part in (
        "loose:",
        "[A]:",
        "[b] place:",
        "[b] plce:",
        "[c]",
        "relative/folder",
        "[d] endpoint belong",
        "[e] endpoint",
        "[f] token_env",
        "[g]",
        "[h] place:",
    ):
        assert part in caught.value.message, part
    write("[x\n")
    with pytest.raises(InvalidArgument, match="TOML"):
        named_registries()


def test_references_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(NAMED)
    backend, spelled = open_for("hub:Acme/Sentiment@v3", None)
    assert isinstance(backend, HubRegistry)
    assert (str(backend.namespace), spelled) == ("hub:Acme/Sentiment", "Acme/Sentiment@v3")
    assert backend.client.endpoint == "https://huggingface.co"
    for place in ("prod", None):
        if place is None:
            monkeypatch.setenv("ADAPTERBAY_REGISTRY", "prod")
        backend, spelled = open_for("hub:other/thing", place)
        assert isinstance(backend, HubRegistry)
        assert (backend.client.endpoint, backend.client.token) == ("https://hub.internal", "hf_secret")
        assert (str(backend.namespace), spelled) == ("hub:other/thing", "other/thing")
    Registry.open(tmp_path / "store").close()
    local, spelled = open_for("team/x@3", str(tmp_path / "store"))
    assert isinstance(local, Registry)
    assert spelled == "team/x@3"
    with pytest.raises(InvalidReference):
        open_for("hub:org", None)
