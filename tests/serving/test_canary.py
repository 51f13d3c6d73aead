"""Sticky shares of a channel."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapterhub.manifest import Record
from adapterhub.refs import AdapterRef
from adapterhub.registry.base import Version
from adapterhub.serving.rollout.canary import Share, caller_of, pick

PROD = AdapterRef.parse("acme/support@prod")
CALLERS = [f"acme\0user-{n}" for n in range(10_000)]


@pytest.fixture
def versions(publish: Callable[..., Record]) -> list[Version]:
    return [Version(publish()) for _ in range(3)]


def drawn(shares: list[Share], ref: AdapterRef = PROD) -> list[int]:
    return [pick(shares, ref=ref, caller=caller).record.version for caller in CALLERS]


def test_five_percent_of_ten_thousand_and_nobody_flips(versions: list[Version]) -> None:
    stable, candidate, _ = versions
    shares = [(stable, 95), (candidate, 5)]
    first = drawn(shares)
    assert abs(first.count(2) / len(first) - 0.05) < 0.007
    assert drawn(list(reversed(shares))) == first


def test_as_the_weight_grows_callers_only_move_in(versions: list[Version]) -> None:
    stable, candidate, _ = versions
    before: set[str] = set()
    for weight in (1, 5, 25, 50, 51, 75, 99):
        now = {c for c, v in zip(CALLERS, drawn([(stable, 100 - weight), (candidate, weight)]), strict=True) if v == 2}
        assert before < now
        assert abs(len(now) / len(CALLERS) - weight / 100) < 0.02
        before = now


def test_another_candidate_or_channel_draws_others(versions: list[Version]) -> None:
    stable, candidate, other = versions
    first = drawn([(stable, 80), (candidate, 20)])
    second = drawn([(stable, 80), (other, 20)])
    both = sum(a == 2 and b == 3 for a, b in zip(first, second, strict=True))
    assert abs(both / len(CALLERS) - 0.04) < 0.01, "independent: a fifth of a fifth"
    assert drawn([(stable, 80), (candidate, 20)], AdapterRef.parse("acme/support@beta")) != first


def test_three_versions_each_get_their_share(versions: list[Version]) -> None:
    got = drawn(list(zip(versions, (70, 20, 10), strict=True)))
    for number, share in ((1, 0.7), (2, 0.2), (3, 0.1)):
        assert abs(got.count(number) / len(got) - share) < 0.02


def test_one_version_gets_everybody(versions: list[Version]) -> None:
    assert set(drawn([(versions[1], 5)])) == {2}


@pytest.mark.parametrize(
    ("body", "caller"),
    [
        ({}, "acme\0key-1"),
        ({"user": "ana"}, "acme\0ana"),
        ({"user": 7}, "acme\0key-1"),
        ({"safety_identifier": "ben", "user": "ana"}, "acme\0ben"),
        ({"metadata": {"user_id": "cleo"}}, "acme\0cleo"),
        ({"metadata": "cleo", "user": ""}, "acme\0key-1"),
    ],
)
def test_a_caller_is_the_end_user_where_one_is_named(body: dict[str, object], caller: str) -> None:
    assert caller_of(body, key="key-1", tenant="acme") == caller
