"""Calls of tools, told while they are written: in every format, however the text is cut into pieces."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from expertd.protocol.messages import ToolCall
from expertd.worker.calls import Calls
from expertd.worker.json_object import JsonObject

PROPERTIES = {"path": {"type": "string"}, "count": {"type": "integer"}, "parts": {"type": "array"}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": PROPERTIES}}}
    for name in ("write_file", "now")
]

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)
CUTS = st.lists(st.integers(0, 400), max_size=30)


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(places)]


def every_character(text: str) -> list[str]:
    return list(text)


def parser(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call


def told(name: str, texts: Iterable[str], cut: bool = False) -> tuple[list[tuple[str, str]], list[ToolCall], str]:
    """The calls that the pieces make (name and arguments), the pieces that came before the end, and what is no call."""
    calls = Calls(parser(name), TOOLS)
    early = [piece for text in texts for piece in calls.feed(text)]
    late, text = calls.close(cut)
    found: list[tuple[str, str]] = []
    for piece in [*early, *late]:
        if piece.id:
            found.append((piece.name, piece.arguments))
        else:
            assert not piece.name
            found[-1] = (found[-1][0], found[-1][1] + piece.arguments)
    ids = [piece.id for piece in [*early, *late] if piece.id]
    assert len(ids) == len(set(ids))
    return found, early, text


# -- JSON --------------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(OBJECTS, st.booleans(), st.sampled_from([None, 2]), CUTS)
def test_an_object_is_read_in_any_pieces(
    given: dict[str, Any], ascii: bool, indent: int | None, cuts: list[int]
) -> None:
    text = json.dumps(given, ensure_ascii=ascii, indent=indent)
    found = JsonObject()
    assert sum(found.feed(piece) for piece in pieces(f" \n{text} }}", cuts)) == len(text) + 2
    assert (found.text, found.complete) == (text, True)
    assert {name: json.loads(value) for name, value in found.members.items()} == given


def no_constant(name: str) -> None:
    raise ValueError(name)


@settings(max_examples=100)
@given(OBJECTS, st.data())
def test_what_python_s_reader_refuses_is_not_taken(given: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(given, ensure_ascii=False)
    place = data.draw(st.integers(0, len(text)))
    wrong = text[:place] + data.draw(st.sampled_from('{}[]",:\\0123.eE+-tfn \n\x01')) + text[place + 1 :]
    found = JsonObject()
    taken = found.feed(wrong)
    try:
        value, end = json.JSONDecoder(parse_constant=no_constant).raw_decode(wrong.lstrip())
    except ValueError:
        assert not found.complete
    else:
        assert found.complete == isinstance(value, dict)
        assert not found.complete or found.text == wrong.lstrip()[:end]
    assert found.broken == (not found.complete and taken < len(wrong))


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (r'{"a": "\ud83d\ude00"}', r'{"a": "\ud83d\ude00"}'),
        (r'{"a": "x\ud83d y"}', r'{"a": "x\ud83d'),
        (r'{"a": "x\ud83d\n"}', r'{"a": "x\ud83d' + "\\"),
        (r'{"a": "x\ud83d\ud83d"}', r'{"a": "x\ud83d\ud83'),
        (r'{"a": "x\ud83d"}', r'{"a": "x\ud83d'),
        (r'{"a": "x\ude00"}', r'{"a": "x\ude0'),
        (r'{"\ud83d": 1}', r'{"\ud83d'),
    ],
)
def test_half_of_a_surrogate_pair_is_no_character(text: str, taken: str) -> None:
    found = JsonObject()
    found.feed(text)
    assert found.text == taken
    assert found.complete == (text == taken) and found.broken == (text != taken)
    assert found.settled == (text if found.complete else text[: text.index("\\")])


def test_an_escape_is_told_when_it_is_whole() -> None:
    found = JsonObject()
    values = []
    for character in r'{"a": "x\n\u00e4\ud83d\ude00y"}':
        found.feed(character)
        values.append(found.value.strip())
    whole = ["", '"', "x", r"\n", r"\u00e4", r"\ud83d\ude00", "y"]
    assert set(values) == {"".join(whole[: count + 1]) for count in range(len(whole))}


def test_a_member_s_value_is_told_while_it_is_read() -> None:
    found = JsonObject()
    values = []
    for character in '{"a" : [1, 2], "b":"x"}':
        found.feed(character)
        values.append((found.member, found.value.strip()))
    assert ("a", "[1,") in values
    assert ("b", '"x') in values
    assert found.members == {"a": "[1, 2]", "b": '"x"'}


# -- formats -----------------------------------------------------------------------------------------------------------

ARGUMENTS = {"path": 'a "b"\n<c>', "count": 3, "parts": [1, {"x": None}]}
AS_JSON = json.dumps(ARGUMENTS)


def xml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def coder(name: str, arguments: dict[str, Any]) -> str:
    said = "".join(f"<parameter={key}>\n{xml(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"\n<function={name}>\n{said}</function>\n"


def invoked(name: str, arguments: dict[str, Any], tag: str = "") -> str:
    said = "".join(
        f'<{tag}parameter name="{key}">{xml(value)}</{tag}parameter>\n' for key, value in arguments.items()
    )
    return f'\n<{tag}invoke name="{name}">\n{said}</{tag}invoke>'


def pairs(name: str, arguments: dict[str, Any], tag: str = "") -> str:
    said = "".join(
        f"<{tag}arg_key>{key}</{tag}arg_key>\n<{tag}arg_value>{xml(value)}</{tag}arg_value>\n"
        for key, value in arguments.items()
    )
    return f"{name}\n{said}"


def functions(name: str, arguments: dict[str, Any]) -> str:
    said = "".join(f'<param name="{key}"><![CDATA[{xml(value)}]]></param>' for key, value in arguments.items())
    return f'"{name}">{said}'


def opened(name: str, arguments: dict[str, Any]) -> str:
    said = "".join(
        f'<|open|>argument key="{key}" type="{"string" if isinstance(value, str) else "any"}"<|sep|>'
        f"{xml(value)}<|close|>argument<|sep|>"
        for key, value in arguments.items()
    )
    return f'<|open|>call tool="{name}" index="1"<|sep|>{said}<|close|>call<|sep|>'


def as_json(name: str, arguments: dict[str, Any]) -> str:
    return f"\n{json.dumps({'name': name, 'arguments': arguments})}\n"


def headed(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}[ARGS]{json.dumps(arguments)}"


def kimi(name: str, arguments: dict[str, Any]) -> str:
    begin = f"<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>"
    return f"{begin}{json.dumps(arguments)}<|tool_call_end|>"


WRITERS: dict[str, Any] = {
    "json_tools": as_json,
    "mistral": headed,
    "kimi_k2": kimi,
    "qwen3_coder": coder,
    "glm47": pairs,
    "longcat": lambda name, arguments: pairs(name, arguments, "longcat_"),
    "minimax_m2": invoked,
    "minicpm5": functions,
    "muse_spark": lambda name, arguments: invoked(name, arguments, "atem:"),
    "kimi_k3": opened,
}
ONCE = {
    "pythonic": '[write_file(path="a", count=3)]',
    "gemma4": 'call:write_file{path:<|"|>a<|"|>,count:3}',
    "function_gemma": "call:write_file{path:<escape>a<escape>,count:3}",
}
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "path": st.text("ab <>/\"'\\{}[]é\n", min_size=1).map(lambda text: f"x{text}x"),
        "count": st.integers(-9, 9),
        "parts": st.lists(st.integers(0, 9), max_size=3),
    },
)


@pytest.mark.parametrize("format", WRITERS)
@settings(max_examples=25)
@given(arguments=PARAMETERS, cuts=CUTS)
def test_pieces_make_what_the_parser_reads(format: str, arguments: dict[str, Any], cuts: list[int]) -> None:
    assume(arguments or format != "longcat")  # whose parser reads no call without arguments
    text = WRITERS[format]("write_file", arguments)
    whole = parser(format)(text, TOOLS)
    whole = whole[0] if isinstance(whole, list) else whole
    for texts in (pieces(text, cuts), every_character(text), [text]):
        found, _, left = told(format, texts)
        assert [(name, json.loads(said)) for name, said in found] == [(whole["name"], whole["arguments"])]
        assert left == ""


@pytest.mark.parametrize("format", WRITERS)
def test_the_name_comes_before_the_arguments_and_they_before_the_end(format: str) -> None:
    text = WRITERS[format]("write_file", ARGUMENTS)
    _, early, _ = told(format, every_character(text))
    name, *more = early
    assert (name.name, name.arguments in ("", "{")) == ("write_file", True)
    assert len(more) >= len(ARGUMENTS), "each argument was told when it had ended, or earlier"
    if format in ("json_tools", "mistral", "kimi_k2"):
        assert "".join(piece.arguments for piece in early) == AS_JSON
        assert len(early) == len(AS_JSON) - AS_JSON.count("\\"), "each character goes out as it comes"


@pytest.mark.parametrize("format", ONCE)
def test_other_formats_are_told_at_the_end(format: str) -> None:
    found, early, _ = told(format, every_character(ONCE[format]))
    assert early == []
    assert found == [("write_file", '{"path": "a", "count": 3}')]


@pytest.mark.parametrize("format", ["mistral", "kimi_k2", "minimax_m2", "kimi_k3", "json_tools"])
def test_several_calls_between_two_markers(format: str) -> None:
    write = WRITERS[format]
    found, early, _ = told(format, every_character(write("write_file", ARGUMENTS) + write("now", {})))
    assert [(name, json.loads(said)) for name, said in found] == [("write_file", ARGUMENTS), ("now", {})]
    assert len([piece for piece in early if piece.id]) == 2


@pytest.mark.parametrize("format", ["mistral", "json_tools"])
def test_a_list_of_calls(format: str) -> None:
    text = json.dumps([{"name": "write_file", "arguments": ARGUMENTS}, {"id": "c9", "name": "now", "arguments": {}}])
    found, early, _ = told(format, every_character(text))
    assert [(name, json.loads(said)) for name, said in found] == [("write_file", ARGUMENTS), ("now", {})]
    assert [piece.id for piece in early if piece.id][1] == "c9"


# -- what goes wrong ---------------------------------------------------------------------------------------------------

NO_CALLS = [
    "Paris",
    '{"name": "now", "arguments": "not json"}',
    '{"name": "now", "arguments": null}',
    '{"name": "now", "arguments": [1]}',
    '{"name": "", "arguments": {}}',
    '{"name": 5, "arguments": {}}',
    '{"arguments": {"path": "a"}}',
    '{"name": "\\ud800", "arguments": {}}',
    '{"arguments": {"count": NaN}, "name": "now"}',
    '{"name": "now", "argu',
]


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_passed_on_as_it_is(text: str) -> None:
    for texts in (every_character(text), [text]):
        assert told("json_tools", texts) == ([], [], text)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "now", "arguments": {"id": 123456789012345678901234}}', '{"id": 123456789012345678901234}'),
        ('{"name": "now", "arguments": {"x": 1e400}}', '{"x": 1e400}'),
        ('{"name": "now", "arguments": "{\\"path\\": 1}"}', '{"path": 1}'),
        ('{"name": "now"}', "{}"),
        ('{"arguments": {"path": "a"}, "name": "now"}', '{"path": "a"}'),
        ('{"name": "now", "arguments": {"path": "\\ud800"}}', '{"path": "'),
        ('{"name": "now", "arguments": {}}}', "{}"),
    ],
    ids=["a large number", "a larger one", "as text", "none", "before the name", "half a pair", "a brace too many"],
)
def test_arguments_go_out_as_the_model_writes_them(text: str, arguments: str) -> None:
    for texts in (every_character(text), [text]):
        found, _, left = told("json_tools", texts)
        assert (found, left) == ([("now", arguments)], "")


def test_an_id_of_the_model_s_own_is_kept_unless_it_is_endless() -> None:
    for id, kept in (("c" * 256, True), ("c" * 257, False), ("", False)):
        text = json.dumps({"id": id, "name": "now", "arguments": {}})
        (call,) = told("json_tools", [text])[1]
        assert (call.id == id) == kept
        assert kept or call.id.startswith("call_")


@pytest.mark.parametrize("format", WRITERS)
@settings(max_examples=20)
@given(cut=st.integers(1, 300), cuts=CUTS)
def test_what_is_cut_off_is_the_beginning_of_the_arguments_or_no_call(format: str, cut: int, cuts: list[int]) -> None:
    text = WRITERS[format]("write_file", ARGUMENTS)
    begun = text[: min(cut, len(text) - 1)]
    found, _, left = told(format, pieces(begun, cuts), cut=True)
    if not found:
        assert left == begun
        return
    ((name, said),) = found
    assert (name, left) == ("write_file", "")
    assert AS_JSON.startswith(said)


@pytest.mark.parametrize("wrong", ["nope}}", "NaN}}", "01}}", '"\\x"}}', '"\n"}}', "tru}}"])
def test_arguments_end_where_they_are_no_json(wrong: str) -> None:
    text = '{"name": "now", "arguments": {"path": "a", "count": ' + wrong
    for texts in (every_character(text), [text]):
        found, _, left = told("json_tools", texts)
        ((name, said),) = found
        assert (name, left) == ("now", "")
        assert said.startswith('{"path": "a", "count": ')
        assert (said + "}").startswith(text[len('{"name": "now", "arguments": ') :][: len(said)])
        with pytest.raises(ValueError, match="line 1"):
            json.loads(said)


def test_an_argument_that_comes_twice_ends_a_call_too() -> None:
    text = coder("write_file", {"path": "a", "count": 1}).replace("</function>", "") + "<parameter=path>b</parameter>"
    found, _, left = told("qwen3_coder", every_character(text + "</function>"))
    assert (found, left) == ([("write_file", '{"path": "a", "count": 1')], "")


def test_a_parser_of_others_is_asked_once_at_the_end() -> None:
    calls = Calls(lambda text, tools: {"name": text, "arguments": {"tools": len(tools)}}, TOOLS)
    assert calls.feed("no") + calls.feed("w") == []
    ((call,), left) = calls.close()
    assert (call.name, call.arguments, left) == ("now", '{"tools": 2}', "")
