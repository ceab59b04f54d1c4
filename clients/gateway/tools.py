"""Which functions a model may call: read from any API's ``tools`` and ``tool_choice``.  Pure, as ``wanted``.

Calls that were made are in ``conversation``; how one is enforced is the worker's business (``expertd.worker.grammar``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from expertd.clients.gateway.fields import invalid, string, unsupported
from expertd.protocol.errors import RequestInvalid

__all__ = ["ToolsWanted", "choose", "entries", "function_of", "tool_choice"]

ToolsWanted = tuple[list[dict[str, Any]], Literal["auto", "required"]]
"""What may be called, and whether something has to be."""

_NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "type": lambda value: True,
    "cache_control": lambda value: True,
    "eager_input_streaming": lambda value: isinstance(value, bool),
    "defer_loading": lambda value: value is False,
    "async": lambda value: value is False,
    "allowed_callers": lambda value: isinstance(value, list) and "direct" in value,
    "output_schema": lambda value: isinstance(value, dict),
    "input_examples": lambda value: value == [],
}
"""What the vendors' tools have beside, each with the test of the values that change nothing here.

``allowed_callers`` and ``output_schema`` are for programs that a vendor's service runs; here only the model calls."""


def entries(value: object) -> list[dict[str, Any]]:
    """The entries of ``tools``, each an object.  This and what follows raise RequestInvalid, which names ``param``."""
    if value is None:
        return []
    if not isinstance(value, list):
        invalid("tools", "a list of tools")
    for place, tool in enumerate(value):
        if not isinstance(tool, dict):
            invalid(f"tools[{place}]", "an object")
    return value


def of_type_function(tool: Mapping[str, Any], param: str) -> None:
    """Refuse a tool that is not of OpenAI's type for functions."""
    kind = tool.get("type")
    if not isinstance(kind, str):
        invalid(param, "an object with a type")
    if kind != "function":
        unsupported(param, f"is of type {kind!r}; only functions are supported")


def function_of(value: Mapping[str, Any], param: str, schema: str = "parameters") -> dict[str, Any]:
    """A function that may be called, as templates take it; ``schema`` is what its parameters are called.

    ``strict`` changes nothing: where a call is enforced its arguments always fit the schema, and where the model may
    choose nothing is enforced (docs/integrations.md).
    """
    refuse_unknown(value, {"name", "description", "strict", schema}, param)
    name = string(value, "name", param)
    if not name:
        invalid(f"{param}.name", "a string that is not empty")
    function: dict[str, Any] = {"name": name}
    if value.get("description") is not None:
        function["description"] = string(value, "description", param)
    if not isinstance(value.get("strict"), bool | None):
        invalid(f"{param}.strict", "true or false")
    parameters = value.get(schema)
    if parameters is not None and not isinstance(parameters, dict):
        invalid(f"{param}.{schema}", "an object, a JSON schema")
    function["parameters"] = parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def refuse_unknown(value: Mapping[str, Any], known: set[str], param: str) -> None:
    """Refuse what a tool says that is neither ``known`` nor changes anything."""
    for name, field in value.items():
        test = _NEUTRAL.get(name)
        if name not in known and field is not None and not (test is not None and test(field)):
            unsupported(f"{param}.{name}")


def tool_choice(value: object, tools: list[dict[str, Any]]) -> ToolsWanted:
    """Which of ``tools`` may be called, and whether one has to be, as both of OpenAI's APIs say it.

    In chat completions a function's name, and a list of tools that are allowed, lie one object deeper.
    """
    if value is None or value in ("auto", "none", "required"):
        return choose(tools, str(value or "auto"))
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind == "allowed_tools":
        holder = value.get("allowed_tools", value)
        allowed = holder.get("tools") if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or not isinstance(allowed, list):
            invalid("tool_choice.allowed_tools", "an object with a mode and tools")
        names = [_named(tool, "tool_choice.allowed_tools.tools") for tool in allowed]
        mode = holder.get("mode", "auto")
        if mode not in ("auto", "required"):
            invalid("tool_choice.allowed_tools.mode", "'auto' or 'required'")
        return choose(tools, mode, names, "tool_choice.allowed_tools.tools")
    return choose(tools, "required", [_named(value, "tool_choice")])


def choose(
    tools: list[dict[str, Any]], mode: str, names: Sequence[object] | None = None, param: str = "tool_choice"
) -> ToolsWanted:
    """``tools`` that may be called in ``mode`` ("auto", "none" or "required"); with ``names`` only those."""
    if names is not None:
        known = [tool["function"]["name"] for tool in tools]
        for name in names:
            if name not in known:
                raise RequestInvalid(f"'{param}' names {name!r}, which is none of the tools", param=param)
        tools = [tool for tool in tools if tool["function"]["name"] in names]
    if mode == "required" and not tools:
        raise RequestInvalid(f"'{param}' wants a tool to be called, but there are no tools", param=param)
    return ([], "auto") if mode == "none" else (tools, "required" if mode == "required" else "auto")


def _named(value: object, param: str) -> object:
    """The name in an object that names a function."""
    if not isinstance(value, dict) or value.get("type") != "function":
        invalid(param, "'none', 'auto', 'required', or an object that names a function")
    function = value.get("function", value)
    return function.get("name") if isinstance(function, dict) else None
