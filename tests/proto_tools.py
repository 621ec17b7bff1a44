"""Generates the gRPC stubs and reads the contract's descriptors. `make proto` runs `proto_tools.py generate`.

Stubs come straight from protoc: nothing edits them afterwards, and tests/test_proto.py proves them fresh.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "proto"
PACKAGE_FOLDER = PROTO_ROOT / "adapterbay" / "v1"


def proto_files() -> list[str]:
    """Our .proto files, relative to the import root."""
    return sorted(path.relative_to(PROTO_ROOT).as_posix() for path in PACKAGE_FOLDER.glob("*.proto"))


def generated_files(folder: Path) -> dict[str, bytes]:
    """The stubs under an output root, by path relative to it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((folder / "adapterbay" / "v1").glob("*_pb2*.py*"))
        if path.suffix in {".py", ".pyi"}
    }


def has_service(file: str) -> bool:
    """Whether a .proto file declares a service."""
    return re.search(r"^service ", (PROTO_ROOT / file).read_text(), re.MULTILINE) is not None


def run_protoc(files: list[str], *arguments: str) -> None:
    """Runs grpcio-tools' protoc with the mypy-protobuf plugins of this environment."""
    import grpc_tools

    scripts = Path(sys.executable).parent
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
        f"-I{PROTO_ROOT}",
        f"-I{well_known}",
        *arguments,
        *files,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"protoc failed:\n{done.stderr}")


def generate(output: Path = PROTO_ROOT) -> None:
    """Writes `*_pb2.py`, `*_pb2_grpc.py` and their `.pyi` under `output`; services only where the file has any.

    The `.pyi` come from mypy-protobuf, whose service stubs type the synchronous and the asyncio side.
    """
    run_protoc(proto_files(), f"--python_out={output}", f"--mypy_out={output}")
    services = [file for file in proto_files() if has_service(file)]
    run_protoc(services, f"--grpc_python_out={output}", f"--mypy_grpc_out={output}")


def descriptors() -> list[descriptor_pb2.FileDescriptorProto]:
    """Our files' descriptors with source info (comments), compiled now from the .proto text."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "set.binpb"
        run_protoc(proto_files(), "--include_source_info", f"--descriptor_set_out={target}")
        files = descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes()).file
    return [file for file in files if file.name in proto_files()]


if __name__ == "__main__":
    if sys.argv[1:] != ["generate"]:
        raise SystemExit("usage: proto_tools.py generate")
    generate()
