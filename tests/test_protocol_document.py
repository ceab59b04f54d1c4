"""Holds protocol/PROTOCOL.md to the code: every message, field, error, constant and byte offset, both ways."""

from __future__ import annotations

import importlib
import re
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from expertd.protocol import PROTOCOL, layout, lifeline
from expertd.protocol.errors import ExpertdError, error_classes
from expertd.protocol.messages import MESSAGES, Sampling

DOCUMENT = Path(__file__).parents[1] / "protocol" / "PROTOCOL.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")

PARTIES = {"client", "worker", "daemon", "gateway"}

Row = dict[str, str]


# -- the document ------------------------------------------------------------------------------------------------------


def _sections() -> dict[str, str]:
    """The text under each heading, up to the next heading of any level."""
    pieces = re.split(r"(?m)^#+ (.+)$", TEXT)
    headings = pieces[1::2]
    twice = {heading for heading in headings if headings.count(heading) > 1}
    assert not twice, f"PROTOCOL.md has two sections named {twice}"
    return dict(zip(headings, pieces[2::2], strict=True))


SECTIONS = _sections()


def _table(section: str) -> list[Row]:
    """The rows of the first table in a section; backticks are taken off the cells."""
    lines = [line.strip() for line in SECTIONS.get(section, "").splitlines() if line.startswith("|")]
    if not lines:
        return []
    cells = [[cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")] for line in lines]
    head, rule, *rows = cells
    assert all(set(cell) <= {"-", " ", "|"} for cell in rule), f"{section}: the table has no rule below its head"
    for row in rows:
        assert len(row) == len(head), f"{section}: row '{row[0]}' has {len(row)} cells where the head has {len(head)}"
    return [dict(zip([name.strip() for name in head], row, strict=True)) for row in rows]


# -- the code, in the document's words ---------------------------------------------------------------------------------


def _type(kind: msgspec.inspect.Type) -> str:
    match kind:
        case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType():
            return f"list of {_type(kind.item_type)}"
        case msgspec.inspect.UnionType():
            return " or ".join(sorted((_type(one) for one in kind.types), key=lambda name: name == "nil"))
        case msgspec.inspect.StructType():
            return kind.cls.__name__
        case msgspec.inspect.LiteralType():
            return "str"
    names: dict[type, str] = {
        msgspec.inspect.IntType: "int",
        msgspec.inspect.FloatType: "float",
        msgspec.inspect.BoolType: "bool",
        msgspec.inspect.StrType: "str",
        msgspec.inspect.BytesType: "bytes",
        msgspec.inspect.NoneType: "nil",
        msgspec.inspect.DictType: "map",
    }
    return names[type(kind)]


def _range(low: int | None, high: int | None, unit: str) -> list[str]:
    if low and low == high:
        return [f"{low} {unit}"]
    if low and high:
        return [f"{low} to {high} {unit}"]
    return [f"at most {high} {unit}"] if high else []


def _bounds(kind: msgspec.inspect.Type) -> list[str]:
    match kind:
        case msgspec.inspect.IntType():
            if kind.lt is not None:
                return [f"{kind.ge} to {kind.lt - 1}"]
            return [f">= {kind.ge}"] if kind.ge is not None else []
        case msgspec.inspect.FloatType():
            low = [f">= {kind.ge:g}"] if kind.ge is not None else [f"> {kind.gt:g}"] if kind.gt is not None else []
            return low + ([f"<= {kind.le:g}"] if kind.le is not None else [])
        case msgspec.inspect.StrType():
            return _range(kind.min_length, kind.max_length, "characters")
        case msgspec.inspect.BytesType():
            return _range(kind.min_length, kind.max_length, "bytes")
        case msgspec.inspect.LiteralType():
            return [" or ".join(sorted(str(value) for value in kind.values))]
        case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType():
            each = ", ".join(_bounds(kind.item_type))
            return _range(kind.min_length, kind.max_length, "items") + ([f"each {each}"] if each else [])
        case msgspec.inspect.UnionType():
            return [bound for one in kind.types for bound in _bounds(one)]
    return []


def _default(field: msgspec.inspect.Field) -> list[str]:
    if field.required:
        return []
    value: Any = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, Sampling):
        return ["default greedy"]
    return ["default " + ("nil" if value is None else "empty" if value in (b"", "", [], ()) else str(value).lower())]


def field_rows(cls: type) -> list[tuple[str, str, str]]:
    """``(field, type, bounds)`` of a message or one of its structures, as its table in the document has them."""
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, msgspec.inspect.StructType)
    return [
        (field.encode_name, _type(field.type), "; ".join(_bounds(field.type) + _default(field)) or "none")
        for field in info.fields
    ]


