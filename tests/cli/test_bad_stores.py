"""What `ah` says where a bucket cannot be used: what happened, why, and what to type next."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Ah = Callable[..., Any]
PROXY = Path(__file__).parents[1] / "registry" / "fault_proxy.py"


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nobody, and nothing of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module", autouse=True)
def _session() -> Iterator[None]:
    """One for all tests here, as for all commands of a process: reading S3's model is most of what they would take."""
    from adapterhub.registry.s3.requests import session

    session.cache_clear()
    yield
    session.cache_clear()


@pytest.fixture
def without_session(_session: None) -> Iterator[None]:
    from adapterhub.registry.s3.requests import session

    session.cache_clear()
    yield
    session.cache_clear()


@pytest.fixture
def refusing() -> Iterator[Any]:
    """A store that says no to everything, as ``refusing.breaks(kind, method)`` tells it."""
    spec = importlib.util.spec_from_file_location("fault_proxy", PROXY)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.proxy_to("http://127.0.0.1:1") as proxy:
        yield proxy


def refused(done: Any, *said: str) -> None:
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("error: ")
    assert "next:" in done.err
    assert "Traceback" not in done.err
    for text in said:
        assert text in done.err


@pytest.mark.parametrize(
    ("kind", "said", "todo"),
    [
        ("key", "does not know the access key", "aws sts get-caller-identity"),
        ("secret", "the secret key is not the one", "aws sts get-caller-identity"),
        ("bucket", "there is no bucket models", "aws s3 mb s3://models"),
        ("denied", "no permission for", "deploy/iam"),
        ("skew", "clock is more than 15 minutes off", "timedatectl"),
    ],
)
@pytest.mark.parametrize("command", ["ls", "publish", "pull", "gc", "delete-tenant"])
def test_a_store_that_says_no(
    ah: Ah, refusing: Any, adapter_factory: Callable[..., Path], command: str, kind: str, said: str, todo: str
) -> None:
    for method in ("GET", "PUT", "POST", "DELETE", "HEAD"):
        refusing.breaks(kind, method, times=1000)
    words: dict[str, tuple[object, ...]] = {
        "publish": (adapter_factory(), "--name", "acme/support"),
        "pull": ("acme/support", "--to", "there"),
        "delete-tenant": ("acme", "--confirm", "acme"),
    }
    url = f"s3://models/team?endpoint={refusing.url}"
    refused(ah(command, *words.get(command, ()), "--registry", url), said, todo)
    assert not Path("there").exists()


def test_a_proxy_that_redirects(ah: Ah, refusing: Any) -> None:
    """As nginx does, from http to https: it names no region, and botocore asks for one without end."""
    for method in ("GET", "HEAD"):
        refusing.breaks("301", method, times=10_000)
    done = ah("ls", "--registry", f"s3://models/team?endpoint={refusing.url}")
    refused(done, "the endpoint sends every request elsewhere", "endpoint= should be https://")


def test_a_store_without_tls(ah: Ah, refusing: Any) -> None:
    url = f"s3://models/team?endpoint={refusing.url.replace('http:', 'https:')}"
    refused(ah("ls", "--registry", url), "cannot be reached", "AWS_CA_BUNDLE")


def test_no_credentials(ah: Ah, refusing: Any, without_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    refused(ah("ls", "--registry", f"s3://models/team?endpoint={refusing.url}"), "no credentials", "AWS_PROFILE")
