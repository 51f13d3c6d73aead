"""Signatures: made and checked by OpenSSF Model Signing, refused for every reason there is."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from adapterhub.errors import IntegrityError, Untrusted, UsageError
from adapterhub.manifest import Record
from adapterhub.refs import AdapterName
from adapterhub.registry import Draft, Registry
from adapterhub.registry.base import Signature
from adapterhub.registry.memory import MemoryStore
from adapterhub.registry.signing import PublicKey, Signers, sign, signature_of, verify

Keys = tuple[Path, Path]


@pytest.fixture
def store() -> MemoryStore:
    """One kind is enough: `test_kinds` has the others."""
    return MemoryStore()


@pytest.fixture
def ana(keys: dict[str, Keys]) -> Keys:
    return keys["ana"]


@pytest.fixture
def ben(keys: dict[str, Keys]) -> Keys:
    return keys["ben"]


@pytest.fixture
def record(registry: Registry, new_draft: Callable[..., Draft], name: AdapterName) -> Record:
    return registry.publish(new_draft("one"), name=name, author="ana")


def test_a_signed_version_is_used(registry: Registry, record: Record, ana: Keys, ben: Keys) -> None:
    made = sign(registry, record, key=ana[0])
    assert registry.signatures(record) == [made]
    assert made.key == PublicKey.read(ana[1]).id
    Signers.read([ana[1]]).require(registry, record)
    Signers.read([ben[1], ana[1]]).require(registry, record)  # one of them is enough


def test_without_keys_anything_goes(registry: Registry, record: Record) -> None:
    Signers().require(registry, record)


def test_a_second_signature_of_one_key_changes_nothing(registry: Registry, record: Record, ana: Keys) -> None:
    assert sign(registry, record, key=ana[0]) == sign(registry, record, key=ana[0])
    assert len(registry.signatures(record)) == 1


def test_several_may_sign(registry: Registry, record: Record, ana: Keys, ben: Keys) -> None:
    for keys in (ana, ben):
        sign(registry, record, key=keys[0])
    assert len(registry.signatures(record)) == 2
    for keys in (ana, ben):
        Signers.read([keys[1]]).require(registry, record)


def test_the_signature_is_over_the_digest_alone(
    registry: Registry, record: Record, new_draft: Callable[..., Draft], ana: Keys
) -> None:
    sign(registry, record, key=ana[0])
    again = registry.publish(new_draft("one"), name=record.name, author="ben")
    assert (again.digest, again.version) == (record.digest, 2)
    Signers.read([ana[1]]).require(registry, again)


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(registry: Registry, record: Record, key: Path) -> str:
    with pytest.raises(Untrusted) as error:
        Signers.read([key]).require(registry, record)
    assert error.value.hint == f"ah signatures {record.ref}"
    return error.value.why


def test_an_unsigned_version_is_refused(registry: Registry, record: Record, ana: Keys) -> None:
    assert refused(registry, record, ana[1]) == "nobody signed it"


def test_a_version_that_another_key_signed_is_refused(registry: Registry, record: Record, ana: Keys, ben: Keys) -> None:
    sign(registry, record, key=ben[0])
    assert refused(registry, record, ana[1]).startswith("signed with another key")


def test_a_signature_of_another_version_is_refused(
    registry: Registry, record: Record, new_draft: Callable[..., Draft], ana: Keys
) -> None:
    other = registry.publish(new_draft("two"), name=record.name, author="ana")
    registry.add_signature(other, signature_of(record.manifest, key=ana[0]))
    assert "over another digest" in refused(registry, other, ana[1])


def test_a_signature_under_another_keys_name_is_refused(
    registry: Registry, record: Record, ana: Keys, ben: Keys
) -> None:
    registry.add_signature(record, replace(signature_of(record.manifest, key=ben[0]), key=PublicKey.read(ana[1]).id))
    assert "names another key" in refused(registry, record, ana[1])


def edited(bundle: bytes, **changes: Any) -> bytes:
    raw = json.loads(bundle)
    for path, value in changes.items():
        place = raw
        *above, last = path.split("__")
        for part in above:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return json.dumps(raw).encode()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda bundle: b"",
    "no JSON": lambda bundle: bundle[:-20],
    "no object": lambda bundle: b"[]",
    "not UTF-8": lambda bundle: b"\xff\xfe",
    "too deep": lambda bundle: b"[" * 100_000,
    "too large": lambda bundle: bundle + b" " * 5_000_000,
    "no key": lambda bundle: edited(bundle, verificationMaterial__publicKey=None),
    "no hint": lambda bundle: edited(bundle, verificationMaterial__publicKey__hint=None),
    "no signature": lambda bundle: edited(bundle, dsseEnvelope__signatures=[]),
    "another signature": lambda bundle: edited(bundle, dsseEnvelope__signatures=[{"sig": "AAAA", "keyid": ""}]),
    "another type": lambda bundle: edited(bundle, dsseEnvelope__payloadType="text/plain"),
    "another media type": lambda bundle: edited(bundle, mediaType="application/json"),
    "no payload": lambda bundle: edited(bundle, dsseEnvelope__payload="AAAA"),
    "changed payload": lambda bundle: edited(bundle, dsseEnvelope__payload=changed_payload(bundle)),
}


def changed_payload(bundle: bytes) -> str:
    payload = base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"])
    return base64.b64encode(payload.replace(b'"manifest.json"', b'"anything.else"')).decode()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused(
    registry: Registry, record: Record, ana: Keys, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = signature_of(record.manifest, key=ana[0])
    registry.add_signature(record, Signature(made.key, DAMAGES[damage](made.bundle)))
    assert refused(registry, record, ana[1])
    with pytest.raises(IntegrityError, match="not good"):
        sign(registry, record, key=ana[0])
    assert capsys.readouterr().out == ""


def test_a_signature_that_leaves_the_manifest_out_is_no_proof(
    registry: Registry, record: Record, ana: Keys, tmp_path: Path
) -> None:
    """A trusted key signed some other folder and told to ignore files called like ours."""
    from model_signing import hashing, signing

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text("other")
    config: Any = hashing.Config
    files = config().set_ignored_paths(paths=["manifest.json"])
    config = signing.Config
    config().set_hashing_config(files).use_elliptic_key_signer(private_key=ana[0]).sign(
        tmp_path / "model", tmp_path / "bundle"
    )
    registry.add_signature(record, Signature(PublicKey.read(ana[1]).id, (tmp_path / "bundle").read_bytes()))
    assert "over another digest" in refused(registry, record, ana[1])


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_the_curves_of_sigstore_sign(
    record: Record, tmp_path: Path, curve: Any, key_writer: Callable[..., Keys]
) -> None:
    private, public = key_writer(tmp_path / "key", ec.generate_private_key(curve))
    verify(record.manifest, signature_of(record.manifest, key=private), key=PublicKey.read(public))


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
    ],
    ids=["secp256k1", "ed25519", "rsa"],
)
def test_other_kinds_of_keys_are_refused(
    record: Record, tmp_path: Path, key: Any, key_writer: Callable[..., Keys]
) -> None:
    private, public = key_writer(tmp_path / "key", key)
    with pytest.raises(UsageError, match="cannot sign models") as error:
        signature_of(record.manifest, key=private)
    assert error.value.hint.startswith("openssl")
    with pytest.raises(UsageError, match="cannot sign models"):
        PublicKey.read(public)


def test_a_key_with_a_password(record: Record, tmp_path: Path, key_writer: Callable[..., Keys]) -> None:
    private, public = key_writer(tmp_path / "key", ec.generate_private_key(ec.SECP256R1()), password=b"open sesame")
    made = signature_of(record.manifest, key=private, password="open sesame")
    verify(record.manifest, made, key=PublicKey.read(public))
    for wrong in (None, "close"):
        with pytest.raises(UsageError):
            signature_of(record.manifest, key=private, password=wrong)


def test_files_that_are_no_keys_are_named(record: Record, ana: Keys, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key")
    for path in (tmp_path / "nothing", tmp_path / "text", ana[0]):
        with pytest.raises(UsageError) as error:
            Signers.read([path])
        assert str(path) in error.value.what
    for path in (tmp_path / "nothing", tmp_path / "text", ana[1]):
        with pytest.raises(UsageError) as error:
            signature_of(record.manifest, key=path)
        assert str(path) in error.value.what


@pytest.mark.slow
def test_the_stock_tool_checks_it_too(new_draft: Callable[..., Draft], ana: Keys, ben: Keys, tmp_path: Path) -> None:
    manifest = new_draft("one").manifest
    (tmp_path / "version").mkdir()
    (tmp_path / "version" / "manifest.json").write_bytes(manifest.to_bytes())
    (tmp_path / "bundle.json").write_bytes(signature_of(manifest, key=ana[0]).bundle)

    def says(public: Path) -> int:
        command = [sys.executable, "-m", "model_signing", "verify", "key", tmp_path / "version"]
        options = ["--signature", tmp_path / "bundle.json", "--public_key", public]
        return subprocess.run([*command, *options], capture_output=True).returncode

    assert says(ana[1]) == 0
    assert says(ben[1]) != 0
