"""Every error that AdapterHub raises, in one tree.

    AdapterHubError                what, why, hint          exit 2   HTTP 500
    ├── UsageError                 cannot be right as typed          400
    │   ├── InvalidName            outside the grammar of names      400
    │   ├── ConfigError            a key or value of a config        400
    │   ├── DataError              a data file or one of its rows    400
    │   ├── TooLarge               a request's body                  413
    │   └── HeadersTooLarge        a request's headers               431
    ├── Unauthorized               no key, or not a good one         401
    ├── Forbidden                  the key lacks the scope           403
    ├── TooManyRequests            over a limit; try later           429
    ├── NotFound                   tenant, adapter, version, …       404
    ├── Gone                       yanked or deleted                 410
    ├── Conflict                   somebody else was first           409
    │   └── AlreadyExists          a create-only key is taken        409
    ├── AdapterError               an adapter directory              422
    │   ├── Unsupported            whole, but cannot be used so      422
    │   └── EngineRefused          the engine does not load it       400
    ├── BaseMismatch               trained on another base           422
    ├── Untrusted                  not signed by a required key      422
    ├── RequirementUnmet       falls short of --require          422   exit 1
    ├── MissingDependency          an extra or a program is absent   500
    ├── StorageError               disk full, not writable, away     503
    │   ├── UnsafeStore            cannot keep our promises          503
    │   └── RegistryAway           a server cannot look a name up    503
    ├── StillLoading               an adapter, longer than we wait   503
    ├── IntegrityError             bytes differ from the record      500   exit 1
    ├── RunFailed                  training or export broke off      500   exit 1
    └── EngineError                the engine died or never came up  503   exit 1
        └── NotReady               it starts, or stops; come again   503   exit 1

A user's mistake exits with 2; something that broke under the user exits with 1.
"""

from __future__ import annotations

from typing import ClassVar


class AdapterHubError(Exception):
    """The root. ``what`` happened, ``why``, and ``hint``: the next command to type.

    ``what`` and ``why`` may be shown to HTTP clients where ``public`` says so; ``hint`` is for the terminal.
    """

    exit_code: ClassVar[int] = 2
    status: ClassVar[int] = 500

    def __init__(self, what: str, *, why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" if self.why else self.what


class UsageError(AdapterHubError):
    """What was typed or sent cannot be right, whatever the state of the world."""

    status = 400


class InvalidName(UsageError):
    """A tenant, adapter, channel or reference outside the grammar of `adapterhub.refs`."""


class ConfigError(UsageError):
    """A key or a value of a configuration, with its file, line and column where known."""


class DataError(UsageError):
    """A data file or one of its rows, as ``file:line``."""


class TooLarge(UsageError):
    """A request body over the limit."""

    status = 413


class HeadersTooLarge(UsageError):
    """The headers of a request over the limit."""

    status = 431


class Unauthorized(AdapterHubError):
    """No API key, or one that is unknown, revoked or expired."""

    status = 401


class Forbidden(AdapterHubError):
    """The key is good, and does not allow this."""

    status = 403


class TooManyRequests(AdapterHubError):
    """Over a limit. ``retry_after`` is in seconds, ``headers`` go with the answer."""

    status = 429

    def __init__(
        self, what: str, *, why: str = "", retry_after: float = 1.0, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(what, why=why)
        self.retry_after = retry_after
        self.headers = headers


class NotFound(AdapterHubError):
    """A tenant, adapter, version, channel, run or base that is not there (or may not be seen)."""

    status = 404


class Gone(AdapterHubError):
    """A version that exists but was yanked or deleted."""

    status = 410


class Conflict(AdapterHubError):
    """Somebody else moved it first."""

    status = 409


class AlreadyExists(Conflict):
    """A create-only key, folder or number is taken."""


class AdapterError(AdapterHubError):
    """An adapter directory is broken: missing config, truncated weights, NaN."""

    status = 422


class Unsupported(AdapterError):
    """The adapter is whole, but what was asked for cannot be done with it."""


class EngineRefused(AdapterError):
    """The adapter passed every check of ours, and the engine does not load it: who asks for it is told so."""

    status = 400


class BaseMismatch(AdapterHubError):
    """The adapter was trained on another base model."""

    status = 422


class Untrusted(AdapterHubError):
    """No good signature by a key that is required: nothing of the version is used."""

    status = 422


class RequirementUnmet(AdapterHubError):
    """An adapter falls short of what `ah publish --require` asks for. Nothing was published."""

    exit_code = 1
    status = 422


class MissingDependency(AdapterHubError):
    """An optional extra or an external program is not installed."""


class StorageError(AdapterHubError):
    """The disk is full, the folder not writable, the store out of reach."""

    status = 503


class UnsafeStore(StorageError):
    """The store cannot keep the registry's promises (create-if-absent, read after write)."""


class RegistryAway(StorageError):
    """A server cannot look up what is asked for: its registry does not answer. What is loaded goes on being served."""


class StillLoading(AdapterHubError):
    """An adapter is on its way, but not within the time that a request waits. ``retry_after`` is in seconds."""

    status = 503

    def __init__(self, what: str, *, why: str = "", hint: str = "", retry_after: float = 1.0) -> None:
        super().__init__(what, why=why, hint=hint)
        self.retry_after = retry_after


class IntegrityError(AdapterHubError):
    """Bytes differ from what was published. Never served, never exported."""

    exit_code = 1


class RunFailed(AdapterHubError):
    """A training or an export broke off; the hint says how to go on."""

    exit_code = 1


class EngineError(AdapterHubError):
    """The serving engine died, or never became ready."""

    exit_code = 1
    status = 503


class NotReady(EngineError):
    """A server that starts, stops, or starts again: it takes no requests now. ``retry_after`` is in seconds."""

    def __init__(self, what: str, *, why: str = "", hint: str = "", retry_after: float = 5.0) -> None:
        super().__init__(what, why=why, hint=hint)
        self.retry_after = retry_after