def structures() -> list[type]:
    """Every structure inside a message."""
    found: dict[type, None] = {}

    def visit(kind: Any) -> None:
        if isinstance(kind, msgspec.inspect.StructType):
            if kind.cls not in MESSAGES:
                found[kind.cls] = None
            for field in kind.fields:
                visit(field.type)
        for inner in (getattr(kind, "item_type", None), *getattr(kind, "types", ())):
            if inner is not None:
                visit(inner)

    for message in MESSAGES:
        visit(msgspec.inspect.type_info(message))
    return list(found)


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*MESSAGES, *structures()], ids=lambda cls: cls.__name__)
def test_the_table_of_a_message_has_its_fields(cls: type) -> None:
    name = cls.__name__
    assert name in SECTIONS, f"PROTOCOL.md has no section '{name}': add one with a table of its fields"
    documented = [(row["field"], row["type"], row["bounds"]) for row in _table(name)]
    expected = field_rows(cls)
    wanted = "\n".join(f"| `{field}` | {kind} | {bounds} | ... |" for field, kind, bounds in expected)
    assert documented == expected, f"edit the table of '{name}' in protocol/PROTOCOL.md; the code has\n{wanted}"
    assert all(row["meaning"] for row in _table(name)), f"'{name}': a field has no meaning"
    assert expected or "No fields." in SECTIONS[name], f"'{name}' has no fields: say 'No fields.'"


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_a_message_says_who_sends_it_to_whom(cls: type) -> None:
    first = SECTIONS[cls.__name__].strip().splitlines()[0]
    directions = re.findall(r"(\w+) -> (\w+)", first)
    assert directions, f"'{cls.__name__}' begins without its direction, as 'worker -> daemon'"
    assert {party for direction in directions for party in direction} <= PARTIES


def test_no_section_describes_a_message_that_does_not_exist() -> None:
    known = {cls.__name__ for cls in (*MESSAGES, *structures())}
    described = {name for name in SECTIONS if (rows := _table(name)) and "field" in rows[0]}
    described |= {name for name, text in SECTIONS.items() if "No fields." in text}
    assert described == known, f"remove from protocol/PROTOCOL.md, or add to the code: {described ^ known}"


def test_every_message_in_the_text_exists() -> None:
    listed = re.findall(r"`([a-z]+)`", SECTIONS["Types"])
    assert sorted(listed) == sorted(cls.__name__.lower() for cls in MESSAGES), "edit the list of types in PROTOCOL.md"


# -- errors ------------------------------------------------------------------------------------------------------------


def _error_row(cls: type[ExpertdError]) -> Row:
    return {
        "code": cls.code,
        "class": cls.__name__,
        "exit": str(cls.exit_status),
        "HTTP": str(cls.http_status),
        "retryable": "yes" if cls.retryable else "no",
    }


@pytest.mark.parametrize("cls", error_classes().values(), ids=lambda cls: cls.code)
def test_the_table_of_errors_has_each_as_it_is(cls: type[ExpertdError]) -> None:
    rows = [row for row in _table("Errors") if row["code"] == cls.code]
    expected = _error_row(cls)
    assert len(rows) == 1, f"the table 'Errors' in protocol/PROTOCOL.md has {len(rows)} rows {cls.code}; add {expected}"
    documented = {key: value for key, value in rows[0].items() if key != "meaning"}
    assert documented == expected, f"edit the row {cls.code} of the table 'Errors' in protocol/PROTOCOL.md"
    assert rows[0]["meaning"]


