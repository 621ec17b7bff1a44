"""Versions in and out by the real clients: the bytes and the digests stay the same."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from registry_serve.tools import Hub, files_of, new_weights
from registry_tools import Tiny

from adapterbay.registry import Registry
from adapterbay.registry.digest import digest_bytes
from adapterbay.registry.local import collection


def test_pushed_here_pulled_by_the_client(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    store = Registry.open(hub.store)
    receipt = store.push(llama.adapter, "team/local")
    second = store.push(new_weights(llama.adapter, tmp_path / "second", 2), "team/local", aliases=["champion"])
    folder = Path(
        snapshot_download("team/local", revision="v1", endpoint=hub.url, token=hub.token("alice"), cache_dir=tmp_path)
    )
    found = files_of(folder)
    own = files_of(llama.adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert found[name] == own[name]
    assert found["adapterbay/README.md"] == own["README.md"]  # what PEFT wrote; the card is ours
    assert "sha256:" + hashlib.sha256(found["adapterbay/manifest.json"]).hexdigest() == receipt.digest
    ledger = json.loads(found["adapterbay/versions.json"])
    assert ledger["versions"] == [{"version": 1, "digest": receipt.digest, "commit": None}]

    newest = snapshot_download("team/local", endpoint=hub.url, token=hub.token("alice"), local_dir=tmp_path / "main")
    again = Registry.open(tmp_path / "again")
    assert again.push(newest, "copy", base=str(llama.base)).digest == second.digest
    by_alias = hf_hub_download(
        "team/local",
        "adapter_model.safetensors",
        revision="champion",
        endpoint=hub.url,
        token=hub.token("alice"),
        cache_dir=tmp_path,
    )
    assert Path(by_alias).read_bytes() == (tmp_path / "second" / "adapter_model.safetensors").read_bytes()


def test_every_version_is_a_commit_with_its_tag(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    store = Registry.open(hub.store, by="carol")
    digests = [
        store.push(new_weights(llama.adapter, tmp_path / f"w{number}", number), "team/many").digest
        for number in range(3)
    ]
    api = hub.api()
    history = api.list_repo_commits("team/many")
    assert [commit.title for commit in history] == ["Version 3", "Version 2", "Version 1"]
    assert {tuple(commit.authors) for commit in history} == {("carol",)}
    refs = api.list_repo_refs("team/many")
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [
        (f"v{number}", commit.commit_id) for number, commit in zip((1, 2, 3), reversed(history), strict=True)
    ]
    assert [branch.name for branch in refs.branches] == ["main"]
    assert refs.branches[0].target_commit == history[0].commit_id
    for number, digest in enumerate(digests, 1):
        assert api.model_info("team/many", revision=digest).sha == refs.tags[number - 1].target_commit
        short = refs.tags[number - 1].target_commit[:10]
        assert api.model_info("team/many", revision=short).sha.startswith(short)
    ledger = json.loads(
        Path(
            hf_hub_download(
                "team/many", "adapterbay/versions.json", endpoint=hub.url, token=hub.token("alice"), cache_dir=tmp_path
            )
        ).read_bytes()
    )
    shas = [commit.commit_id for commit in reversed(history)]
    assert ledger["versions"] == [
        {"version": number, "digest": digest, "commit": sha if number < 3 else None}
        for number, (digest, sha) in enumerate(zip(digests, shas, strict=True), 1)
    ]


def test_uploaded_by_the_client_resolved_here(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    api = hub.api("bob")
    api.create_repo("team/theirs")
    commit = api.upload_folder(
        repo_id="team/theirs", folder_path=llama.adapter, commit_message="First", commit_description="Of two."
    )
    store = Registry.open(hub.store)
    resolved = store.resolve("team/theirs")
    assert resolved.version == 1
    # The same digest as the same folder has in any registry.
    elsewhere = Registry.open(tmp_path / "elsewhere").push(llama.adapter, "x", base=str(llama.base))
    assert resolved.digest == elsewhere.digest
    snapshot = store.open_snapshot(resolved.digest)
    assert {name: path.read_bytes() for name, path in snapshot.files.items()} == files_of(llama.adapter)
    info = api.model_info("team/theirs")
    assert info.sha == commit.oid
    newest = api.list_repo_commits("team/theirs")[0]
    assert (newest.title, newest.message, newest.authors) == ("First", "Of two.", ["bob"])
    assert store.history("team/theirs")[-1].by == "bob"
    assert store.verify("team/theirs").ok


def test_a_pulled_folder_is_the_same_version_again(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    source = Registry.open(tmp_path / "source")
    parent = source.push(llama.adapter, "parent", base=str(llama.base))
    child = source.push(
        new_weights(llama.adapter, tmp_path / "child", 5), "child", base=str(llama.base), parents=[parent.digest]
    )
    folder = source.pull("child", tmp_path / "pulled")
    api = hub.api()
    api.create_repo("team/portable")
    api.upload_folder(repo_id="team/portable", folder_path=folder)
    assert Registry.open(hub.store).resolve("team/portable").digest == child.digest


def test_stale_manifest_is_replaced(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    """Somebody downloads a version, trains on, and uploads the weights alone."""
    api = hub.api()
    api.create_repo("team/stale")
    api.upload_folder(repo_id="team/stale", folder_path=llama.adapter)
    changed = new_weights(llama.adapter, tmp_path / "changed", 9)
    api.upload_file(
        repo_id="team/stale",
        path_in_repo="adapter_model.safetensors",
        path_or_fileobj=changed / "adapter_model.safetensors",
    )
    store = Registry.open(hub.store)
    assert store.resolve("team/stale").version == 2
    manifest = Path(
        hf_hub_download(
            "team/stale", "adapterbay/manifest.json", endpoint=hub.url, token=hub.token("alice"), cache_dir=tmp_path
        )
    ).read_bytes()
    assert "sha256:" + hashlib.sha256(manifest).hexdigest() == store.resolve("team/stale").digest
    assert (
        store.resolve("team/stale").digest
        == Registry.open(tmp_path / "r").push(changed, "x", base=str(llama.base)).digest
    )


def test_a_readme_alone_makes_no_version_and_is_kept(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    store = Registry.open(hub.store)
    bare = new_weights(llama.adapter, tmp_path / "bare", 1)
    (bare / "README.md").unlink()
    store.push(bare, "team/card")
    api = hub.api()

    def readme() -> str:
        return Path(
            hf_hub_download("team/card", "README.md", endpoint=hub.url, token=hub.token("alice"), cache_dir=tmp_path)
        ).read_text()

    generated = readme()
    card = ModelCard(generated)
    assert card.data.library_name == "peft"
    api.upload_file(repo_id="team/card", path_in_repo="README.md", path_or_fileobj=b"# Ours\n")
    assert store.resolve("team/card").version == 1
    assert readme() == "# Ours\n"
    # New weights later: the person's text stays, and is the version's own.
    api.upload_file(
        repo_id="team/card",
        path_in_repo="adapter_model.safetensors",
        path_or_fileobj=new_weights(llama.adapter, tmp_path / "more", 3) / "adapter_model.safetensors",
    )
    assert readme() == "# Ours\n"
    assert store.snapshot("team/card@2").read("README.md") == b"# Ours\n"


def test_a_generated_card_follows_the_version(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    store = Registry.open(hub.store)
    bare = new_weights(llama.adapter, tmp_path / "bare", 1)
    (bare / "README.md").unlink()
    store.push(bare, "team/fresh")
    api = hub.api()
    first = api.model_info("team/fresh")
    api.upload_file(
        repo_id="team/fresh",
        path_in_repo="adapter_model.safetensors",
        path_or_fileobj=new_weights(llama.adapter, tmp_path / "more", 3) / "adapter_model.safetensors",
    )
    text = Path(
        hf_hub_download("team/fresh", "README.md", endpoint=hub.url, token=hub.token("alice"), cache_dir=tmp_path)
    ).read_text()
    assert "v2" in text
    assert "v1" not in text
    assert api.model_info("team/fresh", revision="v1").sha == first.sha
    assert "README.md" not in store.snapshot("team/fresh@2").files


def test_what_is_uploaded_in_two_parts_is_a_version_when_it_is_whole(hub: Hub, llama: Tiny) -> None:
    api = hub.api()
    api.create_repo("team/parts")
    api.upload_file(
        repo_id="team/parts",
        path_in_repo="adapter_config.json",
        path_or_fileobj=llama.adapter / "adapter_config.json",
    )
    assert api.list_repo_refs("team/parts").tags == []
    assert api.list_repo_files("team/parts") == ["adapter_config.json"]
    api.upload_file(
        repo_id="team/parts",
        path_in_repo="adapter_model.safetensors",
        path_or_fileobj=llama.adapter / "adapter_model.safetensors",
    )
    assert [tag.name for tag in api.list_repo_refs("team/parts").tags] == ["v1"]
    assert Registry.open(hub.store).resolve("team/parts").version == 1


def test_deleted_versions(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    store = Registry.open(hub.store, by="carol")
    for number in range(3):
        store.push(new_weights(llama.adapter, tmp_path / f"w{number}", number), "team/gone")
    api = hub.api()
    before = {tag.name: tag.target_commit for tag in api.list_repo_refs("team/gone").tags}
    store.delete("team/gone", 1, "wrong data")
    store.delete("team/gone", 3)

    def get(revision: str, name: str = "adapter_model.safetensors") -> bytes:
        place = tmp_path / "cache"
        path = hf_hub_download(
            "team/gone", name, revision=revision, endpoint=hub.url, token=hub.token("alice"), cache_dir=place
        )
        return Path(path).read_bytes()

    with pytest.raises(EntryNotFoundError, match=r"version 1 of team/gone was deleted on .* by carol: wrong data"):
        get("v1")
    with pytest.raises(EntryNotFoundError, match="version 3 of team/gone was deleted"):
        get(before["v3"])
    # main is a version that is there.
    assert get("main") == get("v2") == (tmp_path / "w1" / "adapter_model.safetensors").read_bytes()
    history = api.list_repo_commits("team/gone")
    assert [commit.title for commit in history] == ["Back to version 2", "Version 3", "Version 2", "Version 1"]
    assert [tag.name for tag in api.list_repo_refs("team/gone").tags] == ["v2"]
    store.gc(grace_seconds=0)
    assert get("main", "README.md").startswith(b"---")
    store.delete("team/gone", 2)
    assert api.list_repo_files("team/gone") == []
    assert "team/gone" not in [info.id for info in api.list_models()]
    assert store.push(llama.adapter, "team/gone").version == 4
    assert get("v4", "adapter_config.json") == (llama.adapter / "adapter_config.json").read_bytes()


def test_a_tag_is_the_newest_commit_of_its_version(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    """Going back to a version makes a second commit of it. SHAs have no order: six names make chance visible."""
    store, api = Registry.open(hub.store), hub.api()
    later = new_weights(llama.adapter, tmp_path / "later", 9)
    for name in (f"team/again-{number}" for number in range(6)):
        store.push(llama.adapter, name, aliases=["champion"])
        store.push(later, name)
        api.list_repo_refs(name)
        store.delete(name, 2)
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(name).tags}
        assert tags["v1"] == tags["champion"] == api.model_info(name, revision="v1").sha == api.model_info(name).sha


def test_gc_keeps_a_commits_files_for_the_grace_period(hub: Hub, llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    store, api = Registry.open(hub.store), hub.api()
    api.create_repo("team/leaving")
    api.upload_folder(repo_id="team/leaving", folder_path=llama.adapter)
    api.upload_file(repo_id="team/leaving", path_in_repo="notes.md", path_or_fileobj=b"notes of one who is leaving")
    notes = store.blobs.path(digest_bytes(b"notes of one who is leaving"))
    written = time.time()
    store.delete("team/leaving", 1)
    with monkeypatch.context() as patch:
        patch.setattr(collection, "time", SimpleNamespace(time=lambda: written))
        store.gc(grace_seconds=0)
    assert notes.exists()
    store.gc(grace_seconds=0)
    assert not notes.exists()


def test_a_signature_that_comes_later(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    """Signed here after it was seen there, or by a client: in both cases it is a file of the version."""
    pytest.importorskip("model_signing")
    from signing_tools import make_keys

    from adapterbay.registry.signing import sign, verify_signature

    keys = make_keys(tmp_path, "one")
    store = Registry.open(hub.store)
    adapter = new_weights(llama.adapter, tmp_path / "signed", 77)  # a signature goes with the content, in any name
    store.push(adapter, "team/signed")
    api = hub.api()
    unsigned = api.model_info("team/signed").sha
    snapshot = store.snapshot("team/signed")
    bundle = sign(snapshot, keys.private)
    store.attach_signature("team/signed", 1, bundle, key=keys.fingerprint)
    assert [commit.title for commit in api.list_repo_commits("team/signed")] == ["Signature of version 1", "Version 1"]
    assert "adapterbay/model.sig" in api.list_repo_files("team/signed", revision="v1")
    assert "adapterbay/model.sig" not in api.list_repo_files("team/signed", revision=unsigned)

    api.create_repo("team/signed-there")
    api.upload_folder(repo_id="team/signed-there", folder_path=adapter)
    api.upload_file(repo_id="team/signed-there", path_in_repo="adapterbay/model.sig", path_or_fileobj=bundle)
    assert [record.version for record in store.versions("team/signed-there")] == [1]
    resolved = store.resolve("team/signed-there")
    assert resolved.digest == store.resolve("team/signed").digest
    assert verify_signature(snapshot, store.signature(resolved.digest), [keys.public]) == keys.fingerprint
    with pytest.raises(HfHubHTTPError, match="signature"):
        api.upload_file(repo_id="team/signed-there", path_in_repo="adapterbay/model.sig", path_or_fileobj=b"{}")


@pytest.mark.slow
def test_peft_pushes_and_loads(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    """push_to_hub twice, then PeftModel.from_pretrained of both versions: the same tensors."""
    answer = hub.python(
        f"""
        import json, torch
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import LlamaForCausalLM
        base = {str(llama.base)!r}
        sums = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
            model = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
            model.push_to_hub("team/peft", commit_message=f"Seed {{seed}}")
            sums.append(sum(p.double().sum().item() for n, p in model.named_parameters() if "lora_" in n))
        loaded = []
        for revision in ("v1", "v2", "main"):
            model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), "team/peft", revision=revision)
            loaded.append(sum(p.double().sum().item() for n, p in model.named_parameters() if "lora_" in n))
        print(json.dumps({{"pushed": sums, "loaded": loaded}}))
        """,
        tmp_path / "hf",
    )
    first, second = answer["pushed"]
    assert first != second
    assert answer["loaded"] == [first, second, second]
    store = Registry.open(hub.store)
    assert [record.version for record in store.versions("team/peft")] == [1, 2]
    for version in (1, 2):
        folder = snapshot_download(
            "team/peft",
            revision=f"v{version}",
            endpoint=hub.url,
            token=hub.token("alice"),
            cache_dir=tmp_path / "cache",
        )
        snapshot = store.snapshot(f"team/peft@{version}")
        found = files_of(Path(folder))
        for name, path in snapshot.files.items():
            assert found[name] == path.read_bytes(), name
    pulled = store.pull("team/peft@1", tmp_path / "pulled")
    assert (
        Registry.open(tmp_path / "r").push(pulled, "x", base=str(llama.base)).digest
        == store.resolve("team/peft@1").digest
    )


def test_hf_upload_and_download(hub: Hub, llama: Tiny, tmp_path: Path, start_hub: Callable[..., Hub]) -> None:
    uploaded = hub.hf(tmp_path / "hf", "upload", "team/cli", llama.adapter)
    assert uploaded.returncode == 0, uploaded.stderr
    assert f"{hub.url}/team/cli/" in uploaded.stdout
    downloaded = hub.hf(tmp_path / "hf", "download", "team/cli", "--local-dir", tmp_path / "down", "--revision", "v1")
    assert downloaded.returncode == 0, downloaded.stderr
    found, own = files_of(tmp_path / "down"), files_of(llama.adapter)
    assert {name: found[name] for name in own} == own
    who = hub.hf(tmp_path / "hf", "auth", "whoami")
    assert who.returncode == 0, who.stderr
    assert "alice" in who.stdout
    one = hub.hf(tmp_path / "hf", "upload", "team/cli", llama.adapter / "adapter_config.json", "adapter_config.json")
    assert one.returncode == 0, one.stderr
    assert Registry.open(hub.store).resolve("team/cli").version == 1  # nothing changed
