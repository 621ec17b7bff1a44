"""`registry mirror`: digests and numbers stay, a killed mirror goes on, and a conflict copies nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_tools import REGISTRY, ServerProcess, environment
from plain_hub import PlainHub

from adapterbay.registry import Registry
from adapterbay.registry.backend import Backend
from adapterbay.registry.errors import BaseNotFound, Conflict, InvalidArgument, NotFound
from adapterbay.registry.gate import Guard
from adapterbay.registry.hub.backend import HubRegistry
from adapterbay.registry.mirror import mirror, parse_names, plan

Content = Callable[[int], Path]
OUR_SERVER = "registry serve"


@pytest.fixture
def source(tmp_path: Path, content: Content) -> Registry:
    """Two adapters, five versions, two aliases; one content twice; a README of its own."""
    store = Registry.open(tmp_path / "source")
    (first := content(1)).joinpath("README.md").write_text("# Tales\n")
    store.push(first, "team/tales")
    store.push(content(2), "team/tales", aliases=["champion"])
    store.push(first, "team/tales", aliases=["challenger"])
    store.push(content(3), "team/songs", aliases=["champion"])
    store.push(content(4), "team/songs")
    return store


@pytest.fixture(params=["folder", "plain", OUR_SERVER])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    if request.param == "folder":
        return Registry.open(tmp_path / "destination")
    where: Any = request.getfixturevalue("plain" if request.param == "plain" else "server")
    return HubRegistry("hub:team", endpoint=where.endpoint, cache=tmp_path / "hub-cache")


def contents(backend: Backend) -> dict[str, tuple[dict[int, str], dict[str, int]]]:
    """Digests by number, and aliases, of every adapter."""
    return {
        found.name: (
            {record.version: record.digest for record in backend.versions(found.name)},
            backend.aliases(found.name),
        )
        for found in backend.adapters()
    }


def test_there_and_back(source: Registry, destination: Backend, tmp_path: Path) -> None:
    report = mirror(source, destination)
    assert (len(report.copied), report.present, report.left_out) == (5, 0, ())
    assert contents(destination) == contents(source)
    assert destination.snapshot("team/tales@1").read("README.md") == b"# Tales\n"
    assert destination.verify().ok

    back = Registry.open(tmp_path / "back")
    mirror(destination, back)
    assert contents(back) == contents(source)
    for record in source.versions("team/tales"):
        ours, theirs = source.open_snapshot(record.digest), back.open_snapshot(record.digest)
        assert ours.manifest.to_bytes() == theirs.manifest.to_bytes()
        for path in ours.files:
            assert ours.read(path) == theirs.read(path)

    again = mirror(source, destination)
    assert (again.copied, again.aliases, again.present) == ((), (), 5)


def test_what_is_new_is_added(source: Registry, destination: Backend, content: Content) -> None:
    mirror(source, destination)
    source.push(content(5), "team/tales")
    source.set_alias("team/tales", "champion", 4)
    destination.set_alias("team/tales", "ours", 1)
    report = mirror(source, destination)
    assert [(copy.to, copy.version) for copy in report.copied] == [("team/tales", 4)]
    assert [(alias.alias, alias.previous, alias.version) for alias in report.aliases] == [("champion", 2, 4)]
    assert destination.aliases("team/tales") == {"challenger": 3, "champion": 4, "ours": 1}


def test_a_guard_holds_one_alias_back_and_not_the_others(source: Registry, tmp_path: Path) -> None:
    destination = Registry.open(tmp_path / "guarded")
    destination.guard(None, "challenger", Guard(requires=("signature",)))
    source.set_alias("team/tales", "zebra", 1)
    for _ in range(2):
        report = mirror(source, destination)
        assert ["team/tales@challenger is guarded" in reason for reason in report.left_out] == [True]
        assert destination.aliases("team/tales") == {"champion": 2, "zebra": 1}
        assert "challenger" not in {alias.alias for alias in report.aliases}


def test_without_aliases_and_under_other_names(source: Registry, destination: Backend) -> None:
    report = mirror(source, destination, parse_names(["team/tales=team/stories"]), aliases=False)
    assert (len(report.copied), report.aliases) == (3, ())
    assert {name: found[1] for name, found in contents(destination).items()} == {"team/stories": {}}
    assert contents(destination)["team/stories"][0] == contents(source)["team/tales"][0]


def test_a_conflict_copies_nothing(source: Registry, destination: Backend, content: Content) -> None:
    destination.push(content(8), "team/tales")
    destination.push(content(2), "team/tales")
    before = contents(destination)
    with pytest.raises(Conflict) as caught:
        mirror(source, destination)
    assert "team/tales@1 is" in caught.value.message
    assert "team/tales@2" not in caught.value.message, "the same content under the same number is no conflict"
    assert caught.value.reason == "VERSION_TAKEN"
    assert contents(destination) == before, "team/songs was not copied either"


def test_numbers_that_were_deleted_stay_free(source: Registry, destination: Backend, content: Content) -> None:
    source.delete("team/tales", 1)
    source.push(content(5), "team/tales")
    source.delete("team/tales", 4)
    source.push(content(6), "team/tales")
    mirror(source, destination)
    assert contents(destination) == contents(source)
    assert list(contents(destination)["team/tales"][0]) == [2, 3, 5]
    with pytest.raises(NotFound):
        destination.resolve("team/tales@4")
    assert mirror(source, destination).copied == ()
    assert destination.push(content(7), "team/tales").version == 6
    assert destination.verify().ok


def test_what_the_destination_deleted_is_left_out(source: Registry, tmp_path: Path) -> None:
    destination = Registry.open(tmp_path / "destination")
    mirror(source, destination)
    destination.remove_alias("team/tales", "champion")
    destination.delete("team/tales", 2, "not for here")
    report = mirror(source, destination)
    assert report.copied == ()
    assert [line.split(":")[0] for line in report.left_out] == [
        "team/tales@2 was deleted at the destination",
        "the alias team/tales@champion",
    ]


def test_names_that_cannot_be_there(source: Registry, content: Content, plain: PlainHub, tmp_path: Path) -> None:
    source.push(content(1), "deep/er/name")
    hub = HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "hub-cache")
    with pytest.raises(InvalidArgument) as caught:
        plan(source, hub)
    assert "deep/er/name=OTHER" in caught.value.message
    with pytest.raises(InvalidArgument):
        plan(source, hub, {"team/tales": "songs", "team/songs": "songs"})
    with pytest.raises(NotFound):
        plan(source, hub, {"nothing": "nothing"})
    for names in (["a=", "b"], ["a", "a=b"], ["=x"]):
        with pytest.raises(InvalidArgument):
            parse_names(names)
    assert plain.repos == {}


def test_a_base_that_moved(source: Registry, base_folder: Path, tmp_path: Path, content: Content) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base_folder, moved)
    store = Registry.open(tmp_path / "elsewhere")
    digest = store.push(content(1), "team/tales", base=f"folder:{moved}").digest
    moved.rename(tmp_path / "moved-again")
    with pytest.raises(BaseNotFound) as caught:
        mirror(store, source, {"team/tales": "team/copy"})
    assert "team/tales@1" in caught.value.message
    mirror(store, source, {"team/tales": "team/copy"}, base=f"folder:{tmp_path / 'moved-again'}")
    assert source.resolve("team/copy").digest == digest


# The command


def command(home: Path, endpoint: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", REGISTRY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(home, endpoint),
    )


def done(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out, err


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_killed_mirror_goes_on(
    who: str, source: Registry, content: Content, server: ServerProcess, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    for number in range(20, 30):  # so that the kill comes long before the last of them
        source.push(content(number), "team/zebra")
    mirroring = command(home, server.endpoint, "mirror", source.root, "hub:team")
    assert mirroring.stdout is not None
    first = mirroring.stdout.readline()
    assert "team/songs@1 sha256:" in first
    if who == "client":
        mirroring.kill()
        mirroring.communicate(timeout=60)
    else:
        server.kill()
        _, err = done(mirroring, 1)
        assert err.startswith("error: ")
        assert "Traceback" not in err
        server.start()
    out, _ = done(command(home, server.endpoint, "mirror", source.root, "hub:team", "--json"))
    report = json.loads(out)["report"]
    assert report["present"] >= 1
    assert report["present"] + len(report["copied"]) == 15
    hub = HubRegistry("hub:team", endpoint=server.endpoint, cache=tmp_path / "hub-cache")
    assert contents(hub) == contents(source)
    assert hub.verify().ok
    store = Registry.open(server.store)
    assert contents(store) == contents(source)
    assert store.verify().ok
    store.close()


def test_the_command(source: Registry, plain: PlainHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "adapterbay").mkdir(parents=True)
    (home / "adapterbay" / "registries.toml").write_text(
        f'[prod]\nplace = "hub:team"\nendpoint = "{plain.endpoint}"\n', encoding="utf-8"
    )
    out, _ = done(command(home, "http://127.0.0.1:9", "places", "--json"))
    assert json.loads(out)["places"]["prod"]["endpoint"] == plain.endpoint
    assert "prod" in done(command(home, "http://127.0.0.1:9", "places"))[0]
    out, _ = done(command(home, "http://127.0.0.1:9", "mirror", source.root, "prod", "team/songs", "--dry-run"))
    assert out.splitlines()[-1] == "2 versions would be copied, 0 were there already."
    assert plain.repos == {}
    out, _ = done(command(home, "http://127.0.0.1:9", "mirror", source.root, "prod", "team/songs"))
    assert out.splitlines()[-2:] == [
        "alias team/songs@champion → 1",
        "2 versions were copied, 0 were there already.",
    ]
    out, _ = done(command(home, "http://127.0.0.1:9", "mirror", "prod", tmp_path / "back", "songs=my/songs"))
    assert contents(Registry.open(tmp_path / "back"))["my/songs"] == contents(source)["team/songs"]
    _, err = done(command(home, "http://127.0.0.1:9", "mirror", source.root, "prod", "team/tales=team/songs"), 1)
    assert err.startswith("error: Nothing was copied: team/songs@1 is sha256:")
    _, err = done(command(home, "http://127.0.0.1:9", "mirror", source.root, "prdo"), 2)
    assert "Did you mean prod?" in err
