"""Who may call what, and in which words a request reaches the engine. Pure: no I/O, no vLLM.

    (method, raw path) ──► route        everything that is not listed here is 404
    body["model"]      ──► base | AdapterRef
    body               ──► the body that the engine sees: immutable model name, our salt, our chat template

Without keys there is one caller, who may use everything, and the server listens on loopback alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from adapterhub.errors import HeadersTooLarge, NotFound, UsageError
from adapterhub.refs import LATEST, AdapterRef
from adapterhub.serving.arguments import BASE_NAME
from adapterhub.serving.tenants.callers import Caller, Scope

MAX_BODY = 32 * 1024 * 1024  # bytes
MAX_HEADERS = 64 * 1024  # bytes, of names and values

Kind = Literal["model", "caller", "metrics", "open"]


@dataclass(frozen=True)
class Route:
    """A way in. ``model``: its JSON body names a model. ``caller``: for who has a key. ``metrics``: that,
    and a tenant sees its own. ``open``: for everybody.
    """

    path: str
    kind: Kind
    scope: Scope | None = "inference"  # that a key needs here; None: any
    takes_ends: bool = False  # whether the engine reads `stop_token_ids` from the body
    takes_template: bool = False  # whether the engine reads `chat_template` from the body, and not from its kwargs
    renders_chat: bool = False  # whether the engine applies a chat template at all
    fills_cache: bool = False  # whether the prompt goes through the engine's prefix cache


@dataclass(frozen=True)
class Manner:
    """How a version is spoken with, where that differs from its base."""

    chat_template: str | None = None
    ends: tuple[int, ...] = ()  # ids of tokens at which it stops, besides those of the base


_AS_ITS_BASE = Manner()

_ROUTES = {
    ("POST", b"/v1/chat/completions"): Route(
        "/v1/chat/completions", "model", takes_ends=True, takes_template=True, renders_chat=True, fills_cache=True
    ),
    ("POST", b"/v1/completions"): Route("/v1/completions", "model", takes_ends=True, fills_cache=True),
    ("POST", b"/v1/responses"): Route("/v1/responses", "model", takes_ends=True, renders_chat=True, fills_cache=True),
    ("POST", b"/v1/messages"): Route("/v1/messages", "model", renders_chat=True, fills_cache=True),
    ("POST", b"/v1/messages/count_tokens"): Route("/v1/messages/count_tokens", "model", renders_chat=True),
    ("POST", b"/v1/embeddings"): Route("/v1/embeddings", "model", fills_cache=True),
    ("POST", b"/tokenize"): Route("/tokenize", "model", takes_template=True, renders_chat=True),
    ("POST", b"/detokenize"): Route("/detokenize", "model"),
    ("GET", b"/v1/models"): Route("/v1/models", "caller", scope=None),
    ("GET", b"/health"): Route("/health", "open"),
    ("GET", b"/ready"): Route("/ready", "open"),
    ("GET", b"/version"): Route("/version", "caller", scope=None),
    ("GET", b"/metrics"): Route("/metrics", "metrics", scope=None),
    **{
        (method, f"/adapterhub/{name}".encode()): Route(f"/adapterhub/{name}", "caller", scope="admin")
        for method, names in {
            "GET": ("state", "loaded", "config", "openapi.json"),
            "POST": ("poll", "load", "pin", "unpin", "forget"),
        }.items()
        for name in names
    },
    **{
        ("POST", f"/adapterhub/{name}".encode()): Route(f"/adapterhub/{name}", "caller", scope="channels")
        for name in ("channels", *(f"rollout/{verb}" for verb in ("status", "start", "promote", "pause", "abort")))
    },
}
TOKEN_ROUTES = frozenset(route.path for route in _ROUTES.values() if route.fills_cache)  # the engine is asked there
ALWAYS_OPEN = frozenset({"/health", "/ready"})  # answered before the server is ready

# Fields that would let a caller reach past its own request, with the reason. A null is the same as absent.
_REFUSED = {
    "chat_template": "the template comes with the base or the adapter",
    "priority": "the order of requests is decided here",
    "kv_transfer_params": "cache transfer is between engines",
    "ec_transfer_params": "cache transfer is between engines",
    "vllm_xargs": "they reach into the engine's extensions",
    "prompt_embeds": "a prompt is text or tokens",
    "request_id": "send the header X-Request-Id",
    "previous_response_id": "responses are not stored here; send the earlier turns in `input`",
    "background": "responses are not stored here; send the request without it",
}
_MEDIA = re.compile(r"(image|audio|video|file)(_url)?|input_(image|audio|video|file)")
_HEADERS = frozenset(  # never the client's own
    {b"x-request-id", b"x-vllm-priority", b"x-data-parallel-rank", b"authorization", b"x-api-key"}
)
# Where there may be something that can be read and not written again: lone surrogates, escaped, in UTF-8 or in UTF-16;
# and nesting deeper than this.
_ONLY_READ = (b"\\u", b"\xed", b"\x00")
_DEEP = 500
_REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)


def find_route(method: str, raw_path: bytes, path: str) -> Route:
    """The route for a request line, compared byte for byte. Raises NotFound.

    ``path`` is what the engine's router will look at: it must be the same text, so no escape, doubled slash or case
    says one thing to us and another to the router.
    """
    route = _ROUTES.get((method, raw_path))
    if route is None or path != route.path:
        raise NotFound("there is no such route", why="see GET /v1/models and POST /v1/chat/completions")
    return route


def check_browser(host: str | None, origin: str | None) -> None:
    """A server without keys answers to this machine only: a web page must not reach it through somebody's browser.

    Not by a name that points here (``host``, DNS rebinding), and not from another site (``origin``, which browsers
    send and nothing else has to). Raises UsageError.
    """
    if host is not None and not _LOOPBACK.fullmatch(host):
        raise UsageError("the Host header is not this server's", why="without keys it answers to localhost alone")
    if origin is not None and not _LOOPBACK.fullmatch(origin.partition("://")[2]):
        raise UsageError("the request comes from a web page elsewhere", why="without keys only local ones may ask")


def check_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raises HeadersTooLarge."""
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADERS:
        raise HeadersTooLarge("the headers are too large", why=f"at most {MAX_HEADERS} bytes")


