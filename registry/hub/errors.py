"""What huggingface_hub raises, in our words: the one place where it is judged and wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adapterhub.errors import AdapterHubError, AlreadyExists, Conflict, InvalidName, NotFound, StorageError

LOGIN = "hf auth login, or export HF_TOKEN=…"
_AGAIN = "type the same command again"


class Busy(StorageError):
    """Another try may help; what was asked for may have been done all the same."""

    def __init__(self, what: str, *, why: str = "", hint: str = "", after: float = 0) -> None:
        """``after``: seconds that the Hub asked to wait."""
        super().__init__(what, why=why, hint=hint)
        self.after = after


class Stale(Conflict):
    """A commit whose parent is no longer the head of its branch."""


class Taken(AlreadyExists):
    """A tag, branch or repository that is there."""


class NoRepository(NotFound):
    """No such repository, or not for this token: the Hub does not tell which."""


@contextmanager
def hub_errors(what: str, *, page: str = "") -> Iterator[None]:
    """Turns what the client says into our errors: ``what`` could not be done; ``page``: the repository's address."""
    from huggingface_hub import errors as hub

    transport = hub.HfHubHTTPError.__bases__[0]  # the HTTP library's own root, whichever library that is
    known = (transport, hub.OfflineModeIsEnabled, hub.LocalTokenNotFoundError, ValueError)
    try:
        yield
    except known as error:
        raise _judged(error, what, page) from error
    except RuntimeError as error:  # the client's, around what broke an upload
        if not isinstance(error.__cause__, known):
            raise
        raise _judged(error.__cause__, what, page) from error


def _judged(error: BaseException, what: str, page: str) -> AdapterHubError:
    from huggingface_hub import errors as hub

    if isinstance(error, hub.HfHubHTTPError):
        return _answered(error, what, page)
    if isinstance(error, hub.OfflineModeIsEnabled):
        why = "the offline mode of huggingface_hub is on"
        return StorageError(what, why=why, hint=f"unset HF_HUB_OFFLINE, then {_AGAIN}")
    if isinstance(error, hub.LocalTokenNotFoundError):
        return StorageError(what, why="there is no token for the Hub", hint=LOGIN)
    if isinstance(error, hub.HFValidationError):
        return InvalidName(what, why=str(error), hint="look at the name of the organisation and the adapter")
    if isinstance(error, ValueError):  # the client's word for metadata that the Hub refuses, and for broken answers
        return StorageError(what, why=str(error), hint=f"look at {page}" if page else _AGAIN)
    return Busy(what, why=f"the Hub did not answer: {error!r}", hint=f"look whether it is up, then {_AGAIN}")


def _answered(error: Any, what: str, page: str) -> AdapterHubError:
    from huggingface_hub import errors as hub

    status, said = error.response.status_code, _said(error)
    if isinstance(error, hub.GatedRepoError):
        return StorageError(what, why="the repository is gated", hint=f"ask for access on {page}, then {_AGAIN}")
    if isinstance(error, hub.DisabledRepoError):
        return StorageError(what, why="the Hub has disabled the repository", hint=f"look at {page}")
    if isinstance(error, hub.RepositoryNotFoundError):
        return NoRepository(what, why="there is no such repository, or the token may not see it", hint=LOGIN)
    if isinstance(error, hub.RevisionNotFoundError | hub.EntryNotFoundError) or status == 404:
        return NotFound(what, why=said, hint=f"look at {page}")
    if status == 401:
        return StorageError(what, why=f"the Hub does not take the token: {said}", hint=LOGIN)
    if status in {402, 403}:
        return StorageError(
            what, why=said, hint="hf auth whoami  # needs a token with write access to the organisation"
        )
    if status == 409:
        return Taken(what, why=said, hint=_AGAIN)
    if status == 412:
        return Stale(what, why="somebody else was first", hint=_AGAIN)
    if status == 429:
        after = _seconds(error.response.headers.get("Retry-After", ""))
        wait = f"wait {after:.0f} seconds" if after else "wait some minutes"
        return Busy(
            what, why="the Hub has too many requests of this account", hint=f"{wait}, then {_AGAIN}", after=after
        )
    if status in {408, 500, 502, 503, 504}:
        return Busy(what, why=said, hint=f"look at https://status.huggingface.co, then {_AGAIN}")
    return StorageError(what, why=said, hint=f"look at {page}" if page else _AGAIN)


def _said(error: Any) -> str:
    message = error.server_message or error.response.headers.get("X-Error-Message") or ""
    return f"the Hub said {error.response.status_code}: {message[:300]}".removesuffix(": ")


def _seconds(text: str) -> float:
    return float(text) if text.isdigit() else 0.0
