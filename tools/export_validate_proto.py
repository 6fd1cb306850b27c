"""Writes buf/validate/validate.proto, which our protos import, into a folder.

The file is the protovalidate project's, not ours, and no package of a Python registry ships its text. The locked
`protovalidate` wheel carries its descriptor; this prints that descriptor as a .proto file, so that buf, protoc, foreign
generators and the validator at run time agree on one version. tools/generate.sh keeps protos/buf up to date with it.

    python tools/export_validate_proto.py FOLDER
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf import descriptor_pb2 as d
from google.protobuf import duration_pb2, field_mask_pb2, message_factory, text_format, timestamp_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from protovalidate._gen.buf.validate import validate_pb

NAME = "buf/validate/validate.proto"
LABELS = {1: "optional ", 2: "required ", 3: "repeated "}
LAST_FIELD_NUMBER = 536870911


class Printer:
    def __init__(self, file: d.FileDescriptorProto) -> None:
        self.file = file
        self.syntax = file.syntax or "proto2"
        # Parsing the options again with a pool that knows the file turns unknown bytes into the file's own extensions.
        self.pool = DescriptorPool()
        for known in (d.DESCRIPTOR, duration_pb2.DESCRIPTOR, field_mask_pb2.DESCRIPTOR, timestamp_pb2.DESCRIPTOR):
            self.pool.AddSerializedFile(known.serialized_pb)
        self.pool.AddSerializedFile(file.SerializeToString())
        message_factory.GetMessageClassesForFiles([file.name], self.pool)

    def text(self) -> str:
        return "\n".join(self.lines()) + "\n"

    def lines(self) -> Iterator[str]:
        yield f"// Printed by tools/export_validate_proto.py from the descriptor in the protovalidate wheel: {NAME}."
        yield "// Copyright Buf Technologies, Inc. Licensed under the Apache License, Version 2.0."
        yield f'syntax = "{self.syntax}";'
        yield f"package {self.file.package};"
        for dependency in self.file.dependency:
            yield f'import "{dependency}";'
        for statement in self.options("google.protobuf.FileOptions", self.file.options):
            yield f"option {statement};"
        for enum in self.file.enum_type:
            yield from self.enum(enum)
        for message in self.file.message_type:
            yield from self.message(message)
        yield from self.extensions(self.file.extension)

    def message(self, message: d.DescriptorProto) -> Iterator[str]:
        yield f"message {message.name} {{"
        for statement in self.options("google.protobuf.MessageOptions", message.options):
            yield f"option {statement};"
        for enum in message.enum_type:
            yield from self.enum(enum)
        for nested in message.nested_type:
            if nested.options.map_entry:
                raise NotImplementedError(f"{message.name}: map fields")
            yield from self.message(nested)
        printed: set[int] = set()
        for field in message.field:
            if not field.HasField("oneof_index"):
                yield self.field(field)
            elif field.oneof_index not in printed:
                printed.add(field.oneof_index)
                yield from self.oneof(message, field.oneof_index)
        for extension_range in message.extension_range:
            last = extension_range.end - 1
            yield f"extensions {extension_range.start} to {'max' if last == LAST_FIELD_NUMBER else last};"
        for reserved in message.reserved_range:
            yield f"reserved {reserved.start} to {reserved.end - 1};"
        for name in message.reserved_name:
            yield f'reserved "{name}";'
        yield from self.extensions(message.extension)
        yield "}"

    def oneof(self, message: d.DescriptorProto, index: int) -> Iterator[str]:
        oneof = message.oneof_decl[index]
        yield f"oneof {oneof.name} {{"
        for statement in self.options("google.protobuf.OneofOptions", oneof.options):
            yield f"option {statement};"
        for field in message.field:
            if field.HasField("oneof_index") and field.oneof_index == index:
                yield self.field(field, label="")
        yield "}"

    def extensions(self, extensions: Sequence[d.FieldDescriptorProto]) -> Iterator[str]:
        for extension in extensions:
            yield f"extend {extension.extendee} {{ {self.field(extension)} }}"

    def field(self, field: d.FieldDescriptorProto, label: str | None = None) -> str:
        if field.HasField("default_value"):
            raise NotImplementedError(f"{field.name}: default values")
        kind = field.type_name or d.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        options = ", ".join(self.options("google.protobuf.FieldOptions", field.options))
        label = LABELS[field.label] if label is None else label
        return f"{label}{kind} {field.name} = {field.number}{f' [{options}]' if options else ''};"

    def enum(self, enum: d.EnumDescriptorProto) -> Iterator[str]:
        yield f"enum {enum.name} {{"
        for statement in self.options("google.protobuf.EnumOptions", enum.options):
            yield f"option {statement};"
        for value in enum.value:
            options = ", ".join(self.options("google.protobuf.EnumValueOptions", value.options))
            yield f"{value.name} = {value.number}{f' [{options}]' if options else ''};"
        yield "}"

    def options(self, kind: str, options: Message) -> Iterator[str]:
        descriptor = self.pool.FindMessageTypeByName(kind)
        parsed = message_factory.GetMessageClass(descriptor).FromString(options.SerializeToString())
        for field, value in parsed.ListFields():
            name = f"(.{field.full_name})" if field.is_extension else field.name
            for item in value if field.is_repeated else [value]:
                if field.message_type:
                    text = text_format.MessageToString(item, as_one_line=True, descriptor_pool=self.pool)
                    yield f"{name} = {{ {text} }}"
                else:
                    yield f"{name} = {self.scalar(field, item)}"

    @staticmethod
    def scalar(field: object, item: object) -> str:
        enum = getattr(field, "enum_type", None)
        if enum is not None:
            return str(enum.values_by_number[item].name)
        if isinstance(item, bool):
            return str(item).lower()
        if isinstance(item, str):
            return json.dumps(item)
        return str(item)


def main() -> None:
    file = d.FileDescriptorProto.FromString(validate_pb._DESC.proto.to_binary())
    path = Path(sys.argv[1]) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Printer(file).text())


if __name__ == "__main__":
    main()
