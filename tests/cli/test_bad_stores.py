"""What `ah` says where a bucket cannot be used: what happened, why, and what to type next."""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import logging
import os
import ssl
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


@pytest.fixture(scope="module")
def proxy_to() -> Any:
    spec = importlib.util.spec_from_file_location("fault_proxy", PROXY)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.proxy_to


@pytest.fixture
def refusing(proxy_to: Any) -> Iterator[Any]:
    """A store that says no to everything, as ``refusing.breaks(kind, method)`` tells it."""
    with proxy_to("http://127.0.0.1:1") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bucket_at() -> Iterator[Callable[..., str]]:
    """moto's S3 over HTTP: makes a bucket there, and returns the endpoint."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_UPLOAD_PART_MIN_SIZE", str(2**20))  # read when moto is imported; other tests need it
        from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}

    def made(bucket: str, *, versions: bool = False, lock: bool = False) -> str:
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
        client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=lock)
        if versions:
            client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        if lock:
            rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
            configuration = {"ObjectLockEnabled": "Enabled", "Rule": rule}
            client.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration=configuration)
        return endpoint

    yield made
    server.stop()


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


def test_the_wrong_region(ah: Ah, refusing: Any) -> None:
    for method in ("GET", "HEAD"):
        refusing.breaks("region", method, times=1000)
    url = f"s3://models/team?endpoint={refusing.url}&region=us-east-1"
    refused(ah("ls", "--registry", url), "not in the region that was asked", "it is in eu-west-1", "region=eu-west-1")


@pytest.mark.parametrize("command", ["ls", "publish", "pull"])
def test_an_endpoint_that_is_down(
    ah: Ah, adapter_factory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("adapterhub.registry.s3.requests.Patience.pause", lambda self, failures: 0.0)
    words = {"publish": (adapter_factory(), "--name", "acme/support"), "pull": ("acme/support",)}.get(command, ())
    done = ah(command, *words, "--registry", "s3://models/team?endpoint=http://127.0.0.1:1")
    refused(done, "s3://models/team cannot be reached", "look whether endpoint= is right and up")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ls", "publish"])
def test_an_endpoint_that_hangs(
    ah: Ah, refusing: Any, adapter_factory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Its user waits three times as long as the address says, and no longer."""
    monkeypatch.setattr("adapterhub.registry.s3.requests.Patience.pause", lambda self, failures: 0.0)
    for method in ("GET", "HEAD", "PUT"):
        refusing.breaks("hang", method, times=1000)
    words = (adapter_factory(), "--name", "acme/support") if command == "publish" else ()
    done = ah(command, *words, "--registry", f"s3://models/team?endpoint={refusing.url}&timeout=0.2")
    refused(done, "did not answer in time", "look whether the endpoint is up", "timeout=5")


@pytest.mark.slow
def test_tls_that_nobody_vouches_for(
    ah: Ah, proxy_to: Any, bucket_at: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with proxy_to(bucket_at("private"), tls=context) as proxy:
        url = f"s3://private/team?endpoint={proxy.url}"
        refused(ah("ls", "--registry", url), "certificate verify failed", "export AWS_CA_BUNDLE=")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        assert ah("ls", "--registry", url).code == 0


def self_signed(folder: Path) -> Path:
    """Key and certificate of 127.0.0.1, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)  # as the builder compares them
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now)
    built = built.not_valid_after(now + datetime.timedelta(days=1)).add_extension(host, critical=False)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "certificate.pem"
    path.write_bytes(key.private_bytes(*form) + built.sign(key, hashes.SHA256()).public_bytes(form[0]))
    return path


@pytest.mark.slow
def test_a_bucket_that_may_only_be_read(
    ah: Ah, proxy_to: Any, bucket_at: Callable[..., str], adapter_factory: Callable[..., Path], tmp_path: Path
) -> None:
    endpoint = bucket_at("shared")
    adapter = adapter_factory()
    assert ah("publish", adapter, "--name", "acme/support", "--registry", f"s3://shared?endpoint={endpoint}").code == 0
    with proxy_to(endpoint) as proxy:
        url = f"s3://shared?endpoint={proxy.url}"
        for method in ("PUT", "POST", "DELETE"):
            proxy.breaks("denied", method, times=1000)
        for words in (
            ("publish", adapter, "--name", "acme/support"),
            ("channel", "set", "acme/support", "prod", "1"),
            ("yank", "acme/support@1", "--why", "broken"),
        ):
            refused(ah(*words, "--registry", url), "no permission for", "in s3://shared", "deploy/iam")
        assert len(ah("ls", "acme/support", "--registry", url, "--json").json) == 1
        assert ah("pull", "acme/support", "--to", tmp_path / "there", "--registry", url).code == 0
        assert ah("show", "acme/support@1", "--registry", url, "--json").json["status"] == "active"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "told"), [("versions", "old versions"), ("lock", "object lock")])
def test_a_bucket_that_keeps_what_is_deleted(
    ah: Ah, bucket_at: Callable[..., str], adapter_factory: Callable[..., Path], tmp_path: Path, kind: str, told: str
) -> None:
    """It works, and its owner is told what it costs."""
    url = f"s3://kept-{kind}?endpoint={bucket_at(f'kept-{kind}', **{kind: True})}"
    done = ah("registry", "doctor", url)
    assert done.code == 0 and told in done.err
    adapter = adapter_factory()
    for _ in range(2):
        assert ah("publish", adapter, "--name", "acme/support", "--registry", url).code == 0
    assert ah("pull", "acme/support@1", "--to", tmp_path / "there", "--registry", url).code == 0
    for number in (1, 2):
        assert ah("delete", f"acme/support@{number}", "--yes", "--registry", url).code == 0
    done = ah("gc", "--older-than", "0m", "--registry", url, "--json")
    assert done.json["freed"] == 2
    refused(ah("pull", "acme/support@1", "--to", tmp_path / "again", "--registry", url), "deleted")
