"""The codec of messages, the tree of errors, and the routing log's bytes.

That PROTOCOL.md says the same is ``test_protocol_document.py``; what a daemon does with messages is
``test_daemon_process.py``.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.protocol import errors
from expertd.protocol.errors import ExpertdError, MessageInvalid, error_classes, from_code
from expertd.protocol.messages import (
    FRAME_LIMIT,
    MESSAGES,
    AskStatus,
    Attach,
    Delta,
    Detach,
    Error,
    Fetch,
    Message,
    Status,
    Stop,
    Welcome,
    decode,
    encode,
    expect,
)
from expertd.protocol.routing import pack, unpack

MESSAGE_IDS = [cls.__name__ for cls in MESSAGES]
SMALL = {"max_size": 3}


def _values(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Values that a field of type ``kind`` may have."""
    match kind:
        case msgspec.inspect.IntType():
            low = kind.ge if kind.ge is not None else -(2**63)
            return st.integers(low, kind.lt - 1 if kind.lt is not None else 2**64 - 1)
        case msgspec.inspect.FloatType():
            return st.floats(
                kind.gt if kind.gt is not None else kind.ge,
                kind.le,
                exclude_min=kind.gt is not None,
                allow_nan=False,
            )
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.StrType():
            return st.text(max_size=20)
        case msgspec.inspect.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=min(kind.max_length or 20, 20))
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.LiteralType():
            return st.sampled_from(list(kind.values))
        case msgspec.inspect.UnionType():
            return st.one_of([_values(one) for one in kind.types])
        case msgspec.inspect.ListType():
            return st.lists(_values(kind.item_type), min_size=kind.min_length or 0, max_size=3)
        case msgspec.inspect.VarTupleType():
            return st.lists(_values(kind.item_type), max_size=3).map(tuple)
        case msgspec.inspect.DictType():
            return st.dictionaries(_values(kind.key_type), _values(kind.value_type), max_size=3)
        case msgspec.inspect.StructType():
            return st.builds(kind.cls, **{field.name: _values(field.type) for field in kind.fields})
        case msgspec.inspect.AnyType():
            return st.one_of(st.none(), st.booleans(), st.text(**SMALL), st.lists(st.text(**SMALL), **SMALL))
    raise AssertionError(f"no values for {kind}")


def _messages(cls: type[Message]) -> st.SearchStrategy[Any]:
    return _values(msgspec.inspect.type_info(cls))


def _fields(cls: type[Message]) -> dict[str, Any]:
    """The map of a fixed valid message of ``cls``: the least of each field."""
    return {"type": cls.__name__.lower(), **{f.name: _least(f.type) for f in _struct(cls).fields}}


def _struct(cls: type[Message]) -> msgspec.inspect.StructType:
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, msgspec.inspect.StructType)
    return info


def _least(kind: msgspec.inspect.Type) -> Any:
    match kind:
        case msgspec.inspect.IntType():
            return kind.ge or 0
        case msgspec.inspect.FloatType():
            return 1.0
        case msgspec.inspect.BoolType():
            return False
        case msgspec.inspect.StrType():
            return ""
        case msgspec.inspect.BytesType():
            return bytes(kind.min_length or 0)
        case msgspec.inspect.LiteralType():
            return kind.values[0]
        case msgspec.inspect.UnionType():
            return None
        case msgspec.inspect.ListType():
            return [_least(kind.item_type)] * (kind.min_length or 0)
        case msgspec.inspect.VarTupleType():
            return []
        case msgspec.inspect.DictType():
            return {}
        case msgspec.inspect.StructType():
            return {field.name: _least(field.type) for field in kind.fields}
    raise AssertionError(f"no least value for {kind}")


# -- the codec ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MESSAGES, ids=MESSAGE_IDS)
def test_a_message_comes_back_as_it_was_sent(cls: type[Message]) -> None:
    @settings(max_examples=20, deadline=None)
    @given(_messages(cls))
    def check(message: Message) -> None:
        assert decode(encode(message)) == message

    check()


@pytest.mark.parametrize("cls", MESSAGES, ids=MESSAGE_IDS)
def test_a_frame_is_a_map_with_its_type(cls: type[Message]) -> None:
    fields = _fields(cls)
    again = msgspec.msgpack.decode(encode(decode(msgspec.msgpack.encode(fields))))
    assert again == fields


@pytest.mark.parametrize("cls", MESSAGES, ids=MESSAGE_IDS)
def test_fields_that_are_not_known_are_ignored(cls: type[Message]) -> None:
    fields = _fields(cls)
    more = {**fields, "zz_new": {"deep": [1, None, b"x"]}}
    assert decode(msgspec.msgpack.encode(more)) == decode(msgspec.msgpack.encode(fields))


