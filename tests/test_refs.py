from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import InvalidName
from adapterhub.refs import MAX_VERSION, RESERVED_ADAPTERS, AdapterName, AdapterRef, check_channel

HOSTILE = r"(?!(con|prn|aux|nul|com[1-9]|lpt[1-9])(\.|$))(?!.*\.(git|ipynb)$)"  # to Windows or the Hub
tenants = st.from_regex(r"[a-z0-9](-?[a-z0-9]){0,20}", fullmatch=True).filter(re.compile(HOSTILE).match)
adapters = (
    st.from_regex(r"[a-z0-9]([-_.]?[a-z0-9]){0,20}", fullmatch=True)
    .filter(lambda a: a not in RESERVED_ADAPTERS)
    .filter(re.compile(HOSTILE).match)
)
channels = st.from_regex(r"[a-z]([-_.]?[a-z0-9]){0,20}", fullmatch=True).filter(re.compile(HOSTILE).match)
selectors = (
    st.integers(1, MAX_VERSION) | st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True) | channels | st.just("latest")
)


@given(tenants, adapters, selectors)
def test_what_is_printed_is_read_back(tenant: str, adapter: str, selector: int | str) -> None:
    ref = AdapterName(tenant, adapter).at(selector)
    assert AdapterRef.parse(str(ref)) == ref
    assert ref.selector == str(selector)


@given(st.text(max_size=80))
def test_any_text_is_a_safe_reference_or_refused(text: str) -> None:
    try:
        ref = AdapterRef.parse(text)
    except InvalidName as error:
        assert error.what.isprintable()
        return
    for part in (ref.name.tenant, ref.name.adapter):
        assert part not in {"", ".", ".."}
        assert not set(part) & set("/\\\0@: \n")
        assert part == part.lower()


def test_a_bare_name_means_latest() -> None:
    assert AdapterRef.parse("acme/support") == AdapterRef.parse("acme/support@latest")
    assert not AdapterRef.parse("acme/support").is_fixed
    assert AdapterRef.parse("acme/support@3").is_fixed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "acme",
        "acme/",
        "/support",
        "Acme/support",
        "acme/Support",
        "../x/support",
        "acme/..",
        "acme/../../etc/passwd",
        "/etc/passwd",
        "acme/a/b",
        "acme\\x/support",
        "acme/sup\0port",
        "acme/sup\nport",
        "-acme/support",
        "acme-/support",
        "ac--me/support",
        "acme/su..port",
        "acme/support.",
        "acme/ support",
        "acmé/support",
        "a" * 64 + "/support",
        "acme/" + "a" * 64,
        "acme/" + "a" * 100_000,
        "acme/support@",
        "acme/support@0",
        "acme/support@01",
        "acme/support@-1",
        "acme/support@1000000000",
        "acme/support@3x",
        "acme/support@sha256:12",
        "acme/support@sha256:" + "G" * 64,
        "acme/support@Prod",
        "acme/support@a@b",
        "acme/base",
        "acme/image",
        "con/support",
        "acme/nul",
        "acme/lpt1.v2",
        "acme/support@aux",
        "acme/support.git",
        "acme/notes.ipynb",
    ],
)
def test_names_outside_the_grammar_are_refused(text: str) -> None:
    with pytest.raises(InvalidName) as refused:
        AdapterRef.parse(text)
    assert len(refused.value.what) < 200


def test_latest_cannot_be_set() -> None:
    with pytest.raises(InvalidName, match="computed"):
        check_channel("latest")
    check_channel("latest", allow_latest=True)


def test_a_reference_has_exactly_one_selector() -> None:
    name = AdapterName("acme", "support")
    with pytest.raises(InvalidName):
        AdapterRef(name)
    with pytest.raises(InvalidName):
        AdapterRef(name, version=1, channel="prod")
