"""A JSON object that arrives in pieces: how much of it is JSON so far, and which of its members are complete.

What is taken is always the beginning of a valid object (RFC 8259) whose strings are Unicode: whoever passes it on as it
comes has never passed on anything else.  Values are kept as the text that they have; to make sense of them is the
business of ``json.loads``.
"""

from __future__ import annotations

import json
import re
from typing import Literal

__all__ = ["JsonObject"]

DEEPEST = 200
"""Levels of arrays and objects; ``json`` itself gives up at about a thousand."""

_State = Literal["key", "colon", "value", "next", "string", "escape", "hex", "number", "word"]
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_BEGUN_NUMBER = re.compile(r"-?|-?(0|[1-9][0-9]*)(\.[0-9]*|(\.[0-9]+)?[eE][+-]?[0-9]*)?")


class JsonObject:
    """One object, read character by character; white space may come before it."""

    def __init__(self) -> None:
        self.text = ""
        """What was taken, from the opening brace on."""
        self.members: dict[str, str] = {}
        """The object's own members that are complete, each with the text of its value."""
        self.member: str | None = None
        """Whose value is being read."""
        self.complete = False
        """Whether the object has ended."""
        self.broken = False
        """Whether something came that is no JSON: nothing was taken from there on."""
        self._state: _State = "value"
        self._closers: list[str] = []
        self._may_close = False  # whether the innermost object or array may end here, before a key or a value
        self._is_key = False  # whether the string that is being read is one
        self._begin = 0  # where in the text a key, or the value of ``member``, begins
        self._rest = ""  # of a word; or of a number, or the digits of an escape: what has come
        self._escape: int | None = None  # where an escape begins that is not complete
        self._high = False  # whether it lacks the second half of a surrogate pair

    @property
    def settled(self) -> str:
        """``text`` without an escape that is not complete: readers of what is unfinished stumble over half of one."""
        return self.text[: self._escape]

    @property
    def value(self) -> str:
        """The settled text so far of the value of ``member``."""
        named = self._state == "colon" and len(self._closers) == 1
        return "" if self.member is None or named else self.settled[self._begin :]

    def feed(self, text: str) -> int:
        """Take more; returns how many characters of it: fewer where the object ends, or what comes is no JSON."""
        skipped = 0
        if not self.text:
            skipped = len(text) - len(text.lstrip(" \t\n\r"))
        place = len(self.text)
        self.text += text[skipped:]
        while place < len(self.text) and not self.complete:
            if not self._take(self.text[place], place):
                self.broken = True
                break
            place += 1
        left = len(self.text) - place
        self.text = self.text[:place]
        return len(text) - left

    def _take(self, character: str, place: int) -> bool:
        """Take the character at ``place``; False: there cannot be such a one."""
        if self.broken:
            return False
        match self._state:
            case "string":
                return self._in_string(character, place)
            case "escape":
                if character == "u":
                    self._state, self._rest = "hex", ""
                    return True
                if self._high or character not in '"\\/bfnrt':
                    return False
                self._state, self._escape = "string", None
                return True
            case "hex":
                self._rest += character
                return character in "0123456789abcdefABCDEF" and (len(self._rest) < 4 or self._unit_ends())
            case "word":
                expected, self._rest = self._rest[0], self._rest[1:]
                if not self._rest:
                    self._value_ends(place + 1)
                return character == expected
            case "number":
                if character in "+-.eE0123456789":
                    self._rest += character
                    return _BEGUN_NUMBER.fullmatch(self._rest) is not None
                if not _NUMBER.fullmatch(self._rest):
                    return False
                self._value_ends(place)
        return character in " \t\n\r" or self._between(character, place)

    def _in_string(self, character: str, place: int) -> bool:
        if character == "\\":
            self._state = "escape"
            self._escape = place if self._escape is None else self._escape
        elif self._high:
            return False
        elif character != '"':
            return character >= " "
        elif self._is_key:
            if len(self._closers) == 1:
                self.member = json.loads(self.text[self._begin : place + 1])
            self._state = "colon"
        else:
            self._value_ends(place + 1)
        return True

    def _unit_ends(self) -> bool:
        """An escape has its four digits; False: half of a surrogate pair would be without the other."""
        unit = int(self._rest, 16)
        if (0xDC00 <= unit < 0xE000) != self._high:
            return False
        self._state, self._high = "string", 0xD800 <= unit < 0xDC00
        if not self._high:
            self._escape = None
        return True

    def _between(self, character: str, place: int) -> bool:
        """Where a value, a key, or a mark between them has to come."""
        closes = self._closers and character == self._closers[-1]
        if closes and (self._state == "next" or self._may_close):
            self._closers.pop()
            self._value_ends(place + 1)
            return True
        if self._state == "value":
            return self._value_begins(character, place)
        expected = {"key": '"', "colon": ":", "next": ","}[self._state]
        if self._state == "key":
            self._state, self._is_key = "string", True
            if len(self._closers) == 1:
                self._begin = place
        elif self._state == "colon":
            self._state = "value"
            if len(self._closers) == 1:
                self._begin = place + 1
        else:
            self._state = "key" if self._closers[-1] == "}" else "value"
        self._may_close = False
        return character == expected

    def _value_begins(self, character: str, place: int) -> bool:
        if len(self._closers) == 1:
            self._begin = place
        self._may_close = False
        if character in "{[":
            self._closers.append("}" if character == "{" else "]")
            self._state, self._may_close = ("key" if character == "{" else "value"), True
            return len(self._closers) <= DEEPEST and (character == "{" or len(self._closers) > 1)
        if not self._closers:
            return False
        if character == '"':
            self._state, self._is_key = "string", False
        elif character in _WORDS:
            self._state, self._rest = "word", _WORDS[character]
        else:
            self._state, self._rest = "number", character
            return character in "-0123456789"
        return True

    def _value_ends(self, end: int) -> None:
        self._state, self._may_close = "next", False
        if not self._closers:
            self.complete = True
        elif len(self._closers) == 1 and self.member is not None:
            self.members[self.member] = self.text[self._begin : end]
            self.member = None