def _broken(cls: type[Message]) -> list[tuple[str, dict[str, Any]]]:
    fields = _fields(cls)
    out = []
    for field in _struct(cls).fields:
        if field.required:
            out.append((f"without {field.name}", {k: v for k, v in fields.items() if k != field.name}))
        wrong: Any = 7 if isinstance(fields[field.name], dict) else {"not": "this"}
        out.append((f"wrong {field.name}", {**fields, field.name: wrong}))
    return out


BROKEN = [(f"{cls.__name__} {how}", fields) for cls in MESSAGES for how, fields in _broken(cls)]


@pytest.mark.parametrize("fields", [fields for _, fields in BROKEN], ids=[how for how, _ in BROKEN])
def test_a_missing_field_or_a_wrong_type_is_message_invalid(fields: dict[str, Any]) -> None:
    with pytest.raises(MessageInvalid):
        decode(msgspec.msgpack.encode(fields))


OUT_OF_BOUNDS = [
    {**_fields(Fetch), "layer": -1},
    {**_fields(Fetch), "layer": 2**64 - 1, "sequence": -(2**63)},
    {**_fields(Fetch), "experts": []},
    {**_fields(Fetch), "experts": [65536]},
    {**_fields(Fetch), "experts": [-1]},
    {**_fields(Fetch), "experts": [0] * 65537},
    {**_fields(Fetch), "routing": bytes((8 << 20) + 1)},
    {**_fields(Attach), "token": bytes(15)},
    {**_fields(Attach), "token": bytes(17)},
    {**_fields(Attach), "mode": "file"},
    {**_fields(Error), "code": "x" * 4097},
    {**_fields(Delta), "text": "x" * ((1 << 24) + 1)},
    {"type": "generate", "request": 1, "messages": [], "max_tokens": 0},
    {"type": "generate", "request": 1, "messages": [], "max_tokens": 1, "sampling": {"temperature": -0.1}},
    {"type": "generate", "request": 1, "messages": [], "max_tokens": 1, "sampling": {"temperature": float("nan")}},
    {"type": "generate", "request": 1, "messages": [], "max_tokens": 1, "sampling": {"top_p": 0.0}},
    {"type": "generate", "request": 1, "messages": [], "max_tokens": 1, "sampling": {"top_p": 1.1}},
    {"type": "finished", "request": 1, "reason": "error", "prompt_tokens": 1, "completion_tokens": 1},
]


@pytest.mark.parametrize("number", range(len(OUT_OF_BOUNDS)))
def test_what_is_out_of_bounds_is_message_invalid(number: int) -> None:
    with pytest.raises(MessageInvalid):
        decode(msgspec.msgpack.encode(OUT_OF_BOUNDS[number]))


NO_MESSAGES = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "a number": b"\x07",
    "an array": b"\x91\xa4stop",
    "nil": b"\xc0",
    "a map without type": b"\x80",
    "an unknown type": msgspec.msgpack.encode({"type": "evict"}),
    "a type in capitals": msgspec.msgpack.encode({"type": "Stop"}),
    "a type that is a number": msgspec.msgpack.encode({"type": 3}),
    "a type that is not text": b"\x81\xa4type\xa2\xff\xfe",
    "something behind it": encode(Stop()) + b"\x00",
    "JSON": b'{"type": "stop"}',
    "cut short": encode(Detach(session=300))[:-1],
    "a list that claims 2^32 entries": b"\x82\xa4type\xa8resident\xa5slots\xdd\xff\xff\xff\xff",
    "nested without end": b"\x82\xa4type\xa4stop\xa1z" + b"\x91" * 200_000,
    "nested without end where anything goes": b"\x82\xa4type\xa8generate\xa8messages\x91\x81\xa1a" + b"\x91" * 200_000,
}


@pytest.mark.parametrize("frame", NO_MESSAGES.values(), ids=NO_MESSAGES.keys())
def test_what_is_no_message_is_message_invalid(frame: bytes) -> None:
    with pytest.raises(MessageInvalid):
        decode(frame)


def test_a_frame_over_the_limit_is_message_invalid() -> None:
    with pytest.raises(MessageInvalid, match="longer than"):
        decode(bytes(FRAME_LIMIT + 1))


def _decode_or_refuse(frame: bytes) -> None:
    try:
        decode(frame)
    except MessageInvalid:
        pass


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(frame: bytes) -> None:
    _decode_or_refuse(frame)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(MESSAGES).flatmap(_messages),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 10_000),
)
def test_damaged_messages_raise_nothing_else(message: Message, damage: list[tuple[int, int]], cut: int) -> None:
    frame = bytearray(encode(message))
    for place, byte in damage:
        frame[place % len(frame)] = byte
    _decode_or_refuse(bytes(frame))
    _decode_or_refuse(bytes(frame[: cut % len(frame)]))


