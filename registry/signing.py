"""Signatures over a version's digest, with keys: OpenSSF Model Signing makes and checks them, no crypto of our own.

What is signed is the content manifest, as a model of one file ``manifest.json``: its sha256 is the version's digest, so
a signature can be checked before a byte of the weights is fetched, and it holds in every registry that the version is
copied to. It is a sigstore bundle, which the stock ``model_signing verify key`` reads too (decision record 0023).
"""

from __future__ import annotations

import hashlib
import tempfile
from base64 import b64decode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub.errors import IntegrityError, Untrusted, UsageError
from adapterhub.manifest import Manifest, Record, parse_json
from adapterhub.registry.base import Registry, Signature

MANIFEST = "manifest.json"  # what the signed file is called

_CURVES = frozenset({"secp256r1", "secp384r1", "secp521r1"})
_WHY_CURVES = "sigstore takes elliptic-curve keys on P-256, P-384 and P-521"
_NEW_KEY = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
_PUBLIC = "openssl ec -in key.pem -pubout -out key.pub"
_BROKEN = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)  # what a mangled bundle raises


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked with."""

    pem: bytes
    path: Path  # where it was read, for people

    @property
    def id(self) -> str:
        """What sigstore bundles name it by: the sha256 of its PEM text, 64 hex digits."""
        return hashlib.sha256(self.pem).hexdigest()

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """Raises UsageError for what is no public key, or one of a kind that signs no models."""
        from cryptography.hazmat.primitives import serialization

        data = _read(path)
        try:
            key = serialization.load_pem_public_key(data)
        except ValueError as error:
            raise UsageError(f"{path} is no public key", why=str(error), hint=_PUBLIC) from error
        return cls(_pem(key, path), path)


@dataclass
class Signers:
    """The keys of which one must have signed whatever is used; without keys anything goes."""

    keys: tuple[PublicKey, ...] = ()
    _checked: set[str] = field(default_factory=set, repr=False)  # digests: a signature that is good stays good

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Signers:
        """Raises UsageError: a key that cannot be read must not mean that no signature is needed."""
        return cls(tuple(PublicKey.read(path) for path in paths))

    def require(self, registry: Registry, record: Record) -> None:
        """Raises Untrusted for a version that none of the keys signed. Asks the registry once for each digest."""
        if self.keys and record.digest not in self._checked:
            self.check(record, registry.signatures(record))

    def check(self, record: Record, signatures: Sequence[Signature]) -> None:
        """Raises Untrusted where none of ``signatures`` is good."""
        if not self.keys:
            return
        wanted = {key.id: key for key in self.keys}
        reasons = []
        for signature in signatures:
            key = wanted.get(signature.key)
            if key is None:
                reasons.append(f"signed with another key, {signature.key[:12]}…")
                continue
            try:
                verify(record.manifest, signature, key=key)
            except Untrusted as error:
                reasons.append(error.why)
                continue
            self._checked.add(record.digest)
            return
        raise Untrusted(
            f"{record.ref} is not signed with a key that is required here",
            why="; ".join(reasons) or "nobody signed it",
            hint=f"ah signatures {record.ref}",
        )


def sign(registry: Registry, record: Record, *, key: Path, password: str | None = None) -> Signature:
    """Sign a published version and store the signature beside it. Returns what is stored.

    Raises UsageError for a key that cannot sign, IntegrityError where the registry holds a broken signature of it.
    """
    made = signature_of(record.manifest, key=key, password=password)
    registry.add_signature(record, made)
    stored = next((s for s in registry.signatures(record) if s.key == made.key), None)
    if stored is None:
        raise IntegrityError(f"the registry lost the signature of {record.ref} that it was just given")
    try:
        verify(record.manifest, stored, key=PublicKey(_public_pem(key, password), key))
    except Untrusted as error:
        raise IntegrityError(
            f"the registry holds a signature of {record.ref} by this key that is not good",
            why=error.why,
            hint="remove it from the registry, then sign again",
        ) from error
    return stored


def signature_of(manifest: Manifest, *, key: Path, password: str | None = None) -> Signature:
    """A signature over a manifest, stored nowhere yet. Raises UsageError for a key that cannot sign."""
    from model_signing import hashing, signing

    _public_pem(key, password)
    with tempfile.TemporaryDirectory(prefix="ah-sign-") as folder:
        model = _as_model(manifest, Path(folder))
        bundle = Path(folder) / "bundle.json"
        files = _new(hashing.Config).set_ignored_paths(paths=(), ignore_git_paths=False)
        signer = _new(signing.Config).set_hashing_config(files)
        signer.use_elliptic_key_signer(private_key=key, password=_bytes(password)).sign(model, bundle)
        data = bundle.read_bytes()
    return Signature(_claims(data)[0], data)


def verify(manifest: Manifest, signature: Signature, *, key: PublicKey) -> None:
    """Raises Untrusted, whose ``why`` says what is wrong with the signature."""
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    try:
        hint, resources = _claims(signature.bundle)
    except (IntegrityError, *_BROKEN) as error:
        raise _refused("is damaged", key) from error
    if hint != key.id:
        raise _refused("names another key inside", key)
    signed = _signed(manifest)
    with tempfile.TemporaryDirectory(prefix="ah-verify-") as folder:
        model = _as_model(manifest, Path(folder))
        public, bundle = Path(folder) / "key.pub", Path(folder) / "bundle.json"
        public.write_bytes(key.pem)
        bundle.write_bytes(signature.bundle)
        try:
            _new(verifying.Config).use_elliptic_key_verifier(public_key=public).verify(model, bundle)
        except (InvalidSignature, *_BROKEN) as error:
            changed = "is over another digest" if resources != signed else "is damaged"
            raise _refused(changed, key) from error
    if resources != signed:  # a signer may leave files out: then it says nothing of ours
        raise _refused("is over another digest", key)


def flaw(manifest: Manifest, signature: Signature) -> str:
    """What is wrong with a signature by its own account, before any key is asked; empty where nothing is."""
    try:
        hint, resources = _claims(signature.bundle)
    except (IntegrityError, *_BROKEN):
        return "it is damaged"
    if hint != signature.key:
        return "it names another key inside"
    return "" if resources == _signed(manifest) else "it is over another digest"


def _signed(manifest: Manifest) -> list[Any]:
    """What a signature of this manifest speaks of."""
    return [{"name": MANIFEST, "algorithm": "sha256", "digest": manifest.digest.removeprefix("sha256:")}]


def _claims(bundle: bytes) -> tuple[str, list[Any]]:
    """Which key and which files a bundle speaks of, by its own account."""
    raw = parse_json(bundle, what="a signature")
    payload = parse_json(b64decode(raw["dsseEnvelope"]["payload"], validate=True), what="a signature's payload")
    return str(raw["verificationMaterial"]["publicKey"]["hint"]), list(payload["predicate"]["resources"])


def _as_model(manifest: Manifest, folder: Path) -> Path:
    """A folder as model signing sees a model, called after the digest and the same wherever it is made."""
    model = folder / manifest.digest.removeprefix("sha256:")
    model.mkdir()
    (model / MANIFEST).write_bytes(manifest.to_bytes())
    return model


def _public_pem(private: Path, password: str | None) -> bytes:
    from cryptography.hazmat.primitives import serialization

    data = _read(private)
    try:
        key = serialization.load_pem_private_key(data, _bytes(password))
    except TypeError as error:  # says which of the two it is
        raise UsageError(f"{private} cannot be opened", why=str(error), hint="set or unset AH_KEY_PASSWORD") from error
    except ValueError as error:
        raise UsageError(f"{private} is no private key", why=str(error), hint=_NEW_KEY) from error
    return _pem(key.public_key(), private)


def _pem(public_key: Any, path: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if not isinstance(public_key, ec.EllipticCurvePublicKey) or public_key.curve.name not in _CURVES:
        raise UsageError(f"{path} cannot sign models", why=_WHY_CURVES, hint=_NEW_KEY)
    return public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read", why=error.strerror or str(error)) from error


def _new(config: Any) -> Any:
    return config()  # the constructors of model_signing are not typed


def _bytes(password: str | None) -> Any:
    # model_signing declares text and hands it on to what wants bytes (1.1.1)
    return password.encode() if password is not None else None


def _refused(why: str, key: PublicKey) -> Untrusted:
    return Untrusted("a signature is not good", why=f"the signature with the key {key.id[:12]}… {why}")
