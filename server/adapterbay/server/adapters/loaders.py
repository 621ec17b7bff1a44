"""The threads that load adapters: they may compute, each on one core, and leave the engine's thread all of them.

torch's OpenMP build keeps the number of threads twice: once for each thread that has computed, and once for those that
have not yet. `torch.set_num_threads` sets both, so that a loader that asks for one thread would leave one to every
thread that computes for the first time later, the engine's perhaps. So the loaders are made at once, and the common
number is set back before anybody else can have seen it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from adapterbay.registry.errors import AdapterbayError, EngineFault
from adapterbay.server.adapters.forms import ServingForm

_making = threading.Lock()


def loading_threads(count: int) -> ThreadPoolExecutor:
    """An executor of `count` threads that exist already and compute with one OpenMP thread each."""
    with _making:
        common = torch.get_num_threads()
        everyone = threading.Barrier(count + 1)
        executor = ThreadPoolExecutor(count, thread_name_prefix="adapter-load", initializer=_compute_alone)
        for _ in range(count):
            executor.submit(everyone.wait)
        everyone.wait()
        # In a thread that ends, so that this one keeps what it had.
        setting_back = threading.Thread(target=torch.set_num_threads, args=(common,))
        setting_back.start()
        setting_back.join()
    return executor


def attempted(load: Callable[[str], ServingForm], digest: str) -> ServingForm | AdapterbayError:
    """The form, or what went wrong."""
    try:
        return load(digest)
    except AdapterbayError as error:
        return error
    except BaseException as error:  # noqa: BLE001 - whatever it is, the rows that wait must hear of it
        fault = EngineFault(f"Loading {digest} failed: {error!r}")
        fault.__cause__ = error
        return fault


def beside(executor: ThreadPoolExecutor, work: Callable[[], None]) -> Callable[[], None]:
    """Has `work` done on a free thread of an executor whose thread this is. What is returned waits for it, or does it
    where no thread was free, and raises what it raised."""
    try:
        begun = executor.submit(work)
    except RuntimeError:  # the executor takes nothing any more: it is waiting for this thread to end
        return work

    def finish() -> None:
        if begun.cancel():
            work()
        else:
            begun.result()

    return finish


def _compute_alone() -> None:
    torch.get_num_threads()  # takes the common number, once for each thread; later it would undo what follows
    torch.set_num_threads(1)
