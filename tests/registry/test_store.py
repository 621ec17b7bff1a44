"""Push, resolve, aliases, events, pull, verify, altered blobs, threads, and the index built again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from registry_tools import Draft, Tiny, tree

from adapterbay.registry import ANY, Manifest, Registry, Resolved, locate
from adapterbay.registry.digest import digest_bytes
from adapterbay.registry.errors import (
    BaseMismatch,
    InvalidArgument,
    InvalidReference,
    NotFound,
    Rejected,
    StaleAlias,
)

DraftOf = Callable[[Tiny], Draft]


@pytest.fixture
def another(llama: Tiny, draft: DraftOf) -> Callable[[], Path]:
    """Adapters that differ in one value."""
    count = 0

    def make() -> Path:
        nonlocal count
        count += 1
        made = draft(llama)
        made.edit_tensors(lambda tensors: next(iter(tensors.values())).flat.__setitem__(0, float(count)))
        return made.path

    return make


def test_a_push_and_what_it_found(llama: Tiny, registry: Registry) -> None:
    receipt = registry.push(llama.adapter, "team/x", aliases=["champion", "best", "champion"])
    assert (receipt.name, receipt.version, receipt.same_as) == ("team/x", 1, None)
    assert receipt.aliases == ("champion", "best")
    manifest = receipt.manifest
    base = locate(str(llama.base))
    assert manifest.base_fingerprint == base.fingerprint
    assert manifest.base_reference == f"folder:{llama.base}"
    assert manifest.tokenizer_digest == base.tokenizer_digest
    assert manifest.chat_template_digest == base.chat_template_digest
    assert (manifest.task, manifest.rank, manifest.peft_type, manifest.labels) == ("causal-lm", 4, "LORA", ())
    assert manifest.peft_config == json.loads((llama.adapter / "adapter_config.json").read_text())
    assert [entry.path for entry in manifest.files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert receipt.new_bytes == manifest.size_bytes + len(manifest.to_bytes())
    assert receipt.digest == manifest.digest == digest_bytes(manifest.to_bytes())
    assert registry.manifest(receipt.digest) == manifest
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_the_manifest_knows_neither_name_nor_time(llama: Tiny, tmp_path: Path) -> None:
    first = Registry.open(tmp_path / "a").push(llama.adapter, "one")
    time.sleep(0.01)
    second = Registry.open(tmp_path / "b").push(llama.adapter, "two/three", aliases=["x"])
    assert first.digest == second.digest


def test_same_content_is_a_new_version_and_no_new_bytes(
    llama: Tiny, registry: Registry, another: Callable[[], Path]
) -> None:
    registry.push(llama.adapter, "x")
    other = registry.push(another(), "x")
    assert other.same_as is None
    blobs = {path for path in tree(registry.root) if path.startswith("blobs")}
    again = registry.push(llama.adapter, "x")
    assert (again.version, again.same_as, again.new_bytes) == (3, 1, 0)
    elsewhere = registry.push(llama.adapter, "y")
    assert (elsewhere.version, elsewhere.same_as, elsewhere.new_bytes) == (1, None, 0)
    assert {path for path in tree(registry.root) if path.startswith("blobs")} == blobs


def test_blobs_are_read_only_and_named_by_content(llama: Tiny, registry: Registry) -> None:
    registry.push(llama.adapter, "x")
    blobs = [path for path in (registry.root / "blobs").rglob("*") if path.is_file()]
    assert len(blobs) == 4
    for blob in blobs:
        assert digest_bytes(blob.read_bytes()) == f"sha256:{blob.name}"
        assert blob.stat().st_mode & 0o222 == 0
        assert blob.parent.name == blob.name[:2]


def test_resolve(llama: Tiny, registry: Registry, another: Callable[[], Path]) -> None:
    first = registry.push(llama.adapter, "team/x", aliases=["champion"])
    second = registry.push(another(), "team/x")
    assert registry.resolve("team/x") == Resolved("team/x", "team/x", 2, second.digest)
    assert registry.resolve("team/x@latest").version == 2
    assert registry.resolve("team/x@1") == Resolved("team/x@1", "team/x", 1, first.digest)
    assert registry.resolve("team/x@champion").digest == first.digest
    assert registry.resolve(f"team/x@{second.digest}").version == 2


@pytest.mark.parametrize(
    ("reference", "near"),
    [
        ("team/sentimant", "team/sentiment"),
        ("sentiment", "team/sentiment"),
        ("team/sentiment@7", "team/sentiment@1"),
        ("team/sentiment@champoin", "team/sentiment@champion"),
    ],
)
def test_not_found_names_what_is_near(llama: Tiny, registry: Registry, reference: str, near: str) -> None:
    registry.push(llama.adapter, "team/sentiment", aliases=["champion"])
    registry.push(llama.adapter, "other/thing")
    with pytest.raises(NotFound) as caught:
        registry.resolve(reference)
    assert near in caught.value.near
    assert near in caught.value.message


def test_what_else_is_not_found(llama: Tiny, registry: Registry) -> None:
    registry.push(llama.adapter, "x")
    absent = "sha256:" + "0" * 64
    for ask in (
        lambda: registry.resolve(f"x@{absent}"),
        lambda: registry.manifest(absent),
        lambda: registry.open_snapshot(absent),
        lambda: registry.version("x", 2),
        lambda: registry.version("y", 1),
        lambda: registry.versions("y"),
        lambda: registry.aliases("y"),
        lambda: registry.verify("y"),
        lambda: registry.set_alias("y", "a", 1),
        lambda: registry.set_alias("x", "a", 2),
        lambda: registry.remove_alias("x", "a"),
        lambda: registry.remove_alias("y", "a"),
    ):
        with pytest.raises(NotFound):
            ask()
    with pytest.raises(InvalidReference, match="push it to the registry first"):
        registry.resolve("hub:org/repo@main")


def test_resolve_sees_other_processes(llama: Tiny, registry: Registry) -> None:
    registry.push(llama.adapter, "x")
    assert registry.resolve("x").version == 1
    Registry.open(registry.root).push(llama.adapter, "x")
    assert registry.resolve("x").version == 2


def test_alias_compare_and_swap(llama: Tiny, registry: Registry) -> None:
    for _ in range(3):
        registry.push(llama.adapter, "x")
    move = registry.set_alias("x", "champion", 1, expected=None)
    assert (move.previous, move.version) == (None, 1)
    with pytest.raises(StaleAlias, match="points at version 1, but it was expected not to be set"):
        registry.set_alias("x", "champion", 2, expected=None)
    with pytest.raises(StaleAlias) as caught:
        registry.set_alias("x", "champion", 2, expected=3)
    assert caught.value.metadata["current_version"] == "1"
    assert caught.value.metadata["expected_version"] == "3"
    assert registry.aliases("x") == {"champion": 1}
    assert registry.set_alias("x", "champion", 2, expected=1).previous == 1
    assert registry.set_alias("x", "champion", 3).previous == 2
    with pytest.raises(StaleAlias):
        registry.remove_alias("x", "champion", expected=1)
    assert registry.remove_alias("x", "champion", expected=3).version is None
    assert registry.aliases("x") == {}
    with pytest.raises(StaleAlias, match="is not set, but version 3 was expected"):
        registry.set_alias("x", "champion", 1, expected=3)
    for bad in ("latest", "3", "Champion", ""):
        with pytest.raises(InvalidReference):
            registry.set_alias("x", bad, 1, expected=ANY)


def test_only_one_of_many_threads_wins_a_swap(llama: Tiny, registry: Registry) -> None:
    for _ in range(9):
        registry.push(llama.adapter, "x")
    registry.set_alias("x", "champion", 9)
    outcomes: list[str] = []

    def swap(version: int) -> None:
        try:
            registry.set_alias("x", "champion", version, expected=9)
            outcomes.append("won")
        except StaleAlias:
            outcomes.append("lost")

    threads = [threading.Thread(target=swap, args=(version,)) for version in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 7 + ["won"]


def test_threads_push_and_read_one_object(llama: Tiny, registry: Registry) -> None:
    def work(_: int) -> int:
        version = registry.push(llama.adapter, "x").version
        assert registry.resolve("x").version >= version
        assert len(registry.adapters()) == 1
        return version

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(work, range(8))) == list(range(1, 9))
    assert registry.verify().ok


def test_events(llama: Tiny, registry: Registry) -> None:
    assert registry.last_event() == 0
    receipt = registry.push(llama.adapter, "x", aliases=["champion"])
    registry.push(llama.adapter, "x")
    registry.set_alias("x", "champion", 2)
    registry.set_alias("x", "champion", 2)  # nothing moves, nothing is told
    registry.remove_alias("x", "champion")
    told = [(e.sequence, e.kind, e.version, e.alias, e.previous_version) for e in registry.events()]
    assert told == [
        (1, "pushed", 1, None, None),
        (2, "alias_set", 1, "champion", None),
        (3, "pushed", 2, None, None),
        (4, "alias_set", 2, "champion", 1),
        (5, "alias_removed", 2, "champion", 2),
    ]
    assert registry.last_event() == 5
    assert {event.digest for event in registry.events()} == {receipt.digest}
    assert [event.sequence for event in registry.events(after=3, limit=1)] == [4]
    assert all(event.at.utcoffset() is not None for event in registry.events())


def test_listing(llama: Tiny, bert: Tiny, registry: Registry) -> None:
    assert registry.count() == 0
    registry.push(llama.adapter, "team/gen", aliases=["champion"])
    registry.push(llama.adapter, "team/gen", aliases=["challenger"])
    registry.push(bert.adapter, "team/cls", labels=["no", "yes"])
    registry.push(llama.adapter, "teamless")
    assert [adapter.name for adapter in registry.adapters()] == ["team/cls", "team/gen", "teamless"]
    assert registry.count() == 3
    cls, gen = registry.adapters("team/")
    assert (cls.task, cls.labels, cls.rank, cls.versions) == ("sequence-classification", ("no", "yes"), 4, 1)
    assert (gen.version, gen.versions, gen.aliases) == (2, 2, ("challenger",))
    assert gen.alias_versions == {"champion": 1, "challenger": 2}
    first, second = registry.versions("team/gen")
    assert (first.aliases, second.aliases) == (("champion",), ("challenger",))
    assert registry.version("team/gen", 1) == first
    assert first.size_bytes == registry.manifest(first.digest).size_bytes
    registry.delete("teamless", 1)
    assert registry.count() == len(registry.adapters()) == 2


def test_labels_tasks_and_training_record(bert: Tiny, draft: DraftOf, registry: Registry) -> None:
    assert registry.push(bert.adapter, "x").manifest.labels == ("0", "1")
    trained = draft(bert)
    (trained.path / "config.json").write_text('{"id2label": {"0": "neg", "1": "pos"}}')
    assert registry.push(trained.path, "x").manifest.labels == ("neg", "pos")
    base = locate(str(bert.base))
    record = {
        "base": {"reference": f"folder:{bert.base}", "fingerprint": base.fingerprint},
        "task": "sequence-classification",
        "labels": ["bad", "good"],
        "chat_template_digest": None,
        "metrics": {"accuracy": 0.75},
        "versions": {"torch": "2.0", "peft": "0.21.2"},
        "seed": 7,
    }
    trained.write_training(**record)
    trained.edit_config(base_model_name_or_path="/somewhere/else", task_type=None)
    receipt = registry.push(trained.path, "x")
    assert receipt.manifest.labels == ("bad", "good")
    assert receipt.manifest.training == record
    assert receipt.manifest.library_versions == {"torch": "2.0", "peft": "0.21.2"}
    assert registry.push(trained.path, "x", labels=["a", "b"]).manifest.labels == ("a", "b")
    with pytest.raises(Rejected, match="there are 3 labels"):
        registry.push(trained.path, "x", labels=["a", "b", "c"])
    with pytest.raises(InvalidArgument, match="must differ"):
        registry.push(trained.path, "x", labels=["a", "a"])
    with pytest.raises(InvalidArgument, match="is not one of"):
        registry.push(trained.path, "x", task="poetry")
    trained.write_training(**record | {"base": {"reference": str(bert.base), "fingerprint": "sha256:" + "1" * 64}})
    with pytest.raises(BaseMismatch) as caught:
        registry.push(trained.path, "x")
    assert (caught.value.expected, caught.value.actual) == (base.fingerprint, "sha256:" + "1" * 64)


def test_a_head_says_the_task(bert: Tiny, draft: DraftOf, registry: Registry) -> None:
    untold = draft(bert)
    untold.edit_config(task_type=None)
    assert registry.push(untold.path, "x").manifest.task == "sequence-classification"


def test_no_task_at_all(llama: Tiny, draft: DraftOf, registry: Registry) -> None:
    untold = draft(llama)
    untold.edit_config(task_type=None)
    with pytest.raises(InvalidArgument, match="pass --task"):
        registry.push(untold.path, "x")
    assert registry.push(untold.path, "x", task="feature-extraction").manifest.task == "feature-extraction"
    with pytest.raises(InvalidArgument, match="no head"):
        registry.push(llama.adapter, "x", labels=["a"])


def test_a_pulled_folder_is_what_was_pushed_and_loads_in_plain_peft(
    llama: Tiny, bert: Tiny, registry: Registry, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    ids = torch.arange(1, 9)[None]
    for tiny, kind in ((llama, AutoModelForCausalLM), (bert, AutoModelForSequenceClassification)):
        name = tiny.base.parent.name
        registry.push(tiny.adapter, name)
        pulled = registry.pull(name, tmp_path / "out" / name)
        assert {path.name: path.read_bytes() for path in pulled.iterdir() if path.is_file()} == {
            path.name: path.read_bytes() for path in tiny.adapter.iterdir()
        }
        assert digest_bytes((pulled / "adapterbay" / "manifest.json").read_bytes()) == registry.resolve(name).digest
        with torch.no_grad():
            plain = kind.from_pretrained(tiny.base).eval()(input_ids=ids).logits
            ours = PeftModel.from_pretrained(kind.from_pretrained(tiny.base), pulled).eval()(input_ids=ids).logits
            theirs = (
                PeftModel.from_pretrained(kind.from_pretrained(tiny.base), tiny.adapter).eval()(input_ids=ids).logits
            )
        assert torch.equal(ours, theirs)
        if kind is AutoModelForCausalLM:
            assert not torch.allclose(ours, plain, atol=1e-3)


def test_pull_never_overwrites(llama: Tiny, registry: Registry, tmp_path: Path) -> None:
    registry.push(llama.adapter, "x")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(full)
    for destination in (full, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(InvalidArgument):
            registry.pull("x", destination)
    assert (full / "mine").read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert len(list(registry.pull("x", empty).iterdir())) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "link", "empty", "registry"}
