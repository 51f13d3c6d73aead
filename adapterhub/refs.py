"""Names: the grammar of tenants, adapters and references.

    acme/support              the newest active version: the same as acme/support@latest
    acme/support@3            version 3, for ever the same bytes
    acme/support@sha256:9f…   the version with that digest (64 hex digits)
    acme/support@prod         whatever the channel `prod` points to now

Tenants are ``[a-z0-9](-?[a-z0-9])*``; adapters the same plus ``_`` and single dots; channels start with a
letter. At most 63 characters each. These names become path and bucket keys, so nothing else is ever let in; nor what
Windows takes for a device (``con``), or the Hub for a file (``x.git``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapterhub.errors import InvalidName

LATEST = "latest"
MAX_LENGTH = 63  # characters
MAX_VERSION = 999_999_999  # keys are written as 10**9 - n (registry/layout.py)

# vLLM applies an adapter of one of the first five names to other requests' multimodal parts
# (its default-multimodal-LoRA matching); `base` is the base model.
RESERVED_ADAPTERS = frozenset({"text", "image", "audio", "video", "input", "base"})

_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))})
_FILE_ENDINGS = (".git", ".ipynb")  # no repository of the Hub may end so

_TENANT = re.compile(r"[a-z0-9](?:-?[a-z0-9])*")
_ADAPTER = re.compile(r"[a-z0-9](?:[-_.]?[a-z0-9])*")
_CHANNEL = re.compile(r"[a-z](?:[-_.]?[a-z0-9])*")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, order=True)
class AdapterName:
    """A line of versions under a tenant: ``acme/support``."""

    tenant: str
    adapter: str

    def __post_init__(self) -> None:
        check_tenant(self.tenant)
        check_adapter(self.adapter)

    @classmethod
    def parse(cls, text: str) -> AdapterName:
        """Read ``tenant/adapter``. Raises InvalidName."""
        tenant, slash, adapter = text.partition("/")
        if not slash:
            raise InvalidName(
                f"{_show(text)} is not an adapter name",
                why="an adapter name is tenant/adapter",
                hint="write it like acme/support",
            )
        return cls(tenant, adapter)

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}"

    def at(self, selector: int | str) -> AdapterRef:
        """A reference to one version of this adapter, by number, digest or channel."""
        if isinstance(selector, int):
            return AdapterRef(self, version=selector)
        return AdapterRef.parse(f"{self}@{selector}")


@dataclass(frozen=True)
class AdapterRef:
    """A reference to one version: by number, by digest, or through a channel. Exactly one is set."""

    name: AdapterName
    version: int | None = None
    digest: str | None = None
    channel: str | None = None

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.version, self.digest, self.channel)) != 1:
            raise InvalidName(f"a reference to {self.name} needs exactly one of version, digest and channel")
        if self.version is not None and not 1 <= self.version <= MAX_VERSION:
            raise InvalidName(f"{self.version} is not a version number", why=f"versions go from 1 to {MAX_VERSION}")
        if self.digest is not None and not _DIGEST.fullmatch(self.digest):
            raise InvalidName(f"{_show(self.digest)} is not a digest", why="a digest is sha256: and 64 hex digits")
        if self.channel is not None:
            check_channel(self.channel, allow_latest=True)

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Read ``tenant/adapter[@version|@sha256:digest|@channel]``. Raises InvalidName."""
        bare, at, selector = text.partition("@")
        name = AdapterName.parse(bare)
        if not at:
            return cls(name, channel=LATEST)
        if _VERSION.fullmatch(selector):
            return cls(name, version=int(selector))
        if selector.startswith("sha256:"):
            return cls(name, digest=selector)
        if selector[:1].isdigit() or not selector:
            raise InvalidName(
                f"{_show(text)} names no version",
                why="after @ stands a version number from 1, a sha256: digest or a channel",
                hint=f"ah ls {name}",
            )
        return cls(name, channel=selector)

    @property
    def selector(self) -> str:
        """What stands after the ``@``."""
        return str(self.version or self.digest or self.channel)

    @property
    def is_fixed(self) -> bool:
        """Whether it names the same version for ever: a number or a digest, not a channel."""
        return self.channel is None

    def __str__(self) -> str:
        return f"{self.name}@{self.selector}"


def check_tenant(text: str) -> None:
    """Raises InvalidName unless ``text`` is a tenant name."""
    _check("tenant", text, _TENANT, "lower-case letters, digits and single hyphens between them")


def check_adapter(text: str) -> None:
    """Raises InvalidName unless ``text`` is an adapter name that may be published."""
    _check("adapter", text, _ADAPTER, "lower-case letters, digits and single - _ . between them")
    if text in RESERVED_ADAPTERS:
        raise InvalidName(
            f"the adapter name {text!r} is reserved",
            why="it means something else to the serving engine",
            hint=f"choose another, like {text}-lora",
        )


def check_channel(text: str, *, allow_latest: bool = False) -> None:
    """Raises InvalidName unless ``text`` is a channel; ``latest`` is computed and cannot be set."""
    _check("channel", text, _CHANNEL, "a letter, then lower-case letters, digits and single - _ . between them")
    if text == LATEST and not allow_latest:
        raise InvalidName(
            "the channel 'latest' cannot be set or rolled back",
            why="it is computed: the newest active version",
            hint="use a channel of your own, like prod",
        )


def _check(kind: str, text: str, pattern: re.Pattern[str], grammar: str) -> None:
    if len(text) > MAX_LENGTH:
        raise InvalidName(f"the {kind} name {_show(text)} is too long", why=f"at most {MAX_LENGTH} characters")
    if not pattern.fullmatch(text):
        raise InvalidName(f"{_show(text)} is not a {kind} name", why=f"allowed are {grammar}")
    if text.partition(".")[0] in _DEVICES:
        raise InvalidName(f"{_show(text)} cannot be a {kind} name", why="it is a device on Windows, no folder")
    if text.endswith(_FILE_ENDINGS):
        raise InvalidName(f"{_show(text)} cannot be a {kind} name", why="the Hub allows no repository that ends so")


def _show(text: str) -> str:
    """``text`` safe for a terminal and a log: escaped, and cut where it is long."""
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "…'"
