"""The house: who may import whom, what a wheel holds, and that the light core loads no torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("proto", "registry", "base", "server", "trainer", "app")
PARTS = ("v1", "registry", "base", "server", "client", "trainer", "comparison", "cli", "demo")
MAX_LINES = 400

MAY_IMPORT = {
    "v1": set(),
    "registry": {"v1"},
    "base": {"v1", "registry"},
    "server": {"v1", "registry", "base"},
    "trainer": {"v1", "registry", "base"},
    "client": {"v1"},
    "comparison": {"v1", "registry", "client"},
    "cli": {"v1", "registry", "base", "server", "trainer", "client", "comparison", "demo"},
    "demo": {"v1", "registry", "base", "server", "trainer", "client", "comparison", "cli"},
}
"""Which parts a part may import besides itself."""

LIGHT = {"numpy", "pydantic", "rich", "safetensors", "typer", "huggingface_hub", "grpc", "grpc_status", "google"}
LIGHT |= {"yaml"}
REGISTRY_EXTRAS = {"starlette", "uvicorn", "anyio", "model_signing", "cryptography", "modelscope_hub"}
"""What `registry serve`, `registry sign` and modelscope: need, imported only where they are used."""
HEAVY = {"torch", "accelerate", "bitsandbytes", "gguf", "peft", "transformers"}
HEAVY |= {"datasets", "matplotlib", "pandas", "pyarrow", "statsmodels", "scipy", "grpc_health", "grpc_reflection"}
HEAVY |= {"prometheus_client"}
HEAVY |= REGISTRY_EXTRAS - {"anyio"}  # which huggingface_hub needs, too
"""What the extras bring."""
OUTSIDE = {
    "client": {"grpc", "grpc_status", "google"},
    "registry": LIGHT | REGISTRY_EXTRAS,
    "cli": LIGHT,
    "v1": {"grpc", "google", "typing_extensions"},
}
"""What a part of the light core may import from outside; the standard library goes without saying."""


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[2]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module with its line, wherever the statement stands: in functions and for types only, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            if module == "adapterbay":
                yield from ((f"adapterbay.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno


def test_every_source_belongs_to_a_part() -> None:
    assert {part_of(path) for path in sources()} == set(PARTS)
    for path in sources():
        assert path.relative_to(ROOT).parts[1] == "adapterbay", path


def test_imports_go_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources()
        for module, line in imports(path)
        if module.split(".")[0] == "adapterbay"
        and module.split(".")[1] not in MAY_IMPORT[part_of(path)] | {part_of(path)}
    ]
    assert not wrong


def test_the_light_core_imports_light_things_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources()
        if part_of(path) in OUTSIDE
        for module, line in imports(path)
        if module.split(".")[0] not in sys.stdlib_module_names | OUTSIDE[part_of(path)] | {"adapterbay"}
    ]
    assert not wrong


def test_the_rules_cover_every_part() -> None:
    assert set(MAY_IMPORT) == set(PARTS)
    assert not {"server", "trainer"} & (MAY_IMPORT["trainer"] | MAY_IMPORT["server"])


def test_the_namespace_has_no_init_and_every_part_is_typed() -> None:
    for folder in FOLDERS:
        assert not list((ROOT / folder).rglob("adapterbay/__init__.py"))
    for part in PARTS:
        homes = [ROOT / folder / "adapterbay" / part for folder in FOLDERS]
        found = [home for home in homes if home.is_dir()]
        assert len(found) == 1, part
        assert (found[0] / "__init__.py").is_file()
        assert (found[0] / "py.typed").is_file()


def test_no_file_outgrows_its_room() -> None:
    ours = [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in ours
        if "_pb2" not in path.name
        and ".venv" not in path.parts  # the peers' environment, where it is installed
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long


def test_the_client_and_the_registry_load_no_torch() -> None:
    code = (
        "import adapterbay.client, adapterbay.registry, adapterbay.registry.cli, adapterbay.cli.main, sys; "
        "heavy = {'torch', 'transformers', 'peft', 'adapterbay.server', 'adapterbay.base'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**clean, **environment}, timeout=280
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    try:
        import hatchling  # noqa: F401 - only whether it is there

        isolation = ["--no-isolation"]
    except ModuleNotFoundError:
        isolation = []
    done = run(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(folder), str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_part_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for part in PARTS:
        assert f"adapterbay/{part}/__init__.py" in names
        assert f"adapterbay/{part}/py.typed" in names
    for path in sources():
        assert "/".join(path.relative_to(ROOT).parts[1:]) in names, path
    tops = {name.split("/")[0] for name in names}
    assert tops == {"adapterbay", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names if name.endswith((".pyc", "adapterbay/__init__.py"))]


@pytest.mark.slow
def test_an_installed_wheel_runs_without_the_heavy_packages(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has the light dependencies only: what needs torch says in one line what to install."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = str(tmp_path / "env" / "bin" / "python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    done = run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    )
    assert done.returncode == 0, done.stderr
    link_light_packages(Path(sysconfig.get_path("purelib")), site)

    code = "import adapterbay.client, adapterbay.registry; print(adapterbay.client.__file__)"
    imported = run(python, "-I", "-c", code)
    assert imported.returncode == 0, imported.stderr
    assert Path(imported.stdout.strip()).is_relative_to(site)
    assert run(python, "-I", "-c", "import torch").returncode != 0

    scripts = tmp_path / "env" / "bin"
    for command in (["adapterbay", "--help"], ["adapterbay", "version"], ["registry", "--help"]):
        shown = run(str(scripts / command[0]), *command[1:])
        assert shown.returncode == 0, (command, shown.stderr)
    for command in (["server", "start"], ["adapterbay", "server", "start", "--port", "0"]):
        missing = run(str(scripts / command[0]), *command[1:])
        assert missing.returncode == 2, (command, missing.stderr)
        lines = missing.stderr.splitlines()
        assert len(lines) == 1, missing.stderr
        assert lines[0].startswith("error: ")
        assert "pip install 'adapterbay[server]'" in lines[0]


def link_light_packages(outer: Path, site: Path) -> None:
    """Gives the environment everything of the outer one but what the extras bring."""
    for entry in outer.iterdir():
        ours = "adapterbay" in entry.name or entry.suffix == ".pth" or entry.name.startswith("_")
        if entry.name in HEAVY or ours or (site / entry.name).exists():
            continue
        (site / entry.name).symlink_to(entry)
