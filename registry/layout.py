"""The drawing of the bucket. Every key is built here and nowhere else.

    registry.json                                            format, id
    t/<tenant>/blobs/sha256/<hh>/<hex>                       bytes, by content
    t/<tenant>/blobs/sha256/<hh>/<hex>~<epoch>               the same, stored while <hex> was being collected (`gc`)
    t/<tenant>/a/<adapter>/v/<INV>-<n>.json                  THE VERSION: its record. Creating this key commits it.
    t/<tenant>/a/<adapter>/d/<hex>/<n>                       finds a version by digest: a hint until the record exists
    t/<tenant>/a/<adapter>/ch/<channel>/<INV>-<seq>.json     channel log; the newest is where it points
    t/<tenant>/a/<adapter>/st/<n>/<INV>-<seq>.json           status log of a version; none: active
    t/<tenant>/a/<adapter>/ev/<n>/<INV>-<seq>.json           evaluations of a version, added after it was published
    t/<tenant>/a/<adapter>/sig/<hex>/<key>.json              signatures over a digest, by the id of the key
    t/<tenant>/log/<INV-ms>-<id>--<adapter>--<what>.json     what happened: a hint, written before each commit; empty
    t/<tenant>/intents/<publish-id>.json                     a publish under way, for the collector
    t/<tenant>/intents/<publish-id>.sealed                   how it goes on: it commits, or was given up
    t/<tenant>/intents/<publish-id>.doubted                  it was about to commit for too long (`intents`)
    t/<tenant>/intents/<publish-id>.past                     the newest version of its adapter, after that
    t/<tenant>/condemned/<epoch>.json                        a collection under way, for publishers
    t/<tenant>/condemned/<epoch>.closed                      its collector has deleted the last blob
    gone/<tenant>.json                                       a deleted tenant; the name is never issued again
    t/<tenant>/idx/<INV-ms>-<id>.json.gz                     a listing snapshot: derived, can be rebuilt
    doctor/<id>-…                                            the doctor's trials, removed again

``INV`` is 10⁹ − n, zero padded: object stores list ascending only, so the newest sorts first, and "the newest" is one
LIST of one key. Prefixes end in ``/``: ``acme/bot`` never matches ``acme/bot2``. Blobs are per tenant: access and
deletion by prefix, and nobody learns what another tenant stores.

Names come in as `AdapterName` or checked tenant and channel names, so no key leaves its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress

from adapterhub.errors import IntegrityError, InvalidName
from adapterhub.refs import AdapterName, check_channel, check_tenant

REGISTRY = "registry.json"
TENANTS = "t/"
TRIALS = "doctor/"
GONE = "gone/"

_NUMBER = re.compile(r"[/-]([1-9][0-9]*)(?:\.json)?$")
_EVENT = re.compile(r"([0-9]{13})-[0-9a-f]{32}--((?:[^-/]|-(?!-))+)--([^/]+)\.json")
_TOP = 10**9  # above every version and sequence number
_TOP_MS = 10**13  # above every time in milliseconds until the year 2286


def tenant(tenant: str) -> str:
    """Prefix of all that a tenant has."""
    check_tenant(tenant)
    return f"{TENANTS}{tenant}/"


def gone(tenant: str) -> str:
    check_tenant(tenant)
    return f"{GONE}{tenant}.json"


def blobs(tenant: str) -> str:
    """Prefix."""
    check_tenant(tenant)
    return f"t/{tenant}/blobs/sha256/"


def blob(tenant: str, sha256: str, epoch: str = "") -> str:
    """``epoch``: of the collection during which these bytes were stored again."""
    return f"{blobs(tenant)}{sha256[:2]}/{sha256}" + (f"~{epoch}" if epoch else "")


def blob_of(key: str) -> tuple[str, str]:
    """The sha256 of a blob's key, and its epoch or nothing."""
    sha256, _, epoch = key.rpartition("/")[2].partition("~")
    return sha256, epoch


def intents(tenant: str) -> str:
    """Prefix; publishes under way, in the order of their ids."""
    check_tenant(tenant)
    return f"t/{tenant}/intents/"


def intent(tenant: str, publish_id: str) -> str:
    return f"{intents(tenant)}{publish_id}.json"


def seal(tenant: str, publish_id: str) -> str:
    return f"{intents(tenant)}{publish_id}.sealed"


def doubt(tenant: str, publish_id: str) -> str:
    return f"{intents(tenant)}{publish_id}.doubted"


def past(tenant: str, publish_id: str) -> str:
    return f"{intents(tenant)}{publish_id}.past"


def seal_of(intent: str) -> str:
    """The key of the seal beside the key of an intent."""
    return intent.removesuffix(".json") + ".sealed"


def collections(tenant: str) -> str:
    """Prefix; collections under way, oldest first."""
    check_tenant(tenant)
    return f"t/{tenant}/condemned/"


def condemned(tenant: str, epoch: str) -> str:
    return f"{collections(tenant)}{epoch}.json"


def closed(tenant: str, epoch: str) -> str:
    return f"{collections(tenant)}{epoch}.closed"


