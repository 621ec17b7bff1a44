"""Run as a script without torch: every kind of change at once, by many processes and threads, and killed. Prints JSON.

storm_worker.py together REGISTRY ADAPTER PROCESSES STEPS
storm_worker.py kill REGISTRY ADAPTER COUNT SEED
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from crash_worker import new_content

from adapterbay.registry import Registry
from adapterbay.registry.errors import AdapterbayError, Conflict, NotFound, PromotionRefused, StaleAlias
from adapterbay.registry.gate import Guard
from adapterbay.registry.local.doctor import diagnose
from adapterbay.registry.portable import MANIFEST_PATH

NAMES = ("team/a", "team/b", "c")
KINDS = ("push", "push", "alias", "alias", "rollback", "tag", "deprecate", "delete", "guard", "gc", "sign")
EXPECTED = (NotFound, Conflict, StaleAlias, PromotionRefused)
"""What may happen when others change the same things; anything else is a bug."""


def one_change(store: Registry, folder: Path, dice: random.Random, done: Counter[str]) -> None:
    """One random change; counts what came of it."""
    name = dice.choice(NAMES)
    kind = dice.choice(
        ("push", "push", "alias", "alias", "rollback", "tag", "deprecate", "delete", "guard", "gc", "sign")
    )
    try:
        versions = [record.version for record in store.versions(name)] if kind != "push" else []
        if kind == "push":
            new_content(folder, dice.randrange(40))
            store.push(folder, name, aliases=dice.choice(([], ["champion"], ["new"])))
        elif kind == "alias":
            expected = store.aliases(name).get("champion")
            store.set_alias(name, "champion", dice.choice(versions), expected=expected)
        elif kind == "rollback":
            store.rollback(name, "champion")
        elif kind == "tag":
            store.tag(name, dice.choice(versions), {f"key{dice.randrange(4)}": str(dice.random())})
        elif kind == "deprecate":
            store.deprecate(name, dice.choice(versions), dice.choice(("old", None)))
        elif kind == "delete":
            store.delete(name, dice.choice(versions), "storm")
        elif kind == "guard":
            guard = dice.choice((None, Guard(requires=("signature",))))
            store.guard(name, "champion", guard)
        elif kind == "sign":
            store.attach_signature(name, dice.choice(versions), dice.randbytes(20))
        else:
            store.gc(grace_seconds=0 if dice.random() < 0.5 else 3600)
        done[kind] += 1
    except EXPECTED as error:
        done[error.reason] += 1


def sound(place: Path) -> None:
    """Everything that must hold whatever was going on."""
    store = Registry.open(place, create=False)
    report = store.verify()
    assert report.ok, report.problems
    assert diagnose(place).ok, diagnose(place).findings
    assert [event.sequence for event in store.events(limit=10**6)] == list(range(1, store.last_event() + 1))
    for name in NAMES:
        try:
            history = store.history(name)
        except NotFound:
            continue
        pushed = [event.version for event in history if event.kind == "pushed"]
        deleted = {event.version for event in history if event.kind == "deleted"}
        assert pushed == list(range(1, len(pushed) + 1)), "numbers count up and are never used again"
        live = [version for version in pushed if version not in deleted]
        assert [record.version for record in store.versions(name)] == live if live else not deleted - set(pushed)
        if live:
            assert store.resolve(name).version == live[-1]
            assert set(store.aliases(name).values()) <= set(live), "an alias never points at a deleted version"
    store.close()


def same_after_rebuild(place: Path) -> bool:
    store = Registry.open(place, create=False)

    def facts() -> Any:
        found = store.adapters()
        return found, [store.versions(each.name) for each in found], store.events(limit=10**6)

    before = facts()
    store.rebuild_index()
    return facts() == before


def work(place: Path, folder: Path, steps: int, seed: int, answers: Any) -> None:
    done: Counter[str] = Counter()
    store = Registry.open(place)
    failures: list[str] = []

    def thread(number: int) -> None:
        own = folder.parent / f"own-{seed}-{number}"
        shutil.copytree(folder, own)
        dice = random.Random(1000 * seed + number)
        try:
            for _ in range(steps):
                one_change(store, own, dice, done)
        except BaseException as error:  # noqa: BLE001 - told to the parent
            failures.append(repr(error))

    threads = [threading.Thread(target=thread, args=(number,)) for number in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    answers.put((dict(done), failures))


def begin(place: Path, folder: Path) -> None:
    """Three versions of each adapter, so that there is something to change."""
    store = Registry.open(place)
    for name in NAMES:
        for number in range(3):
            new_content(folder, number)
            store.push(folder, name, aliases=["champion"])
    store.close()


def together(place: Path, folder: Path, processes: int, steps: int) -> dict[str, Any]:
    begin(place, folder)
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    workers = [context.Process(target=work, args=(place, folder, steps, seed, answers)) for seed in range(processes)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=240) for _ in workers]
    for worker in workers:
        worker.join()
    sound(place)
    done: Counter[str] = Counter()
    for counts, _ in found:
        done.update(counts)
    return {
        "done": dict(done),
        "failures": [failure for _, failures in found for failure in failures],
        "rebuilt": same_after_rebuild(place),
        "temporary": len(list((place / "tmp").iterdir())),
    }


def kill(place: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    dice = random.Random(seed)
    begin(place, folder)
    sequences = []
    for number in range(count):
        source = folder.parent / f"source-{number}"  # of its own: a kill may leave it half written
        shutil.copytree(folder, source)
        child = os.fork()
        if child == 0:
            try:
                own = Registry.open(place)
                changes: Counter[str] = Counter()
                random_changes = random.Random(seed * 10_000 + number)
                while True:
                    one_change(own, source, random_changes, changes)
            except AdapterbayError as error:
                sys.stderr.write(f"{error}\n")
            finally:
                os._exit(1)
        time.sleep(dice.uniform(0.002, 0.15))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"a change failed: {status}"
        sound(place)
        store = Registry.open(place, create=False)
        sequences.append(store.last_event())
        store.close()
    assert sequences == sorted(sequences)
    store = Registry.open(place)
    for name in NAMES:
        new_content(folder, 99)
        receipt = store.push(folder, name)
        assert store.snapshot(f"{name}@{receipt.version}").manifest.digest == receipt.digest
        pulled = store.pull(name, place.parent / f"pulled-{name.replace('/', '-')}")
        assert (pulled / MANIFEST_PATH).is_file()
    store.gc(grace_seconds=0)
    sound(place)
    return {"kills": count, "events": sequences[-1], "rebuilt": same_after_rebuild(place)}


def main() -> None:
    mode, registry, adapter, *rest = sys.argv[1:]
    folder = Path(registry).parent / "source"
    shutil.copytree(adapter, folder)
    answer = (together if mode == "together" else kill)(Path(registry), folder, int(rest[0]), int(rest[1]))
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
