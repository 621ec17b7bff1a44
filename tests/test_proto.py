"""The contract: stubs are fresh, everything is commented, and names follow buf's STANDARD lint rules.

`buf lint` itself (rules in buf.yaml) is run by hand where npm is at hand; these tests hold its naming rules without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)
from proto_tools import PROTO_ROOT, descriptors, generate, generated_files, has_service, proto_files

PASCAL = re.compile(r"[A-Z][a-zA-Z0-9]*")
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
UPPER_SNAKE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
FILES = descriptors()
SourcePath = tuple[int, ...]


def upper_snake(pascal: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", pascal).upper()


def messages(file: FileDescriptorProto) -> Iterator[tuple[SourcePath, DescriptorProto]]:
    """Every message with its source-info path, nested ones included."""

    def walk(path: SourcePath, message: DescriptorProto) -> Iterator[tuple[SourcePath, DescriptorProto]]:
        yield path, message
        for index, nested in enumerate(message.nested_type):
            yield from walk((*path, 3, index), nested)

    for index, message in enumerate(file.message_type):
        yield from walk((4, index), message)


def enums(file: FileDescriptorProto) -> Iterator[tuple[SourcePath, EnumDescriptorProto]]:
    for index, enum in enumerate(file.enum_type):
        yield (5, index), enum
    for path, message in messages(file):
        for index, enum in enumerate(message.enum_type):
            yield (*path, 4, index), enum


def services(file: FileDescriptorProto) -> Iterator[tuple[SourcePath, ServiceDescriptorProto]]:
    for index, service in enumerate(file.service):
        yield (6, index), service


def commented_paths(file: FileDescriptorProto) -> dict[SourcePath, str]:
    """What must carry a comment: path to a name for the failure message."""
    paths: dict[SourcePath, str] = {(12,): "syntax line (the file's own comment)"}
    for path, message in messages(file):
        paths[path] = message.name
        for index, field in enumerate(message.field):
            paths[(*path, 2, index)] = f"{message.name}.{field.name}"
        for index, oneof in enumerate(message.oneof_decl):
            if not oneof.name.startswith("_"):  # proto3 optional makes a synthetic one
                paths[(*path, 8, index)] = f"{message.name}.{oneof.name}"
    for path, enum in enums(file):
        paths[path] = enum.name
        for index, value in enumerate(enum.value):
            paths[(*path, 2, index)] = value.name
    for path, service in services(file):
        paths[path] = service.name
        for index, method in enumerate(service.method):
            paths[(*path, 2, index)] = f"{service.name}.{method.name}"
    return paths


each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def test_the_contract_is_not_empty() -> None:
    assert sorted(file.name for file in FILES) == proto_files()
    assert {service.name for file in FILES for service in file.service} == {"InferenceService", "AdapterService"}


def test_stubs_are_fresh(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh, committed = generated_files(tmp_path), generated_files(PROTO_ROOT)
    assert sorted(fresh) == sorted(committed), "run `make proto`"
    stale = [name for name, content in fresh.items() if committed[name] != content]
    assert not stale, f"{stale} differ from what protoc writes now; run `make proto`"


def test_every_file_has_the_stubs_it_needs() -> None:
    committed = set(generated_files(PROTO_ROOT))
    for file in proto_files():
        stem = file.removesuffix(".proto")
        assert {f"{stem}_pb2.py", f"{stem}_pb2.pyi"} <= committed
        grpc_stubs = {f"{stem}_pb2_grpc.py", f"{stem}_pb2_grpc.pyi"}
        assert (grpc_stubs <= committed) == has_service(file)


@each_file
def test_everything_is_commented(file: FileDescriptorProto) -> None:
    comments = {tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location}
    missing = [name for path, name in commented_paths(file).items() if not comments.get(path)]
    assert not missing


@each_file
def test_package_is_versioned_and_matches_its_folder(file: FileDescriptorProto) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_.]*\.v[1-9][0-9]*", file.package)
    assert Path(file.name).parent.as_posix() == file.package.replace(".", "/")
    assert SNAKE.fullmatch(Path(file.name).stem)
    assert file.syntax == "proto3"
    assert not file.public_dependency
    assert not file.weak_dependency


@each_file
def test_message_and_field_names(file: FileDescriptorProto) -> None:
    for _, message in messages(file):
        assert PASCAL.fullmatch(message.name)
        for field in message.field:
            assert SNAKE.fullmatch(field.name), f"{message.name}.{field.name}"
            assert field.name != "descriptor"
            assert field.label != field.LABEL_REQUIRED
        for oneof in message.oneof_decl:
            assert SNAKE.fullmatch(oneof.name.removeprefix("_"))
        assert not message.extension


@each_file
def test_enum_names(file: FileDescriptorProto) -> None:
    for _, enum in enums(file):
        assert PASCAL.fullmatch(enum.name)
        assert not enum.options.allow_alias
        prefix = upper_snake(enum.name) + "_"
        first = enum.value[0]
        assert (first.name, first.number) == (prefix + "UNSPECIFIED", 0)
        for value in enum.value:
            assert UPPER_SNAKE.fullmatch(value.name)
            assert value.name.startswith(prefix)


def test_service_and_method_names() -> None:
    used: list[str] = []
    for file in FILES:
        for _, service in services(file):
            assert PASCAL.fullmatch(service.name)
            assert service.name.endswith("Service")
            for method in service.method:
                assert PASCAL.fullmatch(method.name)
                request, response = (
                    name.removeprefix(f".{file.package}.") for name in (method.input_type, method.output_type)
                )
                assert request in {f"{method.name}Request", f"{service.name}{method.name}Request"}
                assert response in {f"{method.name}Response", f"{service.name}{method.name}Response"}
                used += [request, response]
    assert len(used) == len(set(used)), "a request or response belongs to one method only"


@each_file
def test_every_import_is_used(file: FileDescriptorProto) -> None:
    types = {field.type_name for _, message in messages(file) for field in message.field if field.type_name}
    packages = {
        "adapterbay/v1/types.proto": {
            f".adapterbay.v1.{m.name}" for f in FILES if "types" in f.name for m in f.message_type
        },
        "google/protobuf/timestamp.proto": {".google.protobuf.Timestamp"},
    }
    for dependency in file.dependency:
        assert types & packages[dependency], f"{file.name} imports {dependency} for nothing"


def test_streamed_request_has_the_fields_of_the_unary_one() -> None:
    by_name = {message.name: message for file in FILES for _, message in messages(file)}
    unary, streamed = by_name["GenerateRequest"], by_name["GenerateStreamRequest"]
    assert [f.SerializeToString() for f in unary.field] == [f.SerializeToString() for f in streamed.field]
