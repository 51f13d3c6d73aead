"""Addresses of registries on S3: what they say, and what they may not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import UsageError
from adapterhub.registry import open_store
from adapterhub.registry.s3.address import Address, parse

part = st.text(alphabet="ab0._- ü", min_size=1, max_size=5).filter(lambda text: text not in {".", ".."})
words = st.text(alphabet="abc-", min_size=1, max_size=8)
addresses = st.builds(
    Address,
    bucket=st.from_regex(r"[a-z0-9][a-z0-9.-]{1,20}[a-z0-9]", fullmatch=True),
    prefix=st.lists(part, max_size=3).map("/".join),
    endpoint=st.sampled_from(["", "http://127.0.0.1:9000", "https://minio.example", "https://[::1]:9000/s3"]),
    region=st.just("") | words,
    profile=st.just("") | words,
    timeout=st.sampled_from([None, 0.5, 5.0, 3600.0]),
    path_style=st.sampled_from([None, True, False]),
    single_writer=st.booleans(),
)


@given(addresses)
def test_the_url_opens_the_same_registry(address: Address) -> None:
    assert parse(address.url) == address
    assert address.own(address.key("t/acme/x")) == "t/acme/x"


def test_a_plain_address() -> None:
    assert parse("s3://models") == Address("models")
    assert parse("s3://models/") == Address("models")
    assert parse("s3://models/team/a/") == Address("models", "team/a")
    assert Address("models", "team").key("t/x") == "team/t/x"
    assert Address("models").key("t/x") == "t/x"
    assert open_store("s3://models/team?region=eu-west-1").url == "s3://models/team?region=eu-west-1"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("s3://a", "no bucket"),
        ("s3://bu cket/x", "no bucket"),
        ("s3://key:secret@models/x", "no credentials"),
        ("s3://models/a//b", "prefix"),
        ("s3://models/../b", "prefix"),
        ("s3://models?zone=1", "no setting"),
        ("s3://models?endpoint=minio.example", "no endpoint"),
        ("s3://models?endpoint=ftp://minio.example", "no endpoint"),
        ("s3://models?endpoint=https://key:secret@minio.example", "no endpoint"),
        ("s3://models?single_writer=yes", "neither true nor false"),
        ("s3://models?timeout=0", "is no time"),
        ("s3://models?timeout=5s", "is no time"),
        ("s3://models?timeout=nan", "is no time"),
        ("s3://models?timeout=9999", "is no time"),
    ],
)
def test_what_is_no_address_says_why(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        parse(url)
    assert refused.value.hint
    assert "secret" not in str(refused.value)
