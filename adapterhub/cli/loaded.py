"""`ah loaded`: which adapter versions a running server holds, over its admin API."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from adapterhub.cli.output import JsonOption, print_json, print_table
from adapterhub.errors import (
    AdapterHubError,
    Conflict,
    EngineError,
    Forbidden,
    Gone,
    NotFound,
    Unauthorized,
    UsageError,
)

DEFAULT_URL = "http://127.0.0.1:8000/v1"
UrlOption = Annotated[str | None, typer.Option("--url", help=f"The server; default $AH_URL, then {DEFAULT_URL}.")]


def loaded(url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Show the versions that a server holds, and how many requests are under way on each.

    On a server with keys it takes $AH_API_KEY, which needs the scope admin.
    """
    found = admin("GET", "loaded", url=url)
    if as_json:
        print_json(found)
        return
    rows = [[entry["model"], str(entry["leases"]), "yes" if entry["pinned"] else ""] for entry in found]
    print_table(["VERSION", "REQUESTS", "PINNED"], rows)


def admin(method: str, path: str, *, url: str | None, body: Any = None, scope: str = "admin") -> Any:
    """An answer of the admin API, which takes a key with ``scope``. Raises AdapterHubError."""
    import httpx

    server = (url or os.environ.get("AH_URL") or DEFAULT_URL).rstrip("/").removesuffix("/v1")
    key = os.environ.get("AH_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.request(method, f"{server}/adapterhub/{path}", json=body, headers=headers, timeout=600)
        told = answer.json()
    except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise EngineError(
            f"no server answers at {server}", why=str(error), hint="ah serve --base …, or --url http://HOST:PORT/v1"
        ) from error
    except ValueError as error:
        raise EngineError(f"{server} is no AdapterHub server", why="its answer is not JSON") from error
    if answer.is_success:
        return told
    raise _refusal(answer.status_code, str(told.get("error", {}).get("message", answer.text)), scope)


def _refusal(status: int, message: str, scope: str) -> AdapterHubError:
    if status == 401:
        return Unauthorized("the server asks for an API key", why=message, hint="export AH_API_KEY=ah_…")
    if status == 403:
        return Forbidden("this key may not do that", why=message, hint=f"ah key create TENANT --scope {scope}")
    kinds = {400: UsageError, 404: NotFound, 409: Conflict, 410: Gone, 422: UsageError}
    if status in kinds:
        return kinds[status](message)
    return EngineError(f"the server refused ({status})", why=message)
