"""Compiles the kernels once for this machine, keeps them under the cache folder, and loads them.

The file is named by what it depends on: the sources, torch, the compiler with its flags, and the processor; and by its
own bytes, which are checked before it is loaded (`cache`). Another process, or a restart, loads it in milliseconds.
`-march=native` picks what this processor has; without AVX-512 the same sources compile to plain loops.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import torch

from adapterbay.registry.errors import Unavailable
from adapterbay.registry.paths import cache_folder
from adapterbay.server.kernels import cache

Compile = Literal["auto", "on", "off"]

SOURCES: Final = Path(__file__).parent / "src"
FLAGS: Final = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
)
COMPILERS: Final = ("c++", "g++", "clang++")
COMPILE_SECONDS: Final = 600.0
NO_COMPILER: Final = "there is no C++ compiler (CXX, c++, g++ or clang++)"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """Whether the kernels can be used, and how that came about. `seconds` is what it took; `compiled` is False when
    they came from the cache; `reason` says why there are none."""

    loaded: bool
    compiled: bool = False
    seconds: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        if not self.loaded:
            return f"off ({self.reason})"
        return f"on ({'compiled' if self.compiled else 'from the cache'} in {self.seconds:.1f} s)"


OFF: Final = Kernels(loaded=False, reason="switched off")

_lock = threading.Lock()
_state: Kernels | None = None


def load(mode: Compile) -> Kernels:
    """Makes the operators of `ops` available, and tells whether they are.

    `off` never does; `auto` does where the kernels can be compiled; `on` raises Unavailable where they cannot.
    """
    if mode == "off":
        return OFF
    global _state
    with _lock:
        if _state is None or not _state.loaded:
            _state = _try()
            log.info("kernels: %s", _state)
        if mode == "on" and not _state.loaded:
            advice = "Install a C++ compiler, or start" if _state.reason == NO_COMPILER else "Mend that, or start"
            raise Unavailable(f"There are no kernels: {_state.reason}. {advice} with --compile off.")
        return _state


def _try() -> Kernels:
    began = time.monotonic()
    compiler = find_compiler()
    if compiler is None:
        return Kernels(loaded=False, reason=NO_COMPILER)
    try:
        compiled = _load(compiler, cache_folder() / "kernels")
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return Kernels(loaded=False, reason=" ".join(str(error).split())[:500])
    from adapterbay.server.kernels import ops

    ops.register_fakes()
    return Kernels(loaded=True, compiled=compiled, seconds=time.monotonic() - began)


def find_compiler() -> str | None:
    """The compiler's path: what CXX names, else the first that is there."""
    wanted = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((found for name in wanted if (found := shutil.which(name))), None)


def _load(compiler: str, folder: Path) -> bool:
    """Loads the library from the cache, or as it is built now. Whether it was built now."""
    key = _digest(compiler)
    try:
        library, built = cache.kept(folder, key, partial(build, compiler))
    except OSError as error:
        log.warning("the kernels are compiled at every start, because %s cannot keep them: %s", folder, error)
        with tempfile.TemporaryDirectory(prefix="adapterbay-kernels-") as elsewhere:
            torch.ops.load_library(str(build(compiler, Path(elsewhere))))  # type: ignore[no-untyped-call]
        return True
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    return built


def build(compiler: str, folder: Path) -> Path:
    """Compiles `src/` in `folder`; the library's file.

    Raises OSError or subprocess.SubprocessError; RuntimeError with the compiler's first complaint.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-I{path}" for path in include_paths()]
    made, library = folder / "ops.o", folder / "ops.so"
    _run([compiler, *FLAGS, *includes, "-c", str(SOURCES / "ops.cpp"), "-o", str(made)])
    # Not linked with OpenMP: its symbols are to come from the one runtime that torch has loaded.
    libraries = [f"-L{path}" for path in library_paths()]
    _run([compiler, "-shared", str(made), "-o", str(library), *libraries, "-ltorch_cpu", "-lc10", *_LOOSE])
    return library


_LOOSE: Final = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:300])
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}: {complaint}")


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    parts = [torch.__version__, platform.machine(), _processor(), compiler, version, *FLAGS]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What `-march=native` looks at, as far as the system tells: a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