def adapters(tenant: str) -> str:
    """Prefix; its folders are adapter names."""
    check_tenant(tenant)
    return f"t/{tenant}/a/"


def adapter_in(tenant: str, key: str) -> str:
    """The adapter's part of a key below `adapters`."""
    return key.removeprefix(adapters(tenant)).partition("/")[0]


def adapter_names(tenant: str, folders: Iterable[str]) -> list[AdapterName]:
    """Without what somebody put there by hand (``.DS_Store``)."""
    names = []
    for folder in folders:
        with suppress(InvalidName):
            names.append(AdapterName(tenant, folder))
    return names


def adapter(name: AdapterName) -> str:
    """Prefix of all that one adapter has."""
    return f"{adapters(name.tenant)}{name.adapter}/"


def versions(name: AdapterName) -> str:
    """Prefix; newest version first."""
    return f"t/{name.tenant}/a/{name.adapter}/v/"


def version(name: AdapterName, number: int) -> str:
    return f"{versions(name)}{_newest_first(number)}.json"


def digests(name: AdapterName, digest: str) -> str:
    """Prefix; its last parts are the numbers of versions that may have this ``sha256:`` digest."""
    return f"t/{name.tenant}/a/{name.adapter}/d/{digest.removeprefix('sha256:')}/"


def digest(name: AdapterName, digest: str, number: int) -> str:
    return f"{digests(name, digest)}{number}"


def channels(name: AdapterName) -> str:
    """Prefix; its folders are channel names."""
    return f"t/{name.tenant}/a/{name.adapter}/ch/"


def moves(name: AdapterName, channel: str) -> str:
    """Prefix; newest move first."""
    check_channel(channel)
    return f"{channels(name)}{channel}/"


def statuses(name: AdapterName) -> str:
    """Prefix; its folders are the numbers of versions whose status was ever changed."""
    return f"t/{name.tenant}/a/{name.adapter}/st/"


def status_changes(name: AdapterName, number: int) -> str:
    """Prefix; newest change first."""
    return f"{statuses(name)}{number}/"


def measured(name: AdapterName) -> str:
    """Prefix; its folders are the numbers of versions that have evaluations."""
    return f"t/{name.tenant}/a/{name.adapter}/ev/"


def evaluations(name: AdapterName, number: int) -> str:
    """Prefix; newest evaluation of a version first."""
    return f"{measured(name)}{number}/"


def signatures(name: AdapterName, digest: str) -> str:
    """Prefix; its last parts are the ids of the keys that verify."""
    return f"t/{name.tenant}/a/{name.adapter}/sig/{digest.removeprefix('sha256:')}/"


def signature(name: AdapterName, digest: str, key: str) -> str:
    return f"{signatures(name, digest)}{key}.json"


def numbered(prefix: str, seq: int) -> str:
    """An entry of the log below ``prefix``."""
    return f"{prefix}{_newest_first(seq)}.json"


def events(tenant: str) -> str:
    """Prefix; newest event first."""
    check_tenant(tenant)
    return f"t/{tenant}/log/"


def event(name: AdapterName, milliseconds: int, identity: str, what: str) -> str:
    """``what`` is words with single spaces: "channel prod". No name can hold ``--``."""
    return f"{events_at(name.tenant, milliseconds)}-{identity}--{name.adapter}--{what.replace(' ', '--')}.json"


def event_of(tenant: str, key: str) -> tuple[AdapterName, str, int] | None:
    """Adapter, what, and milliseconds since 1970 of an event's key; None for a file that somebody put there."""
    found = _EVENT.fullmatch(key.removeprefix(events(tenant)))
    if found is None:
        return None
    try:
        return AdapterName(tenant, found[2]), found[3].replace("--", " "), _TOP_MS - int(found[1])
    except InvalidName:
        return None


def events_at(tenant: str, milliseconds: int) -> str:
    """What keys of events at this time start with; newer events sort before it, older ones after."""
    return f"{events(tenant)}{_TOP_MS - milliseconds:013d}"


def snapshots(tenant: str) -> str:
    """Prefix; newest listing snapshot first."""
    check_tenant(tenant)
    return f"t/{tenant}/idx/"


def snapshot(tenant: str, milliseconds: int, identity: str) -> str:
    return f"{snapshots(tenant)}{_TOP_MS - milliseconds:013d}-{identity}.json.gz"


def trial(identity: str, name: str) -> str:
    return f"{TRIALS}{identity}-{name}"


def number_of(key: str) -> int:
    """The version or sequence number at the end of a key. Raises IntegrityError for a file that is none of ours."""
    found = _NUMBER.search(key)
    if found is None:
        raise IntegrityError(f"{key} is no part of a registry", why="somebody put it there by hand", hint="remove it")
    return int(found[1])


def key_of(signature: str) -> str:
    """The id of the public key at the end of a signature's key."""
    return signature.rpartition("/")[2].removesuffix(".json")


def _newest_first(number: int) -> str:
    return f"{_TOP - number:09d}-{number}"
