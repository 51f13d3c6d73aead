"""Keys: what is stored of them, whom they stand for, and when they open nothing."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from adapterhub.errors import Unauthorized, UsageError
from adapterhub.refs import AdapterName
from adapterhub.serving.tenants.access import Access
from adapterhub.serving.tenants.callers import SINGLE_USER, Caller, Limits
from adapterhub.serving.tenants.keys import Directory, Key, Minted, Share, Tenant, mint, presented_key

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
DESK = AdapterName.parse("globex/desk")


def directory(minted: Minted, **changed: object) -> Directory:
    key = Key(minted.id, "acme", minted.hash, scopes=frozenset({"inference"}), limits=Limits(concurrency=2))
    acme = Tenant("acme", base=False, weight=2.0, limits=Limits(concurrency=8))
    return Directory(tenants=[acme], keys=[replace(key, **changed)], shares=[Share(DESK, "acme")])  # type: ignore[arg-type]


def test_a_key_stands_for_its_tenant() -> None:
    minted = mint()
    caller = directory(minted).caller(minted.text, now=NOW)
    assert (caller.tenant, caller.key, caller.weight, caller.base) == ("acme", minted.id, 2.0, False)
    assert caller.may_use(AdapterName.parse("acme/x")) and caller.may_use(DESK)
    assert not caller.may_use(AdapterName.parse("globex/other"))
    assert caller.owns(AdapterName.parse("acme/x")) and not caller.owns(DESK)
    assert caller.least("concurrency") == 2


def test_the_text_is_not_kept_and_not_shown() -> None:
    minted = mint()
    key = Key(minted.id, "acme", minted.hash, scopes=frozenset())
    assert minted.text.rsplit("_", 1)[1] not in repr(minted) + repr(key)
    assert len({mint().text for _ in range(100)}) == 100


def test_what_opens_nothing() -> None:
    minted = mint()
    here = directory(minted)
    wrong = minted.text[:-1] + ("a" if minted.text[-1] != "a" else "b")
    said = set()
    for presented in (
        wrong,
        mint().text,
        "x",
        "ah_",
        minted.text + "\n",
        minted.text.upper(),
        "\xff",
        f" {minted.text}",
    ):
        with pytest.raises(Unauthorized) as refusal:
            here.caller(presented, now=NOW)
        said.add(str(refusal.value))
    assert said == {"the API key is not valid"}
    for presented in (None, ""):
        with pytest.raises(Unauthorized, match="needed"):
            here.caller(presented, now=NOW)


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"revoked": "2026-11-25T11:59:59+00:00"}, "revoked"), ({"expires": "2026-11-25T12:00:00+00:00"}, "expired")],
)
def test_a_key_that_ended_says_so_to_its_holder_alone(changed: dict[str, str], why: str) -> None:
    minted = mint()
    ended = directory(minted, **changed)
    with pytest.raises(Unauthorized, match=why):
        ended.caller(minted.text, now=NOW)
    with pytest.raises(Unauthorized) as refusal:
        ended.caller(minted.text[:-4] + "0000", now=NOW)
    assert why not in str(refusal.value)


def test_where_a_key_may_stand() -> None:
    assert presented_key([(b"authorization", b"Bearer k")]) == "k"
    assert presented_key([(b"authorization", b"bearer  k ")]) == "k"
    assert presented_key([(b"x-api-key", b"k"), (b"authorization", b"Bearer k")]) == "k"
    assert presented_key([(b"accept", b"*/*")]) is None
    assert presented_key([(b"authorization", b"Basic k")]) != "k"
    with pytest.raises(Unauthorized, match="two"):
        presented_key([(b"x-api-key", b"k"), (b"authorization", b"Bearer l")])


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_a_limit_is_a_positive_number(value: object) -> None:
    with pytest.raises(UsageError, match="requests-per-minute"):
        Limits(requests_per_minute=value)  # type: ignore[arg-type]
    assert Limits(queue=0).queue == 0


class TestAccess:
    pytestmark = pytest.mark.anyio

    async def test_without_keys_everybody_is_the_single_user(self) -> None:
        assert Access().caller([]) is SINGLE_USER

    async def test_what_is_known_goes_on_within_a_bound_and_no_longer(self) -> None:
        from adapterhub.errors import StorageError

        minted, seconds, away = mint(), [0.0], [False]

        async def read() -> Directory:
            if away[0]:
                raise StorageError("away")
            return directory(minted)

        access = Access(read, bound=300, clock=lambda: seconds[0])
        headers = [(b"authorization", b"Bearer " + minted.text.encode())]
        with pytest.raises(StorageError):  # never looked
            access.caller(headers)
        await access.look()
        away[0] = True
        with pytest.raises(StorageError):
            await access.look()
        seconds[0] = 300
        assert isinstance(access.caller(headers), Caller)
        seconds[0] = 300.1
        with pytest.raises(StorageError):
            access.caller(headers)
        away[0] = False
        await access.look()
        assert access.caller(headers).tenant == "acme"
