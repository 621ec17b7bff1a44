"""The server as a process: its start, its end, its log, and what it does not have."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from registry_serve.tools import Hub, registry_command
from registry_tools import Tiny

from adapterbay.registry import Registry


def test_sigterm_ends_it_quietly(start_hub: Callable[..., Hub], llama: Tiny) -> None:
    hub = start_hub()
    Registry.open(hub.store).push(llama.adapter, "team/x")
    api = hub.api()
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.extend(api.model_info("team/x").sha for _ in range(5)))
    thread.start()
    thread.join()
    assert hub.stop() == 0
    assert len(answers) == 5
    log = (hub.root / "server.log").read_text()
    assert "Traceback" not in log
    assert "method=GET path=/api/models/team/x status=200" in log
    assert "caller=alice" in log
    assert hub.token("alice") not in log


def test_it_says_that_tokens_travel_open(tmp_path: Path) -> None:
    command = registry_command(
        "serve", "--registry", tmp_path / "r", "--port", 0, "--host", "0.0.0.0", "--anonymous", "read"
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        process.terminate()
        assert process.wait(timeout=60) == 0
    assert lines[0].startswith("Tokens travel unencrypted: put a proxy with TLS in front")
    assert "export HF_ENDPOINT=http://0.0.0.0:" in lines[1]


def test_mistakes_at_the_start(start_hub: Callable[..., Hub], tmp_path: Path) -> None:
    hub = start_hub()

    def fails(*arguments: object) -> str:
        done = subprocess.run(
            registry_command("serve", *arguments), capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        return done.stderr

    store = ("--registry", tmp_path / "r")
    assert "Choose another --port" in fails(*store, "--port", hub.port, "--anonymous", "read")
    assert "anonymous is 'all'" in fails(*store, "--anonymous", "all")
    assert "There is no base folder" in fails(*store, "--base", f"x={tmp_path}/nothing")
    assert "a name stands before '='" in fails(*store, "--base", "=folder:/x")
    assert "is not a URL" in fails(*store, "--public-url", "adapters.example.org")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "is not a registry and not empty" in fails("--registry", tmp_path / "other", "--anonymous", "read")


def test_without_starlette_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['starlette'] = None; sys.modules['uvicorn'] = None\n"
        "from adapterbay.registry.cli import serving\n"
        "from adapterbay.registry.cli.common import app\n"
        "app(['serve', '--anonymous', 'read', '--registry', sys.argv[1]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r")], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "pip install 'adapterbay[registry-server]'" in done.stderr


def test_the_registry_loads_without_starlette() -> None:
    code = (
        "import adapterbay.registry, adapterbay.registry.cli, adapterbay.registry.cli.serving, sys; "
        "assert not {'starlette', 'uvicorn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_hub_has_and_we_have_not(hub: Hub) -> None:
    api = hub.api()
    api.create_repo("team/absent", exist_ok=True)
    for act, what in (
        (lambda: api.create_repo("team/d", repo_type="dataset"), "repositories of type dataset are"),
        (lambda: api.create_repo("team/s", repo_type="space", space_sdk="static"), "repositories of type space are"),
        (lambda: api.dataset_info("team/d"), "datasets are"),
        (lambda: api.space_info("team/d"), "Spaces are"),
        (lambda: api.delete_repo("team/absent"), "deleting a whole repository is"),
        (lambda: api.move_repo("team/absent", "team/moved"), "moving and renaming repositories is"),
        (lambda: api.update_repo_settings("team/absent", private=True), "settings of a repository are"),
        (lambda: list(api.get_repo_discussions("team/absent")), "discussions and pull requests are"),
        (lambda: api.create_pull_request("team/absent", title="x"), "discussions"),
        (lambda: api.super_squash_history("team/absent"), "squashing the history is"),
        (lambda: list(api.list_lfs_files("team/absent")), "managing LFS files is"),
        (lambda: list(api.list_repo_likers("team/absent")), "likes are"),
        (lambda: list(api.list_datasets()), "datasets are"),
        (lambda: list(api.list_collections()), "collections are"),
        (lambda: api.get_user_overview("alice"), "pages of users are"),
    ):
        with pytest.raises(HfHubHTTPError, match=what) as refused:
            act()
        assert refused.value.response.status_code == 501, what
        assert "This is a registry of adapters, not the whole Hub" in str(refused.value)
    bearer = {"authorization": f"Bearer {hub.token('alice')}"}
    for path in (
        "/team/absent.git/info/refs?service=git-upload-pack",
        "/datasets/a/b/resolve/main/x",
        "/team/absent/raw/main/README.md",
        "/team/absent/blob/main/README.md",
        "/team/absent/tree/main",
        "/team/absent/discussions/1",
    ):
        assert get_session().get(hub.url + path, headers=bearer).status_code == 501, path
    nothing = get_session().get(f"{hub.url}/no/such/address", headers=bearer)
    assert nothing.status_code == 404
    assert "error" in nothing.json()
