"""Errors as HTTP clients see them: the status of `errors.py`, the JSON shape of the API, and never a path.

A client's mistake (4xx) is told as it is: those texts are written in this package and name no file. What broke on our
side (5xx) is told in general; the log has the rest under the request's id.
"""

from __future__ import annotations

import json
import logging
import math
from http import HTTPStatus
from typing import Any

from adapterhub.errors import AdapterHubError, NotReady, RegistryAway, StillLoading, TooManyRequests, Unauthorized

log = logging.getLogger(__name__)

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    410: "GoneError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_RETRY_SECONDS = 5.0  # where an error does not say
_UNAVAILABLE = "this cannot be answered now; try again"
_BROKEN = "something broke on our side"


def error_answer(error: AdapterHubError, *, path: str, request_id: str) -> tuple[int, bytes]:
    """Status and JSON body. Logs what the client is not told."""
    message = str(error)
    if error.status >= 500 and not isinstance(error, StillLoading | NotReady | RegistryAway):  # told as they are
        log.error("request %s: %s", request_id, error, exc_info=error)
        message = f"{_UNAVAILABLE if error.status == 503 else _BROKEN} (request {request_id})"
    return error.status, json.dumps(_shape(error.status, message, path)).encode()


def error_headers(error: AdapterHubError) -> list[tuple[bytes, bytes]]:
    """What HTTP wants beside the body: which kind of key, and when to come again."""
    if isinstance(error, Unauthorized):
        return [(b"www-authenticate", b"Bearer")]
    if error.status in (429, 503):
        wanted = _RETRY_SECONDS
        if isinstance(error, TooManyRequests | StillLoading | NotReady):
            wanted = error.retry_after
        seconds = max(1, math.ceil(wanted))  # whole: RFC 9110
        limits = error.headers if isinstance(error, TooManyRequests) else ()
        closing = [(b"connection", b"close")] if isinstance(error, NotReady) else []  # the next may go elsewhere
        return [(b"retry-after", str(seconds).encode()), *limits, *closing]
    return []


def _shape(status: int, message: str, path: str) -> dict[str, Any]:
    if path.startswith("/v1/messages"):  # Anthropic's API
        kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    kind = _TYPES.get(status, HTTPStatus(status).phrase.replace(" ", "") + "Error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
