"""What a model writes between the markers of a call, told while it is written: the name first, then the arguments.

mlx-lm's parsers read what is complete.  Here is what can be told earlier with certainty, where the format allows it:
arguments that are JSON pass through as the model writes them, and of those that are written one by one each is told
when it has ended, as mlx-lm's own parser reads it.  Everything else is told in one piece at the end.  What was told is
not taken back: the pieces of a call's arguments make the JSON of an object, or the beginning of one if what follows
cannot be read or never comes.

Works on text alone; where calls begin and end in an answer is known to ``expertd.worker.channels``.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from expertd.protocol.messages import ToolCall
from expertd.worker.json_object import JsonObject

__all__ = ["Calls", "Parser"]

log = logging.getLogger(__name__)

Parser = Callable[[str, list[dict[str, Any]]], Any]
"""One of mlx-lm's: the text between two markers and the tools -> a call, or a list of calls.  Raises anything."""


LONGEST_ID = 256
"""Characters of an id that a model gives its call; a longer one is replaced by ours."""


class Calls:
    """The text between two markers, which holds a call or several."""

    def __init__(self, parse: Parser, tools: list[dict[str, Any]]) -> None:
        self._parse = parse
        self._tools = tools
        self._said = ""
        self._told: list[_Seen] = []
        self._format = _format_of(parse, tools)

    @property
    def begun(self) -> bool:
        """Whether a call was told, be it in part."""
        return bool(self._told)

    @property
    def complete(self) -> bool:
        """Whether all calls that were told are complete."""
        return all(call.complete for call in self._told)

    def feed(self, text: str) -> list[ToolCall]:
        """Take more; returns what there is to tell of it."""
        self._said += text
        return self._tell(self._format.feed(text)) if self._format is not None else []

    def close(self, cut: bool = False) -> tuple[list[ToolCall], str]:
        """The text is over: what is left to tell, and what is no call at all and so has to be told as text.

        A call that was told in part, and whose rest cannot be read, stays as it is.

        Args:
            cut: the text was not ended by its marker or by the model, so that its last call may lack arguments.
        """
        if cut and isinstance(self._format, _Parameters) and self._format.reads_what_is_cut:
            return [], "" if self._told else self._said
        try:
            found = self._parse(self._said, self._tools)
            seen = [_seen(call) for call in (found if isinstance(found, list) else [found])]
        except Exception as error:
            # A parser is a program of others, and what the model wrote may be anything.
            if self._told and self.complete:
                return [], ""
            log.info("a call of a tool could not be read (%s)", type(error).__name__)
            return [], "" if self._told else self._said
        return self._tell(seen), ""

    def _tell(self, seen: list[_Seen]) -> list[ToolCall]:
        """What is new in ``seen``, as far as it goes on from what was told."""
        pieces: list[ToolCall] = []
        for place, call in enumerate(seen):
            if place == len(self._told):
                if not self.complete:
                    break
                id = call.id if len(call.id) <= LONGEST_ID else ""
                pieces.append(ToolCall(id=id or _new_id(), name=call.name, arguments=call.arguments))
                self._told.append(call)
                continue
            told = self._told[place]
            if told.complete:
                continue
            if call.name != told.name or not call.arguments.startswith(told.arguments):
                break
            if more := call.arguments[len(told.arguments) :]:
                pieces.append(ToolCall(arguments=more))
            self._told[place] = call
        return pieces


@dataclass(frozen=True)
class _Seen:
    """A call as far as it can be told; ``arguments`` are the beginning of their JSON."""

    name: str
    arguments: str
    id: str = ""
    complete: bool = False


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _seen(found: dict[str, Any]) -> _Seen:
    """A call that a parser has read.

    Raises:
        ValueError, TypeError, KeyError: it has no name, or its arguments are not a JSON object.
    """
    name, arguments = found["name"], found.get("arguments", {})
    if not isinstance(name, str) or not name.strip():
        raise ValueError("a call without a name")
    text = arguments if isinstance(arguments, str) else _json(arguments)
    if not isinstance(json.loads(text), dict):
        raise ValueError("arguments that are no object")
    (name + text).encode()  # half of a surrogate pair is no text
    return _Seen(name, text, str(found.get("id") or ""), complete=True)


def _json(arguments: object) -> str:
    return json.dumps(arguments, ensure_ascii=False, allow_nan=False)


# -- formats whose calls can be told before they are complete ----------------------------------------------------------


class _Format(Protocol):
    def feed(self, text: str) -> list[_Seen]:
        """Take more text; returns all calls so far.  Of those before the last none changes any more."""