def test_the_table_of_errors_has_no_others() -> None:
    unknown = {row["code"] for row in _table("Errors")} - set(error_classes())
    assert not unknown, f"remove from the table 'Errors' in protocol/PROTOCOL.md: {unknown}"


# -- versions, constants, bytes ----------------------------------------------------------------------------------------


def test_the_document_is_of_the_version_that_the_code_speaks() -> None:
    found = re.search(r"(?m)^Protocol version: (\d+)$", TEXT)
    assert found is not None
    assert int(found.group(1)) == PROTOCOL, "edit 'Protocol version' in protocol/PROTOCOL.md"


def test_the_changelog_begins_with_the_version_that_the_code_speaks() -> None:
    entries = re.findall(r"(?m)^\* \*\*(\d+)\*\*", SECTIONS["Changelog"])
    assert [int(entry) for entry in entries] == list(range(PROTOCOL, 0, -1)), "edit 'Changelog' in protocol/PROTOCOL.md"


@pytest.mark.parametrize("row", _table("Constants"), ids=lambda row: row["name"])
def test_a_constant_has_the_value_that_the_code_has(row: Row) -> None:
    module, _, name = row["name"].rpartition(".")
    value = getattr(importlib.import_module(f"expertd.{module}"), name)
    if isinstance(value, bytes):
        value = value.decode("ascii").replace("\0", "\\0")
    assert row["value"] == str(value).removesuffix(".0"), f"edit {row['name']} in the table 'Constants' of PROTOCOL.md"


NEEDED = {
    "protocol.PROTOCOL",
    "protocol.messages.FRAME_LIMIT",
    "protocol.layout.LAYOUT",
    "protocol.layout.PAGE",
    "protocol.layout.SLAB_ELEMENTS",
    "protocol.layout.ABSENT",
    "protocol.layout._MAGIC",
    "protocol.layout._TABLE_OFFSET",
    "protocol.paths.SOCKET_PATH_BYTES",
}


def test_the_constants_of_the_wire_and_of_the_layout_are_in_the_table() -> None:
    missing = NEEDED - {row["name"] for row in _table("Constants")}
    assert not missing, f"add to the table 'Constants' of protocol/PROTOCOL.md: {missing}"


def _pieces(packed: struct.Struct) -> list[tuple[str, str]]:
    """``(offset, size)`` of the fields of a packed structure."""
    offset, out = 0, []
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", packed.format):
        size = struct.calcsize(f"<{count}{kind}")
        out.append((str(offset), str(size)))
        offset += size
    return out


@pytest.mark.parametrize(
    ("section", "packed"),
    [
        ("Greeting", lifeline.GREETING),
        ("Segment packet", lifeline._SEGMENT),
        ("Segment header", layout._HEADER),
        ("Segment contents", layout._CONTENTS),
    ],
)
def test_the_bytes_lie_where_the_table_says(section: str, packed: struct.Struct) -> None:
    documented = [(row["offset"], row["bytes"]) for row in _table(section)]
    assert packed.format.startswith("<")
    assert documented == _pieces(packed), f"edit the table '{section}' in protocol/PROTOCOL.md"


def test_the_answer_to_a_greeting_is_the_byte_of_the_document() -> None:
    assert f"0x{lifeline._KNOWN.hex()}" in SECTIONS["Greeting"], "edit 'Greeting' in protocol/PROTOCOL.md"


def test_lines_are_at_most_120_characters_long() -> None:
    long = [n for n, line in enumerate(TEXT.splitlines(), 1) if len(line) > 120 and not line.startswith("|")]
    assert not long, f"wrap these lines of protocol/PROTOCOL.md: {long}"
