"""Where a registry on S3 is: ``s3://bucket/prefix`` and, behind a ``?``, what differs from the usual AWS settings.

    endpoint=https://minio.example    another S3 than Amazon's; default AWS_ENDPOINT_URL_S3, then the profile's
    region=eu-central-1               default AWS_REGION, then the profile's
    profile=ci                        of ~/.aws/config; default AWS_PROFILE
    timeout=5                         seconds to wait for an answer, each of three times; default 30
    path_style=true                   https://host/bucket/key, not https://bucket.host/key; the default with endpoint=
    single_writer=true                a store that cannot create unless absent: see `doctor`

The address is all that a colleague needs, so it is in one place and can be passed on. Credentials are never in it: they
come from where boto3 looks for them (environment, profile, the machine's role).
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from adapterhub.errors import InvalidName, UsageError
from adapterhub.registry.store import check_key

_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,61}[a-zA-Z0-9]")
_TEXTS = ("endpoint", "region", "profile")
_FLAGS = ("path_style", "single_writer")
_SETTINGS = (*_TEXTS, "timeout", *_FLAGS)
_LONGEST = 3600.0  # seconds
_HINT = "--registry s3://bucket/prefix"


@dataclass(frozen=True)
class Address:
    """One registry on S3."""

    bucket: str
    prefix: str = ""  # "team/models": no slash at either end
    endpoint: str = ""
    region: str = ""
    profile: str = ""
    timeout: float | None = None  # seconds; None: as `requests.Patience` thinks right
    path_style: bool | None = None  # None: as botocore thinks right for the endpoint
    single_writer: bool = False

    @property
    def url(self) -> str:
        """Opens the same registry again."""
        query = {name: getattr(self, name) for name in _TEXTS if getattr(self, name)}
        if self.timeout is not None:
            query["timeout"] = f"{self.timeout:g}"
        if self.path_style is not None:
            query["path_style"] = str(self.path_style).lower()
        if self.single_writer:
            query["single_writer"] = "true"
        path = f"/{quote(self.prefix)}" if self.prefix else ""
        return f"s3://{self.bucket}{path}" + (f"?{urlencode(query, safe=':/')}" if query else "")

    @property
    def name(self) -> str:
        """The address without its settings, for messages."""
        return f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    def key(self, key: str) -> str:
        """The whole key of one of the registry's keys."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def own(self, key: str) -> str:
        """The registry's key of a whole one."""
        return key.removeprefix(f"{self.prefix}/") if self.prefix else key


def parse(url: str) -> Address:
    """Raises UsageError for what is no address of a bucket, or names a setting that there is not."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise UsageError(
            "a registry's address holds no credentials",
            why="it is printed, logged and passed on",
            hint="export AWS_PROFILE=…, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if not _BUCKET.fullmatch(parts.netloc):
        raise UsageError(f"{url!a} names no bucket", why=f"{parts.netloc!a} cannot be one", hint=_HINT)
    prefix = unquote(parts.path).strip("/")
    try:
        check_key(prefix or "none")
    except InvalidName as error:
        raise UsageError(
            f"{prefix!a} cannot be a prefix in a bucket", why="it has an empty part", hint=_HINT
        ) from error
    settings = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in settings:
        if name not in _SETTINGS:
            raise UsageError(
                f"{name!a} is no setting of a registry on S3",
                why=f"settings are {', '.join(_SETTINGS)}",
                hint=f"{_HINT}?endpoint=https://…",
            )
    texts = {name: settings.get(name, "") for name in _TEXTS}
    _check_endpoint(texts["endpoint"])
    return Address(
        parts.netloc,
        prefix,
        **texts,
        timeout=_seconds(settings.get("timeout")),
        path_style=_flag(settings, "path_style"),
        single_writer=bool(_flag(settings, "single_writer")),
    )


def _check_endpoint(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if endpoint and (parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or "@" in parts.netloc):
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        raise UsageError(f"{shown!a} is no endpoint", why="one is http:// or https:// and a host", hint=_HINT)


def _flag(settings: dict[str, str], name: str) -> bool | None:
    value = settings.get(name)
    if value not in {None, "true", "false"}:
        raise UsageError(f"{name}={value!a} is neither true nor false", hint=f"{_HINT}?{name}=true")
    return None if value is None else value == "true"


def _seconds(value: str | None) -> float | None:
    if value is None:
        return None
    with suppress(ValueError):
        if 0 < float(value) <= _LONGEST:
            return float(value)
    raise UsageError(
        f"timeout={value!a} is no time", why=f"it is seconds, up to {_LONGEST:g}", hint=f"{_HINT}?timeout=5"
    )
