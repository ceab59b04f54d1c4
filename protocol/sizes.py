"""Sizes as people write and read them."""

from __future__ import annotations

import re

from expertd.protocol.errors import SizeInvalid
from expertd.protocol.shown import show_size

__all__ = ["AUTO", "DIGITS", "MOST", "parse_budget", "parse_rate", "parse_size", "show_size"]

AUTO = "auto"
"""The budget that is what the machine can spare."""

MOST = (1 << 63) - 1
"""No size is larger: messages carry no larger number."""
DIGITS = 40

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter] = _UNITS[_letter + "b"] = 1000**_power
    _UNITS[_letter + "ib"] = 1024**_power


def parse_size(text: str) -> int:
    """Bytes of ``512MB``, ``2GiB``, ``1.5G`` or ``1048576`` (decimal and binary units as written).

    Raises:
        SizeInvalid: anything else, or nothing above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise SizeInvalid(f"'{text}' is not a size; write for example 512MB, 2GiB or a number of bytes")
    number = match.group(1)
    if len(number) > DIGITS:
        raise SizeInvalid(f"'{text[:DIGITS]}...' is more memory than there can be; write for example 512MB or 2GiB")
    size = int(float(number) * unit) if "." in number else int(number) * unit
    if size > MOST:
        raise SizeInvalid(f"'{text}' is more memory than there can be; write for example 512MB or 2GiB")
    if size <= 0:
        raise SizeInvalid(f"'{text}' is no size to work with; write for example 512MB, 2GiB or a number of bytes")
    return size


def parse_rate(text: str) -> int:
    """Bytes a second of ``200MB`` or ``200MB/s``.

    Raises:
        SizeInvalid: anything else, or nothing above zero.
    """
    try:
        return parse_size(text.strip().removesuffix("/s"))
    except SizeInvalid:
        raise SizeInvalid(f"{text.strip()!r} is not a rate in bytes a second; write for example 200MB/s") from None


def parse_budget(text: str) -> int | None:
    """Bytes of a budget as ``parse_size`` reads them; None for ``auto``: what the machine can spare.

    Raises:
        SizeInvalid: neither.
    """
    if text.strip().lower() == AUTO:
        return None
    try:
        return parse_size(text)
    except SizeInvalid as error:
        raise SizeInvalid(f"{error.message}, or {AUTO} for what the machine can spare") from None
