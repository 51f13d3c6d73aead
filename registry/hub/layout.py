"""Where things are on the Hub: one model repository an adapter. No I/O.

<org>/<tenant>.<adapter>      the repository, private
  tag v<n>                    THE VERSION: its commit. Creating this tag is the commit point
    adapter_config.json, …    the files of its manifest, at the top, where PEFT looks for them
    adapterhub.json           its record
    README.md                 the model card; a README of the version itself is adapterhub/README.md
  branch main                 the newest version, for those who name no revision
  branch ah-channels          log.json: channels, statuses, evaluations, signatures
  branch ah-staging-<ms>-<id> a publish under way, since then
<org>/adapterhub              gone/<tenant>.json: names of deleted tenants, never issued again
"""

from __future__ import annotations

import re

from adapterhub.errors import InvalidName, Unsupported, UsageError
from adapterhub.manifest import Manifest
from adapterhub.refs import MAX_VERSION, AdapterName

MAIN = "main"
LOG_BRANCH = "ah-channels"
LOG = "log.json"
RECORD = "adapterhub.json"
CARD = "README.md"
KEPT = frozenset({".gitattributes", CARD, RECORD})  # of a tree, beside the files of its manifest
BOOK = "adapterhub"  # no tenant's repository: theirs have a dot

_FOLDER = "adapterhub/"
_MAX_REPOSITORY = 96  # characters of a name, the Hub's own limit
_ORG = re.compile(r"[A-Za-z0-9](?:[-_.]?[A-Za-z0-9])*")
_STAGING = re.compile(r"ah-staging-([0-9]{13})-[0-9a-f]{32}")
_TAG = re.compile(r"v([1-9][0-9]{0,8})")


def check_org(url: str) -> str:
    """The organisation or user of ``hf://org``. Raises UsageError."""
    org = url.partition("://")[2].rstrip("/")
    if not _ORG.fullmatch(org) or len(org) > _MAX_REPOSITORY:
        raise UsageError(
            f"{url!a} is no registry on the Hub",
            why="after hf:// stands one organisation or user",
            hint="--registry hf://acme-models",
        )
    return org


def repository(org: str, name: AdapterName) -> str:
    """``org/tenant.adapter``. Raises InvalidName for what is too long for the Hub."""
    short = f"{name.tenant}.{name.adapter}"
    if len(short) > _MAX_REPOSITORY:
        raise InvalidName(
            f"{name} is too long for the Hub",
            why=f"{short} has {len(short)} characters, a repository's name at most {_MAX_REPOSITORY}",
            hint="choose a shorter adapter name",
        )
    return f"{org}/{short}"


def adapter_of(repo: str) -> AdapterName | None:
    """Whose repository it is; None for one that no adapter can have."""
    tenant, _, adapter = repo.partition("/")[2].partition(".")
    try:
        return AdapterName(tenant, adapter)
    except InvalidName:
        return None


def tag(number: int) -> str:
    return f"v{number}"


def number_of(name: str) -> int | None:
    """The version that a tag stands for; None for a tag of somebody else."""
    found = _TAG.fullmatch(name)
    return int(found[1]) if found and int(found[1]) <= MAX_VERSION else None


def staging(publish_id: str, milliseconds: int) -> str:
    """The branch of a publish that began then (since 1970)."""
    return f"ah-staging-{milliseconds:013d}-{publish_id}"


def staged_at(branch: str) -> int | None:
    """Milliseconds since 1970; None for a branch that is no publish's."""
    found = _STAGING.fullmatch(branch)
    return int(found[1]) if found else None


def place(path: str) -> str:
    """Where a file of a manifest is in the repository: ``README.md`` is the Hub's own card."""
    return _FOLDER + CARD if path == CARD else path


def check_files(manifest: Manifest) -> None:
    """Raises Unsupported for files whose place in a repository is taken, or that git takes for its own."""
    ours = {".gitattributes", ".gitignore", ".gitmodules", ".git", RECORD}
    for file in manifest.files:
        if file.path.startswith(_FOLDER) or any(part.lower() in ours for part in file.path.split("/")):
            raise Unsupported(
                f"{file.path!a} cannot be published to the Hub",
                why="a file of that name means something else in a repository there",
                hint="publish it to a folder or a bucket, or rename the file",
            )


def gone(tenant: str) -> str:
    """In `BOOK`: what is left of a deleted tenant."""
    return f"gone/{tenant}.json"
