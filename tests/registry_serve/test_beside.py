"""Beside the adapter at the root: adapters in folders pass the same admission, and the ledger is the server's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from registry_serve.tools import Hub, new_weights
from registry_tools import Draft, Tiny
from safetensors.torch import load_file, save_file

from adapterbay.registry import Registry, locate
from adapterbay.registry.digest import digest_bytes
from adapterbay.registry.portable import LEDGER_PATH

Change = Callable[[Path], None]


@pytest.fixture
def api(hub: Hub, llama: Tiny) -> HfApi:
    """The client of a server that has version 1 of `team/beside`."""
    api = hub.api()
    api.create_repo("team/beside", exist_ok=True)
    api.upload_folder(repo_id="team/beside", folder_path=llama.adapter)
    return api


def shorten(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def empty(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file({key: value * 0 for key, value in load_file(weights).items()}, weights)


def cut(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file({key: value[:, :-1].contiguous() for key, value in load_file(weights).items()}, weights)


def unserved(folder: Path) -> None:
    Draft(folder).edit_config(peft_type="POLY")


def other_base(folder: Path) -> None:
    Draft(folder).edit_config(base_model_name_or_path="nobody/knows")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shorten, "adapter_model.safetensors was refused"),
        (empty, "second/: The adapter changes nothing"),
        (cut, "second/: "),
        (unserved, "second/: .*POLY"),
        (other_base, "second/: .*nobody/knows"),
    ],
)
def test_an_adapter_in_a_folder_passes_the_same_admission(
    api: HfApi, llama: Tiny, tmp_path: Path, change: Change, words: str
) -> None:
    change(folder := new_weights(llama.adapter, tmp_path / "second", 2))
    before = api.model_info("team/beside").sha
    with pytest.raises(HfHubHTTPError, match=words) as refused:
        api.upload_folder(repo_id="team/beside", folder_path=folder, path_in_repo="second")
    assert refused.value.response.status_code == 422
    assert api.model_info("team/beside").sha == before
    config, weights = sorted(path for path in folder.iterdir() if path.name.startswith("adapter_"))
    api.upload_file(repo_id="team/beside", path_in_repo=f"second/{config.name}", path_or_fileobj=config)
    with pytest.raises(HfHubHTTPError, match=words):  # as soon as it is whole
        api.upload_file(repo_id="team/beside", path_in_repo=f"second/{weights.name}", path_or_fileobj=weights)


def test_an_adapter_in_a_folder_may_call_its_base_as_it_likes(api: HfApi, llama: Tiny, tmp_path: Path) -> None:
    """By the fingerprint in its record, as at the root; without the record it cannot be found any more."""
    folder = new_weights(llama.adapter, tmp_path / "fourth", 4)
    other_base(folder)
    fingerprint = locate(str(llama.base)).fingerprint
    record = {"base": {"reference": "nobody/knows", "fingerprint": fingerprint}}
    (folder / "training.json").write_text(json.dumps(record))
    api.upload_folder(repo_id="team/beside", folder_path=folder, path_in_repo="fourth")
    with pytest.raises(HfHubHTTPError, match=r"fourth/: .*nobody/knows"):
        api.delete_file("fourth/training.json", repo_id="team/beside")
    record["base"]["fingerprint"] = "sha256:" + "0" * 64
    with pytest.raises(HfHubHTTPError, match="fourth/: "):
        api.upload_file(
            repo_id="team/beside", path_in_repo="fourth/training.json", path_or_fileobj=json.dumps(record).encode()
        )


def test_parts_are_checked_as_far_as_they_can_be(api: HfApi) -> None:
    lying = (2**40).to_bytes(8, "little") + b"{}"
    for path, data, words in (
        ("third/adapter_model.safetensors", lying, "third/adapter_model.safetensors was refused"),
        ("model.safetensors", lying, "model.safetensors was refused"),
        ("deep/er/x.SafeTensors", b"{}", "deep/er/x.SafeTensors was refused"),
        ("third/adapter_config.json", b'{"r": 1, "r": 2}', "third/adapter_config.json"),
        ("third/adapter_config.json", b"{nothing", "third/adapter_config.json"),
    ):
        with pytest.raises(HfHubHTTPError, match=words) as refused:
            api.upload_file(repo_id="team/beside", path_in_repo=path, path_or_fileobj=data)
        assert refused.value.response.status_code == 422


def test_peft_pushes_two_adapters_and_loads_the_second(hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    answer = hub.python(
        f"""
        import json, torch
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import LlamaForCausalLM
        base = {str(llama.base)!r}
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
        model.add_adapter("second", lora)
        model.push_to_hub("team/two")
        sums = [sum(p.double().sum().item() for n, p in model.named_parameters() if f".{{a}}." in n)
                for a in ("default", "second")]
        loaded = []
        for subfolder in (None, "second"):
            more = {{}} if subfolder is None else {{"subfolder": subfolder}}
            found = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), "team/two", **more)
            loaded.append(sum(p.double().sum().item() for n, p in found.named_parameters() if "lora_" in n))
        print(json.dumps({{"pushed": sums, "loaded": loaded}}))
        """,
        tmp_path / "hf",
    )
    assert answer["loaded"] == answer["pushed"]
    assert answer["pushed"][0] != answer["pushed"][1]
    assert [record.version for record in Registry.open(hub.store).versions("team/two")] == [1]


def test_the_ledger_is_the_servers_own(api: HfApi, hub: Hub, llama: Tiny, tmp_path: Path) -> None:
    path = Path(api.hf_hub_download("team/beside", LEDGER_PATH, cache_dir=tmp_path / "before"))
    ledger = path.read_bytes()
    api.upload_file(repo_id="team/beside", path_in_repo=LEDGER_PATH, path_or_fileobj=b"{}")
    api.create_commit(
        "team/beside",
        [CommitOperationAdd(LEDGER_PATH, b"{ }"), CommitOperationAdd("more.md", b"more")],
        commit_message="A ledger of its own",
    )
    assert not Registry.open(hub.store).blobs.path(digest_bytes(b"{ }")).exists(), "what no commit names is not kept"
    head = api.model_info("team/beside").sha
    api.upload_file(repo_id="team/beside", path_in_repo=LEDGER_PATH, path_or_fileobj=b"{}")
    assert api.model_info("team/beside").sha == head, "nothing changed"
    api.create_commit(
        "team/beside",
        [CommitOperationDelete(LEDGER_PATH), CommitOperationAdd("notes.md", b"hello")],
        commit_message="Notes",
    )
    assert api.model_info("team/beside").sha != head
    path = Path(api.hf_hub_download("team/beside", LEDGER_PATH, cache_dir=tmp_path / "after"))
    assert path.read_bytes() == ledger
    api.upload_folder(repo_id="team/beside", folder_path=new_weights(llama.adapter, tmp_path / "next", 5))
    assert [tag.name for tag in api.list_repo_refs("team/beside").tags][-1] == "v2"