class _Objects:
    """Each call is a JSON object with a name and arguments: one, a list, or one after the other."""

    def __init__(self) -> None:
        self._done: list[_Seen] = []
        self._object = JsonObject()

    def feed(self, text: str) -> list[_Seen]:
        while True:
            if not self._object.text:
                text = text.lstrip(" \t\r\n[,]")
            text = text[self._object.feed(text) :]
            now = self._now(self._object)
            if not self._object.complete or now is None:
                return self._done if now is None else [*self._done, now]
            self._done.append(now)
            self._object = JsonObject()

    @staticmethod
    def _now(call: JsonObject) -> _Seen | None:
        """The call, once its name and the beginning of its arguments are known."""
        known = call.members
        name, id = _string(known.get("name")), _string(known.get("id"))
        arguments = call.value if call.member == "arguments" else known.get("arguments", "{}" if call.complete else "")
        if not name.strip() or not arguments.startswith("{"):
            return None
        return _Seen(name, arguments, id, complete=call.complete or "arguments" in known)


def _string(text: str | None) -> str:
    """The string that ``text`` is in JSON, or nothing."""
    found = json.loads(text) if text is not None and text.startswith('"') else ""
    try:
        found.encode()
    except UnicodeEncodeError:
        return ""
    return str(found)


class _Headed:
    """A header with the name comes before each object of arguments; or all is a list of calls as in ``_Objects``."""

    def __init__(self, header: re.Pattern[str]) -> None:
        self._header = header
        self._rest = ""
        self._done: list[_Seen] = []
        self._call: tuple[str, str] | None = None  # name and id
        self._arguments = JsonObject()
        self._list: _Objects | None = None

    def feed(self, text: str) -> list[_Seen]:
        self._rest += text
        if self._list is None and self._call is None and not self._done and self._rest.lstrip().startswith("["):
            self._list = _Objects()
        if self._list is not None:
            rest, self._rest = self._rest, ""
            return self._list.feed(rest)
        while self._call is not None or self._next():
            self._rest = self._rest[self._arguments.feed(self._rest) :]
            name, id = self._call or ("", "")
            if not self._arguments.complete:
                begun = self._arguments.text != ""
                return [*self._done, _Seen(name, self._arguments.settled, id)] if begun else self._done
            self._done.append(_Seen(name, self._arguments.text, id, complete=True))
            self._call, self._arguments = None, JsonObject()
        return self._done

    def _next(self) -> bool:
        """Go behind the next header, if there is one."""
        header = self._header.search(self._rest)
        if header is None:
            return False
        self._rest = self._rest[header.end() :]
        self._call = header["name"], header.groupdict().get("id") or ""
        return True


class _Parameters:
    """Arguments are written one by one: at each mark mlx-lm's parser can read what is there, with an end put to it."""

    def __init__(self, parse: Parser, tools: list[dict[str, Any]], marks: str, end: str) -> None:
        self._parse = parse
        self._tools = tools
        self._marks = re.compile(marks)
        self._end = end
        self.reads_what_is_cut = not end
        self._said = ""
        self._read = 0
        self._seen: list[_Seen] = []

    def feed(self, text: str) -> list[_Seen]:
        self._said += text
        if ">" not in text:  # with which each mark ends
            return self._seen
        read = max((mark.end() for mark in self._marks.finditer(self._said)), default=0)
        if read > self._read:
            self._read = read
            try:
                found = self._parse(self._said[:read] + self._end, self._tools)
                *done, now = map(_seen, found if isinstance(found, list) else [found])
            except Exception as error:
                log.debug("nothing can be told of a call yet (%s)", type(error).__name__)
            else:
                begun = "" if now.arguments == "{}" else now.arguments[:-1]
                self._seen = [*done, _Seen(now.name, begun, now.id)]
        return self._seen


_HEADERS = {
    "mistral": r"(?P<name>[\w-]+)\s*\[ARGS\]",
    "kimi_k2": r"(?P<id>(?:functions\.)?(?P<name>[^\s<>|]+?):[0-9]+)\s*<\|tool_call_argument_begin\|>",
}
_MARKS = {
    "qwen3_coder": (r"<function=[^>]+>|</parameter>", "</function>"),
    "glm47": (r"<arg_key>|</arg_value>", ""),
    "longcat": (r"<longcat_arg_key>|</longcat_arg_value>", ""),
    "minimax_m2": (r"<invoke name=[^>]+>|</parameter>", "</invoke>"),
    "minicpm5": (r"""\A\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+)\s*>|</param>""", ""),
    "muse_spark": (r"<atem:invoke\b[^>]*>|</atem:parameter>", ""),
    "kimi_k3": (r"<\|open\|>call [^|]*<\|sep\|>|<\|close\|>(?:argument|json)<\|sep\|>", "<|close|>call<|sep|>"),
}
"""By mlx-lm's parser: where a name or an argument ends, and what makes the text up to there one that it reads."""


def _format_of(parse: Parser, tools: list[dict[str, Any]]) -> _Format | None:
    package, _, name = str(getattr(parse, "__module__", "")).rpartition(".")
    if package != "mlx_lm.tool_parsers":
        return None
    if name == "json_tools":
        return _Objects()
    if name in _HEADERS:
        return _Headed(re.compile(_HEADERS[name]))
    return _Parameters(parse, tools, *_MARKS[name]) if name in _MARKS else None
