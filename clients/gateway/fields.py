"""Fields of a request's body: read, or refused with an error that names them.

Every API reads its parameters with these; what they mean is in the modules of the APIs, and in ``wanted``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from expertd.protocol.errors import ParameterUnsupported, RequestInvalid

WHOLE_LIMIT = (1 << 63) - 1


def body_object(body: object) -> dict[str, Any]:
    """A decoded JSON body, which has to be an object.  All that follows raise RequestInvalid, which names ``param``."""
    if not isinstance(body, dict):
        raise RequestInvalid("the body has to be a JSON object")
    return body


def invalid(param: str, rule: str) -> NoReturn:
    """Refuse the value of ``param``, which has to be ``rule``."""
    raise RequestInvalid(f"'{param}' has to be {rule}", param=param)


def unsupported(param: str, why: str = "is not supported; leave it out") -> NoReturn:
    """Refuse a parameter that asks for what is not offered."""
    raise ParameterUnsupported(f"the parameter '{param}' {why}", param=param)


def is_number(value: object) -> bool:
    """Whether ``value`` is a number of JSON; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def boolean(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A truth value; ``default`` where there is none."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        invalid(name, "true or false")
    return value


def within(body: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    """A number from ``low`` to ``high``; ``default`` where there is none."""
    value = body.get(name)
    if value is None:
        return default
    if not is_number(value) or not low <= value <= high:
        invalid(name, f"a number from {low:g} to {high:g}")
    return float(value)


def whole(body: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    """A whole number of at least ``low`` and at most ``high``, or None."""
    value = body.get(name)
    if value is None:
        return None
    good = isinstance(value, int) and not isinstance(value, bool) and value >= low
    most = WHOLE_LIMIT if high is None else high
    if not good or value > most:
        invalid(name, f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}")
    return int(value)


def string(body: Mapping[str, Any], name: str, param: str) -> str:
    """A string that has to be there, in an object that is called ``param``."""
    value = body.get(name)
    if not isinstance(value, str):
        invalid(f"{param}.{name}", "a string")
    return value
