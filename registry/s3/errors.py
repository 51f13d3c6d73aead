"""What boto3 raises, in our words: the one place where it is judged and wrapped.

`is_passing` says whether another try may help; `wrapped` says what happened, why, and what to type.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from adapterhub.errors import AdapterHubError, AlreadyExists, NotFound, StorageError, UnsafeStore
from adapterhub.registry.s3.address import Address

_BUSY = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "ServiceUnavailable",
}
_PASSING = _BUSY | {"RequestTimeout", "InternalError", "ConditionalRequestConflict", "OperationAborted"}
_PASSING_STATUS = {429, 500, 502, 503, 504}
_TIMEOUTS = ("ReadTimeoutError", "ConnectTimeoutError")
_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
    "301",
}
_SIGN = "aws sts get-caller-identity  # whose credentials are these?"
_RULES = "ask for access; policies that are enough are in deploy/iam"

# code → (why, what to type); {bucket}, {message} and {region} are filled in
_REASONS = {
    "NoSuchBucket": ("there is no bucket {bucket}", "aws s3 mb s3://{bucket}"),
    "InvalidAccessKeyId": ("the store does not know the access key", _SIGN),
    "SignatureDoesNotMatch": ("the secret key is not the one of the access key", _SIGN),
    "InvalidToken": ("the session token is not valid", _SIGN),
    "ExpiredToken": ("the session token has expired", "aws sso login, or export fresh AWS_* credentials"),
    "TokenRefreshRequired": ("the session token has expired", "aws sso login, or export fresh AWS_* credentials"),
    "RequestTimeTooSkewed": (
        "this machine's clock is more than 15 minutes off the store's",
        "timedatectl set-ntp true  # set the clock, then type the same command again",
    ),
    "RequestExpired": ("this machine's clock is behind the store's", "timedatectl set-ntp true"),
    "QuotaExceeded": ("the store is full, or the bucket's quota is used up", "ah gc, or ask for more room"),
    "XMinioStorageFull": ("the store is full", "ah gc, or ask for more room"),
}


class Denied(StorageError):
    """The store knows us and says no. Where listing is limited, also its answer for what is not there."""


class UploadGone(StorageError):
    """An upload by parts was finished, aborted or changed by somebody else."""


class PastEnd(StorageError):
    """A range beyond the last byte."""


class Broken(Exception):
    """A body ended early, or stood still. Never leaves the store: another try follows, or a StorageError."""


@dataclass(frozen=True)
class _Answer:
    """What a store said instead of doing it."""

    code: str
    status: int
    message: str
    region: str  # where the bucket is, if it said so


@cache
def foreign() -> tuple[type[Exception], ...]:
    """What boto3 and a body that breaks may raise. Imported late: boto3 takes 0.3 s."""
    from botocore.exceptions import BotoCoreError, ClientError

    # botocore follows a 301 that names no region (a proxy's, to https) for ever
    return BotoCoreError, ClientError, Broken, RecursionError


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, Broken):
        return True
    answer = _answer(error)
    if answer is not None:
        return answer.code in _PASSING or answer.status in _PASSING_STATUS
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"SSLError", "ProxyConnectionError"}:
        return False
    return bool(kinds & {"HTTPClientError", "IncompleteReadError", "ResponseParserError"})


def is_timeout(error: Exception) -> bool:
    """Whether it took long to fail: few tries, or nobody gets an answer for minutes."""
    return type(error).__name__ in _TIMEOUTS


def was_answered(error: StorageError) -> bool:
    """Whether the store said no, rather than nothing. To a HEAD it cannot say why: ask with a LIST."""
    return isinstance(error.__cause__, Exception) and _answer(error.__cause__) is not None


def wrapped(error: Exception, address: Address, *, key: str = "") -> AdapterHubError:
    """The error that our callers see. ``key``: what the request was about."""
    answer = _answer(error)
    return _unanswered(error, address) if answer is None else _answered(answer, address, key=key)


def _answer(error: Exception) -> _Answer | None:
    response = getattr(error, "response", None)
    if not isinstance(response, dict) or "Error" not in response:
        return None
    details, meta = response["Error"], response.get("ResponseMetadata", {})
    region = details.get("Region") or meta.get("HTTPHeaders", {}).get("x-amz-bucket-region", "")
    return _Answer(str(details.get("Code", "")), meta.get("HTTPStatusCode", 0), details.get("Message") or "", region)


def _answered(answer: _Answer, address: Address, *, key: str) -> AdapterHubError:
    code, status = answer.code, answer.status
    what = f"{address.name} cannot be used"
    if code == "PreconditionFailed" or status == 412:
        return AlreadyExists(f"{key} exists in {address.name}")
    if code in {"NoSuchUpload", "InvalidPart", "InvalidPartOrder"}:
        return UploadGone(f"an upload of {key} to {address.name} was ended by somebody else", hint=_AGAIN)
    if code == "NoSuchKey" or (status == 404 and code in {"404", "NotFound", ""}):
        return NotFound(f"{key} is not in {address.name}")
    if code == "InvalidRange" or status == 416:
        return PastEnd(f"{key} of {address.name} has no such bytes")
    if code in _REASONS:
        why, hint = _REASONS[code]
        return StorageError(what, why=why.format(bucket=address.bucket), hint=hint.format(bucket=address.bucket))
    if code in _REGION:
        return _elsewhere(answer, address)
    if code in {"NotImplemented", "501"} or status == 501:
        return UnsafeStore(f"{address.name} cannot hold a registry", why=answer.message or code, hint=way_out(address))
    if code in {"AccessDenied", "AllAccessDisabled", "403"} or status == 403:
        return Denied(
            f"no permission for {key or address.name} in s3://{address.bucket}", why=_said(answer), hint=_RULES
        )
    if code in _BUSY or status in {429, 503}:
        return StorageError(f"{address.name} is too busy", why=_said(answer), hint="wait a minute, then " + _AGAIN)
    return StorageError(what, why=_said(answer), hint=_DOCTOR.format(url=address.url))


_AGAIN = "type the same command again"
_DOCTOR = "ah registry doctor '{url}'"


def _said(answer: _Answer) -> str:
    return f"the store said {answer.code or answer.status}: {answer.message}".removesuffix(": ")


def _elsewhere(answer: _Answer, address: Address) -> StorageError:
    where = f"it is in {answer.region}" if answer.region else _said(answer)
    region = answer.region or "REGION"
    return StorageError(
        f"the bucket {address.bucket} is not in the region that was asked",
        why=where,
        hint=f"--registry '{address.name}?region={region}', or export AWS_REGION={region}",
    )


def _unanswered(error: Exception, address: Address) -> AdapterHubError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "recursion depth" in str(error):  # botocore may have wrapped it
        kinds = {"RecursionError"}
    what = f"{address.name} cannot be reached"
    for names, why, hint in _UNANSWERED:
        if kinds & names:
            return StorageError(what, why=why or str(error), hint=hint)
    return StorageError(what, why=str(error), hint=_DOCTOR.format(url=address.url))


_LOGIN = "export AWS_PROFILE=…, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; or aws configure"
_UNANSWERED: tuple[tuple[set[str], str, str], ...] = (
    ({"NoCredentialsError"}, "there are no credentials", _LOGIN),
    ({"PartialCredentialsError", "CredentialRetrievalError"}, "", _LOGIN),
    ({"SSOError", "SSOTokenLoadError", "TokenRetrievalError", "UnauthorizedSSOTokenError"}, "", "aws sso login"),
    ({"ProfileNotFound"}, "", "aws configure list-profiles"),
    ({"NoRegionError"}, "no region is set", "export AWS_REGION=…, or add ?region=… to the address"),
    (
        {"SSLError"},
        "",
        "export AWS_CA_BUNDLE=/path/to/ca.pem for a private authority; http:// in endpoint= where there is no TLS",
    ),
    (
        {"RecursionError"},
        "the endpoint sends every request elsewhere, and does not say where",
        "look whether endpoint= should be https://, or region=… another",
    ),
    ({"ProxyConnectionError"}, "", "look at HTTPS_PROXY and NO_PROXY"),
    (
        {"ReadTimeoutError", "ConnectTimeoutError"},
        "it was asked several times and did not answer in time",
        "look whether the endpoint is up, then " + _AGAIN + "; timeout=5 in the address waits for less",
    ),
    ({"EndpointConnectionError"}, "", "look whether endpoint= is right and up, then " + _AGAIN),
    ({"Broken", "HTTPClientError", "ResponseParserError"}, "", _AGAIN),
)


def way_out(address: Address) -> str:
    """What to do with a store that cannot create unless absent."""
    alone = address.url + ("&" if "?" in address.url else "?") + "single_writer=true"
    return f"take a store that honours If-None-Match; or, if one process alone ever writes: --registry '{alone}'"
