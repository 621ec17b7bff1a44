"""Repositories, tags and listings as the real client sees them."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from registry_serve.tools import Hub, new_weights
from registry_tools import Tiny

from adapterbay.registry import Registry
from adapterbay.registry.gate import Guard


def test_create_repo(hub: Hub) -> None:
    api = hub.api()
    url = api.create_repo("team/new")
    assert url.repo_id == "team/new"
    assert url == f"{hub.url}/team/new"
    with pytest.raises(HfHubHTTPError, match="team/new is there already") as conflict:
        api.create_repo("team/new")
    assert conflict.value.response.status_code == 409
    assert api.create_repo("team/new", exist_ok=True).repo_id == "team/new"
    assert api.list_repo_files("team/new") == []
    assert [commit.title for commit in api.list_repo_commits("team/new")] == ["initial commit"]
    # A name of one part is the caller's own, as on the Hub.
    assert api.create_repo("mine").repo_id == "alice/mine"


def test_what_a_name_may_be(hub: Hub, llama: Tiny) -> None:
    api = hub.api()
    with pytest.raises(BadRequestError, match="must begin with a-z or 0-9 and hold only"):
        api.create_repo("Team/Upper")
    with pytest.raises(BadRequestError, match="'refs' is a word of the Hub's addresses"):
        api.create_repo("team/refs")
    for kind in ("api", "models"):
        with pytest.raises(BadRequestError, match=f"'{kind}' is a word of the Hub's addresses"):
            api.create_repo(f"{kind}/sentiment")
    with pytest.raises(BadRequestError, match="device name on Windows"):
        api.create_repo("team/con")
    assert not api.repo_exists("Team/Upper")
    # Names of one part come from local pushes, and are read as any other.
    Registry.open(hub.store).push(llama.adapter, "single")
    assert api.model_info("single").id == "single"
    assert "adapter_config.json" in api.list_repo_files("single", revision="v1")
    with pytest.raises(BadRequestError, match="can be read, but not committed to"):
        api.create_commit("single", [CommitOperationAdd("NOTES.md", b"x")], commit_message="Notes")


def test_what_exists(hub: Hub, llama: Tiny) -> None:
    Registry.open(hub.store).push(llama.adapter, "team/exists")
    api = hub.api()
    assert api.repo_exists("team/exists")
    assert not api.repo_exists("team/exist")
    assert api.revision_exists("team/exists", "v1")
    assert not api.revision_exists("team/exists", "v2")
    assert not api.revision_exists("team/exists", "0" * 40)
    assert api.file_exists("team/exists", "adapter_config.json")
    assert not api.file_exists("team/exists", "config.json")
    assert not api.file_exists("team/exists", "adapter_config.json", revision="v9")
    with pytest.raises(RepositoryNotFoundError, match="There is no adapter team/exist in this registry"):
        api.model_info("team/exist")
    with pytest.raises(RevisionNotFoundError, match="no revision 'nothing'"):
        api.model_info("team/exists", revision="nothing")


def test_tags_are_versions_and_aliases(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    store = Registry.open(hub.store)
    for number in (1, 2):
        store.push(new_weights(llama.adapter, tmp_path / f"w{number}", number), "team/tags")
    api = hub.api("dora")
    api.create_tag("team/tags", tag="champion", revision="v1")
    assert store.aliases("team/tags") == {"champion": 1}
    assert store.history("team/tags")[-1].by == "dora"
    with pytest.raises(HfHubHTTPError, match="at v1: delete it first") as there:
        api.create_tag("team/tags", tag="champion", revision="v2")
    assert there.value.response.status_code == 409
    api.create_tag("team/tags", tag="champion", revision="v1", exist_ok=True)
    api.delete_tag("team/tags", tag="champion")
    api.create_tag("team/tags", tag="champion", revision=api.list_repo_refs("team/tags").tags[1].target_commit)
    assert store.aliases("team/tags") == {"champion": 2}
    names = {tag.name: tag.target_commit for tag in api.list_repo_refs("team/tags").tags}
    assert set(names) == {"v1", "v2", "champion"}
    assert names["champion"] == names["v2"] == api.model_info("team/tags", revision="champion").sha
    # vN is where it belongs, and nowhere else.
    api.create_tag("team/tags", tag="v2", revision="v2", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("team/tags", tag="v2", revision="v2")
    with pytest.raises(BadRequestError, match="whose version is v1"):
        api.create_tag("team/tags", tag="v2", revision="v1", exist_ok=True)
    with pytest.raises(BadRequestError, match="is a version and stays"):
        api.delete_tag("team/tags", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("team/tags", tag="challenger")
    with pytest.raises(BadRequestError, match="is not an alias"):
        api.create_tag("team/tags", tag="Über", revision="v1")
    with pytest.raises(BadRequestError, match="always means the newest commit"):
        api.create_tag("team/tags", tag="main", revision="v1")
    api.upload_file(repo_id="team/tags", path_in_repo="NOTES.md", path_or_fileobj=b"x")
    with pytest.raises(BadRequestError, match="makes no version"):
        api.create_tag("team/tags", tag="notes")


def test_a_guard_holds_over_http(hub: Hub, llama: Tiny) -> None:
    store = Registry.open(hub.store)
    store.push(llama.adapter, "team/guarded")
    store.guard("team/guarded", "champion", Guard(minimum={"accuracy": 0.9}))
    with pytest.raises(HfHubHTTPError, match="is guarded and may not point at version 1") as refused:
        hub.api().create_tag("team/guarded", tag="champion", revision="v1", exist_ok=True)
    assert refused.value.response.status_code == 403
    assert store.aliases("team/guarded") == {}


def test_branches(hub: Hub) -> None:
    api = hub.api()
    api.create_repo("team/branches")
    api.create_branch("team/branches", branch="main", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="like any but main, is not implemented") as refused:
        api.create_branch("team/branches", branch="dev", exist_ok=True)
    assert refused.value.response.status_code == 501
    with pytest.raises(BadRequestError, match="main cannot be deleted"):
        api.delete_branch("team/branches", branch="main")


def test_listing(start_hub: object, llama: Tiny, tmp_path: Path) -> None:
    hub: Hub = start_hub()  # type: ignore[operator]
    store = Registry.open(hub.store)
    for name in ("team/a", "team/b", "other/a", "solo"):
        store.push(llama.adapter, name)
    api = hub.api()
    api.create_repo("team/empty")

    def names(**filters: object) -> list[str]:
        return [info.id for info in api.list_models(**filters)]  # type: ignore[arg-type]

    assert names() == ["other/a", "solo", "team/a", "team/b", "team/empty"]
    assert names(author="team") == ["team/a", "team/b", "team/empty"]
    assert names(search="/A") == ["other/a", "team/a"]
    assert names(limit=2) == ["other/a", "solo"]
    assert names(limit=0) == []
    assert names(pipeline_tag="text-generation") == ["other/a", "solo", "team/a", "team/b"]
    assert names(filter="peft", author="other") == ["other/a"]
    assert names(filter=["peft", "nothing"]) == []
    # Names that the clients cannot ask for are the store's own affair: whoever goes by the list is not led astray.
    for name in ("team/tree", "team/x.git", "datasets/a", "a--b", "a/b/c"):
        store.push(llama.adapter, name)
    assert names() == ["other/a", "solo", "team/a", "team/b", "team/empty"]
    only_team = hub.api("eve", "read", only="team/")
    assert [info.id for info in only_team.list_models()] == ["team/a", "team/b", "team/empty"]
    with pytest.raises(HfHubHTTPError, match="the filter num_parameters is not implemented"):
        list(api.list_models(num_parameters="min:1B"))
    with pytest.raises(HfHubHTTPError, match="the filter sort is not implemented"):
        list(api.list_models(sort="last_modified", limit=1))
    info = next(iter(api.list_models(author="other", full=True)))
    assert info.tags is not None
    assert info.card_data is not None
    assert info.sha == api.model_info("other/a").sha


def test_pages(hub: Hub, llama: Tiny) -> None:
    """Everything is there once, over several pages."""
    api = hub.api()
    api.create_repo("team/pages")
    paths = [f"data/{number:04}.txt" for number in range(1100)]
    api.create_commit(
        "team/pages", [CommitOperationAdd(path, path.encode()) for path in paths], commit_message="Many files"
    )
    assert api.list_repo_files("team/pages") == paths
    expanded = list(api.list_repo_tree("team/pages", "data", expand=True))
    assert [entry.path for entry in expanded] == paths
    assert {entry.last_commit.title for entry in expanded if entry.last_commit} == {"Many files"}
    for number in range(120):
        api.create_commit(
            "team/pages", [CommitOperationAdd("n.txt", str(number).encode())], commit_message=f"n{number}"
        )
    titles = [commit.title for commit in api.list_repo_commits("team/pages")]
    assert titles == [f"n{number}" for number in reversed(range(120))] + ["Many files", "initial commit"]
    formatted = api.list_repo_commits("team/pages", formatted=True)
    assert formatted[0].formatted_title == "n119"
    assert [entry.path for entry in api.list_repo_tree("team/pages")] == ["data", "n.txt"]


def test_the_check_of_downloads(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    Registry.open(hub.store).push(llama.adapter, "team/checked")
    place = tmp_path / "down"
    done = hub.hf(tmp_path / "hf", "download", "team/checked", "--local-dir", place)
    assert done.returncode == 0, done.stderr
    checked = hub.api().verify_repo_checksums("team/checked", local_dir=place)
    assert checked.mismatches == []
    assert checked.missing_paths == []
    (place / "adapter_config.json").write_bytes(b"{}")
    assert [each["path"] for each in hub.api().verify_repo_checksums("team/checked", local_dir=place).mismatches] == [
        "adapter_config.json"
    ]


def test_cards_with_bad_front_matter(hub: Hub) -> None:
    api = hub.api()
    api.create_repo("team/yaml")
    with pytest.raises(ValueError, match="no mapping of keys to values"):
        api.upload_file(repo_id="team/yaml", path_in_repo="README.md", path_or_fileobj=b"---\n- a\n---\n")
    laughs = "\n".join(
        ["a: &a [x, x]", *(f"{c}: &{c} [*{p}, *{p}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True))]
    )
    with pytest.raises(ValueError, match="YAML aliases"):
        api.upload_file(repo_id="team/yaml", path_in_repo="README.md", path_or_fileobj=f"---\n{laughs}\n---\n".encode())
    api.upload_file(
        repo_id="team/yaml",
        path_in_repo="README.md",
        path_or_fileobj=b"---\nlicense: mit\nbase_model: a/b\nday: 2026-01-01\n---\n# x\n",
    )
    info = api.model_info("team/yaml")
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    assert info.tags is not None
    assert {"license:mit", "base_model:a/b", "base_model:adapter:a/b"} <= set(info.tags)


def test_cards_by_the_clients_own_verbs(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    """`ModelCard.push_to_hub` and `metadata_update` have a card checked without sending their token."""
    Registry.open(hub.store).push(llama.adapter, "team/cards")
    code = """
        import json
        from huggingface_hub import ModelCard, metadata_update
        metadata_update("team/cards", {"license": "mit"})
        card = ModelCard.load("team/cards")
        card.text += "Made on a Sunday."
        card.push_to_hub("team/cards")
        print(json.dumps([card.data.license, ModelCard.load("team/cards").text[-17:]]))
        """
    assert hub.python(code, tmp_path / "hf") == ["mit", "Made on a Sunday."]
    assert [tag.name for tag in hub.api().list_repo_refs("team/cards").tags] == ["v1"]
