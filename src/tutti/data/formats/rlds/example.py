"""tf.train.Example without TensorFlow: a record's features by key, each parsed when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from tutti.data.formats.errors import data_error
from tutti.errors import UserError

List = Literal["bytes_list", "float_list", "int64_list"]
MAX_STEPS = 1_000_000
"""Most steps of an episode."""
STEPS_EXPECTED = "an integer for each step of the episode"
_VARINT = 11
"""Bytes that a number takes at most, with its tag where it is not packed."""


@cache
def messages() -> tuple[type[Message], type[Message]]:
    """The classes of an Example and of a Feature, by a descriptor made here.

    In this Example the value of each key is declared as bytes, those of a Feature, which is the same on the
    wire: what nobody asks for is neither parsed nor copied.
    """
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="tutti/example.proto", package="tutti", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, bool]) -> Any:
        made = file.message_type.add(name=name)
        for number, (field, type_, repeated) in enumerate(fields, 1):
            label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=type_, label=label)
        return made

    for name, of in (("Bytes", kind.TYPE_BYTES), ("Float", kind.TYPE_FLOAT), ("Int64", kind.TYPE_INT64)):
        message(f"{name}List", ("value", of, True))
    lists = ("Bytes", "Float", "Int64")
    feature = message("Feature", *((f"{name.lower()}_list", kind.TYPE_MESSAGE, False) for name in lists))
    feature.oneof_decl.add(name="kind")
    for field, name in zip(feature.field, lists, strict=True):
        field.type_name, field.oneof_index = f".tutti.{name}List", 0
    message("Entry", ("key", kind.TYPE_BYTES, False), ("value", kind.TYPE_BYTES, False))
    message("Features", ("feature", kind.TYPE_MESSAGE, True)).field[0].type_name = ".tutti.Entry"
    message("Example", ("features", kind.TYPE_MESSAGE, False)).field[0].type_name = ".tutti.Features"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    classes = (pool.FindMessageTypeByName(f"tutti.{name}") for name in ("Example", "Feature"))
    example, feature = map(message_factory.GetMessageClass, classes)
    return example, feature


def count_values(feature: bytes) -> int:
    """How many integers a Feature has. Raises: ValueError if it is none, or has more than MAX_STEPS."""
    if not feature:
        raise ValueError("it is missing")
    if len(feature) > _VARINT * MAX_STEPS:
        raise ValueError(f"more than {MAX_STEPS:,} steps")
    try:
        parsed: Any = messages()[1].FromString(feature)
    except DecodeError:
        raise ValueError("it is damaged") from None
    if parsed.WhichOneof("kind") in ("bytes_list", "float_list"):
        raise ValueError("expected integers")
    return len(parsed.int64_list.value)


class Record:
    """An Example's features by key; `where` names it in messages.

    Raises: UserError if it is damaged, or a feature is not what was promised.
    """

    def __init__(self, content: bytes, where: str) -> None:
        self._where = where
        try:
            example: Any = messages()[0].FromString(content)
        except DecodeError:
            raise self.wrong("its record is damaged", "a tf.train.Example") from None
        self._entries = {entry.key: entry for entry in example.features.feature}

    def wrong(self, problem: str, expected: object = "", found: object = "") -> UserError:
        """An error about this record."""
        return data_error(f"{self._where}: {problem}.", expected=expected, found=found)

    def stored(self, key: str) -> bytes:
        """The Feature of `key` as it is stored; empty where there is none."""
        entry = self._entries.get(key.encode())
        return b"" if entry is None else entry.value

    def count(self, key: str) -> int:
        """How many integers `key` has, at most MAX_STEPS."""
        try:
            return count_values(self.stored(key))
        except ValueError as error:
            raise self.wrong(f"{key}: {error}", STEPS_EXPECTED) from None

    def values(self, key: str, kind: List, count: int, *, optional: bool = False) -> Sequence[Any] | None:
        """The list of `count` values of `key`; None where it is `optional` and missing or empty."""
        feature = self.stored(key)
        if kind != "bytes_list" and len(feature) > _VARINT * (count + 8):
            raise self.wrong(f"{key} has too many values", f"{count:,}", f"{len(feature):,} bytes")
        try:
            parsed: Any = messages()[1].FromString(feature)
        except DecodeError:
            raise self.wrong(f"{key} is damaged", "a feature of a tf.train.Example") from None
        found = parsed.WhichOneof("kind")
        values = getattr(parsed, found or kind).value
        if not values and optional and count:
            return None
        if not values and not feature and count:
            raise self.wrong(f"{key} is missing", "the features of features.json")
        if found not in (kind, None):
            raise self.wrong(f"{key} holds values of another type", kind, found)
        if len(values) != count:
            raise self.wrong(f"{key} has {len(values):,} values", f"{count:,}, by steps and features.json")
        return values
