"""Wire conformance: our protos are, field by field, the ones published clients were generated from.

The comparison reads the serialized descriptor out of a generated file without importing it: two files that register
the package `inference` cannot share a process.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)

from service.pb import grpc_service_pb2, model_config_pb2
from tests.conformance.test_tritonclient import CURRENT, REQUIREMENTS
from tests.support.venvs import python_with

GOLDEN = Path(__file__).parent / "protocol.txt"


@pytest.fixture(scope="module")
def ours() -> list[str]:
    modules = (grpc_service_pb2.__file__, model_config_pb2.__file__)
    return sorted(fact for path in modules for fact in facts(file_of(path)))


def file_of(path: str | Path) -> FileDescriptorProto:
    """The file descriptor inside the generated module at `path`: its longest bytes literal."""
    literals = [
        node.value
        for node in ast.walk(ast.parse(Path(path).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, bytes)
    ]
    return FileDescriptorProto.FromString(max(literals, key=len))


def facts(file: FileDescriptorProto) -> list[str]:
    """Everything of a file that is visible on the wire or in JSON and text format, one line each, order-free."""
    lines = [f"package {file.package} {file.syntax}"]
    for enum in file.enum_type:
        lines += enum_facts(file.package, enum)
    for message in file.message_type:
        lines += message_facts(file.package, message)
    for service in file.service:
        for method in service.method:
            stream = f"{'stream ' * method.client_streaming}{method.input_type}"
            answer = f"{'stream ' * method.server_streaming}{method.output_type}"
            lines.append(f"rpc {file.package}.{service.name}/{method.name} {stream} -> {answer}")
    return lines


def enum_facts(scope: str, enum: EnumDescriptorProto) -> Iterator[str]:
    for value in enum.value:
        yield f"enum {scope}.{enum.name} {value.name} = {value.number}"


def message_facts(scope: str, message: DescriptorProto) -> list[str]:
    name = f"{scope}.{message.name}"
    lines = [f"message {name} map_entry={message.options.map_entry}"]
    for enum in message.enum_type:
        lines += enum_facts(name, enum)
    for nested in message.nested_type:
        lines += message_facts(name, nested)
    for field in message.field:
        kind = FieldDescriptorProto.Type.Name(field.type)
        label = FieldDescriptorProto.Label.Name(field.label)
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else "-"
        packed = field.options.packed if field.options.HasField("packed") else "-"
        lines.append(
            f"field {name}.{field.name} = {field.number} {label} {kind} {field.type_name or '-'} oneof={oneof} "
            f"json={field.json_name} optional={field.proto3_optional} packed={packed}"
        )
    return lines


def test_every_message_field_and_enum_is_the_published_one(ours: list[str]) -> None:
    """Names, numbers, types, labels, oneofs and enum values equal the list taken from tritonclient 2.73.0."""
    assert ours == GOLDEN.read_text().splitlines()


def test_the_installed_client_speaks_the_same_protocol(ours: list[str]) -> None:
    """The list is not older than the client that the conformance tests drive."""
    where = "import tritonclient; print(tritonclient.__path__[0])"
    answer = subprocess.run(
        [python_with(*REQUIREMENTS[CURRENT]), "-c", where], capture_output=True, text=True, check=True
    )
    folder = Path(answer.stdout.strip()) / "grpc"
    theirs = facts(file_of(folder / "service_pb2.py")) + facts(file_of(folder / "model_config_pb2.py"))
    assert ours == sorted(theirs)


def test_all_twenty_calls_are_described() -> None:
    """Reflection can list the service: its descriptor is in the generated file."""
    service = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert len(service.methods) == 20
    assert [m.name for m in service.methods if m.client_streaming or m.server_streaming] == ["ModelStreamInfer"]