def request_id_of(headers: Mapping[bytes, bytes]) -> str | None:
    """The caller's own X-Request-Id, where it is short and plain."""
    found = headers.get(b"x-request-id", b"")
    return found.decode() if _REQUEST_ID.fullmatch(found) else None


def strip_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers that the engine may see: no key, none that choose priority or engine, not the old body's length."""
    dropped = _HEADERS | {b"content-length", b"transfer-encoding"}
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def read_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises UsageError."""
    try:
        body = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
        if any(sign in raw for sign in _ONLY_READ) or raw.count(b"{") + raw.count(b"[") > _DEEP:
            json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise UsageError("the body is not JSON", why=str(error)[:200]) from error
    if not isinstance(body, dict):
        raise UsageError("the body must be a JSON object")
    return body


def read_model(body: Mapping[str, Any], caller: Caller) -> AdapterRef | None:
    """Which model is asked for; None is the base.

    Raises UsageError (no model), InvalidName (outside the grammar), NotFound (not the caller's).
    """
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise UsageError("`model` is missing", why=f"name {BASE_NAME}, or an adapter like acme/support@prod")
    if model == BASE_NAME:
        if not caller.base:
            raise not_found(BASE_NAME)
        return None
    ref = _parsed(model) if len(model) <= _USUAL else AdapterRef.parse(model)
    if not caller.may_use(ref.name):
        raise not_found(ref)
    return ref


_USUAL = 200  # characters: what is longer is not kept
_parsed = lru_cache(4096)(AdapterRef.parse)


def not_found(ref: AdapterRef | str) -> NotFound:
    """The one answer to what is not there and to what may not be seen."""
    named = str(ref).removesuffix(f"@{LATEST}")  # which nobody has to write
    return NotFound(f"the model {named} does not exist", why="see GET /v1/models")


def check_body(body: Mapping[str, Any]) -> None:
    """Raises UsageError for what a caller may not send: it is told, and not dropped."""
    for field in body.keys() & _REFUSED.keys():
        if body[field] not in (None, False):
            raise UsageError(f"`{field}` is not accepted", why=_REFUSED[field])
    kwargs = body.get("chat_template_kwargs")
    if isinstance(kwargs, Mapping) and kwargs.keys() & {"chat_template", "tokenize"}:
        raise UsageError("`chat_template_kwargs` is not accepted so", why=_REFUSED["chat_template"])
    if not isinstance(body.get("cache_salt"), str | None):
        raise UsageError("`cache_salt` must be text")
    for part in _parts(body):
        _check_media(part)


def rewrite(
    body: Mapping[str, Any], *, route: Route, caller: Caller, model: str, manner: Manner = _AS_ITS_BASE
) -> dict[str, Any]:
    """The body that the engine sees, of one that `check_body` passed.

    ``model`` is the immutable name; ``manner`` the adapter's own template and ends where they differ from the base's.
    """
    chat_template = manner.chat_template
    clean = {k: v for k, v in body.items() if k not in _REFUSED and k != "cache_salt"} | {"model": model}
    if route.fills_cache:
        clean["cache_salt"] = caller.salt(body.get("cache_salt"))
    if chat_template is not None and route.takes_template:
        clean["chat_template"] = chat_template
    elif chat_template is not None and route.renders_chat and isinstance(kwargs := _kwargs(body), dict):
        # vLLM takes it from there as long as the server has none of its own: `--chat-template` is refused
        clean["chat_template_kwargs"] = kwargs | {"chat_template": chat_template}
    if manner.ends and route.takes_ends and isinstance(given := body.get("stop_token_ids") or [], list):
        clean["stop_token_ids"] = [*given, *(i for i in manner.ends if i not in given)]
    return clean


def _kwargs(body: Mapping[str, Any]) -> Any:
    """What a chat template gets beside the messages; where it is no object, the engine says so."""
    given = body.get("chat_template_kwargs")
    return {} if given is None else given


def _parts(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every JSON object below the conversation fields, at any depth: content parts nest in tool results."""
    stack = [body.get(field) for field in ("messages", "input", "system", "prompt", "instructions")]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield value
            stack.extend(
                v for k, v in value.items() if k not in {"input", "arguments"}
            )  # a tool's, never rendered as media
        elif isinstance(value, list):
            stack.extend(value)


def _check_media(part: dict[str, Any]) -> None:
    """Media come inside the request: the server fetches nothing, and nothing from another's cache."""
    named = [part[key] for key in part if _MEDIA.fullmatch(key)]
    if not named and not (isinstance(kind := part.get("type"), str) and _MEDIA.fullmatch(kind)):
        return
    if part.get("uuid") is not None:
        raise UsageError("media by `uuid` are not accepted", why="send them as a data: URL")
    sources = [part.get("source"), *named]
    urls = [s if isinstance(s, str) else s.get("url") for s in sources if isinstance(s, str | dict)]
    urls += [part.get("file_id"), part.get("file_url")]
    if any(isinstance(url, str) and not url.startswith("data:") for url in urls):
        raise UsageError("media by URL are not accepted", why="send them as a data: URL")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
