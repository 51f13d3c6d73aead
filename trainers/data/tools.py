"""Tool schemas and tool calls: checked here, because a template writes whatever it gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from adapterhub.trainers.data.rows import BadRow, kind, quoted
from adapterhub.trainers.data.strictjson import parse

_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
_CALL = '{"type": "function", "function": {"name", "arguments"}}'
_TOOL = '{"type": "function", "function": {"name", "parameters"}}'


def tool_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """Arguments become objects: templates print them as JSON, and a string would be quoted twice. Raises BadRow."""
    if isinstance(calls, str):
        calls = _parsed(calls, at, "a list of calls")
    if not isinstance(calls, list):
        raise BadRow(f"{at} is {kind(calls)}", "a list of calls")
    return [one_call(call, f"{at}[{i}]") for i, call in enumerate(calls)]


def one_call(call: Any, at: str) -> dict[str, Any]:
    """One call, with or without its ``function`` around it. Raises BadRow."""
    if isinstance(call, str):
        call = _parsed(call, at, _CALL)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"{at} names no function", _CALL)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"{at}.arguments", "an object, or its JSON text")
    if not isinstance(arguments, dict):
        raise BadRow(f"{at}.arguments is {kind(arguments)}", "an object")
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """``[{"type": "function", "function": {name, description, parameters}}]``, or its JSON text. Raises BadRow."""
    if value is None or value == "" or value == []:
        return ()
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return _checked(text)


@lru_cache(maxsize=256)  # the rows of a file mostly have the same tools
def _checked(text: str) -> tuple[Mapping[str, Any], ...]:
    tools = _parsed(text, "tools", "a list of tool schemas")
    if not isinstance(tools, list):
        raise BadRow(f"tools is {kind(tools)}", "a list of tool schemas")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow(f"tools[{i}] names no function", _TOOL)
        _check_schema(function.get("parameters", {}), f"tools[{i}].function.parameters", whole=True)
    return tuple(tools)


def _check_schema(schema: Any, at: str, *, whole: bool = False) -> None:
    """What makes a schema useless to a model and to guided decoding; not all of JSON Schema."""
    if not isinstance(schema, dict):
        raise BadRow(f"{at} is no JSON schema", "an object")
    named = schema.get("type")
    types = named if isinstance(named, list) else [named] if named is not None else []
    unknown = [t for t in types if t not in _TYPES]
    if unknown:
        raise BadRow(f"{at} is no JSON schema: type is {quoted(unknown[0])}", "one of " + ", ".join(sorted(_TYPES)))
    if whole and types and "object" not in types:
        raise BadRow(f"{at} is no JSON schema of an object", '{"type": "object", "properties": {…}}')
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise BadRow(f"{at}.properties is {kind(properties)}", "an object")
    for name, inner in properties.items():
        if not isinstance(inner, bool):
            _check_schema(inner, f"{at}.properties.{name}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise BadRow(f"{at}.required is {kind(required)}", "a list of names")
    if whole and (missing := [name for name in required if properties and name not in properties]):
        raise BadRow(f"{at}.required names {quoted(missing[0])}, which is no property", "names of its properties")


def check_called(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], key: str) -> None:
    """Every call must name one of the row's tools, where it has any. Raises BadRow."""
    if not tools:
        return
    known = {tool["function"]["name"] for tool in tools}
    for i, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in known:
                raise BadRow(
                    f"{key}[{i}] calls {quoted(call['function']['name'])}, which is none of the row's tools",
                    "one of " + ", ".join(sorted(known)),
                )


def _parsed(text: str, at: str, expected: str) -> Any:
    try:
        return parse(text.encode("utf-8", "surrogatepass"))
    except BadRow as error:
        if error.what.startswith("not JSON"):
            raise BadRow(f"{at} is not JSON", expected) from error
        raise BadRow(f"{at}: {error.what}", error.expected) from error