ANYTHING = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(**SMALL), st.binary(**SMALL)
    ),
    lambda inner: st.one_of(st.lists(inner, **SMALL), st.dictionaries(st.text(**SMALL), inner, **SMALL)),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_any_value_in_any_field_raises_nothing_else(cls: type[Message], data: st.DataObject) -> None:
    fields = _fields(cls) if cls.__name__ != "Generate" else {"type": "generate"}
    name = data.draw(st.sampled_from([*fields]))
    _decode_or_refuse(msgspec.msgpack.encode({**fields, name: data.draw(ANYTHING)}))


def test_a_status_that_tells_of_no_layers_is_understood() -> None:
    (models,) = (field.type for field in _struct(Status).fields if field.name == "models")
    assert isinstance(models, msgspec.inspect.ListType)
    model = _least(models.item_type)
    del model["layers"]
    found = decode(msgspec.msgpack.encode({**_fields(Status), "models": [model]}))
    assert expect(found, Status).models[0].layers == []


def test_expect_gives_the_message_that_was_expected() -> None:
    stop = Stop()
    assert expect(stop, Stop) is stop


def test_expect_raises_the_error_that_came_instead() -> None:
    with pytest.raises(errors.BudgetTooSmall, match="too small"):
        expect(Error(code="budget_too_small", message="too small"), Welcome)


def test_expect_refuses_another_message() -> None:
    with pytest.raises(MessageInvalid, match="Welcome was expected and AskStatus came"):
        expect(AskStatus(), Welcome)


# -- errors ------------------------------------------------------------------------------------------------------------


def _all_errors() -> list[type[ExpertdError]]:
    found: list[type[ExpertdError]] = []
    todo: list[type[ExpertdError]] = [ExpertdError]
    while todo:
        found.append(cls := todo.pop())
        todo += cls.__subclasses__()
    return found


@pytest.mark.parametrize("cls", _all_errors(), ids=lambda cls: cls.__name__)
def test_an_error_crosses_the_wire_and_comes_back_as_its_class(cls: type[ExpertdError]) -> None:
    message = decode(encode(Error.of(cls("what happened"), 7)))
    assert isinstance(message, Error)
    assert message.sequence == 7
    back = message.exception()
    assert type(back) is cls
    assert (back.message, str(back)) == ("what happened", "what happened")


def test_a_code_that_is_not_known_becomes_a_plain_error() -> None:
    back = from_code("from_the_future", "what happened")
    assert type(back) is ExpertdError
    assert back.message == "what happened"


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in _all_errors()]
    assert sorted(codes) == sorted(set(codes))
    assert error_classes() == {cls.code: cls for cls in _all_errors()}


def test_codes_are_lower_case_words() -> None:
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in error_classes())


def test_a_message_for_the_user_is_needed() -> None:
    with pytest.raises(TypeError):
        ExpertdError()  # type: ignore[call-arg]


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    assert errors.__doc__ is not None
    drawn: list[tuple[str, str, str]] = []
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        found = re.fullmatch(r" {4}((?:[| ] {3})*)(?:(?:\||`)-- )?([A-Z]\w+) +([a-z_]+)", line)
        if found is None:
            continue
        depth = 0 if "-- " not in line else len(found.group(1)) // 4 + 1
        path[depth:] = [found.group(2)]
        drawn.append((found.group(2), found.group(3), path[depth - 1] if depth else "Exception"))
    real = [(cls.__name__, cls.code, cls.__bases__[0].__name__) for cls in _all_errors()]
    assert sorted(drawn) == sorted(real), "edit the tree at the top of protocol/errors.py"


# -- the routing log ---------------------------------------------------------------------------------------------------

RECORDS = st.lists(
    st.tuples(st.integers(0, 65535), st.lists(st.integers(0, 65535), unique=True, max_size=20)), max_size=10
)


@settings(deadline=None)
@given(RECORDS, st.integers(1, 3))
def test_a_routing_log_comes_back_without_repetitions(records: list[tuple[int, list[int]]], times: int) -> None:
    log = b"".join(pack(layer, experts * times) for layer, experts in records)
    assert list(unpack(log)) == records


def test_a_record_is_layer_count_and_experts_in_little_endian() -> None:
    assert pack(3, [1, 258]) == bytes([3, 0, 2, 0, 1, 0, 2, 1])


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_random_routing_bytes_are_records_or_message_invalid(log: bytes) -> None:
    try:
        records = list(unpack(log))
    except MessageInvalid:
        return
    assert b"".join(pack(layer, experts) for layer, experts in records) == log


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6, 7])
def test_a_routing_log_that_ends_inside_a_record_is_message_invalid(cut: int) -> None:
    with pytest.raises(MessageInvalid):
        list(unpack(pack(3, [1, 2])[:cut]))
